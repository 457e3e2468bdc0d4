"""The model: its bank over steps, processes and resumes; against the same written by hand."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningDataModule, Trainer, seed_everything
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder, ModelCheckpoint
from torch import Tensor, nn

import litzoo
from litzoo.callbacks import SAM, StepSeed
from litzoo.datamodules import DigitsDataModule
from litzoo.datamodules.arrays import TRAIN, VAL, Arrays
from litzoo.zoo import Batch, InstanceDiscrimination
from litzoo.zoo.cli import main
from litzoo.zoo.pretrained import load_checkpoint

QUIET: dict[str, Any] = {
    **dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False),
    "accelerator": "cpu",
    "devices": 1,
}


def data_of(**settings: Any) -> DigitsDataModule:
    return DigitsDataModule(**{"augmentation": "none", "image_size": 8, "batch_size": 64, "train_fraction": 0.25, "seed": 0, **settings})


class Flat(nn.Module):
    """An encoder without BatchNorm, so that shards can be compared with the whole batch."""

    num_features = 16

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh())

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def model_of(data: Any, flat: bool = True, **settings: Any) -> InstanceDiscrimination:
    torch.manual_seed(0)
    settings = {"backbone": "conv4", "embedding_dim": 8, "bank_start": "random", "temperature": 0.2, "negatives": 50, "knn": 10, **settings}
    model = InstanceDiscrimination(data.num_train, in_channels=1, image_size=8, lr_scheduler=None, **settings)
    if flat:
        model.backbone = Flat()
        model.projection = nn.Linear(16, 8)
    return model


OBJECTIVES: dict[str, dict[str, Any]] = {
    "softmax": {},
    "nce": {"objective": "nce"},
    "nce, the paper": {"objective": "nce", "positives_in_noise": True, "proximal_weight": 30.0, "bank_momentum": 0.0},
    "nce, shared": {"objective": "nce", "noise": "shared", "partition_momentum": 0.9},
}


def test_steps_against_a_hand_written_loop(tmp_path: Path) -> None:
    """Softmax with the proximal term: gradient, SGD, then the rows; in float64."""
    data = data_of()
    model = model_of(data, proximal_weight=2.0, bank_momentum=0.25, optimizer=lambda params: torch.optim.SGD(params, lr=0.5))
    start = copy.deepcopy(model.state_dict())
    Trainer(max_epochs=2, precision="64-true", limit_val_batches=0, num_sanity_val_steps=0, **QUIET).fit(model, datamodule=data)

    twin = model_of(data)
    twin.load_state_dict(start)
    twin.double()
    twin.bank.start(data.train_index, data.fingerprint)
    rows, written = twin.bank.rows.clone(), torch.zeros(data.num_train, dtype=torch.bool)
    place = {int(sample): row for row, sample in enumerate(data.train_index)}
    weights = [*twin.backbone.parameters(), *twin.projection.parameters()]
    loader = data_of().train_dataloader()
    for epoch in range(2):
        loader._batches.set_epoch(epoch)
        for batch in loader:
            batch = data.transform(batch)
            features = F.normalize(twin.projection(twin.backbone(batch.input.double())))
            row = torch.tensor([place[int(sample)] for sample in batch.index])
            loss = F.cross_entropy(features @ rows.T / 0.2, row) + 2.0 * (features - rows[row]).pow(2).sum(1).mean()
            gradients = torch.autograd.grad(loss, weights)
            with torch.no_grad():
                for weight, gradient in zip(weights, gradients, strict=True):
                    weight -= 0.5 * gradient
                kept = 0.25 * written[row, None]  # the first feature replaces the random direction
                written[row] = True
                rows[row] = F.normalize(kept * rows[row] + (1 - kept) * features)
    torch.testing.assert_close(model.double().bank.rows, rows, rtol=1e-10, atol=1e-12)
    for mine, theirs in zip(model.projection.parameters(), twin.projection.parameters(), strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-10, atol=1e-12)


class Watch(Callback):
    """Sees the bank at the start and the end of each validation."""

    def __init__(self) -> None:
        self.before: list[Tensor] = []
        self.after: list[Tensor] = []

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.before.append(pl_module.bank.rows.clone())

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.after.append(pl_module.bank.rows.clone())


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_trains_and_validates_without_writing(objective: str) -> None:
    data = data_of(batch_size=32)
    model = model_of(data, flat=False, **{**OBJECTIVES[objective], "bank_momentum": 0.0})
    watch = Watch()
    trainer = Trainer(max_epochs=6, precision="bf16-mixed", callbacks=[watch], **QUIET)
    trainer.fit(model, datamodule=data)
    assert len(watch.before) == 7, "the sanity check is one"
    for before, after in zip(watch.before, watch.after, strict=True):
        assert torch.equal(before, after)
    assert not torch.equal(watch.before[0], watch.before[1])
    assert torch.isfinite(trainer.callback_metrics["train/loss"])
    assert float(trainer.callback_metrics["val/knn_bank"]) > 0.3, "ten classes"
    (scores,) = trainer.test(model, datamodule=data, verbose=False)
    assert scores["test/knn_bank"] > 0.3
    assert torch.allclose(model.bank.rows.norm(dim=1), torch.ones(len(model.bank)))


SCRIPT = """
import sys, torch
from lightning.pytorch import Trainer
from test_instance_discrimination import OBJECTIVES, QUIET, data_of, model_of

