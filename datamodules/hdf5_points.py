"""Point clouds from one HDF5 file."""

import os

import torch
from torch import Tensor

from ..zoo.functional.points import Normalization
from .arrays import Arrays
from .augment.points import PointAugmentation
from .errors import DataError
from .hdf5_reading import open_hdf5, resolve_path
from .points import PointsDataModule


class HDF5PointsDataModule(PointsDataModule):
    """Point clouds of any HDF5 file with `points` and `label`.

    The file holds `points` `(M, N, 3)` float, `label` `(M,)` int, and optionally `split` `(M,)` (0 = train,
    1 = validation, 2 = test), `class_names` `(C,)` text, `part` `(M, N)` int, `part_names`, and `count` `(M,)`, where clouds have fewer
    points than N: those behind them are never seen. It is read into memory. Without `split`, a stratified one is drawn.

    Args:
        path: the file; `~` and environment variables are resolved.
        num_points: points of a training cloud, a new random subset each epoch; None takes all.
        eval_points: points of an evaluation cloud, a random subset that stays the same; None takes all.
        normalization: "unit_sphere", "unit_box" or "none"; applied before any augmentation.
        augmentation: what to do to training clouds.
        val_fraction: share of validation clouds where the file has no `split`.
        test_fraction: share of test clouds where the file has no `split`.
        split_seed: draw a new stratified split of the same fractions with this seed, also where the file has one.
        balanced: whether every class comes equally often in a training epoch.
        batch_size: training samples in a batch of one process.
        eval_batch_size: samples in an evaluation batch; None means twice `batch_size`.
        num_workers: loader processes; 0 is the fastest for data in memory.
        seed: seed of order and augmentation; None takes that of `seed_everything`, or 0.

    Raises:
        DataError: if the file is missing, truncated or of another layout.

    Example:
        >>> data = HDF5PointsDataModule("shapes.h5", num_points=512)
        >>> data.num_classes, data.class_names[:2]
        (69, ['AircraftBuoyant', 'Apartment'])
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
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
            num_points,
            eval_points,
            normalization,
            augmentation,
            val_fraction,
            test_fraction,
            split_seed,
            balanced,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            seed=seed,
        )
        self.path = resolve_path(path)

    def read(self) -> Arrays:
        with open_hdf5(self.path, "clouds", "points", "label") as file:
            points, label = file.numbers("points"), file.whole_numbers("label").long()
            split = file.whole_numbers("split") if "split" in file else None
            names = file.texts("class_names") if "class_names" in file else None
            part = file.whole_numbers("part") if "part" in file else None
            part_names = file.texts("part_names") if "part_names" in file else ()
            count = file.whole_numbers("count").long() if "count" in file else None
            self._check(points, label, split, part, count)
            if part is not None and part_names and part.max() >= len(part_names):
                raise DataError(f"{self.path}: parts run up to {part.max()}, but there are {len(part_names)} part names")
            file.check_labels(label, split, names)
        names = names if names is not None else tuple(str(cls) for cls in range(int(label.max()) + 1))
        if count is not None:  # whatever stands behind a cloud's points, they come again there
            cloud, place = torch.arange(len(points))[:, None], torch.arange(points.shape[1]) % count[:, None]
            points, part = points[cloud, place], None if part is None else part[cloud, place]
        return Arrays(points, label, self.finish_split(label, split), names, part, part_names, count=count)

    def _check(self, points: Tensor, label: Tensor, split: Tensor | None, part: Tensor | None, count: Tensor | None) -> None:
        if points.dim() != 3 or points.shape[-1] != 3 or not points.is_floating_point() or 0 in points.shape:
            raise DataError(f"{self.path}: points must be floats of shape (M, N, 3), they are {points.dtype} {tuple(points.shape)}")
        for name, array, shape in (
            ("label", label, points.shape[:1]),
            ("split", split, points.shape[:1]),
            ("part", part, points.shape[:2]),
            ("count", count, points.shape[:1]),
        ):
            if array is not None and array.shape != shape:
                raise DataError(f"{self.path}: {name} must have shape {tuple(shape)} like the points, it has {tuple(array.shape)}")
        if count is not None and not bool(((count >= 1) & (count <= points.shape[1])).all()):
            raise DataError(
                f"{self.path}: count must say how many of its {points.shape[1]} points each cloud has, it runs from {count.min()} to {count.max()}: "
                "correct or remove it"
            )
        own = torch.arange(points.shape[1]) < (points.shape[1] if count is None else count[:, None])
        bad = (~(torch.isfinite(points).all(-1) | ~own).all(-1)).nonzero().squeeze(1).tolist()
        if bad:
            raise DataError(f"{self.path}: {len(bad)} clouds hold NaN or infinite coordinates, the first at position {bad[0]}: remove them")
