"""Data packed once into one HDF5 file, from which they are memory-mapped: nothing is decoded or copied when a training starts."""

import errno
import hashlib
import math
import mmap
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from shutil import disk_usage
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..zoo.files import whole_file
from .errors import DataError

# No permission, no room, a read-only file system, a file where a folder is needed.
_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENOTDIR, errno.EEXIST)
# MAP_NORESERVE, which Python does not name; of other machines the number is another one.
_NO_RESERVE = 0x4000 if platform.machine() in ("x86_64", "aarch64") else 0


def pack_once(path: Path, source: str, write: Callable[[Any], None], option: str = "--data.root") -> None:
    """Make a packed file, unless it is there already.

    Of several processes one packs, the others wait. The file appears under its name only when it is whole.

    Args:
        path: the `.h5` file to make.
        source: what it is made from; a file made from something else is made anew.
        write: fills an open, empty `h5py.File`; see `block_dataset`.
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
            f"the packed data cannot be written to {path} ({error.strerror}): give a place with room where you may write, with {option}"
        ) from error


def _write(path: Path, source: str, write: Callable[[Any], None]) -> None:
    import h5py

    with whole_file(path) as temporary:
        with h5py.File(temporary, "w") as file:
            write(file)
            file.attrs["source"] = source
        with temporary.open("r+b") as written:  # before it gets its name, or a power failure could leave blocks of zeros in it
            os.fsync(written.fileno())


def remove_leftovers(path: Path) -> None:
    """Remove the temporary files of `whole_file` that a killed process left beside a file; to be called by the one process that may write it.

    Args:
        path: the file that they were to become.

    Example:
        >>> remove_leftovers(Path("data/cifar10.h5"))
    """
    for entry in path.parent.iterdir():
        head, _, process = entry.name.rpartition(".")
        if head == f".{path.name}" and process.isdigit():
            entry.unlink(missing_ok=True)


def packed_from(path: Path) -> str | None:
    """What a packed file was made from, as `pack_once` was told.

    Args:
        path: the file.

    Returns:
        The source; None if there is no such file, a broken one, or one that litzoo did not pack.

    Example:
        >>> packed_from(Path("data/cifar10.h5"))
        'cifar-10-python.tar.gz c58f30108f718f92721af3b95e74349a'
    """
    import h5py

    try:
        with h5py.File(path, "r") as file:
            return file.attrs.get("source")
    except OSError:
        return None


def packed_place(root: Path, name: str, source: str, pack: Path | None, family: str, data: str) -> Path:
    """The file that a user's folder is packed into.

    Args:
        root: the folder.
        name: of the file, if nobody gives one.
        source: what it is packed from.
        pack: a file or an existing folder for it; None puts it beside the folder, or into `~/.cache/litzoo` where that is not allowed.
        family: with which the source of every such file begins.
        data: what is in the folder, for the message.

    Returns:
        Its path.

    Raises:
        DataError: if `pack` is somebody else's file.

    Example:
        >>> packed_place(Path("photos"), "photos.64.h5", "litzoo image folder: 64", None, "litzoo image folder", "a folder of images")
        PosixPath('photos.64.h5')
    """
    if pack is not None:
        if pack.is_file() and not (packed_from(pack) or "").startswith(family):
            raise DataError(f"{pack} exists and was not packed from {data}: give another file with --data.pack, or delete it")
        return pack / name if pack.is_dir() else pack
    beside = root.parent / name
    if packed_from(beside) == source or os.access(beside.parent, os.W_OK):
        return beside
    # Folders of the same name must not share a file.
    home = hashlib.sha256(os.fsencode(root)).hexdigest()[:8]
    return Path.home() / ".cache" / "litzoo" / f"{home}-{name}"


def _source(path: Path) -> str | None:
    """What an existing packed file was made from; None if there is none, or a broken one; somebody else's is refused."""
    import h5py

    source = packed_from(path)
    if source is None and path.is_file() and h5py.is_hdf5(path) and _opens(path):
        raise DataError(f"{path} was not packed by litzoo and is left alone: move it away, or read it with a DataModule for HDF5 files")
    return source


def _opens(path: Path) -> bool:
    import h5py

    try:
        h5py.File(path, "r").close()
    except OSError:
        return False
    return True


