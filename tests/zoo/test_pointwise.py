"""The fused Linear, BatchNorm, ReLU and maximum against the plain layers: values, gradients, statistics, training."""

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from litzoo.zoo import PointNetClassifier
from litzoo.zoo.layers import pointwise
from litzoo.zoo.layers.pointwise import PointwiseLayers, linear_batchnorm, linear_batchnorm_max, max_over_points
from litzoo.zoo.pointnet import Variant


def layers_of(*widths: int, seed: int = 0, momentum: float | None = 0.1, last_relu: bool = True) -> nn.Sequential:
    """Pointwise layers whose BatchNorms have scales of both signs, shifts and running statistics."""
    torch.manual_seed(seed)
    layers = []
    for narrow, wide in pairwise(widths):
        norm = nn.BatchNorm1d(wide, momentum=momentum)
        with torch.no_grad():
            norm.weight.normal_()
            norm.bias.normal_()
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
        layers += [nn.Conv1d(narrow, wide, 1, bias=False), norm, nn.ReLU()]
    if not last_relu:
        layers[-1] = nn.Identity()
    return nn.Sequential(*layers).double()


def plain(layers: nn.Sequential, x: Tensor) -> tuple[Tensor, Tensor]:
    found = layers(x).max(dim=2)
    return found.values, found.indices


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
@pytest.mark.parametrize("widths", [(16, 32), (3, 8, 40)])
@pytest.mark.parametrize("last_relu", [True, False])
def test_equals_the_plain_layers_in_double_precision(
    training: bool, momentum: float | None, widths: tuple[int, ...], last_relu: bool
) -> None:
    fused, reference = (layers_of(*widths, momentum=momentum, last_relu=last_relu) for _ in range(2))
    fused.train(training)
    reference.train(training)
    for step in range(3):
        x = torch.randn(5, widths[0], 30, dtype=torch.float64, requires_grad=True)
        y = x.detach().clone().requires_grad_()
        ours, winner = max_over_points(fused, x)
        theirs, _ = plain(reference, y)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
        weight = torch.randn_like(ours)
        gradients = torch.autograd.grad((ours * weight).sum(), [x, *fused.parameters()])
        expected = torch.autograd.grad((theirs * weight).sum(), [y, *reference.parameters()])
        for found, right in zip(gradients, expected, strict=True):
            torch.testing.assert_close(found, right, rtol=1e-11, atol=1e-12)
        for (name, found), right in zip(fused.named_buffers(), reference.buffers(), strict=True):
            torch.testing.assert_close(
                found, right, rtol=1e-12, atol=1e-12, msg=lambda text, name=name, step=step: f"{name}, step {step}: {text}"
            )
        with torch.no_grad():
            positive = (ours > 0) | (not last_relu)
            reached = fused.eval()(x).gather(2, winner.unsqueeze(-1)).squeeze(-1)
            if not training:
                torch.testing.assert_close(reached[positive], ours[positive], rtol=0, atol=1e-12)
            fused.train(training)


