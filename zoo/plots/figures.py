"""What all figures share: colours, size, saving."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties

from ..files import whole_file

# Dark text on white: the pictures stand side by side in reports.
INK, MUTED, LINES = "#1f2933", "#616e7c", "#e4e7eb"
# Dots per inch of every saved figure.
DPI = 150
SERIES = ("#2f6fb2", "#e08e2b", "#4c9f70", "#c2473d", "#7d5ba6", "#3aa6b9", "#a37c55", "#d670a7", "#8a9a2f", "#52606d")


def new_figure(width: float, height: float, layout: Literal["constrained"] | None = "constrained") -> Figure:
    """A figure of that size in inches that draws itself without a window, outside of pyplot's global state.

    Args:
        width: inches.
        height: inches.
        layout: matplotlib's layout engine, or None for axes that are placed by hand.

    Returns:
        The figure.

    Example:
        >>> new_figure(4, 3).add_subplot()
    """
    figure = Figure(figsize=(width, height), layout=layout, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def text_width(texts: Sequence[str], size: float) -> float:
    """The width of the widest text, in inches, in the default font.

    Args:
        texts: one line each.
        size: of the font, in points.

    Returns:
        Inches; 0 without texts.

    Example:
        >>> text_width(["chair", "armchair"], 10) > text_width(["chair"], 10)
        True
    """
    figure = Figure(dpi=100)
    renderer, font = FigureCanvasAgg(figure).get_renderer(), FontProperties(size=size)
    return max((renderer.get_text_width_height_descent(text, font, False)[0] / 100 for text in texts), default=0.0)


def shorten(text: str, length: int = 28) -> str:
    """The text, or its start and an ellipsis where it is longer.

    Args:
        text: one line.
        length: characters, the ellipsis included.

    Returns:
        At most `length` characters.

    Example:
        >>> shorten("a very long name", 8)
        'a very …'
    """
    text = text.encode("utf-8", "replace").decode()  # file names need not be text, which matplotlib wants
    return text if len(text) <= length else text[: length - 1] + "…"


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a PNG, see `whole_file`.

    Args:
        figure: what to write.
        path: a `.png` file; its folder is made.

    Example:
        >>> save_figure(new_figure(4, 3), "empty.png")
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(target) as temporary:
        figure.savefig(temporary, format="png", dpi=DPI)
