"""Flooding: keeps the training loss from falling below a level."""

import math

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from .guards import class_names_of_bases, refuse, refuse_manual_optimization


class Flooding(Callback):
    """Trains on |L - b| + b in place of the loss L, so that L hovers around the flood level b and does not reach zero.

    The gradient is sign(L - b) dL/dw: descent above the level, ascent below it. Only the gradient changes; what is logged,
    monitored and returned stays the true loss. L is the loss of a micro-batch, as in the paper: with accumulation each
    micro-batch is compared with b on its own, and under DDP each process compares its own, unless `sync`.

    Cost: a comparison a batch; with `sync` one all-reduce of a number. Composes with every callback; with `FGM` and `SAM`
    both passes are flooded. Refuses manual optimisation and DeepSpeed, which scales the loss where nobody sees it.

    Args:
        level: b, in the unit of the loss, at least 0; the paper tries 0.00 to 0.20 for cross entropy, chosen on validation
            data. 0 switches it off.
        sync: compare the mean loss of all processes, so that they rise and fall together, as one process with the whole
            batch would.

    Raises:
        ValueError: if `level` is negative or not finite.

    Example:
        >>> trainer = Trainer(callbacks=[Flooding(0.02)])

    Source:
        Ishida, Yamane, Sakai, Niu & Sugiyama, "Do We Need Zero Training Loss After Achieving Zero Training Error?",
        ICML 2020, equation 3.
    """

    def __init__(self, level: float, sync: bool = False) -> None:
        if not (level >= 0 and math.isfinite(level)):
            raise ValueError(f"level is the loss below which training ascends, and must be at least 0, got {level}")
        self.level = level
        self.sync = sync
        self._checked = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        refuse_manual_optimization(self, pl_module)
        if "DeepSpeedStrategy" in class_names_of_bases(trainer.strategy):
            raise refuse(self, "does not work under DeepSpeed, which scales the loss out of sight", "use strategy='ddp'")
        self._checked = False

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if not self.level:
            return
        # The loss is divided by the accumulation and scaled by the GradScaler already; scaling the level avoids reading the scale.
        value = loss.detach().to(torch.promote_types(loss.dtype, torch.float32))
        level = torch.full_like(value, self.level / trainer.accumulate_grad_batches)
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            level = scaler.scale(level)
        if self.sync and trainer.world_size > 1:
            value = trainer.strategy.reduce(value.clone(), reduce_op="mean")
        if not self._checked:
            self._checked = True
            if trainer.global_step == 0 and value < level:
                rank_zero_warn(f"Flooding: the level {self.level} is above the loss of the first batch, so training begins with ascent")
        sign = torch.sign(value - level).to(loss.dtype)
        loss.register_hook(lambda gradient: gradient * sign)
