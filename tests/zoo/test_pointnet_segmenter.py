"""PointNet for part segmentation: the head against one layer over all features, the restriction to a class, training and files."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import litzoo
from litzoo.zoo import Batch, PointNetSegmenter
from litzoo.zoo.pointnet_segmenter import PointHead

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
PART_CLASSES = [0, 0, 1, 1, 1]


def segmenter(**settings: Any) -> PointNetSegmenter:
    torch.manual_seed(0)
    return PointNetSegmenter(**{"num_classes": 2, "num_parts": 5, "part_classes": PART_CLASSES, "network": "semantic", **settings})


def test_the_head_is_one_layer_over_all_features() -> None:
    torch.manual_seed(0)
    head = PointHead((3, 5), 7, (8, 6, 4), 9, 0.0).double().eval()
    local, cloud = [torch.randn(2, 3, 11).double(), torch.randn(2, 5, 11).double()], torch.randn(2, 7).double()
    weight = torch.cat([head.from_local[0].weight[..., 0], head.from_local[1].weight[..., 0], head.from_cloud.weight], dim=1)
    everything = torch.cat([*local, cloud[:, :, None].expand(-1, -1, 11)], dim=1)
    expected = head.last(head.second(head.first(weight @ everything)))
    torch.testing.assert_close(head(local, cloud), expected, rtol=1e-10, atol=1e-12)
    assert weight.abs().max() <= 15**-0.5


@pytest.mark.parametrize("variant", ["paper", "compact"])
@pytest.mark.parametrize(("network", "features"), [("part", 2048), ("semantic", 1024)])
def test_shapes(network: str, features: int, variant: str) -> None:
    model = segmenter(network=network, variant=variant, feature_transform=variant == "paper").eval()
    points, label = torch.randn(3, 40, 3), torch.tensor([0, 1, 1])
    assert model(points, label).shape == (3, 5, 40)
    assert model.encode(points).shape == (3, features)
    assert (model.encode(points) < 0).any() == (variant == "compact")  # no ReLU before the maximum


def test_the_parts_network_is_that_of_the_supplement() -> None:
    model = PointNetSegmenter(16, 50, [0] * 50)
    widths = [layer.weight.shape[:2] for layer in model.modules() if isinstance(layer, nn.Conv1d)]
    assert [tuple(width) for width in widths] == [
        *((64, 3), (128, 64), (1024, 128)),  # input transform
        *((64, 3), (128, 64), (128, 128)),
        *((64, 128), (128, 64), (1024, 128)),  # feature transform
        *((512, 128), (2048, 512)),
        *((256, 64), (256, 128), (256, 128), (256, 512), (256, 2048)),  # one layer of the head
        *((256, 256), (128, 256), (50, 128)),
    ]
    assert model.head.from_cloud.weight.shape == (256, 2048 + 16)


@pytest.mark.parametrize("network", ["part", "semantic"])
def test_order_of_points_does_not_matter(network: str) -> None:
    model, points, label, order = segmenter(network=network).eval(), torch.randn(2, 50, 3), torch.tensor([0, 1]), torch.randperm(50)
    torch.testing.assert_close(model(points, label)[..., order], model(points[:, order], label), rtol=1e-3, atol=1e-4)


def test_predictions_are_parts_of_the_class() -> None:
    model = segmenter()
    clouds = [torch.randn(30, 3) * 5 + 2, torch.randn(17, 3)]
    parts = model.predict(clouds, torch.tensor([1, 0]))
    assert [len(part) for part in parts] == [30, 17]
    assert set(parts[0].tolist()) <= {2, 3, 4}
    assert set(parts[1].tolist()) <= {0, 1}
    assert model.training
    again = model.double().predict(clouds, torch.tensor([1, 0]))
    assert all(torch.equal(*pair) for pair in zip(again, parts, strict=True)), "a model of another precision takes the same clouds"


def test_the_class_is_an_input_only_if_asked_for() -> None:
    points = torch.randn(2, 20, 3)
    with_class, without = segmenter().eval(), segmenter(class_input=False).eval()
    assert not torch.allclose(with_class(points, torch.tensor([0, 0])), with_class(points, torch.tensor([1, 1])))
    assert torch.equal(without(points), without(points, torch.tensor([1, 1])))
    with pytest.raises(ValueError, match=r"call it with \(points, label\)"):
        with_class(points)


def boxes(objects: int = 24, points: int = 64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Class 0 is cut in two by height, class 1 in three."""
    torch.manual_seed(0)
    clouds, label = torch.rand(objects, points, 3) * 2 - 1, torch.arange(objects) % 2
    height = clouds[..., 1]
    return clouds, label, torch.where(label[:, None] == 0, (height > 0).long(), 2 + (height > -0.3).long() + (height > 0.3).long())


