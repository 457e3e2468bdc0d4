"""`litzoo show critical`: the points of a cloud that decide a PointNet's prediction, as pictures, an interactive page and PLY files."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jsonargparse import ArgumentParser

from . import CommandError
from .cloud_files import StoredCloud, add_cloud_options, check_cloud_options, read_cloud_files

if TYPE_CHECKING:
    from ..pointnet import PointNetClassifier


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
    add_cloud_options(parser)
    parser.add_argument("--resolution", type=int, default=64, help="grid points along each edge for the upper bound")
    parser.add_argument("--renderer", default="matplotlib", choices=["matplotlib", "open3d"], help="what draws critical_points.png")
    parser.add_argument("--ply", action="store_true", help="also write NAME_full.ply, NAME_critical.ply and NAME_upper.ply of each cloud")
    parser.add_argument("--html", action="store_true", help="also write critical_points.html, a page to turn the clouds in a browser")
    options = parser.parse_args(arguments)
    if options.resolution < 2:
        raise CommandError(f"--resolution must be at least 2, got {options.resolution}")
    check_cloud_options(options)

    model = _model(options.model)
    found = [_look(model, cloud, options.resolution) for cloud in read_cloud_files(options)]
    _write(found, options)
    return 0


def _model(name: str) -> "PointNetClassifier":
    from ..pointnet import PointNetClassifier
    from ..pretrained import load_model

    model: Any = load_model(name)
    if not isinstance(model, PointNetClassifier):
        raise CommandError(f"{name} is a {type(model).__name__}; critical points are those of a PointNetClassifier")
    return model.eval()


# Looking


def _look(model: "PointNetClassifier", stored: StoredCloud, resolution: int) -> _Found:
    from ..critical_sets import critical_points, upper_bound_points
    from ..functional.points import normalize_points

    name, cloud, _ = stored
    raw = torch.from_numpy(cloud)[None]
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
