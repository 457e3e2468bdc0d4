"""Every recipe on bundled data in two processes, started once: what is equal in both, and equal to one process.

The methods that share more than gradients are compared with one process on the global batch in the tests of their models.
"""

import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from litzoo.datamodules import ArrayDataModule, DigitsDataModule, FurnitureDataModule, HDF5PointsDataModule, PatientsDataModule
from litzoo.datamodules.arrays import TEST
from litzoo.zoo import ImageClassifier, LogisticRegression, PointNetClassifier, PointNetSegmenter
from litzoo.zoo.cli import CONFIGS
from litzoo.zoo.cli.parsing import import_short_names
from litzoo.zoo.cli.training import LitzooCLI

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]

LINEAR = "supcon_digits_classifier"
# All that need no other data; the second stage of SupCon takes the encoder of the first.
RECIPES = [
    *("classifier_digits", "instdisc_digits", "relational_digits", "supcon_digits", LINEAR, "supcon_digits_crossentropy", "wgan_digits"),
    *("logistic_patients", "pointnet_furniture", "pointnet_furniture_tutorial"),
]
BATCHES = 2
QUIET = {"accelerator": "cpu", "precision": "32-true", "enable_progress_bar": False, "enable_model_summary": False}
FIT = {**QUIET, "max_epochs": 1, "limit_train_batches": BATCHES, "num_sanity_val_steps": 0, "devices": 2, "strategy": "ddp"}


def arguments(recipe: str, trainer: dict[str, Any], *options: str) -> list[str]:
    settings = [f"--trainer.{name}={str(value).lower()}" for name, value in trainer.items()]
    return ["--config", str(CONFIGS / f"{recipe}.yaml"), *settings, *options]


def fit_recipe(recipe: str, folder: Path) -> dict[str, Any]:
    """Fit a recipe and test it, as `litzoo fit` does, and say what this process is left with."""
    options = [f"--trainer.default_root_dir={folder / 'runs'}"]
    if recipe == LINEAR:
        encoder = folder / "runs" / "supcon_digits" / "version_0" / "checkpoints" / "last.ckpt"
        options += ["--model.encoder", str(encoder), "--model.lr", "0.1"]
    cli = LitzooCLI(["fit", *arguments(recipe, FIT, *options)])
    found = {name: float(value) for name, value in cli.trainer.callback_metrics.items()}
    (scores,) = cli.trainer.test(cli.model, datamodule=cli.datamodule, verbose=False)
    return {"state": cli.model.state_dict(), "fit": found, "test": scores, "run": str(cli.trainer.loggers[0].log_dir)}


# Models whose gradients are the mean of the gradients of the shards.

SGD = partial(torch.optim.SGD, lr=0.1)
SIZE = 8  # samples in a batch of one process


def plain(name: str, clouds: Path, batch_size: int) -> tuple[LightningModule, ArrayDataModule]:
    """A model without dropout, and its data."""
    torch.manual_seed(0)
    common: dict[str, Any] = {"optimizer": SGD, "lr_scheduler": None}
    if name == "LogisticRegression":
        return LogisticRegression(**common), PatientsDataModule(batch_size=batch_size)
    if name == "ImageClassifier":
        images = DigitsDataModule(image_size=8, batch_size=batch_size)
        return ImageClassifier(10, backbone="conv4", in_channels=1, image_size=8, **common), images
    if name == "PointNetClassifier":
        return PointNetClassifier(11, dropout=0.0, **common), FurnitureDataModule(num_points=16, batch_size=batch_size)
    data = HDF5PointsDataModule(clouds, num_points=16, batch_size=batch_size)
    return PointNetSegmenter(4, 2, data.part_classes, dropout=0.0, **common), data


PLAIN = ["LogisticRegression", "ImageClassifier", "PointNetClassifier", "PointNetSegmenter"]


def fit_plain(name: str, clouds: Path) -> dict[str, Tensor]:
    model, data = plain(name, clouds, SIZE)
    off = dict.fromkeys(("logger", "enable_checkpointing"), False)
    trainer = Trainer(**{**FIT, **off, "precision": "64-true", "limit_val_batches": 0})
    trainer.fit(model, datamodule=data)
    return {name: weight.detach() for name, weight in model.named_parameters()}


def run_rank(folder: Path, rank: int) -> None:
    import_short_names()
    result: dict[str, Any] = {recipe: fit_recipe(recipe, folder) for recipe in RECIPES}
    result |= {name: fit_plain(name, folder / "clouds.h5") for name in PLAIN}
    torch.save(result, folder / f"rank_{rank}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, two_processes: Callable[..., None]) -> Path:
    """Where both processes have run `run_rank`."""
    from contract import write_points

    made = tmp_path_factory.mktemp("ranks")
    write_points(made / "clouds.h5", parts=True)
    two_processes(Path(__file__), made)
    return made


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"rank_{rank}.pt", weights_only=False) for rank in range(2)]


