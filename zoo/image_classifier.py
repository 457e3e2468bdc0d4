"""Supervised classification of images, by any encoder of `backbones.py`."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from .batch import Batch, count_unlabelled, input_and_label
from .epoch_mean import log_epoch_mean
from .functional.classification import ClassWeights, make_class_weights
from .functional.mixing import mix_images
from .image_input import ImageInput
from .layers.classification_metrics import classification_metrics
from .layers.modes import evaluating
from .optimization import WarmupCosineLR, configure_optimizer


class ImageClassifier(LightningModule):
    """Image classifier: an encoder f and a linear layer, p(y | x) = softmax(W f(x) + b), fitted by the cross entropy.

    Loss: mean_i -sum_c t_ic log p(c | x_i), with targets t_i = (1 - s) onehot(y_i) + s / C under label smoothing s. MixUp draws
    a ~ Beta(mixup, mixup) per batch and trains on a x_i + (1 - a) x_j with target a t_i + (1 - a) t_j, x_j another image of the
    batch; CutMix pastes a box of x_j that covers 1 - a of the image, a ~ Beta(cutmix, cutmix). With both, one of the two is
    drawn per batch. Class weights w act as in torch's `cross_entropy`: the term of class c is multiplied by w_c, and without mixing
    the sum over the batch is divided by the sum of its w_{y_i}.

    Batches are `Batch` or `(images, label)`, images `(B, C, H, W)` float; a training batch may hold views `(B, V, C, H, W)`, each of
    which counts as an image of its own. Logs loss and accuracy of training, and of validation and test also mean class
    accuracy, MCC and calibration error, each over the whole epoch. Under MixUp and CutMix, training accuracy compares the
    prediction for a mixed image with the label of x_i alone, so it does not measure the fit.

    Args:
        num_classes: C.
        class_names: name of each class; kept with the weights.
        backbone: the encoder: a name or a mapping, see `resolve_backbone`.
        in_channels: channels of the images.
        image_size: height and width of the images; up to 64, convolutional encoders get their small-image stem. None: any.
        image_mean: channel means with which the data are normalised; `predict` applies them to raw images.
        image_std: channel standard deviations, likewise.
        pretrained: start from timm's weights. The setting is not saved, so loading a checkpoint never downloads anything.
        label_smoothing: s, in [0, 1].
        mixup: parameter of MixUp's Beta distribution; 0 is off.
        cutmix: parameter of CutMix's Beta distribution; 0 is off.
        dropout: dropout before the linear layer, in [0, 1].
        class_counts: training samples of each class; needed for class weights.
        class_weights: "balanced" weighs classes inversely to their frequency, "effective" to their effective number of samples, see
            `effective_number_weights`.
        effective_beta: of the effective number, in [0, 1].
        optimizer: parameters -> optimizer.
        lr_scheduler: optimizer -> scheduler, or None.

    Raises:
        ValueError: if a setting is out of range, a list has the wrong length, or there is no such encoder.

    Example:
        >>> model = ImageClassifier(num_classes=10, backbone="resnet18", image_size=32)
        >>> model.eval()(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 10])

    Source:
        Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018; Yun et al., "CutMix: Regularization Strategy
        to Train Strong Classifiers with Localizable Features", ICCV 2019; Szegedy et al., "Rethinking the Inception
        Architecture for Computer Vision", CVPR 2016, section 7 (label smoothing).
    """

    input_kind = "images"  # what `litzoo predict` reads for it
    prefers_bf16 = True  # convolutions dominate: the command line takes bf16-mixed where the processor gains by it

    def __init__(
        self,
        num_classes: int,
        class_names: list[str] | None = None,
        backbone: str | dict[str, Any] = "resnet18",
        in_channels: int = 3,
        image_size: int | None = 32,
        image_mean: list[float] | None = None,
        image_std: list[float] | None = None,
        pretrained: bool = False,
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        dropout: float = 0.0,
        class_counts: list[int] | None = None,
        class_weights: ClassWeights = "none",
        effective_beta: float = 0.999,
        optimizer: OptimizerCallable = lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True),
        lr_scheduler: LRSchedulerCallable | None = lambda optimizer: WarmupCosineLR(optimizer, warmup=0.05),
    ) -> None:
        super().__init__()
        _check_settings(num_classes, class_names, class_counts, label_smoothing, mixup, cutmix, dropout)
        self.image_input = ImageInput(in_channels, image_size, image_mean, image_std)
        description = self.image_input.resolve(backbone)
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler", "backbone", "pretrained"])
        # Resolved, and without pretrained, so that a checkpoint loads anywhere, offline.
        self.save_hyperparameters({"backbone": description, "pretrained": False})
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.num_classes = num_classes
        self.class_names = class_names or [str(cls) for cls in range(num_classes)]
        self.label_smoothing = label_smoothing
        self.mixup = mixup
        self.cutmix = cutmix

        self.backbone = self.image_input.create(description, pretrained)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(int(self.backbone.num_features), num_classes)  # type: ignore[arg-type]

        # Not persistent: it belongs to the training data, weights files do not need it.
        self.class_weight: Tensor | None
        self.register_buffer("class_weight", make_class_weights(class_weights, class_counts, effective_beta), persistent=False)

        self.train_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.val_metrics = classification_metrics(num_classes, "val/")
        self.test_metrics = classification_metrics(num_classes, "test/")

    def forward(self, images: Tensor) -> Tensor:
        """Images `(B, C, H, W)` -> logits `(B, num_classes)`."""
        return self.head(self.dropout(self.encode(images)))

    def encode(self, images: Tensor) -> Tensor:
        """Images `(B, C, H, W)` -> features `(B, D)`, before dropout and the linear layer."""
        return self.image_input.encode(self.backbone, images)

    @torch.no_grad()
    def predict(self, images: Tensor | Sequence[Tensor]) -> Tensor:
        """Class probabilities of raw images, which are resized, normalised as in training and classified in evaluation mode.

        Images that are not of `image_size` are cropped to the largest centred square and resized with antialiasing. Grey images
        are repeated to three channels, colour images are turned grey by luma, whichever the encoder needs.

        Args:
            images: `(B, C, H, W)`, one image `(C, H, W)`, or a sequence of images of different sizes; uint8, or float in [0, 1].

        Returns:
            `(B, num_classes)` float32 probabilities, on the model's device.

        Raises:
            ValueError: if an image has the wrong shape, dtype or range, or there are no images.

        Example:
            >>> model.predict(torchvision.io.decode_image("cat.png")).argmax()
        """
        groups = self.image_input.prepare(images, self.device)
        with evaluating(self):
            logits = [self(group.to(self.head.weight.dtype)) for group in groups]
        return torch.cat(logits).float().softmax(dim=1)

    def on_fit_start(self) -> None:
        unlabelled, images = count_unlabelled(getattr(self.trainer, "datamodule", None))
        if unlabelled:
            raise ValueError(
                f"{unlabelled} of {images} training images have no label: a classifier cannot train on them; leave them out, or let "
                "the callback PseudoLabels label them"
            )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, label = input_and_label(batch)
        label = label.long()
        if images.dim() == 5:
            # First views first, so that mixing pairs an image with another one and not with its own second view.
            mixing = bool(self.mixup or self.cutmix)
            label = label.repeat(images.shape[1]) if mixing else label.repeat_interleave(images.shape[1])
            images = (images.transpose(0, 1) if mixing else images).flatten(0, 1)
        key = batch.key if isinstance(batch, Batch) else None
        images, target = mix_images(images, label, self.num_classes, self.mixup, self.cutmix, key)
        logits = self(images)
        loss = F.cross_entropy(logits, target, self.class_weight, label_smoothing=self.label_smoothing)
        self.train_accuracy.update(logits.detach(), label)
        self.log("train/accuracy", self.train_accuracy, on_step=False, on_epoch=True, batch_size=len(label))
        self.log("train/loss", loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(label))
        return loss

    def _evaluate(self, batch: Any, stage: Literal["val", "test"]) -> dict[str, Tensor]:
        images, label = input_and_label(batch)
        logits = self(images)
        metrics = self.val_metrics if stage == "val" else self.test_metrics
        metrics.update(logits, label)
        log_epoch_mean(self, f"{stage}/loss", F.cross_entropy(logits.float(), label), len(label), prog_bar=True)
        return {"logits": logits, "label": label}

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        return self._evaluate(batch, "val")

    def on_validation_epoch_end(self) -> None:
        values = self.val_metrics.compute()
        self.log("val/accuracy", values.pop("val/accuracy"), prog_bar=True)
        self.log_dict(values)
        self.val_metrics.reset()

    def test_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        return self._evaluate(batch, "test")

    def on_test_epoch_end(self) -> None:
        self.log_dict(self.test_metrics.compute())
        self.test_metrics.reset()

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Probabilities `(B, num_classes)`; the images of a DataModule are normalised already."""
        images = batch if isinstance(batch, Tensor) else input_and_label(batch)[0]
        return self(images).float().softmax(dim=1)

    def configure_optimizers(self) -> Any:
        return configure_optimizer(self, self.optimizer, self.lr_scheduler)


def _check_settings(
    num_classes: int,
    class_names: list[str] | None,
    class_counts: list[int] | None,
    label_smoothing: float,
    mixup: float,
    cutmix: float,
    dropout: float,
) -> None:
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, got {num_classes}")
    for name, values in (("class_names", class_names), ("class_counts", class_counts)):
        if values is not None and len(values) != num_classes:
            raise ValueError(f"{name} has {len(values)} entries, but num_classes is {num_classes}")
    for name, value, high in (
        ("label_smoothing", label_smoothing, 1.0),
        ("dropout", dropout, 1.0),
        ("mixup", mixup, 100.0),
        ("cutmix", cutmix, 100.0),
    ):
        if not 0 <= value <= high:
            raise ValueError(f"{name} must lie in [0, {high:g}], got {value}")
