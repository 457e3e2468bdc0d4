"""Precision, recall and F1 of each class after a test."""

import csv
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from ..zoo.functional.confusion import per_class_scores
from .predictions import EpochConfusion, class_names_of, output_folder


class PerClassTable(Callback):
    """Prints precision, recall, F1 and sample count of each class after a test or a `validate`, and writes them as CSV.

    The file is `per_class_test.csv` (or `per_class_val.csv`) in the run's folder. The scores cover the whole epoch and all
    processes; a score without samples is 0. Any classifier works, as with `ConfusionMatrixPlot`. It has no state.

    Cost: a bincount a batch. Composes with every callback.

    Args:
        class_names: names of the classes; by default the model's or the data's.

    Example:
        >>> Trainer(callbacks=[PerClassTable()]).test(model, datamodule=data)
    """

    def __init__(self, class_names: list[str] | None = None) -> None:
        self.class_names = class_names
        self._confusion = EpochConfusion()

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._confusion.reset()

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._confusion.reset()

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if trainer.state.fn == "validate" and dataloader_idx == 0:
            self._confusion.update(trainer, pl_module, outputs, batch)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if dataloader_idx == 0:
            self._confusion.update(trainer, pl_module, outputs, batch)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._report(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._report(trainer, pl_module, "test")

    def _report(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._confusion.matrix is None:
            return
        matrix = self._confusion.total(trainer)
        if not trainer.is_global_zero:
            return
        rows = _rows(matrix, class_names_of(pl_module, trainer, self.class_names, len(matrix)))
        width = max(len(row[0]) for row in rows)
        print(f"{'class':<{width}}  precision  recall     f1  samples")
        for name, precision, recall, f1, samples in rows:
            print(f"{name:<{width}}  {precision:9.3f}  {recall:6.3f}  {f1:5.3f}  {samples:7d}")
        folder = output_folder(trainer)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"per_class_{stage}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["class", "precision", "recall", "f1", "samples"])
            writer.writerows(rows)


def _rows(matrix: Tensor, names: list[str]) -> list[tuple[str, float, float, float, int]]:
    """A row a class, then the mean over the classes that occur."""
    scores = per_class_scores(matrix)
    columns = (scores.precision.tolist(), scores.recall.tolist(), scores.f1.tolist(), scores.samples.tolist())
    rows = list(zip(names, *columns, strict=True))
    occurs = scores.samples > 0
    means = [score[occurs].mean().item() for score in scores[:3]]
    return [*rows, ("mean of classes", means[0], means[1], means[2], int(scores.samples.sum()))]
