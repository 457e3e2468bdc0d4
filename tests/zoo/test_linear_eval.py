"""Linear evaluation of every encoder that the package exports, by the recipe and from a checkpoint."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from PIL import Image

import litzoo
from litzoo import zoo
from litzoo.zoo.cli import main

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
IMAGES = {"in_channels": 1, "image_size": 8, "backbone": "conv4"}
# How each model is made for the data in brackets; what has no `encode` is none.
ENCODERS: dict[str, dict[str, Any]] = {
    "ImageClassifier": {"num_classes": 10, **IMAGES},
    "ImageEncoder": IMAGES,
    "InstanceDiscrimination": {"num_train": 50, **IMAGES},
    "PointNetClassifier": {"num_classes": 11, "input_transform": False, "feature_transform": False},
    "RelationalReasoning": IMAGES,
    "SupConEncoder": IMAGES,
}
NO_ENCODERS = {"LogisticRegression", "PointNetSegmenter", "EncoderClassifier", "WGAN"}


def test_every_model_is_here() -> None:
    assert set(ENCODERS) | NO_ENCODERS == set(zoo.MODELS)
    for name in ENCODERS:
        assert callable(getattr(zoo, name).encode)


@pytest.mark.parametrize("name", ENCODERS)
def test_linear_evaluation_of_a_checkpoint(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = getattr(zoo, name)(**ENCODERS[name])
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    trainer.strategy.connect(model)
    trainer.save_checkpoint("plain.ckpt")
    checkpoint = torch.load("plain.ckpt", weights_only=True)
    checkpoint["hyper_parameters"] = {**checkpoint["hyper_parameters"], "_class_path": f"litzoo.zoo.{name}"}  # as `litzoo fit` writes it
    torch.save(checkpoint, "encoder.ckpt")
    points = name == "PointNetClassifier"
    data = ["FurnitureDataModule", "--data.num_points", "64"] if points else ["DigitsDataModule", "--data.image_size", "8"]
    command = ["--config", "linear_eval", "--model.encoder", "encoder.ckpt", "--data", data[0], *data[1:]]
    command += ["--data.augmentation.scale", "[1,1]", "--data.augmentation.shift", "0"] if points else ["--data.train_fraction", "0.2"]
    assert main(["fit", *command, "--trainer.max_epochs", "2", "--trainer.enable_progress_bar", "false"]) == 0
    best = next(Path("runs/linear_eval/version_0/checkpoints").glob("epoch_*.ckpt"))
    state = torch.load(best, weights_only=True)["state_dict"]
    for key, value in model.state_dict().items():
        if isinstance(value, torch.Tensor) and f"encoder.{key}" in state:
            torch.testing.assert_close(state[f"encoder.{key}"], value, rtol=0, atol=0, equal_nan=True, msg=key)
    assert any(key.startswith("encoder.") for key in state)


def test_pictures_of_a_folder_become_what_the_encoder_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("light", "dark"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for index in range(12):
            value = (200 if name == "light" else 20) + index
            Image.new("RGB", (20, 24), (value, value // 2, index)).save(tmp_path / "photos" / name / f"{index}.png")
    encoder = zoo.ImageClassifier(10, image_size=16, backbone="conv4", image_mean=[0.4, 0.5, 0.6], image_std=[0.1, 0.2, 0.3])
    litzoo.save(encoder, "encoder.safetensors", {})
    command = ["fit", "--config", "finetune", "--data.path", "photos", "--model.encoder", "encoder.safetensors"]
    command += ["--trainer.max_epochs", "1", "--trainer.enable_progress_bar", "false"]
    assert main(command) == 0
    run = Path("runs/finetune/version_0")
    settings = yaml.safe_load((run / "config.yaml").read_text())["data"]["init_args"]
    assert (settings["image_size"], settings["mean"], settings["std"]) == (16, [0.4, 0.5, 0.6], [0.1, 0.2, 0.3])
    tuned = litzoo.load_encoder(run / "checkpoints" / "last.ckpt")
    assert tuned.class_names == ["dark", "light"]
    assert any((tuned.encoder.state_dict()[key] != value).any() for key, value in encoder.state_dict().items() if key.endswith("weight"))
    assert main([*command, "--data.mean", "[0.1,0.2,0.3]", "--data.std", "[0.1,0.1,0.1]"]) == 2, "what was asked for is not overruled"
