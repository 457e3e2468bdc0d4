"""ShapeNetPart in each of its official formats, parsed once."""

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from ..zoo.batch import Batch
from ..zoo.functional.points import Normalization, farthest_points
from .arrays import Arrays
from .augment.points import PointAugmentation
from .errors import DataError
from .hdf5_reading import open_hdf5, resolve_path
from .packing import block_dataset, map_array, pack_once, packed_place
from .points import PointsDataModule, Subset
from .splits import SPLIT_NAMES, TRAIN, UNUSED, VAL, hold_out, stratified_split

TrainOn = Literal["train", "trainval"]
PartLabels = Literal["global", "category"]
Layout = Literal["v0", "normal", "hdf5"]

# Name, WordNet offset and number of parts of each category, in the order of the offsets, which is that of the names.
_CATEGORIES = (
    ("Airplane", "02691156", 4),
    ("Bag", "02773838", 2),
    ("Cap", "02954340", 2),
    ("Car", "02958343", 4),
    ("Chair", "03001627", 4),
    ("Earphone", "03261776", 3),
    ("Guitar", "03467517", 3),
    ("Knife", "03624134", 2),
    ("Lamp", "03636649", 4),
    ("Laptop", "03642806", 2),
    ("Motorbike", "03790512", 6),
    ("Mug", "03797390", 2),
    ("Pistol", "03948459", 3),
    ("Rocket", "04099429", 3),
    ("Skateboard", "04225987", 3),
    ("Table", "04379243", 3),
)
_NAMES = tuple(name for name, _, _ in _CATEGORIES)
_SYNSETS = tuple(synset for _, synset, _ in _CATEGORIES)
_SIZES = tuple(parts for _, _, parts in _CATEGORIES)
# The first global part label of each category.
_FIRST = tuple(sum(_SIZES[:cls]) for cls in range(len(_SIZES)))
# Packed files of another version are made anew.
_SOURCE = "litzoo ShapeNetPart, version 1"
# Shapes that are parsed, and kept if the process is stopped, together.
_CHUNK = 64
_HDF5_NAME = re.compile(r"ply_data_(train|val|test)(\d*)\.h5")
_LISTS = tuple(f"train_test_split/shuffled_{split}_file_list.json" for split in SPLIT_NAMES)


@dataclass(frozen=True)
class _Shape:
    """One shape: its name, `SYNSET/ID` or `FILE.h5/ROW`, its class and official split, and size and time of its files."""

    name: str
    label: int
    split: int
    stamp: str


class _Source:
    """A folder in one of the official formats.

    Attributes:
        folder: where the files lie: the given folder, or the only one in it that holds the data.
        layout: the format.
        stamps: size and time of modification of each file that counts, by its name relative to the folder; no file is opened.
        fingerprint: of the stamps.
    """

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            what = "is a file: unpack it first, and give the folder" if root.exists() else "does not exist: give the folder of ShapeNetPart"
            raise DataError(f"{root} {what} with --data.root")
        try:
            below = sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
            found = [(folder, layout) for folder in (root, *below) if (layout := _layout(folder)) is not None]
            if not found:
                raise DataError(
                    f"{root} holds no ShapeNetPart: give the folder with 02691156/points, with 02691156/*.txt or with "
                    "ply_data_train0.h5 by --data.root"
                )
            if found[0][0] != root and len(found) > 1:
                raise DataError(
                    f"{root} holds ShapeNetPart {len(found)} times, in {' and '.join(folder.name for folder, _ in found)}: "
                    "give one of them with --data.root"
                )
            self.folder, self.layout = found[0]
            self.stamps = _stamps(self.folder, self.layout)
        except OSError as error:
            raise DataError(f"{root} cannot be read: {error}") from error
        digest = hashlib.sha256(self.layout.encode())
        for item in sorted(self.stamps.items()):
            digest.update("\0".join(item).encode(errors="surrogateescape") + b"\n")
        self.fingerprint = digest.hexdigest()

    def shapes(self) -> tuple[list[_Shape], list[str]]:
        """All listed shapes that are there, split by split in the official order, and the names of those that are absent."""
        return _rows(self.folder) if self.layout == "hdf5" else self._listed()

    def _listed(self) -> tuple[list[_Shape], list[str]]:
        official: dict[str, int] = {}
        for split, file in enumerate(_LISTS):
            for entry in _read_list(self.folder / file) if file in self.stamps else ():
                synset, _, identifier = entry.removeprefix("shape_data/").partition("/")
                if synset not in _SYNSETS or not identifier or "/" in identifier:
                    raise DataError(f"{self.folder / file} lists {entry!r}, which is no shape_data/SYNSET/ID: fetch the archive anew")
                # Some shapes stand in two lists; they must not be trained with and scored on.
                official[f"{synset}/{identifier}"] = split
        shapes, absent = [], []
        for name in sorted(official, key=official.__getitem__):
            stamp = [self.stamps.get(part) for part in _files(name, self.layout)]
            if any(stamp):
                shapes.append(_Shape(name, _SYNSETS.index(name.split("/")[0]), official[name], " ".join(map(str, stamp))))
            else:
                absent.append(name)
        return shapes, absent


