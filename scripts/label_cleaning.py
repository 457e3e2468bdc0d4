"""Score label cleaning on known mistakes: flip labels, clean by both schemes and by cleanlab, compare what is found with what was flipped.

    python scripts/label_cleaning.py cifar10.h5 --n 10000 --rates 0.1 0.2 --kinds symmetric pair --seeds 0 1 2

Of the training images of an HDF5 file, n are taken, each class its share. A share of their labels is flipped: `symmetric`, to any
other class, or `pair`, from class c to c + 1. The methods:

    one of K, majority    models trained on one fold; flagged if more than half of the K - 1 votes doubt the label
    one of K, all votes   the same models; flagged if all votes doubt it
    one of K, cleanlab    the same models; cleanlab's default filter on their mean probabilities
    K - 1 of K, vote      models trained on all folds but one; flagged if the one vote doubts the label
    K - 1 of K, cleanlab  the same models; cleanlab's default filter

A model of one fold is trained for more epochs, as it sees fewer samples in each. Everything that was trained before in the same
folder with the same settings is not trained again, so an interrupted series can be continued, and more seeds, rates or kinds can
be added. The defaults train 60 small models of each scheme: 12 cases with 780,000 training samples each on 10,000 images.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from litzoo.datamodules import HDF5ImagesDataModule
from litzoo.zoo import ImageClassifier, WarmupCosineLR
from litzoo.zoo.cleaning import CleaningResult, Scheme, clean_labels, find_issues
from litzoo.zoo.cli.precision import native_precision
from litzoo.zoo.functional.label_cleaning import judge_labels, mean_probabilities
from litzoo.zoo.functional.subsets import stratified_subset

KINDS = ("symmetric", "pair")
UNUSED = 3


class Score(NamedTuple):
    """How well the flagged labels are those that were flipped."""

    flagged: float
    precision: float
    recall: float
    f1: float


class MakeModel:
    """Makes a classifier of images; a class, so that processes can be sent one."""

    def __init__(self, backbone: str, lr: float) -> None:
        self.backbone = backbone
        self.lr = lr

    def __call__(self, data: Any) -> ImageClassifier:
        return ImageClassifier(
            data.num_classes,
            backbone=self.backbone,
            in_channels=data.in_channels,
            image_size=data.image_size,
            optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=self.lr, weight_decay=0.05),
            lr_scheduler=lambda optimizer: WarmupCosineLR(optimizer, warmup=0.05),
        )


def flip_labels(label: np.ndarray, rate: float, kind: str, num_classes: int, seed: int) -> np.ndarray:
    """Flip round(rate N) labels, drawn at random: to another class, or with kind "pair" to the next one."""
    draw = np.random.default_rng(seed)
    chosen = draw.permutation(len(label))[: round(rate * len(label))]
    step = draw.integers(1, num_classes, len(chosen)) if kind == "symmetric" else 1
    flipped = label.copy()
    flipped[chosen] = (label[chosen] + step) % num_classes
    return flipped


def score(flagged: Tensor, flipped: Tensor) -> Score:
    """Precision, recall and F1; 0 where nothing was flagged or flipped."""
    found = int((flagged & flipped).sum())
    precision, recall = found / max(int(flagged.sum()), 1), found / max(int(flipped.sum()), 1)
    return Score(int(flagged.sum()), precision, recall, 2 * found / max(int(flagged.sum()) + int(flipped.sum()), 1))


def methods(one: CleaningResult, rest: CleaningResult) -> Iterator[tuple[str, Tensor]]:
    """Names of the methods, and what they flag."""
    votes = len(one.probabilities) - 1
    yield "one of K, majority", one.table.review
    yield "one of K, all votes", judge_labels(one.probabilities, one.label, min_flags=votes).review
    yield "one of K, cleanlab", find_issues(mean_probabilities(one.probabilities), one.label)
    yield "K - 1 of K, vote", rest.table.review
    yield "K - 1 of K, cleanlab", find_issues(mean_probabilities(rest.probabilities), rest.label)


def run_case(options: argparse.Namespace, kind: str, rate: float, seed: int, report: Callable[[str], None]) -> dict[str, Score]:
    """Flip, clean by both schemes, and score all methods."""
    data = HDF5ImagesDataModule(options.path, val_fraction=0.0, batch_size=options.batch_size)
    train, true = data.train_index, data.arrays.label.clone()
    chosen = train[stratified_subset(true[train], options.n, seed=0)]
    split = torch.full_like(data.arrays.split, UNUSED)
    split[chosen] = 0
    label = true.clone()
    label[chosen] = torch.from_numpy(flip_labels(true[chosen].numpy(), rate, kind, data.num_classes, seed))
    data.reassign(split=split, label=label)
    schemes: tuple[tuple[Scheme, int], ...] = (("train_on_one", options.fold_epochs), ("leave_one_out", options.epochs))
    results = [
        clean_labels(
            MakeModel(options.backbone, options.lr),
            data,
            partial(Trainer, max_epochs=epochs, accelerator=options.accelerator, devices=1, precision=options.precision),
            options.runs / f"{Path(options.path).stem}_{len(chosen)}_{kind}_{rate:g}_seed_{seed}" / scheme,
            folds=options.folds,
            scheme=scheme,
            num_models=options.models,
            seed=seed,
            jobs=options.jobs,
            recipe={"epochs": epochs, **{name: getattr(options, name) for name in ("backbone", "lr", "batch_size", "precision")}},
            report=report,
        )
        for scheme, epochs in schemes
    ]
    flipped = (label != true)[results[0].index]
    return {name: score(flagged, flipped) for name, flagged in methods(*results)}


def row(case: str, method: str, values: Score, spread: Score | None = None) -> str:
    """A line of the table; with a spread, mean ± standard deviation."""
    cells = [f"{values.flagged:7,.0f}"]
    for name in ("precision", "recall", "f1"):
        cells.append(f"{getattr(values, name):.3f}" + ("" if spread is None else f" ± {getattr(spread, name):.3f}"))
    return f"{case:<34} {method:<21} {'  '.join(cells)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", help="HDF5 file as HDF5ImagesDataModule reads it")
    parser.add_argument("--n", type=int, default=10_000, help="images to take (default: 10000)")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.1, 0.2], help="shares of labels to flip (default: 0.1 0.2)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="how to flip them (default: both)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of flips, folds and models (default: 0 1 2)")
    parser.add_argument("--folds", type=int, default=5, help="K (default: 5)")
    parser.add_argument("--models", type=int, default=1, help="models in a round (default: 1)")
    parser.add_argument("--epochs", type=int, default=12, help="of a model of K - 1 folds (default: 12)")
    parser.add_argument("--fold-epochs", type=int, default=30, help="of a model of one fold (default: 30)")
    parser.add_argument("--backbone", default="conv4", help="encoder of the models (default: conv4)")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate of AdamW (default: 0.003)")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--jobs", type=int, default=1, help="processes (default: 1)")
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--runs", type=Path, default=Path("runs/label_cleaning"), help="where the predictions are kept")
    options = parser.parse_args()
    if not all(0 < rate < 1 for rate in options.rates):
        parser.error(f"--rates must lie between 0 and 1, got {' '.join(map(str, options.rates))}")
    if min(options.n, options.folds, options.models, options.epochs, options.fold_epochs, options.batch_size, options.jobs) < 1:
        parser.error("numbers of images, folds, models, epochs and processes must be at least 1")
    options.precision = native_precision(options.accelerator)

    def report(line: str) -> None:
        print(f"    {line}", file=sys.stderr, flush=True)

    header = f"{'case':<34} {'method':<21} flagged  precision  recall  F1"
    table: dict[str, dict[str, list[Score]]] = {}
    print(header)
    for kind in options.kinds:
        for rate in options.rates:
            for seed in options.seeds:
                for method, values in run_case(options, kind, rate, seed, report).items():
                    table.setdefault(f"{kind} {rate:g}", {}).setdefault(method, []).append(values)
                    print(row(f"{kind} {rate:g}, seed {seed}", method, values), flush=True)
    print(f"\nmean ± standard deviation over {len(options.seeds)} seeds\n{header}")
    for case, rows in table.items():
        for method, scores in rows.items():
            every = np.array(scores)
            spread = every.std(axis=0, ddof=1) if len(every) > 1 else np.zeros(every.shape[1])
            print(row(case, method, Score(*every.mean(axis=0)), Score(*spread)))


if __name__ == "__main__":
    main()
