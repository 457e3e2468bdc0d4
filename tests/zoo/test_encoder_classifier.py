"""The classifier of any encoder: cached training against training on the batches, heads against oracles, round trips, mistakes."""

import csv
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, LearningRateFinder, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.cli import ReduceLROnPlateau
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner import Tuner
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.functional.classification import binary_auroc

import litzoo
from litzoo.callbacks import EMA, SAM, ConfusionMatrixPlot, DiscriminativeLR, GradualUnfreeze, PerClassTable, StepSeed
from litzoo.datamodules import DigitsDataModule, HDF5PointsDataModule, PatientsDataModule
from litzoo.datamodules.arrays import Arrays
from litzoo.datamodules.augment.points import PointAugmentation
from litzoo.zoo import EncoderClassifier, ImageClassifier, InstanceDiscrimination, LogisticRegression
from litzoo.zoo.cli import main
from litzoo.zoo.feature_cache import FeatureCache
from litzoo.zoo.layers.feature_heads import LinearHead
from litzoo.zoo.pretrained import WeightsError, load_checkpoint, resolve_encoder

QUIET: dict[str, Any] = {
    **dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False),
    "accelerator": "cpu",
    "devices": 1,
}
MOMENTS: dict[str, Any] = {"image_mean": [0.3], "image_std": [0.4]}
ENCODER: dict[str, Any] = {
    "model": "ImageClassifier",
    "hparams": {"num_classes": 2, "backbone": "conv4", "in_channels": 1, "image_size": 8, **MOMENTS},
}
HASTY: dict[str, Any] = {"factor": 0.5, "patience": 0, "threshold": 0.99}
LARGE_STEPS: Any = lambda params: torch.optim.SGD(params, lr=10.0, momentum=0.9)


def data_of(kind: type[DigitsDataModule] = DigitsDataModule, **settings: Any) -> DigitsDataModule:
    known = {"augmentation": "none", "image_size": 8, "batch_size": 64, "train_fraction": 0.5, "seed": 0, "mean": [0.3], "std": [0.4]}
    return kind(**{**known, **settings})


def model_of(**settings: Any) -> EncoderClassifier:
    torch.manual_seed(0)
    return EncoderClassifier(**{"encoder": ENCODER, "num_classes": 10, "optimizer": LARGE_STEPS, **settings})


def fit(model: EncoderClassifier, data: Any = None, ckpt_path: Any = None, **settings: Any) -> Trainer:
    trainer = Trainer(**{**QUIET, "max_epochs": 3, **settings})
    trainer.fit(model, datamodule=data or data_of(), ckpt_path=ckpt_path)
    return trainer


def rows_of(path: str | Path) -> list[dict[str, str]]:
    with Path(path).open(newline="") as file:
        return list(csv.DictReader(file))


def tensors(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items() if isinstance(value, Tensor)}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def raw_digits(*classes: int) -> Tensor:
    values, label = load_digits(return_X_y=True)
    return torch.from_numpy(values[np.isin(label, classes)] / 16).float().view(-1, 1, 8, 8)


# Training on cached features


@pytest.mark.parametrize(
    ("of_model", "of_data", "of_trainer"),
    [
        ({}, {}, {}),
        ({}, {"balanced": True}, {}),
        ({}, {}, {"limit_train_batches": 3}),
        ({}, {}, {"limit_train_batches": 0.5}),
        ({}, {}, {"overfit_batches": 2}),
        ({}, {}, {"max_steps": 13}),
        ({"lr_scheduler": None, "label_smoothing": 0.1}, {}, {}),
        ({"lr_scheduler": lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)}, {}, {}),
        ({"lr_scheduler": lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 5.0, total_steps=30)}, {}, {}),
        ({"lr_scheduler": None, "optimizer": lambda params: torch.optim.LBFGS(params, lr=0.1, max_iter=2)}, {}, {}),
    ],
)
def test_cached_training_equals_training_on_the_batches(
    of_model: dict[str, Any], of_data: dict[str, Any], of_trainer: dict[str, Any]
) -> None:
    """The same minibatches, steps, rates and logged numbers, in float64."""
    found = []
    for cache in (True, False):
        model = model_of(cache_features=cache, **of_model)
        trainer = fit(model, data_of(**of_data), precision="64-true", **of_trainer)
        assert trainer.log_every_n_steps == 50
        assert trainer.limit_train_batches == of_trainer.get("limit_train_batches", trainer.overfit_batches or 1.0)
        rates = [group["lr"] for group in trainer.optimizers[0].param_groups]
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        if "max_steps" in of_trainer:  # training on the batches breaks off without a last validation
            metrics = {name: value for name, value in metrics.items() if name.startswith("train")}
        if "optimizer" in of_model:  # and counts every evaluation of a step
            metrics = {name: value for name, value in metrics.items() if name.startswith("val")}
        found.append((tensors(model.head), metrics, (trainer.global_step, rates)))
    (weights, metrics, steps), (weights_2, metrics_2, steps_2) = found
    assert steps == steps_2
    assert metrics == pytest.approx(metrics_2, abs=1e-6)
    torch.testing.assert_close(weights, weights_2, rtol=1e-5, atol=1e-7)  # images are normalised in float32, and in another order
    assert weights["weight"].abs().max() > 0


