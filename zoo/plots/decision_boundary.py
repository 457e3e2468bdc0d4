"""Two-dimensional classification as a picture."""

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.figure import Figure

from .figures import INK, MUTED, SERIES, new_figure

_GRID = 200


def plot_decision_boundary(
    points: np.ndarray,
    label: np.ndarray,
    predict: Callable[[np.ndarray], np.ndarray],
    class_names: Sequence[str],
    axis_names: tuple[str, str] = ("x1", "x2"),
) -> Figure:
    """Draw points by class over the regions of the predicted classes, with the line between them.

    Args:
        points: `(M, 2)`.
        label: `(M,)` int.
        predict: points `(G, 2)` float32 -> class probabilities `(G, C)`.
        class_names: C names.
        axis_names: what the two features are.

    Returns:
        The figure.

    Example:
        >>> plot_decision_boundary(x, y, lambda grid: model(grid), ["benign", "malignant"], ("age", "tumour size"))
    """
    low, high = points.min(axis=0), points.max(axis=0)
    margin = 0.06 * np.maximum(high - low, 1e-9)
    xs, ys = (np.linspace(low[axis] - margin[axis], high[axis] + margin[axis], _GRID) for axis in (0, 1))
    grid = np.stack(np.meshgrid(xs, ys), axis=-1).reshape(-1, 2).astype(np.float32)
    probabilities = predict(grid).reshape(_GRID, _GRID, -1)
    figure = new_figure(5.6, 4.4)
    axes = figure.add_subplot()
    regions = probabilities.argmax(axis=-1)
    colors = [SERIES[cls % len(SERIES)] for cls in range(len(class_names))]
    axes.contourf(xs, ys, regions, levels=np.arange(len(class_names) + 1) - 0.5, colors=colors, alpha=0.12)
    for cls in range(len(class_names)):
        rest = np.delete(probabilities, cls, axis=-1).max(axis=-1)
        axes.contour(xs, ys, probabilities[..., cls] - rest, levels=[0.0], colors=[INK], linewidths=1.4)
    for cls, name in enumerate(class_names):
        members = points[label == cls]
        axes.scatter(
            members[:, 0], members[:, 1], s=26, color=colors[cls], edgecolors="white", linewidths=0.6, label=f"{name} ({len(members)})"
        )
    axes.set_xlabel(axis_names[0], color=MUTED)
    axes.set_ylabel(axis_names[1], color=MUTED)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=0, colors=INK)
    axes.legend(frameon=False, fontsize=9)
    return figure
