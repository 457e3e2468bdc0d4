"""`NeighbourGallery` picks the true neighbours, and shows them as they were."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule
from matrix import Loader, Net, batches, make_trainer
from sklearn.metrics.pairwise import cosine_similarity
from torch import Tensor

from litzoo.callbacks import NeighbourGallery
from litzoo.zoo.plots import neighbours as plots
from litzoo.zoo.plots.neighbours import Neighbour

Pairs = list[tuple[Tensor, Tensor]]
Drawn = list[tuple[list[np.ndarray], list[str], list[list[Neighbour]], str]]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Drawn:
    """What was drawn, without the second that a picture takes."""
    from matplotlib.figure import Figure

    calls: Drawn = []

    def plot(*arguments: Any) -> Figure:
        calls.append(arguments)
        return Figure(figsize=(1, 1))

    monkeypatch.setattr(plots, "plot_neighbours", plot)
    return calls


def encoded(model: Net, pairs: Pairs) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    model.eval()
    with torch.no_grad():
        features = torch.cat([model.encode(x) for x, _ in pairs])
    return features.numpy(), torch.cat([x for x, _ in pairs]).numpy(), torch.cat([y for _, y in pairs]).numpy()


def check(model: Net, call: Any, train: Pairs, val: Pairs, queries: list[int], count: int) -> None:
    bank, inputs, label = encoded(model, train)
    query, samples, true = encoded(model, val)
    shown, names, rows, title = call
    similarity = cosine_similarity(query[queries].astype(np.float64), bank.astype(np.float64))
    for place, image, name, row, scores in zip(queries, shown, names, rows, similarity, strict=True):
        assert np.array_equal(image, samples[place])
        assert name == str(true[place])
        best = np.argsort(-scores, kind="stable")[:count]
        assert [neighbour.similarity for neighbour in row] == pytest.approx(scores[best], abs=1e-5)
        for neighbour, number in zip(row, best, strict=True):
            assert np.array_equal(neighbour.sample, inputs[number])
            assert neighbour.name == str(label[number])
            assert neighbour.same == (label[number] == true[place])
    same = sum(neighbour.same or False for row in rows for neighbour in row)
    assert f"{same} of {len(queries) * count} neighbours are of the query's class" in title


def test_true_neighbours(tmp_path: Path, drawn: Drawn) -> None:
    model = Net(norm=True)
    trainer = make_trainer(tmp_path, NeighbourGallery(3, 5, reference_loader=batches(3)))
    trainer.fit(model, Loader(batches(0)), Loader(batches(9, 6)))
    assert [call[3].split(",")[0] for call in drawn] == ["epoch 0", "epoch 2"], "of three, the first and the last"
    # Of 24 samples every eighth was kept.
    check(model, drawn[-1], batches(3), batches(9, 6), [0, 8, 16], 5)
    assert (tmp_path / "neighbours" / "val.png").is_file()
    trainer.test(model, Loader(batches(8, 2)), verbose=False)
    check(model, drawn[-1], batches(3), batches(8, 2), [0, 4, 6], 5)
    assert drawn[-1][3].startswith("test: ")
    assert (tmp_path / "neighbours" / "test.png").is_file()


def test_fewer_samples_than_asked_for(tmp_path: Path, drawn: Drawn) -> None:
    model = Net()
    trainer = make_trainer(tmp_path, NeighbourGallery(8, 8, reference_loader=batches(3, 1)))
    trainer.validate(model, Loader(batches(9, 1)), verbose=False)
    check(model, drawn[-1], batches(3, 1), batches(9, 1), [0, 1, 2, 3], 4)


@pytest.mark.parametrize("samples", [1, 7, 8, 9, 63, 64, 65, 1000])
def test_queries_are_spread_evenly(samples: int, tmp_path: Path, drawn: Drawn) -> None:
    val = [(torch.full((1, 2), float(number)), torch.zeros(1, dtype=torch.long)) for number in range(samples)]
    model = Net()
    model.validation_step = lambda batch, batch_idx: None  # type: ignore[method-assign]
    make_trainer(tmp_path, NeighbourGallery(8, 1, reference_loader=batches(3))).validate(model, Loader(val), verbose=False)
    places = [int(query[0]) for query in drawn[-1][0]]
    assert len(places) == min(8, samples)
    assert places == sorted(set(places))
    assert places[0] == 0
    gaps = np.diff([*places, samples])
    assert max(gaps) <= 2 * samples / len(places) + 1


def test_features_of_the_whole_batch(tmp_path: Path, drawn: Drawn) -> None:
    """A single sample would have no statistics."""
    model = Net()
    model.norm = torch.nn.BatchNorm1d(8, track_running_stats=False)
    trainer = make_trainer(tmp_path, NeighbourGallery(3, 5, reference_loader=batches(3, 1)))
    trainer.validate(model, Loader(batches(9, 1)), verbose=False)
    check(model, drawn[-1], batches(3, 1), batches(9, 1), [0, 2, 3], 4)


def test_samples_without_label(tmp_path: Path, drawn: Drawn) -> None:
    train = [(x, torch.full_like(y, -1)) for x, y in batches(3)]
    make_trainer(tmp_path, NeighbourGallery(2, 2, reference_loader=train)).validate(Net(), Loader(batches(9, 2)), verbose=False)
    _, _, rows, title = drawn[-1]
    assert {(neighbour.name, neighbour.same) for row in rows for neighbour in row} == {("no label", None)}
    assert "0 of 0 neighbours" in title


class Flat(Net):
    """Takes any inputs."""

    def encode(self, x: Tensor) -> Tensor:
        return super().encode(x.flatten(1)[:, :2])

    def validation_step(self, batch: Any, batch_idx: int) -> None: ...  # type: ignore[override]


class Data(LightningDataModule):
    """Somebody's images, normalised."""

    image_mean, image_std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    class_names = ("cat", "dog", "cow")

    def __init__(self, shape: tuple[int, ...] = (3, 8, 8)) -> None:
        super().__init__()
        self.raw = torch.rand(12, *shape, generator=torch.Generator().manual_seed(0))

    def loader(self) -> Any:
        x = self.raw
        if x.dim() == 4 and x.shape[1] == 3:
            x = (x - torch.tensor(self.image_mean)[:, None, None]) / torch.tensor(self.image_std)[:, None, None]
        return Loader([(x[start : start + 4], torch.arange(4) % 3) for start in (0, 4, 8)])

    val_dataloader = eval_train_dataloader = loader