def test_plateau_and_callbacks_see_every_epoch(tmp_path: Path) -> None:
    model = model_of(lr_scheduler=lambda optimizer: ReduceLROnPlateau(optimizer, "val/loss", **HASTY), cache_features=True)
    best, monitor = ModelCheckpoint(tmp_path / "best", monitor="val/loss", save_top_k=-1), LearningRateMonitor()
    stop = EarlyStopping("val/accuracy", mode="max", patience=100)
    trainer = fit(
        model,
        max_epochs=4,
        callbacks=[best, monitor, stop],
        enable_checkpointing=True,
        logger=CSVLogger(tmp_path),
        default_root_dir=tmp_path,
    )
    rows = rows_of(tmp_path / "lightning_logs" / "version_0" / "metrics.csv")
    assert len([row for row in rows if row["val/accuracy"]]) == len([row for row in rows if row["train/loss"]]) == 4
    rates = [float(row["lr-SGD"]) for row in rows if row["lr-SGD"]]
    assert rates == [10.0, 10.0, 5.0, 2.5], "factor 0.5 after every epoch that is not better by half"
    assert len(list((tmp_path / "best").glob("*.ckpt"))) == 4
    assert trainer.global_step == 4 * 10


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_frozen_encoder_stays_to_the_bit(cache: bool, precision: str) -> None:
    model = model_of(cache_features=cache)
    before = tensors(model.encoder)
    fit(model, precision=precision, max_epochs=2)
    assert same(before, tensors(model.encoder))
    model.train()
    assert model.training
    assert not any(layer.training for layer in model.encoder.modules())
    assert not any(parameter.requires_grad for parameter in model.encoder.parameters())
    assert model.head.weight.abs().max() > 0


class Interrupt(Callback):
    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        if not trainer.sanity_checking and trainer.current_epoch == 1:
            raise KeyboardInterrupt


@pytest.mark.parametrize("lr", [None, "auto"])
def test_resumed_equals_uninterrupted(lr: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = model_of(lr=lr)
    fit(whole, max_epochs=4)
    saving = ModelCheckpoint(tmp_path, filename="last", save_on_train_epoch_end=True)
    cut = model_of(lr=lr)
    trainer = Trainer(**{**QUIET, "enable_checkpointing": True, "max_epochs": 4, "callbacks": [saving, Interrupt()]})
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        trainer.fit(cut, datamodule=data_of())
    assert trainer.log_every_n_steps == 50, "an interrupted trainer is as it was, too"
    resumed = model_of(lr=lr)
    caplog.clear()
    with caplog.at_level(logging.INFO):
        trainer = fit(resumed, ckpt_path=tmp_path / "last.ckpt", max_epochs=4)
    assert same(tensors(whole), tensors(resumed))
    assert trainer.global_step == 40
    assert whole.lr == resumed.lr
    assert isinstance(resumed.lr, float) is (lr == "auto")
    assert "range test" not in caplog.text


def test_what_stands_against_the_cache() -> None:
    cases: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ("augmented", {}, {"augmentation": "randaugment"}),
        ("augmented", {}, {"views": 2}),
        ("accumulated or clipped", {"accumulate_grad_batches": 2}, {}),
        ("accumulated or clipped", {"gradient_clip_val": 1.0}, {}),
        ("within an epoch", {"val_check_interval": 0.5}, {}),
        ("EMA acts", {"callbacks": [EMA()]}, {}),
        ("SAM acts", {"callbacks": [SAM()]}, {}),
        ("LearningRateFinder acts", {"callbacks": [LearningRateFinder()]}, {}),
        ("ModelCheckpoint acts", {"callbacks": [ModelCheckpoint(every_n_train_steps=7)], "enable_checkpointing": True}, {}),
    ]
    for message, trainer, data in cases:
        with pytest.raises(ValueError, match=f"features cannot be cached, because .*{message}"):
            fit(model_of(cache_features=True), data_of(**data), **trainer)
        with pytest.raises(ValueError, match=f"lr auto .*{message}.* LearningRateFinder"):
            fit(model_of(lr="auto"), data_of(**data), **trainer)
    model = model_of()
    trainer = fit(model, data_of(views=2), callbacks=[EMA(), StepSeed()], max_epochs=1)
    assert trainer.global_step == 10
    assert model.automatic_optimization


