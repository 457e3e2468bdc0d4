"""Point clouds as a sheet of pictures."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from .figures import INK, new_figure

_YAW, _PITCH = np.deg2rad(35.0), np.deg2rad(20.0)


def _view(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Project `(N, 3)`, +y up, as seen from the front, a little from the side and above: `(N, 2)` and depth `(N,)`."""
    x, y, z = points.T
    x, z = np.cos(_YAW) * x + np.sin(_YAW) * z, -np.sin(_YAW) * x + np.cos(_YAW) * z
    y, z = np.cos(_PITCH) * y - np.sin(_PITCH) * z, np.sin(_PITCH) * y + np.cos(_PITCH) * z
    return np.stack([x, y], axis=1), z


def plot_point_clouds(
    clouds: Sequence[np.ndarray] | np.ndarray, titles: Sequence[str], colors: Sequence[np.ndarray] | None = None, columns: int | None = None
) -> Figure:
    """Draw clouds side by side, +y up; near points are drawn large and dark, far ones small and pale.

    Args:
        clouds: M clouds `(N, 3)`.
        titles: M titles.
        colors: M arrays `(N,)` of values to colour the points by, or None to shade them by depth.
        columns: clouds in a row; by default as many as make the sheet about 3:2.

    Returns:
        The figure.

    Example:
        >>> plot_point_clouds(np.random.rand(4, 512, 3), ["a", "b", "c", "d"])
    """
    number = len(clouds)
    columns = columns or max(1, min(number, round((1.5 * number) ** 0.5)))
    rows = -(-number // columns)
    figure = new_figure(1.55 * columns, 1.75 * rows)
    for position, (cloud, title) in enumerate(zip(clouds, titles, strict=True)):
        points, depth = _view(np.asarray(cloud, dtype=np.float64))
        order = np.argsort(depth)
        points, depth = points[order], depth[order]
        near = (depth - depth.min()) / max(float(np.ptp(depth)), 1e-12)
        values = near if colors is None else np.asarray(colors[position])[order]
        axes = figure.add_subplot(rows, columns, position + 1)
        colormap = "viridis_r" if colors is None else "tab20"
        axes.scatter(points[:, 0], points[:, 1], c=values, cmap=colormap, s=0.6 + 2.4 * near, alpha=0.85, linewidths=0, rasterized=True)
        middle = (points.max(axis=0) + points.min(axis=0)) / 2
        reach = max(float(np.ptp(points, axis=0).max()) / 2, 1e-12) * 1.05
        axes.set_xlim(middle[0] - reach, middle[0] + reach)
        axes.set_ylim(middle[1] - reach, middle[1] + reach)
        axes.set_aspect("equal")
        axes.set_axis_off()
        axes.set_title(title, fontsize=9, color=INK, pad=2)
    return figure
