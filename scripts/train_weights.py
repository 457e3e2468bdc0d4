"""Make trained weights: run a recipe, take the checkpoint that validation chose, store it in float16, score that file once.

python scripts/train_weights.py RECIPE [--output-name NAME] [--runs DIR | --run DIR [--machine TEXT]]
"""

import argparse
import contextlib
import hashlib
import inspect
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything

from litzoo import __version__
from litzoo.callbacks import KNNMonitor
from litzoo.zoo import pretrained
from litzoo.zoo.cli import CommandError, recipe_path
from litzoo.zoo.files import write_file
from litzoo.zoo.weights_files import WEIGHTS

ROOT = Path(__file__).resolve().parent.parent
# The settings that decide what is learned; others say where files lie and what is shown, or are told otherwise on the card.
_TRAINING = ("trainer.precision", "trainer.max_epochs", "trainer.gradient", "trainer.accumulate", "model.", "data.batch_size", "data.views")


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, the wall time of its fit, and what was chosen after how many epochs."""

    folder: Path
    minutes: float
    best: Path
    epochs: int
    selected_by: str


def fit(recipe: Path, runs: Path) -> tuple[Path, float]:
    """Train a recipe as `litzoo fit` does, and return the run's folder and the minutes it took."""
    from litzoo.zoo.cli.training import train

    before = set(runs.glob("*/version_*"))
    start = time.monotonic()
    train(["fit", "--config", str(recipe), "--trainer.default_root_dir", str(runs)])
    minutes = (time.monotonic() - start) / 60
    made = [path for path in runs.glob("*/version_*") if path not in before]
    if len(made) != 1:
        raise CommandError(f"the run of {recipe} under {runs} cannot be told from the {len(made)} new folders: use an empty --runs")
    return made[0], minutes


def finished_run(folder: Path, minutes: float | None = None) -> Run:
    """Read what a run's files say of its best checkpoint, its epochs and its time.

    Args:
        folder: `ROOT/NAME/version_N`.
        minutes: of the fit; None takes the time from the writing of config.yaml to that of the last checkpoint.

    Raises:
        CommandError: if the run has no checkpoint or no configuration, was resumed or selected nothing.
    """
    config, last = folder / "config.yaml", folder / "checkpoints" / "last.ckpt"
    if not last.is_file() or not config.is_file():
        raise CommandError(f"{folder} is not a run of `litzoo fit`: it lacks config.yaml or checkpoints/last.ckpt")
    if minutes is None and list(folder.glob("config_resumed_*.yaml")):
        raise CommandError(f"{folder} was resumed, so its files do not tell how long it trained: train the recipe in one go")
    checkpoint = torch.load(last, map_location="cpu", weights_only=True)
    # By its name: the run's folder may have been moved since.
    chosen = [
        (last.parent / Path(state["best_model_path"]).name, state["monitor"])
        for state in checkpoint["callbacks"].values()
        if isinstance(state, dict) and state.get("best_model_path") and state.get("monitor")
    ]
    if len(chosen) != 1 or not chosen[0][0].is_file():
        raise CommandError(f"{last} does not name one best checkpoint that still exists: set --checkpoint.monitor to a validation metric")
    best, monitor = chosen[0]
    if not monitor.startswith("val"):
        raise CommandError(
            f"{folder} chose its checkpoint by {monitor}, which is not a validation metric: weights are chosen on validation"
        )
    if minutes is None:
        minutes = (last.stat().st_mtime - config.stat().st_mtime) / 60
    return Run(folder, minutes, best, checkpoint["epoch"] + 1, monitor)


def leaves(settings: Any, name: str = "") -> dict[str, Any]:
    """A nested configuration as `a.b.c` -> value, without the levels that the command line leaves out."""
    if not isinstance(settings, dict):
        return {name: settings}
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= leaves(value, name if key == "init_args" else f"{name}.{key}".lstrip("."))
    return found


def options(config: dict[str, Any], recipe: Path) -> str:
    """What a run's command line changed of its recipe's training, as options of `litzoo fit`; where the data lie is left out."""
    from litzoo.zoo.cli.training import train

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        train(["fit", "--config", str(recipe), "--print_config"])
    planned = leaves(yaml.safe_load(printed.getvalue()))
    changed = {name: value for name, value in leaves(config).items() if name in planned and planned[name] != value}
    said = {name: value for name, value in changed.items() if name.startswith(_TRAINING) and name != "model.encoder"}
    return " ".join(f"--{name} {value}" for name, value in said.items())


def build_data(config: dict[str, Any]) -> LightningDataModule:
    """The DataModule of a run's config.yaml."""
    parser = ArgumentParser()
    parser.add_subclass_arguments(LightningDataModule, "data")
    data: LightningDataModule = parser.instantiate_classes(parser.parse_object({"data": config["data"]})).data
    return data


def judges(config: dict[str, Any]) -> list[Callback]:
    """The callbacks of a run that score features, for models without a classifier."""
    listed = config["trainer"].get("callbacks") or []
    return [KNNMonitor(**(each.get("init_args") or {})) for each in listed if each["class_path"].endswith(".KNNMonitor")]


