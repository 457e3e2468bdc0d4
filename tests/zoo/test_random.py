"""Counter-based random numbers: against plain Python integers, and as a statistician would look at them."""

import hashlib
import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats

from litzoo.zoo.functional import random as module
from litzoo.zoo.functional.random import fold_in, integers, normal, random_order, uniform

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
KEYS = [0, 1, 2, -1, 5, 2**63 - 1, -(2**63), 0x123456789ABCDEF]


def mix(x: int) -> int:
    """SplitMix64's output function on unsigned 64-bit integers."""
    x &= MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def draws(key: int, count: int) -> list[int]:
    """SplitMix64 seeded with `key`."""
    return [mix((key & MASK) + i * GOLDEN) for i in range(1, count + 1)]


def fold(key: int, number: int) -> int:
    return mix(mix((key & MASK) + GOLDEN) ^ (number & MASK))


def test_reference_is_splitmix64() -> None:
    # Published outputs of SplitMix64 (Vigna's splitmix64.c) with seed 1234567.
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert draws(1234567, 5) == expected


@pytest.mark.parametrize("key", KEYS)
def test_uniform_is_the_top_24_bits(key: int) -> None:
    expected = [(x >> 40) / 2**24 for x in draws(key, 12)]
    assert uniform(torch.tensor([key]), 3, 4).flatten().tolist() == expected


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("shape", [(), (1,), (50,), (7, 3)])
def test_normal_is_box_muller(key: int, shape: tuple[int, ...]) -> None:
    count = math.prod(shape)
    bits = draws(key, math.ceil(count / 2))
    radius = [math.sqrt(-2 * math.log(((x >> 40) + 0.5) / 2**24)) for x in bits]
    angle = [2 * math.pi * (x & 0xFFFFFF) / 2**24 for x in bits]
    # each draw gives two numbers: first all the cosines, then the sines
    expected = [r * turn(a) for turn in (math.cos, math.sin) for r, a in zip(radius, angle, strict=True)][:count]
    given = normal(torch.tensor([key]), *shape)
    assert given.shape == (1, *shape)
    np.testing.assert_allclose(given.flatten(), expected, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize(("key", "number"), list(itertools.product(KEYS, KEYS)))
def test_fold_in_against_plain_integers(key: int, number: int) -> None:
    assert int(fold_in(key, number)) & MASK == fold(key, number)
    assert int(fold_in(key, number, 7)) & MASK == fold(fold(key, number), 7)


@pytest.mark.parametrize("key", KEYS)
def test_random_order_sorts_the_signed_draws(key: int) -> None:
    signed = [x - (1 << 64) if x >> 63 else x for x in draws(key, 9)]
    assert random_order(torch.tensor(key), 9).tolist() == sorted(range(9), key=signed.__getitem__)


def fingerprint(numbers: torch.Tensor) -> str:
    return hashlib.sha256(numbers.contiguous().numpy().tobytes()).hexdigest()[:16]


def test_recorded_numbers() -> None:
    """Splits and orders of published results are made of them: they must never change."""
    key = fold_in(7, torch.arange(16))
    assert fingerprint(fold_in(key[:, None], 3, torch.arange(50))) == "bdfe49cb4bc87814"
    for length, recorded in (
        (1, "38723a2e5e8a17aa"),
        (2, "c2db1575da494160"),
        (10, "5c92d5f64618626a"),
        (1024, "ab519263e2397393"),
        (2048, "4d037411c5dfb3f8"),
        (5000, "c4e2035dbb976445"),
    ):
        assert fingerprint(random_order(key, length)) == recorded
    assert fingerprint(random_order(key[0], 70_000)) == "b523e05d7f9a818f"
    assert fingerprint(uniform(key)) == "7207cc7e2e42917d"
    assert fingerprint(uniform(key, 1000, 3)) == "789ebf4b795c1e3d"
    assert fingerprint(uniform(key, 1000, low=0.8, high=1.25)) == "c405dbb7dc1371c9"
    numbers = normal(key, 1001, 3)
    some = [[0.29666072, 0.67703635, -0.90317833], [0.84494436, 0.16572981, -2.14184117], [0.44745561, 0.27833351, -0.29148057]]
    np.testing.assert_allclose(numbers[5, [0, 1, 1000]], some, rtol=0, atol=1e-6)
    assert float(numbers.double().sum()) == pytest.approx(353.93401, abs=1e-2)
    assert float(numbers.double().abs().sum()) == pytest.approx(38160.34648, abs=1e-2)


def test_unsigned_integers_mix_like_signed_ones() -> None:
    for x in (torch.tensor(KEYS), torch.tensor(-1), fold_in(5, torch.arange(60)).view(3, 20).T, torch.empty(0, dtype=torch.int64)):
        for given in (module._mix(x.clone()), torch.compile(lambda x: module._mix(x.clone()), backend="eager", fullgraph=True)(x)):
            assert torch.equal(given, module._mix_signed(x.clone()))


@pytest.mark.parametrize("bits", [64, 50, 20, 3])
@pytest.mark.parametrize("shape", [(1,), (7, 2), (5, 300), (3, 5000), (0, 4)])
def test_sorted_like_a_plain_sort(bits: int, shape: tuple[int, ...]) -> None:
    numbers = fold_in(2, torch.arange(math.prod(shape))).view(shape) >> (64 - bits)  # of fewer bits, more share the upper ones
    assert torch.equal(module._sorted(numbers), numbers.sort(dim=-1).values)


def test_shapes_and_types() -> None:
    keys = fold_in(0, torch.arange(5))
    assert keys.dtype == torch.int64
    assert fold_in(3, 4).shape == ()
    assert fold_in(torch.arange(5)[:, None], torch.arange(7)).shape == (5, 7)
    assert fold_in(0, torch.arange(5)[:, None], 2, torch.arange(7)).shape == (5, 7)
    assert uniform(keys).shape == (5,)
    assert uniform(keys, 2, 3).shape == (5, 2, 3)
    assert uniform(keys, 2).dtype == normal(keys, 2).dtype == torch.float32
    assert random_order(keys, 6).shape == (5, 6)
    assert random_order(keys[0], 6).shape == (6,)


def test_fold_in_broadcasts_like_a_loop_and_order_matters() -> None:
    a, b = torch.arange(4), torch.arange(10, 13)
    table = fold_in(9, a[:, None], b)
    assert all(int(table[i, j]) == int(fold_in(fold_in(9, int(a[i])), int(b[j]))) for i in range(4) for j in range(3))
    assert int(fold_in(0, 1, 2)) != int(fold_in(0, 2, 1))
    assert int(fold_in(1, 2)) != int(fold_in(2, 1))
    everything = fold_in(0, torch.arange(100)[:, None], torch.arange(1000)).flatten()
    assert len(everything.unique()) == len(everything)


def test_a_number_depends_on_its_key_alone() -> None:
    keys = fold_in(1, torch.arange(6))
    assert torch.equal(uniform(keys, 8)[3], uniform(keys[3:4], 8)[0])
    assert torch.equal(normal(keys.flip(0), 8), normal(keys, 8).flip(0))
    assert torch.equal(random_order(keys, 8)[2], random_order(keys[2], 8))


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-2.0, 3.0), (0.8, 1.25)])
def test_uniform_is_uniform(low: float, high: float) -> None:
    along = uniform(torch.tensor([42]), 100_000, low=low, high=high)[0]
    across = uniform(fold_in(0, 5, torch.arange(100_000)), low=low, high=high)
    for x in (along, across):
        assert low <= x.min()
        assert x.max() < high or x.max() == pytest.approx(high)
        assert stats.kstest(x.double().numpy(), stats.uniform(low, high - low).cdf).pvalue > 1e-3


