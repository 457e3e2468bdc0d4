"""What a DataModule, of litzoo or of somebody else, tells about its labels."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from litzoo.datamodules import DigitsDataModule
from litzoo.zoo.batch import count_unlabelled, labelled_samples


@pytest.mark.parametrize("counts", [[3, 5], (3, 5), torch.tensor([3, 5]), {"cat": 3, "dog": 5}])
def test_counts_of_any_kind(counts: Any) -> None:
    assert labelled_samples(SimpleNamespace(class_counts=counts)) == 8
    assert count_unlabelled(SimpleNamespace(num_train=10, class_counts=counts)) == (2, 10)


@pytest.mark.parametrize("data", [None, SimpleNamespace(num_train=10), SimpleNamespace(num_train=10, class_counts=len)])
def test_data_that_do_not_tell(data: Any) -> None:
    assert labelled_samples(data) is None
    assert count_unlabelled(data) == (0, 0)


def test_digits() -> None:
    data = DigitsDataModule()
    label = data.arrays.label.clone()
    label[data.train_index[:7]] = -1
    data.reassign(label=label)
    assert count_unlabelled(data) == (7, data.num_train)
