"""Class-balanced epochs: every class equally often, no matter how rare it is."""

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import h5py
import pytest
import torch
from contract import Probe, same, trainer, write_images
from lightning.pytorch.callbacks import ModelCheckpoint

from litzoo.datamodules import Arrays, DataError, HDF5ImagesDataModule
from litzoo.datamodules.arrays import ArrayDataset, BatchLoader, BatchSampler
from litzoo.zoo import Batch

# Class 0 has 100 samples, class 3 has 3; positions in the data set are not 0, 1, 2, ...
COUNTS = (100, 30, 17, 3)
LABEL = torch.arange(4).repeat_interleave(torch.tensor(COUNTS))[torch.randperm(150, generator=torch.Generator().manual_seed(0))]
INDICES = torch.arange(150) * 2 + 7
CLASS = dict(zip(INDICES.tolist(), LABEL.tolist(), strict=True))


def sampler(batch_size: int = 150, seed: int = 0, **settings: Any) -> BatchSampler:
    return BatchSampler(INDICES, batch_size, seed, training=True, label=LABEL, **settings)


def epoch_of(balanced: BatchSampler, epoch: int) -> list[tuple[int, int]]:
    """Index and repeat of each sample of an epoch, in order."""
    balanced.set_epoch(epoch)
    batches = list(balanced)
    assert len(batches) == len(balanced)
    assert {number for number, _, _ in batches} == {epoch}
    return [pair for _, indices, repeats in batches for pair in zip(indices, repeats, strict=True)]


@pytest.mark.parametrize("batch_size", [150, 50, 10, 1])
def test_every_class_equally_often(batch_size: int) -> None:
    for epoch in range(8):
        seen = Counter(CLASS[index] for index, _ in epoch_of(sampler(batch_size), epoch))
        assert sum(seen.values()) == 150, "an epoch is as long as ever"
        assert max(seen.values()) - min(seen.values()) <= 1


def test_the_classes_with_one_place_more_take_turns() -> None:
    total = Counter(CLASS[index] for epoch in range(4) for index, _ in epoch_of(sampler(), epoch))
    assert len(set(total.values())) == 1


@pytest.mark.parametrize("epoch", range(4))
def test_repeats_are_as_even_as_can_be(epoch: int) -> None:
    seen: dict[int, list[int]] = {index: [] for index in INDICES.tolist()}
    for index, repeat in epoch_of(sampler(), epoch):
        seen[index].append(repeat)
    for cls, count in enumerate(COUNTS):
        times = [len(repeats) for index, repeats in seen.items() if CLASS[index] == cls]
        assert len(times) == count
        assert max(times) - min(times) <= 1
    for repeats in seen.values():
        assert sorted(repeats) == list(range(len(repeats))), "repeats are counted from 0"


def test_a_large_class_shows_other_samples_in_other_epochs() -> None:
    balanced = sampler()
    shown = [{index for index, _ in epoch_of(balanced, epoch) if CLASS[index] == 0} for epoch in range(30)]
    assert all(len(indices) in (37, 38) for indices in shown)
    assert all(a != b for a, b in itertools.pairwise(shown))
    assert len(set.union(*shown)) == 100
    times = Counter(index for indices in shown for index in indices)
    assert 2 <= min(times.values()) <= max(times.values()) <= 22  # 30 epochs, 37.5 of 100 each: 11.25 on average


def test_classes_are_mixed_within_the_epoch() -> None:
    order = [CLASS[index] for index, _ in epoch_of(sampler(), 0)]
    for start in range(0, 150, 50):
        assert all(5 <= count <= 21 for count in Counter(order[start : start + 50]).values())
    assert order != [CLASS[index] for index, _ in epoch_of(sampler(), 1)]


def test_an_epoch_is_a_function_of_seed_and_epoch() -> None:
    balanced = sampler(20)
    first = epoch_of(balanced, 3)
    epoch_of(balanced, 0)
    torch.rand(5)
    assert epoch_of(balanced, 3) == epoch_of(sampler(20), 3) == first
    assert epoch_of(sampler(20, seed=1), 3) != first
    assert epoch_of(balanced, 4) != first


