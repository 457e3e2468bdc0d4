"""How well clusters of features agree with classes."""

from typing import NamedTuple

import numpy as np
import torch.nn.functional as F
from torch import Tensor

# Directions in which first centres are looked for: distances hardly differ, and in all of them that would take most of the time.
_DIRECTIONS = 64


class ClusteringMetrics(NamedTuple):
    """Agreement of clusters with classes.

    Attributes:
        ami: adjusted mutual information: 1 for the classes themselves, about 0 for clusters at random.
        nmi: normalised mutual information in [0, 1], which clusters at random do not bring to 0.
    """

    ami: float
    nmi: float


def clustering_metrics(features: Tensor, label: Tensor, seed: int = 0) -> ClusteringMetrics:
    """Cluster features of length one by k-means into as many clusters as there are classes, and compare the two partitions.

    AMI = (I - E[I]) / ((H(cluster) + H(class)) / 2 - E[I]), with mutual information I and its expectation E[I] over partitions of the same
    sizes; NMI = I / ((H(cluster) + H(class)) / 2). The first centres are those of k-means++; with more than 64 dimensions, by
    distances in as many random directions.

    Args:
        features: `(N, D)` float; their length does not matter.
        label: `(N,)` int64.
        seed: of the first centres.

    Returns:
        Two numbers.

    Raises:
        ValueError: if shapes disagree, or there are fewer than two classes.

    Example:
        >>> clustering_metrics(torch.eye(3)[torch.tensor([0, 0, 1, 1, 2, 2])], torch.tensor([0, 0, 1, 1, 2, 2])).ami
        1.0

    Source:
        Vinh, Epps & Bailey, "Information Theoretic Measures for Clusterings Comparison", JMLR 2010; both are scikit-learn's.
    """
    from sklearn.cluster import KMeans, kmeans_plusplus
    from sklearn.metrics import adjusted_mutual_info_score, normalized_mutual_info_score

    if features.dim() != 2 or label.shape != features.shape[:1]:
        raise ValueError(
            f"features must be (samples, dimensions) with one label each, got {tuple(features.shape)} and {tuple(label.shape)}"
        )
    classes = len(label.unique())
    if classes < 2:
        raise ValueError("clusters can be compared with two classes or more, all samples have the same label")
    points = F.normalize(features.detach().float()).cpu().numpy()
    narrow = points.astype(np.float64)  # which scikit-learn would do at each centre
    if points.shape[1] > _DIRECTIONS:
        narrow = narrow @ np.random.RandomState(seed).randn(points.shape[1], _DIRECTIONS)
    _, first = kmeans_plusplus(narrow, classes, random_state=seed)
    cluster = KMeans(classes, init=points[first], n_init=1, random_state=seed).fit_predict(points)
    truth = label.cpu().numpy()
    return ClusteringMetrics(float(adjusted_mutual_info_score(truth, cluster)), float(normalized_mutual_info_score(truth, cluster)))
