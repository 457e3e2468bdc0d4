"""The feature queue: against a deque, in checkpoints, in a loss, and in two processes."""

import copy
import pickle
from collections import deque
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from litzoo.zoo.functional.supcon import supcon_loss
from litzoo.zoo.layers.feature_queue import FeatureQueue

Rows = list[tuple[list[float], list[float]]]


def held(queue: FeatureQueue) -> Rows:
    """The rows that count, from the oldest to the newest, with their labels."""
    features, labels = queue.contents()
    start = int(queue.get_extra_state()["next"])
    labels = labels[:, None] if labels.dim() == 1 else labels
    empty = (labels < 0).all(dim=1) | (labels == 0).all(dim=1) if queue.classes else (labels < 0).all(dim=1)
    order = [place % len(queue) for place in range(start, start + len(queue)) if not empty[place % len(queue)]]
    return [(features[row].tolist(), labels[row].tolist()) for row in order]


def by_deque(batches: list[tuple[Tensor, Tensor]], length: int) -> Rows:
    kept: deque[tuple[list[float], list[float]]] = deque(maxlen=length)
    for features, labels in batches:
        for feature, label in zip(features, labels, strict=True):
            left_out = bool(label < 0) if label.dim() == 0 else not bool(label.any())
            if not left_out and bool(feature.isfinite().all()) and bool(feature.any()):
                kept.append((F.normalize(feature.float(), dim=0).tolist(), label[None].tolist() if label.dim() == 0 else label.tolist()))
    return list(kept)


def random_batches(sizes: list[int], classes: int | None = None) -> list[tuple[Tensor, Tensor]]:
    """Some labels are missing, some features are none."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for size in sizes:
        features = torch.randn(size, 4, generator=generator) * 10
        bad = torch.rand(size, generator=generator)
        features[bad < 0.1, 2], features[(bad > 0.1) & (bad < 0.2)] = float("nan"), 0.0
        if classes is None:
            labels = torch.randint(-1, 5, (size,), generator=generator)
        else:
            labels = torch.rand(size, classes, generator=generator).softmax(dim=1) * (torch.rand(size, 1, generator=generator) > 0.2)
        made.append((features, labels))
    return made


@pytest.mark.parametrize("classes", [None, 3])
@pytest.mark.parametrize("length", [1, 7, 12, 100])
def test_against_a_deque(length: int, classes: int | None) -> None:
    queue = FeatureQueue(4, length, classes)
    batches = random_batches([3, 0, 5, 4, 30, 1, 12, 7], classes)
    for number, batch in enumerate(batches, start=1):
        queue.write(*batch)
        expected = by_deque(batches[:number], length)
        found = held(queue)
        assert [label for _, label in found] == [label for _, label in expected]
        for (feature, _), (wanted, _) in zip(found, expected, strict=True):
            assert feature == pytest.approx(wanted, abs=1e-6)
    if length == 7:
        assert torch.allclose(queue.contents()[0].norm(dim=1), torch.ones(7))


@pytest.mark.parametrize("classes", [None, 3])
def test_a_loss_takes_its_contents(classes: int | None) -> None:
    """What is not filled yet counts for nothing, and a step's own rows are not in it yet."""
    queue, z = FeatureQueue(4, 20, classes), torch.randn(6, 4, requires_grad=True)
    labels = torch.tensor([0, 0, 1, 1, 2, 2]) if classes is None else torch.eye(3)[[0, 0, 1, 1, 2, 2]]
    queue.stage(z, labels)
    assert torch.equal(supcon_loss(z, labels, queue=queue.contents()), supcon_loss(z, labels)), "empty"
    queue.commit()
    loss = supcon_loss(z, labels, queue=queue.contents())
    torch.testing.assert_close(loss, supcon_loss(z, labels, queue=(z.detach(), labels)))
    queue.stage(z, labels)
    loss.backward()
    assert not queue.contents()[0].requires_grad


def test_is_neither_parameter_nor_buffer() -> None:
    queue = FeatureQueue(4, 3)
    assert not list(queue.parameters())
    assert not list(queue.buffers())
    assert list(queue.state_dict()) == ["_extra_state"]


@pytest.mark.parametrize("classes", [None, 3])
def test_a_resumed_queue_goes_on_as_the_one_that_was_saved(classes: int | None, tmp_path: Path) -> None:
    batches = random_batches([5, 4, 9, 6], classes)
    whole, resumed = (FeatureQueue(4, 11, classes) for _ in range(2))
    for batch in batches[:2]:
        whole.write(*batch)
    torch.save(whole.state_dict(), tmp_path / "state.pt")
    resumed.stage(*batches[0])  # of a step that was broken off
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    twins = [resumed, copy.deepcopy(whole), pickle.loads(pickle.dumps(whole))]
    for batch in batches[2:]:
        assert all(held(twin) == held(whole) for twin in twins)
        for queue in (whole, *twins):
            queue.write(*batch)
    assert all(held(twin) == held(whole) for twin in twins)
    assert held(whole)


