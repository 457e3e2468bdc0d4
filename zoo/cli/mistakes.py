"""Tells a user's mistake from a fault of the program, and says it in one sentence."""

import re
import sys

from ... import callbacks, datamodules, zoo
from . import CommandError, did_you_mean

# What surrounds the reason in the messages of jsonargparse.
_NOISE = re.compile(r"Does not validate against any|Subtypes:|Errors:|Given value|Expected a <class 'NoneType'>|Expected a path but")
# What it says of the other ways to give a value, beside the reason why this one does not do.
_OTHER_WAYS = re.compile(
    r"Not a valid subclass of|Subclass types expect|a class path \(str\)|a dict with|a dict without|Option '.*' is not accepted|"
    r"Expected a typing\.Literal"
)


def sentence(error: BaseException) -> str | None:
    """The sentence to print for a mistake of the user's, or None for a fault that deserves its traceback.

    Args:
        error: what was raised.

    Returns:
        One line, or None.
    """
    types: list[type[BaseException]] = [CommandError, ValueError, OSError]
    exceptions = sys.modules.get("lightning.fabric.utilities.exceptions")
    if exceptions is not None:  # if it was never imported, its error cannot have been raised
        types.append(exceptions.MisconfigurationException)
    if isinstance(error, RuntimeError) and str(error).startswith("Error(s) in loading state_dict"):
        faults = re.sub(r"\s+", " ", str(error))[:300]
        return f"the checkpoint does not fit this model; give the config.yaml of its run with --config ({faults} ...)"
    if isinstance(error, RuntimeError) and str(error).startswith("Early stopping conditioned on metric"):
        return str(error)
    if not isinstance(error, tuple(types)):
        return None
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return parser_sentence(str(error)) or type(error).__name__


def _class_names(option: str) -> list[str]:
    """Short class names that an option takes."""
    leaf = option.lstrip("-").rpartition(".")[2]
    if leaf.endswith(("optimizer", "lr_scheduler")):  # a model may have several
        import torch

        module, base = (torch.optim, "Optimizer") if leaf.endswith("optimizer") else (torch.optim.lr_scheduler, "LRScheduler")
        names = [name for name, value in vars(module).items() if isinstance(value, type) and issubclass(value, getattr(module, base))]
        return names if leaf.endswith("optimizer") else [*names, "WarmupCosineLR"]
    return {"model": list(zoo.MODELS), "data": list(datamodules.DATAMODULES), "callbacks": list(callbacks.CALLBACKS)}.get(leaf, [])


def parser_sentence(message: str) -> str:
    """What is wrong with an argument, out of what jsonargparse says: the option and the innermost reason.

    Args:
        message: many lines of jsonargparse, or any other message, which is only put on one line.

    Returns:
        One line.
    """
    keys = re.findall(r'Parser key "([^"]+)"', message)
    option = "--" + ".".join(keys)
    unknown_class = re.search(r"Expected a dot import path string: (\S+)", message)
    if unknown_class:
        name, names = unknown_class[1], _class_names(option)
        choices = re.search(r"Expected a typing\.Literal\[(.*?)\]", message)
        if choices and not names:  # a setting that is a preset by name or a mapping, not a class
            return f"{option}: expected one of {choices[1]}, or a mapping of settings, got {name}"
        return f"{option}: no class {name!r}" + (f"; {did_you_mean(name, names)}" if names else "; give its short name or its import path")
    unknown_option = re.search(r"Option '([^']+)' is not accepted", message)
    if unknown_option and unknown_option[1] not in keys[1:]:  # else it is one, of an item of a list, and has a wrong value
        return f"{option}.{unknown_option[1]} is not an option of that class; {option}.help CLASS lists its options"
    required = re.search(r"following arguments are required: ([\w.]+(?:, [\w.]+)*)", message)
    if required and option != "--":
        return f"give {' and '.join(f'{option}.{name}' for name in required[1].split(', '))}, which has no default"
    reasons = []
    for line in message.splitlines():
        reason = re.sub(r'Parser key "[^"]+":', "", line).strip()
        reason = re.sub(r"^-(\s+|$)", "", reason)
        if reason and not _NOISE.search(reason):
            reasons.append(reason)
    reasons = [reason for reason in reasons if not _OTHER_WAYS.match(reason)] or reasons
    text = re.sub(r"\s+", " ", " ".join(dict.fromkeys(reasons))).strip()
    text = re.sub(r"typing\.Literal\[(.*?)\]", r"one of \1", re.sub(r"<class '(\w+)'>", r"\1", text))
    text = (
        text.replace("Expected a one of", "expected one of")
        .replace("Expected a ", "expected ")
        .replace(". Got value: ", ", got ")
        .replace("Got value: ", "got ")
    )
    given = re.search(r"Given value: (.+)", message)
    if text == "expected list" and given:
        text = f"expected a list, write '[{given[1]}]'"
    return f"{option}: {text}" if option != "--" else text
