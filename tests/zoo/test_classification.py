"""Classification losses: against loops in float64, scikit-learn and torch."""

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.utils.class_weight import compute_class_weight
from torch import Tensor

from litzoo.zoo.functional.classification import (
    class_balanced_weights,
    effective_number_weights,
    focal_cross_entropy,
    make_class_weights,
    orthogonality_penalty,
)

LOGITS = torch.randn(13, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2
LABEL = torch.arange(13) % 5
WEIGHT = torch.tensor([0.5, 1.0, 2.0, 0.25, 3.0], dtype=torch.float64)


def naive_focal(logits: Tensor, label: Tensor, gamma: float, weight: Tensor | None, smoothing: float) -> float:
    """Loops over samples and classes; torch's definition of smoothing with weights."""
    total = normaliser = 0.0
    classes = logits.shape[1]
    weights = [1.0] * classes if weight is None else weight.tolist()
    for row, target in zip(logits.tolist(), label.tolist(), strict=True):
        log_sum = max(row) + math.log(sum(math.exp(x - max(row)) for x in row))
        log_p = [x - log_sum for x in row]
        loss = -(1 - smoothing) * weights[target] * log_p[target]
        loss -= smoothing / classes * sum(w * lp for w, lp in zip(weights, log_p, strict=True))
        total += (1 - math.exp(log_p[target])) ** gamma * loss
        normaliser += weights[target]
    return total / normaliser


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("weight", [None, WEIGHT])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_focal_against_loops(gamma: float, weight: Tensor | None, smoothing: float) -> None:
    expected = naive_focal(LOGITS, LABEL, gamma, weight, smoothing)
    assert float(focal_cross_entropy(LOGITS, LABEL, gamma, weight, smoothing)) == pytest.approx(expected, rel=1e-12)
    single = focal_cross_entropy(LOGITS.float(), LABEL, gamma, weight, smoothing)
    assert single.dtype == torch.float32
    assert float(single) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("weight", [None, WEIGHT])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_gamma_zero_is_torch(weight: Tensor | None, smoothing: float) -> None:
    expected = F.cross_entropy(LOGITS, LABEL, weight=weight, label_smoothing=smoothing)
    assert torch.equal(focal_cross_entropy(LOGITS, LABEL, 0.0, weight, smoothing), expected)
    # and the general formula tends to it
    torch.testing.assert_close(focal_cross_entropy(LOGITS, LABEL, 1e-9, weight, smoothing), expected)


def test_focusing_a_weighted_mean_is_something_else() -> None:
    """Some codes focus the mean: (1 - exp(-CE))^gamma CE of the batch. An easy and a hard sample tell them apart."""
    logits = torch.tensor([[4.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    label = torch.tensor([0, 1])
    mean = F.cross_entropy(logits, label)
    wrong = (1 - torch.exp(-mean)) ** 2 * mean
    right = focal_cross_entropy(logits, label, gamma=2.0)
    p = logits.softmax(1)[[0, 1], label]
    assert float(right) == pytest.approx(float(((1 - p) ** 2 * -p.log()).mean()))
    assert abs(float(right) - float(wrong)) > 0.1


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 3.5])
@pytest.mark.parametrize("weight", [None, WEIGHT])
def test_focal_gradient(gamma: float, weight: Tensor | None) -> None:
    logits = LOGITS.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: focal_cross_entropy(x, LABEL, gamma, weight, 0.1), logits)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_extreme_logits(gamma: float, smoothing: float, dtype: torch.dtype) -> None:
    big = 6e4 if dtype is torch.float16 else 1e30
    logits = torch.tensor([[big, 0, -big], [-big, big, 0], [0, 0, 0], [80, -80, 0]], dtype=dtype, requires_grad=True)
    if dtype is not torch.float16 and smoothing:
        logits = (logits.detach() / 1e24).requires_grad_()
    for label in ([0, 1, 2, 0], [2, 0, 1, 1]):
        loss = focal_cross_entropy(logits, torch.tensor(label), gamma, None, smoothing)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert loss.isfinite()
        assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    low = LOGITS.to(dtype)
    loss = focal_cross_entropy(low, LABEL, 2.0, WEIGHT, 0.1)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, focal_cross_entropy(low.float(), LABEL, 2.0, WEIGHT, 0.1), rtol=1e-6, atol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(focal_cross_entropy(low, LABEL, 2.0, WEIGHT, 0.1), loss)
        matrices = torch.randn(3, 8, 8)
        penalty = orthogonality_penalty(matrices)
    assert penalty.dtype == torch.float32
    assert torch.equal(penalty, orthogonality_penalty(matrices))
    assert orthogonality_penalty(matrices.to(dtype)).dtype == torch.float32


def test_negative_gamma_is_refused() -> None:
    with pytest.raises(ValueError, match="gamma must be at least 0, got -1"):
        focal_cross_entropy(LOGITS, LABEL, gamma=-1)


def test_balanced_weights_are_those_of_scikit_learn() -> None:
    labels = np.repeat([0, 1, 2, 3], [3, 50, 11, 7])
    expected = compute_class_weight("balanced", classes=np.arange(4), y=labels)
    weights = class_balanced_weights([3, 50, 11, 7])
    np.testing.assert_allclose(weights, expected, rtol=1e-6)
    assert float((weights * torch.tensor([3, 50, 11, 7])).sum()) == pytest.approx(71)
    assert torch.equal(weights, class_balanced_weights(torch.tensor([3, 50, 11, 7])))
    assert weights.dtype == torch.float32
    assert class_balanced_weights([4, 0, 4])[1] == 0


@pytest.mark.parametrize("counts", [[], [0, 0], [3, -1], [3, math.nan], [[3, 1], [1, 1]]])
def test_impossible_counts_are_refused(counts: Any) -> None:
    for weigh in (class_balanced_weights, effective_number_weights):
        with pytest.raises(ValueError, match="class_counts"):
            weigh(counts)


def naive_effective(counts: list[int], beta: float) -> list[float]:
    """In exact fractions, by the sum of the series: E_n = 1 + beta + ... + beta^(n - 1)."""
    exact = Fraction(beta)
    effective = [sum((exact**power for power in range(count)), Fraction(0)) for count in counts]
    inverse = [1 / number if number else Fraction(0) for number in effective]
    present = sum(number > 0 for number in effective)
    return [float(present * value / sum(inverse)) for value in inverse]


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.999, 1 - 1e-9, 1 - 2**-53, 1.0])
@pytest.mark.parametrize("counts", [[1, 2], [3, 50, 11, 7], [4, 0, 4], [1, 200, 0]])
def test_effective_number_in_exact_fractions(beta: float, counts: list[int]) -> None:
    weights = effective_number_weights(counts, beta)
    np.testing.assert_allclose(weights, naive_effective(counts, beta), rtol=2e-7)
    assert weights.dtype == torch.float32
    assert float(weights.sum()) == pytest.approx(sum(count > 0 for count in counts))
    assert torch.equal(weights, effective_number_weights(torch.tensor(counts), beta))


