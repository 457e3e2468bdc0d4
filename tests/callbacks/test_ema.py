"""EMA: the average is the formula's, and none of the nine defects of Lightning's EMAWeightAveraging (2.6.6) is back."""

import copy
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from matrix import BATCHES, Loader, Manual, Net, Steps, WithMomentum, batches, make_trainer
from torch import Tensor, nn

from litzoo.callbacks import EMA, SWA, StepSeed

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
Weights = dict[str, Tensor]


class Scripted(LightningModule):
    """Its weight moves by minus the batch in every step, so that the sequence of weights is known beforehand."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, dtype=dtype))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self.weight * batch.to(self.weight.dtype)).sum()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val/weight", self.weight.sum().float())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


class Record(Callback):
    """Notes the state of the training before the first batch and after each, and of each validation."""

    def __init__(self) -> None:
        self.raw: list[Weights] = []
        self.validated: list[Weights] = []
        self.scores: list[float] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.raw.append(clone(pl_module))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.raw.append(clone(pl_module))

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        self.last = clone(pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.validated.append(self.last)
        self.scores.extend(float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/"))


def clone(model: nn.Module) -> Weights:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(first: Weights, second: Weights) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def ema(sequence: list[np.ndarray], decay: float, warmup: bool) -> list[np.ndarray]:
    """The averages after each step in float64; the first of the sequence is the initial weight."""
    averages = [sequence[0].astype(np.float64)]
    for t, weight in enumerate(sequence[1:], start=1):
        d = min(decay, (1 + t) / (10 + t)) if warmup else decay
        averages.append(d * averages[-1] + (1 - d) * weight)
    return averages


def moves(number: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(number, 3, generator=generator, dtype=torch.float64))


def loaders() -> tuple[Loader, Loader]:
    return Loader(batches(0)), Loader(batches(9, 2))


def averaged(raw: list[Weights], decay: float, warmup: bool = True) -> list[Weights]:
    """The averages of whole recorded states; what is an integer is that of the last step."""
    floats = {
        name: ema([state[name].double().numpy() for state in raw], decay, warmup) for name in raw[0] if raw[0][name].is_floating_point()
    }
    return [
        {name: torch.from_numpy(np.asarray(floats[name][t])) if name in floats else value for name, value in state.items()}
        for t, state in enumerate(raw)
    ]


def assert_close(found: Weights, expected: Weights, tolerance: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name].double(), value.double(), atol=tolerance, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


def loss_of(weights: Weights, pairs: list[tuple[Tensor, Tensor]]) -> float:
    """A hand evaluation of a `Net(norm=True)`."""
    model = Net(norm=True).double()
    model.load_state_dict(weights)
    model.eval()
    with torch.no_grad():
        return float(np.mean([float(F.cross_entropy(model(x.double()), y)) for x, y in pairs]))


# The formula


@pytest.mark.parametrize("warmup", [True, False])
@pytest.mark.parametrize("decay", [0.3, 0.95])
def test_closed_form(decay: float, warmup: bool, tmp_path: Path) -> None:
    script, model, record = moves(20), Scripted(), Record()
    make_trainer(tmp_path, EMA(decay, warmup), record, max_epochs=1, val_check_interval=5).fit(
        model, Loader(script), Loader([torch.zeros(3)])
    )
    sequence = [np.zeros(3), *np.cumsum([-move.numpy() for move in script], axis=0)]
    expected = ema(sequence, decay, warmup)
    for state, weight in zip(record.raw, sequence, strict=True):
        np.testing.assert_allclose(state["weight"], weight, atol=1e-12, err_msg="the training goes on with its own weights")
    for number, state in enumerate(record.validated[1:], start=1):
        np.testing.assert_allclose(state["weight"], expected[5 * number], atol=1e-12)
    np.testing.assert_allclose(model.weight.detach(), expected[-1], atol=1e-12)
    assert len(record.validated) == 5
    assert not np.allclose(expected[-1], sequence[-1], atol=1e-3)


def test_warmup_ends(tmp_path: Path) -> None:
    """With decay 0.3 the warm-up is over after the third step: 4/13 > 0.3."""
    script = moves(6)
    ends = []
    for warmup in (True, False):
        model = Scripted()
        make_trainer(tmp_path, EMA(0.3, warmup), max_epochs=1).fit(model, Loader(script))
        ends.append(model.weight.detach().clone())
    assert 1e-4 < float((ends[0] - ends[1]).abs().max()) < 0.1


def test_decay_one_keeps_the_initial_weights(tmp_path: Path) -> None:
    model, record = Net(norm=True), Record()
    before = clone(model)
    make_trainer(tmp_path, EMA(1.0, warmup=False), record).fit(model, *loaders())
    after = clone(model)
    for name, value in before.items():
        if value.is_floating_point():
            assert torch.equal(after[name], value), name
    assert not torch.equal(record.raw[-1]["first.weight"], before["first.weight"])


def test_decay_zero_gives_the_raw_weights(tmp_path: Path) -> None:
    model, record = Net(norm=True), Record()
    make_trainer(tmp_path, EMA(0.0), record).fit(model, *loaders())
    assert same(clone(model), record.raw[-1])


@pytest.mark.parametrize("decay", [-0.1, 1.1, float("nan")])
def test_decay_out_of_range(decay: float) -> None:
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\], got"):
        EMA(decay)


# The nine defects; the refusal of save_weights_only (3) and exceptions (5) are in the matrix


def test_defect_1_test_after_fit_takes_the_average(tmp_path: Path) -> None:
    checkpoint, model, record = ModelCheckpoint(tmp_path, "best"), Net(norm=True), Record()
    trainer = make_trainer(tmp_path, EMA(0.9), record, checkpoint, enable_checkpointing=True)
    trainer.fit(model, *loaders())
    expected = loss_of(averaged(record.raw, 0.9)[-1], batches(9, 2))
    nn.init.zeros_(model.last.weight)
    found = trainer.test(model, loaders()[1], ckpt_path=checkpoint.best_model_path, verbose=False, weights_only=True)[0]["test/loss"]
    assert found == pytest.approx(expected, abs=1e-5)
    assert abs(loss_of(record.raw[-1], batches(9, 2)) - expected) > 1e-4, "the raw weights would score otherwise"


def test_defect_2_second_fit_begins_anew(tmp_path: Path) -> None:
    callback = EMA(0.5)
    for seed in range(2):
        script, model = moves(6, seed), Scripted()
        make_trainer(tmp_path, callback, max_epochs=1).fit(model, Loader(script))
        expected = ema([np.zeros(3), *np.cumsum([-move.numpy() for move in script], axis=0)], 0.5, True)[-1]
        np.testing.assert_allclose(model.weight.detach(), expected, atol=1e-12)
        assert callback.state_dict()["updates"] == 6


def test_defect_4_until_the_first_update_nothing_is_touched(tmp_path: Path) -> None:
    """The sanity check and the validations within the first accumulation see the initial weights, as do checkpoints."""
    checkpoint, model, record = ModelCheckpoint(tmp_path, "{step}-{batch}", save_top_k=-1, every_n_train_steps=1), Scripted(), Record()
    nn.init.ones_(model.weight)
    settings = {"accumulate_grad_batches": 3, "val_check_interval": 1, "max_epochs": 1, "enable_checkpointing": True}
    trainer = make_trainer(tmp_path, EMA(0.9), record, checkpoint, **settings)
    trainer.fit(model, Loader(moves(6)), Loader([torch.zeros(3)]))
    for state in record.validated[:3]:
        assert state["weight"].tolist() == [1.0, 1.0, 1.0]
    assert record.scores[:3] == [3.0, 3.0, 3.0], "monitored values"
    assert record.validated[3]["weight"].tolist() != [1.0, 1.0, 1.0]
    assert len(record.validated) == 7


def test_defect_4_no_update_at_all(tmp_path: Path) -> None:
    model = Scripted()
    nn.init.ones_(model.weight)
    trainer = make_trainer(tmp_path, EMA(0.9), limit_train_batches=0)
    trainer.fit(model, Loader(moves(3)))
    trainer.save_checkpoint(tmp_path / "untouched.ckpt")
    assert model.weight.tolist() == [1.0, 1.0, 1.0]
    assert torch.load(tmp_path / "untouched.ckpt", weights_only=True)["state_dict"]["weight"].tolist() == [1.0, 1.0, 1.0]


def test_defect_6_two_optimizers_are_one_update_a_batch(tmp_path: Path) -> None:
    callback = EMA(0.9)
    make_trainer(tmp_path, callback).fit(Manual(2), *loaders())
    assert callback.state_dict()["updates"] == 3 * BATCHES


def test_defect_7_pickling_in_the_middle_of_training(tmp_path: Path) -> None:
    """`ddp_spawn` and Ray pickle the callback; in the middle of a validation it holds two sets of weights."""

    class Pickle(Callback):
        number = 0

        def check(self, trainer: Trainer, *_: Any, **__: Any) -> None:
            for twin in (pickle.loads(pickle.dumps(callback)), copy.deepcopy(callback)):
                assert same(twin.state_dict()["raw"], callback.state_dict()["raw"])
                assert twin.state_dict()["updates"] == callback.state_dict()["updates"]
            self.number += 1

        on_train_batch_end = on_validation_batch_end = check  # type: ignore[assignment]

    callback, checks = EMA(0.9), Pickle()
    make_trainer(tmp_path, callback, checks, max_epochs=1).fit(Net(norm=True), *loaders())
    assert checks.number == BATCHES + 4
    checks.check(None)  # type: ignore[arg-type]


def test_defect_8_bfloat16_weights_are_averaged_in_float32(tmp_path: Path) -> None:
    """The weight jumps from 0 to 1 in the first step; 500 updates at decay 0.999 move the average to 0.394."""
    model, callback = Scripted(torch.float32), EMA(0.999, warmup=False)
    jump = [torch.full((3,), -1.0), *[torch.zeros(3)] * 499]
    make_trainer(tmp_path, callback, max_epochs=1, precision="bf16-true").fit(model, Loader(jump))
    expected = 1 - 0.999**500
    assert callback.state_dict()["average"]["weight"].dtype == torch.float32
    np.testing.assert_allclose(callback.state_dict()["average"]["weight"], expected, atol=1e-5)
    assert model.weight.dtype == torch.bfloat16
    np.testing.assert_allclose(model.weight.detach().float(), expected, atol=2**-9)


def test_defect_8_resuming_keeps_the_float32_average(tmp_path: Path) -> None:
    def train(epochs: int, ckpt_path: Path | None = None) -> tuple[EMA, Weights, Any]:
        model, callback = Net(norm=True), EMA(0.99)
        trainer = make_trainer(tmp_path, StepSeed(1), callback, max_epochs=epochs, precision="bf16-true")
        trainer.fit(model, *loaders(), ckpt_path=ckpt_path, weights_only=None if ckpt_path is None else True)
        return callback, clone(model), trainer

    whole, weights, _ = train(4)
    train(2)[2].save_checkpoint(tmp_path / "half.ckpt")
    resumed, again, _ = train(4, tmp_path / "half.ckpt")
    assert same(weights, again)
    assert set(whole.state_dict()["average"]) == {name for name, value in weights.items() if value.dtype == torch.bfloat16}
    for key in ("average", "raw"):
        assert same(whole.state_dict()[key], resumed.state_dict()[key]), key


class Late(Steps, LightningModule):
    """Makes its last layer in a hook."""

    def __init__(self, hook: str) -> None:
        super().__init__()
        self.hook = hook
        self.last: Any = None

    def setup(self, stage: str) -> None:
        if self.hook == "setup":
            self.last = nn.Linear(8, 3)

    def configure_model(self) -> None:
        if self.hook == "configure_model" and self.last is None:
            self.last = nn.Linear(8, 3)


@pytest.mark.parametrize("hook", ["setup", "configure_model"])
def test_defect_9_layers_made_in_a_hook(hook: str, tmp_path: Path) -> None:
    model, record = Late(hook), Record()
    make_trainer(tmp_path, EMA(0.9), record).fit(model, *loaders())
    assert_close(clone(model), averaged(record.raw, 0.9)[-1])
    assert "last.weight" in clone(model)


def test_defect_9_integer_buffers_are_those_of_the_last_step(tmp_path: Path) -> None:
    model, record = Net(norm=True), Record()
    make_trainer(tmp_path, EMA(0.99), record).fit(model, *loaders())
    seen = [int(state["norm.0.num_batches_tracked"]) for state in record.validated]
    assert seen == [0, BATCHES, 2 * BATCHES, 3 * BATCHES]
    assert int(model.norm[0].num_batches_tracked) == 3 * BATCHES  # type: ignore[index,arg-type]


@pytest.mark.parametrize("name", ["FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy"])
def test_defect_9_sharding_is_refused(name: str) -> None:
    strategy = type("Mine", (type(name, (), {}),), {})()
    stub = SimpleNamespace(strategy=strategy, callbacks=[], checkpoint_callbacks=[])
    with pytest.raises(MisconfigurationException, match="EMA does not work under Mine, which shards parameters: use strategy='ddp'"):
        EMA().setup(stub, Net(), "fit")  # type: ignore[arg-type]
    EMA().setup(stub, Net(), "test")  # type: ignore[arg-type]


# What is averaged


class Tied(Scripted):
    """A language model whose output layer is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(5, 3).double()
        self.output = nn.Linear(3, 5, bias=False).double()
        self.output.weight = self.embedding.weight

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        token = torch.tensor([batch_idx % 5])
        return F.cross_entropy(self.output(self.embedding(token)), (token + 1) % 5)


