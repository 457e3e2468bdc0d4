"""The mean of the best checkpoints: its weights, its statistics, and a training that does not notice."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from matrix import Loader, Net, batches, make_trainer
from torch import Tensor

from litzoo.callbacks import EMA, CheckpointAverage, StepSeed

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def train(
    folder: Path, *extra: Any, norm: bool = True, resume: Path | None = None, **settings: Any
) -> tuple[Net, ModelCheckpoint, Trainer]:
    keeper = ModelCheckpoint(folder / "best", "{epoch}", monitor="val/loss", save_top_k=3, save_last=True)
    trainer = make_trainer(folder, StepSeed(1), keeper, *extra, **{"enable_checkpointing": True, "max_epochs": 4, **settings})
    model = Net(norm=norm)
    trainer.fit(model, Loader(batches(0)), Loader(batches(9, 2)), ckpt_path=resume, weights_only=None if resume is None else True)
    return model, keeper, trainer


def mean_of(keeper: ModelCheckpoint) -> dict[str, Tensor]:
    states = [torch.load(path, weights_only=True)["state_dict"] for path in keeper.best_k_models]
    assert len(states) == 3
    return {name: torch.stack([state[name].double() for state in states]).mean(dim=0) for name in states[0]}


@pytest.mark.parametrize("averaged", [False, True])
@pytest.mark.parametrize("norm", [False, True])
def test_mean_of_the_best_with_statistics_of_its_own(norm: bool, averaged: bool, tmp_path: Path) -> None:
    more = [EMA(0.5)] if averaged else []
    callback = CheckpointAverage(reference_loader=batches(5, 4))
    model, keeper, _ = train(tmp_path / "with", *more, callback, norm=norm)
    plain, _, _ = train(tmp_path / "without", *more, norm=norm)
    for name, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), f"the training noticed: {name}"

    assert callback.average_path == tmp_path / "with" / "best" / "average.ckpt"
    assert sorted(path.suffix for path in callback.average_path.parent.iterdir()) == [".ckpt"] * 5, "no temporary file"
    written, expected = torch.load(callback.average_path, weights_only=True), mean_of(keeper)
    assert "optimizer_states" not in written
    for name, value in written["state_dict"].items():
        if "running" not in name and value.is_floating_point():
            torch.testing.assert_close(value.double(), expected[name], rtol=1e-6, atol=1e-7)
    twin = Net(norm=norm)
    twin.load_state_dict(written["state_dict"])
    if norm:
        outputs = [twin.first(x) for x, _ in batches(5, 4)]
        mean = torch.stack([output.mean(dim=0) for output in outputs]).mean(dim=0)
        variance = torch.stack([output.var(dim=0) for output in outputs]).mean(dim=0)
        torch.testing.assert_close(twin.norm[0].running_mean, mean)  # type: ignore[index]  # a Sequential
        torch.testing.assert_close(twin.norm[0].running_var, variance)  # type: ignore[index]  # a Sequential
    scores = make_trainer(tmp_path).test(
        Net(norm=norm), Loader(batches(9, 2)), ckpt_path=callback.average_path, verbose=False, weights_only=True
    )
    assert scores[0]["test/loss"] > 0


def test_a_resumed_training_writes_it_anew(tmp_path: Path) -> None:
    first = CheckpointAverage()
    _, keeper, _ = train(tmp_path, first, norm=False, max_epochs=3)
    again = CheckpointAverage()
    _, keeper, _ = train(tmp_path, again, norm=False, max_epochs=6, resume=Path(keeper.last_model_path))
    assert again.average_path == first.average_path
    written = torch.load(again.average_path, weights_only=True)["state_dict"]  # type: ignore[arg-type]  # it was written
    for name, value in mean_of(keeper).items():
        if value.is_floating_point():
            torch.testing.assert_close(written[name].double(), value, rtol=1e-6, atol=1e-7)


def test_nothing_to_average_is_told(tmp_path: Path) -> None:
    callback = CheckpointAverage()
    trainer = make_trainer(tmp_path, callback, ModelCheckpoint(tmp_path, save_top_k=1, monitor="val/loss"), enable_checkpointing=True)
    with pytest.warns(UserWarning, match=re.escape("add ModelCheckpoint(monitor=..., save_top_k=3)")):
        trainer.fit(Net(), Loader(batches(0)), Loader(batches(9, 2)))
    assert callback.average_path is None
    with pytest.raises(ValueError, match="batch_norm_batches must be at least 1"):
        CheckpointAverage(batch_norm_batches=0)
    with pytest.raises(TypeError, match="gone through once only"):
        CheckpointAverage(iter([]))


SCRIPT = """
import sys, torch
from pathlib import Path
from litzoo.callbacks import CheckpointAverage
from test_checkpoint_average import train
from matrix import batches
callback = CheckpointAverage(batches(5, 4))
model, keeper, trainer = train(Path(sys.argv[1] + "_run"), callback, strategy="ddp", devices=2, use_distributed_sampler=False)
torch.save((str(callback.average_path), list(keeper.best_k_models)), f"{sys.argv[1]}_{trainer.global_rank}.pt")
"""


def test_two_processes_write_one(tmp_path: Path, two_processes: Callable[..., None]) -> None:
    script = tmp_path / "train.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n{SCRIPT}")
    two_processes(script, tmp_path / "result")
    (first, paths), (second, _) = (torch.load(tmp_path / f"result_{rank}.pt") for rank in range(2))
    assert first == second
    states = [torch.load(path, weights_only=True)["state_dict"] for path in paths]
    written = torch.load(first, weights_only=True)["state_dict"]
    torch.testing.assert_close(written["last.weight"], torch.stack([state["last.weight"] for state in states]).mean(dim=0))
    assert not torch.equal(written["norm.0.running_mean"], torch.stack([state["norm.0.running_mean"] for state in states]).mean(dim=0))