for number, settings in enumerate(OBJECTIVES.values()):
    data = data_of(batch_size=16)
    model = model_of(data, **settings)
    settings = {**QUIET, "devices": 2, "strategy": "ddp", "use_distributed_sampler": False}
    trainer = Trainer(max_epochs=2, precision="64-true", num_sanity_val_steps=0, limit_val_batches=0, **settings)
    trainer.fit(model, datamodule=data)
    torch.save(model.state_dict(), f"{sys.argv[1]}_{number}_{trainer.global_rank}.pt")
"""


def test_two_processes_equal_one_on_the_global_batch(tmp_path: Path, two_processes: Callable[..., None]) -> None:
    script = tmp_path / "train.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n{SCRIPT}")
    two_processes(script, tmp_path / "result")
    for number, settings in enumerate(OBJECTIVES.values()):
        data = data_of(batch_size=32)
        model = model_of(data, **settings)
        trainer = Trainer(max_epochs=2, precision="64-true", num_sanity_val_steps=0, limit_val_batches=0, **QUIET)
        trainer.fit(model, datamodule=data)
        first, second = (torch.load(tmp_path / f"result_{number}_{rank}.pt") for rank in range(2))
        for state in (first, second):
            for name, expected in model.state_dict().items():
                found, wanted = (value["rows"] if isinstance(value, dict) else value for value in (state[name], expected))
                torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11, equal_nan=True)  # softmax estimates no partition
        assert torch.equal(first["bank._extra_state"]["rows"], second["bank._extra_state"]["rows"])


@pytest.mark.parametrize("objective", ["softmax", "nce", "nce, shared"])
def test_resumed_in_the_middle_of_an_epoch_equals_uninterrupted(objective: str, tmp_path: Path) -> None:
    def run(folder: Path, ckpt_path: Path | None = None, **settings: Any) -> InstanceDiscrimination:
        seed_everything(3, verbose=False)
        data = data_of(batch_size=32, augmentation="instdisc", seed=None)
        model = model_of(data, flat=False, **OBJECTIVES[objective])
        saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=7, save_top_k=-1)
        trainer = Trainer(max_epochs=2, callbacks=[StepSeed(), saving], **{**QUIET, "enable_checkpointing": True}, **settings)
        trainer.fit(model, datamodule=data, ckpt_path=ckpt_path, weights_only=False)
        return model

    whole = run(tmp_path / "whole")
    path = tmp_path / "whole" / "step=7.ckpt"
    assert data_of(batch_size=32).num_train // 32 == 10, "step 7 lies in the first epoch"
    resumed = run(tmp_path / "resumed", path)
    assert torch.equal(resumed.bank.rows, whole.bank.rows)
    for mine, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert torch.equal(resumed.log_partition, whole.log_partition) or objective == "softmax"


def fitted(data: Any, **settings: Any) -> InstanceDiscrimination:
    model = model_of(data, flat=False, **settings)
    Trainer(max_epochs=1, limit_val_batches=0, **QUIET).fit(model, datamodule=data)
    return model


def test_other_data_are_refused_or_the_bank_is_rebuilt() -> None:
    model = fitted(data_of())
    other = data_of(train_fraction=0.25, split_seed=1)
    assert other.num_train == model.num_train
    again = Trainer(max_epochs=1, limit_val_batches=0, **QUIET)
    with pytest.raises(ValueError, match=r"belongs to other training images .* set rebuild_bank to true"):
        again.fit(model, datamodule=other)

    rebuilt = model_of(other, flat=False, rebuild_bank=True, optimizer=lambda params: torch.optim.SGD(params, lr=0.0))
    rebuilt.load_state_dict(model.state_dict())
    Trainer(max_epochs=1, limit_train_batches=0, limit_val_batches=0, **QUIET).fit(rebuilt, datamodule=other)
    expected = torch.cat([rebuilt.eval()(other.transform(batch).input) for batch in other.eval_train_dataloader()])
    torch.testing.assert_close(rebuilt.bank.rows, expected.detach())
    assert rebuilt.bank.fits(other.train_index, other.fingerprint)


def test_the_bank_starts_from_features_or_at_random() -> None:
    data = data_of()
    still: dict[str, Any] = {"flat": False, "optimizer": lambda params: torch.optim.SGD(params, lr=0.0)}
    features, drawn = (model_of(data, bank_start=how, **still) for how in ("features", "random"))
    for model in (features, drawn):
        Trainer(max_epochs=1, limit_train_batches=0, limit_val_batches=0, **QUIET).fit(model, datamodule=data)
    expected = torch.cat([features.eval()(data.transform(batch).input) for batch in data.eval_train_dataloader()])
    torch.testing.assert_close(features.bank.rows, expected.detach())
    assert float(drawn.bank.rows.mean(dim=0).norm()) < 0.2
    assert float(features.bank.rows.mean(dim=0).norm()) > 0.5, "untrained features have a common direction"


def test_another_number_of_images_is_told() -> None:
    data = data_of()
    with pytest.raises(ValueError, match=f"made for {data.num_train} training images, the data have"):
        Trainer(max_epochs=1, **QUIET).fit(model_of(data), datamodule=data_of(train_fraction=0.5))


def test_weights_are_saved_without_the_bank(tmp_path: Path) -> None:
    data = data_of()
    model = fitted(data)
    litzoo.save(model, tmp_path / "model.safetensors", {"summary": "digits"}, half=False)
    loaded = litzoo.load(tmp_path / "model.safetensors")
    assert isinstance(loaded, InstanceDiscrimination)
    assert len(loaded.bank) == 0
    images = torch.randint(256, (3, 1, 8, 8), dtype=torch.uint8)
    assert torch.equal(loaded.embed(images), model.embed(images))
    # The bank starts anew where there is none.
    Trainer(max_epochs=1, limit_val_batches=0, **QUIET).fit(loaded, datamodule=data)
    assert len(loaded.bank) == data.num_train


def test_checkpoints_load_with_their_bank(tmp_path: Path) -> None:
    data = data_of()
    model = model_of(data, flat=False)
    trainer = Trainer(max_epochs=1, limit_val_batches=0, **QUIET)
    trainer.fit(model, datamodule=data)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = load_checkpoint(tmp_path / "last.ckpt", model="InstanceDiscrimination")
    assert isinstance(loaded, InstanceDiscrimination)
    assert torch.equal(loaded.bank.rows, model.bank.rows)


def test_a_second_pass_over_a_batch_writes_nothing() -> None:
    """SAM calls the step twice: the row is that of the first pass, whose weights are those of the training."""
    data = data_of(batch_size=300)
    seen: list[Tensor] = []
    model = model_of(data, bank_momentum=0.0)
    step = model.forward
    model.forward = lambda images: seen.append(step(images)) or seen[-1]  # type: ignore[method-assign,func-returns-value]  # records what it gives
    Trainer(max_epochs=1, limit_train_batches=1, limit_val_batches=0, callbacks=[SAM(5.0)], **QUIET).fit(model, datamodule=data)
    assert len(seen) == 2
    written = model.bank.rows[model.bank.rows_of(next(iter(data.train_dataloader())).index)]
    torch.testing.assert_close(written, seen[0].detach())
    assert not torch.allclose(written, seen[1])


@pytest.mark.parametrize("objective", ["softmax", "nce"])
@pytest.mark.parametrize("tuner", [LearningRateFinder, BatchSizeFinder])
def test_tuners_find_a_bank_and_leave_none_behind(tuner: type[Callback], objective: str, tmp_path: Path) -> None:
    """They train before the fit, and put everything back by a checkpoint."""
    data = data_of()
    model = model_of(data, flat=False, bank_start="features", **OBJECTIVES[objective])
    model.lr = 1e-3
    rows: list[Tensor] = []

    class Start(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            rows.append(model.bank.rows.clone())

    settings: dict[str, Any] = {"num_training_steps": 5} if tuner is LearningRateFinder else {"max_trials": 1, "steps_per_trial": 2}
    trainer = Trainer(max_epochs=1, limit_val_batches=0, callbacks=[tuner(**settings), Start()], default_root_dir=tmp_path, **QUIET)
    trainer.fit(model, datamodule=data)
    torch.testing.assert_close(rows[0], rows[-trainer.num_training_batches], msg="the fit begins as the tuner did")
    assert torch.isfinite(trainer.callback_metrics["train/loss"])


def test_a_step_that_was_broken_off_writes_nothing_later() -> None:
    data = data_of()
    model = model_of(data)

    class Break(Callback):
        def on_after_backward(self, *_: Any) -> None:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Trainer(max_epochs=1, limit_val_batches=0, callbacks=[Break()], **QUIET).fit(model, datamodule=data)
    before, later = model.bank.rows.clone(), data_of(seed=1)
    Trainer(max_epochs=1, limit_train_batches=1, limit_val_batches=0, **QUIET).fit(model, datamodule=later)
    changed = (model.bank.rows != before).any(dim=1).nonzero().squeeze(1)
    assert torch.equal(changed, model.bank.rows_of(next(iter(later.train_dataloader())).index.sort().values))


def test_fast_dev_run_fills_the_bank_from_one_batch() -> None:
    data = data_of(eval_batch_size=50)
    model = model_of(data, bank_start="features", flat=False)
    Trainer(fast_dev_run=True, **QUIET).fit(model, datamodule=data)
    assert int(model.bank._written.sum()) <= 50 + 64


class Tuples(LightningDataModule):
    """Somebody's own data, with hooks of the module and plain batches."""

    def __init__(self) -> None:
        super().__init__()
        self.images = torch.rand(20, 1, 8, 8)

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(self.images, torch.zeros(20).long(), torch.arange(20)), 4)

    eval_train_dataloader = train_dataloader


