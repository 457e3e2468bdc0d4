"""Subsets in which each class keeps its share."""

import pytest
import torch

from litzoo.zoo.functional.subsets import stratified_subset


@pytest.mark.parametrize("number", [1, 10, 57, 99])
def test_subset_is_stratified(number: int) -> None:
    label = torch.tensor([-1] * 10 + [0] * 40 + [1] * 20 + [5] * 30)[torch.randperm(100)]
    before = torch.get_rng_state()
    chosen = stratified_subset(label, number)
    assert torch.equal(before, torch.get_rng_state())
    assert chosen.tolist() == sorted({*chosen.tolist()})
    assert len(chosen) == number
    for cls, share in ((-1, 10), (0, 40), (1, 20), (5, 30)):
        assert abs(int((label[chosen] == cls).sum()) - share * number / 100) < 1
    assert torch.equal(chosen, stratified_subset(label, number)), "always the same"
    if 1 < number < 99:
        assert not torch.equal(chosen, stratified_subset(label, number, seed=1))


def test_a_small_set_is_drawn_whole() -> None:
    for number in (5, 6):
        assert stratified_subset(torch.tensor([2, 2, 0, -1, 1]), number).tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="at least 1"):
        stratified_subset(torch.zeros(4, dtype=torch.long), 0)
