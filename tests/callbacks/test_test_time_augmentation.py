"""`TestTimeAugmentation` against the mean over views by hand, in every stage."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from matrix import Loader, Net, Pairs, batches, make_trainer
from torch import Tensor

from litzoo.callbacks import EMA, SnapshotEnsemble, TestTimeAugmentation
from litzoo.datamodules import DigitsDataModule
from litzoo.zoo import Batch, EncoderClassifier, ImageClassifier, PointNetClassifier

VIEWS: list[Callable[[Tensor], Tensor]] = [torch.neg, torch.sin]
# The last batch is a smaller one.
PAIRS: Pairs = [*batches(9, 2), (torch.randn(2, 2), torch.tensor([0, 2]))]


def by_hand(model: Net, pairs: Pairs, merge: str = "probabilities", views: Any = VIEWS) -> Tensor:
    """Probabilities of all samples, in float64."""
    double = copy.deepcopy(model).eval().double()
    with torch.no_grad():
        logits = torch.stack([torch.cat([double(view(x.double())) for x, _ in pairs]) for view in (lambda x: x, *views)])
    return logits.softmax(-1).mean(0) if merge == "probabilities" else logits.mean(0).softmax(-1)


def loss_of(probability: Tensor, pairs: Pairs) -> float:
    """The mean over samples."""
    return float(F.nll_loss(probability.log(), torch.cat([y for _, y in pairs])))


@pytest.mark.parametrize("merge", ["probabilities", "logits"])
def test_test_and_predict_are_the_mean_over_views(merge: Any, tmp_path: Path) -> None:
    model = Net(norm=True)
    trainer = make_trainer(tmp_path, TestTimeAugmentation(VIEWS, merge))
    wanted = by_hand(model, PAIRS, merge)
    for _ in range(2):
        assert trainer.test(model, Loader(PAIRS), verbose=False)[0]["test/loss"] == pytest.approx(loss_of(wanted, PAIRS), abs=1e-5)
        torch.testing.assert_close(torch.cat(trainer.predict(model, Loader(PAIRS))).double(), wanted, atol=1e-6, rtol=0)
        assert "forward" not in vars(model)
    plain = by_hand(model, PAIRS, views=[])
    assert trainer.validate(model, Loader(PAIRS), verbose=False)[0]["val/loss"] == pytest.approx(loss_of(plain, PAIRS), abs=1e-5)


def test_identity_alone_changes_no_bit(tmp_path: Path) -> None:
    model = Net(norm=True)
    for precision in ("32-true", "bf16-mixed"):
        plain, augmented = (
            make_trainer(tmp_path, *made, precision=precision).predict(model, Loader(PAIRS)) for made in ((), (TestTimeAugmentation([]),))
        )
        assert all(torch.equal(one, other) and one.dtype == other.dtype for one, other in zip(plain or [], augmented or [], strict=True))


def test_bf16(tmp_path: Path) -> None:
    model = Net()
    wanted = by_hand(model, PAIRS)
    for precision in ("bf16-mixed", "bf16-true"):
        found = make_trainer(tmp_path, TestTimeAugmentation(VIEWS), precision=precision).predict(copy.deepcopy(model), Loader(PAIRS))
        assert found[0].dtype == torch.float32
        torch.testing.assert_close(torch.cat(found).double(), wanted, atol=0.03, rtol=0)


def test_validation_within_fit(tmp_path: Path) -> None:
    """What is monitored is augmented if asked for, also in the sanity check; the training is the same."""
    scores: dict[bool, float] = {}
    weights = []
    for validation in (False, True):
        model = Net()
        trainer = make_trainer(tmp_path, TestTimeAugmentation(VIEWS, validation=validation), num_sanity_val_steps=1)
        trainer.fit(model, Loader(batches(0)), Loader(PAIRS))
        scores[validation] = float(trainer.callback_metrics["val/loss"])
        weights.append(model.last.weight)
        assert scores[validation] == pytest.approx(loss_of(by_hand(model, PAIRS, views=VIEWS if validation else []), PAIRS), abs=1e-5)
    assert scores[True] != pytest.approx(scores[False], abs=1e-3)
    assert torch.equal(*weights)


class OfNet(Net):
    """Its steps call a submodule."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(self.first, self.norm, self.last)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test/loss", F.cross_entropy(self.net(batch[0]), batch[1]))