@pytest.mark.parametrize("precision", ["32-true", "64-true"])
def test_the_bank_starts_from_features_of_plain_batches(precision: Any) -> None:
    data, model = Tuples(), InstanceDiscrimination(20, "conv4", embedding_dim=8, in_channels=1, image_size=8)
    Trainer(max_epochs=1, limit_train_batches=0, precision=precision, **QUIET).fit(model, datamodule=data)
    with torch.no_grad():
        torch.testing.assert_close(model.bank.rows, model.eval()(data.images.to(model.dtype)))


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_raw_images_and_partition_in_true_precisions(precision: Any) -> None:
    data = data_of()
    model = model_of(data, flat=False, objective="nce", partition_momentum=0.999)
    Trainer(max_epochs=1, limit_train_batches=2, limit_val_batches=0, precision=precision, **QUIET).fit(model, datamodule=data)
    assert model.log_partition.dtype == (torch.float64 if precision == "64-true" else torch.float32), "bfloat16 would not follow"
    assert model.embed(torch.zeros(2, 1, 8, 8, dtype=torch.uint8)).dtype == torch.float32


def test_a_new_bank_has_a_partition_of_its_own() -> None:
    data = data_of()
    model = model_of(data, objective="nce", optimizer=lambda params: torch.optim.SGD(params, lr=0.0))
    fresh = copy.deepcopy(model)
    model.log_partition.fill_(7.0)  # as it comes with trained weights, whose bank is not there
    for one in (model, fresh):
        Trainer(max_epochs=1, limit_train_batches=1, limit_val_batches=0, **QUIET).fit(one, datamodule=data)
    assert float(model.log_partition) == float(fresh.log_partition)


