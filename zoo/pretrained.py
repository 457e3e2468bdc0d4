"""Trained weights: one safetensors file a model, which says what it holds and proves that it is whole. Nothing here unpickles."""

import hashlib
import json
import math
import os
import re
import shlex
from collections.abc import Mapping
from contextvars import Context
from pathlib import Path
from typing import Any, TypeGuard

import torch
from lightning.pytorch import LightningModule
from safetensors.torch import save as to_safetensors
from torch import Tensor

from .. import __version__, zoo
from .backbones import describe_pretrained
from .files import whole_file
from .safe_reading import WeightsError, WeightsFile, first_bytes, is_zip, load_torch_file, one_line, open_safetensors
from .weights_files import bundled_index, find_weights, is_on_hub

_FORMAT = "1"
_TIMM = ("timm:", "hf-hub:timm/")


def list_models() -> list[str]:
    """Names of the trained models that ship with litzoo, for `load`.

    Returns:
        The names in alphabetical order.

    Raises:
        WeightsError: if the index of the weights is broken.

    Example:
        >>> "pointnet_furniture" in list_models()
        True
    """
    return sorted(bundled_index())


def load(source: str | os.PathLike[str], device: str | torch.device = "cpu") -> LightningModule:
    """Load a trained model in evaluation mode.

    Bundled weights are checked against the sha256 of the index, every file against the digest in its own header. That
    finds damage; it does not prove who wrote the file. A file may name any model of litzoo and nothing else.

    Args:
        source: a name of `list_models()`, the path of a `.safetensors` file, or `hf-hub:owner/repo[@revision][:file]`
            on the Hugging Face hub, where the file is `model.safetensors` unless given; or `timm:NAME[@SIZE]` for an `ImageEncoder`
            with timm's pretrained weights, on images of SIZE pixels instead of those of its training.
        device: where to put the model.

    Returns:
        The model, its parameters in float32.

    Raises:
        WeightsError: if there is no such source, or it cannot be downloaded, or is damaged, foreign or of another version.
        ValueError: if the device cannot be used.

    Example:
        >>> model = litzoo.load("pointnet_furniture")
    """
    return _to_device(_load_timm(source) if _is_timm(source) else _load_file(find_weights(source)), device)


def load_model(source: str | os.PathLike[str], device: str | torch.device = "cpu") -> LightningModule:
    """Load a model from weights or from a checkpoint of `litzoo fit`.

    Args:
        source: what `load` takes, or the path of a Lightning `.ckpt`.
        device: where to put the model.

    Returns:
        The model in evaluation mode.

    Raises:
        WeightsError: if the source cannot be loaded.
        ValueError: if the device cannot be used.

    Example:
        >>> model = load_model("runs/pointnet/last.ckpt")
    """
    return load_checkpoint(source, device) if Path(source).suffix == ".ckpt" and not is_on_hub(source) else load(source, device)


def load_encoder(source: str | os.PathLike[str], device: str | torch.device = "cpu") -> LightningModule:
    """Load a model that has `encode(input) -> (B, D)`, from weights or from a checkpoint of `litzoo fit`.

    Args:
        source: what `load_model` takes.
        device: where to put the model.

    Returns:
        The whole model in evaluation mode.

    Raises:
        WeightsError: if the source cannot be loaded, or the model has no `encode`.
        ValueError: if the device cannot be used.

    Example:
        >>> features = load_encoder("pointnet_furniture").encode(torch.rand(2, 1024, 3))  # (2, 1024)
    """
    model = load_model(source, device)
    if not callable(getattr(model, "encode", None)):
        raise WeightsError(f"{os.fspath(source)} holds a {type(model).__name__}, which has no encode() and cannot serve as an encoder")
    return model


