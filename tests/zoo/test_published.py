"""Published checkpoints: outputs equal those of the network that was saved, and every other file is told from them in one sentence."""

import argparse
import collections
import io
import json
import pickle
import sys
import types
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import torchvision
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from litzoo.zoo import (
    ImageClassifier,
    InstanceDiscrimination,
    PointNetClassifier,
    PointNetSegmenter,
    RelationalReasoning,
    SupConEncoder,
    WeightsError,
    from_published,
    load,
)
from litzoo.zoo.cli import main
from litzoo.zoo.published import read_published
from litzoo.zoo.published_layouts import resnet_hparams

State = dict[str, Any]


def settled(module: nn.Module) -> Any:
    """A module whose BatchNorms are at no start value, in evaluation mode."""
    for layer in module.modules():
        if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, std=0.3)
            nn.init.normal_(layer.running_mean, std=0.3)  # type: ignore[arg-type]  # None only without running statistics
            nn.init.uniform_(layer.running_var, 0.5, 2.0)  # type: ignore[arg-type]  # likewise
    return module.eval()


def small_resnet() -> nn.Module:
    """A ResNet-18 with the small stem, without a classifier."""
    network = torchvision.models.resnet18()
    network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    network.maxpool, network.fc = nn.Identity(), nn.Identity()
    return settled(network)


def with_shortcuts(state: Mapping[str, Tensor], prefix: str = "") -> State:
    """As repositories with ResNets for CIFAR call it."""
    return {prefix + key.replace("downsample", "shortcut"): value for key, value in state.items()}


