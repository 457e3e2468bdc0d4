"""Measure what each training trick changes: a small training with it and without it, from the same seeds, scored on the test set.

    python scripts/trick_effects.py cifar10.h5

Every training takes the same labels, the same first weights and the same number of optimiser steps under one cosine, and is scored by its
last weights, so nothing is chosen on the test set; validation images serve `CheckpointAverage` alone. Each trick has one setting,
which is not tuned. The effect is the difference to the plain training of the same seed: its mean and standard error over the seeds.
`PseudoLabels` also gets images without labels, which take steps from those with labels.

What is done is kept in the folder of `--runs`, and the same command goes on where it was stopped.
"""

import argparse
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from experiments import SILENT, claim_folder, keep, kept, silence_lightning, spread
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from litzoo import callbacks
from litzoo.datamodules import DigitsDataModule, HDF5ImagesDataModule
from litzoo.datamodules.splits import TRAIN, UNUSED
from litzoo.zoo import ImageClassifier, WarmupCosineLR
from litzoo.zoo.cli.precision import native_precision
from litzoo.zoo.functional.subsets import stratified_subset

PLAIN = "plain"
# Of a ResNet for small images, from the input to the output.
STAGES = [r"backbone\.(conv1|bn1)", r"blocks\.0", r"blocks\.1", r"blocks\.2", r"head"]


class Trick(NamedTuple):
    """A change of the plain training.

    Args:
        callbacks: makes them.
        model: settings of `ImageClassifier`.
        augmentation: preset, None for that of the plain training.
        unlabelled: images without a label are there too.
        trains: False if the plain training's weights are tested.
        validates: validation images decide which checkpoints are kept.
    """

    callbacks: Callable[[], list[Callback]] = list
    model: Mapping[str, Any] = MappingProxyType({})
    augmentation: str | None = None
    unlabelled: bool = False
    trains: bool = True
    validates: bool = False


TRICKS: dict[str, Trick] = {
    PLAIN: Trick(),
    "TestTimeAugmentation('flip')": Trick(lambda: [callbacks.TestTimeAugmentation("flip")], trains=False),
    "Flooding(0.1)": Trick(lambda: [callbacks.Flooding(0.1)]),
    "FGM(0.1, target='backbone.conv1')": Trick(lambda: [callbacks.FGM(0.1, target=r"backbone\.conv1")]),
    "SAM(rho=0.05)": Trick(lambda: [callbacks.SAM(rho=0.05)]),
    "EMA(decay=0.99)": Trick(lambda: [callbacks.EMA(decay=0.99)]),
    "SWA(start=0.75)": Trick(lambda: [callbacks.SWA(start=0.75)]),
    "SnapshotEnsemble(num_cycles=3)": Trick(lambda: [callbacks.SnapshotEnsemble(num_cycles=3)], {"lr_scheduler": None}),
    "CheckpointAverage()": Trick(lambda: [callbacks.CheckpointAverage()], validates=True),
    "DiscriminativeLR(factor=2.6)": Trick(lambda: [callbacks.DiscriminativeLR(factor=2.6, groups=STAGES)]),
    "GradualUnfreeze(every_n_epochs=2)": Trick(lambda: [callbacks.GradualUnfreeze(every_n_epochs=2, groups=STAGES)]),
    "PseudoLabels(threshold=0.95)": Trick(lambda: [callbacks.PseudoLabels(threshold=0.95)], unlabelled=True),
    "label_smoothing: 0.1": Trick(model={"label_smoothing": 0.1}),
    "mixup: 0.2": Trick(model={"mixup": 0.2}),
    "cutmix: 1.0": Trick(model={"cutmix": 1.0}),
    "dropout: 0.3": Trick(model={"dropout": 0.3}),
    "augmentation: randaugment": Trick(augmentation="randaugment"),
    "augmentation: none": Trick(augmentation="none"),
}


