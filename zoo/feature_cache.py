"""Training a head on features that were computed once: the cache, when it may stand for the batches, and a range test on it."""

import math
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.tuner.lr_finder import _LRFinder
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer

from .unaugmented_pass import unaugmented_pass

# A callback with one of these hooks wants to see every batch, but for the observers. By name, as some are of floors above.
_BATCH_HOOKS = (
    *("on_train_batch_start", "on_train_batch_end", "on_before_zero_grad"),
    *("on_before_backward", "on_after_backward", "on_before_optimizer_step"),
)
_OBSERVERS = {
    *("Checkpoint", "DeviceStatsMonitor", "LearningRateMonitor", "ProgressBar", "ThroughputMonitor", "Timer"),
    *("StepSeed", "_StopBetweenBatches"),
}
_TUNERS = {"BatchSizeFinder", "GradientAccumulationScheduler", "LearningRateFinder", "StochasticWeightAveraging"}
# The range test.
_LEAST_LR, _LARGEST_LR, _STEPS = 1e-5, 30.0, 100


class ShortEpochs(Callback):
    """In a fit that asks for it, an epoch of the trainer has one batch; afterwards, or after an exception, the trainer is as it was."""

    def __init__(self) -> None:
        self._before: dict[str, Any] = {}

    def begin(self, trainer: Trainer, validated: bool = False) -> None:
        """Cut the epochs short until the fit ends; with `validated`, each has a validation at its end, whatever was asked for."""
        settings: dict[str, Any] = dict.fromkeys(("limit_train_batches", "log_every_n_steps"), 1)
        if validated:
            settings |= {"val_check_interval": 1.0, "check_val_every_n_epoch": 1}
        self._before = {name: getattr(trainer, name) for name in settings}
        for name, value in settings.items():
            setattr(trainer, name, value)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for name, value in self._before.items():
            setattr(trainer, name, value)
        self._before = {}


