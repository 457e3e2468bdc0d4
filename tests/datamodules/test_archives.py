"""Official archives: whole or not at all, and one sentence for everything that can be wrong with them."""

import codecs
import dataclasses
import hashlib
import http.client
import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
import threading
import time
import urllib.error
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, ClassVar

import h5py
import numpy as np
import pytest
import torchvision.datasets
from torchvision.datasets import utils

from litzoo.datamodules import DataError
from litzoo.datamodules.archives import Archive, Members, official_archive, open_members, pack_archive, unpickle_arrays

CONTENTS = {
    "second": np.random.default_rng(0).bytes(200_000),
    "first": np.random.default_rng(1).bytes(70_001),
    "empty": b"",
    "notes.txt": b"one\ntwo\n",
}


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def write_tar(path: Path, folder: str, contents: dict[str, bytes], prefix: str = "") -> None:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in contents.items():
            entry = tarfile.TarInfo(f"{prefix}{folder}/{name}")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def checksums(contents: dict[str, bytes]) -> dict[str, str | None]:
    return {name: None if name.endswith(".txt") else md5(contents[name]) for name in sorted(contents)}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def archive(root: Path) -> Archive:
    """An archive in the root folder."""
    root.mkdir()
    write_tar(root / "things.tar.gz", "things", CONTENTS)
    # Port 9 discards: nothing listens there.
    return Archive(
        "http://127.0.0.1:9/things.tar.gz", "things.tar.gz", md5((root / "things.tar.gz").read_bytes()), "things", checksums(CONTENTS)
    )


def unpack(root: Path, contents: dict[str, bytes] = CONTENTS) -> None:
    (root / "things").mkdir()
    for name, content in contents.items():
        (root / "things" / name).write_bytes(content)


def contents_of(archive: Archive, root: Path, download: bool = False) -> dict[str, bytes]:
    with open_members(archive, root, download) as members:
        assert members.sizes == {name: len(content) for name, content in CONTENTS.items()}
        return {name: reader.read() for name, reader in members}


def no_network(*_: object, **__: object) -> None:
    raise urllib.error.URLError("no route to host")


@pytest.fixture
def server(root: Path, archive: Archive) -> Iterator[Callable[..., tuple[Archive, list[str]]]]:
    """Moves the archive out of the root folder onto a server of this machine: `server(keep=0.5)` breaks off half way."""
    content = (root / archive.filename).read_bytes()
    (root / archive.filename).unlink()
    requests: list[str] = []
    answer = {"keep": 1.0, "status": 200}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append(self.path)
            self.send_response(int(answer["status"]))
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: int(len(content) * answer["keep"])])

        def log_message(self, *_: object) -> None:
            pass

    web = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=web.serve_forever, args=(0.02,), daemon=True)
    thread.start()

    def serve(**settings: Any) -> tuple[Archive, list[str]]:
        answer.update(settings)
        return replace(archive, url=f"http://127.0.0.1:{web.server_port}/things.tar.gz"), requests

    yield serve
    web.shutdown()
    web.server_close()
    thread.join()


