"""Watches how many directions a representation makes use of."""

import math
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from ..zoo.functional.feature_rank import effective_rank_of_gram, gram
from .features import FeatureObserver, Features, batch_features, log_score


class FeatureRank(FeatureObserver):
    """Logs the effective rank of the features of validation and test, and warns once when they collapse.

    With s_i the singular values of the matrix of features, rows samples, and p_i = s_i / sum_j s_j:

        rank = exp(-sum_i p_i log p_i),

    between 1, where all samples have the same features up to a factor, and the smaller of samples and dimensions. It needs no labels.
    A fall during self-supervised training tells of a collapse that the loss does not show.

    Logs `val/feature_rank` and `test/feature_rank`, with `features="forward"` followed by `_forward`, over the whole epoch and
    all processes. With several evaluation loaders, the first one counts; the sanity check logs nothing. It has no state.

    Cost: the evaluated samples are encoded once more, once for all callbacks that look at features; a D x D matrix in float64
    and its eigenvalues. Composes with every callback.

    Args:
        features: what is looked at: "encode" for `pl_module.encode(x)`, or "forward".
        warn_below: rank under which the features count as collapsed; 0 never warns.
        every_n_epochs: in `fit`, look at the first validated epoch (also after a resume), every n-th one and the last.

    Raises:
        ValueError: if a setting is out of range.
        MisconfigurationException: at the start, if the module has no such method.

    Example:
        >>> trainer = Trainer(callbacks=[FeatureRank()])

    Source:
        Roy & Vetterli, "The Effective Rank: A Measure of Effective Dimensionality", EUSIPCO 2007; Garrido, Balestriero, Najman &
        LeCun, "RankMe", ICML 2023.
    """

    def __init__(self, features: Features = "encode", warn_below: float = 1.5, every_n_epochs: int = 1) -> None:
        super().__init__(features, every_n_epochs)
        if not (warn_below >= 0 and math.isfinite(warn_below)):
            raise ValueError(f"warn_below must be a rank, or 0 for no warning, got {warn_below}")
        self.warn_below = warn_below
        self._gram: Tensor | None = None
        self._warned = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._warned = False

    def begin(self) -> None:
        self._gram = None

    def see(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any) -> None:
        found = gram(batch_features(trainer, pl_module, self.features, batch))
        self._gram = found if self._gram is None else self._gram + found

    def conclude(self, trainer: Trainer, pl_module: LightningModule, stage: Literal["val", "test"]) -> None:
        found = rank_over_processes(trainer, pl_module, self._gram)
        if found is None:
            return
        rank, dimensions = found
        log_score(pl_module, f"{stage}/feature_rank{self.suffix}", rank)
        if rank < self.warn_below <= dimensions and not self._warned:  # a single feature cannot collapse
            self._warned = True
            rank_zero_warn(
                f"FeatureRank: the {dimensions} features of {type(pl_module).__name__}.{self.features} spread over {rank:.1f} "
                "directions only: they have collapsed, all samples look nearly alike to whatever is trained on them. Try a lower "
                "learning rate, more negatives or a larger batch, other augmentation, a loss that keeps features apart; and see to it "
                "that the inputs differ"
            )


def rank_over_processes(trainer: Trainer, pl_module: LightningModule, part: Tensor | None) -> tuple[float, int] | None:
    """The effective rank of the features of all processes, and D; None if no process had a batch. Every process must call it.

    Args:
        part: `(D, D)`, the Gram matrix of this process's features; None if it had no batch.
    """
    size = torch.tensor(0 if part is None else len(part), device=pl_module.device)
    if trainer.world_size > 1:
        size = trainer.strategy.all_gather(size).max()
    if size == 0:
        return None
    total = torch.zeros(int(size), int(size), dtype=torch.double, device=pl_module.device) if part is None else part
    return float(effective_rank_of_gram(trainer.strategy.reduce(total, reduce_op="sum"))), int(size)