def test_tied_weights(tmp_path: Path) -> None:
    model, record = Tied(), Record()
    trainer = make_trainer(tmp_path, EMA(0.9), record, max_epochs=1)
    trainer.fit(model, Loader(moves(8)))
    trainer.save_checkpoint(tmp_path / "tied.ckpt")
    saved = torch.load(tmp_path / "tied.ckpt", weights_only=True)["state_dict"]
    expected = averaged(record.raw, 0.9)[-1]["output.weight"]
    for name in ("output.weight", "embedding.weight"):
        torch.testing.assert_close(saved[name], expected, atol=1e-12, rtol=0)
    assert model.output.weight is model.embedding.weight


def test_tied_weights_in_a_checkpoint_of_the_training(tmp_path: Path) -> None:
    model, record = Tied(), Record()
    checkpoint = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=4)
    make_trainer(tmp_path, EMA(0.9), record, checkpoint, max_epochs=1, enable_checkpointing=True).fit(model, Loader(moves(8)))
    saved = torch.load(tmp_path / "step=4.ckpt", weights_only=True)["state_dict"]
    assert_close(saved, averaged(record.raw, 0.9)[4], 1e-12)


def test_frozen_parameters_keep_every_bit(tmp_path: Path) -> None:
    model = Net()
    model.first.requires_grad_(False)
    before = clone(model)
    make_trainer(tmp_path, EMA(0.9)).fit(model, *loaders())
    for name, value in clone(model).items():
        assert torch.equal(value, before[name]) is name.startswith("first"), name