def test_normal_is_normal() -> None:
    for x in (normal(torch.tensor([42]), 100_000)[0], normal(fold_in(0, 5, torch.arange(100_000)))):
        assert stats.kstest(x.double().numpy(), "norm").pvalue > 1e-3
        assert x.abs().max() < 5.9
        # moments 1 to 4, each within 5 standard errors
        for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
            assert abs(float((x.double() ** power).mean()) - moment) < 5 * math.sqrt(variance / len(x))


@pytest.mark.parametrize("step", ["samples", "epochs", "seeds", "draws", "raw keys"])
def test_neighbouring_streams_are_independent(step: str) -> None:
    """Correlation of neighbours, and a chi-square test of pairs on a 16 x 16 grid."""
    n = 50_000
    i = torch.arange(n)
    x, y = {
        "samples": lambda: (uniform(fold_in(0, 2, 0, i)), uniform(fold_in(0, 2, 0, i + 1))),
        "epochs": lambda: (uniform(fold_in(0, 2, 0, i)), uniform(fold_in(0, 2, 1, i))),
        "seeds": lambda: (uniform(fold_in(0, 2, 0, i)), uniform(fold_in(1, 2, 0, i))),
        "draws": lambda: (uniform(fold_in(fold_in(0, i), 0)), uniform(fold_in(fold_in(0, i), 1))),
        "raw keys": lambda: (uniform(i), uniform(i + 1)),
    }[step]()
    assert abs(np.corrcoef(x, y)[0, 1]) < 4 / math.sqrt(n)
    counts = np.histogram2d(x.numpy(), y.numpy(), bins=16, range=[[0, 1], [0, 1]])[0]
    assert stats.chisquare(counts.ravel()).pvalue > 1e-4


