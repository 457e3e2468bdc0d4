"""Images from an HDF5 file: mapped or in memory, and one sentence for each way in which a file can be broken."""

import pickle
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from contract import write_images

from litzoo.datamodules import DataError, HDF5ImagesDataModule
from litzoo.datamodules.hdf5_images import read_images
from litzoo.datamodules.splits import TEST, TRAIN, VAL, stratified_split


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_images(tmp_path / "images.h5")


def change(path: Path, name: str, value: Any, **storage: Any) -> None:
    """Replace a data set of the file; None removes it."""
    with h5py.File(path, "a") as file:
        if name in file:
            del file[name]
        if value is not None:
            file.create_dataset(name, data=value, **storage)


@pytest.mark.parametrize("channels", [1, 3])
def test_reads_what_is_in_the_file(tmp_path: Path, channels: int) -> None:
    path = write_images(tmp_path / "images.h5", shape=(10, 14, channels))
    data = HDF5ImagesDataModule(path, image_size=8)
    with h5py.File(path) as file:
        assert (data.arrays.input.permute(0, 2, 3, 1).numpy() == file["image"][:]).all()
        assert data.arrays.label.tolist() == file["label"][:].tolist()
        assert data.arrays.split.tolist() == file["split"][:].tolist()
    assert data.class_names == ["class 0", "class 1", "class 2", "class 3"]
    assert (data.in_channels, data.image_size) == (channels, 8)
    assert data.arrays.label.dtype == torch.int64
    assert data.arrays.split.dtype == torch.uint8


@pytest.mark.parametrize("storage", [{"chunks": (7, 12, 12, 3)}, {"compression": "gzip"}, {"chunks": (1, 12, 12, 3), "shuffle": True}])
def test_mapped_or_in_memory_is_the_same(tmp_path: Path, storage: dict[str, Any]) -> None:
    mapped = HDF5ImagesDataModule(write_images(tmp_path / "contiguous.h5"), seed=1)
    loaded = HDF5ImagesDataModule(write_images(tmp_path / "chunked.h5", **storage), seed=1)
    assert mapped.arrays.mapped == tmp_path / "contiguous.h5"
    assert loaded.arrays.mapped is None
    for name in ("train_dataloader", "val_dataloader", "test_dataloader", "eval_train_dataloader"):
        for a, b in zip(*(map(data.transform, getattr(data, name)()) for data in (mapped, loaded)), strict=True):
            assert torch.equal(a.input, b.input)
            assert torch.equal(a.label, b.label)


def test_mapped_images_travel_as_a_path(tmp_path: Path) -> None:
    sizes = {}
    for name, storage in (("mapped", {}), ("loaded", {"compression": "gzip"})):
        data = HDF5ImagesDataModule(write_images(tmp_path / f"{name}.h5", images=400, shape=(32, 32, 3), **storage))
        _ = data.arrays
        content = pickle.dumps(data)
        sizes[name] = len(content)
        assert torch.equal(pickle.loads(content).arrays.input, data.arrays.input)
    assert sizes["loaded"] > 400 * 32 * 32 * 3
    assert sizes["mapped"] < 20_000


@pytest.mark.parametrize("settings", [{}, {"image_size": 8}, {"augmentation": "none"}, {"views": 2}])
def test_what_a_model_gets_is_contiguous(path: Path, settings: dict[str, Any]) -> None:
    """The stored images have their channels last, and a model may say `view`."""
    data = HDF5ImagesDataModule(path, **settings)
    for loader in (data.train_dataloader(), data.val_dataloader()):
        assert data.transform(next(iter(loader))).input.is_contiguous()


def test_a_batch_does_not_write_to_the_file(path: Path) -> None:
    before = path.read_bytes()
    data = HDF5ImagesDataModule(path)
    data.arrays.input[0] = 0  # private to the process
    del data
    assert path.read_bytes() == before