def test_normalisation_is_undone(tmp_path: Path, drawn: Drawn) -> None:
    data = Data()
    make_trainer(tmp_path, NeighbourGallery(2, 1)).validate(Flat(), datamodule=data, verbose=False)
    queries, names, rows, _ = drawn[-1]
    for place, query, name, row in zip([0, 8], queries, names, rows, strict=True):
        assert np.allclose(query, data.raw[place].permute(1, 2, 0), atol=1e-6)
        assert np.allclose(row[0].sample, query), "the training set is the validation set here"
        assert name == row[0].name == "cat"


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        (0.4, 0.2),
        (torch.tensor([0.4]), torch.tensor([0.2])),
        (torch.tensor(0.4), [0.2]),
        (np.full((1, 1, 1), 0.4), np.full((1, 1, 1), 0.2)),
    ],
)
def test_normalisation_as_others_write_it(mean: Any, std: Any, tmp_path: Path, drawn: Drawn) -> None:
    data, model = Data((1, 8, 8)), Flat()
    model.image_mean, model.image_std = mean, std  # type: ignore[assignment]
    data.image_mean = data.image_std = None  # type: ignore[assignment]
    picture = NeighbourGallery()._picture(make_trainer(tmp_path), model, data.raw[0])
    assert np.allclose(picture[..., 0], data.raw[0, 0] * 0.2 + 0.4)


@pytest.mark.parametrize(
    ("shape", "pictured"),
    [((1, 8, 6), (8, 6, 1)), ((8, 7), (8, 7, 1)), ((5, 8, 8), (8, 8, 1)), ((20, 3), (20, 3)), ((20, 6), (20, 3)), ((7,), (7,))],
)
def test_kinds_of_inputs(shape: tuple[int, ...], pictured: tuple[int, ...], tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, NeighbourGallery(2, 2))
    trainer.validate(Flat(), datamodule=Data(shape), verbose=False)
    assert (tmp_path / "neighbours" / "val.png").is_file()
    picture = NeighbourGallery()._picture(trainer, Flat(), Data(shape).raw[0])
    assert picture.shape == pictured
    if len(pictured) == 3:
        assert picture.min() >= 0
        assert picture.max() <= 1


def test_mistakes(tmp_path: Path, drawn: Drawn) -> None:
    for settings in ({"queries": 0}, {"neighbours": 0}):
        with pytest.raises(ValueError, match="queries and neighbours must be at least 1"):
            NeighbourGallery(**settings)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"draws images \(C, H, W\), clouds \(N, 3\) and vectors \(D,\), but .* \(2, 3, 4, 5\)"):
        make_trainer(tmp_path, NeighbourGallery()).validate(Flat(), datamodule=Data((2, 3, 4, 5)), verbose=False)
    with pytest.raises(ValueError, match="class_names has 2 names, but there are 3 classes"):
        make_trainer(tmp_path, NeighbourGallery(class_names=["a", "b"])).validate(Flat(), datamodule=Data(), verbose=False)
    make_trainer(tmp_path / "dev", NeighbourGallery(), fast_dev_run=True).validate(Flat(), datamodule=Data(), verbose=False)
    assert not (tmp_path / "dev" / "neighbours").exists()


def run_rank(folder: Path) -> None:
    """One of two processes; the first one draws, with neighbours that the second one holds."""
    calls: Drawn = []
    draw = plots.plot_neighbours
    plots.plot_neighbours = lambda *arguments: calls.append(arguments) or draw(*arguments)  # type: ignore[assignment, func-returns-value]
    gallery = NeighbourGallery(3, 5, reference_loader=batches(3))
    trainer = make_trainer(folder, gallery, strategy="ddp", devices=2, use_distributed_sampler=False)
    model = Net()
    trainer.fit(model, Loader(batches(trainer.global_rank)), Loader(batches(8 + trainer.global_rank, 6)))
    if trainer.is_global_zero:
        check(model, calls[-1], batches(3), batches(8, 6), [0, 8, 16], 5)
    else:
        assert not calls


@pytest.mark.slow
def test_two_processes_equal_one(rank_folder: Path) -> None:
    assert (rank_folder / "neighbours" / "val.png").is_file()
