"""Measure what `litzoo select` saves: labels that it chooses against labels chosen at random, by the accuracy on the test set.

    python scripts/data_selection.py cifar10.h5

For each seed, a model and the members of an ensemble are trained on the first labels, drawn at random. Then, round by round, `select_samples`
ranks samples without a label, the most useful ones get theirs, and all models are trained anew. Random labels are added in as many and in
some more rounds; one model is trained on all labels. Every training takes the same number of steps, starts from scratch and is scored by its
last weights, so nothing is chosen on the test set. The table says how many random labels give the accuracy of the selected ones, by
interpolation of the accuracy over the logarithm of the number of labels.

What is done is kept in the folder of `--runs`, and the same command goes on where it was stopped.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from experiments import SILENT, claim_folder, keep, kept, silence_lightning, spread
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor

from litzoo.datamodules import DigitsDataModule, HDF5ImagesDataModule
from litzoo.datamodules.splits import TRAIN, UNUSED
from litzoo.zoo import ImageClassifier, select_samples
from litzoo.zoo.functional.random import fold_in, random_order

# Numbers that keep the streams of one seed apart.
_LABELS, _MODEL, _POOL = 1, 2, 3


class Experiment:
    """Trainings on parts of the labels of one data set, whose results are kept.

    Args:
        options: of the command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        if options.data == "digits":
            self.data: Any = DigitsDataModule(val_fraction=0.0, batch_size=options.batch_size)
        else:
            self.data = HDF5ImagesDataModule(options.data, val_fraction=0.0, batch_size=options.batch_size)
        self.data.eval_batch_size = 256
        self.split = self.data.arrays.split.clone()
        self.pool: Tensor = self.data.train_index.clone()

    def order(self, seed: int) -> Tensor:
        """All training samples in the order in which random labels are drawn."""
        return self.pool[random_order(fold_in(seed, _LABELS), len(self.pool))]

    def train(self, labelled: Tensor, seed: int, member: int) -> ImageClassifier:
        """A model trained on these labels; member 0 is the one in production."""
        split = self.split.clone()
        split[self.pool] = UNUSED
        split[labelled] = TRAIN
        data, options = self.data, self.options
        data.reassign(split=split)
        seed_everything(int(fold_in(seed, _MODEL, member)) & 0x7FFFFFFF, verbose=False)
        model = ImageClassifier(
            data.num_classes,
            data.class_names,
            options.backbone,
            data.in_channels,
            data.image_size,
            data.image_mean,
            data.image_std,
            optimizer=lambda params: torch.optim.SGD(params, lr=options.lr, momentum=0.9, weight_decay=5e-4, nesterov=True),
        )
        Trainer(max_steps=options.steps, max_epochs=-1, limit_val_batches=0, **SILENT).fit(model, datamodule=data)
        return model.eval()

    def accuracy(self, model: ImageClassifier) -> float:
        """On the test set."""
        return float(Trainer(**SILENT).test(model, datamodule=self.data, verbose=False)[0]["test/accuracy"])

    def path(self, name: str) -> Path:
        return Path(self.options.runs) / f"{name}.json"

    def scored(self, name: str, labelled: Tensor, seed: int) -> float:
        """Test accuracy of one model on these labels."""
        found = kept(self.path(name)) or keep(self.path(name), {"accuracy": self.accuracy(self.train(labelled, seed, 0))})
        return float(found["accuracy"])

    def selected(self, name: str, labelled: Tensor, seed: int, turn: int) -> dict[str, Any]:
        """Test accuracy of the production model on these labels, and the samples whose labels come next."""
        found = kept(self.path(name))
        if found is not None:
            return found
        options = self.options
        production = self.train(labelled, seed, 0)
        result: dict[str, Any] = {"accuracy": self.accuracy(production)}
        if turn < options.rounds:
            members = [self.train(labelled, seed, member + 1) for member in range(options.members)]
            rest = self.pool[~torch.isin(self.pool, labelled)]
            rest = rest[random_order(fold_in(seed, _POOL, turn), len(rest))[: options.pool]]
            batches = (self.data.arrays.input[part] for part in rest.split(256))
            choice = select_samples(production, members, batches, options.views or (), None, options.threshold, options.rank)
            queue, known = rest[choice.order], rest[choice.left_out]
            # Once fewer are doubted than get a label, the others come at random.
            result["next"] = torch.cat([queue, known])[: options.step].tolist()
            right = self.data.arrays.label[rest] == choice.proposed
            result["left_out"] = float(choice.left_out.float().mean())
            result["left_out_right"] = float(right[choice.left_out].float().mean()) if len(known) else None
            result["proposals_right"] = float(right[choice.order].float().mean()) if len(queue) else None
        return keep(self.path(name), result)

    def run(self, seed: int) -> dict[str, Any]:
        """All trainings of a seed: `selected` and `random`, number of labels -> accuracy, and `rounds`, what the selections said."""
        options, order = self.options, self.order(seed)
        chosen, selected, rounds = order[: options.start], {}, []
        for turn in range(options.rounds + 1):
            found = self.selected(f"seed_{seed}_selected_{len(chosen)}", chosen, seed, turn)
            selected[len(chosen)] = found["accuracy"]
            self.tell(seed, f"{len(chosen):,} labels, selected", found["accuracy"])
            if "next" in found:
                rounds.append(found)
                chosen = torch.cat([chosen, torch.tensor(found["next"], dtype=chosen.dtype)])
        random = {options.start: selected[options.start]}
        sizes = [options.start + options.step * turn for turn in range(1, options.rounds + options.more + 1)]
        for size in [*(size for size in sizes if size < len(order)), len(order)]:
            random[size] = self.scored(f"seed_{seed}_random_{size}", order[:size], seed)
            self.tell(seed, f"{size:,} labels, random", random[size])
        return {"selected": selected, "random": random, "rounds": rounds}

    def tell(self, seed: int, what: str, accuracy: float) -> None:
        print(f"{time.strftime('%H:%M:%S')} seed {seed}, {what}: {accuracy:.4f}", flush=True)


