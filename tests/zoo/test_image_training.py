"""Training images from the command line: what the data tell the model, the precision, resume, and what a checkpoint knows."""

from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

import litzoo
from litzoo.datamodules import DigitsDataModule
from litzoo.zoo.cli import main, precision
from litzoo.zoo.cli.precision import cpu_multiplies_bf16, native_precision

FAST = [
    *("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"),
    *("--trainer.limit_train_batches", "3", "--trainer.limit_val_batches", "1", "--trainer.callbacks", "[]"),
]


@pytest.fixture
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def checkpoint(run: str) -> dict:
    return torch.load(Path("runs") / run / "checkpoints" / "last.ckpt", weights_only=True)


def test_data_tell_the_model_their_images(inside: Path) -> None:
    arguments = ["--config", "classifier_digits", "--data.image_size", "16", "--data.mean", "[0.25]", "--data.std", "[0.5]"]
    assert main(["fit", *arguments, *FAST, "--trainer.max_epochs", "1", "--model.class_weights", "effective"]) == 0
    known = checkpoint("classifier_digits/version_0")["hyper_parameters"]
    assert (known["in_channels"], known["image_size"], known["num_classes"]) == (1, 16, 10)
    assert (known["image_mean"], known["image_std"]) == ([0.25], [0.5])
    assert (known["class_counts"], known["class_weights"]) == (DigitsDataModule().class_counts, "effective")
    assert known["backbone"]["name"] == "conv4"
    path = inside / "digits.safetensors"
    assert main(["export", "runs/classifier_digits/version_0/checkpoints/last.ckpt", "--output", str(path)]) == 0
    model = litzoo.load(path)
    picture = torch.randint(0, 256, (1, 40, 30), dtype=torch.uint8)
    assert model.predict(picture).shape == (1, 10)
    assert litzoo.load_encoder(path).encode(torch.rand(2, 1, 16, 16)).shape == (2, 64)


def test_disagreement_with_the_images_is_refused(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", "classifier_digits", "--model.in_channels", "3", *FAST]) == 2
    assert "--model.in_channels 3 disagrees with the data" in capsys.readouterr().err


@pytest.mark.parametrize("native", [True, False])
def test_precision_where_nobody_says(
    inside: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], native: bool
) -> None:
    monkeypatch.setattr(precision, "cpu_multiplies_bf16", lambda: native)
    assert main(["fit", "--config", "classifier_digits", *FAST, "--trainer.max_epochs", "1"]) == 0
    assert ("litzoo: bf16-mixed" in capsys.readouterr().out) == native
    state = checkpoint("classifier_digits/version_0")["state_dict"]
    assert all(value.dtype == torch.float32 for value in state.values() if value.is_floating_point())


def test_precision_that_somebody_says_holds(inside: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(precision, "cpu_multiplies_bf16", lambda: True)
    assert main(["fit", "--config", "classifier_digits", *FAST, "--trainer.max_epochs", "1", "--trainer.precision", "32-true"]) == 0
    assert main(["fit", "--config", "pointnet_furniture", *FAST, "--trainer.max_epochs", "1"]) == 0, "and PointNet never asked for it"
    assert "bf16" not in capsys.readouterr().out


@pytest.mark.parametrize(("name", "dtype"), [("bf16-true", torch.bfloat16), ("64-true", torch.float64)])
@pytest.mark.parametrize("recipe", ["classifier_digits", "pointnet_furniture"])
def test_true_precisions_reach_the_inputs(inside: Path, name: str, dtype: torch.dtype, recipe: str) -> None:
    assert main(["fit", "--config", recipe, *FAST, "--trainer.max_epochs", "1", "--trainer.precision", name]) == 0
    state = checkpoint(f"{recipe}/version_0")["state_dict"]
    assert {value.dtype for key, value in state.items() if key.endswith("weight")} == {dtype}


@pytest.mark.parametrize(
    ("flags", "native"),
    [("fpu avx512f avx512_bf16 sse", True), ("fpu amx_bf16 amx_tile", True), ("fpu avx2 avx512f", False), ("", False)],
)
def test_flags_of_the_processor(tmp_path: Path, flags: str, native: bool) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor : 0\nmodel name : any\nflags\t\t: {flags}\n\nprocessor : 1\n")
    assert cpu_multiplies_bf16(tmp_path / "cpuinfo") == native
    assert not cpu_multiplies_bf16(tmp_path / "missing")


def test_precision_of_accelerators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "cpu_multiplies_bf16", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert native_precision("auto") is None, "an old GPU emulates it"
    assert native_precision("cpu") == "bf16-mixed"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert native_precision("auto") == native_precision("gpu") == "bf16-mixed"
    assert native_precision("mps") is None


def test_resumed_run_equals_the_uninterrupted_one(inside: Path) -> None:
    settings = ["fit", "--config", "classifier_digits", *FAST, "--model.lr_scheduler", "null"]
    assert main([*settings, "--trainer.max_epochs", "3", "--name", "whole"]) == 0
    assert main([*settings, "--trainer.max_epochs", "1", "--name", "cut"]) == 0
    assert main([*settings, "--trainer.max_epochs", "3", "--name", "cut", "--ckpt_path", "last"]) == 0
    whole, resumed = checkpoint("whole/version_0")["state_dict"], checkpoint("cut/version_0")["state_dict"]
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.slow
def test_the_digits_recipe_learns(inside: Path) -> None:
    quiet = FAST[:6]
    assert main(["fit", "--config", "classifier_digits", *quiet, "--trainer.max_epochs", "8"]) == 0
    assert main(["test", "--config", "classifier_digits", *quiet]) == 0
    rows = next(Path("runs/classifier_digits/version_0").glob("test_*/metrics.csv")).read_text().splitlines()
    scores = dict(zip(rows[0].split(","), rows[1].split(","), strict=True))
    assert float(scores["test/accuracy"]) > 0.95


def test_images_without_labels_are_refused_before_the_first_step(
    inside: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with h5py.File("images.h5", "w") as file:
        file["image"] = np.zeros((40, 8, 8, 1), np.uint8)
        file["label"] = np.arange(40) % 2
    module = inside / "half_labelled.py"
    module.write_text(
        "import torch\nfrom dataclasses import replace\nfrom litzoo.datamodules import HDF5ImagesDataModule\n"
        "class HalfLabelled(HDF5ImagesDataModule):\n"
        "    def read(self):\n        arrays = super().read()\n        return replace(arrays, label=torch.where(torch.arange(40) < 20, arrays.label, -1))\n"
    )
    data = ["--data", "half_labelled.HalfLabelled", "--data.path", "images.h5", "--data.batch_size", "4"]
    monkeypatch.syspath_prepend(inside)
    assert main(["fit", "--model", "ImageClassifier", "--model.backbone", "conv4", *data, *FAST]) == 2
    assert "training images have no label" in capsys.readouterr().err
    assert not list(Path("runs").glob("*/*")), "a run that never began leaves no folder"
