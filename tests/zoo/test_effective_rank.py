"""The effective rank against numpy's singular values and matrices whose rank is known."""

import numpy as np
import pytest
import torch
from torch import Tensor

from litzoo.zoo.functional.feature_rank import effective_rank, effective_rank_of_gram, gram


def by_svd(features: Tensor) -> float:
    """The formula, from numpy's singular values."""
    values = np.linalg.svd(features.double().numpy(), compute_uv=False)
    share = values / values.sum()
    share = share[share > 1e-12]
    return float(np.exp(-(share * np.log(share)).sum()))


@pytest.mark.parametrize("shape", [(50, 8), (8, 50), (30, 30), (1, 5), (5, 1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equals_the_singular_values(shape: tuple[int, int], dtype: torch.dtype) -> None:
    features = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -3, shape[1])).to(dtype)
    rank = effective_rank(features)
    assert rank.dtype == torch.float64
    assert rank.shape == ()
    assert float(rank) == pytest.approx(by_svd(features), rel=1e-9)


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_equal_singular_values_count(rank: int) -> None:
    basis = torch.linalg.qr(torch.randn(20, rank, dtype=torch.float64))[0]
    samples = torch.linalg.qr(torch.randn(40, rank, dtype=torch.float64))[0]
    assert float(effective_rank(7.5 * samples @ basis.T)) == pytest.approx(rank, rel=1e-6)


def test_collapsed_features_have_rank_one() -> None:
    one = torch.randn(16)
    assert float(effective_rank(one.expand(100, 16))) == pytest.approx(1, abs=1e-6)
    assert float(effective_rank(torch.randn(100, 1) * one)) == pytest.approx(1, abs=1e-6)


def test_does_not_depend_on_the_scale() -> None:
    features = torch.randn(40, 6, dtype=torch.float64)
    for scale in (1e-9, 1e9):
        assert float(effective_rank(scale * features)) == pytest.approx(float(effective_rank(features)), rel=1e-9)


def test_batches_add_up() -> None:
    features = torch.randn(41, 6)
    total = sum((gram(part) for part in features.split(7)), torch.zeros(6, 6, dtype=torch.float64))
    assert float(effective_rank_of_gram(total)) == pytest.approx(float(effective_rank(features)), rel=1e-9)


def test_nothing_and_no_numbers() -> None:
    assert float(effective_rank(torch.zeros(5, 3))) == 0
    for value in (float("nan"), float("inf")):
        assert effective_rank(torch.tensor([[1.0, value], [0.0, 1.0]])).isnan()
    with pytest.raises(ValueError, match="samples, dimensions"):
        effective_rank(torch.zeros(5))
    with pytest.raises(ValueError, match=r"got \(0, 3\)"):
        effective_rank(torch.zeros(0, 3))
