"""`litzoo predict`: pictures, meshes or point clouds in files or folders become classes with their probabilities, or parts."""

import argparse
import csv
import inspect
import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from ...datamodules.meshes import UpAxis
from ..files import write_file
from ..functional.points import VoteBy
from ..pretrained import load_model
from . import CommandError
from .cloud_files import HDF5
from .predict_parts import PartFinder, part_table
from .segmenters import is_segmenter
from .sources import FORMS, POINTS, Kind, Samples, check_sources, classified_kind, complaint, count_samples, find_files, read_samples

_VOTING = ("votes", "vote_by")
# Classes that are named for each sample, if nobody says how many.
_TOP = 5

# Classifying


def _rows(model: Any, samples: Samples, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Classify some samples."""
    votes = {name: value for name in _VOTING if (value := getattr(options, name)) is not None}
    probabilities = model.predict(samples.inputs, **votes)
    scores = model.ood_score(samples.inputs) if options.ood_score else None
    names = model.class_names
    confidence, classes = probabilities.topk(min(options.top or _TOP, len(names)), dim=1)
    rows = []
    for number, ((path, position), values, ids) in enumerate(zip(samples.places, confidence.tolist(), classes.tolist(), strict=True)):
        ranked = [{"class": names[cls], "confidence": round(value, 6)} for cls, value in zip(ids, values, strict=True)]
        row: dict[str, Any] = {"file": str(path), "index": position, "predictions": ranked}
        rows.append(row if scores is None else {**row, "ood_score": round(float(scores[number]), 6)})
    return rows


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


def _write(rows: list[dict[str, Any]], table: Callable[[list[dict[str, Any]]], str], output: Path | None, noun: str) -> None:
    text = json.dumps(rows, indent=1) + "\n" if output is not None and output.suffix.lower() == ".json" else table(rows)
    content = text.encode("utf-8", "backslashreplace")  # file names need not be text
    if output is None:
        sys.stdout.write(content.decode())
        return
    write_file(output, content)
    print(f"{len(rows)} {noun}: {output}")


def _check_options(arguments: argparse.Namespace, model: Any, kind: Kind) -> None:
    """Refuse the options that a model does not take."""
    if arguments.ood_score and not hasattr(model, "ood_score"):
        raise CommandError(f"--ood-score: {arguments.model} is a {type(model).__name__}, which gives no such score: leave it out")
    if is_segmenter(model):
        if arguments.top is not None:
            raise CommandError(f"--top: {arguments.model} finds parts, all of which are told: leave it out")
    elif arguments.cls is not None:
        raise CommandError(f"--class: {arguments.model} is a {type(model).__name__}, which finds the class itself: leave it out")
    elif arguments.output is not None and arguments.output.suffix.lower() in HDF5:
        raise CommandError(f"--output {arguments.output}: {arguments.model} finds classes, give a name that ends in .csv or .json")
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
    """Classify pictures, meshes or point clouds, or find the parts of objects, whichever the model was made for.

    Of a segmenter, rows tell the share of the points of each part, and an HDF5 file holds the points with their parts.

    Args:
        argv: the options and sources: picture files, meshes and clouds as `read_cloud` reads them, .npy files of uint8 (height, width,
            channels) or (pictures, height, width, channels) or of clouds (points, 3) or (clouds, points, 3), whose points may have a
            normal, a label or both behind x, y, z, HDF5 files with `image` or `points` and perhaps the `count` of those that are no copies,
            and folders of these.

    Returns:
        The exit status.

    Raises:
        CommandError: if a source is missing, broken or of the other kind, the model does neither, does not take an option, or does not
            know the class of an object. Pictures and meshes that cannot be read are named after the others have been classified and
            written.

    Example:
        >>> predict(["photos", "--model", "photos.safetensors", "--output", "classes.csv"])
        0
    """
    parser = argparse.ArgumentParser(
        prog="litzoo predict",
        description="Classify pictures, meshes or point clouds, or find the parts of objects, whichever the model was made for. "
        f"Pictures: {FORMS['images']}. Meshes and clouds: {FORMS['points']}.",
    )
    parser.add_argument("sources", metavar="SOURCE", nargs="+", type=Path, help="files or folders, which are searched for both")
    parser.add_argument("--model", required=True, help="a name of `litzoo list`, a .safetensors, a .ckpt or hf-hub:owner/repo")
    parser.add_argument("--top", type=int, help=f"classes to name for each picture or cloud (default: {_TOP})")
    parser.add_argument("--class", dest="cls", help="for models that find parts: what all objects are, if HDF5 files do not tell")
    parser.add_argument(
        "--output",
        type=Path,
        help="a .csv or .json file; of parts also .h5, with the part of each point; by default CSV goes to the terminal",
    )
    parser.add_argument("--batch-size", type=int, default=32, help="pictures or clouds at a time (default: 32)")
    parser.add_argument(
        "--points",
        type=int,
        help=f"points to sample on a mesh, and the most to keep of a file of points (default: {POINTS}); "
        ".npy and HDF5 clouds are taken whole",
    )
    parser.add_argument("--up-axis", choices=get_args(UpAxis), help="the axis of the shapes that points up (default: y)")
    parser.add_argument("--votes", type=int, help="views of each cloud whose probabilities are averaged (default: 1)")
    parser.add_argument("--vote-by", choices=get_args(VoteBy), help="turn the views about the up axis, or give them subsets (default: yaw)")
    parser.add_argument("--ood-score", action="store_true", help="also give each sample's out-of-distribution score")
    arguments = parser.parse_args(argv)
    for option in ("top", "batch_size", "points", "votes"):
        if getattr(arguments, option) is not None and getattr(arguments, option) < 1:
            raise CommandError(f"--{option.replace('_', '-')} must be at least 1")
    if arguments.vote_by is not None and arguments.votes is None:
        raise CommandError("--vote-by says what the views of --votes are: give both")
    output: Path | None = arguments.output
    if output is not None and output.suffix.lower() not in (".csv", ".json", *HDF5):
        raise CommandError(f"--output {output}: give a name that ends in .csv or .json, or for the part of each point in .h5")
    if output is not None and not output.absolute().parent.is_dir():
        raise CommandError(f"--output {output}: there is no folder {output.absolute().parent}")
    if output is not None and output.is_dir():
        raise CommandError(f"--output {output} is a folder: give the name of a file")
    if output is not None and output.exists() and output.suffix.lower() in HDF5:
        raise CommandError(f"--output {output} exists already and is not overwritten: give another name")
    if output is not None and not os.access(output.absolute().parent, os.W_OK):
        raise CommandError(f"--output {output}: you may not write to {output.absolute().parent}, give another folder")

    check_sources(arguments.sources)
    model: Any = load_model(arguments.model)
    kind: Kind = "points" if is_segmenter(model) else classified_kind(model, arguments.model)
    _check_options(arguments, model, kind)
    files = find_files(arguments.sources, kind, arguments.model)
    count_samples(files, kind)  # broken arrays are refused before any work is done
    corrupt: dict[Path, str] = {}
    read = read_samples(files, kind, arguments.batch_size, corrupt, arguments.points, arguments.up_axis)
    parts = PartFinder(model, files, arguments) if is_segmenter(model) else None
    rows = [row for samples in read for row in (_rows(model, samples, arguments) if parts is None else parts.rows(samples))]
    if rows and parts is not None and output is not None and output.suffix.lower() in HDF5:
        parts.write(output)
    elif rows:
        _write(rows, _table if parts is None else part_table, output, "clouds" if kind == "points" else "pictures")
    if corrupt:
        done = "classified" if parts is None else "done"
        raise CommandError(complaint(corrupt, len(files), f"; the others are {done}" if rows else ""))
    return 0
