"""`FeatureRank`: the whole epoch's rank, one warning, and no more."""

import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from matrix import Loader, Net, batches, make_trainer
from torch import Tensor

from litzoo.callbacks import FeatureRank
from litzoo.zoo.functional.feature_rank import effective_rank


class Collapsed(Net):
    """All features alike, but for what no loss sees."""

    def encode(self, x: Tensor) -> Tensor:
        return torch.ones(len(x), 8) + 1e-4 * super().encode(x)


def features(model: Net, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    model.eval()
    with torch.no_grad():
        return torch.cat([model.encode(x) for x, _ in pairs])


def test_rank_of_the_whole_epoch(tmp_path: Path) -> None:
    model = Net(norm=True)
    trainer = make_trainer(tmp_path, FeatureRank())
    trainer.fit(model, Loader(batches(0)), Loader(batches(9, 5)))
    assert float(trainer.callback_metrics["val/feature_rank"]) == pytest.approx(float(effective_rank(features(model, batches(9, 5)))))
    trainer.test(model, Loader(batches(7, 6)), verbose=False)
    assert float(trainer.callback_metrics["test/feature_rank"]) == pytest.approx(float(effective_rank(features(model, batches(7, 6)))))


def test_needs_no_labels(tmp_path: Path) -> None:
    model = Net()
    model.validation_step = lambda batch, batch_idx: None  # type: ignore[method-assign]
    x = [x for x, _ in batches(9, 5)]
    for pairs in (x, [(part,) for part in x], [(part, part + 1) for part in x], [[[part, part + 1]] for part in x]):
        found = make_trainer(tmp_path, FeatureRank()).validate(model, Loader(pairs), verbose=False)[0]  # type: ignore[arg-type]
        assert found["val/feature_rank"] == pytest.approx(float(effective_rank(features(model, batches(9, 5)))))


def test_of_the_logits(tmp_path: Path) -> None:
    model = Net()
    trainer = make_trainer(tmp_path, FeatureRank(), FeatureRank(features="forward"))
    scores = trainer.validate(model, Loader(batches(9, 5)), verbose=False)[0]
    with torch.no_grad():
        logits = torch.cat([model(x) for x, _ in batches(9, 5)])
    assert scores["val/feature_rank_forward"] == pytest.approx(float(effective_rank(logits)))
    assert scores["val/feature_rank_forward"] != scores["val/feature_rank"]


def test_epochs(tmp_path: Path) -> None:
    callback, epochs = FeatureRank(every_n_epochs=3), []
    model = Net()
    model.encode = lambda x: (epochs.append(trainer.current_epoch), Net.encode(model, x))[1]  # type: ignore[method-assign]
    trainer = make_trainer(tmp_path, callback, max_epochs=5, num_sanity_val_steps=0)
    model.validation_step = lambda batch, batch_idx: None  # type: ignore[method-assign]
    trainer.fit(model, Loader(batches(0)), Loader(batches(9, 1)))
    counts = [epochs.count(epoch) - 7 for epoch in range(5)]  # without the training's own
    assert counts == [1, 0, 1, 0, 1]


def test_warns_once_of_a_collapse(tmp_path: Path) -> None:
    callback = FeatureRank()
    for _ in range(2):  # once in each fit
        with pytest.warns(UserWarning, match="FeatureRank") as caught:
            make_trainer(tmp_path, callback).fit(Collapsed(), Loader(batches(0)), Loader(batches(9, 2)))
        found = [str(warning.message) for warning in caught if "FeatureRank" in str(warning.message)]
        assert len(found) == 1
        assert "the 8 features of Collapsed.encode spread over 1.0 directions only" in found[0]
        assert "learning rate" in found[0]


class Single(Net):
    """One feature, which cannot collapse."""

    def encode(self, x: Tensor) -> Tensor:
        return super().encode(x)[:, :1]

    def forward(self, x: Tensor) -> Tensor:
        return self.last(super().encode(x))


@pytest.mark.parametrize(("model", "below"), [(Net(), 1.5), (Collapsed(), 0.0), (Single(), 1.5)])
def test_does_not_warn(model: Net, below: float, tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(tmp_path, FeatureRank(warn_below=below)).fit(model, Loader(batches(0)), Loader(batches(9, 2)))
    assert not [warning for warning in caught if "FeatureRank" in str(warning.message)]


def test_diverged_features_do_not_end_the_training(tmp_path: Path) -> None:
    class Diverged(Net):
        def encode(self, x: Tensor) -> Tensor:
            return super().encode(x) / (0 if not self.training else 1)

    trainer = make_trainer(tmp_path, FeatureRank())
    trainer.fit(Diverged(), Loader(batches(0)), Loader(batches(9, 2)))
    assert trainer.callback_metrics["val/feature_rank"].isnan()


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="every_n_epochs must be at least 1, got 0"):
        FeatureRank(every_n_epochs=0)
    with pytest.raises(ValueError, match="features must be 'encode' or 'forward', got 'embed'"):
        FeatureRank(features="embed")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="warn_below must be a rank"):
        FeatureRank(warn_below=-1)

    class Bare(LightningModule):
        def training_step(self, batch: object, batch_idx: int) -> None: ...

        def validation_step(self, batch: object, batch_idx: int) -> None: ...

        def configure_optimizers(self) -> None: ...

    for features_of in ("encode", "forward"):
        with pytest.raises(MisconfigurationException, match=f"FeatureRank needs the features of Bare, which has no {features_of}"):
            make_trainer(tmp_path, FeatureRank(features=features_of)).fit(Bare(), Loader(batches(0)), Loader(batches(9, 2)))  # type: ignore[arg-type]

    class Wrong(Net):
        def encode(self, x: Tensor) -> Tensor:
            return super().encode(x)[:, :, None]

        def forward(self, x: Tensor) -> Tensor:
            return self.last(super().encode(x))

    with pytest.raises(ValueError, match=r"Wrong.encode must give features \(4, D\) in floats for 4 inputs, got torch.float32 \(4, 8, 1\)"):
        make_trainer(tmp_path, FeatureRank()).validate(Wrong(), Loader(batches(9, 2)), verbose=False)
    model = Net()
    model.validation_step = lambda batch, batch_idx: None  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="the batches of Net are no inputs, but dict: let the loader yield x"):
        make_trainer(tmp_path, FeatureRank()).validate(model, Loader([{"x": torch.zeros(4, 2)}]), verbose=False)  # type: ignore[list-item]


def run_rank(folder: Path) -> None:
    """One of two processes: each has its own samples."""
    trainer = make_trainer(folder, FeatureRank(), strategy="ddp", devices=2, use_distributed_sampler=False)
    model = Net()
    trainer.fit(model, Loader(batches(trainer.global_rank)), Loader(batches(8 + trainer.global_rank, 3)))
    torch.save((model.state_dict(), trainer.callback_metrics["val/feature_rank"]), folder / f"rank_{trainer.global_rank}.pt")


@pytest.mark.slow
def test_two_processes_equal_one(rank_folder: Path) -> None:
    model = Net()
    for rank in range(2):
        weights, found = torch.load(rank_folder / f"rank_{rank}.pt", weights_only=True)
        model.load_state_dict(weights)
        assert float(found) == pytest.approx(float(effective_rank(features(model, batches(8, 3) + batches(9, 3)))))
