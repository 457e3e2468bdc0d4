"""What `litzoo predict` and `litzoo select` read: pictures, meshes and point clouds in files and folders, in batches."""

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...datamodules.meshes import SHAPE_SUFFIXES, UpAxis, read_cloud, read_clouds, turn_up
from ...datamodules.pictures import PICTURE_SUFFIXES, decode_picture, why_undecodable
from . import CommandError

Kind = Literal["points", "images"]
ARRAYS = (".npy", ".h5", ".hdf5")
SHAPES = tuple(suffix for suffix in SHAPE_SUFFIXES if suffix not in ARRAYS)
READABLE = {"points": (*ARRAYS, *SHAPES), "images": (*PICTURE_SUFFIXES, *ARRAYS)}
NOUN = {"points": "point clouds", "images": "pictures"}
_CONTENT = {"points": "points", "images": "image"}
# Of a point: x, y, z, then perhaps a normal, then perhaps a label.
_COLUMNS = (3, 4, 6, 7)
FORMS = {
    "points": ".npy files of shape (points, 3) or (clouds, points, 3), also with normals or labels behind x, y, z, HDF5 files with `points`, "
    f"{', '.join(SHAPES)} files",
    "images": f"{', '.join(PICTURE_SUFFIXES)} files, .npy files of uint8 (height, width, channels) or (pictures, height, width, channels), "
    "HDF5 files with `image`",
}
# Points that a mesh is sampled at, and that are kept of a cloud.
POINTS = 2048
# Pixels of the pictures that are held at a time, whatever their number: photographs are large.
_PIXELS = 1 << 25
# Pixels of the shorter edge of a picture that is shown small, at least.
_THUMBNAIL = 256


class Samples(NamedTuple):
    """A batch of samples.

    Attributes:
        places: file and number in it of each sample.
        inputs: as the `predict` of a model takes them.
    """

    places: list[tuple[Path, int]]
    inputs: Tensor | list[Tensor]


# Finding


def check_sources(sources: list[Path]) -> None:
    """Refuse what can be refused before a model is loaded.

    Args:
        sources: files and folders.

    Raises:
        CommandError: if one is missing, or of no kind that is read.
    """
    for source in sources:
        if source.is_dir():
            continue
        if not source.exists():
            raise CommandError(f"there is no file or folder {source}")
        if source.suffix.lower() not in (*PICTURE_SUFFIXES, *SHAPES, *ARRAYS):
            raise CommandError(
                f"{source}: pictures are read from {', '.join(PICTURE_SUFFIXES)} files, meshes and clouds from {', '.join(SHAPES)} files, "
                f"arrays from {', '.join(ARRAYS)} files"
            )


def classified_kind(model: Any, source: str) -> Kind:
    """What a classifier classifies.

    Args:
        model: as it was loaded.
        source: what messages call it.

    Returns:
        "points" or "images".

    Raises:
        CommandError: if it is no classifier of either.
    """
    kind: Kind | None = getattr(model, "input_kind", None)
    if hasattr(model, "embed") and not hasattr(model, "predict"):
        raise CommandError(
            f"{source} is an encoder, {type(model).__name__}, and has no classes: give a classifier, or write its features with "
            f"`litzoo embed --model {shlex.quote(source)} --data ImageFolderDataModule --data.path DIR --output features.h5`"
        )
    if kind not in READABLE or not hasattr(model, "predict") or not hasattr(model, "class_names"):
        raise CommandError(f"{source} is a {type(model).__name__}, which classifies neither pictures nor point clouds")
    return kind


def find_files(sources: list[Path], kind: Kind, model: str) -> list[Path]:
    """The files to classify. A folder may hold both kinds, and what the model does not take is passed over; a named file is refused.

    Args:
        sources: files and folders.
        kind: what the model takes.
        model: what messages call it.

    Returns:
        The files, those of a folder in ascending order.

    Raises:
        CommandError: if a file is of the other kind, or a folder holds none.
    """
    files: list[Path] = []
    for source in sources:
        if not source.is_dir():
            held = _held(source)
            if held is not None and held != kind:
                raise CommandError(f"{source} holds {NOUN[held]}, but {model} classifies {NOUN[kind]}: {FORMS[kind]}")
            files.append(source)
            continue
        visible = (path for path in source.rglob("*") if not any(part.startswith(".") for part in path.relative_to(source).parts))
        candidates = sorted(path for path in visible if path.suffix.lower() in READABLE[kind] and path.is_file())
        found = [path for path in candidates if _held(path) in (kind, None)]
        if not found:
            raise CommandError(f"{source} holds no {', '.join(READABLE[kind])} file with {NOUN[kind]}, which {model} classifies")
        files += found
    return files


