"""`litzoo show`: pictures of data."""

from pathlib import Path
from typing import Any

import torch

from . import CommandError, did_you_mean, recipe_path

_SUBJECTS = ["data"]


def _data_node(path: str) -> Any:
    import yaml

    with open(path, encoding="utf-8") as file:
        try:
            recipe = yaml.safe_load(file)
        except yaml.YAMLError as error:
            raise CommandError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(recipe, dict) or "data" not in recipe:
        raise CommandError(f"{path} has no `data`")
    return recipe["data"]


def _show_data(arguments: list[str]) -> int:
    from jsonargparse import ArgumentParser
    from lightning.pytorch import LightningDataModule

    from ... import datamodules
    from ..functional.points import unit_sphere
    from ..plots.class_frequencies import plot_class_frequencies
    from ..plots.figures import save_figure

    for name in datamodules.DATAMODULES:
        getattr(datamodules, name)
    parser = ArgumentParser(
        prog="litzoo show data", description="Class frequencies, and a sheet of samples, as PNG files.", exit_on_error=False
    )
    parser.add_argument("-c", "--config", help="name or file of a recipe, of which only `data` is used")
    parser.add_subclass_arguments(LightningDataModule, "data", required=False)
    parser.add_argument("--output", type=Path, default=Path("."), help="folder of the pictures")
    parser.add_argument("--split", default="train", choices=["train", "val", "test"], help="which samples to draw")
    parser.add_argument("--per_class", type=int, default=2, help="samples of each class on the sheet")
    options = parser.parse_args(arguments)
    if options.config is not None:
        parser.set_defaults(data=_data_node(recipe_path(options.config)))
        options = parser.parse_args(arguments)
    if options.data is None:
        raise CommandError("say which data: --config RECIPE or --data CLASS, such as --data FurnitureDataModule")
    data: Any = parser.instantiate_classes(options).data
    if not isinstance(data, datamodules.ArrayDataModule):
        raise CommandError(f"litzoo show data draws the data sets of litzoo, not {type(data).__name__}")

    counts = {
        name: torch.bincount(data.arrays.label[data.indices(split)], minlength=data.num_classes).tolist()
        for split, name in enumerate(("train", "val", "test"))
    }
    options.output.mkdir(parents=True, exist_ok=True)
    frequencies = options.output / "class_frequencies.png"
    save_figure(plot_class_frequencies(counts, data.class_names), frequencies)
    print(f"{sum(map(sum, counts.values()))} samples in {data.num_classes} classes: {frequencies}")
    if data.arrays.input.dim() != 3:
        return 0

    from ..plots.point_clouds import plot_point_clouds

    members = data.indices(["train", "val", "test"].index(options.split))
    labels = data.arrays.label[members]
    chosen = torch.cat([members[labels == cls][: options.per_class] for cls in range(data.num_classes)])
    if len(chosen) == 0:
        raise CommandError(f"the {options.split} split is empty")
    titles = [data.class_names[cls] for cls in data.arrays.label[chosen].tolist()]
    sheet = options.output / "clouds.png"
    save_figure(plot_point_clouds(unit_sphere(data.arrays.input[chosen].float()).numpy(), titles), sheet)
    print(f"{len(chosen)} clouds of the {options.split} split: {sheet}")
    return 0


def show(arguments: list[str]) -> int:
    """Draw what the first argument names."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(
            f"usage: litzoo show {{{','.join(_SUBJECTS)}}} ...\n\nlitzoo show data --config RECIPE: class frequencies and a sheet of samples"
        )
        return 0
    if arguments[0] not in _SUBJECTS:
        raise CommandError(f"litzoo show {arguments[0]}: {did_you_mean(arguments[0], _SUBJECTS)}")
    return _show_data(arguments[1:])
