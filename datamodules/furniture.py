"""Real furniture shapes that ship with litzoo."""

from pathlib import Path

from ..zoo.functional.points import Normalization
from .augment.points import PointAugmentation
from .hdf5_points import HDF5PointsDataModule

FURNITURE = Path(__file__).parent / "bundled" / "furniture.h5"


class FurnitureDataModule(HDF5PointsDataModule):
    """261 furniture objects in 11 unbalanced classes (10 to 51 objects), 2,048 surface points each, +y up.

    Sampled from the models of the Debian package `sweethome3d-furniture` 1.8, which are CC-BY-3.0 or CC0;
    `datamodules/bundled/furniture_LICENSE.txt` and the `creator` of each object in the file name the authors. Seeded
    stratified split of 194 training, 28 validation and 39 test objects.

    Args:
        num_points: points of a training cloud, a new random subset each epoch; None takes all.
        eval_points: points of an evaluation cloud, a random subset that stays the same; None takes all.
        normalization: "unit_sphere", "unit_box" or "none"; applied before any augmentation.
        augmentation: what to do to training clouds.
        val_fraction: share of validation clouds, where `split_seed` draws a new split.
        test_fraction: share of test clouds, where `split_seed` draws a new split.
        split_seed: draw a new stratified split with this seed; None keeps the file's.
        balanced: whether every class comes equally often in a training epoch.
        batch_size: training samples in a batch of one process.
        eval_batch_size: samples in an evaluation batch; None means twice `batch_size`.
        num_workers: loader processes; 0 is the fastest for data in memory.
        seed: seed of order and augmentation; None takes that of `seed_everything`, or 0.

    Example:
        >>> FurnitureDataModule().class_names[:3]
        ['armchair', 'bed', 'cabinet']
    """

    def __init__(
        self,
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
    ) -> None:
        super().__init__(
            FURNITURE,
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
