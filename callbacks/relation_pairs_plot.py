"""Draws the pairs of images that a relation head finds the most and the least related."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from ..zoo.layers.modes import evaluating
from .features import FeatureObserver, batch_features, samples_of
from .guards import refuse
from .pictures import EvenlySpread, hand_over, raw_images
from .predictions import names_of_known_classes, output_folder


class RelationPairsPlot(FeatureObserver):
    """Writes a picture of the pairs of validation images that are the most and the least related, by the module's own judgement.

    `relation_pairs/val.png` in the run's folder shows the latest validation that was drawn, `relation_pairs/test.png` the test. Of
    images that are spread evenly over the split, always the same ones, all pairs are scored by the sigmoid of `pl_module.relate(a, b)`,
    which for the features `(P, D)` of P pairs gives their logits `(P,)`, as `RelationalReasoning` does. An image is shown in at most one
    of the best pairs and one of the worst; the frame says whether both are of one class. The title has the area under the ROC curve:
    how often a pair of one class has a larger score than a pair of two. Images are shown as they were before normalisation,
    as by `NeighbourGallery`. The picture also goes to every logger that takes pictures.

    Features are taken in evaluation mode. Under several processes, the images are those of the first one. With several evaluation loaders,
    the first one counts; the sanity check draws nothing. It has no state, and leaves training and random streams alone.

    Cost: a pass of the kept images through the encoder, shared with `NeighbourGallery`, their pairs through the head, and about 0.5 s.
    Composes with every callback; under `EMA` and `SWA` it shows the average.

    Args:
        pairs: drawn of the most related, and as many of the least related.
        samples: images of which all pairs are scored.
        every_n_epochs: in `fit`, draw the first validated epoch (also after a resume), every n-th one and the last.
        class_names: names of the classes; by default the model's `class_names`, else the data's, else numbers.

    Raises:
        ValueError: if a setting is out of range, or the inputs are no images.
        MisconfigurationException: at the start, if the module has no `encode` or no `relate`.

    Example:
        >>> trainer = Trainer(callbacks=[RelationPairsPlot()])
    """

    def __init__(self, pairs: int = 8, samples: int = 64, every_n_epochs: int = 10, class_names: list[str] | None = None) -> None:
        super().__init__("encode", every_n_epochs)
        if pairs < 1 or samples < 2:
            raise ValueError(f"pairs must be at least 1 and samples at least 2, got {pairs} and {samples}")
        self.pairs = pairs
        self.samples = samples
        self.class_names = class_names
        self.begin()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "predict" and not callable(getattr(pl_module, "relate", None)):
            raise refuse(
                self,
                f"needs to know which images {type(pl_module).__name__} takes for related, which has no relate",
                "define relate(self, first, second) -> logits (pairs,) of features (pairs, dimensions), or leave the callback out",
            )

    def begin(self) -> None:
        # Images, their features and labels.
        self._kept: EvenlySpread[tuple[Tensor, Tensor, int]] = EvenlySpread(self.samples)

    def see(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any) -> None:
        if not trainer.is_global_zero:
            return
        inputs, label = samples_of(pl_module, batch)
        if inputs.dim() != 4:
            raise ValueError(f"RelationPairsPlot draws images (B, C, H, W), but the inputs have shape {tuple(inputs.shape)}")
        labels = label.tolist()

        def sample(row: int) -> tuple[Tensor, Tensor, int]:
            features = batch_features(trainer, pl_module, self.features, batch)[row].clone()
            return inputs[row].cpu(), features, labels[row]

        self._kept.offer(len(labels), sample)

    def conclude(self, trainer: Trainer, pl_module: LightningModule, stage: Literal["val", "test"]) -> None:
        folder = output_folder(trainer) / "relation_pairs"
        if getattr(trainer, "fast_dev_run", False) or not trainer.is_global_zero:
            return
        kept = self._kept.chosen()
        if len(kept) < 2:
            return
        from ..zoo.plots.figures import save_figure
        from ..zoo.plots.relations import RelatedPair, plot_relations

        first, second = torch.triu_indices(len(kept), len(kept), 1)
        score = _scores(trainer, pl_module, torch.stack([features for _, features, _ in kept]), first, second)
        label = torch.tensor([label for _, _, label in kept]).clamp(min=-1)
        known = (label[first] >= 0) & (label[second] >= 0)
        same = label[first] == label[second]
        names = names_of_known_classes(trainer, pl_module, self.class_names, int(label.max()) + 1)
        # The name at -1 is that of images without a label.
        names.append("no label")
        order = score.argsort(descending=True, stable=True)
        pictures = [raw_images(trainer, pl_module, image[None])[0].numpy() for image, _, _ in kept]
        sections = {}
        best = "most related, with the head's probability that both are of one image"
        for heading, ordered in ((best, order), ("least related", order.flip(0))):
            chosen = _disjoint(ordered.tolist(), first.tolist(), second.tolist(), self.pairs)
            sections[heading] = [
                RelatedPair(
                    pictures[int(first[pair])],
                    pictures[int(second[pair])],
                    (names[label[first[pair]]], names[label[second[pair]]]),
                    float(score[pair]),
                    bool(same[pair]) if known[pair] else None,
                )
                for pair in chosen
            ]
        title = f"{stage}: {len(score):,} pairs of {len(kept)} images{_separation(score[known], same[known])}"
        figure = plot_relations(sections, f"epoch {trainer.current_epoch}, {title}" if trainer.state.fn == "fit" else title)
        path = folder / f"{stage}.png"
        save_figure(figure, path)
        hand_over(trainer, f"relation_pairs/{stage}", figure, path)


def _scores(trainer: Trainer, pl_module: LightningModule, features: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Probabilities `(P,)` of pairs, on the CPU; of what is not finite 0.5, as a training that diverges must not end here."""
    with torch.no_grad(), evaluating(pl_module), trainer.precision_plugin.forward_context():
        features = features.to(next(pl_module.parameters()).dtype)
        logits: Any = pl_module.relate(features[first], features[second])  # type: ignore[operator]  # `setup` has seen to it
    return logits.float().sigmoid().nan_to_num(0.5).cpu()


def _disjoint(ordered: Sequence[int], first: Sequence[int], second: Sequence[int], number: int) -> list[int]:
    """The first pairs of an order in which every image comes but once."""
    chosen: list[int] = []
    used: set[int] = set()
    for pair in ordered:
        if len(chosen) == number:
            break
        if used.isdisjoint((first[pair], second[pair])):
            used |= {first[pair], second[pair]}
            chosen.append(pair)
    return chosen


def _separation(score: Tensor, same: Tensor) -> str:
    """What the title says of scores and classes."""
    if not bool(same.any()) or bool(same.all()):
        return ""
    more = (score[same][:, None] > score[~same]).double() + 0.5 * (score[same][:, None] == score[~same]).double()
    return f", AUC of the same class {float(more.mean()):.3f}"
