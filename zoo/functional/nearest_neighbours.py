"""Nearest neighbours by inner product, exact and fast, and classifiers made of them."""

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Scores = Literal["fp32", "bf16"]

_CHUNK = 65_536  # rows of the bank at a time
_BLOCK = 2**24  # scores of a block of queries with a chunk of the bank, which bounds the memory
_COLUMNS = 640  # columns of scores at a time, at least, that are compared while they are in the cache


@torch.no_grad()
def nearest_neighbours(query: Tensor, bank: Tensor, k: int, scores: Scores = "fp32") -> tuple[Tensor, Tensor]:
    """The k rows of the bank with the largest inner product with each query, s_ij = q_i . b_j.

    The features are taken as they are: normalise both for cosine similarity. Exact: equal to a stable descending sort of all
    products in float32, whatever `torch.set_float32_matmul_precision` allows elsewhere, so that of equal rows the first counts as the nearest. Memory does not grow with the bank.

    A lower bound of the k-th largest product is the k-th largest of the maxima over groups of columns; only the few products that
    reach it are sorted. With "bf16" the products are computed in bfloat16 and the bound is lowered by the rounding error that they
    can have at most; what reaches it is computed again in float32. So "bf16" finds the same neighbours, and is the faster one where
    the processor multiplies bfloat16 faster. Where too many products lie within the rounding error, as in
    classes that are almost points, float32 is used instead.

    Args:
        query: `(Q, D)` float; computed in float32 whatever it is, also under autocast. There is no gradient.
        bank: `(N, D)` float, finite like the queries.
        k: in [1, N].
        scores: "fp32", or "bf16" on a CPU or with CUDA.

    Returns:
        Similarity `(Q, k)` float32, descending, and index `(Q, k)` int64.

    Raises:
        ValueError: if shapes or devices do not agree, something is not finite or not a float, there are fewer than k rows, or `scores`
            is another.

    Example:
        >>> nearest_neighbours(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0], [0.8, 0.6], [0.6, 0.8]]), k=2)
        (tensor([[0.8000, 0.6000]]), tensor([[1, 2]]))
    """
    _check_features(query, bank)
    if not 1 <= k <= len(bank):
        raise ValueError(f"k must lie in [1, {len(bank)}], the rows of the bank; got {k}: take a smaller k or a larger bank")
    if scores not in get_args(Scores):
        raise ValueError(f"scores must be one of {', '.join(get_args(Scores))}; got {scores!r}")
    query = query.float()
    similarity = query.new_full((len(query), k), -torch.inf)
    index = torch.zeros(similarity.shape, dtype=torch.long, device=query.device)
    width = min(_CHUNK, len(bank))
    height = min(max(1, _BLOCK // max(width, 4 * k)), len(query))
    # One buffer for all blocks, because fresh memory of this size is dear.
    buffer = query.new_empty(height * width)
    with torch.autocast(query.device.type, enabled=False), _full_precision():
        for start in range(0, len(bank), width):
            rows = bank[start : start + width].float()
            search = _Rounded(rows, k, buffer) if scores == "bf16" else _Plain(rows, k, buffer)
            for value, place, part in zip(*(x.split(height) for x in (similarity, index, query)), strict=True):
                if len(part) == 0:
                    continue
                best, row = search(part, value[:, -1])
                if start > 0:  # those found before come first, so that a stable sort prefers the smaller index
                    best, row = _largest(torch.cat([value, best], dim=1), torch.cat([place, row + start], dim=1), k)
                value.copy_(best)
                place.copy_(row)
    return similarity, index


@contextmanager
def _full_precision() -> Iterator[None]:
    """Inside, products of float32 are not rounded to TF32 or bfloat16."""
    with ExitStack() as after:
        try:
            after.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            torch.set_float32_matmul_precision("highest")
        except RuntimeError:  # it was set by backend, which torch since 2.9 does not let one ask for as a whole
            for part in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):  # type: ignore[attr-defined]  # torch makes the module when it is asked for
                after.callback(setattr, part, "fp32_precision", part.fp32_precision)
                part.fp32_precision = "ieee"
        yield


class _Plain:
    """The search in one chunk of the bank, by products in float32.

    Args:
        bank: `(N, D)` float32.
        k: neighbours to find.
        buffer: room for the scores of all queries of a call, float32.
    """

    def __init__(self, bank: Tensor, k: int, buffer: Tensor) -> None:
        self.bank, self.k, self.buffer = bank, k, buffer

    def __call__(self, query: Tensor, least: Tensor) -> tuple[Tensor, Tensor]:
        """Similarity and index, `(B, k)`, of the k best that reach `least` `(B,)`; where there are fewer, -inf."""
        scores = _room(self.buffer, query, self.bank)
        least = torch.maximum(least, _kth_maximum(query, self.bank, scores, scores, self.k))
        place, count, crowded = _reaching(scores, least, self.k)
        found = _ragged(scores.view(-1).index_select(0, place), place % len(self.bank), count, self.k)
        if crowded is not None:
            found[0][crowded], found[1][crowded] = _stable_topk(scores[crowded], self.k)
        return found


class _Rounded:
    """The search in one chunk of the bank, by products in bfloat16 that find the candidates; arguments as for `_Plain`."""

    def __init__(self, bank: Tensor, k: int, buffer: Tensor) -> None:
        self.bank, self.k, self.buffer = bank, k, buffer.view(torch.bfloat16)
        self.plain, self.in_vain = _Plain(bank, k, buffer), False
        self.rounded = bank.bfloat16()
        self.norm = bank.norm(dim=1).amax()
        # Besides the rounding of the rows, that of D sums in float32, here and where the products are computed again.
        self.error = (bank - self.rounded.float()).norm(dim=1).amax() + 2**-23 * bank.shape[1] * self.norm

    def __call__(self, query: Tensor, least: Tensor) -> tuple[Tensor, Tensor]:
        """As that of `_Plain`."""
        if self.in_vain:
            return self.plain(query, least)
        rounded = query.bfloat16()
        scores = _room(self.buffer, query, self.bank)
        # Positive bfloat16 numbers are in the order of their bits, and integers of 16 bits are compared much faster on a CPU.
        bits = scores.view(torch.int16)
        bound = _kth_maximum(rounded, self.rounded, scores, bits, self.k).view(torch.bfloat16).float()
        # |q.b - q'.b'| <= |q - q'| |b| + |q'| |b - b'|, and 1 % for the norms; a product itself is rounded by half a unit at most.
        error = 1.01 * ((query - rounded).norm(dim=1) * self.norm + rounded.norm(dim=1) * self.error)
        bound = torch.maximum(least - error, bound - 2**-8 * bound.abs() - 2 * error).bfloat16()
        place, count, crowded = _reaching(bits, bound.view(torch.int16), self.k, bound <= 0)
        column = place % len(self.bank)
        found = _ragged(_products_at(query, self.bank, column, count), column, count, self.k)
        if crowded is not None:
            found[0][crowded], found[1][crowded] = self.plain(query[crowded], least[crowded])
            self.in_vain = bool(crowded.float().mean() > 0.5)  # the next queries will hardly do better
        return found


def _room(buffer: Tensor, query: Tensor, bank: Tensor) -> Tensor:
    """The beginning of the buffer as a matrix of all products."""
    return buffer[: len(query) * len(bank)].view(len(query), len(bank))


def _kth_maximum(query: Tensor, bank: Tensor, scores: Tensor, sortable: Tensor, k: int) -> Tensor:
    """Fill `scores` with all products, and return a lower bound of the k-th largest of each row, `(B,)`.

    The maxima run over pieces of the bank, each a column further than the one before: so neighbours that lie together, as in a bank
    that is sorted by class, or at equal distances, as where the classes take turns, fall into different groups.

    Args:
        query: `(B, D)`.
        bank: `(N, D)`.
        scores: `(B, N)`, to be filled.
        sortable: the memory of `scores`, perhaps as another dtype whose order counts.
        k: of the k-th largest.
    """
    lowest = -torch.inf if sortable.dtype.is_floating_point else torch.iinfo(sortable.dtype).min
    columns = max(_COLUMNS, -(-3 * k // 32) * 32)  # few groups would be a loose bound, and products of multiples of 32 are faster
    pieces = -(-len(bank) // columns)
    highest = sortable.new_full((len(query), min(columns, len(bank)) + pieces - 1), lowest)
    for piece in range(pieces):
        part = slice(piece * columns, (piece + 1) * columns)
        torch.mm(query, bank[part].T, out=scores[:, part])
        group = highest[:, piece : piece + scores[:, part].shape[1]]
        torch.maximum(group, sortable[:, part], out=group)
    if highest.shape[1] < k:
        return highest.new_full((len(query),), lowest)
    return highest.topk(k, dim=1, sorted=False).values.amin(dim=1)


def _reaching(scores: Tensor, least: Tensor, k: int, crowded: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Where scores reach the least of their row.

    Args:
        scores: `(B, N)`.
        least: `(B,)`.
        k: neighbours to find.
        crowded: `(B,)` bool, rows that are crowded whatever reaches the least.

    Returns:
        The flat places in ascending order, how many there are in each row, `(B,)`, and which rows were left out because sorting so
        many would take longer than another way, or None where there are none.
    """
    rows, columns = scores.shape
    if scores.device.type == "cpu":  # where numpy is several times faster
        place = torch.from_numpy(np.flatnonzero(scores.numpy() >= least[:, None].numpy()))
    else:
        place = (scores >= least[:, None]).flatten().nonzero().squeeze(1)
    count = torch.searchsorted(place, torch.arange(rows + 1, device=place.device) * columns).diff()
    many = count > max(columns // 16, 2 * k)
    crowded = many if crowded is None else crowded | many
    if not crowded.any():
        return place, count, None
    return place[~crowded.repeat_interleave(count)], count.masked_fill(crowded, 0), crowded


def _products_at(query: Tensor, bank: Tensor, column: Tensor, count: Tensor) -> Tensor:
    """The products at some columns of each row, one row after the other."""
    start = F.pad(count.cumsum(0), (1, 0))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")
        where = torch.sparse_csr_tensor(start, column, query.new_zeros(len(column)), (len(query), len(bank)), check_invariants=False)
    return torch.sparse.sampled_addmm(where, query, bank.T, beta=0.0).values()


def _ragged(value: Tensor, column: Tensor, count: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Sort rows of different lengths, `count` `(B,)`, that follow one another: their k largest and the columns; -inf behind them."""
    length = torch.arange(max(int(count.max()), k), device=count.device)
    filled = length < count[:, None]
    values = value.new_full(filled.shape, -torch.inf).masked_scatter_(filled, value)
    return _largest(values, column.new_zeros(filled.shape).masked_scatter_(filled, column), k)


def _largest(value: Tensor, index: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row in descending order, of equal ones the first, and their indices."""
    value, order = value.sort(dim=1, descending=True, stable=True)
    return value[:, :k], index.gather(1, order[:, :k])


def _stable_topk(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row, of equal ones the first, without sorting the rows: `topk` of a score and its place in one number."""
    bits = (scores + 0.0).view(torch.int32)  # -0 becomes 0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers in the order of the numbers
    back = torch.arange(scores.shape[1] - 1, -1, -1, device=scores.device)
    index = ((ordered.long() << 32) | back).topk(k, dim=1).indices
    return scores.gather(1, index), index


def knn_votes(query: Tensor, bank: Tensor, labels: Tensor, k: int, temperature: float, num_classes: int, scores: Scores = "fp32") -> Tensor:
    """Probabilities of the classes by a weighted vote of the k nearest neighbours.

    p_c = sum_{j in kNN, y_j = c} exp(s_j / T) / sum_{j in kNN} exp(s_j / T), s being the inner product: normalise the features.
    The largest similarity of a query is subtracted first, so that no temperature overflows.

    Args:
        query: `(Q, D)` float.
        bank: `(N, D)` float.
        labels: `(N,)` int64 in [0, C); rows labelled -1 have no label and are left out of the bank.
        k: neighbours that vote, at most the labelled rows.
        temperature: T above 0.
        num_classes: C.
        scores: as for `nearest_neighbours`.

    Returns:
        `(Q, C)` float32; rows sum to 1.

    Raises:
        ValueError: as for `nearest_neighbours`, for labels that do not fit, or if the temperature is not above 0.

    Example:
        >>> bank = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
        >>> knn_votes(torch.tensor([[1.0, 0.0]]), bank, torch.tensor([0, 1, 1]), k=2, temperature=0.1, num_classes=2)
        tensor([[0.8808, 0.1192]])

    Source:
        Wu, Xiong, Yu & Lin, "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", CVPR 2018, section 3.4.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    bank, labels = labelled_rows(bank, labels, num_classes)
    similarity, index = nearest_neighbours(query, bank, k, scores)
    weight = ((similarity - similarity[:, :1]) / temperature).exp_()
    votes = weight.new_zeros(len(query), num_classes).scatter_add_(1, labels[index], weight)
    return votes / votes.sum(dim=1, keepdim=True)


def knn_predict(
    query: Tensor, bank: Tensor, labels: Tensor, k: int, temperature: float, num_classes: int, scores: Scores = "fp32"
) -> Tensor:
    """The class with the most votes of `knn_votes`; of equal ones the smallest.

    Args:
        query: `(Q, D)` float.
        bank: `(N, D)` float.
        labels: `(N,)` int64 in [0, C), or -1.
        k: neighbours that vote.
        temperature: T above 0.
        num_classes: C.
        scores: as for `nearest_neighbours`.

    Returns:
        `(Q,)` int64.

    Raises:
        ValueError: as for `knn_votes`.

    Example:
        >>> bank = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
        >>> knn_predict(torch.tensor([[1.0, 0.0]]), bank, torch.tensor([0, 1, 1]), k=2, temperature=0.1, num_classes=2)
        tensor([0])
    """
    return knn_votes(query, bank, labels, k, temperature, num_classes, scores).argmax(dim=1)


def class_means(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """The mean of the features of each class, scaled to length 1.

    Args:
        features: `(N, D)` float; normalise them if each is to weigh the same.
        labels: `(N,)` int64 in [0, C); rows labelled -1 have no label and do not count.
        num_classes: C.

    Returns:
        `(C, D)` float32; zeros for a class without rows.

    Raises:
        ValueError: for labels that do not fit, or features that are not finite.

    Example:
        >>> class_means(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0]]), torch.tensor([1, 2, 2]), 3)
        tensor([[0., 0.],
                [1., 0.],
                [0., 1.]])
    """
    features, labels = labelled_rows(features, labels, num_classes)
    total = features.new_zeros(num_classes, features.shape[1], dtype=torch.float32).index_add_(0, labels, features.float())
    return F.normalize(total, dim=1)


def nearest_class_mean(query: Tensor, means: Tensor) -> Tensor:
    """Cosine similarity of each query with the mean of each class; the largest is the prediction.

    Args:
        query: `(Q, D)` float, of any length.
        means: `(C, D)` float, as `class_means` gives them.

    Returns:
        `(Q, C)` float32; -inf for a class whose mean is zero, so that it is never predicted.

    Raises:
        ValueError: if shapes or devices do not agree, or something is not finite or not a float.

    Example:
        >>> nearest_class_mean(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
        tensor([[0.6000,   -inf]])
    """
    _check_features(query, means, "means")
    with torch.autocast(query.device.type, enabled=False), _full_precision():
        cosine = F.normalize(query.float(), dim=1) @ F.normalize(means.float(), dim=1).T
    return cosine.masked_fill(~means.any(dim=1), -torch.inf)


def labelled_rows(features: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """The rows with a label, and their labels, after checking that all fit together.

    Args:
        features: `(N, D)` float.
        labels: `(N,)` int64 in [0, C), or -1 where there is no label.
        num_classes: C.

    Returns:
        Features and labels; the tensors themselves where every row has a label.

    Raises:
        ValueError: if shapes or devices do not agree, a label is another, or features are not finite or not floats.

    Example:
        >>> labelled_rows(torch.tensor([[1.0], [2.0]]), torch.tensor([-1, 0]), num_classes=1)
        (tensor([[2.]]), tensor([0]))
    """
    if features.ndim != 2 or labels.shape != features.shape[:1]:
        raise ValueError(
            f"features must be (N, D) and labels (N,), one for each row; got {tuple(features.shape)} and {tuple(labels.shape)}"
        )
    if labels.dtype != torch.long or labels.device != features.device:
        raise ValueError(
            f"labels must be int64 on {features.device}, where the features are; got {labels.dtype} on {labels.device}: use labels.to(...)"
        )
    _check_finite("features", features)
    if len(labels) == 0:
        return features, labels
    low, high = (int(x) for x in labels.aminmax())
    if low < -1 or high >= num_classes:
        wrong = high if high >= num_classes else low
        raise ValueError(f"labels must lie in [0, {num_classes}), num_classes being {num_classes}, or be -1 for none; got {wrong}")
    if low >= 0:
        return features, labels
    known = labels >= 0
    return features[known], labels[known]


def _check_features(query: Tensor, bank: Tensor, name: str = "bank") -> None:
    """Refuse what cannot be compared."""
    if query.ndim != 2 or bank.ndim != 2 or query.shape[1] != bank.shape[1]:
        raise ValueError(f"query must be (Q, D) and {name} (N, D) with the same D; got {tuple(query.shape)} and {tuple(bank.shape)}")
    if query.device != bank.device:
        raise ValueError(f"query is on {query.device} and {name} on {bank.device}: move one with .to(...)")
    _check_finite("query", query)
    _check_finite(name, bank)


def _check_finite(name: str, features: Tensor) -> None:
    """Refuse numbers that cannot be features."""
    if not features.is_floating_point():
        raise ValueError(f"{name} must be of a floating-point dtype, got {features.dtype}: use {name}.float()")
    # The sum first, because it is one pass; it may overflow where every number is finite.
    if not features.sum(dtype=torch.float32).isfinite() and not features.isfinite().all():
        bad = int((~features.isfinite()).any(dim=1).sum())
        raise ValueError(
            f"{name} holds numbers that are not finite, in {bad} of {len(features)} rows: find out what made them, or drop those"
        )
