"""What the commands that make models and data of options share: their parser, the names of classes, and what the data tell a model."""

from typing import NoReturn

from lightning.pytorch.cli import LightningArgumentParser

from ... import callbacks, datamodules, zoo
from . import CommandError

# What a model learns from its data: attribute of the DataModule -> argument of the model, where both exist.
LINKS = (
    *("num_classes", "class_names", "class_counts", "num_train"),
    *("normalization", "num_parts", "part_names", "part_classes"),  # of point clouds
    *("in_channels", "image_size", "image_mean", "image_std"),  # of images
)


class Parser(LightningArgumentParser):
    """A parser that raises instead of leaving the program."""

    # The parsers of nested classes end here too, so the message is shortened only where it is printed.
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise CommandError(message) from ex


def import_short_names() -> None:
    """Import every public class of litzoo, because jsonargparse knows a class by its short name once it has been imported."""
    for face in (zoo, datamodules, callbacks):
        for name in face.__all__:
            getattr(face, name)
