"""Losses against the memory bank: against the formulas written out in float64, and fast paths against plain ones."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from litzoo.zoo.functional import instance_discrimination as losses
from litzoo.zoo.functional.instance_discrimination import bank_similarities, instance_softmax_loss, log_partition_of, nce_loss, without_own


def problem(batch: int = 6, rows: int = 40, dim: int = 5, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(batch * rows)
    features = F.normalize(torch.randn(batch, dim, generator=generator, dtype=torch.float64)).to(dtype)
    bank = F.normalize(torch.randn(rows, dim, generator=generator, dtype=torch.float64)).to(dtype)
    return features.requires_grad_(), bank, torch.randint(rows, (batch,), generator=generator)


def naive_softmax(features: Tensor, bank: Tensor, index: Tensor, temperature: float) -> Tensor:
    out = []
    for feature, own in zip(features, index.tolist(), strict=True):
        exponentials = [math.e ** (row @ feature / temperature) for row in bank]
        out.append(-torch.log(exponentials[own] / sum(exponentials)))
    return torch.stack(out)


@pytest.mark.parametrize("block", [1, 6, 7 * 6, 1 << 17])
@pytest.mark.parametrize("temperature", [1.0, 0.07])
def test_softmax_against_the_formula(block: int, temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "_CACHED", block)
    features, bank, index = problem()
    weights = torch.linspace(0.5, 2.0, 6, dtype=torch.float64)
    found, expected = (function(features, bank, index, temperature) for function in (instance_softmax_loss, naive_softmax))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    mine, theirs = (torch.autograd.grad((loss * weights).sum(), features)[0] for loss in (found, expected))
    torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-12)


def test_gradients_against_finite_differences() -> None:
    features, bank, index = problem()
    rows = torch.randint(40, (6, 9))
    assert torch.autograd.gradcheck(lambda f: instance_softmax_loss(f, bank, index, 0.3), features)
    assert torch.autograd.gradcheck(lambda f: bank_similarities(f, bank, rows), features)
    assert torch.autograd.gradcheck(lambda f: nce_loss((f * bank[index]).sum(1), bank_similarities(f, bank, rows), 0.3, 0.7), features)


def test_softmax_at_random_features_has_its_closed_form() -> None:
    """log N + 1 / (2 D t^2), and for NCE Z / N = exp(1 / (2 D t^2))."""
    generator = torch.Generator().manual_seed(0)
    dim, rows, temperature = 128, 20_000, 0.1
    features, bank = (F.normalize(torch.randn(number, dim, generator=generator)) for number in (256, rows))
    index = torch.randint(rows, (256,), generator=generator)
    loss = instance_softmax_loss(features, bank, index, temperature).mean()
    assert float(loss) == pytest.approx(math.log(rows) + 1 / (2 * dim * temperature**2), abs=0.15)
    partition = log_partition_of(features @ bank[:4096].T, temperature)
    assert float(partition) == pytest.approx(1 / (2 * dim * temperature**2), abs=0.01)


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_extreme_logits_stay_finite(scale: float) -> None:
    features = (F.normalize(torch.randn(3, 4)) * scale).requires_grad_()
    bank = F.normalize(torch.randn(30, 4)) * scale
    index = torch.tensor([0, 1, 2])
    loss = instance_softmax_loss(features, bank, index, 0.07)
    expected = F.cross_entropy(features.double() @ bank.double().T / 0.07, index, reduction="none")
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-4)
    assert torch.autograd.grad(loss.sum(), features)[0].isfinite().all()


def test_half_precision_and_autocast_compute_in_float32() -> None:
    features, bank, index = problem(dtype=torch.float32)
    rows = torch.randint(40, (6, 9))

    def everything() -> list[Tensor]:
        return [
            instance_softmax_loss(features, bank, index, 0.1),
            bank_similarities(features, bank, rows),
            bank_similarities(features, bank, rows[0]),
        ]

    plain = everything()
    with torch.autocast("cpu", torch.bfloat16):
        cast = everything()
    for mine, theirs in zip(cast, plain, strict=True):
        assert torch.equal(mine, theirs)
        assert torch.equal(*(torch.autograd.grad(values.sum(), features)[0] for values in (mine, theirs)))
    half = features.detach().bfloat16().requires_grad_()
    loss = instance_softmax_loss(half, bank, index, 0.1)
    assert loss.dtype == torch.float32
    assert torch.autograd.grad(loss.sum(), half)[0].dtype == torch.bfloat16


def test_bf16_scores_are_close() -> None:
    features, bank, index = problem(64, 500, 32, torch.float32)
    exact, fast = (instance_softmax_loss(features, bank, index, 0.1, scores) for scores in ("fp32", "bf16"))  # type: ignore[arg-type]
    assert float((exact - fast).detach().abs().max()) < 10 / 256  # logits up to 10
    mine, theirs = (torch.autograd.grad(loss.mean(), features)[0] for loss in (exact, fast))
    assert float((mine - theirs).norm() / mine.norm()) < 0.01
    rows = torch.randint(500, (64, 20))
    exact, fast = (bank_similarities(features, bank, rows, scores) for scores in ("fp32", "bf16"))  # type: ignore[arg-type]
    assert float((exact - fast).detach().abs().max()) < 2 / 256
    mine, theirs = (torch.autograd.grad(chosen.square().sum(), features)[0] for chosen in (exact, fast))
    assert float((mine - theirs).norm() / mine.norm()) < 0.02


@pytest.mark.parametrize("ratio", [0, 10**9])
@pytest.mark.parametrize("block", [1, 1 << 23])
def test_chosen_similarities_against_a_gather(ratio: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By products and by gathering, whole and in blocks; a row that is drawn twice counts twice."""
    monkeypatch.setattr(losses, "_ROWS_PER_CHOICE", ratio)
    monkeypatch.setattr(losses, "_PRODUCTS", block)
    monkeypatch.setattr(losses, "_GATHERED", block)
    features, bank, _ = problem()
    rows = torch.randint(40, (6, 9))
    rows[:, 1] = rows[:, 0]
    found = bank_similarities(features, bank, rows)
    expected = torch.einsum("bd,bkd->bk", features, bank[rows])
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-14)
    weights = torch.randn(6, 9, dtype=torch.float64)
    mine, theirs = (torch.autograd.grad((chosen * weights).sum(), features)[0] for chosen in (found, expected))
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-13)


