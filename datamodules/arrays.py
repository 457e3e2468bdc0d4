"""The contract of every DataModule: whole batches by index, randomness by key, exact resume."""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, SequentialSampler

from ..zoo.batch import Batch
from ..zoo.functional.random import fold_in, global_seed, random_order
from .errors import DataError
from .packing import map_array, map_images
from .splits import SPLIT_NAMES, TEST, TRAIN, UNUSED, VAL

# Numbers that keep the streams of one seed apart.
_ORDER, _SAMPLE, _INTERLEAVE, _REPEAT = 1, 2, 6, 7


@dataclass(frozen=True)
class Arrays:
    """A data set in memory, or its input memory-mapped, all splits together.

    Attributes:
        input: `(M, ...)`, any dtype.
        label: `(M,)` int64; -1 where it is unknown.
        split: `(M,)` uint8: 0 = train, 1 = validation, 2 = test, 3 = unused.
        class_names: name of each class.
        part: `(M, N)` part labels of points, or None.
        part_names: name of each part; empty without parts.
        mapped: the file that `input` is mapped from, or None: images from `image`, points from `points` and their `part`. What a
            worker process is sent is its path, not the data.
        count: `(M,)` int64, how many points each cloud has; behind them, its points come again from the first on. None if all are full.
    """

    input: Tensor
    label: Tensor
    split: Tensor
    class_names: tuple[str, ...]
    part: Tensor | None = None
    part_names: tuple[str, ...] = ()
    mapped: Path | None = None
    count: Tensor | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        if self.mapped is not None:
            values["input"] = "image" if self.input.dim() == 4 else "points"
            values["part"] = None if self.part is None else "part"
        return _rebuild, (values,)


def _rebuild(values: dict[str, Any]) -> Arrays:
    """Arrays that were sent to another process; of mapped ones, their names in the file were."""
    path = values["mapped"]
    if path is not None:
        values["input"] = map_images(path) if values["input"] == "image" else map_array(path, values["input"])
        values["part"] = None if values["part"] is None else map_array(path, values["part"])
    return Arrays(**values)


