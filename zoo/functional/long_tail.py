"""Class imbalance without new features: classifier weights of even length, and groups of classes by their number of samples."""

from collections.abc import Sequence

import torch
from torch import Tensor


def tau_normalized(weight: Tensor, tau: float) -> Tensor:
    """Weights of a linear classifier divided by a power of their length, w_c / ||w_c||^tau.

    Trained on imbalanced data, a classifier has longer weights for frequent classes. tau = 0 leaves them, tau = 1 makes all equally long.

    Args:
        weight: `(C, D)` float; a row of zeros stays.
        tau: usually in [0, 1], chosen on balanced validation data.

    Returns:
        `(C, D)`.

    Raises:
        ValueError: if tau is negative.

    Example:
        >>> tau_normalized(torch.tensor([[3.0, 4.0], [0.0, 2.0]]), 1.0)
        tensor([[0.6000, 0.8000],
                [0.0000, 1.0000]])

    Source:
        Kang et al., "Decoupling Representation and Classifier for Long-Tailed Recognition", ICLR 2020, section 4; arXiv 1910.09217.
    """
    if not tau >= 0:
        raise ValueError(f"tau must be at least 0, got {tau}")
    length = weight.norm(dim=1, keepdim=True)
    return weight / torch.where(length > 0, length, 1.0) ** tau


def shot_groups(class_counts: Sequence[int], many: int = 100, few: int = 20) -> dict[str, list[int]]:
    """Classes in groups by their number of training samples, without groups that are empty.

    Args:
        class_counts: training samples of each of the C classes.
        many: a class with more has many.
        few: a class with fewer has few; between them, limits included, it has a medium number.

    Returns:
        "many", "medium" and "few", in this order -> numbers of the classes.

    Raises:
        ValueError: if the limits are in the wrong order.

    Example:
        >>> shot_groups([500, 100, 20, 19])
        {'many': [0], 'medium': [1, 2], 'few': [3]}

    Source:
        Liu et al., "Large-Scale Long-Tailed Recognition in an Open World", CVPR 2019, section 4 (more than 100, 20 to 100, fewer than 20).
    """
    if not 0 <= few <= many:
        raise ValueError(f"the limits must satisfy 0 <= few <= many, got few {few} and many {many}")
    groups: dict[str, list[int]] = {"many": [], "medium": [], "few": []}
    for cls, count in enumerate(class_counts):
        groups["many" if count > many else "few" if count < few else "medium"].append(cls)
    return {name: classes for name, classes in groups.items() if classes}
