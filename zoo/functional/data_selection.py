"""Which samples to label next: where an ensemble and the model in production are not sure of the same class."""

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from .label_cleaning import normalized_weights

Rank = Literal["disagreement", "entropy", "margin"]

# Rows of probabilities in half precision add up to 1 within this.
_TOLERANCE = 0.02


class Selection(NamedTuple):
    """A row for each of N samples, and the order in which to review them.

    Attributes:
        left_out: `(N,)` bool, whether both sides are sure of the same class.
        label: `(N,)` int64, the class that the production model predicts.
        score: `(N,)`, its probability by the production model.
        proposed: `(N,)` int64, the class that the ensemble predicts.
        proposed_score: `(N,)`, its probability by the ensemble.
        against: `(N,)` int64, how many members of the ensemble predict another class than the production model.
        usefulness: `(N,)` float64, by which the samples are ranked; the higher, the more useful.
        order: `(Q,)` int64, positions of the samples that are not left out, the most useful first.
    """

    left_out: Tensor
    label: Tensor
    score: Tensor
    proposed: Tensor
    proposed_score: Tensor
    against: Tensor
    usefulness: Tensor
    order: Tensor


def disagreement(probabilities: Tensor, weights: Tensor | None = None) -> Tensor:
    """Jensen-Shannon divergence of a committee: how much more uncertain its mean is than its members are.

        D_n = H(sum_k w_k p_kn) - sum_k w_k H(p_kn),  H(p) = -sum_c p_c log p_c,  sum_k w_k = 1

    It is the mean Kullback-Leibler divergence of the members from their mean, and the mutual information between the class and a member
    drawn at random: 0 where all say the same, however unsure, and log K where K of equal weight are each sure of a class of their own.

    Args:
        probabilities: `(K, N, C)`.
        weights: `(K,)`, at least 0, not all 0; None weighs all alike.

    Returns:
        `(N,)` float64, in nats.

    Raises:
        ValueError: if the shapes disagree, or the weights have no positive sum.

    Example:
        >>> disagreement(torch.tensor([[[1.0, 0.0], [0.5, 0.5]], [[0.0, 1.0], [0.5, 0.5]]]))
        tensor([0.6931, 0.0000], dtype=torch.float64)

    Source:
        McCallum & Nigam, "Employing EM and Pool-Based Active Learning for Text Classification", ICML 1998; Houlsby, Huszár,
        Ghahramani & Lengyel, "Bayesian Active Learning for Classification and Preference Learning", 2011, equation 2.
    """
    if probabilities.dim() != 3 or len(probabilities) == 0:
        raise ValueError(f"the probabilities of a committee must have shape (members, N, C), got {tuple(probabilities.shape)}")
    share = _shares(weights, len(probabilities)).to(probabilities.device)
    wide = probabilities.double()
    mean = torch.einsum("k,knc->nc", share, wide)
    return (entropy(mean) - torch.einsum("k,kn->n", share, entropy(wide))).clamp_min(0)  # below 0 by rounding only


def entropy(probabilities: Tensor) -> Tensor:
    """H = -sum_c p_c log p_c, in nats: 0 where one class is certain, log C where all are equally probable.

    Args:
        probabilities: `(..., C)`.

    Returns:
        `(...)` float64.

    Example:
        >>> entropy(torch.tensor([[0.5, 0.5], [1.0, 0.0]]))
        tensor([0.6931, 0.0000], dtype=torch.float64)

    Source:
        Settles, "Active Learning Literature Survey", 2009, section 3.1.
    """
    return torch.special.entr(probabilities.double()).sum(dim=-1)


def margin(probabilities: Tensor) -> Tensor:
    """p_(1) - p_(2), how far the most probable class leads the second one; the smaller, the more useful is a label.

    Args:
        probabilities: `(..., C)`, C at least 2.

    Returns:
        `(...)` float64.

    Example:
        >>> margin(torch.tensor([0.5, 0.25, 0.25]))
        tensor(0.2500, dtype=torch.float64)

    Source:
        Scheffer, Decomain & Wrobel, "Active Hidden Markov Models for Information Extraction", IDA 2001; Settles 2009, section 3.1.
    """
    first, second = probabilities.double().topk(2, dim=-1).values.unbind(-1)
    return first - second


