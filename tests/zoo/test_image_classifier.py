"""The image classifier: its loss against the formula in float64, and in every way it is used."""

import ast
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import litzoo
from litzoo.zoo import Batch, ImageClassifier, image_classifier
from litzoo.zoo.pretrained import load_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def shaken(seed: int = 0, **settings: Any) -> ImageClassifier:
    """A small model whose BatchNorm statistics are not at their neutral start, and which logs nothing."""
    torch.manual_seed(seed)
    model = ImageClassifier(**{"num_classes": 5, "backbone": "conv4", "image_size": 16, **settings})
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2.0)
    return model.eval()


def silent(model: ImageClassifier) -> ImageClassifier:
    model.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    return model


def soft_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return -(target * (logits - logits.logsumexp(1, keepdim=True))).sum(1).mean()


# --- loss ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_loss_against_the_formula(smoothing: float) -> None:
    model = silent(shaken(label_smoothing=smoothing)).double()
    images, label = torch.randn(4, 3, 16, 16).double(), torch.tensor([0, 3, 4, 1])
    target = (1 - smoothing) * F.one_hot(label, 5) + smoothing / 5
    torch.testing.assert_close(model.training_step((images, label), 0), soft_cross_entropy(model(images), target))
    assert torch.equal(model.training_step((images, label), 0), model.training_step(Batch(images, label, torch.arange(4)), 0))
    with pytest.raises(TypeError, match="got Tensor"):
        model.training_step(images, 0)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("method", ["mixup", "cutmix"])
