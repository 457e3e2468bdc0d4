"""The confusion matrix as a picture."""

from collections.abc import Sequence

import numpy as np
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure

from .figures import INK, LINES, MUTED, new_figure, shorten, text_width

_POINTS = 72  # to the inch
_SMALLEST_FONT = 4.5
# Light enough for dark type (contrast 4.5 and more), so that two cells of nearly one colour never differ in the colour of their type.
_BLUES = LinearSegmentedColormap.from_list("shares", ["#ffffff", "#cfe0f1", "#a3c6e8", "#7aaede", "#5797d3"])


def plot_confusion_matrix(matrix: np.ndarray, class_names: Sequence[str], title: str = "") -> Figure:
    """Draw a confusion matrix: colour is the share of the row, numbers are counts, and each row says how many samples it has.

    The colours grow with the root of the share, because the mistakes are the small shares. Counts are left out where they
    would not fit into the cells; few classes also get the share in percent.

    Args:
        matrix: `(C, C)` counts, rows are the true classes.
        class_names: C names.
        title: above the picture.

    Returns:
        The figure: the matrix and its colour bar.

    Raises:
        ValueError: if the matrix is not square or the number of names differs.

    Example:
        >>> plot_confusion_matrix(np.eye(2, dtype=int), ["cat", "dog"])
    """
    counts = np.asarray(matrix)
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1] or len(class_names) != len(counts):
        raise ValueError(f"a confusion matrix must be square with a name for each class, got {counts.shape} and {len(class_names)} names")
    classes = len(counts)
    samples = counts.sum(axis=1)
    share = counts / np.maximum(samples[:, None], 1)
    names = [shorten(str(name)) for name in class_names]

    # Everything is placed by hand, in inches: layout engines cut off labels beside axes of fixed aspect.
    cell = float(np.clip(5.2 / classes, 0.2, 1.0))
    side = cell * classes
    font = float(np.clip(0.5 * cell * _POINTS, 6.0, 10.0))
    label_width = text_width(names, font)
    upright = cell > label_width + 0.1
    support = [f"{number:,}" for number in samples]
    support_width = max(text_width(support, font), text_width(["samples"], font))
    left, right = label_width + 0.5, support_width + 0.95
    bottom = 0.55 + (font / _POINTS * 1.3 if upright else label_width)
    top = 0.85 if title else 0.5
    title_overhang = max(0.0, text_width([title], 11) - (left + side + right) + 0.2)
    width, height = left + side + right + title_overhang, bottom + side + top
    figure = new_figure(width, height, layout=None)
    axes = figure.add_axes((left / width, bottom / height, side / width, side / height))
    image = axes.imshow(share, cmap=_BLUES, norm=PowerNorm(0.6, vmin=0, vmax=1), aspect="auto", interpolation="nearest")

    axes.set_xticks(range(classes), names, rotation=0 if upright else 90, fontsize=font)
    axes.set_yticks(range(classes), names, fontsize=font)
    axes.set_xticks(np.arange(classes + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(classes + 1) - 0.5, minor=True)
    axes.grid(which="minor", color=LINES, linewidth=0.6)
    axes.tick_params(which="both", length=0, pad=4, labelcolor=INK)
    axes.spines[:].set_color(LINES)
    axes.set_xlabel("predicted class", color=MUTED, fontsize=10, labelpad=6)
    axes.set_ylabel("true class", color=MUTED, fontsize=10, labelpad=6)

    digits = len(str(counts.max(initial=0)))
    count_font = min(font * 1.15, 0.5 * cell * _POINTS, 1.35 * cell * _POINTS / digits)
    if count_font >= _SMALLEST_FONT:
        percent = "\n{:.0%}" if cell >= 0.6 else ""
        for row, column in np.argwhere(counts):
            text = str(counts[row, column]) + percent.format(share[row, column])
            axes.text(column, row, text, ha="center", va="center", fontsize=count_font, color=INK, linespacing=1.3)

    beside = side + 0.1 + support_width
    for row, text in enumerate(support):
        axes.text(
            beside / side, 1 - (row + 0.5) / classes, text, transform=axes.transAxes, ha="right", va="center", fontsize=font, color=MUTED
        )
    axes.text(beside / side, 1 + 0.08 / side, "samples", transform=axes.transAxes, ha="right", va="bottom", fontsize=font, color=MUTED)
    if title:
        figure.text(left / width, 1 - 0.22 / height, title, ha="left", va="top", fontsize=11, color=INK)

    length = min(side, 2.6)
    scale = figure.add_axes(
        ((left + side + support_width + 0.32) / width, (bottom + side - length) / height, 0.11 / width, length / height)
    )
    bar = figure.colorbar(image, cax=scale, ticks=[0, 0.1, 0.25, 0.5, 1])
    bar.ax.set_yticklabels(["0", "10%", "25%", "50%", "100%"], fontsize=7, color=MUTED)
    bar.ax.minorticks_off()
    bar.ax.tick_params(length=0, pad=2)
    bar.outline.set_visible(False)
    return figure
