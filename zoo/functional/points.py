"""Point clouds: bringing them to a common position and size, and views of them to vote over."""

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from .random import fold_in, random_order

Normalization = Literal["unit_sphere", "unit_box", "none"]
VoteBy = Literal["yaw", "subsample"]


def _floor(dtype: torch.dtype) -> float:
    """What a size is at least, so that nothing is divided by zero; 1e-12 itself is zero in float16."""
    return max(1e-12, torch.finfo(dtype).tiny)


def unit_sphere(points: Tensor, count: Tensor | None = None) -> Tensor:
    """Centre each cloud on its mean and scale it so that its farthest point lies on the unit sphere.

    x' = (x - mean(x)) / max_i ||x_i - mean(x)||. A cloud whose points all coincide becomes all zeros.

    Args:
        points: `(..., N, 3)` float.
        count: `(...,)` int64: the mean is that of so many points of a cloud, behind which they are repeated; None means all N.

    Returns:
        The same shape and dtype.

    Example:
        >>> unit_sphere(torch.rand(2, 64, 3)).norm(dim=-1).amax(-1)
        tensor([1., 1.])
    """
    # From the first point first: the mean of equal numbers need not be that number, and this is more exact far from the origin.
    centred = points - points[..., :1, :]
    if count is None:
        mean = centred.mean(dim=-2, keepdim=True)
    else:
        own = torch.arange(points.shape[-2], device=points.device) < count[..., None]
        mean = (centred * own[..., None]).sum(dim=-2, keepdim=True) / count[..., None, None]
    centred = centred - mean
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


def normalize_points(points: Tensor, normalization: Normalization, count: Tensor | None = None) -> Tensor:
    """Apply the normalisation of that name.

    Args:
        points: `(..., N, 3)` float.
        normalization: "unit_sphere", "unit_box" or "none".
        count: `(...,)` int64, how many points each cloud has, behind which they are repeated; None means all N.

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
        return unit_sphere(points, count)
    if normalization == "unit_box":
        return unit_box(points)
    if normalization == "none":
        return points
    raise ValueError(f"normalization must be one of {', '.join(get_args(Normalization))}; got {normalization!r}")


def farthest_points(points: Tensor, number: int) -> Tensor:
    """Farthest-point sampling: the first point, and then each time the point that is farthest from all those taken before.

    i_1 = 0, i_k = argmax_i min_{j < k} ||x_i - x_{i_j}||; of points equally far, the first one. The exact greedy algorithm, all clouds
    at once (Eldar et al., "The Farthest Point Strategy for Progressive Image Sampling", IEEE TIP 1997). The first n indices are the
    result for n points, so one call serves every smaller number. Nothing is random. A copy is taken only when all different points are.

    Args:
        points: `(B, N, 3)` float, finite; distances are computed in float32 or, for such points, in float64.
        number: how many to take, in [1, N].

    Returns:
        `(B, number)` int64, the indices of the points in the order in which they are taken; none comes twice.

    Raises:
        ValueError: if there are fewer points.

    Example:
        >>> farthest_points(torch.tensor([[[0.0, 0, 0], [1, 0, 0], [3, 0, 0], [0, 0, 0]]]), 3)
        tensor([[0, 2, 1]])
    """
    clouds, length = points.shape[:2]
    if not 1 <= number <= length:
        raise ValueError(f"number must lie in [1, {length}], the points of a cloud; got {number}")
    x, y, z = points.to(torch.promote_types(points.dtype, torch.float32)).permute(2, 0, 1).contiguous()
    nearest = torch.full_like(x, math.inf)
    distance, along = torch.empty_like(x), torch.empty_like(x)
    taken = torch.zeros(clouds, number, dtype=torch.long, device=points.device)
    last = taken[:, :1]
    for place in range(1, number):
        torch.sub(x, x.gather(1, last), out=distance).square_()
        for axis in (y, z):
            torch.sub(axis, axis.gather(1, last), out=along)
            distance.addcmul_(along, along)
        torch.minimum(nearest, distance, out=nearest)
        nearest.scatter_(1, last, -1.0)  # never again, even where all others coincide with points taken before
        # numpy's vectorised argmax is several times faster than torch's on the CPU.
        farthest = torch.from_numpy(nearest.numpy().argmax(1)) if nearest.device.type == "cpu" else nearest.argmax(1)
        taken[:, place] = farthest
        last = taken[:, place : place + 1]
    return taken


def voting_views(points: Tensor, votes: int, vote_by: VoteBy) -> Tensor:
    """Views of each cloud whose predictions are to be averaged; they really differ, so that averaging can help.

    "yaw" turns the cloud about the vertical y axis by 0, 1/V, ... of a full turn, as the authors' evaluation does; it suits models
    that were trained with such rotations. "subsample" takes random halves of the points, the same on every call.

    Args:
        points: `(B, N, 3)` float.
        votes: V, views of each cloud; a single one is the cloud as it is.
        vote_by: "yaw" or "subsample".

    Returns:
        `(B, V, N, 3)`, for "subsample" and more than one vote `(B, V, ceil(N / 2), 3)`.

    Raises:
        ValueError: if there are no votes, or `vote_by` is another.

    Example:
        >>> voting_views(torch.rand(2, 64, 3), 12, "yaw").shape
        torch.Size([2, 12, 64, 3])

    Source:
        Qi et al., "PointNet", CVPR 2017: `num_votes` of the authors' evaluation.
    """
    if votes < 1 or vote_by not in get_args(VoteBy):
        raise ValueError(f"votes must be at least 1 and vote_by one of {', '.join(get_args(VoteBy))}; got {votes} and {vote_by!r}")
    if votes == 1:
        return points.unsqueeze(1)
    if vote_by == "yaw":
        angle = torch.arange(votes, device=points.device, dtype=points.dtype) * (2 * math.pi / votes)
        return turn_about_y(points.unsqueeze(1), angle)
    return points[:, half_order(torch.arange(votes, device=points.device), points.shape[1])]


def turn_about_y(points: Tensor, angle: Tensor) -> Tensor:
    """Turn points about the vertical y axis: x' = x cos a + z sin a, z' = z cos a - x sin a.

    Args:
        points: `(..., N, 3)` float.
        angle: a in radians, float, of a shape that broadcasts with `...`.

    Returns:
        `(..., N, 3)` of the type of the points.

    Example:
        >>> turn_about_y(torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor(math.pi / 2)).round()
        tensor([[1., 0., -0.]])
    """
    cos, sin, zero, one = angle.cos(), angle.sin(), torch.zeros_like(angle), torch.ones_like(angle)
    turn = torch.stack([cos, zero, sin, zero, one, zero, -sin, zero, cos], dim=-1).unflatten(-1, (3, 3)).to(points.dtype)
    # Under somebody's autocast the coordinates would be rounded to half precision.
    with torch.autocast(points.device.type, enabled=False):
        return points @ turn.mT


def half_order(number: Tensor, length: int) -> Tensor:
    """Which points fixed random halves of a cloud hold.

    Args:
        number: `(...)` int64, which halves.
        length: N, points of a cloud.

    Returns:
        `(..., ceil(N / 2))` int64, none of them twice in a half.

    Example:
        >>> half_order(torch.arange(4), 9).shape
        torch.Size([4, 5])
    """
    return random_order(fold_in(0, number), length)[..., : -(-length // 2)]