def test_mixing_against_the_formula(method: str, smoothing: float, monkeypatch: pytest.MonkeyPatch) -> None:
    model = silent(shaken(label_smoothing=smoothing, **{method: 1.0}))
    images, label = torch.rand(4, 3, 16, 16), torch.tensor([0, 3, 4, 1])
    seen: list[Tensor] = []
    original = model.forward

    def spy(mixed: Tensor) -> Tensor:
        seen.append(mixed)
        return original(mixed)

    monkeypatch.setattr(model, "forward", spy)
    loss = model.training_step((images, label), 0)
    (mixed,) = seen
    other, other_label = images.roll(1, 0), label.roll(1)
    if method == "mixup":  # the share is read off one pixel, and must then fit all
        share = ((mixed - other) / (images - other))[0, 0, 0, 0]
        torch.testing.assert_close(mixed, share * images + (1 - share) * other, rtol=1e-4, atol=1e-5)
    else:
        pasted = (mixed == other).all(dim=1)
        assert torch.equal(pasted, pasted[:1].expand_as(pasted)), "one box for the whole batch"
        rows, columns = (int(pasted[0].any(dim).sum()) for dim in (1, 0))
        assert pasted[0].sum() == rows * columns
        assert torch.equal(mixed, torch.where(pasted[:, None], other, images))
        share = 1 - pasted[0].float().mean()
    target = share * F.one_hot(label, 5) + (1 - share) * F.one_hot(other_label, 5)
    torch.testing.assert_close(loss, soft_cross_entropy(original(mixed), (1 - smoothing) * target + smoothing / 5), rtol=1e-4, atol=1e-5)
    # Training accuracy counts against the image's own label.
    expected = (original(mixed).argmax(1) == label).float().mean()
    assert model.train_accuracy.compute() == expected


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("kind", ["balanced", "effective"])
def test_class_weights_against_the_formula(kind: Any, smoothing: float, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = [3, 50, 11, 7, 40]
    model = silent(shaken(label_smoothing=smoothing, class_counts=counts, class_weights=kind, effective_beta=0.95)).double()
    images, label = torch.randn(4, 3, 16, 16).double(), torch.tensor([0, 3, 4, 1])
    effective = torch.tensor([1 / count if kind == "balanced" else 0.05 / (1 - 0.95**count) for count in counts], dtype=torch.float64)
    weight = effective * (111 / 5 if kind == "balanced" else 5 / effective.sum())
    torch.testing.assert_close(model.class_weight, weight, rtol=1e-6, atol=0)
    log_p = model(images).log_softmax(dim=1)
    terms = -weight * ((1 - smoothing) * F.one_hot(label, 5) + smoothing / 5) * log_p
    torch.testing.assert_close(model.training_step((images, label), 0), terms.sum() / weight[label].sum(), rtol=1e-6, atol=0)
    # Of mixed images, with targets of several classes, the mean over the batch.
    mixed = torch.rand(4, 5, dtype=torch.float64).softmax(dim=1)
    monkeypatch.setattr(image_classifier, "mix_images", lambda images, *_: (images, mixed))
    terms = -weight * ((1 - smoothing) * mixed + smoothing / 5) * log_p
    torch.testing.assert_close(model.training_step((images, label), 0), terms.sum() / 4, rtol=1e-6, atol=0)
    assert "class_weight" not in model.state_dict()


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_class_weights_in_every_precision(precision: Any) -> None:
    model = shaken(class_counts=[1, 2, 3, 4, 5], class_weights="effective", mixup=0.2)
    loader = DataLoader(TensorDataset(torch.randn(8, 3, 16, 16), torch.arange(8) % 5), 4)
    trainer = Trainer(max_epochs=1, precision=precision, accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit(model, loader)
    model.mixup = 0.0
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model, loader)
    assert bool(trainer.callback_metrics["train/loss"].isfinite())


def test_views_train_like_so_many_images(monkeypatch: pytest.MonkeyPatch) -> None:
    views, label = torch.randn(3, 2, 3, 16, 16), torch.tensor([0, 3, 4])
    flat, flat_label = views.flatten(0, 1), label.repeat_interleave(2)
    a, b = silent(shaken()).double().train(), silent(shaken()).double().train()
    torch.testing.assert_close(a.training_step((views.double(), label), 0), b.training_step((flat.double(), flat_label), 0))
    assert torch.equal(a.train_accuracy.compute(), b.train_accuracy.compute())
    # Mixing pairs an image with another image, not with its own second view.
    pair = silent(shaken(mixup=1.0))
    shown: list[Tensor] = []
    monkeypatch.setattr(image_classifier, "mix_images", lambda images, label, *_: (shown.append(label), (images, label))[1])
    pair.training_step((views, label), 0)
    assert shown[0].tolist() == [0, 3, 4, 0, 3, 4]
    with pytest.raises(ValueError, match=r"\(batch, 3, height, width\), got \(3, 2, 3, 16, 16\)"):
        pair.validation_step((views, label), 0)


# --- structure -------------------------------------------------------------------------------------------------------


def test_shapes_and_layout() -> None:
    model = ImageClassifier(num_classes=7, backbone="resnet20", in_channels=1).eval()
    images = torch.randn(2, 1, 32, 32)
    assert model.encode(images).shape == (2, 64)
    torch.testing.assert_close(model(images), model.head(model.backbone(images)), rtol=1e-4, atol=1e-5)
    resnet = ImageClassifier(num_classes=7)
    assert resnet.hparams["backbone"] == {"name": "resnet18", "in_channels": 3, "stem": "small"}
    layouts = []
    resnet.backbone.network.layer4.register_forward_hook(
        lambda module, args, out: layouts.append(out.is_contiguous(memory_format=torch.channels_last))
    )
    assert resnet(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    assert layouts == [True]


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 1, 16, 16), (2, 16, 16, 3)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"the model takes images of shape \(batch, 3, height, width\)"):
        shaken()(torch.zeros(shape))