def test_the_layout_of_the_shared_files(tmp_path: Path) -> None:
    """Chunked, gzip, one channel, numpy's texts, all samples in the training split."""
    path = tmp_path / "omniglot.h5"
    with h5py.File(path, "w") as file:
        image = np.random.default_rng(0).integers(0, 2, (40, 105, 105, 1)).astype(np.uint8) * 255
        file.create_dataset("image", data=image, chunks=(40, 105, 105, 1), compression="gzip", compression_opts=1)
        file["label"] = np.arange(40) // 20
        file["split"] = np.zeros(40, np.uint8)
        file["class_names"] = np.array(["Greek/01", "Greek/02"], dtype=h5py.string_dtype())
    data = HDF5ImagesDataModule(path, image_size=28, val_fraction=0.2)
    assert data.arrays.split.bincount().tolist() == [32, 8], "there is no validation split in the file, so it is held out"
    assert data.transform(next(iter(data.val_dataloader()))).input.shape == (8, 1, 28, 28)
    with pytest.raises(DataError, match="the test split is empty"):
        data.test_dataloader()


def test_without_names_and_split(tmp_path: Path) -> None:
    data = HDF5ImagesDataModule(write_images(tmp_path / "bare.h5", split=False, names=False))
    assert data.class_names == ["0", "1", "2", "3"]
    assert torch.equal(data.arrays.split, stratified_split(data.arrays.label, 0.1, 0.15, 0))
    other = HDF5ImagesDataModule(data.path, split_seed=5)
    assert not torch.equal(other.arrays.split, data.arrays.split)


def test_names_of_the_arrays_can_be_given(path: Path) -> None:
    with h5py.File(path, "a") as file:
        file["coarse"] = file["label"][:] // 2
        file["coarse_names"] = ["low", "high"]
    arrays, split = read_images(path, "coarse", "coarse_names")
    assert arrays.class_names == ("low", "high")
    assert arrays.label.unique().tolist() == [0, 1]
    assert split is not None
    assert not arrays.split.any()


@pytest.mark.parametrize("whole", ["u1", ">i2", "u4", "i8", "<f8"])
def test_any_width_and_byte_order_of_labels(path: Path, whole: str) -> None:
    before = HDF5ImagesDataModule(path).arrays
    for name, values in (("label", before.label), ("split", before.split)):
        change(path, name, values.numpy().astype(whole))
    after = HDF5ImagesDataModule(path).arrays
    assert torch.equal(after.label, before.label)
    assert torch.equal(after.split, before.split)


def test_path_resolves_home_and_variables(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGES", str(path.parent))
    monkeypatch.setenv("HOME", str(path.parent))
    monkeypatch.chdir(path.parent)
    for name in ("$IMAGES/images.h5", "~/images.h5", "images.h5"):
        data = HDF5ImagesDataModule(name)
        assert data.num_classes == 4
        assert data.arrays.mapped == path


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no file .*nothing\.h5: give the HDF5 file of the images with --data.path"):
        _ = HDF5ImagesDataModule(tmp_path / "nothing.h5").num_classes


@pytest.mark.parametrize("name", ["image", "label"])
def test_missing_keys(path: Path, name: str) -> None:
    change(path, name, None)
    with pytest.raises(DataError, match=rf"has no data set {name}; it holds: class_names"):
        _ = HDF5ImagesDataModule(path).num_classes


@pytest.mark.parametrize("storage", [{}, {"compression": "gzip"}])
@pytest.mark.parametrize("keep", [0.0, 0.05, 0.5, 0.95])
def test_truncated_file(tmp_path: Path, keep: float, storage: dict[str, Any]) -> None:
    path = write_images(tmp_path / "images.h5", **storage)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(DataError, match="cannot be read as HDF5"):
        _ = HDF5ImagesDataModule(path).num_classes


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("image", np.zeros((60, 12, 12, 3), np.float32), "image must be uint8 of shape"),
        ("image", np.zeros((60, 12, 12, 3), np.int8), "image must be uint8 of shape"),
        ("image", np.zeros((60, 3, 12, 12), np.uint8), r"with C = 1 or 3, it is uint8 \(60, 3, 12, 12\)"),
        ("image", np.zeros((60, 12, 12, 4), np.uint8), "with C = 1 or 3"),
        ("image", np.zeros((60, 12, 12), np.uint8), "with C = 1 or 3"),
        ("image", np.zeros((60, 0, 12, 3), np.uint8), "with C = 1 or 3"),
        ("image", np.zeros((0, 12, 12, 3), np.uint8), "with C = 1 or 3"),
        ("image", np.uint8(1), "with C = 1 or 3"),
        ("label", np.zeros(59, np.int32), r"label must have shape \(60,\)"),
        ("label", np.zeros((60, 1), np.int32), r"label must have shape \(60,\)"),
        ("label", np.full(60, 4), "labels run from 4 to 4, but there are 4 class names"),
        ("label", np.full(60, -2), "labels start at 0, but the lowest is -2"),
        ("label", np.full(60, 0.5), "label must hold whole numbers"),
        ("label", np.array([b"cat"] * 60), "label must be an array of numbers"),
        ("split", np.zeros(10, np.uint8), r"split must have shape \(60,\)"),
        ("split", np.full(60, 3, np.uint8), "split must be 0"),
        ("split", np.full(60, 256), "split must be 0 .*it holds 256"),
        ("split", np.full(60, 2, np.uint8), "no sample belongs to the training split"),
        ("class_names", np.zeros(4), "class_names must be a list of texts"),
    ],
)
def test_wrong_layout(path: Path, name: str, value: Any, message: str) -> None:
    change(path, name, value)
    with pytest.raises(DataError, match=message):
        _ = HDF5ImagesDataModule(path).num_classes


