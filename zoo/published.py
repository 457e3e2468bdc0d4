"""Published checkpoints: weights that other repositories trained become litzoo's models, key by key. Nothing here runs code of a file.

Layouts, each read as its repository saves it:

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

import importlib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, get_args

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from .. import __version__, zoo
from .backbones import CIFAR_RESNETS
from .pretrained import construct, is_training_state
from .safe_reading import WeightsError, WeightsFile, first_bytes, load_torch_file, one_line, open_safetensors

Layout = Literal["lemniscate", "supcontrast", "relational", "pointnet"]
_Rules = tuple[tuple[str, str], ...]

# Where checkpoints keep the state of the network.
_NESTS = ("state_dict", "model_state_dict", "model", "net", "backbone")
_PARTS = ("backbone", "relation")  # of the layout relational, which keeps the encoder and its head apart
# Wrappers, which put their name into the keys of what they hold.
_WRAPPERS = ("module", "_orig_mod")
# Classes whose objects lie in published checkpoints beside the state; they are read as lifeless stand-ins, whatever they are.
_BYSTANDERS = (
    "argparse.Namespace",
    "lib.LinearAverage.LinearAverage",
    "lib.NCEAverage.NCEAverage",
    "lib.alias_multinomial.AliasMethod",
    # Scores that nobody turned into plain numbers.
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
)
# Blocks of each stage, and whether they are bottlenecks.
_RESNETS: dict[tuple[tuple[int, ...], bool], str] = {
    ((2, 2, 2, 2), False): "resnet18",
    ((3, 4, 6, 3), False): "resnet34",
    ((3, 4, 6, 3), True): "resnet50",
    ((3, 4, 23, 3), True): "resnet101",
    ((3, 8, 36, 3), True): "resnet152",
}

# Published key -> litzoo's.
_RESNET: _Rules = (
    (r"((?:conv1|bn1)\.\w+)", r"backbone.network.\1"),
    (r"(layer[1-4]\.\d+\.(?:conv|bn)[123]\.\w+)", r"backbone.network.\1"),
    (r"(layer[1-4]\.\d+)\.(?:downsample|shortcut)\.([01]\.\w+)", r"backbone.network.\1.downsample.\2"),
)
_CONV4: _Rules = tuple(
    (rf"layer{block}\.(?:{layer})\.(\w+)", rf"backbone.layers.{4 * block - 4 + place}.\1")
    for block in (1, 2, 3, 4)
    for place, layer in enumerate(("conv|0", "bn|1"))
)
_RELATION: _Rules = (
    (r"(?:linear1|0)\.(\w+)", r"relation.first.\1"),
    (r"(?:bn1|1)\.(\w+)", r"relation.norm.\1"),
    (r"(?:linear2|3)\.(\w+)", r"relation.last.\1"),
)


# PointNets: linear layer, its BatchNorm -> litzoo's linear layer, behind which its BatchNorm follows.
_Layers = tuple[tuple[str, str, str], ...]
_TNET: _Layers = (
    ("conv1", "bn1", "points.0"),
    ("conv2", "bn2", "points.3"),
    ("conv3", "bn3", "points.6"),
    ("fc1", "bn4", "head.0.0"),
    ("fc2", "bn5", "head.0.3"),
)
_WHOLE_CLOUDS: _Layers = (
    ("feat.conv1", "feat.bn1", "backbone.local.0"),
    ("feat.conv2", "feat.bn2", "backbone.wide.0"),
    ("feat.conv3", "feat.bn3", "backbone.wide.3"),
)
_CLASSIFIER: _Layers = (("fc1", "bn1", "head.0.0"), ("fc2", "bn2", "head.0.3"))
_PARTS_OF_CLOUDS: _Layers = (
    ("conv1", "bn1", "backbone.local.0.0"),
    ("conv2", "bn2", "backbone.local.1.0"),
    ("conv3", "bn3", "backbone.local.2.0"),
    ("conv4", "bn4", "backbone.wide.0.0"),
    ("conv5", "bn5", "backbone.wide.1.0"),
)


class _Bystander:
    """Stands in for an object that lies in a checkpoint: it keeps the object's contents, and has none of its behaviour."""

    def __new__(cls, *arguments: Any, **settings: Any) -> Self:
        return super().__new__(cls)

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        self.contents: Any = None

    def __setstate__(self, contents: Any) -> None:
        self.contents = contents


