"""Flooding: the gradient of |L - b| + b, and nothing else changes. The matrix has the rest."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from matrix import Loader, Net, batches, make_trainer
from torch import Tensor

from litzoo.callbacks import Flooding

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


class FakeStrategy:
    """One of two processes; the mean over both is `mean`."""

    def __init__(self, mean: float) -> None:
        self.mean = mean

    def reduce(self, value: Tensor, reduce_op: str) -> Tensor:
        assert reduce_op == "mean"
        return torch.full_like(value, self.mean)


class FakeTrainer:
    global_step = 1
    accumulate_grad_batches = 1
    precision_plugin = None

    def __init__(self, mean: float | None = None) -> None:
        self.world_size = 1 if mean is None else 2
        self.strategy = FakeStrategy(mean or 0.0)


@pytest.mark.parametrize("value", [0.0, 0.3, 0.7, 0.7 + 1e-12, 5.0])
def test_gradient_is_that_of_the_formula(value: float) -> None:
    w = torch.tensor([value], dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad((w.sum() - 0.7).abs() + 0.7, w)[0] * 3
    loss = w.sum()
    Flooding(0.7).on_before_backward(FakeTrainer(), None, loss)  # type: ignore[arg-type]
    (loss * 3).backward()
    assert w.grad is not None
    torch.testing.assert_close(w.grad, expected, atol=0, rtol=0)


@pytest.mark.parametrize(("mean", "sign"), [(0.1, -1.0), (0.9, 1.0)])
def test_sync_compares_the_mean(mean: float, sign: float) -> None:
    w = torch.tensor([0.5], requires_grad=True)
    loss = w.sum()
    Flooding(0.4, sync=True).on_before_backward(FakeTrainer(mean), None, loss)  # type: ignore[arg-type]
    loss.backward()
    assert w.grad is not None
    assert float(w.grad) == sign


class Losses(Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        assert float(outputs["loss"]) == float(trainer.callback_metrics["train/loss_step"])
        self.seen.append(float(outputs["loss"]))


def test_the_loss_is_reported_as_it_is_and_hovers_around_the_level(tmp_path: Path) -> None:
    ends = {}
    for level in (0.0, 0.8):
        losses = Losses()
        make_trainer(tmp_path, Flooding(level), losses, max_epochs=60).fit(Net(), Loader(batches(0)[:1]))
        ends[level] = losses.seen
    assert ends[0.0][0] == ends[0.8][0]
    assert ends[0.0][-1] < 0.6, "without flooding it falls below"
    assert all(abs(loss - 0.8) < 0.15 for loss in ends[0.8][-10:])


def test_a_level_above_the_first_loss_is_told(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"level 9.0 is above the loss of the first batch"):
        make_trainer(tmp_path, Flooding(9.0), max_epochs=1).fit(Net(), Loader(batches(0)))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*Flooding.*")
        make_trainer(tmp_path, Flooding(0.1), max_epochs=1).fit(Net(), Loader(batches(0)))


@pytest.mark.parametrize("level", [-0.1, float("nan"), float("inf")])
def test_bad_level(level: float) -> None:
    with pytest.raises(ValueError, match="level is the loss below which training ascends"):
        Flooding(level)


def test_deepspeed_is_refused() -> None:
    class DeepSpeedStrategy:
        pass

    class Deep(FakeTrainer):
        strategy = DeepSpeedStrategy()

        def __init__(self) -> None: ...

    with pytest.raises(Exception, match="Flooding does not work under DeepSpeed"):
        Flooding(0.1).setup(Deep(), Net(), "fit")  # type: ignore[arg-type]