class BatchSampler(DistributedSampler, SequentialSampler):
    """Yields `(epoch, indices)`, one batch at a time, for this process.

    The order of the samples is a function of (seed, epoch). In training, each process takes its part of every global
    batch. In evaluation, the samples are dealt out without duplicates and every process gets the same number of batches.
    It subclasses `DistributedSampler` and `SequentialSampler` only so that Lightning leaves it in place, in several
    processes and with `overfit_batches`.

    Args:
        indices: `(M,)` int64, positions in the data set.
        batch_size: samples in a batch of one process.
        seed: seed of the order.
        training: shuffle, and drop the incomplete last batch (if there is more than one batch).
        shuffle: False keeps the order of `indices` in training.
        label: `(M,)` int64, the class of each index; given, an epoch of the same length draws every class equally often. A class
            with too few samples repeats them, one with too many takes others in the next epoch. Then `(epoch, indices, repeats)` is
            yielded, where a repeat is how often the sample came before in this epoch.
        length: samples of a training epoch; None means each once. With more of them, all samples come again, in another order, before any
            comes a third time, and repeats are yielded as well.
    """

    def __init__(
        self,
        indices: Tensor,
        batch_size: int,
        seed: int,
        training: bool,
        shuffle: bool = True,
        label: Tensor | None = None,
        length: int | None = None,
    ) -> None:
        self.indices = indices
        self.length = length if training and length is not None else len(indices)
        self.batch_size = batch_size
        self.seed = seed
        self.training = training
        self.shuffle = shuffle and training
        self.label = label if self.shuffle else None
        self.epoch = 0

    def _balanced(self, order: Tensor) -> tuple[Tensor, Tensor]:
        """Of a random order of positions, one in which every class has the same number of places, and the repeats."""
        assert self.label is not None
        label = self.label[order]
        present = label.unique()
        chosen, repeats = [], []
        for number, cls in enumerate(present.tolist()):
            members = order[label == cls]
            # The classes that get one place more change from epoch to epoch.
            places = self.length // len(present) + int((number + self.epoch) % len(present) < self.length % len(present))
            place = torch.arange(places)
            chosen.append(members[place % len(members)])
            repeats.append(place // len(members))
        mixed = random_order(fold_in(self.seed, _INTERLEAVE, self.epoch), self.length)
        return torch.cat(chosen)[mixed], torch.cat(repeats)[mixed]

    def _order(self) -> tuple[Tensor, Tensor | None]:
        """Positions in `indices` in the order of an epoch, and the repeats where there are any."""
        samples = len(self.indices)
        order = random_order(fold_in(self.seed, _ORDER, self.epoch), samples) if self.shuffle else torch.arange(samples)
        if self.label is not None:
            return self._balanced(order)
        if self.length <= samples:
            return order[: self.length], None
        place = torch.arange(self.length)
        if self.shuffle:
            again = fold_in(self.seed, _ORDER, self.epoch, torch.arange(1, -(-self.length // samples)))
            order = torch.cat([order, random_order(again, samples).flatten()])
        return order[place % len(order)], place // samples

    def _world(self) -> tuple[int, int]:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        return 0, 1

    def __len__(self) -> int:
        _, world = self._world()
        if self.training:
            return max(1, self.length // (self.batch_size * world))
        # At most one batch per sample of the process with the fewest, so that none gets an empty batch.
        return max(1, min(math.ceil(len(self.indices) / (self.batch_size * world)), len(self.indices) // world))

    def __iter__(self) -> Iterator[tuple[Any, ...]]:  # type: ignore[override]  # whole batches, not single indices
        rank, world = self._world()
        if len(self.indices) < world:
            raise DataError(f"{len(self.indices)} samples cannot be dealt out to {world} processes: use fewer processes")
        if self.training:
            order, repeats = self._order()
            indices = self.indices[order]
            size = min(self.batch_size * world, len(order) - len(order) % world)
            for start in range(0, len(self) * size, size):
                mine = slice(start + rank, start + size, world)
                if repeats is None:
                    yield self.epoch, indices[mine].tolist()
                else:
                    yield self.epoch, indices[mine].tolist(), repeats[mine].tolist()
        else:
            for batch in self.indices[rank::world].tensor_split(len(self)):
                yield self.epoch, batch.tolist()

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


class ArrayDataset(Dataset[Batch]):
    """Reads whole batches: the index is what a `BatchSampler` yields.

    Args:
        arrays: the data.
        seed: seed of the samples' keys, or None for evaluation batches, which have no key.
    """

    def __init__(self, arrays: Arrays, seed: int | None) -> None:
        self.arrays = arrays
        self.seed = seed

    def __len__(self) -> int:
        return len(self.arrays.label)

    def __getitem__(self, item: tuple[Any, ...]) -> Batch:
        epoch, indices, *repeats = item
        index = torch.tensor(indices)
        key = None if self.seed is None else fold_in(self.seed, _SAMPLE, epoch, index)
        if key is not None and repeats:  # a sample that comes again in an epoch is augmented in another way
            again = torch.tensor(repeats[0])
            key = torch.where(again > 0, fold_in(key, _REPEAT, again), key)
        return Batch(
            input=self.arrays.input[index],
            label=self.arrays.label[index],
            index=index,
            part=None if self.arrays.part is None else self.arrays.part[index].long(),
            key=key,
        )


class BatchLoader(DataLoader):
    """A DataLoader that can stop and go on in the middle of an epoch: it has `state_dict` and `load_state_dict`.

    Args:
        dataset: what to read from.
        sampler: which batches, in which order.
        num_workers: worker processes; 0 is the fastest for data in memory.
    """

    def __init__(self, dataset: ArrayDataset, sampler: BatchSampler, num_workers: int = 0, **kwargs: Any) -> None:
        # Lightning's `predict` makes the loader anew and passes these two as well.
        kwargs.update(batch_size=None, persistent_workers=num_workers > 0)
        super().__init__(dataset, sampler=sampler, num_workers=num_workers, **kwargs)
        self._batches = sampler
        self._position = 0
        self._resume: dict[str, int] | None = None

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]  # a generator, so that batches can be counted
        state, self._resume = self._resume, None
        start = state["position"] if state is not None and state["epoch"] == self._batches.epoch else 0
        self._position = 0
        for batch in super().__iter__():
            self._position += 1
            if self._position > start:
                yield batch

    def state_dict(self) -> dict[str, int]:
        """Epoch, batches given out in it, and what must not change for the rest of the epoch to be the same."""
        if self._resume is not None:  # saved again before the first batch
            return self._resume
        return {"epoch": self._batches.epoch, "position": self._position, "batches": len(self), **self._layout()}

    def _layout(self) -> dict[str, int]:
        _, world = self._batches._world()
        return {"batch_size": self._batches.batch_size, "samples": len(self._batches.indices), "processes": world}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after the batches that were already given out in that epoch.

        Raises:
            DataError: if the batch size, the number of samples or of processes is another one.
        """
        for name, now in self._layout().items():
            if state[name] != now and 0 < state["position"] < state["batches"]:
                raise DataError(
                    f"the checkpoint was written in the middle of an epoch with {name} {state[name]}, now it is {now}: "
                    "resume with the same data, batch size and number of processes, or start from a checkpoint of an epoch's end"
                )
        self._batches.set_epoch(state["epoch"])
        self._resume = state


class ArrayDataModule(LightningDataModule):
    """Base of the DataModules: a subclass says how to `read` its arrays and how to `augment` and `prepare` a batch.

    `num_classes`, `class_names`, `num_train` and `class_counts` are known as soon as it is constructed. Order and
    augmentation are functions of (seed, epoch, sample), so they depend neither on workers nor on processes, and a resumed
    run sees what the uninterrupted one saw. The test split is read by the test loader only.

    Attributes:
        samples_per_epoch: samples of a training epoch, from the next loader on; None means each once. With more of them samples come
            again, augmented in another way.

    Args:
        batch_size: training samples in a batch of one process.
        eval_batch_size: samples in an evaluation batch; None means twice `batch_size`.
        num_workers: loader processes; 0 is the fastest for data in memory.
        seed: seed of order and augmentation; None takes that of `seed_everything`, or 0.
        shuffle: whether training shuffles.
        balanced: whether every class comes equally often in a training epoch.
    """

    def __init__(
        self,
        *,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int | None = None,
        shuffle: bool = True,
        balanced: bool = False,
    ) -> None:
        super().__init__()
        if batch_size < 1 or (eval_batch_size is not None and eval_batch_size < 1):
            raise ValueError(f"batch_size and eval_batch_size must be at least 1, got {batch_size} and {eval_batch_size}")
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size or 2 * batch_size
        self.num_workers = num_workers
        self._seed = seed
        self.shuffle = shuffle
        self.balanced = balanced
        self.samples_per_epoch: int | None = None
        self._resume: dict[str, int] | None = None

    def read(self) -> Arrays:
        """Read the whole data set.

        Raises:
            DataError: if it is not there or broken.
        """
        raise NotImplementedError(f"{type(self).__name__} must define read()")

    def augment(self, batch: Batch) -> Batch:
        """Augment a training batch with randomness drawn from `batch.key` alone."""
        return batch

    def prepare(self, batch: Batch) -> Batch:
        """What every batch needs before any augmentation, such as normalisation."""
        return batch

    @cached_property
    def arrays(self) -> Arrays:
        """The data, read on first use."""
        arrays = self.read()
        if not (arrays.split == TRAIN).any():
            raise DataError(f"{type(self).__name__}: no sample belongs to the training split")
        return arrays

    @property
    def seed(self) -> int:
        """Seed of order and augmentation."""
        return global_seed() if self._seed is None else self._seed

    @property
    def num_classes(self) -> int:
        return len(self.arrays.class_names)

    @property
    def class_names(self) -> list[str]:
        return list(self.arrays.class_names)

    @property
    def num_train(self) -> int:
        return len(self.indices(TRAIN))

    @property
    def class_counts(self) -> list[int]:
        """Training samples of each class; those without a label are not counted."""
        label = self.arrays.label[self.indices(TRAIN)]
        return torch.bincount(label[label >= 0], minlength=self.num_classes).tolist()

    @property
    def train_index(self) -> Tensor:
        """`(num_train,)` int64: the number of each training sample in the data set, which is its `Batch.index`; ascending."""
        return self.indices(TRAIN)

    @property
    def train_label(self) -> Tensor:
        """`(num_train,)` int64: their labels; -1 where unknown."""
        return self.arrays.label[self.train_index]

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the training samples, for what is made from them, such as a memory bank: a hash of their indices and some inputs."""
        index = self.train_index
        some = index[torch.linspace(0, len(index) - 1, min(len(index), 64)).long()]
        digest = hashlib.sha256(index.numpy().tobytes())
        digest.update(self.arrays.input[some].contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def reassign(self, *, split: Tensor | None = None, label: Tensor | None = None) -> None:
        """Give samples another split or another label, from the next loader on; the inputs and what normalises them stay.

        Args:
            split: `(M,)` uint8 (0 = train, 1 = validation, 2 = test, 3 = unused), or None to leave it.
            label: `(M,)` int64, -1 where unknown, or None to leave them.

        Raises:
            ValueError: if there is not one value for each sample of the data set, one is out of range, or none trains.

        Example:
            >>> data = DigitsDataModule()
            >>> split = data.arrays.split.clone()
            >>> split[data.train_index[:100]] = 3
            >>> data.reassign(split=split)
        """
        arrays = self.arrays
        for name, given, least, end in (("split", split, 0, UNUSED + 1), ("label", label, -1, len(arrays.class_names))):
            if given is None:
                continue
            if given.shape != arrays.label.shape:
                raise ValueError(f"{name} must be one number for each of {len(arrays.label)} samples, got shape {tuple(given.shape)}")
            if len(given) and not least <= int(given.min()) <= int(given.max()) < end:
                raise ValueError(f"{name} must lie in {least} to {end - 1}, got {int(given.min())} to {int(given.max())}")
        if split is not None and not (split == TRAIN).any():
            raise ValueError("the split leaves no sample to train on")
        self.arrays = replace(
            arrays,
            # Copies: what the caller does to its own tensors later must not change the data.
            split=arrays.split if split is None else split.to(torch.uint8, copy=True),
            label=arrays.label if label is None else label.to(torch.long, copy=True),
        )
        vars(self).pop("fingerprint", None)

    def indices(self, split: int) -> Tensor:
        """Positions of the samples of a split (0 = train, 1 = validation, 2 = test, 3 = unused), in ascending order."""
        return (self.arrays.split == split).nonzero().squeeze(1)

    @property
    def augments(self) -> bool:
        """Whether a model may get something else in a training batch than in an evaluation batch of the same samples."""
        return type(self).augment is not ArrayDataModule.augment

    def transform(self, batch: Batch) -> Batch:
        """Prepare a batch and, if it has keys, augment it; on the batch's device.

        Args:
            batch: as the loaders give it.

        Returns:
            What the model gets.
        """
        # Under somebody's autocast products would be rounded to half precision.
        with torch.no_grad(), torch.autocast(batch.input.device.type, enabled=False):
            batch = self.prepare(batch)
            return batch if batch.key is None else self.augment(batch)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if not isinstance(batch, Batch):
            return batch
        batch = self.transform(batch)
        # Lightning converts inputs before this hook, when they may still be integers: for "bf16-true" and "64-true" once more.
        return batch if self.trainer is None else self.trainer.precision_plugin.convert_input(batch)

    def setup(self, stage: str) -> None:
        # Before the callbacks are set up; the sanity check would tell it in the middle of its progress bar.
        own = type(self).val_dataloader is ArrayDataModule.val_dataloader
        if own and stage == "fit" and self.trainer is not None and self.trainer.enable_validation:
            self._filled(VAL)

    def _filled(self, split: int) -> Tensor:
        indices = self.indices(split)
        if len(indices) == 0:
            cure = "; raise --data.val_fraction, or train without validation with --trainer.limit_val_batches 0" if split == VAL else ""
            raise DataError(f"{type(self).__name__}: the {SPLIT_NAMES[split]} split is empty{cure}")
        return indices

    def _loader(self, split: int, training: bool) -> BatchLoader:
        indices = self._filled(split)
        overfitting = getattr(self.trainer, "overfit_batches", 0) > 0
        label = self.arrays.label[indices] if self.balanced and training else None
        if label is not None and label.min() < 0:
            raise DataError(f"{type(self).__name__}: balanced=True needs labels, but some training samples have none")
        batch_size = self.batch_size if training else self.eval_batch_size
        return BatchLoader(
            ArrayDataset(self.arrays, self.seed if training else None),
            # By keyword, because Lightning's `predict` makes the loader anew with another.
            sampler=BatchSampler(indices, batch_size, self.seed, training, self.shuffle and not overfitting, label, self.samples_per_epoch),
            num_workers=self.num_workers if training else 0,
            pin_memory=torch.cuda.is_available(),
        )

    def train_dataloader(self) -> BatchLoader:
        loader = self._loader(TRAIN, training=True)
        if self._resume is not None:
            loader.load_state_dict(self._resume)
            self._resume = None
        return loader

    def eval_train_dataloader(self) -> BatchLoader:
        """The training set in fixed order, never augmented: for memory banks, nearest neighbours and probes."""
        return self._loader(TRAIN, training=False)

    def val_dataloader(self) -> BatchLoader:
        return self._loader(VAL, training=False)

    def test_dataloader(self) -> BatchLoader:
        return self._loader(TEST, training=False)

    def predict_dataloader(self) -> BatchLoader:
        """The test split."""
        return self._loader(TEST, training=False)

    # Lightning restores the loader by itself, but not if somebody asked for `trainer.estimated_stepping_batches` before, as schedulers do.

    def state_dict(self) -> dict[str, Any]:
        """Where the training loader stands."""
        loader = None if self.trainer is None else self.trainer.train_dataloader
        return {"train_loader": loader.state_dict()} if isinstance(loader, BatchLoader) else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Let the next training loader go on where it stood."""
        self._resume = state_dict.get("train_loader")
