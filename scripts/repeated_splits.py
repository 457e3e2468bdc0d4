"""Score a recipe on repeated stratified splits: mean and 95 % interval of the test metrics.

    python scripts/repeated_splits.py pointnet_furniture --splits 5 -- --trainer.max_epochs 40

Each split k = 1, 2, ... is drawn with `--data.split_seed k`, trained with `--seed_everything k`, its checkpoint chosen on the
validation part and scored once on the test part. What follows `--` is handed to `litzoo fit` and `litzoo test`. Splits
that were scored before in the same folder are not trained again, so an interrupted series can be continued.

    python scripts/repeated_splits.py pointnet_furniture --alternative input="--model.input_transform true"

trains alternatives of the recipe as well, and scores the choice between them: in each split, the one whose checkpoint has the
lowest validation loss. So no test object of a split has a say in what is scored on it.
"""

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
from scipy import stats

CHOSEN_BY = "val/loss"


def run_split(name: str, recipe: str, split: int, runs: Path, options: list[str]) -> dict[str, float]:
    """Train and score one split in processes of their own; returns the test metrics and the checkpoint's validation loss."""
    result = runs / f"{name}_split_{split}.json"
    if not result.is_file():
        shared = ["--config", recipe, "--trainer.default_root_dir", str(runs), "--name", result.stem]
        shared += ["--data.split_seed", str(split), "--seed_everything", str(split), "--trainer.enable_progress_bar", "false", *options]
        for command in ("fit", "test"):
            subprocess.run([sys.executable, "-m", "litzoo", command, *shared], check=True, stdout=subprocess.DEVNULL)
        tested = max(runs.glob(f"{result.stem}/version_*/test_*/metrics.csv"), key=lambda path: path.stat().st_mtime)
        trained = np.genfromtxt(tested.parent.parent / "metrics.csv", delimiter=",", names=True, deletechars="")
        header, values = (line.split(",") for line in tested.read_text().splitlines()[:2])
        metrics = {key: float(value) for key, value in zip(header, values, strict=True) if key.startswith("test/")}
        metrics[CHOSEN_BY] = float(np.nanmin(trained[CHOSEN_BY]))
        result.write_text(json.dumps(metrics))
    return json.loads(result.read_text())


def report(title: str, rows: list[dict[str, float]]) -> None:
    """Print mean and 95 % t interval of each test metric."""
    for name in (key for key in rows[0] if key.startswith("test/")):
        values = np.array([row[name] for row in rows])
        half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else float("nan")
        print(f"{title}: {name}: {values.mean():.4f} ± {half:.4f} (95 % t interval, {len(values)} splits)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="name or file of a recipe whose data have `split_seed`")
    parser.add_argument("--splits", type=int, default=5)
    parser.add_argument("--runs", type=Path, default=Path("runs/repeated_splits"))
    parser.add_argument("--alternative", action="append", default=[], metavar="NAME=OPTIONS", help="more options, under a name; repeatable")
    parser.add_argument("options", nargs="*", help="options for litzoo fit and test, behind --")
    arguments = parser.parse_args()
    arguments.runs.mkdir(parents=True, exist_ok=True)
    recipe = Path(arguments.recipe).stem
    candidates: dict[str, list[str]] = {recipe: []}
    for alternative in arguments.alternative:
        name, equals, options = alternative.partition("=")
        if not equals or not name:
            parser.error(f"--alternative takes NAME=OPTIONS, got {alternative}")
        candidates[f"{recipe}_{name}"] = shlex.split(options)
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in candidates}
    for split in range(1, arguments.splits + 1):
        for name, options in candidates.items():
            rows[name].append(run_split(name, arguments.recipe, split, arguments.runs, [*arguments.options, *options]))
            print(f"split {split}, {name}: " + ", ".join(f"{key} {value:.4f}" for key, value in rows[name][-1].items()), flush=True)
    for name in candidates:
        report(name, rows[name])
    if len(candidates) > 1:
        best = [min(candidates, key=lambda name: rows[name][split][CHOSEN_BY]) for split in range(arguments.splits)]
        print("chosen on validation, split by split: " + ", ".join(best))
        report("the choice", [rows[name][split] for split, name in enumerate(best)])


if __name__ == "__main__":
    main()
