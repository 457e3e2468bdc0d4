"""The metrics of an epoch, against scikit-learn over uneven batches."""

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, balanced_accuracy_score, matthews_corrcoef
from torch import Tensor

from litzoo.zoo.layers.classification_metrics import MeanClassAccuracy, classification_metrics

SIZES = (7, 1, 32, 3, 20)
pytestmark = pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")


def batches(classes: int = 5, absent: int | None = None) -> list[tuple[Tensor, Tensor]]:
    """Uneven batches of logits that are right more often than not; class `absent` is predicted but never a label."""
    generator = torch.Generator().manual_seed(1)
    given = []
    for size in SIZES:
        label = torch.randint(classes, (size,), generator=generator)
        if absent is not None:
            label[label == absent] = (absent + 1) % classes
        given.append((torch.randn(size, classes, generator=generator) * 1.5 + 1.5 * torch.eye(classes)[label], label))
    return given


def naive_calibration(probability: np.ndarray, label: np.ndarray, bins: int) -> float:
    confidence, right = probability.max(1), probability.argmax(1) == label
    total = 0.0
    for b in range(bins):
        inside = (confidence > b / bins) & (confidence <= (b + 1) / bins)
        if inside.any():
            total += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    return total


@pytest.mark.parametrize("absent", [None, 2])
def test_against_scikit_learn(absent: int | None) -> None:
    metrics = classification_metrics(5, "val/")
    data = batches(absent=absent)
    for logits, label in data:
        metrics.update(logits, label)
    logits, label = (torch.cat(parts) for parts in zip(*data, strict=True))
    guess = logits.argmax(1)
    if absent is not None:
        assert absent in guess
        assert absent not in label
    values = {name: float(value) for name, value in metrics.compute().items()}
    assert sorted(values) == ["val/accuracy", "val/calibration_error", "val/mcc", "val/mean_class_accuracy"]
    assert values["val/accuracy"] == pytest.approx(accuracy_score(label, guess))
    assert values["val/mean_class_accuracy"] == pytest.approx(balanced_accuracy_score(label, guess))
    assert values["val/mcc"] == pytest.approx(matthews_corrcoef(label, guess), abs=1e-6)
    probability = logits.double().softmax(1).numpy()
    assert values["val/calibration_error"] == pytest.approx(naive_calibration(probability, label.numpy(), 15), abs=1e-5)


def test_the_mean_over_batches_is_something_else() -> None:
    metrics = classification_metrics(5, "")
    single = classification_metrics(5, "")
    per_batch = []
    for logits, label in batches():
        metrics.update(logits, label)
        per_batch.append({name: float(value) for name, value in single(logits, label).items()})
    for name, value in metrics.compute().items():
        assert abs(float(value) - np.mean([batch[name] for batch in per_batch])) > 1e-3, name
    metrics.reset()
    logits, label = batches()[0]
    metrics.update(logits, label)
    assert float(metrics.compute()["accuracy"]) == pytest.approx(per_batch[0]["accuracy"])


def test_one_sample_and_one_class() -> None:
    metrics = classification_metrics(3, "")
    metrics.update(torch.tensor([[5.0, 0.0, 0.0]]), torch.tensor([0]))
    values = metrics.compute()
    assert values["accuracy"] == values["mean_class_accuracy"] == 1
    assert values["mcc"] == 0  # of one class there is nothing to correlate
    assert all(value.isfinite() for value in values.values())


def test_nothing_seen_is_zero() -> None:
    with pytest.warns(UserWarning, match="compute"):
        assert MeanClassAccuracy(3).compute() == 0


def test_logits_in_half_precision() -> None:
    metrics = classification_metrics(5, "")
    for logits, label in batches():
        metrics.update(logits.bfloat16(), label)
    logits, label = (torch.cat(parts) for parts in zip(*batches(), strict=True))
    assert float(metrics.compute()["accuracy"]) == pytest.approx(accuracy_score(label, logits.bfloat16().float().argmax(1)))