class ArrayBlock:
    """An array of a packed file that is being written, in one contiguous block.

    Written past h5py, in whose finalisers a Ctrl-C would be lost, and which does not say when the disk is full.

    Args:
        path: the file.
        name: of the array, for messages.
        offset: where the block starts, in bytes.
        shape: of the whole array.
        dtype: of its numbers.
    """

    def __init__(self, path: Path, name: str, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.path = path
        self.name = name
        self.offset = offset
        self.shape = shape
        self.dtype = dtype

    def __setitem__(self, part: slice, values: np.ndarray) -> None:
        start, stop, _ = part.indices(self.shape[0])
        if values.shape != (stop - start, *self.shape[1:]) or values.dtype != self.dtype:
            raise ValueError(
                f"{self.name} {start} to {stop} must be {self.dtype} of shape {(stop - start, *self.shape[1:])}, "
                f"got {values.dtype} {values.shape}"
            )
        with self.path.open("r+b", buffering=0) as file:
            file.seek(self.offset + start * math.prod(self.shape[1:]) * self.dtype.itemsize)
            # NumPy's types do not say that an array is a buffer.
            left = memoryview(np.ascontiguousarray(values).reshape(-1).view(np.uint8))  # type: ignore[arg-type]
            while left:
                left = left[file.write(left) :]


def block_dataset(file: Any, name: str, shape: tuple[int, ...], dtype: str | np.dtype[Any] = "uint8") -> ArrayBlock:
    """Make an array of a packed file, in one contiguous block, so that it can be memory-mapped.

    Args:
        file: the open `h5py.File`.
        name: of the array.
        shape: of the whole array; the first dimension counts the samples.
        dtype: of its numbers, in the machine's byte order.

    Returns:
        The empty block; assign arrays of that dtype to its slices.

    Raises:
        OSError: if there is no room for it.

    Example:
        >>> block_dataset(file, "image", (50000, 32, 32, 3))[:1000] = images
    """
    import h5py

    kind = np.dtype(dtype)
    needed, free = math.prod(shape) * kind.itemsize, disk_usage(Path(file.filename).absolute().parent).free
    if free < needed:  # told now, not hours later
        raise OSError(errno.ENOSPC, f"{name} takes {needed / 1e6:,.1f} MB, but {free / 1e6:,.1f} MB are free")
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    space = h5py.h5s.create_simple(shape)
    made = h5py.h5d.create(file.id, name.encode(), h5py.h5t.py_create(kind), space, dcpl=properties)
    return ArrayBlock(Path(file.filename), name, made.get_offset(), shape, kind)


def can_map(array: Any) -> bool:
    """Whether an array of an HDF5 file can be memory-mapped: one contiguous, uncompressed block of native numbers.

    Args:
        array: the open `h5py.Dataset`.

    Returns:
        False if it is chunked, was never written, or its numbers have a foreign byte order or lie across their own size.

    Example:
        >>> can_map(file["image"])
        True
    """
    offset = array.id.get_offset()
    return array.chunks is None and offset is not None and offset % array.dtype.itemsize == 0 and array.dtype.isnative


def map_array(path: Path, name: str) -> Tensor:
    """Memory-map an array of an HDF5 file, see `can_map`; it may be larger than the machine's memory.

    All processes that map it share its pages; one that writes to a page gets a copy of its own.

    Args:
        path: the file.
        name: of the array.

    Returns:
        The array as it is stored.

    Raises:
        DataError: if it is stored in another way, or the file is truncated.

    Example:
        >>> map_array(Path("data/cifar10.h5"), "image").shape
        torch.Size([60000, 32, 32, 3])
    """
    import h5py

    with h5py.File(path, "r") as file:
        array = file[name]
        if not can_map(array):
            raise DataError(f"{path}: {name} is chunked, compressed or of foreign byte order, and cannot be memory-mapped")
        offset, shape, dtype = array.id.get_offset(), array.shape, array.dtype
        path = Path(array.file.filename)  # another one, if the name is a link to it
    try:
        return torch.from_numpy(_map(path, offset, shape, dtype))
    except ValueError as error:
        raise DataError(f"{path} is truncated: delete it, it is made anew ({error})") from error


def _map(path: Path, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    count = math.prod(shape)
    if sys.platform != "linux" or count == 0:
        return np.memmap(path, dtype=dtype, mode="c", offset=offset, shape=shape)
    # Linux would reserve memory for a copy of every page, and refuse a file that is larger than the memory.
    with path.open("rb") as file:
        mapped = mmap.mmap(
            file.fileno(), offset + count * dtype.itemsize, flags=mmap.MAP_PRIVATE | _NO_RESERVE, prot=mmap.PROT_READ | mmap.PROT_WRITE
        )
    return np.frombuffer(mapped, dtype, count, offset).reshape(shape)


def map_images(path: Path) -> Tensor:
    """Memory-map the images of an HDF5 file whose `image` `(N, H, W, C)` is one contiguous block of uint8; see `map_array`.

    Args:
        path: the file.

    Returns:
        `(N, C, H, W)` uint8, a view.

    Raises:
        DataError: if the images are stored in another way, or the file is truncated.

    Example:
        >>> map_images(Path("data/cifar10.h5")).shape
        torch.Size([60000, 3, 32, 32])
    """
    return map_array(path, "image").permute(0, 3, 1, 2)