def select(
    production: Tensor,
    fused: Tensor,
    members: Tensor | None = None,
    weights: Tensor | None = None,
    threshold: float = 0.95,
    rank: Rank = "disagreement",
) -> Selection:
    """Compare the model in production with an ensemble: leave out what both know, and rank the rest by how useful a label would be.

    A sample is left out where both predict the same class y and p_production(y) >= t and p_fused(y) >= t. Of the others, the ensemble's
    class is the proposed label, and the most useful ones come first:

    - "disagreement": D of the production model and the M members, see `disagreement`; the production model weighs as much as a member
      on average. Without `members`, of the production model and the ensemble.
    - "entropy": H(p_fused), see `entropy`.
    - "margin": 1 - (p_fused,(1) - p_fused,(2)), see `margin`.

    Equally useful samples keep their order.

    Args:
        production: `(N, C)` probabilities.
        fused: `(N, C)` probabilities of the ensemble, such as `fuse` gives them.
        members: `(M, N, C)` probabilities of its members, or None.
        weights: `(M,)` of the members, as in the fusion; None weighs all alike.
        threshold: t, in [0, 1].
        rank: what makes a label useful.

    Returns:
        The selection.

    Raises:
        ValueError: if shapes disagree, rows are no probabilities, or a setting is out of range.

    Example:
        >>> select(torch.tensor([[0.99, 0.01], [0.9, 0.1]]), torch.tensor([[0.98, 0.02], [0.2, 0.8]])).order
        tensor([1])
    """
    if rank not in get_args(Rank):
        raise ValueError(f"rank must be one of {', '.join(get_args(Rank))}; got {rank!r}")
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must lie in [0, 1], got {threshold}")
    if production.dim() != 2 or production.shape[1] < 2:
        raise ValueError(f"production must have shape (N, C) with at least 2 classes, got {tuple(production.shape)}")
    committee = fused[None] if members is None else members
    if fused.shape != production.shape or committee.shape[1:] != production.shape or len(committee) == 0:
        more = "" if members is None else f" and the members (M, N, C), got {tuple(members.shape)}"
        raise ValueError(f"the fused probabilities must have shape {tuple(production.shape)}, got {tuple(fused.shape)}{more}")
    if members is None and weights is not None:
        raise ValueError("weights are those of the members: give members too")
    share = _shares(weights, len(committee))
    for name, given in (("production", production), ("fused", fused), ("members", committee)):
        _check_probabilities(name, given)

    score, label = production.max(dim=1)
    best, proposed = fused.max(dim=1)
    # In a tie of the ensemble, which of two equal classes max finds is an accident.
    proposed = torch.where(_of(fused, label) == best, label, proposed)
    left_out = (proposed == label) & (score >= threshold) & (best >= threshold)
    against = (committee.amax(dim=-1) > torch.stack([_of(member, label) for member in committee])).sum(dim=0)
    if rank == "disagreement":
        # Of M + 1, the production model has one part.
        share = torch.cat([share.new_ones(1), len(committee) * share])
        usefulness = disagreement(torch.cat([production[None].to(committee), committee]), share)
    else:
        usefulness = entropy(fused) if rank == "entropy" else 1 - margin(fused)
    return Selection(left_out, label, score, proposed, best, against, usefulness, rank_queue(left_out, usefulness))


def rank_queue(left_out: Tensor, usefulness: Tensor) -> Tensor:
    """Positions of the samples that are not left out, the most useful first; equally useful ones keep their order.

    Args:
        left_out: `(N,)` bool.
        usefulness: `(N,)`.

    Returns:
        `(Q,)` int64.

    Example:
        >>> rank_queue(torch.tensor([False, True, False]), torch.tensor([0.1, 0.9, 0.3]))
        tensor([2, 0])
    """
    queue = (~left_out).nonzero().squeeze(1)
    return queue[usefulness[queue].argsort(descending=True, stable=True)]


def _of(probabilities: Tensor, label: Tensor) -> Tensor:
    return probabilities.gather(-1, label[:, None]).squeeze(-1)


def _shares(weights: Tensor | None, number: int) -> Tensor:
    """Weights of sum 1, float64, on the CPU."""
    if weights is None:
        return torch.full((number,), 1 / number, dtype=torch.float64)
    if weights.shape != (number,):
        raise ValueError(f"there must be one weight for each of {number} members, got shape {tuple(weights.shape)}")
    return normalized_weights(weights.detach().cpu())


def _check_probabilities(name: str, given: Tensor) -> None:
    sums = given.double().sum(dim=-1)
    if not given.is_floating_point() or not bool((given >= 0).all()) or not bool(((sums - 1).abs() <= _TOLERANCE).all()):
        raise ValueError(f"{name} must be probabilities, whose rows add up to 1: apply a softmax to logits")
