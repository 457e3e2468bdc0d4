"""What the callbacks that judge a representation share: features of batches, and of the whole training set."""

import contextlib
import random
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DistributedSampler

from ..zoo.batch import Batch, input_and_label, labelled_samples
from ..zoo.layers.modes import evaluating
from .evaluation import EvaluationObserver
from .guards import refuse

Features = Literal["encode", "forward"]

# Keeps the samples of a batch apart from those of the next one.
_BATCH = 1 << 32
# Seconds after which a pass over the training set shows a progress bar.
_PATIENCE = 5.0


class FeatureBank(NamedTuple):
    """Features of the training set, in the loader's order, the same on every process.

    Attributes:
        features: `(N, D)` float32 of unit length.
        label: `(N,)` int64, -1 where it is unknown.
        key: `(N,)` int64, ascending: by it `samples_at` finds the sample again.
    """

    features: Tensor
    label: Tensor
    key: Tensor


# Features of a batch and of a training set


def to_device(trainer: Trainer, pl_module: LightningModule, batch: Any) -> Any:
    """A loader's batch as a step gets it: in the training's precision, on the device, after the hooks of module and data."""
    batch = pl_module._on_before_batch_transfer(trainer.precision_plugin.convert_input(batch), dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, pl_module.device)


def inputs_of(pl_module: LightningModule, batch: Any) -> Tensor:
    """Inputs of a batch with labels or without. Views in a `Batch` are samples of their own; of a list of views, the first one is taken.

    Raises:
        ValueError: if it holds none.
    """
    inputs = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if isinstance(inputs, (tuple, list)) and inputs:
        inputs = inputs[0]
    if isinstance(inputs, Tensor):
        return inputs.flatten(0, 1) if isinstance(batch, Batch) and inputs.dim() == 5 else inputs
    raise ValueError(
        f"the batches of {type(pl_module).__name__} are no inputs, but {type(batch).__name__}: "
        "let the loader yield x, (x, ...), or a litzoo Batch"
    )


def samples_of(pl_module: LightningModule, batch: Any) -> tuple[Tensor, Tensor]:
    """Inputs, as by `inputs_of`, and labels `(B,)` of a batch.

    Raises:
        ValueError: if it is no batch of inputs and labels.
    """
    with contextlib.suppress(TypeError):
        label = input_and_label(batch)[1]
        if isinstance(label, Tensor) and label.dim() == 1 and not label.is_floating_point():
            is_views = isinstance(batch, Batch) and batch.input.dim() == 5
            return inputs_of(pl_module, batch), label.long().repeat_interleave(batch.input.shape[1]) if is_views else label.long()
    raise ValueError(
        f"the batches of {type(pl_module).__name__} are no pairs of inputs and labels (batch,), but {type(batch).__name__}: "
        "let the loader yield (x, y), or a litzoo Batch"
    )


def encode(trainer: Trainer, pl_module: LightningModule, features: Features, inputs: Tensor) -> Tensor:
    """Features `(B, D)` in float32, in evaluation mode and without a trace in modes and random streams.

    Raises:
        ValueError: if the module gives something else.
    """
    with torch.no_grad(), evaluating(pl_module), _kept_random_streams(pl_module):
        with trainer.precision_plugin.forward_context():
            found = getattr(pl_module, features)(inputs)
    return _checked(pl_module, features, found, len(inputs))


def _checked(pl_module: LightningModule, features: Features, found: Any, rows: int) -> Tensor:
    if not isinstance(found, Tensor) or found.dim() != 2 or len(found) != rows or not found.is_floating_point():
        shape = f"{found.dtype} {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"{type(pl_module).__name__}.{features} must give features ({rows}, D) in floats for {rows} inputs, got {shape}")
    return found.detach().float()


def directions(features: Tensor) -> Tensor:
    """Features `(B, D)` at unit length; of what is not finite, or has no direction, zeros: a training that diverges must not end here."""
    return F.normalize(features, dim=1).nan_to_num(0.0, 0.0, 0.0)


