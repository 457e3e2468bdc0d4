"""Confusion matrix and per-class scores against scikit-learn."""

import pytest
import torch
from sklearn import metrics

from litzoo.zoo.functional.confusion import confusion_matrix, per_class_scores


@pytest.mark.parametrize("classes", [2, 5, 69])
def test_matches_scikit_learn(classes: int) -> None:
    label, prediction = torch.randint(classes, (2, 400))
    matrix = confusion_matrix(prediction, label, classes)
    assert matrix.tolist() == metrics.confusion_matrix(label, prediction, labels=range(classes)).tolist()
    expected = metrics.precision_recall_fscore_support(label, prediction, labels=range(classes), zero_division=0)
    for ours, theirs in zip(per_class_scores(matrix), expected, strict=True):
        torch.testing.assert_close(ours, torch.as_tensor(theirs), rtol=0, atol=1e-12)


def test_classes_without_samples_or_predictions_score_0() -> None:
    """Class 1 is never predicted, class 2 has no samples, class 3 has neither."""
    label, prediction = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 2, 0, 0])
    scores = per_class_scores(confusion_matrix(prediction, label, 4))
    expected = metrics.precision_recall_fscore_support(label, prediction, labels=range(4), zero_division=0)
    for ours, theirs in zip(scores, expected, strict=True):
        torch.testing.assert_close(ours, torch.as_tensor(theirs), rtol=0, atol=1e-12)


def test_rows_are_the_true_classes() -> None:
    assert confusion_matrix(torch.tensor([1, 1]), torch.tensor([0, 0]), 2).tolist() == [[0, 2], [0, 0]]


def test_no_samples() -> None:
    scores = per_class_scores(torch.zeros(3, 3, dtype=torch.long))
    assert all(score.tolist() == [0, 0, 0] for score in scores)
