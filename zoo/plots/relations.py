"""Pairs of images and how related they are, as a picture."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from .figures import INK, MUTED, new_figure, shorten, text_width
from .images import draw_image
from .neighbours import draw_frame, draw_legend

_FONT = 8
_SIDE = 0.95  # inches of a picture; more where the names are long
_LETTERS = 16  # of a name
_COLUMNS = 4  # pairs side by side
_BETWEEN = 0.05  # inches between the pictures of a pair
_GAP = 0.2  # between pairs
_MARGIN = 0.2
_TITLE = 0.42
_CAPTION = 0.3  # above the pairs of a section
_LINE = 0.2  # the names above the pictures
_RISE = 0.075  # of the names' letters above the pictures


class RelatedPair(NamedTuple):
    """Two images and what the relation head says of them.

    Args:
        first: an image `(H, W, C)`, uint8 or floats in [0, 1], with C = 1 or 3.
        second: another one.
        names: of their classes.
        score: how related they are, in [0, 1].
        same: whether they are of one class; None if nobody knows.
    """

    first: np.ndarray
    second: np.ndarray
    names: tuple[str, str]
    score: float
    same: bool | None


def plot_relations(sections: Mapping[str, Sequence[RelatedPair]], title: str = "") -> Figure:
    """Draw pairs of images, section by section, in frames: blue if both are of one class, broken orange if not.

    Args:
        sections: heading -> pairs in the order in which to draw them, four in a row.
        title: for the upper left corner.

    Returns:
        The figure.

    Raises:
        ValueError: if a section has no pairs, or an image has another shape, type or range.

    Example:
        >>> pair = RelatedPair(np.random.rand(32, 32, 3), np.random.rand(32, 32, 3), ("cat", "dog"), 0.93, same=False)
        >>> plot_relations({"most related": [pair]})
    """
    if not sections or not all(sections.values()):
        raise ValueError(f"every section needs at least one pair, got { ({name: len(pairs) for name, pairs in sections.items()}) }")
    labels = [shorten(name, _LETTERS) for pairs in sections.values() for pair in pairs for name in pair.names]
    side = max(_SIDE, text_width(labels, _FONT) + text_width(["0.000"], _FONT - 1) + 0.08)
    pitch = 2 * side + _BETWEEN + _GAP
    columns = min(_COLUMNS, max(len(pairs) for pairs in sections.values()))
    # The legend must not meet the title.
    legend = text_width(["same class", "other class"], _FONT) * 2 + 1.0
    texts = max(text_width([title], _FONT + 3) + legend + 0.3, text_width(list(sections), _FONT))
    width = 2 * _MARGIN + max(pitch * columns - _GAP, texts)
    step = side + _LINE + _GAP
    rows = [-(-len(pairs) // columns) for pairs in sections.values()]
    height = 2 * _MARGIN + _TITLE + (_CAPTION + 0.12) * len(rows) + step * sum(rows) - _GAP
    figure = new_figure(width, height, layout=None)

    figure.text(_MARGIN / width, 1 - _MARGIN / height, title, ha="left", va="top", fontsize=_FONT + 3, color=INK)
    draw_legend(figure, width - _MARGIN, _MARGIN + 0.09)
    top = _MARGIN + _TITLE
    for (heading, pairs), lines in zip(sections.items(), rows, strict=True):
        figure.text(_MARGIN / width, 1 - (top + 0.16) / height, heading, ha="left", va="baseline", fontsize=_FONT, color=MUTED)
        for number, pair in enumerate(pairs):
            row, column = divmod(number, columns)
            _draw_pair(figure, pair, _MARGIN + column * pitch, top + _CAPTION + row * step, side)
        top += _CAPTION + 0.12 + step * lines
    return figure


def _draw_pair(figure: Figure, pair: RelatedPair, left: float, top: float, side: float) -> None:
    width, height = figure.get_size_inches()
    baseline = 1 - (top + _LINE - _RISE) / height
    for place, (image, name) in enumerate(zip((pair.first, pair.second), pair.names, strict=True)):
        start = left + place * (side + _BETWEEN)
        draw_image(figure, image, start, top + _LINE, side)
        color = INK if pair.same else MUTED
        figure.text(start / width, baseline, shorten(name, _LETTERS), ha="left", va="baseline", fontsize=_FONT, color=color)
    wide = 2 * side + _BETWEEN
    figure.text((left + wide) / width, baseline, f"{pair.score:.3f}", ha="right", va="baseline", fontsize=_FONT - 1, color=MUTED)
    draw_frame(figure, left, top + _LINE, wide, side, pair.same)
