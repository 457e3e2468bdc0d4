"""Critical sets of point clouds and the shapes that bound them, as a picture."""

from collections.abc import Sequence

import numpy as np
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure

from .point_clouds import DEPTH, caption, cloud_of, cloud_table, dot_area, draw_cloud, frame_of

# From far to near.
PALE = LinearSegmentedColormap.from_list("pale", ["#eef1f4", "#d5dbe1"])
CRITICAL = LinearSegmentedColormap.from_list("critical", ["#f0a080", "#d9492f", "#8f1414"])
# From dark to bright: the upper bound is a body in the light.
_BODY = LinearSegmentedColormap.from_list("body", ["#12352d", "#2c7a63", "#5fb592", "#d3efdf"])
_LIGHT = np.array([-0.15, 0.75, 0.65]) / np.linalg.norm([-0.15, 0.75, 0.65])
_SIDE = 2.3  # inches of a picture


def plot_critical_points(
    clouds: Sequence[np.ndarray] | np.ndarray,
    critical: Sequence[np.ndarray],
    upper: Sequence[np.ndarray] | None,
    titles: Sequence[str],
    pictures: Sequence[Sequence[np.ndarray]] | None = None,
) -> Figure:
    """Draw a row for each cloud: all its points, the critical ones over the pale cloud, and the upper-bound shape; +y up.

    The pictures of a row share view and scale, and a line under each tells how many points it has.

    Args:
        clouds: M clouds `(N, 3)`.
        critical: M arrays `(K,)` of indices into the cloud.
        upper: M shapes `(L, 3)`, of which one may be empty; None leaves the column out.
        titles: M titles, for the left edge; may have several lines, such as the predicted class and its probability.
        pictures: M times 3 square images `(S, S, 3)`, two without `upper`, that were drawn elsewhere and take the place of the dots;
            each shows what `frame_of` holds.

    Returns:
        The figure.

    Raises:
        ValueError: if a cloud has another shape, or there are more or fewer sets, shapes, titles or pictures than clouds.

    Example:
        >>> cloud = np.random.rand(512, 3)
        >>> plot_critical_points([cloud], [np.arange(60)], None, ["chair\\n98 %"])
    """
    number = len(clouds)
    lengths = {len(values) for values in (critical, titles, upper, pictures) if values is not None}
    if number == 0 or lengths != {number}:
        raise ValueError(
            f"every cloud needs its critical set, its shape and a title: there are {number} clouds and {sorted(lengths)} of these"
        )
    whole = [cloud_of(cloud) for cloud in clouds]
    shapes = None if upper is None else [shape_of(shape) for shape in upper]
    frames = [frame_of(cloud) if shapes is None else frame_of(cloud, shapes[row]) for row, cloud in enumerate(whole)]
    headers = ["all points", "critical set", *([] if shapes is None else ["upper bound"])]
    figure, table = cloud_table(titles, headers, frames, side=_SIDE)
    for row, (cloud, chosen, frame, axes) in enumerate(zip(whole, critical, frames, table, strict=True)):
        caption(axes[0], f"{len(cloud):,} points")
        caption(axes[1], f"{len(chosen):,} points, {len(chosen) / len(cloud):.0%}")
        if shapes is not None:
            caption(axes[2], f"{len(shapes[row]):,} grid points")
        if pictures is not None:
            for place, picture in zip(axes, pictures[row], strict=True):
                place.imshow(picture, extent=(0, 1, 0, 1), interpolation="antialiased")
            continue
        area = dot_area(len(cloud), _SIDE)
        draw_cloud(axes[0], cloud, frame, DEPTH, area)
        draw_cloud(axes[1], cloud, frame, PALE, area, hidden=1.0)
        draw_cloud(axes[1], cloud[np.asarray(chosen)], frame, CRITICAL, 2.2 * area, hidden=1.0)
        if shapes is not None and len(shapes[row]):
            colors, pitch = body_of(shapes[row])
            # Neighbours overlap, so that nothing shines through.
            draw_cloud(axes[2], shapes[row], frame, colors, (1.6 * pitch / (2 * frame.reach) * _SIDE * 72) ** 2, hidden=1.0)
    return figure


def shape_of(points: np.ndarray) -> np.ndarray:
    """An upper-bound shape as float64.

    Args:
        points: `(N, 3)`; N may be 0.

    Returns:
        `(N, 3)` float64.

    Example:
        >>> shape_of(np.zeros((0, 3))).shape
        (0, 3)
    """
    return np.asarray(points, dtype=np.float64).reshape(-1, 3)


def body_of(points: np.ndarray) -> tuple[np.ndarray, float]:
    """Colours of points that fill a body, as if light fell on it, and the distance between neighbours.

    The surface faces away from the mean of a point's neighbours, and is brightest where it faces the light.

    Args:
        points: `(N, 3)`.

    Returns:
        `(N, 4)` in [0, 1], and the distance.

    Example:
        >>> colors, pitch = body_of(np.random.rand(512, 3))
    """
    from sklearn.neighbors import NearestNeighbors

    distance, neighbours = NearestNeighbors(n_neighbors=min(60, len(points))).fit(points).kneighbors(points)
    outward = points - points[neighbours].mean(axis=1)
    outward /= np.maximum(np.linalg.norm(outward, axis=1, keepdims=True), 1e-12)
    body: Colormap = _BODY
    return body(0.5 + 0.5 * outward @ _LIGHT), float(np.median(distance[:, 1])) if len(points) > 1 else 0.03