def test_another_size_is_told() -> None:
    state = FeatureQueue(4, 11).state_dict()
    for queue, match in (
        (FeatureQueue(8, 11), r"features \(11, 4\) and labels \(11,\), this one \(11, 8\) and \(11,\): set dimensions"),
        (FeatureQueue(4, 12), r"this one \(12, 4\) and \(12,\)"),
        (FeatureQueue(4, 11, 3), r"this one \(11, 4\) and \(11, 3\)"),
    ):
        with pytest.raises(ValueError, match=match):
            queue.load_state_dict(state)


def test_a_checkpoint_holds_what_is_staged() -> None:
    """Lightning's checkpoint callbacks run before the hook that commits."""
    queue = FeatureQueue(4, 3)
    queue.stage(torch.eye(4)[:1], torch.tensor([5]))
    assert queue.is_staged
    assert queue.contents()[1].tolist() == [-1, -1, -1]
    assert queue.state_dict()["_extra_state"]["labels"].tolist() == [5, -1, -1]
    assert not queue.is_staged
    queue.commit()
    assert queue.contents()[1].tolist() == [5, -1, -1]
    queue.stage(torch.eye(4)[:1], torch.tensor([6]))
    queue.discard()
    queue.commit()
    assert queue.contents()[1].tolist() == [5, -1, -1]
    queue.clear()
    assert held(queue) == []


def test_precision_never_falls_below_float32() -> None:
    for classes in (None, 2):
        queue = FeatureQueue(4, 3, classes)
        labels = torch.tensor([1]) if classes is None else torch.tensor([[0.25, 0.75]])
        for given, dtype in ((torch.bfloat16, torch.float32), (torch.half, torch.float32), (torch.double, torch.float64)):
            queue.to(given).write(torch.randn(1, 4, dtype=torch.bfloat16), labels)
            features, kept = queue.contents()
            assert features.dtype == dtype
            assert kept.dtype == (torch.int64 if classes is None else dtype)
        assert len(held(queue)) == 3
        torch.testing.assert_close(features.norm(dim=1), torch.ones(3, dtype=torch.float64), atol=1e-6, rtol=0)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_features_without_a_length_are_left_out(scale: float) -> None:
    """Their squares leave the range of float32."""
    queue = FeatureQueue(2, 2)
    queue.write(torch.tensor([[scale, 0.0], [3.0, 4.0], [float("inf"), 1.0]]), torch.tensor([1, 2, 3]))
    assert held(queue) == [([pytest.approx(0.6), pytest.approx(0.8)], [2])]


def test_mistakes_are_told() -> None:
    for settings, match in (((0, 3), "dimensions of a feature queue"), ((4, 0), "length of a"), ((4, 3, 0), "classes of a")):
        with pytest.raises(ValueError, match=match):
            FeatureQueue(*settings)
    hard, soft = FeatureQueue(4, 3), FeatureQueue(4, 3, 2)
    for queue, features, labels, match in (
        (hard, torch.zeros(2, 5), torch.zeros(2), r"features for the queue must have shape \(B, 4\), got \(2, 5\)"),
        (hard, torch.zeros(2, 4), torch.zeros(3, dtype=torch.int64), r"integers of shape \(2,\), got torch.int64 of shape \(3,\)"),
        (hard, torch.zeros(2, 4), torch.zeros(2), r"integers of shape \(2,\), got torch.float32"),
        (soft, torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64), r"probabilities of shape \(2, 2\), got torch.int64 of shape \(2,\)"),
    ):
        with pytest.raises(ValueError, match=match):
            queue.stage(features, labels)
    assert not hard.is_staged


SCRIPT = """
import sys, torch
import torch.distributed as dist
from litzoo.zoo.layers.feature_queue import FeatureQueue

dist.init_process_group("gloo")
rank = dist.get_rank()
hard, soft = FeatureQueue(4, 7), FeatureQueue(4, 3, classes=2)
for start, cut, end in ((0, 3, 5), (5, 5, 8), (8, 9, 10)):  # unequal numbers, once none
    mine = torch.arange(10)[[slice(start, cut), slice(cut, end)][rank]]
    features = torch.stack([mine + 1, mine * 0 + 1, mine * 0, mine * 0], dim=1)
    hard.write(features.float(), mine)
    soft.write(features.bfloat16(), torch.eye(2)[mine % 2])
torch.save([hard.state_dict(), soft.state_dict()], f"{sys.argv[1]}_{rank}.pt")
"""


def test_two_processes_hold_the_same_queue(tmp_path: Path, two_processes: Callable[..., None]) -> None:
    script = tmp_path / "queue.py"
    script.write_text(SCRIPT)
    two_processes(script, tmp_path / "state")
    for rank in range(2):
        hard, soft = FeatureQueue(4, 7), FeatureQueue(4, 3, classes=2)
        for queue, state in zip((hard, soft), torch.load(tmp_path / f"state_{rank}.pt", weights_only=True), strict=True):
            queue.load_state_dict(state)
        assert [label for _, label in held(hard)] == [[3], [4], [5], [6], [7], [8], [9]]
        assert [feature[0] / feature[1] for feature, _ in held(hard)] == pytest.approx([4, 5, 6, 7, 8, 9, 10])
        assert [label for _, label in held(soft)] == [[0, 1], [1, 0], [0, 1]]