def test_validation_is_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    encode = ImageClassifier.encode
    monkeypatch.setattr(ImageClassifier, "encode", lambda self, images: calls.append(len(images)) or encode(self, images))
    data = data_of()
    fit(model_of(), data, max_epochs=5)
    assert sum(calls) == len(data.train_index) + len(data.indices(1))


def test_fast_dev_run_trains_a_batch() -> None:
    for settings in ({}, {"cache_features": True}, {"lr": "auto"}, {"head": "knn"}, {"head": "class_means"}):
        trainer = fit(model_of(**settings), fast_dev_run=True)
        assert trainer.global_step == 1


def test_data_that_augment(points_file: Callable[..., Path]) -> None:
    assert not data_of().augments
    assert not PatientsDataModule().augments
    assert data_of(augmentation="standard").augments
    assert data_of(views=2).augments
    neutral = PointAugmentation(scale=(1.0, 1.0), shift=0.0)
    assert not HDF5PointsDataModule(points_file(), augmentation=neutral, num_points=None).augments
    for settings in ({}, {"num_points": None}, {"augmentation": neutral, "num_points": None, "eval_points": 32}):
        assert HDF5PointsDataModule(points_file(), **settings).augments


# The learning rate


def test_range_test_finds_a_rate_that_learns() -> None:
    """Two clusters: the best rate falls with the square of the scale of the features."""
    found = []
    for scale in (0.2, 4.0):
        cache = FeatureCache(data_of(), 1.0)
        generator = torch.Generator().manual_seed(0)
        index = data_of().train_index
        label = torch.arange(len(index)) % 2
        features = scale * (torch.randn(len(index), 8, generator=generator) + 2 * F.one_hot(label, 8))
        cache.fill(features, label, index)
        head = LinearHead(8, 2)
        found.append(cache.find_lr(head, torch.optim.SGD(head.parameters(), lr=1.0), 0.0))
    assert 0.1 < found[0] < 30
    assert found[0] > 20 * found[1]


def test_lightnings_finder_sets_the_rate() -> None:
    finder = LearningRateFinder(min_lr=1e-3, max_lr=30, num_training_steps=30)
    model = model_of(lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0))
    trainer = fit(model, callbacks=[finder], max_epochs=4)
    assert finder.optimal_lr is not None
    assert model.lr == finder.optimal_lr.suggestion() != 10.0
    assert trainer.optimizers[0].param_groups[0]["lr"] == model.lr, "the scheduler has it too"


def test_lightnings_tuner_before_a_cached_fit() -> None:
    model = model_of(lr_scheduler=None)
    trainer = Trainer(**{**QUIET, "max_epochs": 4})
    found = Tuner(trainer).lr_find(model, datamodule=data_of(), min_lr=1e-3, max_lr=30, num_training=30)
    assert found is not None
    trainer.fit(model, datamodule=data_of())
    assert trainer.optimizers[0].param_groups[0]["lr"] == model.lr == found.suggestion()
    trainer.test(model, data_of(), verbose=False)
    assert trainer.global_step == 40, "on cached features, also after a test"
    assert not model.automatic_optimization


