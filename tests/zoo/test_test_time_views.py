"""Views of images and clouds, and the mean over them, against numpy, scipy and naive float64 sums."""

import copy
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import affine_transform
from torch import Tensor, nn

from litzoo.zoo.functional.points import voting_views
from litzoo.zoo.functional.views import VIEWS, flip, half, log_mean_probability, mirror, over_views, resolve_views, rotate, shift, yaw, zoom
from litzoo.zoo.layers.test_time_views import TestTimeViews

IMAGES = torch.rand(3, 2, 6, 6, generator=torch.Generator().manual_seed(0))
CLOUDS = torch.rand(3, 9, 3, generator=torch.Generator().manual_seed(1))


def test_images_move_as_numpy_moves_them() -> None:
    array = IMAGES.numpy()
    assert np.array_equal(flip(IMAGES).numpy(), array[..., ::-1])
    for quarters in (-1, 0, 1, 2, 3):
        assert np.array_equal(rotate(IMAGES, quarters).numpy(), np.rot90(array, quarters, (2, 3)))
        assert np.array_equal(rotate(IMAGES, quarters, flipped=True).numpy(), np.rot90(array[..., ::-1], quarters, (2, 3)))
    padded = np.pad(array, ((0, 0), (0, 0), (2, 2), (2, 2)), mode="edge")
    assert np.array_equal(shift(IMAGES, 0.25, -0.01).numpy(), padded[..., 3:9, 0:6])  # 1.5 pixels are 2, 0.06 at least one
    assert torch.equal(shift(IMAGES, 0, 0), IMAGES)


@pytest.mark.parametrize("factor", [0.8, 1.3])
def test_zoom_is_scipys_bilinear_interpolation(factor: float) -> None:
    found = zoom(IMAGES.double(), factor)
    offset = (1 - 1 / factor) * 2.5
    for image, zoomed in zip(IMAGES.flatten(0, 1).double().numpy(), found.flatten(0, 1), strict=True):
        wanted = affine_transform(image, np.array([1 / factor, 1 / factor]), offset, order=1, mode="nearest")
        np.testing.assert_allclose(zoomed.numpy(), wanted, atol=1e-12)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(zoom(IMAGES.bfloat16(), factor).double(), found, atol=0.01, rtol=0)


def test_clouds_turn_as_they_do_for_votes() -> None:
    for turns, view in enumerate(VIEWS["yaw"], start=1):
        torch.testing.assert_close(view(CLOUDS), voting_views(CLOUDS, 12, "yaw")[:, turns])
    x, y, z = CLOUDS.double().unbind(-1)
    turned = torch.stack([z, y, -x], dim=-1)
    torch.testing.assert_close(yaw(CLOUDS.double(), 0.25), turned)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(yaw(CLOUDS, 0.25).double(), turned, atol=1e-6, rtol=0)
    assert torch.equal(mirror(CLOUDS), torch.stack([-CLOUDS[..., 0], CLOUDS[..., 1], CLOUDS[..., 2]], dim=-1))
    for number in range(4):
        assert torch.equal(half(CLOUDS, number), voting_views(CLOUDS, 4, "subsample")[:, number])
    assert half(CLOUDS, 0).shape == (3, 5, 3)


@pytest.mark.parametrize("preset", VIEWS)
def test_presets_are_pure_and_differ(preset: Any) -> None:
    inputs = (CLOUDS if preset in ("yaw", "mirror", "halves") else IMAGES).clone()
    before = inputs.clone()
    views = [view(inputs) for view in resolve_views(preset)]
    assert torch.equal(inputs, before)
    assert all(torch.equal(view, again(inputs)) for view, again in zip(views, pickle.loads(pickle.dumps(VIEWS[preset])), strict=True))
    distinct = {tuple(view.flatten().tolist()) for view in (inputs, *views)}
    assert len(distinct) == len(views) + 1
    if inputs.dim() == 4:  # several views of each sample are views of images, too
        stacked = torch.stack([inputs, inputs], dim=1)
        assert all(torch.equal(view(stacked)[:, 1], single) for view, single in zip(VIEWS[preset], views, strict=True))


