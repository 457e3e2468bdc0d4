"""Files that appear whole or not at all: they are written under a temporary name and renamed."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary name beside a file; what is written there replaces the file at the end, or is removed if anything fails.

    Args:
        path: the file; its folder must exist.

    Yields:
        The temporary name, `.NAME.PID`.

    Raises:
        OSError: if the file cannot be written; it names the file.

    Example:
        >>> with whole_file("numbers.npy") as temporary:
        ...     with temporary.open("wb") as file:
        ...         np.save(file, np.arange(3))
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        yield temporary
        temporary.replace(target)
    except OSError as error:
        # A full disk names no file, other failures name the temporary one; h5py's errors have no number.
        if error.errno is None or str(error.filename) not in ("None", str(temporary)):
            raise
        raise OSError(error.errno, error.strerror, str(target)) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_file(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a whole file, see `whole_file`.

    Args:
        path: the file; its folder is made.
        content: all of it.

    Raises:
        OSError: if it cannot be written; it names the file.

    Example:
        >>> write_file("note.txt", b"done")
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(target) as temporary:
        temporary.write_bytes(content)
