"""RandAugment on whole batches: every image draws its own operations from its key, and those that drew the same go through it together."""

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from ...zoo.functional.random import uniform

# A name's position here is its number in the draws; the signed ones stand together.
OPERATIONS = (
    "Identity",
    *("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"),
    *("Brightness", "Color", "Contrast", "Sharpness"),
    *("Posterize", "Solarize", "AutoContrast", "Equalize"),
)
_FIRST_SIGNED, _LAST_SIGNED = OPERATIONS.index("ShearX"), OPERATIONS.index("Sharpness")


def _to_uint8(values: Tensor) -> Tensor:
    """Clamp float32 in place and cut off the fraction; by way of int16, because float32 to uint8 is not vectorised on the CPU."""
    return values.clamp_(0.0, 255.0).to(torch.int16).to(torch.uint8)


def _source_matrix(name: str, magnitude: float, height: int, width: int) -> list[list[float]]:
    """Where a pixel comes from, in pixels from the middle of the image: `source = A (target - c - t) + c`, as rows `[A | offset]`."""
    a = ((1.0, 0.0), (0.0, 1.0))
    c = t = (0.0, 0.0)
    # Sources of shears often lie exactly between two pixels, so the last bits of torchvision's detour by degrees decide pixels.
    angle = math.radians(math.degrees(math.atan(magnitude)))
    if name == "ShearX":
        a, c = ((1.0, math.tan(angle)), (0.0, 1.0)), (-0.5 * width, -0.5 * height)
    elif name == "ShearY":
        a, c = ((1.0, 0.0), (math.sin(angle) / math.cos(angle), 1.0)), (-0.5 * width, -0.5 * height)
    elif name == "TranslateX":
        t = (float(int(magnitude)), 0.0)
    elif name == "TranslateY":
        t = (0.0, float(int(magnitude)))
    else:
        turn = math.radians(-(magnitude % 360))
        a = ((math.cos(turn), math.sin(turn)), (-math.sin(turn), math.cos(turn)))
    return [[x, y, middle - x * (c[0] + t[0]) - y * (c[1] + t[1])] for (x, y), middle in zip(a, c, strict=True)]


