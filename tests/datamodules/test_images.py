"""What all image data sets share: which images train, how they are normalised, what a model gets."""

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.model_selection import train_test_split
from torch import Tensor
from torchvision.transforms import v2

from litzoo.datamodules import Arrays, DataError, DigitsDataModule, ImageAugmentation, ImageDataModule
from litzoo.datamodules.splits import TEST, TRAIN, UNUSED, VAL
from litzoo.zoo import Batch

COUNTS = (100, 50, 20, 9)


class Noise(ImageDataModule):
    """Random images; class c has `COUNTS[c]` of them."""

    def __init__(self, shape: tuple[int, int, int] = (3, 8, 8), split: Tensor | None = None, **settings: Any) -> None:
        super().__init__(**settings)
        self.shape = shape
        self.given = split

    def read(self) -> Arrays:
        label = torch.arange(len(COUNTS)).repeat_interleave(torch.tensor(COUNTS))
        label = label[torch.randperm(len(label), generator=torch.Generator().manual_seed(0))]
        image = torch.randint(0, 256, (len(label), *self.shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
        image = (image // torch.arange(1, self.shape[0] + 1, dtype=torch.uint8)[:, None, None]) + 3
        return Arrays(image, label, self.finish_split(label, self.given), tuple("abcd"))


def per_class(data: ImageDataModule, split: int) -> list[int]:
    return data.arrays.label[data.indices(split)].bincount(minlength=len(COUNTS)).tolist()


# --- which images train -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("val", "test"), [(0.1, 0.0), (0.2, 0.3), (0.0, 0.5), (0.0, 0.0)])
def test_fractions_without_a_split(val: float, test: float) -> None:
    data = Noise(val_fraction=val, test_fraction=test)
    assert per_class(data, VAL) == [round(count * val) for count in COUNTS]
    assert per_class(data, TEST) == [round(count * test) for count in COUNTS]
    assert per_class(data, UNUSED) == [0, 0, 0, 0]


def test_as_stratified_as_scikit_learn() -> None:
    data = Noise(val_fraction=0.2)
    _, expected = train_test_split(np.arange(sum(COUNTS)), test_size=0.2, stratify=data.arrays.label.numpy(), random_state=0)
    of_library = data.arrays.label[torch.from_numpy(expected)].bincount(minlength=len(COUNTS))
    assert (of_library - torch.tensor(per_class(data, VAL))).abs().max() <= 1


def test_validation_is_held_out_from_training_alone() -> None:
    official = torch.zeros(sum(COUNTS), dtype=torch.uint8)
    official[::3] = TEST
    seen = set()
    for seed in range(5):
        data = Noise(split=official, val_fraction=0.25, test_fraction=0.5, split_seed=seed)
        assert torch.equal(data.indices(TEST), (official == TEST).nonzero().squeeze(1))
        train = data.arrays.label[official == TRAIN].bincount().tolist()
        assert per_class(data, VAL) == [round(count * 0.25) for count in train]
        assert data.num_train == sum(train) - len(data.indices(VAL))
        seen.add(tuple(data.indices(VAL).tolist()))
    assert len(seen) == 5
    assert torch.equal(official, torch.where(torch.arange(sum(COUNTS)) % 3 == 0, TEST, TRAIN).to(torch.uint8)), (
        "the given split is not written to"
    )


def test_official_validation_is_kept() -> None:
    official = (torch.arange(sum(COUNTS)) % 3).to(torch.uint8)
    data = Noise(split=official, val_fraction=0.4, test_fraction=0.4, split_seed=3)
    assert torch.equal(data.arrays.split, official)


def test_train_fractions_are_nested_and_stratified() -> None:
    whole = Noise(val_fraction=0.2, test_fraction=0.1)
    larger = set(whole.indices(TRAIN).tolist())
    for fraction in (0.7, 0.5, 0.2, 0.1, 0.001):
        data = Noise(val_fraction=0.2, test_fraction=0.1, train_fraction=fraction)
        assert per_class(data, TRAIN) == data.class_counts == [max(1, round(count * fraction)) for count in whole.class_counts]
        smaller = set(data.indices(TRAIN).tolist())
        assert smaller < larger
        larger = smaller
        for split in (VAL, TEST):
            assert torch.equal(data.indices(split), whole.indices(split))
        assert len(data.indices(UNUSED)) == whole.num_train - data.num_train
    other = Noise(val_fraction=0.2, test_fraction=0.1, train_fraction=0.2, split_seed=1)
    assert set(other.indices(TRAIN).tolist()) != set(Noise(val_fraction=0.2, test_fraction=0.1, train_fraction=0.2).indices(TRAIN).tolist())


# --- normalisation ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_moments_are_those_of_the_training_images(channels: int) -> None:
    data = Noise(shape=(channels, 6, 7), val_fraction=0.4, image_size=6)
    train = data.arrays.input[data.indices(TRAIN)].numpy() / 255
    assert data.image_mean == pytest.approx(train.mean((0, 2, 3)), abs=5.1e-5)
    assert data.image_std == pytest.approx(train.std((0, 2, 3)), abs=5.1e-5)
    elsewhere = data.arrays.input[data.indices(VAL)].numpy() / 255
    assert data.image_mean != pytest.approx(elsewhere.mean((0, 2, 3)), abs=5.1e-5), "the comparison can fail"
    assert all(isinstance(value, float) for value in (*data.image_mean, *data.image_std))
    assert pickle.loads(pickle.dumps(data)).image_mean == data.image_mean


def test_published_and_given_moments() -> None:
    class Published(Noise):
        published_mean, published_std = (0.5, 0.4, 0.3), (0.2, 0.2, 0.1)

    assert Published().image_mean == [0.5, 0.4, 0.3]
    assert Published().image_std == [0.2, 0.2, 0.1]
    half = Published(mean=[0.1, 0.1, 0.1])
    assert (half.image_mean, half.image_std) == ([0.1, 0.1, 0.1], [0.2, 0.2, 0.1])
    measured = Noise(std=(1.0, 1.0, 1.0))
    assert (measured.image_mean, measured.image_std) == (Noise().image_mean, [1.0, 1.0, 1.0])


def test_a_channel_without_contrast_is_not_blown_up() -> None:
    class Flat(Noise):
        def read(self) -> Arrays:
            arrays = super().read()
            return Arrays(torch.full_like(arrays.input, 77), arrays.label, arrays.split, arrays.class_names)

    data = Flat()
    assert min(data.image_std) == pytest.approx(1 / 255, abs=5e-5)
    assert data.transform(next(iter(data.val_dataloader()))).input.abs().max() < 0.1


@pytest.mark.parametrize("name", ["mean", "std"])
def test_moments_of_other_channels_are_refused(name: str) -> None:
    data = Noise(**{name: [0.5]})
    with pytest.raises(DataError, match=f"{name} has 1 values, but the images have 3 channels"):
        _ = data.image_mean


# --- what a model gets --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("height", "width", "size"), [(8, 8, 8), (32, 32, 12), (30, 30, 7), (12, 12, 20), (20, 44, 9), (51, 25, 25), (33, 24, 30), (64, 40, 5)]
)
@pytest.mark.parametrize("channels", [1, 3])
def test_evaluation_equals_torchvision(height: int, width: int, size: int, channels: int) -> None:
    data = Noise(shape=(channels, height, width), image_size=size, augmentation="simclr", views=2, eval_batch_size=7)
    expected = v2.Compose(
        [
            v2.ToDtype(torch.float32, scale=True),
            v2.CenterCrop(min(height, width)),
            v2.Resize(size, antialias=True),
            v2.Normalize(data.image_mean, data.image_std),
        ]
    )
    for loader in (data.val_dataloader(), data.eval_train_dataloader()):
        batch = data.transform(next(iter(loader)))
        assert batch.input.dtype == torch.float32
        assert batch.input.is_contiguous()
        torch.testing.assert_close(batch.input, expected(data.arrays.input[batch.index]), rtol=0, atol=1e-5)


def test_training_without_augmentation_is_evaluation() -> None:
    data = Noise(shape=(3, 14, 18), image_size=9, augmentation="none")
    batch = next(iter(data.train_dataloader()))
    torch.testing.assert_close(data.transform(batch).input, data.transform(batch._replace(key=None)).input, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("views", "shape"), [(1, (16, 3, 8, 8)), (2, (16, 2, 3, 8, 8)), (5, (16, 5, 3, 8, 8))])
def test_views(views: int, shape: tuple[int, ...]) -> None:
    augmentation = ImageAugmentation(crop_scale=(0.3, 1.0))
    data = Noise(shape=(3, 12, 12), image_size=8, views=views, augmentation=augmentation, batch_size=16)
    batch = data.transform(next(iter(data.train_dataloader())))
    assert batch.input.shape == shape
    if views > 1:
        assert not torch.equal(batch.input[:, 0], batch.input[:, 1])
    assert data.transform(next(iter(data.val_dataloader()))).input.dim() == 4
    assert torch.equal(data.transform(next(iter(data.train_dataloader()))).input, batch.input)


def test_what_is_linked_to_the_model() -> None:
    data = Noise(shape=(1, 10, 10))
    assert (data.in_channels, data.image_size, data.num_classes) == (1, 10, 4)
    assert len(data.image_mean) == len(data.image_std) == 1
    assert Noise(shape=(3, 10, 14), image_size=6).image_size == 6


def test_a_size_is_needed_for_images_that_are_not_square() -> None:
    with pytest.raises(DataError, match=r"10 x 14 pixels, say to what square: --data\.image_size"):
        _ = Noise(shape=(3, 10, 14)).image_size


def test_balanced_training_draws_every_class_equally_often() -> None:
    data = Noise(balanced=True, batch_size=30)
    label = torch.cat([batch.label for batch in data.train_dataloader()])
    assert label.bincount().tolist() == pytest.approx([len(label) / 4] * 4, abs=4)
    evaluation = torch.cat([batch.index for batch in data.eval_train_dataloader()])
    assert torch.equal(evaluation, data.indices(TRAIN))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"augmentation": "cutout"}, "one of none, standard"),
        ({"views": 0}, "views and image_size must be at least 1"),
        ({"image_size": 0}, "views and image_size must be at least 1"),
        ({"train_fraction": 0.0}, "train_fraction must lie in"),
        ({"train_fraction": 1.5}, "train_fraction must lie in"),
        ({"val_fraction": 1.0}, "sum to less than 1"),
        ({"val_fraction": 0.6, "test_fraction": 0.4}, "sum to less than 1"),
        ({"test_fraction": -0.1}, "must be at least 0"),
        ({"std": [1.0, 0.0, 1.0]}, "std must be positive"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_impossible_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Noise(**settings)


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]
)
def test_transform_stays_on_its_device(device: str) -> None:
    data = Noise(shape=(3, 12, 10), image_size=8)
    for loader in (data.train_dataloader(), data.val_dataloader()):
        batch = next(iter(loader))
        moved = data.transform(Batch(*(None if values is None else values.to(device) for values in batch)))
        assert moved.input.device.type == device
        torch.testing.assert_close(moved.input.cpu(), data.transform(batch).input, rtol=0, atol=1e-4)


