"""The layouts of published checkpoints: what a state says of its network, and where each of its tensors goes in litzoo's model.

- "lemniscate" (zhirongw/lemniscate.pytorch), ResNets for ImageNet or CIFAR -> `InstanceDiscrimination`;
- "supcontrast" (HobbitLong/SupContrast), `SupConResNet` -> `SupConEncoder`, `SupCEResNet` -> `ImageClassifier`;
- "relational" (mpatacchiola/self-supervised-relational-reasoning), Conv-4, ResNet-8, 32, 56 and 34 with their head
  -> `RelationalReasoning`;
- "pointnet" (yanx27/Pointnet_Pointnet2_pytorch and fxia22/pointnet.pytorch, which call the layers alike), the PointNets for clouds
  of three coordinates: classifiers -> `PointNetClassifier`, yanx27's part and fxia22's dense segmentation -> `PointNetSegmenter`,
  all of the variant "compact". Their outputs are log-probabilities, litzoo's are logits: equal after a log-softmax. Their biases before
  a BatchNorm become part of its running mean. Their classifiers drop out before the last BatchNorm, litzoo's behind it: the same
  outputs, but another training. yanx27's parts and classes are in the order of `ShapeNetPartDataModule`.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .backbones import CIFAR_RESNETS
from .safe_reading import WeightsError, few_names

Layout = Literal["lemniscate", "supcontrast", "relational", "pointnet"]
Rules = tuple[tuple[str, str], ...]


class Plan(NamedTuple):
    """What becomes of a published state.

    Attributes:
        model: name of litzoo's model.
        hparams: what the shapes say.
        rules: published key -> litzoo's.
        made: tensors of litzoo's that the publication has none for.
        note: what to know about them.
        state: the published tensors in the form that the rules are about, where it is another.
    """

    model: str
    hparams: dict[str, Any]
    rules: Rules
    made: dict[str, Tensor]
    note: str
    state: Mapping[str, Tensor] | None = None


# What layouts share


def _matrix(state: Mapping[str, Tensor], key: str, dim: int = 2) -> Tensor:
    """A weight that sizes are read from; of a convolution over points, `dim` is 3."""
    if key not in state:
        raise WeightsError(f"is not of this layout: it has no {key}, but {few_names(state)}")
    if state[key].dim() != dim:
        raise WeightsError(f"is not of this layout: {key} has the shape {tuple(state[key].shape)}")
    return state[key]


def _inside(prefix: str, rules: Rules) -> Rules:
    return tuple((rf"{re.escape(prefix)}\.{old}", new) for old, new in rules)


# Images

# Published key -> litzoo's.
_RESNET: Rules = (
    (r"((?:conv1|bn1)\.\w+)", r"backbone.network.\1"),
    (r"(layer[1-4]\.\d+\.(?:conv|bn)[123]\.\w+)", r"backbone.network.\1"),
    (r"(layer[1-4]\.\d+)\.(?:downsample|shortcut)\.([01]\.\w+)", r"backbone.network.\1.downsample.\2"),
)
_CONV4: Rules = tuple(
    (rf"layer{block}\.(?:{layer})\.(\w+)", rf"backbone.layers.{4 * block - 4 + place}.\1")
    for block in (1, 2, 3, 4)
    for place, layer in enumerate(("conv|0", "bn|1"))
)
_RELATION: Rules = (
    (r"(?:linear1|0)\.(\w+)", r"relation.first.\1"),
    (r"(?:bn1|1)\.(\w+)", r"relation.norm.\1"),
    (r"(?:linear2|3)\.(\w+)", r"relation.last.\1"),
)

# Blocks of each stage, and whether they are bottlenecks.
_RESNETS: dict[tuple[tuple[int, ...], bool], str] = {
    ((2, 2, 2, 2), False): "resnet18",
    ((3, 4, 6, 3), False): "resnet34",
    ((3, 4, 6, 3), True): "resnet50",
    ((3, 4, 23, 3), True): "resnet101",
    ((3, 8, 36, 3), True): "resnet152",
}


def _lemniscate(state: Mapping[str, Tensor], checkpoint: Mapping[str, Any], hparams: Mapping[str, Any]) -> Plan:
    projection = _matrix(state, "fc.weight" if "fc.weight" in state else "linear.weight")
    settings = {**resnet_hparams(state, ""), "embedding_dim": len(projection)}
    rows = _bank_rows(checkpoint.get("lemniscate"))
    if rows is not None:
        settings["num_train"] = rows
    elif "num_train" not in hparams:
        raise WeightsError("does not hold its memory bank, which would tell how many images it was trained on: give num_train")
    return Plan("InstanceDiscrimination", settings, (*_RESNET, (r"(?:fc|linear)\.(weight|bias)", r"projection.\1")), {}, "")


def _bank_rows(bank: Any) -> int | None:
    """Rows of a published memory bank: of a module, of its stand-in, or of its state dict."""
    contents = getattr(bank, "contents", bank)
    buffers = contents.get("_buffers", contents) if isinstance(contents, Mapping) else getattr(contents, "_buffers", None)
    memory = buffers.get("memory") if isinstance(buffers, Mapping) else None
    return len(memory) if isinstance(memory, Tensor) and memory.dim() == 2 else None


def _supcontrast(state: Mapping[str, Tensor], checkpoint: Mapping[str, Any], hparams: Mapping[str, Any]) -> Plan:
    encoder, settings = _inside("encoder", _RESNET), resnet_hparams(state, "encoder.")
    if "fc.weight" in state:
        settings["num_classes"] = len(_matrix(state, "fc.weight"))
        return Plan("ImageClassifier", settings, (*encoder, (r"fc\.(weight|bias)", r"head.\1")), {}, "")
    linear = "head.weight" in state
    last = _matrix(state, "head.weight" if linear else "head.2.weight")
    settings["embedding_dim"] = len(last)
    if not linear:
        settings["hidden_dim"] = last.shape[1]
        return Plan("SupConEncoder", settings, (*encoder, (r"head\.([02]\.(?:weight|bias))", r"projection.\1")), {}, "")
    # Features are means of what a ReLU gave, so that the ReLU between both layers changes nothing.
    width = _width(state, "encoder.")
    made = {"projection.0.weight": torch.eye(width), "projection.0.bias": torch.zeros(width)}
    note = "the published head is one linear layer: the first layer of the projection head is the identity"
    return Plan("SupConEncoder", settings, (*encoder, (r"head\.(weight|bias)", r"projection.2.\1")), made, note)


def _relational(state: Mapping[str, Tensor], checkpoint: Mapping[str, Any], hparams: Mapping[str, Any]) -> Plan:
    prefix, head = (
        next((name for name in names if any(key.startswith(f"{name}.") for key in state)), "")
        for names in (("backbone", "net.feature_extractor"), ("relation", "relation_module", "relation_head"))
    )
    if not prefix or not head:
        raise WeightsError(
            "is not an encoder together with its relation head: save both, torch.save({'backbone': ..., 'relation': ...}, FILE)"
        )
    first = _matrix(state, f"{head}.linear1.weight" if f"{head}.linear1.weight" in state else f"{head}.0.weight")
    if any(re.match(rf"{re.escape(prefix)}\.layer4\.(?:conv|0)\.weight$", key) for key in state):
        name = f"{prefix}.layer1.conv.weight"
        conv = state.get(name, state.get(f"{prefix}.layer1.0.weight"))
        channels = conv.shape[1] if conv is not None and conv.dim() == 4 else 3
        settings: dict[str, Any] = {"backbone": {"name": "conv4"}, "in_channels": channels, "image_size": None}
        rules, width = _inside(prefix, _CONV4), 64
    elif not any(key.startswith(f"{prefix}.layer4.") for key in state):
        settings, rules = _cifar_resnet(state, prefix)
        width = 64
    else:
        settings, rules = resnet_hparams(state, f"{prefix}."), _inside(prefix, _RESNET)
        width = _width(state, f"{prefix}.")
    settings["hidden_dim"] = len(first)
    if first.shape[1] == 2 * width:
        settings["aggregation"] = "cat"
    elif "aggregation" not in hparams:
        raise WeightsError(
            "has a relation head on the sum, the mean or the maximum of two features, and does not say which: give aggregation"
        )
    return Plan("RelationalReasoning", settings, (*rules, *_inside(head, _RELATION)), {}, "")


def _blocks(state: Mapping[str, Tensor], prefix: str) -> tuple[int, ...]:
    """Blocks of each of four stages."""
    places = [key.removeprefix(prefix).split(".") for key in state if key.startswith(f"{prefix}layer")]
    return tuple(len({place[1] for place in places if place[0] == f"layer{stage}"}) for stage in (1, 2, 3, 4))


def _cifar_resnet(state: Mapping[str, Tensor], prefix: str) -> tuple[dict[str, Any], Rules]:
    """Hyper-parameters and rules of an encoder that is a ResNet of three stages, with convolutions as shortcuts."""
    blocks = _blocks(state, f"{prefix}.")
    name = next((name for name, depth in CIFAR_RESNETS.items() if blocks == (*[(depth - 2) // 6] * 3, 0)), None)
    first = state.get(f"{prefix}.conv1.weight")
    if name is None or first is None or first.dim() != 4:
        raise WeightsError(f"has no Conv-4, ResNet-8, 20, 32, 56 or 34 under {prefix}: its stages have {blocks} blocks")
    rules = [(r"((?:conv1|bn1)\.\w+)", r"backbone.\1")]
    for place in range(sum(blocks)):
        stage, block = divmod(place, blocks[0])
        rules += [
            (rf"layer{stage + 1}\.{block}\.((?:conv|bn)[12]\.\w+)", rf"backbone.blocks.{place}.\1"),
            (rf"layer{stage + 1}\.{block}\.downsample\.([01]\.\w+)", rf"backbone.blocks.{place}.shortcut.\1"),
        ]
    settings = {"backbone": {"name": name, "shortcut": "conv"}, "in_channels": first.shape[1], "image_size": None}
    return settings, _inside(prefix, tuple(rules))


def resnet_hparams(state: Mapping[str, Tensor], prefix: str) -> dict[str, Any]:
    """Hyper-parameters of a model whose encoder is a ResNet, from its blocks and the kernel of its first convolution."""
    blocks = _blocks(state, prefix)
    name = _RESNETS.get((blocks, f"{prefix}layer1.0.conv3.weight" in state))
    first = state.get(f"{prefix}conv1.weight")
    if name is None or first is None or first.dim() != 4:
        raise WeightsError(f"has no ResNet-18, 34, 50, 101 or 152 under {prefix or 'its keys'}: its stages have {blocks} blocks")
    stem = "small" if first.shape[2] == 3 else "original"
    return {"backbone": {"name": name, "stem": stem}, "in_channels": first.shape[1], "image_size": None}


def _width(state: Mapping[str, Tensor], prefix: str) -> int:
    """Features of a ResNet: of bottlenecks four times as many."""
    return 2048 if f"{prefix}layer1.0.conv3.weight" in state else 512


# PointNets

# Linear layer, its BatchNorm -> litzoo's linear layer, behind which its BatchNorm follows.
_Layers = tuple[tuple[str, str, str], ...]
_TNET: _Layers = (
    ("conv1", "bn1", "points.0"),
    ("conv2", "bn2", "points.3"),
    ("conv3", "bn3", "points.6"),
    ("fc1", "bn4", "head.0.0"),
    ("fc2", "bn5", "head.0.3"),
)
_BACKBONE: _Layers = (
    ("feat.conv1", "feat.bn1", "backbone.local.0"),
    ("feat.conv2", "feat.bn2", "backbone.wide.0"),
    ("feat.conv3", "feat.bn3", "backbone.wide.3"),
)
_CLASSIFIER: _Layers = (("fc1", "bn1", "head.0.0"), ("fc2", "bn2", "head.0.3"))
_PART_BACKBONE: _Layers = (
    ("conv1", "bn1", "backbone.local.0.0"),
    ("conv2", "bn2", "backbone.local.1.0"),
    ("conv3", "bn3", "backbone.local.2.0"),
    ("conv4", "bn4", "backbone.wide.0.0"),
    ("conv5", "bn5", "backbone.wide.1.0"),
)


def _pointnet(state: Mapping[str, Tensor], checkpoint: Mapping[str, Any], hparams: Mapping[str, Any]) -> Plan:
    has_classes = "convs1.weight" in state  # the network of parts, which knows the object's class
    prefix = "" if has_classes else "feat."
    channels = _matrix(state, f"{prefix}stn.conv1.weight", 3).shape[1]
    if channels != 3:
        raise WeightsError(
            f"has a PointNet of {channels} numbers a point, such as normals or colours; litzoo's takes the 3 coordinates alone"
        )
    layers = list(_PART_BACKBONE if has_classes else _BACKBONE)
    lasts = {}
    for name, own in ((f"{prefix}stn", "backbone.input_transform"), (f"{prefix}fstn", "backbone.feature_transform")):
        if any(key.startswith(f"{name}.") for key in state):
            layers += [(f"{name}.{linear}", f"{name}.{norm}", f"{own}.{place}") for linear, norm, place in _TNET]
            lasts[f"{name}.fc3"] = f"{own}.head.1"
    settings: dict[str, Any] = {"variant": "compact", "feature_transform": f"{prefix}fstn.fc3" in lasts}
    if not has_classes and "conv4.weight" not in state:
        layers += _CLASSIFIER
        lasts["fc3"] = "head.2"
        settings["num_classes"] = len(_matrix(state, "fc3.weight"))
        return Plan("PointNetClassifier", settings, _linear_rules(layers, lasts), {}, "", _without_biases(state, layers))

    conv, norm = ("convs", "bns") if has_classes else ("conv", "bn")
    layers += [(f"{conv}2", f"{norm}2", "head.second.0.0"), (f"{conv}3", f"{norm}3", "head.last.0.0")]
    lasts[f"{conv}4"] = "head.last.1"
    parts = len(_matrix(state, f"{conv}4.weight", 3))
    # Columns of its first layer: the cloud's features, its class, then the features of the point.
    cloud, local = (2048, (64, 128, 128, 512, 2048)) if has_classes else (1024, (64,))
    first = _matrix(state, f"{conv}1.weight", 3)
    classes = first.shape[1] - cloud - sum(local)
    if (classes < 1 if has_classes else classes != 0) or first.shape[2] != 1:
        raise WeightsError(f"is not of this layout: {conv}1.weight has the shape {tuple(first.shape)}")
    settings |= {"network": "part", "num_classes": classes} if has_classes else {"network": "semantic", "num_classes": 1}
    settings |= {"num_parts": parts, "part_classes": [-1] * parts, "class_input": has_classes, "dropout": 0.0}
    split = _without_biases(state, [*layers, (f"{conv}1", f"{norm}1", "")])
    by_cloud, *by_point = split.pop(f"{conv}1.weight").split([cloud + classes, *local], dim=1)
    split |= {f"{conv}1.weight.{place}": columns for place, columns in enumerate(by_point)}
    split[f"{conv}1.weight.cloud"] = by_cloud.squeeze(2)
    rules = (
        *_linear_rules(layers, lasts),
        (rf"{conv}1\.weight\.(\d)", r"head.from_local.\1.weight"),
        (rf"{conv}1\.weight\.cloud", "head.from_cloud.weight"),
        (rf"{norm}1\.(\w+)", r"head.first.0.\1"),
    )
    note = "" if "part_classes" in hparams else "part_classes was not given: every part may occur in every class"
    return Plan("PointNetSegmenter", settings, rules, {}, note, split)


def _linear_rules(layers: Iterable[tuple[str, str, str]], lasts: Mapping[str, str]) -> Rules:
    """Of layers with a BatchNorm, and of those without."""
    rules = [(rf"{re.escape(linear)}\.(weight|bias)", rf"{own}.\1") for linear, own in lasts.items()]
    for linear, norm, own in layers:
        parent, _, place = own.rpartition(".")
        rules += [
            (rf"{re.escape(linear)}\.(weight)", rf"{own}.\1"),
            (rf"{re.escape(norm)}\.(\w+)", rf"{parent}.{int(place) + 1}.\1"),
        ]
    return tuple(rules)


def _without_biases(state: Mapping[str, Tensor], layers: Iterable[tuple[str, str, str]]) -> dict[str, Tensor]:
    """The state without the biases before BatchNorms: BatchNorm(W x + b) with the mean m is that of W x with the mean m - b."""
    found = dict(state)
    for linear, norm, _ in layers:
        names = f"{linear}.bias", f"{norm}.running_mean"
        missing = [name for name in names if name not in state]
        if missing:
            raise WeightsError(f"is not a whole PointNet of this layout: it lacks {few_names(missing)}")
        bias, mean = found.pop(names[0]), state[names[1]]
        if bias.shape != mean.shape or not bias.is_floating_point() or not mean.is_floating_point():
            raise WeightsError(
                f"is not of this layout: {names[0]} is {bias.dtype} of the shape {tuple(bias.shape)}, "
                f"{names[1]} is {mean.dtype} of the shape {tuple(mean.shape)}"
            )
        found[names[1]] = mean.double() - bias.double()
    return found


# State without wrappers, the whole checkpoint and the hyper-parameters that were given -> plan; errors go behind the name of the file.
PLANS: dict[str, Callable[[Mapping[str, Tensor], Mapping[str, Any], Mapping[str, Any]], Plan]] = {
    "lemniscate": _lemniscate,
    "supcontrast": _supcontrast,
    "relational": _relational,
    "pointnet": _pointnet,
}