class Masked(Scripted):
    """Keeps buffers of all sorts: a causal mask, complex weights, a buffer that each step replaces."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.full((3, 3), float("-inf")).triu(1))
        self.register_buffer("count", torch.zeros(3, dtype=torch.float64))
        self.spectrum = nn.Parameter(torch.zeros(3, dtype=torch.complex128))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.count = self.count + batch
        return super().training_step(batch, batch_idx) + (self.spectrum.real * batch).sum() - (self.spectrum.imag * batch).sum()


@pytest.fixture
def masked(tmp_path: Path) -> tuple[Masked, Record]:
    model, record = Masked(), Record()
    make_trainer(tmp_path, EMA(0.9), record, max_epochs=1).fit(model, Loader(moves(8)))
    return model, record


def test_infinite_masks_do_not_become_nan(masked: tuple[Masked, Record]) -> None:
    """-inf minus -inf is no number."""
    assert torch.equal(masked[0].mask, Masked().mask)  # type: ignore[arg-type]


def test_complex_weights_are_averaged(masked: tuple[Masked, Record]) -> None:
    expected = ema([state["spectrum"].numpy().view(np.float64) for state in masked[1].raw], 0.9, True)[-1]
    np.testing.assert_allclose(masked[0].spectrum.detach().numpy().view(np.float64), expected, atol=1e-12)


def test_buffers_that_a_step_replaces_are_averaged(masked: tuple[Masked, Record]) -> None:
    expected = ema([state["count"].numpy() for state in masked[1].raw], 0.9, True)[-1]
    np.testing.assert_allclose(masked[0].count, expected, atol=1e-12)  # type: ignore[arg-type]


def test_buffers_that_a_step_replaces_come_back(tmp_path: Path) -> None:
    checkpoint, record, resumed = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=4), Record(), Record()
    make_trainer(tmp_path, EMA(0.9), record, checkpoint, max_epochs=1, enable_checkpointing=True).fit(Masked(), Loader(moves(8)))
    make_trainer(tmp_path / "again", EMA(0.9), resumed, max_epochs=1).fit(
        Masked(), Loader(moves(8)), ckpt_path=tmp_path / "step=4.ckpt", weights_only=True
    )
    assert same(resumed.raw[0], record.raw[4])


class Versioned(nn.Module):
    """Moves its weights when it loads a file of its first version, as torch's own modules do."""

    _version = 2

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3, dtype=torch.float64))

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: dict[str, Any], *rest: Any) -> None:
        if metadata.get("version") != 2:
            state[prefix + "scale"] = state[prefix + "scale"] * 1000
        super()._load_from_state_dict(state, prefix, metadata, *rest)


