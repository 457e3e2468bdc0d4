"""Logistic regression: the log of the CNTK-101 tutorial, a gradient by hand, scikit-learn's fit, weights and mistakes."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from sklearn.linear_model import LogisticRegression as SklearnLogisticRegression
from torch import Tensor

import litzoo
from litzoo.datamodules import PatientsDataModule
from litzoo.zoo import LogisticRegression

# Minibatch -> loss and error, as the tutorial prints them. 50 to 150 are chaotic: a change of 1e-6 in the start changes them.
TUTORIAL = {
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


class Log(Callback):
    """Keeps loss and error of every minibatch."""

    def __init__(self) -> None:
        self.loss: list[float] = []
        self.error: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        self.loss.append(float(trainer.callback_metrics["train/loss"]))
        self.error.append(float(trainer.callback_metrics["train/error"]))


def trainer(folder: Path, **settings: object) -> Trainer:
    return Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,  # type: ignore[arg-type]
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[LogisticRegression, Log, dict[str, float]]:
    model, log = LogisticRegression(), Log()
    fit = trainer(tmp_path_factory.mktemp("patients"), callbacks=[log])
    fit.fit(model, datamodule=PatientsDataModule())
    (scores,) = fit.test(model, datamodule=PatientsDataModule(), verbose=False)
    return model, log, dict(scores)


def test_training_log_of_the_tutorial(trained: tuple[LogisticRegression, Log, dict[str, float]]) -> None:
    _, log, _ = trained
    assert len(log.loss) == 800
    assert log.loss[0] == pytest.approx(math.log(2), abs=1e-6)
    assert log.error[0] == pytest.approx(0.32)
    for minibatch, (loss, error) in TUTORIAL.items():
        assert log.loss[minibatch] == pytest.approx(loss, abs=0.01), minibatch
        assert log.error[minibatch] == pytest.approx(error), minibatch


def test_result_of_the_tutorial(trained: tuple[LogisticRegression, Log, dict[str, float]]) -> None:
    model, _, scores = trained
    assert scores["test/accuracy"] == pytest.approx(1 - 0.12)
    assert model.linear.bias.tolist() == pytest.approx([7.991, -7.991], abs=0.01)
    data = PatientsDataModule()
    test = data.indices(2)
    assert "".join(map(str, data.arrays.label[test].tolist())) == "1001110110111010110010001"
    predicted = model(data.arrays.input[test]).argmax(dim=1)
    assert "".join(map(str, predicted.tolist())) == "1000000110111010110010001"


def test_patients_are_the_stream_of_the_tutorial() -> None:
    """Drawn as the notebook draws them, from numpy's global generator."""
    data = PatientsDataModule()
    state = np.random.get_state()
    try:
        np.random.seed(0)
        drawn = []
        for size in (32, *[25] * 800, 25):
            label = np.random.randint(size=(size, 1), low=0, high=2)
            drawn.append(((np.random.randn(size, 2) + 3) * (label + 1)).astype(np.float32))
    finally:
        np.random.set_state(state)
    assert torch.equal(data.arrays.input[data.indices(1)], torch.from_numpy(drawn[0]))
    assert torch.equal(data.arrays.input[data.indices(2)], torch.from_numpy(drawn[-1]))
    batches = list(data.train_dataloader())
    assert len(batches) == 800
    for batch, expected in zip(batches, drawn[1:-1], strict=True):
        assert torch.equal(batch.input, torch.from_numpy(expected))
    assert (data.num_train, data.num_classes, data.class_names) == (20_000, 2, ["benign", "malignant"])
    assert not torch.equal(PatientsDataModule(data_seed=1).arrays.input, data.arrays.input)


def test_gradient_against_the_formula() -> None:
    """dL/dW = (softmax(W x + b) - onehot)^T x / B."""
    model = LogisticRegression(num_features=3, num_classes=4).double()
    torch.nn.init.normal_(model.linear.weight)
    x, label = torch.randn(7, 3, dtype=torch.float64), torch.arange(7) % 4
    model.log_dict = lambda *_, **__: None  # type: ignore[method-assign,assignment]
    model.training_step((x, label), 0).backward()
    rows = []
    for row in (x @ model.linear.weight.T + model.linear.bias).tolist():
        total = sum(math.exp(value) for value in row)
        rows.append([math.exp(value) / total for value in row])
    error = (torch.tensor(rows, dtype=torch.float64) - torch.eye(4, dtype=torch.float64)[label]).detach()
    torch.testing.assert_close(model.linear.weight.grad, error.T @ x / 7)
    torch.testing.assert_close(model.linear.bias.grad, error.mean(dim=0))


def test_against_scikit_learn() -> None:
    """Trained to the end on the whole batch, it is scikit-learn's unregularised fit."""
    data = PatientsDataModule()
    chosen = data.indices(0)[:2000]
    x, label = data.arrays.input[chosen].double(), data.arrays.label[chosen]
    model = LogisticRegression().double()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=200, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = torch.nn.functional.cross_entropy(model(x), label)
        value.backward()
        return value

    optimizer.step(loss)  # type: ignore[arg-type]
    expected = SklearnLogisticRegression(C=np.inf, tol=1e-10, max_iter=1000).fit(x.numpy(), label.numpy())
    weight, bias = model.linear.weight.detach(), model.linear.bias.detach()
    np.testing.assert_allclose((weight[1] - weight[0]).numpy(), expected.coef_[0], rtol=1e-3)
    assert float(bias[1] - bias[0]) == pytest.approx(float(expected.intercept_[0]), rel=1e-3)


def test_encode_is_the_input() -> None:
    x = torch.randn(5, 2)
    assert torch.equal(LogisticRegression().encode(x), x)


def test_weights_round_trip(tmp_path: Path) -> None:
    model = LogisticRegression(num_features=3, num_classes=4, class_names=list("abcd"))
    torch.nn.init.normal_(model.linear.weight)
    litzoo.save(model, tmp_path / "weights.safetensors", card={"description": "patients"}, half=False)
    loaded = litzoo.load(str(tmp_path / "weights.safetensors"))
    x = torch.randn(5, 3)
    assert torch.equal(loaded(x), model.eval()(x))
    assert list(loaded.hparams["class_names"]) == list("abcd")


def test_checkpoint_round_trip(tmp_path: Path) -> None:
    fit = Trainer(
        accelerator="cpu", default_root_dir=tmp_path, max_steps=3, logger=False, enable_progress_bar=False, enable_model_summary=False
    )
    model = LogisticRegression()
    fit.fit(model, datamodule=PatientsDataModule())
    loaded = LogisticRegression.load_from_checkpoint(fit.checkpoint_callback.best_model_path)  # type: ignore[union-attr]
    assert torch.equal(loaded.linear.weight, model.linear.weight)


def test_scheduler_is_used(tmp_path: Path) -> None:
    model = LogisticRegression(lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1))
    fit = trainer(tmp_path, limit_train_batches=3)
    fit.fit(model, datamodule=PatientsDataModule())
    assert fit.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.05)


def test_a_plain_pair_is_a_batch(tmp_path: Path) -> None:
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(8, 2), torch.arange(8) % 2), batch_size=4)
    fit = trainer(tmp_path)
    fit.fit(LogisticRegression(), loader, loader)
    assert {"train/loss", "train/error", "val/loss", "val/accuracy"} <= set(fit.callback_metrics)


def test_wrong_number_of_names() -> None:
    with pytest.raises(ValueError, match="class_names has 3 entries, but num_classes is 2"):
        LogisticRegression(num_classes=2, class_names=["a", "b", "c"])
