"""`litzoo report`: one page about a training, to read, to send and to keep."""

import difflib
import glob
import os
import platform
import re
from collections.abc import Mapping
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import numpy as np
import torch
import yaml

from . import CommandError, is_config
from .data_options import Parser, add_data_options, parse_with_data
from .embed import SPLITS, add_encoding_options, check_agreement, check_split, prepared_batches
from .runs import find_checkpoint, read_rows

if TYPE_CHECKING:
    from ...datamodules import ArrayDataModule
    from ..plots.report import Curve, Map, Report, Sample

_SHOWN = 12  # samples of a kind
_CRITICAL = 4  # clouds whose critical points are drawn
_LARGEST = 4 << 20  # bytes of a picture of the run, at most
_LOG_ONLY = ("--log_only", "--log-only")
_FLAGS = (*_LOG_ONLY, "--overwrite")
_SETTINGS = ("seed_everything", "trainer.max_epochs", "trainer.max_steps", "trainer.precision", "trainer.accumulate_grad_batches")


class _Seen(NamedTuple):
    """What a model says of the samples of a split: `(N, ...)` each; None where it says no such thing."""

    probability: np.ndarray | None
    features: np.ndarray | None
    label: np.ndarray
    index: np.ndarray  # type: ignore[assignment]  # hides tuple.index, which nobody needs here


def report(arguments: list[str]) -> int:
    """Write one self-contained page about a run: metrics, curves, confusion matrix, scores of the classes, a map of the features, the best,
    the worst and the most confidently wrong predictions, critical points of clouds, the run's pictures, configuration and environment.

    Args:
        arguments: the command line.

    Returns:
        The exit status.

    Raises:
        CommandError: if there is no such run, its checkpoint or its data cannot be read, or the page exists already.

    Example:
        >>> report(["runs/classifier_digits", "--output", "report.html"])
        0
    """
    from ..plots.projection import Method, check_method
    from ..plots.report import write_report_html

    parser = Parser(prog="litzoo report", description="One self-contained page about a run of `litzoo fit`; it needs no network.")
    parser.add_argument("run", metavar="RUN", type=str, help="a folder runs/NAME/version_N, or runs/NAME or NAME for the newest of it")
    parser.add_argument("--checkpoint", type=str, default="best", help="best, last, or a .ckpt file")
    parser.add_argument("--split", default="val", choices=SPLITS, help="which samples are predicted; choose nothing by the test split")
    parser.add_argument("--method", default="tsne", choices=[*get_args(Method), "none"], help="how features are drawn in a plane")
    parser.add_argument("--samples", type=int, default=1500, help="the most to draw in the plane")
    parser.add_argument(
        "--log_only", "--log-only", action="store_true", help="curves, pictures and configuration, without loading model and data"
    )
    parser.add_argument("--output", type=Path, default=None, help="the .html file to write; by default report.html in the run's folder")
    parser.add_argument("--overwrite", action="store_true", help="replace a page that exists")
    add_data_options(parser)
    add_encoding_options(parser)
    options, data = parse_with_data(parser, [*arguments, *_data_of_run(arguments)], "without --log_only, litzoo report takes")
    run = _run_at(options.run)
    if run is None:
        close = difflib.get_close_matches(options.run, [path.name for path in Path("runs").glob("*/")], n=1)
        raise CommandError(
            f"there is no run {options.run}: did you mean {close[0]}?"
            if close
            else f"there is no run {options.run}: give a folder that `litzoo fit` wrote, such as runs/classifier_digits/version_0"
        )
    output: Path = options.output or run / "report.html"
    if output.suffix.lower() not in (".html", ".htm"):
        raise CommandError(f"--output {output}: give a name that ends in .html")
    if output.exists() and not options.overwrite:
        raise CommandError(f"{output} exists already: replace it with --overwrite, or choose another name with --output FILE")
    if options.samples < 2:
        raise CommandError(f"--samples must be at least 2, got {options.samples}")
    if options.method != "none":
        check_method(options.method)
    page = _from_log(run)
    page.pictures = {_title(path, run): path.read_bytes() for path in _newest_pictures(run)}
    if not options.log_only:
        if data is None:
            raise CommandError(f"{run} has no config.yaml that tells its data: say which with --data CLASS, or add --log_only")
        check_split(data, options.split)
        _add_model(page, run, data, options)
    write_report_html(output, page)
    print(f"{output} ({output.stat().st_size / 1e6:.1f} MB)")
    return 0