def _held(path: Path) -> Kind | None:
    """What a file holds, without reading it whole; None if it cannot be told, so that reading it says what is wrong."""
    if path.suffix.lower() in PICTURE_SUFFIXES:
        return "images"
    if path.suffix.lower() in SHAPES:
        return "points"
    try:
        if path.suffix.lower() == ".npy":
            array = np.load(path, mmap_mode="r", allow_pickle=False)
            if array.dtype == np.uint8 and array.ndim in (3, 4):
                return "images"
            return "points" if array.ndim in (2, 3) and array.shape[-1] in _COLUMNS else None
        import h5py

        with h5py.File(path, "r") as file:
            held: list[Kind] = [kind for kind in NOUN if _CONTENT[kind] in file]  # type: ignore[misc]  # keys of a dict of Kinds
            return held[0] if len(held) == 1 else None
    except (ValueError, OSError, EOFError):
        return None


# Reading


def count_samples(files: list[Path], kind: Kind) -> int:
    """How many samples there are; arrays that are broken are refused before any work is done.

    Args:
        files: of `find_files`.
        kind: what they hold.

    Returns:
        Their number, with those that will turn out to be unreadable.

    Raises:
        CommandError: if an array cannot be read, or is of another form.
    """
    number = 0
    for path in files:
        if path.suffix.lower() not in ARRAYS:
            number += 1
        elif kind == "points":
            number += len(_clouds(path))
        else:
            with _picture_array(path) as array:
                number += 1 if len(array.shape) == 3 else len(array)
    return number


def _unreadable(path: Path, error: Exception) -> CommandError:
    return CommandError(f"{path} cannot be read, it may be truncated or of another format ({error})")


def _content(path: Path, file: Any, name: str) -> Any:
    if name not in file:
        raise CommandError(f"{path} has no data set `{name}`; it holds: {', '.join(file) or 'nothing'}")
    return file[name]


def _clouds(path: Path) -> list[np.ndarray]:
    """The clouds of a file, each `(N, 3)` float32 without the copies that fill it up in a packed file."""
    count = None
    try:
        if path.suffix.lower() == ".npy":
            points = np.load(path, allow_pickle=False)
        else:
            import h5py

            with h5py.File(path, "r") as file:
                points = _content(path, file, "points")
                if not isinstance(points, h5py.Dataset):
                    raise CommandError(f"{path}: `points` must be an array, it is a group")
                if points.dtype.kind != "f":
                    raise CommandError(
                        f"{path}: `points` must be floats of shape (clouds, points, 3), they are {points.dtype} {points.shape}"
                    )
                points = points[()]
                if "count" in file:
                    count = np.asarray(file["count"])
    except (ValueError, OSError, EOFError) as error:
        raise _unreadable(path, error) from error
    clouds = points[None] if points.ndim == 2 else points
    if clouds.ndim != 3 or clouds.shape[-1] not in _COLUMNS or 0 in clouds.shape or clouds.dtype.kind not in "fiu":
        raise CommandError(
            f"{path}: a cloud has shape (points, 3), several have (clouds, points, 3), with 4, 6 or 7 columns if normals or labels follow; "
            f"this is {points.dtype} {points.shape}"
        )
    if count is None:
        count = np.full(len(clouds), clouds.shape[1])
    elif count.dtype.kind not in "iu" or count.shape != clouds.shape[:1] or count.min() < 1 or count.max() > clouds.shape[1]:
        raise CommandError(
            f"{path}: `count` must say how many of its {clouds.shape[1]} points each of the {len(clouds)} clouds has, it is {count.dtype} "
            f"{count.shape}: correct or remove it"
        )
    with np.errstate(over="ignore"):  # what overflows is infinite, and told as such
        own = [cloud[:number, :3].astype(np.float32) for cloud, number in zip(clouds, count, strict=True)]
    if not all(np.isfinite(cloud).all() for cloud in own):
        raise CommandError(f"{path} holds NaN or infinite coordinates: remove them")
    return own


def _stored_cloud(path: Path, number: int) -> np.ndarray:
    """One of the clouds that `_clouds` found good, without reading the others, of which there may be very many."""
    if path.suffix.lower() == ".npy":
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        return np.array((array if array.ndim == 2 else array[number])[:, :3], dtype=np.float32)
    import h5py

    with h5py.File(path, "r") as file:
        stored = file["points"]
        cloud = stored[()] if stored.ndim == 2 else stored[number]
        return np.array(cloud[: file["count"][number] if "count" in file else len(cloud), :3], dtype=np.float32)


def _check_pixels(path: Path, array: Any) -> None:
    shape: tuple[int, ...] = getattr(array, "shape", ())
    if getattr(array, "dtype", None) != np.uint8 or len(shape) not in (3, 4) or shape[-1] not in (1, 3) or 0 in shape:
        raise CommandError(
            f"{path}: pictures in an array are uint8 of shape (height, width, channels), several have (pictures, height, width, channels), "
            f"with 1 or 3 channels; this is {getattr(array, 'dtype', 'a group')} {shape}"
        )


@contextmanager
def _picture_array(path: Path) -> Iterator[Any]:
    """The pictures of a .npy or HDF5 file, still on the disk."""
    try:
        if path.suffix.lower() == ".npy":
            array = np.load(path, mmap_mode="r", allow_pickle=False)
            _check_pixels(path, array)
            yield array
        else:
            import h5py

            with h5py.File(path, "r") as file:
                images = _content(path, file, "image")
                _check_pixels(path, images)
                yield images
    except (ValueError, OSError, EOFError) as error:
        raise _unreadable(path, error) from error


