"""The supervised contrastive loss: against its formula written out as loops in float64, and against independent implementations."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from litzoo.zoo.functional import supcon
from litzoo.zoo.functional.supcon import supcon_loss

Queue = tuple[Tensor, Tensor]


def naive(rows: Tensor, labels: Tensor, temperature: float = 0.1, step: int = 1, queue: Queue | None = None) -> Tensor:
    """The formula of the docstring, anchor by anchor and row by row; every `step`-th row is an anchor."""
    everything = rows if queue is None else torch.cat([rows, queue[0]])
    label = labels if queue is None else torch.cat([labels, queue[1]])
    unit = [row / row.norm() for row in everything]
    counted = [j for j in range(len(unit)) if (float(label[j].sum()) > 0 if label.dim() == 2 else int(label[j]) >= 0)]
    losses, weights = [rows.sum() * 0], []
    for i in range(0, len(rows), step):
        if i not in counted:
            continue
        others = [j for j in counted if j != i]
        agreement = [float(label[i] @ label[j]) if label.dim() == 2 else float(label[i] == label[j]) for j in others]
        if sum(agreement) == 0:
            continue
        logits = [unit[i] @ unit[j] / temperature for j in others]
        log_sum = torch.stack(logits).exp().sum().log()
        mean = torch.stack([w * s for w, s in zip(agreement, logits, strict=True)]).sum() / sum(agreement)
        weights.append(min(1.0, sum(agreement)))
        losses.append(weights[-1] * (log_sum - mean))
    return torch.stack(losses).sum() / max(sum(weights), 1.0)


def rows_of(number: int, dim: int = 5, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(number, dim, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def soft_of(number: int, classes: int = 4, seed: int = 0) -> Tensor:
    """Labels as of mixup: two classes each; the first row is alone in its class, and the last one has none."""
    generator = torch.Generator().manual_seed(seed)
    first, second = (F.one_hot(torch.randint(classes, (number,), generator=generator), classes + 1).double() for _ in range(2))
    share = torch.rand(number, 1, generator=generator, dtype=torch.float64)
    labels = share * first + (1 - share) * second
    labels[0], labels[-1] = F.one_hot(torch.tensor(classes), classes + 1), 0.0
    return labels


HARD = torch.tensor([2, 0, 7, 2, -1, 0, 0, 2, 1000, 3, 3, -1])  # 7 and 1000 have one row each
QUEUE = (rows_of(7, seed=3).detach(), torch.tensor([3, 5, 7, -1, 0, 2000, 5]))


def assert_same(found: Tensor, expected: Tensor, z: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)
    mine, theirs = (torch.autograd.grad(loss, z)[0] for loss in (found, expected))
    torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


@pytest.fixture(params=[(1, 0), (5, 0), (5, 1 << 22), (384, 1 << 22)], ids=str)
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of other sizes, which are computed again for the gradient or kept."""
    size, kept = request.param
    monkeypatch.setattr(supcon, "_CACHED", size)
    monkeypatch.setattr(supcon, "_KEPT", kept)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("queue", [None, QUEUE], ids=["alone", "queue"])
@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_rows_against_the_formula(temperature: float, queue: Queue | None) -> None:
    z = rows_of(12)
    assert_same(supcon_loss(z, HARD, temperature, queue=queue), naive(z, HARD, temperature, queue=queue), z)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("queue", [False, True], ids=["alone", "queue"])
@pytest.mark.parametrize("mode", ["all", "one"])
@pytest.mark.parametrize("views", [1, 2, 3])
def test_views_against_the_formula(views: int, mode: Any, queue: bool) -> None:
    labels = torch.tensor([1, 0, -1, 1])
    z = rows_of(4 * views)
    keys = QUEUE if queue else None
    found = supcon_loss(z.view(4, views, 5), labels, mode=mode, queue=keys)
    assert_same(found, naive(z, labels.repeat_interleave(views), step=views if mode == "one" else 1, queue=keys), z)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("queue", [False, True], ids=["alone", "queue"])
@pytest.mark.parametrize("mode", ["all", "one"])
def test_soft_labels_against_the_formula(mode: Any, queue: bool) -> None:
    labels = soft_of(5)
    z = rows_of(10)
    keys = (QUEUE[0], soft_of(7, seed=1)) if queue else None
    found = supcon_loss(z.view(5, 2, 5), labels, mode=mode, queue=keys)
    assert_same(found, naive(z, labels.repeat_interleave(2, dim=0), step=2 if mode == "one" else 1, queue=keys), z)


