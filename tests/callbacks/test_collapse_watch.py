"""`CollapseWatch` beside a training that collapses, and one that does not."""

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from matrix import Loader, Manual, Net, batches, make_trainer
from torch import Tensor, nn

from litzoo.callbacks import CollapseWatch, FeatureRank
from litzoo.zoo.functional.feature_rank import effective_rank
from litzoo.zoo.functional.supcon import supcon_loss

Pairs = list[tuple[Tensor, Tensor]]
HEALTHY, DEADLY = 0.0, 5.0  # weight decay; under the second, all features are nearly the same within two epochs, and stay so


def clusters(seed: int = 0, sizes: tuple[int, ...] = (12, 12, 12, 7)) -> Pairs:
    generator = torch.Generator().manual_seed(seed)
    labels = [torch.randint(3, (size,), generator=generator) for size in sizes]
    angles = [2 * math.pi / 3 * label + 0.3 * torch.randn(len(label), generator=generator) for label in labels]
    return [(torch.stack([angle.cos(), angle.sin()], dim=1), label) for angle, label in zip(angles, labels, strict=True)]


class Contrastive(LightningModule):
    """Somebody's contrastive training, which tells the loss of collapsed features."""

    def __init__(self, decay: float = HEALTHY) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.decay = decay
        self.encoder = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU())
        self.head = nn.Linear(8, 4)
        self.collapsed_loss: float | None = None
        self.losses: list[tuple[int, float, float]] = []

    def encode(self, x: Tensor) -> Tensor:
        return self.encoder(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encode(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, label = batch
        loss = supcon_loss(self(x), label)
        collapsed = math.log(len(x) * self.trainer.world_size - 1)
        self.collapsed_loss = collapsed
        self.losses.append((self.current_epoch, float(loss.detach()), collapsed))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None: ...

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, weight_decay=self.decay)

    def ratio(self, epoch: int) -> float:
        losses = [loss for of, *loss in self.losses if of == epoch and math.isfinite(loss[0])]
        return sum(loss for loss, _ in losses) / sum(collapsed for _, collapsed in losses)


class Untold(Contrastive):
    """Does not tell."""

    def __getattribute__(self, name: str) -> Any:
        if name == "collapsed_loss":
            raise AttributeError(name)
        return super().__getattribute__(name)


def told(caught: list[warnings.WarningMessage]) -> list[str]:
    return [str(warning.message) for warning in caught if "CollapseWatch" in str(warning.message)]


def fit(folder: Path, model: LightningModule, *extra: Any, **settings: Any) -> tuple[Any, list[str]]:
    """The trainer, and what the callback has said."""
    settings = {"max_epochs": 6, **settings}
    val = Loader(clusters(1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ckpt_path = settings.pop("ckpt_path", None)
        trainer = make_trainer(folder, *extra, **settings)
        trainer.fit(model, Loader(clusters()), val, ckpt_path=ckpt_path, weights_only=None if ckpt_path is None else True)
    return trainer, told(caught)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_training_that_collapses(accumulate: int, tmp_path: Path) -> None:
    model = Contrastive(DEADLY)
    trainer, texts = fit(tmp_path, model, CollapseWatch(), accumulate_grad_batches=accumulate, max_epochs=8)
    assert float(trainer.callback_metrics["train/collapse_ratio"]) == pytest.approx(model.ratio(7), abs=1e-6)
    assert model.ratio(7) == pytest.approx(1.0, abs=1e-3)
    assert len(texts) == 2
    loss, features = sorted(texts)
    assert "for 3 epochs the training loss has stayed at its value for features that are all the same, at last " in loss
    assert "times it: warm the learning rate up" in loss
    assert "for 3 validations the 8 features of Contrastive.encode have spread over few directions" in features
    assert trainer.current_epoch == 8


def test_a_training_that_does_not(tmp_path: Path) -> None:
    model = Contrastive()
    trainer, texts = fit(tmp_path, model, CollapseWatch(stop=True))
    assert texts == []
    assert trainer.current_epoch == 6
    assert float(trainer.callback_metrics["train/collapse_ratio"]) == pytest.approx(model.ratio(5), abs=1e-6)
    assert model.ratio(5) < 0.8
    with torch.no_grad():
        rank = float(effective_rank(model.encode(torch.cat([x for x, _ in clusters(1)]))))
    assert float(trainer.callback_metrics["val/feature_rank"]) == pytest.approx(rank)


def test_ends_the_training(tmp_path: Path) -> None:
    """By either sign; a resumed training that is as collapsed ends at once."""
    for watch in (CollapseWatch(2, min_rank=0.0, stop=True), CollapseWatch(2, tolerance=1e-9, features="forward", stop=True)):
        model, last = Contrastive(DEADLY), ModelCheckpoint(tmp_path, "last", enable_version_counter=False)
        trainer, texts = fit(tmp_path, model, watch, last, max_epochs=30, enable_checkpointing=True)
        epochs = trainer.current_epoch
        assert 2 <= epochs < 10
        assert len(texts) == 1
        assert texts[0].endswith(". The training ends here")
        trainer, texts = fit(tmp_path, Contrastive(DEADLY), watch, ckpt_path=tmp_path / "last.ckpt", max_epochs=30)
        assert (trainer.current_epoch, len(texts)) == (epochs + 1, 1)


def test_the_loss_alone(tmp_path: Path) -> None:
    """Of a module that has no features, or is not validated; the value may be the user's."""

    class Bare(Untold):
        encode = None  # type: ignore[assignment]  # a module without features

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.encoder(x))

    for model, watch, settings in (
        (Bare(DEADLY), CollapseWatch(collapsed_loss=2.25), {}),
        (Contrastive(DEADLY), CollapseWatch(), {"limit_val_batches": 0}),
        (Contrastive(DEADLY), CollapseWatch(min_rank=0), {}),
    ):
        trainer, texts = fit(tmp_path, model, watch, max_epochs=9, **settings)
        assert len(texts) == 1
        assert "training loss" in texts[0]
        assert set(trainer.callback_metrics) == {"train/collapse_ratio"}
        losses = [loss for epoch, loss, _ in model.losses if epoch == 8]
        expected = sum(losses) / len(losses) / 2.25 if isinstance(model, Bare) else model.ratio(8)
        assert float(trainer.callback_metrics["train/collapse_ratio"]) == pytest.approx(expected, abs=1e-6)


def test_the_features_alone(tmp_path: Path) -> None:
    trainer, texts = fit(tmp_path, Untold(DEADLY), CollapseWatch(features="forward"), max_epochs=9)
    assert len(texts) == 1
    assert "the 4 features of Untold.forward have spread over few directions, at last 1.0" in texts[0]
    assert set(trainer.callback_metrics) == {"val/feature_rank_forward"}


def test_a_loss_of_manual_optimisation_is_whole(tmp_path: Path) -> None:
    class Returns(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> Any:  # type: ignore[override]  # typed more loosely than that of its parent
            super().training_step(batch, batch_idx)
            return torch.tensor(3.0)

    trainer = make_trainer(tmp_path, CollapseWatch(collapsed_loss=2.0))
    trainer.fit(Returns(), Loader(batches(0)), Loader(batches(9, 2)))
    assert float(trainer.callback_metrics["train/collapse_ratio"]) == pytest.approx(1.5)


def test_steps_that_overflow_are_left_out(tmp_path: Path) -> None:
    class Overflows(Contrastive):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            return loss if batch_idx != 1 else loss.detach().requires_grad_() * math.nan

    model = Overflows()
    trainer, _ = fit(tmp_path, model, CollapseWatch())
    losses = [loss for epoch, *loss in model.losses if epoch == 5]
    del losses[1]
    expected = sum(loss for loss, _ in losses) / sum(collapsed for _, collapsed in losses)
    assert float(trainer.callback_metrics["train/collapse_ratio"]) == pytest.approx(expected, abs=1e-6)


def test_the_value_may_lie_on_the_device(tmp_path: Path) -> None:
    class Lies(Contrastive):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            self.collapsed_loss = torch.tensor(self.collapsed_loss)  # type: ignore[assignment]  # a number or a tensor, as a module likes
            return loss

    model = Lies()
    trainer, _ = fit(tmp_path, model, CollapseWatch())
    assert float(trainer.callback_metrics["train/collapse_ratio"]) == pytest.approx(model.ratio(5), abs=1e-6)


def test_a_fall_of_the_rank(tmp_path: Path) -> None:
    """From 8 directions to 3, which is no collapse but where a share of the best counts."""

    class Falls(Net):
        def encode(self, x: Tensor) -> Tensor:
            width = 8 if self.trainer.current_epoch == 0 else 3
            return torch.eye(8)[torch.arange(len(x)) % width] + 0 * super().encode(x)

    val = Loader([*batches(9, 1), (torch.zeros(20, 2), torch.zeros(20, dtype=torch.long))])
    for share, count in ((0.0, 0), (0.3, 0), (0.5, 1)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            make_trainer(tmp_path, CollapseWatch(min_share=share), max_epochs=5).fit(Falls(), Loader(batches(0)), val)
        texts = told(caught)
        assert len(texts) == count
        assert all("at last 3.0" in text for text in texts)


def test_leaves_the_rank_to_feature_rank(tmp_path: Path) -> None:
    class Notes(Contrastive):
        def log(self, name: Any, *args: Any, **kwargs: Any) -> None:
            self.names = [*getattr(self, "names", []), name]
            super().log(name, *args, **kwargs)

    for features, beside in (("encode", FeatureRank()), ("forward", FeatureRank())):
        model = Notes()
        fit(tmp_path, model, CollapseWatch(features=features), beside)  # type: ignore[arg-type]  # the parameter is one of both names
        assert model.names.count("val/feature_rank") == 6
        assert model.names.count("val/feature_rank_forward") == (6 if features == "forward" else 0)


def test_a_single_sample_cannot_collapse(tmp_path: Path) -> None:
    one = Loader([(torch.ones(1, 2), torch.ones(1, dtype=torch.long))])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(tmp_path, CollapseWatch(1)).fit(Net(), Loader(batches(0)), one)
    assert told(caught) == []


def test_a_resumed_training_counts_on(tmp_path: Path) -> None:
    """Also in the middle of an epoch, and from a checkpoint that validation has written before the epoch ended."""
    whole = Contrastive(DEADLY)
    kept = [
        ModelCheckpoint(tmp_path / "steps", "{step}", save_top_k=-1, every_n_train_steps=6, save_on_train_epoch_end=False),
        ModelCheckpoint(tmp_path / "val", "{epoch}", save_top_k=-1, save_on_train_epoch_end=False),
    ]
    watch = CollapseWatch(4, min_rank=0)
    trainer, texts = fit(tmp_path, whole, watch, *kept, enable_checkpointing=True, max_epochs=8)
    assert len(texts) == 1
    state = watch.state_dict()
    assert state["stuck"] > 4
    for name in ("steps/step=6.ckpt", "steps/step=18.ckpt", "val/epoch=1.ckpt", "val/epoch=4.ckpt"):
        again, resumed = CollapseWatch(4, min_rank=0), Contrastive(DEADLY)
        other, texts = fit(tmp_path / name, resumed, again, ckpt_path=tmp_path / name, max_epochs=8)
        assert again.state_dict() == state, name
        assert float(other.callback_metrics["train/collapse_ratio"]) == float(trainer.callback_metrics["train/collapse_ratio"])
        assert len(texts) == 1
    short, _ = fit(tmp_path / "short", Contrastive(DEADLY), CollapseWatch(4), max_epochs=2)
    assert float(short.callback_metrics["train/collapse_ratio"]) == pytest.approx(whole.ratio(1), abs=1e-6)
    resumed, again = Contrastive(DEADLY), CollapseWatch(4)
    other, _ = fit(tmp_path / "middle", resumed, again, ckpt_path=tmp_path / "steps/step=6.ckpt", max_epochs=2)
    ratio = float(other.callback_metrics["train/collapse_ratio"])
    assert ratio == pytest.approx(whole.ratio(1), abs=1e-6), "the steps before the checkpoint count"


def test_only_training_is_watched(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, CollapseWatch(1))
    scores = trainer.validate(Contrastive(), Loader(clusters(1)), verbose=False)
    assert scores == [{}]
    trainer.test(Net(), Loader(batches(9, 2)), verbose=False)
    assert set(trainer.callback_metrics) == {"test/loss"}


def test_mistakes(tmp_path: Path) -> None:
    for settings, match in (
        ({"patience": 0}, "patience must be at least 1, got 0"),
        ({"tolerance": 0.0}, "tolerance must lie between 0 and 1"),
        ({"collapsed_loss": 0.0}, "collapsed_loss must be a number above 0"),
        ({"min_rank": -1.0}, "min_rank must be a rank"),
        ({"min_share": 1.0}, r"min_share must be a share of the highest rank in \[0, 1\)"),
        ({"features": "z"}, "features must be 'encode' or 'forward'"),
        ({"every_n_epochs": 0}, "every_n_epochs must be at least 1"),
    ):
        with pytest.raises(ValueError, match=match):
            CollapseWatch(**settings)  # type: ignore[arg-type]  # of mixed types
    for watch, settings in ((CollapseWatch(min_rank=0), {}), (CollapseWatch(), {"limit_val_batches": 0})):
        with pytest.raises(MisconfigurationException, match="CollapseWatch has nothing to watch: Untold has no collapsed_loss, and"):
            fit(tmp_path, Untold(), watch, **settings)
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `CollapseWatch`"):  # Lightning's
        make_trainer(tmp_path, CollapseWatch(), CollapseWatch(features="forward"))


def run_rank(folder: Path) -> None:
    """One of two processes, each with its own samples: the loss is that of both."""
    watch = CollapseWatch(2, stop=True)
    trainer = make_trainer(folder, watch, strategy="ddp", devices=2, use_distributed_sampler=False, max_epochs=30)
    model, rank = Contrastive(DEADLY), trainer.global_rank
    trainer.fit(model, Loader(clusters(rank)), Loader(clusters(1 + rank)))
    torch.save(
        {"losses": model.losses, "epochs": trainer.current_epoch, "state": watch.state_dict()}
        | {name: float(value) for name, value in trainer.callback_metrics.items()},
        folder / f"rank_{rank}.pt",
    )


@pytest.mark.slow
def test_two_processes_agree(rank_folder: Path) -> None:
    first, second = (torch.load(rank_folder / f"rank_{rank}.pt", weights_only=True) for rank in range(2))
    assert 2 <= first["epochs"] == second["epochs"] < 30
    assert first["state"] == second["state"]
    losses = [loss for epoch, *loss in first["losses"] + second["losses"] if epoch == first["epochs"] - 1]
    expected = sum(loss for loss, _ in losses) / sum(collapsed for _, collapsed in losses)
    for found in (first, second):
        assert found["train/collapse_ratio"] == pytest.approx(expected, abs=1e-6)
        assert found["val/feature_rank"] < 1.5
