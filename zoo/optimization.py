"""From `optimizer=` and `lr_scheduler=` of a model to what Lightning's `configure_optimizers` returns."""

import difflib
import math
from collections.abc import Iterable
from typing import Any, cast

from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable, ReduceLROnPlateau
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CyclicLR, LambdaLR, LRScheduler, OneCycleLR


class WarmupCosineLR(LambdaLR):
    """Linear warm-up, then half a cosine down to a final factor, over the whole training, one step a batch.

    factor(t) = (t + 1) / (W + 1) for t < W, then f + (1 - f) (1 + cos(pi (t - W) / (T - W))) / 2,
    with T training steps, W = warmup T of them warm-up, and final factor f.

    T is taken from the trainer, so it follows `--trainer.max_epochs`, also where a training is resumed with another one; outside of
    litzoo's models give `total_steps`.

    Args:
        optimizer: whose learning rates to scale.
        warmup: share of the steps spent on the warm-up, in [0, 1).
        final_factor: learning rate at the end, as a share of the start's.
        total_steps: T; None lets the model fill it in.

    Raises:
        ValueError: if `warmup` or `final_factor` is out of range.

    Example:
        >>> scheduler = WarmupCosineLR(optimizer, warmup=0.05, total_steps=1000)

    Source:
        Loshchilov & Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", ICLR 2017, equation 5.
    """

    def __init__(self, optimizer: Optimizer, warmup: float = 0.0, final_factor: float = 0.0, total_steps: int | None = None) -> None:
        if not 0 <= warmup < 1:
            raise ValueError(f"warmup is a share of the training steps and must lie in [0, 1), got {warmup}")
        if not 0 <= final_factor <= 1:
            raise ValueError(f"final_factor must lie in [0, 1], got {final_factor}")
        self.warmup = warmup
        self.final_factor = final_factor
        self.total_steps = total_steps
        super().__init__(optimizer, self._factor)

    def _factor(self, step: int) -> float:
        if self.total_steps is None:
            return 1.0
        warmup_steps = int(self.warmup * self.total_steps)
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        progress = min((step - warmup_steps) / max(self.total_steps - warmup_steps, 1), 1.0)
        return self.final_factor + (1.0 - self.final_factor) * 0.5 * (1.0 + math.cos(math.pi * progress))

    def set_total_steps(self, total_steps: int) -> None:
        """Say how long the training is, before its first step."""
        self.total_steps = total_steps
        for group, base, factor in zip(self.optimizer.param_groups, self.base_lrs, self.lr_lambdas, strict=True):
            group["lr"] = base * factor(self.last_epoch)
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint; where the training is longer or shorter now, with the rates of one that always was."""
        total_steps = self.total_steps
        super().load_state_dict(state_dict)
        if total_steps is not None and total_steps != self.total_steps:
            self.set_total_steps(total_steps)


class TimmOptimizer(Optimizer):
    """Any optimizer of timm by its name, such as "lamb", "adan", "lion", "sgdp" or "lookahead_radam": what it makes is timm's own.

    Args:
        params: parameters, or groups of them.
        name: one of `timm.optim.list_optimizers()`, or "lookahead_" and one.
        lr: learning rate; None takes the optimizer's own.
        weight_decay: weight decay of all parameters.
        momentum: of those that have one.
        options: further arguments of the optimizer.

    Raises:
        ValueError: if timm has no such optimizer, or it takes no such options.

    Example:
        >>> type(TimmOptimizer(model.parameters(), "adan", lr=1e-3)).__name__
        'Adan'
    """

    def __new__(
        cls,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        name: str,
        lr: float | None = None,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        options: dict[str, Any] | None = None,
    ) -> Any:
        from timm.optim import create_optimizer_v2, list_optimizers

        known, groups = list_optimizers(), cast(list[dict[str, Any]], list(params))
        base = name.lower().removeprefix("lookahead_")
        if base not in known:
            close = difflib.get_close_matches(base, known, n=1, cutoff=0.5)
            raise ValueError(
                f"timm has no optimizer {name!r}; " + (f"did you mean {close[0]}?" if close else "see timm.optim.list_optimizers()")
            )
        try:
            return create_optimizer_v2(groups, name, lr, weight_decay, momentum, **(options or {}))
        except TypeError as error:
            raise ValueError(f"timm's optimizer {name!r} does not take these options: {error}") from error

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        name: str,
        lr: float | None = None,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        options: dict[str, Any] | None = None,
    ) -> None:
        """Never called, because `__new__` makes another class's object; the command line reads the arguments here."""


# Schedulers whose parameters count batches; Lightning would step them once an epoch.
_PER_STEP = (WarmupCosineLR, CyclicLR, OneCycleLR)


def configure_optimizer(module: LightningModule, optimizer: OptimizerCallable, lr_scheduler: LRSchedulerCallable | None) -> Any:
    """Build what `configure_optimizers` returns: the scheduler is stepped in the unit it counts in.

    `WarmupCosineLR`, `CyclicLR` and `OneCycleLR` are stepped once a batch, all others once an epoch;
    `ReduceLROnPlateau` watches its own `monitor`, which must be logged.

    Args:
        module: the model; its trainer says how long training is.
        optimizer: parameters -> optimizer.
        lr_scheduler: optimizer -> scheduler, or None.

    Returns:
        The optimizer, or Lightning's dictionary of optimizer and scheduler.

    Example:
        >>> def configure_optimizers(self):
        ...     return configure_optimizer(self, self.optimizer, self.lr_scheduler)
    """
    built = optimizer(module.parameters())
    if lr_scheduler is None:
        return built
    scheduler: LRScheduler | ReduceLROnPlateau = lr_scheduler(built)
    if isinstance(scheduler, WarmupCosineLR) and scheduler.total_steps is None:
        steps = module.trainer.estimated_stepping_batches
        if not math.isfinite(steps):
            raise ValueError("WarmupCosineLR needs to know how long training is: set trainer.max_epochs or trainer.max_steps")
        scheduler.set_total_steps(int(steps))
    settings: dict[str, Any] = {"scheduler": scheduler, "interval": "step" if isinstance(scheduler, _PER_STEP) else "epoch"}
    if isinstance(scheduler, ReduceLROnPlateau):
        settings["monitor"] = scheduler.monitor
    return {"optimizer": built, "lr_scheduler": settings}