def resolve_encoder(source: str | os.PathLike[str] | Mapping[str, Any]) -> tuple[LightningModule, dict[str, Any]]:
    """Load an encoder without what only its own training needs, and describe it so that it can be built again, offline.

    Args:
        source: what `load_encoder` takes, or a description, which gives that encoder with random weights.

    Returns:
        The model in evaluation mode, and its description, JSON values: `{"model": name, "hparams": {...}}`.

    Raises:
        WeightsError: if the source cannot be loaded or the description does not fit, or the model has no `encode`.

    Example:
        >>> encoder, description = resolve_encoder("pointnet_furniture")
        >>> description["model"]
        'PointNetClassifier'
    """
    if isinstance(source, Mapping):
        name, hparams = source.get("model"), source.get("hparams")
        if set(source) != {"model", "hparams"} or not isinstance(hparams, Mapping):
            raise WeightsError(
                f'an encoder is described as {{"model": NAME, "hparams": {{...}}}}, got the keys {", ".join(map(str, source))}'
            )
        if name not in zoo.MODELS or not callable(getattr(getattr(zoo, name), "encode", None)):
            raise WeightsError(f"the encoder {name!r} is not one of litzoo's models with encode(): give one of {_models()}")
        try:
            built = construct(name, hparams)
        except (TypeError, ValueError) as error:
            raise WeightsError(
                f"the encoder cannot be built, {_version_of(name)} does not take its hparams ({one_line(error, 300)})"
            ) from error
        return built.eval(), {"model": name, "hparams": _without_private(built.hparams)}
    loaded = load_encoder(source)
    name, hparams = type(loaded).__name__, _without_private(loaded.hparams)
    state = {key: value for key, value in loaded.state_dict().items() if not is_training_state(key)}
    problem, cure = f"the encoder {os.fspath(source)} cannot be built again", "save every argument of its constructor as a hyper-parameter"
    return _build(name, hparams, state, problem, cure), {"model": name, "hparams": hparams}


def encoder_hparams(source: str | os.PathLike[str] | Mapping[str, Any]) -> dict[str, Any]:
    """Hyper-parameters of an encoder, of the inner one where classifiers lie around it; nothing is downloaded for timm's.

    Args:
        source: what `resolve_encoder` takes.

    Returns:
        The hyper-parameters, such as `image_size`, `image_mean` and `image_std`.

    Raises:
        WeightsError: if the source cannot be loaded.

    Example:
        >>> encoder_hparams("timm:resnet18")["image_size"]
        224
    """
    if isinstance(source, Mapping):
        hparams = source.get("hparams")
    else:
        hparams = _describe_timm(source) if _is_timm(source) else load_encoder(source).hparams
    while isinstance(hparams, Mapping) and isinstance(hparams.get("encoder"), Mapping):
        hparams = hparams["encoder"].get("hparams")
    return dict(hparams or {})


def load_checkpoint(path: str | os.PathLike[str], device: str | torch.device = "cpu", model: str | None = None) -> LightningModule:
    """Load the model of a Lightning checkpoint without running code that the file may hold.

    Args:
        path: a `.ckpt` of one of litzoo's models.
        device: where to put the model.
        model: the model's name, for the checkpoint of a plain Trainer, which does not say it; else None.

    Returns:
        The model in evaluation mode.

    Raises:
        WeightsError: if the file is missing, damaged or holds something else.
        ValueError: if the device cannot be used.

    Example:
        >>> model = load_checkpoint("runs/pointnet/last.ckpt")
    """
    return _to_device(read_checkpoint(path, model)[0], device)


