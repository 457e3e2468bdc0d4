"""`LinearProbe` against a loop written by hand."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from matrix import CLASSES, EPOCHS, Loader, Net, batches, make_trainer
from torch import Tensor, nn

from litzoo.callbacks import SAM, LinearProbe
from litzoo.zoo.batch import Batch

Pairs = list[tuple[Tensor, Tensor]]


class Notes(Callback):
    """Notes the features that each training batch shows the probe: those before its optimiser step, or after it."""

    def __init__(self, after: bool) -> None:
        self.after = after
        self.features: list[Tensor] = []
        self.label: list[Tensor] = []

    def _note(self, pl_module: Any, batch: Any) -> None:
        modes = [module.training for module in pl_module.modules()]
        pl_module.eval()
        with torch.no_grad():
            self.features.append(Net.encode(pl_module, batch[0]))
        self.label.append(batch[1])
        for module, mode in zip(pl_module.modules(), modes, strict=True):
            module.training = mode

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if not self.after:
            self._note(pl_module, batch)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.after:
            self._note(pl_module, batch)


def by_hand(features: list[Tensor], label: list[Tensor], lr: float = 3e-3) -> tuple[nn.Linear, list[float]]:
    """A linear layer from zeros, and its losses."""
    layer = nn.Linear(features[0].shape[1], CLASSES)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    optimizer = torch.optim.Adam(layer.parameters(), lr=lr)
    losses = []
    for x, y in zip(features, label, strict=True):
        known = y >= 0
        loss = F.cross_entropy(layer(x[known]), y[known])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return layer, losses


def assert_is(state: dict[str, Any], layer: nn.Linear) -> None:
    """Adam divides the rounding errors of small gradients by these gradients."""
    assert layer.weight.abs().max() > 0.01
    torch.testing.assert_close(state["weight"], layer.weight.detach(), rtol=0, atol=5e-5)
    torch.testing.assert_close(state["bias"], layer.bias.detach(), rtol=0, atol=5e-5)


def accuracy(layer: nn.Linear, model: Net, pairs: Pairs) -> float:
    model.eval()
    with torch.no_grad():
        right = torch.cat([(layer(model.encode(x)).argmax(1) == y)[y >= 0] for x, y in pairs])
    return float(right.float().mean())


class Apart(Net):
    """Its step does not call `encode`."""

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)))


@pytest.mark.parametrize("kind", [Net, Apart])
def test_equals_a_loop_by_hand(kind: type[Net], tmp_path: Path) -> None:
    """On features that the step computed, else on those of the same inputs encoded once more, after the step."""
    probe, notes, model = LinearProbe(CLASSES), Notes(after=kind is Apart), kind()
    trainer = make_trainer(tmp_path, probe, notes)
    trainer.fit(model, Loader(batches(0)), Loader(batches(9, 6)))
    layer, losses = by_hand(notes.features, notes.label)
    assert_is(probe.state_dict(), layer)
    found = trainer.callback_metrics
    assert float(found["train/probe_loss"]) == pytest.approx(sum(losses[-7:]) / 7, abs=1e-6)
    assert float(found["val/probe_accuracy"]) == pytest.approx(accuracy(layer, model, batches(9, 6)))
    trainer.test(model, Loader(batches(8, 4)), verbose=False)
    assert float(trainer.callback_metrics["test/probe_accuracy"]) == pytest.approx(accuracy(layer, model, batches(8, 4)))


def test_of_the_logits(tmp_path: Path) -> None:
    probe, other, model = LinearProbe(CLASSES, features="forward", lr=0.1), LinearProbe(CLASSES), Net()
    trainer = make_trainer(tmp_path, probe, other)
    trainer.fit(model, Loader(batches(0)), Loader(batches(9, 6)))
    assert probe.state_dict()["weight"].shape == (CLASSES, CLASSES)
    assert other.state_dict()["weight"].shape == (CLASSES, 8)
    assert {"val/probe_accuracy", "val/probe_accuracy_forward", "train/probe_loss_forward"} <= set(trainer.callback_metrics)
    assert not {"encode", "forward"} & set(vars(model))


def test_samples_without_label(tmp_path: Path) -> None:
    train = [(x, torch.tensor([*y[:2].tolist(), -1, -1])) for x, y in batches(0)]

    class Unsupervised(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return (self.encode(batch[0]) - 0.5).square().mean()

        def validation_step(self, batch: Any, batch_idx: int) -> None: ...  # type: ignore[override]

    probe, notes, model = LinearProbe(CLASSES), Notes(after=False), Unsupervised()
    trainer = make_trainer(tmp_path, probe, notes)
    val = [(x, torch.tensor([-1, *y[1:].tolist()])) for x, y in batches(9, 6)]
    trainer.fit(model, Loader(train), Loader(val))
    layer, _ = by_hand(notes.features, notes.label)
    assert_is(probe.state_dict(), layer)
    assert float(trainer.callback_metrics["val/probe_accuracy"]) == pytest.approx(accuracy(layer, model, val))


def test_features_that_overflow_leave_nothing(tmp_path: Path) -> None:
    """As in a step of half precision that is left out."""

    class Overflows(Net):
        def encode(self, x: Tensor) -> Tensor:
            scale = torch.ones(len(x), 1)
            if self.training and self.steps == 3:
                scale[:2] = torch.inf
            return super().encode(x) * scale

        def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:  # type: ignore[override]
            self.steps += 1
            loss = F.cross_entropy(self(batch[0]), batch[1])
            return loss if loss.isfinite() else None

    probe, notes = LinearProbe(CLASSES), Notes(after=False)
    make_trainer(tmp_path, probe, notes).fit(Overflows(), Loader(batches(0)), Loader(batches(9, 2)))
    notes.label[2] = torch.tensor([-1, -1, *notes.label[2][2:].tolist()])
    assert_is(probe.state_dict(), by_hand(notes.features, notes.label)[0])


def test_the_first_pass_of_sam_counts(tmp_path: Path) -> None:
    probe, notes = LinearProbe(CLASSES), Notes(after=False)
    make_trainer(tmp_path, SAM(0.5), probe, notes).fit(Net(), Loader(batches(0)), Loader(batches(9, 2)))
    assert_is(probe.state_dict(), by_hand(notes.features, notes.label)[0])


class Views(Net):
    """Two views of each image, one of three orders in which models put them together."""

    order = "samples"

    def encode(self, x: Tensor) -> Tensor:
        return super().encode(x.flatten(1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        views = batch.input.transpose(0, 1) if self.order == "views" else batch.input
        label = batch.label.repeat(2) if self.order == "views" else batch.label.repeat_interleave(2)
        x = views.flatten(0, 1)
        if self.order == "mixed":
            x = 0.5 * (x + x.flip(0))
        return F.cross_entropy(self.last(self.encode(x)), label)

    def validation_step(self, batch: Any, batch_idx: int) -> None: ...  # type: ignore[override]


@pytest.mark.parametrize("order", ["samples", "views", "mixed"])
def test_views(order: str, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    train = [Batch(torch.randn(4, 2, 1, 1, 2, generator=generator), y, torch.arange(4)) for _, y in batches(0)]

    class NotesViews(Notes):
        def _note(self, pl_module: Any, batch: Any) -> None:
            super()._note(pl_module, (batch.input.flatten(0, 1).flatten(1), batch.label.repeat_interleave(2)))

    probe, notes, model = LinearProbe(CLASSES), NotesViews(after=order == "mixed"), Views()
    model.order = order
    make_trainer(tmp_path, probe, notes).fit(model, Loader(train), Loader([(x[:, None, None], y) for x, y in batches(9, 2)]))  # type: ignore[arg-type]
    assert_is(probe.state_dict(), by_hand(notes.features, notes.label)[0])


class Data(LightningDataModule):
    def __init__(self, **known: Any) -> None:
        super().__init__()
        vars(self).update(known)

    def train_dataloader(self) -> Any:
        return Loader(batches(0))

    def val_dataloader(self) -> Any:
        return Loader(batches(9, 2))


def test_number_of_classes(tmp_path: Path) -> None:
    probe = LinearProbe()
    make_trainer(tmp_path, probe).fit(Net(), datamodule=Data(num_classes=5))
    assert len(probe.state_dict()["bias"]) == 5
    model = Net()
    model.num_classes = 4  # type: ignore[assignment]
    make_trainer(tmp_path, probe).fit(model, datamodule=Data(num_classes=5))
    assert len(probe.state_dict()["bias"]) == 4, "a second fit begins anew"


def test_a_test_needs_a_trained_probe(tmp_path: Path) -> None:
    model, val = Net(), Loader(batches(9, 6))
    trainer = make_trainer(tmp_path, LinearProbe(CLASSES))
    trainer.fit(model, Loader(batches(0)), val)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    expected = float(trainer.callback_metrics["val/probe_accuracy"])
    fresh = make_trainer(tmp_path, LinearProbe(CLASSES))
    assert "val/probe_accuracy" not in fresh.validate(Net(), val, verbose=False)[0]
    found = make_trainer(tmp_path, LinearProbe(CLASSES)).validate(
        Net(), val, ckpt_path=tmp_path / "last.ckpt", verbose=False, weights_only=True
    )[0]
    assert found["val/probe_accuracy"] == pytest.approx(expected)
    with pytest.raises(MisconfigurationException, match="was saved for 3 classes, and now there are 4: set num_classes to 3"):
        make_trainer(tmp_path, LinearProbe(4), max_epochs=9).fit(
            Net(), Loader(batches(0)), val, ckpt_path=tmp_path / "last.ckpt", weights_only=True
        )


def test_mistakes(tmp_path: Path) -> None:
    for settings, match in (({"num_classes": 1}, "num_classes must be at least 2"), ({"lr": 0.0}, "lr must be positive")):
        with pytest.raises(ValueError, match=match):
            LinearProbe(**settings)  # type: ignore[arg-type]
    with pytest.raises(MisconfigurationException, match=r"LinearProbe does not know how many classes there are: .*: set num_classes"):
        make_trainer(tmp_path, LinearProbe()).fit(Net(), datamodule=Data())
    with pytest.raises(MisconfigurationException, match="nothing to learn, no training sample has a label"):
        make_trainer(tmp_path, LinearProbe()).fit(Net(), datamodule=Data(num_classes=3, class_counts=[0, 0, 0]))
    model = Net()
    with pytest.raises(ValueError, match="LinearProbe has 2 classes, but there are labels up to 2: set num_classes"):
        make_trainer(tmp_path, LinearProbe(2)).fit(model, datamodule=Data())
    assert "encode" not in vars(model)


def run_rank(folder: Path) -> None:
    """One of two processes, each with its own samples, of which some have no label."""
    notes, probe = Notes(after=False), LinearProbe(CLASSES)
    trainer = make_trainer(folder, probe, notes, strategy="ddp", devices=2, use_distributed_sampler=False)
    model, rank = Net(), trainer.global_rank
    model.training_step = lambda batch, batch_idx: (model(batch[0]) - 1).square().mean()  # type: ignore[method-assign]
    train = [(x, y if rank else torch.tensor([*y[:2].tolist(), -1, -1])) for x, y in batches(rank)]
    trainer.fit(model, Loader(train), Loader(batches(8 + rank, 3)))
    found = {name: trainer.callback_metrics[name] for name in ("val/probe_accuracy", "train/probe_loss")}
    torch.save((notes.features, notes.label, probe.state_dict(), model.state_dict(), found), folder / f"rank_{rank}.pt")


@pytest.mark.slow
def test_two_processes_equal_one(rank_folder: Path) -> None:
    """The probe takes the steps of one that sees the samples of both."""
    ranks = [torch.load(rank_folder / f"rank_{rank}.pt", weights_only=True) for rank in range(2)]
    features, label = ([torch.cat(pair) for pair in zip(ranks[0][column], ranks[1][column], strict=True)] for column in (0, 1))
    layer, losses = by_hand(features, label)
    model = Net()
    model.load_state_dict(ranks[0][3])
    for _, _, probe, _, found in ranks:
        assert_is(probe, layer)
        assert torch.equal(probe["weight"], ranks[0][2]["weight"])
        weights = torch.tensor([float((y >= 0).sum()) for y in label[-7:]])
        assert float(found["train/probe_loss"]) == pytest.approx(
            float((weights * torch.tensor(losses[-7:])).sum() / weights.sum()), abs=1e-5
        )
        assert float(found["val/probe_accuracy"]) == pytest.approx(accuracy(layer, model, batches(8, 3) + batches(9, 3)))
    assert len(losses) == 7 * EPOCHS
