"""`EmbeddingPlot` draws the features of all evaluated samples; `run_rank` is for two processes."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from matrix import Loader, Net, batches, make_trainer
from sklearn.decomposition import PCA
from sklearn.preprocessing import normalize
from torch import Tensor

from litzoo.callbacks import EmbeddingPlot
from litzoo.zoo.batch import Batch
from litzoo.zoo.plots import embedding as plots
from litzoo.zoo.plots.embedding import EmbeddingMap

Drawn = list[tuple[EmbeddingMap, list[str]]]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Drawn:
    """What was drawn, without the time that a picture takes."""
    from matplotlib.figure import Figure

    calls: Drawn = []

    def plot(maps: list[EmbeddingMap], names: list[str]) -> Figure:
        calls.append((maps[0], names))
        return Figure(figsize=(1, 1))

    monkeypatch.setattr(plots, "plot_embedding", plot)
    return calls


def plot_pca(**settings: Any) -> EmbeddingPlot:
    return EmbeddingPlot(method="pca", **settings)


def expected(model: Net, pairs: list[tuple[Tensor, Tensor]]) -> tuple[np.ndarray, np.ndarray]:
    """PCA of the features, and the labels."""
    model.eval()
    with torch.no_grad():
        features = torch.cat([model.encode(x) for x, _ in pairs]).double().numpy()
    return PCA(2).fit_transform(normalize(features)), torch.cat([y for _, y in pairs]).numpy()


def test_features_of_the_epoch(tmp_path: Path, drawn: Drawn) -> None:
    model = Net(norm=True)
    trainer = make_trainer(tmp_path, plot_pca())
    trainer.fit(model, Loader(batches(0)), Loader(batches(9, 6)))
    assert [each.title for each, _ in drawn] == ["Net.encode, epoch 0", "Net.encode, epoch 2"], "of three, the first and the last"
    place, label = expected(model, batches(9, 6))
    last, names = drawn[-1]
    assert np.allclose(last.place, place, atol=1e-4)
    assert last.label.tolist() == label.tolist()
    assert last.index.tolist() == list(range(24))
    assert last.images is None
    assert names == ["0", "1", "2"]
    assert {path.name for path in (tmp_path / "embedding").iterdir()} == {"val_epoch_000.png", "val_epoch_002.png", "val.html"}
    trainer.test(model, Loader(batches(8, 2)), verbose=False)
    assert np.allclose(drawn[-1][0].place, expected(model, batches(8, 2))[0], atol=1e-4)
    assert "PCA of 8 test samples" in drawn[-1][0].note
    assert (tmp_path / "embedding" / "test.png").is_file()


def test_subset_and_precision_of_all(tmp_path: Path, drawn: Drawn) -> None:
    from torchmetrics.functional.retrieval import retrieval_precision

    model = Net()
    make_trainer(tmp_path, plot_pca(max_points=6)).validate(model, Loader(batches(9, 6)), verbose=False)
    (found, _), (_, label) = drawn[-1], expected(model, batches(9, 6))
    assert len(found.place) == 6
    assert found.label.tolist() == label[found.index].tolist()
    with torch.no_grad():
        features = torch.nn.functional.normalize(torch.cat([model.encode(x) for x, _ in batches(9, 6)]).double())
    similarity = (features @ features.T).fill_diagonal_(-2)
    target = torch.from_numpy(label)[:, None] == torch.from_numpy(label)
    precision = torch.stack([retrieval_precision(row, own, top_k=1) for row, own in zip(similarity, target, strict=True)]).mean()
    assert found.note == f"PCA of 6 of 24 val samples, precision at 1: {float(precision):.1%}"


class Flat(Net):
    """Takes any inputs."""

    def encode(self, x: Tensor) -> Tensor:
        return super().encode(x.flatten(1)[:, :2])

    def validation_step(self, batch: Any, batch_idx: int) -> None: ...  # type: ignore[override]


class Images(LightningDataModule):
    """Somebody's images, normalised."""

    image_mean, image_std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    class_names = ("cat", "<b>", "cow")

    def __init__(self, size: int = 8, views: int = 0) -> None:
        super().__init__()
        self.views = views
        self.raw = torch.rand(12, *([views] if views else []), 3, size, size, generator=torch.Generator().manual_seed(0))

    def val_dataloader(self) -> Any:
        x = (self.raw - torch.tensor(self.image_mean)[:, None, None]) / torch.tensor(self.image_std)[:, None, None]
        label, index = torch.arange(12) % 3, 100 + torch.arange(12)
        return Loader([Batch(*(column[start : start + 4] for column in (x, label, index))) for start in (0, 4, 8)])  # type: ignore[misc]


@pytest.mark.parametrize("views", [0, 2])
def test_images_and_numbers_of_the_data(views: int, tmp_path: Path) -> None:
    data = Images(views=views)
    make_trainer(tmp_path, plot_pca()).validate(Flat(), datamodule=data, verbose=False)
    page = (tmp_path / "embedding" / "val.html").read_text()
    content = json.loads(re.findall(r'type="application/json" id="data">(.*?)</script>', page)[0])
    assert content["maps"][0]["index"] == [100 + number for number in range(12) for _ in range(max(1, views))]
    assert [each["name"] for each in content["classes"]] == ["cat", "<b>", "cow"]
    assert content["sheets"][0]["side"] == 8
    assert (tmp_path / "embedding" / "val.png").is_file()


