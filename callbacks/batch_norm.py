"""BatchNorm's statistics for weights that no step has seen, such as an average."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch.nn.modules.batchnorm import _BatchNorm

from .features import check_reference_loader, kept_generators, to_device
from .guards import refuse


def modules_in_eval(pl_module: LightningModule) -> set[str]:
    """Names of the submodules that the training keeps in evaluation mode; to be asked while it runs."""
    return {name for name, module in pl_module.named_modules() if not module.training}


def batch_norms(pl_module: LightningModule, in_eval: set[str]) -> list[_BatchNorm]:
    """The layers whose statistics the training estimates."""
    return [
        module
        for name, module in pl_module.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None and name not in in_eval
    ]


def check_batch_norm_settings(reference_loader: Iterable[Any] | None, batches: int | None) -> None:
    """Refuse settings of `estimate_batch_norm` that are out of range.

    Raises:
        ValueError: if the number of batches is not positive.
        TypeError: if the loader can be iterated over only once.
    """
    if batches is not None and batches < 1:
        raise ValueError(f"batch_norm_batches must be at least 1, or None for all, got {batches}")
    check_reference_loader(reference_loader)


def check_batch_norm(callback: Callback, trainer: Trainer, pl_module: LightningModule, reference_loader: Iterable[Any] | None) -> None:
    """Refuse, at the start, a module with BatchNorm whose statistics could not be estimated."""
    if not batch_norms(pl_module, modules_in_eval(pl_module)):
        return
    if type(pl_module).forward.__qualname__ in ("LightningModule.forward", "_forward_unimplemented"):
        raise refuse(callback, "needs a forward to estimate BatchNorm's statistics", "define forward(self, x), or use EMA")
    has_own = reference_loader is not None or hasattr(trainer.datamodule, "eval_train_dataloader")  # type: ignore[attr-defined]  # Lightning sets it in a connector
    if not has_own and isinstance(trainer.train_dataloader, (dict, list, tuple)):
        raise refuse(callback, "cannot tell which of several training loaders has the inputs of forward", "give reference_loader")


@torch.no_grad()
def estimate_batch_norm(
    callback: Callback,
    trainer: Trainer,
    pl_module: LightningModule,
    in_eval: set[str],
    reference_loader: Iterable[Any] | None,
    limit: int | None,
) -> None:
    """Estimate the statistics of all layers anew, by one pass over training data; every process must call it.

    Args:
        callback: who asks, for a message.
        trainer: its trainer.
        pl_module: the module, with the weights to estimate them for.
        in_eval: see `modules_in_eval`.
        reference_loader: batches `(x, ...)` or `x` of `forward(x)`; None: those of the data module's `eval_train_dataloader`, else those
            of the training.
        limit: number of batches; None: all.
    """
    layers = batch_norms(pl_module, in_eval)
    if not layers:
        return
    batches = 0
    with _estimating(pl_module, layers, in_eval):
        for batch in islice(_batches(trainer, pl_module, reference_loader), limit):
            batches += 1
            with trainer.precision_plugin.forward_context():
                pl_module(batch[0] if isinstance(batch, (tuple, list)) else batch)
    if not batches:
        raise refuse(callback, "got no batch to estimate BatchNorm's statistics", "give a reference_loader that has some each time")
    if trainer.world_size > 1:
        for layer in layers:
            for statistic in (layer.running_mean, layer.running_var):
                assert statistic is not None
                statistic.copy_(trainer.strategy.reduce(statistic.clone(), reduce_op="mean"))


@contextlib.contextmanager
def _estimating(pl_module: LightningModule, layers: Sequence[_BatchNorm], in_eval: set[str]) -> Iterator[None]:
    """Inside, the layers' statistics become plain means over the batches.

    `torch.optim.swa_utils.update_bn` replaces the buffers, which others hold, and sets every submodule to one mode.
    """
    modes = {module: module.training for module in pl_module.modules()}
    before = [(layer.momentum, layer.num_batches_tracked) for layer in layers]
    try:
        for name, module in pl_module.named_modules():
            module.training = name not in in_eval
        for layer in layers:
            layer.num_batches_tracked = None if layer.num_batches_tracked is None else layer.num_batches_tracked.clone()
            layer.reset_running_stats()
            layer.momentum = None  # cumulative mean
        with isolate_rng(include_cuda=pl_module.device.type == "cuda"):  # torch's, numpy's and Python's
            yield
    finally:
        for layer, (momentum, tracked) in zip(layers, before, strict=True):
            layer.momentum, layer.num_batches_tracked = momentum, tracked
        for module, training in modes.items():
            module.training = training


def _batches(trainer: Trainer, pl_module: LightningModule, loader: Any) -> Iterator[Any]:
    limit = None
    if loader is None:
        make = getattr(trainer.datamodule, "eval_train_dataloader", None)  # type: ignore[attr-defined]  # Lightning sets it in a connector
        loader = trainer.train_dataloader if make is None else make()
        if make is None and trainer.num_training_batches != float("inf"):
            limit = int(trainer.num_training_batches)  # limit_train_batches
    with kept_generators(loader):
        for batch in islice(loader, limit):
            yield to_device(trainer, pl_module, batch)
