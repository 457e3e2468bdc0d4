"""Losses of adversarial networks: against closed forms, finite differences and float64."""

import math
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litzoo.zoo.functional.adversarial import (
    critic_loss,
    gan_labels,
    generator_loss,
    gradient_penalty,
    interpolated_gradient_norms,
    norm_penalty,
)
from litzoo.zoo.functional.random import fold_in, uniform

KEY = fold_in(0, torch.arange(6))
REAL, FAKE = torch.randn(2, 6, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_losses_are_differences_of_means() -> None:
    real, fake = torch.tensor([3.0, 1.0, -2.0]), torch.tensor([[0.5], [4.0]])
    assert float(critic_loss(real, fake)) == pytest.approx(4.5 / 2 - 2 / 3)
    assert float(generator_loss(fake)) == pytest.approx(-4.5 / 2)
    many = torch.full((70_000,), 1.001, dtype=torch.float16)
    for loss in (generator_loss(many), critic_loss(many * 0, -many)):
        assert loss.dtype == torch.float32
        assert float(loss) == pytest.approx(-float(many[0]), rel=1e-6)


def test_norms_of_a_critic_with_a_known_gradient() -> None:
    """f(x) = |x|^2 / 2 + c x_1 has the gradient x + c e_1."""
    share = uniform(KEY).double()
    c = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    norms = interpolated_gradient_norms(lambda x: x.square().sum((1, 2)) / 2 + c * x[:, 0, 0], REAL, FAKE, KEY)
    rows = []
    for row in range(6):
        point = share[row] * REAL[row] + (1 - share[row]) * FAKE[row]
        gradient = point.clone()
        gradient[0, 0] += 0.7
        rows.append(gradient)
    expected = torch.tensor([math.sqrt(sum(value**2 for value in row.flatten().tolist())) for row in rows], dtype=torch.float64)
    torch.testing.assert_close(norms, expected)
    # d/dc mean (n - 1)^2 = mean 2 (n - 1) (x_1 + c) / n
    (slope,) = torch.autograd.grad(norm_penalty(norms), c)
    first = torch.stack([row[0, 0] for row in rows])
    torch.testing.assert_close(slope, (2 * (expected - 1) * first / expected).mean())


def test_penalty_of_a_network_against_finite_differences() -> None:
    torch.manual_seed(0)
    critic = nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.Softplus(), nn.Linear(5, 1)).double()
    share = uniform(KEY).double().view(-1, 1, 1)
    points = share * REAL + (1 - share) * FAKE

    def penalty_by_differences(one_sided: bool) -> float:
        total = 0.0
        for point in points:
            square = 0.0
            for place in range(6):
                step = torch.zeros(6, dtype=torch.float64)
                step[place] = 1e-5
                step = step.view(1, 3, 2)
                square += float((critic(point[None] + step) - critic(point[None] - step)) / 2e-5) ** 2
            excess = math.sqrt(square) - 0.2
            total += (max(0.0, excess) if one_sided else excess) ** 2
        return total / 6

    for one_sided in (False, True):
        penalty = gradient_penalty(critic, REAL, FAKE, KEY, target=0.2, one_sided=one_sided)
        with torch.no_grad():
            assert float(penalty) == pytest.approx(penalty_by_differences(one_sided), rel=1e-6)
        weight = critic[1].weight
        assert isinstance(weight, Tensor)
        (slope,) = torch.autograd.grad(penalty, weight)
        with torch.no_grad():
            weight[2, 3] += 1e-4
            after = penalty_by_differences(one_sided)
            weight[2, 3] -= 2e-4
            before = penalty_by_differences(one_sided)
            weight[2, 3] += 1e-4
        assert float(slope[2, 3]) == pytest.approx((after - before) / 2e-4, rel=1e-3)


def test_penalty_under_autocast_is_in_float32() -> None:
    torch.manual_seed(0)
    critic = nn.Sequential(nn.Conv2d(1, 4, 3), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(144, 1))
    real, fake = torch.randn(2, 6, 1, 8, 8)
    expected = gradient_penalty(critic, real, fake, KEY)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradient_penalty(critic, real, fake, KEY)
        assert torch.equal(found, expected)
        found = gradient_penalty(critic, real.bfloat16(), fake, KEY)
        assert found.dtype == torch.float32
    half = gradient_penalty(critic.bfloat16(), real.bfloat16(), fake.bfloat16(), KEY)
    assert half.dtype == torch.float32
    assert float(half.detach()) == pytest.approx(float(expected.detach()), rel=0.05)


