"""`KNNMonitor` against scikit-learn's weighted neighbours."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from matrix import Loader, Net, batches, make_trainer
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from litzoo.callbacks import EMA, KNNMonitor
from litzoo.zoo.logistic_regression import LogisticRegression

NAME = "val/knn_k5_t0.1_encode"
Pairs = list[tuple[Tensor, Tensor]]


def directions(model: Net, pairs: Pairs, features: str = "encode") -> tuple[np.ndarray, np.ndarray]:
    model.eval()
    with torch.no_grad():
        found = torch.cat([getattr(model, features)(x) for x, _ in pairs]).double()
    return torch.nn.functional.normalize(found, dim=1).numpy(), torch.cat([y for _, y in pairs]).numpy()


def by_sklearn(model: Net, train: Pairs, val: Pairs, k: int = 5, temperature: float = 0.1, features: str = "encode") -> float:
    """For unit vectors |u - v|^2 = 2 - 2 u.v."""
    (bank, label), (query, true) = directions(model, train, features), directions(model, val, features)
    judge = KNeighborsClassifier(k, weights=lambda distance: np.exp((1 - distance**2 / 2) / temperature), algorithm="brute")
    known = true >= 0
    return float(judge.fit(bank[label >= 0], label[label >= 0]).score(query[known], true[known]))


def test_equals_sklearn(tmp_path: Path) -> None:
    model = Net(norm=True)
    trainer = make_trainer(tmp_path, KNNMonitor(5, reference_loader=batches(3)), KNNMonitor(9, 0.5, "forward", reference_loader=batches(3)))
    trainer.fit(model, Loader(batches(0)), Loader(batches(9, 6)))
    found = trainer.callback_metrics
    assert float(found[NAME]) == pytest.approx(by_sklearn(model, batches(3), batches(9, 6)))
    assert float(found["val/knn_k9_t0.5_forward"]) == pytest.approx(by_sklearn(model, batches(3), batches(9, 6), 9, 0.5, "forward"))
    trainer.test(model, Loader(batches(8, 4)), verbose=False)
    assert float(trainer.callback_metrics["test/knn_k5_t0.1_encode"]) == pytest.approx(by_sklearn(model, batches(3), batches(8, 4)))


def clusters(number: int, seed: int) -> Pairs:
    """Three directions that everybody can tell apart."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(3, (number, 4), generator=generator)
    angle = 2 * torch.pi / 3 * label + 0.1 * torch.randn(number, 4, generator=generator)
    return [(torch.stack([a.cos(), a.sin()], dim=1), y) for a, y in zip(angle, label, strict=True)]


@pytest.mark.parametrize("scores", ["fp32", "bf16"])
def test_clusters(scores: Any, tmp_path: Path) -> None:
    callback = KNNMonitor(k=3, reference_loader=clusters(20, 0), scores=scores)
    found = make_trainer(tmp_path, callback).validate(LogisticRegression(2, 3), Loader(clusters(9, 1)), verbose=False)[0]
    assert found["val/knn_k3_t0.1_encode"] == 1.0
    assert callback.metric() == "val/knn_k3_t0.1_encode"


def without_some_labels(pairs: Pairs) -> Pairs:
    return [(x, torch.tensor([-1, *y[1:].tolist()])) for x, y in pairs]


def test_samples_without_label(tmp_path: Path) -> None:
    model, train, val = Net(), without_some_labels(batches(3, 12)), without_some_labels(batches(9, 6))
    model.validation_step = lambda batch, batch_idx: None  # type: ignore[method-assign]
    found = make_trainer(tmp_path, KNNMonitor(5, reference_loader=train)).validate(model, Loader(val), verbose=False)[0]
    assert found[NAME] == pytest.approx(by_sklearn(model, train, val))


def test_first_of_several_loaders(tmp_path: Path) -> None:
    class Several(Net):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None: ...  # type: ignore[override]

    model = Several()
    trainer = make_trainer(tmp_path, KNNMonitor(5, reference_loader=batches(3)))
    trainer.validate(model, [Loader(batches(9, 6)), Loader(batches(8, 6))], verbose=False)
    assert float(trainer.callback_metrics[NAME]) == pytest.approx(by_sklearn(model, batches(3), batches(9, 6)))


def test_chooses_the_checkpoint(tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path, monitor=NAME, mode="max")
    monitor = KNNMonitor(5, reference_loader=batches(3))
    trainer = make_trainer(tmp_path, monitor, best, enable_checkpointing=True, enable_progress_bar=True)
    trainer.fit(Net(), Loader(batches(0)), Loader(batches(9, 6)))
    model = Net()
    model.load_state_dict(torch.load(best.best_model_path, weights_only=True)["state_dict"])
    assert float(best.best_model_score) == pytest.approx(by_sklearn(model, batches(3), batches(9, 6)))
    assert NAME in trainer.progress_bar_metrics


def test_scores_the_average_of_ema(tmp_path: Path) -> None:
    model = Net()
    trainer = make_trainer(tmp_path, EMA(0.9), KNNMonitor(5, reference_loader=batches(3)))
    trainer.fit(model, Loader(batches(0)), Loader(batches(9, 6)))
    assert float(trainer.callback_metrics[NAME]) == pytest.approx(by_sklearn(model, batches(3), batches(9, 6)))


class Data(LightningDataModule):
    """Somebody's data."""

    def __init__(self, train: Pairs, counts: list[int] | None = None) -> None:
        super().__init__()
        self.train = train
        if counts is not None:
            self.class_counts = counts

    def train_dataloader(self) -> Any:
        return Loader(batches(0))

    def val_dataloader(self) -> Any:
        return Loader(batches(9, 6))

    def eval_train_dataloader(self) -> Any:
        return Loader(self.train)


