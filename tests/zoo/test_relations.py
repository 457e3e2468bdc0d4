"""Pairs, their loss and the relation head, against the published double loop and against the layers themselves, in float64."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litzoo.zoo.functional import relations
from litzoo.zoo.functional.relations import relation_head_loss, relation_loss, view_pairs
from litzoo.zoo.layers import relation_head
from litzoo.zoo.layers.relation_head import Aggregation, RelationHead

JOIN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cat": lambda a, b: torch.cat([a, b], dim=1),
    "sum": lambda a, b: a + b,
    "mean": lambda a, b: (a + b) / 2,
    "max": torch.maximum,
}


def double_loop(views: list[Tensor], aggregation: str) -> tuple[Tensor, Tensor]:
    """Rows and targets as published: views i < j of the batch side by side, then with the second one rolled, each time by one more."""
    rows, targets, shift = [], [], 1
    for i in range(len(views)):
        for j in range(i + 1, len(views)):
            rows += [JOIN[aggregation](views[i], views[j]), JOIN[aggregation](views[i], views[j].roll(shift, dims=0))]
            targets += [torch.ones(len(views[i]), dtype=torch.float64), torch.zeros(len(views[i]), dtype=torch.float64)]
            shift = shift + 1 if shift + 1 < len(views[i]) else 1
    return torch.cat(rows), torch.cat(targets)


def features_of(views: int, samples: int, dim: int = 5, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(views * 100 + samples)
    return torch.randn(views, samples, dim, generator=generator, dtype=dtype).requires_grad_()


# Pairs


@pytest.mark.parametrize("views", [2, 3, 8])
@pytest.mark.parametrize("samples", [2, 3, 4, 16])
def test_rows_and_targets_are_those_of_the_double_loop(samples: int, views: int) -> None:
    features = features_of(views, samples)
    rows, targets = double_loop(list(features), "cat")
    pairs = view_pairs(samples, views)
    flat = features.flatten(0, 1)
    assert torch.equal(torch.cat([flat[pairs.first], flat[pairs.second]], dim=1), rows)
    assert torch.equal(pairs.target.double(), targets)


def test_no_negative_pair_is_of_one_image() -> None:
    for samples in (2, 3, 5, 8, 31):
        for views in range(2, 10):
            first, second, target = view_pairs(samples, views)
            assert len(target) == views * (views - 1) * samples
            assert torch.equal(first % samples == second % samples, target)
            assert bool((first // samples < second // samples).all())
            assert int(target.sum()) * 2 == len(target)
            assert len({*zip(first[target].tolist(), second[target].tolist(), strict=True)}) * 2 == len(target)


def test_plans_are_kept_and_serve_a_gradient_after_inference() -> None:
    with torch.inference_mode():
        kept = view_pairs(7, 3)
    assert view_pairs(7, 3).first is kept.first
    rows = torch.rand(21, 2, requires_grad=True)
    rows[view_pairs(7, 3).second].square().sum().backward()


@pytest.mark.parametrize(
    ("samples", "views", "message"),
    [(1, 4, "larger batch_size or by dropping the last, incomplete one"), (4, 1, "set the views of the data to at least 2")],
)
def test_what_leaves_no_pairs(samples: int, views: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        view_pairs(samples, views)
    with pytest.raises(ValueError, match=message):
        RelationHead(3).loss(torch.rand(views, samples, 3))


# The loss


def published_focal(logits: Tensor, target: Tensor, gamma: float) -> Tensor:
    """As the published code has it, with gamma = 2 there."""
    probability = logits.sigmoid()
    right = target * probability + (1 - target) * (1 - probability)
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return (0.5 * (1 - right) ** gamma * entropy).mean()


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0, 3.5])
def test_focal_loss_against_the_published_one(gamma: float) -> None:
    logits = (torch.linspace(-6, 6, 41, dtype=torch.float64)).requires_grad_()
    target = torch.arange(41) % 3 == 0
    found, expected = relation_loss(logits, target, gamma), published_focal(logits, target.double(), gamma)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    slope = torch.autograd.grad(found, logits, retain_graph=True)[0]
    torch.testing.assert_close(slope, torch.autograd.grad(expected, logits)[0], rtol=1e-9, atol=1e-13)
    sign = torch.where(target, -1.0, 1.0)
    torch.testing.assert_close(relations._relation_loss_slope(logits.detach() * sign, gamma) * sign / 41, slope, rtol=1e-10, atol=1e-14)


def test_without_focus_it_is_the_cross_entropy() -> None:
    logits, target = torch.randn(50, dtype=torch.float64) * 5, torch.arange(50) % 2 == 0
    torch.testing.assert_close(relation_loss(logits, target, 0), F.binary_cross_entropy_with_logits(logits, target.double()))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sure_pairs(dtype: torch.dtype, gamma: float) -> None:
    """Far off, the loss is the logit, and nothing is not a number."""
    far = 6e4 if dtype == torch.float16 else 1e5
    logits = torch.tensor([-far, far, -far, far], dtype=dtype).requires_grad_()
    target = torch.tensor([True, True, False, False])
    loss = relation_loss(logits, target, gamma)
    assert loss.dtype == torch.float32
    expected = float(logits.detach().abs()[0]) / 2 * (0.5 if gamma else 1.0)
    assert float(loss.detach()) == pytest.approx(expected)
    loss.backward()
    assert logits.grad is not None
    assert bool(logits.grad.isfinite().all())
    slope = relations._relation_loss_slope(torch.tensor([far, -far]), gamma)
    torch.testing.assert_close(slope, torch.tensor([0.5 if gamma else 1.0, 0.0]))


# The head


def head_of(aggregation: Aggregation = "cat", dim: int = 5, hidden: int = 6, dtype: torch.dtype = torch.float64) -> RelationHead:
    torch.manual_seed(1)
    head = RelationHead(dim, hidden, aggregation)
    nn.init.normal_(head.norm.weight)
    nn.init.normal_(head.norm.bias)
    return head.to(dtype)


@pytest.fixture(params=[(1, 0), (60, 0), (1 << 18, 0), (1 << 18, 1 << 20)], ids=["pair", "blocks", "whole", "layers"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of other sizes, and the layers themselves."""
    size, few = request.param
    monkeypatch.setattr(relations, "_CACHED", size)
    monkeypatch.setattr(relation_head, "_FEW", few)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("aggregation", JOIN)
