"""Batched image augmentation against torchvision: the same pixels for the same parameters, and the same distribution of parameters."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms.v2 as T
import torchvision.transforms.v2.functional as TF
from scipy import stats
from torch import Tensor
from torchvision.transforms import InterpolationMode

from litzoo.datamodules import ImageAugmentation
from litzoo.datamodules.augment import images as module
from litzoo.datamodules.augment.images import (
    PRESETS,
    center_box,
    color_jitter,
    crop_boxes,
    crop_resize,
    gaussian_blur,
    normalize,
)
from litzoo.datamodules.augment.randaugment import randaugment
from litzoo.zoo.functional.random import fold_in, uniform

MEAN, STD = [0.49, 0.48, 0.45], [0.25, 0.24, 0.26]
OPERATIONS = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)


def pictures(count: int, height: int = 32, width: int | None = None, channels: int = 3, seed: int = 0) -> Tensor:
    """Random pictures with large areas, edges and noise: `(count, channels, height, width)` uint8."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, channels, 4, 4, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(height, width or height), mode="bilinear")
    noise = torch.rand(count, channels, height, width or height, generator=generator)
    return ((0.7 * smooth + 0.3 * noise) * 255).to(torch.uint8)


# --- the same pixels for the same parameters -------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width", "size"), [(32, 32, 32), (96, 96, 64), (96, 96, 96), (40, 64, 24), (16, 16, 32), (8, 8, 3)])
@pytest.mark.parametrize("floats", [False, True])
def test_crop_equals_torchvision(height: int, width: int, size: int, floats: bool) -> None:
    stored = pictures(60, height, width)
    box = crop_boxes(torch.arange(60), height, width, (0.08, 1.0))
    mirrored = torch.arange(60) % 3 == 0
    images = stored.float() / 255 if floats else stored
    views = crop_resize(images, box, size, mirrored)
    assert views.shape == (60, 3, size, size)
    assert views.is_contiguous()
    for index in range(60):
        top, left, high, wide = box[index].int().tolist()
        expected = TF.resized_crop(stored[index].double() / 255, top, left, high, wide, [size, size], antialias=True)
        expected = expected.flip(-1) if mirrored[index] else expected
        torch.testing.assert_close(views[index].double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("angle", [None, torch.linspace(-30, 30, 15)])
def test_several_crops_of_each_image_in_another_order(angle: Tensor | None) -> None:
    stored, order = pictures(5), torch.randperm(15)
    box, mirrored = crop_boxes(torch.arange(15), 32, 32, (0.2, 1.0)), torch.arange(15) % 2 == 0
    one_by_one = crop_resize(stored.repeat_interleave(3, dim=0), box, 20, mirrored, angle)
    torch.testing.assert_close(crop_resize(stored, box, 20, mirrored, angle), one_by_one, rtol=0, atol=1e-6)
    found = crop_resize(stored, box, 20, mirrored, angle, order)
    assert found.is_contiguous()
    torch.testing.assert_close(found, one_by_one[order], rtol=0, atol=1e-6)


def test_a_whole_box_of_the_same_size_is_the_image() -> None:
    stored = pictures(3)
    torch.testing.assert_close(crop_resize(stored, center_box(stored), 32), stored / 255, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(32, 48), (48, 32), (33, 48)])
def test_center_box_is_torchvisions_center_crop(shape: tuple[int, int]) -> None:
    stored = pictures(2, *shape)
    side = min(shape)
    offset = (max(shape) - side) / 2
    views = crop_resize(stored, center_box(stored), side)
    if offset.is_integer():  # else torchvision rounds half a pixel to the even side
        torch.testing.assert_close(views, TF.center_crop(stored, [side]) / 255, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [32, 24])
def test_a_box_that_sticks_out_is_black_there(size: int) -> None:
    stored = pictures(8)
    shift = torch.tensor(list(itertools.product((-4, 0), (-3, 0, 2, 4))), dtype=torch.float32)
    box = torch.cat([shift, torch.full((8, 2), 32.0)], dim=1)
    views = crop_resize(stored, box, size, mirrored=torch.ones(8, dtype=torch.bool))
    for index in range(8):
        top, left = (int(value) + 4 for value in shift[index])
        padded = TF.pad(stored[index : index + 1] / 255, [4, 4, 4, 4])[..., top : top + 32, left : left + 32].flip(-1)
        if size == 32:
            torch.testing.assert_close(views[index], padded[0], rtol=0, atol=1e-6)
        else:  # what lies outside does not darken what lies inside
            assert views[index].max() <= padded.max() + 1e-6


