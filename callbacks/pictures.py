"""What the callbacks that draw share: which samples, images as they were before normalisation, and loggers that take pictures."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

Item = TypeVar("Item")


class EvenlySpread(Generic[Item]):
    """Keeps a number of items spread evenly over a stream of unknown length, always the same ones.

    Every n-th item is kept, n = 1 at first; whenever there are twice as many as wanted, every second one is dropped and n doubles.

    Args:
        number: how many items are wanted.
    """

    def __init__(self, number: int) -> None:
        self._number = number
        self._seen = 0
        self._stride = 1
        self._kept: list[Item] = []

    def offer(self, count: int, make: Callable[[int], Item]) -> None:
        """Take the next items of the stream: `make(row)` gives one of `count`, and is called only for those that are kept."""
        for row in range(count):
            if (self._seen + row) % self._stride == 0:
                self._kept.append(make(row))
                if len(self._kept) == 2 * self._number:
                    self._kept, self._stride = self._kept[::2], 2 * self._stride
        self._seen += count

    def chosen(self) -> list[Item]:
        """At most `number` items, in their order."""
        places = np.linspace(0, len(self._kept) - 1, min(self._number, len(self._kept))).round().astype(int)
        return [self._kept[place] for place in places]


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
