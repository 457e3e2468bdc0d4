"""Point clouds from one HDF5 file."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..zoo.batch import Batch
from ..zoo.functional.points import Normalization, normalize_points
from ..zoo.functional.random import fold_in
from .arrays import TEST, TRAIN, VAL, ArrayDataModule, Arrays, DataError
from .augment.points import PointAugmentation, subsample

# Numbers that keep the streams of one seed apart.
_SPLIT, _EVALUATION = 3, 4


def stratified_split(label: Tensor, val_fraction: float, test_fraction: float, seed: int = 0) -> Tensor:
    """Assign each sample to a split, at random within each class.

    Of the n samples of a class, round(n * fraction) go to validation and to test; a class of at least three samples
    keeps at least one for training.

    Args:
        label: `(M,)` int64.
        val_fraction: share of validation samples, in [0, 1).
        test_fraction: share of test samples, in [0, 1).
        seed: seed of the assignment.

    Returns:
        `(M,)` uint8: 0 = train, 1 = validation, 2 = test.

    Raises:
        ValueError: if the fractions leave nothing for training.

    Example:
        >>> stratified_split(torch.zeros(10, dtype=torch.long), 0.2, 0.1).bincount()
        tensor([7, 2, 1])
    """
    if min(val_fraction, test_fraction) < 0 or val_fraction + test_fraction >= 1:
        raise ValueError(
            f"val_fraction and test_fraction must be at least 0 and sum to less than 1, got {val_fraction} and {test_fraction}"
        )
    split = torch.zeros(len(label), dtype=torch.uint8)
    position = fold_in(seed, _SPLIT, torch.arange(len(label)))
    for cls in label.unique().tolist():
        members = (label == cls).nonzero().squeeze(1)
        members = members[position[members].argsort(stable=True)]
        test = round(len(members) * test_fraction)
        val = min(round(len(members) * val_fraction), max(len(members) - test - 1, 0))
        split[members[:test]] = TEST
        split[members[test : test + val]] = VAL
    return split


class HDF5PointsDataModule(ArrayDataModule):
    """Point clouds of any HDF5 file with `points` and `label`.

    The file holds `points` `(M, N, 3)` float, `label` `(M,)` int, and optionally `split` `(M,)` (0 = train,
    1 = validation, 2 = test), `class_names` `(C,)` text, `part` `(M, N)` int and `part_names`. It is read into memory.
    Without `split`, a stratified one is drawn.

    Args:
        path: the file; `~` and environment variables are resolved.
        num_points: points of a training cloud, a new random subset each epoch; None takes all.
        eval_points: points of an evaluation cloud, a random subset that stays the same; None takes all.
        normalization: "unit_sphere", "unit_box" or "none"; applied before any augmentation.
        augmentation: what to do to training clouds.
        val_fraction: share of validation clouds where the file has no `split`.
        test_fraction: share of test clouds where the file has no `split`.
        split_seed: draw a new stratified split of the same fractions with this seed, also where the file has one.
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
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int | None = None,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, num_workers, seed)
        for name, number in (("num_points", num_points), ("eval_points", eval_points)):
            if number is not None and number < 1:
                raise ValueError(f"{name} must be at least 1, or null for all points; got {number}")
        self.path = Path(os.path.expandvars(path)).expanduser()
        self.num_points = num_points
        self.eval_points = eval_points
        self.normalization = normalization
        self.augmentation = augmentation
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction
        self.split_seed = split_seed

    def read(self) -> Arrays:
        import h5py

        if not self.path.is_file():
            raise DataError(f"there is no file {self.path}: give the HDF5 file of the clouds with --data.path")
        try:
            with h5py.File(self.path, "r") as file:
                missing = [name for name in ("points", "label") if name not in file]
                if missing:
                    raise DataError(f"{self.path} has no data set {' and '.join(missing)}; it holds: {', '.join(file) or 'nothing'}")
                points, label = self._numbers(file, "points"), self._whole(file, "label").long()
                split = self._whole(file, "split") if "split" in file else None
                names = self._texts(file, "class_names") if "class_names" in file else None
                part = self._whole(file, "part") if "part" in file else None
                part_names = self._texts(file, "part_names") if "part_names" in file else ()
        except OSError as error:
            raise DataError(
                f"{self.path} cannot be read as HDF5, it may be truncated or of another format ({error}): fetch it anew"
            ) from error
        self._check(points, label, split, names, part)
        if split is None or self.split_seed is not None:
            split = stratified_split(label, self.val_fraction, self.test_fraction, self.split_seed or 0)
        names = names if names is not None else tuple(str(cls) for cls in range(int(label.max()) + 1))
        return Arrays(points, label, split.to(torch.uint8), names, part, part_names)

    def _numbers(self, file: Any, name: str) -> Tensor:
        kind = getattr(file[name], "dtype", None)
        if kind is None or kind.kind not in "biuf" or kind.itemsize > 8:
            raise DataError(f"{self.path}: {name} must be an array of numbers, it is {'a group' if kind is None else f'of type {kind}'}")
        # Torch cannot index with the wider unsigned types.
        native = "i8" if kind.kind == "u" and kind.itemsize > 1 else kind.newbyteorder("=")
        return torch.from_numpy(file[name][...].astype(native, copy=False))

    def _whole(self, file: Any, name: str) -> Tensor:
        values = self._numbers(file, name)
        if values.is_floating_point() and not torch.equal(values, values.long().to(values.dtype)):
            raise DataError(f"{self.path}: {name} must hold whole numbers, it holds fractions or NaN")
        return values

    def _texts(self, file: Any, name: str) -> tuple[str, ...]:
        import h5py

        if not isinstance(file[name], h5py.Dataset) or h5py.check_string_dtype(file[name].dtype) is None or file[name].ndim != 1:
            raise DataError(f"{self.path}: {name} must be a list of texts")
        return tuple(file[name].asstr()[:])

    def _check(self, points: Tensor, label: Tensor, split: Tensor | None, names: tuple[str, ...] | None, part: Tensor | None) -> None:
        if points.dim() != 3 or points.shape[-1] != 3 or not points.is_floating_point() or 0 in points.shape:
            raise DataError(f"{self.path}: points must be floats of shape (M, N, 3), they are {points.dtype} {tuple(points.shape)}")
        for name, array, shape in (
            ("label", label, points.shape[:1]),
            ("split", split, points.shape[:1]),
            ("part", part, points.shape[:2]),
        ):
            if array is not None and array.shape != shape:
                raise DataError(f"{self.path}: {name} must have shape {tuple(shape)} like the points, it has {tuple(array.shape)}")
        bad = (~torch.isfinite(points).all(-1).all(-1)).nonzero().squeeze(1).tolist()
        if bad:
            raise DataError(f"{self.path}: {len(bad)} clouds hold NaN or infinite coordinates, the first at position {bad[0]}: remove them")
        if label.min() < 0 or (names is not None and label.max() >= len(names)):
            raise DataError(f"{self.path}: labels run from {label.min()} to {label.max()}, but there are {len(names or ())} class names")
        foreign = [] if split is None else sorted(set(split.tolist()) - {TRAIN, VAL, TEST})
        if foreign:
            raise DataError(f"{self.path}: split must be 0 (train), 1 (validation) or 2 (test), it holds {foreign[0]}")

    def prepare(self, batch: Batch) -> Batch:
        points, part = normalize_points(batch.input.float(), self.normalization), batch.part
        if batch.key is None and self.eval_points is not None:
            points, part = subsample(points, fold_in(_EVALUATION, batch.index), self.eval_points, part)
        return batch._replace(input=points, part=part)

    def augment(self, batch: Batch) -> Batch:
        assert batch.key is not None
        points, part = self.augmentation(batch.input, batch.key, self.num_points, batch.part)
        return batch._replace(input=points, part=part)
