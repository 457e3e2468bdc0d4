"""Supervised contrastive learning (Khosla et al., NeurIPS 2020), first stage: an encoder learns features that group by class."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from .batch import Batch, count_unlabelled, input_and_label
from .functional.mixing import mix_images
from .functional.supcon import Anchors, supcon_loss
from .image_input import ImageInput
from .layers.feature_queue import FeatureQueue
from .layers.modes import evaluating
from .layers.precision_at_one import PrecisionAtOne, log_precision_at_one
from .optimization import WarmupCosineLR, configure_optimizer


class SupConEncoder(LightningModule):
    """Supervised contrastive learning: pulls views of images of one class together and pushes all others apart.

    With encoder g and a projection head h of two layers, z = normalise(h(g(x))) for every view x of the batch. The loss is the mean
    over anchors i with positives P(i), the other views of the same class, of

        l_i = log sum_{j != i} exp(z_i . z_j / t) - mean_{p in P(i)} z_i . z_p / t,

    where j runs over the views of all processes (`supcon_loss`). Without supervision, P(i) are the other views of the same image:
    SimCLR. After training, the projection head is no longer needed: `EncoderClassifier` classifies the encoder's features g(x).

    - MixUp and CutMix make labels soft: views are positives to the degree that their labels agree.
    - `queue_size` Q > 0 keeps the embeddings of the last Q views as further positives and negatives. The queue is identical in all
      processes and part of the checkpoint.
    - `chunk_size` computes the loss of a large batch in the memory of a small one: views are encoded in chunks, whose activations are
      not kept but recomputed, one chunk at a time, for the gradient. The gradient is that of the whole batch, but BatchNorm normalises
      by the statistics of each chunk; its running statistics see each image once. Costs another forward pass.

    Batches are `Batch`, `(images, label)` or `([images, images, ...], label)` with one item per view; images `(B, C, H, W)` or views
    `(B, V, C, H, W)`, of which evaluation uses the first. Images labelled -1 are ignored. Logs the loss, and in validation precision
    at 1: the share of images whose nearest other image in feature space has the same class. The best checkpoint is chosen by it.

    Args:
        num_classes: number of classes; needed for MixUp and CutMix only.
        backbone: the encoder g: a name or a mapping, see `resolve_backbone`.
        embedding_dim: dimensions of z.
        hidden_dim: width of the hidden layer of the projection head; None: that of the features.
        temperature: t; 0.5 is usual for SimCLR.
        supervised: whether the positives of a view are the views of its class; False: only those of its image.
        mode: "all" takes every view as an anchor, "one" the first view of each image.
        mixup: parameter of MixUp's Beta distribution; 0 is off.
        cutmix: parameter of CutMix's Beta distribution; 0 is off.
        queue_size: Q; 0 is off.
        chunk_size: views encoded at a time, to save memory; None: all.
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
        >>> model = SupConEncoder(backbone="resnet18", image_size=32)
        >>> model.eval()(torch.rand(2, 3, 32, 32)).norm(dim=1)
        tensor([1., 1.])

    Source:
        Khosla et al., "Supervised Contrastive Learning", NeurIPS 2020; Chen et al., "A Simple Framework for Contrastive Learning of Visual
        Representations", ICML 2020 (SimCLR); Wang, Zhang, Huang & Scott, "Cross-Batch Memory for Embedding Learning", CVPR 2020
        (queue); Gao, Zhang, Han & Callan, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", RepL4NLP 2021
        (chunks).
    """

    checkpoint_monitor = "val/precision_at_1"  # the command line keeps the best checkpoint by it
    prefers_bf16 = True  # convolutions dominate: the command line takes bf16-mixed where the processor gains by it

    def __init__(
        self,
        num_classes: int | None = None,
        backbone: str | dict[str, Any] = "resnet18",
        embedding_dim: int = 128,
        hidden_dim: int | None = None,
        temperature: float = 0.1,
        supervised: bool = True,
        mode: Anchors = "all",
        mixup: float = 0.0,
        cutmix: float = 0.0,
        queue_size: int = 0,
        chunk_size: int | None = None,
        in_channels: int = 3,
        image_size: int | None = 32,
        image_mean: list[float] | None = None,
        image_std: list[float] | None = None,
        pretrained: bool = False,
        optimizer: OptimizerCallable = lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=1e-4),
        lr_scheduler: LRSchedulerCallable | None = lambda optimizer: WarmupCosineLR(optimizer, warmup=0.05),
    ) -> None:
        super().__init__()
        _check_settings(num_classes, embedding_dim, hidden_dim, temperature, supervised, mode, mixup, cutmix, queue_size, chunk_size)
        self.image_input = ImageInput(in_channels, image_size, image_mean, image_std)
        description = self.image_input.resolve(backbone)
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler", "backbone", "pretrained"])
        # Resolved, and without pretrained, so that a checkpoint loads anywhere, offline.
        self.save_hyperparameters({"backbone": description, "pretrained": False})
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.num_classes = num_classes
        self.temperature = temperature
        self.supervised = supervised
        self.mode: Anchors = mode
        self.mixup = mixup
        self.cutmix = cutmix
        self.chunk_size = chunk_size

        self.backbone = self.image_input.create(description, pretrained)
        dimensions = int(self.backbone.num_features)  # type: ignore[arg-type]  # timm's attribute
        hidden_dim = dimensions if hidden_dim is None else hidden_dim
        self.projection = nn.Sequential(nn.Linear(dimensions, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, embedding_dim))
        self.queue = FeatureQueue(embedding_dim, queue_size, num_classes if mixup or cutmix else None) if queue_size else None
        self.val_precision = PrecisionAtOne()
        self.test_precision = PrecisionAtOne()
        # Labelled rows of the last step, in all processes and the queue.
        self._rows: Tensor | None = None

    def forward(self, images: Tensor) -> Tensor:
        """Images `(B, C, H, W)` -> embeddings z `(B, embedding_dim)` of length one."""
        projected = self.projection(self.encode(images))
        return F.normalize(projected.to(torch.promote_types(projected.dtype, torch.float32)))

    def encode(self, images: Tensor) -> Tensor:
        """Images `(B, C, H, W)` -> features g(x) `(B, D)` of the encoder."""
        return self.image_input.encode(self.backbone, images)

    @torch.no_grad()
    def embed(self, images: Tensor | Sequence[Tensor], features: Literal["encode", "forward"] = "encode") -> Tensor:
        """Features of raw images, which are resized, normalised as in training and encoded in evaluation mode.

        Args:
            images: `(B, C, H, W)`, one image `(C, H, W)`, or a sequence of images of different sizes; uint8, or float in [0, 1].
            features: "encode" for the encoder's features, which give better neighbours, or "forward" for the embeddings z.

        Returns:
            `(B, D)` or `(B, embedding_dim)` float32, on the model's device.

        Raises:
            ValueError: if an image has the wrong shape, dtype or range, or there are no images.

        Example:
            >>> model.embed(torchvision.io.decode_image("cat.png")).shape
            torch.Size([1, 512])
        """
        groups = self.image_input.prepare(images, self.device)
        method, dtype = self.encode if features == "encode" else self, next(self.parameters()).dtype
        with evaluating(self):
            return torch.cat([method(group.to(dtype)) for group in groups]).float()

    # Training

    @property
    def collapsed_loss(self) -> Tensor | None:
        """The loss of the last step if all embeddings were equal, log(R - 1) for R labelled rows; None before the first step."""
        return None if self._rows is None else (self._rows - 1).clamp_min(1).log()

    def on_fit_start(self) -> None:
        if self.queue is not None:
            self.queue.discard()
        unlabelled, images = count_unlabelled(getattr(self.trainer, "datamodule", None))
        if self.supervised and unlabelled and unlabelled == images:
            raise ValueError("none of the training images has a label: set supervised to false, for SimCLR")
        if (self.mixup or self.cutmix) and unlabelled:
            raise ValueError(f"{unlabelled} of {images} training images have no label, which MixUp and CutMix cannot mix")

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.queue is not None:
            self.queue.commit()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, label, key = _unpack(batch)
        size, views = images.shape[:2]
        if (self.mixup or self.cutmix) and self.num_classes is not None:
            # First views first: so all views of an image are mixed with one and the same other image, and never with one another.
            ordered, labels = images.transpose(0, 1).flatten(0, 1), label.repeat(views)
            ordered, labels = mix_images(ordered, labels, self.num_classes, self.mixup, self.cutmix, key)
            images, label = ordered.unflatten(0, (views, size)).transpose(0, 1), labels[:size]
        if not self.supervised and views < 2:
            raise ValueError("without supervision the positives of an image are its other views: set the views of the data to 2")
        z = self._embed_in_chunks(images.flatten(0, 1)).unflatten(0, (size, views))
        rows = self.trainer.world_size * views * (_labelled(label) if self.supervised else torch.tensor(size))
        if self.queue is None:
            loss = supcon_loss(z, label if self.supervised else None, self.temperature, self.mode)
        else:
            label, queue = label if self.supervised else _index(batch), self.queue.contents()
            loss = supcon_loss(z, label, self.temperature, self.mode, queue)
            rows = rows + _labelled(queue[1])
            if not self.queue.is_staged:  # a second pass over the batch (SAM, FGM) sees other weights
                self.queue.stage(z.flatten(0, 1), label.repeat_interleave(views, dim=0))
        self._rows = rows
        self.log("train/loss", loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=size)
        return loss

    def _embed_in_chunks(self, images: Tensor) -> Tensor:
        if self.chunk_size is None or not torch.is_grad_enabled():
            return self(images)
        # Even parts: of a short rest, or of a single image, BatchNorm would have poor statistics or none.
        return _recomputed(self, images.tensor_split(math.ceil(len(images) / self.chunk_size)))

    # Evaluation

    def _evaluate(self, batch: Any, stage: Literal["val", "test"]) -> dict[str, Tensor]:
        images, label, _ = _unpack(batch)
        features = self.encode(images[:, 0])
        # No loss: that of a batch depends on which images it holds, and evaluation batches may hold one class only.
        (self.val_precision if stage == "val" else self.test_precision).update(features, label)
        return {"embedding": F.normalize(self.projection(features).float()), "label": label}

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        return self._evaluate(batch, "val")

    def on_validation_epoch_end(self) -> None:
        log_precision_at_one(self, self.val_precision, "val/precision_at_1")

    def test_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        return self._evaluate(batch, "test")

    def on_test_epoch_end(self) -> None:
        log_precision_at_one(self, self.test_precision, "test/precision_at_1")

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Embeddings `(B, embedding_dim)`; the images of a DataModule are normalised already."""
        return self(batch if isinstance(batch, Tensor) else batch[0])

    def configure_optimizers(self) -> Any:
        return configure_optimizer(self, self.optimizer, self.lr_scheduler)


