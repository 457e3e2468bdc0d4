"""`PseudoLabels`: what it chooses, by whom it is seen, and that a resumed run equals the uninterrupted one."""

import contextlib
import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from matrix import CLASSES, FEATURES, Loader, Net, batches, make_trainer
from test_matrix import differences, state
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Subset, TensorDataset

from litzoo.callbacks import EMA, PseudoLabelDataset, PseudoLabels, StepSeed, pseudo_labels
from litzoo.datamodules import DigitsDataModule
from litzoo.zoo import EncoderClassifier, ImageClassifier
from litzoo.zoo.logistic_regression import LogisticRegression

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
ORIGIN = torch.randn(FEATURES, CLASSES, generator=torch.Generator().manual_seed(0))


def samples(number: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Points of which a linear classifier can be sure."""
    x = 3 * torch.randn(number, FEATURES, generator=torch.Generator().manual_seed(seed))
    return x, (x @ ORIGIN).argmax(1)


def partly_labelled(number: int = 40, known: int = 12, seed: int = 0, **settings: Any) -> PseudoLabelDataset:
    """The label that the data set itself gives is one that nobody may read."""
    x, label = samples(number, seed)
    label[known:] = -1
    return PseudoLabelDataset(TensorDataset(x, torch.full((number,), 99)), label, **settings)


# The data set


def test_places_of_samples_without_a_label_are_lent() -> None:
    data = partly_labelled(20, 3)
    x, label = samples(20)
    assert len(data) == 20
    assert data.index.tolist() == list(range(3, 20))
    found = [data[place] for place in range(20)]
    assert [y for _, y in found] == [int(label[sample]) for sample in (0, 1, 2, *[0, 1, 2] * 6)][:20]
    data.assign(torch.tensor([-1, 2, *[-1] * 15]))
    found = [data[place] for place in range(20)]
    assert torch.equal(found[4][0], x[4])
    assert found[4][1] == 2
    times = torch.bincount(data.source, minlength=20)
    assert times[[0, 1, 2, 4]].tolist() == [5, 5, 5, 5]
    data.assign(torch.full((17,), -1))
    assert torch.equal(data.label < 0, torch.arange(20) >= 3)


def test_items_of_several_kinds() -> None:
    label = torch.tensor([1, -1])
    assert PseudoLabelDataset([("a", None), ("b", None)], label)[1] == ("a", 1)
    assert PseudoLabelDataset(["a", "b"], label)[0] == ("a", 1)
    assert PseudoLabelDataset([("a", 7, "more"), ("b", 7, "more")], label)[0] == ("a", 1, "more")


@pytest.mark.parametrize(
    ("label", "reason"),
    [([0, 1], "one number for each of 3 samples"), ([0, 1, 2], "-1 for some"), ([-1, -1, -1], "-1 for some"), ([-2, -1, 0], "-1 for some")],
)
def test_labels_that_do_not_do(label: list[int], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        PseudoLabelDataset(["a", "b", "c"], torch.tensor(label))
    with pytest.raises(ValueError, match="2 samples of predict_on"):
        PseudoLabelDataset(["a", "b", "c"], torch.tensor([0, -1, 1]), predict_on=["a", "b"])


# What is chosen


class Seen(Callback):
    """Notes what each epoch trained on, and what the callback had chosen for it."""

    def __init__(self) -> None:
        self.epochs: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self.chosen: dict[int, tuple[Tensor, Tensor]] = {}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        index = batch.index if hasattr(batch, "key") else batch[0]
        self.epochs.setdefault(trainer.current_epoch, []).append((index.clone(), batch[1].clone()))
        if batch_idx == 0:
            callback = next(found for found in trainer.callbacks if isinstance(found, PseudoLabels))
            self.chosen[trainer.current_epoch] = (callback.index, callback.label)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_plain_loader_trains_on_what_the_model_is_sure_of(workers: int, tmp_path: Path) -> None:
    """Also persistent workers see the choice, the number of batches stays, and predictions are those of evaluation mode."""
    data, seen, model = partly_labelled(), Seen(), Net(norm=True)
    x, _ = samples(40)
    labels, weights = [], []

    class Judge(Callback):
        """What the choice must be, worked out before it is made."""

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if trainer.is_last_batch:
                judge = copy.deepcopy(pl_module).eval().double()
                with torch.no_grad():
                    confidence, guess = judge(x[12:].double()).softmax(1).max(1)
                labels.append(torch.where(confidence >= 0.6, guess, -1))
                weights.append(state(pl_module))

    class After(Callback):
        """That it leaves nothing behind."""

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if trainer.is_last_batch:
                assert differences(weights[-1], state(pl_module)) == []
                assert all(layer.training for layer in pl_module.modules())
                assert trainer.training

    callback = PseudoLabels(0.6, start_epoch=2, dataset=data)
    trainer = make_trainer(tmp_path, Judge(), callback, After(), seen, max_epochs=5)
    loader = DataLoader(data, batch_size=8, shuffle=True, num_workers=workers, persistent_workers=workers > 0)
    trainer.fit(model, loader, Loader(batches(9, 2)))
    assert trainer.global_step == 25
    for epoch in range(5):
        inputs, label = (torch.cat(parts) for parts in zip(*seen.epochs[epoch], strict=True))
        sample = torch.cdist(inputs, x).argmin(1)
        wanted = torch.full((28,), -1) if epoch < 2 else labels[epoch - 1]
        every = torch.cat([samples(40)[1][:12], wanted])
        assert torch.equal(label, every[sample])
        assert set(sample.tolist()) == set((every >= 0).nonzero().squeeze(1).tolist())
        assert torch.equal(seen.chosen[epoch][0], 12 + (wanted >= 0).nonzero().squeeze(1))
    assert len({len(chosen) for chosen, _ in seen.chosen.values()}) > 1
    assert trainer.logged_metrics["train/pseudo_labels"] == len(seen.chosen[4][0])
    assert (data.label[12:] == -1).all(), "after the training the data set is what it was"


def test_when_and_how_much_is_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[float, int | None]] = []

    def choose(confidence: Tensor, label: Tensor, threshold: float, most: int | None) -> Tensor:
        asked.append((threshold, most))
        return torch.full_like(label, -1)

    monkeypatch.setattr(pseudo_labels, "choose_pseudo_labels", choose)
    data = partly_labelled()
    callback = PseudoLabels(0.9, 0.5, start_epoch=2, every_n_epochs=2, max_per_class=3, dataset=data)
    make_trainer(tmp_path, callback, max_epochs=7).fit(Net(), DataLoader(data, batch_size=8))
    assert asked == [(pytest.approx(0.9), 3), (pytest.approx(0.7), 3), (pytest.approx(0.5), 3)]  # for epochs 2, 4 and 6
    asked.clear()
    make_trainer(tmp_path, PseudoLabels(0.9, dataset=data), max_epochs=3).fit(Net(), DataLoader(data, batch_size=8))
    assert asked == [(0.9, None)] * 3  # the last one is for a training that goes on


class Noisy(Net):
    """Augments on the device while it trains."""

    seen: list[tuple[bool, Tensor]]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return (batch[0] + 100, *batch[1:]) if self.trainer.training else batch

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append((self.training, x))
        return super().forward(x)


def test_predictions_are_not_augmented(tmp_path: Path) -> None:
    x, _ = samples(40)
    data, model = partly_labelled(predict_on=list(x)), Noisy()
    model.seen = []
    make_trainer(tmp_path, PseudoLabels(dataset=data, every_n_epochs=9), max_epochs=2).fit(model, DataLoader(data, batch_size=8))
    predicted = torch.cat([inputs for training, inputs in model.seen if not training])
    assert torch.equal(predicted, x[12:])
    assert all((inputs > 50).all() for training, inputs in model.seen if training)


# A DataModule of litzoo


class Digits(DigitsDataModule):
    """Of 1 in 20 training digits the label is known; which they are is kept apart."""

    def __init__(self, every: int = 20, **settings: Any) -> None:
        super().__init__(image_size=8, augmentation="none", **settings)
        self.truth = self.arrays.label.clone()
        label = self.truth.clone()
        hidden = torch.arange(self.num_train) % every > 0
        label[self.train_index[hidden]] = -1
        self.reassign(label=label)
        self.hidden = self.train_index[hidden]


class Classifier(LogisticRegression):
    """A linear classifier of 8 x 8 pixels."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images.flatten(1))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def test_digits_with_few_labels(tmp_path: Path) -> None:
    """Labels that the model is sure of are right more often than its predictions are, and to train on them does no harm."""
    scores, data = {}, Digits(batch_size=64)
    counts = (data.num_train, sum(data.class_counts))
    for name, made in (("without", PseudoLabels(1.0)), ("with", PseudoLabels(0.95))):
        callback, model = made, Classifier()
        trainer = make_trainer(tmp_path, callback, max_epochs=10)
        trainer.fit(model, datamodule=data)
        scores[name] = trainer.validate(model, datamodule=data, verbose=False)[0]["val/accuracy"]
    assert len(callback.index) > 0.3 * len(data.hidden)
    assert set(callback.index.tolist()) <= set(data.hidden.tolist())
    right = (callback.label == data.truth[callback.index]).float().mean()
    inputs = torch.cat([data.transform(batch).input for batch in data.eval_train_dataloader()])
    with torch.no_grad():
        guess = model(inputs).argmax(1)
    unsure = torch.isin(data.train_index, data.hidden) & ~torch.isin(data.train_index, callback.index)
    assert right > (guess == data.truth[data.train_index])[unsure].float().mean() + 0.1
    assert right > 0.9
    assert scores["with"] >= scores["without"]
    assert (data.num_train, sum(data.class_counts)) == counts, "after the training the data are what they were"
    assert data.samples_per_epoch is None
    assert trainer.reload_dataloaders_every_n_epochs == 0


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_of_a_data_module(workers: int, tmp_path: Path) -> None:
    """Every labelled and every chosen sample trains, equally often, with its label; validation is what it was."""
    data, seen = Digits(num_workers=workers), Seen()
    steps = len(data.train_dataloader())
    before = data.arrays

    class Look(Callback):
        def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
            for split in (1, 2):
                members = before.split == split
                assert torch.equal(data.arrays.split == split, members)
                assert torch.equal(data.arrays.label[members], before.label[members])
            assert trainer.reload_dataloaders_every_n_epochs == 5

    trainer = make_trainer(tmp_path, PseudoLabels(0.5), seen, Look(), max_epochs=3, reload_dataloaders_every_n_epochs=5)
    trainer.fit(Classifier(), datamodule=data)
    assert trainer.global_step == 3 * steps
    for epoch, (index, label) in seen.chosen.items():
        every = torch.where(before.split == 0, before.label, -1)
        every[index] = label
        trained, given = (torch.cat(parts) for parts in zip(*seen.epochs[epoch], strict=True))
        assert torch.equal(every[trained], given)
        times = torch.bincount(trained, minlength=len(every))[every >= 0]
        assert len(times) == 65 + len(index)
        assert int(times.max() - times.min()) <= 2
    assert len(seen.chosen[0][0]) == 0 < len(seen.chosen[2][0])
    assert data.arrays.label.data_ptr() != data.truth.data_ptr()


def fit_with_checkpoints(folder: Path, resume: Path | None, workers: int = 0, seed: int = 1) -> dict[str, Any]:
    callback, data, seen = PseudoLabels(0.5), Digits(num_workers=workers, batch_size=128), Seen()
    step = ModelCheckpoint(folder / "steps", "{step}", save_top_k=-1, every_n_train_steps=4, save_on_train_epoch_end=False)
    epoch = ModelCheckpoint(folder / "epochs", "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    validation = ModelCheckpoint(folder / "validations", "{epoch}", monitor="val/loss", save_top_k=-1, save_on_train_epoch_end=False)
    model = Classifier()
    trainer = make_trainer(folder, StepSeed(seed), callback, seen, step, epoch, validation, enable_checkpointing=True, max_epochs=3)
    trainer.fit(model, datamodule=data, ckpt_path=resume, weights_only=None if resume is None else True)
    assert trainer.global_step == 3 * 10
    return {"end": state(model), "chosen": [callback.index, callback.label], "last epoch": seen.epochs[2][-2:]}


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_resumed_run_equals_the_uninterrupted_one(workers: int, tmp_path: Path) -> None:
    """From an epoch's end, its validation, its last batch and its middle, before and after there are labels."""
    whole = fit_with_checkpoints(tmp_path / "whole", None, workers)
    files = ["epochs/epoch=0.ckpt", "epochs/epoch=1.ckpt", "validations/epoch=1.ckpt", "steps/step=16.ckpt", "steps/step=20.ckpt"]
    for name in files if workers == 0 else files[-2:]:
        resumed = fit_with_checkpoints(tmp_path / name.replace("/", "_"), tmp_path / "whole" / name, workers)
        assert differences(whole, resumed) == [], name
    checkpoint = torch.load(tmp_path / "whole" / "steps/step=16.ckpt", weights_only=True)
    assert len(checkpoint["callbacks"]["PseudoLabels"]["index"]) > 0


def test_one_object_serves_several_fits(tmp_path: Path) -> None:
    callback, data = pickle.loads(pickle.dumps(PseudoLabels(0.5))), Digits()
    ends = []
    for _ in range(2):
        model = Classifier()
        make_trainer(tmp_path, callback, max_epochs=2).fit(model, datamodule=data)
        ends.append(state(model))
    assert differences(*ends) == []
    assert len(callback.index)
    assert callback._samples is None
    test = make_trainer(tmp_path, callback)
    test.test(model, datamodule=data, verbose=False)


def test_an_exception_leaves_the_data_as_they_were(tmp_path: Path) -> None:
    data = Digits()
    before = data.arrays

    class Fail(Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                raise RuntimeError("on purpose")

    trainer = make_trainer(tmp_path, Fail(), PseudoLabels(0.5))
    with pytest.raises(RuntimeError, match="on purpose"):
        trainer.fit(Classifier(), datamodule=data)
    assert torch.equal(data.arrays.split, before.split)
    assert torch.equal(data.arrays.label, before.label)
    assert (data.samples_per_epoch, trainer.reload_dataloaders_every_n_epochs) == (None, 0)


def test_classifiers_of_images(tmp_path: Path) -> None:
    """They refuse images without a label, but for this callback; and features are not cached under it."""
    images = ImageClassifier(num_classes=10, image_size=8, in_channels=1, backbone="conv4")
    linear = EncoderClassifier({"model": "ImageClassifier", "hparams": dict(images.hparams)}, num_classes=10)
    for model in (images, linear):
        data = Digits(batch_size=128)
        with pytest.raises(ValueError, match=r"(?s)have no label: .* PseudoLabels label"):
            make_trainer(tmp_path, max_epochs=2).fit(model, datamodule=data)
        callback = PseudoLabels(0.1)
        trainer = make_trainer(tmp_path, callback, EMA(0.5), max_epochs=2)
        trainer.fit(model, datamodule=data)
        assert trainer.global_step == 2 * 10
        assert len(callback.index)


def test_bf16(tmp_path: Path) -> None:
    callback = PseudoLabels(0.5)
    make_trainer(tmp_path, callback, max_epochs=2, precision="bf16-mixed").fit(Classifier(), datamodule=Digits())
    assert len(callback.index)


def test_fast_dev_run(tmp_path: Path) -> None:
    data = Digits()
    make_trainer(tmp_path, PseudoLabels(0.5, start_epoch=9), fast_dev_run=True).fit(Classifier(), datamodule=data)
    assert int((data.train_label < 0).sum()) == len(data.hidden)


# Refusals


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"threshold": 0.0}, "threshold is a probability"),
        ({"threshold": float("nan")}, "threshold is a probability"),
        ({"final_threshold": 1.1}, "final_threshold is a probability"),
        ({"start_epoch": 0}, "start_epoch must be at least 1"),
        ({"every_n_epochs": 0}, "every_n_epochs must be at least 1"),
        ({"max_per_class": 0}, "max_per_class must be at least 1"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        PseudoLabels(**settings)
    with pytest.raises(TypeError, match="must be a PseudoLabelDataset"):
        PseudoLabels(dataset=TensorDataset(torch.zeros(3)))  # type: ignore[arg-type]  # not what it takes, on purpose


def test_refuses_what_cannot_work(tmp_path: Path) -> None:
    data, (x, _) = partly_labelled(), samples(40)
    loader = DataLoader(data, batch_size=8)
    plain = TensorDataset(x, x.new_zeros(40).long())
    everything, nothing = Digits(every=1), Digits()
    nothing.reassign(label=torch.where(nothing.arrays.split == 0, -1, nothing.arrays.label))
    for made, arguments, reason in (
        ([PseudoLabels()], {"train_dataloaders": loader}, "finds no data whose labels it could change: train on PseudoLabelDataset"),
        ([PseudoLabels(dataset=data)], {"train_dataloaders": DataLoader(plain, batch_size=8)}, "training loader does not read"),
        ([PseudoLabels(dataset=data, start_epoch=3)], {"train_dataloaders": loader}, "begin in epoch 3, but the training has 3 epochs"),
        ([PseudoLabels()], {"datamodule": everything}, "finds no training sample without a label among 1"),
        ([PseudoLabels()], {"datamodule": nothing}, "finds no training sample with a label among 1"),
    ):
        model = Net()
        with pytest.raises(MisconfigurationException, match=reason):
            make_trainer(tmp_path, *made).fit(model, **arguments)
        assert model.steps == 0
    with pytest.raises(MisconfigurationException, match="set max_epochs"):
        make_trainer(tmp_path, PseudoLabels(final_threshold=0.5, dataset=data), max_epochs=-1, max_steps=3).fit(Net(), loader)
    both: Any = ConcatDataset([Subset(data, range(40)), plain])
    inside = DataLoader(both, batch_size=8)
    make_trainer(tmp_path, PseudoLabels(dataset=data)).fit(Net(), inside)


def test_no_classifier(tmp_path: Path) -> None:
    class Wide(Classifier):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images) if self.training else images.flatten(1)

    with pytest.raises(ValueError, match="Wide is no classifier: forward gives 64 numbers for 10 classes"):
        make_trainer(tmp_path, PseudoLabels(), limit_val_batches=0).fit(Wide(), datamodule=Digits())


def test_samples_of_validation_and_test_are_refused(tmp_path: Path) -> None:
    x, label = samples(60)
    base = TensorDataset(x, label)
    part = torch.arange(40)
    known = label[:40].clone()
    known[12:] = -1
    data = PseudoLabelDataset(Subset(base, part.tolist()), known)
    loader, callback = DataLoader(data, batch_size=8), PseudoLabels(dataset=data)
    for kind, indices, shared in (("validation", range(30, 60), 10), ("test", range(39, 60), 1), ("validation", range(12), 0)):
        other = DataLoader(Subset(base, list(indices)), batch_size=4)
        reason = f"would train on {shared} of the {kind} samples"
        with pytest.raises(MisconfigurationException, match=reason) if shared else contextlib.nullcontext():
            if kind == "test":
                make_trainer(tmp_path, callback).test(Net(), other, verbose=False)
            else:
                make_trainer(tmp_path, callback).fit(Net(), loader, other)


def test_a_checkpoint_of_other_data_is_refused(tmp_path: Path) -> None:
    data = Digits()
    trainer = make_trainer(tmp_path, PseudoLabels(0.5), max_epochs=2)
    trainer.fit(Classifier(), datamodule=data)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    other = Digits(every=2)
    reason = f"has {len(other.hidden)} samples without a label, but the checkpoint is of a training with {len(data.hidden)} others"
    with pytest.raises(MisconfigurationException, match=reason):
        make_trainer(tmp_path, PseudoLabels(0.5)).fit(Classifier(), datamodule=other, ckpt_path=tmp_path / "last.ckpt")


# Two processes


def run_rank(folder: Path) -> None:
    import os

    callback, seen, data = PseudoLabels(0.5), Seen(), Digits(batch_size=64)
    model = Classifier()
    trainer = make_trainer(folder, callback, seen, strategy="ddp", devices=2, max_epochs=3)
    trainer.fit(model, datamodule=data)
    plain = partly_labelled(41)
    other = PseudoLabels(0.5, dataset=plain)
    loader = DataLoader(plain, batch_size=4, shuffle=True)
    make_trainer(folder, other, strategy="ddp", devices=2, max_epochs=3).fit(Net(), loader)
    found = {"chosen": [callback.index, callback.label, other.index, other.label], "weights": model.state_dict(), "epochs": seen.epochs}
    torch.save(found, folder / f"{os.environ['RANK']}.pt")


@pytest.mark.slow
def test_two_processes_choose_the_same(rank_folder: Path) -> None:
    first, second = (torch.load(rank_folder / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert differences(first["chosen"], second["chosen"]) == []
    assert differences(first["weights"], second["weights"]) == []
    index, label, other, _ = first["chosen"]
    data, model = Digits(), Classifier()
    assert set(index.tolist()) <= set(data.hidden.tolist())
    assert 0 < len(other) <= 29
    model.load_state_dict(first["weights"])
    hidden = torch.isin(data.train_index, data.hidden)
    inputs = torch.cat([data.transform(batch).input for batch in data.eval_train_dataloader()])[hidden]
    with torch.no_grad():
        confidence, guess = model.eval()(inputs).softmax(1).max(1)
    assert torch.equal(index, data.hidden[confidence >= 0.5])
    assert torch.equal(label, guess[confidence >= 0.5])
    for epoch in range(3):
        trained = [torch.cat([part[0] for part in found["epochs"][epoch]]) for found in (first, second)]
        assert len(trained[0]) == len(trained[1]) == 640
