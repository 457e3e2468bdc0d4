"""Makes training randomness a function of the step, so that a resumed run repeats the uninterrupted one."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from ..zoo.functional.random import global_seed


class StepSeed(Callback):
    """Seeds torch before every training batch with a hash of (seed, epoch, batch, process).

    Dropout and other noise drawn during a step then no longer depend on what was drawn before it, so a run resumed from
    any checkpoint draws what the uninterrupted one drew. Processes draw different noise. It has no state.

    Cost: microseconds a batch. CPU and CUDA generators are seeded. Composes with every callback; put it first.

    Args:
        seed: None takes that of `lightning.pytorch.seed_everything`, or 0.

    Example:
        >>> trainer = Trainer(callbacks=[StepSeed(seed=1)])
    """

    def __init__(self, seed: int | None = None) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        seed = global_seed() if self.seed is None else self.seed
        step_seed = hash((seed, trainer.current_epoch, batch_idx, trainer.global_rank)) & 0x7FFFFFFFFFFFFFFF
        # torch.manual_seed also records a stack trace for each kind of accelerator that is not in use: 50 ms a step.
        torch.default_generator.manual_seed(step_seed)
        if pl_module.device.type == "cuda":
            torch.cuda.manual_seed(step_seed)
