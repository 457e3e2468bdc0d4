"""SWA: the mean is the hand loop's, its BatchNorm statistics are torch's, and the training goes on as if alone."""

import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from matrix import BATCHES, Loader, Net, Pairs, batches, make_trainer
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR, StepLR
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, Dataset

from litzoo.callbacks import SWA, average_checkpoints

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
Weights = dict[str, Tensor]
STATISTICS = ("norm.0.running_mean", "norm.0.running_var")


class Scripted(LightningModule):
    """Its weight moves by minus the batch in every step, so that the sequence of weights is known beforehand."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, dtype=torch.float64))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self.weight * batch).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


class Record(Callback):
    """Notes the state of the training after each batch, and of each validation in `fit`."""

    def __init__(self) -> None:
        self.raw: list[Weights] = []
        self.modes: list[dict[str, bool]] = []
        self.random: list[Tensor] = []
        self.validated: list[Weights] = []
        self.scores: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.raw.append(clone(pl_module))
        self.modes.append({name: module.training for name, module in pl_module.named_modules()})

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.random.append(torch.get_rng_state())

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self.validated.append(clone(pl_module))
            self.scores.append(float(trainer.callback_metrics["val/loss"]))


def clone(model: nn.Module) -> Weights:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(first: Weights, second: Weights) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def moves(number: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return list(torch.randn(number, 3, generator=generator, dtype=torch.float64))


def loaders() -> tuple[Loader, Loader]:
    return Loader(batches(0)), Loader(batches(9, 2))


def mean_of(states: list[Weights]) -> Weights:
    """The naive mean in float64; what is an integer is the last one's."""
    return {
        name: torch.from_numpy(np.asarray(np.mean([state[name].double().numpy() for state in states], axis=0)))
        if value.is_floating_point()
        else value
        for name, value in states[-1].items()
    }


def with_statistics(weights: Weights, pairs: Pairs, momentum: float | None = 0.1) -> nn.Module:
    """A copy of the averaged module whose BatchNorm statistics torch has estimated."""
    model = Net(norm=True).double()
    model.load_state_dict(weights)
    model.norm[0].momentum = momentum  # type: ignore[index]
    update_bn([x.double() for x, _ in pairs], model)
    return model.eval()


