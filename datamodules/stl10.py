"""STL-10, from the official archive of binary files."""

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from .archives import MemberReader, Members, official_archive, pack_archive
from .arrays import Arrays
from .augment.images import ImageAugmentation, Preset
from .errors import DataError
from .hdf5_images import read_images
from .hdf5_reading import open_hdf5, resolve_path
from .images import ImageDataModule
from .packing import ArrayBlock, block_dataset
from .splits import TEST, TRAIN, UNUSED, hold_out, thin_out

_SIZE = 96
_BYTES = 3 * _SIZE * _SIZE
# Images that are read and written at once: 28 MB.
_BLOCK = 1024


def _copy_images(reader: MemberReader, image: ArrayBlock, start: int, stop: int, progress: str | None = None) -> None:
    """Write the images of a binary file, which stores each channel column by column, to rows of the packed file."""
    from tqdm import tqdm

    with tqdm(total=stop - start, desc=progress, unit=" images", disable=progress is None) as bar:
        for first in range(start, stop, _BLOCK):
            count = min(_BLOCK, stop - first)
            planes = np.frombuffer(reader.read(count * _BYTES), np.uint8).reshape(count, 3, _SIZE, _SIZE)
            image[first : first + count] = planes.transpose(0, 3, 2, 1)
            bar.update(count)


