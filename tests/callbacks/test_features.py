"""What the callbacks on features share: the same features on every process, and no trace in the training."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from matrix import FEATURES, Loader, Net, batches, make_trainer, precision_settings
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, Sampler, TensorDataset

from litzoo.callbacks import FeatureRank, KNNMonitor, LinearProbe, NeighbourGallery
from litzoo.callbacks.features import FeatureTap, encode_loader, samples_at, samples_of
from litzoo.datamodules.arrays import ArrayDataModule, Arrays
from litzoo.zoo.batch import Batch

SAMPLES = 23


def dataset() -> TensorDataset:
    x = torch.randn(SAMPLES, FEATURES, generator=torch.Generator().manual_seed(5))
    return TensorDataset(x, torch.arange(SAMPLES) % 3)


def loader(**settings: Any) -> DataLoader:
    return DataLoader(dataset(), batch_size=4, **settings)


class ByPython(Sampler[int]):
    """Draws its order from Python's random stream."""

    def __iter__(self) -> Iterator[int]:
        return iter(random.sample(range(SAMPLES), SAMPLES))

    def __len__(self) -> int:
        return SAMPLES


class Groups(Sampler[list[int]]):
    """Draws whole batches, from a generator of its own."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(3)

    def __iter__(self) -> Iterator[list[int]]:
        return (part.tolist() for part in torch.randperm(SAMPLES, generator=self.generator).split(4))


class Data(ArrayDataModule):
    """Batches of litzoo, whose evaluation is dealt out without duplicates."""

    def read(self) -> Arrays:
        x, label = dataset().tensors
        return Arrays(x, label, torch.zeros(SAMPLES, dtype=torch.uint8), ("a", "b", "c"))

    def val_dataloader(self) -> Any:
        return Loader(batches(9, 2))


class Probe(Callback):
    """Encodes a loader in every validation, also that of the sanity check."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.make = make
        self.banks: list[Any] = []
        self.inputs: list[dict[int, Tensor]] = []

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        bank = encode_loader(trainer, pl_module, "encode", self.make())
        self.banks.append(bank)
        self.inputs.append(samples_at(trainer, pl_module, self.make(), bank.key[[2, 3, 20]]))


def expected(model: Net) -> Tensor:
    model.eval()
    with torch.no_grad():
        return nn.functional.normalize(model.encode(dataset().tensors[0]), dim=1)


MAKERS: dict[str, Callable[[], Any]] = {
    "list": lambda: list(loader()),
    "loader": loader,
    "shuffled": lambda: loader(shuffle=True),
    "generator": lambda: loader(shuffle=True, generator=torch.Generator().manual_seed(3)),
    "python": lambda: loader(sampler=ByPython()),
    "batch sampler": lambda: DataLoader(dataset(), batch_sampler=Groups()),
    "workers": lambda: loader(num_workers=1),
    "dealt": lambda: Data(batch_size=2, eval_batch_size=4).eval_train_dataloader(),
    "sampler": lambda: loader(sampler=DistributedSampler(dataset(), *_world(), shuffle=False)),
    "one batch": lambda: [dataset().tensors],
}


def _world() -> tuple[int, int]:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return (torch.distributed.get_world_size(), torch.distributed.get_rank()) if distributed else (1, 0)


def check(model: Net, bank: Any, inputs: dict[int, Tensor], name: str) -> None:
    features, label, key = bank
    x, true = dataset().tensors
    order = torch.arange(SAMPLES)
    if name in ("shuffled", "generator", "python", "batch sampler"):  # in some order that is always the same
        order = torch.cdist(features, expected(model)).argmin(dim=1)
        assert sorted(order.tolist()) == list(range(SAMPLES))
    torch.testing.assert_close(
        features, expected(model)[order], rtol=0, atol=1e-6
    )  # of 4 rows and of 23 a product may differ in its last bit
    assert torch.equal(label, true[order])
    assert torch.equal(key, key.sort().values)
    assert set(inputs) == set(key[[2, 3, 20]].tolist())
    for place in (2, 3, 20):
        assert torch.equal(inputs[int(key[place])], x[order[place]])


