"""Precision, recall and F1 of each class after a test."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from ..zoo.functional.confusion import per_class_scores
from .predictions import EpochConfusion, class_names_of, output_folder, write_csv


class PerClassTable(Callback):
    """Prints precision, recall, F1 and sample count of each class after a test or a `validate`, and writes them as CSV.

    Below the classes stand the mean over the classes that have samples and the overall accuracy. The file is
    `per_class_test.csv` (or `per_class_val.csv`) in the run's folder. The scores cover the whole epoch and all processes;
    an undefined score is 0. Any classifier works, as with `ConfusionMatrixPlot`. With several evaluation loaders, the
    first one counts. It has no state.

    Cost: a bincount a batch. Composes with every callback.

    Args:
        class_names: names of the classes; by default the model's `class_names`, else the data's, else numbers.

    Raises:
        ValueError: if the module is no classifier.

    Example:
        >>> Trainer(callbacks=[PerClassTable()]).test(model, datamodule=data)
    """

    def __init__(self, class_names: list[str] | None = None) -> None:
        self.class_names = class_names
        self._confusion = EpochConfusion(class_names)

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
        if trainer.state.fn == "validate":
            self._report(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._report(trainer, pl_module, "test")

    def _report(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Every process must call it."""
        matrix = self._confusion.total(trainer, pl_module)
        folder = output_folder(trainer)
        if matrix is None or not trainer.is_global_zero:
            return
        rows = _rows(matrix, class_names_of(trainer, pl_module, self.class_names, len(matrix)))
        width = max(len(row[0]) for row in rows)
        lines = [f"{'class':<{width}}  precision  recall     f1  samples"]
        for name, precision, recall, f1, samples in rows[:-1]:
            lines.append(f"{name:<{width}}  {precision:9.3f}  {recall:6.3f}  {f1:5.3f}  {samples:7d}")
        name, *_, accuracy, samples = rows[-1]
        lines.append(f"{name:<{width}}  {'':9}  {'':6}  {accuracy:5.3f}  {samples:7d}")
        rule = "-" * len(lines[0])
        print("\n".join([lines[0], rule, *lines[1:-2], rule, *lines[-2:]]))
        if not getattr(trainer, "fast_dev_run", False):
            write_csv(folder / f"per_class_{stage}.csv", [["class", "precision", "recall", "f1", "samples"], *rows])


def _rows(matrix: Tensor, names: list[str]) -> list[tuple[Any, ...]]:
    """A row a class, the mean over the classes that occur, and the accuracy, in the column of F1 as scikit-learn prints it."""
    scores = per_class_scores(matrix)
    columns = (scores.precision.tolist(), scores.recall.tolist(), scores.f1.tolist(), scores.samples.tolist())
    occurs = scores.samples > 0
    means = [score[occurs].mean().item() for score in scores[:3]]
    samples = int(scores.samples.sum())
    accuracy = int(matrix.diagonal().sum()) / samples
    return [*zip(names, *columns, strict=True), ("macro mean", *means, samples), ("accuracy", "", "", accuracy, samples)]