def test_dropout_comes_before_the_linear_layer() -> None:
    model = shaken(dropout=1.0)
    images = torch.randn(2, 3, 16, 16)
    assert not torch.equal(model(images), model.head.bias.expand(2, 5))
    assert torch.equal(model.train()(images), model.head.bias.expand(2, 5))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"num_classes": 1}, "num_classes must be at least 2, got 1"),
        ({"class_names": ["a"]}, "class_names has 1 entries, but num_classes is 5"),
        ({"image_mean": [0.5, 0.5, 0.5]}, "image_mean and image_std go together"),
        ({"image_mean": [0.5], "image_std": [0.5]}, "image_mean has 1 entries, but in_channels is 3"),
        ({"image_mean": [0.5] * 3, "image_std": [0.5, 0, 0.5]}, "image_std must be positive"),
        ({"dropout": 1.5}, r"dropout must lie in \[0, 1\], got 1.5"),
        ({"label_smoothing": -0.1}, "label_smoothing must lie in"),
        ({"mixup": -1.0}, r"mixup must lie in \[0, 100\]"),
        ({"cutmix": float("nan")}, "cutmix must lie in"),
        ({"backbone": "resnet19"}, "there is no backbone 'resnet19'"),
        ({"backbone": "conv4", "pretrained": True}, "no pretrained weights of 'conv4'"),
        ({"backbone": {"name": "conv4", "in_channels": 1}}, "in_channels is 3, but that of the backbone is 1"),
        ({"backbone": {"name": "vit_tiny_patch16_224", "image_size": 64}}, "image_size is 16, but that of the backbone is 64"),
    ],
)
def test_impossible_settings_are_refused(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        shaken(**setting)


def test_torchvision_is_imported_when_it_is_needed() -> None:
    tree = ast.parse(Path(image_classifier.__file__).read_text())
    heads = {
        node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
        for node in tree.body
        if isinstance(node, (ast.Import, ast.ImportFrom))
    }
    assert not {name for name in heads if name and name.split(".")[0] in ("timm", "torchvision")}


# --- predict ---------------------------------------------------------------------------------------------------------


def test_predict_takes_raw_images() -> None:
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
    model = shaken(image_mean=mean, image_std=std).train()
    raw = torch.randint(256, (3, 3, 16, 16), dtype=torch.uint8)
    probability = model.predict(raw)
    assert model.training, "predict leaves the mode as it was"
    assert not probability.requires_grad
    assert probability.dtype == torch.float32
    model.eval()
    normalised = (raw.double() / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    expected = model(normalised.float()).softmax(1)
    torch.testing.assert_close(probability, expected)
    torch.testing.assert_close(model.predict(raw.double() / 255), expected)
    torch.testing.assert_close(model.predict(list(raw)), expected)
    torch.testing.assert_close(model.predict(raw[0]), expected[:1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_predict_in_true_precisions(dtype: torch.dtype) -> None:
    """As a trainer with 64-true or bf16-true leaves the model."""
    model, images = shaken(), torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    expected = model.predict(images)
    found = model.to(dtype).predict(images)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02)


def test_predict_brings_images_to_size_as_torchvision_does() -> None:
    from torchvision import transforms

    model = shaken()
    images = [torch.rand(3, 40, 60), torch.rand(3, 16, 16), torch.rand(3, 9, 12), torch.rand(3, 90, 30)]
    resize = transforms.Resize((16, 16), antialias=True)
    squares = [resize(transforms.CenterCrop(min(image.shape[1:]))(image)) for image in images]
    torch.testing.assert_close(model.predict(images), model(torch.stack(squares)).softmax(1))
    free = shaken(image_size=None)
    torch.testing.assert_close(free.predict(images)[0], free(images[0][None]).softmax(1)[0])
    torch.testing.assert_close(free.predict(images)[3], free(images[3][None]).softmax(1)[0])


def test_predict_adapts_the_channels() -> None:
    grey, colour = torch.rand(2, 1, 16, 16), torch.rand(2, 3, 16, 16)
    model, grey_model = shaken(), shaken(in_channels=1)
    torch.testing.assert_close(model.predict(grey), model(torch.cat([grey] * 3, 1)).softmax(1))
    luma = 0.2989 * colour[:, :1] + 0.587 * colour[:, 1:2] + 0.114 * colour[:, 2:]
    torch.testing.assert_close(grey_model.predict(colour), grey_model(luma).softmax(1), rtol=1e-3, atol=1e-4)
    assert shaken(in_channels=4).predict(torch.rand(4, 16, 16)).shape == (1, 5)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(3, 16, 16) * 255, "go beyond: divide them by 255"),
        (torch.full((3, 16, 16), float("nan")), "go beyond"),
        (torch.ones(3, 16, 16, dtype=torch.int64), "in uint8, or in float from 0 to 1, got torch.int64"),
        (torch.rand(16, 16), r"got \(16, 16\)"),
        (torch.rand(4, 16, 16), r"got \(1, 4, 16, 16\)"),
        (torch.rand(0, 3, 16, 16), r"got \(0, 3, 16, 16\)"),
        ([], "there are no images"),
    ],
)
def test_what_predict_refuses(images: Any, message: str) -> None:
    model = shaken().train()
    with pytest.raises(ValueError, match=message):
        model.predict(images)
    assert model.training


