"""`litzoo show critical`: the points of a cloud that decide a PointNet's prediction, as pictures, an interactive page and PLY files."""

import itertools
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jsonargparse import ArgumentParser

from . import CommandError

if TYPE_CHECKING:
    from ..pointnet import PointNetClassifier

_HDF5 = (".h5", ".hdf5")
# Clouds of a file that holds many, where --index does not choose.
_CLOUDS = 5


class _Found(NamedTuple):
    """What there is to draw of one cloud, in the coordinates of the model."""

    name: str
    verdict: str
    cloud: np.ndarray
    critical: np.ndarray
    upper: np.ndarray


def show_critical(parser: ArgumentParser, arguments: list[str]) -> int:
    """Draw clouds, their critical sets and their upper-bound shapes.

    Args:
        parser: an empty one, which gets the options.
        arguments: files and options.

    Returns:
        The exit status.

    Raises:
        CommandError: if a file is missing or broken, or the model is no PointNet classifier.

    Example:
        >>> show_critical(ArgumentParser(), ["chair.obj", "--model", "pointnet_furniture", "--html"])
        0
    """
    from ...datamodules.meshes import SHAPE_SUFFIXES

    files = f"{', '.join(SHAPE_SUFFIXES)} or HDF5 files with `points`"
    parser.add_argument("files", metavar="FILE", nargs="+", type=Path, help=files)
    parser.add_argument("--model", type=str, required=True, help="a name of `litzoo list`, a .safetensors, a .ckpt or hf-hub:owner/repo")
    parser.add_argument("--output", type=Path, default=Path("."), help="folder of what is written")
    parser.add_argument("--index", type=int, nargs="+", help="which clouds of files that hold many; by default 5, of different classes")
    parser.add_argument("--points", type=int, default=2048, help="points of a mesh, and the most of a cloud; others are left out at random")
    parser.add_argument("--resolution", type=int, default=64, help="grid points along each edge for the upper bound")
    parser.add_argument("--up_axis", default="y", choices=["y", "z"], help="the axis of the files that points up")
    parser.add_argument("--renderer", default="matplotlib", choices=["matplotlib", "open3d"], help="what draws critical_points.png")
    parser.add_argument("--ply", action="store_true", help="also write NAME_full.ply, NAME_critical.ply and NAME_upper.ply of each cloud")
    parser.add_argument("--html", action="store_true", help="also write critical_points.html, a page to turn the clouds in a browser")
    options = parser.parse_args(arguments)
    for name, least in (("points", 1), ("resolution", 2)):
        if options[name] < least:
            raise CommandError(f"--{name} must be at least {least}, got {options[name]}")
    for path in options.files:
        if not path.is_file():
            raise CommandError(f"there is no file {path}")
        if path.suffix.lower() not in (*SHAPE_SUFFIXES, *_HDF5):
            raise CommandError(f"{path}: clouds are read from {files}")

    model = _model(options.model)
    clouds = _unique([pair for path in options.files for pair in _read(path, options)])
    found = [_look(model, name, cloud, options.resolution) for name, cloud in clouds]
    _write(found, options)
    return 0


def _model(name: str) -> "PointNetClassifier":
    from ..pointnet import PointNetClassifier
    from ..pretrained import load_model

    model: Any = load_model(name)
    if not isinstance(model, PointNetClassifier):
        raise CommandError(f"{name} is a {type(model).__name__}; critical points are those of a PointNetClassifier")
    return model.eval()


# Reading


def _read(path: Path, options: Any) -> list[tuple[str, np.ndarray]]:
    """Names and raw clouds of a file."""
    from ...datamodules.errors import DataError
    from ...datamodules.meshes import read_cloud, turn_up, why_unreadable

    try:
        if path.suffix.lower() in _HDF5:
            clouds = _from_hdf5(path, options.index)
        elif path.suffix.lower() == ".npy" and np.load(path, mmap_mode="r", allow_pickle=False).ndim == 3:
            array = np.load(path, allow_pickle=False)
            clouds = [(f"{path.stem}_{place}", array[place]) for place in _places(path, options.index, len(array), None)]
        else:
            if options.index is not None:
                raise CommandError(f"--index chooses among the clouds of a file, and {path} holds one")
            clouds = [(path.stem, read_cloud(path, options.points))]
    except (CommandError, DataError):
        raise
    except Exception as error:  # the libraries have no common class for what is wrong with a file
        raise CommandError(f"{path} cannot be read: {why_unreadable(error)}") from error
    for name, cloud in clouds:
        if cloud.ndim != 2 or cloud.shape[1] != 3 or len(cloud) == 0 or cloud.dtype.kind not in "fiu":
            raise CommandError(f"{path}: a cloud has shape (points, 3), {name} is {cloud.dtype} {cloud.shape}")
        if not np.isfinite(cloud).all():
            raise CommandError(f"{path} holds NaN or infinite coordinates: remove them")
    return [(name, turn_up(_thin(cloud.astype(np.float32), options.points), options.up_axis)) for name, cloud in clouds]