@pytest.mark.parametrize("angle", [-90.0, -30.0, 0.0, 12.5, 45.0, 90.0, 180.0])
def test_rotation_equals_torchvision_away_from_the_border(angle: float) -> None:
    stored = pictures(4) / 255
    views = crop_resize(stored, center_box(stored), 32, angle=torch.full((4,), angle))
    expected = TF.rotate(stored, angle, interpolation=InterpolationMode.BILINEAR)
    y, x = torch.meshgrid(torch.arange(32) - 15.5, torch.arange(32) - 15.5, indexing="ij")
    inner = (x**2 + y**2).sqrt() < 14
    torch.testing.assert_close(views[..., inner], expected[..., inner], rtol=0, atol=1e-5)
    corner = views[..., 0, 0]
    assert (corner == 0).all() == (angle % 90 != 0), "what turns in is black"


def test_rotation_comes_after_crop_and_flip() -> None:
    stored = pictures(6) / 255
    box = torch.tensor([[2.0, 4.0, 16.0, 16.0]]).expand(6, 4)
    mirrored, angle = torch.arange(6) % 2 == 0, torch.linspace(-40, 40, 6)
    views = crop_resize(stored, box, 16, mirrored, angle)
    y, x = torch.meshgrid(torch.arange(16) - 7.5, torch.arange(16) - 7.5, indexing="ij")
    inner = (x**2 + y**2).sqrt() < 6
    for index in range(6):
        crop = stored[index : index + 1, :, 2:18, 4:20]
        crop = crop.flip(-1) if mirrored[index] else crop
        expected = TF.rotate(crop, angle[index].item(), interpolation=InterpolationMode.BILINEAR)
        torch.testing.assert_close(views[index : index + 1, :, inner], expected[..., inner], rtol=0, atol=1e-5)


def test_rotation_that_shrinks_is_antialiased() -> None:
    fine = (torch.arange(96)[:, None] + torch.arange(96)) % 2
    stored = fine.float().expand(2, 3, 96, 96).contiguous()
    views = crop_resize(stored, center_box(stored), 32, angle=torch.tensor([0.0, 20.0]))
    assert (views[:, :, 10:22, 10:22] - 0.5).abs().max() < 0.2, "a fine chessboard must become grey"
    plain = torch.nn.functional.grid_sample(
        stored[1:], torch.nn.functional.affine_grid(_turn(20.0), [1, 3, 32, 32], align_corners=False), align_corners=False
    )
    assert (plain[:, :, 10:22, 10:22] - 0.5).abs().max() > 0.3, "which takes averaging"


def _turn(degrees: float) -> Tensor:
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return torch.tensor([[[cos, -sin, 0.0], [sin, cos, 0.0]]])


@pytest.mark.parametrize("operation", range(4))
def test_each_colour_operation_equals_torchvision(operation: int) -> None:
    images = pictures(40, 16) / 255
    images[0], images[1] = 0.5, (images[1] > 0.5).float()  # grey, and colours of the cube's corners
    factors = torch.tensor([[1.0, 1.0, 1.0, 0.0]]).repeat(40, 1)
    factors[:, operation] = torch.linspace(-0.5, 0.5, 40) if operation == 3 else torch.linspace(0, 2, 40)
    changed = color_jitter(images, factors, torch.arange(4).expand(40, 4))
    expected = torch.stack(
        [OPERATIONS[operation](image, factor) for image, factor in zip(images, factors[:, operation].tolist(), strict=True)]
    )
    torch.testing.assert_close(changed, expected, rtol=0, atol=1e-5)


def test_jitter_in_every_order_equals_torchvision() -> None:
    orders = torch.tensor(list(itertools.permutations(range(4)))).repeat(5, 1)
    images = pictures(len(orders), 16) / 255
    draw = uniform(torch.arange(len(orders)), 4)
    factors = torch.cat([draw[:, :3] * 2, draw[:, 3:] - 0.5], dim=1)
    changed = color_jitter(images, factors, orders)
    for index in range(len(orders)):
        expected = images[index]
        for operation in orders[index].tolist():
            expected = OPERATIONS[operation](expected, factors[index, operation].item())
        torch.testing.assert_close(changed[index], expected, rtol=0, atol=1e-5)


