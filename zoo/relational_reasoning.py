"""Relational reasoning (Patacchiola & Storkey, NeurIPS 2020): without labels, an encoder learns which views are of one image."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from .batch import input_and_label
from .image_input import ImageInput
from .layers.modes import evaluating
from .layers.precision_at_one import PrecisionAtOne, log_precision_at_one
from .layers.relation_head import Aggregation, RelationHead
from .optimization import configure_optimizer


class RelationalReasoning(LightningModule):
    """Relational reasoning: a relation head learns to tell pairs of views of one image from pairs of views of two images.

    K views of each of M images give K (K - 1) M pairs. Half of them are positive, two views of one image; a negative pair is a view of
    one image and a view of another, found by rolling the batch (`view_pairs`). With the encoder's features z = g(x), the head r gives
    the logit

        r(z_i, z_j) = w . LeakyReLU(BatchNorm(U a(z_i, z_j) + u)) + b,

    where the aggregation a is the concatenation, the sum, the mean or the elementwise maximum. The loss is the focal binary
    cross-entropy of all pairs (`relation_loss`). Two images of the same class can form a negative pair: the method knows no classes.

    Both `forward` and `encode` give the features g(x), which `EncoderClassifier` classifies. After training, the head still scores
    how related two images are: `relation_score`.

    Batches are `Batch` with views `(B, K, C, H, W)`, or such views, alone or first in a tuple, where they may be a list of K tensors
    `(B, C, H, W)`; labels are ignored. Each process forms pairs of its own images. Logs the loss, and the head's accuracy on all, on the
    positive and on the negative pairs. Validation images have a single view, so there is no loss; logged is precision at 1, the
    share of images whose nearest other image in feature space has the same class. The best checkpoint is chosen by it.

    Args:
        backbone: the encoder g: a name or a mapping, see `resolve_backbone`.
        num_views: K; None: as many as the data give.
        aggregation: a: "cat", "sum", "mean" or "max".
        hidden_dim: outputs of the head's first layer.
        focal_gamma: exponent of the focal loss: the larger, the less easy pairs count; 0 is the plain cross-entropy.
        in_channels: channels of the images.
        image_size: height and width of the images; up to 64, convolutional encoders get their small-image stem. None: any.
        image_mean: channel means with which the data are normalised; `embed` applies them to raw images.
        image_std: channel standard deviations, likewise.
        pretrained: start from timm's weights. The setting is not saved, so loading a checkpoint never downloads anything.
        optimizer: parameters -> optimizer.
        lr_scheduler: optimizer -> scheduler, or None.

    Raises:
        ValueError: if a setting is out of range, or there is no such encoder.

    Example:
        >>> model = RelationalReasoning(backbone="conv4", image_size=32)
        >>> model.eval()(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 64])

    Source:
        Patacchiola & Storkey, "Self-Supervised Relational Reasoning for Representation Learning", NeurIPS 2020. Learning rate, head
        and negative pairs are those of the published code. That code also accepts a batch of one image, whose positive pairs it
        labels negative; here such a batch is an error.
    """

    checkpoint_monitor = "val/precision_at_1"  # the command line keeps the best checkpoint by it
    prefers_bf16 = True  # convolutions dominate: the command line takes bf16-mixed where the processor gains by it

    def __init__(
        self,
        backbone: str | dict[str, Any] = "conv4",
        num_views: int | None = None,
        aggregation: Aggregation = "cat",
        hidden_dim: int = 256,
        focal_gamma: float = 2.0,
        in_channels: int = 3,
        image_size: int | None = 32,
        image_mean: list[float] | None = None,
        image_std: list[float] | None = None,
        pretrained: bool = False,
        optimizer: OptimizerCallable = lambda params: torch.optim.Adam(params, lr=1e-3),
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        if num_views is not None and num_views < 2:
            raise ValueError(f"num_views must be at least 2, a positive pair, got {num_views}")
        if not (focal_gamma >= 0 and math.isfinite(focal_gamma)):
            raise ValueError(f"focal_gamma must be a number from 0, got {focal_gamma}")
        self.image_input = ImageInput(in_channels, image_size, image_mean, image_std)
        description = self.image_input.resolve(backbone)
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler", "backbone", "pretrained"])
        # Resolved, and without pretrained, so that a checkpoint loads anywhere, offline.
        self.save_hyperparameters({"backbone": description, "pretrained": False})
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.num_views = num_views
        self.focal_gamma = focal_gamma

        self.backbone = self.image_input.create(description, pretrained)
        self.relation = RelationHead(int(self.backbone.num_features), hidden_dim, aggregation)  # type: ignore[arg-type]  # timm's attribute
        self.val_precision = PrecisionAtOne()
        self.test_precision = PrecisionAtOne()

    def forward(self, images: Tensor) -> Tensor:
        """Images `(B, C, H, W)` -> features `(B, D)`, which the head compares."""
        return self.encode(images)

    def encode(self, images: Tensor) -> Tensor:
        """Images `(B, C, H, W)` -> features g(x) `(B, D)` of the encoder."""
        return self.image_input.encode(self.backbone, images)

    def relate(self, first: Tensor, second: Tensor) -> Tensor:
        """Logits `(P,)` of pairs of features `(P, D)`, averaged over both orders, because being of one image is symmetric.

        On a concatenation, the head gives (a, b) and (b, a) different logits, although in training either comes first equally often.
        """
        logits = self.relation(first, second)
        return (logits + self.relation(second, first)) / 2 if self.relation.aggregation == "cat" else logits

    @torch.no_grad()
    def embed(self, images: Tensor | Sequence[Tensor]) -> Tensor:
        """Features of raw images, which are resized, normalised as in training and encoded in evaluation mode.

        Args:
            images: `(B, C, H, W)`, one image `(C, H, W)`, or a sequence of images of different sizes; uint8, or float in [0, 1].

        Returns:
            `(B, D)` float32, on the model's device.

        Raises:
            ValueError: if an image has the wrong shape, dtype or range, or there are no images.

        Example:
            >>> model.embed(torchvision.io.decode_image("cat.png")).shape
            torch.Size([1, 64])
        """
        dtype = self.relation.last.weight.dtype
        groups = self.image_input.prepare(images, self.device)
        with evaluating(self):
            return torch.cat([self(group.to(dtype)) for group in groups]).float()

    @torch.no_grad()
    def relation_score(self, first: Tensor | Sequence[Tensor], second: Tensor | Sequence[Tensor]) -> Tensor:
        """How related images are, pair by pair: the sigmoid of `relate`, the same for (a, b) and (b, a).

        Args:
            first: images as `embed` takes them.
            second: as many images, or one to compare with all of the others.

        Returns:
            `(B,)` float32 in [0, 1], on the model's device; 1 is related.

        Raises:
            ValueError: if the numbers of images differ and neither is 1, or `embed` refuses an image.

        Example:
            >>> model.relation_score(images, images[0]).argsort(descending=True)  # those that are most like the first one
        """
        dtype = self.relation.last.weight.dtype
        features = [self.embed(images).to(dtype) for images in (first, second)]
        counts = [len(rows) for rows in features]
        if counts[0] != counts[1] and 1 not in counts:
            raise ValueError(
                f"images are scored pair by pair: give as many second images as first ones, or one, got {counts[0]} and {counts[1]}"
            )
        with evaluating(self):
            return self.relate(*(rows.expand(max(counts), -1) for rows in features)).float().sigmoid()

    # Training

    @property
    def collapsed_loss(self) -> float:
        """What the loss would be if all features were equal, so that the head could only give every pair the probability 1/2."""
        return math.log(2) * 0.5 ** (self.focal_gamma + 1) if self.focal_gamma else math.log(2)

    def on_fit_start(self) -> None:
        data = getattr(self.trainer, "datamodule", None)
        views, batch_size = getattr(data, "views", None), getattr(data, "batch_size", None)
        if isinstance(views, int):
            self._check_views(views)
        if batch_size == 1:
            raise ValueError("a batch of one image has no negative pair: set the batch_size of the data to at least 2")

    def _check_views(self, views: int) -> None:
        if views < 2 or self.num_views not in (None, views):
            wanted = "at least 2" if self.num_views is None else f"{self.num_views}, the model's num_views"
            raise ValueError(
                f"the data give {views} {'view' if views == 1 else 'views'} of each image: set the views of the data to {wanted}"
            )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images = _views_of(batch)
        size, views = images.shape[:2]
        self._check_views(views)
        features = self.encode(images.flatten(0, 1)).unflatten(0, (size, views)).transpose(0, 1)
        loss, logits, target = self.relation.loss(features, self.focal_gamma)
        # There are as many positive pairs as negative ones.
        positive, negative = 2 * ((logits > 0) & target).float().mean(), 2 * ((logits <= 0) & ~target).float().mean()
        self.log("train/loss", loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=size)
        scores = {"pair_accuracy": (positive + negative) / 2, "positive_accuracy": positive, "negative_accuracy": negative}
        self.log_dict({f"train/{name}": value for name, value in scores.items()}, on_step=False, on_epoch=True, batch_size=size)
        return loss

    # Evaluation

    def _evaluate(self, batch: Any, stage: Literal["val", "test"]) -> dict[str, Tensor]:
        images, label = input_and_label(batch)
        features = self.encode(images)
        (self.val_precision if stage == "val" else self.test_precision).update(features, label)
        return {"embedding": features, "label": label}

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        return self._evaluate(batch, "val")

    def on_validation_epoch_end(self) -> None:
        log_precision_at_one(self, self.val_precision, "val/precision_at_1")

    def test_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        return self._evaluate(batch, "test")

    def on_test_epoch_end(self) -> None:
        log_precision_at_one(self, self.test_precision, "test/precision_at_1")

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Features `(B, D)`; the images of a DataModule are normalised already."""
        return self(batch if isinstance(batch, Tensor) else batch[0])

    def configure_optimizers(self) -> Any:
        return configure_optimizer(self, self.optimizer, self.lr_scheduler)


def _views_of(batch: Any) -> Tensor:
    """Views `(B, K, C, H, W)` of a batch with labels or without."""
    images = batch if isinstance(batch, Tensor) else batch[0]
    if isinstance(images, (tuple, list)):
        images = torch.stack(list(images), dim=1)
    return images.unsqueeze(1) if images.dim() == 4 else images