def test_anchors_with_less_than_one_positive_count_less() -> None:
    """So the loss is continuous where the last positive vanishes."""
    z = rows_of(6)
    labels = F.one_hot(torch.tensor([0, 0, 1, 1, 2, 3])).double()
    labels[4] = torch.tensor([0.0, 0.0, 0.9, 0.1])
    assert_same(supcon_loss(z, labels), naive(z, labels), z)
    labels[4] = torch.tensor([0.0, 0.0, 1 - 1e-9, 1e-9])
    without = supcon_loss(z, torch.tensor([0, 0, 1, 1, 2, 3]))
    torch.testing.assert_close(supcon_loss(z, labels), without, rtol=1e-8, atol=0)


def test_one_hot_labels_are_hard_labels() -> None:
    z = rows_of(20)
    labels = torch.randint(6, (20,))
    labels[3] = -1
    soft = torch.where(labels[:, None] >= 0, F.one_hot(labels.clamp(min=0), 6).double(), 0.0)
    assert_same(supcon_loss(z, soft), supcon_loss(z, labels), z)


def test_gradients_against_finite_differences() -> None:
    z, views = rows_of(12), rows_of(12).detach().view(6, 2, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: supcon_loss(x, HARD, 0.3, queue=QUEUE), z)
    assert torch.autograd.gradcheck(lambda x: supcon_loss(x, HARD[:6], 0.3, "one", queue=QUEUE), views)
    assert torch.autograd.gradcheck(lambda x: supcon_loss(x, soft_of(6), 0.3), views)
    assert torch.autograd.gradcheck(lambda x: supcon_loss(x, temperature=0.3), views)


def test_without_labels_it_is_nt_xent() -> None:
    z = rows_of(16)
    unit = F.normalize(z)
    logits = (unit @ unit.T / 0.5).masked_fill(torch.eye(16, dtype=torch.bool), -math.inf)
    expected = F.cross_entropy(logits, torch.arange(16) ^ 1)  # the other view is the next row, or the one before
    assert_same(supcon_loss(z.view(8, 2, 5), temperature=0.5), expected, z)


def test_mode_one_of_the_published_code() -> None:
    """Its masks are for view-major rows: the first views of all samples, then the second ones."""
    views, labels = rows_of(12).detach().view(6, 2, 5).requires_grad_(), torch.tensor([0, 1, 0, 2, 1, 0])
    unit = F.normalize(views, dim=2)
    rows = torch.cat(unit.unbind(1))
    mask = (labels[:, None] == labels).double().repeat(1, 2)
    not_self = 1 - torch.eye(6, 12, dtype=torch.float64)
    logits = unit[:, 0] @ rows.T / 0.1
    log_probability = logits - (logits.exp() * not_self).sum(1, keepdim=True).log()
    expected = -((mask * not_self * log_probability).sum(1) / (mask * not_self).sum(1)).mean()
    assert_same(supcon_loss(views, labels, mode="one"), expected, views)


