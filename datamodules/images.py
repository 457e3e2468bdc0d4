"""What all image data sets share: views, splits, normalisation."""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from ..zoo.batch import Batch
from .arrays import ArrayDataModule
from .augment.images import PRESETS, ImageAugmentation, Preset, center_box, crop_resize, normalize
from .errors import DataError
from .splits import TRAIN, VAL, hold_out, stratified_split, thin_out

# Training images on which mean and standard deviation are measured, where none are published.
_SAMPLED = 2048
# Of these, so many are counted at a time.
_BLOCK = 64


class ImageDataModule(ArrayDataModule):
    """Base of the image data sets: stored uint8 images become normalised views on the batch's device.

    A subclass says how to `read` its arrays, with input `(M, C, H, W)` uint8, and may set `published_mean` and
    `published_std`. Training batches are `(B, C, S, S)`, or `(B, V, C, S, S)` with several views; evaluation batches are
    always `(B, C, S, S)`: the largest centred square, resized with antialiasing where that is needed.

    Args:
        augmentation: a preset by name, or an `ImageAugmentation`.
        views: views of each training image.
        image_size: S, pixels; None takes the stored size.
        train_fraction: share of each class's training images to use, in (0, 1].
        imbalance: how many times as many training images the first class keeps as the last one, falling exponentially from class to class.
        val_fraction: share of each class's training images held out for validation, where the data have no such split.
        test_fraction: share of each class's images held out for the test, where the data have no split at all.
        split_seed: seed of all these choices.
        balanced: whether every class comes equally often in a training epoch.
        mean: of each channel, of images in [0, 1]; None takes the published or measured one.
        std: the same for the standard deviation.
        compiled: compile the colour operations; pays after some minutes of training.
        batch_size: training images in a batch of one process.
        eval_batch_size: images in an evaluation batch; None means twice `batch_size`.
        num_workers: loader processes; 0 is the fastest for packed images.
        seed: seed of order and augmentation; None takes that of `seed_everything`, or 0.

    Raises:
        ValueError: if a setting is out of range.
    """

    published_mean: tuple[float, ...] | None = None
    published_std: tuple[float, ...] | None = None

    def __init__(
        self,
        *,
        augmentation: Preset | ImageAugmentation = "standard",
        views: int = 1,
        image_size: int | None = None,
        train_fraction: float = 1.0,
        imbalance: float = 1.0,
        val_fraction: float = 0.1,
        test_fraction: float = 0.0,
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
        super().__init__(batch_size=batch_size, eval_batch_size=eval_batch_size, num_workers=num_workers, seed=seed, balanced=balanced)
        if isinstance(augmentation, str) and augmentation not in PRESETS:
            raise ValueError(f"augmentation must be an ImageAugmentation or one of {', '.join(PRESETS)}; got {augmentation!r}")
        if views < 1 or (image_size is not None and image_size < 1):
            raise ValueError(f"views and image_size must be at least 1, got {views} and {image_size}")
        if std is not None and min(std) <= 0:
            raise ValueError(f"std must be positive, got {list(std)}")
        # What is out of range is refused now, not when the data are read.
        stratified_split(torch.zeros(0, dtype=torch.long), val_fraction, test_fraction)
        thin_out(torch.zeros(0, dtype=torch.uint8), torch.zeros(0, dtype=torch.long), train_fraction, imbalance=imbalance)
        self.augmentation = PRESETS[augmentation] if isinstance(augmentation, str) else augmentation
        self.views = views
        self.train_fraction = train_fraction
        self.imbalance = imbalance
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction
        self.split_seed = split_seed
        self.compiled = compiled
        self._image_size = image_size
        self._mean = mean
        self._std = std

    def finish_split(self, label: Tensor, split: Tensor | None) -> Tensor:
        """The split to train with: validation is held out where there is none, and training thinned out.

        Args:
            label: `(M,)` int64; those without a label, -1, are left where they are, or train.
            split: `(M,)` of the data, or None.

        Returns:
            `(M,)` uint8: 0 = train, 1 = validation, 2 = test, 3 = unused.
        """
        known = label >= 0
        if not known.all():
            finished = torch.zeros(len(label), dtype=torch.uint8) if split is None else split.to(torch.uint8, copy=True)
            finished[known] = self.finish_split(label[known], None if split is None else split[known])
            return finished
        if split is None:
            split = stratified_split(label, self.val_fraction, self.test_fraction, self.split_seed)
        elif not (split == VAL).any():
            split = hold_out(split.to(torch.uint8), label, self.val_fraction, self.split_seed)
        return thin_out(split.to(torch.uint8), label, self.train_fraction, self.split_seed, self.imbalance)

    @property
    def in_channels(self) -> int:
        """C: 3, or 1 for grey images."""
        return self.arrays.input.shape[1]

    @property
    def image_size(self) -> int:
        """S: height and width in pixels of what a model gets."""
        if self._image_size is not None:
            return self._image_size
        height, width = self.arrays.input.shape[2:]
        if height != width:
            raise DataError(
                f"{type(self).__name__}: the stored images have {height} x {width} pixels, say to what square: --data.image_size"
            )
        return height

    @property
    def image_mean(self) -> list[float]:
        """Mean that is subtracted from each channel of images in [0, 1]."""
        return self._moments[0]

    @property
    def image_std(self) -> list[float]:
        """Standard deviation by which each channel is divided."""
        return self._moments[1]

    @cached_property
    def _moments(self) -> tuple[list[float], list[float]]:
        mean = self.published_mean if self._mean is None else tuple(map(float, self._mean))
        std = self.published_std if self._std is None else tuple(map(float, self._std))
        if mean is None or std is None:
            train = self.indices(TRAIN)
            chosen = train[torch.linspace(0, len(train) - 1, min(_SAMPLED, len(train))).round().long()]
            count = torch.zeros(self.in_channels, 256, dtype=torch.double)  # how often each value occurs
            for index in chosen.split(_BLOCK):
                pixels = self.arrays.input[index].transpose(0, 1).flatten(1)
                count += torch.stack([channel.bincount(minlength=256) for channel in pixels])
            value, share = torch.arange(256, dtype=torch.double) / 255, count / count.sum(1, keepdim=True)
            average = share @ value
            spread = (share * (value - average[:, None]).square()).sum(1).sqrt()
            # A channel without contrast must not be blown up.
            measured = average.tolist(), spread.clamp(min=1 / 255).tolist()
            mean, std = (given or tuple(round(value, 4) for value in found) for given, found in zip((mean, std), measured, strict=True))
        for name, values in (("mean", mean), ("std", std)):
            if len(values) != self.in_channels:
                raise DataError(f"{type(self).__name__}: {name} has {len(values)} values, but the images have {self.in_channels} channels")
        return list(mean), list(std)

    def reassign(self, *, split: Tensor | None = None, label: Tensor | None = None) -> None:
        self._moments  # noqa: B018  # measured on the training images that there were
        super().reassign(split=split, label=label)

    @property
    def augments(self) -> bool:
        return self.views > 1 or self.augmentation != PRESETS["none"]

    def prepare(self, batch: Batch) -> Batch:
        if batch.key is not None:  # augmentation wants the stored images
            return batch
        images, size = batch.input, self.image_size
        stored = tuple(images.shape[2:]) == (size, size)
        # Mapped images have their channels last; a model gets them as it gets views.
        images = images.contiguous().float() / 255 if stored else crop_resize(images, center_box(images), size)
        return batch._replace(input=normalize(images, self.image_mean, self.image_std))

    def augment(self, batch: Batch) -> Batch:
        assert batch.key is not None
        views = None if self.views == 1 else self.views
        return batch._replace(
            input=self.augmentation(batch.input, batch.key, self.image_size, views, self.image_mean, self.image_std, compiled=self.compiled)
        )
