"""CIFAR-10 and CIFAR-100, from the official archives."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .archives import Members, official_archive, pack_archive, unpickle_arrays
from .arrays import Arrays
from .augment.images import ImageAugmentation, Preset
from .hdf5_images import read_images
from .hdf5_reading import resolve_path
from .images import ImageDataModule
from .packing import block_dataset
from .splits import TEST, TRAIN


def _pack(path: Path, dataset: Literal["CIFAR10", "CIFAR100"], download: bool) -> None:
    """Pack the archive in the order of the official batches, the test batch last."""

    def write(file: Any, members: Members) -> None:
        from torchvision import datasets

        known = getattr(datasets, dataset)
        contents = {name: unpickle_arrays(reader.read(), name) for name, reader in members}
        train, test = ([contents[name] for name, _ in names] for names in (known.train_list, known.test_list))
        images = np.concatenate([batch["data"] for batch in train + test]).reshape(-1, 3, 32, 32)
        block_dataset(file, "image", (len(images), 32, 32, 3))[:] = images.transpose(0, 2, 3, 1)
        file["split"] = np.repeat(np.array([TRAIN, TEST], np.uint8), [sum(len(batch["data"]) for batch in part) for part in (train, test)])
        meta = contents[known.meta["filename"]]
        file["class_names"] = meta[known.meta["key"]]
        fine = "labels" if dataset == "CIFAR10" else "fine_labels"
        file["label"] = np.concatenate([np.array(batch[fine], np.int64) for batch in train + test])
        if dataset == "CIFAR100":
            file["coarse_label"] = np.concatenate([np.array(batch["coarse_labels"], np.int64) for batch in train + test])
            file["coarse_names"] = meta["coarse_label_names"]

    pack_archive(path, official_archive(dataset), download, write)


class CIFAR10DataModule(ImageDataModule):
    """CIFAR-10: 50,000 training and 10,000 test photographs of 32 x 32 pixels in 10 balanced classes.

    The official archive `cifar-10-python.tar.gz`, or the folder `cifar-10-batches-py` that torchvision unpacks, is packed
    once into `cifar10.h5` in the same folder, which alone is needed from then on. Images keep the order of the official
    batches 1 to 5 and of the test batch; the official test images are the test split, and validation is held out from
    the training images.

    Args:
        root: folder of the archive and of the packed file; `~` and environment variables are resolved.
        download: whether to download the archive (170 MB) if it is missing or damaged.
        augmentation: a preset by name, or an `ImageAugmentation`.
        views: views of each training image.
        image_size: pixels of what a model gets; None takes the stored 32.
        train_fraction: share of each class's training images to use, in (0, 1].
        imbalance: how many times as many training images the first class keeps as the last one, falling exponentially from class to class.
        val_fraction: share of each class's training images held out for validation.
        split_seed: seed of these choices.
        balanced: whether every class comes equally often in a training epoch.
        mean: of each channel, of images in [0, 1]; None takes that of the 50,000 training images.
        std: the same for the standard deviation.
        compiled: compile the colour operations; pays after some minutes of training.
        batch_size: training images in a batch of one process.
        eval_batch_size: images in an evaluation batch; None means twice `batch_size`.
        num_workers: loader processes; 0 is the fastest for packed images.
        seed: seed of order and augmentation; None takes that of `seed_everything`, or 0.

    Raises:
        DataError: if there are no data and they cannot be downloaded, or they are damaged.
        ValueError: if a setting is out of range.

    Example:
        >>> data = CIFAR10DataModule("data")
        >>> data.num_train, data.class_names[:2]
        (45000, ['airplane', 'automobile'])

    Source:
        Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
    """

    published_mean = (0.4914, 0.4822, 0.4465)
    published_std = (0.2470, 0.2435, 0.2616)

    def __init__(
        self,
        root: str | os.PathLike[str] = "data",
        *,
        download: bool = True,
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
        self.root = resolve_path(root)
        self.download = download

    def read(self) -> Arrays:
        path = self.root / "cifar10.h5"
        _pack(path, "CIFAR10", self.download)
        arrays, split = read_images(path)
        return replace(arrays, split=self.finish_split(arrays.label, split))


class CIFAR100DataModule(ImageDataModule):
    """CIFAR-100: 50,000 training and 10,000 test photographs of 32 x 32 pixels in 100 fine or 20 coarse balanced classes.

    The official archive `cifar-100-python.tar.gz`, or the folder `cifar-100-python` that torchvision unpacks, is packed
    once into `cifar100.h5` in the same folder, which alone is needed from then on. Images keep the official order, training
    before test; the official test images are the test split. Validation is held out from the training images and training
    is thinned out by the fine classes, whichever labels are used, so that both kinds are trained and validated on the same images.

    Args:
        root: folder of the archive and of the packed file; `~` and environment variables are resolved.
        download: whether to download the archive (169 MB) if it is missing or damaged.
        labels: "fine" for the 100 classes, "coarse" for the 20 groups of five of them.
        augmentation: a preset by name, or an `ImageAugmentation`.
        views: views of each training image.
        image_size: pixels of what a model gets; None takes the stored 32.
        train_fraction: share of each fine class's training images to use, in (0, 1].
        imbalance: how many times as many training images the first class keeps as the last one, falling exponentially from class to class.
        val_fraction: share of each fine class's training images held out for validation.
        split_seed: seed of these choices.
        balanced: whether every class comes equally often in a training epoch.
        mean: of each channel, of images in [0, 1]; None takes that of the 50,000 training images.
        std: the same for the standard deviation.
        compiled: compile the colour operations; pays after some minutes of training.
        batch_size: training images in a batch of one process.
        eval_batch_size: images in an evaluation batch; None means twice `batch_size`.
        num_workers: loader processes; 0 is the fastest for packed images.
        seed: seed of order and augmentation; None takes that of `seed_everything`, or 0.

    Raises:
        DataError: if there are no data and they cannot be downloaded, or they are damaged.
        ValueError: if a setting is out of range.

    Example:
        >>> CIFAR100DataModule("data", labels="coarse").class_names[:2]
        ['aquatic_mammals', 'fish']

    Source:
        Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
    """

    # Commonly used; the images are not at hand to measure them again.
    published_mean = (0.5071, 0.4865, 0.4409)
    published_std = (0.2673, 0.2564, 0.2762)

    def __init__(
        self,
        root: str | os.PathLike[str] = "data",
        *,
        download: bool = True,
        labels: Literal["fine", "coarse"] = "fine",
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
        if labels not in ("fine", "coarse"):
            raise ValueError(f"labels must be fine or coarse, got {labels!r}")
        self.root = resolve_path(root)
        self.download = download
        self.labels = labels

    def read(self) -> Arrays:
        path = self.root / "cifar100.h5"
        _pack(path, "CIFAR100", self.download)
        arrays, official = read_images(path)
        split = self.finish_split(arrays.label, official)
        if self.labels == "coarse":
            arrays, _ = read_images(path, "coarse_label", "coarse_names")
        return replace(arrays, split=split)