def test_samples_change_their_split_and_label_from_the_next_loader_on() -> None:
    data = DigitsDataModule(batch_size=16)
    split, label = data.arrays.split.clone(), data.arrays.label.clone()
    mean, before = data.image_mean, data.fingerprint
    chosen = data.train_index[:40]
    split[data.train_index] = 3
    split[chosen] = 0
    label[chosen[:5]] = -1
    data.reassign(split=split, label=label)
    batches = list(data.train_dataloader())
    assert len(batches) == 2
    assert set(torch.cat([batch.index for batch in batches]).tolist()) <= set(chosen.tolist())
    assert data.num_train == 40
    assert sum(data.class_counts) == 35
    assert data.image_mean == mean
    assert data.fingerprint != before
    split[:], label[:] = 1, 0
    assert data.num_train == 40, "what becomes of the given tensors later changes nothing"
    assert sum(data.class_counts) == 35


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"split": torch.zeros(3, dtype=torch.uint8)}, "one number for each of 1797 samples"),
        ({"label": torch.full((1797,), 10)}, "label must lie in -1 to 9, got 10 to 10"),
        ({"split": torch.full((1797,), 4)}, "split must lie in 0 to 3"),
        ({"split": torch.full((1797,), 2)}, "leaves no sample to train on"),
    ],
)
def test_an_impossible_reassignment_changes_nothing(given: dict[str, torch.Tensor], reason: str) -> None:
    data = DigitsDataModule()
    before = data.arrays
    with pytest.raises(ValueError, match=reason):
        data.reassign(**given)
    assert data.arrays is before
