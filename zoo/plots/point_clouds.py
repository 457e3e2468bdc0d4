"""Point clouds as a sheet of pictures, and what other pictures of clouds share with it."""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from .figures import INK, MUTED, SERIES, new_figure, shorten, text_width

_YAW, _PITCH = np.deg2rad(35.0), np.deg2rad(20.0)
# To the right of the picture, up in it, and towards the eye: as seen from the front, a little from the side and above.
VIEW = np.array(
    [
        [np.cos(_YAW), 0.0, np.sin(_YAW)],
        [np.sin(_PITCH) * np.sin(_YAW), np.cos(_PITCH), -np.sin(_PITCH) * np.cos(_YAW)],
        [-np.cos(_PITCH) * np.sin(_YAW), np.sin(_PITCH), np.cos(_PITCH) * np.cos(_YAW)],
    ]
)
# From far to near.
DEPTH = LinearSegmentedColormap.from_list("depth", ["#c3dcf0", "#5b9bcb", "#2a6099", "#132f52"])
# What people without the cones for long, middle and short waves see of linear RGB (Machado, Oliveira, Fernandes 2009, severity 1).
_BLIND = (
    np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]),
    np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]),
    np.array([[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]),
)
# Colours of parts that everybody can tell apart.
_IN_A_ROW = 8
_CELLS = 26
_SIDE = 1.7  # inches of a picture on the sheet
_FONT = 9


class Frame(NamedTuple):
    """What a picture shows, so that several clouds can be drawn at the same place and scale.

    Args:
        middle: `(2,)`, of the picture.
        reach: from the middle to the left and right edges.
        height: of what is shown, as a part of the width.
        depth: of the farthest and of the nearest point.
    """

    middle: np.ndarray
    reach: float
    height: float
    depth: tuple[float, float]


