"""Draws the confusion matrix of every validation and test."""

import csv
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from .predictions import EpochConfusion, class_names_of, output_folder


class ConfusionMatrixPlot(Callback):
    """Writes the confusion matrix of each validation and test as a picture and as CSV.

    `confusion_matrix/val.png` and `val.csv` in the run's folder show the latest validation, `test.png` and `test.csv` the
    test. The matrix covers the whole epoch and all processes. The picture also goes to every logger that takes figures
    (TensorBoard's `add_figure`) or images (`log_image`, as of Weights & Biases).

    Works with any classifier: a step may return `{"logits": (B, C), "label": (B,)}`; else the module is called once more
    on the inputs of `(x, y)` batches. With several evaluation loaders, the first one counts. It has no state.

    Cost: a bincount a batch, and about 0.3 s for a picture. Composes with every callback.

    Args:
        every_n_epochs: draw at every n-th validation of a training.
        class_names: names of the classes; by default the model's or the data's.

    Raises:
        ValueError: if `every_n_epochs` is below 1, or the module is no classifier.

    Example:
        >>> trainer = Trainer(callbacks=[ConfusionMatrixPlot(class_names=["cat", "dog"])])
    """

    def __init__(self, every_n_epochs: int = 1, class_names: list[str] | None = None) -> None:
        if every_n_epochs < 1:
            raise ValueError(f"every_n_epochs must be at least 1, got {every_n_epochs}")
        self.every_n_epochs = every_n_epochs
        self.class_names = class_names
        self._confusion = EpochConfusion()

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._confusion.reset()

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._confusion.reset()

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if not trainer.sanity_checking and dataloader_idx == 0:
            self._confusion.update(trainer, pl_module, outputs, batch)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if dataloader_idx == 0:
            self._confusion.update(trainer, pl_module, outputs, batch)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        training = trainer.state.fn == "fit"
        if not trainer.sanity_checking and (not training or (trainer.current_epoch + 1) % self.every_n_epochs == 0):
            self._draw(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._draw(trainer, pl_module, "test")

    def _draw(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._confusion.matrix is None:
            return
        matrix = self._confusion.total(trainer)
        if trainer.is_global_zero and not getattr(trainer, "fast_dev_run", False):
            self._write(trainer, matrix, class_names_of(pl_module, trainer, self.class_names, len(matrix)), stage)

    def _write(self, trainer: Trainer, matrix: Tensor, names: list[str], stage: str) -> None:
        from ..zoo.plots.confusion_matrix import plot_confusion_matrix
        from ..zoo.plots.figures import save_figure

        accuracy = matrix.diagonal().sum().item() / max(matrix.sum().item(), 1)
        title = f"{stage}, epoch {trainer.current_epoch}: accuracy {accuracy:.1%} of {matrix.sum().item():,}"
        figure = plot_confusion_matrix(matrix.numpy(), names, title)
        folder = output_folder(trainer) / "confusion_matrix"
        save_figure(figure, folder / f"{stage}.png")
        with (folder / f"{stage}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["true \\ predicted", *names])
            writer.writerows([name, *row] for name, row in zip(names, matrix.tolist(), strict=True))
        for logger in trainer.loggers:
            experiment = getattr(logger, "experiment", None)
            if hasattr(experiment, "add_figure"):
                experiment.add_figure(f"confusion_matrix/{stage}", figure, trainer.global_step, close=False)
            elif hasattr(logger, "log_image"):
                logger.log_image(f"confusion_matrix/{stage}", [str(folder / f"{stage}.png")])