def test_gradcheck() -> None:
    norm = layers_of(4, 6)[1]
    x, weight = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True), torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    norm.train()

    def function(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return _function(norm, x, weight, scale, shift)

    assert torch.autograd.gradcheck(function, (x, weight, norm.weight, norm.bias))
    assert torch.autograd.gradgradcheck(function, (x, weight, norm.weight, norm.bias), atol=1e-4)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("relu", [True, False])
def test_gradcheck_of_the_dense_layer(training: bool, relu: bool) -> None:
    norm = layers_of(4, 6)[1].train(training)
    x, weight = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True), torch.randn(6, 4, dtype=torch.float64, requires_grad=True)

    def function(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return linear_batchnorm(x, weight, _with(norm, scale, shift), relu)

    assert torch.autograd.gradcheck(function, (x, weight, norm.weight, norm.bias))
    assert torch.autograd.gradgradcheck(function, (x, weight, norm.weight, norm.bias), atol=1e-4)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
@pytest.mark.parametrize("widths", [(16, 32), (3, 8, 40), (5, 5, 5, 5)])
@pytest.mark.parametrize("last_relu", [True, False])
def test_dense_layers_equal_the_plain_ones_in_double_precision(
    training: bool, momentum: float | None, widths: tuple[int, ...], last_relu: bool
) -> None:
    reference = layers_of(*widths, momentum=momentum, last_relu=last_relu).train(training)
    fused = PointwiseLayers(*copy.deepcopy(list(reference))).train(training)
    assert fused.state_dict().keys() == reference.state_dict().keys()
    for _ in range(3):
        x = torch.randn(5, widths[0], 30, dtype=torch.float64, requires_grad=True)
        y = x.detach().clone().requires_grad_()
        ours, theirs = fused(x), reference(y)
        assert type(ours.grad_fn).__name__ == "_DenseBackward"
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
        weight = torch.randn_like(ours)
        gradients = torch.autograd.grad((ours * weight).sum(), [x, *fused.parameters()])
        expected = torch.autograd.grad((theirs * weight).sum(), [y, *reference.parameters()])
        for found, right in zip(gradients, expected, strict=True):
            torch.testing.assert_close(found, right, rtol=1e-11, atol=1e-11)
        for found, right in zip(fused.buffers(), reference.buffers(), strict=True):
            torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_single_precision_is_as_good_as_that_of_the_plain_layers(offset: float) -> None:
    """Also where clouds lie far from the origin, and the variance is a small difference of large numbers."""
    exact = layers_of(3, 16)
    torch.manual_seed(1)
    x = torch.randn(4, 3, 200) + offset
    truth = exact(x.double())
    plain_error = (copy.deepcopy(exact).float()(x) - truth).abs().max()
    ours_error = (PointwiseLayers(*copy.deepcopy(list(exact))).float()(x) - truth).abs().max()
    assert ours_error < 3 * plain_error + 1e-6


def _with(norm: nn.BatchNorm1d, scale: Tensor, shift: Tensor) -> nn.BatchNorm1d:
    twin = copy.copy(norm)
    twin._parameters = {"weight": scale, "bias": shift}
    twin._buffers = {name: None if value is None else value.clone() for name, value in norm._buffers.items()}
    return twin


def _function(norm: nn.BatchNorm1d, x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return linear_batchnorm_max(x, weight, _with(norm, scale, shift), relu=False)[0]


@pytest.mark.parametrize("block", [1, 1000, 10**9])
def test_blocks_change_nothing(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layers, x = layers_of(8, 16), torch.randn(7, 8, 20, dtype=torch.float64)
    expected = max_over_points(copy.deepcopy(layers), x)
    monkeypatch.setattr(pointwise, "_SCORES", block)
    found = max_over_points(layers, x)
    torch.testing.assert_close(found.value, expected.value, rtol=0, atol=1e-13)
    assert torch.equal(found.point, expected.point)


@pytest.mark.parametrize("block", [1, 300, 10**9])
def test_blocks_change_only_the_order_of_sums(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layers, x = layers_of(8, 12, 16), torch.randn(7, 8, 20, dtype=torch.float64, requires_grad=True)
    for fused in (linear_batchnorm, lambda *args: linear_batchnorm_max(*args).value):
        found = []
        for chunk in (pointwise._CHUNK, block):
            monkeypatch.setattr(pointwise, "_CHUNK", chunk)
            value = fused(x, layers[0].weight.squeeze(-1), copy.deepcopy(layers[1]))
            found.append([value, *torch.autograd.grad(value.square().sum(), [x, layers[0].weight])])
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("points", [1, 63, 64, 65, 128, 640, 1000, 2500])
def test_argmax_by_groups(points: int) -> None:
    scores = torch.randn(3, 5, points, generator=torch.Generator().manual_seed(points))
    assert torch.equal(pointwise._argmax(scores), scores.argmax(dim=2))


def test_accumulated_gradients_are_those_of_the_plain_layers() -> None:
    fused, reference = layers_of(6, 8, 12), layers_of(6, 8, 12)
    fused_layers = PointwiseLayers(*fused)
    for seed in range(3):
        x = torch.randn(4, 6, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        (max_over_points(fused_layers, x).value.square().sum() / 3).backward()
        (plain(reference, x)[0].square().sum() / 3).backward()
    for ours, theirs in zip(fused.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-11)
    for found, right in zip(fused.buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-12)


def test_without_running_statistics() -> None:
    layers, x = layers_of(8, 16), torch.randn(3, 8, 20, dtype=torch.float64)
    layers[1] = nn.BatchNorm1d(16, track_running_stats=False).double()
    for training in (True, False):
        layers.train(training)
        torch.testing.assert_close(max_over_points(layers, x)[0], plain(layers, x)[0], rtol=0, atol=1e-12)


def test_statistics_that_are_switched_off_stay() -> None:
    """As some do for a second pass over adversarial or unlabelled samples."""
    fused = PointwiseLayers(*layers_of(8, 16))
    x = torch.randn(3, 8, 20, dtype=torch.float64)
    fused[1].track_running_stats = False
    reference, before = copy.deepcopy(fused), copy.deepcopy(fused.state_dict())
    for training in (True, False):
        fused.train(training)
        torch.testing.assert_close(fused(x), nn.Sequential(*reference).train(training)(x), rtol=0, atol=1e-12)
        max_over_points(fused, x)
        for name, value in fused.state_dict().items():
            assert torch.equal(value, before[name])


@pytest.mark.parametrize("seed", range(5))
def test_a_channel_that_does_not_vary_is_finite(seed: int) -> None:
    """Points on a line, and weights orthogonal to it: a variance that rounding may make negative."""
    generator = torch.Generator().manual_seed(seed)
    line = torch.randn(3, 1, generator=generator)
    x = (line * torch.randn(8, 1, 500, generator=generator) * 300).requires_grad_()
    basis = torch.linalg.qr(torch.cat([line, torch.randn(3, 2, generator=generator)], dim=1)).Q
    weight = basis[:, 1:].T.contiguous().requires_grad_()
    for fused in (linear_batchnorm, lambda *args: linear_batchnorm_max(*args).value):
        norm = nn.BatchNorm1d(2)
        value = fused(x, weight, norm)
        assert value.isfinite().all()
        assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(value.square().sum(), [x, weight]))
        assert (norm.running_var >= 0.9 - 1e-6).all()


def test_a_single_point_has_no_variance() -> None:
    layers = layers_of(8, 16)
    with pytest.raises(ValueError, match="single point"):
        linear_batchnorm_max(torch.randn(1, 8, 1, dtype=torch.float64), layers[0].weight.squeeze(-1), layers[1])


@pytest.mark.parametrize("what", ["hook", "pre-hook", "backward hook", "batchnorm", "activation", "bias", "half", "tracing", "hook on all"])
def test_plain_layers_where_somebody_would_notice(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layers, x = layers_of(8, 16).float(), torch.randn(3, 8, 20)
    if what == "hook":
        layers[0].register_forward_hook(lambda module, args, output: output * 2)
    elif what == "pre-hook":
        layers[1].register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    elif what == "backward hook":
        layers[2].register_full_backward_hook(lambda module, into, out: None)
    elif what == "batchnorm":
        layers[1] = nn.InstanceNorm1d(16)
    elif what == "activation":
        layers[2] = nn.GELU()
    elif what == "bias":
        layers[0] = nn.Conv1d(8, 16, 1)
    elif what == "half":
        layers, x = layers.bfloat16(), x.bfloat16()
    elif what == "tracing":
        monkeypatch.setattr(torch.jit, "is_tracing", lambda: True)
    monkeypatch.setattr(pointwise, "linear_batchnorm_max", lambda *args: pytest.fail("fused"))
    on_all = [nn.modules.module.register_module_forward_hook(lambda module, args, output: None)] if what == "hook on all" else []
    try:
        assert torch.equal(max_over_points(layers.eval(), x)[0], plain(layers, x)[0])
    finally:
        for handle in on_all:
            handle.remove()


def test_transforms_of_torch_func_and_forward_gradients() -> None:
    layers, x = PointwiseLayers(*layers_of(4, 6, 8)).eval(), torch.randn(2, 4, 10, dtype=torch.float64)

    def function(x: Tensor) -> Tensor:
        return max_over_points(layers, x).value

    expected = torch.autograd.functional.jacobian(function, x)
    torch.testing.assert_close(torch.func.jacrev(function)(x), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(torch.func.jacfwd(function)(x), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(torch.func.vmap(function)(x[None])[0], function(x), rtol=0, atol=1e-12)
    with forward_ad.dual_level():
        slope = forward_ad.unpack_dual(function(forward_ad.make_dual(x, torch.ones_like(x)))).tangent
    torch.testing.assert_close(slope, expected.sum(dim=(2, 3, 4)), rtol=1e-10, atol=1e-12)


def test_meta_tensors_have_a_shape() -> None:
    with torch.device("meta"):
        assert PointNetClassifier(5).eval()(torch.rand(2, 64, 3)).shape == (2, 5)


def test_autocast_is_left_for_the_fused_layers() -> None:
    layers, x = layers_of(8, 16).float(), torch.randn(3, 8, 20)
    expected = max_over_points(copy.deepcopy(layers), x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        found = max_over_points(layers, x)[0]
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


# --- in PointNet -------------------------------------------------------------------------------------------------------


def classifier(dtype: torch.dtype = torch.float64, variant: Variant = "paper") -> PointNetClassifier:
    torch.manual_seed(0)
    return PointNetClassifier(5, dropout=0.0, label_smoothing=0.1, variant=variant).to(dtype)


def unfused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pointwise, "fusible", lambda *layers: False)


def gradients(model: PointNetClassifier, points: Tensor, label: Tensor) -> list[Tensor]:
    output = model._output(points)
    loss = model._loss(model.head(output.feature), label, output.feature_transform)
    return [loss, *torch.autograd.grad(loss, list(model.parameters()))]


@pytest.mark.parametrize("variant", ["paper", "compact"])
def test_pointnet_has_the_gradients_of_the_plain_layers(variant: Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    points, label = torch.randn(6, 40, 3, dtype=torch.float64), torch.arange(6) % 5
    ours = gradients(classifier(variant=variant), points, label)
    unfused(monkeypatch)
    for found, right in zip(ours, gradients(classifier(variant=variant), points, label), strict=True):
        torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-11)


def test_pointnet_has_the_same_state_dict_and_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    model = classifier().eval()
    points = torch.randn(3, 50, 3, dtype=torch.float64)
    ours = model(points)
    assert set(model.state_dict()) >= {"backbone.wide.6.weight", "backbone.wide.7.running_var", "backbone.wide.7.num_batches_tracked"}
    unfused(monkeypatch)
    torch.testing.assert_close(ours, model(points), rtol=0, atol=1e-12)


@pytest.mark.slow
def test_two_hundred_steps_stay_together(monkeypatch: pytest.MonkeyPatch) -> None:
    def train() -> tuple[list[float], dict[str, Tensor]]:
        # Without transforms: with them, a winner that changes by a rounding makes a chaos of any two runs.
        torch.manual_seed(0)
        model = PointNetClassifier(5, dropout=0.0, input_transform=False, feature_transform=False).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)
        generator, losses = torch.Generator().manual_seed(1), []
        for _ in range(200):
            label = torch.randint(5, (8,), generator=generator)
            points = torch.randn(8, 24, 3, dtype=torch.float64, generator=generator) * (
                1 + label[:, None, None] * torch.tensor([0.2, 0.0, 0.1])
            )
            output = model._output(points)
            loss = model._loss(model.head(output.feature), label, output.feature_transform)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses, model.state_dict()

    ours, weights = train()
    unfused(monkeypatch)
    theirs, expected = train()
    assert ours == pytest.approx(theirs, rel=1e-6)
    for name, value in weights.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)


def test_checkpointed_double_backward_is_possible() -> None:
    """The gradient penalty of a critic, for example: everything is made of differentiable operations."""
    layers = layers_of(4, 8)
    x = torch.randn(2, 4, 6, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(max_over_points(layers, x)[0].sum(), x, create_graph=True)
    second: Any = torch.autograd.grad(F.mse_loss(slope, torch.zeros_like(slope)), layers[0].weight)
    assert torch.isfinite(second[0]).all()
