"""`RelationPairsPlot` picks the true extremes, and leaves the training alone; also the script of its two processes."""

import copy
import pickle
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from matrix import Loader, Net, batches, make_trainer, precision_settings
from PIL import Image
from sklearn.metrics import roc_auc_score
from torch import Tensor

from litzoo.callbacks import EMA, RelationPairsPlot, StepSeed
from litzoo.zoo.plots import relations as plots
from litzoo.zoo.plots.relations import RelatedPair

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
Drawn = list[tuple[Mapping[str, list[RelatedPair]], str]]


class Relating(Net):
    """Somebody's network of 1 x 1 images, of which it compares directions."""

    def encode(self, x: Tensor) -> Tensor:
        return super().encode(x.flatten(1))

    def relate(self, first: Tensor, second: Tensor) -> Tensor:
        return 4 * F.cosine_similarity(first, second) + torch.zeros_like(first[:, 0]) * self.last.bias.sum()


def images(seed: int, number: int = 7) -> list[tuple[Tensor, Tensor]]:
    return [(x[:, :, None, None], y) for x, y in batches(seed, number)]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Drawn:
    """What was drawn, without the time that a picture takes."""
    from matplotlib.figure import Figure

    calls: Drawn = []

    def plot(*arguments: Any) -> Figure:
        calls.append(arguments)
        return Figure(figsize=(1, 1))

    monkeypatch.setattr(plots, "plot_relations", plot)
    return calls


def test_the_extremes_among_all_pairs(tmp_path: Path, drawn: Drawn) -> None:
    model = Relating(norm=True)
    trainer = make_trainer(tmp_path, RelationPairsPlot(pairs=3, samples=8))
    trainer.fit(model, Loader(images(0)), Loader(images(9, 6)))
    assert [title.split(":")[0] for _, title in drawn] == ["epoch 0, val", "epoch 2, val"], "of three, the first and the last"
    assert (tmp_path / "relation_pairs" / "val.png").is_file()
    trainer.test(model, Loader(images(8, 2)), verbose=False)
    assert (tmp_path / "relation_pairs" / "test.png").is_file()

    # Of eight test images, all.
    x, y = (torch.cat(column) for column in zip(*images(8, 2), strict=True))
    with torch.no_grad():
        features = model.eval().encode(x)
        score = torch.stack([torch.stack([model.relate(a[None], b[None])[0] for b in features]) for a in features]).sigmoid()
    # A picture of one pixel and two channels is drawn as their mean, from the darkest to the brightest.
    sections, title = drawn[-1]
    best, worst = sections.values()
    pairs = sorted((float(score[i, j]), i, j) for i in range(8) for j in range(i + 1, 8))
    for found, ordered in ((best, pairs[::-1]), (worst, pairs)):
        used: set[int] = set()
        expected = []
        for value, i, j in ordered:
            if not used & {i, j}:
                used |= {i, j}
                expected.append((value, i, j))
        assert len(found) == 3
        for pair, (value, i, j) in zip(found, expected, strict=False):
            assert pair.score == pytest.approx(value, abs=1e-5)
            assert pair.names == (str(int(y[i])), str(int(y[j])))
            assert pair.same == bool(y[i] == y[j])
            assert pair.first.shape == (1, 1, 1)
    auc = roc_auc_score([int(y[i] == y[j]) for _, i, j in pairs], [value for value, _, _ in pairs])
    assert title == f"test: 28 pairs of 8 images, AUC of the same class {auc:.3f}"


def test_names_of_more_classes_than_the_images_show(tmp_path: Path, drawn: Drawn) -> None:
    names = [f"class {cls}" for cls in range(9)]
    make_trainer(tmp_path, RelationPairsPlot(samples=4, class_names=names)).test(Relating(), Loader(images(8, 2)), verbose=False)
    assert {name for pairs in drawn[-1][0].values() for pair in pairs for name in pair.names} <= set(names)


