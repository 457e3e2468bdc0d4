"""The worked example reproduces the log of the CNTK-101 tutorial."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from litzoo.datamodules import PatientsDataModule
from litzoo.zoo import LogisticRegression

# The tutorial's log from where it no longer depends on rounding: minibatch -> (loss, error).
LOG = {
    200: (0.1290, 0.08),
    250: (0.1321, 0.08),
    300: (0.1012, 0.04),
    350: (0.1076, 0.04),
    400: (0.3087, 0.08),
    450: (0.3219, 0.12),
    500: (0.4076, 0.20),
    550: (0.6784, 0.24),
    600: (0.2988, 0.12),
    650: (0.1676, 0.12),
    700: (0.2772, 0.12),
    750: (0.2309, 0.04),
}
TEST_LABELS = "1001110110111010110010001"


class Log(Callback):
    """Keeps loss and error of each minibatch."""

    def __init__(self) -> None:
        self.loss: list[float] = []
        self.error: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: object) -> None:
        self.loss.append(trainer.callback_metrics["train/loss"].item())
        self.error.append(trainer.callback_metrics["train/error"].item())


def make_trainer(folder: Path, *callbacks: Callback, **settings: object) -> Trainer:
    return Trainer(
        accelerator="cpu",
        max_epochs=1,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **settings,  # type: ignore[arg-type]
    )


def test_reproduces_the_tutorial(tmp_path: Path) -> None:
    log, model, data = Log(), LogisticRegression(), PatientsDataModule()
    trainer = make_trainer(tmp_path, log)
    trainer.fit(model, datamodule=data)

    assert len(log.loss) == 800
    assert log.loss[0] == pytest.approx(math.log(2), abs=1e-6)
    assert log.error[0] == pytest.approx(0.32, abs=1e-6)
    assert {step: log.loss[step] for step in LOG} == pytest.approx({step: loss for step, (loss, _) in LOG.items()}, abs=0.01)
    assert {step: log.error[step] for step in LOG} == pytest.approx({step: error for step, (_, error) in LOG.items()}, abs=1e-6)
    assert model.linear.bias.tolist() == pytest.approx([7.991, -7.991], abs=0.01)

    (metrics,) = trainer.test(model, datamodule=data, verbose=False)
    assert 1 - metrics["test/accuracy"] == pytest.approx(0.12, abs=1e-6)
    assert {"test/loss", "test/mean_class_accuracy", "test/mcc", "test/calibration_error"} <= set(metrics)


def test_the_data_is_the_tutorials_stream() -> None:
    data = PatientsDataModule()
    train, val, test = (data.indices(split) for split in range(3))
    assert (len(train), len(val), len(test)) == (20_000, 32, 25)
    assert "".join(map(str, data.arrays.label[test].tolist())) == TEST_LABELS
    assert data.arrays.input.dtype == torch.float32
    # As the tutorial draws: the labels of a minibatch, then its points.
    stream = np.random.RandomState(0)
    label = stream.randint(size=(32, 1), low=0, high=2)
    points = ((stream.randn(32, 2) + 3) * (label + 1)).astype(np.float32)
    assert (data.arrays.input[val].numpy() == points).all()
    first = next(iter(data.train_dataloader()))
    assert first.index.tolist() == train[:25].tolist()


def test_another_data_seed_gives_other_patients() -> None:
    data, other = PatientsDataModule(), PatientsDataModule(data_seed=1)
    assert not torch.equal(data.arrays.input, other.arrays.input)
    assert sum(data.class_counts) == data.num_train == 20_000
    assert data.class_names == ["benign", "malignant"]


def test_shapes_features_and_hyper_parameters() -> None:
    model = LogisticRegression(num_features=4, num_classes=3, class_names=["a", "b", "c"])
    x = torch.randn(5, 4)
    assert model(x).shape == (5, 3)
    assert model.encode(x) is x
    assert dict(model.hparams) == {"num_features": 4, "num_classes": 3, "class_names": ["a", "b", "c"]}
    assert LogisticRegression().class_names == ["0", "1"]


def test_wrong_number_of_class_names() -> None:
    with pytest.raises(ValueError, match="class_names has 3 entries, but num_classes is 2"):
        LogisticRegression(class_names=["a", "b", "c"])


def test_a_checkpoint_loads_without_arguments(tmp_path: Path) -> None:
    model = LogisticRegression(class_names=["benign", "malignant"])
    trainer = make_trainer(tmp_path, limit_train_batches=3, limit_val_batches=0)
    trainer.fit(model, datamodule=PatientsDataModule())
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    loaded = LogisticRegression.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True)
    assert torch.equal(loaded.linear.weight, model.linear.weight)
    assert loaded.class_names == ["benign", "malignant"]


def test_plain_pairs(tmp_path: Path) -> None:
    """Somebody else's loader of (x, y), and an optimizer and scheduler of their own."""
    x = torch.randn(64, 3)
    pairs = torch.utils.data.TensorDataset(x, (x.sum(dim=1) > 0).long())
    loader = torch.utils.data.DataLoader(pairs, batch_size=16)
    model = LogisticRegression(
        num_features=3,
        optimizer=lambda params: torch.optim.Adam(params, lr=0.3),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5),
    )
    trainer = make_trainer(tmp_path)
    trainer.fit(model, loader, loader)
    assert trainer.callback_metrics["val/accuracy"] > 0.8
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.15)