def _from_hdf5(path: Path, index: list[int] | None) -> list[tuple[str, np.ndarray]]:
    import h5py

    with h5py.File(path, "r") as file:
        if "points" not in file:
            raise CommandError(f"{path} has no data set `points`; it holds: {', '.join(file) or 'nothing'}")
        points, label = file["points"], file["label"][:] if "label" in file else None
        # A picture of what the model has learned by heart says little.
        test = file["split"][:] == 2 if "split" in file else None
        if label is not None and test is not None and test.any():
            label = np.where(test, label, -1)
        if points.ndim != 3:
            raise CommandError(f"{path}: `points` must have shape (clouds, points, 3), it has {points.shape}")
        # Behind a cloud's own points they come again, which would shift its mean.
        told = "count" in file and file["count"].shape == (len(points),)
        count = file["count"][:] if told else np.full(len(points), points.shape[1])
        return [(f"{path.stem}_{place}", points[place, : count[place]]) for place in _places(path, index, len(points), label)]


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
    return first[classes >= 0][:_CLOUDS].tolist()


def _thin(cloud: np.ndarray, points: int) -> np.ndarray:
    """At most that many points, in their order; which ones is the same every time."""
    if len(cloud) <= points:
        return cloud
    return cloud[np.sort(np.random.default_rng(0).permutation(len(cloud))[:points])]


def _unique(clouds: list[tuple[str, np.ndarray]]) -> list[tuple[str, np.ndarray]]:
    """Names are those of the files to write, so files of the same name in several folders get a number."""
    named: dict[str, np.ndarray] = {}
    for name, cloud in clouds:
        free = (name if number == 1 else f"{name}-{number}" for number in itertools.count(1))
        named[next(each for each in free if each not in named)] = cloud
    return list(named.items())


# Looking


def _look(model: "PointNetClassifier", name: str, cloud: np.ndarray, resolution: int) -> _Found:
    from ..critical_sets import critical_points, upper_bound_points
    from ..functional.points import normalize_points

    raw = torch.from_numpy(np.ascontiguousarray(cloud))[None]
    points = normalize_points(raw, model.normalization)
    critical, upper = critical_points(model, points)[0], upper_bound_points(model, points, resolution)[0]
    probabilities = model.predict(raw)[0]
    best = int(probabilities.argmax())
    verdict = f"{model.class_names[best]} {probabilities[best]:.0%}"
    print(f"{name}: {verdict}, {len(critical):,} of {len(cloud):,} points are critical, {len(upper):,} grid points could be added")
    return _Found(name, verdict, points[0].numpy(), critical.numpy(), upper.numpy())


# Writing


def _write(found: list[_Found], options: Any) -> None:
    from ..plots.critical_points import plot_critical_points
    from ..plots.exchange import Scene, write_html, write_ply
    from ..plots.figures import save_figure

    clouds, critical, upper = ([getattr(each, name) for each in found] for name in ("cloud", "critical", "upper"))
    pictures = None
    if options.renderer == "open3d":
        from ..plots.open3d_pictures import RenderingError, render_with_open3d

        try:
            pictures = render_with_open3d(clouds, critical, upper)
        except RenderingError as error:
            print(f"litzoo: {error}; matplotlib draws instead", file=sys.stderr)
    titles = [f"{each.name}\n{each.verdict}" for each in found]
    written = [options.output / "critical_points.png"]
    save_figure(plot_critical_points(clouds, critical, upper, titles, pictures), written[0])
    if options.html:
        written.append(options.output / "critical_points.html")
        write_html(written[-1], [Scene(*each) for each in found], f"Critical points of {Path(options.model).stem}")
    if options.ply:
        for each in found:
            colored = ((each.cloud, (0.18, 0.44, 0.70)), (each.cloud[each.critical], (0.82, 0.23, 0.14)), (each.upper, (0.31, 0.66, 0.53)))
            for kind, (points, color) in zip(("full", "critical", "upper"), colored, strict=True):
                written.append(options.output / f"{each.name}_{kind}.ply")
                write_ply(written[-1], points, np.array(color))
    print(", ".join(map(str, written[:4])) + (f" and {len(written) - 4} more" if len(written) > 4 else ""))
