"""Snapshot ensembles: one training on a cyclic learning rate, the weights at the end of each cycle, and their mean prediction."""

import copy
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts

from ..zoo.functional.views import log_mean_probability
from .features import known_classes
from .guards import refuse, refuse_manual_optimization, refuse_sharded, refuse_together
from .predictions import output_folder


class SnapshotEnsemble(Callback):
    """Trains one model into `num_cycles` minima on a cyclic learning rate, and tests and predicts with the mean of all of them.

    Training: the learning rate of optimiser step t = 1 ... T is, in M cycles of L = ceil(T / M) steps (the last one may be shorter),

        lr(t) = min_lr + (lr - min_lr) / 2 (cos(pi mod(t - 1, L) / L) + 1),

    with lr that of the optimizer, for each parameter group. At the end of cycle m the weights go to `cycle_<m>.ckpt`, a weights-only
    checkpoint for `load_from_checkpoint`. A further run takes the next free folder (`snapshots-v1`, ...); a resumed run goes on in the
    folder of the run it resumes, and writes the snapshots that it takes again anew.

    In `test` and `predict`, `forward` gives the log of the mean probability,

        log p(c | x) = log (1/M sum_m softmax(z_m(x))_c),

    in float32 or wider, so softmax, argmax and cross entropy of it are those of the mean. All snapshots of the run count, whichever of
    its checkpoints is tested, on the Trainer of the fit or, with `ckpt_path=`, on another one. `validate` and the validation in `fit`
    use the current weights. `fast_dev_run` writes no snapshots and tests without them.

    Cost: no more than a plain training; in tests M forward passes a batch and M copies of the weights on the device.
    Composes with: gradient accumulation, mixed precision, DDP, resuming, and every callback but weight averages and those that
    look for a learning rate or a batch size. Refuses a scheduler of the module's own, manual optimisation and sharding strategies.

    Args:
        num_cycles: number of cycles and snapshots M, from 1 (plain cosine annealing) to what T allows.
        min_lr: lowest learning rate, from 0 up to that of the optimizer; the paper's equation has 0.
        dirpath: folder of the snapshots, by default `snapshots` in the run's folder; if they were moved, where they are now.

    Raises:
        ValueError: if a setting is out of range, or if `forward` gives anything but logits (B, C) with C of at least 2.
        MisconfigurationException: if the trainer, the module or the checkpoint does not allow it; the message says what to do.

    Example:
        >>> trainer = Trainer(max_epochs=50, callbacks=[SnapshotEnsemble(num_cycles=5)])
        >>> trainer.fit(model, datamodule=data)
        >>> trainer.test(model, datamodule=data)

    Source:
        Huang, Li, Pleiss, Liu, Hopcroft & Weinberger, "Snapshot Ensembles: Train 1, Get M for Free", ICLR 2017, equation 2 and
        section 3; min_lr is that of Loshchilov & Hutter, "SGDR", ICLR 2017, equation 5.
    """

    def __init__(self, num_cycles: int = 5, min_lr: float = 0.0, dirpath: str | Path | None = None) -> None:
        if num_cycles < 1:
            raise ValueError(f"num_cycles must be at least 1, got {num_cycles}")
        if not 0 <= min_lr < math.inf:
            raise ValueError(f"min_lr must be at least 0 and finite, got {min_lr}")
        self.num_cycles = num_cycles
        self.min_lr = min_lr
        self.dirpath = None if dirpath is None else Path(dirpath).absolute()
        self._forget()
        # While tests or predictions run: the forward in the module's place, the instance's own one before it, and whether it was called.
        self._ensemble: Any = None
        self._before: Any = None
        self._called = False

    def _forget(self) -> None:
        # What a resumed run must share with the run it resumes; None before the training.
        self._settings: dict[str, Any] | None = None
        self._folder: Path | None = None
        self._taken = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._forget()
        refuse_sharded(self, trainer)
        averages = ("EMA", "SWA", "WeightAveraging", "StochasticWeightAveraging")
        refuse_together(self, trainer, averages, "because snapshots are raw weights, and the average is not")
        finders = ("LearningRateFinder", "BatchSizeFinder")
        refuse_together(self, trainer, finders, "which changes the learning rate or the number of steps after the cycles were planned")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        refuse_manual_optimization(self, pl_module)
        if trainer.lr_scheduler_configs:
            raise refuse(self, "sets the learning rate, as does the module's own scheduler", "return only the optimizer")
        optimizer = trainer.optimizers[0]
        rates = [float(group["lr"]) for group in optimizer.param_groups if "lr" in group]
        if not rates:
            raise refuse(self, "finds no learning rate", "return an optimizer with lr from configure_optimizers")
        if self.min_lr > min(rates):
            raise refuse(self, f"has min_lr={self.min_lr:g} above the learning rate {min(rates):g}", "lower min_lr")
        # Counting the steps here would load the training data before a stateful loader is restored, so the length comes later.
        scheduler = CosineAnnealingWarmRestarts(optimizer, T_0=1, eta_min=self.min_lr)
        trainer.strategy.lr_scheduler_configs.append(LRSchedulerConfig(scheduler, interval="step"))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if getattr(trainer, "fast_dev_run", False):
            return
        steps = trainer.estimated_stepping_batches
        if not 0 < steps < math.inf:
            raise refuse(self, "cannot divide a training without end into cycles", "set max_epochs or max_steps")
        length = math.ceil(steps / self.num_cycles)
        cycles = math.ceil(steps / length)
        if cycles < self.num_cycles:
            raise refuse(
                self,
                f"cannot make {self.num_cycles} cycles of {steps} optimiser steps, only {cycles} of {length}",
                f"set num_cycles={cycles} or train longer",
            )
        settings = {"num_cycles": self.num_cycles, "min_lr": self.min_lr, "steps": int(steps)}
        if self._settings is None and trainer.global_step > 0:
            raise refuse(
                self,
                f"would begin at step {trainer.global_step} of a training whose cycles it did not set",
                "fit with a new Trainer, or resume a checkpoint of a fit with it",
            )
        if self._settings not in (None, settings):
            raise refuse(self, f"resumes a training with {self._settings}, but has {settings}", "resume with the same settings and epochs")
        output = output_folder(trainer)
        folder = trainer.strategy.broadcast(self._choose_folder(trainer, output) if trainer.is_global_zero else None)
        if folder is None:
            raise self._moved()
        self._folder, self._settings = folder, settings
        scheduler = trainer.lr_scheduler_configs[0].scheduler
        scheduler.T_0 = scheduler.T_i = length  # type: ignore[union-attr]
        # A callback before this one may have saved the checkpoint of this resume just before the snapshot.
        self._take_snapshot_if_due(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._take_snapshot_if_due(trainer)

    def _take_snapshot_if_due(self, trainer: Trainer) -> None:
        if self._settings is None or self._folder is None:
            return
        scheduler: Any = trainer.lr_scheduler_configs[0].scheduler
        # The scheduler's own count, so that snapshots and restarts cannot drift apart.
        ended = self.num_cycles if scheduler.last_epoch >= self._settings["steps"] else scheduler.last_epoch // scheduler.T_0
        if ended > self._taken:
            trainer.save_checkpoint(self._folder / _name(ended), weights_only=True)
            self._taken = ended

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._settings is not None and self._taken < self.num_cycles:
            rank_zero_warn(f"SnapshotEnsemble has {self._taken} of {self.num_cycles} snapshots: the training ended before its last step")

    def state_dict(self) -> dict[str, Any]:
        return {} if self._settings is None else {"settings": self._settings, "folder": str(self._folder), "taken": self._taken}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._settings = state_dict["settings"]
        self._folder = Path(state_dict["folder"])
        self._taken = state_dict["taken"]

    def _choose_folder(self, trainer: Trainer, output: Path) -> Path | None:
        """The folder of the run that is resumed, None if its snapshots are gone, or a free one."""
        if self._taken:
            return self._find_folder(trainer)
        if self._folder is not None and self._folder.parent.is_dir():
            return self._folder
        base = self.dirpath or output.absolute() / "snapshots"
        folder, version = base, 0
        while any(folder.glob(_name("*"))):
            version += 1
            folder = base.with_name(f"{base.name}-v{version}")
        return folder

    def _find_folder(self, trainer: Trainer) -> Path | None:
        """The first folder that has all snapshots of the run so far, and at least one."""
        if self._folder is None:
            places = [] if self.dirpath is None else [self.dirpath]
        else:
            places = [self._folder]
            # Without a snapshot to look for, those of another run would do.
            if self._taken:
                name = self._folder.name
                if self.dirpath is not None:
                    is_version = name.startswith(f"{self.dirpath.name}-v")
                    places.append(self.dirpath.with_name(name) if is_version else self.dirpath)
                if trainer.ckpt_path:
                    places += [parent / name for parent in Path(trainer.ckpt_path).absolute().parents[:2]]
        wanted = [_name(cycle + 1) for cycle in range(max(self._taken, 1))]
        return next((place for place in places if all((place / file).is_file() for file in wanted)), None)

    def _moved(self) -> Exception:
        files = _name(1) if self._taken == 1 else f"{_name(1)} ... {_name(self._taken)}"
        return refuse(self, f"does not find {files} in {self._folder}", "give the folder in which they are now as dirpath")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._replace_forward(trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._replace_forward(trainer, pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish(pl_module, trainer.num_test_batches)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish(pl_module, trainer.num_predict_batches)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._restore_forward(pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._restore_forward(pl_module)

    def _replace_forward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        refuse_sharded(self, trainer)
        if getattr(trainer, "fast_dev_run", False) and self._folder is None:
            return
        folder = self._find_folder(trainer)
        if folder is None and self._taken:
            raise self._moved()
        if folder is None:
            raise refuse(self, "has no snapshots", "fit with it first, or give ckpt_path of a checkpoint that such a fit has written")
        members = _weights_of_snapshots(pl_module, folder)
        original = pl_module.forward
        caller = _Caller(pl_module, original)
        classes = known_classes(trainer, pl_module, None)

        def ensemble(*args: Any, **kwargs: Any) -> Tensor:
            self._called = True
            # The weights of every place are given, and tying would leave modules that occur twice with the snapshot's weights.
            outputs = (functional_call(caller, weights, args, kwargs, tie_weights=False) for weights in members)
            return log_mean_probability(torch.stack([_checked_logits(pl_module, output, classes) for output in outputs]))

        self._called = False
        # Something else may have replaced it before, such as torch.compile.
        self._before = vars(pl_module).get("forward")
        self._ensemble = ensemble
        pl_module.forward = ensemble  # type: ignore[method-assign]

    def _finish(self, pl_module: LightningModule, batches: Iterable[float]) -> None:
        if self._ensemble is not None and not self._called and sum(batches) > 0:
            raise refuse(self, f"averaged nothing: the steps of {type(pl_module).__name__} never called forward", "let them call self(x)")
        # If another callback has replaced it in turn, teardown finds it again.
        if vars(pl_module).get("forward") is self._ensemble:
            self._restore_forward(pl_module)

    def _restore_forward(self, pl_module: LightningModule) -> None:
        """Undo `_replace_forward`, and hold on to nothing."""
        if self._ensemble is not None and vars(pl_module).get("forward") is self._ensemble:
            del pl_module.forward
            if self._before is not None:
                pl_module.forward = self._before  # type: ignore[method-assign]
        self._ensemble = self._before = None


class _Caller(nn.Module):
    """Calls the forward of a module that has another one in its place, so that `functional_call` does not end up in that."""

    def __init__(self, module: nn.Module, forward: Any) -> None:
        super().__init__()
        self.module = module
        self.original = forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.original(*args, **kwargs)


def _name(cycle: int | str) -> str:
    return f"cycle_{cycle}.ckpt"


def _weights_of_snapshots(module: LightningModule, folder: Path) -> list[dict[str, Tensor]]:
    """Parameters and buffers of each snapshot, as the module itself loads them; the module keeps its own."""
    members: list[dict[str, Tensor]] = []
    # Not as inference tensors: a step may want gradients with respect to its input.
    with torch.inference_mode(False), torch.no_grad():
        own = copy.deepcopy(module.state_dict())
        try:
            while (path := folder / _name(len(members) + 1)).is_file():
                state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
                module.load_state_dict(state, strict=module.strict_loading)
                members.append({name: tensor.clone() for name, tensor in _places_of_tensors(module)})
        finally:
            module.load_state_dict(own, strict=module.strict_loading)
    return members


def _places_of_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Every place of a tensor once: a shared weight has several, a shared submodule's weight one."""
    return [
        (f"module.{name}", tensor)
        for prefix, child in module.named_modules()
        for named in (child.named_parameters, child.named_buffers)
        for name, tensor in named(prefix, recurse=False, remove_duplicate=False)
    ]


def _checked_logits(module: LightningModule, output: Any, classes: int | None) -> Tensor:
    is_logits = isinstance(output, Tensor) and output.is_floating_point() and output.dim() == 2 and output.shape[1] > 1
    if not is_logits or classes not in (None, output.shape[1]):  # of features, the softmax would mean nothing
        found = f"{output.dtype} of shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        wanted = "(batch, classes)" if classes is None else f"(batch, {classes})"
        raise ValueError(f"SnapshotEnsemble averages logits {wanted}, but the forward of {type(module).__name__} gives {found}")
    return output
