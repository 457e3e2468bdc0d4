"""The rounds of label cleaning: in each, models are trained on some folds, and their logits of the other samples are kept in a file."""

import hashlib
import io
import json
import logging
import os
import signal
import threading
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from .batch import Batch
from .files import write_file
from .functional.label_cleaning import fuse
from .functional.random import fold_in

Scheme = Literal["train_on_one", "leave_one_out"]
# As in the data: what trains, and what nobody reads.
_TRAIN, _UNUSED = 0, 3
# Numbers that keep the streams of one seed apart.
_MODEL, _VIEW = 22, 23
# A model is its last weights, and nothing that validates, logs or saves sees the samples that it is to judge.
_SILENT: dict[str, Any] = {
    "limit_val_batches": 0,
    "num_sanity_val_steps": 0,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class _WrongOutputError(ValueError):
    """A model gives something else than logits."""


@dataclass(frozen=True)
class Rounds:
    """What a process needs to train and use a model of a round.

    Attributes:
        make_model: datamodule -> a new model.
        datamodule: an `ArrayDataModule`.
        make_trainer: keyword arguments -> a new trainer.
        output: folder of the predictions.
        index: `(N,)` int64, the numbers of the samples in the data set.
        fold: `(N,)` int64, the fold of each.
        scheme: whether round k trains on fold k alone, or on all others.
        views: of each sample, see `clean_labels`.
        seed: of models and views.
        settings: JSON, what the predictions depend on.
    """

    make_model: Callable[[Any], LightningModule]
    datamodule: Any
    make_trainer: Callable[..., Trainer]
    output: Path
    index: Tensor
    fold: Tensor
    scheme: Scheme
    views: int
    seed: int
    settings: str

    @property
    def fingerprint(self) -> str:
        ordered = json.dumps(json.loads(self.settings), sort_keys=True)
        return hashlib.sha256(ordered.encode()).hexdigest()[:16]

    def path(self, number: int, model: int) -> Path:
        return self.output / "predictions" / f"round_{number + 1}_model_{model + 1}.npz"

    def trains(self, number: int) -> Tensor:
        """`(N,)` bool: which samples a round trains on; it predicts the others."""
        return (self.fold == number) if self.scheme == "train_on_one" else (self.fold != number)

    def says_nothing(self, number: int) -> Tensor:
        """`(N,)` bool: of which samples a round says nothing, as it trains on them or lacks their class."""
        trains, label = self.trains(number), self.datamodule.arrays.label[self.index]
        return trains | ~torch.isin(label, label[trains])

    def read(self, number: int, model: int) -> Tensor | None:
        """Logits `(V, n, C)` of the samples that a round predicts; None where there are none of these settings."""
        try:
            with np.load(self.path(number, model), allow_pickle=False) as file:
                whole = str(file["fingerprint"]) == self.fingerprint and file["logits"].shape[1] == int((~self.trains(number)).sum())
                return torch.from_numpy(file["logits"]) if whole else None
        except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile):
            return None

    def try_out(self) -> None:
        """Refuse what is no classifier before it is trained for long."""
        some, name = self.index[:2], type(self.datamodule).__name__
        with _untouched():
            module = self.make_model(self.datamodule)
            try:
                self._predict(module, torch.device("cpu"), some)
            except _WrongOutputError as error:
                raise ValueError(f"{type(module).__name__} does not classify samples of {name}: {error}") from error
            except (RuntimeError, TypeError, ValueError):
                # Neighbours, for one, can only be asked once there are some.
                try:
                    self._logits(0, 0, some, max_epochs=1, limit_train_batches=1)
                except (RuntimeError, TypeError, ValueError) as error:
                    reason = " ".join(str(error).split())
                    raise ValueError(f"{type(module).__name__} does not classify samples of {name}: {reason}") from error

    def write_settings(self) -> None:
        write_file(self.output / "settings.json", self.settings.encode())

    def run(self, number: int, model: int) -> None:
        """Train a model and write its logits."""
        logits = self._logits(number, model, self.index[~self.trains(number)])
        if not bool(logits.isfinite().all()):
            raise ValueError(
                f"model {model + 1} of round {number + 1} gives outputs that are not finite: its training diverged, lower the learning rate"
            )
        content = io.BytesIO()
        np.savez(content, logits=logits.numpy(), index=self.index[~self.trains(number)].numpy(), fingerprint=self.fingerprint)
        write_file(self.path(number, model), content.getvalue())

    def fused(self, number: int, num_models: int, weights: Tensor | None) -> Tensor:
        """Probabilities `(N, C)` of a round, fused over models and views; NaN where it says nothing."""
        read = [self.read(number, model) for model in range(num_models)]
        present = [each for each in read if each is not None]
        assert len(present) == num_models  # `train_missing` comes first
        fused = torch.full((len(self.index), self.datamodule.num_classes), float("nan"))
        fused[~self.trains(number)] = fuse(torch.stack(present), weights)
        fused[self.says_nothing(number)] = float("nan")
        return fused

    def _logits(self, number: int, model: int, index: Tensor, **settings: Any) -> Tensor:
        """Logits `(V, n, C)` of samples by a model that is trained for a round; settings go to its trainer."""
        data = self.datamodule
        before, attached = data.arrays.split, data.trainer
        split = torch.full_like(before, _UNUSED)
        split[self.index[self.trains(number)]] = _TRAIN
        with _untouched():
            try:
                data.reassign(split=split)
                seed_everything(int(fold_in(self.seed, _MODEL, number, model)) & 0x7FFFFFFF, verbose=False)
                module = self.make_model(data)
                trainer = self.make_trainer(**_SILENT, **settings)
                try:
                    trainer.fit(module, datamodule=data)
                except SystemExit:
                    if trainer.interrupted:  # how Lightning ends on Ctrl-C
                        raise KeyboardInterrupt from None
                    raise
                return self._predict(module, trainer.strategy.root_device, index)
            finally:
                data.trainer = attached
                data.reassign(split=before)

    @torch.no_grad()
    def _predict(self, module: LightningModule, device: torch.device, index: Tensor) -> Tensor:
        data, arrays = self.datamodule, self.datamodule.arrays
        module.to(device).eval()
        dtype = next((weight.dtype for weight in module.parameters() if weight.is_floating_point()), torch.float32)
        rows: list[list[Tensor]] = [[] for _ in range(self.views)]
        for view in range(self.views):
            for part in index.split(data.eval_batch_size):
                key = None if self.views == 1 else fold_in(self.seed, _VIEW, view, part).to(device)
                parts = None if arrays.part is None else arrays.part[part].long().to(device)
                batch = Batch(arrays.input[part].to(device), arrays.label[part].to(device), part.to(device), parts, key)
                inputs = data.transform(batch).input
                if key is not None and getattr(data, "views", 1) > 1:  # the data make several at once
                    inputs = inputs[:, 0]
                logits = module(inputs.to(dtype) if inputs.is_floating_point() else inputs)
                if not isinstance(logits, Tensor) or tuple(logits.shape) != (len(part), data.num_classes):
                    shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
                    raise _WrongOutputError(
                        f"its forward must give logits ({len(part)}, {data.num_classes}) of {len(part)} samples, got {shape}"
                    )
                rows[view].append(logits.float().cpu())
        return torch.stack([torch.cat(row) for row in rows])