def labels_needed(curve: dict[int, float], accuracy: float) -> float:
    """With how many labels a curve reaches an accuracy, linear in log n between its points; infinite if it does not.

    Args:
        curve: number of labels -> accuracy. Where it falls, the best accuracy so far counts.
        accuracy: to be reached.

    Returns:
        The number; at least the smallest one of the curve.
    """
    sizes = sorted(curve)
    best = np.maximum.accumulate([curve[size] for size in sizes])
    if accuracy > best[-1]:
        return float("inf")
    above = int(np.argmax(best >= accuracy))
    if above == 0:
        return float(sizes[0])
    low, high = best[above - 1], best[above]
    share = (accuracy - low) / (high - low)
    return float(np.exp((1 - share) * np.log(sizes[above - 1]) + share * np.log(sizes[above])))


def report(results: list[dict[str, Any]]) -> str:
    """The table, in Markdown.

    Args:
        results: of `Experiment.run`, one for each seed.

    Returns:
        Its lines.
    """
    lines = ["| labels | selected, % | random, % | random labels for the accuracy of the selected | saved |", "|---|---|---|---|---|"]
    first, *sizes = sorted(results[0]["random"])
    for size in (first, *sizes):
        cells = [f"{size:,}"]
        for name in ("selected", "random"):
            values = [100 * result[name][size] for result in results if size in result[name]]
            cells.append(spread(values, 2) if values else "")
        needed = [labels_needed(result["random"], result["selected"][size]) for result in results if size in result["selected"]]
        if size == first or not needed:
            cells += ["", ""]
        elif np.isfinite(needed).all():
            cells += [spread(needed, 0), f"{1 - size / np.mean(needed):.0%}"]
        else:
            cells += ["not reached", ""]
        lines.append("| " + " | ".join(cells) + " |")
    for turn in range(len(results[0]["rounds"])):
        said = [result["rounds"][turn] for result in results]
        parts = [f"left out {100 * np.mean([each['left_out'] for each in said]):.1f} %"]
        for name, what in (("left_out_right", "of those, labels right"), ("proposals_right", "in the queue, proposals right")):
            values = [each[name] for each in said if each[name] is not None]
            parts += [f"{what} {100 * np.mean(values):.1f} %"] if values else []
        lines.append(f"selection {turn + 1}: {', '.join(parts)}")
    lines.append(f"mean ± standard error, {len(results)} seeds; every training takes the same number of steps")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="an HDF5 file of images with splits, or the word digits")
    parser.add_argument("--seeds", type=int, default=3, help="how many (default: 3)")
    parser.add_argument("--start", type=int, default=1000, help="random labels at the beginning (default: 1000)")
    parser.add_argument("--step", type=int, default=1000, help="labels that a round adds (default: 1000)")
    parser.add_argument("--rounds", type=int, default=3, help="of selection (default: 3)")
    parser.add_argument("--more", type=int, default=2, help="rounds more of random labels (default: 2)")
    parser.add_argument("--members", type=int, default=2, help="models in the ensemble (default: 2)")
    parser.add_argument(
        "--pool", type=int, default=10_000, help="samples without a label that a round ranks, drawn at random (default: 10000)"
    )
    parser.add_argument("--steps", type=int, default=1500, help="of every training (default: 1500)")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--backbone", default="resnet8")
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--views", default="flip", help="preset of the ensemble's views, or an empty text (default: flip)")
    parser.add_argument("--threshold", type=float, default=0.95)
    parser.add_argument("--rank", default="disagreement", choices=["disagreement", "entropy", "margin"])
    parser.add_argument("--runs", type=Path, default=Path("runs/data_selection"))
    options = parser.parse_args()
    silence_lightning()
    experiment = Experiment(options)
    if options.start + options.step * options.rounds > len(experiment.pool):
        parser.error(f"{options.start} + {options.rounds} x {options.step} labels are more than the {len(experiment.pool)} that there are")
    claim_folder(parser, options)
    results = [experiment.run(seed) for seed in range(options.seeds)]
    print(report(results))


if __name__ == "__main__":
    main()
