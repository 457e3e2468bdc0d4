"""`litzoo embed`: features that a trained model gives to the samples of a data set, in an HDF5 file."""

import inspect
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from shutil import disk_usage
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jsonargparse import ArgumentParser

from ..batch import Batch
from ..files import whole_file
from ..image_encoder import ImageEncoder
from ..pretrained import load_encoder
from . import CommandError
from .data_options import Parser, add_data_options, parse_with_data

if TYPE_CHECKING:
    from ...datamodules import ArrayDataModule

SPLITS = ("train", "val", "test")
HDF5 = (".h5", ".hdf5")
# What data and model must agree in: the options of the data that may set it.
_AGREE = {
    "in_channels": (),
    "image_size": ("image_size", "size"),
    "image_mean": ("mean",),
    "image_std": ("std",),
    "normalization": ("normalization",),
}
# What tells images from point clouds, in data and models alike.
_KINDS = {"image_size": "images", "normalization": "point clouds"}


class Encoded(NamedTuple):
    """Features of some samples.

    Attributes:
        features: `(N, D)` float32, of `encode`.
        embedding: `(N, E)` float32, of `forward`, for models that do not classify; else None.
        label: `(N,)` int64; -1 where it is unknown.
        index: `(N,)` int64, the number of each sample in its data set.
    """

    features: np.ndarray
    embedding: np.ndarray | None
    label: np.ndarray
    index: np.ndarray  # type: ignore[assignment]  # hides tuple.index, which nobody needs here


def embed(arguments: list[str]) -> int:
    """Write the features of the splits of a data set, not augmented, into one HDF5 file.

    The file has a group for each split with `features` `(N, D)` float32 of the model's `encode`, `label` `(N,)` int64, -1 where there is
    none, and `index` `(N,)` int64, the number of each sample in its data set. A model without class probabilities (without `predict`)
    has an embedding space, unless it is an encoder alone: `embedding` `(N, E)` float32 is what its `forward` gives. Attributes of the file: `model`, `model_class`,
    `data`, `class_names`, `fingerprint` (of the training samples), `litzoo` (version), and the size and normalisation of the data.

    Args:
        arguments: the command line.

    Returns:
        The exit status.

    Raises:
        CommandError: if the file exists, a split is empty, or the model was made for other data.

    Example:
        >>> embed(["--model", "last.ckpt", "--data", "DigitsDataModule", "--output", "features.h5"])
        0
    """
    parser = Parser(
        prog="litzoo embed", description="Write the features that a model gives to the samples of a data set into an HDF5 file."
    )
    parser.add_argument(
        "--model", type=str, required=True, help="a name of `litzoo list`, a .safetensors, a .ckpt, hf-hub:owner/repo or timm:NAME"
    )
    add_data_options(parser)
    parser.add_argument("--split", nargs="+", choices=SPLITS, help="which splits; by default all that have samples")
    parser.add_argument("--output", type=Path, required=True, help="the .h5 file to write; one that exists is not overwritten")
    add_encoding_options(parser)
    options, data = parse_with_data(parser, arguments, "litzoo embed takes", lambda options: options.model)
    output: Path = options.output
    if output.suffix.lower() not in HDF5:
        raise CommandError(f"--output {output}: give a name that ends in .h5 or .hdf5")
    if output.exists():
        raise CommandError(f"{output} exists already and is not overwritten; choose another name with --output FILE")
    if not output.absolute().parent.is_dir():
        raise CommandError(f"--output {output}: there is no folder {output.absolute().parent}")
    if data is None:
        raise CommandError(
            "say which data: --config RECIPE or --data CLASS, such as --data ImageFolderDataModule --data.path FOLDER for pictures in folders"
        )
    splits = (
        [name for name in SPLITS if len(data.indices(SPLITS.index(name)))] if options.split is None else list(dict.fromkeys(options.split))
    )
    for split in splits:
        check_split(data, split)
    model = load_encoder(options.model, options.device)
    check_agreement(model, options.model, data)
    with whole_file(output) as temporary:
        counts = _write(temporary, model, data, splits, options)
    print(f"{', '.join(f'{count:,} {split}' for split, count in counts.items())} samples: {output}")
    return 0