@pytest.mark.parametrize("positives", [False, True])
def test_noise_is_uniform_and_avoids_the_own_row(positives: bool) -> None:
    data = data_of()
    model = model_of(data, objective="nce", negatives=2000, positives_in_noise=positives)
    model.bank.start(torch.arange(20))
    row = torch.arange(20)
    for key in (torch.arange(20), None):
        drawn = model._draw(row, key, 0)
        assert drawn.shape == (20, 2000)
        counts = torch.stack([torch.bincount(line, minlength=20) for line in drawn])
        own = counts.diagonal()
        assert bool((own > 50).all()) if positives else bool((own == 0).all())
        others = counts[~torch.eye(20, dtype=torch.bool)].double()
        expected = 2000 / (20 if positives else 19)
        assert float(((others - expected) ** 2 / expected).sum()) == pytest.approx(380, rel=0.35), "chi-square"
    assert torch.equal(model._draw(row, torch.arange(20), 0), model._draw(row, torch.arange(20), 5)), "of the key alone"


def test_noise_is_left_out_of_compiled_graphs() -> None:
    """Inductor folds the constants of the hash in Python's integers, and then refuses them as int64."""
    model, graphs = model_of(data_of(), objective="nce", noise="shared"), []
    model._trainer = Trainer(max_epochs=1, **QUIET)
    model.bank.start(torch.arange(20))
    compiled = torch.compile(lambda row: model._draw(row, None, 0), backend=lambda graph, _: graphs.append(graph) or graph)
    assert torch.equal(compiled(torch.arange(4)), model._draw(torch.arange(4), None, 0))
    assert not graphs


