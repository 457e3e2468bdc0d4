"""The memory bank: against a loop over rows, in checkpoints, and in two processes."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from litzoo.zoo.layers.memory_bank import MemoryBank

SAMPLES = torch.tensor([3, 4, 9, 20, 21])


def bank_of(momentum: float = 0.5, dim: int = 4) -> MemoryBank:
    bank = MemoryBank(dim, momentum)
    bank.start(SAMPLES, "data")
    return bank


def by_loop(rows: Tensor, samples: list[int], features: Tensor, momentum: float) -> Tensor:
    """A batch, in which the first feature of a sample counts."""
    rows, seen = rows.clone(), set()
    for sample, feature in zip(samples, features, strict=True):
        if sample not in seen:
            row = SAMPLES.tolist().index(sample)
            moved = momentum * rows[row] + (1 - momentum) * feature / feature.norm()
            rows[row] = moved / moved.norm()
        seen.add(sample)
    return rows


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_rows_against_a_loop(momentum: float) -> None:
    bank = bank_of(momentum)
    samples = [20, 3, 20, 21, 3]  # the first of each counts
    features = torch.randn(5, 4)
    expected = by_loop(bank.rows, samples, features, momentum=0.0)
    bank.write(torch.tensor(samples), features)
    torch.testing.assert_close(bank.rows, expected, msg="the first feature replaces the random direction")
    expected = by_loop(bank.rows, samples, -features.flip(0), momentum)
    bank.write(torch.tensor(samples), -features.flip(0))
    torch.testing.assert_close(bank.rows, expected)
    assert torch.allclose(bank.rows.norm(dim=1), torch.ones(5))


def test_starts_with_random_directions_that_depend_on_the_seed_alone() -> None:
    state = torch.get_rng_state()
    first, second, other = (MemoryBank(64) for _ in range(3))
    for bank, seed in ((first, 0), (second, 0), (other, 1)):
        bank.start(torch.arange(3000), seed=seed)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.rows, second.rows)
    assert not torch.equal(first.rows, other.rows)
    assert torch.allclose(first.rows.norm(dim=1), torch.ones(3000))
    assert float(first.rows.mean(dim=0).norm()) < 3 / 3000**0.5


def test_is_neither_parameter_nor_buffer() -> None:
    bank = bank_of()
    assert not list(bank.parameters())
    assert not list(bank.buffers())
    assert list(bank.state_dict()) == ["_extra_state"]


def test_state_goes_round() -> None:
    bank = bank_of()
    bank.write(torch.tensor([9]), torch.randn(1, 4))
    other = MemoryBank(4)
    other.load_state_dict(bank.state_dict())
    assert torch.equal(other.rows, bank.rows)
    assert other.fits(SAMPLES, "data")
    other.write(torch.tensor([9]), torch.randn(1, 4))
    assert not torch.equal(other.rows, bank.rows), "the loaded rows are a copy"
    for twin in (copy.deepcopy(bank), pickle.loads(pickle.dumps(bank))):
        assert torch.equal(twin.rows, bank.rows)
    with pytest.raises(ValueError, match="has 4 dimensions, this one has 8"):
        MemoryBank(8).load_state_dict(bank.state_dict())


def test_a_checkpoint_holds_what_is_staged() -> None:
    """Lightning's checkpoint callbacks run before the hook that commits."""
    bank = bank_of()
    before = bank.rows.clone()
    bank.stage(bank.rows_of(torch.tensor([4])), torch.randn(1, 4))
    assert bank.is_staged
    assert torch.equal(bank.rows, before)
    saved = bank.state_dict()["_extra_state"]["rows"].clone()
    assert not torch.equal(saved, before)
    bank.commit()
    assert torch.equal(bank.rows, saved)
    assert not bank.is_staged


