"""Takes predictions and labels out of the steps of any classifier."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from ..zoo.batch import input_and_label
from ..zoo.files import whole_file
from ..zoo.functional.confusion import confusion_matrix
from .features import known_classes


def predictions_and_label(trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any) -> tuple[Tensor, Tensor, int]:
    """Predicted classes `(B,)`, labels `(B,)` and the number of classes, 0 if unknown, of an evaluation step.

    They are taken from the step's result where it is a mapping with "logits" `(B, C)` or "preds" `(B,)`, and "label" or
    "target"; else the label is that of the batch, and the module is called once more on the inputs.

    Raises:
        ValueError: if the module is no classifier.
    """
    found: Mapping[str, Any] = outputs if isinstance(outputs, Mapping) else {}
    label = found.get("label", found.get("target"))
    scores = found.get("logits", found.get("preds"))
    if label is None or scores is None:
        try:
            inputs, batch_label = input_and_label(batch)
        except TypeError as error:
            raise _no_classifier(pl_module, f"its batches are {type(batch).__name__}") from error
        label = batch_label if label is None else label
        if scores is None:
            with torch.no_grad(), trainer.precision_plugin.forward_context():
                scores = pl_module(inputs)
    if not isinstance(scores, Tensor) or not isinstance(label, Tensor):
        raise _no_classifier(pl_module, f"it gave {type(scores).__name__} for labels of {type(label).__name__}")
    is_classes = scores.dim() == 1 and not scores.is_floating_point()
    is_logits = scores.dim() == 2 and scores.shape[1] > 1 and scores.is_floating_point()
    if label.is_floating_point() or label.dim() != 1 or not (is_classes or is_logits) or len(scores) != len(label):
        raise _no_classifier(
            pl_module, f"it gave {scores.dtype} of shape {tuple(scores.shape)} for labels {label.dtype} of shape {tuple(label.shape)}"
        )
    return (scores.argmax(dim=1), label.long(), scores.shape[1]) if is_logits else (scores.long(), label.long(), 0)


def _no_classifier(pl_module: LightningModule, found: str) -> ValueError:
    return ValueError(
        f"{type(pl_module).__name__} is no classifier: {found}; its forward must give logits (batch, classes) for batches (x, y), "
        "or its step must return {'logits': (batch, classes), 'label': (batch,)} or {'preds': (batch,), 'label': (batch,)}"
    )


def class_names_of(trainer: Trainer, pl_module: LightningModule, given: Sequence[str] | None, num_classes: int) -> list[str]:
    """Names of the classes: those given, else the model's hyper-parameter, the data's, the model's attribute, else numbers.

    Raises:
        ValueError: if the given ones are too few or too many.
    """
    if given is not None and len(given) != num_classes:
        raise ValueError(f"class_names has {len(given)} names, but there are {num_classes} classes")
    hparams = getattr(pl_module, "hparams", None) or {}
    datamodule = getattr(trainer, "datamodule", None)
    for names in (given, hparams.get("class_names"), getattr(datamodule, "class_names", None), getattr(pl_module, "class_names", None)):
        if names is not None and len(names) == num_classes:
            return [str(name) for name in names]
    return [str(cls) for cls in range(num_classes)]


def names_of_known_classes(trainer: Trainer, pl_module: LightningModule, given: Sequence[str] | None, least: int) -> list[str]:
    """Names of all classes, where the labels show only that there are at least so many, see `class_names_of`."""
    known = len(given) if given is not None else known_classes(trainer, pl_module, None)
    return class_names_of(trainer, pl_module, given, max(least, known or 0))


def output_folder(trainer: Trainer) -> Path:
    """Where the callbacks write: the run's folder. Every process must call it, `trainer.log_dir` is a broadcast."""
    return Path(trainer.log_dir or trainer.default_root_dir)


def write_csv(path: Path, rows: Iterable[Iterable[Any]]) -> None:
    """Write rows as a CSV file, see `whole_file`; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


class EpochConfusion:
    """The confusion matrix of an evaluation epoch, on every process and over all of them.

    Args:
        class_names: say how many classes there are where the steps give classes instead of logits.
    """

    def __init__(self, class_names: Sequence[str] | None = None) -> None:
        self._least = len(class_names or ())
        self._matrix: Tensor | None = None

    def reset(self) -> None:
        self._matrix = None

    def update(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any) -> None:
        """Count the predictions of a batch.

        Raises:
            ValueError: if the module is no classifier, or a label is out of range.
        """
        prediction, label, classes = predictions_and_label(trainer, pl_module, outputs, batch)
        if len(label) == 0:
            return
        # Without logits the classes are those seen so far.
        size = classes or max(self._least, int(torch.maximum(prediction, label).max()) + 1)
        if int(label.min()) < 0 or int(label.max()) >= size:
            raise ValueError(
                f"{type(pl_module).__name__} has {size} classes, but there are labels from {int(label.min())} to {int(label.max())}"
            )
        counts = confusion_matrix(prediction, label, size)
        self._matrix = counts if self._matrix is None else _grown(self._matrix, size) + _grown(counts, len(self._matrix))

    def total(self, trainer: Trainer, pl_module: LightningModule) -> Tensor | None:
        """The sum over all processes, on the CPU, or None without samples; every process must call it."""
        classes = torch.tensor(0 if self._matrix is None else len(self._matrix), device=pl_module.device)
        if trainer.world_size > 1:
            # A process may have had no batch, or seen fewer classes.
            classes = trainer.strategy.all_gather(classes).max()
        size = int(classes)
        if size == 0:
            return None
        matrix = torch.zeros(size, size, dtype=torch.long, device=pl_module.device)
        if self._matrix is not None:
            matrix += _grown(self._matrix, size)
        return trainer.strategy.reduce(matrix, reduce_op="sum").cpu()


def _grown(matrix: Tensor, size: int) -> Tensor:
    """The matrix with rows and columns of zeros for further classes."""
    more = max(0, size - len(matrix))
    return torch.nn.functional.pad(matrix, (0, more, 0, more))