def _data_of_run(arguments: list[str]) -> list[str]:
    """The option that takes the data from the run's configuration, which the command line may change, unless it names others or needs none."""
    if any(is_config(argument) or argument.partition("=")[0] in ("--data", *_LOG_ONLY) for argument in arguments):
        return []
    # Not behind an option, whose value it would be.
    positions = (
        argument
        for before, argument in pairwise(["", *arguments])
        if not argument.startswith("-") and ("=" in before or before in _FLAGS or not before.startswith("-"))
    )
    run = _run_at(next(positions, ""))
    return ["--config", str(run / "config.yaml")] if run is not None and (run / "config.yaml").is_file() else []


def _run_at(name: str) -> Path | None:
    """The folder of a run, by its path or by the name of its recipe; None if there is none."""
    for folder in (Path(name), Path("runs") / name) if name else ():
        if (folder / "metrics.csv").is_file():
            return folder
        runs = [path.parent for path in folder.glob("version_*/metrics.csv")]
        if runs:
            return max(runs, key=lambda path: (path / "metrics.csv").stat().st_mtime)
    return None


# What the log tells


def _from_log(run: Path) -> "Report":
    from ..plots.report import Report, Table

    rows = read_rows(run / "metrics.csv")
    if not rows:
        raise CommandError(f"{run / 'metrics.csv'} is empty: the run logged nothing yet")
    config = (run / "config.yaml").read_text(encoding="utf-8") if (run / "config.yaml").is_file() else ""
    try:
        settings = yaml.safe_load(config) or {}
    except yaml.YAMLError as error:
        raise CommandError(f"{run / 'config.yaml'} is not valid YAML: {error}") from error
    curves, axis = _curves(rows)
    epochs = {row["epoch"] for row in rows if "epoch" in row}
    names = [str(_get(settings, f"{part}.class_path") or "").rpartition(".")[2] for part in ("model", "data")]
    what = " on ".join(filter(None, names))
    resolved = run.resolve()
    page = Report(
        title=f"{resolved.parent.name}, {resolved.name}",
        subtitle=" · ".join(filter(None, [what, f"{len(epochs)} epochs" if len(epochs) > 1 else "", _duration(run)])),
        curves=curves,
        axis=axis,
        config=config,
        environment=Table((), _environment()),
    )
    tests = sorted(run.glob("test_*/metrics.csv"), key=lambda path: path.stat().st_mtime)
    tested = read_rows(tests[-1]) if tests else []
    if tested:
        values = {key: float(value) for key, value in tested[-1].items() if "/" in key}
        page.metrics = {f"as `litzoo test` scored it ({tests[-1].parent.name})": values}
    else:
        last = {key: points[-1] for chart in curves.values() for key, (_, points) in chart.items() if key.startswith(("val/", "train/"))}
        page.metrics = {"last values of the log": last}
    chosen = [(name, _get(settings, name)) for name in (*_SETTINGS, *_paths(settings))]
    facts = [(name, _shown(value)) for name, value in chosen if value not in (None, -1)]
    page.settings = Table((), facts) if facts else None
    return page


def _get(settings: Any, name: str) -> Any:
    for part in name.split("."):
        settings = settings.get(part) if isinstance(settings, Mapping) else None
    return settings


