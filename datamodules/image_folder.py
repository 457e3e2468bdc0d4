"""A user's own folders of pictures, decoded once."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np

from .arrays import Arrays
from .augment.images import ImageAugmentation, Preset
from .folders import ClassFolders, Kind, printable
from .hdf5_reading import resolve_path
from .images import ImageDataModule
from .packing import map_images, pack_once
from .pictures import PICTURE_SUFFIXES, decode_picture, why_undecodable

Fit = Literal["crop", "stretch"]

_KIND = Kind(PICTURE_SUFFIXES, "image", "images", "litzoo image folder")
# Packed files of another version are made anew.
_SOURCE = f"{_KIND.source}, version 1"
# Decoded images that are held before they are written, in bytes.
_BLOCK = 1 << 26


def _decode(path: str, size: int, fit: Fit, color: bool) -> np.ndarray:
    """Decode an image to `(size, size, C)` uint8.

    Raises:
        Exception: of any kind that Pillow has for broken files.
    """
    from PIL import Image

    image = decode_picture(path, color, enough=4 * size)  # plenty left to average
    width, height = image.size
    edge = min(width, height)
    left, top = (width - edge) / 2, (height - edge) / 2
    box = (left, top, left + edge, top + edge) if fit == "crop" else (0, 0, width, height)
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box)).reshape(size, size, -1)


class ImageFolderDataModule(ImageDataModule):
    """A user's own folders of images: `path/<class>/**/*.jpg`, or `path/{train,val,test}/<class>/**/*.jpg`.

    Images of any size and mode are decoded once, in threads, cut to squares of `size` pixels and packed into one file that is
    memory-mapped from then on: a later start opens no image. If a file is added, removed or changed, all are packed anew.
    Colours: transparency lies on white, 16 bits are scaled to 8, the orientation that a camera noted is respected, of an
    animation the first frame counts. Hidden files are ignored. A folder `valid` or `validation` is `val`; without `val`, validation
    images are held out from `train`; without `test`, there is no test split. A single folder `train` counts as no split. A folder
    `unlabelled` (or `unlabeled`) beside those of the training classes holds images without a label, for models and callbacks that want none.

    Args:
        path: the folder; `~` and environment variables are resolved.
        size: height and width of the packed images, pixels; None takes 64, or `image_size` where that is more.
        fit: "crop" scales the shorter edge to `size` and keeps the centre, "stretch" changes the proportions.
        color: three channels; False packs grey images of one channel.
        pack: file to pack into, or an existing folder for it; None puts it beside `path`, or into `~/.cache/litzoo` where that is not
            allowed. The name that it gets says `size`, `fit` and `color`.
        skip_corrupt: leave out images that cannot be read, with a warning, instead of refusing to start.
        augmentation: a preset by name, or an `ImageAugmentation`.
        views: views of each training image.
        image_size: pixels of what a model gets; None takes `size`.
        train_fraction: share of each class's training images to use, in (0, 1].
        imbalance: how many times as many training images the first class keeps as the last one, falling exponentially from class to class.
        val_fraction: share of each class's training images held out for validation, where there is no folder for it.
        test_fraction: share of each class's images held out for the test, where there are no folders for splits.
        split_seed: seed of these choices.
        balanced: whether every class comes equally often in a training epoch.
        mean: of each channel, of images in [0, 1]; None measures it on the training images.
        std: the same for the standard deviation.
        compiled: compile the colour operations; pays after some minutes of training.
        batch_size: training images in a batch of one process.
        eval_batch_size: images in an evaluation batch; None means twice `batch_size`.
        num_workers: loader processes; 0 is the fastest for packed images.
        seed: seed of order and augmentation; None takes that of `seed_everything`, or 0.

    Raises:
        DataError: if the folder is missing, has another layout or holds files that cannot be read.
        ValueError: if a setting is out of range.

    Example:
        >>> data = ImageFolderDataModule("~/photos", size=96)
        >>> data.class_names, data.files[0]
        (['cat', 'dog'], 'cat/001.jpg')
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        size: int | None = None,
        fit: Fit = "crop",
        color: bool = True,
        pack: str | os.PathLike[str] | None = None,
        skip_corrupt: bool = False,
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
        size = max(64, image_size or 0) if size is None else size
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        if fit not in ("crop", "stretch"):
            raise ValueError(f"fit must be crop or stretch, got {fit!r}")
        self.path = Path(os.path.abspath(resolve_path(path)))
        self.size = size
        self.fit: Fit = fit
        self.color = color
        self.pack = None if pack is None else Path(os.path.abspath(resolve_path(pack)))
        self.skip_corrupt = skip_corrupt
        self._files: list[str] = []

    @property
    def files(self) -> list[str]:
        """Name of each sample's file, relative to `path`; a batch's `index` points into it."""
        _ = self.arrays  # read now, if not before
        return self._files

    def _attempt(self, path: Path) -> np.ndarray | str:
        try:
            return _decode(os.fspath(path), self.size, self.fit, self.color)
        except Exception as error:  # noqa: BLE001  # Pillow has no common class for what is wrong with a file
            return why_undecodable(error)

    def read(self) -> Arrays:
        folders = ClassFolders(self.path, _KIND, unlabelled=True)
        color, channels = ("rgb", 3) if self.color else ("grey", 1)
        source = f"{_SOURCE}: {self.size} {self.fit} {color} {folders.fingerprint}"
        packed = folders.place(f"{self.path.name}.{self.size}.{self.fit}.{color}.h5", source, self.pack)
        shape = (self.size, self.size, channels)
        block = max(16, min(512, _BLOCK // (self.size * self.size * channels)))

        def samples(paths: list[Path]) -> Iterator[np.ndarray | str]:
            with ThreadPoolExecutor() as pool:
                for start in range(0, len(paths), block):
                    yield from pool.map(self._attempt, paths[start : start + block])

        pack_once(packed, source, folders.writer("image", shape, "uint8", block, samples, self.skip_corrupt), "--data.pack")
        corrupt = folders.corrupt(packed, self.skip_corrupt)
        self._files = folders.names
        return Arrays(
            map_images(packed),
            folders.label,
            folders.finish_split(corrupt, self.finish_split),
            tuple(map(printable, folders.class_names)),
            mapped=packed,
        )
