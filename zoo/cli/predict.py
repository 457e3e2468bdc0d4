"""`litzoo predict`: pictures, meshes or point clouds in files or folders become classes with their probabilities."""

import argparse
import csv
import inspect
import io
import json
import os
import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from ...datamodules.meshes import SHAPE_SUFFIXES, UpAxis, read_clouds, turn_up
from ...datamodules.pictures import PICTURE_SUFFIXES, decode_picture, why_undecodable
from ..functional.points import VoteBy
from ..pretrained import load, load_checkpoint
from . import CommandError

Kind = Literal["points", "images"]
ARRAYS = (".npy", ".h5", ".hdf5")
SHAPES = tuple(suffix for suffix in SHAPE_SUFFIXES if suffix not in ARRAYS)
READABLE = {"points": (*ARRAYS, *SHAPES), "images": (*PICTURE_SUFFIXES, *ARRAYS)}
NOUN = {"points": "point clouds", "images": "pictures"}
_CONTENT = {"points": "points", "images": "image"}
# Of a point: x, y, z, then perhaps a normal, then perhaps a label.
_COLUMNS = (3, 4, 6, 7)
_FORMS = {
    "points": ".npy files of shape (points, 3) or (clouds, points, 3), also with normals or labels behind x, y, z, HDF5 files with `points`, "
    f"{', '.join(SHAPES)} files",
    "images": f"{', '.join(PICTURE_SUFFIXES)} files, .npy files of uint8 (height, width, channels) or (pictures, height, width, channels), "
    "HDF5 files with `image`",
}
_VOTING = ("votes", "vote_by")
# Points that a mesh is sampled at, and that are kept of a cloud.
_POINTS = 2048
# Pixels of the pictures that are held at a time, whatever their number: photographs are large.
_PIXELS = 1 << 25


class _Piece(NamedTuple):
    """Some samples of one file: its path, the position of the first one in it, and what the model's `predict` takes."""

    path: Path
    start: int
    samples: Tensor


# Finding


def _check_sources(sources: list[Path]) -> None:
    """Refuse what can be refused before the model is loaded."""
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


def _files(sources: list[Path], kind: Kind, model: str) -> list[Path]:
    """The files to classify. A folder may hold both kinds, and what the model does not take is passed over; a named file is refused."""
    files: list[Path] = []
    for source in sources:
        if not source.is_dir():
            held = _held(source)
            if held is not None and held != kind:
                raise CommandError(f"{source} holds {NOUN[held]}, but {model} classifies {NOUN[kind]}: {_FORMS[kind]}")
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
            held: list[Kind] = [kind for kind in NOUN if _CONTENT[kind] in file]  # type: ignore[misc]
            return held[0] if len(held) == 1 else None
    except (ValueError, OSError, EOFError):
        return None


# Reading


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


def _check_pixels(path: Path, array: Any) -> None:
    shape: tuple[int, ...] = getattr(array, "shape", ())
    if getattr(array, "dtype", None) != np.uint8 or len(shape) not in (3, 4) or shape[-1] not in (1, 3) or 0 in shape:
        raise CommandError(
            f"{path}: pictures in an array are uint8 of shape (height, width, channels), several have (pictures, height, width, channels), "
            f"with 1 or 3 channels; this is {getattr(array, 'dtype', 'a group')} {shape}"
        )