@pytest.mark.parametrize("batch_size", [5, 10, 16])
def test_two_processes_share_the_global_batches(batch_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = sampler(2 * batch_size)
    shared = sampler(batch_size)
    for epoch in (0, 1):
        alone.set_epoch(epoch)
        shared.set_epoch(epoch)
        expected = list(alone)
        ranks = []
        for rank in range(2):
            monkeypatch.setattr(shared, "_world", lambda rank=rank: (rank, 2))
            ranks.append(list(shared))
        assert len(ranks[0]) == len(ranks[1]) == len(expected)
        for mine, yours, both in zip(*ranks, expected, strict=True):
            union = [*zip(*mine[1:], strict=True), *zip(*yours[1:], strict=True)]
            assert len(mine[1]) == len(yours[1]) == batch_size
            assert sorted(union) == sorted(zip(*both[1:], strict=True))


def test_repeats_get_other_keys() -> None:
    arrays = Arrays(torch.zeros(310, 1), torch.zeros(310, dtype=torch.long), torch.zeros(310, dtype=torch.uint8), ("a",))
    dataset = ArrayDataset(arrays, seed=0)
    balanced = sampler(30)
    keys: list[int] = []
    for epoch in range(3):
        balanced.set_epoch(epoch)
        for item in balanced:
            batch = dataset[item]
            assert batch.key is not None
            assert batch.index.tolist() == item[1]
            keys += batch.key.tolist()
            # what comes for the first time has the key that it has in an epoch that is not balanced
            plain = dataset[item[:2]].key
            assert plain is not None
            assert torch.equal(batch.key == plain, torch.tensor(item[2]) == 0)
    assert len(set(keys)) == len(keys) == 450


def test_without_shuffling_or_training_nothing_is_balanced() -> None:
    for settings in ({"training": True, "shuffle": False}, {"training": False}):
        plain = BatchSampler(INDICES, 150, 0, label=LABEL, **settings)  # type: ignore[arg-type]
        assert [batch[1] for batch in plain] == [INDICES.tolist()]


def test_a_class_without_a_sample_is_left_out() -> None:
    label = LABEL.clone()
    label[label == 1] = 5
    seen = Counter(label[(index - 7) // 2].item() for index, _ in epoch_of(BatchSampler(INDICES, 150, 0, training=True, label=label), 0))
    assert set(seen) == {0, 2, 3, 5}
    assert max(seen.values()) - min(seen.values()) <= 1


def test_more_classes_than_samples_in_an_epoch() -> None:
    label = torch.arange(5)
    seen = epoch_of(BatchSampler(torch.arange(5), 5, 0, training=True, label=label), 0)
    assert sorted(seen) == [(index, 0) for index in range(5)]


# --- through a DataModule -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """61 images; class 0 is common, class 3 is rare."""
    path = write_images(tmp_path / "rare.h5", images=61, split=False)
    with h5py.File(path, "a") as file:
        file["label"][:] = torch.arange(4).repeat_interleave(torch.tensor([40, 10, 7, 4])).numpy()
    return path


def make(path: Path, **settings: Any) -> HDF5ImagesDataModule:
    return HDF5ImagesDataModule(path, test_fraction=0.0, **{"balanced": True, "batch_size": 9, "seed": 1, **settings})


def test_class_counts_stay_those_of_the_data(path: Path) -> None:
    assert make(path).class_counts == make(path, balanced=False).class_counts == [36, 9, 6, 4]


def test_a_repeated_image_is_augmented_in_another_way(path: Path) -> None:
    data = make(path, batch_size=55, augmentation="supcon")
    batch = data.transform(next(iter(data.train_dataloader())))
    assert batch.label.bincount().tolist() in ([14, 14, 14, 13], [13, 14, 14, 14], [14, 13, 14, 14], [14, 14, 13, 14])
    assert len(batch.index.unique()) < 55
    for a, b in itertools.combinations(range(55), 2):
        assert not torch.equal(batch.input[a], batch.input[b])


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("position", [0, 1, 4, 6])
def test_loader_goes_on_where_it_stopped(path: Path, num_workers: int, position: int) -> None:
    loader = make(path, num_workers=num_workers).train_dataloader()
    assert len(loader) == 6
    loader.sampler.set_epoch(2)
    running = iter(loader)
    for _ in range(position):
        next(running)
    state, rest = loader.state_dict(), list(running)
    resumed: BatchLoader = make(path, num_workers=num_workers).train_dataloader()
    resumed.load_state_dict(state)
    batches: list[Batch] = list(resumed)
    assert len(batches) == len(rest) == 6 - position
    assert all(map(same, rest, batches))


def test_resumed_training_equals_uninterrupted(path: Path, tmp_path: Path) -> None:
    def fit(**settings: Any) -> Probe:
        model = Probe(4, seed=0)
        checkpoint = settings.pop("checkpoint", None)
        run = trainer(tmp_path, **settings)
        run.fit(
            model, datamodule=make(path, augmentation="simclr", views=2), ckpt_path=checkpoint, weights_only=False if checkpoint else None
        )
        return model

    keep = ModelCheckpoint(tmp_path / "kept", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    whole = fit(callbacks=[keep])
    assert len(whole.train_seen) == 12
    for step in (3, 6, 8):
        resumed = fit(checkpoint=tmp_path / "kept" / f"step={step}.ckpt")
        assert resumed.train_seen == whole.train_seen[step:]
        assert all(torch.equal(a, b) for a, b in zip(resumed.state_dict().values(), whole.state_dict().values(), strict=True))


def test_unknown_labels_are_refused() -> None:
    class Partly(HDF5ImagesDataModule):
        def read(self) -> Arrays:
            label = torch.tensor([0, 1, -1, 0, 1, -1])
            split = torch.tensor([0, 0, 0, 1, 1, 2], dtype=torch.uint8)
            return Arrays(torch.zeros(6, 3, 4, 4, dtype=torch.uint8), label, split, ("a", "b"))

    with pytest.raises(DataError, match="balanced=True needs labels, but some training samples have none"):
        Partly("unused.h5", balanced=True).train_dataloader()
    assert Partly("unused.h5").class_counts == [1, 1]
    assert len(Partly("unused.h5", balanced=True).eval_train_dataloader()) == 1
