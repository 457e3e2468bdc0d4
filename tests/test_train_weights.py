"""What the card of trained weights says of the run that made them."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from litzoo.zoo.cli import CommandError, recipe_path
from litzoo.zoo.cli.training import train


@pytest.fixture
def script(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("train_weights")


def test_card_names_what_differs_from_the_recipe(script: ModuleType, tmp_path: Path) -> None:
    recipe = recipe_path("supcon_digits")
    options = ["--trainer.max_epochs", "1", "--model.temperature", "0.2", "--data.batch_size", "512"]
    places = ["--trainer.default_root_dir", str(tmp_path), "--trainer.limit_train_batches", "1", "--trainer.accelerator", "cpu"]
    quiet = ["--trainer.enable_progress_bar", "false", "--then", "null", "--trainer.callbacks", "null"]
    train(["fit", "--config", recipe, *options, *places, *quiet])
    run = script.finished_run(tmp_path / "supcon_digits" / "version_0")
    assert (run.epochs, run.selected_by) == (1, "val/precision_at_1")
    assert 0 <= run.minutes < 5
    config = script.yaml.safe_load((run.folder / "config.yaml").read_text(encoding="utf-8"))
    assert sorted(script.options(config, Path(recipe)).split("--")[1:]) == [
        "data.batch_size 512",
        "model.temperature 0.2 ",
        "trainer.max_epochs 1 ",
    ]


def test_weights_are_chosen_on_validation(script: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.yaml").write_text("seed_everything: 0\n", encoding="utf-8")
    chosen = {"best_model_path": "elsewhere/best.ckpt", "monitor": "test/accuracy"}
    torch.save({"epoch": 3, "callbacks": {"best": chosen}}, tmp_path / "checkpoints" / "last.ckpt")
    (tmp_path / "checkpoints" / "best.ckpt").touch()
    with pytest.raises(CommandError, match="not a validation metric"):
        script.finished_run(tmp_path)
