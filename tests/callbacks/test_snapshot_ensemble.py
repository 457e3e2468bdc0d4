"""SnapshotEnsemble against hand-written loops and separately loaded snapshots; `run_rank` is for two processes."""

import math
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateFinder, LearningRateMonitor, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.callbacks.weight_averaging import EMAWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from litzoo.callbacks import EMA, SnapshotEnsemble

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
SAMPLES, BATCH, LR = 50, 8, 0.5


class Plain(LightningModule):
    """Somebody's classifier, with weights of two shapes, a weight that occurs twice, a layer that occurs twice, and BatchNorm."""

    def __init__(self, lr: float = LR) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.first = nn.Linear(4, 4)
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.first.weight
        self.again = self.first
        self.norm = nn.BatchNorm1d(4)
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.again(self.tied(self.first(x)).tanh())))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        logits = self(batch[0])
        self.log("test_loss", F.cross_entropy(logits, batch[1]))
        self.log("test_accuracy", (logits.argmax(dim=1) == batch[1]).double().mean())

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.hparams["lr"], momentum=0.9)


def model(seed: int = 0) -> Plain:
    torch.manual_seed(seed)
    return Plain().double()


def dataset(seed: int = 1, samples: int = SAMPLES) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 4, generator=generator, dtype=torch.float64)
    return TensorDataset(x, torch.randint(3, (samples,), generator=generator))


def loader(seed: int = 1, samples: int = SAMPLES) -> DataLoader:
    return DataLoader(dataset(seed, samples), batch_size=BATCH)


def make_trainer(folder: Path, *callbacks: Callback, **settings: Any) -> Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    common: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "max_epochs": 5, "default_root_dir": folder, **quiet}
    return Trainer(callbacks=list(callbacks), **{**common, **settings})


def fitted(folder: Path, num_cycles: int = 3, **settings: Any) -> tuple[Plain, SnapshotEnsemble, Trainer]:
    module, callback = model(), SnapshotEnsemble(num_cycles)
    trainer = make_trainer(folder, callback, **settings)
    trainer.fit(module, loader())
    return module, callback, trainer


def snapshot(path: Path) -> Plain:
    # The dtype is no hyper-parameter.
    module = Plain().double()
    module.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    return module.eval()


def mean_probability(folder: Path, x: Tensor, num_cycles: int = 3) -> Tensor:
    with torch.no_grad():
        members = [snapshot(folder / f"cycle_{cycle}.ckpt")(x).softmax(dim=1) for cycle in range(1, num_cycles + 1)]
    return sum(members) / num_cycles  # type: ignore[return-value]


def probability(trainer: Trainer, module: LightningModule, **settings: Any) -> Tensor:
    outputs: Any = trainer.predict(module, loader(2), **settings)
    return torch.cat(outputs).exp()


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