class Pairs(nn.Module):
    """Conv-4 with average pooling, and a relation head on the concatenation or the sum."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        layers = collections.OrderedDict[str, nn.Module]()
        for block, (narrow, wide) in enumerate([(3, 8), (8, 16), (16, 32), (32, 64)], start=1):
            pool = nn.AdaptiveAvgPool2d(1) if block == 4 else nn.AvgPool2d(2)
            parts = {"conv": nn.Conv2d(narrow, wide, 3, padding=1, bias=False), "bn": nn.BatchNorm2d(wide), "relu": nn.ReLU(), "pool": pool}
            layers[f"layer{block}"] = nn.Sequential(collections.OrderedDict(parts))
        self.encoder = nn.Sequential(layers)
        head = {"linear1": nn.Linear(width, 24), "bn1": nn.BatchNorm1d(24), "relu": nn.LeakyReLU(), "linear2": nn.Linear(24, 1)}
        self.head = nn.Sequential(collections.OrderedDict(head))

    def checkpoint(self) -> State:
        return {"backbone": self.encoder.state_dict(), "relation": self.head.state_dict(), "optimizer": {"state": {}, "param_groups": []}}


@pytest.fixture
def pairs() -> Pairs:
    return settled(Pairs())


def equal(model: LightningModule, images: Tensor, expected: Tensor) -> None:
    assert not model.training
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)


# Layouts


@torch.no_grad()
def test_lemniscate_of_imagenet() -> None:
    network = settled(torchvision.models.resnet18(num_classes=16))
    state = {f"module.{key}": value for key, value in network.state_dict().items()}
    bank = {"memory": torch.randn(37, 16), "params": torch.tensor([0.07, 0.5])}
    before = torch.get_rng_state()
    model = from_published({"epoch": 3, "state_dict": state, "lemniscate": bank}, "lemniscate")
    assert torch.equal(torch.get_rng_state(), before)
    assert isinstance(model, InstanceDiscrimination)
    assert {value.device.type for value in model.state_dict().values() if isinstance(value, Tensor)} == {"cpu"}
    assert model.hparams["backbone"] == {"name": "resnet18", "in_channels": 3, "stem": "original"}
    assert (model.hparams["num_train"], model.hparams["embedding_dim"]) == (37, 16)
    images = torch.randn(2, 3, 64, 64)
    equal(model, images, F.normalize(network(images)))


@torch.no_grad()
def test_lemniscate_of_cifar_whose_bank_is_an_object(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = types.ModuleType("lib.LinearAverage")
    source = (
        "from torch import nn\nclass LinearAverage(nn.Module):\n    def __setstate__(self, state): raise RuntimeError('their code runs')\n"
    )
    exec(source, code.__dict__)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "lib", types.ModuleType("lib"))
        patch.setitem(sys.modules, "lib.LinearAverage", code)
        bank = code.LinearAverage()
        bank.register_buffer("memory", torch.randn(41, 8))
        network, projection = small_resnet(), nn.Linear(512, 8)
        state = {**with_shortcuts(network.state_dict()), "linear.weight": projection.weight, "linear.bias": projection.bias}
        torch.save({"net": state, "lemniscate": bank, "acc": 0.8}, tmp_path / "ckpt.t7")
        before = torch.serialization.get_safe_globals()
        model, card = read_published(tmp_path / "ckpt.t7", "lemniscate")
    assert set(torch.serialization.get_safe_globals()) == set(before)
    assert card["left_out"] == ["acc", "lemniscate"]
    assert "note" not in card
    assert (model.hparams["backbone"]["stem"], model.hparams["num_train"]) == ("small", 41)
    images = torch.randn(2, 3, 32, 32)
    equal(model, images, F.normalize(projection(network(images))))


@torch.no_grad()
@pytest.mark.parametrize("head", ["mlp", "linear", "classifier"])
def test_supcontrast(tmp_path: Path, head: str) -> None:
    network = small_resnet()
    last: nn.Module = nn.Linear(512, 7)
    if head == "mlp":
        last = nn.Sequential(nn.Linear(512, 20), nn.ReLU(), nn.Linear(20, 7))
    # Its code wraps the encoder alone.
    state = with_shortcuts(network.state_dict(), "encoder.module.")
    state |= {f"{'fc' if head == 'classifier' else 'head'}.{key}": value for key, value in last.state_dict().items()}
    options = argparse.Namespace(model="resnet18", lr_decay_epochs=[700, 800], mean="(0.5, 0.5, 0.5)", syncBN=False)
    torch.save({"opt": options, "model": state, "optimizer": {"state": {}}, "epoch": 9}, tmp_path / "last.pth")
    model, card = read_published(tmp_path / "last.pth", "supcontrast", image_size=32)
    assert card["left_out"] == ["epoch", "opt", "optimizer"]
    assert ("note" in card) == (head == "linear")
    assert model.hparams["image_size"] == 32
    images = torch.randn(2, 3, 32, 32)
    features = network(images)
    if head == "classifier":
        assert isinstance(model, ImageClassifier)
        equal(model, images, last(features))
    else:
        assert isinstance(model, SupConEncoder)
        equal(model, images, F.normalize(last(features)))


@torch.no_grad()
@pytest.mark.parametrize("naming", ["parts", "whole", "numbers"])
def test_relational(pairs: Pairs, naming: str) -> None:
    checkpoint = pairs.checkpoint()
    if naming == "whole":
        parts = (("net.feature_extractor", pairs.encoder), ("relation_module", pairs.head))
        checkpoint = {f"{name}.{key}": value for name, part in parts for key, value in part.state_dict().items()}
    if naming == "numbers":  # layers that were never named
        numbers = {"conv": "0", "bn": "1", "linear1": "0", "bn1": "1", "linear2": "3"}
        rename = lambda key: ".".join(numbers.get(part, part) for part in key.split("."))
        for part in ("backbone", "relation"):
            checkpoint[part] = {rename(key): value for key, value in checkpoint[part].items()}
    model = from_published(checkpoint, "relational")
    assert isinstance(model, RelationalReasoning)
    assert (model.hparams["aggregation"], model.hparams["hidden_dim"]) == ("cat", 24)
    images = torch.randn(6, 3, 32, 32)
    features = pairs.encoder(images).flatten(1)
    equal(model, images, features)
    joined = torch.cat([features[:3], features[3:]], dim=1)
    torch.testing.assert_close(model.relation(features[:3], features[3:]), pairs.head(joined).squeeze(1), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_relation_head_that_does_not_concatenate() -> None:
    pairs = settled(Pairs(width=64))
    with pytest.raises(WeightsError, match="give aggregation"):
        from_published(pairs.checkpoint(), "relational")
    model = from_published(pairs.checkpoint(), "relational", aggregation="max")
    first, second = torch.rand(2, 5, 64)
    torch.testing.assert_close(model.relation(first, second), pairs.head(torch.maximum(first, second)).squeeze(1))


class Stages(nn.Module):
    """A ResNet of three stages for CIFAR whose second and third stage begin with a convolution as their shortcut."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        narrow = 16
        for stage, wide in enumerate((16, 32, 64), start=1):
            stride = 1 if stage == 1 else 2
            first = nn.Sequential(nn.Conv2d(narrow, wide, 1, stride, bias=False), nn.BatchNorm2d(wide)) if stage > 1 else None
            block = torchvision.models.resnet.BasicBlock
            self.add_module(
                f"layer{stage}", nn.Sequential(block(narrow, wide, stride, first), *(block(wide, wide) for _ in range(blocks - 1)))
            )
            narrow = wide

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(images)))
        for stage in (1, 2, 3):
            x = self.get_submodule(f"layer{stage}")(x)
        return x.mean(dim=(2, 3))


