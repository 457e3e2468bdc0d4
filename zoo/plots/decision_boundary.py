"""Two-dimensional classification as a picture."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from .figures import INK, MUTED, SERIES, new_figure

_GRID = 200
# More points than this only hide each other.
_DRAWN = 3000


def plot_decision_boundary(
    points: np.ndarray,
    label: np.ndarray,
    predict: Callable[[Tensor], Tensor],
    class_names: Sequence[str],
    axis_names: Sequence[str] = ("x1", "x2"),
) -> Figure:
    """Draw points by class over the regions of the predicted classes, with the line between them.

    Points on the wrong side have a dark ring.

    Args:
        points: `(M, 2)`.
        label: `(M,)` int.
        predict: points `(G, 2)` float32 -> class probabilities `(G, C)`.
        class_names: C names.
        axis_names: what the two features are.

    Returns:
        The figure; at most 3,000 points are drawn, evenly chosen.

    Raises:
        ValueError: if the points do not have two features.

    Example:
        >>> plot_decision_boundary(x, y, lambda grid: model(grid).softmax(1), ["benign", "malignant"], ("age", "tumour size"))
    """
    points, label = np.asarray(points, dtype=np.float32), np.asarray(label)
    if points.ndim != 2 or points.shape[1] != 2 or len(points) == 0:
        raise ValueError(f"a decision boundary needs points of two features, shape (points, 2), got {points.shape}")
    low, high = points.min(axis=0), points.max(axis=0)
    margin = 0.06 * np.maximum(high - low, 1e-6)
    xs, ys = (np.linspace(low[axis] - margin[axis], high[axis] + margin[axis], _GRID) for axis in (0, 1))
    grid = np.stack(np.meshgrid(xs, ys), axis=-1).reshape(-1, 2).astype(np.float32)
    probabilities = predict(torch.from_numpy(grid)).detach().float().cpu().numpy().reshape(_GRID, _GRID, -1)

    figure = new_figure(5.6, 4.4)
    axes = figure.add_subplot()
    classes = len(class_names)
    colors = [SERIES[cls % len(SERIES)] for cls in range(classes)]
    regions = probabilities.argmax(axis=-1)
    axes.contourf(xs, ys, regions, levels=np.arange(classes + 1) - 0.5, colors=colors, alpha=0.13)
    for cls in range(classes if classes > 2 else 1):
        lead = probabilities[..., cls] - np.delete(probabilities, cls, axis=-1).max(axis=-1)
        # matplotlib warns of a contour that is nowhere.
        if lead.min() < 0 < lead.max():
            axes.contour(xs, ys, lead, levels=[0.0], colors=[INK], linewidths=1.5)

    drawn = np.linspace(0, len(points) - 1, min(len(points), _DRAWN)).astype(int)
    wrong = predict(torch.from_numpy(points[drawn])).detach().cpu().argmax(dim=1).numpy() != label[drawn]
    size = 30 if len(drawn) < 500 else 8
    for cls, name in enumerate(class_names):
        for ring in (False, True):
            x, y = points[drawn[(label[drawn] == cls) & (wrong == ring)]].T
            edge, width = (INK, 1.1) if ring else ("white", 0.6)
            axes.scatter(x, y, s=size, color=colors[cls], edgecolors=edge, linewidths=width, zorder=3)
        axes.scatter([], [], s=30, color=colors[cls], edgecolors="white", label=f"{name} ({(label == cls).sum():,})")
    if wrong.any():
        axes.scatter([], [], s=30, facecolors="none", edgecolors=INK, linewidths=1.1, label=f"wrong side ({wrong.mean():.1%})")
    axes.set_xlim(xs[0], xs[-1])
    axes.set_ylim(ys[0], ys[-1])
    axes.set_xlabel(axis_names[0], color=MUTED)
    axes.set_ylabel(axis_names[1], color=MUTED)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelsize=8, colors=MUTED)
    figure.legend(frameon=False, fontsize=9, labelcolor=INK, loc="outside lower center", ncols=4)
    return figure