class Rates(Callback):
    """The learning rates of the optimiser steps."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])


def equation_2(steps: int, num_cycles: int, lr: float = LR, min_lr: float = 0.0) -> list[float]:
    length = math.ceil(steps / num_cycles)
    return [min_lr + (lr - min_lr) / 2 * (math.cos(math.pi * ((t - 1) % length) / length) + 1) for t in range(1, steps + 1)]


@pytest.mark.parametrize(("accumulate", "num_cycles", "min_lr"), [(1, 3, 0.0), (1, 1, 0.1), (2, 4, 0.0), (3, 3, 0.01), (3, 15, 0.0)])
def test_rates_and_snapshots_equal_a_loop_by_hand(accumulate: int, num_cycles: int, min_lr: float, tmp_path: Path) -> None:
    rates = Rates()
    trainer = make_trainer(tmp_path, SnapshotEnsemble(num_cycles, min_lr), rates, accumulate_grad_batches=accumulate)
    module = model()
    trainer.fit(module, loader(), loader(2))

    batches = len(loader())
    steps = 5 * math.ceil(batches / accumulate)
    expected = equation_2(steps, num_cycles, min_lr=min_lr)
    assert rates.rates == pytest.approx(expected, abs=1e-15)

    by_hand, length, step = model(), math.ceil(steps / num_cycles), 0
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=LR, momentum=0.9)
    files = []
    for _ in range(5):
        for index, batch in enumerate(loader(), start=1):
            (by_hand.training_step(batch, index) / accumulate).backward()
            if index % accumulate == 0 or index == batches:
                optimizer.param_groups[0]["lr"] = expected[step]
                optimizer.step()
                optimizer.zero_grad()
                step += 1
                if step % length == 0 or step == steps:
                    files.append(tmp_path / "snapshots" / f"cycle_{len(files) + 1}.ckpt")
                    saved = torch.load(files[-1], weights_only=True)
                    assert saved["global_step"] == step
                    assert "optimizer_states" not in saved
                    for name, value in by_hand.state_dict().items():
                        torch.testing.assert_close(saved["state_dict"][name], value, rtol=1e-12, atol=1e-12)
    assert len(files) == num_cycles
    assert sorted((tmp_path / "snapshots").iterdir()) == sorted(files)
    assert Plain.load_from_checkpoint(files[0]).hparams["lr"] == LR


def check_ensemble(trainer: Trainer, module: LightningModule, folder: Path, **settings: Any) -> None:
    """Tests and predictions are those of the mean probability, and leave the module as it was."""
    before = {name: value.clone() for name, value in module.state_dict().items()}
    owned, tensors = set(vars(module)), [id(tensor) for tensor in module.parameters()]
    x, label = dataset(2).tensors
    mean = mean_probability(folder, x)
    torch.testing.assert_close(probability(trainer, module, **settings), mean, rtol=0, atol=1e-12)
    metrics = trainer.test(module, loader(2), verbose=False, **settings)[0]
    assert set(metrics) == {"test_loss", "test_accuracy"}
    assert metrics["test_loss"] == pytest.approx(F.nll_loss(mean.log(), label).item(), abs=1e-12)
    assert metrics["test_accuracy"] == (mean.argmax(dim=1) == label).double().mean().item()
    assert set(vars(module)) == owned
    assert [id(tensor) for tensor in module.parameters()] == tensors
    assert module.again is module.first
    assert module.again.weight is module.tied.weight
    if "ckpt_path" not in settings:
        assert same(before, module.state_dict())


def test_the_ensemble_is_the_mean_of_softmaxes(tmp_path: Path) -> None:
    module, callback, trainer = fitted(tmp_path)
    folder = tmp_path / "snapshots"
    check_ensemble(trainer, module, folder)
    check_ensemble(make_trainer(tmp_path / "other", callback), module, folder)
    current = trainer.validate(module, loader(2), verbose=False)[0]["val_loss"]
    x, label = dataset(2).tensors
    with torch.no_grad():
        assert current == pytest.approx(F.cross_entropy(module.eval()(x), label).item()), "validation uses the current weights"
        assert F.nll_loss(mean_probability(folder, x).log(), label).item() != pytest.approx(current, abs=1e-6)


def test_from_any_checkpoint_of_the_run(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path / "checkpoints", save_top_k=-1, filename="{epoch}")
    callback = SnapshotEnsemble(3)
    trainer = make_trainer(tmp_path, callback, saver, enable_checkpointing=True)
    trainer.fit(model(), loader())
    for epoch in (0, 2, 4):
        path = tmp_path / "checkpoints" / f"epoch={epoch}.ckpt"
        check_ensemble(trainer, model(), tmp_path / "snapshots", ckpt_path=path)
        check_ensemble(make_trainer(tmp_path / "new", SnapshotEnsemble()), model(), tmp_path / "snapshots", ckpt_path=path)
    # Snapshots without a run's state: their folder is given.
    check_ensemble(make_trainer(tmp_path / "new", SnapshotEnsemble(dirpath=tmp_path / "snapshots")), model(), tmp_path / "snapshots")


def test_bf16_mixed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, callback = Plain(), SnapshotEnsemble(3)
    data = DataLoader(TensorDataset(dataset().tensors[0].float(), dataset().tensors[1]), batch_size=BATCH)
    trainer = make_trainer(tmp_path, callback, precision="bf16-mixed")
    trainer.fit(module, data)
    outputs: Any = trainer.predict(module, data)
    assert outputs[0].dtype == torch.float32
    members = []
    for cycle in (1, 2, 3):
        member = Plain.load_from_checkpoint(tmp_path / "snapshots" / f"cycle_{cycle}.ckpt").eval()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            members.append(member(dataset().tensors[0].float()).float().softmax(dim=1))
    torch.testing.assert_close(torch.cat(outputs).exp(), sum(members) / 3, rtol=1e-5, atol=1e-6)


class Loader:
    """Batches in an order of its own, which goes on where its state says."""

    def __init__(self) -> None:
        self.next = 0

    def __len__(self) -> int:
        return len(loader())

    def __iter__(self) -> Iterator[Any]:
        batches = list(loader())
        self.next %= len(batches)
        while self.next < len(batches):
            self.next += 1
            yield batches[self.next - 1]

    def state_dict(self) -> dict[str, Any]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.next = state["next"]


class SaveEachStep(Callback):
    """A checkpoint each batch, before the ensemble has counted it if it comes first."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        trainer.save_checkpoint(Path(trainer.default_root_dir) / f"step_{trainer.global_step}.ckpt")