class Current(Scripted):
    def __init__(self) -> None:
        super().__init__()
        self.part = Versioned()


def test_checkpoints_keep_the_versions_of_the_modules(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=4)
    make_trainer(tmp_path, EMA(0.9), checkpoint, max_epochs=1, enable_checkpointing=True).fit(Current(), Loader(moves(8)))
    loaded = Current.load_from_checkpoint(tmp_path / "step=4.ckpt", weights_only=True)
    assert loaded.part.scale.tolist() == [1.0, 1.0, 1.0]


# What is validated and saved


def test_validation_and_best_checkpoint_equal_a_hand_evaluation(tmp_path: Path) -> None:
    best, model, record = ModelCheckpoint(tmp_path, "best", monitor="val/loss"), Net(norm=True), Record()
    make_trainer(tmp_path, EMA(0.9), record, best, enable_checkpointing=True).fit(model, *loaders())
    averages = [averaged(record.raw, 0.9)[epoch * BATCHES] for epoch in range(4)]
    by_hand = [loss_of(weights, batches(9, 2)) for weights in averages]
    assert record.scores == pytest.approx(by_hand, abs=1e-5)
    for state, weights in zip(record.validated, averages, strict=True):
        assert_close(state, weights)
    loaded = Net.load_from_checkpoint(best.best_model_path, norm=True, weights_only=True)
    assert loss_of(clone(loaded), batches(9, 2)) == pytest.approx(min(by_hand[1:]), abs=1e-5)
    assert float(best.best_model_score) == pytest.approx(min(by_hand[1:]), abs=1e-5)  # type: ignore[arg-type]


