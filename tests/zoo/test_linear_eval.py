"""Linear evaluation of every encoder that the package exports, by the recipe and from a checkpoint."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from litzoo import zoo
from litzoo.zoo.cli import main

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
IMAGES = {"in_channels": 1, "image_size": 8, "backbone": "conv4"}
# How each model is made for the data in brackets; what has no `encode` is none.
ENCODERS: dict[str, dict[str, Any]] = {
    "ImageClassifier": {"num_classes": 10, **IMAGES},
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