# Cycles of 12 steps in epochs of 7: amid the first, just after it, at the ends of epochs, amid the last.
@pytest.mark.parametrize("step", [3, 7, 12, 14, 27])
@pytest.mark.parametrize("saves_first", [False, True])
def test_resume_equals_the_uninterrupted_run(step: int, saves_first: bool, tmp_path: Path) -> None:
    def run(folder: Path, **settings: Any) -> tuple[Plain, list[float], Trainer]:
        module, rates, parts = model(), Rates(), [SnapshotEnsemble(3), SaveEachStep()]
        trainer = make_trainer(folder, *(parts[::-1] if saves_first else parts), rates)
        trainer.fit(module, Loader(), **settings)
        return module, rates.rates, trainer

    whole, rates, _ = run(tmp_path / "whole")
    folder = tmp_path / "whole" / "snapshots"
    expected = {path.name: torch.load(path, weights_only=True)["state_dict"] for path in folder.iterdir()}
    assert len(expected) == 3
    for path in folder.iterdir():
        if path.name > f"cycle_{step // 12}.ckpt":
            path.unlink()
    if saves_first and step == 12:
        (folder / "cycle_1.ckpt").unlink()
    resumed, later, trainer = run(tmp_path / "resumed", ckpt_path=tmp_path / "whole" / f"step_{step}.ckpt")
    assert later == rates[step:]
    assert same(resumed.state_dict(), whole.state_dict())
    assert not (tmp_path / "resumed" / "snapshots").exists(), "it goes on in the folder of the run"
    for name, state in expected.items():
        assert same(torch.load(folder / name, weights_only=True)["state_dict"], state)
    check_ensemble(trainer, resumed, folder)


