"""Classifiers for imbalanced classes: against the formulas by hand, through training, checkpoints and mistakes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor

import litzoo
from litzoo.datamodules import DigitsDataModule
from litzoo.zoo import EncoderClassifier, ImageClassifier
from litzoo.zoo.functional.long_tail import shot_groups, tau_normalized
from litzoo.zoo.layers.feature_heads import RescaledHead

QUIET: dict[str, Any] = {
    **dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False),
    "accelerator": "cpu",
    "devices": 1,
}
DATA: dict[str, Any] = {"image_size": 8, "batch_size": 64, "seed": 0, "augmentation": "none", "imbalance": 20.0}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A classifier that was trained on many zeros and few nines."""
    seed_everything(0)
    data = DigitsDataModule(**DATA)
    model = ImageClassifier(
        10, data.class_names, backbone="conv4", in_channels=1, image_size=8, image_mean=data.image_mean, image_std=data.image_std
    )
    Trainer(**QUIET, max_epochs=3).fit(model, datamodule=data)
    path = tmp_path_factory.mktemp("trained") / "classifier.safetensors"
    litzoo.save(model, path, {}, half=False)
    return str(path)


# The formulas


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 2.0])
def test_weights_are_divided_by_a_power_of_their_length(tau: float) -> None:
    weight = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows = [[value / sum(other**2 for other in row) ** (tau / 2) for value in row] for row in weight.tolist()]
    torch.testing.assert_close(tau_normalized(weight, tau), torch.tensor(rows, dtype=torch.float64), rtol=1e-12, atol=0)


def test_a_class_without_weights_stays_without() -> None:
    assert not tau_normalized(torch.zeros(2, 3), 1.0).any()
    with pytest.raises(ValueError, match="tau must be at least 0"):
        tau_normalized(torch.ones(2, 3), -1.0)


def test_groups_have_the_published_limits() -> None:
    assert shot_groups([101, 100, 20, 19, 0]) == {"many": [0], "medium": [1, 2], "few": [3, 4]}
    assert shot_groups([500, 501]) == {"many": [0, 1]}
    assert shot_groups([5, 15, 25], many=20, few=10) == {"many": [2], "medium": [1], "few": [0]}
    with pytest.raises(ValueError, match="0 <= few <= many"):
        shot_groups([1], many=5, few=6)


def test_learned_scales_begin_at_the_given_classifier_and_have_the_gradient_of_the_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, features = (torch.randn(size, dtype=torch.float64, generator=generator) for size in ((4, 6), (9, 6)))
    label = torch.randint(4, (9,), generator=generator)
    head = RescaledHead(6, 4, tau=None).double()
    head.take(weight)
    assert torch.equal(head(features), features @ weight.T)
    F.cross_entropy(head(features), label).backward()
    probability = (features @ weight.T).softmax(dim=1)
    expected = ((probability - F.one_hot(label, 4)) * (features @ weight.T)).mean(dim=0)
    torch.testing.assert_close(head.scale.grad, expected)
    assert [name for name, _ in head.named_parameters()] == ["scale"]


# Through training


def logits_of(model: Any, data: DigitsDataModule) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        parts = [(model.eval()(data.transform(batch).input), batch.label) for batch in data.test_dataloader()]
    logits, label = (torch.cat(column) for column in zip(*parts, strict=True))
    return logits, label


def test_tau_normalisation_learns_nothing_and_is_the_formula(trained: str, tmp_path: Path) -> None:
    data = DigitsDataModule(**DATA)
    model = EncoderClassifier(trained, 10, head="tau_normalized", tau=0.7)
    trainer = Trainer(**QUIET, max_epochs=9)
    trainer.fit(model, datamodule=data)
    assert trainer.current_epoch == 1
    assert "val/accuracy" in trainer.callback_metrics
    source: Any = litzoo.load(trained)
    batch = data.transform(next(iter(data.test_dataloader()))).input
    with torch.no_grad():
        weight = source.head.weight / source.head.weight.norm(dim=1, keepdim=True) ** 0.7
        torch.testing.assert_close(model.eval()(batch), source.encode(batch) @ weight.T, rtol=1e-5, atol=1e-5)
    litzoo.save(model, tmp_path / "it.safetensors", {}, half=False)
    with torch.no_grad():
        assert torch.equal(litzoo.load(str(tmp_path / "it.safetensors"))(batch), model(batch))


def test_scales_are_trained_on_cached_features_alone(trained: str) -> None:
    data = DigitsDataModule(**DATA, balanced=True)
    found = []
    for cache in (True, False):
        torch.manual_seed(0)
        model = EncoderClassifier(trained, 10, head="weight_scaling", cache_features=cache)
        before = {name: value.clone() for name, value in model.encoder.state_dict().items() if isinstance(value, Tensor)}
        Trainer(**QUIET, max_epochs=2, precision="64-true").fit(model, datamodule=data)
        assert all(
            torch.equal(value.to(before[name]), before[name]) for name, value in model.encoder.state_dict().items() if name in before
        )
        found.append(model.head.scale.detach())
    assert (found[0] - 1).abs().max() > 0.01
    torch.testing.assert_close(found[0], found[1])


def test_each_remedy_finds_more_of_the_rare_classes(trained: str) -> None:
    """Trained on 20 times as many zeros as nines, what rebalances the classifier must raise the recall of the rarer half."""
    data = DigitsDataModule(**DATA)

    def recall(model: Any) -> float:
        logits, label = logits_of(model, data)
        right = logits.argmax(dim=1) == label
        return float(np.mean([right[label == cls].float().mean() for cls in range(5, 10)]))

    plain = recall(litzoo.load(trained))
    for head, balanced in (("tau_normalized", False), ("class_means", False), ("weight_scaling", True), ("linear", True)):
        model = EncoderClassifier(trained, 10, head=head)  # type: ignore[arg-type]  # one of its names
        Trainer(**QUIET, max_epochs=5).fit(model, datamodule=DigitsDataModule(**DATA, balanced=balanced))
        assert recall(model) > plain, head


# Mistakes


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"num_classes": 11}, "tells 10 classes apart, but num_classes is 11"),
        ({"tau": -0.5}, "tau and encoder_lr_factor not negative"),
        ({"freeze": False}, "takes the encoder as it is: leave freeze true"),
        ({"lr": 0.1}, "learns nothing by gradient: leave lr out"),
        ({"class_names": list("1023456789")}, r"class 0 of .* is '0', but here '1'"),
        ({"encoder": "pointnet_furniture", "num_classes": 11}, "has no linear classifier on its features to rescale"),
    ],
)
def test_what_cannot_be_rescaled_is_refused(trained: str, settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        EncoderClassifier(**{"encoder": trained, "num_classes": 10, "head": "tau_normalized", **settings})


def test_several_processes_are_refused_where_nothing_is_learned(trained: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """DDP wraps no module without a gradient."""
    monkeypatch.setattr(Trainer, "world_size", 2)
    model = EncoderClassifier(trained, 10, head="tau_normalized")
    with pytest.raises(ValueError, match=r"learns nothing by gradient is made in one process: set trainer\.devices to 1"):
        Trainer(**QUIET, max_epochs=1).fit(model, datamodule=DigitsDataModule(**DATA))


def test_a_head_without_weights_says_so() -> None:
    with pytest.raises(ValueError, match="no weights to rescale"):
        RescaledHead(3, 2, tau=1.0)(torch.ones(1, 3))