def test_partition_is_estimated_once_or_followed() -> None:
    data = data_of()
    constant, followed = (model_of(data, objective="nce", partition_momentum=momentum) for momentum in (1.0, 0.9))
    for model in (constant, followed):
        trainer = Trainer(max_epochs=1, **QUIET)
        model._trainer = trainer
        model._update_partition(torch.full((4, 10), 0.2))
        assert float(model.log_partition) == pytest.approx(1.0)  # 0.2 / temperature
        model._update_partition(torch.full((4, 10), 0.6))
    assert float(constant.log_partition) == pytest.approx(1.0)
    expected = torch.tensor([0.9, 0.1]).log() + torch.tensor([1.0, 3.0])
    assert float(followed.log_partition) == pytest.approx(float(expected.logsumexp(0)))


@pytest.mark.parametrize("momentum", [1.0, 0.9])
def test_a_batch_that_overflowed_leaves_the_partition(momentum: float) -> None:
    model = model_of(data_of(), objective="nce", partition_momentum=momentum)
    model._trainer = Trainer(max_epochs=1, **QUIET)
    for similarity in (float("nan"), 0.2, float("nan"), 0.2):
        model._update_partition(torch.full((4, 10), similarity))
    assert float(model.log_partition) == pytest.approx(1.0)


def test_a_training_that_diverged_is_validated() -> None:
    data = data_of()
    model = model_of(data, flat=False, optimizer=lambda params: torch.optim.SGD(params, lr=1e30))
    trainer = Trainer(max_epochs=2, **QUIET)
    trainer.fit(model, datamodule=data)
    assert float(trainer.callback_metrics["val/knn_bank"]) == 0


def test_views_share_a_row_and_plain_tuples_work() -> None:
    data = data_of(views=2, augmentation="instdisc", batch_size=40)
    model = model_of(data, flat=False, objective="nce")
    Trainer(max_epochs=1, limit_val_batches=0, **QUIET).fit(model, datamodule=data)

    images, label = torch.randn(24, 1, 8, 8), torch.zeros(24, dtype=torch.int64)
    plain = InstanceDiscrimination(24, "conv4", in_channels=1, image_size=8, knn=3)
    triples = torch.utils.data.TensorDataset(images, label, torch.arange(24))
    Trainer(max_epochs=1, **QUIET).fit(plain, torch.utils.data.DataLoader(triples, 8), torch.utils.data.DataLoader(triples, 8))
    with pytest.raises(TypeError, match="must know which image is which"):
        plain.training_step((images, label), 0)
    with pytest.raises(IndexError, match="sample 99 has no row"):
        plain.training_step(Batch(images[:2], label[:2], torch.tensor([0, 99])), 0)


