"""EMA: an exponential moving average of the weights."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer

from .averaged_weights import AveragedWeights


class EMA(AveragedWeights):
    """Validates, saves and keeps an exponential moving average of the weights.

    After the t-th optimiser step (t = 1, 2, ...), with weights w and average a:

        a <- d_t a + (1 - d_t) w,   d_t = min(decay, (1 + t) / (10 + t))   (with warm-up; else d_t = decay),

    in float32 also for half-precision weights. Floating-point buffers (BatchNorm's statistics) are averaged too, integer
    ones are those of the last step. With accumulation there is one update per optimiser step; with several optimisers one
    per batch in which any of them stepped.

    During validation the module holds the average, after training it keeps it; until the first update it is left alone. A
    checkpoint's `state_dict` is the average, so it loads and tests without this callback; the weights of the training lie in
    the callback's state and come back when `fit` resumes. The exception is a checkpoint saved by hand,
    `trainer.save_checkpoint(..., weights_only=True)`: Lightning tells no callback of it, so it holds the weights of the training. An
    exception leaves these in the module.

    Cost: one pass over the weights a step, one float32 copy of them, and another one during validation. Composes with
    every callback but other weight averages. Refuses sharding strategies and `save_weights_only=True`.

    Args:
        decay: d in [0, 1]; 0.999 for some ten thousand steps, 0.9999 for long trainings; 0 is no averaging.
        warmup: let d_t grow, so that the average forgets the initial weights early on.

    Raises:
        ValueError: if `decay` is out of range.

    Example:
        >>> trainer = Trainer(callbacks=[EMA(decay=0.999)])

    Source:
        Polyak & Juditsky, "Acceleration of Stochastic Approximation by Averaging", SIAM J. Control Optim. 30, 1992;
        Tarvainen & Valpola, "Mean teachers are better role models", NeurIPS 2017, equation 1.
    """

    def __init__(self, decay: float = 0.999, warmup: bool = True) -> None:
        if not 0 <= decay <= 1:
            raise ValueError(f"decay is the share of the average that a step keeps, and must lie in [0, 1], got {decay}")
        super().__init__()
        self.decay = decay
        self.warmup = warmup
        self._steps = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._steps = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self._steps:  # still accumulating
            return
        self._steps = trainer.global_step
        update = self._updates + 1
        decay = min(self.decay, (1 + update) / (10 + update)) if self.warmup else self.decay
        self._find_buffers(pl_module)
        self._move_average(1 - decay)