class Experiment:
    """Trainings on one data set, whose results are kept.

    Args:
        options: of the command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        data = self.data("standard")
        train, label = data.train_index, data.arrays.label
        if len(train) < options.n + options.unlabelled:
            raise SystemExit(
                f"{options.n} labels and {options.unlabelled} images without one are more than the {len(train)} that there are"
            )
        self.labelled = train[stratified_subset(label[train], options.n, seed=0)]
        rest = train[~torch.isin(train, self.labelled)]
        self.unlabelled = rest[stratified_subset(label[rest], options.unlabelled, seed=0)]

    def data(self, augmentation: str) -> Any:
        settings: dict[str, Any] = {"augmentation": augmentation, "val_fraction": 0.04, "batch_size": self.options.batch_size}
        settings["eval_batch_size"] = 500
        return DigitsDataModule(**settings) if self.options.data == "digits" else HDF5ImagesDataModule(self.options.data, **settings)

    def train(self, trick: Trick, seed: int) -> tuple[ImageClassifier, Any, float]:
        """A model trained with a trick, its data, and its accuracy on the test set."""
        options = self.options
        data = self.data(trick.augmentation or options.augmentation)
        split, label = data.arrays.split.clone(), data.arrays.label.clone()
        split[data.train_index] = UNUSED
        split[self.labelled] = TRAIN
        epochs = options.epochs
        if trick.unlabelled:
            split[self.unlabelled] = TRAIN
            label[self.unlabelled] = -1
            epochs = round(epochs * options.n / (options.n + options.unlabelled))
        data.reassign(split=split, label=label)
        seed_everything(seed, verbose=False)
        settings = {
            "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=options.lr, momentum=0.9, weight_decay=5e-4, nesterov=True),
            "lr_scheduler": lambda optimizer: WarmupCosineLR(optimizer, warmup=0.05),
        }
        model = ImageClassifier(
            data.num_classes,
            data.class_names,
            options.backbone,
            data.in_channels,
            data.image_size,
            data.image_mean,
            data.image_std,
            **(settings | dict(trick.model)),
        )
        own = trick.callbacks()
        with TemporaryDirectory() as folder:
            keepers: list[Callback] = []
            if trick.validates:
                keepers = [ModelCheckpoint(folder, monitor="val/accuracy", mode="max", save_top_k=3)]
            trainer = Trainer(
                max_epochs=epochs,
                callbacks=[*own, *keepers],
                default_root_dir=folder,
                precision=options.precision,
                accelerator=options.accelerator,
                limit_val_batches=1.0 if trick.validates else 0,
                **(SILENT | {"enable_checkpointing": trick.validates}),
            )
            trainer.fit(model, datamodule=data)
            average = next((str(each.average_path) for each in own if isinstance(each, callbacks.CheckpointAverage)), None)
            scored = trainer.test(model, datamodule=data, ckpt_path=average, verbose=False)
        return model, data, float(scored[0]["test/accuracy"])

    def run(self, seed: int) -> dict[str, float]:
        """Test accuracy of each trick."""
        path = self.options.runs / f"seed_{seed}.json"
        accuracy: dict[str, float] = kept(path) or {}
        tested = [name for name, trick in TRICKS.items() if not trick.trains]
        for name, trick in TRICKS.items():
            if not trick.trains or (name in accuracy and (name != PLAIN or all(each in accuracy for each in tested))):
                continue
            model, data, accuracy[name] = self.train(trick, seed)
            if name == PLAIN:
                for each in tested:
                    trainer = Trainer(
                        callbacks=TRICKS[each].callbacks(),
                        precision=self.options.precision,
                        accelerator=self.options.accelerator,
                        **SILENT,
                    )
                    accuracy[each] = float(trainer.test(model, datamodule=data, verbose=False)[0]["test/accuracy"])
            keep(path, accuracy)
            print(f"{time.strftime('%H:%M:%S')} seed {seed}, {name}: {accuracy[name]:.4f}", flush=True)
        return accuracy


def report(results: list[dict[str, float]]) -> str:
    """The table, in Markdown.

    Args:
        results: of `Experiment.run`, one for each seed.

    Returns:
        Its lines.
    """
    lines = ["| trick | test accuracy, % | effect, points |", "|---|---|---|"]
    plain = np.array([result[PLAIN] for result in results])
    for name in TRICKS:
        values = np.array([result[name] for result in results])
        effect = "" if name == PLAIN else spread(100 * (values - plain), 1, "+")
        lines.append(f"| {name if name == PLAIN else f'`{name}`'} | {spread(100 * values, 1)} | {effect} |")
    lines.append(f"mean ± standard error, {len(results)} seeds")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="an HDF5 file of images with splits, or the word digits")
    parser.add_argument("--seeds", type=int, default=3, help="how many (default: 3)")
    parser.add_argument("--n", type=int, default=5000, help="labels (default: 5000)")
    parser.add_argument("--unlabelled", type=int, default=10_000, help="images without a label, for PseudoLabels (default: 10000)")
    parser.add_argument("--epochs", type=int, default=15, help="of the labels (default: 15)")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--backbone", default="resnet8", choices=["resnet8", "resnet20", "resnet32", "resnet56"])
    parser.add_argument("--augmentation", default="standard")
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--runs", type=Path, default=Path("runs/trick_effects"))
    options = parser.parse_args()
    silence_lightning()
    options.precision = native_precision(options.accelerator)
    claim_folder(parser, options)
    experiment = Experiment(options)
    print(report([experiment.run(seed) for seed in range(options.seeds)]))


if __name__ == "__main__":
    main()
