"""What all data sets of point clouds share: subsets, normalisation, splits, parts."""

from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor

from ..zoo.batch import Batch
from ..zoo.functional.points import Normalization, normalize_points
from ..zoo.functional.random import fold_in
from .arrays import ArrayDataModule
from .augment.points import PointAugmentation, subsample
from .splits import TEST, stratified_split

Subset = Literal["random", "farthest"]

# Keeps the stream of evaluation subsets apart from the others of a seed.
_EVALUATION = 4
# Of how many farthest points, in units of `num_points`, a training subset is drawn.
_POOL = 1.2
# Clouds whose parts are looked at together.
_BLOCK = 1024


class PointsDataModule(ArrayDataModule):
    """Base of the data sets of point clouds: a subset of the normalised points, on the batch's device.

    A subclass says how to `read` its arrays, with input `(M, N, 3)` of any floats. Clouds may differ in size: `Arrays.count` then says
    how many points each has, and the places behind them hold those points again, from the first on. Normalisation and random
    subsets see a cloud's own points only. An evaluation cloud keeps the shape of the stored one if `eval_points` is None; the
    part of its repeated points is -1, so that a metric of points counts none twice.

    With `subset="farthest"`, evaluation takes the first `eval_points` of the stored order, and training draws from its first
    round(1.2 `num_points`) (Qian et al., "PointNeXt", NeurIPS 2022); for data whose points are stored in farthest-point order.

    Args:
        num_points: points of a training cloud, a new random subset each epoch; None takes all.
        eval_points: points of an evaluation cloud, a random subset that stays the same; None takes all.
        normalization: "unit_sphere", "unit_box" or "none"; applied before any augmentation.
        augmentation: what to do to training clouds.
        val_fraction: share of validation clouds, where the data have no split.
        test_fraction: share of test clouds, where the data have no split.
        split_seed: draw a new stratified split of these fractions with this seed; None keeps that of the data.
        balanced: whether every class comes equally often in a training epoch.
        subset: "random", or "farthest" for subsets that cover the shape evenly.
        farthest: how many points of each stored cloud, from the first on, are in farthest-point order.
        batch_size: training samples in a batch of one process.
        eval_batch_size: samples in an evaluation batch; None means twice `batch_size`.
        num_workers: loader processes; 0 is the fastest for data in memory.
        seed: seed of order and augmentation; None takes that of `seed_everything`, or 0.

    Raises:
        ValueError: if a setting is out of range, or fewer points are in farthest-point order than a subset takes.
    """

    def __init__(
        self,
        *,
        num_points: int | None = 1024,
        eval_points: int | None = None,
        normalization: Normalization = "unit_sphere",
        augmentation: PointAugmentation = PointAugmentation(),  # noqa: B008  # frozen
        val_fraction: float = 0.1,
        test_fraction: float = 0.15,
        split_seed: int | None = None,
        balanced: bool = False,
        subset: Subset = "random",
        farthest: int = 0,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int | None = None,
    ) -> None:
        super().__init__(batch_size=batch_size, eval_batch_size=eval_batch_size, num_workers=num_workers, seed=seed, balanced=balanced)
        for name, number in (("num_points", num_points), ("eval_points", eval_points)):
            if number is not None and number < 1:
                raise ValueError(f"{name} must be at least 1, or null for all points; got {number}")
        if subset not in get_args(Subset):
            raise ValueError(f"subset must be one of {', '.join(get_args(Subset))}; got {subset!r}")
        self.num_points = num_points
        self.eval_points = eval_points
        self.normalization: Normalization = normalization
        self.augmentation = augmentation
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction
        self.split_seed = split_seed
        self.subset: Subset = subset
        self.farthest = farthest
        needed = max(self._pool or 0, eval_points or 0)
        if subset == "farthest" and farthest < needed:
            raise ValueError(
                f"subset farthest needs the first {needed} points of each cloud in farthest-point order (eval_points, and 1.2 times "
                f"num_points), but {farthest or 'none'} are: take fewer points, set farthest to at least {needed} where the data have "
                "that setting, or subset to random"
            )

    @property
    def _pool(self) -> int | None:
        """How many stored points training draws from; None if from all of them."""
        return None if self.subset == "random" or self.num_points is None else round(_POOL * self.num_points)

    @property
    def part_names(self) -> list[str]:
        """Name of each part; empty if the points have no parts."""
        arrays = self.arrays
        if arrays.part is None or arrays.part_names:
            return list(arrays.part_names)
        return [str(part) for part in range(int(arrays.part.max()) + 1)]

    @property
    def num_parts(self) -> int:
        return len(self.part_names)

    @cached_property
    def part_classes(self) -> list[int]:
        """The class in whose training and validation clouds each part occurs; -1 if that is none, or more than one."""
        arrays, parts = self.arrays, self.num_parts
        if arrays.part is None:
            return []
        # A last row and column take what has no label.
        occurs = torch.zeros(self.num_classes + 1, parts + 1, dtype=torch.bool)
        for index in (arrays.split != TEST).nonzero().squeeze(1).split(_BLOCK):
            part, label = arrays.part[index].long(), arrays.label[index]
            occurs[label.where(label >= 0, self.num_classes)[:, None], part.where(part >= 0, parts)] = True
        occurs = occurs[:-1, :-1]
        return torch.where(occurs.sum(0) == 1, occurs.int().argmax(0), -1).tolist()

    def finish_split(self, label: Tensor, split: Tensor | None) -> Tensor:
        """The split to train with: a new one where there is none, or `split_seed` asks for it.

        Args:
            label: `(M,)` int64.
            split: `(M,)` of the data, or None.

        Returns:
            `(M,)` uint8: 0 = train, 1 = validation, 2 = test.
        """
        if split is None or self.split_seed is not None:
            split = stratified_split(label, self.val_fraction, self.test_fraction, self.split_seed or 0)
        return split.to(torch.uint8)

    def _count(self, batch: Batch) -> Tensor | None:
        count = self.arrays.count
        return None if count is None else count.to(batch.index.device)[batch.index]

    @property
    def augments(self) -> bool:
        neutral = PointAugmentation(scale=(1.0, 1.0), shift=0.0)
        return (self.num_points, self.eval_points) != (None, None) or self.augmentation != neutral

    def prepare(self, batch: Batch) -> Batch:
        count, part = self._count(batch), batch.part
        points = normalize_points(batch.input.float(), self.normalization, count)
        if count is not None and part is not None:
            part = part.masked_fill(torch.arange(part.shape[1], device=part.device) >= count[:, None], -1)
        if batch.key is None and self.eval_points is not None:
            if self.subset == "farthest":
                points, part = points[:, : self.eval_points], None if part is None else part[:, : self.eval_points]
            else:
                own = points.shape[1] if count is None else count[:, None]
                points, part = subsample(points, fold_in(_EVALUATION, batch.index), self.eval_points, part, count)
                if part is not None:
                    part = part.masked_fill(torch.arange(part.shape[1], device=part.device) >= own, -1)
        return batch._replace(input=points, part=part)

    def augment(self, batch: Batch) -> Batch:
        assert batch.key is not None
        points, part, count, pool = batch.input, batch.part, self._count(batch), self._pool
        if pool is not None:
            points, part = points[:, :pool], None if part is None else part[:, :pool]
            count = None if count is None else count.clamp(max=pool)
        points, part = self.augmentation(points, batch.key, self.num_points, part, count)
        return batch._replace(input=points, part=part)
