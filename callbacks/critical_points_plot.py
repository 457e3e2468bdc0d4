"""Draws the points of a cloud that decide a PointNet's prediction."""

from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from ..zoo.batch import input_and_label
from ..zoo.layers.modes import evaluating
from .evaluation import EvaluationObserver
from .guards import refuse
from .predictions import class_names_of, output_folder


class CriticalPointsPlot(EvaluationObserver):
    """Writes a picture of evaluated clouds: all their points, the critical ones, and all that could be added without changing the result.

    `critical_points_val.png` in the run's folder shows the first validation cloud of each class as the model sees it at the end
    of the training, or in a `validate`; `critical_points_test.png` those of the test. Each row names the predicted class with its
    probability, and the true one where they differ. Under several processes, clouds of the first one are drawn; with several
    evaluation loaders, those of the first one. It reads only, does nothing during training, and has no state.

    Cost: at the end about 0.2 s for a cloud, with the upper bound at resolution 64 some seconds. Composes with every callback.

    Args:
        clouds: the most to draw, of a class each.
        resolution: grid points along each edge for the upper bound.
        upper_bound: draw that shape too.
        class_names: names of the classes; by default the model's `class_names`, else the data's, else numbers.

    Raises:
        ValueError: if `clouds` is below 1 or `resolution` below 2.
        MisconfigurationException: at the start, if the module is no PointNet of litzoo.

    Example:
        >>> trainer = Trainer(callbacks=[CriticalPointsPlot(clouds=3)])

    Source:
        Qi et al., "PointNet", CVPR 2017, section 5.3.
    """

    def __init__(self, clouds: int = 5, resolution: int = 64, upper_bound: bool = True, class_names: list[str] | None = None) -> None:
        if clouds < 1:
            raise ValueError(f"clouds must be at least 1, got {clouds}")
        if resolution < 2:
            raise ValueError(f"resolution must be at least 2, got {resolution}")
        self.clouds = clouds
        self.resolution = resolution
        self.upper_bound = upper_bound
        self.class_names = class_names
        # Of each class the first cloud.
        self._kept: dict[int, Tensor] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        from ..zoo.critical_sets import critical_points

        self._kept.clear()
        parameter = next(pl_module.parameters(), torch.empty(0))
        try:
            critical_points(pl_module, parameter.new_zeros(1, 1, 3))
        except TypeError as error:
            raise refuse(self, f"draws PointNets ({error})", "use it with litzoo's PointNetClassifier, or leave it out") from error

    def begin(self) -> None:
        self._kept.clear()

    def see(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any) -> None:
        if trainer.sanity_checking or len(self._kept) == self.clouds or not trainer.is_global_zero:
            return
        try:
            points, label = input_and_label(batch)
        except TypeError as error:
            raise ValueError(f"CriticalPointsPlot draws batches (points, label), these are {type(batch).__name__}") from error
        for place, cls in enumerate(label.tolist()):
            if cls not in self._kept and len(self._kept) < self.clouds:
                self._kept[cls] = points[place].detach().cpu()

    def conclude(self, trainer: Trainer, pl_module: LightningModule, stage: Literal["val", "test"]) -> None:
        if trainer.state.fn != "fit":  # there the last validation is drawn
            self._draw(trainer, pl_module, stage)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._draw(trainer, pl_module, "val")

    def _draw(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Every process must call it."""
        folder = output_folder(trainer)
        if not self._kept or not trainer.is_global_zero or getattr(trainer, "fast_dev_run", False):
            return
        from ..zoo.plots.critical_points import plot_critical_points
        from ..zoo.plots.figures import save_figure

        clouds, critical, upper, titles = [], [], [], []
        with evaluating(pl_module):
            for cls, points in sorted(self._kept.items()):
                cloud, winners, shape, probabilities = self._look(pl_module, points)
                clouds.append(cloud)
                critical.append(winners)
                upper.append(shape)
                names = class_names_of(trainer, pl_module, self.class_names, len(probabilities))
                guess = int(probabilities.argmax())
                truth = "" if guess == cls else f"\nis: {names[cls]}"
                titles.append(f"{names[guess]}\n{probabilities[guess]:.0%}{truth}")
        figure = plot_critical_points(clouds, critical, upper if self.upper_bound else None, titles)
        save_figure(figure, folder / f"critical_points_{stage}.png")

    @torch.no_grad()
    def _look(self, pl_module: LightningModule, points: Tensor) -> tuple[Any, Any, Any, Tensor]:
        """A cloud, its critical points, its upper bound or None, and the class probabilities."""
        from ..zoo.critical_sets import critical_points, upper_bound_points

        # Without autocast, in whose 8 bits many points tie for a maximum.
        parameter = next(pl_module.parameters())
        batch = points[None].to(parameter)
        winners = critical_points(pl_module, batch)[0].cpu().numpy()
        shape = upper_bound_points(pl_module, batch, self.resolution)[0].double().cpu().numpy() if self.upper_bound else None
        return points.double().numpy(), winners, shape, pl_module(batch)[0].float().softmax(dim=0).cpu()
