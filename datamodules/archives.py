"""Official archives: downloaded whole or not at all, checked against the published md5, and read without being unpacked."""

import codecs
import hashlib
import http.client
import io
import os
import pickle
import socket
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

from .errors import DataError
from .packing import pack_once, remove_leftovers

# What reading a damaged .tar.gz raises.
_DAMAGE = (EOFError, OSError, tarfile.TarError, zlib.error)
# Seconds without a byte after which a download counts as failed; urllib would wait for ever.
_STALLED = 60.0


@dataclass(frozen=True)
class Archive:
    """An official archive.

    Attributes:
        url: where it is published.
        filename: its name.
        md5: its checksum.
        folder: the folder in it, and what it is unpacked to by torchvision.
        members: the files in that folder that are needed, each with its md5; None where none is published.
    """

    url: str
    filename: str
    md5: str
    folder: str
    members: dict[str, str | None]


def official_archive(dataset: Literal["CIFAR10", "CIFAR100", "STL10"]) -> Archive:
    """What torchvision knows about an archive, looked up when called.

    Args:
        dataset: name of the class in `torchvision.datasets`.

    Returns:
        The archive.

    Example:
        >>> official_archive("CIFAR10").filename
        'cifar-10-python.tar.gz'
    """
    from torchvision import datasets

    known: Any = getattr(datasets, dataset)
    members: dict[str, str | None] = dict([*known.train_list, *known.test_list])
    if dataset == "STL10":
        members |= {known.class_names_file: None, known.folds_list_file: None}
    else:
        members[known.meta["filename"]] = known.meta["md5"]
    return Archive(known.url, known.filename, known.tgz_md5, known.base_folder, members)


class MemberReader:
    """Reads one file of an archive, and compares its checksum as soon as the last byte is read.

    Args:
        stream: the open file.
        size: bytes in it.
        md5: the published checksum, or None.
        name: for the messages.
        cure: what to do about a damaged file.
    """

    def __init__(self, stream: IO[bytes], size: int, md5: str | None, name: str, cure: str) -> None:
        self._stream = stream
        self._left = size
        self._md5 = md5
        self._digest = hashlib.md5(usedforsecurity=False)
        self._name = name
        self._cure = cure

    def read(self, size: int = -1) -> bytes:
        """The next bytes, or all that are left.

        Raises:
            DataError: if the file is damaged, or these were its last bytes and its checksum is wrong.
        """
        try:
            block = self._stream.read(size)
        except _DAMAGE as error:
            raise DataError(f"{self._name} cannot be read ({error}): {self._cure}") from error
        self._digest.update(block)
        self._left -= len(block)
        if self._left <= 0 and self._md5 not in (None, self._digest.hexdigest()):
            raise DataError(f"{self._name} is not the official file, its md5 is not {self._md5}: {self._cure}")
        return block


class Members:
    """The files of an archive in the order in which they lie there: iterate once, for pairs of a name and a `MemberReader`.

    Args:
        sizes: bytes of each file.
        open_member: opens a file by its name.
        md5: the published checksum of each file, or None.
        place: the archive or folder, for the messages.
        cure: what to do about damage.
    """

    def __init__(
        self, sizes: dict[str, int], open_member: Callable[[str], IO[bytes]], md5: dict[str, str | None], place: Path, cure: str
    ) -> None:
        self.sizes = sizes
        self._open = open_member
        self._md5 = md5
        self._place = place
        self._cure = cure

    def __iter__(self) -> Iterator[tuple[str, MemberReader]]:
        for name, size in self.sizes.items():
            with self._open(name) as stream:
                yield name, MemberReader(stream, size, self._md5[name], f"{name} in {self._place}", self._cure)


def pack_archive(path: Path, archive: Archive, download: bool, write: Callable[[Any, Members], None]) -> None:
    """Make a packed file of an official archive that lies in the same folder, unless the packed file is there already.

    An unpacked folder, as torchvision leaves it, is as good as the archive. Of several processes one downloads and packs,
    the others wait.

    Args:
        path: the `.h5` file to make.
        archive: what it is made from.
        download: whether to download the archive if it is missing or damaged.
        write: `write(file, members)` fills an open, empty `h5py.File`.

    Raises:
        DataError: if there are no data and they cannot be downloaded, or they are damaged.

    Example:
        >>> pack_archive(Path("data/cifar10.h5"), official_archive("CIFAR10"), True, write)
    """
    root = path.parent
    if root.exists() and not root.is_dir():
        raise DataError(f"{root} is not a folder: give the folder of the data with --data.root")
    if not download and not any((root / name).exists() for name in (path.name, archive.filename, archive.folder)):
        raise DataError(_nothing(archive, root))  # here already, so that a misspelt folder is not made

    def fill(file: Any) -> None:
        with open_members(archive, root, download) as members:
            write(file, members)

    pack_once(path, f"{archive.filename} {archive.md5}", fill)


