"""Data sets as LightningDataModules that all keep the same contract: see `ArrayDataModule`."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if __name__ != "litzoo.datamodules":
    raise ImportError("import it as litzoo.datamodules: a bare `datamodules` would be a second copy of the package")

DATAMODULES = {
    "FurnitureDataModule": "furniture",
    "HDF5PointsDataModule": "hdf5_points",
    "PatientsDataModule": "patients",
}
_EXPORTS = {
    **DATAMODULES,
    "ArrayDataModule": "arrays",
    "Arrays": "arrays",
    "DataError": "arrays",
    "PointAugmentation": "augment.points",
}
__all__ = list(_EXPORTS)

if TYPE_CHECKING:
    from .arrays import ArrayDataModule as ArrayDataModule
    from .arrays import Arrays as Arrays
    from .arrays import DataError as DataError
    from .augment.points import PointAugmentation as PointAugmentation
    from .furniture import FurnitureDataModule as FurnitureDataModule
    from .hdf5_points import HDF5PointsDataModule as HDF5PointsDataModule
    from .patients import PatientsDataModule as PatientsDataModule


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
