"""Clouds from an HDF5 file: what is read, and one sentence for each way in which a file can be broken."""

from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from litzoo.datamodules import DataError, HDF5PointsDataModule, PointAugmentation
from litzoo.datamodules.arrays import TEST, TRAIN, VAL
from litzoo.datamodules.splits import stratified_split

PLAIN = PointAugmentation(scale=(1.0, 1.0), shift=0.0)


@pytest.fixture
def path(points_file: Callable[..., Path]) -> Path:
    return points_file(parts=True)


def change(path: Path, name: str, value: object) -> None:
    """Replace a data set of the file; None removes it."""
    with h5py.File(path, "a") as file:
        del file[name]
        if value is not None:
            file[name] = value


def test_reads_what_is_in_the_file(path: Path) -> None:
    data = HDF5PointsDataModule(path)
    with h5py.File(path) as file:
        assert torch.equal(data.arrays.input, torch.from_numpy(file["points"][:]))
        assert data.arrays.label.tolist() == file["label"][:].tolist()
        assert data.arrays.split.tolist() == file["split"][:].tolist()
    assert data.class_names == ["class 0", "class 1", "class 2", "class 3"]
    assert data.arrays.part_names == ("below", "above")
    assert data.arrays.label.dtype == torch.int64


def test_points_behind_the_count_are_never_seen(path: Path) -> None:
    with h5py.File(path, "a") as file:
        count = 5 + np.arange(len(file["label"])) % 60
        points = file["points"][:]
        for cloud, own in zip(points, count, strict=True):
            cloud[own:] = np.nan
        file["points"][...] = points
        file["count"] = count
    data = HDF5PointsDataModule(path, num_points=16, augmentation=PLAIN, normalization="none", batch_size=7)
    for loader in (data.train_dataloader(), data.eval_train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        for batch in loader:
            seen = data.transform(batch)
            for cloud, index in zip(seen.input, batch.index, strict=True):
                own = {tuple(point) for point in points[index, : count[index]].tolist()}
                assert {tuple(point) for point in cloud.tolist()} <= own
    change(path, "count", np.full(60, 65))
    with pytest.raises(DataError, match="count must say how many of its 64 points"):
        _ = HDF5PointsDataModule(path).arrays
    change(path, "count", np.full(3, 5))
    with pytest.raises(DataError, match="count must have shape"):
        _ = HDF5PointsDataModule(path).arrays


@pytest.mark.parametrize("kind", ["<f2", "<f4", "<f8", ">f4"])
@pytest.mark.parametrize("whole", ["u1", ">i2", "u4", "i8", "<f8"])
def test_any_width_and_byte_order(path: Path, kind: str, whole: str) -> None:
    before = HDF5PointsDataModule(path).arrays
    change(path, "points", before.input.numpy().astype(kind))
    for name, values in (("label", before.label), ("part", before.part), ("split", before.split)):
        assert values is not None
        change(path, name, values.numpy().astype(whole))
    data = HDF5PointsDataModule(path, batch_size=4)
    assert data.arrays.label.tolist() == before.label.tolist()
    assert data.arrays.split.tolist() == before.split.tolist()
    batch = data.transform(next(iter(data.train_dataloader())))
    assert batch.input.dtype == torch.float32
    assert batch.label.dtype == torch.int64
    assert batch.part is not None
    assert batch.part.dtype == torch.int64


def test_path_resolves_home_and_variables(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLOUDS", str(path.parent))
    monkeypatch.setenv("HOME", str(path.parent))
    assert HDF5PointsDataModule("$CLOUDS/points.h5").num_classes == 4
    assert HDF5PointsDataModule("~/points.h5").num_classes == 4


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no file .*nothing\.h5"):
        _ = HDF5PointsDataModule(tmp_path / "nothing.h5").num_classes


@pytest.mark.parametrize("name", ["points", "label"])
def test_missing_keys(path: Path, name: str) -> None:
    change(path, name, None)
    with pytest.raises(DataError, match=rf"has no data set {name}; it holds: class_names"):
        _ = HDF5PointsDataModule(path).num_classes


@pytest.mark.parametrize("keep", [0.0, 0.05, 0.5, 0.95])
def test_truncated_file(path: Path, keep: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(DataError, match="cannot be read as HDF5"):
        _ = HDF5PointsDataModule(path).num_classes


def test_not_hdf5(path: Path) -> None:
    path.write_text("x y z\n0 0 0\n")
    with pytest.raises(DataError, match="cannot be read as HDF5"):
        _ = HDF5PointsDataModule(path).num_classes


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_not_finite(path: Path, bad: float) -> None:
    with h5py.File(path, "a") as file:
        file["points"][7, 3, 1] = bad
        file["points"][9, 0, 0] = bad
    with pytest.raises(DataError, match="2 clouds hold NaN or infinite coordinates, the first at position 7"):
        _ = HDF5PointsDataModule(path).num_classes


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("points", np.zeros((60, 64, 2), np.float32), "floats of shape"),
        ("points", np.zeros((60, 64, 3), np.int32), "floats of shape"),
        ("points", np.zeros((60, 0, 3), np.float32), "floats of shape"),
        ("points", np.zeros((60, 192), np.float32), "floats of shape"),
        ("label", np.zeros(59, np.int32), r"label must have shape \(60,\)"),
        ("label", np.zeros((60, 1), np.int32), r"label must have shape \(60,\)"),
        ("label", np.full(60, 4), "labels run from 4 to 4, but there are 4 class names"),
        ("label", np.full(60, -1), "labels start at 0, but the lowest is -1"),
        ("label", np.full(60, 0.5), "label must hold whole numbers"),
        ("label", np.full(60, np.nan), "label must hold whole numbers"),
        ("split", np.zeros(10, np.uint8), r"split must have shape \(60,\)"),
        ("split", np.full(60, 3, np.uint8), "split must be 0"),
        ("split", np.full(60, 256), "split must be 0 .*it holds 256"),
        ("split", np.full(60, -1), "split must be 0 .*it holds -1"),
        ("split", np.full(60, 1, np.uint8), "no sample belongs to the training split"),
        ("part", np.zeros((60, 63), np.uint8), r"part must have shape \(60, 64\)"),
    ],
)
def test_wrong_layout(path: Path, name: str, value: object, message: str) -> None:
    change(path, name, value)
    with pytest.raises(DataError, match=message):
        _ = HDF5PointsDataModule(path).num_classes


SCALAR, TEXT = np.float32(1), np.array([b"a", b"b"])


@pytest.mark.parametrize(
    ("name", "value"),
    [*((name, value) for name in ("points", "label", "split", "part") for value in (SCALAR, TEXT)), ("class_names", SCALAR)],
)
def test_data_sets_of_a_wrong_kind(path: Path, name: str, value: object) -> None:
    change(path, name, value)
    with pytest.raises(DataError):
        _ = HDF5PointsDataModule(path).num_classes


def test_empty_split_is_named(path: Path) -> None:
    change(path, "split", np.zeros(60, np.uint8))
    data = HDF5PointsDataModule(path)
    assert data.num_train == 60
    with pytest.raises(DataError, match="the test split is empty"):
        data.test_dataloader()


def test_without_names_and_split(points_file: Callable[..., Path]) -> None:
    data = HDF5PointsDataModule(points_file(split=False, names=False))
    assert data.class_names == ["0", "1", "2", "3"]
    assert torch.equal(data.arrays.split, stratified_split(data.arrays.label, 0.1, 0.15, 0))
    other = HDF5PointsDataModule(data.path, split_seed=5)
    assert not torch.equal(other.arrays.split, data.arrays.split)


def test_split_seed_overrides_the_file(path: Path) -> None:
    drawn = HDF5PointsDataModule(path, split_seed=1, val_fraction=0.2, test_fraction=0.2)
    assert torch.equal(drawn.arrays.split, stratified_split(drawn.arrays.label, 0.2, 0.2, 1))


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("val", "test"), [(0.1, 0.15), (0.3, 0.3), (0.0, 0.5), (0.5, 0.0)])
def test_stratified_split(seed: int, val: float, test: float) -> None:
    label = torch.arange(8).repeat_interleave(torch.tensor([1, 2, 3, 5, 10, 21, 40, 100]))
    split = stratified_split(label, val, test, seed)
    assert split.dtype == torch.uint8
    assert torch.equal(split, stratified_split(label, val, test, seed))
    for cls in range(8):
        counts = split[label == cls].bincount(minlength=3)
        size = int(counts.sum())
        assert counts[TEST] == round(size * test)
        if size >= 3:
            assert counts[TRAIN] >= 1
            assert counts[VAL] == min(round(size * val), size - int(counts[TEST]) - 1)
    if val or test:
        assert not torch.equal(split, stratified_split(label, val, test, seed + 10))


