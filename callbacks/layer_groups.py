"""The layers of a network from the input to the output, as tricks of fine-tuning count them."""

import re
from collections.abc import Sequence

from torch import nn


def check_patterns(patterns: Sequence[str] | None) -> None:
    """Raise ValueError unless `patterns` is None or a list of regular expressions."""
    if patterns is None:
        return
    if isinstance(patterns, str) or not patterns:
        raise ValueError(f"groups must be a list of regular expressions, from the input to the output, got {patterns!r}")
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"groups has {pattern!r}, which is no regular expression ({error}): escape it or correct it") from error


def layer_groups(module: nn.Module, patterns: Sequence[str] | None) -> list[tuple[str, list[tuple[str, nn.Parameter]]]]:
    """A module's parameters in groups, from the input to the output.

    Every parameter lies in exactly one group, frozen ones too; a tied weight counts once, under its first name.

    Args:
        module: whose parameters to group.
        patterns: a regular expression a group, searched for in the parameters' names; the first that matches wins. None
            takes the direct children that own parameters, in order of registration. Parameters of the module itself come
            first, as a group; a module with a single child is replaced by that child.

    Returns:
        (name of the group, [(name, parameter), ...]) of each group.

    Raises:
        ValueError: if a parameter matches no pattern, a pattern no parameter, or a pattern is no regular expression.

    Example:
        >>> [name for name, _ in layer_groups(module, [r"embed|blocks\\.0", r"blocks", r"head"])]
    """
    check_patterns(patterns)
    parameters = list(module.named_parameters())
    return _by_child(module, parameters) if patterns is None else _by_pattern(parameters, patterns)


def _by_child(module: nn.Module, parameters: list[tuple[str, nn.Parameter]]) -> list[tuple[str, list[tuple[str, nn.Parameter]]]]:
    prefix = ""
    while True:
        groups: dict[str, list[tuple[str, nn.Parameter]]] = {}
        for name, parameter in parameters:
            child, dot, _ = name.removeprefix(prefix).partition(".")
            groups.setdefault(child if dot else "", []).append((name, parameter))
        if len(groups) != 1 or "" in groups:
            own = prefix.rstrip(".") or type(module).__name__
            return [(prefix + child if child else own, members) for child, members in groups.items()]
        prefix += f"{next(iter(groups))}."


def _by_pattern(parameters: list[tuple[str, nn.Parameter]], patterns: Sequence[str]) -> list[tuple[str, list[tuple[str, nn.Parameter]]]]:
    groups: list[list[tuple[str, nn.Parameter]]] = [[] for _ in patterns]
    for name, parameter in parameters:
        for pattern, members in zip(patterns, groups, strict=True):
            if re.search(pattern, name):
                members.append((name, parameter))
                break
        else:
            raise ValueError(f"groups has no pattern for the parameter {name!r}: add one, or end the list with '.*'")
    for pattern, members in zip(patterns, groups, strict=True):
        if not members:
            raise ValueError(
                f"groups has {pattern!r}, which matches no parameter that an earlier pattern leaves: correct it or leave it out"
            )
    return list(zip(patterns, groups, strict=True))
