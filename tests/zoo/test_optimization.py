"""Schedules: the formula, and in which unit Lightning steps them."""

import math
from pathlib import Path
from typing import Any

import pytest
import timm.optim
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ReduceLROnPlateau
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR, StepLR
from torch.utils.data import DataLoader

from litzoo.zoo.optimization import TimmOptimizer, WarmupCosineLR, configure_optimizer

BATCHES = 6
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def formula(t: int, total: int, warmup: float, final: float) -> float:
    w = int(warmup * total)
    if t < w:
        return (t + 1) / (w + 1)
    return final + (1 - final) * (1 + math.cos(math.pi * min((t - w) / (total - w), 1))) / 2


@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.3, 0.99])
@pytest.mark.parametrize("final", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("total", [1, 7, 40])
def test_formula(warmup: float, final: float, total: int) -> None:
    groups: Any = [{"params": [nn.Parameter(torch.zeros(1))], "lr": 0.1}, {"params": [nn.Parameter(torch.zeros(1))], "lr": 2.0}]
    optimizer = SGD(groups)
    scheduler = WarmupCosineLR(optimizer, warmup, final, total_steps=total)
    for t in range(total + 3):
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(
            [base * formula(t, total, warmup, final) for base in (0.1, 2.0)]
        )
        optimizer.step()
        scheduler.step()


def test_total_steps_told_later() -> None:
    early, late = (SGD([nn.Parameter(torch.zeros(1))], lr=0.1) for _ in range(2))
    known, told = WarmupCosineLR(early, 0.2, total_steps=20), WarmupCosineLR(late, 0.2)
    told.set_total_steps(20)
    for _ in range(20):
        assert early.param_groups[0]["lr"] == late.param_groups[0]["lr"]
        assert known.get_last_lr() == told.get_last_lr()
        for optimizer, scheduler in ((early, known), (late, told)):
            optimizer.step()
            scheduler.step()


@pytest.mark.parametrize("setting", [{"warmup": 1.0}, {"warmup": -0.1}, {"final_factor": 1.5}])
def test_impossible_settings(setting: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(setting))):
        WarmupCosineLR(SGD([nn.Parameter(torch.zeros(1))], lr=0.1), **setting)


class Line(LightningModule):
    """Logs its learning rate at each optimizer step."""

    def __init__(self, lr_scheduler: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.lr_scheduler = lr_scheduler
        self.rates: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = (self.weight * batch).square().mean()
        self.log("loss", loss, on_epoch=True)
        self.log("flat", 1.0, on_epoch=True)
        return loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])

    def configure_optimizers(self) -> Any:
        return configure_optimizer(self, lambda params: SGD(params, lr=0.1), self.lr_scheduler)


def fit(model: Line, folder: Path, checkpoint: Path | None = None, callbacks: list[Callback] | None = None, **settings: Any) -> Line:
    trainer = Trainer(
        **{
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "max_epochs": 3,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": bool(callbacks),
            "default_root_dir": folder,
            **settings,
        },
        callbacks=callbacks,
    )
    trainer.fit(model, DataLoader(torch.ones(BATCHES, 1), batch_size=1), ckpt_path=checkpoint, weights_only=False if checkpoint else None)
    return model


def warmup_cosine(optimizer: Any) -> WarmupCosineLR:
    return WarmupCosineLR(optimizer, warmup=0.25, final_factor=0.1)


@pytest.mark.parametrize("epochs", [1, 3])
@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_follows_the_trainer(epochs: int, accumulate: int, tmp_path: Path) -> None:
    model = fit(Line(warmup_cosine), tmp_path, max_epochs=epochs, accumulate_grad_batches=accumulate)
    total = epochs * math.ceil(BATCHES / accumulate)
    assert model.rates == pytest.approx([0.1 * formula(t, total, 0.25, 0.1) for t in range(total)])


def test_follows_max_steps(tmp_path: Path) -> None:
    model = fit(Line(warmup_cosine), tmp_path, max_epochs=-1, max_steps=8)
    assert model.rates == pytest.approx([0.1 * formula(t, 8, 0.25, 0.1) for t in range(8)])