@pytest.mark.parametrize(("views", "samples"), [(2, 2), (2, 5), (3, 3), (5, 4), (9, 3), (6, 12)])
def test_head_on_views_equals_the_layers_on_the_double_loop(views: int, samples: int, aggregation: Aggregation) -> None:
    """Loss, logits, gradients and running statistics, with and without focus."""
    features = features_of(views, samples)
    for gamma in (0.0, 1.5, 2.0):
        head = head_of(aggregation)
        twin = nn.Sequential(*(copy.deepcopy(layer) for layer in (head.first, head.norm, head.activation, head.last)))
        rows, target = double_loop(list(features), aggregation)
        logits = twin(rows).squeeze(1)
        expected = published_focal(logits, target, gamma) if gamma else F.binary_cross_entropy_with_logits(logits, target)
        loss, found, told = head.loss(features, gamma)
        assert not found.requires_grad
        assert torch.equal(told.double(), target)
        torch.testing.assert_close(found, logits.detach(), rtol=1e-10, atol=1e-11)
        torch.testing.assert_close(loss, expected, rtol=1e-11, atol=1e-13)
        mine = torch.autograd.grad(3 * loss, [features, *head.parameters()])
        theirs = torch.autograd.grad(3 * expected, [features, *twin.parameters()])
        for one, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-12)
        for one, other in zip(head.norm.buffers(), twin[1].buffers(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("gamma", [0.0, 2.0])
@pytest.mark.parametrize("size", [1, 1 << 18])
def test_gradcheck(size: int, gamma: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relations, "_CACHED", size)
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 4, 2), (3, 2), (3, 2), (3,), (3,), (3,), (1,)]
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    assert torch.autograd.gradcheck(lambda *x: relation_head_loss(*x, focal_gamma=gamma).loss, inputs)
    # A gradient may be wanted of any part of them only.
    frozen = [x.detach() for x in inputs]
    whole = torch.autograd.grad(relation_head_loss(*inputs).loss, inputs)
    for number in range(len(inputs)):
        some = [*frozen[:number], inputs[number], *frozen[number + 1 :]]
        assert torch.equal(torch.autograd.grad(relation_head_loss(*some).loss, inputs[number])[0], whole[number])
    with torch.no_grad():
        assert float(relation_head_loss(*inputs).loss) == float(relation_head_loss(*inputs).loss)


def test_of_many_pairs_there_is_no_second_derivative() -> None:
    features, head = features_of(4, 60), head_of()
    (gradient,) = torch.autograd.grad(head.loss(features)[0], features, create_graph=True)
    assert gradient.requires_grad, "of few pairs there is"
    features = features_of(8, 60)  # many pairs
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(head.loss(features)[0], features, create_graph=True)


