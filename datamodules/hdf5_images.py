"""Images from one HDF5 file."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from .arrays import Arrays
from .augment.images import ImageAugmentation, Preset
from .errors import DataError
from .hdf5_packing import pack_arrays
from .hdf5_reading import open_hdf5, resolve_path
from .images import ImageDataModule
from .packing import map_images
from .splits import TRAIN


def read_images(
    path: Path, label: str = "label", class_names: str = "class_names", unlabelled: bool = False, pack: Path | None = None
) -> tuple[Arrays, Tensor | None]:
    """Read a file of images; one contiguous, uncompressed block is memory-mapped, as is what is packed of anything else above 64 MB.

    Args:
        path: an HDF5 file with `image` `(M, H, W, C)` uint8, C = 1 or 3, and labels.
        label: name of the labels `(M,)`.
        class_names: name of the list of class names, which may be missing.
        unlabelled: whether a label may be -1, unknown.
        pack: see `pack_arrays`.

    Returns:
        The arrays, all samples in the training split, and the split `(M,)` of the file or None.

    Raises:
        DataError: if the file is missing, truncated or of another layout, or cannot be packed.

    Example:
        >>> arrays, split = read_images(Path("cifar10.h5"))
    """
    with open_hdf5(path, "images", "image", label) as reader:
        image = reader.file["image"]
        shape: tuple[int, ...] = getattr(image, "shape", ())
        kind = getattr(image, "dtype", None)
        if kind != "uint8" or len(shape) != 4 or shape[-1] not in (1, 3) or 0 in shape:
            raise DataError(f"{path}: image must be uint8 of shape (M, H, W, C) with C = 1 or 3, it is {kind} {shape}")
        numbers = reader.whole_numbers(label).long()
        split = reader.whole_numbers("split") if "split" in reader else None
        names = reader.texts(class_names) if class_names in reader else None
        for name, array in ((label, numbers), ("split", split)):
            if array is not None and array.shape != shape[:1]:
                raise DataError(f"{path}: {name} must have shape ({shape[0]},) like the images, it has {tuple(array.shape)}")
        reader.check_labels(numbers, split, names, lowest=-1 if unlabelled else 0)
        mapped = None
        if reader.can_map("image"):
            mapped = path.absolute()
        elif not reader.small("image"):
            mapped = pack_arrays(reader, ("image",), reader.blocks("image"), "images", pack)
        images = reader.numbers("image").permute(0, 3, 1, 2) if mapped is None else map_images(mapped)
    names = names if names is not None else tuple(str(cls) for cls in range(int(numbers.max()) + 1))
    every = torch.zeros(len(numbers), dtype=torch.uint8)
    return Arrays(images, numbers, every, names, mapped=mapped), split


class HDF5ImagesDataModule(ImageDataModule):
    """Images of any HDF5 file with `image` and `label`.

    The file holds `image` `(M, H, W, C)` uint8 with C = 1 or 3, `label` `(M,)` int, and optionally `split` `(M,)`
    (0 = train, 1 = validation, 2 = test) and `class_names` `(C,)` text. Images in one contiguous, uncompressed block are
    memory-mapped. Others are read into memory up to 64 MB; more of them are packed once, some at a time, into a file that is
    memory-mapped, and anew if the given file changes. A label of -1 is unknown: such images always train, all of them.

    Args:
        path: the file; `~` and environment variables are resolved.
        augmentation: a preset by name, or an `ImageAugmentation`.
        views: views of each training image.
        image_size: pixels of what a model gets; None takes the stored size.
        train_fraction: share of each class's training images to use, in (0, 1].
        imbalance: how many times as many training images the first class keeps as the last one, falling exponentially from class to class.
        val_fraction: share of each class's training images held out for validation, where the file has no such split.
        test_fraction: share of each class's images held out for the test, where the file has no `split`.
        split_seed: seed of these choices.
        balanced: whether every class comes equally often in a training epoch.
        mean: of each channel, of images in [0, 1]; None measures it on the training images.
        std: the same for the standard deviation.
        compiled: compile the colour operations; pays after some minutes of training.
        batch_size: training images in a batch of one process.
        eval_batch_size: images in an evaluation batch; None means twice `batch_size`.
        num_workers: loader processes; 0 is the fastest for packed images.
        seed: seed of order and augmentation; None takes that of `seed_everything`, or 0.
        pack: file to pack into, or an existing folder for it; None puts it beside `path`, or into `~/.cache/litzoo` where that is not
            allowed.

    Raises:
        DataError: if the file is missing, truncated or of another layout, or cannot be packed.
        ValueError: if a setting is out of range.

    Example:
        >>> data = HDF5ImagesDataModule("cifar10.h5", augmentation="supcon", views=2)
        >>> data.num_classes, data.image_size
        (10, 32)
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        augmentation: Preset | ImageAugmentation = "standard",
        views: int = 1,
        image_size: int | None = None,
        train_fraction: float = 1.0,
        imbalance: float = 1.0,
        val_fraction: float = 0.1,
        test_fraction: float = 0.15,
        split_seed: int = 0,
        balanced: bool = False,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        compiled: bool = False,
        batch_size: int = 128,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int | None = None,
        pack: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__(
            augmentation=augmentation,
            views=views,
            image_size=image_size,
            train_fraction=train_fraction,
            imbalance=imbalance,
            val_fraction=val_fraction,
            test_fraction=test_fraction,
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
        self.path = resolve_path(path)
        self.pack = None if pack is None else Path(os.path.abspath(resolve_path(pack)))

    def read(self) -> Arrays:
        arrays, given = read_images(self.path, unlabelled=True, pack=self.pack)
        lost = 0 if given is None else int((given[arrays.label < 0] != TRAIN).sum())
        if lost:
            raise DataError(
                f"{self.path}: {lost} images for validation or test have no label, but -1: label them, or put them into the training split"
            )
        return replace(arrays, split=self.finish_split(arrays.label, given))
