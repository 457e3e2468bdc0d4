"""The mean of the best checkpoints of a training, as one checkpoint more."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from .batch_norm import batch_norms, check_batch_norm, estimate_batch_norm, modules_in_eval
from .guards import refuse_sharded
from .swa import average_checkpoints


class CheckpointAverage(Callback):
    """Writes the mean of the best checkpoints, when the training is over.

    With w_1 ... w_k the weights of the checkpoints that `ModelCheckpoint(monitor=..., save_top_k=k)` has kept: (w_1 + ... + w_k) / k,
    as `average.ckpt` beside them. BatchNorm's statistics of the mean are estimated anew, by one pass over the training data. The
    training itself, and the module at its end, are as without this callback. The mean holds no optimiser: it is for
    `validate(ckpt_path=...)`, `test`, and as a start for others. Unlike `SWA` it takes the epochs that validation prefers.

    Cost: reading k checkpoints, and for modules with BatchNorm one pass without gradients over the training data. Composes with
    every callback; under `EMA` it is a mean of averages. Refuses sharding strategies. Without a `ModelCheckpoint` that keeps two or
    more by a metric there is nothing to average, which it says in a warning.

    Attributes:
        average_path: the file, None until it is written.

    Args:
        reference_loader: batches for BatchNorm's statistics, `(x, ...)` or `x` of `forward(x)`; by default those of the data module's
            `eval_train_dataloader`, else those of the training.
        batch_norm_batches: batches for BatchNorm's statistics; None takes all.

    Raises:
        ValueError: if `batch_norm_batches` is not positive.
        TypeError: if `reference_loader` can be gone through only once.

    Example:
        >>> best = ModelCheckpoint(monitor="val/accuracy", mode="max", save_top_k=3)
        >>> trainer = Trainer(callbacks=[best, CheckpointAverage()])

    Source:
        Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization", UAI 2018, section 3; Vaswani et al.,
        "Attention Is All You Need", NeurIPS 2017, section 6.1.
    """

    def __init__(self, reference_loader: Iterable[Any] | None = None, batch_norm_batches: int | None = None) -> None:
        if batch_norm_batches is not None and batch_norm_batches < 1:
            raise ValueError(f"batch_norm_batches must be at least 1, or None for all, got {batch_norm_batches}")
        if isinstance(reference_loader, Iterator):
            raise TypeError("reference_loader can be gone through once only: give a DataLoader or a list")
        self.reference_loader = reference_loader
        self.batch_norm_batches = batch_norm_batches
        self.average_path: Path | None = None
        self._eval: set[str] = set()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self.average_path = None
            refuse_sharded(self, trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._eval = modules_in_eval(pl_module)  # already here, for a training that was over when it was resumed

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_batch_norm(self, trainer, pl_module, self.reference_loader)
        if _keeper(trainer) is None and not getattr(trainer, "fast_dev_run", False):
            rank_zero_warn("CheckpointAverage has nothing to average: add ModelCheckpoint(monitor=..., save_top_k=3)")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.is_last_batch:
            self._eval = modules_in_eval(pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        keeper = _keeper(trainer)
        # Each process may have a list of its own; what counts is what the first one has written.
        paths = trainer.strategy.broadcast(sorted(keeper.best_k_models) if keeper is not None else [])
        if len(paths) < 2:
            return
        output = Path(paths[0]).with_name("average.ckpt")
        temporary = output.with_name(f".{output.name}")
        if trainer.is_global_zero:
            temporary.unlink(missing_ok=True)  # of a process that was killed
            average_checkpoints(paths, temporary)
        trainer.strategy.barrier("CheckpointAverage")
        try:
            if batch_norms(pl_module, self._eval):
                self._estimate(trainer, pl_module, temporary)
            if trainer.is_global_zero:
                temporary.replace(output)
        finally:
            if trainer.is_global_zero:
                temporary.unlink(missing_ok=True)
        self.average_path = output
        rank_zero_info(f"CheckpointAverage: the mean of {len(paths)} checkpoints is {output}")

    @torch.no_grad()
    def _estimate(self, trainer: Trainer, pl_module: LightningModule, path: Path) -> None:
        """Put statistics of its own into the checkpoint; the module stays as it is."""
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        weights = checkpoint["state_dict"]
        live = {name: tensor for name, tensor in pl_module.state_dict().items() if isinstance(tensor, Tensor)}
        before = {name: tensor.clone() for name, tensor in live.items()}
        try:
            for name, tensor in live.items():
                tensor.copy_(weights[name])
            estimate_batch_norm(self, trainer, pl_module, self._eval, self.reference_loader, self.batch_norm_batches)
            if trainer.is_global_zero:
                for name, tensor in live.items():
                    weights[name] = tensor.cpu().clone()
                torch.save(checkpoint, path)
        finally:
            for name, tensor in live.items():
                tensor.copy_(before[name])


def _keeper(trainer: Trainer) -> Any:
    """The `ModelCheckpoint`, of whichever namespace, that keeps several checkpoints by a metric; None without one."""
    for callback in trainer.checkpoint_callbacks:
        if getattr(callback, "monitor", None) is not None and getattr(callback, "save_top_k", 1) not in (0, 1):
            return callback
    return None