def test_all_recipes_on_bundled_data_are_here() -> None:
    bundled = re.compile("DigitsDataModule|FurnitureDataModule|PatientsDataModule")
    assert set(RECIPES) == {path.stem for path in CONFIGS.glob("*.yaml") if bundled.search(path.read_text(encoding="utf-8"))}


def same(mine: Any, theirs: Any) -> bool:
    """Bit for bit, also within the states of memories."""
    if isinstance(mine, dict):
        return mine.keys() == theirs.keys() and all(same(mine[name], theirs[name]) for name in mine)
    if isinstance(mine, Tensor):
        return torch.equal(mine.nan_to_num(7.0), theirs.nan_to_num(7.0)) if mine.is_floating_point() else torch.equal(mine, theirs)
    return bool(mine == theirs)


@pytest.mark.parametrize("recipe", RECIPES)
def test_both_processes_have_one_model_and_one_run(recipe: str, folder: Path, ranks: list[dict[str, Any]]) -> None:
    mine, theirs = (rank[recipe] for rank in ranks)
    # Weights, statistics of BatchNorm, memory banks and queues.
    different = [name for name in mine["state"] if not same(mine["state"][name], theirs["state"][name])]
    assert mine["state"].keys() == theirs["state"].keys()
    assert not different
    for stage in ("fit", "test"):
        shared = {name: value for name, value in mine[stage].items() if not name.startswith("train/")}
        assert shared == {name: value for name, value in theirs[stage].items() if not name.startswith("train/")}
    run = folder / "runs" / recipe / "version_0"
    assert mine["run"] == theirs["run"] == str(run)
    assert [path.name for path in run.parent.iterdir()] == ["version_0"]
    assert len(list(run.glob("checkpoints/*.ckpt"))) == 2, "the best, and the last"
    assert (run / "metrics.csv").is_file()
    assert len(list(run.glob("config*.yaml"))) == 1


@pytest.mark.parametrize("recipe", RECIPES)
def test_evaluation_equals_that_of_one_process(recipe: str, folder: Path, ranks: list[dict[str, Any]]) -> None:
    """Test sets of odd sizes are dealt out without counting a sample twice."""
    import_short_names()
    checkpoint = folder / "runs" / recipe / "version_0" / "checkpoints" / "last.ckpt"
    saved = torch.load(checkpoint, weights_only=True)["state_dict"]
    different = [name for name in saved if not same(saved[name], ranks[0][recipe]["state"][name])]
    assert not different
    options = [f"--ckpt_path={checkpoint}", "--trainer.callbacks=[]", f"--trainer.default_root_dir={folder / 'alone'}"]
    if recipe == LINEAR:
        options += ["--model.encoder", str(folder / "runs" / "supcon_digits" / "version_0" / "checkpoints" / "last.ckpt")]
    cli = LitzooCLI(["validate", *arguments(recipe, QUIET, *options)])
    assert len(cli.datamodule.indices(TEST)) % 2 == 1
    found = {name: float(value) for name, value in cli.trainer.callback_metrics.items()}
    (scores,) = cli.trainer.test(cli.model, datamodule=cli.datamodule, verbose=False)
    assert found
    assert scores
    for stage, alone in (("fit", found), ("test", scores)):
        assert {name: ranks[0][recipe][stage][name] for name in alone} == pytest.approx(alone, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", PLAIN)
def test_gradients_are_the_mean_of_those_of_the_shards(
    name: str, folder: Path, ranks: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = plain(name, folder / "clouds.h5", 2 * SIZE)
    model.double()
    for log in ("log", "log_dict"):
        monkeypatch.setattr(model, log, lambda *args, **kwargs: None)
    weights = list(model.parameters())
    loader = data.train_dataloader()
    for number, batch in zip(range(BATCHES), loader, strict=False):
        whole = data.transform(batch)
        whole = whole._replace(input=whole.input.double())
        shards = [type(whole)(*(None if field is None else field[rank::2] for field in whole)) for rank in range(2)]
        losses: Any = [model.training_step(shard, number) for shard in shards]
        gradients = torch.autograd.grad(sum(losses) / 2, weights, allow_unused=True)
        with torch.no_grad():
            for weight, gradient in zip(weights, gradients, strict=True):
                if gradient is not None:
                    weight -= 0.1 * gradient
    for rank in ranks:
        for key, expected in model.named_parameters():
            torch.testing.assert_close(rank[name][key], expected.detach(), rtol=1e-7, atol=1e-9, msg=key)


if __name__ == "__main__":
    import os

    run_rank(Path(sys.argv[1]), int(os.environ["RANK"]))
