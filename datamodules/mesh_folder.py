"""A user's own folders of meshes and point clouds, sampled once."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..zoo.functional.points import Normalization
from .arrays import Arrays
from .augment.points import PointAugmentation
from .folders import ClassFolders, Kind, printable
from .hdf5_reading import open_hdf5, resolve_path
from .meshes import SHAPE_SUFFIXES, UpAxis, read_clouds, turn_up
from .packing import map_array, pack_once
from .points import PointsDataModule
from .splits import VAL, hold_out

_KIND = Kind(SHAPE_SUFFIXES, "shape", "shapes", "litzoo mesh folder")
# Packed files of another version are made anew.
_SOURCE = f"{_KIND.source}, version 2"
# Shapes that are written at a time.
_BLOCK = 256


class MeshFolderDataModule(PointsDataModule):
    """A user's own folders of meshes and point clouds: `path/<class>/**/*.obj`, or `path/{train,val,test}/<class>/**/*.obj`.

    ModelNet's layout, `path/<class>/{train,test}/*.off`, is known as well. Meshes are sampled uniformly by area, once, on all cores, and
    packed into one file that is memory-mapped from then on: a later start opens no mesh. Of a point cloud with more points a random
    subset is kept, one with fewer repeats them in turn, which normalisation and random subsets do not see. If a file is added, removed
    or changed, all are packed anew. Hidden files are ignored. A folder `valid` or `validation` is `val`; without `val`, validation
    shapes are held out from `train`; without `test`, there is no test split. A single folder `train` counts as no split. Files: see
    `read_cloud`.

    Args:
        path: the folder; `~` and environment variables are resolved.
        sampled_points: points that are packed of each shape; training takes a new subset of them each epoch.
        up_axis: the axis of the files that points up; "z" is turned to y, as the models and augmentations here have it.
        pack: file to pack into, or an existing folder for it; None puts it beside `path`, or into `~/.cache/litzoo` where that is not
            allowed. The name that it gets says `sampled_points` and `up_axis`.
        skip_corrupt: leave out files that cannot be read, with a warning that names them; False refuses to start.
        num_points: points of a training cloud, a new random subset each epoch; None takes all.
        eval_points: points of an evaluation cloud, a random subset that stays the same; None takes all.
        normalization: "unit_sphere", "unit_box" or "none"; applied before any augmentation.
        augmentation: what to do to training clouds.
        val_fraction: share of each class's shapes, or training shapes, held out for validation, where there is no folder for it.
        test_fraction: share of each class's shapes held out for the test, where there are no folders for splits.
        split_seed: draw a new stratified split of these fractions with this seed, also where there are folders for splits.
        balanced: whether every class comes equally often in a training epoch.
        batch_size: training samples in a batch of one process.
        eval_batch_size: samples in an evaluation batch; None means twice `batch_size`.
        num_workers: loader processes; 0 is the fastest for packed data.
        seed: seed of order and augmentation; None takes that of `seed_everything`, or 0.

    Raises:
        DataError: if the folder is missing, has another layout, holds no file that can be read, or needs a library that is not installed.
        ValueError: if a setting is out of range.

    Example:
        >>> data = MeshFolderDataModule("~/ModelNet10", up_axis="z")
        >>> data.class_names[:2], data.files[0]
        (['bathtub', 'bed'], 'bathtub/test/bathtub_0107.off')
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        sampled_points: int = 2048,
        up_axis: UpAxis = "y",
        pack: str | os.PathLike[str] | None = None,
        skip_corrupt: bool = True,
        num_points: int | None = 1024,
        eval_points: int | None = None,
        normalization: Normalization = "unit_sphere",
        augmentation: PointAugmentation = PointAugmentation(),  # noqa: B008  # frozen
        val_fraction: float = 0.1,
        test_fraction: float = 0.15,
        split_seed: int | None = None,
        balanced: bool = False,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int | None = None,
    ) -> None:
        super().__init__(
            num_points=num_points,
            eval_points=eval_points,
            normalization=normalization,
            augmentation=augmentation,
            val_fraction=val_fraction,
            test_fraction=test_fraction,
            split_seed=split_seed,
            balanced=balanced,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            seed=seed,
        )
        if sampled_points < 1:
            raise ValueError(f"sampled_points must be at least 1, got {sampled_points}")
        if up_axis not in ("y", "z"):
            raise ValueError(f"up_axis must be y or z, got {up_axis!r}")
        self.path = Path(os.path.abspath(resolve_path(path)))
        self.sampled_points = sampled_points
        self.up_axis: UpAxis = up_axis
        self.pack = None if pack is None else Path(os.path.abspath(resolve_path(pack)))
        self.skip_corrupt = skip_corrupt
        self._files: list[str] = []

    @property
    def files(self) -> list[str]:
        """Name of each sample's file, relative to `path`; a batch's `index` points into it."""
        _ = self.arrays  # read now, if not before
        return self._files

    def finish_split(self, label: Tensor, split: Tensor | None) -> Tensor:
        if split is not None and self.split_seed is None and not (split == VAL).any():
            split = hold_out(split, label, self.val_fraction)
        return super().finish_split(label, split)

    def _writer(self, folders: ClassFolders) -> Callable[[Any], None]:
        """What fills the packed file: besides what every folder has, how many points each cloud has of its own."""
        count: list[int] = []

        def samples(paths: list[Path]) -> Iterator[np.ndarray | str]:
            for cloud in read_clouds(paths, self.sampled_points):
                # One that cannot be read is full of zeros.
                count.append(self.sampled_points if isinstance(cloud, str) else len(cloud))
                if isinstance(cloud, str):
                    yield cloud
                else:
                    yield turn_up(cloud, self.up_axis)[np.arange(self.sampled_points) % len(cloud)]

        write_folders = folders.writer("points", (self.sampled_points, 3), "float32", _BLOCK, samples, self.skip_corrupt)

        def write(file: Any) -> None:
            write_folders(file)
            file["count"] = np.array(count, np.int64)

        return write

    def read(self) -> Arrays:
        folders = ClassFolders(self.path, _KIND, inner_splits=True)
        source = f"{_SOURCE}: {self.sampled_points} {self.up_axis} {folders.fingerprint}"
        packed = folders.place(f"{self.path.name}.{self.sampled_points}.{self.up_axis}_up.h5", source, self.pack)
        pack_once(packed, source, self._writer(folders), "--data.pack")
        corrupt = folders.corrupt(packed, self.skip_corrupt)
        with open_hdf5(packed, "shapes", "count") as reader:
            count = reader.numbers("count")
        self._files = folders.names
        return Arrays(
            map_array(packed, "points"),
            folders.label,
            folders.finish_split(corrupt, self.finish_split),
            tuple(map(printable, folders.class_names)),
            mapped=packed,
            count=None if (count == self.sampled_points).all() else count,
        )
