"""How many directions features make use of."""

import torch
from torch import Tensor


def effective_rank(features: Tensor) -> Tensor:
    """The effective rank of features: how many directions they spread over, a smooth count between 1 and min(N, D).

    With s_1 >= s_2 >= ... the singular values of the matrix of features, rows samples, and p_i = s_i / sum_j s_j:

        rank = exp(-sum_i p_i log p_i).

    The features are not centred, as in both papers: if all samples have the same features, whatever they are, the rank is 1.
    It does not depend on their scale. Of features all zero it is 0, and NaN of features that are not finite.

    Args:
        features: `(N, D)` float.

    Returns:
        Scalar, float64.

    Raises:
        ValueError: if the features have another shape.

    Example:
        >>> effective_rank(torch.eye(5))
        tensor(5.0000, dtype=torch.float64)

    Source:
        Roy & Vetterli, "The Effective Rank: A Measure of Effective Dimensionality", EUSIPCO 2007, definition 1; Garrido,
        Balestriero, Najman & LeCun, "RankMe: Assessing the Downstream Performance of Pretrained Self-Supervised
        Representations by Their Rank", ICML 2023, equation 1.
    """
    if features.dim() != 2 or 0 in features.shape:
        raise ValueError(f"features must have shape (samples, dimensions), got {tuple(features.shape)}")
    # Both Gram matrices have the same eigenvalues but for zeros: the smaller one is faster.
    return effective_rank_of_gram(gram(features) if features.shape[1] <= features.shape[0] else gram(features.T))


def gram(features: Tensor) -> Tensor:
    """F^T F in float64. Those of several batches, and of several processes, add up to that of all their samples.

    Args:
        features: F, `(N, D)` float.

    Returns:
        `(D, D)` float64; on the CPU if the device has no float64.

    Example:
        >>> gram(torch.ones(3, 2))
        tensor([[3., 3.], [3., 3.]], dtype=torch.float64)
    """
    wide = (features.cpu() if features.device.type == "mps" else features).double()
    return wide.T @ wide


def effective_rank_of_gram(matrix: Tensor) -> Tensor:
    """`effective_rank` of features of which only the sum of their Gram matrices is at hand, in memory O(D^2).

    Args:
        matrix: `(D, D)` float64, such as `gram(first) + gram(second)`.

    Returns:
        Scalar, float64.

    Example:
        >>> effective_rank_of_gram(gram(torch.eye(5)[:2]) + gram(torch.eye(5)[2:]))
        tensor(5.0000, dtype=torch.float64)
    """
    if not bool(matrix.isfinite().all()):
        return matrix.new_tensor(float("nan"))
    eigenvalues = torch.linalg.eigvalsh(matrix)
    # Zeros come out as rounding errors of the largest one, and their roots would be a million times as large.
    noise = eigenvalues[-1].clamp_min(0) * len(matrix) * torch.finfo(matrix.dtype).eps
    values = eigenvalues.where(eigenvalues > noise, 0.0).sqrt()
    total = values.sum()
    entropy = torch.special.entr(values / total.where(total > 0, 1.0)).sum()
    return entropy.exp().where(total > 0, 0.0)