@torch.no_grad()
@pytest.mark.parametrize(("name", "blocks"), [("resnet8", 1), ("resnet20", 3)])
def test_relational_with_a_resnet_for_cifar(name: str, blocks: int) -> None:
    pairs, encoder = settled(Pairs()), settled(Stages(blocks))
    checkpoint = {**pairs.checkpoint(), "backbone": encoder.state_dict()}
    model = from_published(checkpoint, "relational")
    assert model.hparams["backbone"] == {"name": name, "in_channels": 3, "stem": "original", "shortcut": "conv"}
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(model.double()(images), encoder.double()(images), rtol=1e-10, atol=1e-10)
    checkpoint["backbone"].pop("layer2.0.downsample.0.weight")
    with pytest.raises(WeightsError, match=rf"lacks backbone.blocks.{blocks}.shortcut.0.weight"):
        from_published(checkpoint, "relational")


# PointNets: name of the linear layer, of its BatchNorm ("" without one), widths.
TNET = (
    ("conv1", "bn1", 0, 64),
    ("conv2", "bn2", 64, 128),
    ("conv3", "bn3", 128, 1024),
    ("fc1", "bn4", 1024, 512),
    ("fc2", "bn5", 512, 256),
)
WHOLE = (("feat.conv1", "feat.bn1", 3, 64), ("feat.conv2", "feat.bn2", 64, 128), ("feat.conv3", "feat.bn3", 128, 1024))
CLOUDS = {
    "classifier": (*WHOLE, ("fc1", "bn1", 1024, 512), ("fc2", "bn2", 512, 256), ("fc3", "", 256, 7)),
    "dense": (*WHOLE, ("conv1", "bn1", 1088, 512), ("conv2", "bn2", 512, 256), ("conv3", "bn3", 256, 128), ("conv4", "", 128, 6)),
    "parts": (
        *(("conv1", "bn1", 3, 64), ("conv2", "bn2", 64, 128), ("conv3", "bn3", 128, 128)),
        *(("conv4", "bn4", 128, 512), ("conv5", "bn5", 512, 2048)),
        *(("convs1", "bns1", 4933, 256), ("convs2", "bns2", 256, 256), ("convs3", "bns3", 256, 128), ("convs4", "", 128, 6)),
    ),
}


