"""Packed files: made once and whole or not at all, and nobody else's file is touched."""

import os
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from litzoo.datamodules import DataError
from litzoo.datamodules.packing import block_dataset, map_array, map_images, pack_once

IMAGES = np.random.default_rng(0).integers(0, 256, (20, 5, 7, 3), dtype=np.uint8)


def write(file: Any) -> None:
    image = block_dataset(file, "image", IMAGES.shape)
    image[:8] = IMAGES[:8]
    file["label"] = np.arange(20)
    image[8:] = IMAGES[8:]


def test_images_are_one_block_that_h5py_and_a_map_read_alike(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "a.h5"
    pack_once(path, "here", write)
    with h5py.File(path) as file:
        assert file["image"].chunks is None
        assert np.array_equal(file["image"][...], IMAGES)
        assert np.array_equal(file["label"][...], np.arange(20))
        assert file.attrs["source"] == "here"
    assert np.array_equal(map_images(path).permute(0, 2, 3, 1).numpy(), IMAGES)


def test_a_map_is_private(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    pack_once(path, "here", write)
    map_images(path)[:] = 0
    assert np.array_equal(map_images(path).permute(0, 2, 3, 1).numpy(), IMAGES)


def test_packed_once_unless_the_source_changes_or_the_file_is_broken(tmp_path: Path) -> None:
    path, calls = tmp_path / "a.h5", []

    def counted(file: Any) -> None:
        calls.append(1)
        write(file)

    for source, expected in (("one", 1), ("one", 1), ("two", 2)):
        pack_once(path, source, counted)
        assert len(calls) == expected
    path.write_bytes(path.read_bytes()[:100])
    pack_once(path, "two", counted)
    assert len(calls) == 3
    assert np.array_equal(map_images(path).permute(0, 2, 3, 1).numpy(), IMAGES)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_what_fails_leaves_what_was_there(tmp_path: Path, error: type[BaseException]) -> None:
    def fail(file: Any) -> None:
        block_dataset(file, "image", IMAGES.shape)[:8] = IMAGES[:8]
        raise error

    path = tmp_path / "a.h5"
    with pytest.raises(error):
        pack_once(path, "one", fail)
    assert {entry.name for entry in tmp_path.iterdir()} <= {".a.h5.lock"}
    pack_once(path, "one", write)
    with pytest.raises(error):
        pack_once(path, "two", fail)
    assert np.array_equal(map_images(path).permute(0, 2, 3, 1).numpy(), IMAGES)


def test_leftovers_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    for name in (".a.h5.123", ".a.h5.123.txt", ".b.h5.123", "a.h5.123"):
        (tmp_path / name).write_text("x")
    pack_once(tmp_path / "a.h5", "here", write)
    assert {entry.name for entry in tmp_path.iterdir()} == {".a.h5.lock", ".a.h5.123.txt", ".b.h5.123", "a.h5.123", "a.h5"}


def test_a_file_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["image"] = IMAGES
    before = path.read_bytes()
    with pytest.raises(DataError, match="was not packed by litzoo and is left alone"):
        pack_once(path, "here", write)
    assert path.read_bytes() == before


def test_a_place_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match=r"cannot be written to .*a\.h5 .*with --data\.pack"):
        pack_once(tmp_path / "file" / "a.h5", "here", write, "--data.pack")


def test_no_room_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: Any) -> None:
        raise OSError(28, os.strerror(28))

    with pytest.raises(DataError, match="No space left"):
        pack_once(tmp_path / "a.h5", "here", full)
    assert not (tmp_path / "a.h5").exists()


@pytest.mark.parametrize("images", [IMAGES[:3], IMAGES[:8].astype(np.int64), IMAGES[:8, 1:]])
def test_a_block_of_another_shape_is_refused(tmp_path: Path, images: np.ndarray) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        with pytest.raises(ValueError, match="must be uint8 of shape"):
            block_dataset(file, "image", IMAGES.shape)[:8] = images


@pytest.mark.parametrize("settings", [{"chunks": (5, 5, 7, 3)}, {"compression": "gzip"}])
def test_chunks_cannot_be_mapped(tmp_path: Path, settings: dict[str, Any]) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("image", data=IMAGES, **settings)
    with pytest.raises(DataError, match="cannot be memory-mapped"):
        map_images(tmp_path / "a.h5")


@pytest.mark.parametrize("dtype", ["<f4", "<i8", "<f2"])
def test_an_array_of_any_numbers_is_mapped(tmp_path: Path, dtype: str) -> None:
    values = np.random.default_rng(0).normal(size=(6, 4, 3)).astype(dtype)

    def write(file: Any) -> None:
        block = block_dataset(file, "points", values.shape, dtype)
        block[:4], block[4:] = values[:4], values[4:]

    pack_once(tmp_path / "a.h5", "here", write)
    assert np.array_equal(map_array(tmp_path / "a.h5", "points").numpy(), values)


def test_foreign_byte_order_cannot_be_mapped(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["points"] = np.zeros((2, 3), ">f4")
    with pytest.raises(DataError, match="foreign byte order"):
        map_array(tmp_path / "a.h5", "points")