def _write(file: Any, members: Members) -> None:
    """Pack training, test and unlabelled images, in this order."""
    from torchvision.datasets import STL10

    (train_images, _), (train_labels, _), (unlabelled_images, _) = STL10.train_list
    (test_images, _), (test_labels, _) = STL10.test_list
    parts, labels = (train_images, test_images, unlabelled_images), (train_labels, test_labels)
    counts = [members.sizes[name] // _BYTES for name in parts]
    for images, numbers in zip(parts, labels, strict=False):
        if members.sizes[images] != members.sizes[numbers] * _BYTES:
            raise DataError(f"{images} does not hold an image of {_BYTES} bytes for each label in {numbers}: fetch the archive anew")
    stops = np.cumsum(counts).tolist()
    starts = [0, *stops[:-1]]
    image = block_dataset(file, "image", (stops[-1], _SIZE, _SIZE, 3))
    label = np.full(stops[-1], -1)
    for name, reader in members:
        if name in parts:
            part = parts.index(name)
            _copy_images(reader, image, starts[part], stops[part], "packing STL-10" if name == unlabelled_images else None)
        elif name in labels:
            part = labels.index(name)
            label[starts[part] : stops[part]] = np.frombuffer(reader.read(), np.uint8).astype(np.int64) - 1
        elif name == STL10.class_names_file:
            file["class_names"] = reader.read().decode().splitlines()
        else:
            file["folds"] = _folds(reader.read(), counts[0], name)
    file["label"] = label
    file["split"] = np.repeat(np.array([TRAIN, TEST, TRAIN], np.uint8), counts)


def _folds(content: bytes, count: int, name: str) -> Any:
    """The official folds `(10, n)`: positions in the training images. No checksum is published of an unpacked file."""
    try:
        folds = np.array([line.split() for line in content.decode().splitlines() if line.strip()], dtype=np.int64)
        if folds.ndim == 2 and len(folds) == 10 and folds.min() >= 0 and folds.max() < count:
            return folds
    except ValueError:
        pass
    raise DataError(f"{name} must hold 10 lines of equally many positions of training images, below {count}: fetch the archive anew")


class STL10DataModule(ImageDataModule):
    """STL-10: 5,000 training, 8,000 test and 100,000 unlabelled photographs of 96 x 96 pixels, 10 balanced classes.

    The official archive `stl10_binary.tar.gz`, or the folder `stl10_binary` that torchvision unpacks, is packed once into
    `stl10.h5` (3.1 GB) in the same folder, which alone is needed from then on: training, test, then unlabelled images,
    whose label is -1. Validation images always come from the labelled training images, and the official test images are
    the test split. Images that a setting leaves out are in split 3, unused.

    The full official set has not been run here: the tests use files in its format and 109 of its real images.

    Args:
        root: folder of the archive and of the packed file; `~` and environment variables are resolved.
        download: whether to download the archive (2.6 GB) if it is missing or damaged.
        train_on: "labelled" training images, "unlabelled" images, or "both". The validation images are the same with each.
        fold: k from 0 to 9 trains on exactly the official 1,000 images of fold k and validates on others; None trains on all.
        augmentation: a preset by name, or an `ImageAugmentation`.
        views: views of each training image.
        image_size: pixels of what a model gets; None takes the stored 96.
        train_fraction: share of each class's training images to use, and of the unlabelled ones, in (0, 1].
        imbalance: how many times as many training images the first class keeps as the last one, falling exponentially from class to class.
        val_fraction: share of each class's labelled training images held out for validation; with a fold, of those outside it.
        split_seed: seed of these choices.
        balanced: whether every class comes equally often in a training epoch.
        mean: of each channel, of images in [0, 1]; None takes that of the labelled training images.
        std: the same for the standard deviation.
        compiled: compile the colour operations; pays after some minutes of training.
        batch_size: training images in a batch of one process.
        eval_batch_size: images in an evaluation batch; None means twice `batch_size`.
        num_workers: loader processes; 0 is the fastest for packed images.
        seed: seed of order and augmentation; None takes that of `seed_everything`, or 0.

    Raises:
        DataError: if there are no data and they cannot be downloaded, or they are damaged.
        ValueError: if a setting is out of range, or a fold is to be trained with unlabelled images.

    Example:
        >>> data = STL10DataModule("data", train_on="unlabelled", augmentation="simclr", views=2)
        >>> data.num_train, len(data.indices(VAL))
        (100000, 500)

    Source:
        Coates, Ng & Lee, "An Analysis of Single-Layer Networks in Unsupervised Feature Learning", AISTATS 2011.
    """

    # Commonly used, of the labelled training images; not measured here again, as the full set is not at hand.
    published_mean = (0.4467, 0.4398, 0.4066)
    published_std = (0.2603, 0.2566, 0.2713)

    def __init__(
        self,
        root: str | os.PathLike[str] = "data",
        *,
        download: bool = True,
        train_on: Literal["labelled", "unlabelled", "both"] = "labelled",
        fold: int | None = None,
        augmentation: Preset | ImageAugmentation = "standard",
        views: int = 1,
        image_size: int | None = None,
        train_fraction: float = 1.0,
        imbalance: float = 1.0,
        val_fraction: float = 0.1,
        split_seed: int = 0,
        balanced: bool = False,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        compiled: bool = False,
        batch_size: int = 128,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int | None = None,
    ) -> None:
        super().__init__(
            augmentation=augmentation,
            views=views,
            image_size=image_size,
            train_fraction=train_fraction,
            imbalance=imbalance,
            val_fraction=val_fraction,
            test_fraction=0.0,
            split_seed=split_seed,
            balanced=balanced,
            mean=mean,
            std=std,
            compiled=compiled,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            seed=seed,
        )
        if train_on not in ("labelled", "unlabelled", "both"):
            raise ValueError(f"train_on must be labelled, unlabelled or both, got {train_on!r}")
        if fold is not None and fold not in range(10):
            raise ValueError(f"fold must be one of 0 to 9, got {fold}")
        if fold is not None and train_on != "labelled":
            raise ValueError(f"a fold is a choice of labelled images: leave out fold, or set train_on to labelled instead of {train_on}")
        self.root = resolve_path(root)
        self.download = download
        self.train_on = train_on
        self.fold = fold

    def read(self) -> Arrays:
        path = self.root / "stl10.h5"
        pack_archive(path, official_archive("STL10"), self.download, _write)
        arrays, official = read_images(path, unlabelled=True)
        assert official is not None
        fold = None
        if self.fold is not None:
            with open_hdf5(path, "images", "folds") as reader:
                fold = torch.from_numpy(reader.file["folds"][self.fold])
        return replace(arrays, split=self._split(arrays.label, official, fold))

    def _split(self, label: Tensor, official: Tensor, fold: Tensor | None) -> Tensor:
        unlabelled, labelled = label < 0, (label >= 0) & (official == TRAIN)
        split = official.masked_fill(unlabelled, UNUSED)
        if fold is None:
            split = hold_out(split, label, self.val_fraction, self.split_seed)
            if self.train_on == "unlabelled":
                split[split == TRAIN] = UNUSED
            if self.train_on != "labelled":
                split[unlabelled] = TRAIN
        else:
            split[fold] = UNUSED  # for now, so that none of them is held out
            split = hold_out(split, label, self.val_fraction, self.split_seed)
            split[labelled & (split == TRAIN)] = UNUSED
            split[fold] = TRAIN
        return thin_out(split, label, self.train_fraction, self.split_seed, self.imbalance)
