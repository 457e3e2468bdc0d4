"""Linear, BatchNorm and ReLU for every point, and the maximum over the points, with fewer passes over memory than the plain layers.

The batch statistics of W x follow from those of x: with mean m and covariance S of x over all points of all clouds, a channel w of W
has mean w.m and variance w.S w. So BatchNorm becomes part of the product, and W x need not be kept for the gradient.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

# Numbers that a thread works on at a time, so that they stay in its cache: of features, and of W x where only its maximum is wanted.
_CHUNK = 1 << 17
_SCORES = 1 << 18
# The same of a GPU, where they have to fit its memory.
_GPU_CHUNK = 1 << 25
# Points that are compared at a time.
_GROUP = 64


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


class _Statistics(NamedTuple):
    """What BatchNorm needs of W x, from the input x of the Linear.

    Attributes:
        center: `(K,)`, mean of x over all points of all clouds; None where the running statistics are used.
        covariance: `(K, K)` of x; None likewise.
        mean: `(C,)`, of W x.
        variance: `(C,)`, of W x.
    """

    center: Tensor | None
    covariance: Tensor | None
    mean: Tensor
    variance: Tensor


def _blocks(x: Tensor, width: int, chunk: int = _CHUNK) -> Iterator[slice]:
    """Some clouds of `(B, K, N)` at a time, so that `(b, width, N)` has about `chunk` numbers for each thread."""
    numbers = _GPU_CHUNK if x.is_cuda else chunk * torch.get_num_threads()
    size = max(1, numbers // (width * x.shape[2]))
    return (slice(start, start + size) for start in range(0, len(x), size))


@torch.no_grad()
def _statistics(x: Tensor, weight: Tensor, norm: nn.BatchNorm1d) -> _Statistics:
    """The statistics that BatchNorm applies to W x in its mode; the running ones are updated as BatchNorm does."""
    if not norm.training and norm.running_mean is not None:
        assert norm.running_var is not None
        return _Statistics(None, None, norm.running_mean.clone(), norm.running_var.clone())
    count = x.shape[0] * x.shape[2]
    if count == 1:
        raise ValueError("a training batch of a single point has no variance: give more points or clouds")
    center = x.mean(dim=(0, 2))
    covariance = x.new_zeros(x.shape[1], x.shape[1])
    for part in _blocks(x, x.shape[1]):
        centered = x[part] - center[:, None]
        covariance += (centered @ centered.mT).sum(dim=0)
    covariance /= count
    # Rounding may make the variance of a channel that hardly varies negative, and its square root NaN.
    mean, variance = weight @ center, ((weight @ covariance) * weight).sum(dim=1).clamp_min_(0)
    if norm.training and norm.track_running_stats and norm.running_mean is not None:
        assert norm.running_var is not None
        assert norm.num_batches_tracked is not None
        norm.num_batches_tracked.add_(1)
        share = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
        norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), share)
        norm.running_var.lerp_((variance * (count / (count - 1))).to(norm.running_var.dtype), share)
    return _Statistics(center, covariance, mean, variance)


def _plain(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, statistics: _Statistics, eps: float) -> Tensor:
    """BatchNorm(W x), in operations that can be differentiated any number of times."""
    by_batch = statistics.center is not None
    mean, variance = (None, None) if by_batch else (statistics.mean, statistics.variance)
    return F.batch_norm(weight @ x, mean, variance, scale, shift, training=by_batch, eps=eps)


def _gradients_of(output: Tensor, inputs: tuple[Tensor, ...], gradient: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients for the inputs that need one, themselves differentiable."""
    needed = [tensor for tensor in inputs if tensor.requires_grad]
    found = iter(torch.autograd.grad(output, needed, gradient, create_graph=True))
    return tuple(next(found) if tensor.requires_grad else None for tensor in inputs)


