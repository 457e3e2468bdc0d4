"""Which predictions are good enough to train on."""

import torch
from torch import Tensor


def choose_pseudo_labels(confidence: Tensor, label: Tensor, threshold: float, max_per_class: int | None = None) -> Tensor:
    """Labels of the predictions whose confidence reaches a threshold; of each class the most confident ones, if their number is limited.

    Args:
        confidence: `(N,)` float, the largest probability of each sample; one that is not a number reaches no threshold.
        label: `(N,)` int64, the class that has it, at least 0.
        threshold: t, least confidence.
        max_per_class: most samples of a class, of equally confident ones the first; None means no limit.

    Returns:
        `(N,)` int64: the class, or -1 where none is chosen.

    Example:
        >>> choose_pseudo_labels(torch.tensor([0.9, 0.6, 0.8, 0.95]), torch.tensor([1, 0, 1, 1]), threshold=0.7, max_per_class=2)
        tensor([ 1, -1, -1,  1])

    Source:
        Lee, "Pseudo-Label", ICML 2013 workshop, equation 14; the threshold is that of Sohn et al., "FixMatch", NeurIPS 2020, equation 4.
    """
    chosen = (confidence >= threshold).nonzero().squeeze(1)
    if max_per_class is not None:
        chosen = chosen[confidence[chosen].argsort(descending=True, stable=True)]
        chosen = chosen[label[chosen].argsort(stable=True)]
        counts = label[chosen].bincount()
        rank = torch.arange(len(chosen), device=label.device) - (counts.cumsum(0) - counts)[label[chosen]]
        chosen = chosen[rank < max_per_class]
    found = torch.full_like(label, -1)
    found[chosen] = label[chosen]
    return found
