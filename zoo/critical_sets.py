"""Which points of a cloud decide what PointNet says, and how far a cloud may be filled up without changing it."""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .layers.modes import evaluating
from .pointnet import PointNet, PointNetOutput

# Grid points that are held at a time.
_BLOCK = 1 << 14


def critical_points(model: nn.Module, points: Tensor) -> list[Tensor]:
    """The points of each cloud that decide the model's answer: without all others the logits stay the same.

    PointNet sees a cloud only through maxima over its points. A point is critical if it attains one of them, in a channel that is not cut
    off by its ReLU: C_S = {argmax_i h_k(x_i) : max_i h_k(x_i) > 0}; where no ReLU comes before the maximum, in any channel. The maxima
    inside the T-Nets count as well, because their transforms change with their own winners; so the answer stays the same for every T with
    C_S <= T <= S, not only with the transforms held fixed. Of points that are equal in a channel one is taken. At most 1024 points for
    each maximum.

    Args:
        model: a `PointNetClassifier`, or another module with a `PointNet` as its `backbone`.
        points: `(B, N, 3)`, normalised as the model expects.

    Returns:
        For each cloud the ascending indices of its critical points, `(M,)` int64, at least one.

    Raises:
        TypeError: if the model has no `PointNet`.

    Example:
        >>> model = litzoo.load("pointnet_furniture")
        >>> cloud = torch.rand(1, 2048, 3)
        >>> kept = cloud[:, critical_points(model, cloud)[0]]
        >>> torch.allclose(model(kept), model(cloud), atol=1e-4)
        True

    Source:
        Qi et al., "PointNet", CVPR 2017, theorem 2 and section 5.3.
    """
    backbone = _backbone(model)
    output = _evaluate(backbone, points)
    transforms = [transform.points for transform in (backbone.input_transform, backbone.feature_transform) if transform is not None]
    critical = torch.zeros(points.shape[:2], dtype=torch.bool, device=points.device)
    for layers, maxima in zip([*transforms, backbone.wide], output.maxima, strict=True):
        cut = 0.0 if isinstance(layers[-1], nn.ReLU) else -torch.inf
        for cloud, alive, winner in zip(critical, maxima.value > cut, maxima.point, strict=True):
            cloud[winner[alive]] = True
    critical[~critical.any(dim=1), 0] = True  # every channel is cut off: any point tells as much as all
    return [cloud.nonzero().squeeze(1) for cloud in critical]


def upper_bound_points(model: nn.Module, points: Tensor, resolution: int = 64) -> list[Tensor]:
    """All points of a grid that could be added to a cloud without changing the model's answer: the upper-bound shape.

    A point x may be added if it exceeds no maximum, h_k(x) <= max_i h_k(x_i) for every channel k. The T-Nets' maxima are compared
    as well, so the transforms stay as they are and any number of such points may be added at once.

    Args:
        model: a `PointNetClassifier`, or another module with a `PointNet` as its `backbone`.
        points: `(B, N, 3)`, normalised as the model expects.
        resolution: grid points along each edge of the cube that holds [-1, 1]^3 and the cloud.

    Returns:
        For each cloud the grid points `(M, 3)`, of the dtype of `points`.

    Raises:
        TypeError: if the model has no `PointNet`.
        ValueError: if the resolution is below 2.

    Example:
        >>> shape = upper_bound_points(litzoo.load("pointnet_furniture"), torch.rand(1, 2048, 3), resolution=32)[0]

    Source:
        Qi et al., "PointNet", CVPR 2017, theorem 2 and section 5.3.
    """
    if resolution < 2:
        raise ValueError(f"resolution must be at least 2, got {resolution}")
    backbone = _backbone(model)
    output = _evaluate(backbone, points)
    axis = torch.linspace(-1, 1, resolution, dtype=points.dtype, device=points.device)
    grid = torch.cartesian_prod(axis, axis, axis)
    shapes = []
    for number, cloud in enumerate(points):
        reach = max(1.0, float(cloud.abs().max()))
        parts = (grid * reach).split(_BLOCK)
        shapes.append(torch.cat([part[_below(backbone, part, output, number)] for part in parts]))
    return shapes


def _backbone(model: nn.Module) -> PointNet:
    backbone = getattr(model, "backbone", None)
    if not isinstance(backbone, PointNet):
        raise TypeError(f"critical points belong to a PointNet, and {type(model).__name__} has none as its backbone")
    return backbone


@torch.no_grad()
def _evaluate(backbone: PointNet, points: Tensor) -> PointNetOutput:
    with evaluating(backbone):
        return backbone(points)


@torch.no_grad()
def _below(backbone: PointNet, grid: Tensor, output: PointNetOutput, number: int) -> Tensor:
    """The points of `(M, 3)` that exceed no maximum of that cloud, as a mask `(M,)`."""
    limits = [maxima.value[number] for maxima in output.maxima]
    place = torch.arange(len(grid), device=grid.device)
    x = grid.mT[None]
    with evaluating(backbone):
        if backbone.input_transform is not None and output.input_transform is not None:
            x, place = _keep(backbone.input_transform.points, limits.pop(0), x, place)
            x = output.input_transform[number].mT @ x
        x = backbone.local(x) if len(place) else x
        if backbone.feature_transform is not None and output.feature_transform is not None and len(place):
            x, place = _keep(backbone.feature_transform.points, limits.pop(0), x, place)
            x = output.feature_transform[number].mT @ x
        _, place = _keep(backbone.wide, limits.pop(0), x, place)
    return torch.zeros(len(grid), dtype=torch.bool, device=grid.device).index_fill_(0, place, True)


def _keep(layers: nn.Sequential, limit: Tensor, x: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
    """Of points `(1, K, M)` and their places `(M,)`, those whose features are at most `limit` `(C,)` in every channel."""
    if len(place) == 0:  # a convolution refuses no points
        return x, place
    conv, norm = layers[-3], layers[-2]
    assert isinstance(conv, nn.Conv1d)
    assert isinstance(norm, _BatchNorm)  # synchronised or not
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    weight, shift = conv.weight.squeeze(-1) * scale[:, None], norm.bias - norm.running_mean * scale
    hidden = layers[:-3](x)[0]
    # Some channels at a time, because most points fail in one of the first. A ReLU lowers nothing that is above a limit, which is >= 0.
    for channels in torch.arange(len(limit), device=limit.device).split(64):
        good = (torch.addmm(shift[channels, None], weight[channels], hidden) <= limit[channels, None]).all(dim=0)
        hidden, x, place = hidden[:, good], x[:, :, good], place[good]
    return x, place