class _Dense(torch.autograd.Function):
    """BatchNorm(W x), or relu of it, for every point; only x and, behind a ReLU, the result are kept for the gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, eps: float, relu: bool, statistics: _Statistics
    ) -> Tensor:
        factor = scale * (statistics.variance + eps).rsqrt()
        matrix, offset = weight * factor[:, None], (shift - statistics.mean * factor)[:, None]
        y = x.new_empty(len(x), len(weight), x.shape[2])
        for part in _blocks(x, max(weight.shape)):
            torch.matmul(matrix, x[part], out=y[part])
            y[part].add_(offset)
            if relu:
                y[part].clamp_min_(0)
        ctx.save_for_backward(x, weight, scale, shift, y if relu else None, *statistics)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale, shift, y, *rest = ctx.saved_tensors
        statistics = _Statistics(*rest)
        if torch.is_grad_enabled():  # somebody differentiates the gradient
            output = _plain(x, weight, scale, shift, statistics, ctx.eps)
            output = output if y is None else F.relu(output)
            return *_gradients_of(output, (x, weight, scale, shift), gradient), None, None, None
        inverse = (statistics.variance + ctx.eps).rsqrt()
        factor = scale * inverse
        matrix = weight * factor[:, None]
        product, total = torch.zeros_like(weight), torch.zeros_like(scale)
        by_input = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        blocks = list(_blocks(x, max(weight.shape)))
        for part in blocks:
            g = gradient[part] if y is None else _behind_relu(gradient[part], y[part])
            product += (g @ x[part].mT).sum(dim=0)
            total += g.sum(dim=2).sum(dim=0)
            if by_input is not None:
                torch.matmul(matrix.mT, g, out=by_input[part])
        by_scale = inverse * ((product * weight).sum(dim=1) - statistics.mean * total)
        by_weight = _weight_gradient(product, total, by_scale, weight, factor, inverse, statistics)
        if by_input is not None and statistics.center is not None:
            mixing, constant = _input_gradient(total, by_scale, weight, factor, inverse, statistics.center, x.shape[0] * x.shape[2])
            for part in blocks:
                by_input[part].add_(constant).sub_(mixing @ x[part])
        return by_input, by_weight, by_scale, total, None, None, None


class _Maximum(torch.autograd.Function):
    """The maximum of BatchNorm(W x) over the points, and the winning points."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, eps: float, relu: bool, statistics: _Statistics
    ) -> tuple[Tensor, Tensor]:
        # The largest value has the largest W x, the smallest where gamma < 0.
        sign = torch.where(scale < 0, -1.0, 1.0).to(weight.dtype)
        best, point = _best(x, weight * sign[:, None])
        normal = (best * sign - statistics.mean) * (statistics.variance + eps).rsqrt()
        value = normal * scale + shift
        if relu:
            value.clamp_min_(0)
        ctx.save_for_backward(x, weight, scale, shift, point, normal, value, *statistics)
        ctx.mark_non_differentiable(point)
        ctx.eps, ctx.relu = eps, relu
        return value, point

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale, shift, point, normal, value, *rest = ctx.saved_tensors
        statistics = _Statistics(*rest)
        if torch.is_grad_enabled():  # somebody differentiates the gradient
            output = _plain(x, weight, scale, shift, statistics, ctx.eps).gather(2, point.unsqueeze(2)).squeeze(2)
            output = F.relu(output) if ctx.relu else output
            return *_gradients_of(output, (x, weight, scale, shift), gradient), None, None, None
        g = _behind_relu(gradient, value) if ctx.relu else gradient
        inverse = (statistics.variance + ctx.eps).rsqrt()
        factor = scale * inverse
        matrix = weight * factor[:, None]
        by_scale, total = (g * normal).sum(dim=0), g.sum(dim=0)
        by_input = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        mixing = constant = None
        if statistics.center is not None:
            mixing, constant = _input_gradient(total, by_scale, weight, factor, inverse, statistics.center, x.shape[0] * x.shape[2])
        product = torch.zeros_like(weight)
        for part in _blocks(x, max(weight.shape[1], 1)):
            clouds, channels, points = x[part].shape
            # Points along rows, so that a winner is one stretch of memory.
            rows = _transposed(x[part], x.new_empty(clouds, points, channels)).flatten(0, 1)
            row = (point[part] + torch.arange(clouds, device=x.device)[:, None] * points).flatten()
            chosen = rows.index_select(0, row).view(clouds, -1, channels)
            if x.is_cuda:
                product += torch.einsum("bck,bc->ck", chosen, g[part])
            else:
                for mine, weights in zip(chosen, g[part], strict=True):
                    product.addcmul_(mine, weights[:, None])
            if by_input is not None:
                direct = rows.new_zeros(rows.shape) if constant is None else constant.T.repeat(len(rows), 1)
                direct.index_add_(0, row, (g[part][:, :, None] * matrix).flatten(0, 1))
                if mixing is not None:
                    direct.addmm_(rows, mixing, alpha=-1)
                _transposed(direct.view(clouds, points, channels), by_input[part])
        by_weight = _weight_gradient(product, total, by_scale, weight, factor, inverse, statistics)
        return by_input, by_weight, by_scale, total, None, None, None