def _layout(folder: Path) -> Layout | None:
    if any(_HDF5_NAME.fullmatch(entry.name) for entry in folder.iterdir()):
        return "hdf5"
    categories = [folder / synset for synset in _SYNSETS if (folder / synset).is_dir()]
    if any((category / "points").is_dir() for category in categories):
        return "v0"
    return "normal" if any(entry.suffix == ".txt" for category in categories for entry in category.iterdir()) else None


def _stamps(folder: Path, layout: Layout) -> dict[str, str]:
    if layout == "hdf5":
        names = [entry.name for entry in folder.iterdir() if _HDF5_NAME.fullmatch(entry.name)]
        names += [name for name in ("all_object_categories.txt",) if (folder / name).is_file()]
        return {name: _stamp((folder / name).stat()) for name in names}
    lists = [name for name in _LISTS if (folder / name).is_file()]
    if _LISTS[TRAIN] not in lists:
        raise DataError(f"{folder} lacks the official split, {_LISTS[TRAIN]} and others: fetch the archive anew")
    if missing := [name for name in _LISTS if name not in lists]:
        warnings.warn(f"{folder} lacks {' and '.join(missing)}: there are no shapes of those splits", stacklevel=2)
    stamps = {name: _stamp((folder / name).stat()) for name in lists}
    kinds = (("/points", ".pts"), ("/points_label", ".seg")) if layout == "v0" else (("", ".txt"),)
    for place, suffix in ((synset + below, suffix) for synset in _SYNSETS for below, suffix in kinds):
        if (folder / place).is_dir():
            with os.scandir(folder / place) as entries:
                for entry in entries:
                    # A link to nothing is an absent file.
                    if entry.name.endswith(suffix) and not entry.name.startswith(".") and entry.is_file():
                        stamps[f"{place}/{entry.name}"] = _stamp(entry.stat())
    return stamps


def _stamp(status: os.stat_result) -> str:
    return f"{status.st_size} {status.st_mtime_ns}"


def _files(name: str, layout: Layout) -> tuple[str, ...]:
    """The files of a shape: of its points and, where that is another, of its labels."""
    synset, identifier = name.split("/")
    return (f"{synset}/points/{identifier}.pts", f"{synset}/points_label/{identifier}.seg") if layout == "v0" else (f"{name}.txt",)


def _read_list(path: Path) -> list[str]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as JSON ({error}): fetch the archive anew") from error
    if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
        raise DataError(f"{path} must be a list of shape_data/SYNSET/ID: fetch the archive anew")
    return entries