def test_a_submodule_may_be_meant(tmp_path: Path) -> None:
    model = OfNet()
    found = make_trainer(tmp_path, TestTimeAugmentation(VIEWS, target="net")).test(model, Loader(PAIRS), verbose=False)
    assert found[0]["test/loss"] == pytest.approx(loss_of(by_hand(model, PAIRS), PAIRS), abs=1e-5)
    assert "forward" not in vars(model.net)
    with pytest.raises(MisconfigurationException, match="steps of OfNet never called forward: set target to the name"):
        make_trainer(tmp_path, TestTimeAugmentation(VIEWS)).test(model, Loader(PAIRS), verbose=False)
    assert "forward" not in vars(model)
    with pytest.raises(MisconfigurationException, match=r"no submodule 'nte' in OfNet: set target to one, such as first, .*net"):
        make_trainer(tmp_path, TestTimeAugmentation(VIEWS, target="nte")).test(model, Loader(PAIRS), verbose=False)
    make_trainer(tmp_path, TestTimeAugmentation(VIEWS), limit_test_batches=0).test(model, Loader(PAIRS), verbose=False)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_features_are_no_logits(tmp_path: Path) -> None:
    """Those of an encoder, and those inside of a classifier: their softmax would mean nothing."""
    data, model = DigitsDataModule(batch_size=64, augmentation="none", image_size=16), digit_classifier()
    with pytest.raises(ValueError, match=r"logits of 10 classes, but the forward of Conv4 gives 64 numbers: set target"):
        make_trainer(tmp_path, TestTimeAugmentation("flip", target="backbone")).test(model, datamodule=data, verbose=False)
    assert "forward" not in vars(model.backbone)
    make_trainer(tmp_path, TestTimeAugmentation("flip", "logits", "backbone")).test(model, datamodule=data, verbose=False)


class Strange(Net):
    def test_step(self, batch: Any, batch_idx: int) -> None:
        self(x=batch[0])

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        raise KeyError("on purpose")


def test_an_exception_puts_forward_back(tmp_path: Path) -> None:
    model, callback = Strange(), TestTimeAugmentation(VIEWS)
    trainer = make_trainer(tmp_path, callback)
    with pytest.raises(KeyError):
        trainer.predict(model, Loader(PAIRS))
    assert "forward" not in vars(model)
    with pytest.raises(ValueError, match="call it as f\\(x\\)"):
        trainer.test(model, Loader(PAIRS), verbose=False)
    assert "forward" not in vars(model)


class Meanwhile(Callback):
    """Copies the module and the callbacks while a test runs."""

    def on_test_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        x = PAIRS[0][0]
        trainer_of, pl_module._trainer = pl_module._trainer, None
        self.copies = [copy.deepcopy(pl_module), pickle.loads(pickle.dumps(pl_module))]
        pl_module._trainer = trainer_of
        self.outputs = [found(x) for found in (pl_module, *self.copies)]
        pickle.dumps(trainer.callbacks[0])
        self.callback = copy.deepcopy(trainer.callbacks[0])


def test_copies_made_meanwhile(tmp_path: Path) -> None:
    model, meanwhile = Net(), Meanwhile()
    make_trainer(tmp_path, TestTimeAugmentation(VIEWS), meanwhile).test(model, Loader(PAIRS), verbose=False)
    torch.testing.assert_close(meanwhile.outputs[0].double().softmax(1), by_hand(model, PAIRS[:1]), atol=1e-6, rtol=0)
    assert all(torch.equal(meanwhile.outputs[0], output) for output in meanwhile.outputs)
    # A copy goes on by itself: what happens to the first network does not reach it.
    for parameter in model.parameters():
        parameter.data.zero_()
    with torch.no_grad():
        assert all(torch.equal(meanwhile.outputs[0], made(PAIRS[0][0])) for made in meanwhile.copies)
    assert meanwhile.callback._forward is None


def test_together_with_ema(tmp_path: Path) -> None:
    model = Net()
    trainer = make_trainer(tmp_path, EMA(0.9), TestTimeAugmentation(VIEWS, validation=True))
    trainer.fit(model, Loader(batches(0)), Loader(PAIRS))
    wanted = loss_of(by_hand(model, PAIRS), PAIRS)  # after training the module keeps the average
    assert float(trainer.callback_metrics["val/loss"]) == pytest.approx(wanted, abs=1e-5)
    assert trainer.test(model, Loader(PAIRS), verbose=False)[0]["test/loss"] == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("first", [True, False])
def test_together_with_snapshots(first: bool, tmp_path: Path) -> None:
    """Whichever of the two stands for forward first, the views and the snapshots multiply, and the other is put back."""
    ensemble, model = SnapshotEnsemble(2, dirpath=tmp_path / "snapshots"), Net()
    made = (TestTimeAugmentation(VIEWS), ensemble) if first else (ensemble, TestTimeAugmentation(VIEWS))
    trainer = make_trainer(tmp_path, *made)
    trainer.fit(model, Loader(batches(0)), Loader(PAIRS))
    members = []
    for file in sorted((tmp_path / "snapshots").iterdir()):
        member = Net()
        member.load_state_dict(torch.load(file, weights_only=True)["state_dict"])
        members.append(by_hand(member, PAIRS))
    for _ in range(2):
        found = torch.cat(trainer.predict(model, Loader(PAIRS)))
        torch.testing.assert_close(found.double(), torch.stack(members).mean(0), atol=1e-6, rtol=0)
        assert "forward" not in vars(model)


