"""Soft thresholds against loops, torch and finite differences."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litzoo.zoo.layers.soft_threshold import SoftThreshold, soft_threshold


def naive(x: Tensor, threshold: Tensor) -> Tensor:
    out = torch.empty_like(x)
    for place, (value, tau) in enumerate(zip(x.flatten().tolist(), threshold.expand_as(x).flatten().tolist(), strict=True)):
        out.view(-1)[place] = math.copysign(1, value) * max(abs(value) - tau, 0)
    return out


def test_against_loops_and_softshrink() -> None:
    x, threshold = torch.randn(3, 4, 5, dtype=torch.float64), torch.rand(3, 4, 1, dtype=torch.float64)
    torch.testing.assert_close(soft_threshold(x, threshold), naive(x, threshold))
    torch.testing.assert_close(soft_threshold(x, torch.tensor(0.3)), nn.Softshrink(0.3)(x))
    assert torch.equal(soft_threshold(x, torch.tensor(0.0)), x)
    assert bool(soft_threshold(torch.tensor(math.nan), torch.tensor(1.0)).isnan())


def test_gradient() -> None:
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    threshold = (torch.rand(2, 3, 1, dtype=torch.float64) + 0.1).requires_grad_()
    assert torch.autograd.gradcheck(soft_threshold, (x, threshold))
    # That of Softshrink: 1 outside of the thresholds, 0 inside; of the threshold: minus the sign, outside.
    found = torch.autograd.grad(soft_threshold(x, threshold).sum(), (x, threshold))
    outside = x.abs() > threshold
    assert torch.equal(found[0], outside.double())
    torch.testing.assert_close(found[1], -(x.sign() * outside).sum(dim=2, keepdim=True))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("shape", [(4, 3, 7), (4, 3, 5, 2), (2, 3, 2, 2, 2)])
def test_module_against_loops(shared: bool, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    module = SoftThreshold(3, shared).double().eval()
    first, norm, _, last, _ = module.net
    assert isinstance(first, nn.Linear)
    assert isinstance(norm, nn.BatchNorm1d)
    assert isinstance(last, nn.Linear)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    nn.init.normal_(norm.running_mean)
    x = torch.randn(shape, dtype=torch.float64)
    expected = torch.empty_like(x)
    for sample in range(len(x)):
        average = torch.stack([channel.abs().mean() for channel in x[sample]])
        hidden = F.relu((first.weight @ average - norm.running_mean) / (norm.running_var + norm.eps).sqrt())
        alpha = 1 / (1 + torch.exp(-(last.weight @ hidden + last.bias)))
        tau = (alpha * average.mean()).expand(3) if shared else alpha * average
        for channel in range(3):
            expected[sample, channel] = naive(x[sample, channel], tau[channel])
    torch.testing.assert_close(module(x), expected)
    assert last.out_features == (1 if shared else 3)
    assert torch.autograd.gradcheck(module, x[:2].clone().requires_grad_())


def test_half_precision_and_refusal() -> None:
    module, x = SoftThreshold(4), torch.randn(8, 4, 6)
    with torch.autocast("cpu", torch.bfloat16):
        low = module(x.bfloat16())
    assert low.dtype == torch.bfloat16
    assert torch.isfinite(low).all()
    assert not SoftThreshold(4)(torch.zeros(2, 4, 3)).any()
    with pytest.raises(ValueError, match=r"must be \(batch, channels, positions ...\), got \(2, 4\)"):
        module(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="at least two samples, got one: set drop_last"):
        module(x[:1])
    assert module.eval()(x[:1]).shape == (1, 4, 6)
