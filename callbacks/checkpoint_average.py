"""The mean of the best checkpoints of a training, as one checkpoint more."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from .batch_norm import batch_norms, check_batch_norm, check_batch_norm_settings, estimate_batch_norm, modules_in_eval
from .guards import refuse_sharded
from .swa import mean_checkpoint, write_checkpoint


class CheckpointAverage(Callback):
    """Writes the mean of the best checkpoints, when the training is over.

    With w_1 ... w_k the weights of the checkpoints that `ModelCheckpoint(monitor=..., save_top_k=k)` has kept: (w_1 + ... + w_k) / k,
    as `average.ckpt` beside them. BatchNorm's statistics of the mean are estimated anew, by one pass over the training data. The
    training itself, and the module at its end, are as without this callback. The mean holds no optimiser state: it is for
    `validate(ckpt_path=...)` and `test`, or to start from. Unlike `SWA` it takes the epochs that validation prefers.

    Cost: reading k checkpoints, and for modules with BatchNorm one pass without gradients over the training data. Composes with
    every callback; under `EMA` it is a mean of averages. Refuses sharding strategies. If no `ModelCheckpoint` keeps at least two by a
    metric, or a file cannot be read or written, a warning says so and the training ends as usual. Checkpoints that are gone by then
    are left out.

    Attributes:
        average_path: the file, None until it is written.

    Args:
        reference_loader: batches for BatchNorm's statistics, `(x, ...)` or `x` of `forward(x)`; by default those of the data module's
            `eval_train_dataloader`, else those of the training.
        batch_norm_batches: batches for BatchNorm's statistics; None takes all.

    Raises:
        ValueError: if `batch_norm_batches` is not positive.
        TypeError: if `reference_loader` can be iterated over only once.

    Example:
        >>> best = ModelCheckpoint(monitor="val/accuracy", mode="max", save_top_k=3)
        >>> trainer = Trainer(callbacks=[best, CheckpointAverage()])

    Source:
        Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization", UAI 2018, section 3; Vaswani et al.,
        "Attention Is All You Need", NeurIPS 2017, section 6.1.
    """

    def __init__(self, reference_loader: Iterable[Any] | None = None, batch_norm_batches: int | None = None) -> None:
        check_batch_norm_settings(reference_loader, batch_norm_batches)
        self.reference_loader = reference_loader
        self.batch_norm_batches = batch_norm_batches
        self.average_path: Path | None = None
        self._eval: set[str] = set()
        # Checkpoints of a training that this one goes on with.
        self._earlier: set[str] = set()
        self._over = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self.average_path = None
            self._over = False
            refuse_sharded(self, trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._eval = modules_in_eval(pl_module)  # already here, for a training that was over when it was resumed
        keeper = _keeper(trainer)
        self._earlier = set() if keeper is None else set(keeper.best_k_models)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_batch_norm(self, trainer, pl_module, self.reference_loader)
        if _keeper(trainer) is None and not getattr(trainer, "fast_dev_run", False):
            rank_zero_warn("CheckpointAverage has nothing to average: add ModelCheckpoint(monitor=..., save_top_k=3)")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.is_last_batch:
            self._eval = modules_in_eval(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not later: Lightning moves the module to the CPU before on_fit_end.
        self._average(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._over:  # a training that was over when it was resumed has no on_train_end
            self._average(trainer, pl_module)

    def _average(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._over = True
        keeper = _keeper(trainer)
        if keeper is None:
            return
        checkpoint: dict[str, Any] = {}
        paths: list[str] = []
        failure = None
        if trainer.is_global_zero:
            paths = [path for path in keeper.best_k_models if Path(path).is_file()]  # oldest first
            try:
                if len(paths) < 2:
                    raise ValueError(f"a mean needs two of the best checkpoints, there is {len(paths) or 'none'}")
                # What this training has written may hold objects; what was there before it, nobody knows.
                checkpoint = mean_checkpoint(paths, weights_only=not self._earlier.isdisjoint(paths))
            except (OSError, ValueError) as error:
                failure = str(error)
        failure = trainer.strategy.broadcast(failure)
        if failure is None and batch_norms(pl_module, self._eval):
            self._estimate(trainer, pl_module, checkpoint)
        if failure is None and trainer.is_global_zero:
            try:
                self.average_path = write_checkpoint(checkpoint, Path(paths[0]).with_name("average.ckpt"))
            except (OSError, RuntimeError) as error:  # the second is torch's, of a full disk
                failure = f"{Path(paths[0]).parent} could not be written to ({error})"
        failure, self.average_path = trainer.strategy.broadcast((failure, self.average_path))
        if failure is None:
            rank_zero_info(f"CheckpointAverage: the mean of {len(paths)} checkpoints is {self.average_path}")
        else:
            rank_zero_warn(f"CheckpointAverage wrote no mean: {failure}")

    @torch.no_grad()
    def _estimate(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put statistics of its own into the first process's checkpoint; the module stays as it is."""
        weights: Any = trainer.strategy.broadcast(checkpoint.get("state_dict"))
        # A module's on_save_checkpoint may leave some out.
        live = {name: tensor for name, tensor in pl_module.state_dict().items() if isinstance(tensor, Tensor) and name in weights}
        before = {name: tensor.clone() for name, tensor in live.items()}
        layers = set(batch_norms(pl_module, self._eval))
        try:
            for name, tensor in live.items():
                tensor.copy_(weights[name])
            estimate_batch_norm(self, trainer, pl_module, self._eval, self.reference_loader, self.batch_norm_batches)
            for prefix in (prefix for prefix, module in pl_module.named_modules() if module in layers):
                for name in {f"{prefix}.running_mean", f"{prefix}.running_var"} & live.keys():
                    weights[name] = live[name].cpu().clone()
        finally:
            for name, tensor in live.items():
                tensor.copy_(before[name])


def _keeper(trainer: Trainer) -> Any:
    """The `ModelCheckpoint`, of whichever namespace, that keeps the best ones by a metric, but not all; None without one."""
    for callback in trainer.checkpoint_callbacks:
        if getattr(callback, "monitor", None) is not None and getattr(callback, "save_top_k", 1) > 1:
            return callback
    return None