def assert_close(found: Weights, expected: Weights, tolerance: float = 1e-6) -> None:
    """Hold everything but the number of batches against the expected values."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if value.is_floating_point():
            torch.testing.assert_close(
                found[name].double(), value.double(), atol=tolerance, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
            )


def fit(folder: Path, callback: SWA | None, momentum: float | None = 0.1, data: Any = None, **settings: Any) -> tuple[Net, Record, Any]:
    model, record = Net(norm=True), Record()
    model.norm[0].momentum = momentum  # type: ignore[index]
    made = [] if callback is None else [callback]
    trainer = make_trainer(folder, *made, record, **settings)
    if isinstance(data, LightningDataModule):
        trainer.fit(model, datamodule=data)
    else:
        trainer.fit(model, loaders()[0] if data is None else data, loaders()[1])
    return model, record, trainer


# The mean


@pytest.mark.parametrize(
    ("start", "every", "epochs", "averaged"),
    [
        (0, 1, 3, [0, 1, 2]),
        (2, 1, 4, [2, 3]),
        (1, 2, 6, [1, 3, 5]),
        (0, 3, 6, [0, 3]),
        (0.0, 1, 2, [0, 1]),
        (1.0, 1, 3, [1, 2]),
        (0.5, 1, 4, [2, 3]),
        (0.75, 1, 5, [3, 4]),
        (0.58, 20, 50, [29, 49]),  # 0.58 * 50 is 28.999... in floats
    ],
)
def test_mean_of_the_epochs_ends(start: float, every: int, epochs: int, averaged: list[int], tmp_path: Path) -> None:
    script, model = moves(2), Scripted()
    make_trainer(tmp_path, SWA(start, every), max_epochs=epochs).fit(model, Loader(script))
    step = -(script[0] + script[1]).numpy()
    expected = np.mean([step * (epoch + 1) for epoch in averaged], axis=0)
    np.testing.assert_allclose(model.weight.detach(), expected, atol=1e-10)


def test_validations_see_the_mean_so_far(tmp_path: Path) -> None:
    _, record, _ = fit(tmp_path, SWA(1), max_epochs=4)
    ends = record.raw[BATCHES - 1 :: BATCHES]
    assert same(record.validated[0], ends[0]), "before the start nothing is averaged"
    for epoch in (1, 2, 3):
        assert_close(record.validated[epoch], dict(with_statistics(mean_of(ends[1 : epoch + 1]), batches(0)).state_dict()))


def test_validation_metric_and_best_checkpoint_equal_a_hand_evaluation(tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path, "best", monitor="val/loss")
    model, record = Net(norm=True), Record()
    make_trainer(tmp_path, SWA(1), record, best, enable_checkpointing=True, max_epochs=4).fit(model, *loaders())
    ends, by_hand = record.raw[BATCHES - 1 :: BATCHES], []
    for epoch in (1, 2, 3):
        net = with_statistics(mean_of(ends[1 : epoch + 1]), batches(0))
        with torch.no_grad():
            by_hand.append(float(np.mean([float(F.cross_entropy(net(x.double()), y)) for x, y in batches(9, 2)])))
    assert record.scores[1:] == pytest.approx(by_hand, abs=1e-5)
    assert float(best.best_model_score) == pytest.approx(min(record.scores), abs=1e-6)  # type: ignore[arg-type]
    loaded = Net.load_from_checkpoint(best.best_model_path, norm=True, weights_only=True)
    assert same(clone(loaded), record.validated[int(np.argmin(record.scores))])


# The learning rate


class Scheduled(Net):
    def __init__(self, kind: str) -> None:
        super().__init__(norm=True)
        self.kind = kind
        self.rates: list[float] = []

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        if self.kind == "step":
            return {"optimizer": optimizer, "lr_scheduler": StepLR(optimizer, 2, 0.5)}
        cycle = OneCycleLR(optimizer, 0.5, total_steps=int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}


@pytest.mark.parametrize("kind", ["step", "cycle"])
def test_scheduler_and_epochs_are_left_alone(kind: str, tmp_path: Path) -> None:
    found = []
    for made in ([], [SWA(0.5)]):
        model = Scheduled(kind)
        trainer = make_trainer(tmp_path, *made, max_epochs=6)
        trainer.fit(model, *loaders())
        found.append(
            (model.rates, trainer.current_epoch, trainer.max_epochs, trainer.global_step, type(trainer.lr_scheduler_configs[0].scheduler))
        )
    assert found[0] == found[1]
    assert found[0][1:4] == (6, 6, 6 * BATCHES)
    assert len(set(found[0][0])) >= 3


# BatchNorm


@pytest.mark.parametrize("momentum", [0.1, None])
def test_statistics_equal_those_of_torch(momentum: float | None, tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, every_n_epochs=1)
    model, record = Net(norm=True), Record()
    model.norm[0].momentum = momentum  # type: ignore[index]
    make_trainer(tmp_path, SWA(1), checkpoint, record, enable_checkpointing=True).fit(model, *loaders())
    average = mean_of([record.raw[position * BATCHES - 1] for position in (2, 3)])
    expected = dict(with_statistics(average, batches(0), momentum).state_dict())
    saved = torch.load(tmp_path / "epoch=2.ckpt", weights_only=True)["state_dict"]
    for found in (record.validated[-1], saved, clone(model)):
        assert_close(found, expected)
        assert int(found["norm.0.num_batches_tracked"]) == 3 * BATCHES, "that of the training"
    assert model.norm[0].momentum == momentum  # type: ignore[index]
    for name in STATISTICS:
        assert float((average[name] - expected[name]).abs().max()) > 1e-3, "the mean of the statistics is something else"


class Data(LightningDataModule):
    """Training batches 0; for evaluation, the training data in other batches."""

    def train_dataloader(self) -> Loader:
        return loaders()[0]

    def val_dataloader(self) -> Loader:
        return loaders()[1]

    def eval_train_dataloader(self) -> Loader:
        return Loader(batches(5, 3))


@pytest.mark.parametrize(
    ("data", "reference", "number", "pairs"),
    [
        (None, None, None, batches(0)),
        (None, None, 2, batches(0)[:2]),
        (Data(), None, None, batches(5, 3)),
        (Data(), None, 2, batches(5, 3)[:2]),
        (None, batches(6, 4), None, batches(6, 4)),
        (Data(), batches(6, 4), None, batches(6, 4)),
        (Data(), [x for x, _ in batches(6, 4)], 3, batches(6, 4)[:3]),
    ],
    ids=["training", "part of the training", "eval_train", "part of eval_train", "reference", "reference first", "reference of inputs"],
)
def test_source_of_the_statistics(data: Any, reference: Any, number: int | None, pairs: Pairs, tmp_path: Path) -> None:
    model, record, _ = fit(tmp_path, SWA(1, reference_loader=reference, batch_norm_batches=number), data=data)
    average = mean_of([record.raw[position * BATCHES - 1] for position in (2, 3)])
    assert_close(clone(model), dict(with_statistics(average, pairs).state_dict()))


class Endless:
    """A stream; what ends the epoch is limit_train_batches."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for number in range(1000):  # not for ever, so that the test ends
            yield batches(0)[number % BATCHES]


