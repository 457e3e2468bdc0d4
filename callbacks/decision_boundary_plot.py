"""Draws the decision line of a classifier of two features."""

from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from ..zoo.batch import input_and_label
from ..zoo.layers.modes import evaluating
from .evaluation import EvaluationObserver
from .predictions import class_names_of, output_folder


class DecisionBoundaryPlot(EvaluationObserver):
    """Writes a picture of the evaluated points and the line between the predicted classes, for inputs of two features.

    `decision_boundary_val.png` in the run's folder shows the last validation points with the line at the end of the
    training, or those of a `validate`; `decision_boundary_test.png` those of the test. Under several processes, the
    points of the first one are drawn; with several evaluation loaders, those of the first one. It has no state.

    Cost: keeps the evaluated points of an epoch, and about 0.3 s for a picture. Composes with every callback.

    Args:
        axis_names: what the two features are.
        class_names: names of the classes; by default the model's `class_names`, else the data's, else numbers.

    Raises:
        ValueError: if the inputs do not have two features, or the module is no classifier.

    Example:
        >>> trainer = Trainer(callbacks=[DecisionBoundaryPlot(("age", "tumour size"))])
    """

    def __init__(self, axis_names: tuple[str, str] = ("x1", "x2"), class_names: list[str] | None = None) -> None:
        self.axis_names = axis_names
        self.class_names = class_names
        self._batches: list[tuple[Tensor, Tensor]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._batches.clear()

    def begin(self) -> None:
        self._batches.clear()

    def see(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any) -> None:
        if trainer.sanity_checking:
            return
        try:
            points, label = input_and_label(batch)
        except TypeError as error:
            raise ValueError(f"DecisionBoundaryPlot draws batches (x, y), these are {type(batch).__name__}") from error
        if points.dim() != 2 or points.shape[1] != 2:
            raise ValueError(f"DecisionBoundaryPlot draws inputs of two features, shape (batch, 2); these have {tuple(points.shape)}")
        self._batches.append((points.detach().cpu(), label.cpu()))

    def conclude(self, trainer: Trainer, pl_module: LightningModule, stage: Literal["val", "test"]) -> None:
        if trainer.state.fn != "fit":  # there the last validation is drawn
            self._draw(trainer, pl_module, stage)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._draw(trainer, pl_module, "val")

    def _draw(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Every process must call it."""
        folder = output_folder(trainer)
        if not self._batches or not trainer.is_global_zero or getattr(trainer, "fast_dev_run", False):
            return
        from ..zoo.plots.decision_boundary import plot_decision_boundary
        from ..zoo.plots.figures import save_figure

        points, label = (torch.cat(parts) for parts in zip(*self._batches, strict=True))

        def predict(grid: Tensor) -> Tensor:
            with torch.no_grad(), evaluating(pl_module), trainer.precision_plugin.forward_context():
                logits = pl_module(grid.to(pl_module.device, points.dtype))
            if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[1] < 2:
                raise ValueError(f"{type(pl_module).__name__} is no classifier: its forward must give logits (batch, classes)")
            return logits.float().softmax(dim=1).cpu()

        names = class_names_of(trainer, pl_module, self.class_names, predict(points[:1]).shape[1])
        figure = plot_decision_boundary(points.float().numpy(), label.numpy(), predict, names, self.axis_names)
        save_figure(figure, folder / f"decision_boundary_{stage}.png")
