"""Retrieval metrics against a loop over queries and ranks, and against pytorch-metric-learning where it is installed."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from litzoo.zoo.functional import retrieval
from litzoo.zoo.functional.retrieval import retrieval_metrics


def by_loop(query: Tensor, query_label: Tensor, reference: Tensor, reference_label: Tensor, own: bool) -> list[float]:
    similarity = F.normalize(query.double()) @ F.normalize(reference.double()).T
    rows = []
    for number, (row, label) in enumerate(zip(similarity, query_label.tolist(), strict=True)):
        order = [place for place in row.argsort(descending=True, stable=True).tolist() if not (own and place == number)]
        right = [int(reference_label[place] == label) for place in order]
        if (count := sum(right)) == 0:
            continue
        right = right[:count]
        precisions = [sum(right[: rank + 1]) / (rank + 1) * hit for rank, hit in enumerate(right)]
        rows.append([right[0], sum(right) / count, sum(precisions) / count])
    return torch.tensor(rows, dtype=torch.float64).mean(dim=0).tolist()


@pytest.mark.parametrize("places", [1, 100, 1 << 22])
@pytest.mark.parametrize("own", [False, True])
def test_against_a_loop(own: bool, places: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "_PLACES", places)
    generator = torch.Generator().manual_seed(0)
    label, reference_label = (torch.randint(6, (number,), generator=generator) ** 2 for number in (50, 90))
    label[:3] = 99  # a class of three, that no reference has
    centers = torch.randn(100, 5, generator=generator)
    query, reference = (centers[cls] + 1.5 * torch.randn(len(cls), 5, generator=generator) for cls in (label, reference_label))
    found = retrieval_metrics(query, label) if own else retrieval_metrics(query, label, reference, reference_label)
    others = (query, label) if own else (reference, reference_label)
    assert [float(value) for value in found] == pytest.approx(by_loop(query, label, *others, own), abs=1e-12)


def test_perfect_and_worst() -> None:
    label = torch.arange(40) % 4
    perfect = retrieval_metrics(torch.eye(4)[label], label)
    assert [float(value) for value in perfect] == [1.0, 1.0, 1.0]
    apart = retrieval_metrics(torch.eye(2)[[0, 0, 1, 1]], torch.tensor([0, 1, 0, 1]))
    assert [float(value) for value in apart] == [0.0, 0.0, 0.0]


def test_a_query_among_its_copies_is_not_counted() -> None:
    """Equal features: the query may not even be among its nearest."""
    label = torch.tensor([0, 0, 1, 1, 0])
    features = torch.ones(5, 3)
    found = retrieval_metrics(features, label)
    assert [float(value) for value in found] == pytest.approx(by_loop(features, label, features, label, own=True))


def test_agrees_with_pytorch_metric_learning() -> None:
    calculators = pytest.importorskip("pytorch_metric_learning.utils.accuracy_calculator")
    inference = pytest.importorskip("pytorch_metric_learning.utils.inference")
    distances = pytest.importorskip("pytorch_metric_learning.distances")
    generator = torch.Generator().manual_seed(1)
    label = torch.randint(4, (60,), generator=generator)
    features = torch.randn(4, 6, generator=generator)[label] + torch.randn(60, 6, generator=generator)
    names = ("precision_at_1", "r_precision", "mean_average_precision_at_r")
    knn = inference.CustomKNN(distances.CosineSimilarity())
    expected = calculators.AccuracyCalculator(include=names, k="max_bin_count", knn_func=knn).get_accuracy(features, label)
    found = retrieval_metrics(features, label)
    assert [float(value) for value in found] == pytest.approx([expected[name] for name in names], abs=1e-6)


def test_mistakes_are_told() -> None:
    features, label = torch.randn(4, 3), torch.arange(4)
    with pytest.raises(ValueError, match="go together"):
        retrieval_metrics(features, label, features)
    with pytest.raises(ValueError, match="query must be"):
        retrieval_metrics(features, label[:3])
    with pytest.raises(ValueError, match="no reference has the class"):
        retrieval_metrics(features, label)
