"""The `litzoo` command: light answers, mistakes, runs and resume, links, predictions and pictures."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import EarlyStopping

from litzoo.zoo.cli import COMMANDS, CONFIGS, main, recipe_names
from litzoo.zoo.cli.mistakes import sentence
from litzoo.zoo.cli.runs import RunLogger, read_rows

LIGHT = ("torch", "lightning", "numpy", "h5py", "matplotlib")


@pytest.fixture
def clouds(tmp_path: Path) -> Path:
    """Twelve small clouds of each of three classes, in an HDF5 file with a split."""
    rng = np.random.default_rng(0)
    label = np.repeat(np.arange(3), 12)
    points = rng.normal(size=(36, 64, 3)) * (1 + label[:, None, None] * np.array([0.0, 1.0, 2.0]))
    path = tmp_path / "clouds.h5"
    with h5py.File(path, "w") as file:
        file["points"] = points.astype("f2")
        file["label"] = label
        file["split"] = np.tile(np.repeat([0, 1, 2], [8, 2, 2]), 3).astype("u1")
        file["class_names"] = np.array(["ball", "slab", "rod"], dtype=h5py.string_dtype())
    return path


@pytest.fixture
def recipe(tmp_path: Path, clouds: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe that trains in a second; the test runs in its folder."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tiny.yaml"
    settings: dict[str, Any] = {
        "seed_everything": 3,
        "trainer": {
            "max_epochs": 2,
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
        },
        "model": {"class_path": "PointNetClassifier", "init_args": {"input_transform": False, "feature_transform": False}},
        "data": {"class_path": "HDF5PointsDataModule", "init_args": {"path": str(clouds), "num_points": 32, "batch_size": 8}},
    }
    path.write_text(yaml.safe_dump(settings))
    return path


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["state_dict"]


@pytest.mark.parametrize("arguments", [["list"], ["--help"], ["--version"], ["fit", "--config", "pointnet_furnitur"], ["fitt"]])
def test_light_commands_import_nothing_heavy(arguments: list[str]) -> None:
    code = f"import sys; from litzoo.zoo.cli import main; main({arguments!r}); print([m for m in {LIGHT!r} if m in sys.modules], file=sys.stderr)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stderr.splitlines()[-1] == "[]"


def test_help_of_fit_imports_only_what_it_needs() -> None:
    code = (
        "import sys; from litzoo.zoo.cli import main\ntry: main(['fit', '--help'])\n"
        "except SystemExit: print([m for m in ('matplotlib', 'scipy', 'torchvision') if m in sys.modules], file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stderr.splitlines()[-1] == "[]"
    assert "--checkpoint.monitor" in result.stdout


def test_list_names_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    text = capsys.readouterr().out
    for name in ["pointnet_furniture", "logistic_patients", "PointNetClassifier", "FurnitureDataModule", "ConfusionMatrixPlot"]:
        assert re.search(rf"^  {name} +\w", text, re.MULTILINE), name


def test_every_recipe_has_a_sentence_and_sets_the_epochs() -> None:
    for name in recipe_names():
        text = (CONFIGS / f"{name}.yaml").read_text()
        assert text.startswith("# ")
        assert yaml.safe_load(text)["trainer"]["max_epochs"] > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["fitt"], "did you mean fit"),
        (["fit", "--config", "pointnet_furnitur"], "did you mean pointnet_furniture"),
        (["fit", "--config"], "needs the name of a recipe"),
        (["fit", "--config", "RECIPE", "--model", "PointNetClasifier"], "did you mean PointNetClassifier"),
        (["fit", "--config", "RECIPE", "--data", "FurnitureData"], "did you mean FurnitureDataModule"),
        (["fit", "--config", "RECIPE", "--model.hiden", "3"], "--model.hiden is not an option"),
        (["fit", "--config", "RECIPE", "--model.optimizer", "SGDD"], "did you mean SGD"),
        (["fit", "--config", "RECIPE", "--trainer.callbacks+=ConfusionMatrixPlott"], "did you mean ConfusionMatrixPlot"),
        (["fit", "--config", "RECIPE", "--model.class_weights", "even"], "'none', 'balanced', 'effective', got even"),
        (["fit", "--config", "RECIPE", "--model.label_smoothing", "1.5"], "label_smoothing must lie in [0, 1], got 1.5"),
        (["fit", "--config", "RECIPE", "--model.num_classes", "9"], "num_classes 9 disagrees with the data, whose num_classes is 3"),
        (["fit", "--config", "RECIPE", "--data.batch_size", "1e2x"], "--data.batch_size: expected int, got 1e2x"),
        (["fit", "--config", "RECIPE", "--data.augmentation.scale", "[2,1]"], "scale must be a range"),
        (["fit", "--config", "RECIPE", "--data.path", "nowhere.h5"], "there is no file nowhere.h5"),
        (["fit", "--config", "RECIPE", "--ckpt_path", "nowhere.ckpt"], "there is no checkpoint nowhere.ckpt"),
        (["fit", "--config", "RECIPE", "--ckpt_path", "last"], "train first"),
        (["fit", "--config", "RECIPE", "--trainer.precision", "17"], "--trainer.precision: expected"),
        (["fit", "--config", "RECIPE", "--trainer.devices", "0"], "devices"),
        (["fit", "--config", "RECIPE", "--trainer.callbacks+=SAM", "--trainer.callbacks+=SAM"], "SAM does not compose with SAM"),
        (["fit", "--config", "RECIPE", "--trainer.callbacks+=SnapshotEnsemble"], "return only the optimizer"),
        (["fit", "--config", "RECIPE", "--trainer.callbacks+=EMA", "--trainer.callbacks.decay", "2"], "must lie in [0, 1], got 2.0"),
        (
            ["fit", "--config", "RECIPE", "--trainer.callbacks+=EMA", "--trainer.callbacks.decay", "x"],
            "callbacks.decay: expected float, got x",
        ),
        (["fit", "--config", "RECIPE", "--trainer.callbacks+=EMA", "--trainer.callbacks.deca", "1"], "callbacks.deca is not an option"),
        (["fit", "--config", "RECIPE", "--trainer.callbacks+=EMA", "--checkpoint.save_weights_only", "true"], "save_weights_only=False"),
        (["test", "--config", "RECIPE"], "train first"),
        (["fit", "--config", "BROKEN"], "broken.yaml"),
        (["fit", "--config", "WRONG"], "'modle'"),
        (["fit", "--model", "PointNetClassifier"], "fit.data"),
        (["fit", "--model", "torch.nn.Linear", "--data", "FurnitureDataModule"], "not correspond to a subclass of LightningModule"),
        (["show", "dta"], "did you mean data"),
        (["show", "data"], "say which data"),
        (["predict", "nowhere.npy", "--model", "x"], "no file or folder nowhere.npy"),
        (["export", "nowhere.ckpt"], "nowhere.ckpt"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    arguments: list[str], words: str, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken.yaml").write_text("a: [1,")
    (tmp_path / "wrong.yaml").write_text("modle: x")
    names = {"RECIPE": str(recipe), "BROKEN": str(tmp_path / "broken.yaml"), "WRONG": str(tmp_path / "wrong.yaml")}
    monkeypatch.setattr(sys, "argv", ["litzoo"])
    assert main([names.get(argument, argument) for argument in arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("litzoo: ")]
    assert len(lines) == 1
    assert words in lines[0]
    assert "subclass of Callback" not in lines[0], "how else a value could be given is no reason"
    assert not list(tmp_path.glob("runs/*/*"))


def test_a_number_to_stop_by_that_nobody_logs_is_a_mistake() -> None:
    with pytest.raises(RuntimeError) as found:
        EarlyStopping("val/lss")._validate_condition_metric({"val/loss": torch.tensor(0.0)})
    assert "`val/lss` which is not available" in (sentence(found.value) or "")
    assert sentence(RuntimeError("a fault")) is None


def test_a_broken_or_foreign_checkpoint(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", str(recipe), "--trainer.max_epochs", "1"]) == 0
    whole = tmp_path / "runs" / "tiny" / "version_0" / "checkpoints" / "last.ckpt"
    (tmp_path / "truncated.ckpt").write_bytes(whole.read_bytes()[:100_000])
    (tmp_path / "text.ckpt").write_text("hello")
    torch.save({"a": 1}, tmp_path / "other.ckpt")
    for name in ("truncated", "text", "other"):
        for command in ("fit", "test"):
            assert main([command, "--config", str(recipe), "--ckpt_path", f"{name}.ckpt"]) == 2
    assert main(["test", "--config", str(recipe), "--model.feature_transform", "true"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("litzoo: ")]
    assert ["not a whole checkpoint" in line for line in lines] == [True, True, True, True, False, False, False]
    assert all("not a Lightning checkpoint" in line for line in lines[4:6])
    assert "does not fit this model" in lines[6]


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(Exception, match="did you mean fit"):
        main(["fitt", "--debug"])


def test_a_fault_of_the_program_keeps_its_traceback(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from litzoo.zoo import PointNetClassifier

    def broken(self: Any, batch: Any, batch_idx: int) -> None:
        raise KeyError("a fault")

    monkeypatch.setattr(PointNetClassifier, "training_step", broken)
    with pytest.raises(KeyError, match="a fault"):
        main(["fit", "--config", str(recipe)])


def test_fit_test_export_predict(recipe: Path, clouds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", str(recipe)]) == 0
    assert main(["fit", "--config", str(recipe)]) == 0
    run = tmp_path / "runs" / "tiny" / "version_0"
    assert sorted(path.name for path in run.parent.iterdir()) == ["version_0", "version_1"]
    assert {"config.yaml", "metrics.csv", "checkpoints"} <= {path.name for path in run.iterdir()}
    assert list(run.glob("events.out.tfevents*"))
    # Nothing depends on the run: two runs of one seed are equal.
    first, second = (weights(run.parent / name / "checkpoints" / "last.ckpt") for name in ("version_0", "version_1"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    # The links reached the model, and the checkpoint loads as a model.
    hparams = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["hyper_parameters"]
    assert (hparams["num_classes"], hparams["class_names"], hparams["class_counts"]) == (3, ["ball", "slab", "rod"], [8, 8, 8])

    assert main(["test", "--config", str(recipe)]) == 0
    assert "test/accuracy" in (run.parent / "version_1" / "test_0" / "metrics.csv").read_text()
    assert main(["test", "--config", str(recipe), "--ckpt_path", "last"]) == 0
    assert (run.parent / "version_1" / "test_1").is_dir()

    assert main(["export", str(run / "checkpoints" / "last.ckpt"), "--output", "rod.safetensors", "--full-precision"]) == 0
    assert main(["export", str(run / "checkpoints" / "last.ckpt"), "--output", "rod.safetensors"]) == 2
    np.save("one.npy", np.random.default_rng(0).normal(size=(50, 3)))
    for model in ("rod.safetensors", str(run / "checkpoints" / "last.ckpt")):
        assert main(["predict", "one.npy", str(clouds), "--model", model, "--output", f"{Path(model).suffix[1:]}.csv", "--top", "9"]) == 0
    assert Path("safetensors.csv").read_text() == Path("ckpt.csv").read_text()
    with open("ckpt.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 37
    assert sum(float(rows[0][f"confidence_{rank}"]) for rank in (1, 2, 3)) == pytest.approx(1, abs=1e-5)
    assert main(["predict", str(tmp_path / "one.npy"), "--model", "rod.safetensors", "--output", "out.json"]) == 0
    assert {guess["class"] for guess in json.loads(Path("out.json").read_text())[0]["predictions"]} == {"ball", "slab", "rod"}
    capsys.readouterr()
    for broken in (np.zeros((5, 2)), np.full((5, 3), np.nan), np.array(["a"])):
        np.save("broken.npy", broken)
        assert main(["predict", "broken.npy", "--model", "rod.safetensors"]) == 2
    assert capsys.readouterr().err.count("litzoo: broken.npy") == 3


def test_resume_after_kill_equals_uninterrupted(recipe: Path, tmp_path: Path) -> None:
    """kill -9 then `--ckpt_path last`: the same weights, and one metrics file without repeats."""
    assert main(["fit", "--config", str(recipe), "--name", "whole", "--trainer.max_epochs", "12"]) == 0
    command = [sys.executable, "-m", "litzoo", "fit", "--config", str(recipe), "--name", "killed", "--trainer.max_epochs", "12"]
    checkpoint = tmp_path / "runs" / "killed" / "version_0" / "checkpoints" / "last.ckpt"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not checkpoint.is_file():
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert torch.load(checkpoint, weights_only=True)["epoch"] < 11
    assert main(["fit", "--config", str(recipe), "--name", "killed", "--trainer.max_epochs", "12", "--ckpt_path", "last"]) == 0
    whole = tmp_path / "runs" / "whole" / "version_0"
    killed = tmp_path / "runs" / "killed" / "version_0"
    first, second = weights(whole / "checkpoints" / "last.ckpt"), weights(killed / "checkpoints" / "last.ckpt")
    assert all(torch.equal(first[name], second[name]) for name in first)
    rows, resumed_rows = ((run / "metrics.csv").read_text().splitlines() for run in (whole, killed))
    assert resumed_rows == rows
    assert {path.name for path in killed.glob("config*")} == {"config.yaml", "config_resumed_1.yaml"}


def test_resume_after_a_kill_before_the_log_row(recipe: Path, tmp_path: Path) -> None:
    """Lightning logs an epoch after its checkpoint was written: a kill in between must not cost the row."""
    fit = ["fit", "--config", str(recipe)]
    assert main([*fit, "--trainer.max_epochs", "2"]) == 0
    path = tmp_path / "runs" / "tiny" / "version_0" / "metrics.csv"
    lines = path.read_text().splitlines()
    rows = read_rows(path)
    assert "train/loss" in rows[-1]
    path.write_text("\n".join(lines[:-1]) + "\n")
    assert main([*fit, "--trainer.max_epochs", "4", "--ckpt_path", "last"]) == 0
    assert read_rows(path)[: len(rows)] == rows
    assert [row["epoch"] for row in read_rows(path) if "train/loss" in row] == ["0", "1", "2", "3"]


def test_new_columns_never_leave_half_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = RunLogger(tmp_path / "name" / "version_0")
    logger.log_metrics({"a": 1.0}, 0)
    path = tmp_path / "name" / "version_0" / "metrics.csv"
    before = path.read_text()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        logger.log_metrics({"b": 2.0}, 1)
    assert path.read_text() == before


def test_ctrl_c_ends_cleanly(recipe: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "litzoo", "fit", "--config", str(recipe), "--name", "stopped"]
    process = subprocess.Popen([*command, "--trainer.max_epochs", "800"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    checkpoint = tmp_path / "runs" / "stopped" / "version_0" / "checkpoints" / "last.ckpt"
    while process.poll() is None and not checkpoint.is_file():
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "stops after this batch" in message
    assert "--ckpt_path last goes on" in message
    assert "Traceback" not in message
    torch.load(checkpoint, weights_only=True)


def test_another_seed_differs(recipe: Path, tmp_path: Path) -> None:
    for name, seed in (("a", "3"), ("b", "4")):
        assert main(["fit", "--config", str(recipe), "--name", name, "--seed_everything", seed, "--trainer.max_epochs", "1"]) == 0
    first, second = (weights(tmp_path / "runs" / name / "version_0" / "checkpoints" / "last.ckpt") for name in "ab")
    assert not all(torch.equal(first[name], second[name]) for name in first)


def test_environment_variables(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITZOO_FIT__NAME", "from_environment")
    monkeypatch.setenv("LITZOO_FIT__TRAINER__LIMIT_VAL_BATCHES", "0")
    assert main(["fit", "--config", str(recipe), "--trainer.max_epochs", "1", "--checkpoint.monitor", "null"]) == 0
    assert (tmp_path / "runs" / "from_environment" / "version_0").is_dir()


def test_optimizer_and_scheduler_by_name(recipe: Path, tmp_path: Path) -> None:
    options = [
        "--model.optimizer",
        "SGD",
        "--model.optimizer.lr",
        "0.25",
        "--model.lr_scheduler",
        "StepLR",
        "--model.lr_scheduler.step_size",
        "1",
    ]
    assert main(["fit", "--config", str(recipe), "--trainer.max_epochs", "1", *options]) == 0
    state = torch.load(tmp_path / "runs" / "tiny" / "version_0" / "checkpoints" / "last.ckpt", weights_only=True)
    assert state["optimizer_states"][0]["param_groups"][0]["initial_lr"] == 0.25
    assert state["lr_schedulers"][0]["step_size"] == 1


def test_saved_config_runs_again(recipe: Path, tmp_path: Path) -> None:
    assert main(["fit", "--config", str(recipe), "--trainer.max_epochs", "1"]) == 0
    saved = tmp_path / "runs" / "tiny" / "version_0" / "config.yaml"
    assert main(["fit", "--config", str(saved), "--name", "again", "--checkpoint.dirpath", "null", "--last.dirpath", "null"]) == 0
    first, second = (weights(tmp_path / "runs" / name / "version_0" / "checkpoints" / "last.ckpt") for name in ("tiny", "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_no_logger_and_fast_dev_run_leave_no_run_folder(recipe: Path, tmp_path: Path) -> None:
    assert main(["fit", "--config", str(recipe), "--trainer.fast_dev_run", "true"]) == 0
    assert not (tmp_path / "runs").exists()


def test_completion(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--print_completion=shtab-bash"])
    assert stop.value.code == 0
    assert "complete -o" in capsys.readouterr().out


def test_help_of_fit(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--help"])
    assert stop.value.code == 0
    assert "--checkpoint.monitor" in capsys.readouterr().out
    assert set(COMMANDS) >= {"fit", "validate", "test", "predict", "show", "export", "list"}


def test_show_data(recipe: Path, tmp_path: Path) -> None:
    assert main(["show", "data", "--config", str(recipe), "--output", str(tmp_path / "pictures")]) == 0
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == {"class_frequencies.png", "clouds.png"}
    assert main(["show", "data", "--data", "PatientsDataModule", "--output", str(tmp_path / "patients")]) == 0
    assert {path.name for path in (tmp_path / "patients").iterdir()} == {"class_frequencies.png"}


def test_two_processes(recipe: Path, tmp_path: Path) -> None:
    """One run folder for both processes, and a resume of it."""
    command = [sys.executable, "-m", "litzoo", "fit", "--config", str(recipe), "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "--data.batch_size", "4"], check=True, capture_output=True, env=environment)
    assert [path.name for path in (tmp_path / "runs" / "tiny").iterdir()] == ["version_0"]