def _paths(settings: Any) -> list[str]:
    """Names of the settings of model and data that are numbers, words or short lists."""
    found = []
    for part in ("model", "data"):
        found.append(f"{part}.class_path")
        values = _get(settings, f"{part}.init_args")
        for name, value in values.items() if isinstance(values, Mapping) else ():
            if isinstance(value, Mapping) and "class_path" in value:
                found += [f"{part}.init_args.{name}.class_path", f"{part}.init_args.{name}.init_args.lr"]
            elif isinstance(value, (str, int, float)) and not isinstance(value, bool):
                found.append(f"{part}.init_args.{name}")
    return found


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _curves(rows: list[dict[str, str]]) -> tuple[dict[str, dict[str, "Curve"]], str]:
    """Charts by what is measured: `train/loss` and `val/loss` in one; over epochs where all have them, else over steps."""
    values = [{key: _float(value) for key, value in row.items()} for row in rows]
    names = sorted({key for row in values for key in row} - {"epoch", "step"})
    names.sort(
        key=lambda name: (name.rpartition("/")[2] != "loss", "accuracy" not in name, name.startswith("lr-"), name.rpartition("/")[2])
    )
    epochs = {row["epoch"] for row in values if "epoch" in row}
    axis = "epoch" if len(epochs) > 1 else "step"
    charts: dict[str, dict[str, Curve]] = {}
    for name in names:
        points = [(row["step"], row[name]) for row in values if name in row and "step" in row]
        if axis == "epoch":
            places = _epoch_of([step for step, _ in points], values)
            points = [(place, value) for place, (_, value) in zip(places, points, strict=True)]
        if any(np.isfinite(value) for _, value in points):
            charts.setdefault(name.rpartition("/")[2], {})[name] = tuple(zip(*points, strict=True))  # type: ignore[assignment]  # two columns
    return charts, axis


def _epoch_of(steps: list[float], rows: list[dict[str, float]]) -> list[float]:
    """Where steps lie on the axis of epochs: the last row of epoch e is at e + 1, rows within an epoch, such as learning rates, between."""
    ends: dict[float, float] = {}
    for row in rows:
        if "epoch" in row and "step" in row:
            ends[row["epoch"]] = max(row["step"], ends.get(row["epoch"], -1.0))
    epochs = sorted(ends)
    known, places = [-1.0, *(ends[epoch] for epoch in epochs)], [epochs[0], *(epoch + 1 for epoch in epochs)]
    # An epoch that was not finished has the pace of those before.
    pace = (places[-1] - places[0]) / max(known[-1] + 1, 1.0)
    return [float(np.interp(step, known, places) + pace * max(step - known[-1], 0.0)) for step in steps]


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


def _duration(run: Path) -> str:
    """When the run was, and for how long it wrote its log."""
    begin = run / "config.yaml"
    if not begin.is_file():
        return ""
    start, end = (path.stat().st_mtime for path in (begin, run / "metrics.csv"))
    minutes = (end - start) / 60
    took = f", {minutes:.0f} min" if minutes >= 1.5 else f", {60 * minutes:.0f} s" if minutes > 0 else ""
    return f"{datetime.fromtimestamp(start):%Y-%m-%d %H:%M}{took}"


def _environment() -> list[tuple[str, str]]:
    """Of the machine that writes the page."""
    from importlib.metadata import PackageNotFoundError, version

    from ... import __version__

    facts = [("litzoo", __version__), ("Python", platform.python_version())]
    for name in ("torch", "lightning", "torchvision", "torchmetrics", "timm", "numpy"):
        try:
            facts.append((name, version(name)))
        except PackageNotFoundError:
            continue
    facts.append(("system", platform.platform()))
    processor = next(
        (line.partition(":")[2].strip() for line in _lines(Path("/proc/cpuinfo")) if line.startswith("model name")), platform.processor()
    )
    facts.append(("processor", f"{processor}, {os.cpu_count()} cores"))
    if torch.cuda.is_available():
        facts.append(("GPU", torch.cuda.get_device_name()))
    return facts


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []


# What the model says