# Going on


def fit(folder: Path, epochs: int, ckpt_path: Path | None = None, *, average: bool = True) -> tuple[Weights, Any]:
    model = WithMomentum(norm=True)
    made = [EMA(0.9)] if average else []
    trainer = make_trainer(folder, StepSeed(1), *made, max_epochs=epochs)
    trainer.fit(model, *loaders(), ckpt_path=ckpt_path, weights_only=None if ckpt_path is None else True)
    return clone(model), trainer


def test_checkpoint_written_by_hand_after_training_can_be_resumed(tmp_path: Path) -> None:
    whole, _ = fit(tmp_path, 4)
    half, trainer = fit(tmp_path, 2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)
    assert same(saved["state_dict"], half), "the file holds the average"
    assert same(fit(tmp_path, 4, tmp_path / "half.ckpt")[0], whole)


def test_resuming_a_training_that_is_over_keeps_the_average(tmp_path: Path) -> None:
    whole, trainer = fit(tmp_path, 2)
    trainer.save_checkpoint(tmp_path / "all.ckpt")
    resumed, trainer = fit(tmp_path, 2, tmp_path / "all.ckpt")
    assert same(resumed, whole)
    trainer.save_checkpoint(tmp_path / "again.ckpt")
    states = [torch.load(tmp_path / f"{name}.ckpt", weights_only=True) for name in ("all", "again")]
    for state in states:
        assert same(state["state_dict"], whole)
    assert same(states[0]["callbacks"]["EMA"]["raw"], states[1]["callbacks"]["EMA"]["raw"])


