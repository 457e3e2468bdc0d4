"""RandAugment on batches: every operation against torchvision's, and the draws."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from torchvision.transforms.v2 import RandAugment

from litzoo.datamodules.augment.randaugment import OPERATIONS, apply_operation, draw_operations, operation_magnitude, randaugment
from litzoo.zoo.functional.random import fold_in

# Which functions torchvision calls with which arguments is known to these private members alone.
TORCHVISION = RandAugment()
SPACE = TORCHVISION._AUGMENTATION_SPACE
AFFINE = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")
SHAPES = [(4, 3, 32, 32), (4, 1, 28, 28), (4, 3, 96, 96), (4, 3, 27, 33)]
KEY = fold_in(0, torch.arange(20_000))


def pictures(count: int, channels: int, height: int, width: int) -> Tensor:
    """Smooth, noisy and clipped at both ends; the first is gray, the second has a constant channel, the third few levels."""
    generator = torch.Generator().manual_seed(height)
    smooth = torch.rand(count, channels, 5, 5, generator=generator)
    smooth = torch.nn.functional.interpolate(smooth, (height, width), mode="bicubic") * 320 - 30
    images = (smooth + 8 * torch.randn(count, channels, height, width, generator=generator)).clamp(0, 255).to(torch.uint8)
    images[:1] = images[:1, :1]
    images[1:2, :1] = 77
    images[2:3] = images[2:3] // 60 * 60
    return images


def torchvision_operation(images: Tensor, name: str, magnitude: float) -> Tensor:
    arguments = {"interpolation": TORCHVISION.interpolation, "fill": TORCHVISION._fill}
    return torch.stack([TORCHVISION._apply_image_or_video_transform(image, name, magnitude, **arguments) for image in images])


def torchvision_magnitude(name: str, magnitude: int, bins: int, height: int, width: int) -> float:
    values = SPACE[name][0](bins, height, width)
    return 0.0 if values is None else float(values[magnitude])


def between_two_pixels(name: str, magnitude: float, height: int, width: int) -> Tensor:
    """Where the exact source lies halfway between two pixels, so that the last bit of a matrix product decides which one is nearest."""
    y, x = torch.meshgrid(torch.arange(height).double() + 0.5, torch.arange(width).double() + 0.5, indexing="ij")
    turn = math.radians(magnitude)
    u, v = x - width / 2, y - height / 2
    source = {
        "ShearX": (x + magnitude * y, y),
        "ShearY": (x, y + magnitude * x),
        "Rotate": (u * math.cos(turn) - v * math.sin(turn) + width / 2, u * math.sin(turn) + v * math.cos(turn) + height / 2),
    }.get(name, (x, y))
    return torch.stack([(edge - edge.round()).abs() < 1e-5 * max(height, width) for edge in source]).any(0)


def test_the_operations_are_torchvisions() -> None:
    assert list(OPERATIONS) == list(SPACE)
    signed = draw_operations(KEY, 1)
    assert {OPERATIONS[i] for i in signed[0][signed[1]].unique().tolist()} == {name for name, (_, sign) in SPACE.items() if sign}


@pytest.mark.parametrize("bins", [2, 10, 31])
def test_magnitudes(bins: int) -> None:
    for name in OPERATIONS:
        for k in range(bins):
            assert operation_magnitude(name, k, bins, 28, 32) == torchvision_magnitude(name, k, bins, 28, 32)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", OPERATIONS)
def test_operation_against_torchvision(name: str, shape: tuple[int, ...]) -> None:
    images = pictures(*shape)
    for k in (0, 1, 5, 9, 10, 17, 20, 24, 29, 30):
        strength = torchvision_magnitude(name, k, 31, *shape[2:])
        for magnitude in (strength, -strength) if SPACE[name][1] else (strength,):
            expected = torchvision_operation(images, name, magnitude)
            differs = apply_operation(images, name, magnitude) != expected
            # With sizes other than a power of two, whether the BLAS fuses multiply and add can decide these. One that does not: no pixel.
            if name in AFFINE and shape[2:] != (32, 32):
                differs &= ~between_two_pixels(name, magnitude, *shape[2:])
            assert not differs.any(), f"{int(differs.sum())} pixels at magnitude {magnitude}"


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("size", [(1, 1), (2, 5), (3, 3), (260, 256)])
def test_tiny_and_large_images(name: str, size: tuple[int, int]) -> None:
    images = pictures(2, 3, *size)
    magnitude = torchvision_magnitude(name, 9, 31, *size)
    differs = apply_operation(images, name, magnitude) != torchvision_operation(images, name, magnitude)
    if name in AFFINE:
        differs &= ~between_two_pixels(name, magnitude, *size)
    assert not differs.any()


@pytest.mark.parametrize("shape", [(96, 3, 32, 32), (96, 1, 28, 28)], ids=str)
def test_against_a_loop_over_samples(shape: tuple[int, ...]) -> None:
    images, key = pictures(*shape), KEY[: shape[0]]
    operation, negative = draw_operations(key, 3)
    assert len(operation.unique()) == len(OPERATIONS)
    expected = []
    for image, operations, signs in zip(images, operation.tolist(), negative.tolist(), strict=True):
        for number, sign in zip(operations, signs, strict=True):
            strength = torchvision_magnitude(OPERATIONS[number], 7, 10, *shape[2:])
            image = torchvision_operation(image[None], OPERATIONS[number], -strength if sign else strength)[0]
        expected.append(image)
    given = randaugment(images, key, num_ops=3, magnitude=7, num_magnitude_bins=10)
    # At 28 x 28 a shear of 7/30 has its few ties decided by the BLAS's last bit, see above.
    different = (given != torch.stack(expected)).flatten(1).sum(1)
    assert int(different.max()) <= (0 if shape[2] == 32 else 8)


def test_an_image_does_not_depend_on_the_rest_of_the_batch() -> None:
    images, key = pictures(64, 3, 32, 32), KEY[:64]
    together = randaugment(images, key)
    assert torch.equal(together, torch.cat([randaugment(images[i : i + 1], key[i : i + 1]) for i in range(64)]))
    some = torch.randperm(64, generator=torch.Generator().manual_seed(0))[:23]
    assert torch.equal(together[some], randaugment(images[some], key[some]))


def test_the_key_decides() -> None:
    images, key = pictures(64, 3, 32, 32), KEY[:64]
    before, state = images.clone(), torch.get_rng_state()
    given = randaugment(images, key)
    assert torch.equal(given, randaugment(images, key))
    assert not torch.equal(given, randaugment(images, KEY[64:128]))
    assert torch.equal(images, before)  # not changed in place
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(given, randaugment(images.to(memory_format=torch.channels_last), key))
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        assert torch.equal(given, randaugment(images, key))


def test_operations_are_uniform_and_rounds_independent() -> None:
    operation, negative = draw_operations(KEY, 2)
    assert torch.equal(operation, draw_operations(KEY, 5)[0][:, :2])
    for drawn in operation.T:
        assert stats.chisquare(np.bincount(drawn, minlength=len(OPERATIONS))).pvalue > 1e-3
    pairs = np.bincount(operation[:, 0] * len(OPERATIONS) + operation[:, 1], minlength=len(OPERATIONS) ** 2)
    assert stats.chisquare(pairs).pvalue > 1e-3
    for number, name in enumerate(OPERATIONS):
        signs = negative[operation == number]
        assert len(signs) > 1000
        if SPACE[name][1]:
            assert stats.binomtest(int(signs.sum()), len(signs)).pvalue > 1e-3
        else:
            assert not signs.any()


def test_no_operations_and_no_images() -> None:
    images = pictures(4, 3, 32, 32)
    assert torch.equal(randaugment(images, KEY[:4], num_ops=0), images)
    assert randaugment(images[:0], KEY[:0]).shape == (0, 3, 32, 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(2, 3, 8, 8)}, "images must be uint8 of shape .* got torch.float32"),
        ({"images": torch.zeros(2, 4, 8, 8, dtype=torch.uint8)}, "images must be uint8 of shape .* got .*4, 8, 8"),
        ({"images": torch.zeros(3, 8, 8, dtype=torch.uint8)}, "images must be uint8 of shape"),
        ({"key": torch.zeros(3, dtype=torch.int64)}, r"key must be int64 of shape \(2,\).*got torch.int64 of shape \(3,\)"),
        ({"key": torch.zeros(2)}, "key must be int64"),
        ({"num_ops": -1}, "num_ops must be at least 0, got -1"),
        ({"magnitude": 31}, r"magnitude must lie in \[0, num_magnitude_bins = 31\), got 31"),
        ({"magnitude": -1}, "magnitude must lie in"),
        ({"num_magnitude_bins": 1, "magnitude": 0}, "num_magnitude_bins must be at least 2, got 1"),
    ],
)
def test_wrong_arguments_are_refused(change: dict[str, object], message: str) -> None:
    arguments = {"images": torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "key": KEY[:2], **change}
    with pytest.raises(ValueError, match=message):
        randaugment(**arguments)


def test_an_unknown_operation_is_refused() -> None:
    with pytest.raises(ValueError, match=r"name must be one of Identity, .*; got 'Invert'"):
        apply_operation(torch.zeros(1, 1, 2, 2, dtype=torch.uint8), "Invert")