@torch.compiler.disable  # contexts of a checkpoint are unknown to it
def _recomputed(module: nn.Module, chunks: Sequence[Tensor]) -> Tensor:
    """The module's output for all chunks; activations are recomputed, one chunk at a time, for the gradient."""
    contexts = lambda: (nullcontext(), _kept_statistics(module))  # of the first pass, and of the one for the gradient
    return torch.cat([checkpoint(module, chunk, use_reentrant=False, context_fn=contexts) for chunk in chunks])


@contextmanager
def _kept_statistics(module: nn.Module) -> Iterator[None]:
    """Inside, BatchNorm normalises by the statistics of the batch, but does not update its running ones again."""
    layers = [layer for layer in module.modules() if isinstance(layer, _BatchNorm)]
    before = [(layer.momentum, layer.num_batches_tracked) for layer in layers]
    for layer in layers:
        layer.momentum, layer.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for layer, (momentum, batches) in zip(layers, before, strict=True):
            layer.momentum, layer.num_batches_tracked = momentum, batches


def _unpack(batch: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    """Views `(B, V, C, H, W)`, labels, and the samples' keys if there are any."""
    images, label = input_and_label(batch)
    if isinstance(images, (tuple, list)):
        images = torch.stack(list(images), dim=1)
    if images.dim() == 4:
        images = images.unsqueeze(1)
    return images, label.long(), batch.key if isinstance(batch, Batch) else None


def _labelled(label: Tensor) -> Tensor:
    """How many rows `(R,)` or, with soft labels, `(R, C)` have a label."""
    return (label >= 0).sum() if label.dim() == 1 else label.any(dim=1).sum()


def _index(batch: Any) -> Tensor:
    """The number of each sample in its data set, by which its views are told from those of other samples in the queue."""
    if len(batch) < 3 or not isinstance(batch[2], Tensor):
        raise ValueError("a queue without supervision must know which image is which: let the loader yield (images, label, index)")
    return batch[2]


def _check_settings(
    num_classes: int | None,
    embedding_dim: int,
    hidden_dim: int | None,
    temperature: float,
    supervised: bool,
    mode: str,
    mixup: float,
    cutmix: float,
    queue_size: int,
    chunk_size: int | None,
) -> None:
    for name, value, least in (
        ("num_classes", num_classes, 1),
        ("embedding_dim", embedding_dim, 1),
        ("hidden_dim", hidden_dim, 1),
        ("queue_size", queue_size, 0),
        ("chunk_size", chunk_size, 1),
    ):
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if not temperature >= 1 / 640:
        raise ValueError(f"temperature must be at least 1/640, got {temperature}")
    if mode not in get_args(Anchors):
        raise ValueError(f"mode must be one of {', '.join(get_args(Anchors))}; got {mode!r}")
    for name, parameter in (("mixup", mixup), ("cutmix", cutmix)):
        if not 0 <= parameter <= 100:
            raise ValueError(f"{name} must lie in [0, 100], got {parameter}")
    if mixup or cutmix:
        if not supervised:
            raise ValueError("MixUp and CutMix mix labels, and without supervision there are none: set both to 0")
        if num_classes is None:
            raise ValueError("MixUp and CutMix make targets of all classes: give num_classes")