def test_checkpoint_of_a_run_without_it(tmp_path: Path) -> None:
    """The average begins with the weights of the checkpoint."""
    start, trainer = fit(tmp_path, 1, average=False)
    trainer.save_checkpoint(tmp_path / "bare.ckpt")
    model, record, callback = WithMomentum(norm=True), Record(), EMA(0.9)
    trainer = make_trainer(tmp_path, callback, record, max_epochs=3)
    trainer.fit(model, *loaders(), ckpt_path=tmp_path / "bare.ckpt", weights_only=True)
    assert same(record.raw[0], start)
    assert callback.state_dict()["updates"] == 2 * BATCHES
    assert_close(clone(model), averaged(record.raw, 0.9)[-1])


class Other(Scripted):
    strict_loading = False

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Parameter(torch.zeros(2))


def test_checkpoint_of_another_model(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, EMA(0.9), max_epochs=1)
    trainer.fit(Scripted(), Loader(moves(3)))
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    sentence = (
        r"EMA cannot go on from this checkpoint, whose weights have other names \(extra\): "
        "resume the model that was trained, or load the weights alone and begin a new fit"
    )
    with pytest.raises(MisconfigurationException, match=sentence):
        make_trainer(tmp_path, EMA(0.9), max_epochs=2).fit(Other(), Loader(moves(3)), ckpt_path=tmp_path / "one.ckpt", weights_only=True)


# Company


class Mine(EMA):
    """Somebody's subclass: it averages all the same."""


@pytest.mark.parametrize(
    "other", [Mine(), SWA(1), EMAWeightAveraging(), StochasticWeightAveraging(0.1)], ids=lambda other: type(other).__name__
)
def test_two_averages_are_refused(other: Callback, tmp_path: Path) -> None:
    for order in ([EMA(), other], [other, EMA()]):
        with pytest.raises(MisconfigurationException, match=r"does not compose with .*each would validate and save an average of its own"):
            make_trainer(tmp_path, *order).fit(Net(), *loaders())


# What the set-ups of strangers bring


