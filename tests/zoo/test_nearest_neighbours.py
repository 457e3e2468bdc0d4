"""Nearest neighbours and what is made of them, against sorting all products, one-hot votes and scikit-learn."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid
from torch import Tensor

from litzoo.zoo.functional import nearest_neighbours as module
from litzoo.zoo.functional.nearest_neighbours import class_means, knn_predict, knn_votes, nearest_class_mean, nearest_neighbours

BOTH = pytest.mark.parametrize("scores", ["fp32", "bf16"])


def features(rows: int, dim: int = 16, seed: int = 0, classes: int = 5, spread: float = 1.0) -> tuple[Tensor, Tensor]:
    """Unit vectors in clusters, and which cluster."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.randn(classes, dim, generator=torch.Generator().manual_seed(99))
    label = torch.randint(classes, (rows,), generator=generator)
    return F.normalize(centre[label] + spread * torch.randn(rows, dim, generator=generator), dim=1), label


def whole_numbers(rows: int, dim: int, high: int, seed: int) -> Tensor:
    """Features whose products are exact, so that many are equal."""
    return torch.randint(-high, high + 1, (rows, dim), generator=torch.Generator().manual_seed(seed)).float()


def naive(query: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Sort all products in float64; numpy's stable sort of the negative ones puts the smaller index first."""
    products = query.double().numpy() @ bank.double().numpy().T + 0.0
    order = np.argsort(-products, axis=1, kind="stable")[:, :k]
    return torch.from_numpy(np.take_along_axis(products, order, 1)), torch.from_numpy(order)


def naive_votes(query: Tensor, bank: Tensor, labels: Tensor, k: int, temperature: float, classes: int) -> Tensor:
    """The votes over one-hot labels, in float64."""
    similarity, index = naive(query, bank, k)
    votes = (F.one_hot(labels[index], classes) * (similarity / temperature).exp()[..., None]).sum(dim=1)
    return votes / votes.sum(dim=1, keepdim=True)


def assert_nearest(query: Tensor, bank: Tensor, k: int, scores) -> None:
    similarity, index = nearest_neighbours(query, bank, k, scores)
    expected, _ = naive(query, bank, k)
    assert (similarity.dtype, index.dtype, similarity.shape) == (torch.float32, torch.long, index.shape)
    torch.testing.assert_close(similarity.double(), expected, rtol=1e-5, atol=1e-5)
    # Where the order differs, the products are equal up to the rounding of float32.
    at = (query.double() @ bank.double().T).gather(1, index)
    torch.testing.assert_close(at, expected, rtol=1e-6, atol=1e-6)
    assert all(len(set(row)) == k for row in index.tolist())


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks of the bank, blocks of queries and pieces of a chunk."""
    monkeypatch.setattr(module, "_CHUNK", 700)
    monkeypatch.setattr(module, "_BLOCK", 700 * 9)
    monkeypatch.setattr(module, "_COLUMNS", 64)


@BOTH
@pytest.mark.parametrize("k", [1, 7, 200, 3000])
@pytest.mark.parametrize("spread", [0.001, 0.1, 1.0, 10.0])
def test_against_sorting(scores, k: int, spread: float) -> None:
    """From classes that have collapsed to points, to hardly any class."""
    assert_nearest(features(40, seed=1, spread=spread)[0], features(3000, spread=spread)[0], k, scores)


@BOTH
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("rows", [699, 700, 701, 1400, 3001])
@pytest.mark.parametrize("queries", [1, 9, 10, 40])
@pytest.mark.parametrize("k", [1, 20, 699])
def test_at_the_bounds_of_blocks(scores, rows: int, queries: int, k: int) -> None:
    assert_nearest(features(queries, seed=1)[0], features(rows)[0], k, scores)


@BOTH
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("seed", range(40))
def test_random_sizes_with_equal_products(scores, seed: int) -> None:
    """Exactly the stable order, many products being equal, in any layout of the bank."""
    draw = np.random.default_rng(seed)
    rows, queries, dim, high = int(draw.integers(1, 2500)), int(draw.integers(1, 30)), int(draw.integers(1, 9)), int(draw.integers(1, 9))
    bank, query = whole_numbers(rows, dim, high, seed), whole_numbers(queries, dim, high, seed + 100)
    if seed % 3 == 1:
        bank = bank[bank[:, 0].argsort()]
    for k in {1, rows, int(draw.integers(1, rows + 1))}:
        similarity, index = nearest_neighbours(query, bank, k, scores)
        expected, order = naive(query, bank, k)
        assert torch.equal(index, order)
        assert torch.equal(similarity.double(), expected)


@BOTH
@pytest.mark.parametrize("rows", [300, 5000])
def test_equal_rows(scores, rows: int) -> None:
    """Of a bank that collapsed to one point the first rows are the nearest, also to a query that is zero."""
    row = features(1)[0]
    query = torch.cat([row, torch.zeros_like(row), -row, features(1, seed=3)[0]])
    index = nearest_neighbours(query, row.expand(rows, -1).contiguous(), 5, scores)[1]
    assert torch.equal(index, torch.arange(5).expand(4, -1))


@BOTH
@pytest.mark.parametrize("layout", ["sorted", "in turns"])
@pytest.mark.parametrize("classes", [4, 10, 640])
def test_layouts_of_the_bank(scores, layout: str, classes: int) -> None:
    bank, label = features(6400, classes=classes, spread=0.3)
    order = label.argsort(stable=True)
    bank = bank[order] if layout == "sorted" else bank[order].view(classes, -1, 16).transpose(0, 1).reshape(6400, 16)
    assert_nearest(features(30, seed=1, classes=classes, spread=0.3)[0], bank, 50, scores)


def test_bound_keeps_the_search_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 20,000 rows little more than k are sorted, however they lie; in bfloat16 those within its rounding besides."""
    sorted_rows = []
    ragged = module._ragged
    monkeypatch.setattr(module, "_ragged", lambda value, *rest: sorted_rows.append(len(value) / 32) or ragged(value, *rest))
    monkeypatch.setattr(module, "_stable_topk", lambda *_: pytest.fail("too many rows reach the bound"))
    bank, label = features(20_000, 128, classes=10)
    for order in (torch.arange(20_000), label.argsort(), label.argsort().view(10, -1).T.flatten()):
        for scores in ("fp32", "bf16"):
            nearest_neighbours(features(32, 128, seed=1, classes=10)[0], bank[order], 100, scores)
    assert max(sorted_rows[::2]) < 150
    assert max(sorted_rows[1::2]) < 300


@pytest.mark.usefixtures("small_blocks")
def test_bfloat16_is_given_up_where_it_is_in_vain(monkeypatch: pytest.MonkeyPatch) -> None:
    """In each chunk of a bank whose classes are points, the first block of queries shows it."""
    tried = []
    products_at = module._products_at
    monkeypatch.setattr(module, "_products_at", lambda *given: tried.append(1) or products_at(*given))
    assert_nearest(features(40, seed=1, spread=1e-3)[0], features(2100, spread=1e-3)[0], 20, "bf16")
    assert len(tried) == 3
    assert_nearest(features(40, seed=1)[0], features(2100)[0], 20, "bf16")
    assert len(tried) == 3 + 3 * 5


@BOTH
def test_memory_is_that_of_a_block(scores, monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor takes more bytes than the scores of a block, however long the bank is."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            sizes = (
                x.numel() * x.element_size()
                for x in tree_leaves(result)
                if isinstance(x, Tensor) and x.layout == torch.strided and x is not bank
            )
            largest = max(largest, *sizes, 0)
            return result

    monkeypatch.setattr(module, "_CHUNK", 1000)
    monkeypatch.setattr(module, "_BLOCK", 20_000)
    bank, query = features(30_000, 8)[0].half(), features(100, 8, seed=1)[0]
    with Watch():
        nearest_neighbours(query, bank, 10, scores)
    assert largest <= 4 * 20_000


@BOTH
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_features_of_any_length(scores, scale: float) -> None:
    bank, query = features(2000)[0], features(20, seed=1)[0]
    length = torch.rand(2000, 1, generator=torch.Generator().manual_seed(0)) + 0.1
    expected = naive(query, bank * length, 30)[1]
    assert torch.equal(nearest_neighbours(query * scale, bank * length * scale, 30, scores)[1], expected)


@BOTH
def test_dtypes_and_contexts(scores) -> None:
    bank, query = features(500)[0], features(20, seed=1)[0]
    expected = nearest_neighbours(query, bank, 9, scores)
    for found in (
        nearest_neighbours(query.double(), bank.double(), 9, scores),
        nearest_neighbours(query.requires_grad_(), bank.T.contiguous().T, 9, scores),
    ):
        assert not found[0].requires_grad
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    for context in (torch.autocast("cpu", torch.bfloat16), torch.inference_mode()):
        with context:
            found = nearest_neighbours(query, bank, 9, scores)
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    for dtype in (torch.float16, torch.bfloat16):
        assert_nearest(query.detach().to(dtype), bank.to(dtype), 9, scores)
    empty = nearest_neighbours(query[:0], bank, 9, scores)
    assert [tuple(x.shape) for x in empty] == [(0, 9), (0, 9)]


@BOTH
@pytest.mark.parametrize("temperature", [0.07, 1.0])
@pytest.mark.parametrize("k", [1, 20, 400])
def test_votes_against_one_hot(scores, temperature: float, k: int) -> None:
    (bank, labels), query = features(400), features(60, seed=1)[0]
    votes = knn_votes(query, bank, labels, k, temperature, 7, scores)
    expected = naive_votes(query, bank, labels, k, temperature, 7)
    torch.testing.assert_close(votes.double(), expected, rtol=1e-4, atol=1e-6)
    assert votes[:, 5:].eq(0).all()  # classes that the bank does not have
    assert torch.equal(knn_predict(query, bank, labels, k, temperature, 7, scores), expected.argmax(1))


@BOTH
@pytest.mark.parametrize("k", [1, 15])
def test_votes_against_scikit_learn(scores, k: int) -> None:
    (bank, labels), query = features(300), features(50, seed=1)[0]
    reference = KNeighborsClassifier(k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.1))
    reference.fit(bank.double().numpy(), labels.numpy())
    votes = knn_votes(query, bank, labels, k, 0.1, 5, scores)
    np.testing.assert_allclose(votes.numpy(), reference.predict_proba(query.double().numpy()), rtol=1e-4, atol=1e-6)
    assert knn_predict(query, bank, labels, k, 0.1, 5, scores).tolist() == reference.predict(query.double().numpy()).tolist()