# --- use -------------------------------------------------------------------------------------------------------------


def trainer(folder: Path, **settings: Any) -> Trainer:
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    return Trainer(**{"accelerator": "cpu", "devices": 1, "max_epochs": 1, "default_root_dir": folder, **quiet, **settings})


def loader(batch_size: int = 4) -> DataLoader[Any]:
    torch.manual_seed(1)
    return DataLoader(TensorDataset(torch.randn(12, 3, 16, 16), torch.arange(12) % 5), batch_size=batch_size)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("mixing", [{}, {"mixup": 0.2, "cutmix": 1.0, "label_smoothing": 0.1}])
def test_trains_on_pairs(precision: Any, mixing: dict[str, float], tmp_path: Path) -> None:
    model = shaken(**mixing)
    before = {name: value.clone() for name, value in model.named_parameters()}
    run = trainer(tmp_path, precision=precision)
    run.fit(model.train(), loader(), loader())
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert all(value.dtype == torch.float32 for value in model.parameters())
    assert all(not torch.equal(value, before[name]) for name, value in model.named_parameters())
    logged = {
        "train/loss",
        "train/accuracy",
        *(f"val/{name}" for name in ("loss", "accuracy", "mean_class_accuracy", "mcc", "calibration_error")),
    }
    assert logged <= set(run.callback_metrics)
    assert run.callback_metrics["train/loss"].dtype == torch.float32
    (scores,) = run.test(model, loader(), verbose=False)
    assert scores["test/accuracy"] == pytest.approx(float(run.validate(model, loader(), verbose=False)[0]["val/accuracy"]))


def test_learns_what_can_be_learned(tmp_path: Path) -> None:
    torch.manual_seed(0)
    label = torch.arange(80) % 5
    images = torch.randn(80, 3, 16, 16) * 0.3 + torch.randn(5, 3, 1, 1)[label]
    data = DataLoader(TensorDataset(images, label), batch_size=20, shuffle=True)
    model = shaken(optimizer=lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9))
    run = trainer(tmp_path, max_epochs=10)
    run.fit(model.train(), data)
    assert run.validate(model, data, verbose=False)[0]["val/accuracy"] > 0.95


def test_evaluation_gives_logits_and_labels() -> None:
    model = silent(shaken())
    images, label = next(iter(loader()))
    for step in (model.validation_step, model.test_step):
        result = step((images, label), 0)
        assert torch.equal(result["logits"], model(images))
        assert torch.equal(result["label"], label)
    for batch in (images, (images, label), Batch(images, label, torch.arange(4))):
        torch.testing.assert_close(model.predict_step(batch, 0), model(images).softmax(1))


# --- what is stored --------------------------------------------------------------------------------------------------