def test_what_a_broken_off_step_staged_is_never_written() -> None:
    """Its rows are not those of a bank that was started or loaded since."""
    bank, other = bank_of(), MemoryBank(4)
    other.start(torch.arange(2))
    for replace in (lambda: bank.load_state_dict(other.state_dict()), lambda: bank.start(torch.arange(2)), bank.discard):
        bank.start(SAMPLES)
        bank.stage(torch.tensor([4]), torch.randn(1, 4))
        replace()
        before = bank.rows.clone()
        bank.commit()
        assert torch.equal(bank.rows, before)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_features_that_are_not_finite_leave_their_rows(broken: float) -> None:
    """Such as those of a step that float16 overflowed in, which a GradScaler leaves out."""
    bank = bank_of()
    before = bank.rows.clone()
    features = torch.randn(3, 4)
    features[1, 2] = broken
    bank.write(torch.tensor([3, 9, 21]), features)
    assert torch.equal(bank.rows[[1, 2, 3]], before[[1, 2, 3]])
    torch.testing.assert_close(bank.rows[[0, 4]], F.normalize(features[[0, 2]]))
    bank.write(torch.tensor([9]), features[:1])
    torch.testing.assert_close(bank.rows[2], F.normalize(features[:1])[0], msg="still its first feature")


def test_precision_never_falls_below_float32() -> None:
    bank = bank_of().bfloat16()
    assert bank.rows.dtype == torch.float32
    assert bank.half().rows.dtype == torch.float32
    assert bank.double().rows.dtype == torch.float64
    bank.write(torch.tensor([3]), torch.randn(1, 4, dtype=torch.bfloat16))
    assert bank.rows.dtype == torch.float64


def test_belongs_to_its_data() -> None:
    bank = bank_of()
    assert bank.fits(SAMPLES, "data")
    assert bank.fits(SAMPLES, None), "nobody knows better"
    assert not bank.fits(SAMPLES, "other data")
    assert not bank.fits(SAMPLES + 1, "data")
    assert not bank.fits(SAMPLES[:4], "data")


def test_mistakes_are_told() -> None:
    with pytest.raises(ValueError, match="momentum must lie in"):
        MemoryBank(4, 1.0)
    with pytest.raises(ValueError, match="at least one dimension"):
        MemoryBank(0)
    with pytest.raises(ValueError, match="ascending numbers"):
        MemoryBank(4).start(torch.tensor([1, 1]))
    with pytest.raises(IndexError, match="is empty"):
        MemoryBank(4).rows_of(torch.tensor([1]))
    for stranger in (0, 10, 22):
        with pytest.raises(IndexError, match=f"sample {stranger} has no row"):
            bank_of().write(torch.tensor([3, stranger]), torch.randn(2, 4))


SCRIPT = """
import sys, torch
import torch.distributed as dist
from litzoo.zoo.layers.memory_bank import MemoryBank

dist.init_process_group("gloo")
rank = dist.get_rank()
bank = MemoryBank(4, 0.5)
bank.start(torch.tensor([3, 4, 9, 20, 21]))
features = torch.arange(20.0).view(5, 4) + 1
# Unequal numbers, and sample 20 in both processes.
samples, mine = [([20, 3, 9], features[:3]), ([4, 20], features[3:])][rank]
bank.write(torch.tensor(samples), mine)
torch.save(bank.rows, f"{sys.argv[1]}_{rank}.pt")
"""


def test_two_processes_hold_the_same_rows(tmp_path: Path, two_processes: Callable[..., None]) -> None:
    script = tmp_path / "bank.py"
    script.write_text(SCRIPT)
    two_processes(script, tmp_path / "rows")
    first, second = (torch.load(tmp_path / f"rows_{rank}.pt") for rank in range(2))
    assert torch.equal(first, second)
    alone = bank_of()
    alone.write(torch.tensor([20, 3, 9, 4, 20]), torch.arange(20.0).view(5, 4) + 1)
    assert torch.equal(first, alone.rows)


def test_an_average_of_opposite_features_is_no_nan() -> None:
    bank = bank_of(0.5)
    bank.write(torch.tensor([3]), bank.rows[:1])
    bank.write(torch.tensor([3]), -bank.rows[:1])
    assert bank.rows.isfinite().all()
    assert F.normalize(torch.zeros(1, 4)).isfinite().all()
