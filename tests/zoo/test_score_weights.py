"""`litzoo test --ckpt_path WEIGHTS`: the number of a card by one command."""

import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer

import litzoo
from litzoo.datamodules import DigitsDataModule
from litzoo.zoo import EncoderClassifier, ImageClassifier
from litzoo.zoo.cli import main
from litzoo.zoo.cli.runs import read_rows


def scores(runs: Path, recipe: str, weights: str, *options: str) -> dict[str, float]:
    """What `litzoo test` logs."""
    quiet = ["--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu", "--trainer.callbacks", "null"]
    assert main(["test", "--config", recipe, "--ckpt_path", weights, "--trainer.default_root_dir", str(runs), *quiet, *options]) == 0
    (row,) = read_rows(runs / recipe / "test_0" / "metrics.csv")
    return {name.removeprefix("test/"): float(value) for name, value in row.items() if name.startswith("test/")}


def test_bundled_weights_score_what_their_card_says(tmp_path: Path) -> None:
    expected = litzoo.zoo.pretrained.read_header("pointnet_furniture")["card"]["metrics"]
    assert scores(tmp_path, "pointnet_furniture", "pointnet_furniture") == pytest.approx(expected, abs=2e-3)


def test_classifier_on_an_encoder_brings_it_and_its_normalisation(tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder = ImageClassifier(3, backbone="conv4", in_channels=1, image_size=16, image_mean=[0.25], image_std=[0.5])
    litzoo.save(encoder, tmp_path / "encoder.safetensors", {})
    classifier = EncoderClassifier(str(tmp_path / "encoder.safetensors"), 10)
    torch.nn.init.normal_(classifier.head.weight)
    litzoo.save(classifier, tmp_path / "classifier.safetensors", {}, half=False)
    (tmp_path / "encoder.safetensors").unlink()
    found = scores(tmp_path, "supcon_digits_classifier", str(tmp_path / "classifier.safetensors"), "--data.image_size", "16")

    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    data = DigitsDataModule(augmentation="none", image_size=16, mean=[0.25], std=[0.5])
    (expected,) = Trainer(accelerator="cpu", **off).test(classifier, data, verbose=False)
    assert {f"test/{name}": value for name, value in found.items()} == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("recipe", "options", "words"),
    [
        ("classifier_digits", [], "holds PointNetClassifier, but the configuration names ImageClassifier"),
        ("pointnet_furniture", ["--data.normalization", "unit_box"], "learned from data whose normalization is unit_sphere"),
        ("pointnet_furniture", ["--ckpt_path", "pointnet_furnitur"], "a name of `litzoo list`"),
        ("pointnet_furniture", ["--ckpt_path", "nowhere.safetensors"], "nowhere.safetensors does not exist"),
    ],
)
def test_says_what_does_not_fit(recipe: str, options: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--ckpt_path", "pointnet_furniture", "--trainer.default_root_dir", str(tmp_path), *options]
    assert main(["test", "--config", recipe, *given]) == 2
    assert words in capsys.readouterr().err
    assert not list(tmp_path.glob("*/*"))


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root folder of a short run of another model."""
    root = tmp_path_factory.mktemp("runs")
    short = [
        "--trainer.max_epochs",
        "2",
        "--trainer.limit_train_batches",
        "1",
        "--trainer.limit_val_batches",
        "1",
        "--trainer.callbacks",
        "null",
    ]
    quiet = ["--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu", "--trainer.default_root_dir", str(root)]
    assert main(["fit", "--config", "classifier_digits", *short, *quiet]) == 0
    return root


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["fit", "--config", "classifier_digits", "--ckpt_path", "last", "--trainer.max_epochs", "1"], "has had 2 epochs"),
        (["test", "--config", "instdisc_digits", "--ckpt_path", "LAST"], "holds ImageClassifier, but the configuration names InstanceDisc"),
        (
            ["fit", "--config", "linear_eval", "--data", "FurnitureDataModule", "--model.encoder", "LAST"],
            "but FurnitureDataModule has none",
        ),
        (["report", "classifier_digit"], "did you mean classifier_digits?"),
        (["embed", "--config", "classifier_digits", "--model", "tim:resnet18", "--output", "x.h5"], "timm:NAME"),
    ],
)
def test_says_what_does_not_fit_of_a_run(
    digits_run: Path, command: list[str], words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").symlink_to(digits_run)
    last = digits_run / "classifier_digits" / "version_0" / "checkpoints" / "last.ckpt"
    before = sorted(digits_run.rglob("*"))
    assert main([str(last) if argument == "LAST" else argument for argument in command]) == 2
    assert words in capsys.readouterr().err
    assert sorted(digits_run.rglob("*")) == before, "a command that was refused leaves nothing behind"


def test_every_card_names_a_shipped_recipe() -> None:
    from litzoo.zoo.cli import recipe_path

    index = json.loads((Path(litzoo.__file__).parent / "zoo" / "weights" / "index.json").read_text(encoding="utf-8"))
    assert all(Path(recipe_path(entry["card"]["recipe"])).is_file() for entry in index.values())
