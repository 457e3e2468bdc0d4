"""A user's own folders of files, one for each class: what lies in them, and packing it once."""

import hashlib
import os
import warnings
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import DataError
from .packing import block_dataset, packed_place
from .splits import TEST, TRAIN, UNUSED, VAL

_SPLITS = {"train": TRAIN, "val": VAL, "valid": VAL, "validation": VAL, "test": TEST}
_UNLABELLED = ("unlabelled", "unlabeled")
_CURE = ": remove or replace them, or leave them out with --data.skip_corrupt true"


@dataclass(frozen=True)
class Kind:
    """A kind of files, in words for messages.

    Attributes:
        suffixes: how their names end.
        noun: one of them.
        nouns: several of them.
        source: with which the source of their packed files begins.
    """

    suffixes: Collection[str]
    noun: str
    nouns: str
    source: str


class ClassFolders:
    """What lies in a folder, without opening a single file: `<class>/**/*`, or `{train,val,test}/<class>/**/*`; nothing hidden.

    Args:
        root: the folder.
        kind: which files count.
        inner_splits: whether the splits may also lie within the classes, `<class>/{train,val,test}/**/*`.
        unlabelled: whether a folder `unlabelled` or `unlabeled` in the place of a class holds training files without a label.

    Attributes:
        root: the folder.
        kind: which files count.
        names: of all files, relative to the folder and in ascending order.
        fingerprint: of names, sizes and times of modification.
        label: `(M,)` int64; -1 for those without a label.
        split: `(M,)` uint8, or None without folders for the splits.
        class_names: in ascending order.

    Raises:
        DataError: if the folder is missing or has another layout.

    Example:
        >>> ClassFolders(Path("photos"), Kind((".jpg",), "image", "images", "photos")).class_names
        ('cat', 'dog')
    """

    def __init__(self, root: Path, kind: Kind, inner_splits: bool = False, unlabelled: bool = False) -> None:
        self.root, self.kind = root, kind
        if not root.is_dir():
            unpack = "is a file: unpack it first, and give the folder"
            what = unpack if root.exists() else f"does not exist: give the folder of the {kind.nouns}"
            raise DataError(f"{root} {what} with --data.path")
        try:
            found, folders = _scan(root, kind.suffixes)
        except OSError as error:
            raise DataError(f"{root} cannot be read: {error}") from error
        if not found:
            raise DataError(
                f"{root} holds no {kind.nouns} ({', '.join(sorted(suffix[1:] for suffix in kind.suffixes))}): give another folder with --data.path"
            )
        self.names = [name for name, _, _ in found]
        digest = hashlib.sha256()
        for entry in found:
            digest.update("\0".join(map(str, entry)).encode(errors="surrogateescape") + b"\n")
        self.fingerprint = digest.hexdigest()
        parts = [name.split("/") for name in self.names]
        depth = self._depth({part[0] for part in parts if len(part) > 1})
        stray = [name for name, part in zip(self.names, parts, strict=True) if len(part) < depth + 2]
        if stray:
            others = f" (and {len(stray) - 1} more)" if len(stray) > 1 else ""
            place = f"{root}/{'train/' * depth}<class>/"
            raise DataError(f"{root / stray[0]}{others} lies in no class folder: move it to {place}, or remove it")
        without = {part[depth] for part in parts if unlabelled and part[depth].lower() in _UNLABELLED}
        classes = sorted({part[depth] for part in parts} - without)
        if len(classes) < 2:
            raise DataError(
                f"{root} has {kind.nouns} of {'one class only, ' + classes[0] if classes else 'no class'}: it must hold a folder for each class, or train/<class> and so on"
            )
        for empty in sorted(name for name in folders if name.count("/") == depth and name.split("/")[depth] not in {*classes, *without}):
            warnings.warn(f"{root / empty} holds no {kind.noun} and is no class", stacklevel=2)
        number = {name: cls for cls, name in enumerate(classes)} | dict.fromkeys(without, -1)
        self.label = torch.tensor([number[part[depth]] for part in parts])
        above = [part[0] for part in parts] if depth else self._inner(parts) if inner_splits else None
        split = torch.tensor([_SPLITS[name.lower()] for name in above or ()], dtype=torch.uint8)
        self.split = split if (split != TRAIN).any() else None
        if self.split is not None and bool(((self.label < 0) & (self.split != TRAIN)).any()):
            wrong = next(name for name, label, part in zip(self.names, self.label, self.split, strict=True) if label < 0 and part != TRAIN)
            raise DataError(f"{root / wrong} is for validation or test, but has no label: move it to {root}/train/{min(without)}")
        self.class_names = tuple(classes)

    def _depth(self, tops: set[str]) -> int:
        """How many folders lie above those of the classes: 1 if the data have official splits, else 0."""
        splits = {top for top in tops if top.lower() in _SPLITS}
        train = any(top.lower() == "train" for top in splits)
        if splits == tops and train:
            return 1
        if len(splits) > 1 and splits == tops:
            raise DataError(f"{self.root} has the folders {', '.join(sorted(splits))}, but no folder train")
        if len(splits) > 1 and train:
            raise DataError(
                f"{self.root} has the splits {', '.join(sorted(splits))}, but {min(tops - splits)} with {self.kind.nouns} beside them: "
                "move it away"
            )
        return 0

    def _inner(self, parts: list[list[str]]) -> list[str] | None:
        """The folder of each file's split, where splits lie within the classes."""
        inner = [part[1] if len(part) > 2 else "" for part in parts]
        found = {name.lower() for name in inner if name.lower() in _SPLITS}
        if len(found) < 2 or "train" not in found:
            return None
        for name, folder in zip(self.names, inner, strict=True):
            if folder.lower() not in _SPLITS:
                raise DataError(
                    f"{self.root} has the splits {', '.join(sorted(found))} within its classes, but {name} in none of them: move it away"
                )
        return inner

    def finish_split(self, corrupt: Collection[int], finish: Callable[[Tensor, Tensor | None], Tensor]) -> Tensor:
        """The split to train with, in which corrupt files are unused.

        Args:
            corrupt: positions of the files that are left out.
            finish: label and split of the others -> their split.

        Returns:
            `(M,)` uint8: 0 = train, 1 = validation, 2 = test, 3 = unused.
        """
        good = torch.ones(len(self.label), dtype=torch.bool)
        good[list(corrupt)] = False
        split = torch.full((len(good),), UNUSED, dtype=torch.uint8)
        split[good] = finish(self.label[good], None if self.split is None else self.split[good])
        return split

    def place(self, name: str, source: str, pack: Path | None) -> Path:
        """The file to pack into.

        Args:
            name: of the file, if nobody gives one.
            source: what it is packed from.
            pack: a file or an existing folder for it; None puts it beside the folder, or into `~/.cache/litzoo` where that is not allowed.

        Returns:
            Its path.

        Raises:
            DataError: if `pack` is somebody else's file.
        """
        return packed_place(self.root, name, source, pack, self.kind.source, f"a folder of {self.kind.nouns}")

    def writer(
        self,
        dataset: str,
        shape: tuple[int, ...],
        dtype: str,
        block: int,
        samples: Callable[[list[Path]], Iterable[np.ndarray | str]],
        skip_corrupt: bool,
    ) -> Callable[[Any], None]:
        """What fills the packed file: samples, labels, splits and names, and the positions of what cannot be read.

        Args:
            dataset: name of the array of samples.
            shape: of one sample.
            dtype: of its numbers.
            block: how many are written at a time.
            samples: files -> what each becomes, in their order; a text is the reason why one cannot be read.
            skip_corrupt: leave such files out, as zeros, instead of refusing to pack.

        Returns:
            A function for `pack_once`; it raises a `DataError` that names corrupt files, unless they are to be left out and others remain.
        """

        def write(file: Any) -> None:
            import h5py
            from tqdm import tqdm

            array = block_dataset(file, dataset, (len(self.names), *shape), dtype)
            corrupt: dict[int, str] = {}
            waiting: list[np.ndarray] = []
            found = samples([self.root / name for name in self.names])
            for place, sample in enumerate(
                tqdm(found, desc=f"packing {self.root.name}", total=len(self.names), unit=f" {self.kind.nouns}", disable=None)
            ):
                if isinstance(sample, str):
                    corrupt[place] = sample
                waiting.append(np.zeros(shape, dtype) if isinstance(sample, str) else sample)
                if len(waiting) == block or place + 1 == len(self.names):
                    array[place + 1 - len(waiting) : place + 1] = np.stack(waiting)
                    waiting.clear()
            if corrupt and (not skip_corrupt or len(corrupt) == len(self.names)):
                raise DataError(self._complaint(corrupt) + _CURE)
            text = h5py.string_dtype()
            file["label"] = self.label.numpy()
            if self.split is not None:
                file["split"] = self.split.numpy()
            file["class_names"] = np.array([printable(name) for name in self.class_names], dtype=text)
            file["file"] = np.array([printable(name) for name in self.names], dtype=text)
            file["corrupt"] = np.array(list(corrupt), dtype=np.int64)
            file["corrupt_reason"] = np.array([printable(reason) for reason in corrupt.values()], dtype=text)

        return write

    def corrupt(self, packed: Path, skip_corrupt: bool) -> list[int]:
        """Positions of the corrupt files that are left out of a packed file, of which a warning tells.

        Args:
            packed: the file.
            skip_corrupt: whether to leave them out.

        Returns:
            Positions in `names`.

        Raises:
            DataError: if there are any, and they are not to be left out.
        """
        import h5py

        with h5py.File(packed, "r") as file:
            corrupt = dict(zip(file["corrupt"][...].tolist(), file["corrupt_reason"].asstr()[...].tolist(), strict=True))
        if corrupt and not skip_corrupt:
            raise DataError(self._complaint(corrupt) + _CURE)
        if corrupt:
            warnings.warn(f"{self._complaint(corrupt)}; they are left out", stacklevel=2)
        return list(corrupt)

    def _complaint(self, corrupt: dict[int, str]) -> str:
        first = ", ".join(f"{printable(self.names[place])} ({printable(reason)})" for place, reason in list(corrupt.items())[:5])
        more = f" and {len(corrupt) - 5} more" if len(corrupt) > 5 else ""
        return f"{len(corrupt)} of {len(self.names)} {self.kind.nouns} in {self.root} cannot be read: {first}{more}"


