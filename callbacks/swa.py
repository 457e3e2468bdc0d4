"""SWA: the mean of the weights at the end of the last epochs, or of several checkpoints."""

import os
import pickle
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from ..zoo.files import whole_file
from .averaged_weights import AveragedWeights
from .batch_norm import batch_norms, check_batch_norm, check_batch_norm_settings, estimate_batch_norm, modules_in_eval
from .guards import refuse


class SWA(AveragedWeights):
    """Validates, saves and keeps the mean of the weights at the ends of the epochs from `start` on.

    With w_1 ... w_n the weights at the end of the averaged epochs: a = (w_1 + ... + w_n) / n, in float32. The learning rate is
    the module's: its scheduler is neither replaced nor stopped (the paper suggests a constant or cyclic rate in the
    averaged epochs), and no epoch is added. The average has BatchNorm statistics of its own: before it is validated or
    saved, one pass over the training data estimates them anew.

    During validation the module holds the average, after training it keeps it; until `start` it is left alone. A
    checkpoint's `state_dict` is the average, so it loads and tests without this callback; the weights of the training lie in
    the callback's state and come back when `fit` resumes. For the mean of the best checkpoints, see `average_checkpoints`.

    Cost: one float32 copy of the weights, and for modules with BatchNorm one pass without gradients over the training data
    per averaged epoch. Composes with every callback but other weight averages. Refuses sharding strategies and
    `save_weights_only=True`.

    Args:
        start: first epoch that is averaged: below 1 as a share of `max_epochs`, from 1 on its number, counted from 0.
        every_n_epochs: average every n-th epoch only, such as the ends of a cyclic learning rate.
        reference_loader: batches for BatchNorm's statistics, `(x, ...)` or `x` of `forward(x)`; by default those of the data module's
            `eval_train_dataloader`, else those of the training.
        batch_norm_batches: batches for BatchNorm's statistics; None takes all.

    Raises:
        ValueError: if a setting is out of range.
        TypeError: if `reference_loader` can be iterated over only once.

    Example:
        >>> trainer = Trainer(max_epochs=100, callbacks=[SWA(start=0.75)])

    Source:
        Izmailov, Podoprikhin, Garipov, Vetrov & Wilson, "Averaging Weights Leads to Wider Optima and Better
        Generalization", UAI 2018, algorithm 1.
    """

    def __init__(
        self,
        start: float = 0.75,
        every_n_epochs: int = 1,
        reference_loader: Iterable[Any] | None = None,
        batch_norm_batches: int | None = None,
    ) -> None:
        if not (0 <= start < 1 or (start >= 1 and start % 1 == 0)):
            raise ValueError(f"start must be a share of the training in [0, 1), or the number of an epoch, got {start}")
        if every_n_epochs < 1:
            raise ValueError(f"every_n_epochs must be at least 1, got {every_n_epochs}")
        check_batch_norm_settings(reference_loader, batch_norm_batches)
        super().__init__()
        self.start = start
        self.every_n_epochs = every_n_epochs
        self.reference_loader = reference_loader
        self.batch_norm_batches = batch_norm_batches
        self._stale = True
        # Names of the submodules that the training keeps in eval mode.
        self._eval: set[str] = set()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and 0 < self.start < 1 and (trainer.max_epochs or -1) < 0:
            raise refuse(self, f"cannot tell when {self.start:.0%} of the training are over", "set max_epochs, or give start as an epoch")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not trainer.is_last_batch:
            return
        start = self._first_epoch(trainer)
        if trainer.current_epoch >= start and (trainer.current_epoch - start) % self.every_n_epochs == 0:
            self._find_buffers(pl_module)
            self._move_average(1 / (self._updates + 1))
            self._stale = True
            self._eval = modules_in_eval(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._eval = modules_in_eval(pl_module)
        check_batch_norm(self, trainer, pl_module, self.reference_loader)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._stale:  # now, because within the next epoch a second pass could take over the loader's only iterator
            self._show_average(trainer, pl_module)
            self._show_raw(pl_module)

    def _first_epoch(self, trainer: Trainer) -> int:
        # In floats 0.58 * 50 is 28.999...
        return int(self.start * (trainer.max_epochs or 0) + 1e-9) if self.start < 1 else int(self.start)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._updates:
            rank_zero_warn(f"SWA averaged no epoch: training ended before epoch {self._first_epoch(trainer)} was over")
        super().on_train_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        return {"stale": self._stale, **super().state_dict()}

    def _restore(self, state: dict[str, Any]) -> None:
        super()._restore(state)
        self._stale = state["stale"]

    @torch.no_grad()
    def _show_average(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._updates or self._raw is not None:
            return
        super()._show_average(trainer, pl_module)
        layers = batch_norms(pl_module, self._eval)
        if self._stale and layers:
            estimate_batch_norm(self, trainer, pl_module, self._eval, self.reference_loader, self.batch_norm_batches)
            # Estimated once per average: keep them with it.
            statistics = {id(tensor) for layer in layers for tensor in (layer.running_mean, layer.running_var)}
            for live, average in zip(self._live, self._average, strict=True):
                if id(live) in statistics:
                    average.copy_(live)
        self._stale = False


def average_checkpoints(paths: Sequence[str | os.PathLike[str]], output: str | os.PathLike[str]) -> Path:
    """Write a checkpoint whose weights are the mean of those of several Lightning checkpoints, such as the best ones.

    w = (w_1 + ... + w_n) / n for floating-point tensors, summed in float64; the rest is that of the last checkpoint. The result
    holds no optimiser: it is for `load_from_checkpoint`, `test(ckpt_path=...)` and exports. BatchNorm's statistics are averaged
    too, which is only near right; `torch.optim.swa_utils.update_bn` estimates them anew.

    Args:
        paths: at least one checkpoint; `trainer.checkpoint_callback.best_k_models` names the best ones.
        output: file to write; it must not exist.

    Returns:
        The file that was written.

    Raises:
        ValueError: if there is no checkpoint, one cannot be read, or they are not of one model.
        FileExistsError: if `output` exists.

    Example:
        >>> average_checkpoints(list(trainer.checkpoint_callback.best_k_models), "mean.ckpt")

    Source:
        Izmailov et al., UAI 2018, section 3; Vaswani et al., "Attention Is All You Need", NeurIPS 2017, section 6.1.
    """
    output = Path(output)
    if output.exists():
        raise FileExistsError(f"{output} exists: give another file, or delete it")
    return write_checkpoint(mean_checkpoint(paths), output)


def mean_checkpoint(paths: Sequence[str | os.PathLike[str]], weights_only: bool = True) -> dict[str, Any]:
    """What `average_checkpoints` writes; without `weights_only`, the files may hold any objects, and are trusted."""
    if not paths:
        raise ValueError("there is no checkpoint to average: give at least one path")
    total: dict[str, Any] = {}
    for path in paths:
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=weights_only)
            weights = checkpoint["state_dict"]
        except (RuntimeError, EOFError, pickle.UnpicklingError, LookupError, TypeError) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(f"{path} is no Lightning checkpoint, is truncated, or holds more than weights ({reason})") from error
        if total and _shapes(weights) != _shapes(total):
            raise ValueError(f"{path} is not of the same model as {paths[0]}: their weights have other names or shapes")
        for name, value in weights.items():
            wide = value.to(torch.promote_types(value.dtype, torch.float64)) if _is_averaged(value) else value
            total[name] = total[name] + wide if name in total and _is_averaged(value) else wide
    for name, value in weights.items():  # in place, because the dictionary also has the versions of the modules
        weights[name] = (total[name] / len(paths)).to(value.dtype) if _is_averaged(value) else value
    kept = {key: value for key, value in checkpoint.items() if key not in ("optimizer_states", "lr_schedulers", "callbacks", "loops")}
    return {**kept, "state_dict": weights}


def write_checkpoint(checkpoint: dict[str, Any], output: Path) -> Path:
    """Write it whole, see `whole_file`; returns the file."""
    with whole_file(output) as temporary:
        torch.save(checkpoint, temporary)
    return output


def _is_averaged(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def _shapes(weights: dict[str, Any]) -> dict[str, torch.Size | None]:
    return {name: value.shape if isinstance(value, Tensor) else None for name, value in weights.items()}
