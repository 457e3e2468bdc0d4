"""A user's own folders of pictures, decoded once."""

import hashlib
import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from .arrays import Arrays
from .augment.images import ImageAugmentation, Preset
from .errors import DataError
from .hdf5_reading import resolve_path
from .images import ImageDataModule
from .packing import block_dataset, map_images, pack_once, packed_from
from .pictures import PICTURE_SUFFIXES, decode_picture, why_undecodable
from .splits import TEST, TRAIN, UNUSED, VAL

Fit = Literal["crop", "stretch"]

_SPLITS = {"train": TRAIN, "val": VAL, "valid": VAL, "validation": VAL, "test": TEST}
# Packed files of another version are made anew.
_SOURCE = "litzoo image folder, version 1"
# Decoded images that are held before they are written, in bytes.
_BLOCK = 1 << 26


class _Pictures:
    """What lies in a folder, without opening a single file.

    Attributes:
        names: of all images, relative to the folder and in ascending order.
        fingerprint: of names, sizes and times of modification.
        label: `(M,)` int64.
        split: `(M,)` uint8, or None without folders for the splits.
        class_names: in ascending order.
    """

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            what = "is a file: unpack it first, and give the folder" if root.exists() else "does not exist: give the folder of the images"
            raise DataError(f"{root} {what} with --data.path")
        try:
            found, folders = _scan(root)
        except OSError as error:
            raise DataError(f"{root} cannot be read: {error}") from error
        if not found:
            raise DataError(f"{root} holds no images ({', '.join(sorted(kind[1:] for kind in PICTURE_SUFFIXES))})")
        self.names = [name for name, _, _ in found]
        digest = hashlib.sha256()
        for entry in found:
            digest.update("\0".join(map(str, entry)).encode(errors="surrogateescape") + b"\n")
        self.fingerprint = digest.hexdigest()
        parts = [name.split("/") for name in self.names]
        depth = _depth(root, {part[0] for part in parts if len(part) > 1})
        stray = [name for name, part in zip(self.names, parts, strict=True) if len(part) < depth + 2]
        if stray:
            others = f" (and {len(stray) - 1} more)" if len(stray) > 1 else ""
            place = f"{root}/{'train/' * depth}<class>/"
            raise DataError(f"{root / stray[0]}{others} lies in no class folder: move it to {place}, or remove it")
        classes = sorted({part[depth] for part in parts})
        if len(classes) < 2:
            raise DataError(
                f"{root} has images of one class only, {classes[0]}: it must hold a folder for each class, or train/<class> and so on"
            )
        for empty in sorted(name for name in folders if name.count("/") == depth and name.split("/")[depth] not in classes):
            warnings.warn(f"{root / empty} holds no image and is no class", stacklevel=2)
        number = {name: cls for cls, name in enumerate(classes)}
        self.label = torch.tensor([number[part[depth]] for part in parts])
        split = torch.tensor([_SPLITS[part[0].lower()] if depth else TRAIN for part in parts], dtype=torch.uint8)
        self.split = split if (split != TRAIN).any() else None
        self.class_names = tuple(classes)


def _scan(root: Path) -> tuple[list[tuple[str, int, int]], list[str]]:
    """Relative name, size and time of modification of all images, and the names of all folders; nothing hidden."""
    images, folders = [], []
    pending: list[tuple[str, str, tuple[tuple[int, int], ...]]] = [(str(root), "", ())]
    while pending:
        folder, prefix, above = pending.pop()
        status = os.stat(folder)
        here = (status.st_dev, status.st_ino)
        if here in above:  # a link to a folder in which it lies itself
            continue
        with os.scandir(folder) as entries:
            for entry in entries:
                name = prefix + entry.name
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    folders.append(name)
                    pending.append((entry.path, f"{name}/", (*above, here)))
                elif os.path.splitext(entry.name)[1].lower() in PICTURE_SUFFIXES:
                    try:
                        status = entry.stat()
                        images.append((name, status.st_size, status.st_mtime_ns))
                    except FileNotFoundError:  # a link to nothing; it is named with the files that cannot be decoded
                        images.append((name, 0, 0))
    return sorted(images), folders