def test_snapshots_that_come_again_are_written_anew(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    make_trainer(tmp_path, SnapshotEnsemble(3), saver, enable_checkpointing=True).fit(model(), loader())
    files = [tmp_path / "snapshots" / f"cycle_{cycle}.ckpt" for cycle in (1, 2, 3)]
    before = [path.read_bytes() for path in files]
    for epoch, kept in ((0, 0), (1, 1), (4, 3)):
        for path in files:
            path.write_bytes(b"")
        make_trainer(tmp_path / "resumed", SnapshotEnsemble(3)).fit(model(), loader(), ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
        assert [path.stat().st_size > 0 for path in files] == [cycle >= kept for cycle in range(3)]
        for path, content in zip(files, before, strict=True):
            path.write_bytes(content)


def test_a_second_fit_keeps_the_files_of_the_first(tmp_path: Path) -> None:
    callback = SnapshotEnsemble(3)
    make_trainer(tmp_path, callback).fit(model(), loader())
    before = {path: path.read_bytes() for path in (tmp_path / "snapshots").iterdir()}
    second = model(5)
    trainer = make_trainer(tmp_path, callback)
    trainer.fit(second, loader())
    assert {path: path.read_bytes() for path in (tmp_path / "snapshots").iterdir()} == before
    check_ensemble(trainer, second, tmp_path / "snapshots-v1")
    given = SnapshotEnsemble(2, dirpath=tmp_path / "snapshots")
    make_trainer(tmp_path / "elsewhere", given).fit(model(), loader())
    assert sorted(path.name for path in (tmp_path / "snapshots-v2").iterdir()) == ["cycle_1.ckpt", "cycle_2.ckpt"]


def test_the_run_s_folder_is_that_of_the_logger(tmp_path: Path) -> None:
    _, _, trainer = fitted(tmp_path, logger=CSVLogger(tmp_path))
    assert len(list((Path(str(trainer.log_dir)) / "snapshots").iterdir())) == 3
    rates = LearningRateMonitor()
    make_trainer(tmp_path, SnapshotEnsemble(2), rates, logger=CSVLogger(tmp_path)).fit(model(), loader())


@pytest.mark.parametrize("below", ["", "checkpoints"])
def test_moved_folder(below: str, tmp_path: Path) -> None:
    module, _, trainer = fitted(tmp_path / "run")
    trainer.save_checkpoint(tmp_path / "run" / below / "last.ckpt")
    (tmp_path / "run").rename(tmp_path / "moved")
    checkpoint = tmp_path / "moved" / below / "last.ckpt"
    check_ensemble(make_trainer(tmp_path, SnapshotEnsemble()), module, tmp_path / "moved" / "snapshots", ckpt_path=checkpoint)
    (tmp_path / "moved" / "snapshots").rename(tmp_path / "far")
    found = SnapshotEnsemble(dirpath=tmp_path / "far")
    check_ensemble(make_trainer(tmp_path, found), module, tmp_path / "far", ckpt_path=checkpoint)
    with pytest.raises(MisconfigurationException, match=r"does not find cycle_1.ckpt ... cycle_3.ckpt in .*run/snapshots: give the folder"):
        make_trainer(tmp_path, SnapshotEnsemble()).test(model(), loader(2), ckpt_path=checkpoint)


def test_resume_of_a_moved_run(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path / "run", save_top_k=-1, filename="{epoch}")
    make_trainer(tmp_path / "run", SnapshotEnsemble(3), saver, enable_checkpointing=True).fit(model(), loader())
    (tmp_path / "run").rename(tmp_path / "moved")
    late, early = tmp_path / "moved" / "epoch=1.ckpt", tmp_path / "moved" / "epoch=0.ckpt"
    (tmp_path / "moved" / "snapshots" / "cycle_3.ckpt").unlink()
    make_trainer(tmp_path / "new", SnapshotEnsemble(3)).fit(model(), loader(), ckpt_path=late)
    assert (tmp_path / "moved" / "snapshots" / "cycle_3.ckpt").is_file()
    shutil.rmtree(tmp_path / "moved" / "snapshots")
    with pytest.raises(MisconfigurationException, match=r"does not find cycle_1.ckpt in .*run/snapshots"):
        make_trainer(tmp_path / "new", SnapshotEnsemble(3)).fit(model(), loader(), ckpt_path=late)
    make_trainer(tmp_path / "new", SnapshotEnsemble(3)).fit(model(), loader(), ckpt_path=early)
    assert len(list((tmp_path / "new" / "snapshots").iterdir())) == 3, "no snapshot was lost, so a new folder will do"


def test_another_run_s_snapshots_do_not_stand_in(tmp_path: Path) -> None:
    given = tmp_path / "given"
    make_trainer(tmp_path, SnapshotEnsemble(3, dirpath=given)).fit(model(), loader())
    second = SnapshotEnsemble(3, dirpath=given)
    trainer = make_trainer(tmp_path, second)
    trainer.fit(model(), loader())
    shutil.rmtree(tmp_path / "given-v1")
    with pytest.raises(MisconfigurationException, match="does not find"):
        trainer.test(model(), loader(2), verbose=False)

    # A run that has none yet, whose checkpoint lies beside those of another run.
    fitted(tmp_path)
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    make_trainer(tmp_path / "other", SnapshotEnsemble(3), saver, enable_checkpointing=True).fit(model(), loader())
    shutil.rmtree(tmp_path / "other" / "snapshots")
    with pytest.raises(MisconfigurationException, match="has no snapshots"):
        make_trainer(tmp_path, SnapshotEnsemble()).test(model(), loader(2), verbose=False, ckpt_path=tmp_path / "step=5.ckpt")


class Fails(Plain):
    def test_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0])
        raise RuntimeError("of the step")


