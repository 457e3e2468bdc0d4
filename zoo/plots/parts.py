"""Parts of objects, as they are and as a model sees them, as a picture."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from .figures import INK, MUTED, shorten, text_width
from .point_clouds import caption, cloud_of, cloud_sheet, cloud_table, dot_area, draw_cloud, frame_of, part_palette

_WRONG, _RIGHT = "#d62f22", "#d5dbe1"
_SIDE = 2.3  # inches of a picture
_LINE = 0.19  # of the legend
_FONT = 8
_WIDE = 2.5  # inches of a picture on the sheet


def plot_parts(
    clouds: Sequence[np.ndarray] | np.ndarray, parts: Sequence[np.ndarray] | np.ndarray, titles: Sequence[str], part_names: Sequence[str]
) -> Figure:
    """Draw objects side by side, their points coloured by part, +y up; below each, a legend with the share of every part that occurs.

    A part has the same colour in every picture, that of `part_palette`.

    Args:
        clouds: M clouds `(N, 3)`.
        parts: M arrays `(N,)` of parts.
        titles: M titles; may have several lines.
        part_names: name of each part.

    Returns:
        The figure.

    Raises:
        ValueError: if a cloud has another shape, the numbers disagree, or a part has no name.

    Example:
        >>> plot_parts([np.random.rand(512, 3)], [np.repeat([0, 1], 256)], ["chair"], ["leg", "seat"])
    """
    number = len(clouds)
    if number == 0 or not number == len(parts) == len(titles):
        raise ValueError(
            f"every cloud needs its parts and a title: there are {number} clouds, parts of {len(parts)}, and {len(titles)} titles"
        )
    whole = [cloud_of(cloud) for cloud in clouds]
    labels = [np.asarray(part) for part in parts]
    for cloud, part in zip(whole, labels, strict=True):
        if part.shape != (len(cloud),):
            raise ValueError(f"a cloud of {len(cloud)} points needs a part for each, got {part.shape}")
        if part.min() < 0 or part.max() >= len(part_names):
            raise ValueError(f"parts must lie in [0, {len(part_names) - 1}], got {part.min()} to {part.max()}")

    palette = part_palette(len(part_names))
    found = [np.unique(part, return_counts=True) for part in labels]
    frames = [frame_of(cloud) for cloud in whole]
    figure, sheet = cloud_sheet(titles, frames, max(len(present) for present, _ in found) * _LINE + 0.06, _WIDE)
    for cloud, part, (present, points), frame, axes in zip(whole, labels, found, frames, sheet, strict=True):
        draw_cloud(axes, cloud, frame, palette[part], 1.25 * dot_area(len(cloud), _WIDE))
        names = [f"{shorten(str(part_names[part]))}  {_share(count / len(cloud))}" for part, count in zip(present, points, strict=True)]
        left = -(text_width(names, _FONT) * 72 + 12) / 2
        for line, (part, name) in enumerate(zip(present, names, strict=True)):
            _legend_line(axes, (0.5, 0), (left, -(line + 0.5) * _LINE * 72 - 6), palette[part], name)
    return figure


def _share(part: float) -> str:
    return "<1%" if part < 0.005 else f"{part:.0%}"


def _legend_line(
    axes: Axes, anchor: tuple[float, float], shift: tuple[float, float], color: np.ndarray, name: str, absent: bool = False
) -> None:
    """A dot and a name; `anchor` in parts of the axes, `shift` from there in points to the middle of the line's left edge."""
    for text, right, size, ink, style in (
        ("●", 0, 11, color, "normal"),
        (name, 12, _FONT, MUTED if absent else INK, "italic" if absent else "normal"),
    ):
        place = (shift[0] + right, shift[1])
        axes.annotate(text, anchor, place, "axes fraction", "offset points", va="center", fontsize=size, color=ink, fontstyle=style)


