"""What every DataModule promises; the rows are in contract.py."""

import copy
import itertools
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import contract
import pytest
import torch
from contract import CASES, Case, Probe, observe, same, trainer
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from litzoo.datamodules import ArrayDataModule, DataError
from litzoo.datamodules.arrays import TEST, TRAIN, VAL, BatchLoader, BatchSampler
from litzoo.zoo import Batch

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture
def make(case: Case, tmp_path: Path) -> Callable[..., ArrayDataModule]:
    def build(**settings: Any) -> ArrayDataModule:
        return case.make(tmp_path, **{"batch_size": case.batch_size, "seed": 1, **settings})

    return build


def epoch_of(data: ArrayDataModule, epoch: int, loader: BatchLoader | None = None) -> list[Batch]:
    """One training epoch, as a model gets it."""
    loader = loader or data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return [data.transform(batch) for batch in loader]


def test_metadata_is_known_before_training(make: Callable[..., ArrayDataModule]) -> None:
    data = make()
    assert data.trainer is None
    labels = data.arrays.label[data.indices(TRAIN)]
    assert data.num_classes == len(data.class_names) >= 2
    assert all(isinstance(name, str) for name in data.class_names)
    assert data.num_train == len(labels) == sum(data.class_counts)
    assert data.class_counts == [int((labels == cls).sum()) for cls in range(data.num_classes)]
    assert sorted(torch.cat([data.indices(split) for split in (TRAIN, VAL, TEST)]).tolist()) == list(range(len(data.arrays.label)))


def test_every_sample_once_per_epoch(make: Callable[..., ArrayDataModule], case: Case) -> None:
    data = make()
    loader = data.train_dataloader()
    batches = epoch_of(data, 0, loader)
    assert len(batches) == len(loader) == data.num_train // case.batch_size
    assert 4 <= len(batches) <= 10
    assert data.num_train % case.batch_size, "the contract needs an incomplete last batch"
    assert all(len(batch.label) == case.batch_size for batch in batches)
    seen = torch.cat([batch.index for batch in batches]).tolist()
    assert len(set(seen)) == len(seen) == data.num_train - data.num_train % case.batch_size
    assert set(seen) <= set(data.indices(TRAIN).tolist())
    for batch in batches:
        assert torch.equal(batch.label, data.arrays.label[batch.index])
    if not case.shuffles:
        return
    dropped = [set(data.indices(TRAIN).tolist()) - {i for b in epoch_of(data, e) for i in b.index.tolist()} for e in range(3)]
    assert len({frozenset(left) for left in dropped}) > 1, "the same samples must not be left out in every epoch"


def test_epochs_differ_and_repeat(make: Callable[..., ArrayDataModule], case: Case) -> None:
    data = make()
    first, again, second = epoch_of(data, 0), epoch_of(make(), 0), epoch_of(data, 1)
    assert all(map(same, first, again))
    if not case.shuffles:
        assert [b.index.tolist() for b in first] == [b.index.tolist() for b in second]
        return
    assert [b.index.tolist() for b in first] != [b.index.tolist() for b in second]
    assert [b.index.tolist() for b in first] != [b.index.tolist() for b in epoch_of(make(seed=2), 0)]
    if case.augments:
        by_index = [{int(i): x for b in epoch for i, x in zip(b.index, b.input, strict=True)} for epoch in (first, second)]
        for index in by_index[0].keys() & by_index[1].keys():
            assert not torch.equal(by_index[0][index], by_index[1][index])


def test_seed_is_taken_from_seed_everything(make: Callable[..., ArrayDataModule], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    assert all(map(same, epoch_of(make(seed=None), 0), epoch_of(make(seed=7), 0)))


def test_workers_change_nothing(make: Callable[..., ArrayDataModule]) -> None:
    alone, helped = make(), make(num_workers=2)
    loaders = alone.train_dataloader(), helped.train_dataloader()
    for epoch in (0, 1):
        batches = [epoch_of(data, epoch, loader) for data, loader in zip((alone, helped), loaders, strict=True)]
        assert len(batches[0]) == len(batches[1])
        assert all(map(same, *batches))


def test_no_shuffle_keeps_the_order(make: Callable[..., ArrayDataModule]) -> None:
    data = make()
    data.shuffle = False
    seen = torch.cat([batch.index for batch in epoch_of(data, 3)])
    assert torch.equal(seen, data.indices(TRAIN)[: len(seen)])


def test_each_sample_draws_its_own_parameters(make: Callable[..., ArrayDataModule], case: Case) -> None:
    data = make()
    loader = data.train_dataloader()
    batch = next(iter(loader))
    assert batch.key is not None
    assert len(batch.key.unique()) == len(batch.key)
    if not case.augments:
        return
    copies = Batch(*(None if x is None else x[:1].repeat(len(batch.key), *(1,) * (x.dim() - 1)) for x in batch[:4]), batch.key)
    augmented = data.transform(copies).input
    for i, j in itertools.combinations(range(len(augmented)), 2):
        assert not torch.equal(augmented[i], augmented[j])
    # and they do not depend on who else is in the batch
    whole = data.transform(batch).input
    for i in (0, len(whole) - 1):
        one = data.transform(Batch(*(None if x is None else x[i : i + 1] for x in batch)))
        torch.testing.assert_close(one.input[0], whole[i], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "split"), [("val", VAL), ("test", TEST), ("eval_train", TRAIN)])
