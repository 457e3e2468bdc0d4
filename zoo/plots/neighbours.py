"""Samples beside their nearest neighbours, as a picture."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from .figures import DPI, INK, LINES, MUTED, SERIES, new_figure, shorten, text_width
from .images import rgb_pixels
from .point_clouds import DEPTH, cloud_of, dot_area, draw_cloud, frame_of

# Blue and orange, which nearly everybody can tell apart; the broken line tells it to the others, and in print.
_SAME, _OTHER, _UNKNOWN = (SERIES[0], "solid"), (SERIES[1], (0, (3, 1.6))), ("#b6bfc8", "solid")
_FONT = 8
_SIDE = 1.05  # inches of a picture; more where the names are long
_LETTERS = 16  # of a name
_GAP = 0.17  # inches between neighbours
_APART = 0.34  # between a query and its neighbours
_MARGIN = 0.2
_HEADER = 0.62
_LINE = 0.2  # the name above a picture
_RISE = 0.075  # of the name's letters above the picture


class Neighbour(NamedTuple):
    """A neighbour of a query.

    Args:
        sample: what is drawn, as `plot_neighbours` takes it.
        name: of its class.
        similarity: to the query.
        same: whether it is of the query's class; None if nobody knows.
    """

    sample: np.ndarray
    name: str
    similarity: float
    same: bool | None


def plot_neighbours(
    queries: Sequence[np.ndarray], names: Sequence[str], neighbours: Sequence[Sequence[Neighbour]], title: str = ""
) -> Figure:
    """Draw a row for each query: it, and its neighbours in frames: blue if of the same class, broken orange if of another one.

    Args:
        queries: M samples: images `(H, W, C)`, uint8 or floats in [0, 1], with C = 1 or 3; clouds `(N, 3)`, +y up; or vectors `(D,)`,
            as bars that have one scale in all pictures.
        names: class of each query.
        neighbours: those of each query, the nearest first.
        title: for the upper left corner.

    Returns:
        The figure.

    Raises:
        ValueError: if a sample has another shape or range, a query has no name, or the queries differ in their number of neighbours.

    Example:
        >>> found = Neighbour(np.random.rand(32, 32, 3), "dog", 0.93, same=False)
        >>> plot_neighbours([np.random.rand(32, 32, 3)], ["cat"], [[found]])
    """
    counts = {len(row) for row in neighbours}
    if not queries or not len(queries) == len(names) == len(neighbours) or len(counts) != 1 or 0 in counts:
        raise ValueError(
            f"every query needs a name and as many neighbours as the others: there are {len(queries)} queries, {len(names)} names and "
            f"neighbours of {len(neighbours)}"
        )
    columns = counts.pop()
    samples = [*queries, *(neighbour.sample for row in neighbours for neighbour in row)]
    reach = max((float(np.abs(sample).max()) for sample in samples if np.ndim(sample) == 1 and np.size(sample)), default=1.0) or 1.0
    labels = [shorten(name, _LETTERS) for name in [*names, *(neighbour.name for row in neighbours for neighbour in row)]]
    number = text_width(["-0.000"], _FONT - 1) + 0.06
    side = max(_SIDE, text_width(labels, _FONT) + number)
    pitch = side + _GAP
    width = 2 * _MARGIN + pitch * (columns + 1) - _GAP + _APART
    first = _MARGIN + pitch + _APART
    caption = "nearest training samples and their cosine similarity"
    width = max(width, first + text_width([caption], _FONT) + _MARGIN)
    # The legend must not meet the title.
    legend = text_width(["same class", "other class"], _FONT) * 2 + 1.0
    width = max(width, 2 * _MARGIN + text_width([title], _FONT + 3) + legend + 0.3)
    height = 2 * _MARGIN + _HEADER + (side + _LINE + _GAP) * len(queries) - _GAP
    figure = new_figure(width, height, layout=None)

    figure.text(_MARGIN / width, 1 - _MARGIN / height, title, ha="left", va="top", fontsize=_FONT + 3, color=INK)
    draw_legend(figure, width - _MARGIN, _MARGIN + 0.09)
    for left, text in ((_MARGIN, "query"), (first, caption)):
        figure.text(left / width, 1 - (_MARGIN + _HEADER - 0.14) / height, text, ha="left", va="bottom", fontsize=_FONT, color=MUTED)
    for row, (query, name, found) in enumerate(zip(queries, names, neighbours, strict=True)):
        top = _MARGIN + _HEADER + row * (side + _LINE + _GAP)
        _draw_sample(figure, query, _MARGIN, top, side, reach)
        _write(figure, _MARGIN, top, shorten(name, _LETTERS), INK, "bold")
        for column, neighbour in enumerate(found):
            left = first + column * pitch
            _draw_sample(figure, neighbour.sample, left, top, side, reach)
            draw_frame(figure, left, top + _LINE, side, side, neighbour.same)
            _write(figure, left, top, shorten(neighbour.name, _LETTERS), INK if neighbour.same else MUTED)
            figure.text(
                (left + side) / width,
                1 - (top + _LINE - _RISE) / height,
                f"{neighbour.similarity:.3f}",
                ha="right",
                va="baseline",
                fontsize=_FONT - 1,
                color=MUTED,
            )
    return figure


def _write(figure: Figure, left: float, top: float, text: str, color: str, weight: str = "normal") -> None:
    width, height = figure.get_size_inches()
    baseline = 1 - (top + _LINE - _RISE) / height
    figure.text(left / width, baseline, text, ha="left", va="baseline", fontsize=_FONT, color=color, fontweight=weight)


def axes_at(figure: Figure, left: float, top: float, wide: float, high: float) -> Axes:
    """Axes at a place of a figure.

    Args:
        figure: where to put them.
        left: inches from the left edge of the figure.
        top: inches from its upper edge.
        wide: inches.
        high: inches.

    Returns:
        The axes.

    Example:
        >>> axes_at(new_figure(2, 2, layout=None), 0.5, 0.5, 1.0, 1.0)
    """
    width, height = figure.get_size_inches()
    return figure.add_axes((left / width, 1 - (top + high) / height, wide / width, high / height))


def _draw_sample(figure: Figure, sample: np.ndarray, left: float, top: float, side: float, reach: float) -> None:
    top += _LINE
    if np.ndim(sample) == 3:
        pixels = rgb_pixels(sample)
        scale = side / max(pixels.shape[:2])
        high, wide = pixels.shape[0] * scale, pixels.shape[1] * scale
        axes = axes_at(figure, left + (side - wide) / 2, top + (side - high) / 2, wide, high)
        axes.imshow(pixels, aspect="auto", interpolation="nearest" if max(pixels.shape[:2]) <= side * DPI else "antialiased")
    elif np.ndim(sample) == 2:
        points = cloud_of(sample)
        axes = axes_at(figure, left, top, side, side)
        draw_cloud(axes, points, frame_of(points), DEPTH, dot_area(len(points), side))
        axes.set(xlim=(-0.04, 1.04), ylim=(-0.04, 1.04))
    elif np.ndim(sample) == 1 and len(sample):
        axes = axes_at(figure, left, top, side, side)
        axes.axhline(0, color=LINES, linewidth=0.8, zorder=0)
        axes.bar(np.arange(len(sample)), sample, width=0.8, color=DEPTH(0.6))
        axes.set(xlim=(-0.9, len(sample) - 0.1), ylim=(-1.12 * reach, 1.12 * reach))
    else:
        raise ValueError(f"a sample must be an image (H, W, C), a cloud (N, 3) or a vector (D,), got {np.shape(sample)}")
    axes.set_axis_off()


def draw_frame(figure: Figure, left: float, top: float, wide: float, high: float, same: bool | None) -> None:
    """Draw a frame that tells whether samples are of one class.

    Args:
        figure: where to draw.
        left: inches from the left edge of the figure to what is framed.
        top: inches from its upper edge.
        wide: inches of what is framed.
        high: inches of what is framed.
        same: whether they are; None if nobody knows.

    Example:
        >>> draw_frame(new_figure(2, 2, layout=None), 0.5, 0.5, 1.0, 1.0, same=True)
    """
    color, style = _UNKNOWN if same is None else _SAME if same else _OTHER
    axes = axes_at(figure, left, top, wide, high)
    axes.set(xlim=(0, wide / high), ylim=(0, 1))
    axes.set_axis_off()
    rim = FancyBboxPatch((0, 0), wide / high, 1, boxstyle="round,pad=0.015,rounding_size=0.03", fill=False, linewidth=2.2, edgecolor=color)
    rim.set(linestyle=style, clip_on=False)
    axes.add_patch(rim)


def draw_legend(figure: Figure, right: float, middle: float) -> None:
    """Say what the frames mean.

    Args:
        figure: where to draw.
        right: inches from the left edge of the figure to the end of the legend.
        middle: inches from the upper edge of the figure to its middle.

    Example:
        >>> draw_legend(new_figure(3, 1, layout=None), 2.8, 0.5)
    """
    width, height = figure.get_size_inches()
    for text, (color, style) in (("other class", _OTHER), ("same class", _SAME)):
        figure.text(right / width, 1 - middle / height, text, ha="right", va="center", fontsize=_FONT, color=MUTED)
        right -= text_width([text], _FONT) + 0.08
        axes = axes_at(figure, right - 0.28, middle - 0.05, 0.28, 0.1)
        axes.set(xlim=(0, 1), ylim=(0, 1))
        axes.plot([0, 1], [0.5, 0.5], color=color, linestyle=style, linewidth=2.2)
        axes.set_axis_off()
        right -= 0.28 + 0.22
