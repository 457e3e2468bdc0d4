"""Scores out of a confusion matrix."""

from typing import NamedTuple

import torch
from torch import Tensor


class ClassScores(NamedTuple):
    """Scores of each class, `(C,)` float64, and its number of samples, `(C,)` int64."""

    precision: Tensor
    recall: Tensor
    f1: Tensor
    samples: Tensor


def confusion_matrix(prediction: Tensor, label: Tensor, num_classes: int) -> Tensor:
    """Count pairs: entry (i, j) is how many samples of class i were predicted as class j.

    Args:
        prediction: `(B,)` int64 in [0, C).
        label: `(B,)` int64 in [0, C).
        num_classes: C.

    Returns:
        `(C, C)` int64.

    Example:
        >>> confusion_matrix(torch.tensor([0, 1]), torch.tensor([0, 0]), 2)
        tensor([[1, 1], [0, 0]])
    """
    return torch.bincount(label * num_classes + prediction, minlength=num_classes**2).view(num_classes, num_classes)


def per_class_scores(matrix: Tensor) -> ClassScores:
    """Precision, recall and F1 of each class; 0 where a score is undefined, as scikit-learn with `zero_division=0`.

    precision_c = m_cc / sum_i m_ic, recall_c = m_cc / sum_j m_cj, F1_c = 2 m_cc / (sum_i m_ic + sum_j m_cj).

    Args:
        matrix: `(C, C)` counts, rows are the true classes.

    Returns:
        The scores.

    Example:
        >>> per_class_scores(torch.tensor([[3, 1], [0, 4]])).recall
        tensor([0.7500, 1.0000], dtype=torch.float64)
    """
    counts = matrix.double()
    right, true, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)
    return ClassScores(
        precision=right / predicted.clamp_min(1),
        recall=right / true.clamp_min(1),
        f1=2 * right / (predicted + true).clamp_min(1),
        samples=matrix.sum(1).long(),
    )
