"""Holding out and thinning out; `stratified_split` is tested with the points."""

from fractions import Fraction

import pytest
import torch

from litzoo.datamodules.splits import TEST, TRAIN, UNUSED, VAL, hold_out, stratified_split, thin_out

LABEL = torch.arange(6).repeat_interleave(torch.tensor([1, 2, 3, 10, 40, 100]))[
    torch.randperm(156, generator=torch.Generator().manual_seed(0))
]
SPLIT = torch.tensor([TRAIN, TRAIN, TEST, TRAIN], dtype=torch.uint8)[torch.arange(156) % 4]


def counts(split: torch.Tensor, number: int) -> list[int]:
    return LABEL[split == number].bincount(minlength=6).tolist()


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("seed", [0, 1])
def test_hold_out(fraction: float, seed: int) -> None:
    held = hold_out(SPLIT, LABEL, fraction, seed)
    assert held.dtype == torch.uint8
    assert torch.equal(held == TEST, SPLIT == TEST)
    assert torch.equal(held, hold_out(SPLIT, LABEL, fraction, seed))
    for count, val, train in zip(counts(SPLIT, TRAIN), counts(held, VAL), counts(held, TRAIN), strict=True):
        assert val == min(round(count * Fraction(fraction)), max(count - 1, 0))
        assert val + train == count
    if fraction:
        assert not torch.equal(held, hold_out(SPLIT, LABEL, fraction, seed + 10))


def test_hold_out_of_everything_is_a_stratified_split() -> None:
    assert torch.equal(hold_out(torch.zeros_like(SPLIT), LABEL, 0.3, 4), stratified_split(LABEL, 0.3, 0.0, 4))


def test_hold_out_leaves_its_argument_alone() -> None:
    before = SPLIT.clone()
    hold_out(SPLIT, LABEL, 0.5)
    thin_out(SPLIT, LABEL, 0.5)
    assert torch.equal(before, SPLIT)


def test_unused_samples_stay_unused() -> None:
    split = SPLIT.clone()
    split[::5] = UNUSED
    for changed in (hold_out(split, LABEL, 0.5), thin_out(split, LABEL, 0.5)):
        assert (changed[::5] == UNUSED).all()


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 2.0])
def test_impossible_hold_out(fraction: float) -> None:
    with pytest.raises(ValueError, match="must be at least 0 and sum to less than 1"):
        hold_out(SPLIT, LABEL, fraction)


@pytest.mark.parametrize("seed", [0, 3])
def test_thin_out_is_nested(seed: int) -> None:
    larger = SPLIT == TRAIN
    for fraction in (1.0, 0.8, 0.5, 0.25, 0.1, 0.01, 1e-9):
        thinned = thin_out(SPLIT, LABEL, fraction, seed)
        assert torch.equal(thinned == TEST, SPLIT == TEST)
        assert torch.equal((thinned == UNUSED) | (thinned == TRAIN), SPLIT == TRAIN)
        expected = [max(1, round(count * Fraction(fraction))) if count else 0 for count in counts(SPLIT, TRAIN)]
        assert counts(thinned, TRAIN) == expected
        smaller = thinned == TRAIN
        assert not (smaller & ~larger).any()
        larger = smaller
    assert not torch.equal(thin_out(SPLIT, LABEL, 0.3, seed), thin_out(SPLIT, LABEL, 0.3, seed + 1))


def test_thin_out_is_random_within_a_class() -> None:
    label, split = torch.zeros(20, dtype=torch.long), torch.zeros(20, dtype=torch.uint8)
    kept = torch.stack([thin_out(split, label, 0.25, seed) == TRAIN for seed in range(400)]).float().mean(0)
    assert (kept - 0.25).abs().max() < 0.1


def test_what_is_kept_does_not_follow_what_was_held_out() -> None:
    """Both come from one seed: of the training samples, those first in the order of holding out are kept as often as others."""
    label, split = torch.zeros(1000, dtype=torch.long), torch.zeros(1000, dtype=torch.uint8)
    larger = hold_out(split, label, 0.5) == VAL
    held = hold_out(split, label, 0.2)
    kept = thin_out(held, label, 0.5) == TRAIN
    near = larger & (held == TRAIN)  # would be held out next
    assert 0.4 < (kept & near).sum() / near.sum() < 0.6


@pytest.mark.parametrize("fraction", [0.0, -1.0, 1.01, float("nan")])
def test_impossible_thinning(fraction: float) -> None:
    with pytest.raises(ValueError, match=r"train_fraction must lie in \(0, 1\]"):
        thin_out(SPLIT, LABEL, fraction)


def test_a_long_tail_falls_exponentially_and_spares_what_has_no_label() -> None:
    label = torch.arange(5).repeat_interleave(200)
    label = torch.cat([label, torch.full((30,), -1)])
    split = torch.zeros(len(label), dtype=torch.uint8)
    split[::10] = TEST
    kept = thin_out(split, label, 0.5, imbalance=100.0)
    assert [int(((kept == TRAIN) & (label == cls)).sum()) for cls in range(5)] == [round(90 * 100 ** (-cls / 4)) for cls in range(5)]
    assert int(((kept == TRAIN) & (label == -1)).sum()) == round(27 * 0.5)
    assert torch.equal(kept == TEST, split == TEST)
    with pytest.raises(ValueError, match="imbalance must be at least 1"):
        thin_out(split, label, 1.0, imbalance=0.5)
