"""What the callbacks that draw share: images as they were before normalisation, and loggers that take pictures."""

import inspect
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor


def raw_images(trainer: Trainer, pl_module: LightningModule, images: Tensor) -> Tensor:
    """Images `(B, C, H, W)` as they can be drawn: `(B, H, W, 1 or 3)` in [0, 1], float32.

    The normalisation is undone by the data's or the model's `image_mean` and `image_std`; without them, each image is stretched from
    its darkest to its brightest value. Of other numbers of channels, the mean is taken.
    """
    images = images.float()
    for owner in (getattr(trainer, "datamodule", None), pl_module):
        scale = [getattr(owner, name, None) for name in ("image_mean", "image_std")]
        if any(x is None for x in scale):
            continue
        mean, std = (torch.as_tensor(x, dtype=torch.float, device=images.device).reshape(-1, 1, 1) for x in scale)
        if len(mean) == len(std) == images.shape[1]:
            images = images * std + mean
            break
    else:
        low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
        images = (images - low) / (high - low).clamp_min(1e-12)
    images = images.clamp(0, 1)
    return (images if images.shape[1] in (1, 3) else images.mean(1, keepdim=True)).permute(0, 2, 3, 1)


def hand_over(trainer: Trainer, name: str, figure: Any, path: Path) -> None:
    """Give a picture to the loggers that take figures (TensorBoard's `add_figure`) or images (`log_image`, as of Weights & Biases)."""
    for logger in trainer.loggers:
        experiment: Any = getattr(logger, "experiment", None)
        try:
            if hasattr(experiment, "add_figure"):
                experiment.add_figure(name, figure, trainer.global_step, close=False)
            elif hasattr(logger, "log_image") and {"key", "images"} <= set(inspect.signature(logger.log_image).parameters):
                logger.log_image(key=name, images=[str(path)])
        except Exception as error:  # noqa: BLE001  # whatever a logger's service raises, it must not end a training
            rank_zero_warn(f"{type(logger).__name__} did not take the picture {path}: {error}")