def test_pairs_are_forgotten() -> None:
    """What is kept for the gradient is a matter of views, not of pairs."""
    views, samples, hidden = 12, 20, 32
    kept: list[int] = []
    head, features = head_of(hidden=hidden), features_of(views, samples)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):  # type: ignore[func-returns-value]  # notes it, and passes it on
        head.loss(features)
    assert views * (views - 1) * samples >= relation_head._FEW
    assert sum(kept) < 3 * views * samples * hidden < views * (views - 1) * samples * hidden


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("views", [3, 9])
def test_half_precision_and_single_precision(views: int, dtype: torch.dtype) -> None:
    """Also where the features lie far from zero: BatchNorm takes their mean away first."""
    exact = (features_of(views, 40, dim=16).detach() + 3).to(dtype).double().requires_grad_()
    head = head_of(dim=16, hidden=32)
    expected, _, _ = head.loss(exact)
    (slope,) = torch.autograd.grad(expected, exact)
    features = exact.detach().to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss, logits, _ = head.float().loss(features)
    assert loss.dtype == torch.float32
    assert logits.shape == (views * (views - 1) * 40,)
    tolerance = {torch.bfloat16: 0.2, torch.float16: 0.1, torch.float32: 1e-5}[dtype]  # near zero, LeakyReLU turns the other way
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=tolerance / 10)
    loss.backward()
    assert features.grad is not None
    assert features.grad.dtype == dtype
    assert float((features.grad.double() - slope).norm() / slope.norm()) < tolerance


def test_a_gradient_is_scaled_before_it_is_rounded() -> None:
    """As of a GradScaler: those of many pairs would be zero in float16."""
    head, features = head_of(dtype=torch.float32), features_of(10, 40, dtype=torch.float16)
    with torch.no_grad():
        head.last.weight.mul_(1e-5)
    (head.loss(features)[0] * 2.0**16).backward()
    assert features.grad is not None
    assert float((features.grad != 0).float().mean()) > 0.9


@pytest.mark.parametrize("few", [0, 1 << 20])
def test_frozen_statistics(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relation_head, "_FEW", few)
    head, features = head_of(), features_of(4, 6)
    head.norm.eval()
    before = head.norm.running_mean.clone()  # type: ignore[union-attr]  # it tracks them
    rows, target = double_loop(list(features), "cat")
    first, second = rows.chunk(2, dim=1)
    torch.testing.assert_close(head.loss(features)[0], published_focal(head(first, second), target, 2.0))
    assert torch.equal(head.norm.running_mean, before)  # type: ignore[arg-type]  # it tracks them


@pytest.mark.parametrize(("momentum", "counted"), [(0.1, True), (None, True), (0.0, False)])
def test_running_statistics_follow_every_setting(momentum: float | None, counted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relation_head, "_FEW", 0)
    head = head_of()
    head.norm.momentum = momentum
    if not counted:  # as where a batch is seen twice, and is not to count twice
        head.norm.num_batches_tracked = None
    twin = copy.deepcopy(head)
    for seed in (2, 3, 4):
        features = features_of(seed, 6)
        head.loss(features)
        rows, _ = double_loop(list(features), "cat")
        twin(*rows.chunk(2, dim=1))
    for one, other in zip(head.norm.buffers(), twin.norm.buffers(), strict=True):
        torch.testing.assert_close(one, other)


def test_settings_of_the_head() -> None:
    with pytest.raises(ValueError, match="aggregation must be one of cat, sum, mean, max; got 'min'"):
        RelationHead(4, aggregation="min")  # type: ignore[arg-type]  # the mistake
    with pytest.raises(ValueError, match="hidden_dim must be at least 1"):
        RelationHead(4, 0)


def test_equal_features_have_the_loss_of_a_coin() -> None:
    """BatchNorm has nothing to divide by; the gradient is finite."""
    features = torch.ones(9, 40, 5, requires_grad=True)
    head = head_of(dtype=torch.float32)
    nn.init.zeros_(head.last.weight)
    nn.init.zeros_(head.last.bias)
    loss, _, _ = head.loss(features)
    assert float(loss.detach()) == pytest.approx(math.log(2) / 8)
    loss.backward()
    assert features.grad is not None
    assert bool(features.grad.isfinite().all())


def test_a_batch_that_diverged_says_so() -> None:
    features: Any = features_of(9, 40).detach()
    features[2, 3, 1] = math.nan
    assert bool(head_of().loss(features)[0].isnan())
