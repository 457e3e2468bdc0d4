"""Tells when a contrastive training has collapsed."""

import math
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from ..zoo.functional.feature_rank import gram
from .feature_rank import rank_over_processes
from .features import FeatureObserver, Features, batch_features, log_score
from .guards import others, refuse

_CURE = (
    "warm the learning rate up, lower it or the weight decay, then try a larger batch or another temperature, and look at what "
    "augmentation leaves of the samples"
)


class CollapseWatch(FeatureObserver):
    """Warns, or ends the training, when features have collapsed to the same for all samples, from which a contrastive loss cannot recover.

    It watches two signs, of which a module may give only one:

    - The loss. If all features are the same, that of an anchor among R rows is log(R - 1) whatever the temperature (`supcon_loss`). The
      mean training loss of each epoch, divided by this value, is logged as `train/collapse_ratio`; a collapsed training stays at 1.00.
      The value is the argument, or else the module's attribute `collapsed_loss`, read after every step: a number, a scalar tensor,
      which is read without waiting for the device, or None before the first step.
    - The features. Their effective rank in validation is logged as `val/feature_rank`, with `features="forward"` followed by `_forward`,
      unless `FeatureRank` does so; it falls to 1 where all features are the same up to a factor.

    A sign that holds for `patience` epochs, or validations, in a row gives one warning in a fit, which names the cure. Losses
    count for the whole epoch and all processes, steps whose loss is not finite are left out. With several validation loaders, the first
    one counts; the sanity check counts nothing. The counts go on when `fit` resumes; after a resume in the middle of an epoch of several
    processes, the losses of the first process stand for what went before.

    Cost: a sum a step; the validated samples are encoded once more, once for all callbacks that look at features, and the eigenvalues of
    a D x D matrix. Composes with every callback; only one in a trainer. It does nothing in `validate` and `test`.

    Args:
        patience: epochs, or validations, in a row.
        tolerance: how far from 1 the ratio of losses may be to count as stuck.
        collapsed_loss: the loss of collapsed features, if the module does not tell; log(R - 1), times the factor that a loss may have.
        min_rank: rank under which features count as collapsed; 0 is off.
        min_share: share of the highest rank so far under which they do; 0 is off. For training without labels: with labels, features
            may well fall to as many directions as there are classes.
        features: whose rank is watched: "encode" for `pl_module.encode(x)`, or "forward".
        every_n_epochs: look at features in the first validated epoch (also after a resume), every n-th one and the last.
        stop: also end the training.

    Raises:
        ValueError: if a setting is out of range.
        MisconfigurationException: at the start, if there is neither a `collapsed_loss` nor features that are validated.

    Example:
        >>> trainer = Trainer(callbacks=[CollapseWatch(stop=True)])

    Source:
        Khosla et al., "Supervised Contrastive Learning", NeurIPS 2020, equation 2, of equal features; Roy & Vetterli, "The
        Effective Rank: A Measure of Effective Dimensionality", EUSIPCO 2007.
    """

    def __init__(
        self,
        patience: int = 3,
        tolerance: float = 0.01,
        collapsed_loss: float | None = None,
        min_rank: float = 1.5,
        min_share: float = 0.0,
        features: Features = "encode",
        every_n_epochs: int = 1,
        stop: bool = False,
    ) -> None:
        super().__init__(features, every_n_epochs)
        if patience < 1:
            raise ValueError(f"patience must be at least 1, got {patience}")
        if not 0 < tolerance < 1:
            raise ValueError(f"tolerance must lie between 0 and 1, got {tolerance}")
        if collapsed_loss is not None and not (collapsed_loss > 0 and math.isfinite(collapsed_loss)):
            raise ValueError(f"collapsed_loss must be a number above 0, log(R - 1) of R rows, got {collapsed_loss}")
        if not (min_rank >= 0 and math.isfinite(min_rank)):
            raise ValueError(f"min_rank must be a rank, or 0 for none, got {min_rank}")
        if not 0 <= min_share < 1:
            raise ValueError(f"min_share must be a share of the highest rank in [0, 1), got {min_share}")
        self.patience = patience
        self.tolerance = tolerance
        self.collapsed_loss = collapsed_loss
        self.min_rank = min_rank
        self.min_share = min_share
        self.stop = stop
        self._reset()

    def _reset(self) -> None:
        self._watches_loss = self._watches_rank = False
        # For how many epochs and validations in a row the signs have held.
        self._stuck = self._low = 0
        self._best_rank = 0.0
        # Sums over the steps of this epoch, of the loss and of what it would be.
        self._loss: Tensor | float = 0.0
        self._collapsed: Tensor | float = 0.0
        # Signs that were told in this fit.
        self._told: set[str] = set()
        self.begin()

    @property
    def state_key(self) -> str:
        return type(self).__qualname__

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            self._watches_loss = self._watches_rank = False
            return
        self._reset()
        self._watches_loss = self.collapsed_loss is not None or hasattr(pl_module, "collapsed_loss")
        wants_rank = self.min_rank > 0 or self.min_share > 0
        self._watches_rank = wants_rank and self.has_features(pl_module) and trainer.enable_validation
        if not self._watches_loss and not self._watches_rank:
            raise refuse(
                self,
                f"has nothing to watch: {type(pl_module).__name__} has no collapsed_loss, and no {self.features} of validated samples",
                "set collapsed_loss to log(R - 1) for R rows of a batch, or watch validated features, with min_rank above 0",
            )
        if self._watches_rank:
            super().setup(trainer, pl_module, stage)

    # The loss

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        loss = outputs.get("loss") if isinstance(outputs, dict) else None
        if not self._watches_loss or not isinstance(loss, Tensor):
            return
        collapsed = self.collapsed_loss if self.collapsed_loss is not None else getattr(pl_module, "collapsed_loss", None)
        if collapsed is None:
            return
        loss = loss.detach().mean().to(torch.float32 if loss.device.type == "mps" else torch.float64)
        if pl_module.automatic_optimization:
            loss = loss * trainer.accumulate_grad_batches  # by which Lightning has divided it
        finite = loss.isfinite()
        self._loss = self._loss + loss.where(finite, 0.0)
        self._collapsed = self._collapsed + finite.to(loss.dtype) * collapsed

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._watches_loss:
            return
        sums = torch.stack([torch.as_tensor(part, dtype=torch.float32, device=pl_module.device) for part in (self._loss, self._collapsed)])
        self._loss = self._collapsed = 0.0
        loss, collapsed = trainer.strategy.reduce(sums, reduce_op="sum").tolist()
        if collapsed > 0:
            ratio = loss / collapsed
            log_score(pl_module, "train/collapse_ratio", ratio, prog_bar=False)
            self._stuck = self._stuck + 1 if self._is_in_all(trainer, abs(ratio - 1) <= self.tolerance) else 0
            if self._stuck >= self.patience:
                self._tell(
                    trainer,
                    "loss",
                    f"for {self._stuck} epochs the training loss has stayed at its value for features that are all the same, at last "
                    f"{ratio:.3f} times it: {_CURE}",
                )

    # The features

    def begin(self) -> None:
        self._gram: Tensor | None = None
        self._samples = 0

    def see(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any) -> None:
        if not self._watches_rank:
            return
        features = batch_features(trainer, pl_module, self.features, batch)
        found = gram(features)
        self._gram = found if self._gram is None else self._gram + found
        self._samples += len(features)

    def conclude(self, trainer: Trainer, pl_module: LightningModule, stage: Literal["val", "test"]) -> None:
        if not self._watches_rank:
            return
        found = rank_over_processes(trainer, pl_module, self._gram)
        samples = int(trainer.strategy.reduce(torch.tensor(self._samples, device=pl_module.device), reduce_op="sum"))
        if found is None:
            return
        rank, dimensions = found
        if not any(other.features == self.features for other in others(self, trainer, ["FeatureRank"])):
            log_score(pl_module, f"{stage}/feature_rank{self.suffix}", rank)
        # A single feature, or a single sample, cannot collapse.
        low = rank < self.min_rank <= min(samples, dimensions) or rank < self.min_share * self._best_rank
        self._best_rank = max(self._best_rank, rank)
        self._low = self._low + 1 if self._is_in_all(trainer, low) else 0
        if self._low >= self.patience:
            self._tell(
                trainer,
                "features",
                f"for {self._low} validations the {dimensions} features of {type(pl_module).__name__}.{self.features} have spread over few "
                f"directions, at last {rank:.1f}, at best {self._best_rank:.1f}: {_CURE}",
            )

    # Both

    @staticmethod
    def _is_in_all(trainer: Trainer, holds: bool) -> bool:
        """The same answer in every process, whatever the last digit of theirs."""
        return bool(trainer.strategy.reduce_boolean_decision(holds, all=True))

    def _tell(self, trainer: Trainer, sign: str, text: str) -> None:
        if self.stop:
            trainer.should_stop = True
        if sign not in self._told:
            self._told.add(sign)
            rank_zero_warn(f"CollapseWatch: {text}{'. The training ends here' if self.stop else ''}")

    def state_dict(self) -> dict[str, Any]:
        return {
            "stuck": self._stuck,
            "low": self._low,
            "best_rank": self._best_rank,
            "loss": float(self._loss),
            "collapsed": float(self._collapsed),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._stuck, self._low, self._best_rank = (state_dict[name] for name in ("stuck", "low", "best_rank"))
        self._loss, self._collapsed = state_dict["loss"], state_dict["collapsed"]
