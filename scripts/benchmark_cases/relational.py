"""Relational reasoning: pairs of all views of 64 images, relation head and focal loss, forward and backward."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmark_cases import Benchmark, Run

IMAGES, HIDDEN = 64, 256


def _step(views: int, dim: int, make: Callable[[Any], Callable[[Any], Any]]) -> Run:
    """Loss and gradient of features (K M, D), view after view; `make` takes a relation head and gives the loss of features."""
    import torch

    from litzoo.zoo.layers.relation_head import RelationHead

    features = torch.randn(views * IMAGES, dim, generator=torch.Generator().manual_seed(0))
    loss = make(RelationHead(dim, HIDDEN))

    def step() -> None:
        loss(features.clone().requires_grad_()).backward()

    return step


def litzoo(folder: Path, views: int, dim: int) -> Run:
    return _step(views, dim, lambda head: lambda features: head.loss(features.view(views, IMAGES, dim))[0])


def litzoo_compiled(folder: Path, views: int, dim: int) -> Run:
    """With few pairs a compiler fuses the layers; the blocks of many pairs it leaves as they are."""
    import torch

    def make(head: Any) -> Callable[[Any], Any]:
        loss = torch.compile(head.loss)
        return lambda features: loss(features.view(views, IMAGES, dim))[0]

    return _step(views, dim, make)


def _double_loop(views: int) -> Callable[[Any], Callable[[Any], Any]]:
    """The algorithm of the published code: a pair of views after the other, concatenated as it is and with the second one rolled."""
    import torch
    import torch.nn.functional as F

    def make(head: Any) -> Callable[[Any], Any]:
        def loss(features: Any) -> Any:
            parts = features.split(IMAGES)
            rows, targets, shift = [], [], 1
            for i in range(views):
                for j in range(i + 1, views):
                    rows += [torch.cat([parts[i], parts[j]], 1), torch.cat([parts[i], torch.roll(parts[j], shift, 0)], 1)]
                    targets += [torch.ones(IMAGES), torch.zeros(IMAGES)]
                    shift = shift + 1 if shift + 1 < IMAGES else 1
            target = torch.cat(targets)
            logits = head.last(head.activation(head.norm(head.first(torch.cat(rows))))).squeeze(1)
            entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
            probability = torch.sigmoid(logits)
            right = target * probability + (1 - target) * (1 - probability)
            return (torch.pow(1 - right, 2) * (0.5 * target + 0.5 * (1 - target)) * entropy).mean()

        return loss

    return make


def double_loop(folder: Path, views: int, dim: int) -> Run:
    return _step(views, dim, _double_loop(views))


def _benchmark(views: int, dim: int, calls: int, rounds: int) -> Benchmark:
    pairs = views * (views - 1) * IMAGES
    cases = {"litzoo": litzoo, "litzoo compiled": litzoo_compiled, "double loop": double_loop}
    return Benchmark(
        summary=f"relation loss of {views} views of {IMAGES} images, {pairs:,} pairs, D {dim}: forward and backward",
        cases={name: partial(make, views=views, dim=dim) for name, make in cases.items()},
        items=pairs,
        unit="pairs",
        rounds=rounds,
        calls=calls,
        prepared=True,
    )


BENCHMARKS: dict[str, Benchmark] = {
    "relational-2": _benchmark(2, 64, 50, 15),
    "relational-4": _benchmark(4, 64, 20, 15),
    "relational-16": _benchmark(16, 64, 3, 9),
    "relational-25-512": _benchmark(25, 512, 1, 5),
}
