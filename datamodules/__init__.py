"""Data sets as LightningDataModules that all keep the same contract: see `ArrayDataModule`."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if __name__ != "litzoo.datamodules":
    raise ImportError("import it as litzoo.datamodules: a bare `datamodules` would be a second copy of the package")

DATAMODULES = {
    "CIFAR10DataModule": "cifar",
    "CIFAR100DataModule": "cifar",
    "DigitsDataModule": "digits",
    "FurnitureDataModule": "furniture",
    "HDF5ImagesDataModule": "hdf5_images",
    "HDF5PointsDataModule": "hdf5_points",
    "ImageFolderDataModule": "image_folder",
    "MeshFolderDataModule": "mesh_folder",
    "PatientsDataModule": "patients",
    "STL10DataModule": "stl10",
    "ShapeNetPartDataModule": "shapenet_part",
}
_EXPORTS = {
    **DATAMODULES,
    "ArrayDataModule": "arrays",
    "Arrays": "arrays",
    "DataError": "errors",
    "ImageAugmentation": "augment.images",
    "ImageDataModule": "images",
    "PointAugmentation": "augment.points",
    "PointsDataModule": "points",
}
__all__ = list(_EXPORTS)

if TYPE_CHECKING:
    from .arrays import ArrayDataModule as ArrayDataModule
    from .arrays import Arrays as Arrays
    from .augment.images import ImageAugmentation as ImageAugmentation
    from .augment.points import PointAugmentation as PointAugmentation
    from .cifar import CIFAR10DataModule as CIFAR10DataModule
    from .cifar import CIFAR100DataModule as CIFAR100DataModule
    from .digits import DigitsDataModule as DigitsDataModule
    from .errors import DataError as DataError
    from .furniture import FurnitureDataModule as FurnitureDataModule
    from .hdf5_images import HDF5ImagesDataModule as HDF5ImagesDataModule
    from .hdf5_points import HDF5PointsDataModule as HDF5PointsDataModule
    from .image_folder import ImageFolderDataModule as ImageFolderDataModule
    from .images import ImageDataModule as ImageDataModule
    from .mesh_folder import MeshFolderDataModule as MeshFolderDataModule
    from .patients import PatientsDataModule as PatientsDataModule
    from .points import PointsDataModule as PointsDataModule
    from .shapenet_part import ShapeNetPartDataModule as ShapeNetPartDataModule
    from .stl10 import STL10DataModule as STL10DataModule


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
