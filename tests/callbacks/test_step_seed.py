"""StepSeed: what is drawn in a step depends on the step alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from litzoo.callbacks import StepSeed

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


class Draws(LightningModule):
    """Writes down what it draws; `spend` draws more on the side."""

    def __init__(self, spend: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.spend = spend
        self.draws: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.draws.append(float(torch.rand(1)))
        torch.rand(self.spend)
        return self.weight.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def draws(folder: Path, *callbacks: StepSeed, spend: int = 0, **settings: Any) -> list[float]:
    model = Draws(spend)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(
        accelerator="cpu", devices=1, default_root_dir=folder, callbacks=list(callbacks), **{"max_epochs": 2, **quiet, **settings}
    )
    trainer.fit(model, DataLoader(torch.zeros(4, 1)))
    return model.draws


def test_draws_depend_on_the_step_alone(tmp_path: Path) -> None:
    first = draws(tmp_path, StepSeed(1))
    torch.manual_seed(99)
    assert draws(tmp_path, StepSeed(1), spend=17) == first
    assert len(set(first)) == 8, "batches and epochs draw different numbers"
    assert draws(tmp_path, StepSeed(1), max_epochs=3)[:8] == first
    assert not set(draws(tmp_path, StepSeed(2))) & set(first)


def test_control_without_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    first = draws(tmp_path)
    torch.manual_seed(0)
    assert draws(tmp_path, spend=17) != first


def test_seed_is_taken_from_seed_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert draws(tmp_path, StepSeed()) == draws(tmp_path, StepSeed(0))
    monkeypatch.setenv("PL_GLOBAL_SEED", "5")
    assert draws(tmp_path, StepSeed()) == draws(tmp_path, StepSeed(5))


def test_processes_draw_different_noise() -> None:
    class Stub:
        current_epoch = 0

        def __init__(self, rank: int) -> None:
            self.global_rank = rank

    drawn = []
    for rank in range(4):
        StepSeed(1).on_train_batch_start(Stub(rank), Draws(), None, 0)  # type: ignore[arg-type]
        drawn.append(float(torch.rand(1)))
    assert len(set(drawn)) == 4


def test_seeds_of_neighbouring_steps_are_uncorrelated() -> None:
    class Stub:
        global_rank = 0
        current_epoch = 0

    module, drawn = Draws(), []
    for epoch in range(20):
        Stub.current_epoch = epoch
        for batch in range(50):
            StepSeed(0).on_train_batch_start(Stub(), module, None, batch)  # type: ignore[arg-type]
            drawn.append(float(torch.rand(1)))
    assert len(set(drawn)) == 1000
    x = torch.tensor(drawn)
    assert abs(float(torch.corrcoef(torch.stack([x[1:], x[:-1]]))[0, 1])) < 0.13
    assert abs(float(x.mean()) - 0.5) < 0.04


def test_it_has_no_state() -> None:
    assert StepSeed(1).state_dict() == {}