@contextmanager
def open_members(archive: Archive, root: Path, download: bool) -> Iterator[Members]:
    """Open the unpacked folder if it is whole, else the archive.

    Args:
        archive: which one.
        root: the folder that holds it.
        download: whether to download the archive if it is missing or damaged.

    Yields:
        The members, to iterate over once.

    Raises:
        DataError: if there are no data and they cannot be downloaded, or they are damaged.

    Example:
        >>> with open_members(official_archive("CIFAR10"), Path("data"), download=True) as members:
        ...     contents = {name: reader.read() for name, reader in members}
    """
    folder, packed = root / archive.folder, root / archive.filename
    damage = _folder_damage(archive, folder)
    if damage is None:
        sizes = {name: (folder / name).stat().st_size for name in archive.members}
        yield Members(sizes, lambda name: (folder / name).open("rb"), archive.members, folder, f"delete the folder {folder}")
        return
    if not _is_whole(packed, archive.md5):
        if download:
            _download(archive, root)
        elif packed.exists():
            raise DataError(
                f"{packed} is truncated or corrupt, its md5 is not {archive.md5}: delete it and download {archive.url} anew, "
                "or say --data.download true"
            )
        elif folder.exists():
            raise DataError(f"{damage}: delete {folder} and download {archive.url} into {root.absolute()}, or say --data.download true")
        else:
            raise DataError(_nothing(archive, root))
    cure = f"delete {packed} and download {archive.url} anew"
    try:
        tar = tarfile.open(packed, "r:gz")  # noqa: SIM115  # closed below; the consumer's own errors must not be caught here
    except _DAMAGE as error:
        raise DataError(f"{packed} is truncated or corrupt ({error}): {cure}") from error
    with tar:
        try:
            found = {os.path.normpath(entry.name): entry for entry in tar.getmembers() if entry.isfile()}
        except _DAMAGE as error:
            raise DataError(f"{packed} is truncated or corrupt ({error}): {cure}") from error
        entries = {name: found.get(os.path.join(archive.folder, name)) for name in archive.members}
        present = {name: entry for name, entry in entries.items() if entry is not None}
        if len(present) < len(entries):
            missing = [name for name, entry in entries.items() if entry is None]
            raise DataError(f"{packed} lacks {archive.folder}/{' and '.join(missing)}: {cure}")
        # Going back in a compressed file means reading it from its start.
        order = sorted(present, key=lambda name: present[name].offset)
        sizes = {name: present[name].size for name in order}
        yield Members(sizes, lambda name: tar.extractfile(present[name]) or io.BytesIO(), archive.members, packed, cure)


def _nothing(archive: Archive, root: Path) -> str:
    return (
        f"there is neither {archive.filename} nor the folder {archive.folder} in {root.absolute()}: download {archive.url} into it, "
        "give the folder that holds it with --data.root, or say --data.download true"
    )


def _is_whole(path: Path, md5: str | None) -> bool:
    from torchvision.datasets.utils import check_integrity

    try:
        return check_integrity(path, md5)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error}): make it readable, or delete it") from error


def _folder_damage(archive: Archive, folder: Path) -> str | None:
    """What is wrong with an unpacked folder; None if it is whole."""
    for name in archive.members:
        if not (folder / name).is_file():
            return f"{folder / name} is missing"
    for name, md5 in archive.members.items():
        if not _is_whole(folder / name, md5):
            return f"{folder / name} is not the official file, its md5 is not {md5}"
    return None


def _download(archive: Archive, root: Path) -> None:
    """Download to a temporary name, and rename what is whole."""
    from torchvision.datasets.utils import download_url

    remove_leftovers(root / archive.filename)
    temporary = root / f".{archive.filename}.{os.getpid()}"
    before = socket.getdefaulttimeout()
    try:
        socket.setdefaulttimeout(_STALLED)
        download_url(archive.url, root, temporary.name, archive.md5)
        temporary.replace(root / archive.filename)
    except (OSError, RuntimeError, http.client.HTTPException) as error:  # RuntimeError: torchvision found a wrong checksum
        raise DataError(
            f"{archive.url} could not be downloaded ({error}): download it by hand into {root.absolute()}, "
            "or give the folder that holds it with --data.root"
        ) from error
    finally:
        socket.setdefaulttimeout(before)
        temporary.unlink(missing_ok=True)  # also after Ctrl-C


def _encode_latin1(text: str, encoding: str) -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"it asks for the encoding {encoding}")
    return codecs.encode(text, "latin1")


# All that a pickle may name. The module of `_reconstruct` was renamed in numpy 2.
_KNOWN = {
    ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("numpy._core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _encode_latin1,
}


class _ArrayUnpickler(pickle.Unpickler):
    """Knows numpy arrays and nothing else, so that no pickle can run code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return _KNOWN[module, name]


def unpickle_arrays(content: bytes, name: str) -> Any:
    """Load a pickle of dictionaries, lists, numbers, texts and numpy arrays; anything else in it is refused.

    Args:
        content: the pickle; one of Python 2 is fine.
        name: of the file, for the message.

    Returns:
        What was pickled.

    Raises:
        DataError: if it is damaged, or holds anything else.

    Example:
        >>> unpickle_arrays(pickle.dumps({"labels": [3, 8]}, protocol=2), "data_batch_1")
        {'labels': [3, 8]}
    """
    try:
        return _ArrayUnpickler(io.BytesIO(content), encoding="latin1").load()
    except Exception as error:  # a damaged pickle can raise anything
        raise DataError(f"{name} is not a pickle of plain arrays ({error}): fetch it anew from its official place") from error