@pytest.mark.parametrize(
    ("dataset", "unpublished"), [("CIFAR10", set()), ("CIFAR100", set()), ("STL10", {"class_names.txt", "fold_indices.txt"})]
)
def test_what_torchvision_knows(dataset: Any, unpublished: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    known = getattr(torchvision.datasets, dataset)
    archive = official_archive(dataset)
    assert (archive.url, archive.filename, archive.md5, archive.folder) == (known.url, known.filename, known.tgz_md5, known.base_folder)
    assert {name for name, value in archive.members.items() if value is None} == unpublished
    for name, value in known.train_list + known.test_list:
        assert archive.members[name] == value
    monkeypatch.setattr(known, "tgz_md5", "another")
    assert official_archive(dataset).md5 == "another"


# --- reading ---------------------------------------------------------------------------------------------------------


def test_archive_and_folder_hold_the_same(archive: Archive, root: Path) -> None:
    from_archive = contents_of(archive, root)
    assert from_archive == CONTENTS
    assert list(from_archive) == list(CONTENTS), "in the order in which they lie, whatever the order of the checksums"
    assert [path.name for path in root.iterdir()] == ["things.tar.gz"], "nothing is unpacked"
    (root / "things.tar.gz").unlink()
    unpack(root)
    assert contents_of(archive, root) == CONTENTS


def test_leading_dots_in_an_archive(archive: Archive, root: Path) -> None:
    write_tar(root / "things.tar.gz", "things", CONTENTS, prefix="./")
    assert contents_of(replace(archive, md5=md5((root / "things.tar.gz").read_bytes())), root) == CONTENTS


def test_blocks(archive: Archive, root: Path) -> None:
    with open_members(archive, root, download=False) as members:
        for name, reader in members:
            blocks = []
            while block := reader.read(999):
                blocks.append(block)
            assert all(len(block) == 999 for block in blocks[:-1])
            assert b"".join(blocks) == CONTENTS[name]


@pytest.mark.parametrize("size", [-1, 1000])
def test_each_member_is_checked(archive: Archive, root: Path, size: int) -> None:
    wrong = replace(archive, members={**archive.members, "first": md5(b"")})

    def read_all() -> None:
        with open_members(wrong, root, download=False) as members:
            for _, reader in members:
                while reader.read(size):
                    pass

    with pytest.raises(DataError, match=r"first in .*things\.tar\.gz is not the official file"):
        read_all()


def test_missing_member(archive: Archive, root: Path) -> None:
    wanting = replace(archive, members={**archive.members, "third": md5(b""), "fourth": None})
    with pytest.raises(DataError, match=r"things\.tar\.gz lacks things/third and fourth: delete .* and download http"):
        contents_of(wanting, root)


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.99])
def test_truncated_archive(archive: Archive, root: Path, keep: float) -> None:
    path = root / "things.tar.gz"
    content = path.read_bytes()[: int(path.stat().st_size * keep)]
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"things\.tar\.gz is truncated or corrupt, its md5 is not \w+: delete it and download http"):
        contents_of(archive, root)
    # Even if its checksum were right, so that the reading itself fails.
    with pytest.raises(DataError, match=r"things\.tar\.gz.*: delete .*things\.tar\.gz and download http"):
        contents_of(replace(archive, md5=md5(content)), root)
    assert [path.name for path in root.iterdir()] == ["things.tar.gz"]


def test_flipped_bits(archive: Archive, root: Path) -> None:
    path = root / "things.tar.gz"
    whole = path.read_bytes()
    for position in (5, 500, len(whole) // 2, len(whole) - 40):
        content = whole[:position] + bytes([whole[position] ^ 0x55]) + whole[position + 1 :]
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"things\.tar\.gz is truncated or corrupt"):
            contents_of(archive, root)
        # As if its checksum were right: then nothing but the file without a checksum of its own may differ.
        with suppress(DataError):
            found = contents_of(replace(archive, md5=md5(content)), root)
            assert found | {"notes.txt": b""} == CONTENTS | {"notes.txt": b""}


def test_errors_of_the_reader_are_not_blamed_on_the_archive(archive: Archive, root: Path) -> None:
    with pytest.raises(OSError, match="disk full"), open_members(archive, root, download=False):
        raise OSError("disk full")


@pytest.mark.parametrize("damage", ["missing", "corrupt"])
def test_broken_folder(archive: Archive, root: Path, damage: str) -> None:
    unpack(root)
    if damage == "missing":
        (root / "things" / "first").unlink()
    else:
        (root / "things" / "first").write_bytes(CONTENTS["first"][:-1])
    assert contents_of(archive, root) == CONTENTS, "the archive is whole"
    (root / "things.tar.gz").unlink()
    with pytest.raises(DataError, match=r"things/first is .*: delete .*things and download http.*--data\.download true"):
        contents_of(archive, root)


# --- downloading -----------------------------------------------------------------------------------------------------


def test_download(server: Callable[..., tuple[Archive, list[str]]], root: Path) -> None:
    archive, requests = server()
    assert contents_of(archive, root, download=True) == CONTENTS
    assert [path.name for path in root.iterdir()] == ["things.tar.gz"]
    answered = len(requests)
    assert answered > 0
    assert contents_of(archive, root, download=True) == CONTENTS
    assert len(requests) == answered, "what is there is not downloaded again"


def test_corrupt_archive_is_downloaded_anew(server: Callable[..., tuple[Archive, list[str]]], root: Path) -> None:
    archive, _ = server()
    (root / "things.tar.gz").write_bytes(b"half")
    assert contents_of(archive, root, download=True) == CONTENTS


