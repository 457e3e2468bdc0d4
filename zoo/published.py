"""Published checkpoints: weights that other repositories trained become litzoo's models, key by key. Nothing here runs code of a file.

Layouts, each read as its repository saves it:

- "lemniscate" (zhirongw/lemniscate.pytorch), ResNets for ImageNet or CIFAR -> `InstanceDiscrimination`;
- "supcontrast" (HobbitLong/SupContrast), `SupConResNet` -> `SupConEncoder`, `SupCEResNet` -> `ImageClassifier`;
- "relational" (mpatacchiola/self-supervised-relational-reasoning), Conv-4 and ResNet-34 with their head -> `RelationalReasoning`.

Other networks than litzoo's, and so no layouts: the ResNet-8, 32 and 56 of the last repository, whose shortcuts are convolutions
where litzoo's have no weights; and the PointNets of yanx27/Pointnet_Pointnet2_pytorch and fxia22/pointnet.pytorch, which have two
layers fewer than the paper's and no ReLU before the maximum over the points.
"""

import importlib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, get_args

import torch
from lightning.pytorch import LightningModule
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .. import __version__, zoo
from .pretrained import _ZIP, WeightsError, _construct, _first_bytes, _is_extra, _one_line, _Place, _refuse_packed

Layout = Literal["lemniscate", "supcontrast", "relational"]
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
    """

    model: str
    hparams: dict[str, Any]
    rules: _Rules
    made: dict[str, Tensor]
    note: str


def from_published(checkpoint: Mapping[str, Any], layout: Layout, /, **hparams: Any) -> LightningModule:
    """Make a model of a checkpoint that another repository's code trained, with the same outputs.

    Wrappers' prefixes (`module.`) and the nests of checkpoints (`state_dict`, `model`, `net`, ...) are looked through; sizes follow from
    shapes. Every tensor of the published network is used and every one of the model is filled, or there is an error.

    Args:
        checkpoint: what `torch.load(file, weights_only=True)` gives, or the state dict alone; tensors of any floating-point type.
        layout: "lemniscate", "supcontrast" or "relational": the repository, see the head of this file.
        hparams: hyper-parameters of the model that no shape tells, such as `image_size`, `image_mean` and `image_std`, with which
            `embed` and `predict` prepare raw images; `num_train` of an `InstanceDiscrimination` without its bank; or the
            `aggregation` of a relation head that does not concatenate.

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
    place = _Place(Path(path).expanduser(), os.fspath(path), "copy it again")
    model, left_out, note = _convert(_read(place), layout, hparams, place.label)
    card: dict[str, Any] = {
        "summary": f"{type(model).__name__} of {place.path.name}, a published checkpoint of the layout {layout}",
        "source": place.path.name,
        "layout": layout,
        "litzoo": __version__,
        "left_out": left_out,
    }
    return model, {**card, "note": note} if note else card


def _read(place: _Place) -> Mapping[str, Any]:
    start = _first_bytes(place)
    if place.path.suffix == ".safetensors":
        try:
            return load_file(place.path)
        except SafetensorError as error:
            raise WeightsError(f"{place.label} is not a whole safetensors file ({_one_line(error, 120)}): {place.cure}") from error
    cure = "where you trust it, open it there with its own code and save its state_dict() alone by torch.save"
    try:
        if start[: len(_ZIP)] == _ZIP:
            _refuse_packed(place)
        with torch.serialization.safe_globals([(_Bystander, name) for name in _BYSTANDERS]):
            checkpoint = torch.load(place.path, map_location="cpu", weights_only=True)
    except (OSError, WeightsError):
        raise
    except Exception as error:  # a damaged file raises about anything
        blocked = re.search(r"GLOBAL (\S+)", str(error))
        if blocked is not None:
            raise WeightsError(
                f"{place.label} holds a Python object ({blocked[1][:100]}) and opening it could run code, so it is not opened; {cure}"
            ) from error
        raise WeightsError(
            f"{place.label} is damaged, or cannot be opened without running code ({_reason(error)}): {place.cure}, or {cure}"
        ) from error
    if not isinstance(checkpoint, Mapping):
        raise WeightsError(f"{place.label} holds a {type(checkpoint).__name__}, not the state dict of a network")
    return checkpoint