@pytest.mark.parametrize("name", MAKERS)
def test_encodes_a_loader(name: str, tmp_path: Path) -> None:
    model, probe = Net(norm=True), Probe(MAKERS[name])
    trainer = make_trainer(tmp_path, probe, max_epochs=1)
    trainer.fit(model, Loader(batches(0)), Loader(batches(9, 2)))
    check(model, probe.banks[-1], probe.inputs[-1], name)


class Draws(Net):
    """Draws random numbers whenever it encodes, and has layers in both modes."""

    def __init__(self) -> None:
        super().__init__(norm=True)
        self.norm[0].eval()  # type: ignore[index]

    def encode(self, x: Tensor) -> Tensor:
        return super().encode(x) + 0 * (torch.rand(1) + np.random.rand())


def test_leaves_no_trace(tmp_path: Path) -> None:
    shuffling = loader(shuffle=True, generator=torch.Generator().manual_seed(3))

    def state(model: Net) -> list[Any]:
        return [
            torch.get_rng_state().tolist(),
            random.getstate(),
            np.random.get_state()[1].tolist(),  # type: ignore[index]
            shuffling.generator.get_state().tolist(),
            [module.training for module in model.modules()],
            {name: value.tolist() for name, value in model.state_dict().items()},
        ]

    model = Draws()
    trainer = make_trainer(tmp_path)
    trainer.validate(model, Loader(batches(9, 2)), verbose=False)
    model.train()
    model.norm[0].eval()  # type: ignore[index]
    before = state(model)
    bank = encode_loader(trainer, model, "encode", shuffling)
    assert state(model) == before
    samples_at(trainer, model, shuffling, bank.key[:1])  # which goes no further than it must
    assert state(model) == before
    model.encode = lambda x: 1 / (0 * torch.rand(1)).long().item()  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        encode_loader(trainer, model, "encode", shuffling)
    assert state(model) == before


def test_training_is_the_same_beside_pictures(tmp_path: Path) -> None:
    weights = []
    for callbacks in ([], [NeighbourGallery(2, 2, every_n_epochs=1, reference_loader=loader(shuffle=True))]):
        torch.manual_seed(1)
        model = Net(norm=True)
        make_trainer(tmp_path, *callbacks, val_check_interval=0.5).fit(model, loader(shuffle=True), Loader(batches(9, 2)))
        weights.append(model.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed", "bf16-true", "16-mixed, GradScaler"])
def test_precision(precision: str, tmp_path: Path) -> None:
    model, probe = Net(), Probe(loader)
    make_trainer(tmp_path, probe, max_epochs=1, **precision_settings(precision)).fit(model, Loader(batches(0)), Loader(batches(9, 2)))
    assert probe.banks[-1].features.dtype == torch.float32
    close = 1e-6 if precision == "64-true" else 0.05
    torch.testing.assert_close(probe.banks[-1].features, expected(model.float()), rtol=0, atol=close)


class Hooks(LightningDataModule):
    """Somebody's data, which are only brought to scale after the transfer."""

    def val_dataloader(self) -> Any:
        return Loader(batches(9, 2))

    def eval_train_dataloader(self) -> DataLoader:
        x, label = dataset().tensors
        return DataLoader(TensorDataset(x / 100, label), batch_size=4)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0] * 100, batch[1]]


def test_data_hooks(tmp_path: Path) -> None:
    data = Hooks()
    model, probe = Net(), Probe(data.eval_train_dataloader)
    make_trainer(tmp_path, probe).validate(model, datamodule=data, verbose=False)
    torch.testing.assert_close(probe.banks[-1].features, expected(model))


def test_encoded_once_for_all(tmp_path: Path) -> None:
    """Two callbacks in the same validation share what was encoded, and keep nothing of it."""
    from litzoo.callbacks.features import _MEMOS

    class Counts(Net):
        evaluated = 0

        def encode(self, x: Tensor) -> Tensor:
            self.evaluated += 0 if torch.is_grad_enabled() else len(x)
            return super().encode(x)

        def validation_step(self, batch: Any, batch_idx: int) -> None: ...  # type: ignore[override]

    model, given = Counts(), list(loader())
    callbacks = [
        KNNMonitor(k=3, reference_loader=given),
        NeighbourGallery(2, 2, reference_loader=given),
        KNNMonitor(5, reference_loader=given),
    ]
    trainer = make_trainer(tmp_path, *callbacks, num_sanity_val_steps=0)
    trainer.validate(model, Loader(batches(9, 2)), verbose=False)
    assert model.evaluated == SAMPLES + 8  # the training set and the validation set
    assert trainer not in _MEMOS
    # Nor after an exception.
    model.validation_step = lambda batch, batch_idx: 1 / batch_idx  # type: ignore[method-assign, assignment]
    with pytest.raises(ZeroDivisionError):
        trainer.validate(model, Loader(batches(9, 2)), verbose=False)
    assert trainer not in _MEMOS