def of_clouds(kind: str, transform: bool = True) -> dict[str, Tensor]:
    """A random state; what becomes one number has few digits, so that float32 does not round it."""
    torch.manual_seed(0)
    prefix, wide = ("", 128) if kind == "parts" else ("feat.", 64)
    layers = list(CLOUDS[kind])
    for name, size in [("stn", 3), ("fstn", wide)][: 1 + transform]:
        start = f"{prefix}{name}."
        layers += [(start + linear, start + norm, before or size, after) for linear, norm, before, after in TNET]
        layers.append((f"{start}fc3", "", 256, size * size))
    state = {}
    for linear, norm, before, after in layers:
        weight = torch.randn(after, before) * before**-0.5
        state[f"{linear}.weight"] = weight.unsqueeze(2) if "conv" in linear else weight
        state[f"{linear}.bias"] = torch.randint(-32, 33, (after,)) / 64
        if norm:
            state |= {f"{norm}.weight": torch.rand(after) + 0.5, f"{norm}.bias": torch.randn(after) * 0.3}
            state |= {f"{norm}.running_mean": torch.randint(-32, 33, (after,)) / 64, f"{norm}.running_var": torch.rand(after) + 0.5}
            state[f"{norm}.num_batches_tracked"] = torch.tensor(5)
    return state


def scores_of_clouds(kind: str, state: dict[str, Tensor], points: Tensor, label: Tensor) -> Tensor:
    """Logits `(B, C)`, or `(B, P, N)` of points, in float64."""

    def layer(x: Tensor, linear: str, norm: str, relu: bool = True) -> Tensor:
        x = state[f"{linear}.weight"].double().flatten(1) @ x + state[f"{linear}.bias"].double()[:, None]
        if not norm:
            return x
        scale, shift, mean, var = (state[f"{norm}.{name}"].double()[:, None] for name in ("weight", "bias", "running_mean", "running_var"))
        x = (x - mean) / (var + 1e-5).sqrt() * scale + shift
        return x.clamp_min(0) if relu else x

    def align(x: Tensor, name: str) -> Tensor:
        hidden = x
        for linear, norm, *_ in TNET:
            hidden = hidden.amax(dim=2, keepdim=True) if linear == "fc1" else hidden
            hidden = layer(hidden, f"{name}.{linear}", f"{name}.{norm}")
        matrix = layer(hidden, f"{name}.fc3", "").unflatten(1, (x.shape[1], x.shape[1])).squeeze(3) + torch.eye(x.shape[1])
        return (x.mT @ matrix).mT

    prefix = "" if kind == "parts" else "feat."
    transforms = {3 if kind == "parts" else 1: f"{prefix}fstn"} if f"{prefix}fstn.fc3.weight" in state else {}
    layers = CLOUDS[kind]
    last = 5 if kind == "parts" else 3
    x, local = align(points.mT, f"{prefix}stn"), []
    for place, (linear, norm, *_) in enumerate(layers[:last], start=1):
        x = layer(x, linear, norm, relu=place < last)
        local.append(x)  # yanx27's parts have them from before the transform, the dense network from behind it
        x = align(x, transforms[place]) if place in transforms else x
        if kind == "dense" and place == 1:
            local[0] = x
    x = x.amax(dim=2, keepdim=True)
    if kind != "classifier":
        classes = F.one_hot(label, 5).double().unsqueeze(2)
        cloud = torch.cat([x, classes], dim=1) if kind == "parts" else x
        x = torch.cat([cloud.expand(-1, -1, points.shape[1]), *(local if kind == "parts" else local[:1])], dim=1)
    for linear, norm, *_ in layers[last:]:
        x = layer(x, linear, norm)
    return x.squeeze(2) if kind == "classifier" else x