def add_encoding_options(parser: ArgumentParser) -> None:
    """Add the options on how a model encodes."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    help_text = "samples at a time; by default the data's eval_batch_size"
    parser.add_argument("--batch_size", "--batch-size", type=int | None, default=None, help=help_text)
    parser.add_argument("--device", type=str, default=device, help="where the model runs")


def check_split(data: "ArrayDataModule", split: str) -> None:
    """Refuse a split without samples.

    Raises:
        CommandError: if it has none.
    """
    counts = {name: len(data.indices(number)) for number, name in enumerate(SPLITS)}
    if counts[split] == 0:
        held = ", ".join(f"{name} {count:,}" for name, count in counts.items())
        raise CommandError(f"--split {split}: {type(data).__name__} has no such samples ({held})")


def check_agreement(model: Any, source: str, data: "ArrayDataModule") -> None:
    """Refuse data that are not such as the model was made for; what a model does not say is not compared.

    Raises:
        CommandError: if kind, channels, size or normalisation differ.
    """
    check_kind(model, source, data)
    hparams = _hparams_of_inputs(model)
    takes = inspect.signature(type(data).__init__).parameters
    for name, options in _AGREE.items():
        wanted, found = hparams.get(name), getattr(data, name, None)
        if wanted is None or found is None:
            continue
        same = wanted == found if isinstance(wanted, (str, int)) else np.shape(wanted) == np.shape(found) and np.allclose(wanted, found)
        if not same:
            value = str(wanted) if isinstance(wanted, (str, int)) else f"[{','.join(map(str, wanted))}]"
            cure = next((f"add --data.{option} {value}" for option in options if option in takes), "give other data")
            raise CommandError(f"{source} was made for {name} {value}, but that of {type(data).__name__} is {found}: {cure}")


def check_kind(model: Any, source: str, data: Any) -> None:
    """Refuse pictures where a model takes clouds, and the other way round.

    Raises:
        CommandError: if the data have none of what the model takes.
    """
    hparams = _hparams_of_inputs(model)
    for name, kind in _KINDS.items():
        if name in hparams and not hasattr(data, name):
            raise CommandError(f"{source} ({type(model).__name__}) takes {kind}, but {type(data).__name__} has none: give other data")


def _hparams_of_inputs(model: Any) -> Any:
    """A classifier on an encoder takes what the encoder does."""
    return getattr(getattr(model, "encoder", None), "hparams", None) or getattr(model, "hparams", {})


def prepared_batches(
    model: Any, data: "ArrayDataModule", split: str, batch_size: int | None, progress: bool = True
) -> Iterator[tuple[Batch, torch.Tensor]]:
    """The samples of a split, never augmented, in the order of the data set.

    Args:
        model: on its device.
        data: what it was made for.
        split: "train", "val" or "test".
        batch_size: samples at a time; None takes that of the data.
        progress: show a bar on standard error.

    Yields:
        A batch as it is stored, and what the model takes, on its device.

    Raises:
        CommandError: if `batch_size` is below 1.
    """
    from lightning.fabric.utilities import move_data_to_device
    from tqdm import tqdm

    if batch_size is not None and batch_size < 1:
        raise CommandError(f"--batch_size must be at least 1, got {batch_size}")
    data.eval_batch_size = batch_size or data.eval_batch_size
    loader = {"train": data.eval_train_dataloader, "val": data.val_dataloader, "test": data.test_dataloader}[split]()
    device = next(model.parameters()).device
    for batch in tqdm(loader, split, leave=False, disable=None if progress else True):  # None: where nobody watches
        with torch.no_grad():
            inputs = data.transform(move_data_to_device(batch, device)).input
        yield batch, inputs


def has_embedding(model: Any) -> bool:
    """Whether `forward` gives something else than classes or the very features of `encode`."""
    return not hasattr(model, "predict") and not isinstance(model, ImageEncoder)


def encode_split(model: Any, data: "ArrayDataModule", split: str, batch_size: int | None, progress: bool = True) -> Iterator[Encoded]:
    """Encode the samples of a split, never augmented, batch by batch, in the order of the data set.

    Args:
        model: in evaluation mode.
        data: what it was made for.
        split: "train", "val" or "test".
        batch_size: samples at a time; None takes that of the data.
        progress: show a bar on standard error.

    Yields:
        A batch.

    Raises:
        CommandError: if `batch_size` is below 1, or the model gives something else than features `(N, D)`.
    """
    for batch, inputs in prepared_batches(model, data, split, batch_size, progress):
        with torch.no_grad():
            features = model.encode(inputs)
            embedding = model(inputs) if has_embedding(model) else None
        for name, found in (("encode", features), ("forward", embedding)):
            if found is not None and (found.dim() != 2 or len(found) != len(inputs)):
                raise CommandError(
                    f"{type(model).__name__}.{name} must give features ({len(inputs)}, D) of {len(inputs)} samples, got {tuple(found.shape)}"
                )
        yield Encoded(
            features.float().cpu().numpy(),
            None if embedding is None else embedding.float().cpu().numpy(),
            batch.label.long().clamp(min=-1).numpy(),
            batch.index.numpy(),
        )


def _write(path: Path, model: Any, data: "ArrayDataModule", splits: list[str], options: Any) -> dict[str, int]:
    """Write all splits, a batch at a time, and return the numbers of their samples."""
    import h5py

    from ... import __version__

    counts = {split: len(data.indices(SPLITS.index(split))) for split in splits}
    batches = ((split, batch) for split in splits for batch in encode_split(model, data, split, options.batch_size))
    first = next(batches)
    needed = sum(counts.values()) * sum(value[0].nbytes for value in first[1] if value is not None)
    free = disk_usage(path.absolute().parent).free
    if free < needed:  # told now, because the library does not survive a full disk
        raise CommandError(f"--output {options.output} takes {needed / 1e6:,.1f} MB, but there are {free / 1e6:,.1f} MB free: make room")
    written = dict.fromkeys(splits, 0)
    with h5py.File(path, "w", libver="v108") as file:  # before, the names of some thousand classes were too long for an attribute
        file.attrs.update(
            {
                "model": options.model,
                "model_class": type(model).__name__,
                "data": type(data).__name__,
                "class_names": np.array(data.class_names, dtype=h5py.string_dtype()),
                "fingerprint": data.fingerprint,
                "litzoo": __version__,
                **{name: value for name in _AGREE if (value := getattr(data, name, None)) is not None},
            }
        )
        for split, batch in chain([first], batches):
            group, start = file.require_group(split), written[split]
            for name, value in batch._asdict().items():
                if value is None:
                    continue
                if start == 0:
                    group.create_dataset(name, (counts[split], *value.shape[1:]), value.dtype)
                group[name][start : start + len(value)] = value
            written[split] += len(batch.label)
    return counts