@pytest.mark.parametrize(
    ("view", "inputs", "reason"),
    [
        (flip, CLOUDS, "view is one of images"),
        (mirror, IMAGES, "view is one of clouds"),
        (lambda images: rotate(images, 1), IMAGES[..., :4], "only square images"),
        (lambda images: zoom(images, 0.9), (255 * IMAGES).byte(), "wants images in floats"),
    ],
)
def test_views_of_something_else(view: Any, inputs: Tensor, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        view(inputs)


def test_log_mean_probability_against_float64() -> None:
    logits = 30 * torch.randn(5, 4, 3)
    wanted = logits.double().softmax(-1)
    torch.testing.assert_close(log_mean_probability(logits).double().exp(), wanted.mean(0), atol=1e-6, rtol=0)
    torch.testing.assert_close(log_mean_probability(logits, dim=1).double().exp(), wanted.mean(1), atol=1e-6, rtol=0)
    far = torch.tensor([[0.0, -1000.0], [0.0, -1002.0]])
    assert float(log_mean_probability(far)[1]) == pytest.approx(-1000 + math.log((1 + math.exp(-2)) / 2))
    assert log_mean_probability(logits.bfloat16()).dtype == torch.float32


def network(inputs: Tensor) -> Tensor:
    return torch.stack([inputs.flatten(1)[:, 0], inputs.flatten(1)[:, -1], inputs.flatten(1).mean(1)], dim=1)


@pytest.mark.parametrize("merge", ["probabilities", "logits"])
def test_wrapper_is_the_mean_over_views(merge: Any) -> None:
    outputs = torch.stack([network(IMAGES), network(IMAGES.flip(-1)), network(IMAGES.flip(-2))]).double()
    wrapped = TestTimeViews(Network(), [flip, flip_down], merge)
    wanted = outputs.softmax(-1).mean(0) if merge == "probabilities" else outputs.mean(0).softmax(-1)
    torch.testing.assert_close(wrapped(IMAGES).double().softmax(-1), wanted, atol=1e-6, rtol=0)
    assert torch.equal(TestTimeViews(Network(), [], merge)(IMAGES), network(IMAGES))
    for copied in (copy.deepcopy(wrapped), pickle.loads(pickle.dumps(wrapped))):
        assert torch.equal(copied(IMAGES), wrapped(IMAGES))


def flip_down(images: Tensor) -> Tensor:
    return images.flip(-2)


class Network(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return network(inputs)


def test_a_function_merges_anything() -> None:
    found = over_views(lambda x: {"top": x.amax()}, [torch.neg], lambda outputs: [float(output["top"]) for output in outputs], IMAGES)
    assert found == [float(IMAGES.amax()), float(-IMAGES.amin())]
    halves = over_views(lambda x, scale: scale * x.amax(), VIEWS["halves"], max, CLOUDS, scale=2)
    assert float(halves) == 2 * float(CLOUDS.amax())


@pytest.mark.parametrize(
    ("function", "merge", "reason"),
    [
        (lambda x: (x, x), "logits", "the output is tuple: give a function of the list of outputs as merge"),
        (lambda x: {"logits": x}, "probabilities", "the output is dict"),
        (lambda x: x, "logits", "of shape \\(3, 2, 6, 6\\)"),
        (lambda x: network(x).argmax(1), "logits", "int64"),
        (lambda x: network(x)[:, :1], "probabilities", "averages logits \\(batch, classes\\)"),
        (lambda x: x.flatten(0, -2)[:, 0] if x[0, 0, 0, 0] > 0 else x.flatten(), "logits", "different shapes"),
    ],
)
def test_outputs_that_cannot_be_averaged(function: Any, merge: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        over_views(function, [torch.neg], merge, IMAGES)


@pytest.mark.parametrize(("preset", "reason"), [("flip", "one of images .* got dict"), ("mirror", "one of clouds .* got dict")])
def test_presets_want_tensors(preset: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        over_views(lambda inputs: inputs["x"].mean((1, 2)), VIEWS[preset], "logits", {"x": IMAGES})


def test_refuses_unknown_settings() -> None:
    with pytest.raises(ValueError, match=r"one of flip, flip_rotations, .*; got 'mirrored'"):
        TestTimeViews(Network(), "mirrored")  # type: ignore[arg-type]  # no such preset, on purpose
    with pytest.raises(TypeError, match="sequence of functions"):
        TestTimeViews(Network(), [1])  # type: ignore[list-item]  # no function, on purpose
    with pytest.raises(ValueError, match="merge must be one of probabilities, logits"):
        TestTimeViews(Network(), "flip", "median")  # type: ignore[arg-type]  # no such merge, on purpose
