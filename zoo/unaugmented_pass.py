"""One pass over training samples as they are, such as to fill a memory bank or a cache of features."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch

from .layers.modes import evaluating


@contextmanager
def unaugmented_pass(module: Any, loader: Iterable[Any]) -> Iterator[Iterator[Any]]:
    """Batches on the module's device; inside, the module is in evaluation mode and its trainer's precision, and has no gradients.

    Args:
        module: a LightningModule with a trainer, of which a `fast_dev_run` sees as few batches here as in training.
        loader: of samples that are not augmented, such as the `eval_train_dataloader` of a DataModule.

    Yields:
        The batches.

    Example:
        >>> with unaugmented_pass(module, data.eval_train_dataloader()) as batches:
        ...     features = torch.cat([module.encode(batch.input) for batch in batches])
    """
    trainer = module.trainer
    convert, to_device = trainer.precision_plugin.convert_input, trainer.strategy.batch_to_device
    with torch.no_grad(), evaluating(module), trainer.precision_plugin.forward_context():
        yield (to_device(convert(batch), module.device) for batch in islice(loader, int(trainer.fast_dev_run) or None))