def test_effective_number_lies_between_no_weights_and_the_inverse_frequency() -> None:
    counts = [10, 300, 9000]
    assert effective_number_weights(counts, 0.0).tolist() == [1, 1, 1]
    inverse = class_balanced_weights(counts)
    for beta in (1.0, 1 - 1e-12):
        torch.testing.assert_close(effective_number_weights(counts, beta), inverse * 3 / inverse.sum())
    ratios = [float(weights[0] / weights[2]) for weights in (effective_number_weights(counts, beta) for beta in (0.9, 0.99, 0.999, 0.9999))]
    assert ratios == sorted(ratios)
    # Counts for which beta^n is 0, and those of the largest data sets, whose difference 1 - beta^n would be rounded away.
    assert effective_number_weights([10**5, 10**15], 0.9).tolist() == [1, 1]
    huge = effective_number_weights([10**12, 3 * 10**12], 1 - 2**-53)
    torch.testing.assert_close(huge[0] / huge[1], torch.tensor(3.0), rtol=1e-3, atol=0)


def test_class_weights_by_name() -> None:
    assert make_class_weights("none", None) is None
    assert torch.equal(make_class_weights("balanced", [3, 1]), class_balanced_weights([3, 1]))  # type: ignore[arg-type]  # it is none for "none" alone
    assert torch.equal(make_class_weights("effective", [3, 1], 0.9), effective_number_weights([3, 1], 0.9))  # type: ignore[arg-type]  # likewise
    for kind, counts, beta, message in (
        ("even", [1], 0.9, "one of none, balanced, effective; got 'even'"),
        ("effective", None, 0.9, "class_weights='effective' needs class_counts"),
        ("none", None, 1.5, r"beta must lie in \[0, 1\], got 1.5"),
    ):
        with pytest.raises(ValueError, match=message):
            make_class_weights(kind, counts, beta)  # type: ignore[arg-type]  # on purpose
    with pytest.raises(ValueError, match="beta must lie in"):
        effective_number_weights([1, 2], -0.1)


def naive_orthogonality(matrices: Tensor) -> float:
    total = 0.0
    for a in matrices.tolist():
        k = len(a)
        total += sum(((i == j) - sum(a[i][m] * a[j][m] for m in range(k))) ** 2 for i in range(k) for j in range(k))
    return total / len(matrices)


def test_orthogonality_against_loops() -> None:
    matrices = torch.randn(4, 6, 6, dtype=torch.float64)
    assert float(orthogonality_penalty(matrices)) == pytest.approx(naive_orthogonality(matrices), rel=1e-12)
    assert torch.autograd.gradcheck(orthogonality_penalty, matrices[:2, :3, :3].clone().requires_grad_())
    rotation = torch.linalg.qr(matrices)[0]
    assert float(orthogonality_penalty(rotation)) == pytest.approx(0, abs=1e-20)


def test_docstring_numbers() -> None:
    check: Callable[..., object] = pytest.approx
    assert float(focal_cross_entropy(torch.zeros(2, 4), torch.tensor([0, 1]), gamma=2.0)) == check(0.7798, abs=1e-4)
    assert float(orthogonality_penalty(2 * torch.eye(3).expand(4, 3, 3))) == 27
