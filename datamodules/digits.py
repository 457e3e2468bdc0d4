"""Real handwritten digits, offline."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .arrays import Arrays
from .augment.images import ImageAugmentation, Preset
from .images import ImageDataModule
from .splits import stratified_split

# The test images are the same for everybody, whatever the seeds.
_TEST_FRACTION, _TEST_SEED = 0.2, 0
_GENTLE = ImageAugmentation(crop_scale=(0.8, 1.0), crop_ratio=(0.9, 1.1), rotation=10.0)


class DigitsDataModule(ImageDataModule):
    """1,797 handwritten digits of 13 writers, 8 x 8 pixels in 17 shades, light on black: the data that scikit-learn ships.

    Enlarged once to `image_size`, so that encoders for small photographs take them; grey, one channel. The same 359 images are
    the test split for everybody, a fifth of each digit; validation is held out from the other 1,438. All splits share their writers.

    Args:
        augmentation: a preset by name, or an `ImageAugmentation`; the default zooms, shifts and turns a little. Most presets mirror
            images, and a mirrored digit is none.
        views: views of each training image.
        image_size: pixels of what a model gets; 8 or None keeps the stored ones.
        train_fraction: share of each class's training images to use, in (0, 1].
        imbalance: how many times as many training images the first class keeps as the last one, falling exponentially from class to class.
        val_fraction: share of each class's training images held out for validation.
        split_seed: seed of these choices; it does not touch the test split.
        balanced: whether every class comes equally often in a training epoch.
        mean: of the grey in [0, 1]; None measures it on the training images.
        std: the same for the standard deviation.
        compiled: compile the colour operations; pays after some minutes of training.
        batch_size: training images in a batch of one process.
        eval_batch_size: images in an evaluation batch; None means twice `batch_size`.
        num_workers: loader processes; 0 is the fastest for data in memory.
        seed: seed of order and augmentation; None takes that of `seed_everything`, or 0.

    Raises:
        ValueError: if a setting is out of range.

    Example:
        >>> data = DigitsDataModule()
        >>> data.num_train, data.in_channels, data.image_size
        (1295, 1, 32)

    Source:
        Alpaydin & Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998, doi:10.24432/C50P49
        (CC BY 4.0), its test file; `sklearn.datasets.load_digits`.
    """

    def __init__(
        self,
        *,
        augmentation: Preset | ImageAugmentation = _GENTLE,
        views: int = 1,
        image_size: int | None = 32,
        train_fraction: float = 1.0,
        imbalance: float = 1.0,
        val_fraction: float = 0.1,
        split_seed: int = 0,
        balanced: bool = False,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        compiled: bool = False,
        batch_size: int = 128,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int | None = None,
    ) -> None:
        super().__init__(
            augmentation=augmentation,
            views=views,
            image_size=image_size or 8,
            train_fraction=train_fraction,
            imbalance=imbalance,
            val_fraction=val_fraction,
            test_fraction=0.0,
            split_seed=split_seed,
            balanced=balanced,
            mean=mean,
            std=std,
            compiled=compiled,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            seed=seed,
        )

    def read(self) -> Arrays:
        from sklearn.datasets import load_digits

        values, number = load_digits(return_X_y=True)
        shades = torch.from_numpy(values).float().view(-1, 1, 8, 8) * (255 / 16)
        if self.image_size != 8:
            size = (self.image_size, self.image_size)
            shades = F.interpolate(shades, size, mode="bilinear", align_corners=False, antialias=True)
        label = torch.from_numpy(number).long()
        split = self.finish_split(label, stratified_split(label, 0.0, _TEST_FRACTION, _TEST_SEED))
        return Arrays(shades.round().to(torch.uint8), label, split, tuple(str(digit) for digit in range(10)))