def _reason(error: BaseException) -> str:
    """The first sentence of an error of torch.load, behind its advice to run the code."""
    text = re.sub(r"Weights only load failed\..*?WeightsUnpickler error:", "", str(error), flags=re.DOTALL)
    return _one_line(ValueError(text.strip().partition("\n")[0] or type(error).__name__), 120)


def _convert(checkpoint: Mapping[str, Any], layout: str, hparams: Mapping[str, Any], label: str) -> tuple[LightningModule, list[str], str]:
    """The model, the names of what was left out, and the note."""
    if layout not in get_args(Layout):
        raise WeightsError(f"there is no layout {layout!r}; there are {', '.join(get_args(Layout))}")
    state, left_out = _published_state(checkpoint, layout, label)
    if any("stn" in key.split(".") for key in state):
        raise WeightsError(
            f"{label} holds a PointNet as yanx27 or fxia22 publish it, which is another network than litzoo's: it has two layers fewer, and "
            "no ReLU before the maximum over the points"
        )
    try:
        plan = _PLANS[layout](state, checkpoint, hparams)
    except WeightsError as error:
        raise WeightsError(f"{label} {error}") from None
    named = _renamed(state, plan, label)
    settings = {**plan.hparams, **hparams}
    # Whatever is imported in there would make its constants there, and for the whole process.
    importlib.import_module("timm")
    getattr(zoo, plan.model)
    try:
        with torch.device("meta"):  # no memory, and no work, for what may not fit
            outline = _construct(plan.model, settings)
    except (TypeError, ValueError, RuntimeError) as error:
        raise WeightsError(f"{label}: no {plan.model} can be built with these hyper-parameters ({_one_line(error, 300)})") from error
    wanted = {key: value for key, value in outline.state_dict().items() if not _is_extra(key)}
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
        model = _construct(plan.model, settings)
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


_PLANS: dict[str, Callable[[Mapping[str, Tensor], Mapping[str, Any], Mapping[str, Any]], _Plan]] = {
    "lemniscate": _lemniscate,
    "supcontrast": _supcontrast,
    "relational": _relational,
}


def _inside(prefix: str, rules: _Rules) -> _Rules:
    return tuple((rf"{re.escape(prefix)}\.{old}", new) for old, new in rules)


def _matrix(state: Mapping[str, Tensor], key: str) -> Tensor:
    if key not in state:
        raise WeightsError(f"is not of this layout: it has no {key}, but {_few(state)}")
    if state[key].dim() != 2:
        raise WeightsError(f"is not of this layout: {key} has the shape {tuple(state[key].shape)}")
    return state[key]


def _resnet(state: Mapping[str, Tensor], prefix: str) -> dict[str, Any]:
    """Hyper-parameters of a model whose encoder is a ResNet, from its blocks and the kernel of its first convolution."""
    places = [key.removeprefix(prefix).split(".") for key in state if key.startswith(f"{prefix}layer")]
    blocks = tuple(len({place[1] for place in places if place[0] == f"layer{stage}"}) for stage in (1, 2, 3, 4))
    name = _RESNETS.get((blocks, f"{prefix}layer1.0.conv3.weight" in state))
    first = state.get(f"{prefix}conv1.weight")
    if name is None and blocks[3] == 0 and any("downsample" in place for place in places):
        raise WeightsError(
            f"has a ResNet of three stages, {blocks[:3]} blocks, with convolutions as shortcuts; those of litzoo have shortcuts without weights"
        )
    if name is None or first is None or first.dim() != 4:
        raise WeightsError(f"has no ResNet-18, 34, 50, 101 or 152 under {prefix or 'its keys'}: its stages have {blocks} blocks")
    stem = "small" if first.shape[2] == 3 else "original"
    return {"backbone": {"name": name, "stem": stem}, "in_channels": first.shape[1], "image_size": None}


def _width(state: Mapping[str, Tensor], prefix: str) -> int:
    """Features of a ResNet: of bottlenecks four times as many."""
    return 2048 if f"{prefix}layer1.0.conv3.weight" in state else 512
