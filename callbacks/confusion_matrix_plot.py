"""Draws the confusion matrix of validation and test."""

from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from .evaluation import EvaluationObserver
from .pictures import hand_over
from .predictions import EpochConfusion, class_names_of, output_folder, write_csv


class ConfusionMatrixPlot(EvaluationObserver):
    """Writes the confusion matrix of validation and test as a picture and as CSV.

    `confusion_matrix/val.png` and `val.csv` in the run's folder show the latest validation, after training the last one;
    `test.png` and `test.csv` the test. The matrix covers the whole epoch and all processes. The picture also goes to
    every logger that takes figures (TensorBoard's `add_figure`) or images (`log_image`, as of Weights & Biases).

    Works with any classifier: a step may return a mapping of "logits" `(B, C)` or "preds" `(B,)` and "label" or "target"
    `(B,)`; else the module is called once more on the inputs of `(x, y)` batches. With several evaluation loaders, the
    first one counts. The sanity check draws nothing. It has no state.

    Cost: a bincount a batch, and about 0.5 s for a picture, with 69 classes about 2 s. Composes with every callback.

    Args:
        every_n_epochs: draw every n-th epoch of a training, and always at its end.
        class_names: names of the classes; by default the model's `class_names`, else the data's, else numbers.

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
        self._confusion = EpochConfusion(class_names)
        # Not drawn yet: the matrix and the title of its picture.
        self._pending: tuple[Tensor, str] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._pending = None

    def begin(self) -> None:
        self._confusion.reset()

    def see(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any) -> None:
        self._confusion.update(trainer, pl_module, outputs, batch)

    def conclude(self, trainer: Trainer, pl_module: LightningModule, stage: Literal["val", "test"]) -> None:
        self._collect(trainer, pl_module, stage)
        if trainer.state.fn != "fit" or (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._draw(trainer, pl_module, stage)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._draw(trainer, pl_module, "val")

    def _collect(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Every process must call it."""
        matrix = self._confusion.total(trainer, pl_module)
        if matrix is None:
            self._pending = None
            return
        samples = int(matrix.sum())
        title = f"{stage}: accuracy {int(matrix.diagonal().sum()) / samples:.1%} of {samples:,}"
        # A model that is tested alone was trained for a number of epochs nobody knows.
        self._pending = (matrix, f"epoch {trainer.current_epoch}, {title}" if trainer.state.fn == "fit" else title)

    def _draw(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Draw what was not drawn yet; every process must call it."""
        pending, self._pending = self._pending, None
        if pending is None or getattr(trainer, "fast_dev_run", False):
            return
        matrix, title = pending
        folder = output_folder(trainer) / "confusion_matrix"
        if not trainer.is_global_zero:
            return
        from ..zoo.plots.confusion_matrix import plot_confusion_matrix
        from ..zoo.plots.figures import save_figure

        names = class_names_of(trainer, pl_module, self.class_names, len(matrix))
        figure = plot_confusion_matrix(matrix.numpy(), names, title)
        save_figure(figure, folder / f"{stage}.png")
        header = ["true \\ predicted", *names]
        write_csv(folder / f"{stage}.csv", [header, *([name, *row] for name, row in zip(names, matrix.tolist(), strict=True))])
        hand_over(trainer, f"confusion_matrix/{stage}", figure, folder / f"{stage}.png")
