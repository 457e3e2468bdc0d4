"""Reading arrays out of an HDF5 file, with one clear sentence about whatever is wrong with it."""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import DataError
from .packing import can_map
from .splits import TEST, TRAIN, VAL

# Bytes of arrays that may be in memory whole, and that are read at a time of larger ones.
_IN_MEMORY, _BLOCK = 64_000_000, 1 << 24


class HDF5Reader:
    """An open HDF5 file whose arrays are checked as they are read; made by `open_hdf5`.

    Args:
        path: for the messages.
        file: the open `h5py.File`.
        status: of the file, before it was opened.
    """

    def __init__(self, path: Path, file: Any, status: os.stat_result) -> None:
        self.path = path
        self.file = file
        self._status = status

    def __contains__(self, name: str) -> bool:
        return name in self.file

    def kind(self, name: str) -> np.dtype[Any]:
        """The type in which an array of numbers is read: in the machine's byte order, and one that torch can index."""
        kind = getattr(self.file[name], "dtype", None)
        if kind is None or kind.kind not in "biuf" or kind.itemsize > 8:
            raise DataError(f"{self.path}: {name} must be an array of numbers, it is {'a group' if kind is None else f'of type {kind}'}")
        # Torch cannot index with the wider unsigned types.
        return np.dtype("i8") if kind.kind == "u" and kind.itemsize > 1 else kind.newbyteorder("=")

    def numbers(self, name: str) -> Tensor:
        """A whole array of numbers."""
        kind = self.kind(name)
        return torch.from_numpy(self.file[name][...].astype(kind, copy=False))

    def whole_numbers(self, name: str) -> Tensor:
        """A whole array of numbers without fractions."""
        return self.check_whole(name, self.numbers(name))

    def check_whole(self, name: str, values: Tensor) -> Tensor:
        """The values, which must be numbers without fractions."""
        if values.is_floating_point() and not torch.equal(values, values.long().to(values.dtype)):
            raise DataError(f"{self.path}: {name} must hold whole numbers, it holds fractions or NaN")
        return values

    def small(self, *names: str) -> bool:
        """Whether some arrays take at most 64 MB, and may be read into memory whole."""
        return self._size(*names) <= _IN_MEMORY

    def _size(self, *names: str) -> int:
        return sum(math.prod(self.file[name].shape) * self.kind(name).itemsize for name in names)

    def stamp(self, *names: str) -> str:
        """Size and time of modification of the file when it was opened, and of the others to which some of its arrays refer."""
        others: set[Path] = set()
        for array in (self.file[name] for name in names):
            home = Path(array.file.filename)  # another file, if the name is a link to it
            named = [name for name, *_ in array.external or ()]
            named += [source.file_name for source in array.virtual_sources()] if array.is_virtual else []
            others |= {home, *(home.parent / name for name in named)}
        statuses = [self._status, *(file.stat() for file in sorted(others - {self.path}) if file.is_file())]
        return " ".join(f"{status.st_size} {status.st_mtime_ns}" for status in statuses)

    def can_map(self, *names: str) -> bool:
        """Whether all of some arrays of numbers can be memory-mapped, and then indexed by torch."""
        return all(can_map(self.file[name]) and self.file[name].dtype == self.kind(name) for name in names)

    def blocks(self, *names: str) -> Iterator[tuple[slice, tuple[Tensor, ...]]]:
        """Arrays of equally many samples, a block of samples at a time, so that they are never in memory whole.

        Args:
            names: of the arrays.

        Yields:
            Which samples, and the arrays' values of them.
        """
        samples = len(self.file[names[0]])
        rows = max(1, _BLOCK * samples // self._size(*names))
        # Whole chunks, so that each is unpacked once, unless they are too long.
        chunk = max((self.file[name].chunks or (1,))[0] for name in names)
        rows = rows // chunk * chunk or min(chunk, 4 * rows)
        for start in range(0, samples, rows):
            part = slice(start, min(start + rows, samples))
            yield part, tuple(torch.from_numpy(self.file[name][part].astype(self.kind(name), copy=False)) for name in names)

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of texts."""
        import h5py

        array = self.file[name]
        if not isinstance(array, h5py.Dataset) or h5py.check_string_dtype(array.dtype) is None or array.ndim != 1:
            raise DataError(f"{self.path}: {name} must be a list of texts")
        return tuple(array.asstr()[:])

    def check_labels(self, label: Tensor, split: Tensor | None, names: tuple[str, ...] | None, lowest: int = 0) -> None:
        """Refuse labels without a name, and splits that are none."""
        if len(label) == 0:
            raise DataError(f"{self.path} holds no sample")
        if label.min() < lowest:
            raise DataError(f"{self.path}: labels start at 0, but the lowest is {label.min()}")
        if names is not None and label.max() >= len(names):
            raise DataError(f"{self.path}: labels run from {label.min()} to {label.max()}, but there are {len(names)} class names")
        foreign = [] if split is None else sorted(set(split.tolist()) - {TRAIN, VAL, TEST})
        if foreign:
            raise DataError(f"{self.path}: split must be 0 (train), 1 (validation) or 2 (test), it holds {foreign[0]}")


def resolve_path(path: str | os.PathLike[str]) -> Path:
    """The path with `~` and environment variables filled in."""
    return Path(os.path.expandvars(path)).expanduser()


@contextmanager
def open_hdf5(path: Path, content: str, *needed: str) -> Iterator[HDF5Reader]:
    """Open an HDF5 file that must hold some arrays.

    Args:
        path: the file.
        content: what it holds, for the message about a missing file.
        needed: names of arrays.

    Yields:
        The reader.

    Raises:
        DataError: if the file is missing, broken or lacks an array.

    Example:
        >>> with open_hdf5(Path("shapes.h5"), "clouds", "points", "label") as reader:
        ...     points = reader.numbers("points")
    """
    import h5py

    if not path.is_file():
        raise DataError(f"there is no file {path}: give the HDF5 file of the {content} with --data.path")
    try:
        status = path.stat()  # before it is opened: of what is written to it meanwhile, the stamp will be another one
        with h5py.File(path, "r") as file:
            missing = [name for name in needed if name not in file]
            if missing:
                raise DataError(f"{path} has no data set {' and '.join(missing)}; it holds: {', '.join(file) or 'nothing'}")
            yield HDF5Reader(path, file, status)
    except OSError as error:
        raise DataError(f"{path} cannot be read as HDF5, it may be truncated or of another format ({error}): fetch it anew") from error