class FeatureTap:
    """Replaces a module's `encode` or `forward` during a step, and notes the input and output of the first call.

    So the features that a step computes anyway need not be computed again.

    Args:
        pl_module: whose method it replaces between `insert` and `remove`.
        features: the name of that method.
    """

    def __init__(self, pl_module: LightningModule, features: Features) -> None:
        self._pl_module = pl_module
        self._features: Features = features
        self._method: Any = None
        self._own: Any = None
        self.given: Tensor | None = None
        self.found: Tensor | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        found = self._method(*args, **kwargs)
        # A second pass, such as that of SAM, comes later.
        if self.found is None and args and isinstance(args[0], Tensor) and isinstance(found, Tensor):
            self.given, self.found = args[0].detach(), found.detach()
        return found

    def insert(self) -> None:
        self.remove()
        # An attribute of the object itself hides the method; torch.compile and some callbacks set one, too.
        self._own = vars(self._pl_module).get(self._features)
        self._method = getattr(self._pl_module, self._features)
        vars(self._pl_module)[self._features] = self

    def remove(self) -> None:
        self.given = self.found = None
        if self._method is None:
            return
        if self._own is None:
            vars(self._pl_module).pop(self._features, None)
        else:
            vars(self._pl_module)[self._features] = self._own
        self._method = self._own = None

    def take(self, batch: Any) -> tuple[Tensor, Tensor] | None:
        """The noted features `(R, D)` in float32 and their labels `(R,)`, or None if they are not those of the batch's own inputs."""
        given, found = self.given, self.found
        if given is None or found is None:
            return None
        inputs, label = input_and_label(batch)
        label = label.long()
        if isinstance(inputs, (list, tuple)) and inputs:
            inputs = inputs[0]
        if not isinstance(inputs, Tensor):
            return None
        rows: Tensor | None = None
        if _is_same(given, inputs):
            rows = label
        elif inputs.dim() == 5 and given.dim() == 4:  # views
            if _is_same(given, inputs.flatten(0, 1)):
                rows = label.repeat_interleave(inputs.shape[1])
            elif torch.equal(given, inputs.transpose(0, 1).flatten(0, 1)):
                rows = label.repeat(inputs.shape[1])
            elif _is_same(given, inputs[:, 0]):
                rows = label
        return None if rows is None else (_checked(self._pl_module, self._features, found, len(rows)), rows)