@torch.no_grad()
@pytest.mark.parametrize("transform", [True, False])
@pytest.mark.parametrize("kind", CLOUDS)
def test_pointnet(kind: str, transform: bool, tmp_path: Path) -> None:
    state = of_clouds(kind, transform)
    checkpoint = {"epoch": 3, "class_acc": np.mean([0.5, 0.25]), "model_state_dict": state, "optimizer_state_dict": {"state": {}}}
    torch.save(checkpoint, tmp_path / "best_model.pth")
    hparams = {"class_names": list("abcdefg")} if kind == "classifier" else {}
    model, card = read_published(tmp_path / "best_model.pth", "pointnet", **hparams)
    assert card["left_out"] == ["class_acc", "epoch", "optimizer_state_dict"]
    assert (model.hparams["variant"], model.hparams["feature_transform"]) == ("compact", transform)
    points, label = torch.randn(3, 20, 3, dtype=torch.float64), torch.tensor([4, 0, 2])
    expected = scores_of_clouds(kind, state, points, label)
    again = from_published(state, "pointnet", **hparams)  # as fxia22 saves it
    if kind == "classifier":
        assert isinstance(model, PointNetClassifier)
        assert model.class_names == list("abcdefg")
        torch.testing.assert_close(again(points.float()), expected.float(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model.double()(points), expected, rtol=1e-10, atol=1e-10)
    else:
        assert isinstance(model, PointNetSegmenter)
        assert "part_classes was not given" in card["note"]
        assert (model.hparams["num_classes"], model.hparams["num_parts"]) == (5 if kind == "parts" else 1, 6)
        torch.testing.assert_close(again(points.float(), label), expected.float(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model.double()(points, label), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        ("classifier", {"feat.conv2.bias": None}, "is not a whole PointNet of this layout: it lacks feat.conv2.bias"),
        ("classifier", {"feat.bn3.running_mean": None}, "it lacks feat.bn3.running_mean"),
        ("classifier", {"feat.fstn.fc3.bias": None}, "lacks backbone.feature_transform.head.1.bias"),
        ("classifier", {"bn2.weight": None}, "lacks head.0.4.weight"),
        ("classifier", {"feat.conv4.weight": torch.zeros(1)}, "no place for: feat.conv4.weight"),
        ("classifier", {"feat.conv1.bias": torch.zeros(3)}, r"feat.conv1.bias is torch.float32 of the shape \(3,\)"),
        ("classifier", {"feat.conv1.bias": torch.zeros(64, dtype=torch.int32)}, "feat.conv1.bias is torch.int32"),
        ("classifier", {"feat.stn.conv1.weight": torch.zeros(64, 6, 1)}, "a PointNet of 6 numbers a point, such as normals"),
        ("classifier", {"fc3.weight": torch.zeros(256)}, r"fc3.weight has the shape \(256,\)"),
        ("dense", {"feat.stn.conv1.weight": torch.zeros(64, 9, 1)}, "a PointNet of 9 numbers a point"),
        ("dense", {"conv1.weight": torch.zeros(512, 1093, 1)}, r"conv1.weight has the shape \(512, 1093, 1\)"),
        ("parts", {"convs1.weight": torch.zeros(256, 4928, 1)}, r"convs1.weight has the shape \(256, 4928, 1\)"),
        ("parts", {"convs1.weight": torch.zeros(8, 4944, 1)}, r"'convs1.weight.\w+' has the shape \(8, \d+(, 1)?\), but \(256,"),
        ("parts", {"convs1.bias": None}, "it lacks convs1.bias"),
        ("parts", {"bns1.running_var": None}, "lacks head.first.0.running_var"),
    ],
)
def test_pointnet_that_does_not_fit(kind: str, change: dict[str, Tensor | None], words: str) -> None:
    state = {key: value for key, value in {**of_clouds(kind), **change}.items() if value is not None}
    with pytest.raises(WeightsError, match=words) as raised:
        from_published(state, "pointnet")
    assert "\n" not in str(raised.value)


def test_parts_of_the_classes() -> None:
    classes = [0, 1, 2, 3, 4, 4]
    model = from_published(of_clouds("parts"), "pointnet", part_classes=classes, class_names=list("abcde"))
    found = model.predict(torch.randn(2, 30, 3), torch.tensor([4, 1]))  # type: ignore[operator]  # `predict` of a model of unknown class
    assert set(found[0].tolist()) <= {4, 5}
    assert set(found[1].tolist()) == {1}


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"])
def test_depth_is_told_by_the_blocks(name: str) -> None:
    with torch.device("meta"):
        state = getattr(torchvision.models, name)().state_dict()
    assert resnet_hparams(state, "") == {"backbone": {"name": name, "stem": "original"}, "in_channels": 3, "image_size": None}


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_float32(pairs: Pairs, dtype: torch.dtype) -> None:
    expected = pairs.encoder.get_submodule("layer2").conv.weight.to(dtype).float()
    model = from_published(pairs.to(dtype).checkpoint(), "relational")
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert torch.equal(model.backbone.layers[4].weight, expected)


def test_files_older_than_the_counter_of_batches(pairs: Pairs) -> None:
    checkpoint = pairs.checkpoint()
    for part in ("backbone", "relation"):
        checkpoint[part] = {key: value for key, value in checkpoint[part].items() if not key.endswith("num_batches_tracked")}
    assert from_published(checkpoint, "relational").relation.norm.num_batches_tracked == 0


def test_a_model_does_not_share_memory_with_the_checkpoint(pairs: Pairs) -> None:
    checkpoint = pairs.checkpoint()
    model = from_published(checkpoint, "relational")
    checkpoint["relation"]["linear2.bias"].fill_(3.0)
    assert model.relation.last.bias.item() != 3.0


def test_safetensors(pairs: Pairs, tmp_path: Path) -> None:
    checkpoint = pairs.checkpoint()
    state = {f"{part}.{key}": value for part in ("backbone", "relation") for key, value in checkpoint[part].items()}
    safetensors.torch.save_file(state, tmp_path / "conv4.safetensors")
    model, card = read_published(tmp_path / "conv4.safetensors", "relational")
    assert torch.equal(model.relation.last.weight, pairs.head.linear2.weight)
    assert card["left_out"] == []


# Checkpoints of something else


def without(part: str, key: str) -> Callable[[State], Any]:
    return lambda checkpoint: checkpoint[part].pop(key)


def put(part: str, key: str, value: Any) -> Callable[[State], Any]:
    return lambda checkpoint: checkpoint[part].update({key: value})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without("backbone", "layer3.bn.running_var"), "lacks backbone.layers.9.running_var"),
        (without("relation", "linear2.bias"), "lacks relation.last.bias"),
        (without("relation", "linear1.weight"), "it has no relation.0.weight"),
        (put("backbone", "layer5.conv.weight", torch.zeros(1)), "no place for: backbone.layer5.conv.weight"),
        (put("relation", "linear1.scale", torch.zeros(1)), "holds besides relation.linear1.scale"),
        (put("backbone", "layer2.conv.weight", torch.zeros(16, 8, 5, 5)), r"\(16, 8, 5, 5\), but \(16, 8, 3, 3\)"),
        (put("relation", "linear2.weight", torch.zeros(1, 24, dtype=torch.int8)), "torch.int8, which is no floating-point"),
        (put("relation", "linear2.weight", torch.zeros(1, 24, dtype=torch.complex64)), "torch.complex64, which is no floating-point"),
        (put("relation", "bn1.num_batches_tracked", torch.tensor(1.0)), "torch.float32, which is no integer"),
        (put("relation", "linear1.weight", torch.zeros(128)), r"relation.linear1.weight has the shape \(128,\)"),
        (put("relation", "linear2.weight", [0.0] * 24), "must be a dense tensor, it is a list"),
        (put("relation", "linear2.weight", torch.zeros(1, 24).to_sparse()), "must be a dense tensor"),
        (put("relation", "linear2.weight", torch.zeros(1, 24, device="meta")), "must be a dense tensor"),
        (put("relation", "linear1.weight", torch.zeros(1).expand(1 << 40, 128)), "fewer numbers than that are stored"),
        (put("relation", "module.linear1.bias", torch.zeros(24)), "holds 'relation.linear1.bias' twice"),
        (put("relation", "0.bias", torch.zeros(24)), "both 'relation.linear1.bias' and 'relation.0.bias'"),
        (put("relation", "a\n\x1b[2J", torch.zeros(1)), r"named like no layer, 'relation\.a\\n\\x1b\[2J'"),
        (lambda checkpoint: checkpoint.pop("relation"), "save both"),
        (lambda checkpoint: checkpoint.clear(), "holds no tensors of a network, only nothing"),
    ],
)
def test_state_that_does_not_fit(pairs: Pairs, change: Callable[[State], Any], words: str) -> None:
    checkpoint = pairs.checkpoint()
    for part in ("backbone", "relation"):
        checkpoint[part] = dict(checkpoint[part])
    change(checkpoint)
    with pytest.raises(WeightsError, match=words) as raised:
        from_published(checkpoint, "relational")
    assert "\n" not in str(raised.value)


