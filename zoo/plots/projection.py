"""From many dimensions to the two of a picture."""

from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..functional.nearest_neighbours import nearest_neighbours

Method = Literal["tsne", "umap", "pca"]

# Distances hardly change by leaving out the rest, and the search for neighbours is much faster.
_KEPT = 50
_PERPLEXITY = 30.0


def check_method(method: str) -> None:
    """Refuse a method that there is not, or whose package is missing.

    Args:
        method: "tsne", "umap" or "pca".

    Raises:
        ValueError: if it is another, or "umap" without umap-learn.

    Example:
        >>> check_method("tsne")
    """
    if method not in get_args(Method):
        raise ValueError(f"the method must be one of {', '.join(get_args(Method))}, got {method!r}")
    if method == "umap":
        _umap()


def _umap() -> Any:
    try:
        from umap import UMAP
    except ImportError as error:
        raise ValueError(f"the method umap needs the package umap-learn ({error}): pip install umap-learn, or take tsne") from error
    return UMAP


def project(features: np.ndarray, method: Method = "tsne", seed: int = 0) -> np.ndarray:
    """Places in a plane, by the cosine similarity of features: they are brought to unit length first.

    "pca" takes the two directions u_1, u_2 of the largest variance, x_i = (u_1 . v_i, u_2 . v_i). "tsne" keeps neighbours together:
    it minimises sum_ij p_ij log(p_ij / q_ij), where p_ij falls with the distance of v_i and v_j like a Gaussian as wide as to hold
    about 30 neighbours, and q_ij ~ 1 / (1 + |x_i - x_j|^2); it starts from PCA, and distances between groups mean little. "umap" minimises
    a cross entropy of neighbourhoods, and needs umap-learn.

    Args:
        features: `(N, D)` float, finite; N at least 1.
        method: "tsne", "umap" or "pca".
        seed: of the method; NumPy's and torch's global random streams are left alone.

    Returns:
        `(N, 2)` float32, the same for the same seed.

    Raises:
        ValueError: if the shape is another, a number is not finite, or the method cannot be used.

    Example:
        >>> project(np.random.randn(100, 16), "pca").shape
        (100, 2)

    Source:
        van der Maaten & Hinton, "Visualizing Data using t-SNE", JMLR 2008; McInnes, Healy & Melville, "UMAP", arXiv:1802.03426.
    """
    check_method(method)
    rows = np.asarray(features, dtype=np.float64)
    if rows.ndim != 2 or 0 in rows.shape:
        raise ValueError(f"features must have shape (samples, dimensions), got {rows.shape}")
    if not np.isfinite(rows).all():
        bad = int((~np.isfinite(rows)).any(axis=1).sum())
        raise ValueError(f"the features of {bad} of {len(rows)} samples are not finite: find out what made them, or drop those")
    rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    if not np.ptp(rows, axis=0).max() > 1e-6:  # a single sample, or features that have collapsed
        return np.zeros((len(rows), 2), dtype=np.float32)
    kept = _principal(rows, _KEPT if method == "tsne" else 2)
    if method == "pca" or len(rows) < 5:  # a handful of samples have no neighbourhoods
        return kept[:, :2].astype(np.float32)
    if method == "umap":
        umap = _umap()(n_neighbors=min(15, len(rows) - 1), metric="cosine", random_state=seed, n_jobs=1)
        return np.asarray(umap.fit_transform(rows), dtype=np.float32)
    from sklearn.manifold import TSNE

    start = (kept[:, :2] / kept[:, 0].std() * 1e-4).astype(np.float32)
    # Of vectors of unit length, the squared distance is twice one minus the cosine.
    tsne = TSNE(perplexity=min(_PERPLEXITY, (len(rows) - 1) / 3), init=start, learning_rate="auto", random_state=seed)
    return np.asarray(tsne.fit_transform(kept.astype(np.float32)), dtype=np.float32)


def _principal(rows: np.ndarray, number: int) -> np.ndarray:
    """The first principal components `(N, number)`; fewer where there are fewer, but at least two, of zeros."""
    from sklearn.decomposition import PCA

    # Both are exact, and by default scikit-learn takes a random one for many samples.
    solver = "covariance_eigh" if rows.shape[1] <= len(rows) else "full"
    found = PCA(min(number, *rows.shape), svd_solver=solver).fit_transform(rows)
    return np.pad(found, ((0, 0), (0, max(0, 2 - found.shape[1]))))


class Neighbours(NamedTuple):
    """Whether samples lie among their own kind.

    Attributes:
        wrong: `(N,)` bool, samples whose nearest neighbour is of another class.
        precision: share of the others; None if nothing can be told.
    """

    wrong: np.ndarray
    precision: float | None


def judge_neighbours(features: Tensor, label: Tensor) -> Neighbours:
    """Compare the class of every sample with that of its nearest neighbour by cosine similarity, itself left out.

    The precision is precision at 1. Samples without a label are no neighbours; they and those without another one of their class
    do not count.

    Args:
        features: `(N, D)` float, finite.
        label: `(N,)` int64 on the same device; -1 where it is unknown.

    Returns:
        Which ones have a wrong neighbour, and the precision.

    Raises:
        ValueError: if a feature is not finite.

    Example:
        >>> judge_neighbours(torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]]), torch.tensor([0, 0, 1, 1])).precision
        1.0
    """
    known = (label >= 0).nonzero().squeeze(1)
    _, place, counts = label[known].unique(return_inverse=True, return_counts=True)
    has_others = counts[place] > 1
    wrong = torch.zeros_like(label, dtype=torch.bool)
    if not has_others.any():
        return Neighbours(wrong.cpu().numpy(), None)
    rows = F.normalize(features[known].float(), dim=1)
    nearest = nearest_neighbours(rows, rows, 2)[1]
    # Of equal rows another one may come before the sample itself.
    own = torch.arange(len(known), device=label.device)
    other = torch.where(nearest[:, 0] == own, nearest[:, 1], nearest[:, 0])
    wrong[known] = (place[other] != place) & has_others
    return Neighbours(wrong.cpu().numpy(), 1 - int(wrong.sum()) / int(has_others.sum()))
