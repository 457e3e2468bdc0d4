"""From many dimensions to the two of a picture."""

from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
import torch.nn.functional as F

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
    kept = _principal(rows, _KEPT if method == "tsne" else 2, seed)
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


def _principal(rows: np.ndarray, number: int, seed: int) -> np.ndarray:
    """The first principal components `(N, number)`; fewer where there are fewer, but at least two, of zeros."""
    from sklearn.decomposition import PCA

    found = PCA(min(number, *rows.shape), random_state=seed).fit_transform(rows)
    return np.pad(found, ((0, 0), (0, max(0, 2 - found.shape[1]))))


class Neighbours(NamedTuple):
    """Whether samples lie among their own kind.

    Attributes:
        wrong: `(N,)` bool, samples whose nearest neighbour is of another class.
        precision: share of the others; None if nothing can be told.
    """

    wrong: np.ndarray
    precision: float | None


def judge_neighbours(features: np.ndarray, label: np.ndarray) -> Neighbours:
    """Compare the class of every sample with that of its nearest neighbour by cosine similarity, itself left out.

    The precision is precision at 1. Samples without a label are no neighbours; they and those without another one of their class
    do not count.

    Args:
        features: `(N, D)` float, finite.
        label: `(N,)` int; -1 where it is unknown.

    Returns:
        Which ones have a wrong neighbour, and the precision.

    Raises:
        ValueError: if a feature is not finite.

    Example:
        >>> judge_neighbours(np.array([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]]), np.array([0, 0, 1, 1])).precision
        1.0
    """
    wrong = np.zeros(len(label), dtype=bool)
    known = np.flatnonzero(label >= 0)
    classes, place = np.unique(label[known], return_inverse=True)
    counts = np.bincount(place, minlength=len(classes))[place] > 1
    if not counts.any():
        return Neighbours(wrong, None)
    rows = F.normalize(torch.from_numpy(np.asarray(features[known], dtype=np.float32)), dim=1)
    nearest = nearest_neighbours(rows, rows, 2)[1].numpy()
    # Of equal rows another one may come before the sample itself.
    other = np.where(nearest[:, 0] == np.arange(len(known)), nearest[:, 1], nearest[:, 0])
    differs = (place[other] != place) & counts
    wrong[known] = differs
    return Neighbours(wrong, 1 - float(differs.sum()) / float(counts.sum()))


def stratified_subset(label: np.ndarray, number: int, seed: int = 0) -> np.ndarray:
    """Samples drawn at random, of each class its share, rounded up or down.

    Args:
        label: `(N,)` int; -1, for no label, counts as a class.
        number: samples to draw, at least 1.
        seed: of the draw.

    Returns:
        Positions, ascending: `number` of them, or all where there are no more.

    Raises:
        ValueError: if `number` is below 1.

    Example:
        >>> stratified_subset(np.array([0, 0, 0, 0, 1, 1]), 3).shape
        (3,)
    """
    if number < 1:
        raise ValueError(f"a subset must have at least 1 sample, got {number}")
    if len(label) <= number:
        return np.arange(len(label))
    order = np.lexsort((np.random.default_rng(seed).random(len(label)), label))
    # Of the samples sorted by class, evenly spaced ones.
    return np.sort(order[((np.arange(number) + 0.5) * len(label) / number).astype(int)])
