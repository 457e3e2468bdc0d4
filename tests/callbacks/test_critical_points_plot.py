"""CriticalPointsPlot: which clouds it draws, that the sets are those of the model, and that it changes nothing.

The conditions are those of the callback matrix, on a PointNet, because it refuses every other module.
"""

import contextlib
import pickle
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from matrix import Net, make_trainer
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from litzoo.callbacks import CriticalPointsPlot, StepSeed
from litzoo.zoo import Batch, PointNetClassifier
from litzoo.zoo.plots import critical_points as plots

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
NAMES = ["chair", "lamp", "table"]


class Partly(PointNetClassifier):
    """With a part that stays in evaluation mode while the rest trains, and several validation loaders."""

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:  # type: ignore[override]
        return super().validation_step(batch, batch_idx)

    def on_train_start(self) -> None:
        self.backbone.local.eval()


def small(kind: type[PointNetClassifier] = PointNetClassifier) -> PointNetClassifier:
    torch.manual_seed(0)
    return kind(3, NAMES, input_transform=False, feature_transform=False)


def clouds(seed: int = 0, samples: int = 12) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    points = torch.rand(samples, 300, 3, generator=generator) * 2 - 1
    return TensorDataset(points, torch.arange(samples) // 2 % 3)


def loader(seed: int = 0, dtype: torch.dtype = torch.float32, as_batch: bool = False) -> DataLoader:
    points, label = clouds(seed).tensors

    def collate(samples: list[tuple[Tensor, Tensor]]) -> Any:
        x, y = (torch.stack(parts) for parts in zip(*samples, strict=True))
        return Batch(x, y, torch.arange(len(y))) if as_batch else (x, y)

    return DataLoader(TensorDataset(points.to(dtype), label), batch_size=4, collate_fn=collate)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    seen: list[dict[str, Any]] = []
    draw = plots.plot_critical_points

    def spy(clouds: Any, critical: Any, upper: Any, titles: Any, pictures: Any = None) -> Any:
        seen.append({"clouds": clouds, "critical": critical, "upper": upper, "titles": titles})
        return draw(clouds, critical, upper, titles, pictures)

    monkeypatch.setattr(plots, "plot_critical_points", spy)
    return seen


def make(**settings: Any) -> CriticalPointsPlot:
    return CriticalPointsPlot(**{"resolution": 5, **settings})


@pytest.mark.parametrize(
    ("settings", "dtype"),
    [
        ({}, torch.float32),
        ({"precision": "bf16-mixed", "accumulate_grad_batches": 2}, torch.float32),
        ({"precision": "64-true"}, torch.float64),
        ({"precision": "bf16-true"}, torch.bfloat16),
    ],
)
def test_end_of_fit_and_test(settings: dict[str, Any], dtype: torch.dtype, tmp_path: Path, drawn: list[dict[str, Any]]) -> None:
    model = small(Partly)
    trainer = make_trainer(tmp_path, make(), max_epochs=2, **settings)
    trainer.fit(model, loader(1, dtype, as_batch=True), [loader(2, dtype, as_batch=True), loader(3, dtype, as_batch=True)])
    assert len(drawn) == 1, "once, at the end"
    assert (tmp_path / "critical_points_val.png").read_bytes().startswith(b"\x89PNG")
    wanted = clouds(2).tensors[0][::2][:3]
    np.testing.assert_allclose(np.stack(drawn[0]["clouds"]), wanted.numpy(), atol=0 if dtype != torch.bfloat16 else 0.01)

    # Without the other points the model says the same.
    model = model.eval().double()
    for cloud, critical, title in zip(drawn[0]["clouds"], drawn[0]["critical"], drawn[0]["titles"], strict=True):
        assert 0 < len(critical) < len(cloud), "not every point"
        points = torch.from_numpy(cloud)[None]
        with torch.no_grad():
            whole, kept = model(points), model(points[:, critical])
        if dtype != torch.bfloat16:
            torch.testing.assert_close(whole, kept, atol=1e-4, rtol=0)
        guess = NAMES[int(whole.argmax())]
        assert title.splitlines()[0] == guess
        assert title.splitlines()[1] in (f"{share}%" for share in range(30, 101))

    trainer.test(small(), loader(4, dtype), verbose=False)
    assert (tmp_path / "critical_points_test.png").is_file()
    assert len(drawn) == 2


def test_what_is_wrong_and_options(tmp_path: Path, drawn: list[dict[str, Any]]) -> None:
    model = small()
    with torch.no_grad():
        model.head[-1].bias.copy_(torch.tensor([0.0, 50.0, 0.0]))  # type: ignore[union-attr, operator]
    callback = make(clouds=2, upper_bound=False, class_names=["a", "b", "c"])
    make_trainer(tmp_path, callback).validate(model, loader(), verbose=False)
    assert (tmp_path / "critical_points_val.png").is_file()
    assert drawn[0]["titles"] == ["b\n100%\nis: a", "b\n100%"]
    assert drawn[0]["upper"] is None
    make_trainer(tmp_path / "third", callback, limit_val_batches=0, max_epochs=1).fit(model, loader())
    make_trainer(tmp_path / "fast", callback, fast_dev_run=True).fit(model, loader(), loader())
    assert len(drawn) == 1, "nothing that the last run left, and nothing in a dry run"


def state(model: LightningModule) -> dict[str, Any]:
    return {**{name: value.clone() for name, value in model.state_dict().items()}, "modes": [part.training for part in model.modules()]}


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(torch.equal(value, other[name]) if isinstance(value, Tensor) else value == other[name] for name, value in one.items())


def test_changes_no_bit_and_survives_reuse(tmp_path: Path) -> None:
    """Training, modes of the layers and random numbers; one object, that was pickled, for two runs."""

    class Modes(Callback):
        def on_train_end(self, trainer: Any, pl_module: LightningModule) -> None:
            self.modes = [part.training for part in pl_module.modules()]

    def train(name: str, *made: Callback) -> dict[str, Any]:
        model, modes = small(Partly), Modes()
        trainer = make_trainer(tmp_path / name, StepSeed(1), *made, modes, max_epochs=2)
        trainer.fit(model, loader(1), loader(2))
        assert len(set(modes.modes)) == 2
        keys = sorted({*trainer.callback_metrics, *trainer.logged_metrics})
        return {**state(model), "modes at the end": modes.modes, "keys": keys, "random": torch.rand(3)}

    bare, callback = train("bare"), pickle.loads(pickle.dumps(make()))
    for name in ("first", "second"):
        assert same(bare, train(name, callback))
        assert (tmp_path / name / "critical_points_val.png").is_file()


def test_resume(tmp_path: Path, drawn: list[dict[str, Any]]) -> None:
    """The same end and the same picture as of a run that was not interrupted."""

    def run(folder: Path, resume: Path | None) -> dict[str, Any]:
        model = small()
        saver = ModelCheckpoint(folder, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
        trainer = make_trainer(folder, StepSeed(1), make(), saver, enable_checkpointing=True, max_epochs=2)
        trainer.fit(model, loader(1), loader(2), ckpt_path=resume, weights_only=None if resume is None else True)
        return state(model)

    whole = run(tmp_path / "whole", None)
    assert same(whole, run(tmp_path / "resumed", tmp_path / "whole" / "epoch=0.ckpt"))
    assert drawn[0]["titles"] == drawn[1]["titles"]
    assert all((one == other).all() for one, other in zip(drawn[0]["critical"], drawn[1]["critical"], strict=True))


def test_compile(tmp_path: Path) -> None:
    make_trainer(tmp_path, make(), max_epochs=1).fit(torch.compile(small(), backend="eager"), loader(1), loader(2))
    assert (tmp_path / "critical_points_val.png").is_file()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_exception_draws_nothing(error: type[BaseException], tmp_path: Path) -> None:
    class Fail(Callback):
        def on_validation_batch_end(self, trainer: Any, *_: Any) -> None:
            if not trainer.sanity_checking:
                raise error("on purpose")

    with pytest.raises(RuntimeError if error is RuntimeError else SystemExit):
        make_trainer(tmp_path, make(), Fail(), max_epochs=1).fit(small(), loader(1), loader(2))
    assert not list(tmp_path.glob("*.png"))


def test_refusals(tmp_path: Path) -> None:
    reason = re.escape(
        "CriticalPointsPlot draws PointNets (critical points belong to a PointNet, and Net has none as its backbone): use it"
    )
    with pytest.raises(MisconfigurationException, match=reason):
        make_trainer(tmp_path, make()).fit(Net(), loader(1), loader(2))
    with pytest.raises(ValueError, match="clouds must be at least 1, got 0"):
        CriticalPointsPlot(clouds=0)
    with pytest.raises(ValueError, match="resolution must be at least 2, got 1"):
        CriticalPointsPlot(resolution=1)

    class Tensors(PointNetClassifier):
        def validation_step(self, batch: Any, batch_idx: int) -> None: ...  # type: ignore[override]

        def on_validation_epoch_end(self) -> None: ...

    points = DataLoader(clouds().tensors[0], batch_size=4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"draws batches \(points, label\), these are Tensor"):
        make_trainer(tmp_path, make()).validate(Tensors(3), points, verbose=False)


# Two processes


def run_rank(folder: Path) -> None:
    """One of two processes, with clouds of its own: the picture, drawn by the first one alone, changes no weight of either."""
    import os

    rank = int(os.environ["RANK"])
    ends = []
    for made in ([], [make()]):
        model = small()
        trainer = make_trainer(
            folder / str(len(made)), StepSeed(1), *made, max_epochs=1, strategy="ddp", devices=2, use_distributed_sampler=False
        )
        trainer.fit(model, loader(rank), loader(5 + rank))
        trainer.test(model, loader(5 + rank), verbose=False)
        ends.append({name: value.clone() for name, value in model.named_parameters()})
    torch.save(ends, folder / f"rank_{rank}.pt")


@pytest.mark.slow
def test_two_processes(tmp_path: Path, two_processes: Callable[..., None]) -> None:
    two_processes(Path(__file__), tmp_path)
    (bare, made), (_, other) = (torch.load(tmp_path / f"rank_{rank}.pt", weights_only=True) for rank in range(2))
    assert same(bare, made)
    assert same(made, other)
    assert {path.name for path in (tmp_path / "1").glob("*.png")} == {"critical_points_val.png", "critical_points_test.png"}


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        run_rank(Path(sys.argv[1]))
