"""`litzoo clean`: what it writes, that it goes on where it was, that the original stays, and what it says to mistakes."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import yaml

from litzoo.datamodules import HDF5ImagesDataModule, HDF5PointsDataModule
from litzoo.datamodules.hdf5_writing import write_hdf5
from litzoo.zoo.cli import CommandError, main
from litzoo.zoo.cli.clean import _checked_trainer, _MakeTrainer

FOLDER = ["--output", "out"]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits of 16 x 16 pixels with a tenth of wrong labels, in an HDF5 file."""
    from litzoo.datamodules import DigitsDataModule

    data = DigitsDataModule(image_size=16)
    label = data.arrays.label.clone()
    label[::10] = (label[::10] + 1) % 10
    path = tmp_path_factory.mktemp("digits") / "digits.h5"
    write_hdf5(path, data.arrays, label)
    return path


@pytest.fixture
def recipe(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe that trains in a second; the test runs in its folder."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tiny.yaml"
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 5e-3}}
    settings: dict[str, Any] = {
        "seed_everything": 3,
        "trainer": {"max_epochs": 2, "accelerator": "cpu", "callbacks": ["litzoo.callbacks.ConfusionMatrixPlot", "ModelCheckpoint"]},
        "model": {"class_path": "litzoo.zoo.ImageClassifier", "init_args": {"backbone": "conv4", "optimizer": optimizer}},
        "data": {"class_path": "HDF5ImagesDataModule", "init_args": {"path": str(digits), "augmentation": "none", "batch_size": 32}},
        "checkpoint": {"monitor": "val/loss"},
        "then": None,
    }
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture
def run(recipe: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs the command on the recipe; returns status, output and errors."""

    def command(*arguments: str, config: str | None = str(recipe)) -> tuple[int, str, str]:
        status = main(["clean", *([] if config is None else ["--config", config]), *arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return command


def rows_of(folder: str = "out") -> list[dict[str, str]]:
    with (Path(folder) / "labels.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_whole_way(run: Callable[..., tuple[int, str, str]], digits: Path) -> None:
    original = digits.read_bytes()
    status, output, error = run(*FOLDER, "--folds", "2", "--scheme", "leave_one_out", "--filter", "prune_by_noise_rate")
    assert (status, error) == (0, "")
    assert "litzoo: round 1 of 2, model 1 of 1: trained on 647 samples, agrees with " in output
    names = {path.name for path in Path("out").iterdir() if not path.name.startswith(".")}
    assert names == {"labels.csv", "labels.json", "summary.json", "review.html", "settings.json", "predictions"}
    rows = rows_of()
    data = HDF5ImagesDataModule(digits)
    assert [int(row["index"]) for row in rows] == data.train_index.tolist()
    doubted = [row for row in rows if row["verdict"] == "review"]
    with h5py.File(digits, "r") as file:
        number = file["index"][:]
    wrong = [row for row in doubted if number[int(row["index"])] % 10 == 0]
    assert len(wrong) / len(doubted) > 0.3
    assert f"1,295 labels, {len(doubted)} to review" in output

    before = {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}
    memory = ["--data.eval_batch_size", "50"]  # what a machine has room for changes nothing
    status, output, _ = run(
        *FOLDER, "--folds", "2", "--scheme", "leave_one_out", "--filter", "prune_by_noise_rate", "--apply", "new.h5", *memory
    )
    assert status == 0
    assert "litzoo: 2 of 2 models were trained before" in output
    assert "trained on" not in output
    assert before == {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}
    assert digits.read_bytes() == original
    assert f"1,797 samples of all splits, {len(doubted)} relabelled: new.h5, for --data HDF5ImagesDataModule --data.path new.h5" in output
    copy = HDF5ImagesDataModule("new.h5")
    expected = data.arrays.label.clone()
    for row in doubted:
        expected[int(row["index"])] = int(row["proposed"])
    assert copy.arrays.label.tolist() == expected.tolist()

    # A person's decisions, and leaving samples out.
    first, second = doubted[:2]
    lines = [f"{first['index']},,{first['given']},{first['proposed']},accept", f"{second['index']},,,,keep"]
    Path("decisions.csv").write_text("\n".join(["index,file,given,proposed,decision", *lines]) + "\n")
    same = (*FOLDER, "--folds", "2", "--scheme", "leave_one_out", "--apply_by", "drop", "--decisions", "decisions.csv")
    status, output, _ = run(*same, "--apply", "dropped.h5")
    assert status == 0
    assert "1,796 samples of all splits, 1 left out: dropped.h5" in output
    with h5py.File("dropped.h5", "r") as file:
        assert set(range(1797)) - set(file["index"][:].tolist()) == {int(first["index"])}

    for file, message in ((str(digits), "exists already and is not overwritten"), ("new.h5", "exists already"), ("new.csv", "ends in .h5")):
        status, output, error = run(*FOLDER, "--folds", "2", "--scheme", "leave_one_out", "--apply", file)
        assert (status, message in error, error.count("\n")) == (2, True, 1)
    assert digits.read_bytes() == original
    status, _, error = run(*FOLDER, "--folds", "2", "--scheme", "leave_one_out", "--trainer.max_epochs", "3")
    assert (status, error) == (
        2,
        "litzoo: out was made with trainer.max_epochs 2, now it is 3: give the same settings, or another output folder\n",
    )


def test_votes_of_augmented_views(run: Callable[..., tuple[int, str, str]]) -> None:
    options = [
        "--folds",
        "3",
        "--views",
        "2",
        "--data.augmentation",
        "standard",
        "--trainer.max_epochs",
        "1",
        "--split",
        "val",
        "--models",
        "2",
    ]
    status, output, error = run(*FOLDER, *options, "--min_flags", "2", "--threshold", "0.2", "--show", "4", "--data.val_fraction", "0.2")
    assert (status, error) == (0, "")
    assert "round 3 of 3, model 2 of 2" in output
    rows = rows_of()
    assert {row["votes"] for row in rows} == {"2"}
    for row in rows:
        assert (row["verdict"] == "review") == (row["flags"] == "2")
    page = json.loads(Path("out/review.html").read_text().partition('id="data">')[2].partition("</script>")[0])
    assert len(page["items"]) == 4
    with np.load("out/predictions/round_1_model_1.npz") as file:
        assert file["logits"].shape[0] == 2
        assert file["index"].tolist() == sorted(file["index"].tolist())


def test_a_trainer_is_made_anew_without_checkpoints(recipe: Path) -> None:
    make = _MakeTrainer(yaml.safe_load(recipe.read_text())["trainer"])
    first, second = (make(logger=False, enable_checkpointing=False, limit_val_batches=0) for _ in range(2))
    names = [type(callback).__name__ for callback in first.callbacks]
    assert "ConfusionMatrixPlot" in names
    assert "ModelCheckpoint" not in names
    assert not set(map(id, first.callbacks)) & set(map(id, second.callbacks))
    assert (first.limit_val_batches, first.max_epochs) == (0, 2)


def test_one_callback_needs_no_list() -> None:
    model = {"class_path": "litzoo.zoo.PointNetClassifier"}
    for callbacks in ({"class_path": "litzoo.callbacks.EMA"}, [{"class_path": "litzoo.callbacks.EMA", "init_args": {}}], None):
        assert _checked_trainer({"callbacks": callbacks, "accelerator": "cpu"}, model)["devices"] == 1
    waits = {"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": {"monitor": "val/loss"}}
    with pytest.raises(CommandError, match="EarlyStopping would wait for ever"):
        _checked_trainer({"callbacks": waits}, model)


def test_clouds(run: Callable[..., tuple[int, str, str]]) -> None:
    quick = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "1", "--data.num_points", "32", "--data.eval_points", "32"]
    status, output, error = run(*FOLDER, "--folds", "2", *quick, "--show", "3", "--apply", "new.h5", config="pointnet_furniture")
    assert (status, error) == (0, "")
    assert "--data HDF5PointsDataModule --data.path new.h5" in output
    assert "more labels are doubted than not: models that weak cannot judge them" in output
    page = json.loads(Path("out/review.html").read_text().partition('id="data">')[2].partition("</script>")[0])
    assert len(page["items"]) == 3
    assert all(len(item["png"]) > 1000 for item in page["items"])
    assert len(HDF5PointsDataModule("new.h5").arrays.label) == 261


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--folds", "1", *FOLDER], "there must be at least 2 folds, got 1"),
        (["--folds", "two", *FOLDER], "--folds: expected int, got two"),
        (["--scheme", "both", *FOLDER], "--scheme: expected one of 'train_on_one', 'leave_one_out', got both"),
        (["--filter", "bst", *FOLDER], "cleanlab has no filter 'bst'; there are: prune_by_noise_rate"),
        (["--show", "0", *FOLDER], "--show must be at least 1, got 0"),
        (["--trainer.devices", "2", *FOLDER], "trains each model on one device: give --trainer.devices 1, and --jobs for several"),
        (
            ["--trainer.callbacks", "EarlyStopping", "--trainer.callbacks.monitor", "val/loss", *FOLDER],
            "label cleaning does not validate, so EarlyStopping would wait for ever: leave it out of --trainer.callbacks",
        ),
        (
            ["--model.lr_scheduler", "lightning.pytorch.cli.ReduceLROnPlateau", "--model.lr_scheduler.monitor", "val/loss", *FOLDER],
            "label cleaning does not validate, so no learning rate can follow val/loss: give another --model.lr_scheduler",
        ),
        (["--output", "tiny.yaml"], "--output tiny.yaml is a file: give a folder"),
        (["--output", "."], "--output . holds other files: give a new folder, or one of an earlier `litzoo clean`"),
        (["--decisions", "d.csv", *FOLDER], "--decisions says what goes into the cleaned copy: give --apply FILE.h5 too"),
        (["--decisions", "d.csv", "--apply", "a.h5", *FOLDER], "there is no file d.csv: the review page downloads one"),
        (["--apply", "a.zip", *FOLDER], "a.zip: give a name that ends in .h5 or .hdf5"),
        (["--apply", "no/a.h5", *FOLDER], "no/a.h5: there is no folder"),
        (["--views", "2", *FOLDER], "2 views would be alike, as HDF5ImagesDataModule does not augment"),
        (
            ["--model", "SupConEncoder", "--model.backbone", "conv4", *FOLDER],
            "SupConEncoder does not classify samples of HDF5ImagesDataModule: its forward must give logits (2, 10) of 2 samples",
        ),
        (["--model", "WGAN", *FOLDER], "WGAN does not classify samples of HDF5ImagesDataModule: "),
        ([], "output"),
    ],
)
def test_mistakes_are_one_sentence(run: Callable[..., tuple[int, str, str]], arguments: list[str], message: str) -> None:
    status, _, error = run(*arguments)
    assert (status, error.count("\n")) == (2, 1)
    assert error.startswith("litzoo: ")
    assert message in error
    assert not (Path("out") / "predictions").exists()
    assert not (Path("out") / "settings.json").exists()


def test_nothing_said_is_told(run: Callable[..., tuple[int, str, str]]) -> None:
    status, _, error = run(*FOLDER, config=None)
    assert status == 2
    assert error.startswith("litzoo: say which model and data: --config RECIPE, or --model CLASS and --data CLASS; recipes: classifier_")