def test_jitter_of_grey_images_leaves_saturation_and_hue_alone() -> None:
    images = pictures(24, 16, channels=1) / 255
    orders = torch.tensor(list(itertools.permutations(range(4))))
    factors = torch.tensor([[1.3, 0.6, 1.7, 0.3]]).expand(24, 4)
    changed = color_jitter(images, factors, orders)
    for index in range(24):
        expected = images[index]
        for operation in orders[index].tolist():
            expected = expected if operation > 1 else OPERATIONS[operation](expected, factors[index, operation].item())
        torch.testing.assert_close(changed[index], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(16, 16), (16, 24)])
@pytest.mark.parametrize("kernel_size", [3, 9])
def test_blur_equals_torchvision(shape: tuple[int, int], kernel_size: int) -> None:
    images, sigma = pictures(10, *shape) / 255, torch.linspace(0.1, 2.0, 10)
    expected = torch.stack(
        [TF.gaussian_blur(image, [kernel_size] * 2, [width] * 2) for image, width in zip(images, sigma.tolist(), strict=True)]
    )
    torch.testing.assert_close(gaussian_blur(images, sigma, kernel_size), expected, rtol=0, atol=1e-5)


def test_normalize_equals_torchvision() -> None:
    images = pictures(4) / 255
    torch.testing.assert_close(normalize(images, MEAN, STD), TF.normalize(images, MEAN, STD), rtol=1e-5, atol=1e-5)


# --- the whole ---------------------------------------------------------------------------------------------------------


