"""Instance discrimination: one step against a memory bank, that is loss, gradient with respect to the features, and new rows."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

from benchmark_cases import Benchmark, Make, Run

BATCH, DIM, NEGATIVES, TEMPERATURE, MOMENTUM = 256, 128, 4096, 0.07, 0.5
INSTANCES = 50_000
LOG_PARTITION = 0.797  # of random features: 1 / (2 D t^2)
Scores = Literal["fp32", "bf16"]


def _problem(instances: int) -> tuple[Any, Any, Any]:
    """Features, bank and the samples of the batch."""
    import torch
    import torch.nn.functional as F

    generator = torch.Generator().manual_seed(0)
    features, rows = (F.normalize(torch.randn(number, DIM, generator=generator)) for number in (BATCH, instances))
    return features, rows, torch.randperm(instances, generator=generator)[:BATCH]


def _noise(instances: int) -> Any:
    import torch

    return torch.randint(instances, (BATCH, NEGATIVES), generator=torch.Generator().manual_seed(1))


def _litzoo(instances: int, loss: Callable[[Any, Any, Any], Any]) -> Run:
    """A step with litzoo's bank; `loss` takes features, rows of the bank and the numbers of the batch's own rows."""
    import torch

    from litzoo.zoo.layers.memory_bank import MemoryBank

    features, rows, index = _problem(instances)
    bank = MemoryBank(DIM, MOMENTUM)
    bank.start(torch.arange(instances))
    bank.rows.copy_(rows)
    del rows

    def step() -> None:
        x = features.clone().requires_grad_()
        loss(x, bank.rows, bank.rows_of(index)).mean().backward()
        bank.write(index, x)

    return step


def softmax_litzoo(folder: Path, scores: Scores = "fp32", instances: int = INSTANCES) -> Run:
    """Exact softmax over all rows."""
    from litzoo.zoo.functional.instance_discrimination import instance_softmax_loss

    return _litzoo(instances, lambda x, rows, index: instance_softmax_loss(x, rows, index, TEMPERATURE, scores))


def nce_litzoo(folder: Path, scores: Scores = "fp32", shared: bool = False, instances: int = INSTANCES) -> Run:
    """NCE with noise of each sample's own, or shared by the batch."""
    from litzoo.zoo.functional.instance_discrimination import bank_similarities, nce_loss, without_own

    noise = _noise(instances)[0] if shared else _noise(instances)

    def loss(x: Any, rows: Any, index: Any) -> Any:
        negative = bank_similarities(x, rows, noise, scores)
        if shared:
            negative = without_own(negative, noise, index)
        return nce_loss((x * rows[index]).sum(1), negative, TEMPERATURE, LOG_PARTITION)

    return _litzoo(instances, loss)


def _update(rows: Any, index: Any, x: Any) -> None:
    """The published average of a row: half of the old, half of the new."""
    import torch.nn.functional as F

    rows.index_copy_(0, index, F.normalize(MOMENTUM * rows[index] + (1 - MOMENTUM) * x.detach()))


def nce_gather(folder: Path, instances: int = INSTANCES) -> Run:
    """The algorithm of the published code: the rows of each sample's noise are gathered, and the ratio P / (P + m / N) is formed."""
    import torch

    features, rows, index = _problem(instances)
    chosen = torch.cat([index[:, None], _noise(instances)], dim=1)
    partition = instances * 2.718281828459045**LOG_PARTITION

    class Probabilities(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any) -> Any:
            gathered = rows.index_select(0, chosen.view(-1)).view(*chosen.shape, DIM)
            probabilities = torch.bmm(gathered, x[:, :, None]).squeeze(2).div_(TEMPERATURE).exp_().div_(partition)
            ctx.save_for_backward(gathered, probabilities)
            return probabilities

        @staticmethod
        def backward(ctx: Any, grad: Any) -> Any:
            gathered, probabilities = ctx.saved_tensors
            weights = grad * probabilities / TEMPERATURE
            return torch.bmm(weights[:, None, :], gathered).squeeze(1)

    def step() -> None:
        x = features.clone().requires_grad_()
        probabilities: Any = Probabilities.apply(x)
        noise, eps = NEGATIVES / instances, 1e-7
        positive = probabilities[:, 0]
        negative = probabilities[:, 1:]
        own = (positive / (positive + noise + eps)).log()
        others = (noise / (negative + noise + eps)).log()
        (-(own.sum() + others.sum()) / BATCH).backward()
        _update(rows, index, x)

    return step


def softmax_dense(folder: Path, instances: int = INSTANCES) -> Run:
    """The published average over all rows: the logits as a matrix, cross entropy, and a product back."""
    import torch
    import torch.nn.functional as F

    features, rows, index = _problem(instances)

    class Logits(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any) -> Any:
            return torch.mm(x, rows.t()).div_(TEMPERATURE)

        @staticmethod
        def backward(ctx: Any, grad: Any) -> Any:
            return torch.mm(grad.div(TEMPERATURE), rows)

    def step() -> None:
        x = features.clone().requires_grad_()
        F.cross_entropy(Logits.apply(x), index).backward()
        _update(rows, index, x)

    return step


def _step(what: str, cases: dict[str, Make], rounds: int = 9) -> Benchmark:
    return Benchmark(
        summary=f"{what}: loss, gradient and new rows of {BATCH} samples, D {DIM}, K {NEGATIVES:,}",
        cases=cases,
        items=BATCH,
        unit="samples",
        rounds=rounds,
        instances=INSTANCES,
        prepared=True,
    )


_GATHER: dict[str, Make] = {"per-sample gather": nce_gather}
BENCHMARKS: dict[str, Benchmark] = {
    "nce": _step("NCE", {"litzoo, one matmul": nce_litzoo, **_GATHER}),
    "nce-bf16": _step("NCE, products in bfloat16", {"litzoo, one matmul, bf16": partial(nce_litzoo, scores="bf16"), **_GATHER}),
    "nce-shared": _step("NCE, noise shared by the batch", {"litzoo, shared": partial(nce_litzoo, shared=True), **_GATHER}),
    "instance-softmax": _step(
        "exact softmax over the bank",
        {
            "litzoo, blocks": softmax_litzoo,
            "litzoo, blocks, bf16": partial(softmax_litzoo, scores="bf16"),
            "matrix of logits": softmax_dense,
        },
    ),
    "bank": _step(
        "against a bank of --instances rows",
        {
            "softmax": softmax_litzoo,
            "softmax, bf16": partial(softmax_litzoo, scores="bf16"),
            "NCE": nce_litzoo,
            "NCE, shared": partial(nce_litzoo, shared=True),
        },
        rounds=3,
    ),
}