def test_unlabelled_data_need_no_labels() -> None:
    data = data_of()
    data.arrays.label.fill_(-1)
    model = model_of(data, flat=False)
    trainer = Trainer(max_epochs=1, **QUIET)
    trainer.fit(model, datamodule=data)
    assert "val/knn_bank" not in trainer.callback_metrics


def test_validation_images_without_a_label_do_not_count() -> None:
    data = data_of(eval_batch_size=20)
    val = data.indices(VAL)
    data.arrays.label[val[: len(val) // 2]] = -1  # also whole batches
    model = model_of(data, flat=False, knn=1)
    trainer = Trainer(max_epochs=1, num_sanity_val_steps=0, **QUIET)
    trainer.fit(model, datamodule=data)
    model.eval()
    with torch.no_grad():
        found = torch.cat([model(data.transform(batch).input) for batch in data.val_dataloader()]) @ model.bank.rows.T
    right = data.train_label[found.argmax(dim=1)] == data.arrays.label[val]
    assert float(trainer.callback_metrics["val/knn_bank"]) == pytest.approx(float(right[len(val) // 2 :].float().mean()))


def test_a_bank_of_other_images_scores_nothing_and_says_so() -> None:
    data = data_of()
    model = fitted(data)
    alone = Trainer(**QUIET)
    for other, bank, message in ((data_of(split_seed=1), model.bank, "other training images"), (data, model_of(data).bank, "is empty")):
        model.bank = bank
        with pytest.warns(UserWarning, match=message):
            assert alone.validate(model, datamodule=other, verbose=False) == [{}]
    assert model._labelled is None


class UnlabelledDigits(DigitsDataModule):
    def read(self) -> Arrays:
        arrays = super().read()
        return replace(arrays, label=arrays.label.masked_fill(arrays.split == TRAIN, -1))


class Outer:
    class Inner(InstanceDiscrimination):
        """A class that is no attribute of its module."""


@pytest.mark.parametrize(("labelled", "said"), [(True, "best checkpoint by val/knn_bank"), (False, "newest checkpoint: ")])
def test_the_best_checkpoint_without_a_validation_loss(
    labelled: bool, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    data = "DigitsDataModule" if labelled else f"{__name__}.UnlabelledDigits"
    arguments = ["--config", "instdisc_digits", "--data", data, "--data.image_size", "8", "--data.train_fraction", "0.1"]
    model = ["--model", f"{__name__}.Outer.Inner"] if labelled else []
    quick = ["--trainer.callbacks", "[]", "--trainer.max_epochs", "2", "--trainer.accelerator", "cpu"]
    assert main(["fit", *arguments, *model, *quick]) == 0
    out = capsys.readouterr().out
    assert said in out
    assert ("have no labels for val/knn_bank" in out) is not labelled
    assert len(list((tmp_path / "runs").rglob("epoch_*.ckpt"))) == 1


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"num_train": 1}, "num_train must be at least 2"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"objective": "infonce"}, "objective must be softmax or nce"),
        ({"noise": "none"}, "noise must be per_sample or shared"),
        ({"negatives": 0}, "negatives and knn must be at least 1"),
        ({"bank_start": "zeros"}, "bank_start must be features or random"),
        ({"partition_momentum": 1.5}, "partition_momentum must lie in"),
        ({"proximal_weight": -1.0}, "proximal_weight must not be negative"),
        ({"bank_momentum": 1.0}, "the bank's momentum must lie in"),
        ({"image_mean": [0.5]}, "image_mean and image_std go together"),
    ],
)
def test_impossible_settings_are_refused(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InstanceDiscrimination(**{"num_train": 10, "backbone": "conv4", **setting})
