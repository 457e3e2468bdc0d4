"""FGM and SAM: the second pass leaves no trace, and settings under which it would be wrong are refused. The matrix has the rest."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from matrix import BATCHES, EPOCHS, Loader, Net, WithMomentum, batches, make_trainer
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from litzoo.callbacks import FGM, SAM

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
Make = Callable[[], Callback]
BOTH = pytest.mark.parametrize("make", [lambda: FGM(0.5, "first"), lambda: SAM(0.5)], ids=["FGM", "SAM"])


class Traced(Net):
    """BatchNorm, dropout, metrics of all kinds; a learning rate of 0, so that only traces can make a difference."""

    def __init__(self) -> None:
        super().__init__(norm=True)
        self.mean = MeanMetric()
        self.collection = MetricCollection([MulticlassAccuracy(3), MulticlassF1Score(3)])
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.mean.update(loss.detach())
        self.collection.update(self(batch[0]).detach(), batch[1])
        self.log_dict({"a": loss, "b": 2 * loss})
        return loss

    def on_train_epoch_end(self) -> None:
        self.losses += [float(self.mean.compute()), *map(float, self.collection.compute().values())]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


@BOTH
@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_second_pass_leaves_no_trace(make: Make, accumulate: int, tmp_path: Path) -> None:
    results = []
    for made in ([], [make()]):
        torch.manual_seed(5)
        model = Traced()
        torch.manual_seed(5)
        trainer = make_trainer(tmp_path, *made, accumulate_grad_batches=accumulate)
        trainer.fit(model, Loader(batches(0)), Loader(batches(9, 2)))
        results.append((model, dict(trainer.callback_metrics), torch.get_rng_state()))
    (bare, bare_metrics, bare_rng), (model, metrics, rng) = results
    assert model.steps == 2 * bare.steps, "the second pass ran"
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in bare.state_dict().items())
    assert bare.losses == model.losses
    assert bare_metrics.keys() == metrics.keys()
    assert all(torch.equal(value, metrics[name]) for name, value in bare_metrics.items())
    assert torch.equal(bare_rng, rng)
    assert "log" not in vars(model)
    assert "log_dict" not in vars(model)


class Restless(Net):
    """Replaces a buffer in every step, draws numpy's numbers, and takes its labels out of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("counter", torch.zeros(1))
        self.drawn: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.counter = self.counter + 1
        self.drawn.append(float(np.random.rand()))
        return super().training_step((batch["x"], batch.pop("y")), batch_idx)


class Mappings(Loader):
    def __iter__(self) -> Iterator[Any]:
        return ({"x": x, "y": y} for x, y in super().__iter__())


@BOTH
def test_replaced_buffers_numpy_and_emptied_batches(make: Make, tmp_path: Path) -> None:
    drawn = []
    for made in ([], [make()]):
        np.random.seed(3)
        model = Restless()
        make_trainer(tmp_path, *made, max_epochs=1).fit(model, Mappings(batches(0)))
        assert float(model.counter) == BATCHES
        drawn.append(model.drawn[:: 1 + len(made)])
    assert drawn[0] == drawn[1]