def test_stratified_split_is_random_within_a_class() -> None:
    label = torch.zeros(20, dtype=torch.long)
    chosen = torch.stack([stratified_split(label, 0.0, 0.25, seed) == TEST for seed in range(400)]).float().mean(0)
    assert (chosen - 0.25).abs().max() < 0.1


@pytest.mark.parametrize("fractions", [(-0.1, 0.2), (0.5, 0.5), (0.9, 0.3)])
def test_impossible_fractions(fractions: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="sum to less than 1"):
        stratified_split(torch.zeros(10, dtype=torch.long), *fractions)


def test_parts_follow_their_points(path: Path) -> None:
    augmentation = PointAugmentation(rotation="none", scale=(0.8, 1.2), shift=0.0, dropout=0.5)
    data = HDF5PointsDataModule(path, num_points=40, normalization="none", augmentation=augmentation, batch_size=16)
    batch = data.transform(next(iter(data.train_dataloader())))
    assert batch.part is not None
    assert batch.input.shape == (16, 40, 3)
    assert torch.equal(batch.part, (batch.input[..., 2] > 0).long())
    evaluation = data.transform(next(iter(data.val_dataloader())))
    assert evaluation.part is not None
    assert torch.equal(evaluation.part, (evaluation.input[..., 2] > 0).long())


