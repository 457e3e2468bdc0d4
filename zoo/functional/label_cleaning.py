"""Wrong labels in a data set: folds, the fusion of an ensemble, and votes on each label."""

from typing import NamedTuple

import torch
from torch import Tensor

from .random import fold_in

# Keeps the stream of folds apart from the others of a seed.
_FOLDS = 21


class LabelVotes(NamedTuple):
    """What rounds say of labels.

    Attributes:
        flagged: `(R, N)` bool, whether a round doubts a label.
        predicted: `(R, N)` bool, whether the round says anything about the sample.
        flags: `(N,)` int64, how many rounds doubt its label.
        votes: `(N,)` int64, how many say anything.
    """

    flagged: Tensor
    predicted: Tensor
    flags: Tensor
    votes: Tensor


class LabelTable(NamedTuple):
    """A row for each sample.

    Attributes:
        flags: `(N,)` int64, rounds that doubt the label.
        votes: `(N,)` int64, rounds that say anything; 0 leaves a sample unjudged.
        proposed: `(N,)` int64, the class of the highest mean probability; the given label where there is no vote.
        given_probability: `(N,)`, mean probability of the given label; NaN where there is no vote.
        proposed_probability: `(N,)`, that of the proposed one.
        review: `(N,)` bool, whether the flags reach the limit.
    """

    flags: Tensor
    votes: Tensor
    proposed: Tensor
    given_probability: Tensor
    proposed_probability: Tensor
    review: Tensor


def assign_folds(label: Tensor, folds: int, seed: int = 0) -> Tensor:
    """Deal samples out to K folds at random, each class evenly; the folds' sizes differ by one at most, in each class and in all.

    A class with fewer samples than folds is missing in some of them.

    Args:
        label: `(N,)` int64.
        folds: K, at least 2.
        seed: of the assignment, which is a function of seed, labels and positions alone.

    Returns:
        `(N,)` int64 in [0, K).

    Raises:
        ValueError: if K is below 2, or there are fewer samples than folds.

    Example:
        >>> assign_folds(torch.tensor([0, 0, 1, 1]), 2).bincount()
        tensor([2, 2])
    """
    if folds < 2:
        raise ValueError(f"there must be at least 2 folds, got {folds}")
    if len(label) < folds:
        raise ValueError(f"{len(label)} samples cannot be dealt out to {folds} folds: use fewer folds")
    order = fold_in(seed, _FOLDS, torch.arange(len(label))).argsort(stable=True).to(label.device)
    order = order[label[order].argsort(stable=True)]
    fold = torch.empty_like(order)
    # Class after class is dealt on where the one before ended, so that the remainders of small classes spread.
    fold[order] = torch.arange(len(label), device=label.device) % folds
    return fold


def fuse(logits: Tensor, weights: Tensor | None = None) -> Tensor:
    """Class probabilities of an ensemble over views: the softmax of the weighted mean of all outputs.

    p_n = softmax(sum_mv w_mv z_mvn / sum_mv w_mv). The mean is taken before the softmax, so it is a normalised geometric mean of the
    members' probabilities: a member that is unsure hardly changes it, one that is sure of another class does.

    Args:
        logits: `(M, V, N, C)`, of M models and V views.
        weights: `(M, V)`, at least 0, not all 0; None weighs all alike.

    Returns:
        `(N, C)`, float32 or wider.

    Raises:
        ValueError: if the logits or the weights have another shape, or the weights no positive sum.

    Example:
        >>> fuse(torch.tensor([[[[0.0, 2.0]]], [[[2.0, 0.0]]]]))
        tensor([[0.5000, 0.5000]])
    """
    if logits.dim() != 4 or 0 in logits.shape[:2]:
        raise ValueError(f"logits must have shape (models, views, N, C), got {tuple(logits.shape)}")
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if weights is None:
        return wide.mean(dim=(0, 1)).softmax(dim=-1)
    if weights.shape != logits.shape[:2]:
        raise ValueError(f"weights must have shape (models, views) = {tuple(logits.shape[:2])}, got {tuple(weights.shape)}")
    return torch.einsum("mv,mvnc->nc", normalized_weights(weights).to(wide), wide).softmax(dim=-1)