def test_other_networks(pairs: Pairs) -> None:
    conv = torch.zeros(16, 3, 3, 3)
    uneven = {"conv1.weight": conv} | {f"layer{stage}.{block}.conv1.weight": conv for stage in (1, 2, 3) for block in range(stage)}
    head = {f"linear{layer}.weight": torch.zeros(24, 128) for layer in (1, 2)}
    for checkpoint, layout, words in (
        ({"backbone": uneven, "relation": head}, "relational", r"has no Conv-4, ResNet-8.*its stages have \(1, 2, 3, 0\) blocks"),
        ({"feat.stn.conv1.weight": torch.zeros(64, 3, 1)}, "supcontrast", "holds a PointNet, which is of the layout pointnet"),
        ({"sa1.mlp_convs.0.weight": conv}, "pointnet", r"it has no feat.stn.conv1.weight, but sa1.mlp_convs.0.weight"),
        ({"fc.weight": torch.zeros(16, 512)}, "lemniscate", r"its stages have \(0, 0, 0, 0\) blocks"),
        (pairs.checkpoint(), "lemniscate", "it has no linear.weight"),
        ({"model": {"a": conv}, "net": {"a": conv}}, "supcontrast", "several states, model and net"),
        ({"epoch": 3, "opt\n": {}}, "supcontrast", r"only 'opt\\n', epoch"),
        (pairs.checkpoint(), "moco", "no layout 'moco'; there are lemniscate, supcontrast, relational, pointnet"),
    ):
        with pytest.raises(WeightsError, match=words):
            from_published(checkpoint, layout)  # type: ignore[arg-type]  # a wrong name, on purpose


