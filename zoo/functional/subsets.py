"""A part of many samples in which each class keeps its share."""

import torch
from torch import Tensor


def stratified_subset(label: Tensor, number: int, seed: int = 0) -> Tensor:
    """Samples drawn at random, of each class its share, rounded up or down; no random stream moves.

    Args:
        label: `(N,)` int64; -1, for no label, counts as a class.
        number: samples to draw, at least 1.
        seed: of the draw.

    Returns:
        Positions `(number,)` int64, ascending, on the device of `label`; all `(N,)` where there are no more.

    Raises:
        ValueError: if `number` is below 1.

    Example:
        >>> stratified_subset(torch.tensor([0, 0, 0, 0, 1, 1]), 3).shape
        torch.Size([3])
    """
    if number < 1:
        raise ValueError(f"a subset must have at least 1 sample, got {number}")
    if len(label) <= number:
        return torch.arange(len(label), device=label.device)
    order = torch.randperm(len(label), generator=torch.Generator().manual_seed(seed)).to(label.device)
    order = order[label[order].argsort(stable=True)]
    # Of the samples sorted by class, evenly spaced ones.
    return order[(2 * torch.arange(number, device=label.device) + 1) * len(label) // (2 * number)].sort().values
