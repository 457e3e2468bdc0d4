"""Linear, BatchNorm and ReLU for every point, then the maximum over the points, without ever holding the wide features' gradient."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Maxima(NamedTuple):
    """What a maximum over the points of each cloud found.

    Attributes:
        value: `(B, C)`, the maximum of each channel.
        point: `(B, C)` int64, the point that attains it; of equal ones any.

    Example:
        >>> Maxima(torch.tensor([[0.5]]), torch.tensor([[7]])).point
        tensor([[7]])
    """

    value: Tensor
    point: Tensor


# Scores that are held at a time, numbers.
_BLOCK = 1 << 22
_GROUP = 64


class _Gram(torch.autograd.Function):
    """A A^T, whose gradient (G + G^T) A takes one product instead of two."""

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        ctx.save_for_backward(a)
        return a @ a.mT

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (a,) = ctx.saved_tensors
        return (gradient + gradient.mT) @ a


def _winners(x: Tensor, weight: Tensor) -> Tensor:
    """The point with the largest `weight @ x` of each cloud and channel: `(B, K, N)`, `(C, K)` -> `(B, C)` int64."""
    clouds = max(1, _BLOCK // (weight.shape[0] * x.shape[2]))
    # Channels by points, so that the maximum runs along memory.
    return torch.cat([_argmax(weight @ part) for part in x.split(clouds)])


def _argmax(scores: Tensor) -> Tensor:
    """`scores.argmax(dim=2)`, twice as fast on a CPU: first the group, by the vectorised maximum, then the place in it."""
    batch, channels, points = scores.shape
    if points % _GROUP or scores.is_cuda:
        return scores.argmax(dim=2)
    groups = scores.view(-1, points // _GROUP, _GROUP)
    group = groups.amax(dim=2).argmax(dim=1)
    row = group + torch.arange(len(group), device=group.device) * groups.shape[1]
    return (group * _GROUP + groups.view(-1, _GROUP).index_select(0, row).argmax(dim=1)).view(batch, channels)


def linear_batchnorm_max(x: Tensor, weight: Tensor, norm: nn.BatchNorm1d, relu: bool = True) -> Maxima:
    """max over points of relu(BatchNorm(W x)), and which point wins, equal to the plain layers and much cheaper.

    BatchNorm and ReLU are monotone in each channel, so the maximum is taken over W x (the minimum where gamma < 0) and they are
    applied to the winners alone. The batch statistics follow from those of the input: with mean m and covariance S of x over all
    points of all clouds, a channel w has mean w.m and variance w.S w. So the gradient flows through the winning points, m and S,
    and W x is needed for the comparison only. The running statistics are updated as BatchNorm does.

    Args:
        x: `(B, K, N)` float32 or float64, N points of each of B clouds.
        weight: `(C, K)`.
        norm: over C channels, with scale and shift; its mode decides between the statistics of the batch and the running ones.
        relu: whether a ReLU comes before the maximum.

    Returns:
        The maxima `(B, C)` and the winning points `(B, C)`.

    Raises:
        ValueError: if a training batch has a single point in all, which has no variance.

    Example:
        >>> features, point = linear_batchnorm_max(torch.rand(2, 128, 1024), torch.rand(512, 128), nn.BatchNorm1d(512))
        >>> features.shape, point.shape
        (torch.Size([2, 512]), torch.Size([2, 512]))

    Source:
        The network is that of Qi et al., "PointNet", CVPR 2017; the identities are elementary.
    """
    batch, _, points = x.shape
    count = batch * points
    by_batch = norm.training or norm.running_mean is None
    if by_batch and count == 1:
        raise ValueError("a training batch of a single point has no variance: give more points or clouds")
    with torch.no_grad():
        sign = torch.where(norm.weight < 0, -1.0, 1.0).to(weight.dtype)
        winner = _winners(x, weight * sign[:, None])
    # Points along rows, so that a winner is one stretch of memory.
    row = winner + torch.arange(batch, device=winner.device)[:, None] * points
    chosen = x.mT.flatten(0, 1).index_select(0, row.flatten()).view(batch, *weight.shape)
    best = (chosen * weight).sum(dim=2)
    if by_batch:
        center = x.mean(dim=(0, 2))
        centered = (x - center[:, None]).transpose(0, 1).flatten(1)
        covariance = _Gram.apply(centered) / count
        mean, variance = weight @ center, torch.einsum("ck,kl,cl->c", weight, covariance, weight)
        if norm.training and norm.track_running_stats:
            _update(norm, mean.detach(), variance.detach() * (count / (count - 1)))
    else:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        mean, variance = norm.running_mean, norm.running_var
    value = (best - mean) * (variance + norm.eps).rsqrt() * norm.weight + norm.bias
    return Maxima(F.relu(value) if relu else value, winner)


@torch.no_grad()
def _update(norm: nn.BatchNorm1d, mean: Tensor, variance: Tensor) -> None:
    """The running statistics after one more batch; without a momentum they are the mean over all batches."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked.add_(1)
    share = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), share)
    norm.running_var.lerp_(variance.to(norm.running_var.dtype), share)


def max_over_points(layers: nn.Sequential, x: Tensor) -> Maxima:
    """Apply pointwise layers that end in Conv1d, BatchNorm1d and ReLU, and take the maximum over the points.

    The last three are fused by `linear_batchnorm_max`, in float32 also under autocast. They are applied one by one where that would
    change what somebody sees: a hook or another class in the place of one of them, an export or a compilation, weights in half precision.

    Args:
        layers: `(B, K, N)` -> `(B, C, N)`.
        x: `(B, K, N)`.

    Returns:
        The maxima `(B, C)` and the winning points `(B, C)`.

    Example:
        >>> layers = nn.Sequential(nn.Conv1d(3, 8, 1, bias=False), nn.BatchNorm1d(8), nn.ReLU())
        >>> max_over_points(layers, torch.rand(2, 3, 64)).value.shape
        torch.Size([2, 8])
    """
    conv, norm, relu = layers[-3:]
    if not _fusible(conv, norm, relu):
        found = layers(x).max(dim=2)
        return Maxima(found.values, found.indices)
    assert isinstance(conv, nn.Conv1d)
    assert isinstance(norm, nn.BatchNorm1d)
    x = layers[:-3](x)
    with torch.autocast(x.device.type, enabled=False):
        return linear_batchnorm_max(x.to(conv.weight.dtype), conv.weight.squeeze(-1), norm)


def _fusible(conv: nn.Module, norm: nn.Module, relu: nn.Module) -> bool:
    if type(conv) is not nn.Conv1d or type(norm) is not nn.BatchNorm1d or type(relu) is not nn.ReLU:
        return False
    if torch.jit.is_tracing() or torch.compiler.is_compiling():  # also while exporting
        return False
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if any(getattr(layer, name) for layer in (conv, norm, relu) for name in hooks):
        return False
    return (
        conv.kernel_size == (1,)
        and conv.stride == (1,)
        and conv.padding == (0,)
        and conv.groups == 1
        and conv.bias is None
        and norm.affine
        and conv.weight.dtype in (torch.float32, torch.float64)
    )