def by_torchvision(augment: ImageAugmentation, images: Tensor, key: Tensor, size: int) -> Tensor:
    """One view of each image, by torchvision's functions one image at a time, with the parameters that the keys draw."""
    keys = fold_in(key, 0)
    draw = uniform(keys, module._COLUMNS)
    height, width = images.shape[2:]
    jitter = augment._draw_jitter(draw)
    views = []
    for index, image in enumerate(images.double() / 255):
        row = draw[index]
        if augment.crop_scale is not None:
            box = crop_boxes(keys[index : index + 1], height, width, augment.crop_scale, augment.crop_ratio)[0].int().tolist()
            view = TF.resized_crop(image, *box, [size, size], antialias=True)
        else:
            top, left = (int(value * (2 * augment.padding + 1)) for value in row[[module._TOP, module._LEFT]])
            view = TF.pad(image, [augment.padding] * 4)[:, top : top + height, left : left + width]
        view = view.flip(-1) if row[module._FLIP] < augment.flip else view
        if augment.randaugment_ops:
            stored = (view * 255).round().to(torch.uint8)
            view = randaugment(stored[None], fold_in(keys[index : index + 1], module._RANDAUGMENT))[0].double() / 255
        if jitter is not None and jitter.place[index, 0] < 4:
            for operation in jitter.place[index].argsort().tolist():
                view = OPERATIONS[operation](view, jitter.factors[index, operation].item())
        view = TF.rgb_to_grayscale(view, 3) if row[module._GRAY] < augment.grayscale else view
        if row[module._BLUR] < augment.blur:
            kernel, (low, high) = augment.blur_kernel or max(3, size // 10 // 2 * 2 + 1), augment.blur_sigma
            view = TF.gaussian_blur(view, [kernel] * 2, [(low + row[module._SIGMA] * (high - low)).item()] * 2)
        view = TF.solarize(view, augment.solarize_threshold) if row[module._SOLARIZE] < augment.solarize else view
        views.append(TF.normalize(view, MEAN, STD))
    return torch.stack(views)


WHOLE = {
    **PRESETS,
    "everything": ImageAugmentation(
        crop_scale=(0.1, 0.9), flip=0.5, brightness=0.6, contrast=0.5, saturation=0.9, hue=0.5, grayscale=0.3, blur=0.5, solarize=0.3
    ),
    "contrast alone": ImageAugmentation(contrast=0.9, jitter_probability=0.5),
}


@pytest.mark.parametrize(
    ("name", "stored", "size"),
    [(name, 32, 32) for name in WHOLE] + [(name, 96, 64) for name, augment in WHOLE.items() if augment.crop_scale is not None],
)
def test_views_equal_torchvision_with_the_same_parameters(name: str, stored: int, size: int) -> None:
    augment = WHOLE[name]
    images, key = pictures(50, stored), torch.arange(50)
    views = augment(images, key, size, mean=MEAN, std=STD)
    torch.testing.assert_close(views.double(), by_torchvision(augment, images, key, size), rtol=0, atol=1e-4 if augment.solarize else 3e-5)


@pytest.mark.parametrize("name", WHOLE)
def test_without_branches_the_views_are_the_same(name: str) -> None:
    """What a GPU and the compiler run equals what a CPU runs."""
    augment, images = WHOLE[name], pictures(40)
    keys = fold_in(torch.arange(40)[:, None], torch.arange(2))
    draw = uniform(keys.flatten(), module._COLUMNS).view(40, 2, -1)
    views = [torch.empty(40, 2, 3, 32, 32) for _ in range(2)]
    for straight in (False, True):
        augment._views(images, keys, draw, 32, MEAN, STD, straight, views[straight])
    torch.testing.assert_close(views[0], views[1], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_compiled_views_are_the_same() -> None:
    # Not a whole number of blocks, and more than one.
    augment, images, key = WHOLE["everything"], pictures(70), torch.arange(70)
    compiled = augment(images, key, views=2, mean=MEAN, std=STD, compiled=True)
    eager = augment(images, key, views=2, mean=MEAN, std=STD)
    torch.testing.assert_close(compiled, eager, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", WHOLE)
def test_a_view_depends_on_its_image_and_key_alone(name: str) -> None:
    augment, images, key = WHOLE[name], pictures(80), torch.arange(100, 180)
    whole = augment(images, key, views=2)
    for chosen in ([5], [79, 3, 40]):
        torch.testing.assert_close(augment(images[chosen], key[chosen], views=2), whole[chosen], rtol=0, atol=1e-5)
    torch.testing.assert_close(augment(images, key, views=3)[:, :2], whole, rtol=0, atol=1e-5)
    torch.testing.assert_close(augment(images, key), whole[:, 0], rtol=0, atol=1e-5)
    assert torch.equal(augment(images, key, views=2), whole)
    if name != "none":
        assert not torch.equal(whole[:, 0], whole[:, 1])
        same_image = augment(images[:1].expand(80, -1, -1, -1), key)
        assert len(torch.unique(same_image.flatten(1), dim=0)) > 40


@pytest.mark.parametrize("name", [name for name, augment in WHOLE.items() if not augment.solarize])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_half_and_double_precision(name: str, dtype: torch.dtype) -> None:
    images, key = pictures(20), torch.arange(20)
    images[:2] = torch.tensor([0, 255], dtype=torch.uint8)[:, None, None, None]  # black and white have no hue
    views = WHOLE[name](images, key, dtype=dtype)
    assert views.dtype == dtype
    assert (views.double() - WHOLE[name](images, key).double()).abs().mean() < 2e-3


def test_double_as_default_dtype() -> None:
    images, key = pictures(4), torch.arange(4)
    torch.set_default_dtype(torch.float64)
    try:
        views = WHOLE["everything"](images, key, mean=MEAN, std=STD)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(views, WHOLE["everything"](images, key, mean=MEAN, std=STD), rtol=0, atol=1e-4)


def test_views_need_no_gradient_and_no_images() -> None:
    images = (pictures(2) / 255).requires_grad_()
    assert not PRESETS["simclr"](images, torch.arange(2)).requires_grad
    assert PRESETS["simclr"](images[:0], torch.arange(0), views=2).shape == (0, 2, 3, 32, 32)
    with pytest.raises(ValueError, match="uint8, or floats"):
        PRESETS["simclr"](pictures(2).long(), torch.arange(2))


@pytest.mark.parametrize("name", WHOLE)
def test_autocast_changes_nothing(name: str) -> None:
    images, key = pictures(20), torch.arange(20)
    with torch.autocast("cpu", torch.bfloat16):
        views = WHOLE[name](images, key, views=2)
    assert torch.equal(views, WHOLE[name](images, key, views=2))


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    images, key = pictures(33), torch.arange(33)
    whole = WHOLE["everything"](images, key, views=2)
    monkeypatch.setattr(module, "_BLOCK_PIXELS", 10 * 1024)
    torch.testing.assert_close(WHOLE["everything"](images, key, views=2), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("channels", [1, 3])
def test_types_and_layouts(name: str, channels: int) -> None:
    augment, images, key = WHOLE[name], pictures(20, channels=channels), torch.arange(20)
    views = augment(images, key, views=2)
    assert views.shape == (20, 2, channels, 32, 32)
    assert views.dtype == torch.float32
    assert views.min() >= 0
    assert views.max() <= 1
    as_stored = images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    torch.testing.assert_close(augment(as_stored, key, views=2), views, rtol=0, atol=1e-6)
    torch.testing.assert_close(augment(images / 255, key, views=2), views, rtol=0, atol=1e-5)
    if not (augment.solarize or augment.randaugment_ops):  # there a rounding can turn a pixel over
        half = augment(images, key, views=2, dtype=torch.bfloat16)
        assert half.dtype == torch.bfloat16
        difference = (half.float() - views).abs()
        assert difference.mean() < 0.01
        assert difference.flatten(2).amax(2).median() < 0.1


# --- the same distributions of parameters ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("height", "width", "scale"), [(32, 32, (0.2, 1.0)), (32, 32, (0.08, 1.0)), (96, 64, (0.08, 1.0)), (20, 60, (0.8, 1.0))]
)
def test_boxes_are_distributed_as_torchvisions(height: int, width: int, scale: tuple[float, float]) -> None:
    count = 3000
    ours = crop_boxes(fold_in(7, torch.arange(count)), height, width, scale)
    torch.manual_seed(0)
    crop = T.RandomResizedCrop(32, scale=scale)
    image = torch.zeros(3, height, width)
    drawn = [crop.make_params([image]) for _ in range(count)]
    theirs = torch.tensor([[params[name] for name in ("top", "left", "height", "width")] for params in drawn], dtype=torch.float32)
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, 0] + ours[:, 2] <= height).all()
    assert (ours[:, 1] + ours[:, 3] <= width).all()
    measures = {
        "top": lambda box: box[:, 0],
        "left": lambda box: box[:, 1],
        "area": lambda box: box[:, 2] * box[:, 3],
        "ratio": lambda box: box[:, 3] / box[:, 2],
    }
    for name, measure in measures.items():
        assert stats.ks_2samp(measure(ours).numpy(), measure(theirs).numpy()).pvalue > 1e-3, name


def test_a_box_that_never_fits_is_the_largest_in_the_middle() -> None:
    wide = crop_boxes(torch.arange(50), 10, 100, (0.9, 1.0))
    assert (wide == torch.tensor([0.0, (100 - 13) // 2, 10.0, 13.0])).all()
    high = crop_boxes(torch.arange(50), 100, 10, (0.9, 1.0))
    assert (high == torch.tensor([(100 - 13) // 2, 0.0, 13.0, 10.0])).all()


def test_jitter_parameters_are_distributed_as_published() -> None:
    augment = ImageAugmentation(brightness=0.4, contrast=1.5, saturation=0.8, hue=0.1, jitter_probability=0.8)
    jitter = augment._draw_jitter(uniform(fold_in(3, torch.arange(6000)), module._COLUMNS))
    assert jitter is not None
    for column, (low, high) in enumerate([(0.6, 1.4), (0.0, 2.5), (0.2, 1.8), (-0.1, 0.1)]):
        assert stats.kstest(jitter.factors[:, column].numpy(), stats.uniform(low, high - low).cdf).pvalue > 1e-3
    applied = jitter.place[:, 0] < 4
    assert stats.binomtest(int(applied.sum()), 6000, 0.8).pvalue > 1e-3
    assert (jitter.place[~applied] == 4).all()
    codes = (jitter.place[applied] * torch.tensor([64, 16, 4, 1])).sum(1)
    kinds, counts = codes.unique(return_counts=True)
    assert len(kinds) == 24
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3
    torch.manual_seed(0)
    theirs = [T.ColorJitter(0.4, 1.5, 0.8, 0.1).make_params([])[name] for name in ("brightness_factor", "hue_factor") for _ in range(2000)]
    for part, column in ((theirs[:2000], 0), (theirs[2000:], 3)):
        assert stats.ks_2samp(np.array(part), jitter.factors[:, column].numpy()).pvalue > 1e-3


@pytest.mark.parametrize("name", ["flip", "grayscale", "blur", "solarize"])
def test_each_chance_is_as_asked(name: str) -> None:
    settings: dict[str, Any] = {name: 0.3, "blur_sigma": (2.0, 2.0), "solarize_threshold": 0.0}
    images = pictures(1, 8).expand(2000, -1, -1, -1)
    views = ImageAugmentation(**settings)(images, fold_in(1, torch.arange(2000)))
    changed = ((views - images[:1] / 255).abs().flatten(1).amax(1) > 1e-3).sum()
    assert stats.binomtest(int(changed), 2000, 0.3).pvalue > 1e-3


def test_angles_and_shifts_are_uniform() -> None:
    draw = uniform(fold_in(5, torch.arange(4000)), module._COLUMNS)
    assert stats.kstest(draw[:, module._ANGLE].numpy(), "uniform").pvalue > 1e-3
    bright = torch.zeros(1, 1, 9, 9, dtype=torch.uint8)
    bright[0, 0, 4, 4] = 255
    views = ImageAugmentation(padding=4)(bright.expand(4000, -1, -1, -1), fold_in(5, torch.arange(4000)))
    place = views.flatten(1).argmax(1)
    assert (views.flatten(1).sum(1) - 1).abs().max() < 1e-5
    counts = place.bincount(minlength=81)
    assert len(counts) == 81
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3
    turned = ImageAugmentation(rotation=90.0, rotation_probability=0.25)(pictures(1, 8).expand(2000, -1, -1, -1), torch.arange(2000))
    still = ((turned - pictures(1, 8) / 255).abs().flatten(1).amax(1) < 1e-3).sum()
    assert stats.binomtest(int(still), 2000, 0.75).pvalue > 1e-3


def test_pixels_are_distributed_as_torchvisions() -> None:
    """The whole of the SupCon recipe on one picture: statistics of the views, ours and torchvision's."""
    image = pictures(1, 32, seed=3)
    ours = PRESETS["supcon"](image.expand(3000, -1, -1, -1), fold_in(11, torch.arange(3000)))
    recipe = T.Compose(
        [
            T.ToDtype(torch.float32, scale=True),
            T.RandomResizedCrop(32, scale=(0.2, 1.0), antialias=True),
            T.RandomHorizontalFlip(),
            T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            T.RandomGrayscale(0.2),
        ]
    )
    torch.manual_seed(1)
    theirs = torch.stack([recipe(image[0]) for _ in range(3000)])
    measures = {
        "brightness": lambda views: views.mean((1, 2, 3)),
        "contrast": lambda views: views.std((1, 2, 3)),
        "colour": lambda views: (views[:, 0] - views[:, 2]).mean((1, 2)),
        "side": lambda views: (views[..., :16] - views[..., 16:]).mean((1, 2, 3)),
        "corner": lambda views: views[:, 1, 2, 2],
    }
    for name, measure in measures.items():
        assert stats.ks_2samp(measure(ours).numpy(), measure(theirs).numpy()).pvalue > 1e-3, name


# --- mistakes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"flip": 1.5}, "flip"),
        ({"crop_scale": (0.5, 0.2)}, "crop_scale"),
        ({"crop_scale": (0.0, 1.0)}, "crop_scale"),
        ({"crop_ratio": (2.0, 1.0)}, "crop_ratio"),
        ({"padding": -1}, "padding"),
        ({"hue": 0.7}, "hue"),
        ({"crop_scale": (0.2, 1.0), "padding": 4}, "two ways"),
        ({"blur_kernel": 4}, "odd"),
        ({"blur_sigma": (0.0, 1.0)}, "blur_sigma"),
        ({"randaugment_magnitude": 31}, "randaugment_magnitude"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ImageAugmentation(**settings)


def test_views_of_images_that_are_not_square_need_a_size() -> None:
    with pytest.raises(ValueError, match="not square"):
        ImageAugmentation()(pictures(2, 8, 12), torch.arange(2))
    assert ImageAugmentation()(pictures(2, 8, 12), torch.arange(2), size=6).shape == (2, 3, 6, 6)


@pytest.mark.parametrize("kernel_size", [4, 33])
def test_an_impossible_blur_is_refused(kernel_size: int) -> None:
    with pytest.raises(ValueError, match="kernel_size"):
        gaussian_blur(torch.rand(1, 3, 16, 16), torch.ones(1), kernel_size)
