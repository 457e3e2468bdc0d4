"""Scikit-learn's digits: the same images, the same test split for everybody."""

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from litzoo.datamodules import DigitsDataModule
from litzoo.datamodules.splits import TEST, TRAIN, UNUSED, VAL


def test_the_images_of_scikit_learn() -> None:
    data = DigitsDataModule(image_size=8)
    expected = load_digits()
    assert data.arrays.input.shape == (1797, 1, 8, 8)
    assert data.arrays.input.dtype == torch.uint8
    assert (data.arrays.input[:, 0].numpy() == np.rint(expected.images / 16 * 255)).all()
    assert data.arrays.label.tolist() == expected.target.tolist()
    assert data.class_names == [str(digit) for digit in expected.target_names]
    assert (data.in_channels, data.image_size) == (1, 8)


@pytest.mark.parametrize("size", [4, 11, 32])
def test_enlarged_as_pillow_does(size: int) -> None:
    small, data = DigitsDataModule(image_size=8).arrays.input, DigitsDataModule(image_size=size)
    assert data.image_size == size
    for index in range(0, 1797, 100):
        expected = Image.fromarray(small[index, 0].numpy()).resize((size, size), Image.Resampling.BILINEAR)
        assert np.abs(data.arrays.input[index, 0].numpy().astype(int) - np.asarray(expected)).max() <= 1


def test_the_default_trains_and_evaluates_at_32_pixels() -> None:
    data = DigitsDataModule(views=2, batch_size=16)
    train, val = (data.transform(next(iter(loader))) for loader in (data.train_dataloader(), data.val_dataloader()))
    assert train.input.shape == (16, 2, 1, 32, 32)
    assert val.input.shape == (29, 1, 32, 32)


def test_splits() -> None:
    data = DigitsDataModule()
    label = data.arrays.label
    for cls, count in enumerate(label.bincount().tolist()):
        found = data.arrays.split[label == cls].bincount(minlength=3).tolist()
        test = round(count * 0.2)
        assert found == [count - test - round((count - test) * 0.1), round((count - test) * 0.1), test]


@pytest.mark.parametrize("settings", [{"split_seed": 1}, {"val_fraction": 0.3}, {"train_fraction": 0.1}, {"seed": 5}, {"image_size": 8}])
def test_the_test_split_is_the_same_for_everybody(settings: dict[str, float]) -> None:
    plain, other = DigitsDataModule(), DigitsDataModule(**settings)  # type: ignore[arg-type]
    assert torch.equal(plain.indices(TEST), other.indices(TEST))
    assert ("split_seed" not in settings) == bool(torch.isin(other.indices(TRAIN), plain.indices(TRAIN)).all())
    if "train_fraction" in settings:
        assert torch.equal(plain.indices(VAL), other.indices(VAL))
        assert other.num_train + len(other.indices(UNUSED)) == plain.num_train


def test_default_augmentation_does_not_mirror() -> None:
    augmentation = DigitsDataModule().augmentation
    assert augmentation.flip == 0
    assert 0 < augmentation.rotation <= 15