# Fine-tuning


def test_fine_tuning_has_two_rates() -> None:
    model = model_of(freeze=False, lr=0.2, encoder_lr_factor=0.25, lr_scheduler=None)
    before = tensors(model.encoder)
    trainer = fit(model, data_of(augmentation="randaugment"), max_epochs=1)
    assert {group["name"]: group["lr"] for group in trainer.optimizers[0].param_groups} == {"encoder": 0.05, "head": 0.2}
    after = tensors(model.encoder)
    changed = {name.partition(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"backbone"}, "but not the encoder's own classes"
    assert model.encoder.training is model.training


@pytest.mark.parametrize("callback", [DiscriminativeLR(2.0), GradualUnfreeze()])
def test_fine_tuning_with_callbacks(callback: Callback) -> None:
    model = model_of(freeze=False, lr=0.1, encoder_lr_factor=1.0, lr_scheduler=None)
    before = tensors(model)
    trainer = fit(model, callbacks=[callback], max_epochs=1)
    rates = {group["name"]: group["lr"] for group in trainer.optimizers[0].param_groups}
    still = [
        name
        for name, _ in model.encoder.backbone.named_parameters()
        if torch.equal(before[f"encoder.backbone.{name}"], model.state_dict()[f"encoder.backbone.{name}"])
    ]
    if isinstance(callback, DiscriminativeLR):
        assert rates == {"encoder/encoder": 0.05, "head/head": 0.1}
        assert not still
    else:
        assert len(still) == len(list(model.encoder.backbone.parameters())), "the first epoch trains the head"


# Heads without gradient, and strangeness


def features_of(model: EncoderClassifier, data: DigitsDataModule, split: int) -> tuple[np.ndarray, np.ndarray]:
    index = data.indices(split)
    images = (data.arrays.input[index].float() / 255 - 0.3) / 0.4
    with torch.no_grad():
        return F.normalize(model.eval().encode(images), dim=1).double().numpy(), data.arrays.label[index].numpy()


@pytest.mark.parametrize("head", ["knn", "class_means"])
def test_heads_without_gradient(head: Any, tmp_path: Path) -> None:
    model, data = model_of(head=head, k=3), data_of()
    before = tensors(model.encoder)
    odd: dict[str, Any] = {"val_check_interval": 3, "check_val_every_n_epoch": 2}  # there is one epoch of one batch, and it is validated
    trainer = fit(model, data, max_epochs=7, enable_checkpointing=True, default_root_dir=tmp_path, **odd)
    assert "val/accuracy" in trainer.callback_metrics
    assert odd.items() <= vars(trainer).items()
    assert trainer.current_epoch == 1
    assert trainer.global_step == 1
    assert same(before, tensors(model.encoder))
    (bank, label), (query, truth) = features_of(model, data, 0), features_of(model, data, 2)
    if head == "knn":
        votes = KNeighborsClassifier(3, weights=lambda distance: np.exp((1 - distance**2 / 2) / 0.1), algorithm="brute").fit(bank, label)
        expected, cosine = votes.predict_proba(query), np.sort(query @ bank.T)[:, -3]
    else:
        means = np.stack([bank[label == cls].mean(0) for cls in range(10)])
        cosines = query @ (means / np.linalg.norm(means, axis=1, keepdims=True)).T
        expected, cosine = torch.from_numpy(cosines / 0.1).softmax(1).numpy(), cosines.max(1)
    raw = data.arrays.input[data.indices(2)]
    np.testing.assert_allclose(model.predict(raw).numpy(), expected, atol=2e-5)
    np.testing.assert_allclose(model.ood_score(raw).numpy(), 1 - cosine, atol=1e-5)
    tested = trainer.test(ckpt_path="best", datamodule=data, verbose=False)[0]
    assert tested["test/accuracy"] == pytest.approx((expected.argmax(1) == truth).mean())
    assert math.isfinite(tested["test/loss"])
    litzoo.save(model, tmp_path / "head.safetensors", {}, half=False)
    torch.testing.assert_close(litzoo.load(tmp_path / "head.safetensors").predict(raw), model.predict(raw))


class HalfLabelled(DigitsDataModule):
    def read(self) -> Arrays:
        arrays = super().read()
        arrays.label[arrays.split == 0] = torch.where(
            torch.arange(int((arrays.split == 0).sum())) % 2 > 0, -1, arrays.label[arrays.split == 0]
        )
        return arrays


def test_training_samples_without_label() -> None:
    model = model_of(head="knn", k=1)
    fit(model, data_of(HalfLabelled))
    assert len(model.head.votes.labels) == sum(data_of(HalfLabelled).class_counts) < data_of(HalfLabelled).num_train
    with pytest.raises(ValueError, match="training samples have no label: a linear classifier cannot"):
        fit(model_of(), data_of(HalfLabelled))


class FirstDigits(DigitsDataModule):
    """Only 0 to 6 are trained on, or validated."""

    def read(self) -> Arrays:
        arrays = super().read()
        arrays.split[(arrays.label > 6) & (arrays.split < 2)] = 3
        return arrays


@pytest.fixture(scope="module")
def encoder_of_first_digits(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    model = ImageClassifier(10, backbone="conv4", in_channels=1, image_size=8, **MOMENTS)
    Trainer(max_epochs=6, **QUIET).fit(model, datamodule=data_of(FirstDigits, train_fraction=1.0))
    path = tmp_path_factory.mktemp("encoder") / "first.safetensors"
    litzoo.save(model, path, {})
    return str(path)


@pytest.mark.parametrize("head", ["linear", "knn", "class_means"])
def test_noise_and_unseen_digits_are_stranger(head: Any, encoder_of_first_digits: str) -> None:
    data = data_of(FirstDigits, train_fraction=1.0)
    model = EncoderClassifier(encoder_of_first_digits, 10, head=head, k=5)
    fit(model, data, max_epochs=10)
    images, label = data.arrays.input[data.indices(2)], data.arrays.label[data.indices(2)]
    noise = torch.randint(0, 256, (200, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for strange in (images[label > 6], noise):
        known = images[label <= 6]
        scores = torch.cat([model.ood_score(known), model.ood_score(strange)])
        assert scores.shape == (len(known) + len(strange),)
        assert scores.dtype == torch.float32
        area = float(binary_auroc(scores, torch.arange(len(scores)) >= len(known)))
        assert area > 0.8


# Encoders of every kind, and round trips


def test_the_bank_of_the_encoder_is_left_behind(tmp_path: Path) -> None:
    """A checkpoint and a weights file of the classifier hold no bank, load anywhere, and predict the same."""
    data = data_of()
    encoder = InstanceDiscrimination(data.num_train, backbone="conv4", in_channels=1, image_size=8, knn=5, **MOMENTS)
    trainer = Trainer(max_epochs=1, **QUIET)
    trainer.fit(encoder, datamodule=data)
    trainer.save_checkpoint(tmp_path / "encoder.ckpt")
    checkpoint = torch.load(tmp_path / "encoder.ckpt", weights_only=True)
    checkpoint["hyper_parameters"]["_class_path"] = "litzoo.zoo.InstanceDiscrimination"  # as the command line writes it
    torch.save(checkpoint, tmp_path / "encoder.ckpt")
    assert len(checkpoint["state_dict"]["bank._extra_state"]["rows"]) == data.num_train

    model = EncoderClassifier(str(tmp_path / "encoder.ckpt"), 10, optimizer=LARGE_STEPS)
    torch.testing.assert_close(tensors(model.encoder), tensors(encoder), rtol=0, atol=0, equal_nan=True)
    trainer = fit(model)
    trainer.save_checkpoint(tmp_path / "classifier.ckpt")
    saved = torch.load(tmp_path / "classifier.ckpt", weights_only=True)
    assert len(saved["state_dict"]["encoder.bank._extra_state"]["rows"]) == 0
    assert saved["hyper_parameters"]["encoder"]["model"] == "InstanceDiscrimination"
    assert not [key for key in saved["state_dict"] if "metrics" in key]
    (tmp_path / "encoder.ckpt").unlink()

    digits = raw_digits(*range(10))[:50]
    again = load_checkpoint(tmp_path / "classifier.ckpt", model="EncoderClassifier")
    torch.testing.assert_close(again.predict(digits), model.predict(digits))
    litzoo.save(again, tmp_path / "classifier.safetensors", {})
    loaded = litzoo.load_encoder(tmp_path / "classifier.safetensors")
    torch.testing.assert_close(loaded.predict(digits), model.predict(digits), atol=5e-3, rtol=0)
    # A classifier is an encoder itself.
    nested = EncoderClassifier(str(tmp_path / "classifier.safetensors"), 10, head="class_means")
    assert nested.num_features == model.num_features
    fit(nested)
    torch.testing.assert_close(nested.eval().encode(digits), loaded.encode(digits))


def test_same_random_weights_from_a_description() -> None:
    first, second = model_of(), model_of()
    assert same(tensors(first), tensors(second))
    state = torch.get_rng_state()
    resolve_encoder("pointnet_furniture")
    assert torch.equal(state, torch.get_rng_state())


def test_bundled_encoder_of_clouds(points_file: Callable[..., Path], tmp_path: Path) -> None:
    neutral = PointAugmentation(scale=(1.0, 1.0), shift=0.0)
    data = HDF5PointsDataModule(points_file(), augmentation=neutral, num_points=None, batch_size=16)
    model = EncoderClassifier("pointnet_furniture", 4, class_names=list("abcd"), lr=0.003)
    assert model.input_kind == "points"
    assert model.normalization == "unit_sphere"
    trainer = fit(model, data, max_epochs=10, default_root_dir=tmp_path, callbacks=[PerClassTable(), ConfusionMatrixPlot()])
    assert not model.automatic_optimization
    assert trainer.test(model, data, verbose=False)[0]["test/accuracy"] > 0.5
    cloud = torch.rand(200, 3)
    found = model.predict(cloud)
    assert found.shape == (1, 4)
    torch.testing.assert_close(model.predict([5 * cloud + 3, cloud]), found.repeat(2, 1), atol=1e-4, rtol=0)
    assert model.ood_score(cloud).shape == (1,)
    augmented = HDF5PointsDataModule(data.path, num_points=32, batch_size=16)
    fit(EncoderClassifier("pointnet_furniture", 4, head="class_means"), augmented)
    wrong = HDF5PointsDataModule(data.path, normalization="unit_box")
    with pytest.raises(ValueError, match=r"with normalization unit_sphere, but that of the data is unit_box: set data\.normalization"):
        fit(EncoderClassifier("pointnet_furniture", 4), wrong)


def test_encoder_of_vectors() -> None:
    description = {"model": "LogisticRegression", "hparams": {"num_features": 3, "num_classes": 2}}
    model = EncoderClassifier(description, 5)
    assert model.predict(torch.rand(7, 3)).shape == (7, 5)
    assert model.input_kind is None


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"mean": [0.5]}, r"trained with image_mean \[0.3\], but that of the data is \[0.5\]: set data.mean"),
        ({"std": [0.2]}, "set data.std"),
        ({"image_size": 16}, "trained with image_size 8, but that of the data is 16"),
    ],
)
def test_images_that_the_encoder_was_not_made_for(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(model_of(), data_of(**setting))
    with pytest.raises(ValueError, match=message):
        Trainer(**QUIET).validate(model_of(), data_of(**setting), verbose=False)
    fit(model_of(), data_of(mean=[0.305]), max_epochs=1)


def test_the_encoder_of_another_classifier_is_meant(tmp_path: Path) -> None:
    """One that is frozen there would pass no gradient on."""
    first = model_of()
    litzoo.save(first, tmp_path / "first.safetensors", {}, half=False)
    model = model_of(encoder=str(tmp_path / "first.safetensors"), freeze=False, lr=0.1)
    assert isinstance(model.encoder, ImageClassifier)
    assert model.hparams["encoder"] == first.hparams["encoder"]
    assert same(tensors(model.encoder), tensors(first.encoder))
    fit(model, max_epochs=1)
    assert not same(tensors(model.encoder.backbone), tensors(first.encoder.backbone))


def test_more_classes_than_the_model_has() -> None:
    with pytest.raises(ValueError, match="the data have 10 classes, but num_classes of the model is 5"):
        fit(model_of(num_classes=5))


def test_plain_loaders() -> None:
    images, label = torch.randn(32, 2, 1, 8, 8), torch.arange(32) % 10
    loader = DataLoader(TensorDataset(images, label), batch_size=16)
    model = model_of()
    Trainer(max_epochs=1, **QUIET).fit(model, loader)
    assert model.head.weight.abs().max() > 0
    with pytest.raises(ValueError, match="give a DataModule with eval_train_dataloader"):
        Trainer(max_epochs=1, **QUIET).fit(model_of(head="knn"), loader)
    with pytest.raises(ValueError, match="call fit"):
        model_of(head="knn").predict(torch.rand(1, 8, 8))
    with pytest.raises(ValueError, match="no class means"):
        model_of(head="class_means").predict(torch.rand(1, 8, 8))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"num_classes": 1}, "num_classes must be at least 2"),
        ({"class_names": ["a"]}, "class_names has 1 entries, but num_classes is 10"),
        ({"head": "svm"}, "head must be one of linear, knn, class_means"),
        ({"label_smoothing": 2.0}, "label_smoothing must lie in"),
        ({"k": 0}, "k must be at least 1"),
        ({"lr": -1.0}, "lr must be positive"),
        ({"lr": "fast"}, "lr must be positive"),
        ({"head": "knn", "lr": 0.1}, "learns nothing by gradient"),
        ({"head": "class_means", "freeze": False}, "takes the encoder as it is"),
        ({"freeze": False, "lr": "auto"}, "cannot be cached"),
        ({"encoder": "pointnet_furnitur"}, "did you mean pointnet_furniture"),
        ({"encoder": "missing.ckpt"}, "missing.ckpt does not exist"),
        ({"encoder": {"model": "ImageClassifier"}}, "an encoder is described as"),
        ({"encoder": {"model": "ResNet", "hparams": {}}}, "'ResNet' is not one of litzoo's models"),
        ({"encoder": {"model": "ImageClassifier", "hparams": {"num_clases": 2}}}, "does not take its hparams"),
    ],
)
def test_impossible_settings_are_refused(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model_of(**setting)


def test_checkpoints_that_are_no_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "foreign.ckpt"
    torch.save({"state_dict": {}, "hyper_parameters": {"_class_path": "theirs.Net"}}, path)
    with pytest.raises(WeightsError, match=r"holds a theirs\.Net, which is not one of litzoo's models"):
        model_of(encoder=str(path))
    litzoo.save(LogisticRegression(), tmp_path / "headless.safetensors", {})
    monkeypatch.setattr(LogisticRegression, "encode", None)
    with pytest.raises(WeightsError, match="has no encode"):
        model_of(encoder=str(tmp_path / "headless.safetensors"))


# Two processes

PROCESSES = """
import torch
from test_encoder_classifier import QUIET, data_of, model_of, tensors
from lightning.pytorch import Trainer

out = sys.argv[1]
model = model_of()
before = tensors(model.encoder)
trainer = Trainer(**{**QUIET, "devices": 2, "strategy": "ddp", "precision": "64-true", "max_epochs": 2})
trainer.fit(model, datamodule=data_of(batch_size=32))
assert all(torch.equal(before[name].double(), value.double()) for name, value in tensors(model.encoder).items())
if trainer.is_global_zero:
    torch.save({"head": tensors(model.head), "steps": trainer.global_step}, out)
"""


def test_two_processes_equal_one(tmp_path: Path, two_processes: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a cache, the shards of the global batch; with it, that batch."""
    script = tmp_path / "train.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n{PROCESSES}")
    two_processes(script, tmp_path / "result")
    model = model_of(cache_features=True)
    trainer = fit(model, data_of(batch_size=64), precision="64-true", max_epochs=2)
    found = torch.load(tmp_path / "result")
    assert found["steps"] == trainer.global_step
    torch.testing.assert_close(found["head"], tensors(model.head), rtol=1e-5, atol=1e-7)
    monkeypatch.setattr(Trainer, "world_size", 2)
    with pytest.raises(ValueError, match=r"made in one process: set trainer\.devices to 1"):
        fit(model_of(head="knn"))
    with pytest.raises(ValueError, match="cannot be cached, because there are several processes"):
        fit(model_of(cache_features=True))


# The command line


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """From an encoder trained without labels to classes of pictures; interrupted, resumed, exported."""
    monkeypatch.chdir(tmp_path)
    quick = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
    small = ["--data.image_size", "8", "--data.train_fraction", "0.3"]
    assert main(["fit", "--config", "instdisc_digits", *quick, *small, "--trainer.callbacks", "[]", "--trainer.max_epochs", "1"]) == 0
    encoder = "runs/instdisc_digits/version_0/checkpoints/last.ckpt"
    settings = {
        "seed_everything": 1,
        "trainer": {"max_epochs": 3},
        "model": {"class_path": "EncoderClassifier", "init_args": {"encoder": encoder, "lr": "auto"}},
        "data": {"class_path": "DigitsDataModule", "init_args": {"augmentation": "none", "image_size": 8, "train_fraction": 0.3}},
    }
    Path("linear.yaml").write_text(yaml.safe_dump(settings))
    command = ["--config", "linear.yaml", *quick]
    assert main(["fit", *command, "--name", "whole"]) == 0
    constant = ["--model.lr_scheduler", "null", "--name"]
    assert main(["fit", *command, *constant, "straight"]) == 0
    assert main(["fit", *command, *constant, "cut", "--trainer.max_epochs", "1"]) == 0
    assert main(["fit", *command, *constant, "cut", "--ckpt_path", "last"]) == 0
    weights = {name: torch.load(f"runs/{name}/version_0/checkpoints/last.ckpt", weights_only=True) for name in ("whole", "straight", "cut")}
    assert same_states(weights["straight"]["state_dict"], weights["cut"]["state_dict"])
    assert weights["whole"]["hyper_parameters"]["encoder"]["model"] == "InstanceDiscrimination"
    assert weights["whole"]["hyper_parameters"]["encoder"]["hparams"]["backbone"]["name"] == "conv4"
    assert weights["whole"]["hyper_parameters"]["class_names"] == [str(digit) for digit in range(10)]
    assert weights["whole"]["found_lr"] == weights["cut"]["found_lr"] > 0
    rows = rows_of("runs/whole/version_0/metrics.csv")
    assert len([row for row in rows if row["val/accuracy"]]) == 3
    assert any(row["lr-SGD"] for row in rows)
    assert main(["test", *command, "--name", "whole"]) == 0

    assert main(["fit", *command, "--name", "whole", "--trainer.max_epochs", "4", "--ckpt_path", "last"]) == 0
    assert torch.load("runs/whole/version_0/checkpoints/last.ckpt", weights_only=True)["epoch"] == 3
    assert main(["fit", *command, "--name", "near", "--model.head", "knn", "--model.k", "1", "--model.lr", "null"]) == 0
    assert main(["test", *command, "--name", "near", "--model.head", "knn", "--model.k", "1", "--model.lr", "null"]) == 0
    near = "runs/near/version_0/checkpoints/last.ckpt"
    Path(encoder).unlink()
    assert main(["export", near, "--output", "near.safetensors"]) == 0
    np.save("digits.npy", (255 * raw_digits(3)[:5]).byte().permute(0, 2, 3, 1).numpy())
    capsys.readouterr()
    assert main(["predict", "digits.npy", "--model", "near.safetensors", "--ood-score", "--output", "classes.csv", "--top", "1"]) == 0
    predicted = rows_of("classes.csv")
    assert list(predicted[0]) == ["file", "index", "class_1", "confidence_1", "ood_score"]
    assert [row["class_1"] for row in predicted].count("3") >= 4
    assert main(["predict", "digits.npy", "--model", near]) == 0
    assert main(["predict", "digits.npy", "--model", "pointnet_furniture", "--ood-score"]) == 2
    assert "gives no such score: leave it out" in capsys.readouterr().err
    assert main(["fit", *command]) == 2
    assert f"{encoder} does not exist" in capsys.readouterr().err


def same_states(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(
        torch.allclose(value, other[name], rtol=0, atol=0, equal_nan=True) for name, value in one.items() if isinstance(value, Tensor)
    )
