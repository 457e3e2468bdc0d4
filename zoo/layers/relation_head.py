"""The head that judges whether two features are of one image."""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..functional.relations import relation_head_loss, relation_loss, view_pairs

Aggregation = Literal["cat", "sum", "mean", "max"]
# Below so many pairs the layers themselves are faster than `relation_head_loss`, whose operations are many.
_FEW = 2048


class RelationHead(nn.Module):
    """Linear, BatchNorm, LeakyReLU, Linear on the aggregate of two features: the logit that both are of one image.

    The two are concatenated (2 D), added, averaged, or combined by the elementwise maximum. Only the concatenation has an order.

    Args:
        in_features: D.
        hidden_dim: H, outputs of the first layer.
        aggregation: "cat", "sum", "mean" or "max".

    Raises:
        ValueError: if there is no such aggregation, or the width is not positive.

    Example:
        >>> RelationHead(64)(torch.rand(8, 64), torch.rand(8, 64)).shape
        torch.Size([8])

    Source:
        Patacchiola & Storkey, "Self-Supervised Relational Reasoning for Representation Learning", NeurIPS 2020, and its code.
    """

    def __init__(self, in_features: int, hidden_dim: int = 256, aggregation: Aggregation = "cat") -> None:
        super().__init__()
        if aggregation not in get_args(Aggregation):
            raise ValueError(f"aggregation must be one of {', '.join(get_args(Aggregation))}; got {aggregation!r}")
        if hidden_dim < 1:
            raise ValueError(f"hidden_dim must be at least 1, got {hidden_dim}")
        self.aggregation = aggregation
        self.first = nn.Linear(2 * in_features if aggregation == "cat" else in_features, hidden_dim)
        self.norm = nn.BatchNorm1d(hidden_dim)
        self.activation = nn.LeakyReLU()
        self.last = nn.Linear(hidden_dim, 1)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Features `(P, D)` of both images of each pair -> logits `(P,)`."""
        return self.last(self.activation(self.norm(self.first(self._aggregate(first, second))))).squeeze(1)

    def _aggregate(self, first: Tensor, second: Tensor) -> Tensor:
        if self.aggregation == "cat":
            return torch.cat([first, second], dim=1)
        if self.aggregation == "max":
            return torch.maximum(first, second)
        return first + second if self.aggregation == "sum" else (first + second) / 2

    def loss(self, features: Tensor, focal_gamma: float = 2.0) -> tuple[Tensor, Tensor, Tensor]:
        """`relation_loss` on all `view_pairs` of a batch, in training mode.

        The first layer sees every view once instead of every pair, unless the aggregation is "max", which is not linear. The result
        is that of `forward` on all pairs, which also moves BatchNorm's running statistics.

        Args:
            features: `(K, M, D)` of K views of M images.
            focal_gamma: see `relation_loss`.

        Returns:
            The loss, float32 or float64, and of each pair the logit without a gradient and whether it is positive, both `(P,)`.

        Raises:
            ValueError: if there are fewer than two views or images.
        """
        views, samples, _ = features.shape
        pairs = view_pairs(samples, views, features.device)
        # Of two views there are no more pairs than views, and features are smaller to pick than what the layer makes of them.
        if self.aggregation == "max" or views == 2:
            rows = features.flatten(0, 1)
            logits = self(F.embedding(pairs.first, rows), F.embedding(pairs.second, rows))
            return relation_loss(logits, pairs.target, focal_gamma), logits.detach(), pairs.target
        if self.aggregation == "cat":
            first, second = self.first.weight.chunk(2, dim=1)
        else:
            first = second = self.first.weight if self.aggregation == "sum" else self.first.weight / 2
        # Somebody may have frozen the statistics, or share them among processes (SyncBatchNorm).
        is_plain = type(self.norm) is nn.BatchNorm1d and self.norm.training
        if not is_plain or len(pairs.target) < _FEW:
            # Of the last view no pair is the first, of the first view none the second.
            own = F.linear(features[:-1].flatten(0, 1), first, self.first.bias)
            partner = F.linear(features[1:].flatten(0, 1), second)
            hidden = F.embedding(pairs.first, own) + F.embedding(pairs.second - samples, partner)
            logits = self.last(self.activation(self.norm(hidden))).squeeze(1)
            return relation_loss(logits, pairs.target, focal_gamma), logits.detach(), pairs.target
        step = relation_head_loss(
            features,
            first,
            second,
            self.norm.weight,
            self.norm.bias,
            self.last.weight[0],
            self.last.bias,
            self.norm.eps,
            self.activation.negative_slope,
            focal_gamma,
        )
        self._track(step.mean + self.first.bias.detach(), step.var, len(pairs.target))
        # BatchNorm takes the bias away: its gradient is zero, but it has one, for DDP waits for that of every parameter.
        return step.loss + 0 * self.first.bias.sum(), step.logits, pairs.target

    @torch.no_grad()
    def _track(self, mean: Tensor, var: Tensor, pairs: int) -> None:
        """Move the running statistics, as `nn.BatchNorm1d` does."""
        norm = self.norm
        if norm.running_mean is None or norm.running_var is None:
            return
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked += 1
        momentum = 1 / float(norm.num_batches_tracked) if norm.momentum is None and norm.num_batches_tracked is not None else norm.momentum
        for running, value in ((norm.running_mean, mean), (norm.running_var, var * (pairs / (pairs - 1)))):
            running.lerp_(value.to(running.dtype), momentum or 0.0)
