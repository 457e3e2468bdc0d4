"""What the image models share: which images they take, and how raw images are prepared for them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from .backbones import create_backbone, resolve_backbone

Interpolation = Literal["bilinear", "bicubic"]


@dataclass(frozen=True)
class ImageInput:
    """The images that a model was made for.

    Attributes:
        channels: channels of the images.
        size: height and width of the images; None for any size.
        mean: channel means, for images in [0, 1], that are subtracted; None if images are not normalised.
        std: channel standard deviations by which images are divided, likewise.
        interpolation: how images of another size are resized.

    Raises:
        ValueError: if the mean or the standard deviation does not fit, or there is no such interpolation.

    Example:
        >>> ImageInput(3, 32, None, None).prepare(torch.zeros(3, 48, 48, dtype=torch.uint8))[0].shape
        torch.Size([1, 3, 32, 32])
    """

    channels: int
    size: int | None
    mean: Sequence[float] | None
    std: Sequence[float] | None
    interpolation: Interpolation = "bilinear"

    def __post_init__(self) -> None:
        if (self.mean is None) != (self.std is None):
            raise ValueError("image_mean and image_std go together: give both or neither")
        for name, values in (("image_mean", self.mean), ("image_std", self.std)):
            if values is not None and len(values) != self.channels:
                raise ValueError(f"{name} has {len(values)} entries, but in_channels is {self.channels}")
        if self.std is not None and min(self.std) <= 0:
            raise ValueError(f"image_std must be positive, got {self.std}")
        if self.interpolation not in get_args(Interpolation):
            raise ValueError(f"interpolation must be one of {', '.join(get_args(Interpolation))}; got {self.interpolation!r}")

    def resolve(self, backbone: str | Mapping[str, Any]) -> dict[str, Any]:
        """The full description of an encoder of these images, see `resolve_backbone`.

        Raises:
            ValueError: if there is no such encoder, or its description asks for other images.
        """
        if isinstance(backbone, Mapping):
            for name, value in (("in_channels", self.channels), ("image_size", self.size)):
                if backbone.get(name, value) != value:
                    raise ValueError(f"{name} is {value}, but that of the backbone is {backbone[name]}: set both alike")
        return resolve_backbone(backbone, self.channels, self.size)

    def create(self, description: Mapping[str, Any], pretrained: bool = False) -> nn.Module:
        """Build the encoder that `resolve` described, and check that it takes these images.

        Raises:
            ValueError: if it cannot be built, or shrinks the images to nothing, or wants another size.
        """
        backbone = create_backbone(description, pretrained)
        if self.size is not None:
            try:
                with torch.no_grad():
                    backbone.eval()(torch.zeros(1, self.channels, self.size, self.size))
            except (RuntimeError, ValueError, AssertionError, TypeError) as error:
                raise ValueError(
                    f"the backbone {description['name']!r} cannot take images of {self.size} x {self.size} pixels ({error})"
                ) from error
        return backbone.train()

    def encode(self, backbone: nn.Module, images: Tensor) -> Tensor:
        """Normalised images `(B, C, H, W)` -> features `(B, D)`.

        Raises:
            ValueError: if the images are not float, or of another shape.
        """
        if not images.is_floating_point():
            raise ValueError(
                f"the model takes normalised images, got {images.dtype}: give the trainer the DataModule itself (datamodule=...), "
                "whose loaders yield images as they are stored, or call predict() for raw images"
            )
        if images.dim() != 4 or images.shape[1] != self.channels:
            raise ValueError(f"the model takes images of shape (batch, {self.channels}, height, width), got {tuple(images.shape)}")
        # The layout, not the shape: convolutions then run faster, and the layers keep it.
        features: Tensor = backbone(images.contiguous(memory_format=torch.channels_last))
        return features

    def prepare(self, images: Tensor | Sequence[Tensor], device: torch.device | str = "cpu") -> list[Tensor]:
        """Prepare raw images for the encoder: resize and normalise them.

        Images of another size are cropped to the largest centred square and resized with antialiasing. Grey images are repeated
        to three channels, colour images are turned grey by luma, whichever the encoder needs.

        Args:
            images: `(B, C, H, W)`, one image `(C, H, W)`, or a sequence of images of different sizes; uint8, or float in [0, 1].
            device: where to put them.

        Returns:
            Batches `(B, C, H, W)` in the order of the images; one, unless the sizes differ.

        Raises:
            ValueError: if an image is no tensor, has the wrong shape, dtype or range, or there are no images.
        """
        several = isinstance(images, Iterable) and not isinstance(images, (Tensor, str))
        groups = [self._prepare(group, device) for group in (images if several else [images])]
        if not groups:
            raise ValueError("there are no images to predict")
        return [torch.cat(groups)] if len({group.shape[1:] for group in groups}) == 1 else groups

    def _prepare(self, images: Any, device: torch.device | str) -> Tensor:
        from torchvision.transforms.v2 import functional as vision

        if not isinstance(images, Tensor):
            raise ValueError(  # noqa: TRY004  # the command line tells ValueErrors in one sentence
                "an image is a uint8 or float tensor (channels, height, width), such as torchvision.io.decode_image gives, "
                f"got {type(images).__name__}"
            )
        images = images.unsqueeze(0) if images.dim() == 3 else images
        if images.dim() != 4 or images.shape[1] not in {1, 3, self.channels} or 0 in images.shape:
            raise ValueError(f"predict takes images of shape (channels, height, width) or a batch of them, got {tuple(images.shape)}")
        if images.dtype != torch.uint8 and not images.is_floating_point():
            raise ValueError(f"predict takes images in uint8, or in float from 0 to 1, got {images.dtype}")
        if images.is_floating_point() and not bool(((images >= 0) & (images <= 1)).all()):
            raise ValueError("predict takes float images from 0 to 1, but these go beyond: divide them by 255, or give uint8")
        images = vision.to_dtype(images.to(device), torch.float32, scale=True)
        if images.shape[1] != self.channels:
            if self.channels not in (1, 3):
                raise ValueError(f"the model takes images of {self.channels} channels, got {images.shape[1]}")
            images = vision.rgb_to_grayscale(images) if self.channels == 1 else images.expand(-1, 3, -1, -1)
        if self.size is not None and images.shape[2:] != (self.size, self.size):
            square = vision.center_crop(images, [min(images.shape[2:])])
            images = vision.resize(square, [self.size, self.size], vision.InterpolationMode(self.interpolation), antialias=True)
            images = images.clamp(0, 1)  # bicubic overshoots
        if self.mean is not None and self.std is not None:
            images = vision.normalize(images, list(self.mean), list(self.std))
        return images