@pytest.mark.parametrize("settings", [{"keep": 0.5}, {"keep": 0.0}, {"status": 404}])
def test_failed_download(server: Callable[..., tuple[Archive, list[str]]], root: Path, settings: dict[str, Any]) -> None:
    archive, _ = server(**settings)
    with pytest.raises(DataError, match=r"things\.tar\.gz could not be downloaded .*: download it by hand into /.*/data, .*--data\.root"):
        contents_of(archive, root, download=True)
    assert list(root.iterdir()) == []


@pytest.mark.parametrize(
    "error",
    [
        urllib.error.URLError("no route to host"),
        TimeoutError("timed out"),
        ConnectionResetError(104, "reset by peer"),
        http.client.IncompleteRead(b"half"),
        OSError(28, "No space left on device"),
        RuntimeError("File not found or corrupted."),
    ],
)
def test_no_network(archive: Archive, root: Path, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "things.tar.gz").unlink()

    def fail(url: str, root: str, filename: str, md5: str) -> None:
        (Path(root) / filename).write_bytes(b"half")
        raise error

    monkeypatch.setattr(utils, "download_url", fail)
    with pytest.raises(
        DataError, match=rf"{archive.url} could not be downloaded .*: download it by hand into {root}, or .*--data\.root"
    ) as caught:
        pack_archive(root / "things.h5", archive, True, _write)
    assert "\n" not in str(caught.value)
    assert left(root) == []


def test_nobody_listens(archive: Archive, root: Path) -> None:
    """Torchvision's own download, of an address where there is nothing."""
    (root / "things.tar.gz").unlink()
    with pytest.raises(DataError, match="refused"):
        contents_of(archive, root, download=True)


def test_interrupted_download(archive: Archive, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "things.tar.gz").unlink()

    def interrupt(url: str, root: str, filename: str, md5: str) -> None:
        (Path(root) / filename).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(utils, "download_url", interrupt)
    with pytest.raises(KeyboardInterrupt):
        pack_archive(root / "things.h5", archive, True, _write)
    assert left(root) == []


def test_nothing_and_no_download(archive: Archive, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=rf"neither things\.tar\.gz nor the folder things in {tmp_path}/typo: download {archive.url} into it, .*--data"
    ):
        pack_archive(tmp_path / "typo" / "things.h5", archive, False, _write)
    assert not (tmp_path / "typo").exists()


# --- packing ---------------------------------------------------------------------------------------------------------


def _write(file: Any, members: Members) -> None:
    for name, reader in members:
        file[name] = np.frombuffer(reader.read(), np.uint8)


def left(root: Path) -> list[str]:
    """Files in the folder, but for the lock."""
    return sorted(path.name for path in root.iterdir() if not path.name.endswith(".lock"))


def test_packed_file_is_enough(archive: Archive, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utils, "download_url", no_network)
    pack_archive(root / "things.h5", archive, False, _write)
    assert left(root) == ["things.h5", "things.tar.gz"]
    (root / "things.tar.gz").unlink()
    before = (root / "things.h5").stat().st_mtime_ns
    for download in (True, False):
        pack_archive(root / "things.h5", archive, download, _write)
    assert (root / "things.h5").stat().st_mtime_ns == before
    with h5py.File(root / "things.h5") as file:
        assert file["first"][:].tobytes() == CONTENTS["first"]


