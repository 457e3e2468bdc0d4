"""Which predictions become labels, against a loop over the samples."""

import math

import pytest
import torch

from litzoo.zoo.functional.pseudo_labels import choose_pseudo_labels


def naive(confidence: list[float], label: list[int], threshold: float, most: int | None) -> list[int]:
    taken: dict[int, int] = {}
    found = [-1] * len(label)
    for place in sorted(range(len(label)), key=lambda place: (-confidence[place], place)):
        cls = label[place]
        if confidence[place] >= threshold and taken.get(cls, 0) < (math.inf if most is None else most):
            taken[cls] = taken.get(cls, 0) + 1
            found[place] = cls
    return found


@pytest.mark.parametrize("most", [None, 1, 3, 100])
@pytest.mark.parametrize("threshold", [0.1, 0.6, 1.0])
def test_against_a_loop(threshold: float, most: int | None) -> None:
    confidence, label = torch.randint(1, 11, (200,)) / 10, torch.randint(4, (200,)) * 2  # with ties, and classes that nobody has
    found = choose_pseudo_labels(confidence, label, threshold, most)
    assert found.tolist() == naive(confidence.tolist(), label.tolist(), torch.tensor(threshold).item(), most)


@pytest.mark.parametrize("most", [None, 2])
def test_nothing_to_choose(most: int | None) -> None:
    nan = torch.full((3,), math.nan)
    assert choose_pseudo_labels(nan, torch.arange(3), 0.5, most).tolist() == [-1, -1, -1]
    assert choose_pseudo_labels(torch.zeros(0), torch.zeros(0, dtype=torch.long), 0.5, most).tolist() == []
