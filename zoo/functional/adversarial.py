"""Losses of generative adversarial networks."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from .random import fold_in, uniform

# Numbers that keep the draws of one key apart.
_REAL, _FAKE, _FLIP = 1, 2, 3


def critic_loss(real: Tensor, fake: Tensor) -> Tensor:
    """What a Wasserstein critic minimises, mean f(fake) - mean f(real): minus its estimate of the distance of both distributions.

    The estimate is meaningful only if f is kept Lipschitz, as by `gradient_penalty`. Computed in float32 or above.

    Args:
        real: scores f(x) of real samples, of any shape, float.
        fake: scores of generated samples, of any shape.

    Returns:
        The loss, a scalar.

    Example:
        >>> critic_loss(torch.tensor([3.0, 1.0]), torch.tensor([0.5, 0.5]))
        tensor(-1.5000)

    Source:
        Arjovsky, Chintala & Bottou, "Wasserstein Generative Adversarial Networks", ICML 2017, equation 2.
    """
    return _mean(fake) - _mean(real)


def generator_loss(fake: Tensor) -> Tensor:
    """What the generator against a Wasserstein critic minimises, -mean f(fake). Computed in float32 or above.

    Args:
        fake: scores of generated samples, of any shape, float.

    Returns:
        The loss, a scalar.

    Example:
        >>> generator_loss(torch.tensor([3.0, 1.0]))
        tensor(-2.)

    Source:
        Arjovsky, Chintala & Bottou, "Wasserstein Generative Adversarial Networks", ICML 2017, algorithm 1.
    """
    return -_mean(fake)


def interpolated_gradient_norms(critic: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor, key: Tensor | None = None) -> Tensor:
    """Norms of the critic's gradient at a random point between each real sample and a generated one.

    ||grad f(x)||_2 at x = u real + (1 - u) fake, with u ~ U[0, 1) drawn per sample. They can be differentiated with respect to the
    critic's parameters, not to the samples. Under autocast they are computed without it, in float32 or above: rounding would end up in the
    norm.

    Args:
        critic: f, samples -> scores, one a sample. A score must depend on its own sample alone: no BatchNorm.
        real: `(B, ...)` float.
        fake: `(B, ...)` float, of the same shape.
        key: `(B,)` int64, from which u is drawn; None takes torch's generator.

    Returns:
        `(B,)` float.

    Raises:
        ValueError: if the shapes differ, or the critic does not give one score a sample.

    Example:
        >>> interpolated_gradient_norms(lambda x: 3 * x[:, 0], torch.rand(4, 2), torch.rand(4, 2))
        tensor([3., 3., 3., 3.], grad_fn=<LinalgVectorNormBackward0>)

    Source:
        Gulrajani et al., "Improved Training of Wasserstein GANs", NeurIPS 2017, section 4.
    """
    if real.shape != fake.shape:
        raise ValueError(f"every real sample is paired with a generated one of its shape, got {tuple(real.shape)} and {tuple(fake.shape)}")
    real, fake = real.detach(), fake.detach()
    if torch.is_autocast_enabled(real.device.type):  # else the critic's own weights may be in half precision
        real, fake = _full(real), _full(fake)
    share = torch.rand(len(real), device=real.device) if key is None else uniform(key)
    share = share.to(real.dtype).view(-1, *[1] * (real.dim() - 1))
    # In inference mode or under no_grad there would be no gradient to take the norm of.
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(real.device.type, enabled=False):
        points = (share * real + (1 - share) * fake).requires_grad_()
        scores = critic(points)
        if scores.numel() != len(points):
            raise ValueError(f"the critic must give one score a sample, got {tuple(scores.shape)} for {len(points)} samples")
        (gradient,) = torch.autograd.grad(scores.sum(), points, create_graph=True)
        return torch.linalg.vector_norm(_full(gradient).flatten(1), dim=1)


def gradient_penalty(
    critic: Callable[[Tensor], Tensor],
    real: Tensor,
    fake: Tensor,
    key: Tensor | None = None,
    target: float = 1.0,
    one_sided: bool = False,
) -> Tensor:
    """Penalty on gradients of the critic whose norm is not the target: mean (||grad f(x)||_2 - target)^2, at the points x of
    `interpolated_gradient_norms`.

    Args:
        critic: f, samples -> scores, one a sample; no BatchNorm.
        real: `(B, ...)` float.
        fake: `(B, ...)` float, of the same shape.
        key: `(B,)` int64, from which the points are drawn; None takes torch's generator.
        target: the norm that is not penalised.
        one_sided: penalise larger norms alone: mean max(0, ||grad f(x)||_2 - target)^2.

    Returns:
        The penalty, a scalar, float32 or float64, to be weighted: by 10 in the paper.

    Raises:
        ValueError: if the shapes differ, or the critic does not give one score a sample.

    Example:
        >>> gradient_penalty(lambda x: 3 * x[:, 0], torch.rand(4, 2), torch.rand(4, 2))  # (3 - 1)^2
        tensor(4., grad_fn=<MeanBackward0>)

    Source:
        Gulrajani et al., "Improved Training of Wasserstein GANs", NeurIPS 2017, equation 3; one-sided as in its section 4, "Two-sided
        penalty".
    """
    return norm_penalty(interpolated_gradient_norms(critic, real, fake, key), target, one_sided)


def norm_penalty(norms: Tensor, target: float = 1.0, one_sided: bool = False) -> Tensor:
    """`gradient_penalty` of known norms: the mean of (norm - target)^2, or of max(0, norm - target)^2 if it is one-sided.

    Args:
        norms: `(B,)` float.
        target: the norm that is not penalised.
        one_sided: penalise larger norms alone.

    Returns:
        The penalty, a scalar.

    Example:
        >>> norm_penalty(torch.tensor([0.0, 3.0]), one_sided=True)
        tensor(2.)
    """
    excess = norms - target
    return (excess.clamp_min(0) if one_sided else excess).square().mean()


def gan_labels(
    key: Tensor,
    real: bool,
    low: float = 0.9,
    high: float = 1.0,
    fake_high: float = 0.0,
    flip: float = 0.0,
) -> Tensor:
    """Targets of a discriminator's binary cross-entropy, smoothed: U[low, high] for real samples, U[0, fake_high] for generated ones.

    The defaults smooth one side alone. With fake_high > 0, the best discriminator has a mode wherever the generator has one, so the
    generator need not move. A target t above 1 is none: with the logit z, BCE is softplus(z) - t z, which falls without bound as z
    grows. What is drawn above 1 is therefore set to 1, with a warning. A Wasserstein critic has no labels.

    Args:
        key: `(B,)` int64, the samples' random keys.
        real: whether the samples are real.
        low: the least label of a real sample, in [0, high].
        high: the largest one.
        fake_high: the largest label of a generated sample, in [0, 1].
        flip: probability that a sample gets a label of the other kind.

    Returns:
        `(B,)` float32 in [0, 1].

    Raises:
        ValueError: if a setting is out of range.

    Example:
        >>> gan_labels(torch.arange(3), real=False)
        tensor([0., 0., 0.])

    Source:
        Salimans et al., "Improved Techniques for Training GANs", NeurIPS 2016, section 3.4.
    """
    if not 0 <= low <= high:
        raise ValueError(f"labels of real samples need 0 <= low <= high, got {low} and {high}")
    if not (0 <= fake_high <= 1 and 0 <= flip <= 1):
        raise ValueError(f"fake_high and flip must lie in [0, 1], got {fake_high} and {flip}")
    if high > 1:
        warnings.warn(f"labels above 1 leave the discriminator's loss without a lower bound: those up to {high} are set to 1", stacklevel=2)
    of_real = uniform(fold_in(key, _REAL), low=low, high=high).clamp_max(1.0)
    of_fake = uniform(fold_in(key, _FAKE), high=fake_high)
    flipped = uniform(fold_in(key, _FLIP)) < flip
    return torch.where(flipped, of_fake, of_real) if real else torch.where(flipped, of_real, of_fake)


def _full(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _mean(scores: Tensor) -> Tensor:
    return _full(scores).mean()