def test_a_group_is_no_array(path: Path) -> None:
    change(path, "image", None)
    with h5py.File(path, "a") as file:
        file.create_group("image")
    with pytest.raises(DataError, match="image must be uint8 of shape"):
        _ = HDF5ImagesDataModule(path).num_classes


def test_unknown_labels_only_where_they_are_expected(path: Path) -> None:
    with h5py.File(path, "a") as file:
        file["label"][:5] = -1
        elsewhere = int((file["split"][:5] != TRAIN).sum())
    with pytest.raises(DataError, match=f"{elsewhere} images for validation or test have no label, but -1"):
        _ = HDF5ImagesDataModule(path).num_classes
    with pytest.raises(DataError, match="labels start at 0, but the lowest is -1"):
        read_images(path)
    arrays, _ = read_images(path, unlabelled=True)
    assert arrays.label[:5].tolist() == [-1] * 5


@pytest.mark.parametrize("has_split", [True, False])
def test_images_without_a_label_train_and_change_nothing_for_the_others(tmp_path: Path, has_split: bool) -> None:
    settings: dict[str, Any] = {"val_fraction": 0.3, "train_fraction": 0.5}
    path = write_images(tmp_path / "images.h5")
    if not has_split:
        change(path, "split", None)
    labelled = HDF5ImagesDataModule(path, **settings)
    _ = labelled.arrays
    with h5py.File(path, "a") as file:
        more = {name: np.concatenate([file[name][:], file[name][:9]]) for name in file if name != "class_names"}
    more["label"][60:] = -1
    if has_split:
        more["split"][60:] = TRAIN
    for name, value in more.items():
        change(path, name, value)
    data = HDF5ImagesDataModule(path, **settings)
    assert torch.equal(data.arrays.split[:60], labelled.arrays.split)
    assert data.arrays.split[60:].tolist() == [TRAIN] * 9
    assert data.class_counts == labelled.class_counts
    assert data.num_train == labelled.num_train + 9


@pytest.mark.parametrize("names", [True, False])
def test_no_label_is_known(tmp_path: Path, names: bool) -> None:
    path = write_images(tmp_path / "images.h5", names=names)
    change(path, "label", np.full(60, -1))
    arrays, _ = read_images(path, unlabelled=True)
    assert arrays.class_names == (("class 0", "class 1", "class 2", "class 3") if names else ())


@pytest.mark.parametrize("split", [TRAIN, VAL, TEST])
def test_split_of_the_file_is_kept(path: Path, split: int) -> None:
    with h5py.File(path) as file:
        expected = np.flatnonzero(file["split"][:] == split).tolist()
    for settings in ({}, {"split_seed": 3}, {"val_fraction": 0.3, "test_fraction": 0.3}):
        assert HDF5ImagesDataModule(path, **settings).indices(split).tolist() == expected  # type: ignore[arg-type]


def test_images_that_were_never_written(tmp_path: Path) -> None:
    """A file whose images were never written has no block to map."""
    path = tmp_path / "hollow.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("image", (20, 4, 4, 3), np.uint8)
        file["label"] = np.arange(20) % 2
    data = HDF5ImagesDataModule(path)
    assert data.arrays.mapped is None
    assert not data.arrays.input.any()


def test_unknown_augmentation(path: Path) -> None:
    with pytest.raises(ValueError, match="one of none, standard, simclr"):
        HDF5ImagesDataModule(path, augmentation="cutmix")  # type: ignore[arg-type]
