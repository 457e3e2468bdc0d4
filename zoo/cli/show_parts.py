"""`litzoo show parts`: the parts that a trained segmenter finds in clouds, as a picture, an interactive page and PLY files."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jsonargparse import ArgumentParser

from . import CommandError
from .cloud_files import StoredCloud, add_cloud_options, check_cloud_options, read_cloud_files
from .segmenters import class_of, given_class, is_segmenter, short_names

if TYPE_CHECKING:
    from ..pointnet_segmenter import PointNetSegmenter


class _Found(NamedTuple):
    """What there is to draw of one cloud, in the coordinates of its file."""

    name: str
    class_name: str
    cloud: np.ndarray
    part: np.ndarray


def show_parts(parser: ArgumentParser, arguments: list[str]) -> int:
    """Draw clouds, coloured by the parts that a model finds.

    Args:
        parser: an empty one, which gets the options.
        arguments: files and options.

    Returns:
        The exit status.

    Raises:
        CommandError: if a file is missing or broken, the model is no PointNet segmenter, or the class of a cloud is not known.

    Example:
        >>> show_parts(ArgumentParser(), ["chair.obj", "--model", "pointnet_seg_psb", "--class", "Chair", "--html"])
        0
    """
    add_cloud_options(parser)
    parser.add_argument("--class", type=str, help="what all of the clouds are, a class of the model; by default what HDF5 files tell")
    parser.add_argument("--ply", action="store_true", help="also write NAME_parts.ply of each cloud, its points coloured by part")
    parser.add_argument("--html", action="store_true", help="also write parts.html, a page to turn the clouds in a browser")
    options = parser.parse_args(arguments)
    check_cloud_options(options)

    model = _model(options.model)
    given = given_class(options["class"], model, options.model)
    clouds = read_cloud_files(options, model.class_names if given is None else [model.class_names[given]])
    classes = [class_of(cloud.name, cloud.class_name, given, model, options.model) for cloud in clouds]
    names = short_names(model.part_names, model.class_names)
    found = [_look(model, cloud, cls, names) for cloud, cls in zip(clouds, classes, strict=True)]
    _write(found, names, options)
    return 0


def _model(name: str) -> "PointNetSegmenter":
    from ..pretrained import load_model

    model: Any = load_model(name)
    if not is_segmenter(model):
        raise CommandError(f"{name} is a {type(model).__name__}; parts are what a PointNetSegmenter finds, such as pointnet_seg_psb")
    return model


def _look(model: "PointNetSegmenter", cloud: StoredCloud, cls: int, names: list[str]) -> _Found:
    part = model.predict(torch.from_numpy(cloud.points)[None], torch.tensor([cls]))[0].cpu().numpy()
    present, count = np.unique(part, return_counts=True)
    shares = ", ".join(f"{names[each]} {share:.1%}" for each, share in zip(present, count / len(part), strict=True))
    print(f"{cloud.name}: {model.class_names[cls]} of {len(part):,} points, {shares}")
    return _Found(cloud.name, model.class_names[cls], cloud.points, part)


def _write(found: list[_Found], names: list[str], options: Any) -> None:
    from ..plots.exchange import PartScene, write_html, write_ply
    from ..plots.figures import save_figure
    from ..plots.parts import plot_parts
    from ..plots.point_clouds import part_palette

    written = [options.output / "parts.png"]
    titles = [f"{each.name}\n{each.class_name}" for each in found]
    save_figure(plot_parts([each.cloud for each in found], [each.part for each in found], titles, names), written[0])
    if options.html:
        written.append(options.output / "parts.html")
        write_html(written[-1], [PartScene(*each, names) for each in found], f"Parts by {Path(options.model).stem}")
    if options.ply:
        for each in found:
            written.append(options.output / f"{each.name}_parts.ply")
            write_ply(written[-1], each.cloud, part_palette(len(names))[each.part])
    print(", ".join(map(str, written[:4])) + (f" and {len(written) - 4} more" if len(written) > 4 else ""))