def _view(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Project `(N, 3)`, +y up: place in the picture `(N, 2)`, and `(N,)` how near."""
    seen = points @ VIEW.T
    return seen[:, :2], seen[:, 2]


def _behind(flat: np.ndarray, near: np.ndarray) -> np.ndarray:
    """Which points lie well behind others at the same place of the picture; `flat` `(N, 2)` and `near` `(N,)` in [0, 1]."""
    cell = np.minimum((flat * _CELLS).astype(int), _CELLS - 1)
    front = np.full((_CELLS, _CELLS), -np.inf)
    np.maximum.at(front, (cell[:, 0], cell[:, 1]), near)
    return near < front[cell[:, 0], cell[:, 1]] - 0.2


def cloud_of(points: np.ndarray) -> np.ndarray:
    """The points as float64.

    Args:
        points: `(N, 3)`.

    Returns:
        `(N, 3)` float64.

    Raises:
        ValueError: if they have another shape.

    Example:
        >>> cloud_of(np.zeros((5, 3), dtype=np.float32)).dtype
        dtype('float64')
    """
    cloud = np.asarray(points, dtype=np.float64)
    if cloud.ndim != 2 or cloud.shape[1] != 3 or len(cloud) == 0:
        raise ValueError(f"a cloud must have shape (points, 3), got {cloud.shape}")
    return cloud


def frame_of(*clouds: np.ndarray) -> Frame:
    """The smallest square picture that holds some clouds.

    Args:
        clouds: `(N, 3)` each.

    Returns:
        The frame.

    Example:
        >>> frame_of(np.random.rand(512, 3)).reach < 1
        True
    """
    flat, depth = _view(np.concatenate(clouds))
    middle = (flat.max(axis=0) + flat.min(axis=0)) / 2
    extent = np.maximum(np.ptp(flat, axis=0), 1e-12) * 1.03
    return Frame(middle, float(extent.max()) / 2, float(extent[1] / extent.max()), (float(depth.min()), float(depth.max())))


def dot_area(number: int, side: float) -> float:
    """The area of the nearest dots, so that dense clouds cover about as much of a picture as sparse ones.

    Args:
        number: of points.
        side: of the picture, in inches.

    Returns:
        Square points, as matplotlib counts them.

    Example:
        >>> dot_area(8192, 2.0) < dot_area(1024, 2.0)
        True
    """
    return 3.8 * (side / _SIDE) ** 2 * min(1.6, (2048 / number) ** 0.5)


def draw_cloud(axes: Axes, points: np.ndarray, frame: Frame, color: np.ndarray | Colormap, area: float, hidden: float = 0.18) -> None:
    """Draw a cloud; near points are larger than far ones, and those that lie well behind others almost transparent.

    Args:
        axes: where; what is between 0 and 1 lies in the frame.
        points: `(N, 3)`.
        frame: what the picture shows.
        color: `(N, 3)` or `(N, 4)` numbers in [0, 1], or a colour map from far to near.
        area: of the nearest dots, such as `dot_area(N, side)`.
        hidden: opacity of points behind others.

    Example:
        >>> cloud = np.random.rand(512, 3)
        >>> draw_cloud(new_figure(2, 2).add_subplot(), cloud, frame_of(cloud), DEPTH, dot_area(512, 2))
    """
    flat, depth = _view(points)
    far, close = frame.depth
    near = (depth - far) / max(close - far, 1e-12)
    flat = (flat - frame.middle) / (2 * frame.reach) + 0.5
    rgba = np.ones((len(points), 4))
    if isinstance(color, Colormap):
        rgba[:] = color(near)
    else:
        rgba[:, : color.shape[1]] = color
    rgba[:, 3] *= np.where(_behind(flat, near), hidden, 0.95)
    order = np.argsort(depth)
    axes.scatter(flat[order, 0], flat[order, 1], c=rgba[order], s=area * (0.32 + 0.68 * near[order]), linewidths=0)


def _open_frame(axes: Axes, height: float = 1.0) -> None:
    axes.set_xlim(0, 1)
    axes.set_ylim(0.5 - height / 2, 0.5 + height / 2)
    axes.set_aspect("equal")
    axes.set_axis_off()


def cloud_table(
    titles: Sequence[str], headers: Sequence[str], frames: Sequence[Frame], beside: float = 0.0, side: float = 2.3
) -> tuple[Figure, list[list[Axes]]]:
    """Empty pictures in rows and columns, for `draw_cloud`, with room for a line under each of them.

    Args:
        titles: one a row, for the left edge; may have several lines.
        headers: one a column.
        frames: what the pictures of each row show.
        beside: inches to keep free on the right.
        side: width of a picture, in inches.

    Returns:
        The figure, and the axes of each row.

    Example:
        >>> cloud = np.random.rand(512, 3)
        >>> figure, ((stored, turned),) = cloud_table(["chair"], ["stored", "turned"], [frame_of(cloud)])
    """
    margin, gap, line = 0.14, 0.1, 0.28
    names = ["\n".join(shorten(part) for part in title.splitlines()) for title in titles]
    left = margin + text_width([part for name in names for part in name.splitlines()], _FONT) + 0.14
    heights = [side * max(frame.height, 0.3) for frame in frames]
    width = left + (side + gap) * len(headers) + beside + margin
    height = margin + line + sum(heights) + (line + gap) * len(titles) + margin
    figure = new_figure(width, height, layout=None)
    table: list[list[Axes]] = []
    bottom = height - margin - line
    for name, high in zip(names, heights, strict=True):
        bottom -= high
        middle = (bottom + high / 2) / height
        figure.text((left - 0.14) / width, middle, name, ha="right", va="center", fontsize=_FONT, color=INK)
        places = [(left + column * (side + gap)) / width for column in range(len(headers))]
        table.append([figure.add_axes((place, bottom / height, side / width, high / height)) for place in places])
        for axes in table[-1]:
            _open_frame(axes, high / side)
        bottom -= line + gap
    for column, header in enumerate(headers):
        middle = (left + column * (side + gap) + side / 2) / width
        figure.text(middle, 1 - (margin + line - 0.12) / height, header, ha="center", va="bottom", fontsize=_FONT + 1, color=INK)
    return figure, table


def cloud_sheet(titles: Sequence[str], frames: Sequence[Frame], below: float, side: float) -> tuple[Figure, list[Axes]]:
    """Empty pictures side by side, for `draw_cloud`, with a title above each and room below it; those of a row stand on one line.

    Args:
        titles: one a picture; may have several lines.
        frames: what each picture shows.
        below: inches to keep free under a picture.
        side: width of a picture, in inches.

    Returns:
        The figure, and the axes.

    Example:
        >>> cloud = np.random.rand(512, 3)
        >>> figure, (axes,) = cloud_sheet(["chair"], [frame_of(cloud)], 0.5, 2.0)
    """
    margin, gap, line = 0.12, 0.1, 0.17
    columns = _columns(len(frames))
    names = [[shorten(part) for part in title.splitlines()] for title in titles]
    above = 0.08 + line * max(map(len, names))
    heights = [side * max(frame.height, 0.3) for frame in frames]
    rows = [range(start, min(start + columns, len(frames))) for start in range(0, len(frames), columns)]
    width = 2 * margin + columns * (side + gap) - gap
    height = 2 * margin + sum(max(heights[place] for place in row) + above + below for row in rows) + gap * (len(rows) - 1)
    figure = new_figure(width, height, layout=None)
    sheet: list[Axes] = []
    bottom = height - margin
    for row in rows:
        highest = max(heights[place] for place in row)
        bottom -= above + highest
        for column, place in enumerate(row):
            left = margin + column * (side + gap)
            axes = figure.add_axes((left / width, bottom / height, side / width, heights[place] / height))
            _open_frame(axes, heights[place] / side)
            middle = (left + side / 2) / width
            figure.text(
                middle, (bottom + highest + 0.08) / height, "\n".join(names[place]), ha="center", va="bottom", fontsize=_FONT, color=INK
            )
            sheet.append(axes)
        bottom -= below + gap
    return figure, sheet


def _columns(number: int) -> int:
    """Pictures in a row, so that the sheet is about 3:2."""
    return number if number <= 5 else round((1.7 * number) ** 0.5)


def caption(axes: Axes, text: str) -> None:
    """Write a line under a picture of `cloud_table`.

    Args:
        axes: the picture.
        text: one line.

    Example:
        >>> caption(new_figure(2, 2).add_subplot(), "2,048 points")
    """
    axes.annotate(
        text, (0.5, 0), (0, -3), xycoords="axes fraction", textcoords="offset points", ha="center", va="top", fontsize=8, color=MUTED
    )


@cache
def part_palette(number: int) -> np.ndarray:
    """Colours of parts that colour-blind people can tell apart too: any eight in a row look different to everybody.

    The first two are those of `SERIES`. Each further one has the largest distance, in OKLab, from all before it, above all from the
    last seven, and from those as people see them who lack one kind of cones.

    Args:
        number: of colours.

    Returns:
        `(number, 3)` in [0, 1]; a longer palette starts with the shorter one.

    Example:
        >>> part_palette(50).shape
        (50, 3)
    """
    chosen = [np.array([int(code[at : at + 2], 16) / 255 for at in (1, 3, 5)]) for code in SERIES[: min(number, 2)]]
    levels = np.linspace(0.04, 0.96, 17)
    candidates = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(-1, 3)
    places = oklab(candidates)
    chroma = np.hypot(places[:, 1], places[:, 2])
    # Neither pale on white, nor like the ink, nor grey, which stands for what has no part, nor glaring.
    usable = (places[:, 0] > 0.33) & (places[:, 0] < 0.86) & (chroma > 0.07) & (chroma < 0.18)
    candidates, places = candidates[usable], places[usable]
    seen = [oklab(_seen_without(candidates, cones)) for cones in _BLIND]
    while len(chosen) < number:
        before = np.array(chosen)
        # Parts of one object mostly have numbers that lie side by side.
        last = before[-_IN_A_ROW + 1 :]
        apart = _apart(places, oklab(before)) / 0.6
        for each, others in ((places, last), *((each, _seen_without(last, cones)) for each, cones in zip(seen, _BLIND, strict=True))):
            apart = np.minimum(apart, _apart(each, oklab(others)))
        chosen.append(candidates[apart.argmax()])
    return np.array(chosen)


def _apart(places: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Distance of each place `(M, 3)` from the nearest of `others` `(N, 3)`."""
    return np.linalg.norm(places[:, None] - others[None], axis=2).min(axis=1)


def _linear(rgb: np.ndarray) -> np.ndarray:
    """Light of sRGB values."""
    return np.where(rgb <= 0.04045, rgb / 12.92, ((np.maximum(rgb, 0.04045) + 0.055) / 1.055) ** 2.4)


def _seen_without(rgb: np.ndarray, cones: np.ndarray) -> np.ndarray:
    """sRGB values as they look to somebody, by one of the matrices of `_BLIND`."""
    light = np.clip(_linear(rgb) @ cones.T, 0, 1)
    return np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


def oklab(rgb: np.ndarray) -> np.ndarray:
    """Colours in OKLab, in which distances are about as large as they look.

    Args:
        rgb: `(..., 3)` sRGB in [0, 1].

    Returns:
        `(..., 3)`: lightness, and two axes of chroma.

    Example:
        >>> oklab(np.ones(3)).round(2)
        array([ 1., -0., -0.])
    """
    cones = _linear(rgb) @ np.array([[0.4122, 0.2119, 0.0883], [0.5363, 0.6807, 0.2817], [0.0514, 0.1074, 0.6300]])
    return np.cbrt(cones) @ np.array([[0.2105, 1.9780, 0.0259], [0.7936, -2.4286, 0.7828], [-0.0041, 0.4506, -0.8087]])


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
    columns = columns or _columns(number)
    rows = -(-number // columns)
    values = None if colors is None else [np.asarray(color) for color in colors]
    low, high = (0.0, 1.0) if values is None else (min(float(v.min()) for v in values), max(float(v.max()) for v in values))

    figure = new_figure(_SIDE * columns, 1.9 * rows)
    figure.set_layout_engine(ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02, wspace=0.0, hspace=0.02))
    for position, (cloud, title) in enumerate(zip(clouds, titles, strict=True)):
        points = cloud_of(cloud)
        color: np.ndarray | Colormap
        if values is None:
            color = DEPTH
        elif np.issubdtype(values[position].dtype, np.integer):
            color = part_palette(max(len(SERIES), int(values[position].max()) + 1))[values[position]]
        else:
            color = _colormap()((values[position] - low) / max(high - low, 1e-12))
        axes = figure.add_subplot(rows, columns, position + 1)
        _open_frame(axes)
        draw_cloud(axes, points, frame_of(points), color, dot_area(len(points), _SIDE))
        axes.set_title(title, fontsize=_FONT, color=INK, pad=2)
    return figure


def _colormap() -> LinearSegmentedColormap:
    """Low to high for floats, blue over pale to red."""
    return LinearSegmentedColormap.from_list("values", ["#2f6fb2", "#9fc3e3", "#f0d9a8", "#e08e2b", "#b3342b"])
