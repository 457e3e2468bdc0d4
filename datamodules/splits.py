"""Which samples train, validate and test: seeded and stratified by class."""

import torch
from torch import Tensor

from ..zoo.functional.random import fold_in

TRAIN, VAL, TEST, UNUSED = 0, 1, 2, 3
SPLIT_NAMES = ("train", "val", "test")
# Numbers that keep the streams of one seed apart.
_SPLIT, _KEEP = 3, 5


def stratified_split(label: Tensor, val_fraction: float, test_fraction: float, seed: int = 0) -> Tensor:
    """Assign each sample to a split, at random within each class.

    Of the n samples of a class, round(n * fraction) go to validation and to test; a class of at least three samples
    keeps at least one for training.

    Args:
        label: `(M,)` int64.
        val_fraction: share of validation samples, in [0, 1).
        test_fraction: share of test samples, in [0, 1).
        seed: seed of the assignment.

    Returns:
        `(M,)` uint8: 0 = train, 1 = validation, 2 = test.

    Raises:
        ValueError: if the fractions leave nothing for training.

    Example:
        >>> stratified_split(torch.zeros(10, dtype=torch.long), 0.2, 0.1).bincount()
        tensor([7, 2, 1])
    """
    if min(val_fraction, test_fraction) < 0 or val_fraction + test_fraction >= 1:
        raise ValueError(
            f"val_fraction and test_fraction must be at least 0 and sum to less than 1, got {val_fraction} and {test_fraction}"
        )
    split = torch.zeros(len(label), dtype=torch.uint8)
    position = fold_in(seed, _SPLIT, torch.arange(len(label)))
    for cls in label.unique().tolist():
        members = (label == cls).nonzero().squeeze(1)
        members = members[position[members].argsort(stable=True)]
        test = round(len(members) * test_fraction)
        val = min(round(len(members) * val_fraction), max(len(members) - test - 1, 0))
        split[members[:test]] = TEST
        split[members[test : test + val]] = VAL
    return split


def hold_out(split: Tensor, label: Tensor, val_fraction: float, seed: int = 0) -> Tensor:
    """Turn a share of each class's training samples into validation samples; the test split stays as it is.

    Args:
        split: `(M,)` uint8.
        label: `(M,)` int64.
        val_fraction: share of the training samples, in [0, 1).
        seed: seed of the choice.

    Returns:
        A new `(M,)` uint8.

    Raises:
        ValueError: if the fraction is out of range.

    Example:
        >>> hold_out(torch.tensor([0] * 10 + [2], dtype=torch.uint8), torch.zeros(11, dtype=torch.long), 0.2).bincount()
        tensor([8, 2, 1])
    """
    train = (split == TRAIN).nonzero().squeeze(1)
    held = split.clone()
    held[train] = stratified_split(label[train], val_fraction, 0.0, seed)
    return held


def thin_out(split: Tensor, label: Tensor, train_fraction: float, seed: int = 0, imbalance: float = 1.0) -> Tensor:
    """Keep a share of each class's training samples, at least one, and mark the others as unused (3).

    Of n samples of class c among C, round(n * train_fraction * imbalance^(-c / (C - 1))) are kept. A smaller share keeps a subset of
    what a larger one keeps.

    Args:
        split: `(M,)` uint8.
        label: `(M,)` int64.
        train_fraction: share of the training samples, in (0, 1].
        seed: seed of the choice.
        imbalance: the first class's share over the last one's, at least 1: a long tail as of CIFAR-10-LT. Samples without a label are
            not affected.

    Returns:
        A new `(M,)` uint8.

    Raises:
        ValueError: if the fraction or the imbalance is out of range.

    Source:
        Cui, Jia, Lin, Song & Belongie, "Class-Balanced Loss Based on Effective Number of Samples", CVPR 2019, section 5.1 (imbalance).

    Example:
        >>> thin_out(torch.zeros(10, dtype=torch.uint8), torch.zeros(10, dtype=torch.long), 0.3).bincount()
        tensor([3, 0, 0, 7])
    """
    if not 0 < train_fraction <= 1:
        raise ValueError(f"train_fraction must lie in (0, 1], got {train_fraction}")
    if not imbalance >= 1:
        raise ValueError(f"imbalance must be at least 1, got {imbalance}")
    thinned = split.clone()
    last = max(int(label.max()) if len(label) else 0, 1)
    position = fold_in(seed, _KEEP, torch.arange(len(label)))
    for cls in label[split == TRAIN].unique().tolist():
        members = ((label == cls) & (split == TRAIN)).nonzero().squeeze(1)
        members = members[position[members].argsort(stable=True)]
        share = train_fraction * imbalance ** (-max(cls, 0) / last)
        thinned[members[max(1, round(len(members) * share)) :]] = UNUSED
    return thinned
