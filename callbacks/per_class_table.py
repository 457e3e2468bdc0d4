"""Precision, recall and F1 of each class after a test."""

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from ..zoo.functional.confusion import per_class_scores
from ..zoo.functional.long_tail import shot_groups
from .evaluation import EvaluationObserver
from .predictions import EpochConfusion, class_names_of, output_folder, write_csv


class PerClassTable(EvaluationObserver):
    """Prints precision, recall, F1 and sample count of each class after a test or a `validate`, and writes them as CSV.

    Below the classes stand the mean over the classes that have samples and the overall accuracy; where the training data are imbalanced,
    also the means over the classes with many, a medium number and few training samples (`shot_groups`). The file is
    `per_class_test.csv` (or `per_class_val.csv`) in the run's folder. The scores cover the whole epoch and all processes;
    an undefined score is 0. Any classifier works, as with `ConfusionMatrixPlot`. With several evaluation loaders, the
    first one counts. It has no state.

    Cost: a bincount a batch. Composes with every callback.

    Args:
        class_names: names of the classes; by default the model's `class_names`, else the data's, else numbers.
        train_counts: training samples of each class; by default the data's `class_counts`, else the classes are not grouped.
        many: a class with more training samples has many.
        few: a class with fewer has few.

    Raises:
        ValueError: if the limits are in the wrong order, the module is no classifier, or there is not one count for each class.

    Example:
        >>> Trainer(callbacks=[PerClassTable()]).test(model, datamodule=data)
    """

    def __init__(self, class_names: list[str] | None = None, train_counts: list[int] | None = None, many: int = 100, few: int = 20) -> None:
        shot_groups([], many, few)
        self.class_names = class_names
        self.train_counts = train_counts
        self.many = many
        self.few = few
        self._confusion = EpochConfusion(class_names)

    def begin(self) -> None:
        self._confusion.reset()

    def is_due(self, trainer: Trainer) -> bool:
        return trainer.state.fn == "validate"

    def see(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any) -> None:
        self._confusion.update(trainer, pl_module, outputs, batch)

    def conclude(self, trainer: Trainer, pl_module: LightningModule, stage: Literal["val", "test"]) -> None:
        matrix = self._confusion.total(trainer, pl_module)
        folder = output_folder(trainer)
        if matrix is None:
            return
        groups = self._groups(trainer, len(matrix))  # on every process, so that all of them stop at a mistake
        if not trainer.is_global_zero:
            return
        rows = _rows(matrix, class_names_of(trainer, pl_module, self.class_names, len(matrix)), groups)
        width = max(len(row[0]) for row in rows)
        lines = [f"{'class':<{width}}  precision  recall     f1  samples"]
        for name, precision, recall, f1, samples in rows[:-1]:
            lines.append(f"{name:<{width}}  {precision:9.3f}  {recall:6.3f}  {f1:5.3f}  {samples:7d}")
        name, *_, accuracy, samples = rows[-1]
        lines.append(f"{name:<{width}}  {'':9}  {'':6}  {accuracy:5.3f}  {samples:7d}")
        rule = "-" * len(lines[0])
        print("\n".join([lines[0], rule, *lines[1 : len(matrix) + 1], rule, *lines[len(matrix) + 1 :]]))
        if not getattr(trainer, "fast_dev_run", False):
            write_csv(folder / f"per_class_{stage}.csv", [["class", "precision", "recall", "f1", "samples"], *rows])

    def _groups(self, trainer: Any, num_classes: int) -> dict[str, list[int]]:
        """Classes by their number of training samples; none where all belong together."""
        if self.train_counts is not None and len(self.train_counts) != num_classes:
            raise ValueError(f"PerClassTable: train_counts has {len(self.train_counts)} entries, but there are {num_classes} classes")
        counts = self.train_counts or getattr(getattr(trainer, "datamodule", None), "class_counts", None)
        if isinstance(counts, Mapping):
            counts = counts.values()
        # Somebody else's may be a tensor, or something of another meaning.
        numbers = [int(count) for count in counts] if isinstance(counts, Iterable) else []
        groups = shot_groups(numbers[:num_classes], self.many, self.few)
        limits = {"many": f"more than {self.many}", "medium": f"{self.few} to {self.many}", "few": f"fewer than {self.few}"}
        return {f"{name} ({limits[name]})": classes for name, classes in groups.items()} if len(groups) > 1 else {}


def _rows(matrix: Tensor, names: list[str], groups: dict[str, list[int]]) -> list[tuple[Any, ...]]:
    """A row a class, the mean over the classes of each group and over all that occur, and the accuracy, in the column of F1 as
    scikit-learn prints it."""
    scores = per_class_scores(matrix)
    columns = (scores.precision.tolist(), scores.recall.tolist(), scores.f1.tolist(), scores.samples.tolist())
    occurs = scores.samples > 0
    means = []
    for name, classes in {**groups, "macro mean": list(range(len(names)))}.items():
        members = torch.zeros_like(occurs)
        members[classes] = True
        members &= occurs
        if members.any():
            means.append((name, *(score[members].mean().item() for score in scores[:3]), int(scores.samples[members].sum())))
    samples = int(scores.samples.sum())
    accuracy = int(matrix.diagonal().sum()) / samples
    return [*zip(names, *columns, strict=True), *means, ("accuracy", "", "", accuracy, samples)]