@pytest.mark.parametrize("number", [4, 64, 512])
def test_collapsed_rows_have_their_closed_form(number: int) -> None:
    z = torch.ones(number, 8, requires_grad=True)
    loss = supcon_loss(z, torch.arange(number) // 2)
    assert loss.item() == pytest.approx(math.log(number - 1), rel=1e-6)
    assert float(torch.autograd.grad(loss, z)[0].abs().max()) < 1e-6


def test_perfect_clusters_have_their_closed_form() -> None:
    z = F.one_hot(torch.tensor([0, 0, 1, 1, 2, 2])).double()
    assert float(supcon_loss(z, z.argmax(1), 0.5)) == pytest.approx(math.log(math.exp(2) + 4) - 2, rel=1e-12)


def test_order_and_length_of_rows_do_not_matter() -> None:
    z, order = rows_of(12), torch.randperm(12)
    loss = supcon_loss(z, HARD)
    torch.testing.assert_close(supcon_loss(z[order], HARD[order]), loss)
    torch.testing.assert_close(supcon_loss(z * torch.rand(12, 1).add(0.1), HARD), loss)
    assert (torch.autograd.grad(loss, z)[0] * z).sum(1).abs().max() < 1e-12  # nothing along a row
    names = torch.tensor([-1] + [10**9 - 17 * k for k in range(1001)])  # labels are only compared
    torch.testing.assert_close(supcon_loss(z, names[HARD + 1]), loss)


def test_rows_left_out_are_as_absent() -> None:
    z = rows_of(12)
    kept = HARD >= 0
    assert_same(
        supcon_loss(z, HARD, queue=QUEUE),
        supcon_loss(z[kept], HARD[kept], queue=(QUEUE[0][[0, 1, 2, 4, 5, 6]], QUEUE[1][[0, 1, 2, 4, 5, 6]])),
        z,
    )
    assert (torch.autograd.grad(supcon_loss(z, HARD), z)[0][~kept] == 0).all()


def test_queue_has_no_gradient_and_counts() -> None:
    z, keys = rows_of(3), rows_of(7, seed=3)
    loss = supcon_loss(z, torch.tensor([3, 0, 9]), queue=(keys, QUEUE[1]))
    loss.backward()
    assert keys.grad is None
    assert loss.item() > 0
    assert supcon_loss(z, torch.tensor([3, 0, 9])).item() == 0  # no positives without it


@pytest.mark.parametrize("labels", [torch.arange(4), torch.full((4,), -1), torch.zeros(4, 3)], ids=["alone", "left out", "no class"])
def test_without_positives_the_loss_is_zero(labels: Tensor) -> None:
    z = rows_of(4)
    loss = supcon_loss(z, labels)
    assert loss.item() == 0
    assert (torch.autograd.grad(loss, z)[0] == 0).all()


@pytest.mark.parametrize("temperature", [1 / 640, 0.003, 1 / 64, 0.016, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_temperatures_are_finite_and_right(temperature: float, dtype: torch.dtype) -> None:
    z = rows_of(40, 3, dtype=dtype)
    with torch.no_grad():
        z[:4] = torch.eye(3, dtype=dtype)[[0, 1, 0, 1]]
        z[4:6] = -z[:2]  # the far end, and duplicates
    labels = torch.arange(40) % 2
    loss = supcon_loss(z, labels, temperature)
    assert loss.dtype == dtype
    unit = F.normalize(z.double())
    logits = (unit @ unit.T / temperature).masked_fill(torch.eye(40, dtype=torch.bool), -math.inf)
    same = (labels[:, None] == labels) & ~torch.eye(40, dtype=torch.bool)
    expected = (logits.logsumexp(1) - torch.where(same, logits, 0.0).sum(1) / same.sum(1)).mean()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    mine, theirs = (torch.autograd.grad(value, z)[0] for value in (loss, expected))
    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_rows_of_any_length_and_rows_of_zeros(scale: float) -> None:
    z = (torch.randn(6, 4) * scale).requires_grad_()
    loss = supcon_loss(torch.cat([torch.zeros(2, 4), z]), torch.arange(8) % 2)
    assert loss.isfinite()
    assert torch.autograd.grad(loss, z)[0].isfinite().all()
    zeros = torch.zeros(4, 4, requires_grad=True)
    assert (torch.autograd.grad(supcon_loss(zeros, torch.tensor([0, 0, 1, 1])), zeros)[0] == 0).all()


@pytest.mark.parametrize("labels", [torch.arange(64) % 5, soft_of(64).float()], ids=["hard", "soft"])
def test_half_precision_and_autocast_compute_in_float32(labels: Tensor) -> None:
    z = rows_of(64, 16, dtype=torch.float32)
    plain = supcon_loss(z, labels)
    with torch.autocast("cpu", torch.bfloat16):
        cast = supcon_loss(z, labels)
    assert torch.equal(cast, plain)
    assert torch.equal(*(torch.autograd.grad(loss, z)[0] for loss in (cast, plain)))
    half = z.detach().bfloat16().requires_grad_()
    loss = supcon_loss(half, labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, supcon_loss(half.detach().float(), labels))
    assert torch.autograd.grad(loss, half)[0].dtype == torch.bfloat16


def test_float32_is_close_to_float64_across_block_boundaries() -> None:
    for number in (383, 385, 1000):
        z = rows_of(number, 16)
        labels = torch.randint(10, (number,))
        exact, single = supcon_loss(z, labels), supcon_loss(z.float(), labels)
        assert single.item() == pytest.approx(exact.item(), rel=1e-6)
        mine, theirs = (torch.autograd.grad(loss, z)[0] for loss in (single, exact))
        assert float((mine - theirs).norm() / theirs.norm()) < 1e-5


def test_there_is_no_second_derivative_and_no_work_without_a_gradient() -> None:
    z = rows_of(6)
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(supcon_loss(z, labels), z, create_graph=True)
    with torch.no_grad():
        assert not supcon_loss(z, labels).requires_grad


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_agrees_with_pytorch_metric_learning(temperature: float) -> None:
    losses = pytest.importorskip("pytorch_metric_learning.losses", reason="pip install pytorch-metric-learning")
    z = rows_of(40, 16)
    labels = torch.arange(40) % 7
    found, expected = supcon_loss(z, labels, temperature), losses.SupConLoss(temperature=temperature)(z, labels)
    assert found.item() == pytest.approx(expected.item(), rel=1e-7)
    mine, theirs = (torch.autograd.grad(loss, z)[0] for loss in (found, expected))
    assert float((mine - theirs).norm() / theirs.norm()) < 1e-6


VIEWS = torch.zeros(4, 2, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"z": torch.zeros(3), "labels": torch.zeros(3)}, r"rows \(R, D\) or views \(B, V, D\)"),
        ({"z": VIEWS[:, 0]}, "have no positives: pass labels"),
        ({"z": VIEWS[:, 0], "labels": torch.arange(4), "mode": "one"}, "pass z as views"),
        ({"z": VIEWS, "labels": torch.arange(4), "mode": "two"}, "mode must be one of all, one"),
        ({"z": VIEWS, "labels": torch.arange(8)}, r"labels must have shape \(4,\)"),
        ({"z": VIEWS, "labels": torch.zeros(4)}, "must be integers"),
        ({"z": VIEWS, "labels": torch.zeros(4, 3, dtype=torch.long)}, "must be integers"),
        ({"z": VIEWS, "temperature": 0.0}, "at least 1/640"),
        ({"z": VIEWS, "temperature": math.nan}, "at least 1/640"),
        ({"z": VIEWS, "queue": (torch.zeros(2, 3), torch.zeros(2))}, "a queue needs labels"),
        ({"z": VIEWS, "labels": torch.arange(4), "queue": (torch.zeros(2, 4), torch.arange(2))}, r"must have shape \(Q, 3\)"),
        (
            {"z": VIEWS, "labels": torch.arange(4), "queue": (torch.zeros(2, 3), torch.arange(3))},
            r"labels of the queue must have shape \(2,\)",
        ),
        ({"z": VIEWS, "labels": torch.arange(4), "queue": (torch.zeros(2, 3), torch.zeros(2, 5))}, "of one kind"),
    ],
)
def test_mistakes_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        supcon_loss(**arguments)