def test_thumbnails(tmp_path: Path, drawn: Drawn) -> None:
    for size, side in ((8, 8), (64, 32)):
        data = Images(size)
        make_trainer(tmp_path, plot_pca()).validate(Flat(), datamodule=data, verbose=False)
        images = drawn[-1][0].images
        assert images is not None
        assert images.shape == (12, side, side, 3)
        true = data.raw.permute(0, 2, 3, 1).numpy() * 255
        if size == side:
            assert np.abs(images - true).max() <= 0.51
        else:
            assert np.abs(images.mean((1, 2)) - true.mean((1, 2))).max() < 3


def test_odd_samples(tmp_path: Path, drawn: Drawn) -> None:
    """Without labels, with features that are not finite, or all alike, there is a picture too."""
    unlabelled = [(x, torch.full_like(y, -1)) for x, y in batches(9, 2)]
    make_trainer(tmp_path, plot_pca()).validate(Flat(), Loader(unlabelled), verbose=False)
    assert drawn[-1][0].note == "PCA of 8 val samples"
    for value in (float("nan"), 0.0):
        model = Net()
        torch.nn.init.constant_(model.first.weight, value)
        make_trainer(tmp_path, EmbeddingPlot()).validate(model, Loader(batches(9, 2)), verbose=False)
        assert np.isfinite(drawn[-1][0].place).all()


def test_loggers_get_the_picture(tmp_path: Path) -> None:
    board = TensorBoardLogger(tmp_path)
    make_trainer(tmp_path, plot_pca(features="forward"), logger=board).validate(Net(), Loader(batches(9, 2)), verbose=False)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(board.log_dir)
    events.Reload()
    assert events.Tags()["images"] == ["embedding/val_forward"]
    assert (Path(board.log_dir) / "embedding" / "val_forward.png").is_file()


def test_a_picture_that_fails_ends_no_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(plots, "plot_embedding", fail)
    trainer = make_trainer(tmp_path, plot_pca())
    with pytest.warns(UserWarning, match=r"EmbeddingPlot could not draw .*val_epoch_000.png: the disk is full"):
        trainer.fit(Net(), Loader(batches(0)), Loader(batches(9, 2)))
    assert trainer.current_epoch == 3
    assert not (tmp_path / "embedding").exists()


def test_random_streams_are_left_alone(tmp_path: Path) -> None:
    class Watch(Callback):
        def on_validation_epoch_end(self, *_: Any) -> None:
            self.before = torch.get_rng_state(), np.random.get_state()[1]

        def on_validation_end(self, *_: Any) -> None:
            assert torch.equal(self.before[0], torch.get_rng_state())
            assert np.array_equal(self.before[1], np.random.get_state()[1])

    make_trainer(tmp_path, Watch(), EmbeddingPlot()).validate(Net(norm=True), Loader(batches(9, 6)), verbose=False)
    assert (tmp_path / "embedding" / "val.png").is_file()


def test_mistakes(tmp_path: Path, drawn: Drawn) -> None:
    with pytest.raises(ValueError, match="method must be one of tsne, umap, pca"):
        EmbeddingPlot(method="tnse")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_points must be at least 2, got 1"):
        plot_pca(max_points=1)
    with pytest.raises(ValueError, match="class_names has 2 names, but there are 3 classes"):
        make_trainer(tmp_path, plot_pca(class_names=["a", "b"])).validate(Flat(), datamodule=Images(), verbose=False)
    make_trainer(tmp_path / "dev", plot_pca(), fast_dev_run=True).validate(Flat(), datamodule=Images(), verbose=False)
    assert not (tmp_path / "dev" / "embedding").exists()


def test_a_missing_package_is_told_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(MisconfigurationException, match=r"EmbeddingPlot cannot draw .*umap-learn"):
        make_trainer(tmp_path, EmbeddingPlot(method="umap")).fit(Net(), Loader(batches(0)))


def run_rank(folder: Path) -> None:
    """One of two processes; the first one draws what both have."""
    calls: Drawn = []
    draw = plots.plot_embedding
    plots.plot_embedding = lambda maps, names: calls.append((maps[0], names)) or draw(maps, names)  # type: ignore[assignment, func-returns-value]
    trainer = make_trainer(folder, plot_pca(), strategy="ddp", devices=2, use_distributed_sampler=False)
    rank, model, data = trainer.global_rank, Flat(), Images()
    # The second process has one batch less.
    own = [Batch(*(None if column is None else column[rank::2] for column in batch)) for batch in data.val_dataloader().pairs]  # type: ignore[arg-type]
    data.val_dataloader = lambda: Loader(own[: 3 - rank])  # type: ignore[assignment, method-assign]
    trainer.validate(model, datamodule=data, verbose=False)
    if rank == 1:
        assert not calls
        return
    found = calls[-1][0]
    assert sorted(found.index.tolist()) == [100, 101, 102, 103, 104, 105, 106, 107, 108, 110]
    assert found.images is not None
    for number, label, image in zip(found.index - 100, found.label, found.images, strict=True):
        assert label == number % 3
        assert np.abs(image - data.raw[number].permute(1, 2, 0).numpy() * 255).max() <= 0.51


@pytest.mark.slow
def test_two_processes_equal_one(rank_folder: Path) -> None:
    assert (rank_folder / "embedding" / "val.html").is_file()