def test_samples_of() -> None:
    model = Net()
    x, label = torch.rand(4, 2), torch.tensor([0, 1, 2, -1])
    assert samples_of(model, (x, label))[0] is x
    assert samples_of(model, [[x, x + 1], label, "more"])[0] is x
    views = torch.rand(4, 3, 1, 8, 8)
    flat, repeated = samples_of(model, Batch(views, label, torch.arange(4)))
    assert torch.equal(flat, views.flatten(0, 1))
    assert repeated.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, -1, -1, -1]
    assert samples_of(model, (views, label))[0].shape == views.shape, "somebody's videos are no views"
    for wrong in (x, {"x": x}, (x,), (x, label.float()), (x, label[:, None])):
        with pytest.raises(ValueError, match="no pairs of inputs and labels"):
            samples_of(model, wrong)


class Images(Net):
    def encode(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :3]


def test_tap() -> None:
    """What a step computes is taken over if it belongs to the batch, else not."""
    model = Images()
    views, label = torch.rand(4, 3, 1, 2, 2), torch.arange(4)
    batch = Batch(views, label, label)
    tap = FeatureTap(model, "encode")

    def taken(*inputs: Tensor, of: Any = batch) -> tuple[Tensor, Tensor] | None:
        tap.insert()
        for given in inputs:
            model.encode(given)
        found = tap.take(of)
        tap.remove()
        assert "encode" not in vars(model)
        return found

    for given, rows in (
        (views.flatten(0, 1), label.repeat_interleave(3)),
        (views.transpose(0, 1).flatten(0, 1), label.repeat(3)),
        (views[:, 0], label),
    ):
        found = taken(given, torch.rand(12, 1, 2, 2))  # the second pass of SAM does not count
        assert found is not None
        assert torch.equal(found[0], given.flatten(1)[:, :3])
        assert torch.equal(found[1], rows)
    for other in (torch.rand(12, 1, 2, 2), views[:, 1], views.flatten(0, 1).clone().flip(0)):
        assert taken(other) is None
    assert taken() is None
    x = torch.rand(4, 1, 2, 2)
    found = taken(x, of=([x, x + 1], label))
    assert found is not None
    assert torch.equal(found[1], label)
    assert taken(x + 1, of=(x, label)) is None, "such as an image that MixUp made"

    # What hid the method before hides it again.
    hidden = model.encode
    model.encode = hidden  # type: ignore[method-assign]
    tap.insert()
    tap.insert()
    tap.remove()
    assert vars(model)["encode"] is hidden


def test_the_sanity_check_shows_mistakes(tmp_path: Path) -> None:
    """Before an epoch was trained."""

    class Map(Net):
        def encode(self, x: Tensor) -> Tensor:
            return super().encode(x)[:, :, None, None]

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.encode(x).flatten(1))

        def validation_step(self, batch: Any, batch_idx: int) -> None: ...  # type: ignore[override]

    by_name: Any = [{"x": x, "y": y} for x, y in batches(9, 2)]
    for val, match in ((batches(9, 2), r"Map.encode must give features \(4, D\)"), (by_name, "the batches of Map are no .*inputs")):
        for callback in (KNNMonitor(3, reference_loader=batches(3)), NeighbourGallery(reference_loader=batches(3)), FeatureRank()):
            model = Map()
            with pytest.raises(ValueError, match=match):
                make_trainer(tmp_path, callback).fit(model, Loader(batches(0)), Loader(val))
            assert model.steps == 0