def test_numbers_of_one_key_are_independent() -> None:
    for count in (2, 5, 6):
        x = normal(fold_in(3, torch.arange(20_000)), count).double().numpy()
        for y in (x, x**2, np.abs(x)):
            assert np.abs(np.corrcoef(y.T) - np.eye(count)).max() < 5 / math.sqrt(20_000)


@pytest.mark.parametrize("high", [1, 7, 1_281_167, 2**31])
def test_integers_are_the_high_bits_scaled(high: int) -> None:
    found = integers(torch.tensor(KEYS), 3, 4, high=high)
    expected = [[((bits >> 32) * high) >> 32 for bits in draws(key, 12)] for key in KEYS]
    assert found.view(len(KEYS), 12).tolist() == expected
    assert integers(torch.tensor(5), 4, high=high).shape == (4,)


def test_random_order_is_an_unbiased_permutation() -> None:
    orders = random_order(fold_in(0, torch.arange(24_000)), 4)
    assert torch.equal(orders.sort(1).values, torch.arange(4).expand(24_000, 4))
    code = (orders * torch.tensor([64, 16, 4, 1])).sum(1)
    counts = code.unique(return_counts=True)[1].numpy()
    assert len(counts) == 24
    assert stats.chisquare(counts).pvalue > 1e-3
    long = random_order(fold_in(1, torch.arange(2_000)), 100)
    places = torch.zeros(100, 100).index_put_((long.flatten(), torch.arange(100).repeat(2_000)), torch.ones(200_000), accumulate=True)
    assert stats.chisquare(places.numpy(), axis=1).pvalue.min() > 1e-5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_same_numbers_on_the_gpu() -> None:
    keys = fold_in(3, 1, torch.arange(50))
    there = fold_in(3, 1, torch.arange(50, device="cuda"))
    assert torch.equal(there.cpu(), keys)
    assert torch.equal(uniform(there, 20, low=-1.0, high=3.0).cpu(), uniform(keys, 20, low=-1.0, high=3.0))
    assert torch.equal(random_order(there, 100).cpu(), random_order(keys, 100))
    torch.testing.assert_close(normal(there, 21).cpu(), normal(keys, 21), rtol=1e-4, atol=1e-5)