class _Plan(NamedTuple):
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
    rules: _Rules
    made: dict[str, Tensor]
    note: str
    state: Mapping[str, Tensor] | None = None


def from_published(checkpoint: Mapping[str, Any], layout: Layout, /, **hparams: Any) -> LightningModule:
    """Make a model of a checkpoint that another repository's code trained, with the same outputs.

    Wrappers' prefixes (`module.`) and the nests of checkpoints (`state_dict`, `model`, `net`, ...) are looked through; sizes follow from
    shapes. Every tensor of the published network is used and every one of the model is filled, or there is an error.

    Args:
        checkpoint: what `torch.load(file, weights_only=True)` gives, or the state dict alone; tensors of any floating-point type.
        layout: "lemniscate", "supcontrast", "relational" or "pointnet": the repository, see the head of this file.
        hparams: hyper-parameters of the model that no shape tells, such as `image_size`, `image_mean` and `image_std`, with which
            `embed` and `predict` prepare raw images; `num_train` of an `InstanceDiscrimination` without its bank; the
            `aggregation` of a relation head that does not concatenate; or `class_names`, and `part_classes` of a `PointNetSegmenter`
            (without it, every part may occur in every class).

    Returns:
        The model in evaluation mode, float32.

    Raises:
        WeightsError: if there is no such layout, or the checkpoint does not fit it.

    Example:
        >>> checkpoint = torch.load("last.pth", weights_only=True)
        >>> model = from_published(checkpoint, "supcontrast", image_size=32)
    """
    return _convert(checkpoint, layout, hparams, "the checkpoint")[0]


def read_published(path: str | os.PathLike[str], layout: Layout, /, **hparams: Any) -> tuple[LightningModule, dict[str, Any]]:
    """Read a published checkpoint like `from_published`, without running code that the file may hold, and describe it for `save`.

    Args:
        path: a file of `torch.save`, or a `.safetensors` file of the same keys.
        layout: see `from_published`.
        hparams: see `from_published`.

    Returns:
        The model in evaluation mode, and the card: `summary`, `source` (file name), `layout`, `litzoo` (version), `left_out` (entries of
        the file that are no part of the model) and, where there is something to know, `note`.

    Raises:
        WeightsError: if the file is missing, damaged, packed, or holds what only its own code can open; and as `from_published`.

    Example:
        >>> model, card = read_published("last.pth", "supcontrast", image_size=32)
        >>> litzoo.save(model, "supcon.safetensors", card)
    """
    file = WeightsFile(Path(path).expanduser(), os.fspath(path), "copy it again")
    model, left_out, note = _convert(_read(file), layout, hparams, file.label)
    card: dict[str, Any] = {
        "summary": f"{type(model).__name__} of {file.path.name}, a published checkpoint of the layout {layout}",
        "source": file.path.name,
        "layout": layout,
        "litzoo": __version__,
        "left_out": left_out,
    }
    return model, {**card, "note": note} if note else card


