"""Point clouds as a sheet of pictures."""

from collections.abc import Sequence

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from .figures import INK, SERIES, new_figure

_YAW, _PITCH = np.deg2rad(35.0), np.deg2rad(20.0)
# From far to near.
_DEPTH = LinearSegmentedColormap.from_list("depth", ["#c3dcf0", "#5b9bcb", "#2a6099", "#132f52"])
_CELLS = 26


def _view(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Project `(N, 3)`, +y up, as seen from the front, a little from the side and above: `(N, 2)` and depth `(N,)`."""
    x, y, z = points.T
    x, z = np.cos(_YAW) * x + np.sin(_YAW) * z, -np.sin(_YAW) * x + np.cos(_YAW) * z
    y, z = np.cos(_PITCH) * y - np.sin(_PITCH) * z, np.sin(_PITCH) * y + np.cos(_PITCH) * z
    return np.stack([x, y], axis=1), z


def _behind(flat: np.ndarray, near: np.ndarray) -> np.ndarray:
    """Which points lie well behind others at the same place of the picture; `flat` `(N, 2)` and `near` `(N,)` in [0, 1]."""
    cell = np.minimum((flat * _CELLS).astype(int), _CELLS - 1)
    front = np.full((_CELLS, _CELLS), -np.inf)
    np.maximum.at(front, (cell[:, 0], cell[:, 1]), near)
    return near < front[cell[:, 0], cell[:, 1]] - 0.2


def plot_point_clouds(
    clouds: Sequence[np.ndarray] | np.ndarray, titles: Sequence[str], colors: Sequence[np.ndarray] | None = None, columns: int | None = None
) -> Figure:
    """Draw clouds side by side, +y up; near points are large and dark, far ones small and pale, hidden ones almost transparent.

    Args:
        clouds: M clouds `(N, 3)`.
        titles: M titles.
        colors: M arrays `(N,)` to colour the points by: integers choose a colour each, floats go from low to high over all clouds;
            None shades by depth.
        columns: clouds in a row; by default as many as make the sheet about 3:2.

    Returns:
        The figure.

    Raises:
        ValueError: if a cloud has another shape, or there are more or fewer titles or colours than clouds.

    Example:
        >>> plot_point_clouds(np.random.rand(4, 512, 3), ["a", "b", "c", "d"])
    """
    number = len(clouds)
    if number == 0 or len(titles) != number or (colors is not None and len(colors) != number):
        raise ValueError(f"every cloud needs a title and, if any, its colors: there are {number} clouds and {len(titles)} titles")
    columns = columns or (number if number <= 5 else round((1.7 * number) ** 0.5))
    rows = -(-number // columns)
    values = None if colors is None else [np.asarray(color) for color in colors]
    low, high = (0.0, 1.0) if values is None else (min(float(v.min()) for v in values), max(float(v.max()) for v in values))

    figure = new_figure(1.7 * columns, 1.9 * rows)
    figure.set_layout_engine(ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02, wspace=0.0, hspace=0.02))
    for position, (cloud, title) in enumerate(zip(clouds, titles, strict=True)):
        points = np.asarray(cloud, dtype=np.float64)
        if points.ndim != 2 or points.shape[1] != 3 or len(points) == 0:
            raise ValueError(f"a cloud must have shape (points, 3), got {points.shape}")
        flat, depth = _view(points)
        near = (depth - depth.min()) / max(float(np.ptp(depth)), 1e-12)
        middle = (flat.max(axis=0) + flat.min(axis=0)) / 2
        reach = max(float(np.ptp(flat, axis=0).max()) / 2, 1e-12) * 1.03
        flat = (flat - middle) / (2 * reach) + 0.5
        if values is None:
            color = _DEPTH(near)
        elif np.issubdtype(values[position].dtype, np.integer):
            palette = np.array([[int(code[at : at + 2], 16) / 255 for at in (1, 3, 5)] + [1.0] for code in SERIES])
            color = palette[values[position] % len(SERIES)]
        else:
            color = _colormap()((values[position] - low) / max(high - low, 1e-12))
        color[:, 3] = np.where(_behind(flat, near), 0.18, 0.95)
        order = np.argsort(depth)
        # Denser clouds get smaller dots, so that they cover about the same area.
        size = (1.2 + 2.6 * near) * min(1.6, (2048 / len(points)) ** 0.5)
        axes = figure.add_subplot(rows, columns, position + 1)
        axes.scatter(flat[order, 0], flat[order, 1], c=color[order], s=size[order], linewidths=0)
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
        axes.set_aspect("equal")
        axes.set_axis_off()
        axes.set_title(title, fontsize=9, color=INK, pad=2)
    return figure


def _colormap() -> LinearSegmentedColormap:
    """Low to high for floats, blue over pale to red."""
    return LinearSegmentedColormap.from_list("values", ["#2f6fb2", "#9fc3e3", "#f0d9a8", "#e08e2b", "#b3342b"])
