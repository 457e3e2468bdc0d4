"""Views of a batch for test-time augmentation, and the mean of what a network makes of them."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from .points import half_order, turn_about_y

View = Callable[[Tensor], Tensor]
ViewPreset = Literal["flip", "flip_rotations", "shifts", "scales", "yaw", "mirror", "halves"]
Merge = Literal["probabilities", "logits"]


# Views of images (..., H, W)


def _check_images(images: Tensor) -> None:
    if not isinstance(images, Tensor) or images.dim() < 4:
        raise ValueError(f"this view is one of images (batch, channels, height, width), got {_kind(images)}")


def flip(images: Tensor) -> Tensor:
    """Mirror left and right: `(B, ..., C, H, W)`, any type, to the same."""
    _check_images(images)
    return images.flip(-1)


def rotate(images: Tensor, quarters: int, flipped: bool = False) -> Tensor:
    """Turn by quarters of a full turn anticlockwise, after mirroring if `flipped`; exact, no pixel is interpolated.

    Args:
        images: `(B, ..., C, H, W)`, any type, H = W.
        quarters: how many, of either sign.
        flipped: mirror left and right before.

    Returns:
        The same shape and type.

    Raises:
        ValueError: if they are no images, or not square.

    Example:
        >>> rotate(torch.tensor([[[[1, 2], [3, 4]]]]), 1)
        tensor([[[[2, 4],
                  [1, 3]]]])
    """
    _check_images(images)
    if images.shape[-2] != images.shape[-1]:
        raise ValueError(f"only square images keep their shape when they are turned, these are {images.shape[-2]} x {images.shape[-1]}")
    return (images.flip(-1) if flipped else images).rot90(quarters, (-2, -1))


def shift(images: Tensor, right: float, down: float) -> Tensor:
    """Move the content by a share of the size, rounded to whole pixels and at least one; what comes in repeats the border.

    Args:
        images: `(B, ..., C, H, W)`, any type.
        right: share of the width, negative to the left.
        down: share of the height, negative upwards.

    Returns:
        The same shape and type.

    Raises:
        ValueError: if they are no images.

    Example:
        >>> shift(torch.tensor([[[[1, 2, 3]]]]), 0.3, 0.0)
        tensor([[[[1, 1, 2]]]])
    """
    _check_images(images)
    rows, columns = (
        (torch.arange(size, device=images.device) - _pixels(share, size)).clamp(0, size - 1)
        for share, size in ((down, images.shape[-2]), (right, images.shape[-1]))
    )
    return images[..., rows[:, None], columns]


def _pixels(share: float, size: int) -> int:
    return int(math.copysign(max(1, round(abs(share) * size)), share)) if share else 0


def zoom(images: Tensor, factor: float) -> Tensor:
    """Enlarge the content about the centre, or reduce it, by bilinear interpolation; what comes in repeats the border.

    Args:
        images: `(B, ..., C, H, W)` float.
        factor: above 1 enlarges, below 1 reduces.

    Returns:
        The same shape and type; computed in float32 or wider.

    Raises:
        ValueError: if they are no images in floats.

    Example:
        >>> zoom(torch.rand(2, 3, 32, 32), 1.1).shape
        torch.Size([2, 3, 32, 32])
    """
    _check_images(images)
    if not images.is_floating_point():
        raise ValueError(f"zooming interpolates, and wants images in floats, got {images.dtype}")
    wide = images.flatten(0, -4).to(torch.promote_types(images.dtype, torch.float32))
    with torch.autocast(wide.device.type, enabled=False):
        scale = torch.tensor([[1 / factor, 0, 0], [0, 1 / factor, 0]], dtype=wide.dtype, device=wide.device)
        grid = F.affine_grid(scale.expand(len(wide), 2, 3), list(wide.shape), align_corners=False)
        zoomed = F.grid_sample(wide, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return zoomed.to(images.dtype).view(images.shape)


# Views of point clouds (B, N, 3)


def _check_points(points: Tensor) -> None:
    if not isinstance(points, Tensor) or points.dim() != 3 or points.shape[-1] != 3:
        raise ValueError(f"this view is one of clouds (batch, points, 3), got {_kind(points)}")


def yaw(points: Tensor, turns: float) -> Tensor:
    """Turn clouds `(B, N, 3)` about the vertical y axis by a share of a full turn; the same shape and type."""
    _check_points(points)
    return turn_about_y(points, torch.tensor(2 * math.pi * turns, dtype=torch.float64, device=points.device))


def mirror(points: Tensor) -> Tensor:
    """Mirror clouds `(B, N, 3)` at the plane x = 0; the same shape and type."""
    _check_points(points)
    return points * torch.tensor([-1, 1, 1], dtype=points.dtype, device=points.device)


def half(points: Tensor, number: int) -> Tensor:
    """The number-th of fixed random halves of the points: `(B, N, 3)` -> `(B, ceil(N / 2), 3)`, as `voting_views` takes them."""
    _check_points(points)
    return points[:, half_order(torch.tensor(number, device=points.device), points.shape[1])]


VIEWS: dict[str, tuple[View, ...]] = {
    "flip": (flip,),
    "flip_rotations": tuple(
        partial(rotate, quarters=quarters, flipped=flipped) for flipped in (False, True) for quarters in range(4) if quarters or flipped
    ),
    "shifts": tuple(partial(shift, right=x / 16, down=y / 16) for x, y in ((1, 0), (-1, 0), (0, 1), (0, -1))),
    "scales": (partial(zoom, factor=0.9), partial(zoom, factor=1.1)),
    "yaw": tuple(partial(yaw, turns=number / 12) for number in range(1, 12)),
    "mirror": (mirror,),
    "halves": tuple(partial(half, number=number) for number in range(4)),
}


def resolve_views(views: str | Sequence[View]) -> tuple[View, ...]:
    """The views of a preset, or the given ones; the batch as it is comes besides, and is none of them.

    Args:
        views: a name of `VIEWS`, or functions from inputs to inputs.

    Returns:
        The functions.

    Raises:
        ValueError: if there is no such preset.
        TypeError: if one is no function.

    Example:
        >>> len(resolve_views("flip_rotations"))
        7
    """
    if isinstance(views, str):
        if views not in VIEWS:
            raise ValueError(f"views must be a sequence of functions or one of {', '.join(get_args(ViewPreset))}; got {views!r}")
        return VIEWS[views]
    if not isinstance(views, Sequence) or not all(map(callable, views)):
        raise TypeError(f"views must be a sequence of functions from inputs to inputs, or the name of a preset; got {views!r}")
    return tuple(cast(Sequence[View], views))


# The mean over views


def log_mean_probability(logits: Tensor, dim: int = 0) -> Tensor:
    """Log of the mean of the probabilities that several logits give: log (1/V sum_v softmax(z_v)).

    Softmax, argmax and cross entropy of the result are those of the mean. Exact where probabilities underflow.

    Args:
        logits: `(..., C)` float, with the V members along `dim`.
        dim: over which the mean is taken, not the last one.

    Returns:
        The shape without `dim`; float32 or wider.

    Example:
        >>> log_mean_probability(torch.tensor([[0.0, 0.0], [1000.0, 0.0]])).exp()
        tensor([0.7500, 0.2500])
    """
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)
    return scores.logsumexp(dim=dim) - math.log(logits.shape[dim])


def over_views(
    function: Callable[..., Any],
    views: Sequence[View],
    merge: Merge | Callable[[list[Any]], Any],
    inputs: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """What a function makes of a batch and of views of it, merged.

    - "probabilities": log (1/V sum_v softmax(f(view_v(x)))), see `log_mean_probability`;
    - "logits": 1/V sum_v f(view_v(x)), the log of the geometric mean of the probabilities, up to a constant;
    - a function of the list of outputs, for anything else.

    The first view is the batch as it is; with no others, its output is the result, unchanged. The views are processed one by
    one: in evaluation mode that gives what one large batch would, in the memory of a single view.

    Args:
        function: inputs -> output, such as a network's forward; `(B, C)` logits for "probabilities", `(B,)` or `(B, C)` for "logits".
        views: the other views.
        merge: how the outputs become one.
        inputs: the batch.
        args: further arguments of the function, the same for each view.
        kwargs: likewise.

    Returns:
        For "probabilities" and "logits" the shape of an output, in float32 or wider.

    Raises:
        ValueError: if `merge` cannot merge such outputs.

    Example:
        >>> over_views(network, VIEWS["flip"], "probabilities", images)
    """
    output = function(inputs, *args, **kwargs)
    if not views:
        return output
    if not callable(merge):
        _check_output(output, merge)
    outputs = [output, *(function(view(inputs), *args, **kwargs) for view in views)]
    if callable(merge):
        return merge(outputs)
    shapes = {tuple(found.shape) for found in outputs}
    if len(shapes) > 1:
        raise ValueError(f"the outputs for the views have different shapes, {sorted(shapes)}, and cannot be averaged")
    stacked = torch.stack([found.to(torch.promote_types(found.dtype, torch.float32)) for found in outputs])
    return log_mean_probability(stacked) if merge == "probabilities" else stacked.mean(dim=0)


def _check_output(output: Any, merge: str) -> None:
    is_tensor = isinstance(output, Tensor) and output.is_floating_point()
    if is_tensor and (output.dim() == 2 and output.shape[1] > 1 if merge == "probabilities" else 0 < output.dim() <= 2):
        return
    wanted = "logits (batch, classes)" if merge == "probabilities" else "scores (batch,) or (batch, classes)"
    raise ValueError(
        f"merge={merge!r} averages {wanted}, but the output is {_kind(output)}: give a function of the list of outputs as merge"
    )


def _kind(value: Any) -> str:
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def check_merge(merge: str | Callable[[list[Any]], Any]) -> Merge | Callable[[list[Any]], Any]:
    """Refuse what `over_views` does not take.

    Args:
        merge: "probabilities", "logits" or a function.

    Returns:
        The same.

    Raises:
        ValueError: if it is something else.
    """
    if not callable(merge) and merge not in get_args(Merge):
        raise ValueError(f"merge must be one of {', '.join(get_args(Merge))}, or a function of the list of outputs; got {merge!r}")
    return cast(Merge | Callable[[list[Any]], Any], merge)