@pytest.mark.parametrize("data", [Endless(), Loader(batches(0))], ids=["stream", "loader"])
def test_statistics_are_those_of_the_limited_training(data: Any, tmp_path: Path) -> None:
    model, record, _ = fit(tmp_path, SWA(1), data=data, limit_train_batches=3)
    average = mean_of([record.raw[position * 3 - 1] for position in (2, 3)])
    assert_close(clone(model), dict(with_statistics(average, batches(0)[:3]).state_dict()))


class Doubled(Net):
    """Prepares its batches in Lightning's hooks."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch["x"] * 2, batch["y"]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[0] + 1, batch[1]


def test_batches_pass_the_hooks_of_the_module(tmp_path: Path) -> None:
    model, record = Doubled(norm=True), Record()
    train, val = (Loader([{"x": x, "y": y} for x, y in pairs]) for pairs in (batches(0), batches(9, 2)))  # type: ignore[misc]
    make_trainer(tmp_path, SWA(1), record).fit(model, train, val)
    average = mean_of([record.raw[position * BATCHES - 1] for position in (2, 3)])
    seen = [(x * 2 + 1, y) for x, y in batches(0)]
    assert_close(clone(model), dict(with_statistics(average, seen).state_dict()))


# The training does not notice


class Noisy(Dataset[tuple[Tensor, Tensor]]):
    """Augments with all three random streams of a process."""

    def __len__(self) -> int:
        return 4 * BATCHES

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor]:
        x, y = batches(0)[position // 4]
        return x[position % 4] + float(torch.rand(1)) + random.random() + float(np.random.rand()), y[position % 4]


def noisy(kind: str) -> DataLoader[Any]:
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    generator = torch.Generator().manual_seed(3) if kind == "generator" else None
    return DataLoader(Noisy(), batch_size=4, shuffle=True, generator=generator)


@pytest.mark.parametrize("kind", ["global", "generator"])
def test_training_is_equal_bit_for_bit(kind: str, tmp_path: Path) -> None:
    """Raw weights, raw statistics, numbers of batches, order and augmentation of the samples, dropout."""
    _, bare, _ = fit(tmp_path, None, data=noisy(kind))
    model, made, _ = fit(tmp_path, SWA(0), data=noisy(kind))
    assert len(bare.raw) == 3 * BATCHES
    assert [same(one, other) for one, other in zip(bare.raw, made.raw, strict=True)] == [True] * 3 * BATCHES
    assert all(torch.equal(one, other) for one, other in zip(bare.random, made.random, strict=True))
    assert not same(clone(model), made.raw[-1])


class OneIterator(Loader):
    """Has one iterator, which each iter() puts back to the start, as a DataLoader with persistent workers does."""

    def __iter__(self) -> Any:
        self._position, self._start = self._start, 0
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        if self._position >= len(self.pairs):
            raise StopIteration
        self._position += 1
        return self.pairs[self._position - 1]


def test_training_loader_is_never_taken_over_in_the_middle_of_its_epoch(tmp_path: Path) -> None:
    """Without a validation, the first one to ask for the average of an epoch is a checkpoint within the next."""
    found = []
    for made in ([], [SWA(0)]):
        record = Record()
        checkpoint = ModelCheckpoint(tmp_path / str(len(made)), save_top_k=-1, every_n_train_steps=5)
        trainer = make_trainer(tmp_path, *made, record, checkpoint, enable_checkpointing=True)
        trainer.fit(Net(norm=True), OneIterator(batches(0)))
        found.append(record.raw)
        assert trainer.global_step == 3 * BATCHES
    assert [same(one, other) for one, other in zip(*found, strict=True)] == [True] * 3 * BATCHES


def test_modes_of_submodules_stay(tmp_path: Path) -> None:
    """Dropout that the user has put into eval mode stays there, also after the pass over the training data."""
    model, record = Net(norm=True), Record()
    model.norm[1].eval()  # type: ignore[index]
    make_trainer(tmp_path, SWA(0), record).fit(model, *loaders())
    assert record.modes == [{**{name: True for name, _ in model.named_modules()}, "norm.1": False}] * 3 * BATCHES
    assert {name for name, module in model.named_modules() if not module.training} == {"norm.1"}


@pytest.mark.parametrize("val", [True, False])
def test_frozen_batch_norm_keeps_its_statistics(val: bool, tmp_path: Path) -> None:
    """BatchNorm in eval mode is trained around with its old statistics: with new ones the average would be another function."""
    model, record = Net(norm=True), Record()
    norm = model.norm[0].eval()  # type: ignore[index]
    norm.running_mean.fill_(0.5)
    make_trainer(tmp_path, SWA(0), record).fit(model, loaders()[0], loaders()[1] if val else None)
    assert norm.running_mean.tolist() == [0.5] * 8
    assert norm.running_var.tolist() == [1.0] * 8
    assert not norm.training


class EvalDropout(Net):
    """Dropout before BatchNorm, which the user has switched off."""

    def __init__(self) -> None:
        super().__init__(norm=True)
        self.norm = nn.Sequential(nn.Dropout(0.9).eval(), nn.BatchNorm1d(8))


def test_statistics_are_those_of_the_modes_of_the_training(tmp_path: Path) -> None:
    model = EvalDropout()
    make_trainer(tmp_path, SWA(0)).fit(model, *loaders())
    with torch.no_grad():
        hidden = [model.first(x) for x, _ in batches(0)]
    norm: Any = model.norm[1]  # type: ignore[index]
    torch.testing.assert_close(norm.running_mean, torch.stack([value.mean(dim=0) for value in hidden]).mean(dim=0), atol=1e-5, rtol=0)
    torch.testing.assert_close(norm.running_var, torch.stack([value.var(dim=0) for value in hidden]).mean(dim=0), atol=1e-5, rtol=0)


def test_failing_pass_leaves_the_weights_of_the_training(tmp_path: Path) -> None:
    class Broken:
        def __iter__(self) -> Iterator[Any]:
            yield batches(0)[0]
            raise RuntimeError("disk is gone")

    model, record = Net(norm=True), Record()
    with pytest.raises(RuntimeError, match="disk is gone"):
        make_trainer(tmp_path, record, SWA(0, reference_loader=Broken())).fit(model, *loaders())
    assert same(clone(model), record.raw[-1])
    assert model.norm[0].momentum == 0.1  # type: ignore[index]


def test_loaders_and_modules_that_give_no_statistics(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="can be iterated over only once"):
        SWA(reference_loader=iter(batches(0)))
    with pytest.raises(MisconfigurationException, match="got no batch to estimate"):
        make_trainer(tmp_path, SWA(0, reference_loader=[])).fit(Net(norm=True), *loaders())
    with pytest.raises(MisconfigurationException, match="cannot tell which of several training loaders"):
        make_trainer(tmp_path, SWA(0)).fit(Net(norm=True), {"a": loaders()[0], "b": loaders()[0]})

    class Silent(Net):
        forward = LightningModule.forward

    with pytest.raises(MisconfigurationException, match="needs a forward"):
        make_trainer(tmp_path, SWA(0)).fit(Silent(norm=True), loaders()[0])


# Going on


def test_resuming_a_training_that_is_over_keeps_the_average(tmp_path: Path) -> None:
    whole, _, trainer = fit(tmp_path, SWA(1))
    trainer.save_checkpoint(tmp_path / "all.ckpt")
    model = Net(norm=True)
    make_trainer(tmp_path, SWA(1)).fit(model, *loaders(), ckpt_path=tmp_path / "all.ckpt", weights_only=True)
    assert same(clone(model), clone(whole))


# Mistakes


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"start": -1}, "start must be a share of the training in [0, 1), or the number of an epoch, got -1"),
        ({"start": -0.1}, "start must be a share of the training in [0, 1), or the number of an epoch, got -0.1"),
        ({"start": 1.5}, "start must be a share of the training in [0, 1), or the number of an epoch, got 1.5"),
        ({"start": float("nan")}, "start must be a share of the training in [0, 1), or the number of an epoch, got nan"),
        ({"start": float("inf")}, "start must be a share of the training in [0, 1), or the number of an epoch, got inf"),
        ({"every_n_epochs": 0}, "every_n_epochs must be at least 1, got 0"),
        ({"batch_norm_batches": 0}, "batch_norm_batches must be at least 1, or None for all, got 0"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=re.escape(reason)):
        SWA(**settings)


def test_share_of_an_endless_training_is_refused(tmp_path: Path) -> None:
    for limits in ({"max_epochs": -1, "max_steps": 3}, {"max_epochs": None, "max_steps": 3}):
        with pytest.raises(
            MisconfigurationException, match="SWA cannot tell when 75% of the training are over: set max_epochs, or give start"
        ):
            make_trainer(tmp_path, SWA(0.75), **limits).fit(Net(), *loaders())
    make_trainer(tmp_path, SWA(0), max_epochs=-1, max_steps=BATCHES).fit(Net(), *loaders())


@pytest.mark.parametrize("start", [9, 0.9])
def test_warning_if_no_epoch_was_averaged(start: float, tmp_path: Path) -> None:
    model, record = Net(norm=True), Record()
    with pytest.warns(UserWarning, match="SWA averaged no epoch: training ended before epoch 9 was over"):
        make_trainer(tmp_path, SWA(start), record, max_epochs=10, max_steps=5).fit(model, *loaders())
    assert same(clone(model), record.raw[-1])


# The mean of checkpoints


def checkpoint(path: Path, seed: int, **more: Any) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    weights = {
        "single": torch.randn(4, generator=generator),
        "double": torch.randn(2, 2, generator=generator, dtype=torch.float64),
        "half": 3e4 + 1e3 * torch.randn(3, generator=generator).half(),
        "bfloat": torch.randn(3, generator=generator).bfloat16(),
        "integer": torch.tensor(seed),
        "flag": torch.tensor([bool(seed % 2)]),
        "scalar": torch.randn((), generator=generator),
        **more,
    }
    torch.save({"state_dict": weights, "epoch": seed, "optimizer_states": [{}], "callbacks": {}, "hyper_parameters": {"width": seed}}, path)
    return weights


def test_mean_of_checkpoints(tmp_path: Path) -> None:
    paths = [tmp_path / f"{seed}.ckpt" for seed in range(3)]
    states = [checkpoint(path, seed) for seed, path in enumerate(paths)]
    output = average_checkpoints(paths, str(tmp_path / "mean.ckpt"))
    assert output == tmp_path / "mean.ckpt"
    written = torch.load(output, weights_only=True)
    for name, value in written["state_dict"].items():
        assert value.dtype == states[0][name].dtype, name
        assert value.shape == states[0][name].shape, name
        if value.is_floating_point():
            expected = mean_of([{name: state[name]} for state in states])[name].to(value.dtype)
            torch.testing.assert_close(value, expected, atol=0, rtol=1e-15 if name == "double" else 1e-7)
        else:
            assert torch.equal(value, states[-1][name]), "what is an integer is the last one's"
    assert float(written["state_dict"]["half"].max()) < float("inf"), "three of them sum up to more than float16 holds"
    assert written["hyper_parameters"] == {"width": 2}
    assert {"optimizer_states", "callbacks"}.isdisjoint(written)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.ckpt", "1.ckpt", "2.ckpt", "mean.ckpt"], "no temporary file"


def test_mean_of_complex_weights_and_extra_state(tmp_path: Path) -> None:
    """The state_dict of a module may hold complex weights, and anything at all under `_extra_state`."""
    paths = [tmp_path / f"{seed}.ckpt" for seed in range(2)]
    for seed, path in enumerate(paths):
        checkpoint(path, seed, spectrum=torch.tensor([1 + 2j, 3j]) * (1 + seed), _extra_state={"seed": seed})
    written = torch.load(average_checkpoints(paths, tmp_path / "mean.ckpt"), weights_only=True)["state_dict"]
    assert written["_extra_state"] == {"seed": 1}
    assert written["spectrum"].tolist() == [1.5 + 3j, 4.5j]


def test_mean_of_real_checkpoints_loads_and_tests(tmp_path: Path) -> None:
    every = ModelCheckpoint(tmp_path / "all", "{epoch}", monitor="val/loss", save_top_k=3)
    make_trainer(tmp_path, every, enable_checkpointing=True).fit(Net(norm=True), *loaders())
    output = average_checkpoints(list(every.best_k_models), tmp_path / "mean.ckpt")
    states = [torch.load(path, weights_only=True)["state_dict"] for path in every.best_k_models]
    loaded = Net.load_from_checkpoint(output, norm=True, weights_only=True)
    assert_close(clone(loaded), mean_of(states))
    scores = make_trainer(tmp_path).test(Net(norm=True), loaders()[1], ckpt_path=output, verbose=False, weights_only=True)[0]
    assert scores["test/loss"] > 0


def test_mistakes_with_checkpoints(tmp_path: Path) -> None:
    paths = [tmp_path / f"{seed}.ckpt" for seed in range(3)]
    checkpoint(paths[0], 0)
    checkpoint(paths[1], 1, another=torch.zeros(1))
    checkpoint(paths[2], 2, single=torch.zeros(5))
    with pytest.raises(ValueError, match="there is no checkpoint to average: give at least one path"):
        average_checkpoints([], tmp_path / "mean.ckpt")
    for other in paths[1:]:
        with pytest.raises(
            ValueError, match=re.escape(f"{other} is not of the same model as {paths[0]}: their weights have other names or shapes")
        ):
            average_checkpoints([paths[0], other], tmp_path / "mean.ckpt")
    with pytest.raises(FileExistsError, match=r"2\.ckpt exists: give another file, or delete it"):
        average_checkpoints(paths[:1], paths[2])
    with pytest.raises(FileNotFoundError):
        average_checkpoints([tmp_path / "none.ckpt"], tmp_path / "mean.ckpt")
    assert sorted(tmp_path.iterdir()) == paths, "nothing was written"


def test_failing_write_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint(tmp_path / "0.ckpt", 0)

    def full(thing: Any, path: Path) -> None:
        path.write_bytes(b"half of it")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="no space left"):
        average_checkpoints([tmp_path / "0.ckpt"], tmp_path / "mean.ckpt")
    assert [path.name for path in tmp_path.iterdir()] == ["0.ckpt"]


# Two processes


def run_rank(folder: Path) -> None:
    """One of two processes: each trains on batches of its own, and so has BatchNorm statistics of its own."""
    model = Net(norm=True)
    trainer = make_trainer(folder, SWA(1), strategy="ddp", devices=2, use_distributed_sampler=False)
    trainer.fit(model, Loader(batches(trainer.global_rank)), loaders()[1])
    torch.save(clone(model), folder / f"rank_{trainer.global_rank}.pt")


@pytest.mark.slow
def test_statistics_of_two_processes(rank_folder: Path) -> None:
    first, second = (torch.load(rank_folder / f"rank_{rank}.pt", weights_only=True) for rank in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    ranks = [with_statistics(first, batches(rank)).state_dict() for rank in range(2)]
    for name in STATISTICS:
        torch.testing.assert_close(first[name].double(), (ranks[0][name] + ranks[1][name]) / 2, atol=1e-6, rtol=0)
        assert float((ranks[0][name] - ranks[1][name]).abs().max()) > 1e-3