def test_an_exception_under_another_forward(tmp_path: Path) -> None:
    """Another callback's forward is on top and goes first: what is left does nothing, and the next run clears it away."""
    model = Net()
    trainer = make_trainer(tmp_path, TestTimeAugmentation(VIEWS), SnapshotEnsemble(1, dirpath=tmp_path / "snapshots"))
    trainer.fit(model, Loader(batches(0)), Loader(PAIRS))
    plain = by_hand(model, PAIRS[:1], views=[])
    with pytest.raises(RuntimeError):
        trainer.predict(model, Loader([(torch.zeros(1, 7), torch.zeros(1))]))
    with torch.no_grad():
        torch.testing.assert_close(model(PAIRS[0][0]).double().softmax(1), plain, atol=1e-6, rtol=0)
    trainer.predict(model, Loader(PAIRS))
    assert "forward" not in vars(model)


def digit_classifier() -> ImageClassifier:
    return ImageClassifier(num_classes=10, image_size=16, in_channels=1, backbone="conv4")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_classifiers_of_images(tmp_path: Path) -> None:
    """An image classifier, and a linear one whose training has cached the features, which a view has not."""
    data = DigitsDataModule(batch_size=64, augmentation="none", image_size=16)
    images = digit_classifier()
    linear = EncoderClassifier({"model": "ImageClassifier", "hparams": dict(images.hparams)}, num_classes=10)
    for model in (images, linear):
        trainer = make_trainer(tmp_path, TestTimeAugmentation("flip"), max_epochs=1, limit_train_batches=4)
        trainer.fit(model, datamodule=data)
        found = torch.cat(trainer.predict(model, datamodule=data))
        test = torch.cat([data.transform(batch).input for batch in data.test_dataloader()])
        with torch.no_grad():
            wanted = torch.stack([model.eval()(test), model(test.flip(-1))]).double().softmax(-1).mean(0)
        torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_cached_features_make_room_for_augmented_validation(tmp_path: Path) -> None:
    data = DigitsDataModule(batch_size=64, augmentation="none", image_size=16)
    model = EncoderClassifier({"model": "ImageClassifier", "hparams": dict(digit_classifier().hparams)}, num_classes=10)
    trainer = make_trainer(tmp_path, TestTimeAugmentation("flip", validation=True), max_epochs=1)
    trainer.fit(model, datamodule=data)
    batch = [data.transform(batch) for batch in data.val_dataloader()]
    inputs, label = torch.cat([part.input for part in batch]), torch.cat([part.label for part in batch])
    with torch.no_grad():
        wanted = torch.stack([model.eval()(inputs), model(inputs.flip(-1))]).double().softmax(-1).mean(0)
    assert float(trainer.callback_metrics["val/loss"]) == pytest.approx(float(F.nll_loss(wanted.log(), label)), abs=1e-4)


def test_clouds_and_votes_multiply(tmp_path: Path) -> None:
    clouds, label = torch.rand(3, 32, 3), torch.arange(3)
    model = PointNetClassifier(num_classes=3, normalization="none", votes=2)
    views = (clouds, clouds * torch.tensor([-1.0, 1, 1]))
    wanted = torch.stack([model.predict(view, votes=2) for view in views]).mean(0)
    found = make_trainer(tmp_path, TestTimeAugmentation("mirror")).predict(model, Loader([Batch(clouds, label, torch.arange(3))]))
    torch.testing.assert_close(found[0], wanted, atol=1e-6, rtol=0)


def test_compiled(tmp_path: Path) -> None:
    model = Net()
    wanted = by_hand(model, PAIRS)
    found = make_trainer(tmp_path, TestTimeAugmentation(VIEWS)).predict(torch.compile(model, backend="eager"), Loader(PAIRS))
    torch.testing.assert_close(torch.cat(found).double(), wanted, atol=1e-6, rtol=0)


def run_rank(folder: Path) -> None:
    import os

    rank = int(os.environ["RANK"])
    model = Net(norm=True)
    callback = TestTimeAugmentation(VIEWS, validation=True)
    trainer = make_trainer(folder, callback, strategy="ddp", devices=2, use_distributed_sampler=False, max_epochs=1)
    trainer.fit(model, Loader(batches(rank)), Loader(batches(9 + rank, 2)))
    own = vars(model).get("forward")
    test = trainer.test(model, Loader(batches(9 + rank, 2)), verbose=False)[0]["test/loss"]
    predicted = torch.cat(trainer.predict(model, Loader(batches(9 + rank, 2))))
    assert vars(model).get("forward") is own
    assert type(own).__name__ != "_ForwardOverViews"
    torch.save(
        {"weights": model.state_dict(), "test": test, "predicted": predicted, "val": trainer.callback_metrics}, folder / f"{rank}.pt"
    )


@pytest.mark.slow
def test_two_processes(rank_folder: Path) -> None:
    for rank in range(2):
        found = torch.load(rank_folder / f"{rank}.pt", weights_only=True)
        model = Net(norm=True)
        model.load_state_dict(found["weights"])
        torch.testing.assert_close(found["predicted"].double(), by_hand(model, batches(9 + rank, 2)), atol=1e-6, rtol=0)
        assert found["test"] == pytest.approx(loss_of(by_hand(model, batches(9 + rank, 2)), batches(9 + rank, 2)), abs=1e-5)
