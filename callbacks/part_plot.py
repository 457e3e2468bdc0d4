"""Draws the parts that a segmenter finds in objects, and how well each part is found."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from ..zoo.batch import Batch
from .evaluation import EvaluationObserver
from .predictions import names_of_known_classes, output_folder, write_csv


class PartPlot(EvaluationObserver):
    """Writes a picture of objects with their true and predicted parts, and a table of the intersection over union of each part.

    `parts_val.png` in the run's folder shows the first validation object of each class as the model sees it at the end of the training,
    or in a `validate`; `parts_test.png` those of the test. A test or a `validate` also prints, for each part, the intersection over
    union of all its points and their number, and writes them as `part_iou_test.csv` (or `part_iou_val.csv`). The table covers the whole
    epoch and all processes; the picture shows objects of the first process. With several evaluation loaders, the first one counts.
    It has no state.

    The evaluation step must return a mapping with "part" and "part_prediction" `(B, N)` and "label" `(B,)`, as that of
    `PointNetSegmenter`; points of the part -1 do not count.

    Cost: a bincount a batch, and about 0.2 s for an object in the picture. Composes with every callback.

    Args:
        objects: the most to draw, of a class each.
        part_names: name of each part; by default the data's, else the model's, else numbers.
        class_names: names of the classes; by default the model's, else the data's, else numbers.

    Raises:
        ValueError: if `objects` is below 1, or the step returns no parts.

    Example:
        >>> Trainer(callbacks=[PartPlot()]).test(PointNetSegmenter(2, 3, [0, 0, 1]), datamodule=data)
    """

    def __init__(self, objects: int = 6, part_names: list[str] | None = None, class_names: list[str] | None = None) -> None:
        if objects < 1:
            raise ValueError(f"objects must be at least 1, got {objects}")
        self.objects = objects
        self.part_names = part_names
        self.class_names = class_names
        # Of each class the first object: points, true and predicted parts.
        self._kept: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        # Intersection, true and predicted points of each part.
        self._counts = torch.zeros(3, 0, dtype=torch.long)

    def begin(self) -> None:
        self._kept.clear()
        self._counts = torch.zeros(3, 0, dtype=torch.long)

    def see(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any) -> None:
        if trainer.sanity_checking:
            return
        names = ("part", "part_prediction", "label")
        if not isinstance(outputs, Mapping) or not all(isinstance(outputs.get(name), Tensor) for name in names):
            raise ValueError(
                f"PartPlot needs the parts that {type(pl_module).__name__} finds: its evaluation step must return a mapping with "
                "'part' and 'part_prediction' (batch, points) and 'label' (batch,), as that of PointNetSegmenter"
            )
        part, found, label = (outputs[name] for name in names)
        points = batch.input if isinstance(batch, Batch) else batch[0]
        known = part >= 0
        size = max(self._counts.shape[1], int(torch.maximum(part, found).max()) + 1)
        counts = [torch.bincount(values, minlength=size).cpu() for values in (part[known & (part == found)], part[known], found[known])]
        self._counts = torch.nn.functional.pad(self._counts, (0, size - self._counts.shape[1])) + torch.stack(counts)
        for place, cls in enumerate(label.tolist()):
            if cls not in self._kept and len(self._kept) < self.objects:
                self._kept[cls] = (points[place].float().cpu(), part[place].cpu(), found[place].cpu())

    def conclude(self, trainer: Trainer, pl_module: LightningModule, stage: Literal["val", "test"]) -> None:
        if trainer.state.fn != "fit":  # there the last validation is drawn
            self._report(trainer, pl_module, stage)
            self._draw(trainer, pl_module, stage)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._draw(trainer, pl_module, "val")

    def _report(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Every process must call it."""
        folder = output_folder(trainer)
        counts = self._counts.to(pl_module.device)
        if trainer.world_size > 1:
            # A process may have seen fewer parts.
            size = int(trainer.strategy.all_gather(torch.tensor(counts.shape[1], device=pl_module.device)).max())
            counts = trainer.strategy.reduce(torch.nn.functional.pad(counts, (0, size - counts.shape[1])), reduce_op="sum")
        if not trainer.is_global_zero or counts.shape[1] == 0:
            return
        both, true, predicted = counts.cpu()
        names = _part_names(trainer, pl_module, self.part_names, len(both))[: len(both)]
        union = true + predicted - both
        rows = [
            (name, int(common) / int(whole), int(points))
            for name, common, whole, points in zip(names, both, union, true, strict=True)
            if whole > 0
        ]
        width = max(4, *(len(name) for name, _, _ in rows))
        head = f"{'part':<{width}}    IoU   points"
        print("\n".join([head, "-" * len(head), *(f"{name:<{width}}  {iou:5.3f}  {points:7d}" for name, iou, points in rows)]))
        if not getattr(trainer, "fast_dev_run", False):
            write_csv(folder / f"part_iou_{stage}.csv", [["part", "iou", "points"], *rows])

    def _draw(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Every process must call it."""
        folder = output_folder(trainer)
        if not self._kept or not trainer.is_global_zero or getattr(trainer, "fast_dev_run", False):
            return
        from ..zoo.plots.figures import save_figure
        from ..zoo.plots.parts import plot_part_labels

        kept = sorted(self._kept.items())
        parts = max(int(torch.maximum(part, found).max()) + 1 for _, (_, part, found) in kept)
        class_names = names_of_known_classes(trainer, pl_module, self.class_names, kept[-1][0] + 1)
        titles = []
        for cls, (_, part, found) in kept:
            known = part >= 0
            right = f"\n{(part == found)[known].float().mean():.0%} right" if known.any() else ""
            titles.append(f"{class_names[cls]}{right}")
        figure = plot_part_labels(
            [points.numpy() for _, (points, _, _) in kept],
            [part.numpy() for _, (_, part, _) in kept],
            [found.numpy() for _, (_, _, found) in kept],
            titles,
            _part_names(trainer, pl_module, self.part_names, parts),
        )
        save_figure(figure, folder / f"parts_{stage}.png")


def _part_names(trainer: Trainer, pl_module: LightningModule, given: Sequence[str] | None, least: int) -> list[str]:
    """Names of at least so many parts."""
    for owner in (given, getattr(getattr(trainer, "datamodule", None), "part_names", None), getattr(pl_module, "part_names", None)):
        if owner is not None and len(owner) >= least:
            return [str(name) for name in owner]
    return [str(part) for part in range(least)]
