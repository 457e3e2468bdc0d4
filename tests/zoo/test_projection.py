"""Maps of features against scikit-learn and numpy."""

import sys
import types
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.manifold import trustworthiness
from sklearn.metrics.pairwise import cosine_similarity
from sklearn.preprocessing import normalize

from litzoo.zoo.functional.retrieval import retrieval_metrics
from litzoo.zoo.plots.projection import check_method, judge_neighbours, project

DRAW = np.random.RandomState(0)


@pytest.mark.parametrize("shape", [(40, 7), (7, 40), (600, 80)])
def test_pca(shape: tuple[int, int]) -> None:
    features = DRAW.randn(*shape) * np.linspace(3, 1, shape[1])
    found = project(features, "pca")
    rows = normalize(features)
    assert found == pytest.approx(PCA(2, svd_solver="full").fit_transform(rows), abs=1e-4)
    left, values, _ = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
    assert np.abs(found) == pytest.approx(np.abs(left[:, :2] * values[:2]), abs=1e-4), "up to the signs, which numpy chooses in another way"
    assert project(17 * features, "pca") == pytest.approx(found, abs=1e-5), "the length of a feature does not matter"


def test_tsne_keeps_neighbours_and_repeats() -> None:
    features, label = load_digits(return_X_y=True)
    features, label = features[:300], label[:300]
    before = np.random.get_state()[1].copy()
    found = project(features, "tsne", seed=3)
    assert np.array_equal(before, np.random.get_state()[1])
    assert np.array_equal(found, project(features, "tsne", seed=3))
    assert trustworthiness(features, found, n_neighbors=5, metric="cosine") > 0.95
    nearest = ((found[:, None] - found) ** 2).sum(-1) + np.diag(np.full(300, np.inf))
    assert (label[nearest.argmin(1)] == label).mean() > 0.9


@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_odd_sizes(method: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for shape in ((1, 1), (1, 4), (2, 1), (3, 8), (4, 2), (5, 1), (6, 64)):
            found = project(DRAW.randn(*shape), method)
            assert found.shape == (shape[0], 2)
            assert np.isfinite(found).all()
        for collapsed in (np.ones((30, 4)), np.zeros((30, 4)), np.arange(1, 31)[:, None] * np.ones(4)):
            assert (project(collapsed, method) == 0).all()
        assert np.isfinite(project(np.repeat(DRAW.randn(2, 4), 20, 0), method)).all()


def test_umap_is_handed_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {}

    class UMAP:
        def __init__(self, **given: Any) -> None:
            settings.update(given)

        def fit_transform(self, rows: np.ndarray) -> np.ndarray:
            return rows[:, :2]

    monkeypatch.setitem(sys.modules, "umap", types.SimpleNamespace(UMAP=UMAP))
    features = DRAW.randn(8, 4)
    assert project(features, "umap", seed=5) == pytest.approx(normalize(features)[:, :2])
    assert settings == {"n_neighbors": 7, "metric": "cosine", "random_state": 5, "n_jobs": 1}


def test_mistakes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(ValueError, match=r"needs the package umap-learn .*: pip install umap-learn, or take tsne"):
        check_method("umap")
    with pytest.raises(ValueError, match="one of tsne, umap, pca, got 'lda'"):
        project(np.ones((3, 2)), "lda")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="2 of 3 samples are not finite"):
        project(np.array([[1.0], [np.nan], [np.inf]]))
    for shape in ((3,), (0, 4), (4, 0)):
        with pytest.raises(ValueError, match="shape"):
            project(np.ones(shape))


def test_nearest_neighbours_against_all_pairs() -> None:
    label = DRAW.randint(-1, 4, 60)
    label[:2] = 9, 8  # alone in their classes
    features = DRAW.randn(60, 5) + 2 * np.eye(5)[label.clip(0, 4)]
    features[20] = features[30] = features[40]  # equal rows
    found = judge_neighbours(torch.from_numpy(features), torch.from_numpy(label))
    similarity = cosine_similarity(features.astype(np.float32))
    wrong = []
    for row in range(60):
        others = [other for other in range(60) if other != row and label[other] >= 0]
        best = max(others, key=lambda other: similarity[row, other])
        wrong.append(label[row] >= 0 and (label == label[row]).sum() > 1 and label[best] != label[row])
    differ = [row for row in np.flatnonzero(found.wrong != np.array(wrong)) if row not in (20, 30, 40)]
    assert differ == []
    known = torch.from_numpy(label) >= 0
    precision = retrieval_metrics(torch.from_numpy(features)[known], torch.from_numpy(label)[known]).precision_at_1
    assert found.precision == pytest.approx(float(precision), abs=0.05)


def test_nothing_to_compare() -> None:
    for label in ([-1, -1, -1], [0, 1, -1], []):
        found = judge_neighbours(torch.randn(len(label), 2), torch.tensor(label, dtype=torch.long))
        assert found.precision is None
        assert not found.wrong.any()
