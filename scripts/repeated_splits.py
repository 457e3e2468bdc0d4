"""Score a recipe on repeated stratified splits: mean and 95 % interval of the test metrics.

    python scripts/repeated_splits.py pointnet_furniture --splits 5 -- --trainer.max_epochs 40

Each split k = 1, 2, ... is drawn with `--data.split_seed k`, trained with `--seed_everything k`, its checkpoint chosen on the
validation part and scored once on the test part. What follows `--` is handed to `litzoo fit` and `litzoo test`. Splits
that were scored before in the same folder are not trained again, so an interrupted series can be continued.

    python scripts/repeated_splits.py pointnet_furniture --alternative input="--model.input_transform true"

trains alternatives of the recipe as well, and scores the choice between them: in each split, the one whose checkpoint has the
lowest validation loss, or with `--chosen-by val/knn_bank` the highest of that. So no test object of a split has a say in what is
scored on it.

With `--same-split` the data keep their own split and only the seed of the training changes: 0, 1, ...
"""

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
from scipy import stats


def run_split(
    name: str, recipe: str, seed: int, runs: Path, same_split: bool, options: list[str], chosen_by: str = "val/loss"
) -> dict[str, float]:
    """Train and score one split in processes of their own; returns the test metrics, and of validation what the choice goes by."""
    result = runs / f"{name}_{'seed' if same_split else 'split'}_{seed}.json"
    metrics: dict[str, float] = json.loads(result.read_text()) if result.is_file() else {}
    if not metrics:
        shared = ["--config", recipe, "--trainer.default_root_dir", str(runs), "--name", result.stem]
        shared += ["--seed_everything", str(seed), "--trainer.enable_progress_bar", "false", *options]
        shared += [] if same_split else ["--data.split_seed", str(seed)]
        for command in ("fit", "test"):
            subprocess.run([sys.executable, "-m", "litzoo", command, *shared], check=True, stdout=subprocess.DEVNULL)
    if chosen_by not in metrics:  # also where the split was scored before, and chosen by something else
        tested = max(runs.glob(f"{result.stem}/version_*/test_*/metrics.csv"), key=lambda path: path.stat().st_mtime)
        trained = np.genfromtxt(tested.parent.parent / "metrics.csv", delimiter=",", names=True, deletechars="")
        if chosen_by not in (trained.dtype.names or ()):
            logged = ", ".join(key for key in trained.dtype.names or () if key.startswith("val/"))
            raise SystemExit(f"{name} logs no {chosen_by}: let --chosen-by be one of {logged}")
        header, values = (line.split(",") for line in tested.read_text().splitlines()[:2])
        metrics |= {key: float(value) for key, value in zip(header, values, strict=True) if key.startswith("test/")}
        metrics[chosen_by] = float((np.nanmin if chosen_by.endswith("loss") else np.nanmax)(trained[chosen_by]))
        result.write_text(json.dumps(metrics))
    return metrics


def report(title: str, rows: list[dict[str, float]], unit: str) -> None:
    """Print mean and 95 % t interval of each test metric."""
    for name in (key for key in rows[0] if key.startswith("test/")):
        values = np.array([row[name] for row in rows])
        half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else float("nan")
        print(f"{title}: {name}: {values.mean():.4f} ± {half:.4f} (95 % t interval, {len(values)} {unit})")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, epilog="options for litzoo fit and test follow --"
    )
    parser.add_argument("recipe", help="name or file of a recipe whose data have `split_seed`")
    parser.add_argument("--splits", type=int, default=5, help="how many splits, or with --same-split how many seeds (default: 5)")
    parser.add_argument("--same-split", action="store_true", help="keep the split of the data, change the seed only")
    parser.add_argument("--runs", type=Path, default=Path("runs/repeated_splits"))
    parser.add_argument("--alternative", action="append", default=[], metavar="NAME=OPTIONS", help="more options, under a name; repeatable")
    parser.add_argument("--chosen-by", default="val/loss", metavar="METRIC", help="of validation: a loss is to be low, anything else high")
    own, behind = (sys.argv[1:], []) if "--" not in sys.argv else (sys.argv[1 : sys.argv.index("--")], sys.argv[sys.argv.index("--") + 1 :])
    arguments = parser.parse_args(own)
    arguments.runs.mkdir(parents=True, exist_ok=True)
    recipe = Path(arguments.recipe).stem
    candidates: dict[str, list[str]] = {recipe: []}
    for alternative in arguments.alternative:
        name, equals, options = alternative.partition("=")
        if not equals or not name:
            parser.error(f"--alternative takes NAME=OPTIONS, got {alternative}")
        candidates[f"{recipe}_{name}"] = shlex.split(options)
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in candidates}
    unit, first = ("seeds", 0) if arguments.same_split else ("splits", 1)
    for seed in range(first, first + arguments.splits):
        for name, options in candidates.items():
            options = [*behind, *options]
            rows[name].append(run_split(name, arguments.recipe, seed, arguments.runs, arguments.same_split, options, arguments.chosen_by))
            values = ", ".join(f"{key} {value:.4f}" for key, value in rows[name][-1].items())
            print(f"{unit[:-1]} {seed}, {name}: {values}", flush=True)
    for name in candidates:
        report(name, rows[name], unit)
    if len(candidates) > 1:
        pick = min if arguments.chosen_by.endswith("loss") else max
        best = [pick(candidates, key=lambda name: rows[name][place][arguments.chosen_by]) for place in range(arguments.splits)]
        print(f"chosen on validation, {unit[:-1]} by {unit[:-1]}: " + ", ".join(best))
        report("the choice", [rows[name][place] for place, name in enumerate(best)], unit)


if __name__ == "__main__":
    main()