def _add_model(page: "Report", run: Path, data: "ArrayDataModule", options: Any) -> None:
    from ..pretrained import load_model

    checkpoint = _checkpoint(run, options.checkpoint)
    model = load_model(checkpoint, options.device)
    check_agreement(model, str(checkpoint), data)
    named = list(getattr(model, "class_names", data.class_names))
    if named != data.class_names:
        raise CommandError(
            f"{checkpoint} knows the classes {_list(named)}, but those of {type(data).__name__} are {_list(data.class_names)}: give the data "
            "of the run, or add --log_only"
        )
    seen = _see(model, data, options)
    page.class_names = data.class_names
    page.split = f"{len(seen.label):,} {options.split} samples, {checkpoint.name}, in float32"
    if seen.probability is not None and (seen.label >= 0).any():
        _add_predictions(page, seen, data)
    if seen.features is not None and options.method != "none":
        page.map = _map(seen, options)
    if hasattr(data, "normalization") and seen.probability is not None:
        png = _critical(model, data, seen)
        if png is not None:
            page.pictures = {"Critical points of some objects: without all others, the class stays the same": png, **page.pictures}


def _list(names: list[str]) -> str:
    return ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")


def _checkpoint(run: Path, which: str) -> Path:
    if which not in ("best", "last"):
        path = Path(which)
        if not path.is_file():
            raise CommandError(f"--checkpoint {which}: there is no such file; say best, last, or a .ckpt file")
        return path
    if not (run / "checkpoints" / "last.ckpt").is_file():
        raise CommandError(f"{run} has no checkpoints/last.ckpt yet: name a file with --checkpoint, or add --log_only")
    place = run.resolve()  # of the folder "." too
    return find_checkpoint(place.parent, which, glob.escape(place.name))


def _see(model: Any, data: "ArrayDataModule", options: Any) -> _Seen:
    """One pass over the samples as they are."""
    # What names parts classifies points.
    classifies = hasattr(model, "class_names") and not hasattr(model, "part_names")
    probabilities, features, labels, indices = [], [], [], []
    for batch, inputs in prepared_batches(model, data, options.split, options.batch_size):
        labels.append(batch.label.long().clamp(min=-1).numpy())
        indices.append(batch.index.numpy())
        with torch.no_grad():
            if callable(getattr(model, "encode", None)):
                features.append(model.encode(inputs).float().cpu().numpy())
            if classifies:
                logits = model(inputs)
                classifies = isinstance(logits, torch.Tensor) and logits.shape == (len(inputs), len(data.class_names))
                probabilities.append(logits.float().softmax(dim=1).cpu().numpy() if classifies else np.empty(0))
    label, index = np.concatenate(labels), np.concatenate(indices)
    flat = bool(features) and all(part.ndim == 2 for part in features)
    seen = _Seen(np.concatenate(probabilities) if classifies else None, np.concatenate(features) if flat else None, label, index)
    for values in (seen.probability, seen.features):
        bad = 0 if values is None else int((~np.isfinite(values)).any(axis=1).sum())
        if bad:
            raise CommandError(
                f"the model gives other than finite numbers for {bad:,} of {len(label):,} {options.split} samples, its training diverged: "
                "choose another --checkpoint, or add --log_only"
            )
    return seen