def _array_pieces(path: Path, array: Any, batch_size: int) -> Iterator[_Piece]:
    """Slices of an array of pictures that is still on the disk."""
    if len(array.shape) == 3:
        array = array[()][None]
    size = max(1, min(batch_size, _PIXELS // int(np.prod(array.shape[1:3]))))
    for start in range(0, len(array), size):
        part = np.array(array[start : start + size])
        yield _Piece(path, start, torch.from_numpy(part).permute(0, 3, 1, 2))


def _picture_pieces(path: Path, batch_size: int) -> Iterator[_Piece]:
    """The pictures of a .npy or HDF5 file, some at a time."""
    try:
        if path.suffix.lower() == ".npy":
            array = np.load(path, mmap_mode="r", allow_pickle=False)
            _check_pixels(path, array)
            yield from _array_pieces(path, array, batch_size)
        else:
            import h5py

            with h5py.File(path, "r") as file:
                images = _content(path, file, "image")
                _check_pixels(path, images)
                yield from _array_pieces(path, images, batch_size)
    except (ValueError, OSError, EOFError) as error:
        raise _unreadable(path, error) from error


# Classifying


def _rows(piece: _Piece, probabilities: Tensor, scores: Tensor | None, names: list[str], top: int) -> list[dict[str, Any]]:
    confidence, classes = probabilities.topk(min(top, len(names)), dim=1)
    rows = []
    for position, (values, ids) in enumerate(zip(confidence.tolist(), classes.tolist(), strict=True)):
        ranked = [{"class": names[cls], "confidence": round(value, 6)} for cls, value in zip(ids, values, strict=True)]
        row: dict[str, Any] = {"file": str(piece.path), "index": piece.start + position, "predictions": ranked}
        rows.append(row if scores is None else {**row, "ood_score": round(float(scores[position]), 6)})
    return rows


def _classify_clouds(model: Any, files: list[Path], options: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[Path, str]]:
    """The rows in the order of the files, and the shapes that cannot be read with the reasons."""
    votes = {name: value for name in _VOTING if (value := getattr(options, name)) is not None}
    rows: list[dict[str, Any]] = []
    waiting: list[_Piece] = []
    corrupt: dict[Path, str] = {}

    def classify_waiting() -> None:
        # Those of one size go through the model together.
        for _, group in groupby(waiting, lambda piece: piece.samples.shape):
            pieces = list(group)
            clouds = torch.stack([piece.samples for piece in pieces])
            probabilities = model.predict(clouds, **votes)
            scores = model.ood_score(clouds) if options.ood_score else None
            for number, piece in enumerate(pieces):
                one = slice(number, number + 1)
                rows.extend(_rows(piece, probabilities[one], None if scores is None else scores[one], model.class_names, options.top))
        waiting.clear()

    for path in files:
        if path.suffix.lower() in ARRAYS:
            _clouds(path)  # refused before any work is done
    for array, group in groupby(files, lambda path: path.suffix.lower() in ARRAYS):
        paths = list(group)
        read = map(_clouds, paths) if array else read_clouds(paths, options.points or _POINTS)
        for path, found in zip(paths, read, strict=True):
            if isinstance(found, str):
                corrupt[path] = found
                continue
            for position, cloud in enumerate(found if array else [found]):
                waiting.append(_Piece(path, position, torch.from_numpy(turn_up(cloud, options.up_axis or "y"))))
                if len(waiting) == options.batch_size:
                    classify_waiting()
    classify_waiting()
    return rows, corrupt


def _classify_pictures(model: Any, files: list[Path], options: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[Path, str]]:
    """The rows in the order of the files, and the pictures that cannot be decoded with the reasons."""
    rows: list[dict[str, Any]] = []
    waiting: list[_Piece] = []
    corrupt: dict[Path, str] = {}

    def classify_waiting() -> None:
        if waiting:
            pictures = [piece.samples for piece in waiting]
            probabilities = model.predict(pictures)
            scores = model.ood_score(pictures) if options.ood_score else None
            for number, piece in enumerate(waiting):
                one = slice(number, number + 1)
                rows.extend(_rows(piece, probabilities[one], None if scores is None else scores[one], model.class_names, options.top))
            waiting.clear()

    for path in files:
        if path.suffix.lower() in ARRAYS:
            next(_picture_pieces(path, 1))  # refused before any work is done
    pixels = 0
    for path in files:
        if path.suffix.lower() in PICTURE_SUFFIXES:
            try:
                picture = torch.from_numpy(np.array(decode_picture(path))).permute(2, 0, 1)
            except Exception as error:  # noqa: BLE001  # Pillow has no common class for what is wrong with a file
                corrupt[path] = why_undecodable(error)
                continue
            pixels += picture[0].numel()
            if len(waiting) == options.batch_size or pixels > _PIXELS:
                classify_waiting()
                pixels = picture[0].numel()
            waiting.append(_Piece(path, 0, picture))
        else:
            classify_waiting()
            pixels = 0
            for piece in _picture_pieces(path, options.batch_size):
                scores = model.ood_score(piece.samples) if options.ood_score else None
                rows += _rows(piece, model.predict(piece.samples), scores, model.class_names, options.top)
    classify_waiting()
    return rows, corrupt


# Writing


def _table(rows: list[dict[str, Any]]) -> str:
    """CSV with a pair of columns for each rank."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    ranks = range(1, len(rows[0]["predictions"]) + 1)
    score = ["ood_score"] if "ood_score" in rows[0] else []
    writer.writerow(["file", "index", *(name for rank in ranks for name in (f"class_{rank}", f"confidence_{rank}")), *score])
    for row in rows:
        guesses = (value for guess in row["predictions"] for value in guess.values())
        writer.writerow([row["file"], row["index"], *guesses, *(row[name] for name in score)])
    return text.getvalue()


def _write(rows: list[dict[str, Any]], output: Path | None, noun: str) -> None:
    text = json.dumps(rows, indent=1) + "\n" if output is not None and output.suffix.lower() == ".json" else _table(rows)
    content = text.encode("utf-8", "backslashreplace")  # file names need not be text
    if output is None:
        sys.stdout.write(content.decode())
        return
    temporary = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        temporary.replace(output)
    finally:
        temporary.unlink(missing_ok=True)
    print(f"{len(rows)} {noun}: {output}")


def _complaint(corrupt: dict[Path, str], number: int, rows: int, kind: Kind) -> str:
    first = ", ".join(f"{path} ({reason})" for path, reason in list(corrupt.items())[:5])
    more = f" and {len(corrupt) - 5} more" if len(corrupt) > 5 else ""
    rest = "; the others are classified" if rows else ""
    return f"{len(corrupt)} of {number} files cannot be {'read' if kind == 'points' else 'decoded'}: {first}{more}{rest}"


def _check_options(arguments: argparse.Namespace, model: Any, kind: Kind) -> None:
    """Refuse the options that a model does not take."""
    if arguments.ood_score and not hasattr(model, "ood_score"):
        raise CommandError(f"--ood-score: {arguments.model} is a {type(model).__name__}, which gives no such score: leave it out")
    takes = inspect.signature(model.predict).parameters
    for name in ("points", "up_axis", *_VOTING):
        option = f"--{name.replace('_', '-')}"
        if getattr(arguments, name) is None:
            continue
        if kind != "points":
            raise CommandError(f"{option} is for meshes and point clouds, but {arguments.model} classifies pictures: leave it out")
        if name in _VOTING and name not in takes:
            raise CommandError(f"{option}: {arguments.model} is a {type(model).__name__}, which takes no votes: leave it out")


def predict(argv: list[str]) -> int:
    """Classify pictures, meshes or point clouds, whichever the model was made for.

    Args:
        argv: the options and sources: picture files, meshes and clouds as `read_cloud` reads them, .npy files of uint8 (height, width,
            channels) or (pictures, height, width, channels) or of clouds (points, 3) or (clouds, points, 3), whose points may have a
            normal, a label or both behind x, y, z, HDF5 files with `image` or `points` and perhaps the `count` of those that are no copies,
            and folders of these.

    Returns:
        The exit status.

    Raises:
        CommandError: if a source is missing, broken or of the other kind, the model does not classify, or does not take an option. Pictures
            and meshes that cannot be read are named after the others have been classified and written.

    Example:
        >>> predict(["photos", "--model", "photos.safetensors", "--output", "classes.csv"])
        0
    """
    parser = argparse.ArgumentParser(
        prog="litzoo predict",
        description="Classify pictures, meshes or point clouds, whichever the model was made for. "
        f"Pictures: {_FORMS['images']}. Meshes and clouds: {_FORMS['points']}.",
    )
    parser.add_argument("sources", metavar="SOURCE", nargs="+", type=Path, help="files or folders, which are searched for both")
    parser.add_argument("--model", required=True, help="a name of `litzoo list`, a .safetensors, a .ckpt or hf-hub:owner/repo")
    parser.add_argument("--top", type=int, default=5, help="classes to name for each picture or cloud (default: 5)")
    parser.add_argument("--output", type=Path, help="a .csv or .json file; by default CSV goes to the terminal")
    parser.add_argument("--batch-size", type=int, default=32, help="pictures or clouds at a time (default: 32)")
    parser.add_argument(
        "--points",
        type=int,
        help=f"points to sample on a mesh, and the most to keep of a file of points (default: {_POINTS}); "
        ".npy and HDF5 clouds are taken whole",
    )
    parser.add_argument("--up-axis", choices=get_args(UpAxis), help="the axis of the shapes that points up (default: y)")
    parser.add_argument("--votes", type=int, help="views of each cloud whose probabilities are averaged (default: 1)")
    parser.add_argument("--vote-by", choices=get_args(VoteBy), help="turn the views about the up axis, or give them subsets (default: yaw)")
    parser.add_argument("--ood-score", action="store_true", help="also say how strange each sample is to the training data")
    arguments = parser.parse_args(argv)
    for option in ("top", "batch_size", "points", "votes"):
        if getattr(arguments, option) is not None and getattr(arguments, option) < 1:
            raise CommandError(f"--{option.replace('_', '-')} must be at least 1")
    if arguments.vote_by is not None and arguments.votes is None:
        raise CommandError("--vote-by says what the views of --votes are: give both")
    output: Path | None = arguments.output
    if output is not None and output.suffix.lower() not in (".csv", ".json"):
        raise CommandError(f"--output {output}: give a name that ends in .csv or .json")
    if output is not None and not output.absolute().parent.is_dir():
        raise CommandError(f"--output {output}: there is no folder {output.absolute().parent}")
    if output is not None and output.is_dir():
        raise CommandError(f"--output {output} is a folder: give the name of a file")
    if output is not None and not os.access(output.absolute().parent, os.W_OK):
        raise CommandError(f"--output {output}: you may not write to {output.absolute().parent}, give another folder")

    _check_sources(arguments.sources)
    model: Any = load_checkpoint(arguments.model) if arguments.model.endswith(".ckpt") else load(arguments.model)
    kind: Kind | None = getattr(model, "input_kind", None)
    if hasattr(model, "embed") and not hasattr(model, "predict"):
        raise CommandError(
            f"{arguments.model} is an encoder, {type(model).__name__}, and has no classes: give a classifier, "
            f"or get features in Python with litzoo.load_encoder({arguments.model!r}).embed(pictures)"
        )
    if kind not in READABLE or not hasattr(model, "predict") or not hasattr(model, "class_names"):
        raise CommandError(f"{arguments.model} is a {type(model).__name__}, which classifies neither pictures nor point clouds")
    _check_options(arguments, model, kind)
    files = _files(arguments.sources, kind, arguments.model)
    if kind == "points":
        rows, corrupt = _classify_clouds(model, files, arguments)
    else:
        rows, corrupt = _classify_pictures(model, files, arguments)
    if rows:
        _write(rows, output, "clouds" if kind == "points" else "pictures")
    if corrupt:
        raise CommandError(_complaint(corrupt, len(files), len(rows), kind))
    return 0
