"""Draws samples beside their nearest neighbours in a representation."""

from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from ..zoo.functional.nearest_neighbours import nearest_neighbours
from .features import (
    FeatureObserver,
    Features,
    batch_features,
    check_reference_loader,
    directions,
    loader_of,
    refuse_training_loader,
    refuse_without_training_samples,
    samples_at,
    samples_of,
    training_features,
)
from .pictures import EvenlySpread, hand_over, raw_images
from .predictions import names_of_known_classes, output_folder


class NeighbourGallery(FeatureObserver):
    """Writes a picture of validation samples and the training samples that lie nearest to them.

    `neighbours/val.png` in the run's folder shows the latest validation that was drawn, `neighbours/test.png` the test, with
    `features="forward"` followed by `_forward`. Each row is a sample of that split, always the same ones, spread evenly over it, and
    the training samples with the largest cosine similarity of features; the frame says whether they are of its class, the title how
    many of all are. Images are shown as they were before normalisation, by the data's or the model's `image_mean` and `image_std`, else
    from their darkest to their brightest value; clouds `(N, 3)` and vectors `(D,)` as such. The picture also goes to every logger that
    takes pictures, as that of `ConfusionMatrixPlot`.

    Features are taken in evaluation mode and without augmentation, those of the training set anew for every picture. Under several
    processes, the queries are those of the first one, the neighbours those among all training samples. With several evaluation loaders,
    the first one counts; the sanity check draws nothing. It has no state, and leaves training and random streams alone.

    Cost: a pass over the training set without gradients, shared with `KNNMonitor`, another one that only reads it, to find the
    neighbours' inputs, the batches that the queries come from once more, and about 0.5 s for 8 queries. Composes with every callback;
    under `EMA` and `SWA` it shows the average.

    Args:
        queries: rows of the picture.
        neighbours: columns.
        every_n_epochs: in `fit`, draw the first validated epoch (also after a resume), every n-th one and the last.
        features: what is compared: "encode" for `pl_module.encode(x)`, or "forward".
        reference_loader: batches `(x, y)` of training samples, the same on every process or with a distributed sampler; by
            default those of the data module's `eval_train_dataloader`.
        class_names: names of the classes; by default the model's `class_names`, else the data's, else numbers.

    Raises:
        ValueError: if a setting is out of range, or the inputs are neither images nor clouds nor vectors.
        TypeError: if `reference_loader` can be iterated over only once.
        MisconfigurationException: at the start, if the module has no such method, or there are no training samples.

    Example:
        >>> trainer = Trainer(callbacks=[NeighbourGallery(queries=6)])
    """

    def __init__(
        self,
        queries: int = 8,
        neighbours: int = 8,
        every_n_epochs: int = 10,
        features: Features = "encode",
        reference_loader: Iterable[Any] | None = None,
        class_names: list[str] | None = None,
    ) -> None:
        super().__init__(features, every_n_epochs)
        if queries < 1 or neighbours < 1:
            raise ValueError(f"queries and neighbours must be at least 1, got {queries} and {neighbours}")
        check_reference_loader(reference_loader)
        self.queries = queries
        self.neighbours = neighbours
        self.reference_loader = reference_loader
        self.class_names = class_names
        self.begin()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "predict":
            refuse_without_training_samples(self, trainer, pl_module, self.reference_loader)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        refuse_training_loader(self, trainer, self.reference_loader)

    def begin(self) -> None:
        # Picture, features and label of each query.
        self._kept: EvenlySpread[tuple[np.ndarray, Tensor, int]] = EvenlySpread(self.queries)

    def see(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any) -> None:
        if not trainer.is_global_zero:
            return
        inputs, label = samples_of(pl_module, batch)
        labels = label.tolist()

        def query(row: int) -> tuple[np.ndarray, Tensor, int]:
            features = batch_features(trainer, pl_module, self.features, batch)[row].clone()
            return self._picture(trainer, pl_module, inputs[row].cpu()), features, labels[row]

        self._kept.offer(len(labels), query)

    def conclude(self, trainer: Trainer, pl_module: LightningModule, stage: Literal["val", "test"]) -> None:
        folder = output_folder(trainer) / "neighbours"
        if getattr(trainer, "fast_dev_run", False):
            return
        bank = training_features(trainer, pl_module, self.features, self.reference_loader)
        queries = self._kept.chosen()
        # Only the first process has queries, but every one has to look for the neighbours.
        nearest, similarity = torch.zeros(0, 0, dtype=torch.long), torch.zeros(0, 0)
        if queries:
            query = directions(torch.stack([features for _, features, _ in queries]))
            similarity, nearest = nearest_neighbours(query, bank.features, min(self.neighbours, len(bank.features)))
        similarity, nearest = trainer.strategy.broadcast((similarity.cpu(), nearest.cpu()))
        if len(nearest) == 0:
            return
        keys, labels = bank.key.cpu()[nearest], bank.label.cpu()[nearest].clamp(min=-1)
        found = samples_at(trainer, pl_module, loader_of(trainer, pl_module, self.reference_loader), keys.flatten().unique())
        if not trainer.is_global_zero:
            return
        from ..zoo.plots.figures import save_figure
        from ..zoo.plots.neighbours import Neighbour, plot_neighbours

        own = torch.tensor([label for _, _, label in queries]).clamp(min=-1)
        least = 1 + max(int(bank.label.max()), int(own.max()))
        names = names_of_known_classes(trainer, pl_module, self.class_names, least)
        # The name at -1 is that of samples without a label.
        names.append("no label")
        known = (own[:, None] >= 0) & (labels >= 0)
        same = known & (own[:, None] == labels)
        rows = [
            [
                Neighbour(self._picture(trainer, pl_module, found[key]), names[label], value, right if sure else None)
                for key, label, value, right, sure in zip(*(column.tolist() for column in columns), strict=True)
            ]
            for columns in zip(keys, labels, similarity, same, known, strict=True)
        ]
        title = f"{stage}: {int(same.sum())} of {int(known.sum())} neighbours are of the query's class"
        figure = plot_neighbours(
            [picture for picture, _, _ in queries],
            [names[label] for label in own.tolist()],
            rows,
            f"epoch {trainer.current_epoch}, {title}" if trainer.state.fn == "fit" else title,
        )
        path = folder / f"{stage}{self.suffix}.png"
        save_figure(figure, path)
        hand_over(trainer, f"neighbours/{stage}{self.suffix}", figure, path)

    def _picture(self, trainer: Trainer, pl_module: LightningModule, sample: Tensor) -> np.ndarray:
        """A sample as `plot_neighbours` takes it."""
        sample = sample.float()
        if sample.dim() == 1 or (sample.dim() == 2 and sample.shape[1] in (3, 6)):  # points may have normals
            return sample[..., :3].numpy() if sample.dim() == 2 else sample.numpy()
        image = sample[None] if sample.dim() == 2 else sample
        if image.dim() != 3:
            raise ValueError(
                f"NeighbourGallery draws images (C, H, W), clouds (N, 3) and vectors (D,), but the inputs have shape {tuple(sample.shape)}"
            )
        return raw_images(trainer, pl_module, image[None])[0].numpy()
