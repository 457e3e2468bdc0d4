"""The furniture that ships with litzoo."""

import hashlib

import h5py
import pytest
import torch

from litzoo.datamodules import FurnitureDataModule
from litzoo.datamodules.arrays import TEST, TRAIN, VAL
from litzoo.datamodules.furniture import FURNITURE


@pytest.fixture(scope="module")
def data() -> FurnitureDataModule:
    return FurnitureDataModule()


def test_objects_and_classes(data: FurnitureDataModule) -> None:
    assert tuple(data.arrays.input.shape) == (261, 2048, 3)
    assert data.num_classes == len(data.class_names) == 11
    assert data.class_names == sorted(data.class_names)
    assert data.arrays.label.bincount().tolist() == [15, 15, 28, 10, 49, 17, 16, 18, 23, 51, 19]


def test_split(data: FurnitureDataModule) -> None:
    assert [len(data.indices(split)) for split in (TRAIN, VAL, TEST)] == [194, 28, 39]
    for split in (TRAIN, VAL, TEST):
        assert data.arrays.label[data.indices(split)].unique().tolist() == list(range(11)), "every class is in every split"
    assert sum(data.class_counts) == data.num_train == 194


def test_no_object_is_there_twice(data: FurnitureDataModule) -> None:
    flat = data.arrays.input.float().flatten(1)
    assert len(flat.unique(dim=0)) == 261


def test_fingerprint() -> None:
    """Weights and numbers in the README belong to this file; another one needs them made anew."""
    assert hashlib.sha256(FURNITURE.read_bytes()).hexdigest() == "c43d3823b3ef38d8303ddd4943ef12157ddfb9f6027a2223ce58814413660545"


def test_licences_travel_with_the_data() -> None:
    licence = FURNITURE.with_name("furniture_LICENSE.txt").read_text()
    assert "CC-BY" in licence or "Creative Commons" in licence
    authors = FURNITURE.with_name("furniture_AUTHORS.txt").read_text()
    with h5py.File(FURNITURE) as file:
        creators = file["creator"].asstr()[:]
        assert len(creators) == 261
        assert all(creators)
        assert [creator for creator in sorted(set(creators)) if creator not in authors] == []
        for collection in {path.split("/")[0] for path in file["path"].asstr()[:]}:
            assert f"Files: {collection}/*" in licence, f"the licence file does not cover {collection}"
    assert FURNITURE.stat().st_size < 4 * 2**20


def test_transformed_batches(data: FurnitureDataModule) -> None:
    train = data.transform(next(iter(data.train_dataloader())))
    val = data.transform(next(iter(data.val_dataloader())))
    assert train.input.shape == (32, 1024, 3)
    assert val.input.shape == (28, 2048, 3)
    torch.testing.assert_close(val.input.norm(dim=-1).amax(1), torch.ones(28))
    assert train.input.isfinite().all()