@BOTH
def test_small_gradients_in_half_precision(make: Make, tmp_path: Path) -> None:
    class Small(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * 1e-6

    model = Small()
    make_trainer(tmp_path, make(), precision="16-true").fit(model, Loader(batches(0)))
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_the_radius_may_be_scheduled(tmp_path: Path) -> None:
    for callback, name in ((FGM(0.5, "first"), "epsilon"), (SAM(0.5), "rho")):
        setattr(callback, name, 0.0)
        model = Net()
        make_trainer(tmp_path, callback).fit(model, Loader(batches(0)))
        assert model.steps == EPOCHS * BATCHES, "0 switches it off"


@BOTH
def test_nothing_is_kept_after_an_exception(make: Make, tmp_path: Path) -> None:
    callback: Any = make()
    with pytest.raises(RuntimeError):
        make_trainer(tmp_path, callback).fit(Fails(), Loader(batches(0)))
    assert (callback._targets, callback._window, callback._arguments) == ([], [], ())


@BOTH
def test_every_n_steps(make: Make, tmp_path: Path) -> None:
    callback: Any = make()
    callback.every_n_steps = 4
    model = Net()
    make_trainer(tmp_path, callback).fit(model, Loader(batches(0)))
    steps = EPOCHS * BATCHES
    assert model.steps == steps + -(-steps // 4)


class Fails(Net):
    """Its second pass fails."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if self.steps % 2 == 0:
            raise RuntimeError("in the second pass")
        return loss


@BOTH
def test_a_failing_second_pass_moves_no_weight(make: Make, tmp_path: Path) -> None:
    model = Fails()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="in the second pass"):
        make_trainer(tmp_path, make()).fit(model, Loader(batches(0)))
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert "log" not in vars(model)


@BOTH
def test_an_overflow_skips_the_step(make: Make, tmp_path: Path) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=10_000)
    model = Net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    settings: dict[str, Any] = {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)], "max_epochs": 1}
    make_trainer(tmp_path, make(), limit_train_batches=1, **settings).fit(model, Loader(batches(0)))
    assert scaler.get_scale() < 2.0**40, "it did overflow"
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    make_trainer(tmp_path, make(), **{**settings, "max_epochs": 6}).fit(model, Loader(batches(0)))
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert not torch.equal(before["last.weight"], model.state_dict()["last.weight"]), "steps without overflow are taken"


class Odd(Net):
    """A step that returns a mapping and does not ask for the index; now and then it skips a batch."""

    def training_step(self, batch: Any) -> Any:  # type: ignore[override]
        if float(batch[0].sum()) > 0:
            return None
        return {"loss": F.cross_entropy(self(batch[0]), batch[1]), "more": 1}


class Seen(Callback):
    """How many batches the second pass has run over."""

    def __init__(self, watched: Any) -> None:
        self.watched = watched
        self.windows: list[int] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self.windows.append(len(self.watched._window))


@BOTH
def test_mappings_skipped_batches_and_steps_without_index(make: Make, tmp_path: Path) -> None:
    callback: Any = make()
    seen = Seen(callback)
    pairs = batches(0)
    assert any(float(x.sum()) > 0 for x, _ in pairs)
    model = Odd()
    make_trainer(tmp_path, callback, seen, accumulate_grad_batches=2).fit(model, Loader(pairs))
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert set(seen.windows) <= {0, 1}, "a window holds no batch of an earlier step"


class Words(LightningModule):
    """A stranger's text classifier."""

    def __init__(self, sparse: bool = False) -> None:
        super().__init__()
        self.word_embedding = nn.Embedding(10, 4, sparse=sparse)
        self.head = nn.Linear(4, 2)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.head(self.word_embedding(batch[0]).mean(dim=1)), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def words() -> Loader:
    return Loader([(torch.randint(10, (4, 5)), torch.randint(2, (4,))) for _ in range(3)])


def test_targets() -> None:
    model = Words()
    weight = model.word_embedding.weight
    assert FGM(1, "embed").targets(model) == [weight]
    assert FGM(1, r"embedding\.weight$").targets(model) == [weight]
    assert FGM(1, model.word_embedding).targets(model) == [weight]
    assert FGM(1, lambda name, parameter: parameter.dim() == 2 and "word" in name).targets(model) == [weight]
    assert SAM().targets(model) == list(model.parameters())


@pytest.mark.parametrize("target", ["emb.", nn.Linear(2, 2), lambda name, parameter: False])
def test_a_target_that_matches_nothing_is_refused(target: Any, tmp_path: Path) -> None:
    if target == "emb.":  # the pattern of the tutorials: a dot that was meant as one
        target = r"emb\."
    with pytest.raises(
        MisconfigurationException, match=r"FGM found no weight for target .*the names are word_embedding.weight, head.weight"
    ):
        make_trainer(tmp_path, FGM(1, target)).fit(Words(), words())


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="sparse"):
        make_trainer(tmp_path, FGM(1, "embedding")).fit(Words(sparse=True), words())
    with pytest.raises(MisconfigurationException, match="FGM does not compose with SAM"):
        make_trainer(tmp_path, FGM(1, "embedding"), SAM()).fit(Words(), words())

    class Quasi(Words):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.LBFGS(self.parameters())

    class Iterates(Words):
        def training_step(self, dataloader_iter: Any) -> Tensor:  # type: ignore[override]
            return self.head.weight.sum()

    for make in (lambda: FGM(1, "embedding"), SAM):
        with pytest.raises(MisconfigurationException, match="does not work with LBFGS"):
            make_trainer(tmp_path, make()).fit(Quasi(), words())
        with pytest.raises(MisconfigurationException, match="dataloader_iter"):
            make_trainer(tmp_path, make()).fit(Iterates(), words())


def test_a_frozen_target_takes_one_pass(tmp_path: Path) -> None:
    model = WithMomentum()
    model.first.requires_grad_(False)
    make_trainer(tmp_path, FGM(0.5, "first"), max_epochs=1).fit(model, Loader(batches(0)))
    assert model.steps == BATCHES


@pytest.mark.parametrize(
    ("make", "words_of_error"),
    [
        (lambda: FGM(-1, "x"), "epsilon is the length"),
        (lambda: FGM(float("nan"), "x"), "epsilon is the length"),
        (lambda: FGM(1, "("), "no regular expression"),
        (lambda: FGM(1, "x", every_n_steps=0), "every_n_steps must be at least 1"),
        (lambda: SAM(-0.1), "rho is the radius"),
        (lambda: SAM(every_n_steps=0), "every_n_steps must be at least 1"),
    ],
)
def test_bad_settings(make: Make, words_of_error: str) -> None:
    with pytest.raises(ValueError, match=words_of_error):
        make()
