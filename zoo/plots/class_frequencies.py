"""How often each class occurs, as a picture."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from .figures import INK, MUTED, SERIES, new_figure


def plot_class_frequencies(counts: Mapping[str, Sequence[int]], class_names: Sequence[str]) -> Figure:
    """Draw the samples of each class as stacked bars, one colour a split, most frequent class first.

    Args:
        counts: split -> samples of each of the C classes.
        class_names: C names.

    Returns:
        The figure; its axis is logarithmic, and the bars side by side, where one class has over 100 times the samples of another.

    Example:
        >>> plot_class_frequencies({"train": [30, 10], "test": [3, 1]}, ["chair", "lamp"])
    """
    table = np.array([list(values) for values in counts.values()])
    total = table.sum(axis=0)
    order = np.argsort(-total, kind="stable")
    logarithmic = total.max() > 100 * max(total.min(), 1)
    classes = len(class_names)
    figure = new_figure(7.5, float(np.clip(1.4 + 0.24 * classes, 2.4, 20)))
    axes = figure.add_subplot()
    place = np.arange(classes)
    left = np.zeros(classes)
    for number, (split, values) in enumerate(zip(counts, table, strict=True)):
        height = 0.8 / len(table) if logarithmic else 0.8
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
    else:
        for row, value in zip(place, total[order], strict=True):
            axes.text(value + total.max() * 0.01, row, f"{value:,}", va="center", fontsize=8, color=MUTED)
    axes.set_yticks(place, [class_names[cls] for cls in order], fontsize=9 if classes < 40 else 7)
    axes.invert_yaxis()
    axes.set_ylim(classes - 0.4, -0.6)
    axes.set_xlabel("samples", color=MUTED)
    axes.tick_params(length=0, colors=INK)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="x", color="#e4e7eb", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=9, loc="lower right")
    return figure
