"""The confusion matrix as a picture."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from .figures import INK, MUTED, new_figure

_COUNTS_UP_TO = 25


def plot_confusion_matrix(matrix: np.ndarray, class_names: Sequence[str], title: str = "") -> Figure:
    """Draw a confusion matrix: colour is the share of the row, numbers are counts, `n` is the samples of a class.

    Args:
        matrix: `(C, C)` counts, rows are the true classes.
        class_names: C names.
        title: above the picture.

    Returns:
        The figure; with more than 25 classes the counts are left out.

    Example:
        >>> plot_confusion_matrix(np.eye(2, dtype=int), ["cat", "dog"])
    """
    counts = np.asarray(matrix)
    classes = len(counts)
    samples = counts.sum(axis=1)
    share = counts / np.maximum(samples[:, None], 1)
    size = float(np.clip(2.2 + 0.42 * classes, 4.2, 16))
    figure = new_figure(size + 0.9, size)
    axes = figure.add_subplot()
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    font = float(np.clip(260 / max(classes, 1) ** 0.5 / 8, 4.5, 10))
    axes.set_xticks(
        range(classes),
        class_names,
        rotation=90 if classes > 12 else 45,
        ha="center" if classes > 12 else "right",
        rotation_mode="default" if classes > 12 else "anchor",
        fontsize=font,
    )
    axes.set_yticks(range(classes), [f"{name}  (n={count})" for name, count in zip(class_names, samples, strict=True)], fontsize=font)
    if classes <= _COUNTS_UP_TO:
        for (row, column), count in np.ndenumerate(counts):
            if count:
                axes.text(
                    column, row, str(count), ha="center", va="center", fontsize=font, color="white" if share[row, column] > 0.55 else INK
                )
    axes.set_xticks(np.arange(classes + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(classes + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="#e4e7eb", linewidth=0.6)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("predicted class", color=MUTED)
    axes.set_ylabel("true class", color=MUTED)
    axes.set_title(title, color=INK, fontsize=11)
    figure.colorbar(image, ax=axes, fraction=0.045, pad=0.03, label="share of the true class").outline.set_visible(False)
    return figure