def _rows(folder: Path) -> tuple[list[_Shape], list[str]]:
    """The shapes of the HDF5 files; they hold all that is listed."""
    matches = [match for entry in folder.iterdir() if (match := _HDF5_NAME.fullmatch(entry.name))]
    missing = [f"ply_data_{split}*.h5" for split in SPLIT_NAMES if all(match[1] != split for match in matches)]
    if missing:
        raise DataError(f"{folder} lacks {' and '.join(missing)}: fetch the archive anew")
    classes = _hdf5_classes(folder / "all_object_categories.txt")
    shapes = []
    for match in sorted(matches, key=lambda match: (SPLIT_NAMES.index(match[1]), int(match[2] or 0))):
        path = folder / match[0]
        with open_hdf5(path, "clouds", "data", "label", "pid") as reader:
            data, pid, label = reader.file["data"], reader.file["pid"], reader.whole_numbers("label").flatten().tolist()
            if data.shape != (*pid.shape, 3) or len(label) != len(data) or data.dtype.kind != "f" or pid.dtype.kind not in "iu":
                raise DataError(
                    f"{path}: data, pid and label must have shapes (M, N, 3), (M, N) and (M, 1), they have {data.shape}, {pid.shape} and "
                    f"{reader.file['label'].shape}: fetch it anew"
                )
        if label and not 0 <= min(label) <= max(label) < len(classes):
            raise DataError(f"{path}: labels run from {min(label)} to {max(label)}, but there are {len(classes)} categories: fetch it anew")
        stamp = _stamp(path.stat())
        shapes += [_Shape(f"{path.name}/{row}", classes[cls], SPLIT_NAMES.index(match[1]), stamp) for row, cls in enumerate(label)]
    return shapes, []


