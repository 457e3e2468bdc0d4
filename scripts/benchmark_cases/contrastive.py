"""The supervised contrastive loss of two views of many samples of ten classes: forward and backward."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmark_cases import Benchmark, Make, Run

DIM, CLASSES, TEMPERATURE = 128, 10, 0.1


def _step(rows: int, loss: Callable[[Any, Any], Any]) -> Run:
    """Loss and gradient of rows (R, D) with labels (R,)."""
    import torch

    generator = torch.Generator().manual_seed(0)
    z = torch.randn(rows, DIM, generator=generator)
    labels = torch.randint(CLASSES, (rows // 2,), generator=generator).repeat(2)

    def step() -> None:
        loss(z.clone().requires_grad_(), labels).backward()

    return step


def litzoo(folder: Path, rows: int) -> Run:
    from litzoo.zoo.functional.supcon import supcon_loss

    return _step(rows, lambda z, labels: supcon_loss(z, labels, TEMPERATURE))


def dense(folder: Path, rows: int) -> Run:
    """The algorithm of the published code: matrices of logits, of positives and of all but the diagonal."""
    import torch
    import torch.nn.functional as F

    def loss(z: Any, labels: Any) -> Any:
        z = F.normalize(z)
        same = torch.eq(labels[:, None], labels[None, :]).float()
        logits = torch.div(z @ z.T, TEMPERATURE)
        logits = logits - logits.max(dim=1, keepdim=True).values.detach()
        others = torch.scatter(torch.ones_like(same), 1, torch.arange(len(z))[:, None], 0)
        same = same * others
        log_probability = logits - torch.log((torch.exp(logits) * others).sum(1, keepdim=True))
        count = same.sum(1)
        return -((same * log_probability).sum(1) / torch.where(count < 1e-6, 1, count)).mean()

    return _step(rows, loss)


def metric_learning(folder: Path, rows: int) -> Run:
    from pytorch_metric_learning.losses import SupConLoss

    return _step(rows, SupConLoss(temperature=TEMPERATURE))


def _benchmark(rows: int, calls: int, rounds: int, **peers: Make) -> Benchmark:
    cases = {"litzoo": litzoo, **{name.replace("_", " "): make for name, make in peers.items()}}
    return Benchmark(
        summary=f"supervised contrastive loss of {rows:,} rows, D {DIM}, {CLASSES} classes: forward and backward",
        cases={name: partial(make, rows=rows) for name, make in cases.items()},
        items=rows,
        unit="rows",
        rounds=rounds,
        calls=calls,
        prepared=True,
        packages={"pytorch metric learning": "pytorch_metric_learning"} if peers else {},
    )


_PEERS = {"dense": dense, "pytorch_metric_learning": metric_learning}
BENCHMARKS: dict[str, Benchmark] = {
    "supcon-loss-512": _benchmark(512, 20, 9, **_PEERS),
    "supcon-loss-2048": _benchmark(2048, 3, 9, **_PEERS),
    "supcon-loss-8192": _benchmark(8192, 1, 5, **_PEERS),
    "supcon-loss-32768": _benchmark(32_768, 1, 2),  # the matrices of the others would need some 24 and 45 GiB
}