def test_images_without_label_and_a_training_that_diverged(tmp_path: Path, drawn: Drawn) -> None:
    model = Relating()
    model.encode = lambda x: x.flatten(1).repeat(1, 4) * np.nan  # type: ignore[method-assign]  # diverged
    model.validation_step = lambda batch, batch_idx: None  # type: ignore[method-assign]  # it knows no label of -1
    loader = Loader([(x, torch.full_like(y, -1)) for x, y in images(9, 2)])
    make_trainer(tmp_path, RelationPairsPlot(2)).validate(model, loader, verbose=False)
    sections, title = drawn[-1]
    assert title == "val: 28 pairs of 8 images"
    assert {(pair.names, pair.score, pair.same) for pairs in sections.values() for pair in pairs} == {(("no label",) * 2, 0.5, None)}


@pytest.mark.parametrize("samples", [2, 8, 64])
def test_images_are_spread_evenly(samples: int, tmp_path: Path, drawn: Drawn) -> None:
    loader = Loader([(torch.full((1, 2, 1, 1), float(number)), torch.tensor([number])) for number in range(100)])
    model = Relating()
    model.validation_step = lambda batch, batch_idx: None  # type: ignore[method-assign]  # there are more classes than it knows
    make_trainer(tmp_path, RelationPairsPlot(100, samples)).validate(model, loader, verbose=False)
    places = sorted(int(name) for pairs in drawn[-1][0].values() for pair in pairs for name in pair.names)
    assert len(set(places)) == samples
    assert max(np.diff([*sorted(set(places)), 100])) <= 4 * 100 / samples


def trained(folder: Path, precision: str, *callbacks: Any, **settings: Any) -> dict[str, Tensor]:
    model = Relating(norm=True)
    trainer = make_trainer(folder, StepSeed(1), *callbacks, **precision_settings(precision), **settings)
    trainer.fit(model, Loader(images(0)), Loader(images(9, 2)))
    assert model.training
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("precision", ["64-true", "32-true", "bf16-mixed", "16-mixed, GradScaler"])
def test_training_is_left_alone(precision: str, tmp_path: Path) -> None:
    callback = pickle.loads(pickle.dumps(RelationPairsPlot()))
    with_it, without = trained(tmp_path, precision, callback, EMA(0.9)), trained(tmp_path, precision, EMA(0.9))
    for name, value in without.items():
        assert torch.equal(with_it[name], value), name
    with Image.open(tmp_path / "relation_pairs" / "val.png") as image:
        assert min(image.size) > 300
    assert torch.equal(trained(tmp_path, precision, copy.deepcopy(callback), EMA(0.9))["first.weight"], without["first.weight"]), "again"


def test_dev_run_and_a_single_image_draw_nothing(tmp_path: Path, drawn: Drawn) -> None:
    make_trainer(tmp_path, RelationPairsPlot(), fast_dev_run=True).fit(Relating(), Loader(images(0)), Loader(images(9, 2)))
    one = [(x[:1], y[:1]) for x, y in images(9, 1)]
    make_trainer(tmp_path, RelationPairsPlot()).validate(Relating(), Loader(one), verbose=False)
    assert drawn == []


def test_what_it_refuses(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="has no relate"):
        make_trainer(tmp_path, RelationPairsPlot()).fit(Net(), Loader(batches(0)))
    with pytest.raises(ValueError, match="draws images"):
        make_trainer(tmp_path, RelationPairsPlot()).validate(Relating(), Loader(batches(9)), verbose=False)
    for settings in ({"pairs": 0}, {"samples": 1}):
        with pytest.raises(ValueError, match="must be at least"):
            RelationPairsPlot(**settings)


def test_two_processes_draw_once(tmp_path: Path, two_processes: Callable[..., None]) -> None:
    two_processes(Path(__file__), tmp_path)
    assert (tmp_path / "relation_pairs" / "val.png").is_file()


if __name__ == "__main__":
    settings: dict[str, Any] = {"strategy": "ddp", "devices": 2, "use_distributed_sampler": False, "max_epochs": 1}
    make_trainer(Path(sys.argv[1]), RelationPairsPlot(), **settings).fit(Relating(), Loader(images(0)), Loader(images(9, 2)))
