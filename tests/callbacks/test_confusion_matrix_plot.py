"""ConfusionMatrixPlot: the matrix of the whole epoch, in any Lightning project; `run_rank` is for two processes."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from sklearn import metrics
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from litzoo.callbacks import ConfusionMatrixPlot
from litzoo.zoo.batch import Batch

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
CLASSES = 3


class Plain(LightningModule):
    """Somebody's classifier; `result` is what its evaluation steps return."""

    def __init__(self, result: str = "nothing", classes: int = CLASSES) -> None:
        super().__init__()
        self.result = result
        self.linear = nn.Linear(4, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        logits = self(batch[0])
        return {
            "nothing": None,
            "loss": F.cross_entropy(logits, batch[1]),
            "logits": {"logits": logits, "label": batch[1]},
            "target": {"logits": logits, "target": batch[1]},
            "preds": {"preds": logits.argmax(dim=1), "target": batch[1]},
        }[self.result]

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def dataset(seed: int = 0, classes: int = CLASSES, samples: int = 50) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(samples, 4, generator=generator), torch.randint(classes, (samples,), generator=generator))


def loader(seed: int = 0, classes: int = CLASSES, samples: int = 50) -> DataLoader:
    return DataLoader(dataset(seed, classes, samples), batch_size=8)


def make_trainer(folder: Path, *callbacks: Callback, **settings: Any) -> Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    common: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "default_root_dir": folder, **quiet}
    return Trainer(callbacks=list(callbacks), **{**common, **settings})


