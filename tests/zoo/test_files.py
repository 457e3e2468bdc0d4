"""`whole_file` and `write_file`: a file is whole or it is not there, and an error names it."""

import errno
import os
from pathlib import Path

import pytest

from litzoo.zoo.files import whole_file, write_file


def write_half(path: Path, error: BaseException, names_temporary: bool = False) -> None:
    with whole_file(path) as temporary:
        temporary.write_bytes(b"ha")
        if names_temporary:
            assert isinstance(error, OSError)
            error.filename = str(temporary)
        raise error


def test_a_file_is_replaced_only_by_a_whole_one(tmp_path: Path) -> None:
    path = tmp_path / "new" / "numbers.bin"
    write_file(path, b"old")
    with pytest.raises(KeyboardInterrupt):
        write_half(path, KeyboardInterrupt())
    assert path.read_bytes() == b"old"
    with whole_file(path) as temporary:
        assert temporary.parent == path.parent, "another file system could not rename it"
        temporary.write_bytes(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("names_temporary", [False, True])
def test_an_error_names_the_file(names_temporary: bool, tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(OSError, match=r"No space left on device: '.*/full\.bin'") as raised:
        write_half(tmp_path / "full.bin", full, names_temporary)
    assert raised.value.errno == errno.ENOSPC
    with pytest.raises(FileNotFoundError, match=r"'.*/nowhere/a\.bin'"), whole_file(tmp_path / "nowhere" / "a.bin"):
        pass


@pytest.mark.parametrize("error", [FileNotFoundError(errno.ENOENT, "No such file", "other.bin"), OSError("no HDF5 file")])
def test_errors_about_something_else_stay_as_they_are(error: OSError, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"other\.bin|no HDF5 file") as raised:
        write_half(tmp_path / "a.bin", error)
    assert raised.value is error
    assert list(tmp_path.iterdir()) == []