def test_hyper_parameters(pairs: Pairs) -> None:
    assert from_published(pairs.checkpoint(), "relational", focal_gamma=0.0).hparams["focal_gamma"] == 0
    for hparams, words in (
        ({"gamma": 1}, "unexpected keyword"),
        ({"hidden_dim": 10**9}, r"but \(1000000000, 128\)"),
        ({"image_size": 4}, "4 x 4 pixels"),
    ):
        with pytest.raises(WeightsError, match=words):
            from_published(pairs.checkpoint(), "relational", **hparams)
    state = torchvision.models.resnet18(num_classes=16).state_dict()
    with pytest.raises(WeightsError, match=r"does not hold its memory bank.*give num_train"):
        from_published(state, "lemniscate")
    assert from_published(state, "lemniscate", num_train=50).hparams["num_train"] == 50


# Files that are hostile, or broken


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_code_in_a_file_does_not_run(pairs: Pairs, tmp_path: Path, form: str) -> None:
    file, trace = tmp_path / "last.pth", tmp_path / "trace"
    checkpoint = {**pairs.checkpoint(), "extra": Bomb(trace)}
    if form == "pickle":
        file.write_bytes(pickle.dumps(checkpoint))
    else:
        torch.save(checkpoint, file, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(WeightsError, match=r"without running code|could run code") as raised:
        read_published(file, "relational")
    assert "save its state_dict() alone by torch.save" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not trace.exists()


def test_packed_archives_are_not_unpacked(pairs: Pairs, tmp_path: Path) -> None:
    whole, packed = io.BytesIO(), tmp_path / "last.pth"
    torch.save({**pairs.checkpoint(), "zeros": torch.zeros(1_000_000)}, whole)
    with zipfile.ZipFile(whole) as archive, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as other:
        for entry in archive.infolist():
            other.writestr(entry.filename, archive.read(entry))
    with pytest.raises(WeightsError, match=r"packed archive, of 4 MB in 0\.1 MB"):
        read_published(packed, "relational")


def test_broken_files(pairs: Pairs, tmp_path: Path) -> None:
    file = tmp_path / "last.pth"
    torch.save(pairs.checkpoint(), file)
    whole = file.read_bytes()
    torch.save(pairs.checkpoint(), file, _use_new_zipfile_serialization=False)
    legacy = file.read_bytes()
    for content in (whole[:-1000], whole[:1000], whole[:4], legacy[:-1000], legacy[:50], b"text", b"\x80"):
        file.write_bytes(content)
        with pytest.raises(WeightsError, match=r"last\.pth is damaged, or cannot be opened without running code") as raised:
            read_published(file, "relational")
        assert "\n" not in str(raised.value)
    for content, words in ((b"", "is empty"), (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer")):
        file.write_bytes(content)
        with pytest.raises(WeightsError, match=words):
            read_published(file, "relational")
    torch.save([1, 2], file)
    with pytest.raises(WeightsError, match="holds a list"):
        read_published(file, "relational")
    (tmp_path / "a.safetensors").write_bytes(b"\xff" * 16)
    with pytest.raises(WeightsError, match=r"a\.safetensors is not a whole safetensors file"):
        read_published(tmp_path / "a.safetensors", "relational")
    with pytest.raises(WeightsError, match="does not exist"):
        read_published(tmp_path / "nowhere.pth", "relational")


# litzoo import


def test_command(pairs: Pairs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, output = tmp_path / "conv4.tar", tmp_path / "conv4.safetensors"
    torch.save(pairs.checkpoint(), file)
    settings = json.dumps({"image_size": 32, "image_mean": [0.5] * 3, "image_std": [0.25] * 3})
    arguments = ["import", str(file), "--layout", "relational", "--hparams", settings]
    assert main([*arguments, "--full-precision"]) == 0
    text = capsys.readouterr().out
    assert f"left out of {file}: optimizer" in text
    assert f"litzoo.load({str(output)!r})" in text
    model = load(output)
    raw = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        expected = pairs.encoder((raw - 0.5) / 0.25).flatten(1)
    torch.testing.assert_close(model.embed(raw), expected, rtol=1e-4, atol=1e-5)  # type: ignore[operator]  # `embed` of a model of unknown class

    assert main(arguments) == 2
    assert "exists already" in capsys.readouterr().err
    other = ["--output", str(tmp_path / "other.safetensors")]
    for wrong, words in (
        (["--hparams", "{"], "is not JSON"),
        (["--hparams", "[]"], "JSON object"),
        (["--hparams", '{"layout": 1}'], "unexpected"),
    ):
        assert main([*arguments, *other, *wrong]) == 2
        assert words in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*arguments, *other, "--layout", "moco"])
    assert "lemniscate" in capsys.readouterr().err
