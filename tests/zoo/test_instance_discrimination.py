"""The model: its bank over steps, processes and resumes; against the same written by hand."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, Trainer, seed_everything
from torch import Tensor, nn

import litzoo
from litzoo.callbacks import SAM, StepSeed
from litzoo.datamodules import DigitsDataModule
from litzoo.zoo import Batch, InstanceDiscrimination
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
    from lightning.pytorch.callbacks import ModelCheckpoint

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