def _is_same(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors are the same numbers at the same place; comparing the numbers would wait for the device."""
    return (first.data_ptr(), first.shape, first.stride(), first.dtype) == (second.data_ptr(), second.shape, second.stride(), second.dtype)


@contextlib.contextmanager
def _kept_random_streams(pl_module: LightningModule) -> Iterator[None]:
    """Lightning's `isolate_rng`, which by itself restores nothing where an exception, or a loop's break, leaves it."""
    with contextlib.closing(contextlib.ExitStack()) as stack:
        stack.enter_context(isolate_rng(include_cuda=pl_module.device.type == "cuda"))
        yield


@contextlib.contextmanager
def kept_generators(loader: Any) -> Iterator[list[torch.Generator]]:
    """Leave the random generators that a loader and its sampler hold as they are; yields them."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    owners = (loader, getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
    held = [getattr(owner, "generator", None) for owner in owners]
    generators = [generator for generator in held if isinstance(generator, torch.Generator)]
    states = [generator.get_state() for generator in generators]
    try:
        yield generators
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def distributed_sampler(loader: Any) -> DistributedSampler | None:
    """The sampler that deals the loader's samples out to the processes, if there is one."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    for sampler in (getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)):
        if isinstance(sampler, DistributedSampler):
            return sampler
    return None


def evaluated_samples(trainer: Trainer, stage: Literal["val", "test"]) -> int:
    """How many samples the first evaluation loader deals out, before those that a distributed sampler repeats so that all have as many."""
    loaders = tree_leaves(trainer.val_dataloaders if stage == "val" else trainer.test_dataloaders)
    dataset: Any = getattr(distributed_sampler(loaders[0]) if loaders else None, "dataset", None)
    return len(dataset) if hasattr(dataset, "__len__") else torch.iinfo(torch.long).max


def _samples(trainer: Trainer, pl_module: LightningModule, loader: Iterable[Any]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Inputs, labels and keys of this process's share of a loader, the same in every pass; ascending keys are the loader's order.

    A loader with a distributed sampler yields that share; of any other one, which is the same on every process, this process
    takes every so many-th batch.
    """
    sampler, rank, world = distributed_sampler(loader), trainer.global_rank, trainer.world_size
    limit = 1 if getattr(trainer, "fast_dev_run", False) else None
    rows = 0
    with kept_generators(loader) as generators, _kept_random_streams(pl_module):
        # All processes and all passes see a shuffling loader's samples in the same order.
        random.seed(0)
        np.random.seed(0)
        for generator in (torch.default_generator, *generators):
            generator.manual_seed(0)
        for number, batch in enumerate(_with_progress(trainer, islice(loader, limit), loader)):
            if sampler is None and number % world != rank:
                continue
            inputs, label = samples_of(pl_module, to_device(trainer, pl_module, batch))
            row = torch.arange(len(label), device=label.device)
            key = number * _BATCH + row if sampler is None else (rows + row) * world + rank
            rows += len(label)
            # A plain distributed sampler repeats samples until all processes have as many.
            length = len(sampler.dataset) if hasattr(sampler, "dataset") else None  # type: ignore[union-attr, arg-type]  # hasattr narrows no union
            own = slice(None) if length is None else slice(int((key < length).sum()))
            yield inputs[own], label[own], key[own]


def _with_progress(trainer: Trainer, batches: Iterable[Any], loader: Iterable[Any]) -> Iterable[Any]:
    bar = trainer.progress_bar_callback
    if bar is None or not getattr(bar, "is_enabled", True) or not trainer.is_global_zero:
        return batches
    from tqdm import tqdm

    total = len(loader) if hasattr(loader, "__len__") else None  # type: ignore[arg-type]  # hasattr narrows no iterable
    return tqdm(batches, "Training samples", total, leave=False, delay=_PATIENCE)


def over_loader(
    trainer: Trainer, pl_module: LightningModule, loader: Iterable[Any], function: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """What a function of inputs, rows `(B, D)`, makes of all of a loader's samples, with their labels and ascending keys.

    Every process must call it, works on its share, and gets all. The loader may have a `DistributedSampler` or none; without one it
    must be the same on every process. Under a distributed sampler that does not shuffle, a key is the place of a sample in the order.

    Returns:
        `(N, D)`, `(N,)` int64 and `(N,)` int64; an empty loader gives empty tensors.
    """
    parts = [(function(inputs), label, key) for inputs, label, key in _samples(trainer, pl_module, loader)]
    if parts:
        found, label, key = (torch.cat(columns) for columns in zip(*parts, strict=True))
    else:
        found, label, key = torch.zeros(0, 0), torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long)
    del parts
    if trainer.world_size > 1:
        found, label, key = (gathered_rows(trainer, pl_module, column) for column in (found, label, key))
        order = key.argsort()
        found, label, key = found[order], label[order], key[order]
    return found, label, key


def encode_loader(trainer: Trainer, pl_module: LightningModule, features: Features, loader: Iterable[Any]) -> FeatureBank:
    """Features of all of a loader's samples; every process must call it, encodes its share, and gets all of them, see `over_loader`.

    Raises:
        ValueError: if the loader is empty.
    """
    bank = FeatureBank(*over_loader(trainer, pl_module, loader, lambda inputs: directions(encode(trainer, pl_module, features, inputs))))
    if len(bank.key) == 0:
        raise ValueError("the loader of training samples is empty: give a reference_loader that can be iterated over several times")
    return bank


def gathered_rows(trainer: Trainer, pl_module: LightningModule, rows: Tensor) -> Tensor:
    """The rows `(n,)` or `(n, D)` of all processes; one with none of them need not know D."""
    rows = rows.to(pl_module.device)
    sizes: Any = trainer.strategy.all_gather(torch.tensor([*rows.shape], device=rows.device))
    shape = sizes.amax(0).tolist()
    padded = rows.new_zeros(shape)
    if len(rows):
        padded[: len(rows)] = rows
    gathered: Any = trainer.strategy.all_gather(padded)
    return torch.cat([part[:size] for part, size in zip(gathered, sizes[:, 0].tolist(), strict=True)])


def samples_at(trainer: Trainer, pl_module: LightningModule, loader: Iterable[Any], keys: Tensor) -> dict[int, Tensor]:
    """The inputs of some samples of a `FeatureBank`, by their keys, on the CPU; every process must call it, and gets all of them."""
    last = int(keys.max())
    found: dict[int, Tensor] = {}
    for inputs, _, key in _samples(trainer, pl_module, loader):
        for row in torch.isin(key, keys.to(key.device)).nonzero().squeeze(1).tolist():
            found[int(key[row])] = inputs[row].cpu()
        if len(key) and int(key[-1]) >= last:
            break
    if trainer.world_size > 1:
        everybody: list[Any] = [None] * trainer.world_size
        torch.distributed.all_gather_object(everybody, found)
        found = {key: value for part in everybody for key, value in part.items()}
    return found


# What several callbacks look at in the same evaluation is encoded once


class _Memo:
    """What was encoded in the evaluation that runs."""

    def __init__(self) -> None:
        self.batch: Any = None
        self.features: dict[Features, Tensor] = {}
        self.banks: dict[tuple[Features, int | None], FeatureBank] = {}


_MEMOS: WeakKeyDictionary[Trainer, _Memo] = WeakKeyDictionary()


def batch_features(trainer: Trainer, pl_module: LightningModule, features: Features, batch: Any) -> Tensor:
    """Features `(B, D)` of an evaluation batch."""
    memo = _MEMOS.setdefault(trainer, _Memo())
    if memo.batch is not batch:
        memo.batch, memo.features = batch, {}
    if features not in memo.features:
        memo.features[features] = encode(trainer, pl_module, features, inputs_of(pl_module, batch))
    return memo.features[features]


def training_features(
    trainer: Trainer, pl_module: LightningModule, features: Features, reference_loader: Iterable[Any] | None
) -> FeatureBank:
    """Features of the training set in an evaluation; every process must call it."""
    banks = _MEMOS.setdefault(trainer, _Memo()).banks
    place = (features, None if reference_loader is None else id(reference_loader))
    if place not in banks:
        banks[place] = encode_loader(trainer, pl_module, features, loader_of(trainer, pl_module, reference_loader))
    return banks[place]


# Where the training samples come from


def _loader_maker(trainer: Trainer, pl_module: LightningModule) -> Any:
    datamodule = getattr(trainer, "datamodule", None)
    return getattr(datamodule, "eval_train_dataloader", None) or getattr(pl_module, "eval_train_dataloader", None)


def loader_of(trainer: Trainer, pl_module: LightningModule, reference_loader: Iterable[Any] | None) -> Iterable[Any]:
    """The loader that was given, else a new one of the data's training samples in evaluation."""
    return _loader_maker(trainer, pl_module)() if reference_loader is None else reference_loader


def check_reference_loader(reference_loader: Iterable[Any] | None) -> None:
    """Refuse what gives its samples only once.

    Raises:
        TypeError: if it is an iterator.
    """
    if isinstance(reference_loader, Iterator):
        raise TypeError("reference_loader can be iterated over only once: give a DataLoader or a list")


def refuse_without_training_samples(
    callback: Callback, trainer: Trainer, pl_module: LightningModule, reference_loader: Iterable[Any] | None
) -> None:
    """Refuse to start without training samples to compare with."""
    if reference_loader is None and _loader_maker(trainer, pl_module) is None:
        raise refuse(
            callback,
            "has no training samples to compare with",
            "give it a reference_loader, or the trainer a DataModule with eval_train_dataloader()",
        )


def refuse_training_loader(callback: Callback, trainer: Trainer, reference_loader: Iterable[Any] | None) -> None:
    """Refuse the loader that the training itself iterates over: a pass in between would disturb it."""
    loaders = trainer.train_dataloader
    loaders = list(loaders.values()) if isinstance(loaders, dict) else loaders if isinstance(loaders, (list, tuple)) else [loaders]
    if reference_loader is not None and any(loader is reference_loader for loader in loaders):
        raise refuse(callback, "must not go through the training's own loader", "give a second loader as reference_loader, unshuffled")


def labelled_training_samples(trainer: Trainer) -> int | None:
    """How many training samples have a label, if the data say so by their `class_counts`."""
    return labelled_samples(getattr(trainer, "datamodule", None))


def known_classes(trainer: Trainer, pl_module: LightningModule, given: int | None) -> int | None:
    """The number of classes: the given one, else the model's or the data's, else None."""
    owners = (getattr(pl_module, "hparams", None) or {}).get("num_classes"), getattr(pl_module, "num_classes", None)
    for number in (given, *owners, getattr(getattr(trainer, "datamodule", None), "num_classes", None)):
        if isinstance(number, int):
            return number
    return None


class FeatureObserver(EvaluationObserver):
    """Base of callbacks that look at the features of validation and test samples.

    Args:
        features: the module's method that gives the features `(B, D)` of inputs: "encode" or "forward".
        every_n_epochs: in `fit`, look at the first validated epoch (also after a resume), every n-th one and the last.
    """

    def __init__(self, features: Features, every_n_epochs: int) -> None:
        if features not in ("encode", "forward"):
            raise ValueError(f"features must be 'encode' or 'forward', got {features!r}")
        if every_n_epochs < 1:
            raise ValueError(f"every_n_epochs must be at least 1, got {every_n_epochs}")
        self.features: Features = features
        self.every_n_epochs = every_n_epochs
        # Which epoch of this training was validated first.
        self._first_epoch: int | None = None

    @property
    def state_key(self) -> str:
        return self._generate_state_key(features=self.features)

    @property
    def suffix(self) -> str:
        """The end of the names under which scores are logged and pictures written."""
        return "" if self.features == "encode" else "_forward"

    def has_features(self, pl_module: LightningModule) -> bool:
        """Whether the module has the method that gives the features."""
        method = getattr(pl_module, self.features, None)
        # By name, because `pytorch_lightning` has a class of its own; both inherit a forward that only raises.
        return callable(method) and getattr(method, "__qualname__", "") not in ("LightningModule.forward", "_forward_unimplemented")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "predict":
            return
        if not self.has_features(pl_module):
            other = "forward" if self.features == "encode" else "encode"
            raise refuse(
                self,
                f"needs the features of {type(pl_module).__name__}, which has no {self.features}",
                f"define {self.features}(self, x) -> (batch, dimensions), or set features={other!r}",
            )
        if any(callback is not self and callback.state_key == self.state_key for callback in trainer.callbacks):  # type: ignore[attr-defined]  # Lightning sets it in a connector
            raise refuse(self, "would use the same names as another one of its kind", "keep one of the two, or change what names it")
        self._first_epoch = None

    def is_due(self, trainer: Trainer) -> bool:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return True
        epoch = trainer.current_epoch
        if self._first_epoch is None:
            self._first_epoch = epoch
        return epoch == self._first_epoch or (epoch + 1) % self.every_n_epochs == 0 or epoch + 1 == trainer.max_epochs

    def _forget(self, trainer: Trainer) -> None:
        self.begin()
        _MEMOS.pop(trainer, None)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._forget(trainer)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._forget(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._forget(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._forget(trainer)


def log_score(pl_module: LightningModule, name: str, value: float | Tensor, prog_bar: bool = True) -> None:
    """Log a number that is the same on every process."""
    value = torch.as_tensor(value, dtype=torch.float32, device=pl_module.device)
    pl_module.log(name, value, prog_bar=prog_bar, sync_dist=True)


def accuracy_over_processes(trainer: Trainer, pl_module: LightningModule, right: Tensor | int, samples: Tensor | int) -> float | None:
    """The share of right samples over all processes, None without samples; every process must call it."""
    counts = torch.stack([torch.as_tensor(count, device=pl_module.device).long() for count in (right, samples)])
    total_right, total = trainer.strategy.reduce(counts, reduce_op="sum").tolist()
    return total_right / total if total else None
