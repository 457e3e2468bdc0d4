"""Saving figures."""

import os
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Dark text on white, one accent: the pictures stand side by side in reports.
INK, MUTED, ACCENT = "#1f2933", "#7b8794", "#2f6fb2"
SERIES = ("#2f6fb2", "#e08e2b", "#4c9f70")


def new_figure(width: float, height: float) -> Figure:
    """A figure of that size in inches that draws itself without a window, outside of pyplot's global state.

    Args:
        width: inches.
        height: inches.

    Returns:
        The figure.

    Example:
        >>> new_figure(4, 3).add_subplot()
    """
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: str | os.PathLike[str], dpi: int = 120) -> None:
    """Write a PNG under a temporary name and rename it, so that no half-written picture is ever seen.

    Args:
        figure: what to write.
        path: a `.png` file; its folder is made.
        dpi: dots per inch.

    Example:
        >>> save_figure(new_figure(4, 3), "empty.png")
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        figure.savefig(temporary, format="png", dpi=dpi)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