def test_a_tuner_may_save_and_load_before_the_fit(tmp_path: Path) -> None:
    from lightning.pytorch.callbacks import LearningRateFinder

    class Tuned(Net):
        lr = 0.1

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=self.lr)

    finder = LearningRateFinder(num_training_steps=5, update_attr=False)
    model = Tuned()
    make_trainer(tmp_path, EMA(0.9), finder, max_epochs=1, enable_checkpointing=True).fit(model, *loaders())
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_a_buffer_that_the_validation_sets_is_kept(tmp_path: Path) -> None:
    class Threshold(Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("threshold", torch.zeros(1))

        def on_validation_epoch_end(self) -> None:
            self.threshold.fill_(self.global_step)  # type: ignore[operator]

    model = Threshold()
    trainer = make_trainer(tmp_path, EMA(0.9))
    trainer.fit(model, *loaders())
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    assert float(model.threshold) == trainer.global_step  # type: ignore[arg-type]
    assert float(torch.load(tmp_path / "end.ckpt", weights_only=True)["state_dict"]["threshold"]) == trainer.global_step


def test_an_overridden_state_dict(tmp_path: Path) -> None:
    class Partial(WithMomentum):
        def state_dict(self) -> dict[str, Tensor]:  # type: ignore[override]
            return {name: value.clone() for name, value in super().state_dict().items() if "first" not in name}

    model, record = Partial(), Record()
    trainer = make_trainer(tmp_path, EMA(0.9), record)
    trainer.fit(model, *loaders())
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    saved = torch.load(tmp_path / "end.ckpt", weights_only=True)["state_dict"]
    assert same(saved, model.state_dict())
    assert not torch.equal(saved["last.weight"], record.raw[-1]["last.weight"])


def test_a_running_maximum_and_a_growing_buffer(tmp_path: Path) -> None:
    class Observer(Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("highest", torch.full((1,), -torch.inf))
            self.register_buffer("bank", torch.zeros(0))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.highest = torch.maximum(self.highest, batch[0].max())
            self.bank = torch.cat([self.bank, batch[0].mean().view(1)])
            return super().training_step(batch, batch_idx)

    model = Observer()
    trainer = make_trainer(tmp_path, EMA(0.9), max_epochs=2)
    trainer.fit(model, *loaders())
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    assert float(model.highest) == max(float(x.max()) for x, _ in batches(0))
    assert len(model.bank) == 2 * BATCHES
    resumed = Observer()
    resumed.bank = torch.zeros(2 * BATCHES)
    make_trainer(tmp_path, EMA(0.9)).fit(resumed, *loaders(), ckpt_path=tmp_path / "end.ckpt", weights_only=True)
    assert len(resumed.bank) == 3 * BATCHES


def test_weights_without_a_shape_are_refused(tmp_path: Path) -> None:
    class Lazy(Net):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.LazyLinear(8)  # type: ignore[assignment]

    with pytest.raises(MisconfigurationException, match=r"cannot average first.weight, which has no shape yet: run a batch"):
        make_trainer(tmp_path, EMA(0.9)).fit(Lazy(), *loaders())


def test_after_an_exception_a_checkpoint_by_hand_still_holds_the_average(tmp_path: Path) -> None:
    class Fails(WithMomentum):
        def on_train_epoch_end(self) -> None:
            if self.current_epoch == 1:
                raise RuntimeError("on purpose")

    model, record, callback = Fails(), Record(), EMA(0.9)
    trainer = make_trainer(tmp_path, callback, record)
    with pytest.raises(RuntimeError, match="on purpose"):
        trainer.fit(model, *loaders())
    assert same(clone(model), record.raw[-1])
    assert not any(isinstance(tensor, nn.Parameter) for tensor in callback._live), "it keeps no module alive"
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    assert_close(torch.load(tmp_path / "saved.ckpt", weights_only=True)["state_dict"], averaged(record.raw, 0.9)[-1])
