"""The metrics every classifier of litzoo reports."""

import torch
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError, MulticlassMatthewsCorrCoef, MulticlassStatScores


class MeanClassAccuracy(MulticlassStatScores):
    """Mean over the classes that occur of the share of their samples that are right.

    It equals scikit-learn's `balanced_accuracy_score`. torchmetrics' macro accuracy also counts, as 0, a class that has
    no sample but was predicted once.

    Args:
        num_classes: C.

    Example:
        >>> MeanClassAccuracy(3)(torch.tensor([0, 1, 2]), torch.tensor([0, 1, 1]))
        tensor(0.7500)
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes=num_classes, average=None)

    def compute(self) -> Tensor:
        stat_scores = super().compute().double()
        right, support = stat_scores[:, 0], stat_scores[:, 4]
        recall = right / support
        return recall[support > 0].mean().float() if bool((support > 0).any()) else torch.tensor(0.0, device=support.device)


class EpochMetrics(MetricCollection):
    """A collection that may be reset in Lightning's evaluation and go on in its training."""

    def reset(self) -> None:
        # Tensors made in inference mode could not be updated outside of it.
        with torch.inference_mode(False):
            super().reset()


def classification_metrics(num_classes: int, prefix: str) -> EpochMetrics:
    """Accuracy, mean class accuracy, Matthews correlation (MCC) and expected calibration error (15 bins).

    Each is computed once over all samples of an epoch and all processes, never averaged over batches: MCC of a batch that
    holds one class is 0, whatever the predictions.

    Args:
        num_classes: C.
        prefix: put before the names, such as "val/".

    Returns:
        A torchmetrics collection; update it with logits `(B, C)` and labels `(B,)`.

    Example:
        >>> sorted(classification_metrics(3, "val/"))
        ['val/accuracy', 'val/calibration_error', 'val/mcc', 'val/mean_class_accuracy']
    """
    return EpochMetrics(
        {
            "accuracy": MulticlassAccuracy(num_classes, average="micro"),
            "mean_class_accuracy": MeanClassAccuracy(num_classes),
            "mcc": MulticlassMatthewsCorrCoef(num_classes),
            "calibration_error": MulticlassCalibrationError(num_classes, n_bins=15),
        },
        prefix=prefix,
        compute_groups=[["accuracy"], ["mean_class_accuracy"], ["mcc"], ["calibration_error"]],
    )