def _transposed(x: Tensor, into: Tensor) -> Tensor:
    """Copy matrices `(B, K, N)` into `(B, N, K)`; on a CPU one by one, because torch transposes a single matrix much faster."""
    if x.is_cuda:
        return into.copy_(x.mT)
    for source, target in zip(x, into, strict=True):
        target.copy_(source.mT)
    return into


def _behind_relu(gradient: Tensor, output: Tensor) -> Tensor:
    """The gradient where a ReLU let something through, in one pass."""
    return torch.ops.aten.threshold_backward(gradient, output, 0)


def _weight_gradient(
    product: Tensor, total: Tensor, by_scale: Tensor, weight: Tensor, factor: Tensor, inverse: Tensor, statistics: _Statistics
) -> Tensor:
    """dL/dW, from `product` = sum g x^T and `total` = sum g of the gradient g behind BatchNorm."""
    if statistics.center is None or statistics.covariance is None:
        return factor[:, None] * product
    moved = (by_scale * inverse)[:, None] * (weight @ statistics.covariance)
    return factor[:, None] * (product - total[:, None] * statistics.center - moved)


def _input_gradient(
    total: Tensor, by_scale: Tensor, weight: Tensor, factor: Tensor, inverse: Tensor, center: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """What the batch statistics add to dL/dx at every point: constant - mixing x, symmetric `(K, K)` and `(K, 1)`."""
    mixing = (weight.mT * (factor * inverse * by_scale / count)) @ weight
    return mixing, (mixing @ center - weight.mT @ (factor * total / count))[:, None]


def _best(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The largest `weight @ x` of each cloud and channel, and its point: `(B, K, N)`, `(C, K)` -> twice `(B, C)`."""
    best = x.new_empty(len(x), len(weight))
    points = torch.empty(best.shape, dtype=torch.long, device=x.device)
    channels = len(weight) if x.is_cuda else max(1, _SCORES * torch.get_num_threads() // x.shape[2])
    for part in _blocks(x, min(channels, len(weight)), _SCORES):
        for start in range(0, len(weight), channels):
            rows = slice(start, start + channels)
            # Channels by points, so that the maximum runs along memory.
            scores = weight[rows] @ x[part]
            point = _argmax(scores)
            best[part, rows] = scores.gather(2, point.unsqueeze(2)).squeeze(2)
            points[part, rows] = point
    return best, points


def _argmax(scores: Tensor) -> Tensor:
    """`scores.argmax(dim=2)`, twice as fast on a CPU: first the group, by the vectorised maximum, then the place in it."""
    points = scores.shape[2]
    grouped = points - points % _GROUP
    if grouped == 0 or scores.is_cuda:
        return scores.argmax(dim=2)
    groups = scores[..., :grouped].unflatten(2, (-1, _GROUP))
    highest, group = groups.amax(dim=3).max(dim=2)
    members = groups.gather(2, group[..., None, None].expand(-1, -1, 1, _GROUP)).squeeze(2)
    place = group * _GROUP + members.argmax(dim=2)
    if grouped == points:
        return place
    last, rest = scores[..., grouped:].max(dim=2)
    return torch.where(last > highest, rest + grouped, place)


def linear_batchnorm(x: Tensor, weight: Tensor, norm: nn.BatchNorm1d, relu: bool = True) -> Tensor:
    """relu(BatchNorm(W x)) for every point, equal to the plain layers and cheaper.

    W x is never kept, and a few clouds at a time stay in the cache. The running statistics are updated as BatchNorm does.

    Args:
        x: `(B, K, N)` float32 or float64, N points of each of B clouds.
        weight: `(C, K)`.
        norm: over C channels, with scale and shift; its mode decides between the statistics of the batch and the running ones.
        relu: whether a ReLU comes last.

    Returns:
        `(B, C, N)`.

    Raises:
        ValueError: if a training batch has a single point in all, which has no variance.

    Example:
        >>> linear_batchnorm(torch.rand(2, 3, 1024), torch.rand(64, 3), nn.BatchNorm1d(64)).shape
        torch.Size([2, 64, 1024])
    """
    return _Dense.apply(x, weight, norm.weight, norm.bias, norm.eps, relu, _statistics(x, weight, norm))


def linear_batchnorm_max(x: Tensor, weight: Tensor, norm: nn.BatchNorm1d, relu: bool = True) -> Maxima:
    """max over points of relu(BatchNorm(W x)), and which point wins, equal to the plain layers and much cheaper.

    BatchNorm and ReLU are monotone in each channel, so the maximum is taken over W x (the minimum where gamma < 0) and they are
    applied to the winners alone. So the gradient flows through the winning points, m and S, and W x is needed for the comparison
    only. The running statistics are updated as BatchNorm does.

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
    return Maxima(*_Maximum.apply(x, weight, norm.weight, norm.bias, norm.eps, relu, _statistics(x, weight, norm)))


class PointwiseLayers(nn.Sequential):
    """Conv1d, BatchNorm1d and ReLU any number of times, fused by `linear_batchnorm`; the state dict is that of `nn.Sequential`.

    An `nn.Identity` in the place of a ReLU leaves it out. They are applied one by one where fusing would change what somebody sees: see
    `fusible`; and under autocast.

    Example:
        >>> PointwiseLayers(nn.Conv1d(3, 8, 1, bias=False), nn.BatchNorm1d(8), nn.ReLU())(torch.rand(2, 3, 64)).shape
        torch.Size([2, 8, 64])
    """

    def forward(self, x: Tensor) -> Tensor:
        """`(B, K, N)` -> `(B, C, N)`."""
        layers = list(self)
        for conv, norm, activation in zip(layers[::3], layers[1::3], layers[2::3], strict=True):
            if fusible(conv, norm, activation) and not torch.is_autocast_enabled(x.device.type):
                assert isinstance(conv, nn.Conv1d)
                assert isinstance(norm, nn.BatchNorm1d)
                x = linear_batchnorm(x, conv.weight.squeeze(-1), norm, relu=isinstance(activation, nn.ReLU))
            else:
                x = activation(norm(conv(x)))
        return x


def max_over_points(layers: nn.Sequential, x: Tensor) -> Maxima:
    """Apply pointwise layers that end in Conv1d, BatchNorm1d and ReLU or Identity, and take the maximum over the points.

    The last three are fused by `linear_batchnorm_max`, in float32 also under autocast. They are applied one by one where fusing would
    change what somebody sees: see `fusible`.

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
    conv, norm, activation = layers[-3:]
    if not fusible(conv, norm, activation):
        found = layers(x).max(dim=2)
        return Maxima(found.values, found.indices)
    assert isinstance(conv, nn.Conv1d)
    assert isinstance(norm, nn.BatchNorm1d)
    x = layers[:-3](x)
    with torch.autocast(x.device.type, enabled=False):
        return linear_batchnorm_max(x.to(conv.weight.dtype), conv.weight.squeeze(-1), norm, relu=isinstance(activation, nn.ReLU))


def fusible(conv: nn.Module, norm: nn.Module, activation: nn.Module) -> bool:
    """Whether the three are plain layers that nobody watches.

    Not so: a hook on one of them or on all modules, another class in the place of one, an export or a compilation, transforms of
    `torch.func`, forward-mode gradients, meta tensors, weights in half precision.

    Args:
        conv: to be a Conv1d of one point.
        norm: to be a BatchNorm1d.
        activation: to be a ReLU, or an Identity.

    Returns:
        Whether fusing them changes nothing that somebody sees.

    Example:
        >>> fusible(nn.Conv1d(3, 8, 1, bias=False), nn.BatchNorm1d(8), nn.GELU())
        False
    """
    if type(conv) is not nn.Conv1d or type(norm) is not nn.BatchNorm1d or type(activation) not in (nn.ReLU, nn.Identity):
        return False
    if torch.jit.is_tracing() or torch.compiler.is_compiling():  # also while exporting
        return False
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:  # the fused gradients know neither
        return False
    if conv.weight.is_meta or _has_any_global_hook():
        return False
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if any(getattr(layer, name) for layer in (conv, norm, activation) for name in hooks):
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