def _read(file: WeightsFile) -> Mapping[str, Any]:
    first_bytes(file)
    if file.path.suffix == ".safetensors":
        with open_safetensors(file) as opened:
            return {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - it is not a dict
    plain = "where you trust it, open it there with its own code and save its state_dict() alone by torch.save"
    file = file._replace(cure=f"{file.cure}, or {plain}")
    stand_ins = [(_Bystander, name) for name in _BYSTANDERS]
    checkpoint = load_torch_file(file, "is damaged, or cannot be opened without running code", plain, stand_ins)
    if not isinstance(checkpoint, Mapping):
        raise WeightsError(f"{file.label} holds a {type(checkpoint).__name__}, not the state dict of a network")
    return checkpoint


def _convert(checkpoint: Mapping[str, Any], layout: str, hparams: Mapping[str, Any], label: str) -> tuple[LightningModule, list[str], str]:
    """The model, the names of what was left out, and the note."""
    if layout not in get_args(Layout):
        raise WeightsError(f"there is no layout {layout!r}; there are {', '.join(get_args(Layout))}")
    state, left_out = _published_state(checkpoint, layout, label)
    if layout != "pointnet" and any("stn" in key.split(".") for key in state):
        raise WeightsError(f"{label} holds a PointNet, which is of the layout pointnet, not {layout}")
    try:
        plan = _PLANS[layout](state, checkpoint, hparams)
    except WeightsError as error:
        raise WeightsError(f"{label} {error}") from None
    named = _renamed(state if plan.state is None else plan.state, plan, label)
    settings = {**plan.hparams, **hparams}
    # Whatever is imported in there would make its constants there, and for the whole process.
    importlib.import_module("timm")
    getattr(zoo, plan.model)
    try:
        with torch.device("meta"):  # no memory, and no work, for what may not fit
            outline = construct(plan.model, settings)
    except (TypeError, ValueError, RuntimeError) as error:
        raise WeightsError(f"{label}: no {plan.model} can be built with these hyper-parameters ({one_line(error, 300)})") from error
    wanted = {key: value for key, value in outline.state_dict().items() if not is_training_state(key)}
    kept = {"log_partition", *(key for key in wanted if key.endswith("num_batches_tracked"))}  # old files have no such counter
    filled = {*named, *plan.made, *kept}
    missing = [key for key in wanted if key not in filled]
    surplus = [name for key, (name, _) in named.items() if key not in wanted]
    if missing or surplus:
        faults = [f"{text} {_few(names)}" for text, names in (("lacks", missing), ("holds besides", surplus)) if names]
        raise WeightsError(f"{label} is not the whole {plan.model} of the layout {layout}: it {' and '.join(faults)}")
    for key, (name, value) in named.items():
        _check_fit(name, value, wanted[key], label)
    with torch.random.fork_rng(devices=[]):  # initial weights are drawn and thrown away: nobody's seed should notice
        model = construct(plan.model, settings)
    model.load_state_dict({**model.state_dict(), **plan.made, **{key: value for key, (_, value) in named.items()}})
    return model.eval(), left_out, plan.note


def _published_state(checkpoint: Mapping[str, Any], layout: str, label: str) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of the network, without wrappers' names in their keys, and the names of all other entries."""
    if layout == "relational" and all(isinstance(checkpoint.get(part), Mapping) for part in _PARTS):
        used = list(_PARTS)
        found = [(f"{part}.{key}", value) for part in _PARTS for key, value in checkpoint[part].items()]
    else:
        used = [nest for nest in _NESTS if isinstance(checkpoint.get(nest), Mapping)]
        if len(used) > 1:
            raise WeightsError(f"{label} holds several states, {' and '.join(used)}: save the one that is meant alone")
        found = list(
            checkpoint[used[0]].items() if used else ((key, value) for key, value in checkpoint.items() if isinstance(value, Tensor))
        )
    state: dict[str, Tensor] = {}
    for name, value in found:
        if not re.fullmatch(r"[\w.]{1,200}", str(name)):  # what is printed below is harmless
            raise WeightsError(f"{label} holds an entry that is named like no layer, {str(name)[:100]!r}")
        key = ".".join(part for part in str(name).split(".") if part not in _WRAPPERS)
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_quantized or value.is_meta:
            raise WeightsError(f"{label}: {name!r} must be a dense tensor, it is a {type(value).__name__}")
        if value.untyped_storage().nbytes() < value.numel() * value.element_size():
            raise WeightsError(f"{label}: {name!r} has the shape {tuple(value.shape)}, but fewer numbers than that are stored")
        if key in state:
            raise WeightsError(f"{label} holds {key!r} twice, with and without a wrapper's name")
        state[key] = value
    others = sorted(_printable(key) for key, value in checkpoint.items() if key not in used and (used or not isinstance(value, Tensor)))
    if not state:
        raise WeightsError(f"{label} holds no tensors of a network, only {_few([*used, *others]) or 'nothing'}")
    return state, others


def _renamed(state: Mapping[str, Tensor], plan: _Plan, label: str) -> dict[str, tuple[str, Tensor]]:
    """litzoo's key -> published key and tensor."""
    named: dict[str, tuple[str, Tensor]] = {}
    unknown = []
    for key, value in state.items():
        target = next((found.expand(new) for old, new in plan.rules if (found := re.fullmatch(old, key))), None)
        if target is None:
            unknown.append(key)
        elif target in named:
            raise WeightsError(f"{label} holds both {named[target][0]!r} and {key!r}, which are the same tensor of {plan.model}")
        else:
            named[target] = (key, value)
    if unknown:
        raise WeightsError(f"{label} holds tensors that its layout has no place for: {_few(unknown)}")
    return named


def _check_fit(name: str, value: Tensor, own: Tensor, label: str) -> None:
    if value.shape != own.shape:
        raise WeightsError(
            f"{label}: {name!r} has the shape {tuple(value.shape)}, but {tuple(own.shape)} goes with the rest of the network"
        )
    if value.is_floating_point() != own.is_floating_point() or value.is_complex():
        raise WeightsError(
            f"{label}: {name!r} is {value.dtype}, which is no {'floating-point' if own.is_floating_point() else 'integer'} type"
        )


def _printable(name: Any) -> str:
    text = str(name)[:100]
    return text if text.isprintable() else repr(text)


def _few(names: Iterable[str]) -> str:
    first, *others = list(names) or [""]
    shown = [first, *others[:2]]
    return ", ".join(shown) + (f" and {len(others) - 2} more" if len(others) > 2 else "")


# Layouts


def _lemniscate(state: Mapping[str, Tensor], checkpoint: Mapping[str, Any], hparams: Mapping[str, Any]) -> _Plan:
    projection = _matrix(state, "fc.weight" if "fc.weight" in state else "linear.weight")
    settings = {**_resnet(state, ""), "embedding_dim": len(projection)}
    rows = _bank_rows(checkpoint.get("lemniscate"))
    if rows is not None:
        settings["num_train"] = rows
    elif "num_train" not in hparams:
        raise WeightsError("does not hold its memory bank, which would tell how many images it was trained on: give num_train")
    return _Plan("InstanceDiscrimination", settings, (*_RESNET, (r"(?:fc|linear)\.(weight|bias)", r"projection.\1")), {}, "")


def _bank_rows(bank: Any) -> int | None:
    """Rows of a published memory bank: of a module, of its stand-in, or of its state dict."""
    contents = getattr(bank, "contents", bank)
    buffers = contents.get("_buffers", contents) if isinstance(contents, Mapping) else getattr(contents, "_buffers", None)
    memory = buffers.get("memory") if isinstance(buffers, Mapping) else None
    return len(memory) if isinstance(memory, Tensor) and memory.dim() == 2 else None


def _supcontrast(state: Mapping[str, Tensor], checkpoint: Mapping[str, Any], hparams: Mapping[str, Any]) -> _Plan:
    encoder, settings = _inside("encoder", _RESNET), _resnet(state, "encoder.")
    if "fc.weight" in state:
        settings["num_classes"] = len(_matrix(state, "fc.weight"))
        return _Plan("ImageClassifier", settings, (*encoder, (r"fc\.(weight|bias)", r"head.\1")), {}, "")
    linear = "head.weight" in state
    last = _matrix(state, "head.weight" if linear else "head.2.weight")
    settings["embedding_dim"] = len(last)
    if not linear:
        settings["hidden_dim"] = last.shape[1]
        return _Plan("SupConEncoder", settings, (*encoder, (r"head\.([02]\.(?:weight|bias))", r"projection.\1")), {}, "")
    # Features are means of what a ReLU gave, so that the ReLU between both layers changes nothing.
    width = _width(state, "encoder.")
    made = {"projection.0.weight": torch.eye(width), "projection.0.bias": torch.zeros(width)}
    note = "the published head is one linear layer: the first layer of the projection head is the identity"
    return _Plan("SupConEncoder", settings, (*encoder, (r"head\.(weight|bias)", r"projection.2.\1")), made, note)


def _relational(state: Mapping[str, Tensor], checkpoint: Mapping[str, Any], hparams: Mapping[str, Any]) -> _Plan:
    prefix = next((name for name in ("backbone", "net.feature_extractor") if any(key.startswith(f"{name}.") for key in state)), "")
    head = next((name for name in ("relation", "relation_module", "relation_head") if any(key.startswith(f"{name}.") for key in state)), "")
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
        settings, rules = _resnet(state, f"{prefix}."), _inside(prefix, _RESNET)
        width = _width(state, f"{prefix}.")
    settings["hidden_dim"] = len(first)
    if first.shape[1] == 2 * width:
        settings["aggregation"] = "cat"
    elif "aggregation" not in hparams:
        raise WeightsError(
            "has a relation head on the sum, the mean or the maximum of two features, and does not say which: give aggregation"
        )
    return _Plan("RelationalReasoning", settings, (*rules, *_inside(head, _RELATION)), {}, "")


def _pointnet(state: Mapping[str, Tensor], checkpoint: Mapping[str, Any], hparams: Mapping[str, Any]) -> _Plan:
    has_classes = "convs1.weight" in state
    prefix = "" if has_classes else "feat."
    channels = _matrix(state, f"{prefix}stn.conv1.weight", 3).shape[1]
    if channels != 3:
        raise WeightsError(
            f"has a PointNet of {channels} numbers a point, such as normals or colours; litzoo's takes the 3 coordinates alone"
        )
    layers = list(_PARTS_OF_CLOUDS if has_classes else _WHOLE_CLOUDS)
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
        return _Plan("PointNetClassifier", settings, _linear_rules(layers, lasts), {}, "", _without_biases(state, layers))

    conv, norm = ("convs", "bns") if has_classes else ("conv", "bn")
    layers += [(f"{conv}2", f"{norm}2", "head.second.0.0"), (f"{conv}3", f"{norm}3", "head.last.0.0")]
    lasts[f"{conv}4"] = "head.last.1"
    parts = len(_matrix(state, f"{conv}4.weight", 3))
    # Its columns: the cloud's features, its class, then the features of the point.
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
    return _Plan("PointNetSegmenter", settings, rules, {}, note, split)


def _linear_rules(layers: Iterable[tuple[str, str, str]], lasts: Mapping[str, str]) -> _Rules:
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
            raise WeightsError(f"is not a whole PointNet of this layout: it lacks {_few(missing)}")
        bias, mean = found.pop(names[0]), state[names[1]]
        if bias.shape != mean.shape or not bias.is_floating_point() or not mean.is_floating_point():
            raise WeightsError(
                f"is not of this layout: {names[0]} is {bias.dtype} of the shape {tuple(bias.shape)}, "
                f"{names[1]} is {mean.dtype} of the shape {tuple(mean.shape)}"
            )
        found[names[1]] = mean.double() - bias.double()
    return found


_PLANS: dict[str, Callable[[Mapping[str, Tensor], Mapping[str, Any], Mapping[str, Any]], _Plan]] = {
    "lemniscate": _lemniscate,
    "supcontrast": _supcontrast,
    "relational": _relational,
    "pointnet": _pointnet,
}


def _inside(prefix: str, rules: _Rules) -> _Rules:
    return tuple((rf"{re.escape(prefix)}\.{old}", new) for old, new in rules)


def _matrix(state: Mapping[str, Tensor], key: str, dim: int = 2) -> Tensor:
    """A weight that sizes are read from; of a convolution over points, `dim` is 3."""
    if key not in state:
        raise WeightsError(f"is not of this layout: it has no {key}, but {_few(state)}")
    if state[key].dim() != dim:
        raise WeightsError(f"is not of this layout: {key} has the shape {tuple(state[key].shape)}")
    return state[key]


def _blocks(state: Mapping[str, Tensor], prefix: str) -> tuple[int, ...]:
    """Blocks of each of four stages."""
    places = [key.removeprefix(prefix).split(".") for key in state if key.startswith(f"{prefix}layer")]
    return tuple(len({place[1] for place in places if place[0] == f"layer{stage}"}) for stage in (1, 2, 3, 4))


def _cifar_resnet(state: Mapping[str, Tensor], prefix: str) -> tuple[dict[str, Any], _Rules]:
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


def _resnet(state: Mapping[str, Tensor], prefix: str) -> dict[str, Any]:
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
