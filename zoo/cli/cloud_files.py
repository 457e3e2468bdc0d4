"""What `litzoo show critical` and `litzoo show parts` share: the options about clouds, and reading those that are to be drawn."""

import itertools
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ...datamodules.meshes import SHAPE_SUFFIXES, read_cloud, turn_up, why_unreadable
from . import CommandError, check_folder

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

HDF5 = (".h5", ".hdf5")
_FILES = f"{', '.join(SHAPE_SUFFIXES)} or HDF5 files with `points`"
# Clouds of a file that holds many, where --index does not choose.
_CLOUDS = 5


class StoredCloud(NamedTuple):
    """A cloud of a file.

    Attributes:
        name: of the file, with the cloud's number where the file holds many; no two clouds have the same.
        points: `(N, 3)` float32, +y up.
        class_name: if the file tells it.
    """

    name: str
    points: np.ndarray
    class_name: str | None


def add_cloud_options(parser: "ArgumentParser") -> None:
    """Add the files, the model, and how clouds are read.

    Args:
        parser: gets the options.

    Example:
        >>> add_cloud_options(ArgumentParser(prog="litzoo show critical"))
    """
    parser.add_argument("files", metavar="FILE", nargs="+", type=Path, help=_FILES)
    parser.add_argument("--model", type=str, required=True, help="a name of `litzoo list`, a .safetensors, a .ckpt or hf-hub:owner/repo")
    parser.add_argument("--output", type=Path, default=Path("."), help="folder of what is written")
    parser.add_argument("--index", type=int, nargs="+", help="which clouds of files that hold many; by default 5, of different classes")
    parser.add_argument("--points", type=int, default=2048, help="points of a mesh, and the most of a cloud; others are left out at random")
    parser.add_argument("--up_axis", default="y", choices=["y", "z"], help="the axis of the files that points up")


def check_cloud_options(options: Any) -> None:
    """Refuse what can be refused before a model is loaded.

    Args:
        options: those of `add_cloud_options`.

    Raises:
        CommandError: if a file is missing or of no kind that is read, there are to be no points, or nothing may be written.
    """
    if options.points < 1:
        raise CommandError(f"--points must be at least 1, got {options.points}")
    for path in options.files:
        if not path.is_file():
            raise CommandError(f"there is no file {path}")
        if path.suffix.lower() not in (*SHAPE_SUFFIXES, *HDF5):
            raise CommandError(f"{path}: clouds are read from {_FILES}")
    check_folder(options.output, options.output)


def read_cloud_files(options: Any, classes: Collection[str] = ()) -> list[StoredCloud]:
    """The clouds that are to be drawn.

    Args:
        options: those of `add_cloud_options`.
        classes: names, compared without case; of files that tell classes, clouds of these are drawn, if there are any, where nobody says
            which ones.

    Returns:
        The clouds, in the order of the files.

    Raises:
        CommandError: if a file cannot be read, or holds no such cloud.
    """
    wanted = {name.casefold() for name in classes}
    return _unique([cloud for path in options.files for cloud in _read(path, options, wanted)])


def stored_classes(path: Path) -> list[str | None]:
    """The name of each cloud's class in an HDF5 file.

    Args:
        path: the file.

    Returns:
        A name for each label, None for those that have none; empty if the file tells no classes, or is no HDF5 file.

    Raises:
        DataError: if it cannot be read, or its `label` or `class_names` are of another form.
    """
    if path.suffix.lower() not in HDF5:
        return []
    from ...datamodules.hdf5_reading import open_hdf5

    with open_hdf5(path, "clouds") as reader:
        if "label" not in reader or "class_names" not in reader:
            return []
        names = reader.texts("class_names")
        return [names[label] if 0 <= label < len(names) else None for label in reader.whole_numbers("label").long().flatten().tolist()]


