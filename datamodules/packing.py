"""Images packed once into one HDF5 file, from which they are memory-mapped: nothing is decoded or copied when a training starts."""

import errno
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import DataError

# No permission, no room, a read-only file system, a file where a folder is needed.
_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENOTDIR, errno.EEXIST)


def pack_once(path: Path, source: str, write: Callable[[Any], None], option: str = "--data.root") -> None:
    """Make a packed file, unless it is there already.

    Of several processes one packs, the others wait. The file appears under its name only when it is whole.

    Args:
        path: the `.h5` file to make.
        source: what it is made from; a file made from something else is made anew.
        write: fills an open, empty `h5py.File`; see `image_dataset`.
        option: with which another place can be given, for the message.

    Raises:
        DataError: if the file cannot be written, or another HDF5 file has its name.

    Example:
        >>> pack_once(Path("data/cifar10.h5"), "cifar-10-python.tar.gz", write)
    """
    from filelock import FileLock

    if _source(path) == source:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{path.name}.lock")):
            if _source(path) != source:  # nobody made it while this process waited
                remove_leftovers(path)
                _write(path, source, write)
    except OSError as error:
        if error.errno not in _UNWRITABLE:
            raise
        raise DataError(
            f"the packed images cannot be written to {path} ({error.strerror}): give a place with room where you may write, with {option}"
        ) from error


def _write(path: Path, source: str, write: Callable[[Any], None]) -> None:
    import h5py

    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with h5py.File(temporary, "w") as file:
            write(file)
            file.attrs["source"] = source
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(path: Path) -> None:
    """Remove the temporary files `.NAME.PID` that a killed process left of a file; to be called by the one process that may write it.

    Args:
        path: the file that they were to become.

    Example:
        >>> remove_leftovers(Path("data/cifar10.h5"))
    """
    for entry in path.parent.iterdir():
        head, _, process = entry.name.rpartition(".")
        if head == f".{path.name}" and process.isdigit():
            entry.unlink(missing_ok=True)


def _source(path: Path) -> str | None:
    """What an existing packed file was made from; None if there is none, or a broken one."""
    import h5py

    try:
        with h5py.File(path, "r") as file:
            source = file.attrs.get("source")
    except OSError:
        return None
    if source is None:
        raise DataError(f"{path} was not packed by litzoo and is left alone: move it away, or read it with HDF5ImagesDataModule")
    return source


class ImageBlock:
    """The images of a packed file that is being written, in one contiguous block.

    Written past h5py, in whose finalisers a Ctrl-C would be lost, and which does not say when the disk is full.

    Args:
        path: the file.
        offset: where the block starts, in bytes.
        shape: `(N, H, W, C)`.
    """

    def __init__(self, path: Path, offset: int, shape: tuple[int, int, int, int]) -> None:
        self.path = path
        self.offset = offset
        self.shape = shape

    def __setitem__(self, part: slice, images: np.ndarray) -> None:
        start, stop, _ = part.indices(self.shape[0])
        if images.shape != (stop - start, *self.shape[1:]) or images.dtype != np.uint8:
            raise ValueError(
                f"images {start} to {stop} must be uint8 of shape {(stop - start, *self.shape[1:])}, got {images.dtype} {images.shape}"
            )
        with self.path.open("r+b", buffering=0) as file:
            file.seek(self.offset + start * math.prod(self.shape[1:]))
            left = memoryview(np.ascontiguousarray(images).reshape(-1))  # type: ignore[arg-type]
            while left:
                left = left[file.write(left) :]


def image_dataset(file: Any, shape: tuple[int, int, int, int]) -> ImageBlock:
    """Make the data set `image` of a packed file, in one contiguous block, so that it can be memory-mapped.

    Args:
        file: the open `h5py.File`.
        shape: `(N, H, W, C)`.

    Returns:
        The empty block; assign images to its slices.

    Example:
        >>> image_dataset(file, (50000, 32, 32, 3))[:1000] = images
    """
    import h5py

    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    made = h5py.h5d.create(file.id, b"image", h5py.h5t.NATIVE_UINT8, h5py.h5s.create_simple(shape), dcpl=properties)
    return ImageBlock(Path(file.filename), made.get_offset(), shape)


def map_images(path: Path) -> Tensor:
    """Memory-map the images of an HDF5 file whose `image` is one contiguous, uncompressed block of uint8.

    The pages are private to the process only if it writes to them, so that workers share them.

    Args:
        path: the file.

    Returns:
        `(N, C, H, W)` uint8, a view of the stored `(N, H, W, C)`.

    Raises:
        DataError: if the images are stored in another way, or the file is truncated.

    Example:
        >>> map_images(Path("data/cifar10.h5")).shape
        torch.Size([60000, 3, 32, 32])
    """
    import h5py

    with h5py.File(path, "r") as file:
        image = file["image"]
        offset, shape = image.id.get_offset(), image.shape
    if offset is None:
        raise DataError(f"{path}: its images are chunked or compressed and cannot be memory-mapped")
    try:
        stored = np.memmap(path, dtype=np.uint8, mode="c", offset=offset, shape=shape)
    except ValueError as error:
        raise DataError(f"{path} is truncated: delete it, it is made anew ({error})") from error
    return torch.from_numpy(stored).permute(0, 3, 1, 2)
