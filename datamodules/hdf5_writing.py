"""Writing a data set into one HDF5 file, in the layout that the DataModules for HDF5 files read."""

import os
from collections.abc import Sequence
from pathlib import Path
from shutil import disk_usage
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..zoo.files import whole_file
from .arrays import Arrays
from .errors import DataError
from .splits import TRAIN, UNUSED

# Bytes that are written at a time.
_BLOCK = 1 << 26


def check_target(path: str | os.PathLike[str], arrays: Arrays) -> Path:
    """Refuse a file that `write_hdf5` could not write, before there is anything to write.

    Args:
        path: a new `.h5` or `.hdf5` file.
        arrays: the data set.

    Returns:
        The path.

    Raises:
        DataError: if the file exists, has another ending, there is no folder for it, or the samples are neither images nor clouds.

    Example:
        >>> check_target("digits.h5", DigitsDataModule().arrays)
        PosixPath('digits.h5')
    """
    target = Path(path)
    if target.suffix.lower() not in (".h5", ".hdf5"):
        raise DataError(f"{target}: give a name that ends in .h5 or .hdf5")
    if target.exists():
        raise DataError(f"{target} exists already and is not overwritten: give another name")
    if not target.absolute().parent.is_dir():
        raise DataError(f"{target}: there is no folder {target.absolute().parent}")
    samples = arrays.input
    images = samples.dim() == 4 and samples.dtype == torch.uint8 and samples.shape[1] in (1, 3)
    if not images and not (samples.dim() == 3 and samples.shape[2] == 3 and samples.is_floating_point()):
        raise DataError(
            f"{target}: samples of {samples.dtype} and shape {tuple(samples.shape[1:])} are neither images nor point clouds, which are all "
            "that such files hold"
        )
    return target


def write_hdf5(
    path: str | os.PathLike[str], arrays: Arrays, label: Tensor | None = None, kept: Tensor | None = None, files: Sequence[str] = ()
) -> int:
    """Write images or point clouds as `HDF5ImagesDataModule` or `HDF5PointsDataModule` reads them.

    The file holds `image` or `points`, `label`, `split`, `class_names`, `part`, `part_names` and `count` where there are such,
    `index`, the number that each sample has in `arrays`, and `file`, its name. Unused samples are left out, and those without a label,
    unless they are images that train: the DataModules take no others. No file is ever overwritten.

    Args:
        path: a new `.h5` or `.hdf5` file.
        arrays: the data set, with input `(M, C, H, W)` uint8 or `(M, N, 3)` floats.
        label: `(M,)` int64, instead of that of the arrays.
        kept: `(M,)` bool, which samples to write; None writes all.
        files: M names, or none.

    Returns:
        How many samples were written.

    Raises:
        DataError: if the file exists, has another ending, there is no folder or no room for it, the samples are neither images nor
            clouds, or none with a label is left.

    Example:
        >>> write_hdf5("digits.h5", DigitsDataModule().arrays)
        1797
    """
    import h5py

    target = check_target(path, arrays)
    samples = arrays.input
    images = samples.dim() == 4
    new = arrays.label if label is None else label
    takes = (new >= 0) | (images & (arrays.split == TRAIN))
    chosen = (arrays.split != UNUSED) & takes & (torch.ones_like(takes) if kept is None else kept)
    index = chosen.nonzero().squeeze(1)
    if not (new[index] >= 0).any():
        raise DataError(f"{target}: no sample with a label is left to write")
    columns: dict[str, Any] = {"label": new[index], "split": arrays.split[index], "index": index}
    if arrays.part is not None:
        columns["part"] = arrays.part[index]
    if arrays.count is not None:
        columns["count"] = arrays.count[index]
    texts = {
        "class_names": arrays.class_names,
        "part_names": arrays.part_names,
        "file": [files[each] for each in index.tolist()] if files else (),
    }
    size = samples[0].numel() * samples.element_size()
    needed = len(index) * size + sum(column.numel() * column.element_size() for column in columns.values())
    free = disk_usage(target.absolute().parent).free
    if free < needed:  # told now, because the library does not survive a full disk
        raise DataError(f"{target} takes {needed / 1e6:,.1f} MB, but there are {free / 1e6:,.1f} MB free: make room")

    with whole_file(target) as temporary, h5py.File(temporary, "w") as file:
        shape = (*samples.shape[2:], samples.shape[1]) if images else tuple(samples.shape[1:])
        block = file.create_dataset("image" if images else "points", (len(index), *shape), samples[:0].numpy().dtype)
        rows = max(1, _BLOCK // size)
        for start in range(0, len(index), rows):
            part = samples[index[start : start + rows]]
            block[start : start + rows] = (part.permute(0, 2, 3, 1) if images else part).numpy()
        for name, column in columns.items():
            file[name] = column.numpy()
        for name, values in texts.items():
            if len(values):
                file[name] = np.array([value.encode("utf-8", "replace").decode() for value in values], dtype=h5py.string_dtype())
    return len(index)
