"""Point clouds from one HDF5 file."""

import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from ..zoo.functional.points import Normalization
from .arrays import Arrays
from .augment.points import PointAugmentation
from .errors import DataError
from .hdf5_packing import pack_arrays
from .hdf5_reading import HDF5Reader, open_hdf5, resolve_path
from .packing import map_array
from .points import PointsDataModule


class HDF5PointsDataModule(PointsDataModule):
    """Point clouds of any HDF5 file with `points` and `label`.

    The file holds `points` `(M, N, 3)` float, `label` `(M,)` int, and optionally `split` `(M,)` (0 = train,
    1 = validation, 2 = test), `class_names` `(C,)` text, `part` `(M, N)` int, `part_names`, and `count` `(M,)`, where clouds have fewer
    points than N: those behind them are never seen. Without `split`, a stratified one is drawn. Up to 64 MB are read into memory. More are
    memory-mapped where they are contiguous, uncompressed and without `count`; others are packed once, some at a time, into a file that is
    memory-mapped, and anew if the given file changes.

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
        pack: file to pack into, or an existing folder for it; None puts it beside `path`, or into `~/.cache/litzoo` where that is not
            allowed.

    Raises:
        DataError: if the file is missing, truncated or of another layout, or cannot be packed.

    Example:
        >>> data = HDF5PointsDataModule("shapes.h5", num_points=512)
        >>> data.num_classes, data.class_names[:2]
        (69, ['AircraftBuoyant', 'Apartment'])
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
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
        pack: str | os.PathLike[str] | None = None,
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
        self.path = resolve_path(path)
        self.pack = None if pack is None else Path(os.path.abspath(resolve_path(pack)))

    def read(self) -> Arrays:
        with open_hdf5(self.path, "clouds", "points", "label") as file:
            names = ("points", "part") if "part" in file else ("points",)
            label = file.whole_numbers("label").long()
            split = file.whole_numbers("split") if "split" in file else None
            classes = file.texts("class_names") if "class_names" in file else None
            part_names = file.texts("part_names") if "part_names" in file else ()
            count = file.whole_numbers("count").long() if "count" in file else None
            self._check(file, label, split, count)
            file.check_labels(label, split, classes)
            blocks = self._blocks(file, names, count, part_names)
            mapped: Path | None = None
            if file.small(*names):
                stored = [torch.cat(parts) for parts in zip(*(values for _, values in blocks), strict=True)]
            else:
                if count is None and file.can_map(*names):
                    mapped = self.path.absolute()
                    for _ in blocks:  # looks for what is wrong
                        pass
                else:
                    mapped = pack_arrays(file, names, blocks, "clouds", self.pack)
                stored = [map_array(mapped, name) for name in names]
        classes = classes if classes is not None else tuple(str(cls) for cls in range(int(label.max()) + 1))
        part = stored[1] if len(stored) > 1 else None
        return Arrays(stored[0], label, self.finish_split(label, split), classes, part, part_names, mapped, count)

    def _check(self, file: HDF5Reader, label: Tensor, split: Tensor | None, count: Tensor | None) -> None:
        kind, shape = file.kind("points"), tuple(file.file["points"].shape)
        if len(shape) != 3 or shape[-1] != 3 or kind.kind != "f" or 0 in shape:
            raise DataError(f"{self.path}: points must be floats of shape (M, N, 3), they are {kind} {shape}")
        shapes = {name: tuple(array.shape) for name, array in (("label", label), ("split", split), ("count", count)) if array is not None}
        if "part" in file:
            file.kind("part")  # refuses what is no array of numbers
            shapes["part"] = tuple(file.file["part"].shape)
        for name, found in shapes.items():
            expected = shape[:2] if name == "part" else shape[:1]
            if found != expected:
                raise DataError(f"{self.path}: {name} must have shape {expected} like the points, it has {found}")
        if count is not None and not bool(((count >= 1) & (count <= shape[1])).all()):
            raise DataError(
                f"{self.path}: count must say how many of its {shape[1]} points each cloud has, it runs from {count.min()} to {count.max()}: "
                "correct or remove it"
            )

    def _blocks(
        self, file: HDF5Reader, names: tuple[str, ...], count: Tensor | None, part_names: tuple[str, ...]
    ) -> Iterator[tuple[slice, tuple[Tensor, ...]]]:
        """Points and parts, some clouds at a time; whatever stands behind a cloud's points, they come again there.

        Raises:
            DataError: at the end, if coordinates are not finite; at once, if a part is none.
        """
        bad: list[int] = []
        place = torch.arange(file.file["points"].shape[1])
        for rows, values in file.blocks(*names):
            for part in values[1:]:
                file.check_whole("part", part)
                if part_names and part.max() >= len(part_names):
                    raise DataError(f"{self.path}: parts run up to {part.max()}, but there are {len(part_names)} part names")
            if count is not None:
                own = place % count[rows, None]
                values = tuple(value[torch.arange(len(value))[:, None], own] for value in values)
            bad += (rows.start + (~torch.isfinite(values[0]).flatten(1).all(1)).nonzero().squeeze(1)).tolist()
            yield rows, values
        if bad:
            raise DataError(f"{self.path}: {len(bad)} clouds hold NaN or infinite coordinates, the first at position {bad[0]}: remove them")
