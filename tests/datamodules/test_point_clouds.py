"""What all data sets of clouds share: clouds of unequal size, parts and their classes, farthest-point subsets."""

from typing import Any

import pytest
import torch
from torch import Tensor

from litzoo.datamodules import Arrays, DataError, FurnitureDataModule, HDF5PointsDataModule, PointAugmentation, PointsDataModule
from litzoo.datamodules.splits import TEST, TRAIN, VAL, stratified_split
from litzoo.zoo.functional.points import unit_sphere

COUNT = torch.tensor([9, 20, 14, 1, 20, 17, 5, 12, 8, 20])
PLAIN = PointAugmentation(scale=(1.0, 1.0), shift=0.0)


def cloud(place: int) -> Tensor:
    """The cloud's own points; the third coordinate of each is its part."""
    points = torch.randn(20, 3, generator=torch.Generator().manual_seed(place))
    points[:, 2] = torch.arange(20) % 3 + 3 * (place % 2)
    return points[: COUNT[place]]


class Unequal(PointsDataModule):
    """Ten clouds of 1 to 20 points in two classes, of three parts each."""

    def __init__(self, counted: bool = True, split: Tensor | None = None, **settings: Any) -> None:
        super().__init__(**{"batch_size": 4, "normalization": "none", "augmentation": PLAIN, **settings})
        self.counted, self.official = counted, split

    def read(self) -> Arrays:
        points = torch.stack([cloud(place)[torch.arange(20) % size] for place, size in enumerate(COUNT.tolist())])
        label = torch.arange(10) % 2
        split = torch.tensor([TRAIN] * 6 + [VAL] * 2 + [TEST] * 2) if self.official is None else self.official
        count = COUNT if self.counted else None
        return Arrays(points, label, self.finish_split(label, split), ("even", "odd"), points[..., 2].to(torch.uint8), count=count)


def test_evaluation_of_whole_clouds() -> None:
    data = Unequal(normalization="unit_sphere")
    for batch in data.eval_train_dataloader():
        given = data.transform(batch)
        assert given.input.shape == (len(batch.index), 20, 3)
        for place, points, part in zip(batch.index.tolist(), given.input, given.part, strict=True):
            own = cloud(place)
            torch.testing.assert_close(points, unit_sphere(own)[torch.arange(20) % len(own)])
            assert part.dtype == torch.int64
            assert part.tolist() == own[:, 2].long().tolist() + [-1] * (20 - len(own))


@pytest.mark.parametrize("eval_points", [4, 12, 30])
def test_evaluation_subsets(eval_points: int) -> None:
    data = Unequal(eval_points=eval_points)
    for batch in data.eval_train_dataloader():
        given = data.transform(batch)
        for place, points, part in zip(batch.index.tolist(), given.input, given.part, strict=True):
            size = min(eval_points, int(COUNT[place]))
            own = {tuple(point) for point in cloud(place).tolist()}
            chosen = [tuple(point) for point in points.tolist()]
            assert len(set(chosen[:size])) == size
            assert set(chosen) <= own
            assert part.tolist() == points[:size, 2].long().tolist() + [-1] * (eval_points - size)


def test_repeated_points_of_full_clouds_count_once() -> None:
    """An evaluation subset of more points than are stored repeats them, with or without a count."""
    data = Unequal(eval_points=30, counted=False)
    batch = next(iter(data.eval_train_dataloader()))
    part = data.transform(batch).part
    assert part is not None
    assert (part[:, :20] >= 0).all()
    assert (part[:, 20:] == -1).all()


@pytest.mark.parametrize("num_points", [4, 12, 30])
def test_training_subsets(num_points: int) -> None:
    data = Unequal(num_points=num_points)
    loader = data.train_dataloader()
    for epoch in range(20):
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            given = data.transform(batch)
            assert given.part is not None
            assert torch.equal(given.part, given.input[..., 2].long()), "repeated points train like any other"
            for place, points in zip(batch.index.tolist(), given.input.tolist(), strict=True):
                size = min(num_points, int(COUNT[place]))
                assert len({tuple(point) for point in points}) == size


