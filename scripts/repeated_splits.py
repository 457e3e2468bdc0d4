"""Score a recipe on repeated stratified splits: mean and 95 % interval of the test metrics.

    python scripts/repeated_splits.py pointnet_furniture --splits 5 -- --trainer.max_epochs 40

Each split k = 1, 2, ... is drawn with `--data.split_seed k`, trained with `--seed_everything k`, its checkpoint chosen on the
validation part and scored once on the test part. What follows `--` is handed to `litzoo fit` and `litzoo test`. Splits
that were scored before in the same folder are not trained again, so an interrupted series can be continued.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from scipy import stats


def run_split(recipe: str, split: int, runs: Path, options: list[str]) -> dict[str, float]:
    """Train and score one split in processes of their own; returns the test metrics."""
    result = runs / f"{Path(recipe).stem}_split_{split}.json"
    if not result.is_file():
        shared = ["--config", recipe, "--trainer.default_root_dir", str(runs), "--name", result.stem]
        shared += ["--data.split_seed", str(split), "--seed_everything", str(split), "--trainer.enable_progress_bar", "false", *options]
        for command in ("fit", "test"):
            subprocess.run([sys.executable, "-m", "litzoo", command, *shared], check=True, stdout=subprocess.DEVNULL)
        tested = max(runs.glob(f"{result.stem}/version_*/test_*/metrics.csv"), key=lambda path: path.stat().st_mtime)
        header, values = (line.split(",") for line in tested.read_text().splitlines()[:2])
        metrics = {name: float(value) for name, value in zip(header, values, strict=True) if name.startswith("test/")}
        result.write_text(json.dumps(metrics))
    return json.loads(result.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="name or file of a recipe whose data have `split_seed`")
    parser.add_argument("--splits", type=int, default=5)
    parser.add_argument("--runs", type=Path, default=Path("runs/repeated_splits"))
    parser.add_argument("options", nargs="*", help="options for litzoo fit and test, behind --")
    arguments = parser.parse_args()
    arguments.runs.mkdir(parents=True, exist_ok=True)
    rows = []
    for split in range(1, arguments.splits + 1):
        rows.append(run_split(arguments.recipe, split, arguments.runs, arguments.options))
        print(f"split {split}: " + ", ".join(f"{name} {value:.4f}" for name, value in rows[-1].items()), flush=True)
    for name in rows[0]:
        values = np.array([row[name] for row in rows])
        half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else float("nan")
        print(f"{name}: {values.mean():.4f} ± {half:.4f} (95 % t interval, {len(values)} splits)")


if __name__ == "__main__":
    main()
