"""PartPlot: the table equals scikit-learn's Jaccard index of each part; also the script of its two processes."""

import csv
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from sklearn.metrics import jaccard_score
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from litzoo.callbacks import PartPlot
from litzoo.zoo import PointNetSegmenter
from litzoo.zoo.plots import parts
from litzoo.zoo.plots.figures import new_figure

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
NAMES = ["leg", "seat", "blade", "handle", "never there"]


class Heights(LightningModule):
    """Somebody's segmenter: of two parts of each class, the upper one lies above a fixed height."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.mse_loss(self.linear(batch[0][..., :1]).squeeze(-1), batch[2].float())

    def _evaluate(self, batch: Any) -> dict[str, Tensor]:
        points, label, part = batch
        return {"part": part, "part_prediction": 2 * label[:, None] + (points[..., 1] > 0.1).long(), "label": label}

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        return self._evaluate(batch)

    def test_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        return self._evaluate(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def dataset() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    points, label = torch.rand(10, 40, 3, generator=generator) * 2 - 1, torch.arange(10) % 2
    part = 2 * label[:, None] + (points[..., 1] > 0).long()
    part[:, ::7] = -1
    return TensorDataset(points, label, part)


def make_trainer(folder: Path, **settings: Any) -> Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    common: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "default_root_dir": folder, **quiet}
    return Trainer(callbacks=[PartPlot(part_names=NAMES)], **{**common, **settings})


def check(path: Path) -> None:
    points, label, part = dataset().tensors
    found = 2 * label[:, None] + (points[..., 1] > 0.1).long()
    known = part >= 0
    expected = jaccard_score(part[known].numpy(), found[known].numpy(), average=None)
    with path.open(encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["part", "iou", "points"]
    assert [row[0] for row in rows[1:]] == NAMES[:4]
    assert [float(row[1]) for row in rows[1:]] == pytest.approx(expected.tolist(), abs=1e-12)
    assert [int(row[2]) for row in rows[1:]] == torch.bincount(part[known]).tolist()


def test_the_table_and_the_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loader = DataLoader(dataset(), batch_size=4)
    make_trainer(tmp_path).test(Heights(), loader, verbose=False)
    check(tmp_path / "part_iou_test.csv")
    printed = capsys.readouterr().out
    assert "blade" in printed
    assert "never there" not in printed
    with Image.open(tmp_path / "parts_test.png") as image:
        assert min(image.size) > 300


def test_fit_draws_once_at_its_end_and_validate_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loader = DataLoader(dataset(), batch_size=4)
    make_trainer(tmp_path, max_epochs=2).fit(Heights(), loader, loader)
    assert {path.name for path in tmp_path.iterdir()} == {"parts_val.png"}
    assert "blade" not in capsys.readouterr().out
    make_trainer(tmp_path / "validate").validate(Heights(), loader, verbose=False)
    check(tmp_path / "validate" / "part_iou_val.csv")
    assert (tmp_path / "validate" / "parts_val.png").is_file()


def test_an_object_without_any_known_part_has_no_share_of_right_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    titles: list[str] = []
    draw = parts.plot_part_labels

    def spy(*arguments: Any) -> Any:
        titles.extend(arguments[3])
        return draw(*arguments)

    monkeypatch.setattr(parts, "plot_part_labels", spy)
    points, label, part = dataset().tensors
    unknown = part.where(label[:, None] == 1, -1)
    make_trainer(tmp_path).test(Heights(), DataLoader(TensorDataset(points, label, unknown), 4), verbose=False)
    assert titles[0] == "0"
    assert titles[1].endswith("% right")


def test_names_of_more_classes_than_there_are_objects_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    titles: list[str] = []
    monkeypatch.setattr(parts, "plot_part_labels", lambda *arguments: titles.extend(arguments[3]) or new_figure(1, 1))
    trainer = make_trainer(tmp_path)
    trainer.callbacks = [PartPlot(class_names=["chair", "knife", "lamp"])]  # type: ignore[attr-defined]  # Lightning sets it in a connector
    trainer.test(Heights(), DataLoader(dataset(), 4), verbose=False)
    assert [title.splitlines()[0] for title in titles] == ["chair", "knife"]


def test_fast_dev_run_writes_nothing(tmp_path: Path) -> None:
    make_trainer(tmp_path, fast_dev_run=True).fit(Heights(), DataLoader(dataset(), 4), DataLoader(dataset(), 4))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "64-true"])
def test_with_the_segmenter_of_litzoo(precision: str, tmp_path: Path) -> None:
    model = PointNetSegmenter(2, 4, [0, 0, 1, 1], network="semantic", class_names=["chair", "knife"])
    loader = DataLoader(dataset(), batch_size=4)
    trainer = make_trainer(tmp_path, precision=precision, accumulate_grad_batches=2)
    trainer.fit(model, loader, loader)
    trainer.test(model, loader, verbose=False)
    assert {path.name for path in tmp_path.iterdir()} == {"parts_val.png", "parts_test.png", "part_iou_test.csv"}


def test_other_models_are_refused(tmp_path: Path) -> None:
    class Silent(Heights):
        def test_step(self, batch: Any, batch_idx: int) -> Any: ...

    with pytest.raises(ValueError, match="needs the parts that Silent finds"):
        make_trainer(tmp_path).test(Silent(), DataLoader(dataset(), 4), verbose=False)
    with pytest.raises(ValueError, match="objects must be at least 1"):
        PartPlot(objects=0)


def test_two_processes_equal_one(tmp_path: Path, two_processes: Callable[..., None]) -> None:
    two_processes(Path(__file__), tmp_path)
    check(tmp_path / "part_iou_test.csv")


if __name__ == "__main__":
    make_trainer(Path(sys.argv[1]), devices=2, strategy="ddp").test(Heights(), DataLoader(dataset(), batch_size=2), verbose=False)