class Tuples(Plain):
    def test_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0])

    def forward(self, x: Tensor) -> Any:
        return (super().forward(x),)


class OneColumn(Tuples):
    def forward(self, x: Tensor) -> Any:
        return Plain.forward(self, x)[:, :1]


class OtherClasses(Tuples):
    num_classes = 99
    forward = Plain.forward


class NeverCalls(Plain):
    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.last(batch[0])

    predict_step = test_step  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        (Fails, RuntimeError, "of the step"),
        (Tuples, ValueError, r"averages logits \(batch, classes\), but the forward of Tuples gives tuple"),
        (OneColumn, ValueError, r"the forward of OneColumn gives torch.float64 of shape \(8, 1\)"),
        (OtherClasses, ValueError, r"averages logits \(batch, 99\), but the forward of OtherClasses gives torch.float64"),
        (NeverCalls, MisconfigurationException, r"the steps of NeverCalls never called forward: let them call self\(x\)"),
    ],
)
def test_errors_in_the_test_leave_the_module_as_it_was(kind: type[Plain], error: type, message: str, tmp_path: Path) -> None:
    _, callback, _ = fitted(tmp_path)
    module = kind().double()
    owned, before = set(vars(module)), {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(error, match=message):
        make_trainer(tmp_path, callback).test(module, loader(2), verbose=False)
    assert set(vars(module)) == owned
    assert same(before, module.state_dict())
    pickle.dumps(callback)


def test_predict_that_never_calls_forward(tmp_path: Path) -> None:
    _, callback, _ = fitted(tmp_path)
    with pytest.raises(MisconfigurationException, match="never called forward"):
        make_trainer(tmp_path, callback).predict(NeverCalls().double(), loader(2))
    make_trainer(tmp_path, callback, limit_predict_batches=0).predict(NeverCalls().double(), loader(2))


def test_a_forward_that_the_instance_had_comes_back(tmp_path: Path) -> None:
    module, _, trainer = fitted(tmp_path)
    inner = module.forward
    replaced = lambda x: inner(x)
    module.forward = replaced  # type: ignore[method-assign]
    check_ensemble(trainer, module, tmp_path / "snapshots")
    assert vars(module)["forward"] is replaced


class Doubles(Callback):
    """Another callback that replaces forward, and puts back what it has found, first or last."""

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.before = vars(pl_module).get("forward")
        found = pl_module.forward
        pl_module.forward = lambda x: found(torch.cat([x, x]))[: len(x)]  # type: ignore[method-assign]

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        del pl_module.forward
        if self.before is not None:
            pl_module.forward = self.before


@pytest.mark.parametrize("first", [True, False])
def test_with_another_callback_that_replaces_forward(first: bool, tmp_path: Path) -> None:
    module, callback, _ = fitted(tmp_path)
    callbacks = [callback, Doubles()] if first else [Doubles(), callback]
    found = probability(make_trainer(tmp_path, *callbacks), module)
    torch.testing.assert_close(found, mean_probability(tmp_path / "snapshots", dataset(2).tensors[0]), rtol=0, atol=1e-12)
    assert "forward" not in vars(module)


def test_gradients_with_respect_to_the_input(tmp_path: Path) -> None:
    class Attacked(Plain):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            with torch.inference_mode(False), torch.enable_grad():
                x = batch[0].clone().requires_grad_()
                assert torch.autograd.grad(self(x).sum(), x)[0].abs().sum() > 0

    _, callback, _ = fitted(tmp_path)
    make_trainer(tmp_path, callback).test(Attacked().double(), loader(2), verbose=False)


def test_pickle(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(SnapshotEnsemble(2, dirpath=tmp_path)))
    module, callback, _ = fitted(tmp_path)
    check_ensemble(make_trainer(tmp_path, pickle.loads(pickle.dumps(callback))), module, tmp_path / "snapshots")


def test_fast_dev_run_writes_nothing(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, SnapshotEnsemble(), fast_dev_run=True)
    module = model()
    trainer.fit(module, loader(), loader(2))
    trainer.test(module, loader(2), verbose=False)
    assert not (tmp_path / "snapshots").exists()


def test_a_training_that_ends_early_says_so(tmp_path: Path) -> None:
    class Stops(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            trainer.should_stop = trainer.current_epoch == 3

    trainer = make_trainer(tmp_path, SnapshotEnsemble(3), Stops())
    with pytest.warns(UserWarning, match="2 of 3 snapshots: the training ended before its last step"):
        trainer.fit(model(), loader())
    found = probability(trainer, model())
    torch.testing.assert_close(found, mean_probability(tmp_path / "snapshots", dataset(2).tensors[0], 2), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_cycles": 0}, "num_cycles must be at least 1, got 0"),
        ({"min_lr": -0.1}, "min_lr must be at least 0 and finite, got -0.1"),
        ({"min_lr": math.nan}, "min_lr must be at least 0 and finite, got nan"),
        ({"min_lr": math.inf}, "min_lr must be at least 0 and finite, got inf"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SnapshotEnsemble(**settings)


class Scheduled(Plain):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


class Manual(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class NoOptimizer(Plain):
    def configure_optimizers(self) -> Any:
        return None


class TwoOptimizers(Plain):
    def configure_optimizers(self) -> Any:
        return [super().configure_optimizers(), torch.optim.SGD(self.last.parameters(), lr=0.1)]


class FSDPStrategy(SingleDeviceStrategy):
    """Named as the one that shards."""


class BatchSizeFinder(Callback): ...


class Endless(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        return iter(dataset())


@pytest.mark.parametrize(
    ("module", "settings", "message"),
    [
        (Scheduled, {}, "as does the module's own scheduler: return only the optimizer"),
        (Manual, {}, "manually optimised"),
        (NoOptimizer, {}, "finds no learning rate: return an optimizer"),
        (Plain, {"max_epochs": -1}, "a training without end into cycles: set max_epochs or max_steps"),
        (Plain, {"max_steps": 2}, "cannot make 3 cycles of 2 optimiser steps, only 2 of 1: set num_cycles=2 or train longer"),
        (Plain, {"max_steps": 4}, "cannot make 3 cycles of 4 optimiser steps, only 2 of 2: set num_cycles=2 or train longer"),
        (Plain, {"strategy": FSDPStrategy("cpu")}, "FSDPStrategy, which shards"),
        (Plain, {"callbacks": EMA()}, "with EMA, because snapshots are raw weights, and the average is not"),
        (Plain, {"callbacks": EMAWeightAveraging()}, "with EMAWeightAveraging, because"),
        (Plain, {"callbacks": StochasticWeightAveraging(0.1)}, "with StochasticWeightAveraging, because"),
        (Plain, {"callbacks": LearningRateFinder()}, "with LearningRateFinder, which changes"),
        (Plain, {"callbacks": BatchSizeFinder()}, "with BatchSizeFinder, which changes"),
    ],
)
def test_refusals_of_fit(module: type[Plain], settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    settings = dict(settings)
    callbacks = [SnapshotEnsemble(3), *([settings.pop("callbacks")] if "callbacks" in settings else [])]
    with pytest.raises(MisconfigurationException, match=message):
        make_trainer(tmp_path, *callbacks, **settings).fit(module().double(), loader())
    assert not (tmp_path / "snapshots").exists()


def test_more_refusals_of_fit(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"has min_lr=0.6 above the learning rate 0.5: lower min_lr"):
        make_trainer(tmp_path, SnapshotEnsemble(3, 0.6)).fit(model(), loader())
    with pytest.raises(MisconfigurationException, match="training without end"):
        make_trainer(tmp_path, SnapshotEnsemble(3)).fit(model(), DataLoader(Endless(), batch_size=BATCH))
    make_trainer(tmp_path, SnapshotEnsemble(3), max_steps=6).fit(model(), DataLoader(Endless(), batch_size=BATCH))
    with pytest.raises(RuntimeError, match="multiple optimizers"):
        make_trainer(tmp_path, SnapshotEnsemble(3)).fit(TwoOptimizers(), loader())


def test_refusals_of_a_resume(tmp_path: Path) -> None:
    plain = make_trainer(tmp_path, max_epochs=1)
    plain.fit(model(), loader())
    plain.save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(MisconfigurationException, match="would begin at step 7 of a training whose cycles it did not set"):
        make_trainer(tmp_path, SnapshotEnsemble(3)).fit(model(), loader(), ckpt_path=tmp_path / "plain.ckpt")
    _, _, trainer = fitted(tmp_path)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    for callback, epochs in ((SnapshotEnsemble(3), 7), (SnapshotEnsemble(4), 7), (SnapshotEnsemble(3, 0.1), 7)):
        with pytest.raises(MisconfigurationException, match="resume with the same settings and epochs"):
            make_trainer(tmp_path, callback, max_epochs=epochs).fit(model(), loader(), ckpt_path=tmp_path / "last.ckpt")


def test_refusals_of_test(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="has no snapshots: fit with it first, or give ckpt_path"):
        make_trainer(tmp_path, SnapshotEnsemble()).test(model(), loader(2), verbose=False)
    with pytest.raises(MisconfigurationException, match="has no snapshots"):
        make_trainer(tmp_path, SnapshotEnsemble()).predict(model(), loader(2))
    with pytest.raises(MisconfigurationException, match="FSDPStrategy, which shards"):
        make_trainer(tmp_path, SnapshotEnsemble(), strategy=FSDPStrategy("cpu")).test(model(), loader(2), verbose=False)
    make_trainer(tmp_path, SnapshotEnsemble()).validate(model(), loader(2), verbose=False)
    _, callback, _ = fitted(tmp_path)
    with pytest.raises(RuntimeError, match="Error"):
        make_trainer(tmp_path, callback).test(Other(), loader(2), verbose=False)


class Other(Plain):
    """Not the model of the snapshots."""

    def __init__(self) -> None:
        super().__init__()
        self.more = nn.Linear(2, 2)


def run_rank(folder: Path) -> None:
    """One of two processes: two fits, the second resumed from its first epochs, and a test."""
    for name in ("first", "second"):
        module, callback, rates = model(), SnapshotEnsemble(3), Rates()
        saver = ModelCheckpoint(folder / name, save_top_k=-1, filename="{epoch}")
        settings: dict[str, Any] = {"strategy": "ddp", "devices": 2, "enable_checkpointing": True}
        trainer = make_trainer(folder, callback, rates, saver, **settings)
        trainer.fit(module, loader(samples=48))
        assert rates.rates == pytest.approx(equation_2(15, 3))
    resumed = make_trainer(folder, SnapshotEnsemble(3), strategy="ddp", devices=2)
    resumed.fit(model(), loader(samples=48), ckpt_path=folder / "second" / "epoch=2.ckpt")
    resumed.test(model(), loader(2, 48), verbose=False)
    mean = mean_probability(folder / "snapshots-v1", dataset(2, 48).tensors[0])
    mine: Any = resumed.predict(model(), loader(2, 48))
    # Lightning's sampler for predictions gives the processes halves in turns.
    expected = mean[resumed.global_rank :: 2]
    torch.testing.assert_close(torch.cat(mine).exp(), expected, rtol=0, atol=1e-12)


@pytest.mark.slow
def test_two_processes(rank_folder: Path) -> None:
    names = [f"cycle_{cycle}.ckpt" for cycle in (1, 2, 3)]
    assert sorted(path.name for path in rank_folder.iterdir()) == ["first", "second", "snapshots", "snapshots-v1"]
    for name in names:
        # The same training twice, and one of them resumed.
        first, second = (
            torch.load(rank_folder / folder / name, weights_only=True)["state_dict"] for folder in ("snapshots", "snapshots-v1")
        )
        for key, value in first.items():
            torch.testing.assert_close(second[key], value, rtol=1e-12, atol=1e-12)
