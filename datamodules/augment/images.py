"""Batched augmentation of images: every view gets parameters of its own, drawn from its sample's key."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ...zoo.functional.random import fold_in, uniform
from .randaugment import randaugment

Preset = Literal["none", "standard", "simclr", "supcon", "instdisc", "relational", "randaugment"]
# The columns of a view's uniform numbers. Each draw has columns of its own, so that switching one on leaves the others as they were.
_ATTEMPTS = 10
_AREA, _RATIO = slice(0, _ATTEMPTS), slice(_ATTEMPTS, 2 * _ATTEMPTS)
_TOP, _LEFT, _FLIP, _ROTATE, _ANGLE, _JITTER, _GRAY, _BLUR, _SIGMA, _SOLARIZE = range(20, 30)
_FACTORS, _ORDER = slice(30, 34), slice(34, 38)
_COLUMNS = 38
# A key of its own, because RandAugment draws as many numbers as it has operations.
_RANDAUGMENT = 1
_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = range(4)
# Weights of red, green and blue in torchvision's grey (ITU-R BT.601).
_LUMA = (0.2989, 0.587, 0.114)
# Pixels of the views worked on at a time on a CPU, so that they stay in its cache: 256 views of 32 x 32; a quarter of it where
# compiled code goes over them fewer times.
_BLOCK_PIXELS, _COMPILED_BLOCK_PIXELS = 256 * 32 * 32, 64 * 32 * 32


# Geometry


def crop_boxes(key: Tensor, height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float] = (3 / 4, 4 / 3)) -> Tensor:
    """Draw the boxes of a random resized crop: a uniform share of the area, a log-uniform ratio of width to height.

    Ten boxes are drawn for each key and the first that fits is taken; if none does, the largest centred box of an allowed ratio.

    Args:
        key: `(B,)` int64.
        height: pixels of the image.
        width: pixels of the image.
        scale: range of the share of the area.
        ratio: range of width / height.

    Returns:
        `(B, 4)` float32: top, left, height and width, whole numbers.

    Example:
        >>> crop_boxes(torch.arange(2), 32, 32, scale=(0.2, 1.0)).shape
        torch.Size([2, 4])

    Source:
        Szegedy et al., "Going Deeper with Convolutions", CVPR 2015, section 6; as in torchvision's RandomResizedCrop.
    """
    return _boxes(uniform(key, _COLUMNS), height, width, scale, ratio)


def _boxes(draw: Tensor, height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]) -> Tensor:
    area = (draw[:, _AREA] * (scale[1] - scale[0])).add_(scale[0]).mul_(height * width)
    aspect = (draw[:, _RATIO] * math.log(ratio[1] / ratio[0])).add_(math.log(ratio[0])).exp_()
    wide, high = (area * aspect).sqrt_().round_(), (area / aspect).sqrt_().round_()
    fits = (wide > 0) & (wide <= width) & (high > 0) & (high <= height)
    first = fits.int().argmax(dim=1, keepdim=True)  # the first of the largest
    wide, high, fits = (values.gather(1, first).squeeze(1) for values in (wide, high, fits))
    top, left = (draw[:, _TOP] * (height - high + 1)).floor_(), (draw[:, _LEFT] * (width - wide + 1)).floor_()
    in_ratio = width / height
    if in_ratio < ratio[0]:
        middle = (round(width / ratio[0]), width)
    elif in_ratio > ratio[1]:
        middle = (height, round(height * ratio[1]))
    else:
        middle = (height, width)
    fallback = torch.tensor([(height - middle[0]) // 2, (width - middle[1]) // 2, *middle], dtype=torch.float32, device=draw.device)
    return torch.where(fits[:, None], torch.stack([top, left, high, wide], dim=1), fallback)


def center_box(images: Tensor) -> Tensor:
    """The largest centred square of each image.

    Args:
        images: `(B, C, H, W)`.

    Returns:
        `(B, 4)` float32: top, left, height and width.

    Example:
        >>> center_box(torch.zeros(1, 3, 32, 48))
        tensor([[ 0.,  8., 32., 32.]])
    """
    height, width = images.shape[-2:]
    side = min(height, width)
    # Half a pixel goes to the even side, as in torchvision.
    corner = round((height - side) / 2), round((width - side) / 2)
    box = torch.tensor([*corner, side, side], dtype=torch.float32, device=images.device)
    return box.expand(len(images), 4)


def _resize_weights(start: Tensor, length: Tensor, pixels: int, size: int, mirrored: Tensor | None) -> Tensor:
    """How much each of `pixels` stored pixels gives to each of `size` new ones, for one axis: `(B, size, pixels)`.

    A triangle around the new pixel's centre, as wide as the step where the crop shrinks (antialiasing) and one pixel wide where it
    does not; what lies outside of the crop counts nothing, and the rest sums to one.
    """
    step = length.double()[:, None] / size
    center = (torch.arange(size, device=start.device, dtype=torch.float64) + 0.5) * step
    if mirrored is not None:
        center = torch.where(mirrored[:, None], length[:, None] - center, center)
    whole = center.floor()  # apart from the fraction, so that float32 loses nothing
    pixel = torch.arange(pixels, device=start.device, dtype=torch.float32)[None, :] + 0.5 - start[:, None]
    weights = (pixel[:, None, :] - whole.float()[:, :, None]).sub_((center - whole).float()[:, :, None])
    weights.mul_((1 / step.clamp(min=1)).float()[:, :, None]).abs_()
    weights = weights.neg_().add_(1).clamp_(min=0)
    weights.mul_(((pixel > 0) & (pixel < length[:, None]))[:, None, :])
    # A row without any pixel lies in the padding and stays zero.
    return weights.div_(weights.sum(dim=2, keepdim=True).clamp_(min=1e-6))


def crop_resize(
    images: Tensor,
    box: Tensor,
    size: int,
    mirrored: Tensor | None = None,
    angle: Tensor | None = None,
    order: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Crop boxes of each image, resize them to squares, mirror and rotate them, all in one resampling.

    Without a rotation it is R_y X R_x^T for each channel X, with the weights of bilinear interpolation, widened where the box shrinks
    (antialiasing): what torchvision's `resized_crop(antialias=True)` gives. What a box holds outside of the image is black. With a
    rotation each new pixel averages bilinear samples, enough of them for the strongest shrinking; what turns in from outside
    of the box is black.

    Args:
        images: `(M, C, H, W)` uint8, or floats in [0, 1].
        box: `(B, 4)`: top, left, height and width in pixels, whole numbers; B / M boxes of the first image, then of the next.
        size: S, pixels.
        mirrored: `(B,)` bool, which to flip left to right, or None.
        angle: `(B,)` degrees counter-clockwise about the middle, or None.
        order: `(B,)` int64, which box the first result is of, which the second and so on; None keeps their order.
        dtype: of the arithmetic and of the result.

    Returns:
        `(B, C, S, S)` in [0, 1].

    Example:
        >>> images = torch.randint(0, 256, (2, 3, 96, 96), dtype=torch.uint8)
        >>> crop_resize(images, center_box(images), 64).shape
        torch.Size([2, 3, 64, 64])
    """
    if angle is not None:
        views = _rotated_crop(images.repeat_interleave(len(box) // len(images), dim=0), box, size, mirrored, angle, dtype)
        return views if order is None else views[order]
    count, channels, height, width = images.shape
    # Rows of all channels side by side, so that each axis takes a single product per view.
    stored = images.permute(0, 2, 1, 3).to(dtype, memory_format=torch.contiguous_format).contiguous()
    stored = stored.view(count, height, channels * width)
    top, left, high, wide = box.unbind(1)
    vertical = _resize_weights(top, high, height, size, None)
    if images.dtype == torch.uint8:
        vertical.mul_(1 / 255)
    horizontal = _resize_weights(left, wide, width, size, mirrored)
    lines = vertical.to(dtype).view(count, -1, height) @ stored
    resized = (lines.view(-1, size * channels, width) @ horizontal.to(dtype).mT).view(-1, size, channels, size).permute(0, 2, 1, 3)
    return resized.contiguous() if order is None else resized.index_select(0, order)


def _rotated_crop(images: Tensor, box: Tensor, size: int, mirrored: Tensor | None, angle: Tensor, dtype: torch.dtype) -> Tensor:
    height, width = images.shape[-2:]
    # Samples along each side of a new pixel: fixed by the sizes alone, so that a view does not depend on the others of its batch.
    fine = max(1, math.ceil(max(height, width) / size))
    radians = torch.deg2rad(angle)
    cos, sin = radians.cos()[:, None, None], radians.sin()[:, None, None]
    # They spread as far as the box shrinks; where it does not, all lie in the pixel's middle.
    spread = (1 - size / box[:, 2:].amax(dim=1)).clamp_(min=0)[:, None, None]
    middle = torch.arange(size, device=images.device, dtype=torch.float32)[:, None] + 0.5
    offset = (torch.arange(fine, device=images.device, dtype=torch.float32) + 0.5) / fine - 0.5
    position = (middle + offset * spread).flatten(1) * (2 / size) - 1
    y, x = position[:, :, None], position[:, None, :]
    # From the new pixel back: turn, mirror, then into the box. Within [-1, 1] it lies in the box.
    x, y = cos * x - sin * y, sin * x + cos * y
    if mirrored is not None:
        x = torch.where(mirrored[:, None, None], -x, x)
    top, left, high, wide = (values[:, None, None] for values in box.unbind(1))
    column, row = left + (x + 1) / 2 * wide, top + (y + 1) / 2 * high
    inside = (x.abs() <= 1) & (y.abs() <= 1) & (column >= 0) & (column <= width) & (row >= 0) & (row <= height)
    grid = torch.stack([column * (2 / width) - 1, row * (2 / height) - 1], dim=-1)
    stored = images.to(torch.float32)
    if images.dtype == torch.uint8:
        stored = stored / 255
    samples = F.grid_sample(stored, grid, mode="bilinear", padding_mode="border", align_corners=False) * inside[:, None]
    return F.avg_pool2d(samples, fine).to(dtype)


# Colour


class _Jitter(NamedTuple):
    """The colour jitter of a batch: factors `(B, 4)`, and at which place `(B, 4)` each operation comes; at 4, it does not."""

    factors: Tensor
    place: Tensor


def _neutral(value: Tensor, used: Tensor) -> Tensor:
    """A factor where it is used, else 1."""
    return torch.where(used, value, torch.ones_like(value))


def _luma(images: Tensor) -> Tensor:
    """`(B, 3, H, W)` -> `(B, 1, H, W)`."""
    red, green, blue = images.split(1, dim=1)
    return (red * _LUMA[0]).add_(green, alpha=_LUMA[1]).add_(blue, alpha=_LUMA[2])


def _column(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def _step_(images: Tensor, scale: Tensor, grey: Tensor, mean: Tensor | None = None) -> Tensor:
    """clamp(scale x + grey l(x) + mean mean(l(x))) in place, coefficients `(B,)`: brightness, saturation or contrast."""
    if images.shape[1] == 1:
        # A grey image has no saturation: scale + grey is 1 there, and scale for the others.
        change = None if mean is None else images.mean(dim=(2, 3), keepdim=True) * _column(mean)
        images.mul_(_column(scale + grey))
        return (images if change is None else images.add_(change)).clamp_(0, 1)
    luma = _luma(images)
    change = luma * _column(grey)
    if mean is not None:
        change.add_(luma.mean(dim=(2, 3), keepdim=True) * _column(mean))
    return images.mul_(_column(scale)).add_(change).clamp_(0, 1)


def _turn_hue_(images: Tensor, turn: Tensor) -> Tensor:
    """Turn the hue in place by a share of the circle, `(B,)`; value and chroma stay."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.split(1, dim=1)
    highest, lowest = torch.maximum(torch.maximum(red, green), blue), torch.minimum(torch.minimum(red, green), blue)
    chroma = highest - lowest
    # The distance from red on the circle of 6, at most 3, is linear in the colour: 1 + (g + b - r - min) / chroma. On which
    # side of red it lies, green and blue tell. Grey has any hue.
    hue = (green + blue).sub_(red).sub_(lowest).div_(chroma.clamp(min=torch.finfo(chroma.dtype).tiny)).add_(1)
    hue = hue.copysign_(green - blue).add_(6 * _column(turn))
    hue = hue.sub_((hue * (1 / 6)).floor_(), alpha=6)
    red.copy_(lowest).addcmul_(chroma, (hue - 3).abs_().sub_(1).clamp_(0, 1))
    green.copy_(highest).addcmul_(chroma, (hue - 2).abs_().sub_(1).clamp_(0, 1), value=-1)
    blue.copy_(highest).addcmul_(chroma, hue.sub_(4).abs_().sub_(1).clamp_(0, 1), value=-1)
    return images


def _jitter_straight(images: Tensor, jitter: _Jitter) -> Tensor:
    """The jitter without a branch and in place, for a GPU and for the compiler.

    Every order of the four is part of: (b or s) x 2, contrast, (b or s) x 2, hue, (b or s) x 2, contrast, (b or s) x 2; what a
    sample does not use is neutral. So the mean, which the compiler cannot fuse, is taken only twice.
    """
    factors, place = jitter
    at_contrast, at_hue = place[:, _CONTRAST], place[:, _HUE]
    for region in range(4):
        for slot in range(2):
            scale, grey = torch.ones_like(factors[:, 0]), torch.zeros_like(factors[:, 0])
            for operation, other in ((_BRIGHTNESS, _SATURATION), (_SATURATION, _BRIGHTNESS)):
                at = place[:, operation]
                behind = at > at_hue
                mine = 2 * behind + ((at > at_contrast) & ((at_contrast > at_hue) == behind))
                used = (mine == region) & ((at > place[:, other]) == bool(slot)) & (at < 4)
                scale = torch.where(used, factors[:, operation], scale)
                if operation == _SATURATION:
                    grey = torch.where(used, 1 - factors[:, operation], grey)
            images = _step_(images, scale, grey)
        if region in (0, 2):
            factor = _neutral(factors[:, _CONTRAST], ((at_contrast > at_hue) == (region == 2)) & (at_contrast < 4))
            images = _step_(images, factor, torch.zeros_like(factor), 1 - factor)
        if region == 1:
            images = torch.where(_column(at_hue < 4), _turn_hue_(images.clone(), factors[:, _HUE]), images)
    return images


def _jitter_sorted(images: Tensor, jitter: _Jitter, counts: list[int]) -> Tensor:
    """The jitter in place of images sorted by the place of the hue, of which there are `counts`: each takes its four operations alone."""
    factors, place = (values[: sum(counts[:4])] for values in jitter)
    moved, start = images[: len(place)], 0
    for position in range(4):
        group = slice(start, start + counts[position])
        if counts[position]:
            _turn_hue_(moved[group], factors[group, _HUE])
        start = group.stop
        if position == 3:
            break
        # The other three in their order: those behind the hue come a step sooner.
        now = (place - (place > place[:, _HUE:]).long() == position)[:, :_HUE]
        scale = torch.where(now, factors[:, :_HUE], 0).sum(dim=1)
        grey, mean = (torch.where(now[:, operation], 1 - scale, 0) for operation in (_SATURATION, _CONTRAST))
        _step_(moved, scale, grey, mean)
    return images


def color_jitter(images: Tensor, factors: Tensor, order: Tensor) -> Tensor:
    """Change brightness, contrast, saturation and hue of each image, each in its own order.

    With luma l(x): brightness f gives f x, contrast f x + (1 - f) mean(l(x)), saturation f x + (1 - f) l(x), each clamped to
    [0, 1]; hue turns the hue of HSV by the share f of the circle.

    Args:
        images: `(B, C, H, W)` floats in [0, 1]; with C = 1 saturation and hue do nothing.
        factors: `(B, 4)` of brightness, contrast, saturation (at least 0, neutral at 1) and hue (in [-0.5, 0.5], neutral at 0).
        order: `(B, 4)` int64, the operations in the order in which they come: 0 brightness, 1 contrast, 2 saturation, 3 hue.

    Returns:
        `(B, C, H, W)`.

    Example:
        >>> color_jitter(torch.rand(1, 3, 8, 8), torch.tensor([[1.2, 0.8, 1.0, 0.1]]), torch.tensor([[2, 0, 3, 1]])).shape
        torch.Size([1, 3, 8, 8])

    Source:
        torchvision's ColorJitter on float tensors.
    """
    return _jitter_straight(images.clone(), _Jitter(factors.to(images.dtype), order.argsort(dim=1)))


def _blur_weights(sigma: Tensor, kernel_size: int, size: int) -> Tensor:
    """The Gaussian blur of one axis as a matrix `(B, size, size)`, reflected at the border."""
    half = kernel_size // 2
    offset = torch.arange(-half, half + 1, device=sigma.device)
    kernel = (-0.5 * (offset / sigma[:, None]) ** 2).exp()
    kernel = kernel / kernel.sum(dim=1, keepdim=True)
    source = (torch.arange(size, device=sigma.device)[:, None] + offset).abs()
    source = torch.where(source > size - 1, 2 * (size - 1) - source, source)
    weights = torch.zeros(len(sigma), size, size, dtype=kernel.dtype, device=sigma.device)
    return weights.scatter_add_(2, source.expand(len(sigma), -1, -1), kernel[:, None, :].expand(-1, size, -1))


def gaussian_blur(images: Tensor, sigma: Tensor, kernel_size: int) -> Tensor:
    """Blur each image with its own width.

    Args:
        images: `(B, C, H, W)` floats.
        sigma: `(B,)` standard deviations in pixels.
        kernel_size: taps along each axis, odd, less than twice the image's size.

    Returns:
        `(B, C, H, W)`.

    Raises:
        ValueError: if the kernel is even or too large.

    Example:
        >>> gaussian_blur(torch.rand(2, 3, 8, 8), torch.tensor([0.5, 2.0]), 5).shape
        torch.Size([2, 3, 8, 8])
    """
    height, width = images.shape[-2:]
    if kernel_size % 2 == 0 or kernel_size // 2 >= min(height, width):
        raise ValueError(f"kernel_size must be odd and less than twice the image's size {min(height, width)}, got {kernel_size}")
    rows = _blur_weights(sigma, kernel_size, height).to(images.dtype)
    columns = rows if width == height else _blur_weights(sigma, kernel_size, width).to(images.dtype)
    return rows[:, None] @ images @ columns[:, None].mT


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(x - mean) / std for each channel.

    Args:
        images: `(B, C, H, W)` floats.
        mean: C numbers.
        std: C numbers.

    Returns:
        `(B, C, H, W)`.

    Example:
        >>> normalize(torch.ones(1, 1, 2, 2), [0.5], [0.5]).unique()
        tensor([1.])
    """
    return _normalize_(images.clone(), mean, std)


def _normalize_(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    center, scale = (torch.tensor(values, dtype=images.dtype, device=images.device)[:, None, None] for values in (mean, std))
    return images.mul_(1 / scale).sub_(center / scale)


@cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(function)


# All together


@dataclass(frozen=True)
class ImageAugmentation:
    """What to do to the images of a training batch; without arguments nothing.

    In this order: crop, flip and rotation in one resampling; RandAugment; colour jitter, its four operations in random order; grey; blur;
    solarisation; normalisation. Each view draws its own parameters.

    Attributes:
        crop_scale: range of the share of the area that a random resized crop keeps, or None for no such crop.
        crop_ratio: range of its width / height.
        padding: pixels of black border from which a crop of the stored size is taken.
        flip: probability of a left-right flip.
        rotation: largest angle in degrees.
        rotation_probability: probability of a rotation.
        brightness: largest change of the factor, which is uniform in [max(0, 1 - b), 1 + b].
        contrast: the same for contrast.
        saturation: the same for saturation.
        hue: largest turn of the hue, as a share of the circle, at most 0.5.
        jitter_probability: probability of the colour jitter.
        grayscale: probability of turning grey.
        blur: probability of a Gaussian blur.
        blur_sigma: range of its standard deviation in pixels.
        blur_kernel: its taps, odd; None takes a tenth of the image's size.
        solarize: probability of inverting what is brighter than a threshold.
        solarize_threshold: in [0, 1].
        randaugment_ops: operations of RandAugment; 0 for none.
        randaugment_magnitude: their strength, 0 to 30.

    Raises:
        ValueError: if a setting is out of range.

    Example:
        >>> augment = ImageAugmentation(crop_scale=(0.2, 1.0), flip=0.5, brightness=0.4)
        >>> images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
        >>> augment(images, key=torch.arange(4), views=2).shape
        torch.Size([4, 2, 3, 32, 32])
    """

    crop_scale: tuple[float, float] | None = None
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    padding: int = 0
    flip: float = 0.0
    rotation: float = 0.0
    rotation_probability: float = 1.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    jitter_probability: float = 1.0
    grayscale: float = 0.0
    blur: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    blur_kernel: int | None = None
    solarize: float = 0.0
    solarize_threshold: float = 0.5
    randaugment_ops: int = 0
    randaugment_magnitude: int = 9

    def __post_init__(self) -> None:
        for name in ("flip", "rotation_probability", "jitter_probability", "grayscale", "blur", "solarize", "solarize_threshold"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        if self.crop_scale is not None and not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(f"crop_scale must be a range of shares (low, high) with 0 < low <= high <= 1, got {self.crop_scale}")
        for name in ("crop_ratio", "blur_sigma"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name} must be a range (low, high) with 0 < low <= high, got {(low, high)}")
        if min(self.padding, self.rotation, self.brightness, self.contrast, self.saturation, self.randaugment_ops) < 0:
            raise ValueError("padding, rotation, brightness, contrast, saturation and randaugment_ops must be at least 0")
        if not 0 <= self.hue <= 0.5:
            raise ValueError(f"hue must lie in [0, 0.5], got {self.hue}")
        if self.crop_scale is not None and self.padding:
            raise ValueError("crop_scale and padding are two ways to crop: give one of them")
        if self.blur_kernel is not None and (self.blur_kernel < 1 or self.blur_kernel % 2 == 0):
            raise ValueError(f"blur_kernel must be odd, got {self.blur_kernel}")
        if not 0 <= self.randaugment_magnitude <= 30:
            raise ValueError(f"randaugment_magnitude must lie in [0, 30], got {self.randaugment_magnitude}")

    @torch.no_grad()
    def __call__(
        self,
        images: Tensor,
        key: Tensor,
        size: int | None = None,
        views: int | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        compiled: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Augment a batch.

        Args:
            images: `(B, C, H, W)` uint8, or floats in [0, 1]; C = 1 or 3.
            key: `(B,)` int64.
            size: S, pixels of a view; None takes the images' size, which must then be square.
            views: V, or None for one view without an axis of its own.
            mean: of each channel, subtracted; None for no normalisation.
            std: of each channel, divided by.
            compiled: compile all of it; the first call, and that of another size, takes up to a minute.
            dtype: of the arithmetic and of the result.

        Returns:
            `(B, V, C, S, S)`, or `(B, C, S, S)` without `views`.

        Raises:
            ValueError: if the images are not square and no size is given, or of another type.
        """
        batch, channels, height, width = images.shape
        if images.dtype != torch.uint8 and not images.is_floating_point():
            raise ValueError(f"images must be uint8, or floats in [0, 1], got {images.dtype}")
        if size is None and height != width:
            raise ValueError(f"images of {height} x {width} pixels are not square: give the size of the views")
        size = size or height
        count = views or 1
        out = torch.empty(batch, count, channels, size, size, dtype=dtype, device=images.device)
        straight = images.is_cuda or compiled
        make = _compiled(self._views) if compiled else self._views
        keys = fold_in(key[:, None], torch.arange(count, device=key.device))
        draw = uniform(keys.flatten(), _COLUMNS).view(batch, count, _COLUMNS)  # torch.compile makes it write out of bounds
        # On a CPU in blocks that fit its cache; a GPU gets all at once.
        pixels = _COMPILED_BLOCK_PIXELS if compiled else _BLOCK_PIXELS
        block = max(1, batch) if images.is_cuda else max(1, min(batch, pixels // (count * max(height * width, size * size))))
        for start in range(0, batch, block):
            # The last block goes back over some of the one before it rather than be compiled for a size of its own.
            part = slice(min(start, batch - block), start + block)
            with torch.autocast(images.device.type, enabled=False):  # or products are rounded to half precision
                make(images[part], keys[part], draw[part], size, mean, std, straight, out[part])
        return out if views else out.squeeze(1)

    def _views(
        self,
        images: Tensor,
        key: Tensor,
        draw: Tensor,
        size: int,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
        straight: bool,
        out: Tensor,
    ) -> None:
        """Write the views `(B, V, C, S, S)` of images `(B, C, H, W)` to `out`; `straight` does without anything that depends on values."""
        key, draw, out = key.flatten(), draw.flatten(0, 1), out.flatten(0, 1)
        jitter, counts, order = self._draw_jitter(draw), None, None
        if jitter is not None and not straight:
            # Sorted by the place of the hue, so that each place is one slice.
            order = jitter.place[:, _HUE].argsort(stable=True)
            counts = jitter.place[:, _HUE].bincount(minlength=5).tolist()
        pixels = self._crop(images, draw, size, order, out.dtype)
        if jitter is not None and order is not None:
            key, draw, jitter = key[order], draw[order], _Jitter(*(values[order] for values in jitter))
        if self.randaugment_ops:
            stored = (pixels * 255).round_().to(torch.uint8)
            pixels = randaugment(stored, fold_in(key, _RANDAUGMENT), self.randaugment_ops, self.randaugment_magnitude).to(out.dtype) / 255
        if jitter is not None:
            jitter = jitter._replace(factors=jitter.factors.to(out.dtype))
            pixels = _jitter_straight(pixels, jitter) if counts is None else _jitter_sorted(pixels, jitter, counts)
        if self.grayscale and pixels.shape[1] == 3:
            pixels = _where(draw[:, _GRAY] < self.grayscale, pixels, straight, lambda part, _: _luma(part).expand_as(part))
        if self.blur:
            kernel = self.blur_kernel or max(3, size // 10 // 2 * 2 + 1)
            sigma = self.blur_sigma[0] + draw[:, _SIGMA] * (self.blur_sigma[1] - self.blur_sigma[0])
            pixels = _where(draw[:, _BLUR] < self.blur, pixels, straight, lambda part, at: gaussian_blur(part, sigma[at], kernel))
        if self.solarize:
            threshold = self.solarize_threshold
            inverted = draw[:, _SOLARIZE] < self.solarize
            pixels = _where(inverted, pixels, straight, lambda part, _: torch.where(part >= threshold, 1 - part, part))
        if mean is not None and std is not None:
            pixels = _normalize_(pixels, mean, std)
        if order is None:
            out.copy_(pixels)
        else:
            out[order] = pixels

    def _crop(self, images: Tensor, draw: Tensor, size: int, order: Tensor | None, dtype: torch.dtype) -> Tensor:
        height, width = images.shape[-2:]
        if self.crop_scale is not None:
            box = _boxes(draw, height, width, self.crop_scale, self.crop_ratio)
        else:
            box = center_box(images[:1]).expand(len(draw), 4)
        if self.padding:
            shift = (draw[:, [_TOP, _LEFT]] * (2 * self.padding + 1)).floor_() - self.padding
            box = torch.cat([box[:, :2] + shift, box[:, 2:]], dim=1)
        mirrored = draw[:, _FLIP] < self.flip if self.flip else None
        angle = None
        if self.rotation:
            angle = (2 * draw[:, _ANGLE] - 1) * self.rotation * (draw[:, _ROTATE] < self.rotation_probability)
        return crop_resize(images, box, size, mirrored, angle, order, dtype)

    def _draw_jitter(self, draw: Tensor) -> _Jitter | None:
        strengths = (self.brightness, self.contrast, self.saturation)
        if not any((*strengths, self.hue)):
            return None
        low = torch.tensor([max(0.0, 1 - strength) for strength in strengths] + [-self.hue], device=draw.device)
        high = torch.tensor([1 + strength for strength in strengths] + [self.hue], device=draw.device)
        factors = low + draw[:, _FACTORS] * (high - low)
        # As random as the order itself: which place each operation gets.
        place = draw[:, _ORDER].argsort(dim=1, stable=True)
        if self.jitter_probability < 1:
            place = torch.where((draw[:, _JITTER] < self.jitter_probability)[:, None], place, 4)
        return _Jitter(factors, place)


def _where(chosen: Tensor, images: Tensor, straight: bool, change: Callable[[Tensor, Any], Tensor]) -> Tensor:
    """Change the chosen images `(B,)`; `change(images, at)` gets them and their positions, or all of them where that is quicker."""
    if straight:
        return torch.where(_column(chosen), change(images, slice(None)), images)
    at = chosen.nonzero().squeeze(1)
    images[at] = change(images[at], at)
    return images


_JITTERED: dict[str, Any] = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1, "jitter_probability": 0.8, "grayscale": 0.2}

# Published parameters:
# none        nothing but normalisation
# standard    He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2: 4 pixels of padding, flip
# simclr      Chen et al., "A Simple Framework for Contrastive Learning", ICML 2020, appendix B.9 (CIFAR-10): strength 0.5, no blur
# supcon      Khosla et al., "Supervised Contrastive Learning", NeurIPS 2020, the authors' code for CIFAR
# instdisc    Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", CVPR 2018, the authors' code: no flip
# relational  Patacchiola & Storkey, "Self-Supervised Relational Reasoning", NeurIPS 2020, the authors' code
# randaugment Cubuk et al., "RandAugment", NeurIPS 2020: padding, flip, and 2 operations of magnitude 9, their ImageNet values
PRESETS: dict[str, ImageAugmentation] = {
    "none": ImageAugmentation(),
    "standard": ImageAugmentation(padding=4, flip=0.5),
    "simclr": ImageAugmentation(crop_scale=(0.08, 1.0), flip=0.5, **_JITTERED),
    "supcon": ImageAugmentation(crop_scale=(0.2, 1.0), flip=0.5, **_JITTERED),
    "instdisc": ImageAugmentation(crop_scale=(0.2, 1.0), brightness=0.4, contrast=0.4, saturation=0.4, hue=0.4, grayscale=0.2),
    "relational": ImageAugmentation(
        crop_scale=(0.08, 1.0), flip=0.5, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, jitter_probability=0.8, grayscale=0.2
    ),
    "randaugment": ImageAugmentation(padding=4, flip=0.5, randaugment_ops=2, randaugment_magnitude=9),
}
assert set(PRESETS) == set(get_args(Preset))
