"""What the commands share that take a DataModule: its options on the command line, a recipe's data as their start."""

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

from jsonargparse import ArgumentParser

from . import CommandError, recipe_names, recipe_path
from .encoder_data import prepare_images_for

if TYPE_CHECKING:
    from ...datamodules import ArrayDataModule


class Parser(ArgumentParser):
    """jsonargparse's parser, whose errors are a user's mistakes; the parsers of nested classes end here too."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise CommandError(message) from ex


def _data_node(path: str) -> Any:
    import yaml

    with open(path, encoding="utf-8") as file:
        try:
            recipe = yaml.safe_load(file)
        except yaml.YAMLError as error:
            raise CommandError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(recipe, dict) or recipe.get("data") is None:
        raise CommandError(f"{path} has no `data`")
    return recipe["data"]


def add_data_options(parser: ArgumentParser) -> None:
    """Add `--config` and `--data`.

    Args:
        parser: gets the options.

    Example:
        >>> add_data_options(Parser(prog="litzoo show data"))
    """
    from lightning.pytorch import LightningDataModule

    from ... import datamodules

    for name in datamodules.DATAMODULES:
        getattr(datamodules, name)
    parser.add_argument("-c", "--config", help="name or file of a recipe, of which only `data` is used")
    parser.add_subclass_arguments(LightningDataModule, "data", required=False)


def parse_with_data(
    parser: ArgumentParser, arguments: list[str], purpose: str, encoder: Callable[[Any], str | None] = lambda options: None
) -> tuple[Any, "ArrayDataModule | None"]:
    """The options and the data; a recipe's data are what the command line starts from.

    Args:
        parser: with the options of `add_data_options` and others.
        arguments: the command line.
        purpose: the beginning of a sentence on data of others, such as "litzoo show data draws".
        encoder: options -> the encoder that is to get the data, which then come as it knows them where no option says otherwise.

    Returns:
        The options, and the data, or None if nobody says which.

    Raises:
        CommandError: if an option is wrong, or the data are not of litzoo.

    Example:
        >>> parse_with_data(parser, ["--data", "DigitsDataModule"], "litzoo show data draws")
    """
    from ...datamodules import ArrayDataModule

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("-c", "--config")
    try:
        recipe = first.parse_known_args(arguments)[0].config
    except argparse.ArgumentError as error:
        raise CommandError(f"--config needs the name of a recipe or a file; there are: {', '.join(recipe_names())}") from error
    if recipe is not None:
        parser.set_defaults(data=_data_node(recipe_path(recipe)))
    options = parser.parse_args(arguments)
    if options.data is None:
        return options, None
    prepare_images_for(encoder(options), options.data.get("init_args") or {})
    data = parser.instantiate(options).data
    if not isinstance(data, ArrayDataModule):
        raise CommandError(f"{purpose} the data sets of litzoo, not {type(data).__name__}")
    return options, data
