"""Pseudo-labels: training samples without a label get the one that the model itself is sure of."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset

from ..zoo.functional.pseudo_labels import choose_pseudo_labels
from .features import encode, known_classes, over_loader
from .guards import refuse, refuse_sharded

# Splits of a DataModule of litzoo.
_TRAIN, _UNUSED = 0, 3
# Samples of a batch, where the training loader does not say.
_BATCH_SIZE = 64


class PseudoLabelDataset(Dataset[Any]):
    """A data set of which some samples have no label, for `PseudoLabels` and any DataLoader.

    It always has the length of the whole data set: places of samples that have no label at the moment are filled with labelled ones in
    turn. So the number of batches, and with it every schedule, stays the same. Labels and places lie in shared memory, where worker
    processes, persistent ones too, see a new choice. The label that the data set itself gives is never used.

    Args:
        dataset: samples `(x, y, ...)` or `x`, by index.
        label: `(N,)` int64, the label of each sample, -1 where it is unknown.
        predict_on: the same samples without augmentation, on which labels are predicted; None takes `dataset`.

    Raises:
        ValueError: if there is not one label for each sample, or none without or with a label.

    Example:
        >>> train = PseudoLabelDataset(images, label)  # label -1: unknown
        >>> loader = DataLoader(train, batch_size=64, shuffle=True)
    """

    def __init__(self, dataset: Any, label: Tensor, predict_on: Any = None) -> None:
        label = torch.as_tensor(label).long()
        for name, data in (("dataset", dataset), ("predict_on", dataset if predict_on is None else predict_on)):
            if label.shape != (len(data),):
                raise ValueError(f"label must be one number for each of {len(data)} samples of {name}, got shape {tuple(label.shape)}")
        if (label < -1).any() or (label < 0).all() or (label >= 0).all():
            raise ValueError("label must be -1 for some samples, whose label is unknown, and at least 0 for the others")
        self.dataset = dataset
        self.predict_on = dataset if predict_on is None else predict_on
        self.index = (label < 0).nonzero().squeeze(1)
        self.label = label.clone().share_memory_()
        self.source = torch.empty_like(label).share_memory_()
        self.assign(self.label[self.index])

    def __len__(self) -> int:
        return len(self.label)

    def __getitem__(self, place: int) -> tuple[Any, ...]:
        sample = int(self.source[place])
        found = self.dataset[sample]
        inputs, rest = (found[0], found[2:]) if isinstance(found, (tuple, list)) else (found, ())
        return (inputs, int(self.label[sample]), *rest)

    def assign(self, label: Tensor) -> None:
        """Give the samples without a label, those at `index`, others; -1 where they have none.

        Args:
            label: `(U,)` int64.
        """
        every = self.label.clone()
        every[self.index] = label
        source, known = torch.arange(len(every)), (every >= 0).nonzero().squeeze(1)
        lent = (every < 0).nonzero().squeeze(1)
        source[lent] = known[torch.arange(len(lent)) % len(known)]
        # At once, because another process may share this memory.
        self.label.copy_(every)
        self.source.copy_(source)


class _Unlabelled(Dataset[Any]):
    """The inputs of samples without a label, for predictions."""

    def __init__(self, data: PseudoLabelDataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data.index)

    def __getitem__(self, place: int) -> tuple[Any, int]:
        found = self.data.predict_on[int(self.data.index[place])]
        return (found[0] if isinstance(found, (tuple, list)) else found), -1


class _OfDataset:
    """The samples without a label of a `PseudoLabelDataset`."""

    needs_new_loader = False

    def __init__(self, dataset: PseudoLabelDataset) -> None:
        self.dataset = dataset
        self.index = dataset.index

    def loader(self, trainer: Trainer) -> Any:
        """Batches of them, in order."""
        samples = _Unlabelled(self.dataset)
        training = next((loader for loader in tree_leaves(trainer.train_dataloader) if _reads(loader, self.dataset)), None)
        return DataLoader(
            samples,
            batch_size=getattr(training, "batch_size", None) or _BATCH_SIZE,
            sampler=DistributedSampler(samples, trainer.world_size, trainer.global_rank, shuffle=False),
            num_workers=getattr(training, "num_workers", 0),
        )

    def assign(self, label: Tensor) -> None:
        self.dataset.assign(label)

    def restore(self) -> None:
        self.assign(torch.full_like(self.index, -1))


class _OfDataModule:
    """The training samples without a label of a DataModule with `reassign`; in the meantime those without one are in no split."""

    needs_new_loader = True

    def __init__(self, data: Any) -> None:
        self.data = data
        self.before = (data.arrays.split, data.arrays.label, data.samples_per_epoch)
        self.index = data.train_index[data.train_label < 0]
        self.samples = data.samples_per_epoch or len(data.train_index)
        self._label = torch.full_like(self.index, -1)

    def loader(self, trainer: Trainer) -> Any:
        """Batches of them, in order."""
        split = torch.full_like(self.before[0], _UNUSED)
        split[self.index] = _TRAIN
        self.data.reassign(split=split, label=self.before[1])
        try:
            return self.data.eval_train_dataloader()
        finally:
            self.assign(self._label)

    def assign(self, label: Tensor) -> None:
        self._label = label
        split, every = self.before[0].clone(), self.before[1].clone()
        split[self.index] = torch.where(label >= 0, _TRAIN, _UNUSED).to(split.dtype)
        every[self.index] = label
        self.data.reassign(split=split, label=every)
        # As many as ever, so that schedules by step stay what they are.
        self.data.samples_per_epoch = self.samples

    def restore(self) -> None:
        split, label, self.data.samples_per_epoch = self.before
        self.data.reassign(split=split, label=label)


class PseudoLabels(Callback):
    """Trains on the model's own predictions for training samples without a label, where it is sure of them.

    After epoch e - 1, for e = start_epoch, start_epoch + every_n_epochs, ..., each training sample x with the label -1 gets

        y(x) = argmax_c p(c | x)   if   max_c p(c | x) >= t(e),   with p the softmax of the logits in evaluation mode,

    and trains with it from epoch e on, until the next choice, which starts anew; the others do not train. t goes in equal steps from
    `threshold` to `final_threshold` in the last epoch. An epoch always has as many samples as the training set, labelled or not: while
    few have a label, these are repeated, augmented differently each time. So schedules by step stay the same.

    The samples come from a DataModule of litzoo, marked by the label -1 in its training split, or from a `PseudoLabelDataset` in any
    DataLoader. Labels of validation and test samples are never touched, nor is a hidden label ever read. Logs `train/pseudo_labels`, how
    many of these samples the epoch trained on. The choice is in the checkpoint: a resumed run equals the uninterrupted one.

    Cost: a pass without gradients over the samples without a label at each choice, shared by all processes. With a DataModule, the
    training loader is made anew after a choice that changes something. Composes with every callback; under `EMA` and `SWA` the weights of
    the training predict. Refuses sharding strategies.

    Attributes:
        index: `(S,)` int64, the numbers in their data set of the samples that the last choice gave a label.
        label: `(S,)` int64, these labels.

    Args:
        threshold: t, confidence that a label needs, in (0, 1].
        final_threshold: its value in the last epoch; None keeps it.
        start_epoch: first epoch, counted from 0, that may train on pseudo-labels; at least 1.
        every_n_epochs: epochs from one choice to the next.
        max_per_class: most samples of a class, the most confident ones, so that no class takes over; None means no limit.
        dataset: the training samples, if they do not come from a DataModule of litzoo.

    Raises:
        ValueError: if a setting is out of range, or `forward` gives no logits `(B, C)`.
        TypeError: if `dataset` is no `PseudoLabelDataset`.
        MisconfigurationException: at the start of `fit`, if there are no samples without a label or none with one, the training loader
            does not read `dataset`, its samples without a label are validation samples too, or no epoch is left to train on them; at
            the start of `test`, if they are test samples.

    Example:
        >>> data = HDF5ImagesDataModule("partly_labelled.h5")  # label -1: unknown
        >>> trainer = Trainer(max_epochs=100, callbacks=[PseudoLabels(threshold=0.95, start_epoch=10)])

    Source:
        Lee, "Pseudo-Label: The Simple and Efficient Semi-Supervised Learning Method for Deep Neural Networks", ICML 2013 workshop;
        Cascante-Bonilla, Tan, Qi & Ordonez, "Curriculum Labeling", AAAI 2021 (thresholds that fall, choices that start anew).
    """

    def __init__(
        self,
        threshold: float = 0.95,
        final_threshold: float | None = None,
        start_epoch: int = 1,
        every_n_epochs: int = 1,
        max_per_class: int | None = None,
        dataset: PseudoLabelDataset | None = None,
    ) -> None:
        for name, value in (("threshold", threshold), ("final_threshold", final_threshold)):
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"{name} is a probability and must lie in (0, 1], got {value}")
        for name, number in (("start_epoch", start_epoch), ("every_n_epochs", every_n_epochs), ("max_per_class", max_per_class)):
            if number is not None and number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        if dataset is not None and not isinstance(dataset, PseudoLabelDataset):
            raise TypeError(f"dataset must be a PseudoLabelDataset around your data set, got {type(dataset).__name__}")
        self.threshold = threshold
        self.final_threshold = final_threshold
        self.start_epoch = start_epoch
        self.every_n_epochs = every_n_epochs
        self.max_per_class = max_per_class
        self.dataset = dataset
        self.index = self.label = torch.zeros(0, dtype=torch.long)
        # How many have no label of their own; 0 before the first fit.
        self._unlabelled = 0
        # During a fit: the samples, whether the training loader is to be made anew, and the trainer's own setting for that.
        self._samples: _OfDataset | _OfDataModule | None = None
        self._renew = False
        self._reload: int | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_samples": None}  # a callback that is copied or pickled carries no DataModule

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        refuse_sharded(self, trainer)
        self._check_epochs(trainer)
        samples = self._find_samples(trainer)
        self._renew, self._reload = False, None
        self._samples, self._unlabelled = samples, len(samples.index)
        self._assign(samples, torch.full_like(samples.index, -1))

    def _check_epochs(self, trainer: Trainer) -> None:
        last = trainer.max_epochs
        is_known = last is not None and last >= 0
        if self.final_threshold is not None and not is_known:
            raise refuse(self, "does not know when the threshold is to reach its end", "set max_epochs, or leave out final_threshold")
        if last is not None and is_known and self.start_epoch >= last and not getattr(trainer, "fast_dev_run", False):
            raise refuse(
                self,
                f"would begin in epoch {self.start_epoch}, but the training has {last} epochs, counted from 0",
                "lower start_epoch or train longer",
            )

    def _find_samples(self, trainer: Trainer) -> "_OfDataset | _OfDataModule":
        if self.dataset is not None:
            return _OfDataset(self.dataset)
        data = getattr(trainer, "datamodule", None)
        needed = ("reassign", "arrays", "train_index", "train_label", "eval_train_dataloader", "samples_per_epoch")
        if not all(hasattr(data, name) for name in needed):
            raise refuse(
                self,
                "finds no data whose labels it could change",
                "train on PseudoLabelDataset(your_data_set, label), with label -1 where it is unknown, and give that as dataset",
            )
        label = data.train_label  # type: ignore[union-attr]  # hasattr narrows no optional
        if (label >= 0).all():
            raise refuse(self, f"finds no training sample without a label among {len(label)}", "mark them by the label -1")
        if (label < 0).all():
            raise refuse(self, f"finds no training sample with a label among {len(label)}", "label some of them, of each class")
        return _OfDataModule(data)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._samples is None or state_dict["unlabelled"] == 0:  # of a test, or of a trainer that has not trained
            return
        own, chosen = self._samples.index, state_dict["index"]
        place = torch.searchsorted(own, chosen).clamp(max=len(own) - 1)
        if state_dict["unlabelled"] != len(own) or not torch.equal(own[place], chosen):
            raise refuse(
                self,
                f"has {len(own)} samples without a label, but the checkpoint is of a training with {state_dict['unlabelled']} others",
                "resume with the same data",
            )
        label = torch.full_like(own, -1)
        label[place] = state_dict["label"]
        self._assign(self._samples, label)

    def state_dict(self) -> dict[str, Any]:
        return {"unlabelled": self._unlabelled, "index": self.index, "label": self.label}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.dataset is None:
            return
        loaders = tree_leaves(trainer.train_dataloader)
        # What says nothing of its data may read anything.
        if not any(_reads(loader, self.dataset) for loader in loaders) and all(hasattr(loader, "dataset") for loader in loaders):
            raise refuse(self, "is given a dataset that the training loader does not read", "make the training loader of that very dataset")
        self._refuse_overlap(trainer.val_dataloaders, "validation")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._refuse_overlap(trainer.test_dataloaders, "test")

    def _refuse_overlap(self, loaders: Any, kind: str) -> None:
        """Of samples whose number in the same data set is known."""
        if self.dataset is None:
            return
        base, own = _origin(self.dataset.dataset)
        unlabelled = own[self.dataset.index]
        for loader in tree_leaves(loaders):
            other, index = _origin(getattr(loader, "dataset", None))
            shared = int(torch.isin(index, unlabelled).sum()) if other is base else 0
            if shared:
                raise refuse(self, f"would train on {shared} of the {kind} samples", f"leave the {kind} samples out of its dataset")

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._put_reload_back(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """At the last batch, so that every checkpoint after it, that of the epoch's validation too, holds the choice."""
        if not trainer.is_last_batch or self._samples is None:
            return
        pl_module.log("train/pseudo_labels", float(len(self.index)), on_step=False, on_epoch=True, batch_size=1, sync_dist=True)
        epoch = trainer.current_epoch + 1
        if epoch < self.start_epoch or (epoch - self.start_epoch) % self.every_n_epochs:
            return
        before = self.index, self.label
        self._assign(self._samples, self._choose(trainer, pl_module, self._samples, self._threshold_in(trainer, epoch)))
        changed = not (torch.equal(before[0], self.index) and torch.equal(before[1], self.label))
        self._renew = changed and self._samples.needs_new_loader

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._renew:
            # The next epoch begins with a new loader; not sooner, because validation would make its own anew as well.
            self._reload, self._renew = trainer.reload_dataloaders_every_n_epochs, False  # type: ignore[attr-defined]  # set in a connector
            trainer.reload_dataloaders_every_n_epochs = 1  # type: ignore[attr-defined]  # set in a connector

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._put_reload_back(trainer)
        if self._samples is not None:
            self._samples.restore()
        self._samples, self._renew = None, False

    def _put_reload_back(self, trainer: Trainer) -> None:
        if self._reload is not None:
            trainer.reload_dataloaders_every_n_epochs, self._reload = self._reload, None  # type: ignore[attr-defined]  # set in a connector

    def _threshold_in(self, trainer: Trainer, epoch: int) -> float:
        if self.final_threshold is None:
            return self.threshold
        last = (trainer.max_epochs or 0) - 1
        progress = min(1.0, (epoch - self.start_epoch) / max(1, last - self.start_epoch))
        return self.threshold + (self.final_threshold - self.threshold) * progress

    def _choose(self, trainer: Trainer, pl_module: LightningModule, samples: "_OfDataset | _OfDataModule", threshold: float) -> Tensor:
        """Labels `(U,)`, the same on every process."""
        classes = known_classes(trainer, pl_module, None)

        def predict(inputs: Tensor) -> Tensor:
            logits = encode(trainer, pl_module, "forward", inputs)
            if classes not in (None, logits.shape[1]):
                raise ValueError(
                    f"{type(pl_module).__name__} is no classifier: forward gives {logits.shape[1]} numbers for {classes} classes"
                )
            return torch.stack(tuple(logits.softmax(dim=1).max(dim=1)), dim=1)

        with _validating(trainer):
            found, _, place = over_loader(trainer, pl_module, samples.loader(trainer), predict)
        label = torch.full_like(samples.index, -1)
        if len(place):
            confidence, guess = found.cpu().unbind(1)
            label[place.cpu()] = choose_pseudo_labels(confidence, guess.long(), threshold, self.max_per_class)
        return label

    def _assign(self, samples: "_OfDataset | _OfDataModule", label: Tensor) -> None:
        samples.assign(label)
        self.index, self.label = samples.index[label >= 0], label[label >= 0]


@contextlib.contextmanager
def _validating(trainer: Trainer) -> Iterator[None]:
    """What looks at the trainer's stage, such as augmentation on the device, takes what comes inside for validation."""
    trainer.validating = True
    try:
        yield
    finally:
        trainer.training = True


def _reads(loader: Any, dataset: Any) -> bool:
    """Whether a loader's data set is that one, or has it inside."""
    waiting = [getattr(loader, "dataset", None)]
    while waiting:
        data = waiting.pop()
        if data is dataset:
            return True
        waiting += [inner for inner in (getattr(data, "dataset", None), *(getattr(data, "datasets", None) or ())) if inner is not None]
    return False


def _origin(dataset: Any) -> tuple[Any, Tensor]:
    """The data set that others are parts of, and the numbers in it of the samples."""
    index = torch.arange(len(dataset) if hasattr(dataset, "__len__") else 0)
    while isinstance(dataset, (Subset, PseudoLabelDataset)):
        if isinstance(dataset, Subset):
            index = torch.as_tensor(dataset.indices, dtype=torch.long)[index]
        dataset = dataset.dataset
    return dataset, index
