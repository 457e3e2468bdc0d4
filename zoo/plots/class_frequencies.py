"""How often each class occurs, as a picture."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from .figures import INK, LINES, MUTED, SERIES, new_figure, shorten


def plot_class_frequencies(counts: Mapping[str, Sequence[int]], class_names: Sequence[str]) -> Figure:
    """Draw the samples of each class as stacked bars, one colour a split, most frequent class first.

    Where one class has over 100 times the samples of another, the axis is logarithmic, and the bars stand side by side:
    lengths on a logarithmic axis do not add up.

    Args:
        counts: split -> samples of each of the C classes.
        class_names: C names.

    Returns:
        The figure.

    Raises:
        ValueError: if there are no splits, or a split has another number of classes than there are names.

    Example:
        >>> plot_class_frequencies({"train": [30, 10], "test": [3, 1]}, ["chair", "lamp"])
    """
    classes = len(class_names)
    if not counts or any(len(values) != classes for values in counts.values()):
        sizes = {split: len(values) for split, values in counts.items()}
        raise ValueError(f"counts must give each split one number for each of the {classes} classes, got {sizes}")
    table = np.array([list(values) for values in counts.values()])
    total = table.sum(axis=0)
    order = np.argsort(-total, kind="stable")
    logarithmic = bool(total.max() > 100 * max(total.min(), 1))

    bar = 0.32 if logarithmic and classes <= 40 else 0.24
    figure = new_figure(7.5, float(np.clip(1.3 + bar * classes, 1.9, 40)))
    axes = figure.add_subplot()
    place = np.arange(classes)
    left = np.zeros(classes)
    for number, (split, values) in enumerate(zip(counts, table, strict=True)):
        height = 0.84 / len(table) if logarithmic else 0.76
        offset = (number - (len(table) - 1) / 2) * height if logarithmic else 0.0
        axes.barh(
            place + offset,
            values[order],
            height,
            left=None if logarithmic else left,
            label=f"{split} ({values.sum():,})",
            color=SERIES[number % len(SERIES)],
        )
        left += values[order]

    if logarithmic:
        axes.set_xscale("log")
        axes.set_xlim(0.7, total.max() * 2)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.minorticks_off()
    else:
        axes.set_xlim(0, max(int(total.max()), 1) * 1.09)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    ends = np.maximum(table.max(axis=0), 0.75)[order] if logarithmic else total[order]
    for row, end, value in zip(place, ends, total[order], strict=True):
        axes.annotate(f"{value:,}", (end, row), (4, 0), textcoords="offset points", va="center", fontsize=8, color=MUTED)
    axes.set_yticks(place, [shorten(str(class_names[cls])) for cls in order], fontsize=9 if classes <= 40 else 8)
    axes.set_ylim(classes - 0.4, -0.6)
    axes.set_xlabel("samples, logarithmic" if logarithmic else "samples", color=MUTED, fontsize=9)
    axes.tick_params(length=0, labelcolor=INK)
    axes.tick_params(axis="x", labelsize=8, labelcolor=MUTED)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.spines["left"].set_color(MUTED)
    axes.grid(axis="x", color=LINES, linewidth=0.6)
    axes.set_axisbelow(True)
    figure.legend(
        loc="outside upper left", ncols=min(len(table), 5), frameon=False, fontsize=9, labelcolor=INK, handlelength=1, handleheight=1
    )
    return figure
