"""PerClassTable: the table equals scikit-learn's; `run_rank` is for two processes."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from sklearn import metrics
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from litzoo.callbacks import PerClassTable

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
NAMES = ["ant", "bee", "centipede", "never there"]


class Plain(LightningModule):
    """Somebody's classifier, whose steps return nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None: ...

    def test_step(self, batch: Any, batch_idx: int) -> None: ...

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def dataset() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(60, 4, generator=generator), torch.randint(3, (60,), generator=generator))


def make_trainer(folder: Path, **settings: Any) -> Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    common: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "default_root_dir": folder, **quiet}
    return Trainer(callbacks=[PerClassTable(class_names=NAMES)], **{**common, **settings})


def check(path: Path, model: Plain) -> None:
    """The CSV is scikit-learn's table; the mean is over the classes that have samples."""
    x, label = dataset().tensors
    with torch.no_grad():
        prediction = model(x).argmax(dim=1)
    with path.open(encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert header == ["class", "precision", "recall", "f1", "samples"]
    assert [row[0] for row in rows] == [*NAMES, "macro mean", "accuracy"]
    theirs = metrics.precision_recall_fscore_support(label, prediction, labels=range(4), zero_division=0)
    for name, column in zip(header[1:], range(1, 5), strict=True):
        assert [float(row[column]) for row in rows[:4]] == pytest.approx(theirs[column - 1].tolist()), name
    mean = metrics.precision_recall_fscore_support(label, prediction, labels=range(3), average="macro", zero_division=0)
    assert [float(value) for value in rows[4][1:4]] == pytest.approx(mean[:3])
    assert float(rows[5][3]) == pytest.approx(metrics.accuracy_score(label, prediction))
    assert rows[4][4] == rows[5][4] == "60"


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_equals_scikit_learn(stage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = Plain()
    getattr(make_trainer(tmp_path), stage)(model, DataLoader(dataset(), batch_size=8), verbose=False)
    check(tmp_path / f"per_class_{stage.replace('validate', 'val')}.csv", model)
    table = [line for line in capsys.readouterr().out.splitlines() if line]
    assert [line[: len("never there")].strip() for line in table if not line.startswith("-")] == ["class", *NAMES, "macro mean", "accuracy"]
    assert len(set(map(len, table))) == 1, "columns line up"


def test_classes_with_many_and_few_training_samples_have_a_mean_each(tmp_path: Path) -> None:
    model, folder = Plain(), tmp_path
    table = PerClassTable(class_names=NAMES, train_counts=[300, 7, 101, 100])
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(callbacks=[table], accelerator="cpu", devices=1, default_root_dir=folder, **quiet)  # type: ignore[arg-type]  # bools
    trainer.test(model, DataLoader(dataset(), batch_size=8), verbose=False)
    with (folder / "per_class_test.csv").open(encoding="utf-8") as file:
        rows = {row["class"]: row for row in csv.DictReader(file)}
    assert list(rows) == [*NAMES, "many (more than 100)", "few (fewer than 20)", "macro mean", "accuracy"], (
        "the class never there is medium"
    )
    for group, members in (("many (more than 100)", [0, 2]), ("few (fewer than 20)", [1])):
        recalls = [float(rows[NAMES[cls]]["recall"]) for cls in members]
        assert float(rows[group]["recall"]) == pytest.approx(sum(recalls) / len(recalls))
        assert int(rows[group]["samples"]) == sum(int(rows[NAMES[cls]]["samples"]) for cls in members)


def test_counts_for_other_classes_are_refused(tmp_path: Path) -> None:
    trainer = Trainer(callbacks=[PerClassTable(train_counts=[1, 2])], accelerator="cpu", logger=False, default_root_dir=tmp_path)
    with pytest.raises(ValueError, match="train_counts has 2 entries, but there are 4 classes"):
        trainer.test(Plain(), DataLoader(dataset(), batch_size=8), verbose=False)
    with pytest.raises(ValueError, match="0 <= few <= many"):
        PerClassTable(many=1, few=2)


@pytest.mark.parametrize("counts", [torch.tensor([300, 7, 101, 100]), {"ant": 300, "bee": 7, "centipede": 101, "x": 100}, lambda: None])
def test_counts_of_somebody_elses_data(counts: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Data(LightningDataModule):
        class_counts = staticmethod(counts) if callable(counts) else counts

        def test_dataloader(self) -> DataLoader[Any]:
            return DataLoader(dataset(), batch_size=8)

    make_trainer(tmp_path).test(Plain(), datamodule=Data(), verbose=False)
    assert ("few (fewer than 20)" in capsys.readouterr().out) != callable(counts)


def test_fit_prints_no_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loader = DataLoader(dataset(), batch_size=8)
    make_trainer(tmp_path).fit(Plain(), loader, loader)
    assert "precision" not in capsys.readouterr().out
    assert not list(tmp_path.glob("*.csv"))


def test_one_object_for_two_models(tmp_path: Path) -> None:
    trainer, loader = make_trainer(tmp_path, precision="bf16-mixed"), DataLoader(dataset(), batch_size=8)
    trainer.test(Plain(), loader, verbose=False)
    model = Plain()
    trainer.test(model, loader, verbose=False)
    with torch.autocast("cpu", torch.bfloat16):
        check(tmp_path / "per_class_test.csv", model)


def run_rank(folder: Path) -> None:
    """One of two processes, which do not see the same classes."""
    torch.manual_seed(0)
    model = Plain()
    trainer = make_trainer(folder, strategy="ddp", devices=2, use_distributed_sampler=False)
    x, label = dataset().tensors
    order = label.argsort()
    half = order[:25] if trainer.global_rank == 0 else order[25:]
    trainer.test(model, DataLoader(TensorDataset(x[half], label[half]), batch_size=8), verbose=False)
    torch.save(model.state_dict(), folder / f"rank{trainer.global_rank}.pt")


@pytest.mark.slow
def test_two_processes_equal_one(rank_folder: Path) -> None:
    model = Plain()
    model.load_state_dict(torch.load(rank_folder / "rank0.pt", weights_only=True))
    check(rank_folder / "per_class_test.csv", model)