@pytest.mark.parametrize(("num_points", "points"), [(None, 64), (10, 10), (200, 200)])
def test_number_of_points(path: Path, num_points: int | None, points: int) -> None:
    data = HDF5PointsDataModule(path, num_points=num_points, augmentation=PLAIN)
    train, val = (data.transform(next(iter(loader))) for loader in (data.train_dataloader(), data.val_dataloader()))
    assert train.input.shape[1] == points
    assert val.input.shape[1] == 64
    assert train.input.dtype == val.input.dtype == torch.float32


def test_evaluation_takes_a_fixed_subset(path: Path) -> None:
    data = HDF5PointsDataModule(path, eval_points=20, normalization="none", eval_batch_size=3)
    first, again = ([data.transform(batch) for batch in data.eval_train_dataloader()] for _ in range(2))
    for a, b in zip(first, again, strict=True):
        assert a.input.shape[1:] == (20, 3)
        assert torch.equal(a.input, b.input)
        assert a.part is not None
        assert torch.equal(a.part, (a.input[..., 2] > 0).long())
    # which points are taken depends neither on the batch nor on the seed
    other = HDF5PointsDataModule(path, eval_points=20, normalization="none", eval_batch_size=7, seed=9)
    whole = torch.cat([other.transform(batch).input for batch in other.eval_train_dataloader()])
    assert torch.equal(torch.cat([batch.input for batch in first]), whole)


def test_augmented_clouds_were_normalised_before(path: Path) -> None:
    data = HDF5PointsDataModule(path, num_points=None, augmentation=PLAIN)
    batch = data.transform(next(iter(data.train_dataloader())))
    torch.testing.assert_close(batch.input.norm(dim=-1).amax(1), torch.ones(len(batch.label)))


@pytest.mark.parametrize("setting", [{"num_points": 0}, {"batch_size": 0}, {"eval_batch_size": 0}])
def test_impossible_settings(path: Path, setting: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        HDF5PointsDataModule(path, **setting)