def _hdf5_classes(path: Path) -> list[int]:
    """The class of each label of the HDF5 files, which have an order of their own."""
    if not path.is_file():
        return list(range(len(_NAMES)))
    names = [line.split()[0] for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    if sorted(names) != list(_NAMES):
        raise DataError(f"{path} must list the 16 categories, it lists {', '.join(names) or 'none'}: fetch the archive anew")
    return [_NAMES.index(name) for name in names]


def _parse(path: Path, columns: int) -> np.ndarray:
    """The numbers of a text file, `(N, columns)` float32.

    Raises:
        ValueError: if they are none, or another number of columns.
    """
    if path.stat().st_size == 0:
        raise ValueError(f"{path.name} is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about files of blanks only
            values = np.loadtxt(path, np.float32, comments=None, ndmin=2)
    except ValueError as error:
        raise ValueError(f"{path.name}: {str(error).partition(';')[0]}") from error
    if values.size == 0:
        raise ValueError(f"{path.name} is empty")
    if values.shape[1] != columns:
        raise ValueError(f"{path.name} has {values.shape[1]} columns instead of {columns}")
    return values


def _cloud(folder: Path, layout: Layout, shape: _Shape) -> tuple[np.ndarray, np.ndarray]:
    """Points `(N, 3)` and their labels `(N,)` as they are in the text files of a shape.

    Raises:
        OSError: if a file is absent or cannot be read.
        ValueError: if one is broken.
    """
    files = [folder / name for name in _files(shape.name, layout)]
    if layout == "normal":
        values = _parse(files[0], 7)
        return values[:, :3], values[:, 6]
    points, part = _parse(files[0], 3), _parse(files[1], 1)[:, 0]
    if len(points) != len(part):
        raise ValueError(f"{len(points)} points, but {len(part)} labels")
    return points, part


def _clouds(folder: Path, layout: Layout, shapes: list[_Shape]) -> Iterator[tuple[np.ndarray, np.ndarray] | Exception]:
    """What is in the files of each shape, or what is wrong with it."""
    import h5py

    if layout != "hdf5":
        for shape in shapes:
            try:
                yield _cloud(folder, layout, shape)
            except (OSError, ValueError) as error:
                yield error
        return
    for name, group in groupby(shapes, lambda shape: shape.name.split("/")[0]):
        rows = [int(shape.name.split("/")[1]) for shape in group]
        try:
            with h5py.File(folder / name, "r") as file:
                points, part = file["data"][rows[0] : rows[-1] + 1].astype(np.float32), file["pid"][rows[0] : rows[-1] + 1]
        except OSError as error:
            yield from [error] * len(rows)
        else:
            yield from zip(points, part, strict=True)


def _checked(points: np.ndarray, part: np.ndarray, label: int, layout: Layout) -> np.ndarray:
    """The global part labels, uint8.

    Raises:
        ValueError: if points or labels cannot be used.
    """
    if not np.isfinite(points).all():
        raise ValueError("NaN or infinite coordinates")
    lowest = 1 if layout == "v0" else _FIRST[label]
    highest = lowest + _SIZES[label] - 1
    if not ((part >= lowest) & (part <= highest) & (part == np.floor(part))).all():
        wrong = next(value for value in part.tolist() if not (lowest <= value <= highest and value == int(value)))
        raise ValueError(f"part label {wrong:g}, those of {_NAMES[label]} are {lowest} to {highest}")
    return (part - (lowest - _FIRST[label])).astype(np.uint8)


def _why(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return f"no {Path(error.filename).name}"
    return " ".join(str(error.strerror if isinstance(error, OSError) and error.strerror else error).split())


def _read_chunk(folder: Path, layout: Layout, shapes: list[_Shape], farthest: int) -> dict[str, np.ndarray]:
    """Parse, check and order some shapes: those that are good, one behind the other; `count` is 0 where there is a `reason`."""
    points, parts, reasons = [], [], []
    for shape, found in zip(shapes, _clouds(folder, layout, shapes), strict=True):
        try:
            if isinstance(found, Exception):
                raise found
            parts.append(_checked(*found, shape.label, layout))
            points.append(found[0])
            reasons.append("")
        except (OSError, ValueError) as error:
            reasons.append(_why(error))
    count = np.array([len(cloud) for cloud in points], dtype=np.int64)
    if points and farthest:
        most = int(count.max())
        padded = np.stack([cloud[np.arange(most) % len(cloud)] for cloud in points])
        first = farthest_points(torch.from_numpy(padded), min(farthest, most)).numpy()
        for place, cloud in enumerate(points):
            # Copies come last, so that these are all different.
            leading = first[place, : len(cloud)]
            order = np.concatenate([leading, np.setdiff1d(np.arange(len(cloud)), leading, assume_unique=True)])
            points[place], parts[place] = cloud[order], parts[place][order]
    counts = np.zeros(len(shapes), np.int64)
    counts[[not reason for reason in reasons]] = count
    return {
        "points": np.concatenate([np.empty((0, 3), np.float32), *points]),
        "part": np.concatenate([np.empty(0, np.uint8), *parts]),
        "count": counts,
        "reason": np.array(reasons, dtype=np.str_),
    }


def _load_chunk(path: Path) -> dict[str, np.ndarray] | None:
    """A chunk that an earlier start parsed; None if there is none, or only half of it."""
    import zipfile

    try:
        with np.load(path) as chunk:
            return {name: chunk[name] for name in ("points", "part", "count", "reason")}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _read_chunks(source: _Source, shapes: list[_Shape], farthest: int, parts: Path) -> list[Path]:
    """Parse all shapes with all cores, in files of some shapes each; those that an earlier start made are not made again."""
    from tqdm import tqdm

    chunks = [shapes[start : start + _CHUNK] for start in range(0, len(shapes), _CHUNK)]
    keys = [repr((_SOURCE, source.layout, farthest, [(shape.name, shape.label, shape.stamp) for shape in chunk])) for chunk in chunks]
    paths = [parts / f"{hashlib.sha256(key.encode(errors='surrogateescape')).hexdigest()}.npz" for key in keys]
    parts.mkdir(parents=True, exist_ok=True)
    for entry in parts.iterdir():  # of other files, or half written
        if entry not in paths:
            entry.unlink()

    def work(chunk: list[_Shape], path: Path) -> int:
        temporary = path.with_suffix(".tmp")
        with temporary.open("wb") as file:
            # Mypy takes the arrays for savez's own keyword, allow_pickle.
            np.savez(file, **_read_chunk(source.folder, source.layout, chunk, farthest))  # type: ignore[arg-type]
        temporary.replace(path)
        return len(chunk)

    left = [place for place, path in enumerate(paths) if _load_chunk(path) is None]
    done = len(shapes) - sum(len(chunks[place]) for place in left)
    # Each thread has a core to itself.
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        torch.set_num_threads(1)
        with tqdm(desc="packing ShapeNetPart", total=len(shapes), initial=done, unit=" shapes", disable=None) as bar:
            for future in as_completed([pool.submit(work, chunks[place], paths[place]) for place in left]):
                bar.update(future.result())
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
    return paths


def _writer(source: _Source, farthest: int, parts: Path, skip_corrupt: bool, skip_missing: bool) -> Callable[[Any], None]:
    """What fills the packed file: clouds, labels, names; and the names of the shapes that are not there or broken."""

    def write(file: Any) -> None:
        import h5py

        shapes, absent = source.shapes()
        paths = _read_chunks(source, shapes, farthest, parts)
        chunks = [np.load(path) for path in paths]
        count = np.concatenate([np.empty(0, np.int64), *(chunk["count"] for chunk in chunks)])
        reasons = [reason for chunk in chunks for reason in chunk["reason"].tolist()]
        corrupt = {shape.name: reason for shape, reason in zip(shapes, reasons, strict=True) if reason}
        complaint = _complaint(source.folder, len(shapes) + len(absent), absent, corrupt)
        _refuse(complaint, absent and not skip_missing, corrupt and not skip_corrupt)
        good = [shape for shape in shapes if shape.name not in corrupt]
        if not good:
            raise DataError(f"{source.folder} holds no shape that can be used: {complaint or 'the lists are empty'}")
        own = count[count > 0]
        most = int(own.max())
        points = block_dataset(file, "points", (len(good), most, 3), "float32")
        part = block_dataset(file, "part", (len(good), most))
        start = 0
        for chunk in chunks:
            lengths = chunk["count"][chunk["count"] > 0]
            # Behind a cloud's own points they come again from the first on.
            rows = (lengths.cumsum() - lengths)[:, None] + np.arange(most) % lengths[:, None]
            points[start : start + len(rows)], part[start : start + len(rows)] = chunk["points"][rows], chunk["part"][rows]
            start += len(rows)
            chunk.close()
        text = h5py.string_dtype()
        file["count"] = own
        file["label"] = np.array([shape.label for shape in good], dtype=np.int64)
        file["split"] = np.array([shape.split for shape in good], dtype=np.uint8)
        file["class_names"] = np.array(_NAMES, dtype=text)
        file["part_names"] = np.array(_part_names(), dtype=text)
        file["file"] = np.array([shape.name for shape in good], dtype=text)
        file["absent"] = np.array(absent, dtype=text)
        file["corrupt"] = np.array(list(corrupt), dtype=text)
        file["corrupt_reason"] = np.array(list(corrupt.values()), dtype=text)
        shutil.rmtree(parts)

    return write


def _part_names() -> tuple[str, ...]:
    return tuple(f"{name}/{part}" for name, _, parts in _CATEGORIES for part in range(parts))


def _complaint(folder: Path, listed: int, absent: Sequence[str], corrupt: dict[str, str]) -> str:
    """What is wrong with the files; empty if nothing is."""
    sentences = []
    for names, what in ((absent, f"listed shapes in {folder} are absent"), ([f"{n} ({why})" for n, why in corrupt.items()], "are broken")):
        if names:
            more = f" and {len(names) - 5:,} more" if len(names) > 5 else ""
            what = what if names is absent or absent else f"listed shapes in {folder} are broken"
            sentences.append(f"{len(names):,} of {listed:,} {what}: {', '.join(names[:5])}{more}")
    return "; ".join(sentences)


def _refuse(complaint: str, absent: Any, corrupt: Any) -> None:
    options = ["--data.skip_missing true"] * bool(absent) + ["--data.skip_corrupt true"] * bool(corrupt)
    if options:
        raise DataError(f"{complaint}: fetch the archive anew, or leave them out with {' and '.join(options)}")


class ShapeNetPartDataModule(PointsDataModule):
    """ShapeNetPart: 16,846 shapes of 16 categories, about 2,600 points each, with 50 parts; +y is up.

    The folder is in one of the official formats, which is recognised: version 0 (`SYNSET/points/*.pts` and
    `SYNSET/points_label/*.seg`), the release with normals (`SYNSET/*.txt`; the normals are not used), both with `train_test_split`, or
    `shapenet_part_seg_hdf5_data` (`ply_data_train*.h5` and so on, 2,048 points each). It is parsed once, with all cores, into one file
    that is memory-mapped from then on: a later start opens none of the others. If one is added, removed or changed, all are packed anew;
    what is stopped goes on where it stood. Samples stand in the order of the official lists.

    The official lists of 12,137 training, 1,870 validation and 2,874 test shapes name 35 shapes in two of them. Here each of these is in
    the later one only, so that nothing is scored that was trained with: 12,105 training, 1,867 validation and 2,874 test shapes. The HDF5
    files do not name their shapes, and are taken as they are.

    The first `farthest` points of each packed cloud are in farthest-point order, the others in their original order, so that the first n
    cover the shape evenly, for every n.

    The full official set has not been run here: the tests use files in its formats, and 16 of its real shapes.

    Args:
        root: the folder, or one that holds it; `~` and environment variables are resolved.
        train_on: "train", or "trainval" for the training and validation shapes together. Then there is no validation split, unless
            `val_fraction` holds one out; train with `--trainer.limit_val_batches 0`.
        class_choice: names of the categories to use, upper or lower case; None uses all. The shapes of others are in split 3, unused;
            classes keep their numbers and names, and `num_classes` is 16.
        part_labels: "global" labels 0 to 49, or "category" for labels from 0 on within the category.
        num_points: points of a training cloud, a new random subset each epoch; None takes all.
        eval_points: points of an evaluation cloud, a subset that stays the same; None takes all.
        normalization: "unit_sphere", "unit_box" or "none"; applied before any augmentation.
        augmentation: what to do to training clouds.
        val_fraction: share of each category's training shapes held out for validation, where that has no shapes: with "trainval".
        split_seed: seed of this choice.
        balanced: whether every class comes equally often in a training epoch.
        subset: "random", or "farthest" for subsets that cover the shape evenly; see `PointsDataModule`.
        farthest: points of each cloud that are put in farthest-point order; 0 leaves all as they are.
        pack: file to pack into, or an existing folder for it; None puts it beside the folder, or into `~/.cache/litzoo` where that is not
            allowed.
        skip_missing: leave out shapes that are listed but absent, with a warning, instead of refusing to start.
        skip_corrupt: the same for shapes whose files are empty, truncated, mismatched or otherwise broken.
        batch_size: training samples in a batch of one process.
        eval_batch_size: samples in an evaluation batch; None means twice `batch_size`.
        num_workers: loader processes; 0 is the fastest for packed clouds.
        seed: seed of order and augmentation; None takes that of `seed_everything`, or 0.

    Raises:
        DataError: if the folder is missing, has another layout or lacks shapes, or some are broken.
        ValueError: if a setting is out of range.

    Example:
        >>> data = ShapeNetPartDataModule("data/shapenetcore_partanno_segmentation_benchmark_v0", class_choice=["Chair"])
        >>> data.num_train, data.num_classes, data.class_names[4], data.part_names[12]
        (2658, 16, 'Chair', 'Chair/0')

    Source:
        Yi et al., "A Scalable Active Framework for Region Annotation in 3D Shape Collections", SIGGRAPH Asia 2016.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        train_on: TrainOn = "train",
        class_choice: list[str] | None = None,
        part_labels: PartLabels = "global",
        num_points: int | None = 1024,
        eval_points: int | None = None,
        normalization: Normalization = "unit_sphere",
        augmentation: PointAugmentation = PointAugmentation(),  # noqa: B008  # frozen
        val_fraction: float = 0.0,
        split_seed: int = 0,
        balanced: bool = False,
        subset: Subset = "random",
        farthest: int = 1280,
        pack: str | os.PathLike[str] | None = None,
        skip_missing: bool = False,
        skip_corrupt: bool = False,
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
            test_fraction=0.0,
            split_seed=split_seed,
            balanced=balanced,
            subset=subset,
            farthest=farthest,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            seed=seed,
        )
        for name, value, known in (("train_on", train_on, TrainOn), ("part_labels", part_labels, PartLabels)):
            if value not in get_args(known):
                raise ValueError(f"{name} must be one of {', '.join(get_args(known))}; got {value!r}")
        if farthest < 0:
            raise ValueError(f"farthest must be at least 0, got {farthest}")
        # Out of range here and now, not when the data are read.
        stratified_split(torch.zeros(0, dtype=torch.long), val_fraction, 0.0)
        lower = [name.lower() for name in _NAMES]
        unknown = [name for name in class_choice or () if name.lower() not in lower]
        if unknown or class_choice == []:
            raise ValueError(f"class_choice must name some of {', '.join(_NAMES)}; got {unknown[0] if unknown else 'none'}")
        self.root = Path(os.path.abspath(resolve_path(root)))
        self.train_on: TrainOn = train_on
        self.class_choice = class_choice
        self.part_labels: PartLabels = part_labels
        self.pack = None if pack is None else Path(os.path.abspath(resolve_path(pack)))
        self.skip_missing = skip_missing
        self.skip_corrupt = skip_corrupt
        self._chosen = sorted({lower.index(name.lower()) for name in class_choice or _NAMES})
        self._files: list[str] = []

    @property
    def files(self) -> list[str]:
        """Name of each shape, `SYNSET/ID` or `FILE.h5/ROW`; a batch's `index` points into it."""
        _ = self.arrays  # read now, if not before
        return self._files

    @property
    def part_classes(self) -> list[int]:  # known without reading the clouds
        """The class of each part; -1 where part labels of several chosen categories are the same."""
        if self.part_labels == "global":
            return [cls for cls, parts in enumerate(_SIZES) for _ in range(parts)]
        having = [[cls for cls in self._chosen if _SIZES[cls] > part] for part in range(self.num_parts)]
        return [classes[0] if len(classes) == 1 else -1 for classes in having]

    def read(self) -> Arrays:
        found = _Source(self.root)
        source = f"{_SOURCE}: {self.farthest} {found.fingerprint}"
        name = f"{self.root.name}.{self.farthest}.h5"
        packed = packed_place(self.root, name, source, self.pack, _SOURCE.partition(",")[0], "ShapeNetPart")
        parts = packed.with_name(f".{packed.name}.parts")
        pack_once(packed, source, _writer(found, self.farthest, parts, self.skip_corrupt, self.skip_missing), "--data.pack")
        with open_hdf5(packed, "clouds", "points", "part") as reader:
            absent = reader.texts("absent")
            corrupt = dict(zip(reader.texts("corrupt"), reader.texts("corrupt_reason"), strict=True))
            self._files = list(reader.texts("file"))
            label, official, count = reader.numbers("label"), reader.numbers("split"), reader.numbers("count")
        complaint = _complaint(found.folder, len(label) + len(absent) + len(corrupt), absent, corrupt)
        _refuse(complaint, absent and not self.skip_missing, corrupt and not self.skip_corrupt)
        if complaint:
            warnings.warn(f"{complaint}; they are left out", stacklevel=2)
        points = map_array(packed, "points")
        return Arrays(
            points,
            label,
            self._split(label, official),
            _NAMES,
            map_array(packed, "part"),
            _part_names() if self.part_labels == "global" else tuple(map(str, range(max(_SIZES[cls] for cls in self._chosen)))),
            packed,
            None if (count == points.shape[1]).all() else count,
        )

    def _split(self, label: Tensor, official: Tensor) -> Tensor:
        split = official.clone()
        if self.train_on == "trainval":
            split[split == VAL] = TRAIN
        if not (split == VAL).any():
            split = hold_out(split, label, self.val_fraction, self.split_seed or 0)
        # Only now, so that the same shapes of a class are held out with every choice.
        split[~torch.isin(label, torch.tensor(self._chosen))] = UNUSED
        return split

    def prepare(self, batch: Batch) -> Batch:
        if self.part_labels == "category":
            assert batch.part is not None
            first = torch.tensor(_FIRST, device=batch.label.device)
            batch = batch._replace(part=batch.part - first[batch.label][:, None])
        return super().prepare(batch)
