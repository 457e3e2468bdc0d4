"""Draws the decision line of a classifier of two features."""

from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from ..zoo.batch import input_and_label
from .predictions import class_names_of, output_folder


class DecisionBoundaryPlot(Callback):
    """Writes a picture of the evaluated points and the line between the predicted classes, for inputs of two features.

    `decision_boundary_val.png` in the run's folder shows the end of the training, `decision_boundary_test.png` the test.
    Under several processes, the points of the first one are drawn. It has no state.

    Cost: keeps the evaluated points of an epoch, and about 0.3 s for a picture. Composes with every callback.

    Args:
        axis_names: what the two features are.
        class_names: names of the classes; by default the model's or the data's.

    Raises:
        ValueError: if the inputs do not have two features.

    Example:
        >>> trainer = Trainer(callbacks=[DecisionBoundaryPlot(("age", "tumour size"))])
    """

    def __init__(self, axis_names: tuple[str, str] = ("x1", "x2"), class_names: list[str] | None = None) -> None:
        self.axis_names = axis_names
        self.class_names = class_names
        self._batches: list[tuple[Tensor, Tensor]] = []

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._batches.clear()

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._batches.clear()

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._keep(batch)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._keep(batch)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._draw(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._draw(trainer, pl_module, "test")

    def _keep(self, batch: Any) -> None:
        points, label = input_and_label(batch)
        if points.dim() != 2 or points.shape[1] != 2:
            raise ValueError(f"DecisionBoundaryPlot draws inputs of two features, shape (batch, 2); these have {tuple(points.shape)}")
        self._batches.append((points.detach().cpu(), label.cpu()))

    def _draw(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not self._batches or not trainer.is_global_zero or getattr(trainer, "fast_dev_run", False):
            return
        from ..zoo.plots.decision_boundary import plot_decision_boundary
        from ..zoo.plots.figures import save_figure

        points, label = (torch.cat(parts) for parts in zip(*self._batches, strict=True))

        def predict(grid: np.ndarray) -> np.ndarray:
            was_training = pl_module.training
            pl_module.eval()
            with torch.no_grad():
                probabilities = pl_module(torch.from_numpy(grid).to(pl_module.device)).float().softmax(dim=1).cpu().numpy()
            pl_module.train(was_training)
            return probabilities

        classes = predict(points[:1].numpy()).shape[1]
        names = class_names_of(pl_module, trainer, self.class_names, classes)
        figure = plot_decision_boundary(points.numpy(), label.numpy(), predict, names, self.axis_names)
        save_figure(figure, output_folder(trainer) / f"decision_boundary_{stage}.png")
