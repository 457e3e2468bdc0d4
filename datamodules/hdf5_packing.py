"""Large arrays of somebody's HDF5 file that cannot be memory-mapped as they are: packed once into a file from which they can."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from .hdf5_reading import HDF5Reader
from .packing import block_dataset, pack_once, packed_place

_FAMILY = "litzoo HDF5 arrays"
# Packed files of another version are made anew.
_SOURCE = f"{_FAMILY}, version 1"


def pack_arrays(
    reader: HDF5Reader, names: tuple[str, ...], blocks: Iterable[tuple[slice, tuple[Tensor, ...]]], unit: str, pack: Path | None
) -> Path:
    """Pack arrays of an HDF5 file, some samples at a time, into a file in which each is one contiguous block.

    They are packed once, by one of several processes, and anew if size or time of modification of the file change.

    Args:
        reader: the open file.
        names: of its arrays of numbers; the packed file is named after the first.
        blocks: their content; see `HDF5Reader.blocks`.
        unit: what a sample is, in the plural, for the progress bar.
        pack: file to pack into, or an existing folder for it; None puts it beside the file, or into `~/.cache/litzoo` where that is not
            allowed.

    Returns:
        The packed file.

    Raises:
        DataError: if it cannot be written.

    Example:
        >>> with open_hdf5(Path("/data/cifar10.h5"), "images", "image") as reader:
        ...     pack_arrays(reader, ("image",), reader.blocks("image"), "images", None)
        PosixPath('/data/cifar10.h5.image.h5')
    """
    from tqdm import tqdm

    path = Path(os.path.abspath(reader.path))
    source = f"{_SOURCE}: {' '.join(names)} {reader.stamp(*names)}"
    packed = packed_place(path, f"{path.name}.{names[0]}.h5", source, pack, _FAMILY, "an HDF5 file")

    def write(file: Any) -> None:
        arrays = [block_dataset(file, name, reader.file[name].shape, reader.kind(name)) for name in names]
        with tqdm(desc=f"packing {path.name}", total=arrays[0].shape[0], unit=f" {unit}", disable=None) as bar:
            for part, values in blocks:
                for array, value in zip(arrays, values, strict=True):
                    array[part] = value.numpy()
                bar.update(part.stop - part.start)

    pack_once(packed, source, write, "--data.pack")
    return packed