def test_full_clouds_need_no_count() -> None:
    data, plain = Unequal(num_points=7), Unequal(num_points=7, counted=False)
    full = (COUNT == 20).nonzero().squeeze(1)
    batch = next(iter(plain.train_dataloader()))
    batch = batch._replace(
        input=plain.arrays.input[full], label=plain.arrays.label[full], index=full, part=plain.arrays.part[full].long(), key=full
    )
    for one, other in ((batch, batch), (batch._replace(key=None), batch._replace(key=None))):
        given, expected = data.transform(one), plain.transform(other)
        assert torch.equal(given.input, expected.input)
        assert torch.equal(given.part, expected.part)


def test_farthest_subsets() -> None:
    data = Unequal(subset="farthest", farthest=20, num_points=10, eval_points=12)
    evaluation = data.transform(next(iter(data.eval_train_dataloader())))
    assert torch.equal(evaluation.input, data.arrays.input[evaluation.index, :12])
    assert evaluation.part is not None
    assert torch.equal((evaluation.part >= 0).sum(1), COUNT[evaluation.index].clamp(max=12))
    loader, seen = data.train_dataloader(), set()
    for epoch in range(30):
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            for place, points in zip(batch.index.tolist(), data.transform(batch).input.tolist(), strict=True):
                order = [tuple(point) for point in cloud(place).tolist()]
                found = [order.index(tuple(point)) for point in points]
                assert len(set(found)) == min(10, len(order))
                seen |= set(found)
    assert seen == set(range(12))


@pytest.mark.parametrize("setting", [{"num_points": 18}, {"num_points": 10, "eval_points": 21}, {"num_points": 10, "farthest": 0}])
def test_farthest_subsets_need_the_order(setting: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="subset farthest needs the first"):
        Unequal(**{"subset": "farthest", "farthest": 20, **setting})


def test_parts_and_their_classes() -> None:
    data = Unequal()
    assert data.part_names == ["0", "1", "2", "3", "4", "5"]
    assert data.num_parts == 6
    assert data.part_classes == [0, 0, 0, 1, 1, 1]
    arrays = data.arrays
    assert arrays.part is not None
    arrays.part[1, 3] = 0  # now in both classes
    arrays.part[arrays.part == 5] = 4  # now in none
    arrays.part[8, 0] = 4  # in the test split, at which nobody looks
    fresh = Unequal()
    fresh.__dict__["arrays"] = Arrays(
        *(getattr(arrays, name) for name in ("input", "label", "split", "class_names", "part")), tuple("abcdef")
    )
    assert fresh.part_names == list("abcdef")
    assert fresh.part_classes == [-1, 0, 0, 1, 1, -1]


def test_data_without_parts() -> None:
    data = FurnitureDataModule()
    assert data.part_names == []
    assert data.num_parts == 0
    assert data.part_classes == []


def test_parts_of_a_file(points_file: Any) -> None:
    data = HDF5PointsDataModule(points_file(parts=True))
    assert data.part_names == ["below", "above"]
    assert data.part_classes == [-1, -1]
    data.arrays.part[:] = 2
    import h5py

    with h5py.File(data.path, "a") as file:
        file["part"][0, 0] = 2
    with pytest.raises(DataError, match="parts run up to 2, but there are 2 part names"):
        _ = HDF5PointsDataModule(data.path).num_parts


def test_balanced_clouds(points_file: Any) -> None:
    data = HDF5PointsDataModule(points_file(), balanced=True, batch_size=8)
    label = torch.cat([batch.label for batch in data.train_dataloader()])
    assert label.bincount().min() >= 9


def test_splits() -> None:
    label = torch.arange(10) % 2
    drawn = Unequal(split_seed=3, val_fraction=0.2, test_fraction=0.2)
    assert torch.equal(drawn.arrays.split, stratified_split(label, 0.2, 0.2, 3))
    assert Unequal().arrays.split.bincount().tolist() == [6, 2, 2]
