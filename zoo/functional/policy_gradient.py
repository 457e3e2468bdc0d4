"""Two unbiased gradients of an expectation E_{x ~ p}[f(x)] with respect to the parameters of p."""

import torch
from torch import Tensor

from .random import normal


def reinforce_loss(log_prob: Tensor, reward: Tensor, baseline: Tensor | float | None = None) -> Tensor:
    """A loss whose gradient is minus that of the expected reward, by the score function: -mean (r - b) log p(x).

    Reward and baseline count as constants. The gradient is unbiased for every b that does not depend on x; the nearer b is to the
    reward, the smaller the variance. The value of the loss means nothing. Computed in float32 or above.

    `torch.distributions` does the rest: `x = p.sample()` and `p.log_prob(x)`, summed over the dimensions of an action. Where f can be
    differentiated and p reparameterised, the pathwise gradient (`pathwise_normal`, `p.rsample()`) mostly has the smaller variance.

    Args:
        log_prob: `(B,)` float, log p(x) of the samples drawn, with its gradient.
        reward: `(B,)` float, their rewards f(x).
        baseline: b, `(B,)` or a number, such as a running mean of the rewards or a critic's value; None is 0.

    Returns:
        The loss, a scalar.

    Raises:
        ValueError: if the shapes differ, which would pair every sample with every reward.

    Example:
        >>> policy = torch.distributions.Categorical(logits=logits)
        >>> action = policy.sample()
        >>> loss = reinforce_loss(policy.log_prob(action), reward(action), baseline=0.5)

    Source:
        Williams, "Simple Statistical Gradient-Following Algorithms for Connectionist Reinforcement Learning", Machine Learning 8, 1992.
    """
    if log_prob.shape != reward.shape or (isinstance(baseline, Tensor) and baseline.dim() and baseline.shape != reward.shape):
        shapes = [tuple(value.shape) for value in (log_prob, reward, baseline) if isinstance(value, Tensor)]
        raise ValueError(f"every sample has one log-probability, one reward and one baseline, got shapes {', '.join(map(str, shapes))}")
    log_prob = log_prob.to(torch.promote_types(log_prob.dtype, torch.float32))
    advantage = reward.detach() if baseline is None else reward.detach() - (baseline.detach() if isinstance(baseline, Tensor) else baseline)
    return -(advantage.to(log_prob.dtype) * log_prob).mean()


def pathwise_normal(mean: Tensor, std: Tensor | float, key: Tensor | None = None) -> Tensor:
    """Draw x = mean + std * noise, noise ~ N(0, 1), through which f(x) has a gradient with respect to mean and std.

    The mean of f(x) is then an unbiased estimate of E[f(x)], and so is its gradient, which f must have. It is
    `torch.distributions.Normal(mean, std).rsample()`, with noise from the samples' keys where they are given.

    Args:
        mean: `(B, ...)` float.
        std: standard deviations, positive; anything that broadcasts with the mean.
        key: `(B,)` int64, from which the noise is drawn; None takes torch's generator.

    Returns:
        Samples of the shape of the mean.

    Example:
        >>> mean = torch.zeros(1000, requires_grad=True)
        >>> pathwise_normal(mean, 0.5).square().mean().backward()

    Source:
        Kingma & Welling, "Auto-Encoding Variational Bayes", ICLR 2014, section 2.4.
    """
    noise = torch.randn_like(mean) if key is None else normal(key, *mean.shape[1:]).to(mean.dtype)
    return mean + std * noise