def test_pretrained_is_used_once_and_never_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    create = timm.create_model

    def download(name: str, pretrained: bool, **settings: Any) -> torch.nn.Module:
        asked.append(pretrained)
        return create(name, **settings)

    monkeypatch.setattr(timm, "create_model", download)
    model = ImageClassifier(num_classes=5, backbone="test_resnet", image_size=16, pretrained=True, class_names=list("abcde"))
    assert asked == [True]

    run = trainer(tmp_path)
    run.fit(model, loader())
    run.save_checkpoint(tmp_path / "model.ckpt")
    litzoo.save(model.eval(), tmp_path / "model.safetensors", {}, half=False)

    stored = torch.load(tmp_path / "model.ckpt", weights_only=True)["hyper_parameters"]
    assert stored["pretrained"] is False
    assert stored["backbone"] == {"name": "test_resnet", "in_channels": 3, "stem": "small"}
    assert type(stored["backbone"]) is dict
    assert not {"optimizer", "lr_scheduler"} & set(stored)
    assert model.hparams_initial["pretrained"] is False

    asked.clear()
    images = torch.randn(2, 3, 16, 16)
    for loaded in (
        ImageClassifier.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True).eval(),
        load_checkpoint(tmp_path / "model.ckpt", model="ImageClassifier"),
        litzoo.load(tmp_path / "model.safetensors"),
    ):
        assert torch.equal(loaded(images), model(images))
        assert loaded.class_names == list("abcde")
        assert loaded.hparams == model.hparams
    assert set(asked) == {False}


def test_hyper_parameters_of_the_command_line_are_resolved_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning.pytorch import LightningModule
    from lightning.pytorch.cli import LightningCLI

    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **settings: create(name, **settings))
    arguments = ["--model=litzoo.zoo.ImageClassifier", "--model.num_classes=3", "--model.pretrained=true", "--model.image_size=48"]
    arguments += ["--model.backbone={name: test_resnet, drop_path_rate: 0.1}", "--trainer.logger=false"]
    monkeypatch.setattr("sys.argv", ["litzoo", *arguments])
    cli = LightningCLI(LightningModule, run=False, subclass_mode_model=True, auto_configure_optimizers=False, seed_everything_default=False)
    assert cli.model.hparams["pretrained"] is False
    assert cli.model.hparams["backbone"] == {"name": "test_resnet", "in_channels": 3, "stem": "small", "drop_path_rate": 0.1}
    assert type(cli.model.hparams["backbone"]) is dict
    assert cli.model.hparams["_class_path"] == "litzoo.zoo.ImageClassifier"
    assert cli.model.hparams["image_size"] == 48


def test_vision_transformer_is_built_for_the_size_of_the_images(tmp_path: Path) -> None:
    model = ImageClassifier(num_classes=3, backbone={"name": "test_vit", "patch_size": 4}, image_size=24).eval()
    litzoo.save(model, tmp_path / "vit.safetensors", {}, half=False)
    images = torch.randn(2, 3, 24, 24)
    assert torch.equal(litzoo.load(tmp_path / "vit.safetensors")(images), model(images))


# --- in training -------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_fit_after_validate(tmp_path: Path) -> None:
    model = shaken(optimizer=lambda params: torch.optim.SGD(params, lr=0.01), lr_scheduler=None)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(accelerator="cpu", max_epochs=1, default_root_dir=tmp_path, **quiet)
    batches = DataLoader([(torch.randn(4, 3, 16, 16), torch.arange(4))] * 2, batch_size=None)
    trainer.validate(model, batches, verbose=False)
    trainer.test(model, batches, verbose=False)
    trainer.fit(model, batches, batches)


def test_stored_images_and_images_too_small_are_refused_with_a_cure() -> None:
    with pytest.raises(ValueError, match="give the trainer the DataModule itself"):
        shaken()(torch.zeros(2, 3, 16, 16, dtype=torch.uint8))
    with pytest.raises(ValueError, match="'conv4' cannot take images of 4 x 4 pixels"):
        ImageClassifier(5, backbone="conv4", image_size=4)
