"""Draws maps of a representation, on which similar samples lie together."""

from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from ..zoo.batch import Batch
from ..zoo.functional.subsets import stratified_subset
from ..zoo.plots.projection import Method, check_method, judge_neighbours, project
from .features import FeatureObserver, Features, batch_features, directions, evaluated_samples, gathered_rows, samples_of
from .guards import refuse
from .pictures import hand_over, raw_images
from .predictions import names_of_known_classes, output_folder

_THUMBNAIL = 32  # pixels of the longer side


class EmbeddingPlot(FeatureObserver):
    """Writes maps of the features of validation and test samples, coloured by class: t-SNE, UMAP or PCA in two dimensions.

    In the run's folder, `embedding/val_epoch_009.png` shows the validation of that epoch, `embedding/val.png` that of a `validate`, and
    `embedding/test.png` the test; with `features="forward"`, `_forward` stands behind `val` and `test`. `embedding/val.html` and
    `test.html` are interactive pages of the latest map: pointing at a sample shows its class, its number and, of images, the image. The
    picture also goes to every logger that takes pictures, as that of `ConfusionMatrixPlot`.

    The features, in evaluation mode, are those of all processes, at unit length; of many samples a fixed random subset is drawn, in
    which each class keeps its share. The title gives precision at 1 over all of them: how many have a nearest neighbour of their own
    class. Samples without a label are grey. With several evaluation loaders, the first one counts; the sanity check draws nothing. If
    drawing fails, a warning says so and the training goes on. It has no state, and leaves training and random streams alone.

    Cost: keeps the features of all evaluated samples, with thumbnails of images, and compares all with all; t-SNE of 2,000 samples takes
    some seconds of a processor. Composes with every callback; under `EMA` and `SWA` it shows the average.

    Args:
        features: what is drawn: "encode" for `pl_module.encode(x)`, or "forward".
        method: "tsne", "umap", which needs the package umap-learn, or "pca".
        every_n_epochs: in `fit`, draw the first validated epoch (also after a resume), every n-th one and the last.
        max_points: the most samples to draw.
        class_names: names of the classes; by default the model's `class_names`, else the data's, else numbers.

    Raises:
        ValueError: if a setting is out of range, a batch is no pair of inputs and labels, or there are more classes than names.
        MisconfigurationException: at the start, if the module has no such method, or the package of the method is missing.

    Example:
        >>> trainer = Trainer(callbacks=[EmbeddingPlot(every_n_epochs=20), EmbeddingPlot("forward", every_n_epochs=20)])

    Source:
        van der Maaten & Hinton, "Visualizing Data using t-SNE", JMLR 2008.
    """

    def __init__(
        self,
        features: Features = "encode",
        method: Method = "tsne",
        every_n_epochs: int = 10,
        max_points: int = 2000,
        class_names: list[str] | None = None,
    ) -> None:
        super().__init__(features, every_n_epochs)
        if method not in get_args(Method):
            raise ValueError(f"method must be one of {', '.join(get_args(Method))}, got {method!r}")
        if max_points < 2:
            raise ValueError(f"max_points must be at least 2, got {max_points}")
        self.method: Method = method
        self.max_points = max_points
        self.class_names = class_names
        self.begin()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        try:
            check_method(self.method)
        except ValueError as error:
            raise refuse(self, f"cannot draw ({error})", "or set method='tsne'") from error

    def begin(self) -> None:
        self._samples = 0
        # Features `(n, D)`, and label, index, place of the sample and number of the row, `(n, 4)`.
        self._seen: list[tuple[Tensor, Tensor]] = []
        # Thumbnails, in the order of the rows.
        self._images: list[np.ndarray] = []
        self._rows = 0

    def see(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any) -> None:
        inputs, label = samples_of(pl_module, batch)
        if len(label) == 0:
            return
        views = len(label) // len(batch[1])
        samples = len(label) // views
        place = (self._samples + torch.arange(samples, device=label.device)) * trainer.world_size + trainer.global_rank
        index = (batch.index.to(label.device) if isinstance(batch, Batch) else place).repeat_interleave(views)
        row = (self._rows + torch.arange(len(label), device=label.device)) * trainer.world_size + trainer.global_rank
        numbers = torch.stack([label.clamp(min=-1), index, place.repeat_interleave(views), row], dim=1)
        self._seen.append((batch_features(trainer, pl_module, self.features, batch), numbers))
        self._samples += samples
        self._rows += len(label)
        if inputs.dim() == 4:
            images = raw_images(trainer, pl_module, inputs.detach()).permute(0, 3, 1, 2)
            scale = _THUMBNAIL / max(images.shape[2:])
            if scale < 1:
                size = [max(1, round(scale * side)) for side in images.shape[2:]]
                images = F.interpolate(images, size, mode="bilinear", antialias=True)
            self._images.extend((255 * images).round().byte().permute(0, 2, 3, 1).cpu().numpy())

    def conclude(self, trainer: Trainer, pl_module: LightningModule, stage: Literal["val", "test"]) -> None:
        folder = output_folder(trainer) / "embedding"
        if getattr(trainer, "fast_dev_run", False):
            return
        features, numbers = torch.zeros(0, 0), torch.zeros(0, 4, dtype=torch.long)
        if self._seen:  # else this process had no batch
            features, numbers = (torch.cat(parts) for parts in zip(*self._seen, strict=True))
        if trainer.world_size > 1:
            features, numbers = (gathered_rows(trainer, pl_module, rows) for rows in (features, numbers))
        order = numbers[:, 3].argsort()  # as one process would see them
        order = order[numbers[order, 2] < evaluated_samples(trainer, stage)]
        features, numbers = directions(features[order]), numbers[order]
        if len(numbers) == 0:
            return
        numbers = numbers.cpu()
        label, index, _, row = numbers.T.numpy()
        chosen = stratified_subset(numbers[:, 0], self.max_points).numpy()
        images = self._chosen_images(trainer, row[chosen])
        names = names_of_known_classes(trainer, pl_module, self.class_names, int(label.max()) + 1)
        if not trainer.is_global_zero:
            return
        name = f"{stage}{self.suffix}"
        path = folder / (f"{name}_epoch_{trainer.current_epoch:03d}.png" if trainer.state.fn == "fit" else f"{name}.png")
        try:
            from ..zoo.plots.embedding import EmbeddingMap, describe, plot_embedding, write_embedding_html
            from ..zoo.plots.figures import save_figure

            judged = judge_neighbours(features, numbers[:, 0].to(features.device))
            place = project(features.cpu().numpy()[chosen], self.method)
            note = describe(self.method, len(chosen), len(label), f"{stage} samples", judged.precision)
            title = f"{type(pl_module).__name__}.{self.features}"
            if trainer.state.fn == "fit":
                title += f", epoch {trainer.current_epoch}"
            drawn = EmbeddingMap(title, note, place, label[chosen], index[chosen], None, images)
            figure = plot_embedding([drawn], names)
            save_figure(figure, path)
            write_embedding_html(folder / f"{name}.html", [drawn], names, title)
        except Exception as error:  # noqa: BLE001  # of whatever a picture fails, hours of training are worth more
            rank_zero_warn(f"EmbeddingPlot could not draw {path}: {error}")
            return
        hand_over(trainer, f"embedding/{name}", figure, path)

    def _chosen_images(self, trainer: Trainer, rows: np.ndarray) -> np.ndarray | None:
        """Thumbnails of some rows, of whatever process they are, or None where there are none; every process must call it."""
        world, rank = trainer.world_size, trainer.global_rank
        found = {row: self._images[row // world] for row in rows[rows % world == rank].tolist()} if self._images else {}
        if world > 1:
            everybody: list[Any] = [None] * world
            torch.distributed.all_gather_object(everybody, found)
            found = {row: image for part in everybody for row, image in part.items()}
        # Batches may differ in size.
        if len(found) < len(rows) or len({image.shape for image in found.values()}) != 1:
            return None
        return np.stack([found[row] for row in rows.tolist()])
