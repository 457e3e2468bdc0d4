"""Batched augmentation of point clouds: every cloud gets parameters of its own, drawn from its key."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from ...zoo.functional.random import fold_in, normal, random_order, uniform

Rotation = Literal["none", "yaw", "full"]
# Each draw has a number of its own, so that switching one on leaves the others as they were.
_DRAWS = 6
_SUBSAMPLE, _ROTATE, _SCALE, _SHIFT, _DROP, _JITTER = range(_DRAWS)


def rotation_matrices(key: Tensor, rotation: Rotation) -> Tensor:
    """Random rotations: about the vertical y axis by a uniform angle, or uniform over all rotations.

    Uniform rotations come from normalised quaternions of four normal numbers (Shoemake, "Uniform Random Rotations",
    Graphics Gems III, 1992).

    Args:
        key: `(B,)` int64.
        rotation: "yaw" or "full".

    Returns:
        `(B, 3, 3)` float32, orthogonal with determinant 1; points rotate by `points @ matrix.mT`.

    Raises:
        ValueError: for another name.

    Example:
        >>> torch.det(rotation_matrices(torch.arange(2), "full"))
        tensor([1., 1.])
    """
    if rotation == "yaw":
        angle = uniform(key, high=2.0 * math.pi)
        cos, sin, zero, one = angle.cos(), angle.sin(), torch.zeros_like(angle), torch.ones_like(angle)
        rows = [cos, zero, sin, zero, one, zero, -sin, zero, cos]
    elif rotation == "full":
        w, x, y, z = torch.nn.functional.normalize(normal(key, 4), dim=-1).unbind(-1)
        rows = [
            *(1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
            *(2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
            *(2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
        ]
    else:
        raise ValueError(f"rotation must be 'yaw' or 'full', got {rotation!r}")
    return torch.stack(rows, dim=-1).view(-1, 3, 3)


def subsample(
    points: Tensor, key: Tensor, num_points: int, part: Tensor | None = None, count: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Keep a random subset of each cloud's points, without replacement; a smaller cloud repeats points.

    Args:
        points: `(B, N, 3)`.
        key: `(B,)` int64.
        num_points: how many to keep.
        part: `(B, N)` labels that go with the points, or None.
        count: `(B,)` int64, in [1, N]: only so many of a cloud's points, from the first on, are taken; None takes from all.

    Returns:
        Points `(B, num_points, 3)` and their labels `(B, num_points)` or None.

    Example:
        >>> subsample(torch.rand(2, 64, 3), torch.tensor([1, 2]), 16)[0].shape
        torch.Size([2, 16, 3])
    """
    length = points.shape[1]
    order = random_order(key, length)
    if count is None:
        order = order.repeat(1, -(-num_points // length))[:, :num_points] if num_points > length else order[:, :num_points]
    else:
        # The places of a cloud's own points in the order, which stays as it is without the others.
        own = order < count[:, None]
        place = torch.where(own, own.cumsum(1) - 1, length)
        own_order = order.new_zeros(len(order), length + 1).scatter_(1, place, order)
        order = own_order.gather(1, torch.arange(num_points, device=order.device) % count[:, None])
    # Whole rows of one table: it is faster than to gather each coordinate.
    row = (order + torch.arange(len(order), device=order.device)[:, None] * length).flatten()
    kept = points.flatten(0, 1).index_select(0, row).view(*order.shape, points.shape[-1])
    return kept, None if part is None else part.gather(1, order)


def drop_points(points: Tensor, key: Tensor, max_ratio: float, part: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Replace a random share of each cloud's points, uniform in [0, max_ratio), by its first point.

    The shape stays; a maximum over points does not see the copies (Qi et al., "PointNet++", NeurIPS 2017, section 3.3).

    Args:
        points: `(B, N, 3)`.
        key: `(B,)` int64.
        max_ratio: in [0, 1).
        part: `(B, N)` labels that go with the points, or None.

    Returns:
        Points and labels of the same shapes.

    Example:
        >>> drop_points(torch.rand(2, 64, 3), torch.tensor([1, 2]), 0.5)[0].shape
        torch.Size([2, 64, 3])
    """
    ratio = uniform(fold_in(key, 0), 1, high=max_ratio)
    drop = uniform(fold_in(key, 1), points.shape[1]) < ratio
    points = torch.where(drop.unsqueeze(-1), points[:, :1], points)
    return points, None if part is None else torch.where(drop, part[:, :1], part)


def _transform(points: Tensor, matrix: Tensor) -> Tensor:
    """The products of points `(B, N, 3)` and matrices `(B, 3, 3)`."""
    # For rows of three numbers, numpy's product is several times faster than torch's.
    if points.device.type == "cpu" and points.dtype == torch.float32 and not points.requires_grad:
        return torch.from_numpy(np.matmul(points.numpy(), matrix.contiguous().numpy()))
    return _transform_plain(points, matrix.to(points.dtype))


def _transform_plain(points: Tensor, matrix: Tensor) -> Tensor:
    # Not by torch's product, which may round to TF32 or bfloat16.
    (x, y, z), (a, b, c) = points.split(1, dim=-1), matrix.split(1, dim=-2)
    return x * a + y * b + z * c


@dataclass(frozen=True)
class PointAugmentation:
    """What to do to the clouds of a training batch; the defaults suit objects that are already upright.

    In this order: random subset, rotation, scale, shift, point dropout, jitter. Each cloud draws its own parameters.

    Attributes:
        rotation: "none", "yaw" (about the vertical y axis) or "full" (any rotation).
        scale: range of the factor, each axis its own if `scale_axes`.
        scale_axes: whether each axis has its own factor.
        shift: largest shift along each axis, in units of the normalised cloud.
        dropout: largest share of points replaced by the first one, in [0, 1).
        jitter: standard deviation of the noise added to each coordinate.
        jitter_clip: largest absolute noise.

    Example:
        >>> augment = PointAugmentation(rotation="yaw", jitter=0.01)
        >>> augment(torch.rand(2, 64, 3), key=torch.tensor([1, 2]))[0].shape
        torch.Size([2, 64, 3])
    """

    rotation: Rotation = "none"
    scale: tuple[float, float] = (0.8, 1.25)
    scale_axes: bool = True
    shift: float = 0.1
    dropout: float = 0.0
    jitter: float = 0.0
    jitter_clip: float = 0.05

    def __post_init__(self) -> None:
        if self.rotation not in get_args(Rotation):
            raise ValueError(f"rotation must be one of {', '.join(get_args(Rotation))}; got {self.rotation!r}")
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"scale must be a range (low, high) with 0 < low <= high, got {self.scale}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}")
        if min(self.shift, self.jitter, self.jitter_clip) < 0:
            raise ValueError("shift, jitter and jitter_clip must be at least 0")

    def __call__(
        self,
        points: Tensor,
        key: Tensor,
        num_points: int | None = None,
        part: Tensor | None = None,
        count: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Augment a batch.

        Args:
            points: `(B, N, 3)` float32.
            key: `(B,)` int64.
            num_points: size of the random subset, or None for all points.
            part: `(B, N)` part labels, or None.
            count: `(B,)` int64: the subset is taken from so many points of each cloud; None takes it from all.

        Returns:
            Points `(B, num_points, 3)` and labels `(B, num_points)` or None.
        """
        keys = fold_in(key[:, None], torch.arange(_DRAWS, device=key.device)).unbind(1)
        if num_points is not None:
            points, part = subsample(points, keys[_SUBSAMPLE], num_points, part, count)
        if self.rotation != "none" or self.scale != (1.0, 1.0):
            eye = torch.eye(3, device=points.device)
            matrix = eye if self.rotation == "none" else rotation_matrices(keys[_ROTATE], self.rotation).mT
            if self.scale != (1.0, 1.0):
                axes = 3 if self.scale_axes else 1
                matrix = matrix * uniform(keys[_SCALE], 1, axes, low=self.scale[0], high=self.scale[1])
            points = _transform(points, matrix)
        if self.shift:
            points = points + uniform(keys[_SHIFT], 1, 3, low=-self.shift, high=self.shift)
        if self.dropout:
            points, part = drop_points(points, keys[_DROP], self.dropout, part)
        if self.jitter:
            points = points + normal(keys[_JITTER], points.shape[1], 3).mul_(self.jitter).clamp_(-self.jitter_clip, self.jitter_clip)
        return points, part
