"""Agreement of clusters with classes: at its ends, and against mutual information written out."""

import math

import pytest
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_mutual_info_score

from litzoo.zoo.functional.clustering import clustering_metrics


def test_classes_that_are_clusters_agree_wholly() -> None:
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(5, (200,), generator=generator) * 3  # numbers with gaps
    features = 20 * torch.eye(16)[label] + torch.randn(200, 16, generator=generator)
    found = clustering_metrics(features, label)
    assert found.ami == pytest.approx(1.0)
    assert found.nmi == pytest.approx(1.0)
    assert clustering_metrics(features * torch.rand(200, 1), label) == found, "length does not matter"


def test_many_dimensions_against_all_of_them() -> None:
    """First centres by fewer dimensions lead to clusters that are as good as those of scikit-learn's own first centres."""
    generator = torch.Generator().manual_seed(0)
    label = torch.arange(600) % 12
    features = F.normalize(torch.randn(12, 200, generator=generator)[label] + 2.5 * torch.randn(600, 200, generator=generator))
    expected = [
        adjusted_mutual_info_score(label, KMeans(12, n_init=1, random_state=seed).fit_predict(features.numpy())) for seed in range(3)
    ]
    assert min(expected) > 0.5
    assert max(expected) < 1
    assert clustering_metrics(features, label).ami == pytest.approx(sum(expected) / 3, abs=0.1)


def test_labels_at_random_have_no_adjusted_information() -> None:
    generator = torch.Generator().manual_seed(0)
    found = clustering_metrics(torch.randn(400, 8, generator=generator), torch.randint(20, (400,), generator=generator))
    assert abs(found.ami) < 0.03
    assert found.nmi > 0.1


def test_normalised_information_against_its_formula() -> None:
    """Clusters {0, 1, 2} and {3}, classes {0, 1} and {2, 3}."""
    features = torch.tensor([[1.0, 0.0], [1.0, 0.01], [1.0, -0.01], [0.0, 1.0]])
    found = clustering_metrics(features, torch.tensor([0, 0, 1, 1]))
    joint = {(0, 0): 2 / 4, (0, 1): 1 / 4, (1, 1): 1 / 4}
    cluster, cls = {0: 3 / 4, 1: 1 / 4}, {0: 1 / 2, 1: 1 / 2}
    information = sum(p * math.log(p / cluster[a] / cls[b]) for (a, b), p in joint.items())
    entropy = -sum(p * math.log(p) for part in (cluster, cls) for p in part.values()) / 2
    assert found.nmi == pytest.approx(information / entropy)


def test_mistakes_are_told() -> None:
    with pytest.raises(ValueError, match="one label each"):
        clustering_metrics(torch.randn(4, 2), torch.arange(3))
    with pytest.raises(ValueError, match="two classes or more"):
        clustering_metrics(torch.randn(4, 2), torch.zeros(4, dtype=torch.int64))
