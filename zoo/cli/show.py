"""`litzoo show`: pictures of data, of their augmented views, of a model's features, of parts, and of the points that decide."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jsonargparse import ArgumentParser
from torch import Tensor

from . import CommandError, check_folder, did_you_mean
from .data_options import Parser, add_data_options, parse_with_data

if TYPE_CHECKING:
    from ...datamodules import ArrayDataModule

_SUBJECTS = {
    "data": "class frequencies, and a sheet of samples",
    "views": "training samples beside their augmented views",
    "critical": "the points of clouds that decide a PointNet's prediction",
    "parts": "the parts that a segmenter finds in clouds",
    "embedding": "maps of the features that a model gives to samples",
}
_USAGE = {
    "data": "--config RECIPE",
    "views": "--config RECIPE",
    "critical": "FILE... --model NAME",
    "parts": "FILE... --model NAME",
    "embedding": "FILE_OR_MODEL...",
}


def _sentence(subject: str) -> str:
    return f"{_SUBJECTS[subject][0].upper()}{_SUBJECTS[subject][1:]}, as PNG files."


def _parser(subject: str) -> ArgumentParser:
    """What every subject takes: which data, and where to put the pictures."""
    parser = Parser(prog=f"litzoo show {subject}", description=_sentence(subject))
    add_data_options(parser)
    parser.add_argument("--output", type=Path, default=Path("."), help="folder of the pictures")
    return parser


def _parse(parser: ArgumentParser, arguments: list[str], subject: str) -> tuple[Any, "ArrayDataModule"]:
    """The options and the data."""
    options, data = parse_with_data(parser, arguments, f"litzoo show {subject} draws")
    if data is None:
        raise CommandError("say which data: --config RECIPE or --data CLASS, such as --data FurnitureDataModule")
    check_folder(options.output, options.output)
    return options, data


def _at_least_one(options: Any, *names: str) -> None:
    for name in names:
        if options[name] < 1:
            raise CommandError(f"--{name} must be at least 1, got {options[name]}")


def _kind(data: "ArrayDataModule") -> str:
    """What the samples are: "images", "clouds" or "numbers"."""
    from ...datamodules import ImageDataModule

    if isinstance(data, ImageDataModule):
        return "images"
    return "clouds" if data.arrays.input.dim() == 3 and data.arrays.input.shape[-1] == 3 else "numbers"


def _spread(label: Tensor, number: int) -> Tensor:
    """Positions of `number` samples, as equally many of each class as there are, first ones first, sorted by class."""
    order = label.argsort(stable=True)
    _, count = label[order].unique_consecutive(return_counts=True)
    rank = torch.arange(len(label)) - (count.cumsum(0) - count).repeat_interleave(count)
    chosen = order[rank.argsort(stable=True)[:number]]
    return chosen[label[chosen].argsort(stable=True)]


def _titles(data: "ArrayDataModule", samples: Tensor) -> list[str]:
    return [data.class_names[cls] if cls >= 0 else "no label" for cls in data.arrays.label[samples].tolist()]


def _pictures(images: Tensor) -> Any:
    """Images `(..., C, H, W)` as arrays `(..., H, W, C)`."""
    return images.movedim(-3, -1).numpy()


def _show_data(arguments: list[str]) -> int:
    from ..plots.class_frequencies import plot_class_frequencies
    from ..plots.figures import save_figure

    parser = _parser("data")
    parser.add_argument("--split", default="train", choices=["train", "val", "test"], help="which samples to draw")
    parser.add_argument("--per_class", type=int, default=2, help="samples of each class on the sheet")
    options, data = _parse(parser, arguments, "data")
    _at_least_one(options, "per_class")

    labels = {name: data.arrays.label[data.indices(split)] for split, name in enumerate(("train", "val", "test"))}
    counts = {name: torch.bincount(label[label >= 0], minlength=data.num_classes).tolist() for name, label in labels.items()}
    without = sum(int((label < 0).sum()) for label in labels.values())
    options.output.mkdir(parents=True, exist_ok=True)
    frequencies = options.output / "class_frequencies.png"
    save_figure(plot_class_frequencies(counts, data.class_names), frequencies)
    unlabelled = f" and {without} without a label" if without else ""
    print(f"{sum(map(sum, counts.values()))} samples in {data.num_classes} classes{unlabelled}: {frequencies}")
    kind = _kind(data)
    if kind == "numbers":
        return 0

    members = data.indices(["train", "val", "test"].index(options.split))
    label = data.arrays.label[members]
    chosen = torch.cat([members[label == cls][: options.per_class] for cls in range(data.num_classes)])
    if len(chosen) == 0:
        raise CommandError(f"the {options.split} split is empty")
    sheet = options.output / f"{kind}.png"
    if kind == "images":
        from ..plots.images import plot_images

        # Whole classes in a row, so that they stand below each other.
        columns = options.per_class * max(1, round((1.7 * len(chosen)) ** 0.5 / options.per_class))
        figure = plot_images(_pictures(data.arrays.input[chosen]), _titles(data, chosen), min(columns, len(chosen)))
    else:
        from ..functional.points import unit_sphere
        from ..plots.point_clouds import plot_point_clouds

        figure = plot_point_clouds(unit_sphere(data.arrays.input[chosen].float()).numpy(), _titles(data, chosen))
    save_figure(figure, sheet)
    print(f"{len(chosen)} {kind} of the {options.split} split: {sheet}")
    return 0


def _image_views(data: Any, samples: Tensor, epoch: int, views: int) -> Any:
    """The figure of stored images and the first `views` views that a training epoch makes of each."""
    from ..plots.images import plot_views

    batch = data.train_dataloader().dataset[epoch, samples.tolist()]
    # A view depends on its number alone, so the first ones are those of training, however many it takes.
    data.views = views
    images = data.transform(batch).input.view(len(samples), views, data.in_channels, data.image_size, data.image_size)
    mean, std = (torch.tensor(values)[:, None, None] for values in (data.image_mean, data.image_std))
    return plot_views(_pictures(batch.input), _pictures((images * std + mean).clamp(0, 1)), _titles(data, samples))


def _cloud_views(data: "ArrayDataModule", samples: Tensor, epoch: int, views: int) -> Any:
    """The figure of stored clouds and of what `views` epochs make of each."""
    from ..functional.points import unit_sphere
    from ..plots.figures import shorten
    from ..plots.point_clouds import plot_point_clouds

    dataset = data.train_dataloader().dataset
    epochs = range(epoch, epoch + views)
    stored = list(unit_sphere(data.arrays.input[samples].float()).numpy())
    made = [data.transform(dataset[number, samples.tolist()]).input.numpy() for number in epochs]
    clouds, titles = [], []
    for place, name in enumerate(_titles(data, samples)):
        clouds += [stored[place], *(epoch_clouds[place] for epoch_clouds in made)]
        titles += [shorten(name, 20), *(f"epoch {number}" for number in epochs)]
    return plot_point_clouds(clouds, titles, columns=views + 1)


def _show_views(arguments: list[str]) -> int:
    from ..plots.figures import save_figure

    parser = _parser("views")
    parser.add_argument("--samples", type=int, default=8, help="training samples to draw, of as many classes as possible")
    parser.add_argument("--views", type=int, default=6, help="views of each image; of each cloud, the epochs, which make one each")
    parser.add_argument("--epoch", type=int, default=0, help="the training epoch whose views are drawn, from 0; of clouds, the first one")
    options, data = _parse(parser, arguments, "views")
    _at_least_one(options, "samples", "views")
    if options.epoch < 0:
        raise CommandError(f"--epoch must be at least 0, got {options.epoch}")
    kind = _kind(data)
    if kind == "numbers":
        raise CommandError(
            f"litzoo show views draws images and point clouds, but a sample of {type(data).__name__} is "
            f"{tuple(data.arrays.input.shape[1:])} numbers, which are not augmented"
        )
    members = data.indices(0)
    samples = members[_spread(data.arrays.label[members], options.samples)]
    draw = _image_views if kind == "images" else _cloud_views
    path = options.output / "views.png"
    save_figure(draw(data, samples, options.epoch, options.views), path)
    last = options.epoch + (options.views - 1 if kind == "clouds" else 0)
    when = f"epoch {last}" if last == options.epoch else f"epochs {options.epoch} to {last}"
    print(f"{len(samples)} {kind} of the train split, {options.views} augmented of each, as in {when}: {path}")
    return 0


def show(arguments: list[str]) -> int:
    """Draw what the first argument names: `data`, `views`, `critical`, `parts` or `embedding`.

    Args:
        arguments: the subject and its options.

    Returns:
        The exit status.

    Raises:
        CommandError: if there is no such subject, or no data to draw it from.

    Example:
        >>> show(["data", "--data", "DigitsDataModule", "--output", "pictures"])
        0
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        lines = [f"  litzoo show {subject:<9} {_USAGE[subject]:<20}  {text}" for subject, text in _SUBJECTS.items()]
        print(
            "\n".join([f"usage: litzoo show {{{','.join(_SUBJECTS)}}} ...", "", *lines, "", "litzoo show SUBJECT --help tells the options"])
        )
        return 0
    if arguments[0] not in _SUBJECTS:
        raise CommandError(f"litzoo show {arguments[0]}: {did_you_mean(arguments[0], list(_SUBJECTS))}")
    if arguments[0] == "critical":
        from .show_critical import show_critical

        return show_critical(Parser(prog="litzoo show critical", description=_sentence("critical")), arguments[1:])
    if arguments[0] == "parts":
        from .show_parts import show_parts

        return show_parts(Parser(prog="litzoo show parts", description=_sentence("parts")), arguments[1:])
    if arguments[0] == "embedding":
        from .show_embedding import show_embedding

        return show_embedding(arguments[1:])
    return (_show_data if arguments[0] == "data" else _show_views)(arguments[1:])
