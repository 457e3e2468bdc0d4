"""`litzoo select`: which samples to label next, by comparing the model in production with an ensemble."""

import csv
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...datamodules.meshes import UpAxis
from ..files import write_file
from ..functional.data_selection import Rank, Selection
from ..functional.views import ViewPreset
from ..plots.review import ReviewItem, cloud_png, image_png, sample_picture, write_review_html
from ..pretrained import load_encoder
from ..selection import select_samples
from . import CommandError
from .data_options import Parser, add_data_options, parse_with_data
from .embed import add_encoding_options, check_agreement
from .sources import NOUN, POINTS, Kind, check_sources, classified_kind, complaint, count_samples, find_files, read_sample, read_samples

if TYPE_CHECKING:
    from ...datamodules import ArrayDataModule

_FILES = ("queue.csv", "queue.json", "left_out.csv", "review.html")
# Of files, at a time.
_BATCH = 32
# More classes, and the line would fill the terminal.
_LISTED = 20


class _Folder:
    """Samples in files: what goes into the models, and what to say and show of each."""

    columns = ("file", "index")

    def __init__(self, kind: Kind, files: list[Path], options: Any) -> None:
        self.kind, self.files, self.options = kind, files, options
        self.total = count_samples(files, kind)
        self.places: list[tuple[Path, int]] = []
        self.corrupt: dict[Path, str] = {}

    def batches(self) -> Iterator[Tensor | list[Tensor]]:
        from tqdm import tqdm

        read = read_samples(
            self.files, self.kind, self.options.batch_size or _BATCH, self.corrupt, self.options.points, self.options.up_axis
        )
        with tqdm(total=self.total, unit=" samples", leave=False, disable=None) as bar:  # not where nobody watches
            for samples in read:
                self.places += samples.places
                yield samples.inputs
                bar.update(len(samples.places))
        if not self.places:
            raise CommandError(complaint(self.corrupt, len(self.files), ""))

    def facts(self, number: int) -> dict[str, Any]:
        path, index = self.places[number]
        return {"file": str(path), "index": index}

    def picture(self, number: int) -> tuple[bytes | None, str]:
        sample = read_sample(*self.places[number], self.kind, self.options.points, self.options.up_axis)
        return cloud_png(sample) if self.kind == "points" else image_png(sample), ""


class _TrainingSamples:
    """The training samples of a DataModule, likewise."""

    def __init__(self, data: "ArrayDataModule", batch_size: int | None) -> None:
        data.eval_batch_size = batch_size or data.eval_batch_size
        self.data = data
        self.index = data.train_index.tolist()
        self.names: list[str] = list(getattr(data, "files", ()))
        self.columns = (*(("file",) if self.names else ()), "index", "label")

    def facts(self, number: int) -> dict[str, Any]:
        index = self.index[number]
        label = int(self.data.arrays.label[index])
        name = {"file": self.names[index]} if self.names else {}
        return {**name, "index": index, "label": self.data.class_names[label] if label >= 0 else None}

    def picture(self, number: int) -> tuple[bytes | None, str]:
        return sample_picture(self.data.arrays, self.index[number])


