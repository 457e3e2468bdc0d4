"""Heads on features: logits `(B, C)` and out-of-distribution scores `(B,)`, higher the less features are like those of training."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..functional.long_tail import tau_normalized
from ..functional.nearest_neighbours import class_means, nearest_class_mean, nearest_neighbours
from .knn_classifier import KNNClassifier

# A class with fewer votes counts as having this share, so that the loss stays finite.
_LEAST_SHARE = 1e-6


class LinearHead(nn.Linear):
    """W f + b in the precision of its weights, also under autocast; W and b start at 0, so that nothing depends on a seed.

    Args:
        num_features: D.
        num_classes: C.

    Example:
        >>> LinearHead(4, 2).ood_score(torch.rand(1, 4))
        tensor([-0.6931], grad_fn=<NegBackward0>)

    Source:
        Liu, Wang, Owens & Li, "Energy-based Out-of-distribution Detection", NeurIPS 2020, equation 4 with T = 1.
    """

    def __init__(self, num_features: int, num_classes: int) -> None:
        super().__init__(num_features, num_classes)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Features `(B, D)` -> logits `(B, C)`."""
        with torch.autocast(features.device.type, enabled=False):
            return super().forward(features.to(self.weight.dtype))

    def ood_score(self, features: Tensor) -> Tensor:
        """The energy -log sum_c exp(logit_c): `(B, D)` -> `(B,)`."""
        return -self(features).logsumexp(dim=1)


class NeighboursHead(nn.Module):
    """The logarithm of each class's share of the votes of the k nearest training features, see `KNNClassifier`.

    Args:
        num_classes: C.
        k: neighbours that vote.
        temperature: of the votes.

    Example:
        >>> head = NeighboursHead(2, k=1, temperature=0.1)
        >>> head.fit(torch.eye(2), torch.tensor([0, 1]))
        >>> head.ood_score(torch.tensor([[3.0, 0.0], [1.0, 1.0]]))
        tensor([0.0000, 0.2929])

    Source:
        Sun, Ming, Zhu & Li, "Out-of-Distribution Detection with Deep Nearest Neighbors", ICML 2022, with 1 - cos in place of the
        distance of the normalised features, sqrt(2 - 2 cos), which gives the same order.
    """

    def __init__(self, num_classes: int, k: int, temperature: float) -> None:
        super().__init__()
        self.votes = KNNClassifier(num_classes, k, temperature)

    def fit(self, features: Tensor, label: Tensor) -> None:
        """Remember features `(N, D)` with labels `(N,)`, -1 for none."""
        self.votes.fit(features, label)

    def forward(self, features: Tensor) -> Tensor:
        """Features `(B, D)` -> logits `(B, C)` float32."""
        logits: Tensor = self.votes(features).clamp_min(_LEAST_SHARE).log()
        return logits

    def ood_score(self, features: Tensor) -> Tensor:
        """1 - cos to the k-th nearest training feature: `(B, D)` -> `(B,)`."""
        query = F.normalize(features.float(), dim=1)
        return 1 - nearest_neighbours(query, self.votes.features, self.votes.k)[0][:, -1]


class ClassMeansHead(nn.Module):
    """Cosine similarity with the mean of the normalised features of each class, over T; a class without samples is as far as can be.

    Args:
        num_features: D.
        num_classes: C.
        temperature: T.

    Raises:
        ValueError: if no sample has a label, or it is used before it was fitted.

    Example:
        >>> head = ClassMeansHead(2, 2, temperature=0.1)
        >>> head.fit(torch.eye(2), torch.tensor([0, 1]))
        >>> head(torch.tensor([[3.0, 0.0]]))
        tensor([[10.,  0.]])
    """

    means: Tensor

    def __init__(self, num_features: int, num_classes: int, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature
        self.register_buffer("means", torch.zeros(num_classes, num_features))

    def fit(self, features: Tensor, label: Tensor) -> None:
        """Take the means of features `(N, D)` with labels `(N,)`, -1 for none."""
        if not bool((label >= 0).any()):
            raise ValueError("no training sample has a label, so that no class has a mean: give data with labels")
        self.means = class_means(F.normalize(features.float(), dim=1), label, len(self.means))

    def _cosine(self, features: Tensor) -> Tensor:
        if not bool(self.means.any()):
            raise ValueError("the classifier has no class means to compare with: fit it first, or load a trained one")
        return nearest_class_mean(features, self.means.float()).clamp_min(-1)

    def forward(self, features: Tensor) -> Tensor:
        """Features `(B, D)` -> logits `(B, C)` float32."""
        return self._cosine(features) / self.temperature

    def ood_score(self, features: Tensor) -> Tensor:
        """1 - the largest cosine: `(B, D)` -> `(B,)`."""
        return 1 - self._cosine(features).amax(dim=1)


class RescaledHead(nn.Module):
    """A given linear classifier whose weights keep their directions and get other lengths: logit_c = s_c <w_c, f>, without a bias.

    - tau given: s_c = 1 / ||w_c||^tau, and nothing is learned.
    - tau None: learnable weight scaling, s starts at 1; train it on balanced classes.

    Args:
        num_features: D.
        num_classes: C.
        tau: exponent, or None to learn s.

    Raises:
        ValueError: if it is used before it has weights.

    Example:
        >>> head = RescaledHead(2, 2, tau=1.0)
        >>> head.take(torch.tensor([[3.0, 4.0], [0.0, 2.0]]))
        >>> head(torch.tensor([[1.0, 0.0]]))
        tensor([[0.6000, 0.0000]])

    Source:
        Kang et al., "Decoupling Representation and Classifier for Long-Tailed Recognition", ICLR 2020, section 4.
    """

    weight: Tensor

    def __init__(self, num_features: int, num_classes: int, tau: float | None) -> None:
        super().__init__()
        self.tau = tau
        self.register_buffer("weight", torch.zeros(num_classes, num_features))
        if tau is None:
            self.scale = nn.Parameter(torch.ones(num_classes))

    def take(self, weight: Tensor) -> None:
        """Start from the weights `(C, D)` of a trained classifier."""
        self.weight.copy_(weight.detach())

    def forward(self, features: Tensor) -> Tensor:
        """Features `(B, D)` -> logits `(B, C)`, in the precision of the weights, also under autocast."""
        if not bool(self.weight.any()):
            raise ValueError("the classifier has no weights to rescale: give an encoder that has a linear classifier of its own")
        with torch.autocast(features.device.type, enabled=False):
            features = features.to(self.weight.dtype)
            if self.tau is not None:
                return F.linear(features, tau_normalized(self.weight, self.tau))
            return F.linear(features, self.weight) * self.scale

    def ood_score(self, features: Tensor) -> Tensor:
        """The energy -log sum_c exp(logit_c): `(B, D)` -> `(B,)`."""
        return -self(features).logsumexp(dim=1)
