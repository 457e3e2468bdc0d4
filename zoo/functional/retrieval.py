"""How well neighbours share a class: precision at 1, R-precision and MAP@R."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .nearest_neighbours import nearest_neighbours

_PLACES = 1 << 22  # neighbours looked at together, which bounds the memory


class RetrievalMetrics(NamedTuple):
    """Means over the queries, each in [0, 1].

    Attributes:
        precision_at_1: share of queries whose nearest reference has their class.
        r_precision: share of a query's class among its R nearest references, R the number of references of that class.
        map_at_r: mean over the R places of the precision up to a place if it holds the query's class, else 0.
    """

    precision_at_1: Tensor
    r_precision: Tensor
    map_at_r: Tensor


def retrieval_metrics(
    query: Tensor, query_label: Tensor, reference: Tensor | None = None, reference_label: Tensor | None = None
) -> RetrievalMetrics:
    """Precision at 1, R-precision and MAP@R by cosine similarity.

    For a query with R references of its class, and rel(i) = 1 if its i-th nearest reference has that class: R-precision = (1 / R)
    sum_i rel(i), MAP@R = (1 / R) sum_i rel(i) (1 / i) sum_{j <= i} rel(j), i = 1 ... R. Unlike R-precision, MAP@R rewards a
    right order. Queries of a class that no reference has are left out. Of equally near references the first counts as nearer.

    Args:
        query: `(Q, D)` float; the length of a feature does not matter.
        query_label: `(Q,)` int64.
        reference: `(N, D)`; None takes the queries themselves, and a query is then no neighbour of its own.
        reference_label: `(N,)` int64, with `reference`.

    Returns:
        Three float64 scalars.

    Raises:
        ValueError: if shapes disagree, or no reference has the class of any query.

    Example:
        >>> features = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
        >>> retrieval_metrics(features, torch.tensor([0, 0, 1, 1])).map_at_r
        tensor(1., dtype=torch.float64)

    Source:
        Musgrave, Belongie & Lim, "A Metric Learning Reality Check", ECCV 2020, section 3.2 (MAP@R); R-precision is of Manning, Raghavan
        & Schütze, "Introduction to Information Retrieval", 2008, section 8.4.
    """
    if (reference is None) != (reference_label is None):
        raise ValueError("reference and reference_label go together: give both or neither")
    own = reference is None
    if reference is None or reference_label is None:
        reference, reference_label = query, query_label
    for name, features, label in (("query", query, query_label), ("reference", reference, reference_label)):
        if features.dim() != 2 or label.shape != features.shape[:1]:
            raise ValueError(
                f"{name} must be (samples, dimensions) with one label each, got {tuple(features.shape)} and labels {tuple(label.shape)}"
            )
    classes, place = torch.cat([query_label, reference_label]).unique(return_inverse=True)
    query_class, reference_class = place.split([len(query_label), len(reference_label)])
    relevant = torch.bincount(reference_class, minlength=len(classes))[query_class] - int(own)
    kept = relevant > 0
    if not bool(kept.any()):
        raise ValueError("no reference has the class of a query: give references of the queries' classes")
    place = kept.nonzero().squeeze(1)
    query, query_class, relevant = F.normalize(query[kept].float()), query_class[kept], relevant[kept]
    reference = F.normalize(reference.float())

    most = int(relevant.max())
    sums = torch.zeros(3, dtype=torch.float64, device=query.device)
    rank = torch.arange(1, most + 1, device=query.device)
    step = max(1, _PLACES // most)
    for features, cls, number, index in zip(
        query.split(step), query_class.split(step), relevant.split(step), place.split(step), strict=True
    ):
        nearest = nearest_neighbours(features, reference, min(most + int(own), len(reference)))[1]
        if own:
            # Out with the query itself; where equal features stand before it, it may not be among so many, and the last goes.
            itself = nearest == index[:, None]
            itself[:, -1] |= ~itself.any(dim=1)
            nearest = nearest[~itself].view(len(nearest), -1)
        found = (reference_class[nearest] == cls[:, None]) & (rank <= number[:, None])
        found = found.double()
        precision = found.cumsum(dim=1) / rank
        sums += torch.stack([found[:, 0].sum(), (found.sum(dim=1) / number).sum(), ((found * precision).sum(dim=1) / number).sum()])
    return RetrievalMetrics(*(sums / len(query)))
