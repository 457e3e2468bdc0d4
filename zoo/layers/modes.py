"""Evaluation mode for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards each layer is as it was, because a frozen part may be in that mode while the rest trains.

    Args:
        module: whose layers, and it itself, are in evaluation mode for a while.

    Example:
        >>> layers = nn.Sequential(nn.BatchNorm1d(8).eval(), nn.Dropout())
        >>> with evaluating(layers):
        ...     layers[1].training
        False
        >>> layers[0].training, layers[1].training
        (False, True)
    """
    modes = {layer: layer.training for layer in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for layer, training in modes.items():
            layer.training = training