def select(arguments: list[str]) -> int:
    """Leave out the samples that the production model knows, and queue the others for review, the most useful first.

    The folder gets `queue.csv` and `queue.json` with file and index, rank, the class and score of the production model and of the
    ensemble, the number of models against the production model, and the usefulness that ranks; `left_out.csv`; and `review.html`, a page
    with pictures to accept the ensemble's class or keep that of the production model.

    Args:
        arguments: the command line.

    Returns:
        The exit status.

    Raises:
        CommandError: if a setting is wrong, the models do not fit each other or the samples, or the folder holds an earlier selection.
            Pictures and meshes that cannot be read are named after the others have been selected and written.

    Example:
        >>> select(["photos", "--production", "now.safetensors", "--models", "a.ckpt", "b.ckpt", "--output", "next"])
        0
    """
    parser = Parser(
        prog="litzoo select",
        description="Find the samples worth labelling: those of whose class an ensemble and the production model are not both sure.",
    )
    parser.add_argument(
        "sources", metavar="SOURCE", nargs="*", type=Path, default=[], help="files or folders, as `litzoo predict` takes them"
    )
    models = "a name of `litzoo list`, a .safetensors, a .ckpt or hf-hub:owner/repo"
    parser.add_argument("--production", type=str, required=True, help=f"the model in use: {models}")
    help_text = "the ensemble, likewise; without, the production model over --views takes its place"
    parser.add_argument("--models", metavar="MODEL", type=str, nargs="+", default=[], help=help_text)
    add_data_options(parser)
    help_text = "views of each sample that the models see besides the sample itself; their outputs are averaged"
    parser.add_argument("--views", type=ViewPreset | None, default=None, help=help_text)
    parser.add_argument("--weights", type=float, nargs="+", help="of the models in the average, one each; by default all alike")
    help_text = "a sample is left out if both predict the same class with at least this probability"
    parser.add_argument("--threshold", type=float, default=0.95, help=help_text)
    help_text = "what comes first: where the models disagree, or where the ensemble is uncertain by entropy or margin"
    parser.add_argument("--rank", type=Rank, default="disagreement", help=help_text)
    parser.add_argument("--budget", type=int | None, default=None, help="queue only so many samples, the most useful ones")
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    parser.add_argument("--overwrite", action="store_true", help="replace the results of an earlier selection")
    parser.add_argument("--show", type=int, default=300, help="samples on the review page, at most")
    parser.add_argument("--points", type=int | None, default=None, help=f"points of a mesh, as in `litzoo predict` (default: {POINTS})")
    parser.add_argument(
        "--up_axis", "--up-axis", type=UpAxis | None, default=None, help="the axis of the shapes that points up (default: y)"
    )
    add_encoding_options(parser)
    options, data = parse_with_data(parser, arguments, "litzoo select takes")
    _check(options, data)
    names = [options.production, *options.models]
    loaded: list[Any] = [load_encoder(name, options.device) for name in names]
    samples: _Folder | _TrainingSamples
    if data is not None:
        for name, model in zip(names, loaded, strict=True):
            if getattr(model, "image_input", None) is None or not hasattr(data, "image_size"):  # else it prepares the stored images itself
                check_agreement(model, name, data)
        samples = _TrainingSamples(data, options.batch_size)
    else:
        samples = _folder(options, names, loaded)
    selection = select_samples(
        loaded[0],
        loaded[1:],
        data if isinstance(samples, _TrainingSamples) else samples.batches(),
        options.views or (),
        options.weights,
        options.threshold,
        options.rank,
        names,
        progress=data is not None,
    )
    _write(options, samples, selection, loaded[0].class_names)
    if isinstance(samples, _Folder) and samples.corrupt:
        raise CommandError(complaint(samples.corrupt, len(samples.files), "; the others are selected from"))
    return 0


