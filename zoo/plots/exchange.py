"""Point clouds for other programs: PLY files for mesh viewers, one HTML page for browsers."""

import base64
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ..files import write_file
from .critical_points import body_of, shape_of
from .pages import write_page
from .point_clouds import cloud_of, part_palette


class Scene(NamedTuple):
    """One object of an interactive page, with its critical set.

    Args:
        name: of the object.
        note: beside the name, such as the predicted class.
        points: `(N, 3)`.
        critical: `(K,)` indices of the critical points.
        upper: the upper-bound shape `(L, 3)`, or None.
    """

    name: str
    note: str
    points: np.ndarray
    critical: np.ndarray
    upper: np.ndarray | None


class PartScene(NamedTuple):
    """One object of an interactive page, its points coloured by part as `plot_parts` does.

    Args:
        name: of the object.
        note: beside the name, such as its class.
        points: `(N, 3)`.
        part: `(N,)` the part of each point.
        part_names: name of each part.
    """

    name: str
    note: str
    points: np.ndarray
    part: np.ndarray
    part_names: Sequence[str]


def write_ply(path: str | os.PathLike[str], points: np.ndarray, colors: np.ndarray | None = None) -> None:
    """Write a cloud as binary little-endian PLY, which MeshLab, Blender, CloudCompare and open3d read.

    Args:
        path: a `.ply` file; its folder is made.
        points: `(N, 3)`, stored as float32; N may be 0.
        colors: `(N, 3)` or `(3,)` numbers in [0, 1], stored as bytes; None stores none.

    Raises:
        ValueError: if the points or the colours have another shape.

    Example:
        >>> write_ply("chair.ply", np.random.rand(512, 3), np.array([0.2, 0.4, 0.7]))
    """
    cloud = np.asarray(points, dtype="<f4")
    if cloud.ndim != 2 or cloud.shape[1] != 3:
        raise ValueError(f"a cloud must have shape (points, 3), got {cloud.shape}")
    if colors is not None and np.shape(colors) not in ((3,), cloud.shape):
        raise ValueError(f"a cloud of shape {cloud.shape} needs colours of the same shape or one of shape (3,), got {np.shape(colors)}")
    fields = [(name, "<f4") for name in "xyz"] + ([] if colors is None else [(name, "u1") for name in ("red", "green", "blue")])
    vertices = np.zeros(len(cloud), dtype=fields)
    for axis, name in enumerate("xyz"):
        vertices[name] = cloud[:, axis]
    if colors is not None:
        shades = np.broadcast_to(np.rint(255 * np.clip(colors, 0, 1)), cloud.shape)
        for channel, name in enumerate(("red", "green", "blue")):
            vertices[name] = shades[:, channel]
    properties = [f"property {'float' if kind == '<f4' else 'uchar'} {name}" for name, kind in fields]
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(cloud)}", *properties, "end_header"]
    write_file(path, "\n".join(header).encode() + b"\n" + vertices.tobytes())


def write_html(path: str | os.PathLike[str], scenes: Sequence[Scene | PartScene], title: str = "Critical points") -> None:
    """Write one page that shows clouds with critical sets and upper-bound shapes, or with parts, to turn and zoom by mouse, finger and keyboard.

    The page holds everything that it needs, loads nothing, and works from a disk without a network. Coordinates are stored in 16
    bits, about 1/30,000 of the size of an object.

    Args:
        path: a `.html` file; its folder is made.
        scenes: the objects, in the order of their buttons.
        title: of the page.

    Raises:
        ValueError: if there is no object, or a cloud has another shape.

    Example:
        >>> cloud = np.random.rand(512, 3)
        >>> write_html("chair.html", [Scene("chair.npy", "chair 98 %", cloud, np.arange(60), None)])
    """
    if not scenes:
        raise ValueError("a page needs at least one object")
    write_page(path, "viewer.html", {"objects": [_object(scene) for scene in scenes]}, title=title)


def _object(scene: Scene | PartScene) -> dict[str, Any]:
    cloud = cloud_of(scene.points)
    upper = None if isinstance(scene, PartScene) or scene.upper is None else shape_of(scene.upper)
    whole = cloud if upper is None else np.concatenate([cloud, upper])
    low, high = whole.min(axis=0), whole.max(axis=0)
    middle = (low + high) / 2
    # The farthest point lies on the unit sphere, so that nothing leaves the picture while it turns.
    reach = max(float(np.linalg.norm(whole - middle, axis=1).max()), 1e-12)

    def layer(kind: str, name: str, points: np.ndarray, radius: float, **more: Any) -> dict[str, Any]:
        bits = np.rint((points - middle) / reach * 32767).astype("<i2").tobytes()
        return {
            "kind": kind,
            "name": name,
            "count": len(points),
            "radius": round(radius, 5),
            "points": base64.b64encode(bits).decode(),
            **more,
        }

    dot = 0.011 * min(1.5, (2048 / len(cloud)) ** 0.5)
    if isinstance(scene, PartScene):
        palette = np.rint(255 * part_palette(len(scene.part_names))).astype(int).tolist()
        part = np.asarray(scene.part)
        layers = [
            layer(f"part {each}", str(scene.part_names[each]), cloud[part == each], 1.4 * dot, color=palette[each])
            for each in np.unique(part).tolist()
        ]
    else:
        layers = [layer("full", "all points", cloud, dot), layer("critical", "critical set", cloud[np.asarray(scene.critical)], dot)]
        if upper is not None and len(upper):
            layers.append(layer("upper", "upper bound", upper, 0.75 * body_of(upper)[1] / reach))
    return {"name": scene.name, "note": scene.note, "middle": middle.tolist(), "reach": reach, "layers": layers}