def test_evaluation_is_never_augmented(make: Callable[..., ArrayDataModule], name: str, split: int) -> None:
    data = make(eval_batch_size=7)
    loader = getattr(data, f"{name}_dataloader")()
    raw = list(loader)
    assert all(batch.key is None for batch in raw)
    given = [data.transform(batch) for batch in raw]
    assert all(map(same, given, [data.transform(batch) for batch in loader]))
    assert torch.equal(torch.cat([batch.index for batch in given]), data.indices(split))
    assert max(len(batch.label) for batch in given) <= 7
    for batch in given:
        arrays = data.arrays
        part = None if arrays.part is None else arrays.part[batch.index].long()
        stored = Batch(arrays.input[batch.index], arrays.label[batch.index], batch.index, part)
        assert same(batch, data.prepare(stored))


def test_evaluation_while_the_trainer_trains(make: Callable[..., ArrayDataModule], tmp_path: Path) -> None:
    data = make()
    seen: list[list[Batch]] = []

    class Peek(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            assert trainer.training
            assert batch.key is not None
            if batch_idx in (0, 2):
                seen.append([trainer.datamodule.transform(b) for b in trainer.datamodule.eval_train_dataloader()])

    model = Probe(data.num_classes)
    trainer(tmp_path, callbacks=[Peek()], max_epochs=1).fit(model, datamodule=data)
    apart = [data.transform(batch) for batch in make().eval_train_dataloader()]
    assert len(seen) == 2
    assert all(all(map(same, apart, batches)) for batches in seen)
    assert model.val_keys
    assert all(key is None for key in model.val_keys)
    validation = [make().transform(batch).input for batch in make().val_dataloader()]
    assert all(torch.equal(a, b) for a, b in zip(model.val_inputs, validation, strict=True))


def test_batch_keeps_its_type_through_transfer(make: Callable[..., ArrayDataModule]) -> None:
    data = make()
    batch = next(iter(data.val_dataloader()))
    moved = data.transfer_batch_to_device(batch, torch.device("cpu"), 0)
    assert type(moved) is Batch
    assert moved.key is None
    assert same(moved, batch)
    trained = data.transfer_batch_to_device(next(iter(data.train_dataloader())), torch.device("cpu"), 0)
    assert type(trained) is Batch
    assert trained.key is not None
    assert data.on_after_batch_transfer((1, 2), 0) == (1, 2)


@pytest.mark.parametrize("used", [False, True])
def test_pickling(make: Callable[..., ArrayDataModule], used: bool) -> None:
    data = make()
    if used:
        epoch_of(data, 0)
    twin = pickle.loads(pickle.dumps(data))
    assert all(map(same, epoch_of(data, 1), epoch_of(twin, 1)))
    assert copy.deepcopy(data).class_counts == data.class_counts


# --- stopping and going on -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("position", [0, 1, 3, -1])
def test_loader_goes_on_where_it_stopped(make: Callable[..., ArrayDataModule], num_workers: int, position: int) -> None:
    data = make(num_workers=num_workers)
    loader = data.train_dataloader()
    loader.sampler.set_epoch(2)
    position = position % (len(loader) + 1)
    running = iter(loader)
    for _ in range(position):
        next(running)
    state = pickle.loads(pickle.dumps(loader.state_dict()))
    rest = list(running)
    resumed = make(num_workers=num_workers).train_dataloader()
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state, "a checkpoint written before the first batch must not forget the position"
    batches = list(resumed)
    assert len(batches) == len(rest) == len(loader) - position
    assert all(map(same, rest, batches))
    resumed.sampler.set_epoch(3)
    assert len(list(resumed)) == len(loader), "only the first epoch is shortened"


def test_state_of_another_epoch_starts_it_from_its_beginning(make: Callable[..., ArrayDataModule]) -> None:
    data = make()
    loader = data.train_dataloader()
    next(iter(loader))
    resumed = make().train_dataloader()
    resumed.load_state_dict(loader.state_dict())
    assert all(map(same, epoch_of(data, 1), epoch_of(data, 1, resumed)))


@pytest.mark.parametrize("factor", [0.5, 2, 100])
def test_another_batch_size_in_the_middle_of_an_epoch_is_refused(make: Callable[..., ArrayDataModule], case: Case, factor: float) -> None:
    loader = make().train_dataloader()
    running = iter(loader)
    for _ in range(3):
        next(running)
    other = make(batch_size=int(case.batch_size * factor)).train_dataloader()
    with pytest.raises(DataError, match="batch_size"):
        other.load_state_dict(loader.state_dict())
    list(running)
    other.load_state_dict(loader.state_dict())  # an epoch's end


def _fit(make: Callable[..., ArrayDataModule], folder: Path, checkpoint: Path | None = None, **settings: Any) -> Probe:
    data = make(**settings.pop("data", {}))
    model = Probe(data.num_classes, seed=0 if checkpoint is None else 99)
    trainer(folder, **settings).fit(model, datamodule=data, ckpt_path=checkpoint, weights_only=False if checkpoint else None)
    return model


def _equal_weights(a: Probe, b: Probe) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


CHECKPOINTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "every step": ({"every_n_train_steps": 1}, {}),
    "epoch end": ({"save_on_train_epoch_end": True}, {}),
    "validation end": ({"save_on_train_epoch_end": False}, {}),
    "validation end, twice an epoch": ({"save_on_train_epoch_end": False}, {"val_check_interval": 0.5}),
    "every step, twice an epoch": ({"every_n_train_steps": 1}, {"val_check_interval": 0.5}),
    "every step, accumulating": ({"every_n_train_steps": 1}, {"accumulate_grad_batches": 2}),
    "every step, limited": ({"every_n_train_steps": 1}, {"limit_train_batches": 3}),
    "every step, no validation": ({"every_n_train_steps": 1}, {"limit_val_batches": 0}),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_resumed_training_equals_uninterrupted(make: Callable[..., ArrayDataModule], case: Case, tmp_path: Path, kind: str) -> None:
    saving, settings = CHECKPOINTS[kind]
    keep = ModelCheckpoint(tmp_path / "kept", filename="{epoch}-{step}", save_top_k=-1, **saving)
    whole = _fit(make, tmp_path, callbacks=[keep], **settings)
    accumulate = settings.get("accumulate_grad_batches", 1)
    paths = sorted((tmp_path / "kept").glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    assert paths
    for path in paths if case is CASES["hdf5_points"] else paths[1::4] or paths:  # all of them for one, for time
        # with the same callbacks, as a user who starts the same command again
        again = ModelCheckpoint(tmp_path / "again", filename="{epoch}-{step}", save_top_k=-1, **saving)
        resumed = _fit(make, tmp_path, path, callbacks=[again], **settings)
        state = torch.load(path, weights_only=False)
        done = state["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["processed"]
        assert accumulate > 1 or done == state["global_step"]
        assert resumed.train_seen == whole.train_seen[done:], path.name
        assert _equal_weights(resumed, whole), path.name


class Scheduled(Probe):
    """Asks how long training is, as schedulers do, when Lightning has not yet read where a resumed run's loader stood."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return {
            "optimizer": optimizer,
            "lr_scheduler": {
                "scheduler": torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, self.trainer.estimated_stepping_batches),
                "interval": "step",
            },
        }


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resumed_training_equals_uninterrupted_with_a_schedule(
    make: Callable[..., ArrayDataModule], tmp_path: Path, num_workers: int
) -> None:
    def fit(checkpoint: Path | None = None, **settings: Any) -> Probe:
        data = make(num_workers=num_workers)
        model = Scheduled(data.num_classes, seed=0 if checkpoint is None else 99)
        trainer(tmp_path, **settings).fit(model, datamodule=data, ckpt_path=checkpoint, weights_only=False if checkpoint else None)
        return model

    whole = fit(callbacks=[ModelCheckpoint(tmp_path / "kept", filename="{step}", every_n_train_steps=3, save_top_k=-1)])
    resumed = fit(tmp_path / "kept" / "step=3.ckpt")
    assert resumed.train_seen == whole.train_seen[3:]
    assert _equal_weights(resumed, whole)


def test_resumed_twice(make: Callable[..., ArrayDataModule], tmp_path: Path) -> None:
    """A checkpoint of a resumed run is as good as one of the first run."""
    settings: dict[str, Any] = {"val_check_interval": 0.5}

    def keep(name: str) -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path / name, filename="{step}", save_top_k=-1, save_on_train_epoch_end=False)

    whole = _fit(make, tmp_path, callbacks=[keep("a")], **settings)
    first = min((tmp_path / "a").glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    _fit(make, tmp_path, first, callbacks=[keep("b")], **settings)
    for path in (tmp_path / "b").glob("*.ckpt"):
        state = torch.load(path, weights_only=False)
        resumed = _fit(make, tmp_path, path, callbacks=[keep("c")], **settings)
        assert resumed.train_seen == whole.train_seen[state["global_step"] :], path.name
        assert _equal_weights(resumed, whole), path.name


class Crash(Callback):
    """Stops as Ctrl-C does, in the middle of the second epoch."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch == 1 and batch_idx == 1:
            raise RuntimeError("power cut")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_power_cut_in_the_middle_of_an_epoch(make: Callable[..., ArrayDataModule], tmp_path: Path, num_workers: int) -> None:
    whole = _fit(make, tmp_path)
    keep = ModelCheckpoint(tmp_path / "kept", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    with pytest.raises(RuntimeError, match="power cut"):
        _fit(make, tmp_path, callbacks=[keep, Crash()], data={"num_workers": num_workers})
    newest = max((tmp_path / "kept").glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    steps = torch.load(newest, weights_only=False)["global_step"]
    assert steps % (len(whole.train_seen) // 2) > 0
    resumed = _fit(make, tmp_path, newest, data={"num_workers": num_workers})
    assert resumed.train_seen == whole.train_seen[steps:]
    assert _equal_weights(resumed, whole)


def test_controls_of_resumption_differ(make: Callable[..., ArrayDataModule], tmp_path: Path) -> None:
    """Without the loader's state, and with other noise, the comparisons above do fail."""
    whole = _fit(make, tmp_path, callbacks=[ModelCheckpoint(tmp_path / "kept", filename="{step}", every_n_train_steps=3, save_top_k=-1)])
    path = tmp_path / "kept" / "step=3.ckpt"
    state = torch.load(path, weights_only=False)
    del state["loops"]["fit_loop"]["state_dict"]["combined_loader"], state[type(make()).__qualname__]
    torch.save(state, tmp_path / "stateless.ckpt")
    stateless = _fit(make, tmp_path, tmp_path / "stateless.ckpt")
    assert stateless.train_seen != whole.train_seen[3:]
    assert not _equal_weights(stateless, whole)

    data = make()
    noisy = Probe(data.num_classes)
    unseeded = Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        max_epochs=2,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    torch.manual_seed(12345)
    unseeded.fit(noisy, datamodule=data, ckpt_path=path, weights_only=False)
    assert noisy.train_seen == whole.train_seen[3:]
    assert not _equal_weights(noisy, whole)


def test_trainer_refuses_another_batch_size(make: Callable[..., ArrayDataModule], case: Case, tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path / "kept", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    _fit(make, tmp_path, callbacks=[keep], max_epochs=1)
    with pytest.raises(DataError, match="batch_size"):
        _fit(make, tmp_path, tmp_path / "kept" / "step=3.ckpt", data={"batch_size": case.batch_size // 2})


@pytest.mark.parametrize("num_workers", [0, 2])
def test_limit_train_batches(make: Callable[..., ArrayDataModule], tmp_path: Path, num_workers: int) -> None:
    model = _fit(make, tmp_path, limit_train_batches=2, data={"num_workers": num_workers})
    whole = _fit(make, tmp_path)
    half = len(whole.train_seen) // 2
    assert model.train_seen == whole.train_seen[:2] + whole.train_seen[half : half + 2]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_overfit_batches(make: Callable[..., ArrayDataModule], tmp_path: Path, num_workers: int) -> None:
    with warnings.catch_warnings(record=True):
        model = _fit(make, tmp_path, overfit_batches=2, max_epochs=3, data={"num_workers": num_workers})
    order = [[index for index, _ in batch] for batch in model.train_seen]
    assert len(order) == 6
    assert order[:2] == order[2:4] == order[4:]
    data = make()
    assert [index for batch in order[:2] for index in batch] == data.indices(TRAIN)[: 2 * data.batch_size].tolist()


def test_prediction_of_the_data_module(make: Callable[..., ArrayDataModule], tmp_path: Path) -> None:
    data = make()

    class Inputs(Probe):
        def predict_step(self, batch: Batch, batch_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
            return batch.index, batch.input

    found = trainer(tmp_path).predict(Inputs(data.num_classes), datamodule=data)
    assert torch.equal(torch.cat([index for index, _ in found]), data.indices(TEST))
    expected = torch.cat([data.transform(batch).input for batch in data.test_dataloader()])
    assert torch.equal(torch.cat([images for _, images in found]), expected)


def test_prediction_loader(make: Callable[..., ArrayDataModule], tmp_path: Path) -> None:
    """`Trainer.predict` re-makes the loader it is given."""
    data = make()

    class Indices(Probe):
        def predict_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
            return batch.index

    model = Indices(data.num_classes)
    found = trainer(tmp_path).predict(model, dataloaders=data.test_dataloader())
    assert torch.equal(torch.cat(found), data.indices(TEST))


# --- several processes -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory: pytest.TempPathFactory, two_processes: Callable[..., None]) -> list[dict[str, Any]]:
    """What each of two processes sees, for every case at once: starting processes is slow."""
    folder = tmp_path_factory.mktemp("two_ranks")
    for row in CASES.values():
        row.make(folder)
    two_processes(Path(contract.__file__), folder)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_processes_share_the_global_batches(name: str, two_ranks: list[dict[str, Any]], tmp_path: Path) -> None:
    ranks = [seen[name] for seen in two_ranks]
    alone = observe(CASES[name], tmp_path, 2 * CASES[name].batch_size)
    assert len(ranks[0]["train"]) == len(ranks[1]["train"]) == len(alone["train"]) > 0
    for mine, yours, both in zip(ranks[0]["train"], ranks[1]["train"], alone["train"], strict=True):
        assert len(mine) == len(yours)
        union, expected = sorted(mine + yours), sorted(both)
        assert [index for index, _ in union] == [index for index, _ in expected]
        assert [value for _, value in union] == pytest.approx([value for _, value in expected], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_processes_evaluate_each_sample_once(name: str, two_ranks: list[dict[str, Any]], tmp_path: Path) -> None:
    ranks = [seen[name]["val"] for seen in two_ranks]
    assert len(ranks[0]) == len(ranks[1])
    assert all(0 < len(batch) <= 5 for rank in ranks for batch in rank)
    seen = [index for rank in ranks for batch in rank for index in batch]
    assert sorted(seen) == CASES[name].make(tmp_path).indices(VAL).tolist()


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_processes_keep_the_sampler_and_the_weights_together(name: str, two_ranks: list[dict[str, Any]]) -> None:
    for seen in two_ranks:
        assert seen[name]["samplers"] == ["BatchSampler", "BatchSampler"]
    a, b = (seen[name]["weights"] for seen in two_ranks)
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("samples", [2, 3, 5, 8, 13, 29])
@pytest.mark.parametrize("batch_size", [1, 2, 4, 50])
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("training", [True, False])
def test_sampler_deals_out_evenly(samples: int, batch_size: int, world: int, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = BatchSampler(torch.arange(100, 100 + samples), batch_size, seed=0, training=training)
    ranks = []
    for rank in range(world):
        monkeypatch.setattr(sampler, "_world", lambda rank=rank: (rank, world))
        batches = [indices for _, indices in sampler]
        assert len(batches) == len(sampler)
        assert all(batches), "no empty batch"
        assert max(map(len, batches)) <= batch_size + (not training and batch_size == 1)
        ranks.append(batches)
    seen = [index for batches in ranks for batch in batches for index in batch]
    assert len(seen) == len(set(seen))
    if training:
        assert len({len(batch) for batches in ranks for batch in batches}) == 1
    else:
        assert sorted(seen) == list(range(100, 100 + samples))


def test_more_processes_than_samples_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = BatchSampler(torch.arange(1), 4, seed=0, training=True)
    monkeypatch.setattr(sampler, "_world", lambda: (0, 2))
    with pytest.raises(DataError, match="2 processes"):
        list(sampler)


def test_another_number_of_processes_in_the_middle_of_an_epoch_is_refused(make: Callable[..., ArrayDataModule]) -> None:
    loader = make().train_dataloader()
    next(iter(loader))
    with pytest.raises(DataError, match="processes"):
        make().train_dataloader().load_state_dict({**loader.state_dict(), "processes": 2})