def normalized_weights(weights: Tensor) -> Tensor:
    """Weights of the members of an ensemble, scaled to the sum 1.

    Args:
        weights: any shape, at least 0, not all 0.

    Returns:
        The same shape, float64.

    Raises:
        ValueError: if one is negative or not finite, or all are 0.

    Example:
        >>> normalized_weights(torch.tensor([1, 3]))
        tensor([0.2500, 0.7500], dtype=torch.float64)
    """
    wide = weights.double()
    if not bool((wide >= 0).all()) or not bool(wide.isfinite().all()) or float(wide.sum()) <= 0:
        raise ValueError(f"weights must be at least 0 and not all 0, got {weights.tolist()}")
    return wide / wide.sum()


def label_votes(probabilities: Tensor, label: Tensor, threshold: float = 0.0) -> LabelVotes:
    """Let rounds vote on labels: one doubts a label if another class is more probable, or the label's probability is below t.

    Args:
        probabilities: `(R, N, C)`; NaN where a round says nothing about a sample.
        label: `(N,)` int64 in [0, C), the given labels.
        threshold: t, in [0, 1]; 0 leaves only the first rule.

    Returns:
        The votes.

    Raises:
        ValueError: if shapes disagree, or the threshold or a label is out of range.

    Example:
        >>> label_votes(torch.tensor([[[0.9, 0.1], [0.4, 0.6]]]), torch.tensor([1, 1]), 0.7).flags
        tensor([1, 1])
    """
    if probabilities.dim() != 3 or label.shape != probabilities.shape[1:2]:
        raise ValueError(
            f"probabilities must have shape (rounds, N, C) and labels (N,), got {tuple(probabilities.shape)} and {tuple(label.shape)}"
        )
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must lie in [0, 1], got {threshold}")
    if len(label) and not 0 <= int(label.min()) <= int(label.max()) < probabilities.shape[2]:
        raise ValueError(f"labels must lie in 0 to {probabilities.shape[2] - 1}, got {int(label.min())} to {int(label.max())}")
    predicted = ~probabilities.isnan().any(dim=-1)
    known = torch.where(predicted[..., None], probabilities, 0.0)
    given = known.gather(-1, label.expand(len(known), -1)[..., None]).squeeze(-1)
    # A tie is no reason to doubt: which of two equal classes argmax finds is an accident.
    flagged = predicted & ((known.amax(dim=-1) > given) | (given < threshold))
    return LabelVotes(flagged, predicted, flagged.sum(dim=0), predicted.sum(dim=0))


def judge_labels(probabilities: Tensor, label: Tensor, threshold: float = 0.0, min_flags: int | None = None) -> LabelTable:
    """Turn the probabilities of all rounds into a verdict on each label; see `label_votes`.

    A sample is to be reviewed if at least `min_flags` rounds doubt its label, or all that vote on it, where they are fewer.

    Args:
        probabilities: `(R, N, C)`; NaN where a round says nothing about a sample.
        label: `(N,)` int64 in [0, C).
        threshold: below which the probability of a label is too low.
        min_flags: limit, at least 1; None takes more than half of each sample's votes.

    Returns:
        The table.

    Raises:
        ValueError: as for `label_votes`, or if the limit is below 1 or above the votes of every sample.

    Example:
        >>> judge_labels(torch.tensor([[[0.9, 0.1]], [[0.2, 0.8]]]), torch.tensor([1]), min_flags=1).review
        tensor([True])
    """
    votes = label_votes(probabilities, label, threshold)
    most = int(votes.votes.max()) if len(label) else 0
    if min_flags is not None and (min_flags < 1 or (most and min_flags > most)):
        raise ValueError(f"min_flags must lie in 1 to {most}, as many votes as a label gets, got {min_flags}")
    limit = votes.votes // 2 + 1 if min_flags is None else votes.votes.clamp(max=min_flags)
    voted = votes.votes > 0
    mean = mean_probabilities(probabilities)
    given = mean.gather(1, label[:, None]).squeeze(1)
    best = mean.nan_to_num(-1.0).max(dim=1)
    # The given label keeps its place in a tie, as in the vote.
    proposed = torch.where(voted & (best.values > given), best.indices, label)
    return LabelTable(
        votes.flags,
        votes.votes,
        proposed,
        given,
        mean.gather(1, proposed[:, None]).squeeze(1),
        voted & (votes.flags >= limit),
    )


def mean_probabilities(probabilities: Tensor) -> Tensor:
    """The mean over the rounds that say anything about a sample.

    Args:
        probabilities: `(R, N, C)`; NaN where a round says nothing.

    Returns:
        `(N, C)`; NaN where no round does.

    Example:
        >>> mean_probabilities(torch.tensor([[[0.5, 0.5]], [[float("nan"), float("nan")]]]))
        tensor([[0.5000, 0.5000]])
    """
    return probabilities.nanmean(dim=0)