def read_checkpoint(path: str | os.PathLike[str], model: str | None = None) -> tuple[LightningModule, dict[str, Any]]:
    """Read a Lightning checkpoint like `load_checkpoint`, together with the card for `save`.

    Args:
        path: a `.ckpt` of one of litzoo's models.
        model: the model's name, for the checkpoint of a plain Trainer, which does not say it; else None.

    Returns:
        The model in evaluation mode, and the card: `summary`, `source` (file name), `litzoo` (version), `epoch`, `global_step`.

    Raises:
        WeightsError: if the file is missing, damaged or holds something else.

    Example:
        >>> model, card = read_checkpoint("last.ckpt")
        >>> litzoo.save(model, "last.safetensors", card)
    """
    place = WeightsFile(Path(path).expanduser(), os.fspath(path), "take another checkpoint of that run, or copy it again")
    if not is_zip(place):
        raise WeightsError(f"{place.label} is not a Lightning checkpoint; give a .ckpt that `litzoo fit` wrote")
    checkpoint = load_torch_file(
        place,
        "is not a whole checkpoint",
        "hyper-parameters and states in a checkpoint must be plain values: leave the others out with save_hyperparameters(ignore=[...])",
    )
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise WeightsError(f"{place.label} is a torch file but not a Lightning checkpoint; give a .ckpt that `litzoo fit` wrote")
    hparams = checkpoint.get("hyper_parameters") or {}
    class_path = hparams.get("_class_path")
    if class_path is None and model is not None:
        class_path = f"{zoo.__name__}.{model}"
    if class_path is None:
        raise WeightsError(
            f"{place.label} does not say which model it holds, as only checkpoints of `litzoo fit` do; in Python, "
            "name it with load_checkpoint(path, model=...) and write it with litzoo.save"
        )
    module, _, name = str(class_path).rpartition(".")
    if name not in zoo.MODELS or module not in (zoo.__name__, f"{zoo.__name__}.{zoo.MODELS[name]}"):
        raise WeightsError(
            f"{place.label} holds a {class_path}, which is not one of litzoo's models ({_models()}); "
            "in Python, load it with load_from_checkpoint of that class"
        )
    if model is not None and model != name:
        raise WeightsError(f"{place.label} holds a {name}, not a {model}; leave the model out, the checkpoint says it")
    problem = f"{place.label} does not fit {_version_of(name)}"
    built = _build(name, _without_private(hparams), checkpoint["state_dict"], problem, "use the version of litzoo that trained it")
    card = {
        "summary": f"{name} of {place.path.name}",
        "source": place.path.name,
        "litzoo": __version__,
        "epoch": checkpoint.get("epoch"),
        "global_step": checkpoint.get("global_step"),
    }
    return built, card