def _read(path: Path, options: Any, wanted: set[str]) -> list[StoredCloud]:
    """The clouds of a file."""
    from ...datamodules.errors import DataError

    try:
        if path.suffix.lower() in HDF5:
            clouds = _from_hdf5(path, options.index, wanted)
        elif path.suffix.lower() == ".npy" and np.load(path, mmap_mode="r", allow_pickle=False).ndim == 3:
            array = np.load(path, allow_pickle=False)
            places = _places(path, options.index, len(array), None)
            clouds = [StoredCloud(f"{path.stem}_{place}", array[place], None) for place in places]
        else:
            if options.index is not None:
                raise CommandError(f"--index chooses among the clouds of a file, and {path} holds one")
            clouds = [StoredCloud(path.stem, read_cloud(path, options.points), None)]
    except (CommandError, DataError):
        raise
    except Exception as error:  # the libraries have no common class for what is wrong with a file
        raise CommandError(f"{path} cannot be read: {why_unreadable(error)}") from error
    for name, cloud, _ in clouds:
        if cloud.ndim != 2 or cloud.shape[1] != 3 or len(cloud) == 0 or cloud.dtype.kind not in "fiu":
            raise CommandError(f"{path}: a cloud has shape (points, 3), {name} is {cloud.dtype} {cloud.shape}")
        if not np.isfinite(cloud).all():
            raise CommandError(f"{path} holds NaN or infinite coordinates: remove them")
    return [each._replace(points=_prepare(each.points, options)) for each in clouds]


def _prepare(cloud: np.ndarray, options: Any) -> np.ndarray:
    return np.ascontiguousarray(turn_up(_thin(cloud.astype(np.float32), options.points), options.up_axis))


def _from_hdf5(path: Path, index: list[int] | None, wanted: set[str]) -> list[StoredCloud]:
    import h5py

    names = stored_classes(path)
    with h5py.File(path, "r") as file:
        if "points" not in file:
            raise CommandError(f"{path} has no data set `points`; it holds: {', '.join(file) or 'nothing'}")
        points, label = file["points"], file["label"][:] if "label" in file else None
        # A picture of what the model has learned by heart says little.
        test = file["split"][:] == 2 if "split" in file else None
        if points.ndim != 3:
            raise CommandError(f"{path}: `points` must have shape (clouds, points, 3), it has {points.shape}")
        if label is not None:
            of_wanted = np.array([name is not None and name.casefold() in wanted for name in names], dtype=bool)
            for preferred in (of_wanted, test):
                if preferred is not None and preferred.any() and (preferred & (label >= 0)).any():
                    label = np.where(preferred, label, -1)
        # Behind a cloud's own points they come again, which would shift its mean.
        told = "count" in file and file["count"].shape == (len(points),)
        count = file["count"][:] if told else np.full(len(points), points.shape[1])
        places = _places(path, index, len(points), label)
        return [
            StoredCloud(f"{path.stem}_{place}", points[place, : count[place]], names[place] if place < len(names) else None)
            for place in places
        ]


def _places(path: Path, index: list[int] | None, number: int, label: np.ndarray | None) -> list[int]:
    """Which clouds of a file are drawn: those that are asked for, else the first of each of the first classes, else the first ones."""
    if index is not None:
        wrong = [place for place in index if not 0 <= place < number]
        if wrong:
            raise CommandError(f"--index {wrong[0]}: {path} holds clouds 0 to {number - 1}")
        return index
    if number == 0:
        raise CommandError(f"{path} holds no clouds")
    if label is None or (label < 0).all():
        return list(range(min(number, _CLOUDS)))
    classes, first = np.unique(label, return_index=True)
    if (classes >= 0).sum() == 1:
        return np.flatnonzero(label >= 0)[:_CLOUDS].tolist()
    return first[classes >= 0][:_CLOUDS].tolist()


def _thin(cloud: np.ndarray, points: int) -> np.ndarray:
    """At most that many points, in their order; which ones is the same every time."""
    if len(cloud) <= points:
        return cloud
    return cloud[np.sort(np.random.default_rng(0).permutation(len(cloud))[:points])]


def _unique(clouds: list[StoredCloud]) -> list[StoredCloud]:
    """Names are those of the files to write, so files of the same name in several folders get a number."""
    named: dict[str, StoredCloud] = {}
    for cloud in clouds:
        free = (cloud.name if number == 1 else f"{cloud.name}-{number}" for number in itertools.count(1))
        name = next(each for each in free if each not in named)
        named[name] = cloud._replace(name=name)
    return list(named.values())
