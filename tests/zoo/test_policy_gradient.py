"""Both gradients of an expectation: unbiased, and with the variance of the closed form."""

import math

import pytest
import torch
from torch.distributions import Categorical, Normal

from litzoo.zoo.functional.policy_gradient import pathwise_normal, reinforce_loss
from litzoo.zoo.functional.random import fold_in

MEAN, STD, SAMPLES = 1.5, 0.8, 400_000


def single_gradients(baseline: float | None) -> torch.Tensor:
    """The estimate of d/dmu E[x^2] by each sample alone, by the score function."""
    mean = torch.full((SAMPLES,), MEAN, dtype=torch.float64, requires_grad=True)
    policy = Normal(mean, STD)
    x = policy.sample()
    loss = reinforce_loss(policy.log_prob(x), x.square(), baseline)
    (gradient,) = torch.autograd.grad(loss, mean)
    return -gradient * SAMPLES


def test_both_are_unbiased_with_the_known_variances() -> None:
    """E[x^2] under N(mu, s^2) has the gradient 2 mu; the variances of the estimates are polynomials in mu and s."""
    torch.manual_seed(0)
    mu, var = MEAN, STD**2
    # With a = mu^2 - b the score's estimate (x^2 - b) (x - mu) / s^2 has the variance a^2 / s^2 + 6 a + 8 mu^2 + 15 s^2.
    expected = {b: (mu**2 - b) ** 2 / var + 6 * (mu**2 - b) + 8 * mu**2 + 15 * var for b in (0.0, mu**2 + var, mu**2 + 3 * var)}
    found = []
    for baseline, variance in expected.items():
        estimates = single_gradients(baseline or None)
        assert float(estimates.mean()) == pytest.approx(2 * mu, abs=5 * math.sqrt(variance / SAMPLES))
        assert float(estimates.var()) == pytest.approx(variance, rel=0.05)
        found.append(float(estimates.var()))

    mean = torch.full((SAMPLES,), mu, dtype=torch.float64, requires_grad=True)
    x = pathwise_normal(mean, STD, fold_in(0, torch.arange(SAMPLES)))
    (pathwise,) = torch.autograd.grad(x.square().sum(), mean)
    assert float(pathwise.mean()) == pytest.approx(2 * mu, abs=5 * math.sqrt(4 * var / SAMPLES))
    assert float(pathwise.var()) == pytest.approx(4 * var, rel=0.02)
    assert found[0] > found[1] > found[2] > float(pathwise.var()), "none, the mean reward, the best baseline, pathwise"
    assert expected[mu**2 + 3 * var] == pytest.approx(8 * mu**2 + 6 * var)


def test_reinforce_against_the_exact_gradient_of_a_policy() -> None:
    """Of all actions, each weighed by its probability, the gradient is that of the expected reward itself."""
    logits = torch.randn(5, dtype=torch.float64, requires_grad=True)
    reward = torch.randn(5, dtype=torch.float64)
    (exact,) = torch.autograd.grad((logits.softmax(0) * reward).sum(), logits)
    p = logits.softmax(0).detach()
    log_prob = Categorical(logits=logits).log_prob(torch.arange(5))
    for baseline in (None, 3.0, torch.tensor(-1.0), torch.full((5,), 2.0)):
        losses = [p[action] * reinforce_loss(log_prob[[action]], reward[[action]], _row(baseline, action)) for action in range(5)]
        (found,) = torch.autograd.grad(torch.stack(losses).sum(), logits, retain_graph=True)
        torch.testing.assert_close(-found, exact)


def _row(baseline: torch.Tensor | float | None, action: int) -> torch.Tensor | float | None:
    return baseline[[action]] if isinstance(baseline, torch.Tensor) and baseline.dim() else baseline


def test_reward_and_baseline_are_constants() -> None:
    log_prob, reward, baseline = (torch.randn(4, requires_grad=True) for _ in range(3))
    loss = reinforce_loss(log_prob, reward, baseline)
    loss.backward()
    assert reward.grad is None
    assert baseline.grad is None
    torch.testing.assert_close(log_prob.grad, -(reward - baseline).detach() / 4)
    assert reinforce_loss(log_prob.bfloat16(), reward.bfloat16()).dtype == torch.float32


def test_shapes_that_would_broadcast_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got shapes \(4,\), \(4, 1\)"):
        reinforce_loss(torch.zeros(4), torch.zeros(4, 1))
    with pytest.raises(ValueError, match="one baseline"):
        reinforce_loss(torch.zeros(4), torch.zeros(4), torch.zeros(4, 1))


def test_pathwise_samples_are_normal_and_differentiable_in_both_parameters() -> None:
    mean = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    std = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64, requires_grad=True)
    key = torch.tensor([4, 9])
    assert torch.autograd.gradcheck(lambda m, s: pathwise_normal(m, s, key), (mean, std))
    assert torch.equal(pathwise_normal(mean, std, key)[1:], pathwise_normal(mean[1:], std, key[1:]))
    x = pathwise_normal(torch.full((200_000,), 2.0), 0.5)
    assert float(x.mean()) == pytest.approx(2, abs=0.01)
    assert float(x.std()) == pytest.approx(0.5, abs=0.01)