def read(folder: Path, stage: str = "val") -> tuple[list[str], list[list[int]]]:
    """Class names and matrix of a CSV."""
    assert (folder / "confusion_matrix" / f"{stage}.png").read_bytes().startswith(b"\x89PNG")
    with (folder / "confusion_matrix" / f"{stage}.csv").open(encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert [row[0] for row in rows] == header[1:]
    return header[1:], [[int(count) for count in row[1:]] for row in rows]


def expected(model: nn.Module, data: TensorDataset, classes: int = CLASSES) -> list[list[int]]:
    x, label = data.tensors
    with torch.no_grad():
        return metrics.confusion_matrix(label, model(x).argmax(dim=1), labels=range(classes)).tolist()


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The titles of the pictures, which are not drawn."""
    from litzoo.zoo.plots import confusion_matrix, figures

    titles: list[str] = []
    monkeypatch.setattr(confusion_matrix, "plot_confusion_matrix", lambda matrix, names, title: titles.append(title))

    def save(figure: None, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"\x89PNG")

    monkeypatch.setattr(figures, "save_figure", save)
    return titles


@pytest.mark.parametrize("result", ["nothing", "loss", "logits", "target", "preds"])
def test_whole_epoch_equals_scikit_learn(result: str, tmp_path: Path, drawn: list[str]) -> None:
    model, trainer = Plain(result), make_trainer(tmp_path, ConfusionMatrixPlot(class_names=["a", "b", "c"]), max_epochs=2)
    trainer.fit(model, loader(1), loader(2))
    assert read(tmp_path) == (["a", "b", "c"], expected(model, dataset(2)))
    trainer.test(model, loader(3), verbose=False)
    assert read(tmp_path, "test") == (["a", "b", "c"], expected(model, dataset(3)))
    assert read(tmp_path)[1] == expected(model, dataset(2)), "a test leaves the validation's files alone"


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_validate_and_test_alone(stage: str, tmp_path: Path) -> None:
    model = Plain()
    getattr(make_trainer(tmp_path, ConfusionMatrixPlot()), stage)(model, loader(2), verbose=False)
    assert read(tmp_path, {"validate": "val"}.get(stage, stage)) == (["0", "1", "2"], expected(model, dataset(2)))
    assert len(list((tmp_path / "confusion_matrix").iterdir())) == 2, "no temporary file stays"


def test_litzoo_batches(tmp_path: Path, drawn: list[str]) -> None:
    x, label = dataset(2).tensors
    batches = [Batch(x[start : start + 8], label[start : start + 8], torch.arange(start, start + 8)) for start in range(0, 48, 8)]
    model = Plain()
    make_trainer(tmp_path, ConfusionMatrixPlot()).validate(model, DataLoader(batches, batch_size=None), verbose=False)
    assert read(tmp_path)[1] == expected(model, TensorDataset(x[:48], label[:48]))


def test_sanity_check_is_skipped(tmp_path: Path, drawn: list[str]) -> None:
    class Look(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            assert not (tmp_path / "confusion_matrix").exists()

    model = Plain()
    make_trainer(tmp_path, ConfusionMatrixPlot(), Look(), num_sanity_val_steps=2).fit(model, loader(1), loader(2))
    assert len(drawn) == 1
    assert sum(map(sum, read(tmp_path)[1])) == 50


@pytest.mark.parametrize(("every", "epochs"), [(1, [0, 1, 2, 3, 4]), (2, [1, 3, 4]), (5, [4]), (9, [4])])
def test_draws_every_n_epochs_and_at_the_end(every: int, epochs: list[int], tmp_path: Path, drawn: list[str]) -> None:
    model = Plain()
    make_trainer(tmp_path, ConfusionMatrixPlot(every), max_epochs=5).fit(model, loader(1), loader(2))
    assert [title.partition(",")[0] for title in drawn] == [f"epoch {epoch}" for epoch in epochs]
    assert read(tmp_path)[1] == expected(model, dataset(2)), "the last one is that of the last epoch"


def test_bf16_and_accumulation(tmp_path: Path, drawn: list[str]) -> None:
    model = Plain()
    trainer = make_trainer(tmp_path, ConfusionMatrixPlot(), precision="bf16-mixed", accumulate_grad_batches=3, max_epochs=2)
    trainer.fit(model, loader(1), loader(2))
    with torch.autocast("cpu", torch.bfloat16):
        assert read(tmp_path)[1] == expected(model, dataset(2))


def test_two_fits_with_one_object(tmp_path: Path, drawn: list[str]) -> None:
    callback = ConfusionMatrixPlot()
    make_trainer(tmp_path / "first", callback).fit(Plain(), loader(1), loader(2))
    model = Plain(classes=5)
    make_trainer(tmp_path / "second", callback).fit(model, loader(1, 5), loader(2, 5, samples=33))
    assert read(tmp_path / "second")[1] == expected(model, dataset(2, 5, samples=33), 5)
    # A fit without validation has nothing to draw, not even what the last one left.
    make_trainer(tmp_path / "third", callback, limit_val_batches=0).fit(Plain(), loader(1))
    assert not (tmp_path / "third").exists()


def test_resume(tmp_path: Path, drawn: list[str]) -> None:
    trainer = make_trainer(tmp_path / "first", ConfusionMatrixPlot())
    trainer.fit(Plain(), loader(1), loader(2))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    model = Plain()
    resumed = make_trainer(tmp_path / "second", ConfusionMatrixPlot(), max_epochs=3)
    resumed.fit(model, loader(1), loader(2), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert [title.partition(",")[0] for title in drawn] == ["epoch 0", "epoch 1", "epoch 2"]
    assert read(tmp_path / "second")[1] == expected(model, dataset(2))


def test_first_of_several_loaders(tmp_path: Path, drawn: list[str]) -> None:
    model = Plain()
    make_trainer(tmp_path, ConfusionMatrixPlot()).validate(model, [loader(2), loader(3)], verbose=False)
    assert read(tmp_path)[1] == expected(model, dataset(2))


def test_fast_dev_run_writes_nothing(tmp_path: Path, drawn: list[str]) -> None:
    make_trainer(tmp_path, ConfusionMatrixPlot(), fast_dev_run=True).fit(Plain(), loader(1), loader(2))
    assert drawn == []


class Data(LightningDataModule):
    """Somebody's data, whose classes have names."""

    class_names = ("x", "y", "z")

    def val_dataloader(self) -> DataLoader:
        return loader(2)


class Named(Plain):
    def __init__(self, class_names: list[str] | None = None) -> None:
        super().__init__()
        self.save_hyperparameters()


@pytest.mark.parametrize(
    ("given", "model", "names"),
    [
        (["p", "q", "r"], Named(["k", "l", "m"]), ["p", "q", "r"]),
        (None, Named(["k", "l", "m"]), ["k", "l", "m"]),
        (None, Named(), ["x", "y", "z"]),
        (None, Plain(), ["x", "y", "z"]),
    ],
)
def test_class_names(given: list[str] | None, model: Plain, names: list[str], tmp_path: Path, drawn: list[str]) -> None:
    make_trainer(tmp_path, ConfusionMatrixPlot(class_names=given)).validate(model, datamodule=Data(), verbose=False)
    assert read(tmp_path)[0] == names


class TakesImages(Logger):
    """A logger that takes pictures as Weights & Biases' does."""

    name, version = "images", "0"

    def __init__(self) -> None:
        super().__init__()
        self.images: list[str] = []

    def log_metrics(self, *args: Any, **kwargs: Any) -> None: ...

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...

    def log_image(self, key: str, images: list[Any], step: int | None = None) -> None:
        assert all(Path(image).is_file() for image in images)
        self.images.append(key)


def test_loggers_get_the_picture(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board, images = TensorBoardLogger(tmp_path, name="board"), TakesImages()
    loggers = [board, images, CSVLogger(tmp_path)]
    make_trainer(tmp_path, ConfusionMatrixPlot(), logger=loggers).fit(Plain(), loader(1), loader(2))
    events = EventAccumulator(board.log_dir)
    events.Reload()
    assert events.Tags()["images"] == ["confusion_matrix/val"]
    assert images.images == ["confusion_matrix/val"]
    assert (Path(board.log_dir) / "confusion_matrix" / "val.png").is_file(), "in the folder of the run"


class Regression(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)[:, 0]

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None: ...


def test_mistakes(tmp_path: Path, drawn: list[str]) -> None:
    trainer = make_trainer(tmp_path, ConfusionMatrixPlot())
    with pytest.raises(ValueError, match="Regression is no classifier: it gave"):
        trainer.validate(Regression(), loader(2), verbose=False)
    dictionaries = DataLoader([{"x": torch.zeros(4)}] * 2, batch_size=2)
    model = Plain()
    model.validation_step = lambda batch, batch_idx: None  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="Plain is no classifier: its batches are dict"):
        trainer.validate(model, dictionaries, verbose=False)
    model = Plain()
    model.validation_step = lambda batch, batch_idx: None  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="Plain has 3 classes, but there are labels from 1 to 4"):
        trainer.validate(model, loader(2, classes=5), verbose=False)
    with pytest.raises(ValueError, match="class_names has 2 names, but there are 3 classes"):
        make_trainer(tmp_path, ConfusionMatrixPlot(class_names=["a", "b"])).validate(Plain(), loader(2), verbose=False)
    with pytest.raises(ValueError, match="every_n_epochs must be at least 1, got 0"):
        ConfusionMatrixPlot(0)


def run_rank(folder: Path) -> None:
    """One of two processes: fit, then test; the two do not see the same classes, and one has a batch less."""
    torch.manual_seed(0)
    for result in ("logits", "preds"):
        model = Plain(result)
        settings = {"strategy": "ddp", "devices": 2, "max_epochs": 3, "use_distributed_sampler": False}
        trainer = make_trainer(folder / result, ConfusionMatrixPlot(2), **settings)
        rank = trainer.global_rank
        x, label = dataset(2, samples=48).tensors
        order = label.argsort()
        half = order[:24] if rank == 0 else order[24:]
        mine = DataLoader(TensorDataset(x[half], label[half]), batch_size=8)
        trainer.fit(model, loader(1 + rank), mine)
        trainer.test(model, mine, verbose=False)
        if trainer.is_global_zero:
            torch.save(model.state_dict(), folder / f"{result}.pt")


@pytest.mark.slow
def test_two_processes_equal_one(rank_folder: Path) -> None:
    for result in ("logits", "preds"):
        model = Plain()
        model.load_state_dict(torch.load(rank_folder / f"{result}.pt", weights_only=True))
        for stage in ("val", "test"):
            assert read(rank_folder / result, stage)[1] == expected(model, dataset(2, samples=48))