@pytest.mark.parametrize("every", [1, 2])
def test_the_first_validated_epoch_counts(every: int, tmp_path: Path) -> None:
    """So that `ModelCheckpoint` finds a score wherever a training begins, or goes on."""

    def train(epochs: int, **settings: Any) -> Any:
        monitor = KNNMonitor(5, every_n_epochs=4, reference_loader=batches(3))
        best = ModelCheckpoint(tmp_path, monitor=monitor.metric(), mode="max")
        settings = {"enable_checkpointing": True, "check_val_every_n_epoch": every, "max_epochs": epochs, **settings}
        resume = settings.pop("ckpt_path", None)
        trainer = make_trainer(tmp_path, monitor, best, **settings)
        trainer.fit(Net(), Loader(batches(0)), Loader(batches(9, 2)), ckpt_path=resume, weights_only=None if resume is None else False)
        return trainer

    train(9)
    train(2).save_checkpoint(tmp_path / "last.ckpt")
    train(9, ckpt_path=tmp_path / "last.ckpt")


def test_names_are_used_once(tmp_path: Path) -> None:
    """Else Lightning would log the mean of two scores, and a picture replace the other."""
    given = batches(3)
    for first, second in (
        (KNNMonitor(3, reference_loader=given), KNNMonitor(3, reference_loader=batches(4))),
        (NeighbourGallery(2, reference_loader=given), NeighbourGallery(3, reference_loader=given)),
        (FeatureRank(), FeatureRank(warn_below=0)),
    ):
        with pytest.raises(MisconfigurationException, match=f"{type(first).__name__} would use the same names as another one of its kind"):
            make_trainer(tmp_path, first, second).validate(Net(), Loader(batches(9, 2)), verbose=False)
    apart = [
        *(KNNMonitor(3, reference_loader=given), KNNMonitor(3, 0.2, reference_loader=given), FeatureRank()),
        *(NeighbourGallery(2, 2, features=features, reference_loader=given) for features in ("encode", "forward")),  # type: ignore[arg-type]
        LinearProbe(3),
    ]
    make_trainer(tmp_path, *apart).validate(Net(), Loader(batches(9, 2)), verbose=False)
    assert {path.name for path in (tmp_path / "neighbours").iterdir()} == {"val.png", "val_forward.png"}


def test_mistakes(tmp_path: Path) -> None:
    def once() -> Iterator[Any]:
        yield from loader()

    train = Loader(batches(0))
    for callback in (KNNMonitor, NeighbourGallery):
        with pytest.raises(TypeError, match="iterated over only once"):
            callback(reference_loader=once())
        with pytest.raises(MisconfigurationException, match=f"{callback.__name__} has no training samples to compare with: give it"):
            make_trainer(tmp_path, callback()).fit(Net(), train, Loader(batches(9, 2)))
    for callback in (KNNMonitor(3, reference_loader=train), NeighbourGallery(reference_loader=train)):
        with pytest.raises(MisconfigurationException, match="must not go through the training's own loader"):
            make_trainer(tmp_path, callback).fit(Net(), train, Loader(batches(9, 2)))
    with pytest.raises(ValueError, match="the loader of training samples is empty"):
        make_trainer(tmp_path, Probe(list)).validate(Net(), Loader(batches(9, 2)), verbose=False)


def run_rank(folder: Path) -> None:
    """One of two processes: every kind of loader, with random streams that differ between the processes."""
    rank = 0
    for name, make in MAKERS.items():
        model, probe = Net(norm=True), Probe(make)
        trainer = make_trainer(folder, probe, max_epochs=1, strategy="ddp", devices=2, use_distributed_sampler=False)
        rank = trainer.global_rank
        torch.manual_seed(rank)
        random.seed(rank)
        trainer.fit(model, Loader(batches(rank)), Loader(batches(9, 2)))
        torch.save((model.state_dict(), tuple(probe.banks[-1]), probe.inputs[-1]), folder / f"{name}_{rank}.pt")


@pytest.mark.slow
def test_two_processes_equal_one(rank_folder: Path) -> None:
    for name in MAKERS:
        (weights, first, inputs), (_, second, others) = (
            torch.load(rank_folder / f"{name}_{rank}.pt", weights_only=True) for rank in range(2)
        )
        assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True)), name
        assert all(torch.equal(inputs[key], others[key]) for key in inputs), name
        model = Net(norm=True)
        model.load_state_dict(weights)
        check(model, first, inputs, name)