def test_penalty_leaves_the_samples_alone_and_works_without_gradients() -> None:
    real, fake = REAL.clone().requires_grad_(), FAKE.clone().requires_grad_()
    weight = torch.ones(3, 2, dtype=torch.float64, requires_grad=True)

    def critic(x: Tensor) -> Tensor:
        return (weight * x).sum((1, 2), keepdim=True)

    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert float(gradient_penalty(critic, real + 0, fake + 0)) == pytest.approx((math.sqrt(6) - 1) ** 2)
    penalty = gradient_penalty(critic, real, fake)
    penalty.backward()
    assert real.grad is None
    assert fake.grad is None
    assert float(penalty.detach()) == pytest.approx((math.sqrt(6) - 1) ** 2)
    # d/dw (|w| - 1)^2 = 2 (|w| - 1) w / |w|
    torch.testing.assert_close(weight.grad, torch.full((3, 2), 2 * (1 - 1 / math.sqrt(6)), dtype=torch.float64))


def test_a_flat_critic_has_a_finite_penalty() -> None:
    """Where the gradient is zero, its norm has a kink."""
    weight = torch.zeros(3, 2, dtype=torch.float64, requires_grad=True)
    penalty = gradient_penalty(lambda x: (weight * x).sum((1, 2)), REAL, FAKE, KEY)
    assert float(penalty.detach()) == 1
    (slope,) = torch.autograd.grad(penalty, weight)
    assert slope.isfinite().all()


@pytest.mark.parametrize(
    ("critic", "fake", "message"),
    [
        (lambda x: x.sum((1, 2)), FAKE[:5], r"got \(6, 3, 2\) and \(5, 3, 2\)"),
        (lambda x: x.sum(2), FAKE, r"one score a sample, got \(6, 3\) for 6 samples"),
        (lambda x: x.sum(), FAKE, "one score a sample"),
    ],
)
def test_what_the_penalty_refuses(critic: Any, fake: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gradient_penalty(critic, REAL, fake, KEY)


# Labels


def test_labels_are_smooth_on_one_side() -> None:
    key = fold_in(0, torch.arange(4000))
    real, fake = gan_labels(key, real=True, low=0.7), gan_labels(key, real=False)
    assert float(real.min()) >= 0.7
    assert float(real.max()) <= 1
    assert float(real.mean()) == pytest.approx(0.85, abs=0.01)
    assert not fake.any()
    assert torch.equal(real[7:9], gan_labels(key[7:9], real=True, low=0.7)), "a function of the key"
    both = gan_labels(key, real=False, fake_high=0.3)
    assert float(both.max()) <= 0.3
    assert float(both.mean()) == pytest.approx(0.15, abs=0.01)


def test_flipped_labels_are_those_of_the_other_kind() -> None:
    key = fold_in(1, torch.arange(4000))
    for real in (True, False):
        label = gan_labels(key, real=real, low=0.8, flip=0.1)
        assert float(((label == 0) == real).float().mean()) == pytest.approx(0.1, abs=0.02)
        assert bool(((label == 0) | (label >= 0.8)).all())


def test_labels_above_one_are_cut_with_a_warning() -> None:
    key = fold_in(0, torch.arange(1000))
    with pytest.warns(UserWarning, match="without a lower bound: those up to 1.2 are set to 1"):
        label = gan_labels(key, real=True, low=0.7, high=1.2)
    assert float(label.max()) == 1
    assert float((label == 1).float().mean()) == pytest.approx(0.4, abs=0.05)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gan_labels(key, real=True)
    # Why: with t > 1 the loss falls without bound, with t <= 1 it does not.
    logit = torch.tensor([10.0, 1000.0])
    too_much = F.binary_cross_entropy_with_logits(logit, torch.full((2,), 1.2), reduction="none")
    assert too_much.tolist() == pytest.approx([-2.0, -200.0], abs=0.01)


@pytest.mark.parametrize("settings", [{"low": 0.9, "high": 0.8}, {"low": -0.1}, {"fake_high": 1.5}, {"flip": -0.1}])
def test_labels_refuse(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"low <= high|must lie in"):
        gan_labels(KEY, real=True, **settings)