def test_data_module_gives_the_neighbours(tmp_path: Path) -> None:
    model = Net()
    trainer = make_trainer(tmp_path, KNNMonitor(5))
    trainer.fit(model, datamodule=Data(batches(3)))
    assert float(trainer.callback_metrics[NAME]) == pytest.approx(by_sklearn(model, batches(3), batches(9, 6)))
    # Without a DataModule of its own, the module may have the method.
    model.eval_train_dataloader = lambda: Loader(batches(4))  # type: ignore[attr-defined]
    found = make_trainer(tmp_path, KNNMonitor(5)).validate(model, Loader(batches(9, 6)), verbose=False)[0]
    assert found[NAME] == pytest.approx(by_sklearn(model, batches(4), batches(9, 6)))


def test_too_few_neighbours(tmp_path: Path) -> None:
    """Told before the training where it can be known, else after the first epoch; the sanity check does not mind."""
    steps = {}
    for name, callback, data in (
        ("list", KNNMonitor(29, reference_loader=batches(3)), Data(batches(3))),
        ("dataset", KNNMonitor(29, reference_loader=torch.utils.data.DataLoader([(torch.zeros(2), 1)] * 28)), Data(batches(3))),
        ("counts", KNNMonitor(29), Data(batches(3), [8, 10, 10])),
        ("unknown", KNNMonitor(29), Data(batches(3))),
    ):
        model = Net()
        with pytest.raises(MisconfigurationException, match="k=29 neighbours of 28 labelled training samples: set k to at most 28"):
            make_trainer(tmp_path, callback).fit(model, datamodule=data)
        steps[name] = model.steps
    assert steps == {"list": 0, "dataset": 0, "counts": 0, "unknown": 7}
    unlabelled = [(x, torch.full_like(y, -1)) for x, y in batches(3)]
    for callback, data in ((KNNMonitor(1, reference_loader=unlabelled), Data([])), (KNNMonitor(1), Data(unlabelled))):
        with pytest.raises(MisconfigurationException, match="no training sample with a label: give a reference_loader"):
            make_trainer(tmp_path, callback).fit(Net(), datamodule=data)


def test_an_item_of_a_data_set_may_be_a_batch(tmp_path: Path) -> None:
    model, train = Net(), torch.utils.data.DataLoader(batches(3), batch_size=None)  # type: ignore[var-annotated, arg-type]
    found = make_trainer(tmp_path, KNNMonitor(20, reference_loader=train)).validate(model, Loader(batches(9, 6)), verbose=False)[0]
    assert found["val/knn_k20_t0.1_encode"] == pytest.approx(by_sklearn(model, batches(3), batches(9, 6), 20))


def test_what_others_say_of_their_classes(tmp_path: Path) -> None:
    """Counts by name are counts, too; a head of fewer outputs is no hindrance."""
    model = Net()
    model.num_classes = 2  # type: ignore[assignment]
    data = Data(batches(3), {"cat": 8, "dog": 10, "cow": 10})  # type: ignore[arg-type]
    found = make_trainer(tmp_path, KNNMonitor(20)).validate(model, datamodule=data, verbose=False)[0]
    assert found["val/knn_k20_t0.1_encode"] == pytest.approx(by_sklearn(model, batches(3), batches(9, 6), 20))
    with pytest.raises(MisconfigurationException, match="k=29 neighbours of 28"):
        make_trainer(tmp_path, KNNMonitor(29)).validate(model, datamodule=data, verbose=False)


def test_fast_dev_run(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, KNNMonitor(200, reference_loader=batches(3)), fast_dev_run=True)
    trainer.fit(Net(), Loader(batches(0)), Loader(batches(9, 6)))
    assert "val/knn_k200_t0.1_encode" in trainer.callback_metrics


def test_a_training_that_diverges_goes_on(tmp_path: Path) -> None:
    class Diverged(Net):
        def encode(self, x: Tensor) -> Tensor:
            return super().encode(x) / (0 if not self.training else 1)

    trainer = make_trainer(tmp_path, KNNMonitor(5, reference_loader=batches(3)))
    trainer.fit(Diverged(), Loader(batches(0)), Loader(batches(9, 2)))
    assert 0 <= float(trainer.callback_metrics[NAME]) <= 1


def test_mistakes(tmp_path: Path) -> None:
    for settings, match in (
        ({"k": 0}, "k must be at least 1, got 0"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"scores": "fp16"}, "scores must be one of fp32, bf16, got 'fp16'"),
        ({"features": "z"}, "features must be 'encode' or 'forward'"),
    ):
        with pytest.raises(ValueError, match=match):
            KNNMonitor(**settings)  # type: ignore[arg-type]


def run_rank(folder: Path) -> None:
    """One of two processes, each with its own validation samples."""
    trainer = make_trainer(folder, KNNMonitor(5, reference_loader=batches(3)), strategy="ddp", devices=2, use_distributed_sampler=False)
    model, rank = Net(), trainer.global_rank
    trainer.fit(model, Loader(batches(rank)), Loader(batches(8 + rank, 3)))
    torch.save((model.state_dict(), trainer.callback_metrics[NAME]), folder / f"rank_{rank}.pt")


@pytest.mark.slow
def test_two_processes_equal_one(rank_folder: Path) -> None:
    model = Net()
    for rank in range(2):
        weights, found = torch.load(rank_folder / f"rank_{rank}.pt", weights_only=True)
        model.load_state_dict(weights)
        assert float(found) == pytest.approx(by_sklearn(model, batches(3), batches(8, 3) + batches(9, 3)))