class FeatureCache:
    """Features of the training set, and the minibatches that the training loader would make of it.

    Args:
        data: a DataModule of litzoo that does not augment.
        limit: the trainer's `limit_train_batches`: minibatches of an epoch, or their share.

    Example:
        >>> cache = FeatureCache(DigitsDataModule(augmentation="none"), limit=1.0)
        >>> cache.fill(features, label, index)
        >>> for features, label in cache.minibatches(epoch=0):
        ...     step_on(head, optimizer, features, label, label_smoothing=0.0)
    """

    def __init__(self, data: Any, limit: float) -> None:
        self._sampler: Any = data.train_dataloader().sampler  # its order is a function of seed and epoch
        batches = len(self._sampler)
        self.steps = min(limit, batches) if isinstance(limit, int) else max(1, int(limit * batches))
        self._features = self._label = self._index = torch.empty(0)
        # Of validation, by the number of the batch: the numbers of its samples, and their features.
        self._seen: dict[int, tuple[Tensor, Tensor]] = {}

    def fill(self, features: Tensor, label: Tensor, index: Tensor) -> None:
        """Remember features `(N, D)`, labels `(N,)` and the samples' numbers in their data set `(N,)`."""
        self._index, order = index.sort()
        self._features, self._label = features[order], label[order]

    def minibatches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Features and labels of an epoch, batch by batch."""
        self._sampler.set_epoch(epoch)
        batches = [torch.tensor(samples) for _, samples, *_ in islice(self._sampler, self.steps)]
        rows = torch.searchsorted(self._index, torch.cat(batches).to(self._index.device))
        for row in rows.split([len(batch) for batch in batches]):
            yield self._features[row], self._label[row]

    def seen(self, batch: Any, batch_idx: int, encode: Callable[[Tensor], Tensor]) -> Tensor:
        """Features of a validation batch, computed the first time that it comes."""
        known = self._seen.get(batch_idx)
        if known is None or not torch.equal(known[0], batch.index):
            known = self._seen[batch_idx] = (batch.index, encode(batch.input))
        return known[1]

    def find_lr(self, head: nn.Module, optimizer: Optimizer, label_smoothing: float) -> float:
        """The learning rate at which the loss falls fastest, while the rate grows exponentially from step to step.

        Args:
            head: features -> logits; it is trained, so give a copy.
            optimizer: of the head.
            label_smoothing: of the cross entropy.

        Returns:
            The rate, between 1e-5 and 30: a linear layer on features that are small wants a large one.

        Raises:
            ValueError: if the loss diverges at once.

        Source:
            Smith, "Cyclical Learning Rates for Training Neural Networks", WACV 2017, section 3.3.
        """
        finder = _LRFinder("exponential", _LEAST_LR, _LARGEST_LR, _STEPS)
        logarithms, losses, mean = [], [], 0.0
        batches = (batch for epoch in range(_STEPS) for batch in self.minibatches(epoch))
        for step, (features, label) in enumerate(islice(batches, _STEPS)):
            rate = _LEAST_LR * (_LARGEST_LR / _LEAST_LR) ** (step / (_STEPS - 1))
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss, _ = step_on(head, optimizer, features, label, label_smoothing)
            mean = 0.9 * mean + 0.1 * float(loss)
            logarithms.append(math.log(rate))
            losses.append(mean / (1 - 0.9 ** (step + 1)))
            if not losses[-1] <= 4 * min(losses):
                break
        # The slope by the logarithm, on which the rates lie evenly: by the rate itself, it is steepest where the rates are smallest.
        finder.results = {"lr": logarithms, "loss": losses}
        found = finder.suggestion()
        if found is None:
            raise ValueError("the range test diverged at once and found no learning rate: set lr to a number")
        rank_zero_info(f"lr auto: {math.exp(found):.3g}, by a range test of {len(losses)} steps")
        return math.exp(found)


def step_on(head: nn.Module, optimizer: Optimizer, features: Tensor, label: Tensor, label_smoothing: float) -> tuple[Tensor, Tensor]:
    """A step of the cross entropy on a minibatch.

    Args:
        head: features -> logits.
        optimizer: of the head; one that evaluates a step several times, such as LBFGS, may.
        features: `(B, D)`.
        label: `(B,)`.
        label_smoothing: of the cross entropy.

    Returns:
        The loss `()` and the predicted classes `(B,)`, both of before the step.
    """
    found: list[tuple[Tensor, Tensor]] = []

    def closure() -> Any:
        optimizer.zero_grad()
        logits = head(features)
        loss = F.cross_entropy(logits, label, label_smoothing=label_smoothing)
        loss.backward()
        found.append((loss.detach(), logits.detach().argmax(dim=1)))
        return loss

    optimizer.step(closure)
    return found[0]


def training_features(module: Any) -> tuple[Tensor, Tensor, Tensor]:
    """One pass over the training samples as they are.

    Args:
        module: has `encode`, and a trainer whose DataModule has `eval_train_dataloader`.

    Returns:
        Features `(N, D)`, labels `(N,)` and numbers of the samples `(N,)`, on the module's device.
    """
    loader = module.trainer.datamodule.eval_train_dataloader()
    rank_zero_info(f"encoding the training data once, {len(loader)} batches")
    with unaugmented_pass(module, loader) as batches:
        parts = [(module.encode(batch.input), batch.label.long(), batch.index) for batch in batches]
    features, label, index = (torch.cat(column) for column in zip(*parts, strict=True))
    return features, label, index


def obstacle_to_cache(trainer: Any) -> str | None:
    """Why a fit cannot go on cached features in place of its batches, or None if it can."""
    data = getattr(trainer, "datamodule", None)
    if trainer.fast_dev_run:
        return "a fast_dev_run is to encode but a few samples"
    if not hasattr(data, "eval_train_dataloader") or getattr(data, "augments", True):
        return "the training data are augmented, or do not say that they are not"
    if trainer.world_size > 1:
        return "there are several processes"
    if trainer.accumulate_grad_batches != 1 or trainer.gradient_clip_val:
        return "gradients are accumulated or clipped"
    if trainer.val_check_interval != 1.0 or trainer.check_val_every_n_epoch is None:
        return "validation is to run within an epoch"
    names = [type(callback).__name__ for callback in trainer.callbacks if _wants_batches(callback)]
    return f"{names[0]} acts on single batches" if names else None


def _wants_batches(callback: Any) -> bool:
    """Whether a callback acts on single batches, or changes their number."""
    names = {base.__name__ for base in type(callback).__mro__}
    if names & _TUNERS or getattr(callback, "_every_n_train_steps", 0) > 0:  # a ModelCheckpoint within an epoch
        return True
    if "TestTimeAugmentation" in names and callback.validation:  # views of what is validated have no features yet
        return True
    # Against the base class that it has, because `pytorch_lightning` has one of its own.
    base = next((base for base in type(callback).__mro__ if base.__name__ == "Callback"), Callback)
    return not names & _OBSERVERS and any(getattr(type(callback), hook) is not getattr(base, hook) for hook in _BATCH_HOOKS)