@pytest.mark.slow
@pytest.mark.parametrize("network", ["part", "semantic"])
def test_learns_what_the_parts_are(network: str, tmp_path: Path) -> None:
    loader = DataLoader(TensorDataset(*boxes()), batch_size=8)
    model = segmenter(network=network, lr_scheduler=None)
    trainer = Trainer(max_epochs=30, accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
    trainer.fit(model, loader, loader)
    scores = trainer.test(model, loader, verbose=False)[0]
    assert scores["test/instance_miou"] > 0.7
    assert scores["test/accuracy"] > 0.85
    assert scores["test/instance_miou"] == pytest.approx(float(trainer.callback_metrics["test/instance_miou"]))


@pytest.mark.parametrize("network", ["part", "semantic"])
def test_without_a_feature_transform_nothing_is_orthogonal(network: str) -> None:
    losses = []
    for weight in (0.0, 1e3):
        model = segmenter(network=network, feature_transform=False, orthogonality_weight=weight, dropout=0.0)
        model.log = lambda *args, **kwargs: None
        losses.append(model.training_step(boxes(4, 16), 0))
    assert torch.equal(*losses)


def test_ignored_points_have_no_gradient() -> None:
    model = segmenter(dropout=0.0, orthogonality_weight=0.0)
    model.log = lambda *args, **kwargs: None
    clouds, label, part = boxes(4, 16)
    loss = model.training_step((clouds, label, part), 0)
    everything = torch.cat([part, torch.full_like(part, -1)], dim=1)
    doubled = model.training_step(Batch(torch.cat([clouds, clouds], dim=1), label, label, everything), 0)
    torch.testing.assert_close(loss, doubled, rtol=1e-4, atol=1e-5)


def test_the_loss_is_the_mean_over_known_parts_and_zero_without_any() -> None:
    model = segmenter(orthogonality_weight=0.0).eval()
    model.log = lambda *args, **kwargs: None
    clouds, label, part = boxes(4, 16)
    known = torch.arange(part.numel()).view_as(part) % 3 == 0
    loss = model.training_step((clouds, label, part.where(known, -1)), 0)
    logits = model(clouds, label).mT[known].log_softmax(dim=1)
    torch.testing.assert_close(loss, -logits.gather(1, part[known][:, None]).mean(), rtol=1e-5, atol=1e-6)

    loss = model.training_step((clouds, label, torch.full_like(part, -1)), 0)
    assert loss == 0
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(loss, list(model.parameters())))


def test_weights_files(tmp_path: Path) -> None:
    model, points, label = segmenter(part_names=list("abcde")).eval(), torch.randn(2, 30, 3), torch.tensor([0, 1])
    litzoo.zoo.save(model, tmp_path / "parts.safetensors", {"summary": "parts"}, half=False)
    again = litzoo.load(tmp_path / "parts.safetensors")
    assert again.part_names == list("abcde")
    assert torch.equal(again(points, label), model(points, label))
    assert torch.equal(again.foreign, model.foreign)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_parts": 0, "part_classes": []}, "the data have no part labels"),
        ({"num_parts": 1, "part_classes": [0]}, "num_parts at least 2, got 2 and 1$"),
        ({"part_classes": [0, 1]}, "part_classes has 2 entries, it needs 5"),
        ({"part_classes": [0, 0, 1, 1, 2]}, "must lie in"),
        ({"part_names": ["a"]}, "part_names has 1 entries"),
        ({"network": "big"}, "network must be"),
        ({"variant": "big"}, "variant must be 'paper' or 'compact', got 'big'"),
        ({"variant": "big", "network": "part"}, "variant must be"),
        ({"dropout": 1.0}, "dropout must lie"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        segmenter(**settings)


def test_data_without_parts_are_refused() -> None:
    points, label = torch.randn(2, 8, 3), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="these data have none"):
        segmenter().training_step(Batch(points, label, label), 0)
    with pytest.raises(TypeError, match="points, label, part"):
        segmenter().training_step((points, label), 0)
    with pytest.raises(ValueError, match="batch of one cloud"):
        segmenter().training_step((points[:1], label[:1], torch.zeros(1, 8).long()), 0)
