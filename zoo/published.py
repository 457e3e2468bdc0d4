"""Published checkpoints: weights that other repositories trained become litzoo's models, key by key. Nothing here runs code of a file."""

import importlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self, get_args

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from .. import __version__, zoo
from .pretrained import construct, is_training_state
from .published_layouts import PLANS, Layout, Plan
from .safe_reading import WeightsError, WeightsFile, few_names, first_bytes, load_torch_file, one_line, open_safetensors

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


class _Bystander:
    """Stands in for an object that lies in a checkpoint: it keeps the object's contents, and has none of its behaviour."""

    def __new__(cls, *arguments: Any, **settings: Any) -> Self:
        return super().__new__(cls)

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        self.contents: Any = None

    def __setstate__(self, contents: Any) -> None:
        self.contents = contents


def from_published(checkpoint: Mapping[str, Any], layout: Layout, /, **hparams: Any) -> LightningModule:
    """Make a model of a checkpoint that another repository's code trained, with the same outputs.

    Wrappers' prefixes (`module.`) and the nests of checkpoints (`state_dict`, `model`, `net`, ...) are looked through; sizes follow from
    shapes. Every tensor of the published network is used and every one of the model is filled, or there is an error.

    Args:
        checkpoint: what `torch.load(file, weights_only=True)` gives, or the state dict alone; tensors of any floating-point type.
        layout: "lemniscate", "supcontrast", "relational" or "pointnet": the repository, see the head of `published_layouts.py`.
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
        plan = PLANS[layout](state, checkpoint, hparams)
    except WeightsError as error:
        raise WeightsError(f"{label} {error}") from None
    named = _renamed(state if plan.state is None else plan.state, plan, label)
    settings = {**plan.hparams, **hparams}
    # Imported now, because modules that are first imported on the meta device would keep their constants there.
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
        faults = [f"{text} {few_names(names)}" for text, names in (("lacks", missing), ("holds besides", surplus)) if names]
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
        raise WeightsError(f"{label} holds no tensors of a network, only {few_names([*used, *others]) or 'nothing'}")
    return state, others


def _renamed(state: Mapping[str, Tensor], plan: Plan, label: str) -> dict[str, tuple[str, Tensor]]:
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
        raise WeightsError(f"{label} holds tensors that its layout has no place for: {few_names(unknown)}")
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
