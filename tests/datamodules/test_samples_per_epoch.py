"""Training epochs of another length than the training set: samples come again, as evenly as can be and augmented anew."""

from collections import Counter

import pytest
import torch

from litzoo.datamodules import DigitsDataModule
from litzoo.datamodules.arrays import BatchSampler

INDICES = torch.arange(10) * 3 + 1


def epoch_of(sampler: BatchSampler, epoch: int) -> list[tuple[int, int]]:
    sampler.set_epoch(epoch)
    batches = list(sampler)
    assert len(batches) == len(sampler)
    return [pair for _, indices, *repeats in batches for pair in zip(indices, *(repeats or [[0] * len(indices)]), strict=True)]


def sampler(length: int | None, shuffle: bool = True) -> BatchSampler:
    return BatchSampler(INDICES, 1, 5, training=True, shuffle=shuffle, length=length)


@pytest.mark.parametrize("length", [10, 25, 30, 31])
def test_rounds_of_all_samples(length: int) -> None:
    orders = [epoch_of(sampler(length), epoch) for epoch in range(3)]
    assert len({tuple(order) for order in orders}) == 3
    for order in orders:
        assert len(order) == length
        for start in range(0, length, 10):
            indices, repeats = zip(*order[start : start + 10], strict=True)
            assert set(indices) <= set(INDICES.tolist())
            assert len(set(indices)) == len(indices)
            assert set(repeats) == {start // 10}
    assert epoch_of(sampler(length), 1) == orders[1]


def test_the_first_round_is_the_epoch_without_a_length() -> None:
    assert epoch_of(sampler(25), 2)[:10] == epoch_of(sampler(None), 2) == epoch_of(sampler(10), 2)
    assert epoch_of(sampler(4), 2) == epoch_of(sampler(None), 2)[:4]
    assert [index for index, _ in epoch_of(sampler(12, shuffle=False), 2)] == [*INDICES.tolist(), 1, 4]
    evaluation = BatchSampler(INDICES, 3, 5, training=False, length=25)
    assert [index for _, indices in evaluation for index in indices] == INDICES.tolist()


def test_balanced_epochs_of_another_length() -> None:
    label = torch.tensor([0] * 8 + [1] * 2)
    found = epoch_of(BatchSampler(INDICES, 1, 5, training=True, label=label, length=33), 0)
    times = Counter(index for index, _ in found)
    assert {sum(times[index] for index in INDICES[label == cls].tolist()) for cls in (0, 1)} == {16, 17}
    assert sorted(repeat for index, repeat in found if index == INDICES[-1]) == list(range(times[int(INDICES[-1])]))


def test_a_data_module_augments_a_sample_that_comes_again_anew() -> None:
    data = DigitsDataModule(batch_size=32)
    steps = len(data.train_dataloader())
    split = data.arrays.split.clone()
    split[data.train_index[40:]] = 3
    data.samples_per_epoch = data.num_train
    data.reassign(split=split)
    loader = data.train_dataloader()
    assert len(loader) == steps
    batches = list(loader)
    keys = torch.cat([batch.key for batch in batches if batch.key is not None])
    assert len(keys.unique()) == len(keys) == 32 * steps
    times = torch.cat([batch.index for batch in batches]).unique(return_counts=True)[1]
    assert len(times) == 40
    assert int(times.max() - times.min()) <= 2  # the incomplete last batch is dropped
    assert torch.cat([batch.index for batch in data.eval_train_dataloader()]).tolist() == data.train_index.tolist()