def _slices(path: Path, batch_size: int) -> Iterator[Samples]:
    """The pictures of a .npy or HDF5 file, some at a time."""
    with _picture_array(path) as stored:
        array = stored[()][None] if len(stored.shape) == 3 else stored
        size = max(1, min(batch_size, _PIXELS // int(np.prod(array.shape[1:3]))))
        for start in range(0, len(array), size):
            part = torch.from_numpy(np.array(array[start : start + size])).permute(0, 3, 1, 2)
            yield Samples([(path, start + position) for position in range(len(part))], part)


def read_samples(
    files: list[Path],
    kind: Kind,
    batch_size: int,
    corrupt: dict[Path, str],
    points: int | None = None,
    up_axis: UpAxis | None = None,
) -> Iterator[Samples]:
    """The samples of files, in their order, some at a time.

    Args:
        files: of `find_files`.
        kind: what they hold.
        batch_size: how many at a time, at most; of large pictures fewer.
        corrupt: gets the files that cannot be read, with the reasons.
        points: points of a mesh, and the most that are kept of a file of points; None takes the default.
        up_axis: of shapes; None is y.

    Yields:
        Clouds of one size as `(B, N, 3)` float32, pictures of an array as `(B, C, H, W)` uint8, others as a list of `(3, H, W)` uint8.
    """
    yield from (
        _read_clouds(files, batch_size, corrupt, points, up_axis) if kind == "points" else _read_pictures(files, batch_size, corrupt)
    )


def _read_clouds(
    files: list[Path], batch_size: int, corrupt: dict[Path, str], points: int | None, up_axis: UpAxis | None
) -> Iterator[Samples]:
    places: list[tuple[Path, int]] = []
    clouds: list[np.ndarray] = []

    def waiting() -> Iterator[Samples]:
        # Those of one size go through the model together.
        for _, group in groupby(range(len(clouds)), lambda number: clouds[number].shape):
            numbers = list(group)
            yield Samples([places[number] for number in numbers], torch.from_numpy(np.stack([clouds[number] for number in numbers])))
        places.clear()
        clouds.clear()

    for array, group in groupby(files, lambda path: path.suffix.lower() in ARRAYS):
        paths = list(group)
        read = map(_clouds, paths) if array else read_clouds(paths, points or POINTS)
        for path, found in zip(paths, read, strict=True):
            if isinstance(found, str):
                corrupt[path] = found
                continue
            for position, cloud in enumerate(found if array else [found]):
                places.append((path, position))
                clouds.append(turn_up(cloud, up_axis or "y"))
                if len(places) == batch_size:
                    yield from waiting()
    yield from waiting()


def _read_pictures(files: list[Path], batch_size: int, corrupt: dict[Path, str]) -> Iterator[Samples]:
    places: list[tuple[Path, int]] = []
    pictures: list[Tensor] = []
    pixels = 0
    for path in files:
        if path.suffix.lower() in ARRAYS:
            if places:
                yield Samples(places, pictures)
            places, pictures, pixels = [], [], 0
            yield from _slices(path, batch_size)
            continue
        try:
            picture = torch.from_numpy(np.array(decode_picture(path))).permute(2, 0, 1)
        except Exception as error:  # noqa: BLE001  # Pillow has no common class for what is wrong with a file
            corrupt[path] = why_undecodable(error)
            continue
        pixels += picture[0].numel()
        if len(places) == batch_size or (places and pixels > _PIXELS):
            yield Samples(places, pictures)
            places, pictures, pixels = [], [], picture[0].numel()
        places.append((path, 0))
        pictures.append(picture)
    if places:
        yield Samples(places, pictures)


def read_sample(path: Path, number: int, kind: Kind, points: int | None = None, up_axis: UpAxis | None = None) -> np.ndarray:
    """One of the samples that `read_samples` gave, read again to be shown.

    Args:
        path: its file.
        number: its number in the file.
        kind: what it is.
        points: as for `read_samples`.
        up_axis: likewise.

    Returns:
        A picture `(H, W, C)` uint8, perhaps a smaller one, or a cloud `(N, 3)` float32.
    """
    if kind == "points":
        cloud = _stored_cloud(path, number) if path.suffix.lower() in ARRAYS else read_cloud(path, points or POINTS)
        return turn_up(cloud, up_axis or "y")
    if path.suffix.lower() not in ARRAYS:
        return np.array(decode_picture(path, enough=_THUMBNAIL))
    with _picture_array(path) as array:
        picture: np.ndarray = np.array(array if len(array.shape) == 3 else array[number])
    return picture


def complaint(corrupt: dict[Path, str], number: int, rest: str) -> str:
    """A sentence on files that could not be read.

    Args:
        corrupt: files and reasons.
        number: how many files there were.
        rest: what became of the others, or "".

    Returns:
        The sentence.
    """
    first = ", ".join(f"{path} ({reason})" for path, reason in list(corrupt.items())[:5])
    more = f" and {len(corrupt) - 5} more" if len(corrupt) > 5 else ""
    return f"{len(corrupt)} of {number} files cannot be read: {first}{more}{rest}"
