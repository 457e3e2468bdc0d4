"""Losses and tables for classification."""

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

ClassWeights = Literal["none", "balanced", "effective"]


def class_balanced_weights(class_counts: Sequence[int] | Tensor) -> Tensor:
    """Weights inversely proportional to class frequency, w_c = M / (C n_c), so that each class weighs the same in sum.

    Where every class has samples, the mean over the data, sum_c n_c w_c / M, is 1. It is scikit-learn's `class_weight="balanced"`.

    Args:
        class_counts: number of training samples of each of the C classes.

    Returns:
        `(C,)` float32; a class without samples gets 0.

    Raises:
        ValueError: if no class has samples or a count is negative.

    Example:
        >>> class_balanced_weights([30, 10])
        tensor([0.6667, 2.0000])
    """
    counts = _checked_counts(class_counts)
    weights = counts.sum() / (len(counts) * counts.clamp_min(1.0))
    return torch.where(counts > 0, weights, 0.0).float()


def effective_number_weights(class_counts: Sequence[int] | Tensor, beta: float = 0.999) -> Tensor:
    """Weights inversely proportional to the effective number of samples, w_c proportional to (1 - beta) / (1 - beta^n_c).

    A new sample adds the less, the more there are: E_n = 1 + beta + ... + beta^(n - 1) = (1 - beta^n) / (1 - beta). With beta = 0
    every class weighs the same; beta = 1 is the limit, the inverse frequency. Scaled so that the weights of the classes with samples
    have mean 1. Exact for beta close to 1, where 1 - beta^n would cancel, and for any counts.

    Args:
        class_counts: number of training samples of each of the C classes.
        beta: in [0, 1]; (N - 1) / N says that a class has at most N samples that are unlike each other. The paper tries 0.9 to 0.9999.

    Returns:
        `(C,)` float32; a class without samples gets 0.

    Raises:
        ValueError: if no class has samples, a count is negative, or beta is out of range.

    Example:
        >>> effective_number_weights([1, 2], beta=0.5)  # effective numbers 1 and 1.5
        tensor([1.2000, 0.8000])

    Source:
        Cui, Jia, Lin, Song & Belongie, "Class-Balanced Loss Based on Effective Number of Samples", CVPR 2019, equation 2 and section 4.
    """
    counts = _checked_counts(class_counts)
    if not 0 <= beta <= 1:
        raise ValueError(f"beta must lie in [0, 1], got {beta}")
    present = counts > 0
    # log1p and expm1 keep the digits that 1 - beta^n loses.
    rest = 1.0 - beta
    effective = counts if rest == 0 else torch.expm1(counts * (math.log1p(-rest) if rest < 1 else -math.inf)) / -rest
    weights = torch.where(present, 1 / effective, 0.0)
    return (weights * (present.sum() / weights.sum())).float()


def make_class_weights(kind: ClassWeights, class_counts: Sequence[int] | None, beta: float = 0.999) -> Tensor | None:
    """The class weights that a classifier's settings ask for.

    Args:
        kind: "none", "balanced" (`class_balanced_weights`) or "effective" (`effective_number_weights`).
        class_counts: number of training samples of each of the C classes; None is for "none" alone.
        beta: of the effective number.

    Returns:
        `(C,)` float32, or None.

    Raises:
        ValueError: if there is no such kind, the counts are missing or impossible, or beta is out of range.

    Example:
        >>> make_class_weights("balanced", [30, 10])
        tensor([0.6667, 2.0000])
    """
    if kind not in get_args(ClassWeights):
        raise ValueError(f"class_weights must be one of {', '.join(get_args(ClassWeights))}; got {kind!r}")
    if not 0 <= beta <= 1:
        raise ValueError(f"beta must lie in [0, 1], got {beta}")
    if kind == "none":
        return None
    if class_counts is None:
        raise ValueError(f"class_weights={kind!r} needs class_counts: the training samples of each class")
    return class_balanced_weights(class_counts) if kind == "balanced" else effective_number_weights(class_counts, beta)


def _checked_counts(class_counts: Sequence[int] | Tensor) -> Tensor:
    counts = torch.as_tensor(class_counts, dtype=torch.float64)
    if counts.dim() != 1 or not (counts >= 0).all() or not counts.sum() > 0:  # NaN is neither
        raise ValueError(f"class_counts must be counts of samples with at least one above 0, got {counts.tolist()}")
    return counts


def focal_cross_entropy(
    logits: Tensor,
    label: Tensor,
    gamma: float = 0.0,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross entropy in which each sample is weighed by (1 - p)^gamma, p being the probability of its label.

    L = sum_i (1 - p_i)^gamma CE_i / sum_i w_{y_i}, where CE_i is torch's cross entropy of sample i with class weights w
    and label smoothing. The factor is applied per sample, before any mean. With gamma = 0 it is
    `torch.nn.functional.cross_entropy`. Computed in float32 or above, also under autocast.

    Args:
        logits: `(B, C)` float.
        label: `(B,)` int64.
        gamma: focusing exponent, at least 0; 2 in the paper.
        weight: `(C,)` class weights, or None.
        label_smoothing: in [0, 1].

    Returns:
        The loss, a scalar.

    Raises:
        ValueError: if gamma is negative.

    Example:
        >>> focal_cross_entropy(torch.zeros(2, 4), torch.tensor([0, 1]), gamma=2.0)  # (3/4)^2 log 4
        tensor(0.7798)

    Source:
        Lin, Goyal, Girshick, He & Dollár, "Focal Loss for Dense Object Detection", ICCV 2017, equation 5.
    """
    if gamma < 0:
        raise ValueError(f"gamma must be at least 0, got {gamma}")
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    if weight is not None:
        weight = weight.to(logits.dtype)
    if gamma == 0:
        return F.cross_entropy(logits, label, weight=weight, label_smoothing=label_smoothing)
    loss = F.cross_entropy(logits, label, weight=weight, label_smoothing=label_smoothing, reduction="none")
    label_column = label.unsqueeze(1)
    # 1 - p as a sum of the other probabilities: exact where p rounds to 1, and its power has a finite gradient there.
    rest = logits.softmax(dim=1).scatter(1, label_column, 0.0).sum(dim=1)
    loss = rest.clamp_min(torch.finfo(rest.dtype).tiny) ** gamma * loss
    total = weight[label].sum() if weight is not None else loss.numel()
    return loss.sum() / total


def orthogonality_penalty(matrices: Tensor) -> Tensor:
    """How far square matrices are from orthogonal: mean over the batch of ||I - A A^T||_F^2.

    Computed in float32 or above, also under autocast.

    Args:
        matrices: `(B, K, K)` float.

    Returns:
        The penalty, a scalar.

    Example:
        >>> orthogonality_penalty(2 * torch.eye(3).expand(4, 3, 3))  # 3 * (1 - 4)^2
        tensor(27.)

    Source:
        Qi, Su, Mo & Guibas, "PointNet", CVPR 2017, equation 2. Other codes take half of the sum over the batch, the mean
        of the unsquared norms or the norm over the whole batch, so that their weights cannot be compared with this one.
    """
    if matrices.dtype in (torch.float16, torch.bfloat16):
        matrices = matrices.float()
    with torch.autocast(matrices.device.type, enabled=False):
        gram = matrices @ matrices.transpose(1, 2)
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return (identity - gram).square().sum(dim=(1, 2)).mean()
