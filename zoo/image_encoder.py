"""An encoder of images alone, such as a network of timm with its pretrained weights."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from .batch import input_and_label
from .image_input import ImageInput, Interpolation
from .layers.modes import evaluating


class ImageEncoder(LightningModule):
    """Encoder of images f(x) without a head, and the images that it was made for, such as a network of timm with its weights, `timm:NAME`.

    It has no training of its own: `EncoderClassifier` trains a classifier on its features, or all of it.

    Args:
        backbone: the encoder: a name or a mapping, see `resolve_backbone`.
        in_channels: channels of the images.
        image_size: height and width of the images; None for any size.
        image_mean: channel means with which images in [0, 1] are normalised; None if they are not.
        image_std: channel standard deviations, likewise.
        interpolation: how raw images of another size are resized, "bilinear" or "bicubic".
        pretrained: start from timm's weights. The setting is not saved, so loading a checkpoint never downloads anything.

    Raises:
        ValueError: if a setting is out of range, or there is no such encoder, or there are no such weights.

    Example:
        >>> encoder = litzoo.load_encoder("timm:resnet18")
        >>> encoder.embed(torchvision.io.decode_image("cat.png")).shape
        torch.Size([1, 512])
    """

    input_kind = "images"
    prefers_bf16 = True  # what is trained on top of it may train it, too

    def __init__(
        self,
        backbone: str | dict[str, Any],
        in_channels: int = 3,
        image_size: int | None = None,
        image_mean: list[float] | None = None,
        image_std: list[float] | None = None,
        interpolation: Interpolation = "bilinear",
        pretrained: bool = False,
    ) -> None:
        super().__init__()
        self.image_input = ImageInput(in_channels, image_size, image_mean, image_std, interpolation)
        description = self.image_input.resolve(backbone)
        self.save_hyperparameters(ignore=["backbone", "pretrained"])
        # Resolved, and without pretrained, so that a checkpoint loads anywhere, offline.
        self.save_hyperparameters({"backbone": description, "pretrained": False})
        self.backbone = self.image_input.create(description, pretrained)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images `(B, C, H, W)` -> features `(B, D)`."""
        return self.encode(images)

    def encode(self, images: Tensor) -> Tensor:
        """Normalised images `(B, C, H, W)` -> features `(B, D)`."""
        return self.image_input.encode(self.backbone, images)

    @torch.no_grad()
    def embed(self, images: Tensor | Sequence[Tensor]) -> Tensor:
        """Features of raw images, which are resized, normalised and encoded in evaluation mode.

        Args:
            images: `(B, C, H, W)`, one image `(C, H, W)`, or a sequence of images of different sizes; uint8, or float in [0, 1].

        Returns:
            `(B, D)` float32, on the model's device.

        Raises:
            ValueError: if an image has the wrong shape, dtype or range, or there are no images.

        Example:
            >>> features = encoder.embed(torchvision.io.decode_image("cat.png"))
        """
        groups, dtype = self.image_input.prepare(images, self.device), next(self.parameters()).dtype
        with evaluating(self):
            return torch.cat([self(group.to(dtype)).float() for group in groups])

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Features `(B, D)`; the images of a DataModule are normalised already."""
        return self(batch if isinstance(batch, Tensor) else input_and_label(batch)[0])
