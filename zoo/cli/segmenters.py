"""What `litzoo show parts` and `litzoo predict` share about models that find parts: classes by name, and names of parts."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import torch

from . import CommandError, did_you_mean

if TYPE_CHECKING:
    from ..pointnet_segmenter import PointNetSegmenter


def is_segmenter(model: Any) -> "TypeGuard[PointNetSegmenter]":
    """Whether a model finds parts.

    Args:
        model: as it was loaded.

    Returns:
        True for a `PointNetSegmenter`.
    """
    from ..pointnet_segmenter import PointNetSegmenter

    return isinstance(model, PointNetSegmenter)


def given_class(name: str | None, model: "PointNetSegmenter", source: str) -> int | None:
    """The class that --class names, without case; the only one of a model that knows one.

    Args:
        name: the option's value, or None.
        model: a segmenter.
        source: what messages call it.

    Returns:
        The number of the class, or None where each object is to tell its own.

    Raises:
        CommandError: if the model does not know the class.
    """
    if name is None:
        return 0 if model.num_classes == 1 else None
    number = _number(name, model)
    if number is None:
        raise CommandError(f"--class {name}: {source} knows no such class; {did_you_mean(name, model.class_names)}")
    return number


def class_of(place: str, told: str | None, given: int | None, model: "PointNetSegmenter", source: str) -> int:
    """The class of one object.

    Args:
        place: what messages call the object.
        told: the class that its file tells, if any.
        given: that of `given_class`, which counts more.
        model: a segmenter.
        source: what messages call it.

    Returns:
        The number of the class.

    Raises:
        CommandError: if nobody says which class it is, or the model does not know it.
    """
    if given is not None:
        return given
    names = ", ".join(model.class_names)
    if told is None:
        raise CommandError(f"say with --class what {place} is: {source} finds the parts of {names}")
    number = _number(told, model)
    if number is None:
        raise CommandError(f"{place} is of class {told}, which {source} does not know: name a class with --class, one of {names}")
    return number


def _number(name: str, model: "PointNetSegmenter") -> int | None:
    if name in model.class_names:
        return model.class_names.index(name)
    known = [each.casefold() for each in model.class_names]
    return known.index(name.casefold()) if name.casefold() in known else None


def parts_of(model: "PointNetSegmenter", cls: int) -> list[int]:
    """The parts that an object of a class may have.

    Args:
        model: a segmenter.
        cls: the class.

    Returns:
        Their numbers, ascending.
    """
    return torch.nonzero(~model.foreign[cls]).squeeze(1).tolist()


def short_names(part_names: Sequence[str], class_names: Sequence[str]) -> list[str]:
    """Names of parts without a class in front.

    Args:
        part_names: such as "Chair/leg".
        class_names: such as "Chair".

    Returns:
        Such as "leg", in the same order.

    Example:
        >>> short_names(["Chair/leg", "handle", "lid/knob"], ["Chair", "Pot"])
        ['leg', 'handle', 'lid/knob']
    """
    split = [(name, *name.partition("/")) for name in part_names]
    return [part if part and cls in class_names else name for name, cls, _, part in split]