def _check(options: Any, data: "ArrayDataModule | None") -> None:
    """Refuse what can be refused before any work."""
    output: Path = options.output
    if (data is None) == (not options.sources):
        raise CommandError(
            "say which samples: files or folders, or --data CLASS or --config RECIPE for the training samples of a data set"
            if data is None
            else "give files and folders, or --data, not both"
        )
    for name in ("budget", "show", "points", "batch_size"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise CommandError(f"--{name} must be at least 1, got {value}")
    for name in ("points", "up_axis"):
        if data is not None and getattr(options, name) is not None:
            raise CommandError(f"--{name} is for files of shapes, the data have settings of their own: leave it out")
    if options.weights is not None and len(options.weights) != len(options.models):
        raise CommandError(f"--weights needs one number for each of --models: {len(options.models)}, got {len(options.weights)}")
    if output.exists() and not output.is_dir():
        raise CommandError(f"--output {output} is a file: give a folder")
    if not output.absolute().parent.is_dir():
        raise CommandError(f"--output {output}: there is no folder {output.absolute().parent}")
    if not os.access(output if output.is_dir() else output.absolute().parent, os.W_OK):
        raise CommandError(f"--output {output}: you may not write there, give another folder")
    there = [name for name in _FILES if (output / name).exists()]
    if there and not options.overwrite:
        raise CommandError(f"{output / there[0]} exists already and is not overwritten; give another folder, or add --overwrite")
    check_sources(options.sources)


def _folder(options: Any, names: list[str], models: list[Any]) -> _Folder:
    kinds = [classified_kind(model, name) for name, model in zip(names, models, strict=True)]
    for name, kind in zip(names, kinds, strict=True):
        if kind != kinds[0]:
            raise CommandError(f"{names[0]} classifies {NOUN[kinds[0]]}, but {name} {NOUN[kind]}: give models of the same samples")
    for name in ("points", "up_axis"):
        if kinds[0] != "points" and getattr(options, name) is not None:
            raise CommandError(f"--{name} is for meshes and point clouds, but {names[0]} classifies pictures: leave it out")
    return _Folder(kinds[0], find_files(options.sources, kinds[0], options.production), options)


def _write(options: Any, samples: _Folder | _TrainingSamples, selection: Selection, class_names: list[str]) -> None:
    production, fused = ([class_names[cls] for cls in column.tolist()] for column in (selection.label, selection.proposed))
    score, fused_score, usefulness = (
        [round(value, 6) for value in column.tolist()] for column in (selection.score, selection.proposed_score, selection.usefulness)
    )
    against, queued = selection.against.tolist(), selection.order.tolist()
    queue, known = queued[: options.budget], selection.left_out.nonzero().squeeze(1).tolist()
    rows = [
        {
            "rank": place + 1,
            **samples.facts(number),
            "production": production[number],
            "production_score": score[number],
            "fused": fused[number],
            "fused_score": fused_score[number],
            "against": against[number],
            "usefulness": usefulness[number],
        }
        for place, number in enumerate(queue)
    ]
    columns = ["rank", *samples.columns, "production", "production_score", "fused", "fused_score", "against", "usefulness"]
    left_out = [
        {**samples.facts(each), "class": production[each], "production_score": score[each], "fused_score": fused_score[each]}
        for each in known
    ]
    output: Path = options.output
    for name, content in (
        ("queue.csv", _table(columns, rows)),
        ("queue.json", json.dumps(rows, indent=1, allow_nan=False) + "\n"),
        ("left_out.csv", _table([*samples.columns, "class", "production_score", "fused_score"], left_out)),
    ):
        write_file(output / name, content.encode("utf-8", "backslashreplace"))  # file names need not be text
    _write_review(options, samples, selection, queue[: options.show], class_names)

    print(f"{len(known):,} of {len(production):,} samples are left out: production model and ensemble are sure of the same class")
    if known:
        counts = torch.bincount(selection.label[selection.left_out], minlength=len(class_names))
        present = counts.argsort(descending=True, stable=True)[: int((counts > 0).sum())].tolist()
        largest = ", ".join(f"{class_names[cls]} ({int(counts[cls]):,})" for cls in present[:_LISTED])
        print(f"  of each class: {largest}{', ...' if len(present) > _LISTED else ''}")
    of_all = f" of {len(queued):,}" if len(queue) < len(queued) else ""
    first = f", the first {options.show:,}" if options.show < len(queue) else ""
    print(
        f"{len(queue):,}{of_all} to review, the most useful first: {output / 'queue.csv'}; to look through{first}: {output / 'review.html'}"
    )


def _table(columns: list[str], rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _write_review(
    options: Any, samples: _Folder | _TrainingSamples, selection: Selection, shown: list[int], class_names: list[str]
) -> None:
    items = []
    for number in shown:
        facts, (png, text) = samples.facts(number), samples.picture(number)
        items.append(
            ReviewItem(
                facts["index"],
                facts.get("file", ""),
                int(selection.label[number]),
                int(selection.proposed[number]),
                float(selection.score[number]),
                float(selection.proposed_score[number]),
                int(selection.against[number]),
                max(1, len(options.models)),
                png,
                text,
            )
        )
    queued = len(selection.order)
    note = f"{queued:,} of {len(selection.label):,} samples are to be reviewed; class of the production model → class of the ensemble, "
    note += "most useful first." + (f" The first {len(shown):,} are shown." if len(shown) < queued else "")
    write_review_html(options.output / "review.html", items, class_names, f"Samples to label: {options.output.absolute().name}", note)