def plot_part_labels(
    clouds: Sequence[np.ndarray] | np.ndarray,
    truth: Sequence[np.ndarray] | np.ndarray,
    predicted: Sequence[np.ndarray] | np.ndarray,
    titles: Sequence[str],
    part_names: Sequence[str],
) -> Figure:
    """Draw a row for each object: its parts, the predicted ones, and the points that are wrong in red; +y up.

    A part has the same colour in every row, and a legend beside a row names those that occur in it. Points whose true part is
    negative have none: they are left out of the first and the last picture.

    Args:
        clouds: M clouds `(N, 3)`.
        truth: M arrays `(N,)` of parts.
        predicted: M arrays `(N,)` of parts.
        titles: M titles, for the left edge; may have several lines.
        part_names: name of each part.

    Returns:
        The figure.

    Raises:
        ValueError: if a cloud has another shape, the numbers disagree, or a part has no name.

    Example:
        >>> cloud, part = np.random.rand(512, 3), np.repeat([0, 1], 256)
        >>> plot_part_labels([cloud], [part], [part], ["chair"], ["leg", "seat"])
    """
    number = len(clouds)
    if number == 0 or not number == len(truth) == len(predicted) == len(titles):
        raise ValueError(
            f"every cloud needs its parts, its predicted parts and a title: there are {number} clouds, parts of {len(truth)} and "
            f"{len(predicted)}, and {len(titles)} titles"
        )
    whole = [cloud_of(cloud) for cloud in clouds]
    parts = [(np.asarray(true), np.asarray(guess)) for true, guess in zip(truth, predicted, strict=True)]
    for cloud, (true, guess) in zip(whole, parts, strict=True):
        if true.shape != (len(cloud),) or guess.shape != true.shape:
            raise ValueError(f"a cloud of {len(cloud)} points needs a part for each, got {true.shape} and {guess.shape} predicted")
        if max(true.max(), guess.max()) >= len(part_names) or guess.min() < 0:
            raise ValueError(
                f"parts must lie in [0, {len(part_names) - 1}], got {true.max()}, and predicted {guess.min()} to {guess.max()}"
            )

    palette = part_palette(len(part_names))
    names = [shorten(str(name)) for name in part_names]
    present = [np.unique(np.concatenate([true[true >= 0], guess])) for true, guess in parts]
    frames = [frame_of(cloud) for cloud in whole]
    # A row is as high as its legend, whatever its object.
    frames = [
        frame._replace(height=max(frame.height, (len(found) + 1) * _LINE / _SIDE)) for frame, found in zip(frames, present, strict=True)
    ]
    legend = text_width([names[part] for found in present for part in found], _FONT) + 0.4
    figure, table = cloud_table(titles, ["parts", "predicted", "errors"], frames, legend, _SIDE)
    for cloud, (true, guess), found, frame, axes in zip(whole, parts, present, frames, table, strict=True):
        area, known = 1.25 * dot_area(len(cloud), _SIDE), true >= 0
        wrong = known & (true != guess)
        if known.any():
            draw_cloud(axes[0], cloud[known], frame, palette[true[known]], area)
        draw_cloud(axes[1], cloud, frame, palette[guess], area)
        for chosen, color, scale in ((known & ~wrong, _RIGHT, 1.0), (wrong, _WRONG, 1.6)):
            if chosen.any():
                draw_cloud(axes[2], cloud[chosen], frame, np.tile(to_rgb(color), (int(chosen.sum()), 1)), scale * area, hidden=0.6)
        caption(axes[0], f"{len(np.unique(true[known]))} parts")
        caption(axes[1], f"{len(np.unique(guess))} parts")
        caption(axes[2], f"{wrong.sum():,} of {known.sum():,} points wrong, {wrong.sum() / max(known.sum(), 1):.1%}")
        for line, part in enumerate(found):
            below = -(line - (len(found) - 1) / 2) * _LINE * 72
            _legend_line(axes[2], (1, 0.5), (8, below), palette[part], names[part], absent=not (true == part).any())
    return figure