@contextmanager
def _untouched() -> Iterator[None]:
    """Leave random streams, the seed in the environment, signals and the log level as they were."""
    names = ("PL_GLOBAL_SEED", "PL_SEED_WORKERS")
    environment = {name: os.environ.get(name) for name in names}
    in_main = threading.current_thread() is threading.main_thread()  # only there can a signal be handled
    handler = signal.getsignal(signal.SIGINT) if in_main else None
    loggers = {name: logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")}
    levels = {name: logger.level for name, logger in loggers.items()}
    try:
        for logger in loggers.values():
            logger.setLevel(logging.WARNING)
        with isolate_rng(), warnings.catch_warnings():
            # What Lightning would rather see, such as loaders with workers; and what torch says to it.
            warnings.filterwarnings("ignore", category=PossibleUserWarning)
            for message in (".*LeafSpec.*is deprecated.*", "You passed in a `val_dataloader`"):
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        for name, logger in loggers.items():
            logger.setLevel(levels[name])
        if in_main and handler is not None:  # Lightning ignores Ctrl-C from the first one on
            signal.signal(signal.SIGINT, handler)
        for name, value in environment.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def train_missing(rounds: Rounds, folds: int, num_models: int, jobs: int, say: Callable[[str], None]) -> None:
    """Train the models of all rounds whose predictions are not there yet.

    Args:
        rounds: how.
        folds: K, as many rounds.
        num_models: in each round.
        jobs: processes, which train a model each.
        say: gets lines of progress.

    Raises:
        ValueError: if a model's outputs are not finite.
    """
    every = [(number, model) for number in range(folds) for model in range(num_models)]
    missing = [each for each in every if rounds.read(*each) is None]
    if len(missing) < len(every):
        say(f"{len(every) - len(missing)} of {len(every)} models were trained before")
    if missing:
        rounds.write_settings()
    start = time.monotonic()
    for done, (number, model) in enumerate(_finished(rounds, missing, jobs), start=1):
        logits = rounds.read(number, model)
        assert logits is not None  # just written
        trains, label = rounds.trains(number), rounds.datamodule.arrays.label[rounds.index]
        agrees = float((logits.mean(dim=0).argmax(dim=1) == label[~trains]).float().mean())
        seconds = (time.monotonic() - start) / done * (len(missing) - done)
        rest = f"; about {_duration(seconds)} left" if done < len(missing) else ""
        say(
            f"round {number + 1} of {folds}, model {model + 1} of {num_models}: trained on {int(trains.sum()):,} samples, agrees with "
            f"{agrees:.1%} of {int((~trains).sum()):,} other labels{rest}"
        )


def _run_in_worker(rounds: Rounds, number: int, model: int, threads: int) -> tuple[int, int]:
    torch.set_num_threads(threads)
    rounds.run(number, model)
    return number, model


def _finished(rounds: Rounds, missing: list[tuple[int, int]], jobs: int) -> Iterator[tuple[int, int]]:
    """Train models one after the other, or in processes; yields each when it is done."""
    if jobs == 1 or len(missing) < 2:
        for number, model in missing:
            rounds.run(number, model)
            yield number, model
        return
    from joblib import Parallel, delayed

    threads = max(1, torch.get_num_threads() // jobs)
    parallel = Parallel(n_jobs=min(jobs, len(missing)), return_as="generator_unordered", batch_size=1, pre_dispatch="n_jobs")
    yield from parallel(delayed(_run_in_worker)(rounds, *each, threads) for each in missing)


def _duration(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole} s" if whole < 90 else f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
