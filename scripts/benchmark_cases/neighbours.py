"""Nearest neighbours: the weighted vote that evaluates self-supervised features."""

from functools import partial
from pathlib import Path
from typing import Any

from benchmark_cases import Benchmark, Run

TEMPERATURE = 0.1


def clusters(queries: int, rows: int, classes: int = 10, dim: int = 128) -> tuple[Any, Any, Any]:
    """Unit features in overlapping Gaussian clusters, one a class: queries `(Q, dim)`, bank `(N, dim)` and the labels of the bank."""
    import torch
    import torch.nn.functional as F

    generator = torch.Generator().manual_seed(0)
    centre = 0.15 * torch.randn(classes, dim, generator=generator)
    label = torch.randint(classes, (queries + rows,), generator=generator)
    feature = F.normalize(centre[label] + torch.randn(queries + rows, dim, generator=generator), dim=1)
    return feature[:queries], feature[queries:], label[queries:]


# knn: every case returns the predicted classes, `(Q,)`.


def knn_litzoo(scores: Any, folder: Path, queries: int = 2_000, rows: int = 50_000, k: int = 200) -> Run:
    """All queries at once; the blocks are litzoo's affair."""
    from litzoo.zoo.functional.nearest_neighbours import knn_predict

    query, bank, label = clusters(queries, rows)
    return lambda: knn_predict(query, bank, label, k, TEMPERATURE, 10, scores)


def knn_lightly(folder: Path, queries: int = 2_000, rows: int = 50_000, k: int = 200, batch_size: int = 256) -> Run:
    """lightly's function on batches, with the bank transposed as its callers keep it."""
    import torch
    from lightly.utils.benchmarking.knn import knn_predict

    query, bank, label = clusters(queries, rows)
    columns = bank.T.contiguous()
    return lambda: torch.cat([knn_predict(part, columns, label, 10, k, TEMPERATURE)[:, 0] for part in query.split(batch_size)])


def knn_one_hot(folder: Path, queries: int = 2_000, rows: int = 50_000, k: int = 200, batch_size: int = 100) -> Run:
    """The loop with which the authors of instance discrimination evaluate, written anew: votes over one-hot labels, all classes sorted."""
    import torch

    query, bank, label = clusters(queries, rows)
    columns = bank.T.contiguous()

    def predict(part: Any) -> Any:
        similarity, index = (part @ columns).topk(k, dim=1)
        one_hot = torch.zeros(len(part) * k, 10).scatter_(1, label[index].view(-1, 1), 1.0).view(len(part), k, 10)
        votes = (one_hot * (similarity / TEMPERATURE).exp().unsqueeze(2)).sum(dim=1)
        return votes.sort(dim=1, descending=True).indices[:, 0]

    return lambda: torch.cat([predict(part) for part in query.split(batch_size)])


def knn_faiss(folder: Path, queries: int = 2_000, rows: int = 50_000, k: int = 200) -> Run:
    """faiss' exact index on all queries at once, which suits it best, and the same vote."""
    import faiss
    import torch

    faiss.omp_set_num_threads(torch.get_num_threads())
    query, bank, label = clusters(queries, rows)
    index = faiss.IndexFlatIP(bank.shape[1])
    index.add(bank.numpy())

    def predict() -> Any:
        similarity, place = (torch.from_numpy(found) for found in index.search(query.numpy(), k))
        return torch.zeros(queries, 10).scatter_add_(1, label[place], (similarity / TEMPERATURE).exp_()).argmax(dim=1)

    return predict


BENCHMARKS: dict[str, Benchmark] = {
    "knn": Benchmark(
        summary="classes of 2,000 queries by the vote of the 200 nearest of 50,000 rows of 128 numbers, temperature 0.1",
        cases={
            "litzoo, fp32": partial(knn_litzoo, "fp32"),
            "litzoo, bf16": partial(knn_litzoo, "bf16"),
            "lightly, knn_predict": knn_lightly,
            "one-hot votes by 100": knn_one_hot,
            "faiss, IndexFlatIP and vote": knn_faiss,
        },
        items=2_000,
        unit="queries",
        rounds=5,
        packages={"lightly, knn_predict": "lightly", "faiss, IndexFlatIP and vote": "faiss"},
    ),
}
