"""A classifier that remembers its training features."""

from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..functional.nearest_neighbours import Scores, knn_votes, labelled_rows


class KNNClassifier(nn.Module):
    """Weighted vote of the k nearest training features by cosine similarity: p_c ~ sum_{j in kNN, y_j = c} exp(cos(q, b_j) / T).

    The features are buffers, so they move with `.to()` and are part of the state dict; one of any size can be loaded.

    Args:
        num_classes: C.
        k: neighbours that vote, at most as many as there are labelled features.
        temperature: T above 0.
        scores: "fp32" or "bf16", as for `nearest_neighbours`.

    Raises:
        ValueError: when it is used, as `knn_votes` does, or before it was fitted.

    Example:
        >>> classifier = KNNClassifier(2, k=1).fit(torch.tensor([[2.0, 0.0], [0.0, 3.0]]), torch.tensor([0, 1]))
        >>> classifier.predict(torch.tensor([[1.0, 5.0]]))
        tensor([1])

    Source:
        Wu, Xiong, Yu & Lin, "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", CVPR 2018, section 3.4.
    """

    features: Tensor
    labels: Tensor

    def __init__(self, num_classes: int, k: int = 200, temperature: float = 0.1, scores: Scores = "fp32") -> None:
        super().__init__()
        self.num_classes, self.k, self.temperature, self.scores = num_classes, k, temperature, scores
        self.register_buffer("features", torch.empty(0, 0))
        self.register_buffer("labels", torch.empty(0, dtype=torch.long))

    @torch.no_grad()
    def fit(self, features: Tensor, labels: Tensor) -> Self:
        """Remember features in place of earlier ones.

        Args:
            features: `(N, D)` float, of any length; kept in float32.
            labels: `(N,)` int64 in [0, C); rows labelled -1 are left out.

        Returns:
            The classifier itself, on the device of the features.
        """
        features, labels = labelled_rows(features, labels, self.num_classes)
        if len(labels) < self.k:
            raise ValueError(f"k = {self.k} neighbours are to vote, but only {len(labels)} features have a label: take a smaller k")
        self.features, self.labels = F.normalize(features.float(), dim=1), labels.clone()
        return self

    def forward(self, features: Tensor) -> Tensor:
        """Probabilities of the classes: `(Q, D)` -> `(Q, C)` float32."""
        if len(self.labels) == 0:
            raise ValueError("the classifier has no features to compare with: call fit(features, labels) first, or load a state dict")
        query = F.normalize(features.float(), dim=1)
        return knn_votes(query, self.features, self.labels, self.k, self.temperature, self.num_classes, self.scores)

    def predict_proba(self, features: Tensor) -> Tensor:
        """The same as calling it."""
        probability: Tensor = self(features)
        return probability

    def predict(self, features: Tensor) -> Tensor:
        """The most probable class, of equal ones the smallest: `(Q, D)` -> `(Q,)` int64."""
        return self.predict_proba(features).argmax(dim=1)

    def extra_repr(self) -> str:
        return f"{self.num_classes}, k={self.k}, temperature={self.temperature}, scores={self.scores!r}, features={len(self.labels)}"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for name in ("features", "labels"):  # as large as what comes
            if prefix + name in state_dict:
                setattr(self, name, getattr(self, name).new_empty(state_dict[prefix + name].shape))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
