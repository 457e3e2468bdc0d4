"""`then`: the stage that follows a training, with its encoder, from one command line."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from litzoo.zoo.cli import CONFIGS, main, next_stage
from litzoo.zoo.cli.next_stage import run_next_stage, shared_options

RECIPE = [
    *("fit", "--config", "supcon_digits", "--trainer.accelerator=cpu", "--data.image_size", "16"),
    *("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"),
]
QUICK = [*RECIPE, "--data.train_fraction", "0.05", "--trainer.max_epochs", "1", "--trainer.callbacks", "[]"]


class Started:
    """What the next stage was started with, in place of the start."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, inside: bool = False) -> None:
        self.commands: list[list[str]] = []
        self.environment: dict[str, str] = {}
        self.inside = inside
        monkeypatch.setattr(next_stage.subprocess, "Popen", self)

    def __call__(self, command: list[str], env: dict[str, str]) -> Any:
        assert command[:3] == [sys.executable, "-m", "litzoo"]
        self.commands.append(command[3:])
        self.environment = env
        return self

    def wait(self) -> int:
        return main(self.commands[-1]) if self.inside else 0


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Started:
    monkeypatch.chdir(tmp_path)
    return Started(monkeypatch)


@pytest.mark.parametrize(
    ("arguments", "processes", "expected"),
    [
        ("fit --config a --data.root x --data.views=2 --model.temperature 0.1", 1, "--data.root x"),
        ("fit --data.path x -c b", 1, "--data.path x"),
        ("fit --data.path x -c=b --name mine --then null", 1, "--data.path x"),
        (
            "fit --data Own --data.init_args.path x --data.init_args.augmentation.flip 0.5 --data.train_on both",
            1,
            "--data Own --data.init_args.path x",
        ),
        ("fit --data.mean [0.5,-1] --trainer.max_epochs 3", 1, "--data.mean [0.5,-1]"),
        ("fit --seed_everything 3 --trainer.precision=16-mixed --ckpt_path last", 1, "--seed_everything 3 --trainer.precision=16-mixed"),
        ("fit --trainer.accelerator gpu --trainer.devices [1]", 1, "--trainer.accelerator gpu --trainer.devices [1]"),
        ("fit --trainer.accelerator gpu --trainer.devices 2 --trainer.strategy=ddp", 2, "--trainer.accelerator gpu"),
    ],
)
def test_options_that_hold_for_both_stages(arguments: str, processes: int, expected: str) -> None:
    assert shared_options(arguments.split(), processes) == expected.split()


def test_the_process_of_the_next_stage(started: Started, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    of_one = {"RANK": "0", "TORCHELASTIC_RUN_ID": "1", "SLURM_NTASKS": "2", "LITZOO_FIT__NAME": "x"}
    shared = {"LITZOO_FIT__DATA__INIT_ARGS__ROOT": "x", "LITZOO_FIT__TRAINER__DEVICES": "1", "CUDA_VISIBLE_DEVICES": "3"}
    for name, value in {**of_one, **shared}.items():
        monkeypatch.setenv(name, value)
    assert run_next_stage("linear", Path("a b.ckpt"), ["fit", "--data.root", "c d"]) == 0
    assert started.commands == [["fit", "--config", "linear", "--model.encoder", "a b.ckpt", "--data.root", "c d"]]
    assert not of_one.keys() & started.environment.keys()
    assert shared.items() <= started.environment.items()
    assert "litzoo test --config linear --model.encoder 'a b.ckpt' --data.root 'c d'" in capsys.readouterr().out
    run_next_stage("linear", Path("a.ckpt"), [], processes=2)
    assert "LITZOO_FIT__TRAINER__DEVICES" not in started.environment


def test_signals_and_status_of_the_next_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C is left to the next stage; what ends this one ends that one."""
    code = "import os, signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(0)); [os.kill(os.getppid(), number) for number in (signal.SIGINT, signal.SIGTERM)]; time.sleep(60)"
    start = subprocess.Popen
    monkeypatch.setattr(next_stage.subprocess, "Popen", lambda command, env: start([sys.executable, "-c", code]))
    assert run_next_stage("linear", Path("a.ckpt"), []) == 128 + 15


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--then", "supcon_digit_classifier"], "did you mean supcon_digits_classifier?"),
        (["--then", "instdisc_digits"], "the next stage, instdisc_digits, cannot be: --model.encoder is not an option"),
        (["--then", "mine.yaml"], "the next stage, mine.yaml, cannot be: Subcommand 'fit' does not accept option 'trainer.max_epoch'"),
    ],
)
def test_a_mistake_in_then_is_told_before_the_training(
    options: list[str], message: str, started: Started, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("mine.yaml").write_text((CONFIGS / "supcon_digits_classifier.yaml").read_text().replace("max_epochs", "max_epoch"))
    monkeypatch.setenv("LITZOO_FIT__NAME", "mine")
    assert main([*QUICK, *options]) == 2
    assert message in capsys.readouterr().err
    assert not Path("runs").exists()
    assert os.environ["LITZOO_FIT__NAME"] == "mine"


def test_which_encoder_goes_on(started: Started, capsys: pytest.CaptureFixture[str]) -> None:
    def encoder(*options: str) -> str:
        assert main([*QUICK, *options]) == 0
        return started.commands.pop()[4] if started.commands else ""

    assert encoder("--then", "null") == ""
    assert encoder("--trainer.fast_dev_run", "true") == ""
    assert "fast_dev_run leaves no encoder for the next stage" in capsys.readouterr().out
    assert Path(encoder()).name == "epoch_000.ckpt"
    assert Path(encoder("--checkpoint.save_top_k", "0")).name == "last.ckpt"
    assert Path(encoder("--trainer.logger", "false")).is_file()


def test_the_recipe_trains_in_two_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    started = Started(monkeypatch, inside=True)
    assert main([*RECIPE, "--data.train_fraction", "0.5", "--trainer.max_epochs", "3", "--trainer.default_root_dir", "my runs"]) == 0
    (command,) = started.commands
    encoder = tmp_path / "my runs" / "supcon_digits" / "version_0" / "checkpoints" / "average.ckpt"
    assert command[1:5] == ["--config", "supcon_digits_classifier", "--model.encoder", str(encoder)]

    before = torch.load(encoder, weights_only=True)["state_dict"]
    after = torch.load("my runs/supcon_digits_classifier/version_0/checkpoints/last.ckpt", weights_only=True)
    kept = {name.removeprefix("encoder."): value for name, value in after["state_dict"].items() if name.startswith("encoder.")}
    assert kept.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in kept.items() if isinstance(value, Tensor))
    assert after["found_lr"] > 0
    capsys.readouterr()
    assert main(["test", *command[1:]]) == 0
    scores = [line.split()[-1] for line in capsys.readouterr().out.splitlines() if "test/accuracy" in line]
    assert float(scores[0]) > 0.9
    assert main(["test", *RECIPE[1:], "--trainer.default_root_dir", "my runs", "--ckpt_path", str(encoder)]) == 0
    assert main([*RECIPE, "--ckpt_path", str(encoder)]) == 2
    assert "average.ckpt holds weights alone, not the state of a training" in capsys.readouterr().err
    assert (
        yaml.safe_load(Path("my runs/supcon_digits_classifier/version_0/config.yaml").read_text())["data"]["init_args"]["image_size"] == 16
    )