def score(model: LightningModule, data: LightningDataModule, callbacks: list[Callback]) -> tuple[dict[str, float], int]:
    """Metrics on the test split, without their `test/`, and the number of samples in it."""
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(accelerator="cpu", devices=1, callbacks=callbacks, **off)
    values = trainer.test(model, data, verbose=False)[0]
    samples = sum(len(batch[1]) for batch in data.test_dataloader())
    return {name.removeprefix("test/"): round(float(value), 6) for name, value in values.items()}, samples


def machine() -> str:
    """The processor and the number of threads that torch uses."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    threads = torch.get_num_threads()
    return f"{names[0] if names else 'unknown CPU'}, {threads} thread{'s' if threads > 1 else ''}"


def commit() -> str:
    """The commit of this checkout, marked where files differ from it, other than weights made before these."""
    found = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    differing = ["git", "-C", str(ROOT), "status", "--porcelain", "--", ".", ":!zoo/weights"]
    changed = subprocess.run(differing, capture_output=True, text=True, check=True).stdout.strip()
    return f"{found}-changed" if changed else found


def add_to_index(name: str, file: Path, card: dict[str, Any]) -> None:
    """Put an entry into index.json; the file is replaced as a whole."""
    path = WEIGHTS / "index.json"
    index = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    index[name] = {"file": file.name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest(), "card": card}
    write_file(path, (json.dumps(index, indent=2, sort_keys=True) + "\n").encode())


def make(recipe: Path, run: Run, name: str, texts: dict[str, str | None]) -> dict[str, Any]:
    """Export the best checkpoint, score the exported file, and register it.

    The file in zoo/weights and the index change only at the end, when everything has gone well.

    Args:
        recipe: the recipe that was run.
        run: the finished run.
        name: name of the weights.
        texts: "summary", "task", "data", "licence" and "machine" of the card; None takes the recipe's or the class's own words,
            and this machine.

    Returns:
        The card.
    """
    config = yaml.safe_load((run.folder / "config.yaml").read_text(encoding="utf-8"))
    seed = config["seed_everything"]
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise CommandError(f"{run.folder / 'config.yaml'} holds no fixed seed: set seed_everything to a number in the recipe")
    seed_everything(seed)  # data whose split depends on the seed must get the run's
    model, data = pretrained.load_checkpoint(run.best), build_data(config)
    first_line = recipe.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ").strip()
    card: dict[str, Any] = {
        "summary": texts["summary"] or first_line,
        "task": texts["task"] or type(model).__name__,
        "data": texts["data"] or (inspect.getdoc(type(data)) or type(data).__name__).partition("\n")[0],
        "params": sum(parameter.numel() for parameter in model.parameters()),
        "recipe": recipe.stem,
        "options": options(config, recipe),
        "seed": seed,
        "epochs": run.epochs,
        "selected_by": run.selected_by,
        "minutes": round(run.minutes, 2),
        "machine": texts["machine"] or machine(),
        "licence": texts["licence"],
        "commit": commit(),
        "litzoo": __version__,
    }
    with tempfile.TemporaryDirectory(dir=WEIGHTS, prefix=".") as folder:  # the same file system, so that it can be moved
        stored = Path(folder) / f"{name}.safetensors"
        pretrained.save(model, stored, card, half=True)
        metrics, samples = score(pretrained.load(stored), data, judges(config))
        card |= {"metrics": metrics, "test_samples": samples}
        pretrained.save(model, stored, card, half=True)
        os.replace(stored, WEIGHTS / stored.name)
    add_to_index(name, WEIGHTS / f"{name}.safetensors", card)
    return card


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", metavar="RECIPE", help="a shipped recipe or a YAML file")
    parser.add_argument("--output-name", metavar="NAME", help="name of the weights; the recipe's by default")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--runs", metavar="DIR", type=Path, help="keep the run under this folder; by default it is deleted")
    where.add_argument("--run", metavar="DIR", type=Path, help="do not train: take the finished run in this folder, .../version_N")
    parser.add_argument("--summary", help="one line for `litzoo list`; the recipe's first line by default")
    parser.add_argument("--task", help="such as 'classification of point clouds'; the model's name by default")
    parser.add_argument("--data", help="what it was trained on; the DataModule's first sentence by default")
    parser.add_argument("--licence", default="Apache-2.0", help="of the weights (default: %(default)s)")
    parser.add_argument("--machine", metavar="TEXT", help="where --run was trained; this machine by default")
    arguments = parser.parse_args(argv)
    texts = {key: getattr(arguments, key) for key in ("summary", "task", "data", "licence", "machine")}
    try:
        recipe = Path(recipe_path(arguments.recipe))
        name = arguments.output_name or recipe.stem
        with tempfile.TemporaryDirectory() as temporary:
            folder, minutes = (arguments.run, None) if arguments.run else fit(recipe, arguments.runs or Path(temporary))
            card = make(recipe, finished_run(folder, minutes), name, texts)
    except (CommandError, ValueError, OSError) as error:
        print(f"train_weights: {error}", file=sys.stderr)
        return 2
    print(json.dumps(card, indent=2))
    print(f'litzoo.load("{name}"); now run: python scripts/model_table.py --write')
    return 0


if __name__ == "__main__":
    sys.exit(main())
