"""Point clouds: bringing them to a common position and size."""

from typing import Literal, get_args

import torch
from torch import Tensor

Normalization = Literal["unit_sphere", "unit_box", "none"]


def _floor(dtype: torch.dtype) -> float:
    """What a size is at least, so that nothing is divided by zero; 1e-12 itself is zero in float16."""
    return max(1e-12, torch.finfo(dtype).tiny)


def unit_sphere(points: Tensor) -> Tensor:
    """Centre each cloud on its mean and scale it so that its farthest point lies on the unit sphere.

    x' = (x - mean(x)) / max_i ||x_i - mean(x)||. A cloud whose points all coincide becomes all zeros.

    Args:
        points: `(..., N, 3)` float.

    Returns:
        The same shape and dtype.

    Example:
        >>> unit_sphere(torch.rand(2, 64, 3)).norm(dim=-1).amax(-1)
        tensor([1., 1.])
    """
    # From the first point first: the mean of equal numbers need not be that number, and this is more exact far from the origin.
    centred = points - points[..., :1, :]
    centred = centred - centred.mean(dim=-2, keepdim=True)
    radius = centred.norm(dim=-1, keepdim=True).amax(dim=-2, keepdim=True)
    return centred / radius.clamp_min(_floor(points.dtype))


def unit_box(points: Tensor) -> Tensor:
    """Scale each axis of each cloud to [0, 1]: x' = (x - min) / (max - min), per axis; a flat axis becomes 0.

    It does not keep the proportions of the object; `unit_sphere` does.

    Args:
        points: `(..., N, 3)` float.

    Returns:
        The same shape and dtype.

    Example:
        >>> unit_box(torch.rand(2, 64, 3)).amax(-2)
        tensor([[1., 1., 1.], [1., 1., 1.]])
    """
    low = points.amin(dim=-2, keepdim=True)
    extent = points.amax(dim=-2, keepdim=True) - low
    return (points - low) / extent.clamp_min(_floor(points.dtype))


def normalize_points(points: Tensor, normalization: Normalization) -> Tensor:
    """Apply the normalisation of that name.

    Args:
        points: `(..., N, 3)` float.
        normalization: "unit_sphere", "unit_box" or "none".

    Returns:
        The same shape and dtype.

    Raises:
        ValueError: for another name.

    Example:
        >>> cloud = torch.rand(1, 8, 3)
        >>> normalize_points(cloud, "none") is cloud
        True
    """
    if normalization == "unit_sphere":
        return unit_sphere(points)
    if normalization == "unit_box":
        return unit_box(points)
    if normalization == "none":
        return points
    raise ValueError(f"normalization must be one of {', '.join(get_args(Normalization))}; got {normalization!r}")
