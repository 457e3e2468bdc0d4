"""Weights files of strangers are read without running code that they may hold, and what is wrong with one is said in a sentence."""

import re
import textwrap
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_ZIP = b"PK\x03\x04"


class WeightsError(ValueError):
    """A weights file, a checkpoint or the name of one cannot be used; the message says why and what to do.

    Example:
        >>> litzoo.load("pointnet_furnitur")
        Traceback (most recent call last):
        litzoo.zoo.safe_reading.WeightsError: no trained model 'pointnet_furnitur'; did you mean pointnet_furniture?
    """


class WeightsFile(NamedTuple):
    """A weights file on disk, what to call it in a message, and what helps when it is broken."""

    path: Path
    label: str
    cure: str


def first_bytes(file: WeightsFile) -> bytes:
    """The start of a file that is there and is not obviously something else.

    Args:
        file: which one.

    Returns:
        Up to 40 bytes, one at least.

    Raises:
        WeightsError: if it is missing, a folder, empty or a git-lfs pointer.

    Example:
        >>> first_bytes(WeightsFile(Path("last.ckpt"), "last.ckpt", "copy it again"))[:2]
        b'PK'
    """
    if file.path.is_dir():
        raise WeightsError(f"{file.label} is a folder; give the file in it")
    if not file.path.is_file():
        raise WeightsError(f"{file.label} does not exist: check the path")
    with file.path.open("rb") as opened:
        start = opened.read(len(_LFS_POINTER))
    if not start:
        raise WeightsError(f"{file.label} is empty: {file.cure}")
    if start == _LFS_POINTER:
        raise WeightsError(f"{file.label} is a git-lfs pointer, not the file itself: run `git lfs pull` in its repository")
    return start


def is_zip(file: WeightsFile) -> bool:
    """Whether a file is an archive, as torch.save writes it.

    Args:
        file: which one.

    Returns:
        True for an archive, whole or not.

    Raises:
        WeightsError: see `first_bytes`.

    Example:
        >>> is_zip(WeightsFile(Path("last.ckpt"), "last.ckpt", "copy it again"))
        True
    """
    return first_bytes(file).startswith(_ZIP)


@contextmanager
def open_safetensors(file: WeightsFile) -> Iterator[Any]:
    """Open a safetensors file; the tensors are read when they are asked for.

    Args:
        file: which one.

    Yields:
        What `safetensors.safe_open` gives.

    Raises:
        WeightsError: if the file is damaged, also when that shows only as a tensor is read.

    Example:
        >>> with open_safetensors(file) as opened:
        ...     tensors = {key: opened.get_tensor(key) for key in opened.keys()}
    """
    try:
        with safe_open(file.path, framework="pt") as opened:
            yield opened
    except SafetensorError as error:
        reason = one_line(error, 120).removeprefix("Error while deserializing header: ")
        raise WeightsError(f"{file.label} is not a whole safetensors file ({reason}): {file.cure}") from error


def load_torch_file(file: WeightsFile, damaged: str, plain: str, stand_ins: Sequence[tuple[Callable[..., Any], str]] = ()) -> Any:
    """Read a file of torch.save; nothing in it is run.

    Args:
        file: which one.
        damaged: what to say of a file that is not whole, such as "is not a whole checkpoint".
        plain: what to say of a file that holds Python objects: how to have it without them.
        stand_ins: classes that are made in place of those that the file names.

    Returns:
        What was saved, on the CPU.

    Raises:
        WeightsError: if the file is damaged, packed, or holds an object that could run code.

    Example:
        >>> load_torch_file(file, "is not a whole checkpoint", "save its state_dict() alone")["state_dict"]
    """
    try:
        if is_zip(file):
            _refuse_packed(file)
        with torch.serialization.safe_globals(list(stand_ins)):
            return torch.load(file.path, map_location="cpu", weights_only=True)
    except (OSError, WeightsError):
        raise
    except Exception as error:  # a damaged file raises about anything
        blocked = re.search(r"GLOBAL (\S+)", str(error))
        if blocked is None:
            raise WeightsError(f"{file.label} {damaged} ({_without_advice(error)}): {file.cure}") from error
        raise WeightsError(
            f"{file.label} holds a Python object ({blocked[1][:100]}) and opening it could run code, so it is not opened; {plain}"
        ) from error


def one_line(error: BaseException, width: int) -> str:
    """What an error says, as one short line.

    Args:
        error: the error.
        width: the most characters.

    Returns:
        Its message, or the name of its class where it has none.

    Example:
        >>> one_line(ValueError("a\\nb"), 120)
        'a b'
    """
    return textwrap.shorten(str(error) or type(error).__name__, width, placeholder=" ...")


def few_names(names: Iterable[str]) -> str:
    """Names for a message: the first three, and how many more there are.

    Args:
        names: any number.

    Returns:
        One line; empty without names.

    Example:
        >>> few_names("abcde")
        'a, b, c and 2 more'
    """
    first, *others = list(names) or [""]
    shown = [first, *others[:2]]
    return ", ".join(shown) + (f" and {len(others) - 2} more" if len(others) > 2 else "")


def _refuse_packed(file: WeightsFile) -> None:
    """torch.save stores, and never packs; torch.load unpacks all the same, a file of kilobytes into gigabytes."""
    with zipfile.ZipFile(file.path) as archive:
        size = sum(entry.file_size for entry in archive.infolist())
    on_disk = file.path.stat().st_size
    if size > on_disk:
        raise WeightsError(
            f"{file.label} is a packed archive, of {size / 1e6:.0f} MB in {on_disk / 1e6:.1f} MB, which torch.save never writes: "
            "it is not opened"
        )


def _without_advice(error: BaseException) -> str:
    """The first sentence of an error of torch.load, behind its advice to run the code."""
    text = re.sub(r"Weights only load failed\..*?WeightsUnpickler error:", "", str(error), flags=re.DOTALL)
    return one_line(ValueError(text.strip().partition("\n")[0] or type(error).__name__), 120)