@lru_cache(maxsize=128)
def _source_pixels(name: str, magnitude: float, height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The nearest source pixel of each pixel of the result, `(H * W,)` int64, and 1 where it lies inside the image, `(H * W,)` uint8.

    Computed on the CPU in single float32 operations and then moved: the same pixels on every device, under autocast and TF32.
    """
    inside = torch.ones(height, width, dtype=torch.bool, device="cpu")
    position = torch.zeros(height, width, dtype=torch.int64, device="cpu")
    x = torch.arange(width, dtype=torch.float32, device="cpu") - 0.5 * (width - 1)
    y = (torch.arange(height, dtype=torch.float32, device="cpu") - 0.5 * (height - 1)).unsqueeze(1)
    matrix = torch.tensor(_source_matrix(name, magnitude, height, width), dtype=torch.float32, device="cpu")
    for row, length, stride in zip(matrix, (width, height), (1, width), strict=True):
        from_x, from_y, offset = row / (0.5 * length)  # in units in which the image is [-1, 1], as grid_sample has it
        source = ((x * from_x + y * from_y + offset + 1.0) * (0.5 * length) - 0.5).round()
        inside &= (source >= 0) & (source < length)
        position += stride * source.clamp(0, length - 1).to(torch.int64)
    return position.flatten().to(device), inside.flatten().to(torch.uint8).to(device)


def _affine(images: Tensor, name: str, magnitude: float) -> Tensor:
    position, inside = _source_pixels(name, magnitude, images.shape[2], images.shape[3], images.device)
    planes = images.view(-1, images.shape[2] * images.shape[3])
    return planes.gather(1, position.expand(len(planes), -1)).mul_(inside).view_as(images)


def _gray(images: Tensor) -> Tensor:
    """Luminance, rounded down: `(B, 1, H, W)` float32."""
    if images.shape[1] == 1:
        return images.to(torch.float32)
    red, green, blue = images.split(1, dim=1)
    return red.to(torch.float32).mul_(0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114).floor_()


def _blend(images: Tensor, other: Tensor, factor: float) -> Tensor:
    return _to_uint8(images.to(torch.float32).mul_(factor).add_(other, alpha=1.0 - factor))


def _color(images: Tensor, magnitude: float) -> Tensor:
    return images if images.shape[1] == 1 else _blend(images, _gray(images), 1.0 + magnitude)


def _contrast(images: Tensor, magnitude: float) -> Tensor:
    return _blend(images, _gray(images).mean(dim=(1, 2, 3), keepdim=True), 1.0 + magnitude)


def _sharpness(images: Tensor, magnitude: float) -> Tensor:
    height, width = images.shape[2:]
    if height <= 2 or width <= 2:
        return images
    # The whole batch as one line: neighbours are shifts by 1 and by the width. That is wrong in the border, which stays as it was.
    line = images.flatten().to(torch.float32)
    blur = (line[:-2] + line[1:-1]).add_(line[2:])
    blur = (blur[: -2 * width] + blur[width:-width]).add_(blur[2 * width :])
    inner = line[width + 1 : -width - 1]
    # The sums are exact, and a thirteenth of an integer is never half of an odd one: any arithmetic rounds to the same number.
    blur = blur.add_(inner, alpha=4.0).mul_(1.0 / 13.0).round_()
    inner.add_(blur.sub_(inner), alpha=1.0 - (1.0 + magnitude))
    sharp = _to_uint8(line).view_as(images)
    sharp[:, :, :: height - 1] = images[:, :, :: height - 1]
    sharp[..., :: width - 1] = images[..., :: width - 1]
    return sharp


def _posterize(images: Tensor, magnitude: float) -> Tensor:
    return images & (0xFF00 >> int(magnitude) & 0xFF)


def _solarize(images: Tensor, magnitude: float) -> Tensor:
    # Compared in float32, where 255 * 0.2 is 51 whatever the float64 product says.
    threshold = math.ceil(torch.tensor(255.0 * magnitude, dtype=torch.float32, device="cpu").item())
    if threshold <= 0:
        return ~images
    # 255 where the pixel reaches the threshold, else 0: comparisons and torch.where of uint8 are ten times slower on the CPU.
    reached = images.clamp(min=threshold - 1).sub_(threshold - 1).clamp_(max=1).neg_()
    return reached.bitwise_xor_(images)


def _autocontrast(images: Tensor) -> Tensor:
    low, high = (extreme.to(torch.float32) for extreme in (images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)))
    scale = (high - low) * (1.0 / 255.0)
    flat = scale == 0
    return _to_uint8(images.to(torch.float32).sub_(low.masked_fill(flat, 0.0)).div_(scale.masked_fill(flat, 1.0)))


def _equalize(images: Tensor) -> Tensor:
    size = images.shape[2] * images.shape[3]
    plane = torch.arange(images.shape[0] * images.shape[1], dtype=torch.int32, device=images.device).unsqueeze(1)
    place = images.view(-1, size).to(torch.int32).add_(256 * plane).view(-1)
    count = torch.bincount(place, minlength=256 * len(plane)).view(-1, 256).to(torch.int32)
    below = count.cumsum(dim=1, dtype=torch.int32) - count  # pixels darker than each level
    step = (below * (count > 0)).amax(dim=1, keepdim=True) // 255
    table = ((below + step // 2) // step.clamp(min=1)).clamp_(max=255)
    table = torch.where(step > 0, table, torch.arange(256, dtype=torch.int32, device=images.device)).to(torch.uint8)
    return table.view(-1).index_select(0, place).view_as(images)


_FUNCTIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "Identity": lambda images, _: images,
    "Brightness": lambda images, magnitude: _to_uint8(images.to(torch.float32).mul_(1.0 + magnitude)),
    "Color": _color,
    "Contrast": _contrast,
    "Sharpness": _sharpness,
    "Posterize": _posterize,
    "Solarize": _solarize,
    "AutoContrast": lambda images, _: _autocontrast(images),
    "Equalize": lambda images, _: _equalize(images),
}


def _check_images(images: Tensor) -> None:
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images must be uint8 of shape (B, 1 or 3, H, W), got {images.dtype} of shape {tuple(images.shape)}")


def apply_operation(images: Tensor, name: str, magnitude: float = 0.0) -> Tensor:
    """Apply one operation of RandAugment, equally strong, to every image.

    With m the magnitude, g the gray of a pixel and x, y measured as in `torchvision.transforms.v2`:

    | name | pixel |
    |---|---|
    | ShearX, ShearY | from (x + m y, y) or (x, y + m x) about the upper left corner, the nearest pixel; 0 from outside |
    | TranslateX, TranslateY | from (x - m, y) or (x, y - m), m cut to an integer |
    | Rotate | turned by m degrees counter-clockwise about the centre |
    | Brightness | (1 + m) x |
    | Color | (1 + m) x - m g; one channel stays as it is |
    | Contrast | (1 + m) x - m (mean of g over the image) |
    | Sharpness | (1 + m) x - m (3 x 3 blur with weights 1/13 and 5/13 in the middle); the border stays |
    | Posterize | its m highest bits |
    | Solarize | 255 - x where x >= 255 m |
    | AutoContrast | each channel stretched to 0 ... 255 |
    | Equalize | each channel's histogram made flat, with PIL's rounding |
    | Identity | x |

    Args:
        images: `(B, C, H, W)` uint8, C = 1 or 3.
        name: one of `OPERATIONS`.
        magnitude: m, with its sign; `operation_magnitude` gives the one of a bin. Identity, AutoContrast and Equalize ignore it.

    Returns:
        `(B, C, H, W)` uint8, bit for bit what torchvision gives on the CPU; it may share memory with `images`.

    Raises:
        ValueError: for another name, or images of another shape or dtype.

    Example:
        >>> apply_operation(torch.full((1, 1, 1, 2), 77, dtype=torch.uint8), "Posterize", 4)
        tensor([[[[64, 64]]]], dtype=torch.uint8)
    """
    _check_images(images)
    if name not in OPERATIONS:
        raise ValueError(f"name must be one of {', '.join(OPERATIONS)}; got {name!r}")
    function = _FUNCTIONS.get(name)
    images = images.contiguous()
    return _affine(images, name, float(magnitude)) if function is None else function(images, float(magnitude))


@lru_cache(maxsize=1024)
def operation_magnitude(name: str, magnitude: int, num_magnitude_bins: int, height: int, width: int) -> float:
    """The strength of an operation at a bin k of n: a share `k / (n - 1)` of its range.

    ShearX and ShearY reach 0.3, TranslateX and TranslateY 150/331 of the width and height, Rotate 30 degrees, Brightness, Color,
    Contrast and Sharpness 0.9; Posterize goes from 8 bits to 4, Solarize from 1 to 0.

    Args:
        name: one of `OPERATIONS`.
        magnitude: the bin k, from 0 to `num_magnitude_bins - 1`.
        num_magnitude_bins: the number n of bins, at least 2.
        height: H of the images.
        width: W of the images.

    Returns:
        The strength without a sign; 0 for Identity, AutoContrast and Equalize.

    Example:
        >>> operation_magnitude("Posterize", 9, 31, 32, 32)
        7.0
    """
    if name == "Posterize":
        return float((8 - torch.tensor(magnitude, device="cpu") / ((num_magnitude_bins - 1) / 4)).round())
    size = {"TranslateX": width, "TranslateY": height}.get(name, 0)
    largest = {"ShearX": 0.3, "ShearY": 0.3, "Rotate": 30.0, "Brightness": 0.9, "Color": 0.9, "Contrast": 0.9, "Sharpness": 0.9}
    low, high = (1.0, 0.0) if name == "Solarize" else (0.0, largest.get(name, 150.0 / 331.0 * size))
    return float(torch.linspace(low, high, num_magnitude_bins, dtype=torch.float32, device="cpu")[magnitude])


def draw_operations(key: Tensor, num_ops: int) -> tuple[Tensor, Tensor]:
    """Which operations each image gets, uniform over the 14, and which of the signed ones point the negative way, every other one.

    Args:
        key: `(B,)` int64.
        num_ops: the number R of rounds.

    Returns:
        Positions in `OPERATIONS`, `(B, R)` int64, and signs, `(B, R)` bool; the first rounds are the same for every R.

    Example:
        >>> draw_operations(torch.arange(4), 2)[0].shape
        torch.Size([4, 2])
    """
    which, sign = uniform(key, num_ops, 2).unbind(-1)
    operation = (which * len(OPERATIONS)).to(torch.int64)
    return operation, (sign < 0.5) & (operation >= _FIRST_SIGNED) & (operation <= _LAST_SIGNED)


def randaugment(images: Tensor, key: Tensor, num_ops: int = 2, magnitude: int = 9, num_magnitude_bins: int = 31) -> Tensor:
    """Apply `num_ops` random operations of one strength to each image, `x <- op_R(... op_1(x))`, every image its own.

    In each round, the images that drew the same operation and sign go through it together: a loop over 23 groups, never over images.
    An image's result depends on the image and its key alone. Each operation equals torchvision's on the CPU (`apply_operation`).

    Args:
        images: `(B, C, H, W)` uint8, C = 1 or 3.
        key: `(B,)` int64 on the images' device; fold in a number that no other draw uses.
        num_ops: operations per image (the paper's N), at least 0.
        magnitude: strength of all of them (the paper's M), from 0 to `num_magnitude_bins - 1`.
        num_magnitude_bins: number of strengths, at least 2.

    Returns:
        `(B, C, H, W)` uint8 on the same device.

    Raises:
        ValueError: for images or keys of another shape or dtype, or settings outside their range.

    Example:
        >>> randaugment(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.tensor([1, 2])).shape
        torch.Size([2, 3, 32, 32])

    Source: Cubuk, Zoph, Shlens & Le, "RandAugment: Practical Automated Data Augmentation with a Reduced Search Space", NeurIPS 2020;
    the ranges and the rounding are those of `torchvision.transforms.v2.RandAugment`.
    """
    _check_images(images)
    if key.dtype != torch.int64 or key.shape != images.shape[:1]:
        raise ValueError(f"key must be int64 of shape ({len(images)},), one for each image, got {key.dtype} of shape {tuple(key.shape)}")
    if num_ops < 0:
        raise ValueError(f"num_ops must be at least 0, got {num_ops}")
    if num_magnitude_bins < 2:
        raise ValueError(f"num_magnitude_bins must be at least 2, got {num_magnitude_bins}")
    if not 0 <= magnitude < num_magnitude_bins:
        raise ValueError(f"magnitude must lie in [0, num_magnitude_bins = {num_magnitude_bins}), got {magnitude}")
    if num_ops == 0:
        return images
    operation, negative = draw_operations(key, num_ops)
    group = 2 * operation + negative
    order = group.argsort(dim=0, stable=True)
    place = order.argsort(dim=0)  # where each image stands after a round
    groups = 2 * len(OPERATIONS)
    # One transfer of all sizes to the host, for all rounds.
    sizes = (group + groups * torch.arange(num_ops, device=key.device)).view(-1).bincount(minlength=groups * num_ops).tolist()
    chosen = order[:, 0]
    for r in range(num_ops):
        # Each round leaves the images sorted by its operations; only the last puts them back.
        done, start = torch.empty_like(images, memory_format=torch.contiguous_format), 0
        for number, size in enumerate(sizes[r * groups : (r + 1) * groups]):
            if size:
                name, rows = OPERATIONS[number // 2], slice(start, start + size)
                strength = operation_magnitude(name, magnitude, num_magnitude_bins, *images.shape[2:])
                part = apply_operation(images.index_select(0, chosen[rows]), name, -strength if number % 2 else strength)
                done[rows] = part
                start += size
        images = done
        chosen = place[:, r] if r + 1 == num_ops else place[:, r].index_select(0, order[:, r + 1])
    return images.index_select(0, chosen)