def read_header(source: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what a weights file says of itself, without its tensors and without checking them.

    Args:
        source: what `load` takes.

    Returns:
        `model` (name), `hparams`, `card` and `digest`.

    Raises:
        WeightsError: if there is no such source, or its header is damaged or foreign.

    Example:
        >>> read_header("pointnet_furniture")["card"]["metrics"]
    """
    place = find_weights(source)
    first_bytes(place)
    with open_safetensors(place) as file:
        header = file.metadata() or {}
    try:
        return {
            "model": header["model"],
            "hparams": json.loads(header["hparams"]),
            "card": json.loads(header["card"]),
            "digest": header["digest"],
        }
    except (KeyError, ValueError, RecursionError) as error:
        raise WeightsError(
            f"{place.label} is not one of litzoo's weights files, or its header is damaged: litzoo.save and `litzoo export` write them"
        ) from error


def save(model: LightningModule, path: str | os.PathLike[str], card: Mapping[str, Any], half: bool = True) -> None:
    """Write a model as one safetensors file, which `load` reads anywhere, offline.

    The file holds every tensor of the state, but not what only the training needs, such as a memory bank, and, as text, the model's
    name, its hyper-parameters, the card, and a digest of all that. It appears whole or not at all; a file of that name is
    replaced. Before it is written, the model is rebuilt from what it will hold, so a file that could not be loaded is never made.

    Args:
        model: one of litzoo's models; its hyper-parameters must be JSON values.
        path: where to write, ending in `.safetensors`.
        card: what to know about the weights, JSON values: data, recipe, metrics, licence.
        half: store floating-point tensors in float16, at half the size; they are loaded as float32 again.

    Raises:
        WeightsError: if the model is not one of litzoo's, its hyper-parameters or the card are not JSON, the model differs
            from what its hyper-parameters describe, a value does not fit float16, or the path cannot be used.

    Example:
        >>> litzoo.save(model, "pointnet.safetensors", {"summary": "PointNet on furniture", "test/accuracy": 0.87})
    """
    path = Path(path).expanduser()
    if path.suffix != ".safetensors":
        raise WeightsError(f"{path} must end in .safetensors, so that litzoo.load knows what it is")
    if not path.parent.is_dir():
        raise WeightsError(f"there is no folder {path.parent} to write {path.name} to; make it first")
    name = type(model).__name__
    if name not in zoo.MODELS or type(model) is not getattr(zoo, name):
        raise WeightsError(f"{type(model).__module__}.{name} is not one of litzoo's models ({_models()}): its weights could not be loaded")
    hparams = _without_private(model.hparams)
    _check_json(hparams, f"the hyper-parameters of {name}")
    _check_json(dict(card), "the card")
    tensors = {key: _to_store(key, value, half) for key, value in model.state_dict().items() if not is_training_state(key)}
    header = {
        "litzoo": _FORMAT,
        "model": name,
        "hparams": json.dumps(hparams, sort_keys=True),
        "card": json.dumps(dict(card), sort_keys=True),
    }
    header["digest"] = _digest(header, tensors)
    _build(
        name,
        json.loads(header["hparams"]),
        tensors,
        f"{path.name} could not be loaded again, because this {name} is not what its hyper-parameters describe",
        "save every argument of its constructor as a hyper-parameter, and do not change its layers afterwards",
    )

    with whole_file(path) as temporary, temporary.open("wb") as file:
        file.write(to_safetensors(tensors, metadata=header))
        file.flush()
        os.fsync(file.fileno())


def _is_timm(source: str | os.PathLike[str] | Mapping[str, Any]) -> TypeGuard[str]:
    """On the hub, the repositories of timm hold weights of their names, and none of litzoo."""
    return isinstance(source, str) and source.startswith(_TIMM)


def _describe_timm(source: str) -> dict[str, Any]:
    name, at, size = re.sub("|".join(_TIMM), "", source, count=1).partition("@")
    if at and re.fullmatch("[1-9][0-9]*", size) is None:
        raise WeightsError(f"{source}: behind @ stands the size of the images in pixels, such as timm:{name}@224")
    try:
        return describe_pretrained(name, int(size) if at else None)
    except ValueError as error:
        raise WeightsError(f"{source}: {error}") from error


def _load_timm(source: str) -> LightningModule:
    hparams = _describe_timm(source)
    try:
        with torch.random.fork_rng(devices=[]):  # as in _build
            return construct("ImageEncoder", {**hparams, "pretrained": True}).eval()
    except Exception as error:  # errors of the hub's HTTP client get through, too
        if not isinstance(error.__cause__, OSError):
            raise WeightsError(f"{source} cannot be loaded: {one_line(error, 300)}") from error
        raise WeightsError(
            f"{source}: its weights are not in the local cache and cannot be downloaded: check the connection (and that HF_HUB_OFFLINE is not "
            f"set), or write them to a file where there is one, by litzoo.save(litzoo.load({source!r}), 'encoder.safetensors', {{}}), and give "
            f"that ({one_line(error.__cause__, 120)})"
        ) from error


def _load_file(place: WeightsFile) -> LightningModule:
    if place.path.suffix == ".ckpt" or is_zip(place):
        raise WeightsError(
            f"{place.label} is a checkpoint, and only .safetensors files are loaded as weights: convert it with "
            f"`litzoo export {shlex.quote(str(place.path))}`"
        )
    with open_safetensors(place) as file:
        header = file.metadata() or {}
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is not a dict
    if "litzoo" not in header:
        raise WeightsError(
            f"{place.label} is not one of litzoo's weights files (no litzoo in its header): litzoo.save and `litzoo export` write them"
        )
    if header["litzoo"] != _FORMAT:
        raise WeightsError(f"{place.label} has format {header['litzoo']!r}, but litzoo {__version__} reads format {_FORMAT}: update litzoo")
    if header.get("digest") != _digest(header, tensors):
        raise WeightsError(f"{place.label} is damaged (its contents do not match the digest in its header): {place.cure}")
    try:
        name, hparams = header["model"], json.loads(header["hparams"])
    except (KeyError, ValueError, RecursionError) as error:
        raise WeightsError(f"{place.label} has a header without a model or its hyper-parameters: {place.cure}") from error
    if name not in zoo.MODELS:
        raise WeightsError(
            f"{place.label} holds a {name!r}, which is not a model of litzoo {__version__} ({_models()}): update litzoo, if it is a newer one"
        )
    return _build(name, hparams, tensors, f"{place.label} does not fit {_version_of(name)}", "use the version of litzoo that wrote it")


def _build(name: str, hparams: dict[str, Any], state: Mapping[str, Tensor], problem: str, cure: str) -> LightningModule:
    """A model of the allow-list, with these weights, in evaluation mode; `problem` and `cure` say what to say if they don't fit."""
    try:
        with torch.random.fork_rng(devices=[]):  # initial weights are drawn and thrown away: nobody's seed should notice
            model = construct(name, hparams)
        extra = {key: value for key, value in model.state_dict().items() if is_training_state(key)}
        model.load_state_dict({**extra, **state})
    except Exception as error:  # whatever a constructor says about hyper-parameters it does not know
        raise WeightsError(f"{problem} ({one_line(error, 300)}): {cure}") from error
    return model.eval()


def construct(name: str, hparams: Mapping[str, Any]) -> LightningModule:
    """Make a model of the allow-list, with random weights.

    Args:
        name: one of `litzoo.zoo.MODELS`.
        hparams: the arguments of its constructor.

    Returns:
        The model, in training mode.

    Example:
        >>> model = construct("PointNetClassifier", {"num_classes": 7})
    """
    # Inside of LightningCLI's context, the model would take the hyper-parameters of the one that is made from it for its own.
    model: LightningModule = Context().run(getattr(zoo, name), **hparams)
    return model


def is_training_state(key: str) -> bool:
    """Whether only the training needs an entry of a state dict, such as a memory bank: checkpoints hold it, weights files do not.

    Args:
        key: its key in the state dict.

    Returns:
        True for what `get_extra_state` of a module gave.

    Example:
        >>> is_training_state("bank._extra_state")
        True
    """
    return key.rpartition(".")[2] == "_extra_state"


def _to_device(model: LightningModule, device: str | torch.device) -> LightningModule:
    try:
        return model.to(torch.device(device))
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        raise ValueError(f"the model cannot be put on device {str(device)!r}: {one_line(error, 200)}") from error


def _to_store(key: str, value: Any, half: bool) -> Tensor:
    if not isinstance(value, Tensor):
        raise WeightsError(f"the state of the model holds {key!r}, which is a {type(value).__name__}; only tensors can be saved")
    tensor = value.detach().cpu().contiguous()
    if half and tensor.is_floating_point():
        stored = tensor.half()
        if bool((tensor.isfinite() & ~stored.isfinite()).any()):
            largest = tensor.abs()[tensor.isfinite()].max().item()
            raise WeightsError(
                f"{key} holds {largest:.4g}, beyond the 65504 of float16: save it in full precision, with half=False or --full-precision"
            )
        tensor = stored
    return tensor.clone()  # tied weights share memory, which the format does not allow


def _digest(header: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """sha256 over the header but for the digest, then over name, dtype, shape and bytes of each tensor by name."""
    keys = sorted(tensors)
    texts = {key: text for key, text in header.items() if key != "digest"}
    described = [(key, str(tensors[key].dtype), list(tensors[key].shape)) for key in keys]
    digest = hashlib.sha256(json.dumps([texts, described], sort_keys=True).encode())
    for key in keys:
        digest.update(tensors[key].contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _check_json(value: Any, where: str) -> None:
    """Refuse what JSON cannot hold, or would return as something else."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise WeightsError(f"{where} must have text as keys to be saved as JSON, but one is {key!r}")
            _check_json(inner, f"{where}: {key!r}")
    elif isinstance(value, (list, tuple)):
        for inner in value:
            _check_json(inner, where)
    elif isinstance(value, float) and not math.isfinite(value):
        raise WeightsError(f"{where} is or holds {value}, which JSON cannot store")
    elif value is not None and not isinstance(value, (bool, int, float, str)):
        raise WeightsError(
            f"{where} is or holds a {type(value).__name__}, which JSON cannot store; use plain values, or leave it out with "
            "save_hyperparameters(ignore=[...])"
        )


def _without_private(hparams: Mapping[str, Any]) -> dict[str, Any]:
    """Without `_class_path` and `_instantiator`, which LightningCLI adds."""
    return {key: value for key, value in hparams.items() if not str(key).startswith("_")}


def _version_of(name: str) -> str:
    return f"the {name} of litzoo {__version__}"


def _models() -> str:
    return ", ".join(sorted(zoo.MODELS))