def test_shared_rows_are_those_rows_for_every_sample() -> None:
    features, bank, _ = problem()
    shared = torch.randint(40, (9,))
    torch.testing.assert_close(bank_similarities(features, bank, shared), bank_similarities(features, bank, shared.expand(6, 9)))


def nce_by_the_paper(positive: Tensor, negative: Tensor, temperature: float, partition: float, rows: int) -> Tensor:
    """Equations 4 to 7 as they stand: P = exp(s / t) / Z, h = P / (P + m / N)."""
    noise = negative.shape[1] / rows

    def h(similarity: Tensor) -> Tensor:
        probability = (similarity / temperature).exp() / partition
        return probability / (probability + noise)

    return -h(positive).log() - (1 - h(negative)).log().sum(dim=1)


@pytest.mark.parametrize("temperature", [1.0, 0.07])
def test_nce_against_the_paper_and_as_a_cross_entropy(temperature: float) -> None:
    features, bank, index = problem()
    positive, negative = (features * bank[index]).sum(1), bank_similarities(features, bank, torch.randint(40, (6, 9)))
    log_partition = 0.79
    found = nce_loss(positive, negative, temperature, log_partition)
    expected = nce_by_the_paper(positive, negative, temperature, 40 * math.exp(log_partition), rows=40)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    logits = torch.cat([positive[:, None], negative], dim=1) / temperature - math.log(9) - log_partition
    target = torch.zeros_like(logits)
    target[:, 0] = 1
    torch.testing.assert_close(found, F.binary_cross_entropy_with_logits(logits, target, reduction="none").sum(1), rtol=1e-12, atol=1e-12)
    mine, theirs = (torch.autograd.grad(loss.sum(), features, retain_graph=True)[0] for loss in (found, expected))
    torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sum_of_softplus_against_torch(dtype: torch.dtype) -> None:
    """From where e^x vanishes beside one to where the result is x."""
    x = torch.cat([torch.linspace(-110, 110, 4001), torch.tensor([-math.inf, 0.0, -1e-8, 1e-8])]).to(dtype)[:, None].requires_grad_()
    found: Any = losses._SoftplusSum.apply(x, 1.0, 0.0)
    torch.testing.assert_close(found, F.softplus(x.double(), threshold=1e9).sum(1).to(dtype), rtol=3 * torch.finfo(dtype).eps, atol=0)
    torch.testing.assert_close(torch.autograd.grad(found.sum(), x)[0], x.detach().sigmoid())


def test_noise_that_is_left_out_counts_nothing() -> None:
    negative = torch.tensor([[0.2, -math.inf, 0.1]], dtype=torch.float64)
    assert float(log_partition_of(negative, 0.1)) == pytest.approx(math.log((math.exp(2) + math.exp(1)) / 2))
    loss = nce_loss(torch.tensor([0.5], dtype=torch.float64), negative, 0.1, 1.0)
    bias = math.log(3) + 1.0
    assert float(loss) == pytest.approx(sum(math.log1p(math.exp(value)) for value in (bias - 5, 2 - bias, 1 - bias)))


def test_own_rows_are_left_out_of_shared_noise() -> None:
    negative = torch.randn(4, 6, requires_grad=True)
    noise, row = torch.tensor([5, 9, 5, 2, 7, 0]), torch.tensor([5, 3, 0, 5])
    found = without_own(negative, noise, row)
    own = noise == row[:, None]
    assert torch.equal(found, negative.masked_fill(own, -math.inf))
    assert torch.equal(torch.autograd.grad(found[~own].sum(), negative)[0], (~own).float())
    assert torch.equal(without_own(negative, noise, row + 20), negative)


def test_shared_noise_has_the_same_expected_loss() -> None:
    """Over all choices of one row: the mean over shared draws equals the mean over draws of each sample."""
    features, bank, index = problem()
    positive = (features * bank[index]).sum(1)
    shared = torch.stack([nce_loss(positive, bank_similarities(features, bank, torch.tensor([row])), 0.2, 0.5) for row in range(40)])
    every = torch.arange(40).expand(6, 40)
    apart = torch.stack([nce_loss(positive, bank_similarities(features, bank, every[:, [row]]), 0.2, 0.5) for row in range(40)])
    torch.testing.assert_close(shared.mean(), apart.mean())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: instance_softmax_loss(torch.ones(2, 3), torch.ones(4, 5), torch.arange(2)), "must have the same dimensions"),
        (lambda: instance_softmax_loss(torch.ones(2, 3), torch.ones(4, 3), torch.arange(3)), "one row for each of the 2 samples"),
        (lambda: instance_softmax_loss(torch.ones(2, 3), torch.ones(4, 3), torch.arange(2), 0.0), "temperature must be positive"),
        (lambda: bank_similarities(torch.ones(2, 3), torch.ones(4, 3), torch.zeros(3, 2, dtype=torch.int64)), "rows must have shape"),
    ],
)
def test_wrong_shapes_are_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