# Several processes

SHARED = """
import torch

def problem(case):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 2, 6, generator=generator, dtype=torch.float64)
    labels = {"hard": torch.tensor([3, 0, 8, 3, -1, 0, 5]), "soft": torch.rand(7, 3, generator=generator, dtype=torch.float64),
              "simclr": None, "no anchors here": torch.tensor([0, 0, 1, 4, -1, -1, 5])}[case]
    keys = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    key_labels = torch.rand(5, 3, generator=generator) if case == "soft" else torch.tensor([5, 3, 70, -1, 70])
    return x, labels, None if labels is None else (keys, key_labels)

def network():
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4)).double()
"""

SCRIPT = (
    SHARED
    + """
import os, sys
from torch.nn.parallel import DistributedDataParallel
from litzoo.zoo.functional.supcon import supcon_loss

torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
shares = {"even": [slice(0, 3), slice(3, 6)], "uneven": [slice(0, 5), slice(5, 7)]}
found = {}
for case in ("hard", "soft", "simclr", "no anchors here"):
    for mode in ("all", "one"):
        for name, parts in shares.items():
            x, labels, queue = problem(case)
            net = DistributedDataParallel(network())
            z = net(x[parts[rank]])
            mine = None if labels is None else labels[parts[rank]]
            loss = supcon_loss(z, mine, 0.2, mode, queue)
            loss.backward()
            alone = supcon_loss(z.detach(), mine, 0.2, mode, queue, gather=False)
            found[case, mode, name] = loss.detach(), [p.grad for p in net.parameters()], alone
torch.save(found, f"{sys.argv[1]}_{rank}.pt")
"""
)


def test_two_processes_equal_one_on_the_global_batch(tmp_path: Path, two_processes: Callable[..., None]) -> None:
    """Losses and gradients of an encoder's weights under DDP, with as many samples on each process and with different numbers."""
    script = tmp_path / "supcon.py"
    script.write_text(SCRIPT)
    two_processes(script, tmp_path / "found")
    first, second = (torch.load(tmp_path / f"found_{rank}.pt") for rank in range(2))
    shared: dict[str, Any] = {}
    exec(SHARED, shared)
    modes: tuple[Any, ...] = ("all", "one")
    cases = ("hard", "soft", "simclr", "no anchors here")
    for case, mode, (name, size, cut) in itertools.product(cases, modes, (("even", 6, 3), ("uneven", 7, 5))):
        x, labels, queue = shared["problem"](case)
        net = shared["network"]()
        loss = supcon_loss(net(x[:size]), None if labels is None else labels[:size], 0.2, mode, queue)
        loss.backward()
        key = (case, mode, name)
        torch.testing.assert_close((first[key][0] + second[key][0]) / 2, loss.detach(), rtol=1e-12, atol=1e-12)
        for found in (first, second):
            torch.testing.assert_close(found[key][1], [p.grad for p in net.parameters()], rtol=1e-10, atol=1e-13)
        with torch.no_grad():
            alone = supcon_loss(net(x[:cut]), None if labels is None else labels[:cut], 0.2, mode, queue)
        torch.testing.assert_close(first[key][2], alone, rtol=1e-12, atol=1e-12)