def test_endless_training_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"max_epochs or trainer\.max_steps"):
        fit(Line(warmup_cosine), tmp_path, max_epochs=-1)


def test_cyclic_counts_batches(tmp_path: Path) -> None:
    model = fit(Line(lambda optimizer: CyclicLR(optimizer, 0.1, 0.5, step_size_up=4)), tmp_path)
    up = [0.1 + 0.1 * t for t in range(4)]
    cycle = [*up, *(0.6 - rate for rate in up)]
    assert model.rates == pytest.approx((cycle * 3)[: 3 * BATCHES])


def test_one_cycle_counts_batches(tmp_path: Path) -> None:
    model = fit(Line(lambda optimizer: OneCycleLR(optimizer, 0.5, total_steps=3 * BATCHES)), tmp_path)
    assert len(set(model.rates)) == 3 * BATCHES


def test_step_counts_epochs(tmp_path: Path) -> None:
    model = fit(Line(lambda optimizer: StepLR(optimizer, 1, gamma=0.5)), tmp_path)
    assert model.rates == pytest.approx([0.1] * BATCHES + [0.05] * BATCHES + [0.025] * BATCHES)


def test_plateau_watches_its_monitor(tmp_path: Path) -> None:
    model = fit(Line(lambda optimizer: ReduceLROnPlateau(optimizer, monitor="flat", patience=0, factor=0.5)), tmp_path)
    assert model.rates == pytest.approx([0.1] * 2 * BATCHES + [0.05] * BATCHES)


def test_no_scheduler(tmp_path: Path) -> None:
    assert fit(Line(None), tmp_path).rates == [0.1] * 3 * BATCHES


@pytest.mark.parametrize("scheduler", [warmup_cosine, lambda optimizer: CyclicLR(optimizer, 0.1, 0.5, step_size_up=4)])
def test_resume_goes_on(scheduler: Any, tmp_path: Path) -> None:
    whole = fit(Line(scheduler), tmp_path, callbacks=[ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)])
    for epoch in (0, 1):
        resumed = fit(Line(scheduler), tmp_path, tmp_path / f"epoch={epoch}.ckpt")
        assert resumed.rates == whole.rates[(epoch + 1) * BATCHES :]
        assert torch.equal(resumed.weight, whole.weight)


def test_a_longer_training_goes_on_with_its_own_rates(tmp_path: Path) -> None:
    fit(Line(warmup_cosine), tmp_path, callbacks=[ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)], max_epochs=2)
    resumed = fit(Line(warmup_cosine), tmp_path, tmp_path / "epoch=1.ckpt", max_epochs=5)
    assert resumed.rates == fit(Line(warmup_cosine), tmp_path, max_epochs=5).rates[2 * BATCHES :]


@pytest.mark.parametrize(("name", "made"), [("sgd", SGD), ("adan", timm.optim.Adan), ("lookahead_radam", timm.optim.Lookahead)])
def test_timm_optimizers_by_name(name: str, made: type) -> None:
    """The object is timm's own, with its groups, and a scheduler knows it."""
    weights = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = TimmOptimizer([{"params": weights[:1]}, {"params": weights[1:], "lr": 0.5}], name, lr=0.1, weight_decay=0.01)
    assert type(optimizer) is made
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(0.1, 0.01), (0.5, 0.01)]
    scheduler = WarmupCosineLR(optimizer, total_steps=4)
    for _ in range(2):
        sum(weight.square().sum() for weight in weights).backward()  # type: ignore[union-attr]  # a sum of tensors
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[1]["lr"] == pytest.approx(0.25)
    assert float(weights[0].max()) < 1


def test_timm_optimizers_that_do_not_exist() -> None:
    weights = [nn.Parameter(torch.ones(2))]
    assert type(TimmOptimizer(weights, "AdamW")) is torch.optim.AdamW
    with pytest.raises(ValueError, match="no optimizer 'adann'; did you mean adan"):
        TimmOptimizer(weights, "adann")
    with pytest.raises(ValueError, match="'adan' does not take these options"):
        TimmOptimizer(weights, "adan", lr=0.1, options={"colour": "red"})