def _add_predictions(page: "Report", seen: _Seen, data: "ArrayDataModule") -> None:
    from ..functional.confusion import confusion_matrix, per_class_scores
    from ..plots.report import Table

    assert seen.probability is not None
    known = seen.label >= 0
    probability, label, index = seen.probability[known], seen.label[known], seen.index[known]
    guess = probability.argmax(axis=1)
    matrix = confusion_matrix(torch.from_numpy(guess), torch.from_numpy(label), len(data.class_names))
    scores = per_class_scores(matrix)
    page.confusion = matrix.numpy()
    columns = [scores.precision.tolist(), scores.recall.tolist(), scores.f1.tolist(), scores.samples.tolist()]
    page.classes = Table(("class", "precision", "recall", "F1", "samples"), list(zip(data.class_names, *columns, strict=True)))
    page.metrics = {
        page.split: {"accuracy": float((guess == label).mean()), "mean class accuracy": float(scores.recall[scores.samples > 0].mean())},
        **page.metrics,
    }
    own, right = probability[np.arange(len(label)), label], guess == label
    orders = {
        "Most confidently wrong": [row for row in np.argsort(-probability.max(axis=1), kind="stable") if not right[row]],
        "Worst: the least probability for the own class": list(np.argsort(own, kind="stable")),
        "Best: the most probability for the own class": [row for row in np.argsort(-own, kind="stable") if right[row]],
    }
    samples = {}
    for title, order in orders.items():
        chosen = order[:_SHOWN]
        samples[title] = [
            _sample(data, int(index[row]), data.class_names[label[row]], data.class_names[guess[row]], own[row], probability[row].max())
            for row in chosen
        ]
    page.samples = {title: cards for title, cards in samples.items() if cards}


def _sample(data: "ArrayDataModule", index: int, given: str, guess: str, own: float, best: float) -> "Sample":
    from ..plots.report import Sample
    from ..plots.review import sample_picture

    png, text = sample_picture(data.arrays, index, 224)
    number = f"number {index}" + (f": {text}" if text else "")
    if given == guess:
        return Sample(png, given, f"{100 * own:.1f} %, {number}")
    return Sample(png, f"{given}, taken for {guess}", f"{100 * own:.1f} % against {100 * best:.1f} %, {number}")


def _map(seen: _Seen, options: Any) -> "Map | None":
    from ..functional.subsets import stratified_subset
    from ..plots.embedding import describe
    from ..plots.projection import judge_neighbours, project
    from ..plots.report import Map

    assert seen.features is not None
    label = torch.from_numpy(seen.label)
    precision = judge_neighbours(torch.from_numpy(seen.features), label).precision
    chosen = stratified_subset(label, options.samples, 0).numpy()
    place = project(seen.features[chosen], options.method)
    return Map(place, seen.label[chosen], describe(options.method, len(chosen), len(label), f"{options.split} samples", precision))


def _critical(model: Any, data: "ArrayDataModule", seen: _Seen) -> bytes | None:
    """Of one object each of some classes, where the model is a PointNet that classifies."""
    import io

    from ...datamodules.arrays import ArrayDataset
    from ..critical_sets import critical_points
    from ..plots.critical_points import plot_critical_points
    from ..pointnet import PointNetClassifier

    if not isinstance(model, PointNetClassifier):
        return None
    firsts = np.unique(seen.label, return_index=True)[1][:_CRITICAL].tolist()
    assert seen.probability is not None
    batch = data.transform(ArrayDataset(data.arrays, None)[0, seen.index[firsts].tolist()])
    clouds = batch.input.to(next(model.parameters()).device)
    chosen = [points.cpu().numpy() for points in critical_points(model, clouds)]
    guesses = [seen.probability[row] for row in firsts]
    titles = [f"{data.class_names[guess.argmax()]}\n{100 * guess.max():.0f} %" for guess in guesses]
    content = io.BytesIO()
    plot_critical_points(list(clouds.cpu().numpy()), chosen, None, titles).savefig(content, format="png", dpi=110)
    return content.getvalue()


def _newest_pictures(run: Path) -> list[Path]:
    """The last picture of each kind that callbacks drew: of those whose names differ in numbers alone."""
    newest: dict[tuple[Path, str], Path] = {}
    for path in sorted(run.rglob("*.png"), key=lambda path: (path.stat().st_mtime, path)):
        newest[path.parent, re.sub(r"\d+", "", path.stem)] = path
    return sorted(path for path in newest.values() if path.stat().st_size <= _LARGEST)


def _title(path: Path, run: Path) -> str:
    return " ".join(path.relative_to(run).with_suffix("").parts).replace("_", " ")