def _scan(root: Path, suffixes: Collection[str]) -> tuple[list[tuple[str, int, int]], list[str]]:
    """Relative name, size and time of modification of all files of a kind, and the names of all folders; nothing hidden."""
    files, folders = [], []
    pending: list[tuple[str, str, tuple[tuple[int, int], ...]]] = [(str(root), "", ())]
    while pending:
        folder, prefix, above = pending.pop()
        status = os.stat(folder)
        here = (status.st_dev, status.st_ino)
        if here in above:  # a link to a folder in which it lies itself
            continue
        with os.scandir(folder) as entries:
            for entry in entries:
                name = prefix + entry.name
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    folders.append(name)
                    pending.append((entry.path, f"{name}/", (*above, here)))
                elif os.path.splitext(entry.name)[1].lower() in suffixes:
                    try:
                        status = entry.stat()
                        files.append((name, status.st_size, status.st_mtime_ns))
                    except FileNotFoundError:  # a link to nothing; it is named with the files that cannot be read
                        files.append((name, 0, 0))
    return sorted(files), folders


def printable(name: str) -> str:
    """A file name as text, in which bytes that are none are written as numbers.

    Args:
        name: as the system gives it.

    Returns:
        Text that can be stored.

    Example:
        >>> printable("caf\\udce9.png")
        'caf\\\\udce9.png'
    """
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")