def test_smallest_class_wins_a_tie() -> None:
    bank, query = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0]])
    assert knn_predict(query, bank, torch.tensor([2, 1, 0]), 2, 0.1, 3).tolist() == [1]


def test_no_temperature_overflows() -> None:
    (bank, labels), query = features(300), features(50, seed=1)[0]
    votes = knn_votes(100 * query, bank, labels, 20, 1e-4, 5)
    torch.testing.assert_close(votes.sum(dim=1), torch.ones(50))
    assert torch.equal(votes.argmax(1), labels[nearest_neighbours(query, bank, 1)[1][:, 0]])
    torch.testing.assert_close(knn_votes(query, bank, labels, 300, 1e6, 5)[0], labels.bincount() / 300, rtol=1e-4, atol=0)


def test_rows_without_label_do_not_vote() -> None:
    (bank, labels), query = features(300), features(50, seed=1)[0]
    known = torch.arange(300) % 3 > 0
    votes = knn_votes(query, bank, labels.where(known, -1), 20, 0.1, 5)
    assert torch.equal(votes, knn_votes(query, bank[known], labels[known], 20, 0.1, 5))
    with pytest.raises(ValueError, match=r"k must lie in \[1, 200\]"):
        knn_votes(query, bank, labels.where(known, -1), 201, 0.1, 5)


