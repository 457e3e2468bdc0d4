"""`litzoo show embedding`: maps of the features that one or several models give to the same samples."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import numpy as np
import torch

from ..pretrained import load_encoder
from . import CommandError, check_folder
from .data_options import Parser, add_data_options, parse_with_data
from .embed import HDF5, SPLITS, Encoded, add_encoding_options, check_agreement, check_split, encode_split, has_embedding
from .runs import run_of

if TYPE_CHECKING:
    from ...datamodules import ArrayDataModule

_FORMATS = (".png", ".html")


class _Source(NamedTuple):
    """What there is to draw: features `(N, D)`, their labels and indices, and the names of the classes."""

    name: str
    features: np.ndarray
    label: np.ndarray
    index: np.ndarray  # type: ignore[assignment]  # hides tuple.index, which nobody needs here
    class_names: list[str]


def show_embedding(arguments: list[str]) -> int:
    """Draw maps of features, coloured by class, side by side in one picture, and as an interactive page.

    Sources are files of `litzoo embed`, or models, which encode the data first. Of all samples of the split the precision at 1 is told: how
    many have a nearest neighbour of their own class. Drawn is a random subset, of each class its share; sources with the same
    labels show the same samples. The page shows images of samples where the data are given.

    Args:
        arguments: sources and options.

    Returns:
        The exit status.

    Raises:
        CommandError: if a source is missing or holds something else, sources differ in their classes, or there are no labels.

    Example:
        >>> show_embedding(["features.h5", "--method", "pca", "--output", "map.png", "map.html"])
        0
    """
    from ..plots.projection import Method, check_method

    parser = Parser(
        prog="litzoo show embedding",
        description="Maps of the features that models give to samples, as a picture or a page to look around in.",
    )
    parser.add_argument(
        "sources",
        metavar="SOURCE",
        nargs="+",
        type=str,
        help=".h5 files of `litzoo embed`; or models, as --model of it takes them, with data",
    )
    add_data_options(parser)
    parser.add_argument("--split", default="val", choices=SPLITS, help="which samples")
    parser.add_argument("--features", default="encode", choices=["encode", "forward"], help="the encoder's features, or the embedding")
    parser.add_argument("--method", default="tsne", choices=get_args(Method), help="umap needs the package umap-learn")
    parser.add_argument("--samples", type=int, default=3000, help="the most to draw")
    parser.add_argument("--wrong", action="store_true", help="mark samples whose nearest neighbour is of another class")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of samples and of the method")
    parser.add_argument("--output", type=Path, nargs="+", default=[Path("embedding.png")], help=".png and .html files to write")
    add_encoding_options(parser)
    models = lambda options: next((source for source in options.sources if not _is_file(source)), None)
    options, data = parse_with_data(parser, arguments, "litzoo show embedding takes", models)
    if options.samples < 2:
        raise CommandError(f"--samples must be at least 2, got {options.samples}")
    for path in options.output:
        if path.suffix.lower() not in _FORMATS:
            raise CommandError(f"--output {path}: give names that end in {' or '.join(_FORMATS)}")
        check_folder(path, path.parent)
    check_method(options.method)
    for source in options.sources:
        if _is_file(source) and not Path(source).is_file():
            raise CommandError(f"there is no file {source}")
        if not _is_file(source) and data is None:
            raise CommandError(
                f"say which data {source} is to encode: --config RECIPE or --data CLASS, or give a .h5 file of `litzoo embed`"
            )
    if data is not None:
        check_split(data, options.split)

    names = _short_names(options.sources)
    found = [
        _read(source, name, options, data) if _is_file(source) else _encode(source, name, options, data)  # type: ignore[arg-type]  # a model has data, see above
        for source, name in zip(options.sources, names, strict=True)
    ]
    for source in found:
        if source.class_names != found[0].class_names:
            raise CommandError(f"{source.name} and {found[0].name} have different classes: show maps of the same classes side by side")
        bad = int((~np.isfinite(source.features)).any(axis=1).sum())
        if bad:
            raise CommandError(
                f"{source.name}: features of {bad} of {len(source.label)} samples are not finite, the model may have diverged"
            )
        if not (source.label >= 0).any():
            raise CommandError(f"{source.name}: no {options.split} sample has a label to colour it by: choose another --split")
    _write(found, options, data)
    return 0


def _is_file(source: str) -> bool:
    return Path(source).suffix.lower() in HDF5


def _short_names(sources: list[str]) -> list[str]:
    """Files without their folders, checkpoints of a run with its name, where that is enough to tell them apart."""
    short = [_short_name(source) for source in sources]
    return [source if short.count(name) > 1 else name for source, name in zip(sources, short, strict=True)]


def _short_name(source: str) -> str:
    path = Path(source)
    if path.suffix not in (*HDF5, ".safetensors", ".ckpt"):
        return source
    run = run_of(path)
    return path.stem if run is None else f"{run.parent.name}, {path.stem}"


def _read(source: str, name: str, options: Any, data: "ArrayDataModule | None") -> _Source:
    """A file of `litzoo embed`."""
    import h5py

    column = "features" if options.features == "encode" else "embedding"
    try:
        with h5py.File(source, "r") as file:
            held = [split for split in SPLITS if split in file]
            if "class_names" not in file.attrs or not held:
                raise CommandError(f"{source} holds no features with names of classes: `litzoo embed` writes such files")
            if options.split not in held:
                raise CommandError(f"{source} has no {options.split} samples; choose --split {' or '.join(held)}")
            group = file[options.split]
            if column not in group:
                raise CommandError(f"{source} has no embedding beside its features: leave out --features forward")
            if data is not None and file.attrs.get("fingerprint") != data.fingerprint:
                raise CommandError(f"{source} was made of other data than this {type(data).__name__}: give those with --data or --config")
            class_names = [str(each) for each in np.atleast_1d(file.attrs["class_names"])]
            features, label, index = (np.asarray(group[each]) for each in (column, "label", "index"))
    except (OSError, KeyError, RuntimeError) as error:  # the last one is h5py's, of damage
        raise CommandError(f"{source} cannot be read, it may be truncated or of another format ({error})") from error
    is_whole = features.ndim == 2 and features.dtype.kind == "f"
    if not is_whole or any(each.shape != features.shape[:1] or each.dtype.kind not in "iu" for each in (label, index)):
        raise CommandError(f"{source} holds no features (N, D) with a label and an index each: `litzoo embed` writes such files")
    if label.astype(np.int64).max(initial=-1) >= len(class_names):
        raise CommandError(
            f"{source} has {len(class_names)} names of classes, but labels up to {label.max()}: make it anew by `litzoo embed`"
        )
    return _Source(name, features.astype(np.float32), label.astype(np.int64), index.astype(np.int64), class_names)


def _encode(source: str, name: str, options: Any, data: "ArrayDataModule") -> _Source:
    model = load_encoder(source, options.device)
    check_agreement(model, source, data)
    if options.features == "forward" and not has_embedding(model):
        raise CommandError(f"{source} has no embedding beside its features: leave out --features forward")
    column = Encoded._fields.index("features" if options.features == "encode" else "embedding")
    parts = [(batch[column], batch.label, batch.index) for batch in encode_split(model, data, options.split, options.batch_size)]
    features, label, index = (np.concatenate(column) for column in zip(*parts, strict=True))
    return _Source(name, features, label, index, data.class_names)


def _write(found: list[_Source], options: Any, data: "ArrayDataModule | None") -> None:
    from ...datamodules import ImageDataModule
    from ..functional.subsets import stratified_subset
    from ..plots.embedding import EmbeddingMap, describe, plot_embedding, write_embedding_html
    from ..plots.figures import save_figure
    from ..plots.projection import judge_neighbours, project

    pages = [path for path in options.output if path.suffix.lower() == ".html"]
    maps: list[EmbeddingMap] = []
    images: np.ndarray | None = None
    shown = np.zeros(0, dtype=np.int64)
    for source in found:
        label = torch.from_numpy(source.label)
        judged = judge_neighbours(torch.from_numpy(source.features), label)
        chosen = stratified_subset(label, options.samples, options.seed).numpy()
        note = describe(options.method, len(chosen), len(source.label), f"{options.split} samples", judged.precision)
        print(f"{source.name}: {note}")
        index = source.index[chosen]
        if pages and isinstance(data, ImageDataModule) and not np.array_equal(index, shown):
            images, shown = data.arrays.input[index].permute(0, 2, 3, 1).numpy(), index
        place = project(source.features[chosen], options.method, options.seed)
        wrong = judged.wrong[chosen] if options.wrong else None
        maps.append(EmbeddingMap(source.name, note, place, source.label[chosen], index, wrong, images))
    for path in options.output:
        if path in pages:
            write_embedding_html(path, maps, found[0].class_names, f"Embedding of {options.split} samples")
        else:
            save_figure(plot_embedding(maps, found[0].class_names), path)
    print(", ".join(map(str, options.output)))