def test_broken_packed_file_is_made_anew(archive: Archive, root: Path) -> None:
    pack_archive(root / "things.h5", archive, False, _write)
    whole = (root / "things.h5").read_bytes()
    (root / "things.h5").write_bytes(whole[: len(whole) // 2])
    pack_archive(root / "things.h5", archive, False, _write)
    with h5py.File(root / "things.h5") as file:
        assert file["first"][:].tobytes() == CONTENTS["first"]


def test_somebody_elses_file_is_not_replaced(archive: Archive, root: Path) -> None:
    with h5py.File(root / "things.h5", "w") as file:
        file["mine"] = 1
    with pytest.raises(DataError, match=r"things\.h5 was not packed by litzoo .* move it away"):
        pack_archive(root / "things.h5", archive, True, _write)
    with h5py.File(root / "things.h5") as file:
        assert "mine" in file


def test_root_is_a_file(archive: Archive, root: Path) -> None:
    with pytest.raises(DataError, match=r"things\.tar\.gz is not a folder: .*--data\.root"):
        pack_archive(root / "things.tar.gz" / "things.h5", archive, True, _write)


def test_damage_leaves_nothing_behind(archive: Archive, root: Path) -> None:
    wrong = replace(archive, members={**archive.members, "second": md5(b"")})
    with pytest.raises(DataError):
        pack_archive(root / "things.h5", wrong, False, _write)
    assert left(root) == ["things.tar.gz"]


_PACKER = """
import json, sys, time
from pathlib import Path
import numpy as np
from litzoo.datamodules.archives import Archive, pack_archive

root, start = Path(sys.argv[1]), Path(sys.argv[2])

def write(file, members):
    with open(root / "log", "a") as log:
        log.write("packed\\n")
    for name, reader in members:
        file[name] = np.frombuffer(reader.read(), np.uint8)
    time.sleep(0.5)

(root / f"ready{sys.argv[3]}").touch()
while not start.exists():
    time.sleep(0.01)
pack_archive(root / "things.h5", Archive(**json.loads(sys.argv[4])), True, write)
assert (root / "things.h5").exists()
"""


def test_two_processes_download_and_pack_once(server: Callable[..., tuple[Archive, list[str]]], root: Path, tmp_path: Path) -> None:
    archive, requests = server()
    description = json.dumps(dataclasses.asdict(archive))
    command = [sys.executable, "-c", _PACKER, str(root), str(tmp_path / "start")]
    processes = [subprocess.Popen([*command, str(rank), description], stderr=subprocess.PIPE, text=True) for rank in range(2)]
    try:
        deadline = time.monotonic() + 120
        while not all((root / f"ready{rank}").exists() for rank in range(2)) and time.monotonic() < deadline:
            time.sleep(0.01)
        (tmp_path / "start").touch()
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], errors
    assert (root / "log").read_text() == "packed\n"
    assert left(root) == ["log", "ready0", "ready1", "things.h5", "things.tar.gz"]
    assert len(requests) == 2, "torchvision asks for redirects, then for the file; by one process"


# --- pickles ---------------------------------------------------------------------------------------------------------


class _Python2Pickler(pickle._Pickler):  # the one in pure Python, whose methods can be replaced
    """Writes texts and bytes as Python 2 wrote its `str`, as in the official files."""

    dispatch: ClassVar[dict[type, Any]] = dict(pickle._Pickler.dispatch)

    def save_bytes(self, value: bytes) -> None:
        self.write(pickle.BINSTRING + len(value).to_bytes(4, "little") + value)
        self.memoize(value)

    def save_text(self, value: str) -> None:
        self.save_bytes(value.encode("latin1"))

    dispatch[bytes] = save_bytes
    dispatch[str] = save_text


def python2_pickle(value: Any) -> bytes:
    stream = io.BytesIO()
    _Python2Pickler(stream, protocol=2).dump(value)
    return stream.getvalue().replace(b"numpy._core.", b"numpy.core.")


@pytest.mark.parametrize(
    "dump", [python2_pickle, lambda value: pickle.dumps(value, protocol=2), lambda value: pickle.dumps(value, protocol=4)]
)
def test_pickles_of_arrays(dump: Callable[[Any], bytes]) -> None:
    data = np.random.default_rng(0).integers(0, 256, (7, 3072), dtype=np.uint8)
    batch = {"data": data, "labels": [3, 1, 4, 1, 5, 9, 2], "batch_label": "testing batch 1 of 1", "filenames": ["é.png"] * 7}
    content = dump(batch)
    found, official = unpickle_arrays(content, "batch"), pickle.loads(content, encoding="latin1")
    for loaded in (found, official):
        assert np.array_equal(loaded["data"], data)
        assert loaded["data"].dtype == np.uint8
        assert {key: loaded[key] for key in batch if key != "data"} == {key: batch[key] for key in batch if key != "data"}


class _Evil:
    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call[0], self.call[1:]


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_pickles_run_no_code(protocol: int, tmp_path: Path) -> None:
    for call in ((os.system, f"touch {tmp_path}/run"), (eval, "1"), (np.load, "x"), (codecs.encode, "a", "rot13"), (getattr, "a", "b")):
        content = pickle.dumps({"data": _Evil(*call)}, protocol=protocol)
        with pytest.raises(DataError, match="batch is not a pickle of plain arrays"):
            unpickle_arrays(content, "batch")
    assert list(tmp_path.iterdir()) == []


def test_damaged_pickles() -> None:
    content = pickle.dumps({"data": np.zeros(100, np.uint8)}, protocol=2)
    for broken in (b"", content[:-1], content[: len(content) // 2], b"\xff" + content[1:]):
        with pytest.raises(DataError, match="batch is not a pickle"):
            unpickle_arrays(broken, "batch")