def test_class_means_against_scikit_learn() -> None:
    (bank, labels), query = features(300), features(50, seed=1)[0]
    labels = torch.where(labels == 2, -1, labels)  # neither means nor predictions for class 2
    means = class_means(bank, labels, 6)
    for c in range(6):
        rows = bank[labels == c].double()
        expected = F.normalize(rows.mean(0), dim=0) if len(rows) else torch.zeros(16).double()
        torch.testing.assert_close(means[c].double(), expected, rtol=1e-5, atol=1e-6)
    cosine = nearest_class_mean(3 * query, means)
    assert torch.equal(cosine.isinf().any(0), torch.tensor([False, False, True, False, False, True]))
    reference = NearestCentroid().fit(means[[0, 1, 3, 4]].numpy(), [0, 1, 3, 4])
    assert cosine.argmax(1).tolist() == reference.predict(query.numpy()).tolist()


BANK = torch.eye(4)
LABELS = torch.arange(4)


@pytest.mark.parametrize(
    ("query", "bank", "k", "message"),
    [
        (BANK, BANK, 5, r"k must lie in \[1, 4\], the rows of the bank; got 5: take a smaller k or a larger bank"),
        (BANK, BANK, 0, r"k must lie in \[1, 4\]"),
        (BANK, BANK[:0], 1, r"k must lie in \[1, 0\]"),
        (BANK[:, :3], BANK, 1, r"same D; got \(4, 3\) and \(4, 4\)"),
        (BANK[0], BANK, 1, r"query must be \(Q, D\)"),
        (BANK, BANK.long(), 1, r"bank must be of a floating-point dtype, got torch.int64: use bank.float\(\)"),
        (BANK, BANK.to("meta"), 1, r"query is on cpu and bank on meta: move one"),
        (BANK, BANK.index_fill(0, torch.tensor([1, 2]), torch.nan), 1, r"bank holds numbers that are not finite, in 2 of 4 rows"),
        (BANK.index_fill(0, torch.tensor(1), torch.inf), BANK, 1, r"query holds numbers that are not finite, in 1 of 4 rows"),
    ],
)
def test_mistakes_with_features(query: Tensor, bank: Tensor, k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        nearest_neighbours(query, bank, k)


@pytest.mark.parametrize(
    ("labels", "classes", "message"),
    [
        (LABELS, 3, r"labels must lie in \[0, 3\), num_classes being 3, or be -1 for none; got 3"),
        (LABELS - 2, 4, r"got -2"),
        (LABELS[:3], 4, r"got \(4, 4\) and \(3,\)"),
        (LABELS.float(), 4, r"labels must be int64 on cpu, .* got torch.float32"),
        (LABELS.to("meta"), 4, r"on meta: use labels.to"),
    ],
)
def test_mistakes_with_labels(labels: Tensor, classes: int, message: str) -> None:
    for call in (lambda: knn_votes(BANK, BANK, labels, 1, 0.1, classes), lambda: class_means(BANK, labels, classes)):
        with pytest.raises(ValueError, match=message):
            call()


def test_other_mistakes() -> None:
    with pytest.raises(ValueError, match="scores must be one of fp32, bf16; got 'fp16'"):
        nearest_neighbours(BANK, BANK, 1, "fp16")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="temperature must be above 0, got 0"):
        knn_votes(BANK, BANK, LABELS, 1, 0, 4)
    with pytest.raises(ValueError, match="features holds numbers that are not finite"):
        class_means(BANK * torch.nan, LABELS, 4)


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch before 2.9 does not tell")
def test_products_are_not_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever precision the training allows its products of float32; afterwards it is the same again."""

    def set_by_backend() -> None:
        torch.backends.cuda.matmul.fp32_precision = "tf32"

    def precisions() -> list[str]:
        return [part.fp32_precision for part in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)]

    seen, multiply = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda *args, **kwargs: (seen.extend(precisions()), multiply(*args, **kwargs))[1])
    ways = [partial(torch.set_float32_matmul_precision, name) for name in ("high", "medium")]
    for allow in (*ways, set_by_backend):
        try:
            allow()
            before = precisions()
            nearest_neighbours(torch.eye(3), torch.eye(3), 1)
            assert precisions() == before
            assert before[0] == "tf32"
        finally:
            torch.set_float32_matmul_precision("highest")
    assert set(seen) == {"ieee"}


def test_finite_numbers_are_taken_though_their_sum_overflows() -> None:
    similarity, index = nearest_neighbours(BANK, torch.full((100, 4), 1e38), 2)
    assert torch.equal(similarity, torch.full((4, 2), 1e38))
    assert torch.equal(index, torch.tensor([[0, 1]]).expand(4, 2))