def _depth(root: Path, tops: set[str]) -> int:
    """How many folders lie above those of the classes: 1 if the data have official splits, else 0."""
    splits = {top for top in tops if top.lower() in _SPLITS}
    train = any(top.lower() == "train" for top in splits)
    if splits == tops and train:
        return 1
    if len(splits) > 1 and splits == tops:
        raise DataError(f"{root} has the folders {', '.join(sorted(splits))}, but no folder train")
    if len(splits) > 1 and train:
        raise DataError(
            f"{root} has the splits {', '.join(sorted(splits))}, but {min(tops - splits)} with images beside them: move it away"
        )
    return 0


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


def _writer(root: Path, pictures: _Pictures, size: int, fit: Fit, color: bool, skip_corrupt: bool) -> Callable[[Any], None]:
    """What fills the packed file: images, labels, names; and the positions of those that cannot be decoded."""

    def attempt(name: str) -> np.ndarray | str:
        try:
            return _decode(os.path.join(root, name), size, fit, color)
        except Exception as error:  # noqa: BLE001  # Pillow has no common class for what is wrong with a file
            return why_undecodable(error)

    def write(file: Any) -> None:
        import h5py
        from tqdm import tqdm

        names = pictures.names
        images = block_dataset(file, "image", (len(names), size, size, 3 if color else 1))
        blank = np.zeros(images.shape[1:], np.uint8)
        block = max(16, min(512, _BLOCK // blank.size))
        corrupt: dict[int, str] = {}
        with ThreadPoolExecutor() as pool, tqdm(desc=f"packing {root.name}", total=len(names), unit=" images", disable=None) as bar:
            for start in range(0, len(names), block):
                decoded = list(pool.map(attempt, names[start : start + block]))
                corrupt |= {start + place: found for place, found in enumerate(decoded) if isinstance(found, str)}
                images[start : start + len(decoded)] = np.stack([blank if isinstance(found, str) else found for found in decoded])
                bar.update(len(decoded))
        if corrupt and (not skip_corrupt or len(corrupt) == len(names)):
            raise DataError(_complaint(root, names, corrupt) + _CURE)
        text = h5py.string_dtype()
        file["label"] = pictures.label.numpy()
        if pictures.split is not None:
            file["split"] = pictures.split.numpy()
        file["class_names"] = np.array([_printable(name) for name in pictures.class_names], dtype=text)
        file["file"] = np.array([_printable(name) for name in names], dtype=text)
        file["corrupt"] = np.array(list(corrupt), dtype=np.int64)
        file["corrupt_reason"] = np.array([_printable(reason) for reason in corrupt.values()], dtype=text)

    return write


_CURE = ": remove or replace them, or leave them out with --data.skip_corrupt true"


def _printable(name: str) -> str:
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")


def _complaint(root: Path, names: list[str], corrupt: dict[int, str]) -> str:
    first = ", ".join(f"{_printable(names[place])} ({_printable(reason)})" for place, reason in list(corrupt.items())[:5])
    more = f" and {len(corrupt) - 5} more" if len(corrupt) > 5 else ""
    return f"{len(corrupt)} of {len(names)} images in {root} cannot be decoded: {first}{more}"


class ImageFolderDataModule(ImageDataModule):
    """A user's own folders of images: `path/<class>/**/*.jpg`, or `path/{train,val,test}/<class>/**/*.jpg`.

    Images of any size and mode are decoded once, in threads, cut to squares of `size` pixels and packed into one file that is
    memory-mapped from then on: a later start opens no image. If a file is added, removed or changed, all are packed anew.
    Colours: transparency lies on white, 16 bits are scaled to 8, the orientation that a camera noted is respected, of an
    animation the first frame counts. Hidden files are ignored. A folder `valid` or `validation` is `val`; without `val`, validation
    images are held out from `train`; without `test`, there is no test split. A single folder `train` counts as no split.

    Args:
        path: the folder; `~` and environment variables are resolved.
        size: height and width of the packed images, pixels.
        fit: "crop" scales the shorter edge to `size` and keeps the centre, "stretch" changes the proportions.
        color: three channels; False packs grey images of one channel.
        pack: file to pack into, or an existing folder for it; None puts it beside `path`, or into `~/.cache/litzoo` where that is not
            allowed. The name that it gets says `size`, `fit` and `color`.
        skip_corrupt: leave out images that cannot be decoded, with a warning, instead of refusing to start.
        augmentation: a preset by name, or an `ImageAugmentation`.
        views: views of each training image.
        image_size: pixels of what a model gets; None takes `size`.
        train_fraction: share of each class's training images to use, in (0, 1].
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
        DataError: if the folder is missing, has another layout or holds files that cannot be decoded.
        ValueError: if a setting is out of range.

    Example:
        >>> data = ImageFolderDataModule("~/photos", size=96)
        >>> data.class_names, data.files[0]
        (['cat', 'dog'], 'cat/001.jpg')
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        size: int = 64,
        fit: Fit = "crop",
        color: bool = True,
        pack: str | os.PathLike[str] | None = None,
        skip_corrupt: bool = False,
        augmentation: Preset | ImageAugmentation = "standard",
        views: int = 1,
        image_size: int | None = None,
        train_fraction: float = 1.0,
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
            augmentation,
            views,
            image_size,
            train_fraction,
            val_fraction,
            test_fraction,
            split_seed,
            balanced,
            mean,
            std,
            compiled,
            batch_size,
            eval_batch_size,
            num_workers,
            seed,
        )
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

    def _packed(self, source: str) -> Path:
        """The file to pack into."""
        name = f"{self.path.name}.{self.size}.{self.fit}.{'rgb' if self.color else 'grey'}.h5"
        if self.pack is not None:
            if self.pack.is_file() and not (packed_from(self.pack) or "").startswith(_SOURCE.partition(",")[0]):
                raise DataError(
                    f"{self.pack} exists and was not packed from a folder of images: give another file with --data.pack, or delete it"
                )
            return self.pack / name if self.pack.is_dir() else self.pack
        beside = self.path.parent / name
        if packed_from(beside) == source or os.access(beside.parent, os.W_OK):
            return beside
        # Folders of the same name must not share a file.
        place = hashlib.sha256(os.fsencode(self.path)).hexdigest()[:8]
        return Path.home() / ".cache" / "litzoo" / f"{place}-{name}"

    def read(self) -> Arrays:
        import h5py

        pictures = _Pictures(self.path)
        settings = f"{self.size} {self.fit} {'rgb' if self.color else 'grey'}"
        source = f"{_SOURCE}: {settings} {pictures.fingerprint}"
        packed = self._packed(source)
        pack_once(packed, source, _writer(self.path, pictures, self.size, self.fit, self.color, self.skip_corrupt), "--data.pack")
        with h5py.File(packed, "r") as file:
            corrupt = dict(zip(file["corrupt"][...].tolist(), file["corrupt_reason"].asstr()[...].tolist(), strict=True))
        complaint = _complaint(self.path, pictures.names, corrupt)
        if corrupt and not self.skip_corrupt:
            raise DataError(complaint + _CURE)
        if corrupt:
            warnings.warn(f"{complaint}; they are left out", stacklevel=2)
        self._files = pictures.names
        return Arrays(
            map_images(packed),
            pictures.label,
            self._split(pictures, list(corrupt)),
            tuple(map(_printable, pictures.class_names)),
            mapped=packed,
        )

    def _split(self, pictures: _Pictures, corrupt: list[int]) -> Tensor:
        good = torch.ones(len(pictures.label), dtype=torch.bool)
        good[corrupt] = False
        split = torch.full((len(good),), UNUSED, dtype=torch.uint8)
        split[good] = self.finish_split(pictures.label[good], None if pictures.split is None else pictures.split[good])
        return split
