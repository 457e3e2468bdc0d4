"""The mean of the best checkpoints: its weights, its statistics, and a training that does not notice."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import SingleDeviceStrategy
from matrix import Loader, Net, batches, make_trainer
from torch import Tensor

from litzoo.callbacks import EMA, CheckpointAverage, StepSeed
from litzoo.zoo.layers.feature_queue import FeatureQueue

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


class Odd(Net):
    """What modules of others do: hyper-parameters that are objects, weights that are left out, a queue, metrics that are saved."""

    def __init__(self, where: Path) -> None:
        super().__init__(norm=True)
        self.save_hyperparameters()
        self.queue = FeatureQueue(2, 4)
        self.accuracy.persistent(True)

    def forward(self, x: Tensor) -> Tensor:
        self.accuracy.tp += 1
        return super().forward(x)

    def on_train_epoch_start(self) -> None:
        self.queue.write(torch.eye(2)[:1], torch.tensor([self.current_epoch]))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        del checkpoint["state_dict"]["last.bias"]


def test_checkpoints_of_others(tmp_path: Path) -> None:
    """What cannot be averaged is that of the newest one, although 10 sorts before 9; one that was deleted by hand is left out."""

    class Delete(Callback):
        def on_train_end(self, *_: Any) -> None:
            Path(next(iter(keeper.best_k_models))).unlink()

    keeper = ModelCheckpoint(tmp_path, "{epoch}", monitor="epoch", mode="max", save_top_k=3)
    callback = CheckpointAverage(reference_loader=batches(5, 4))
    trainer = make_trainer(tmp_path, keeper, Delete(), callback, enable_checkpointing=True, max_epochs=11)
    trainer.fit(Odd(tmp_path), Loader(batches(0)), Loader(batches(9, 2)))
    written = torch.load(tmp_path / "average.ckpt", weights_only=False)
    before, newest = (torch.load(tmp_path / f"epoch={epoch}.ckpt", weights_only=False) for epoch in (9, 10))
    assert written["epoch"] == 10
    assert written["hyper_parameters"] == {"where": tmp_path}
    weights = written["state_dict"]
    assert weights["queue._extra_state"]["labels"].tolist() == newest["state_dict"]["queue._extra_state"]["labels"].tolist()
    assert torch.equal(weights["accuracy.tp"], newest["state_dict"]["accuracy.tp"])
    assert weights.keys() == newest["state_dict"].keys()
    name = "last.weight"
    torch.testing.assert_close(weights[name], (before["state_dict"][name] + newest["state_dict"][name]) / 2)
    assert not torch.equal(weights["norm.0.running_mean"], newest["state_dict"]["norm.0.running_mean"])


@pytest.mark.parametrize("fault", ["truncated", "one left", "cannot be written"])
def test_a_fault_at_the_end_is_told_and_loses_nothing(fault: str, tmp_path: Path) -> None:
    class Spoil(Callback):
        def on_train_end(self, *_: Any) -> None:
            paths = [Path(path) for path in keeper.best_k_models]
            if fault == "truncated":
                paths[1].write_bytes(paths[1].read_bytes()[:900])
            elif fault == "one left":
                for path in paths[1:]:
                    path.unlink()
            else:
                (tmp_path / "average.ckpt").mkdir()

    keeper = ModelCheckpoint(tmp_path, "{epoch}", monitor="val/loss", save_top_k=3)
    callback = CheckpointAverage()
    trainer = make_trainer(tmp_path, keeper, Spoil(), callback, enable_checkpointing=True)
    words = {"truncated": "is truncated", "one left": "a mean needs two", "cannot be written": "could not be written to"}
    with pytest.warns(UserWarning, match=f"CheckpointAverage wrote no mean: .*{words[fault]}"):
        trainer.fit(Net(norm=True), Loader(batches(0)), Loader(batches(9, 2)))
    assert trainer.state.finished
    assert callback.average_path is None
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".") or (path.name == "average.ckpt" and path.is_file())]


def test_it_is_made_where_the_training_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning moves the module off its device before `on_fit_end`; a training that was over when it was resumed has that hook only."""
    made = []
    monkeypatch.setattr(SingleDeviceStrategy, "teardown", lambda *_: made.append(callback.average_path))
    callback = CheckpointAverage()
    _, keeper, _ = train(tmp_path, callback)
    assert made == [tmp_path / "best" / "average.ckpt"]
    made[0].unlink()
    train(tmp_path, callback, resume=Path(keeper.last_model_path))
    assert callback.average_path == made[0]
    assert made[0].is_file()


@pytest.mark.parametrize("number", [1, -1])
def test_nothing_to_average_is_told(number: int, tmp_path: Path) -> None:
    """A single one, or all, are no choice of the best."""
    callback, keeper = CheckpointAverage(), ModelCheckpoint(tmp_path, save_top_k=number, monitor="val/loss")
    trainer = make_trainer(tmp_path, callback, keeper, enable_checkpointing=True)
    with pytest.warns(UserWarning, match=re.escape("add ModelCheckpoint(monitor=..., save_top_k=3)")):
        trainer.fit(Net(), Loader(batches(0)), Loader(batches(9, 2)))
    assert callback.average_path is None
    with pytest.raises(ValueError, match="batch_norm_batches must be at least 1"):
        CheckpointAverage(batch_norm_batches=0)
    with pytest.raises(TypeError, match="iterated over only once"):
        CheckpointAverage(iter([]))


def run_rank(folder: Path) -> None:
    """One of two processes; they train on the same batches."""
    callback = CheckpointAverage(batches(5, 4))
    _, keeper, trainer = train(folder, callback, strategy="ddp", devices=2, use_distributed_sampler=False)
    torch.save((str(callback.average_path), list(keeper.best_k_models)), folder / f"rank_{trainer.global_rank}.pt")


@pytest.mark.slow
def test_two_processes_write_one(rank_folder: Path) -> None:
    (first, paths), (second, _) = (torch.load(rank_folder / f"rank_{rank}.pt") for rank in range(2))
    assert first == second
    states = [torch.load(path, weights_only=True)["state_dict"] for path in paths]
    written = torch.load(first, weights_only=True)["state_dict"]
    torch.testing.assert_close(written["last.weight"], torch.stack([state["last.weight"] for state in states]).mean(dim=0))
    assert not torch.equal(written["norm.0.running_mean"], torch.stack([state["norm.0.running_mean"] for state in states]).mean(dim=0))
