"""DecisionBoundaryPlot: a picture of the evaluated points, in any project with two features."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from litzoo.callbacks import DecisionBoundaryPlot
from litzoo.zoo import LogisticRegression

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


class Plain(LightningModule):
    """Somebody's classifier of three classes, with a layer that is frozen in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2).eval()
        self.linear = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None: ...

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loader(features: int = 2, classes: int = 3, samples: int = 40, seed: int = 0) -> DataLoader:
    generator = torch.Generator().manual_seed(seed)
    x, label = torch.randn(samples, features, generator=generator), torch.randint(classes, (samples,), generator=generator)
    return DataLoader(TensorDataset(x, label), batch_size=16)


def make_trainer(folder: Path, callback: DecisionBoundaryPlot, **settings: Any) -> Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    common: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "max_epochs": 2, "default_root_dir": folder, **quiet}
    return Trainer(callbacks=[callback], **{**common, **settings})


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What is drawn, with the model's probabilities of its points."""
    from litzoo.zoo.plots import decision_boundary

    seen: list[dict[str, Any]] = []
    draw = decision_boundary.plot_decision_boundary

    def spy(points: np.ndarray, label: np.ndarray, predict: Any, class_names: list[str], axis_names: Any) -> Any:
        probabilities = predict(torch.from_numpy(points))
        seen.append({"points": points, "label": label, "probabilities": probabilities, "names": class_names, "axes": axis_names})
        return draw(points, label, predict, class_names, axis_names)

    monkeypatch.setattr(decision_boundary, "plot_decision_boundary", spy)
    return seen


def is_picture(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("settings", [{}, {"precision": "bf16-mixed", "accumulate_grad_batches": 2}])
def test_end_of_fit_and_test(settings: dict[str, Any], tmp_path: Path, drawn: list[dict[str, Any]]) -> None:
    model, callback = Plain(), DecisionBoundaryPlot(("age", "size"), class_names=["a", "b", "c"])
    trainer = make_trainer(tmp_path, callback, **settings)
    trainer.fit(model, loader(seed=1), [loader(seed=2), loader(seed=3)])
    assert is_picture(tmp_path / "decision_boundary_val.png")
    assert len(drawn) == 1, "once, at the end"
    x, label = loader(seed=2).dataset.tensors  # type: ignore[attr-defined]
    assert (drawn[0]["points"] == x.numpy()).all()
    assert (drawn[0]["label"] == label.numpy()).all()
    assert (drawn[0]["names"], drawn[0]["axes"]) == (["a", "b", "c"], ("age", "size"))
    with torch.no_grad():
        expected = model.eval()(x).softmax(dim=1)
    torch.testing.assert_close(drawn[0]["probabilities"], expected, rtol=0, atol=0.02 if settings else 1e-6)

    trainer.test(model, loader(seed=4), verbose=False)
    assert is_picture(tmp_path / "decision_boundary_test.png")
    assert (drawn[1]["points"] == loader(seed=4).dataset.tensors[0].numpy()).all()  # type: ignore[attr-defined]


def test_leaves_the_modes_of_the_layers_alone(tmp_path: Path) -> None:
    class Modes(DecisionBoundaryPlot):
        def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            before = [module.training for module in pl_module.modules()]
            super().on_train_end(trainer, pl_module)
            assert [module.training for module in pl_module.modules()] == before
            assert len(set(before)) == 2

    make_trainer(tmp_path, Modes()).fit(Plain(), loader(), loader())
    assert is_picture(tmp_path / "decision_boundary_val.png")


def test_two_fits_with_one_object(tmp_path: Path, drawn: list[dict[str, Any]]) -> None:
    callback = DecisionBoundaryPlot()
    make_trainer(tmp_path / "first", callback).fit(Plain(), loader(), loader())
    model = LogisticRegression(class_names=["benign", "malignant"])
    make_trainer(tmp_path / "second", callback).fit(model, loader(classes=2), loader(classes=2, samples=30))
    assert len(drawn[1]["points"]) == 30
    assert drawn[1]["names"] == ["benign", "malignant"]
    # A fit without validation has nothing to draw, not even what the last one left.
    make_trainer(tmp_path / "third", callback, limit_val_batches=0).fit(Plain(), loader())
    assert len(drawn) == 2


def test_validate_alone(tmp_path: Path) -> None:
    make_trainer(tmp_path, DecisionBoundaryPlot()).validate(Plain(), loader(), verbose=False)
    assert is_picture(tmp_path / "decision_boundary_val.png")


def test_fast_dev_run_writes_nothing(tmp_path: Path, drawn: list[dict[str, Any]]) -> None:
    make_trainer(tmp_path, DecisionBoundaryPlot(), fast_dev_run=True).fit(Plain(), loader(), loader())
    assert drawn == []


def test_mistakes(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, DecisionBoundaryPlot())
    with pytest.raises(ValueError, match=r"inputs of two features, shape \(batch, 2\); these have \(16, 3\)"):
        trainer.validate(LogisticRegression(num_features=3, num_classes=3), loader(features=3), verbose=False)

    class Regression(Plain):
        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x)[:, :1]

    with pytest.raises(ValueError, match="Regression is no classifier"):
        make_trainer(tmp_path, DecisionBoundaryPlot()).validate(Regression(), loader(), verbose=False)
