"""Takes predictions and labels out of the steps of any classifier."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from ..zoo.batch import input_and_label
from ..zoo.functional.confusion import confusion_matrix


def logits_and_label(pl_module: LightningModule, trainer: Trainer, outputs: Any, batch: Any) -> tuple[Tensor, Tensor]:
    """Logits `(B, C)` and labels `(B,)` of an evaluation step.

    They are taken from the step's result where it is a mapping with "logits" and "label"; else the module is called once
    more on the inputs.

    Raises:
        ValueError: if there are no logits of that shape.
    """
    if isinstance(outputs, Mapping) and "logits" in outputs and "label" in outputs:
        logits, label = outputs["logits"], outputs["label"]
    else:
        inputs, label = input_and_label(batch)
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            logits = pl_module(inputs)
    if not isinstance(logits, Tensor) or logits.dim() != 2 or label.shape != logits.shape[:1]:
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"{type(pl_module).__name__} is no classifier: its forward must give logits of shape (batch, classes), it gave {shape}; "
            "a step may also return {'logits': ..., 'label': ...}"
        )
    return logits, label


def class_names_of(pl_module: LightningModule, trainer: Trainer, given: list[str] | None, num_classes: int) -> list[str]:
    """Names of the classes: those given, else the model's, else the data's, else numbers."""
    datamodule = getattr(trainer, "datamodule", None)
    for names in (given, getattr(pl_module, "class_names", None), getattr(datamodule, "class_names", None)):
        if names is not None and len(names) == num_classes:
            return list(names)
    return [str(cls) for cls in range(num_classes)]


def output_folder(trainer: Trainer) -> Path:
    """Where the callbacks write: the run's folder."""
    return Path(trainer.log_dir or trainer.default_root_dir)


class EpochConfusion:
    """The confusion matrix of an evaluation epoch, on every process and over all of them.

    Batches of the first evaluation loader count, those of further ones do not.
    """

    def __init__(self) -> None:
        self.matrix: Tensor | None = None

    def reset(self) -> None:
        self.matrix = None

    def update(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any) -> None:
        logits, label = logits_and_label(pl_module, trainer, outputs, batch)
        counts = confusion_matrix(logits.argmax(dim=1), label, logits.shape[1])
        self.matrix = counts if self.matrix is None else self.matrix + counts

    def total(self, trainer: Trainer) -> Tensor:
        """The sum over all processes, on the CPU; every process must call it."""
        assert self.matrix is not None
        return trainer.strategy.reduce(self.matrix, reduce_op="sum").cpu()
