"""Large HDF5 files that cannot be mapped as they are: packed once, some samples at a time, and read as the others are."""

import os
import pickle
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from contract import same, write_images, write_points

from litzoo.datamodules import ArrayDataModule, DataError, HDF5ImagesDataModule, HDF5PointsDataModule, PointAugmentation
from litzoo.datamodules.packing import ArrayBlock, _map, packed_from

EVERYTHING = PointAugmentation(rotation="full", dropout=0.3, jitter=0.02)
LOADERS = ("train_dataloader", "val_dataloader", "test_dataloader", "eval_train_dataloader")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file is a large one, and is read in several blocks."""
    monkeypatch.setattr("litzoo.datamodules.hdf5_reading._IN_MEMORY", 0)
    monkeypatch.setattr("litzoo.datamodules.hdf5_reading._BLOCK", 5000)


def chunked(path: Path, target: Path, **storage: Any) -> Path:
    """Copy a file; its large arrays are stored in another way."""
    with h5py.File(path) as file, h5py.File(target, "w") as copy:
        for name in file:
            if name in ("image", "points", "part"):
                rows, *rest = file[name].shape
                chunks = (min(storage.get("rows", rows), rows), *rest)
                copy.create_dataset(name, data=file[name][...], chunks=chunks, compression="gzip")
            else:
                file.copy(name, copy)
    return target


def same_batches(a: ArrayDataModule, b: ArrayDataModule) -> bool:
    """Whether all loaders of two DataModules give the same, bit for bit, before and after augmentation."""
    return all(
        same(x, y) and same(a.transform(x), b.transform(y))
        for name in LOADERS
        for x, y in zip(getattr(a, name)(), getattr(b, name)(), strict=True)
    )


def images(path: Path, **settings: Any) -> HDF5ImagesDataModule:
    return HDF5ImagesDataModule(path, augmentation="simclr", views=2, batch_size=8, **{"seed": 1, **settings})


def clouds(path: Path, **settings: Any) -> HDF5PointsDataModule:
    return HDF5PointsDataModule(path, num_points=48, augmentation=EVERYTHING, batch_size=8, **{"seed": 1, **settings})


KINDS = {"image": (write_images, images), "points": (lambda path: write_points(path, parts=True), clouds)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 7, 60])
def test_packed_mapped_and_in_memory_give_the_same_batches(kind: str, rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, make = KINDS[kind]
    plain = write(tmp_path / "plain.h5")
    mapped, packed = make(plain), make(chunked(plain, tmp_path / "chunked.h5", rows=rows))
    assert mapped.arrays.mapped == plain
    assert packed.arrays.mapped == tmp_path / f"chunked.h5.{kind}.h5"
    assert same_batches(mapped, packed)
    monkeypatch.setattr("litzoo.datamodules.hdf5_reading._IN_MEMORY", 1 << 20)
    loaded = make(tmp_path / "chunked.h5")
    assert loaded.arrays.mapped is None
    assert same_batches(loaded, packed)
    assert not same_batches(loaded, make(plain, seed=2)), "the comparison can fail"


@pytest.mark.parametrize("kind", ["<f2", "<f4", "<f8", ">f4"])
@pytest.mark.parametrize("whole", ["u1", ">i2", "u4", "<f8"])
def test_clouds_of_any_type_and_size(kind: str, whole: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_points(tmp_path / "points.h5", parts=True)
    with h5py.File(path, "a") as file:
        values = {"points": file["points"][:].astype(kind), "part": file["part"][:].astype(whole)}
        values["count"] = 5 + np.arange(60)
        for cloud, own in zip(values["points"], values["count"], strict=True):
            cloud[own:] = np.nan
        for name, value in values.items():
            file.pop(name, None)
            file[name] = value
    packed = clouds(path)
    assert packed.arrays.mapped == tmp_path / "points.h5.points.h5", "points behind the count cannot be mapped"
    monkeypatch.setattr("litzoo.datamodules.hdf5_reading._IN_MEMORY", 1 << 20)
    loaded = clouds(path)
    assert loaded.arrays.mapped is None
    assert packed.arrays.input.dtype == loaded.arrays.input.dtype
    assert same_batches(packed, loaded)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_mapped_travels_as_a_path(kind: str, tmp_path: Path) -> None:
    write, make = KINDS[kind]
    plain = write(tmp_path / "plain.h5")
    with h5py.File(plain, "a") as file:  # the other kind as well, which must not be taken for it
        if kind == "points":
            file["image"] = np.zeros((60, 4, 4, 3), np.uint8)
        else:
            file["points"] = np.zeros((60, 4, 3), np.float32)
    for data in (make(plain), make(chunked(plain, tmp_path / "chunked.h5"))):
        assert data.arrays.mapped is not None
        content = pickle.dumps(data)
        assert len(content) < 20_000 < data.arrays.input.numel() * data.arrays.input.element_size()
        assert same_batches(pickle.loads(content), data)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_once_and_anew_if_the_file_changes_or_the_pack_is_broken(kind: str, tmp_path: Path) -> None:
    write, make = KINDS[kind]
    path = chunked(write(tmp_path / "plain.h5"), tmp_path / "chunked.h5")
    before = make(path).arrays
    packed = before.mapped
    assert packed is not None

    def made() -> tuple[int, int]:
        _ = make(path).arrays
        return packed.stat().st_ino, packed.stat().st_mtime_ns

    first = made()
    assert made() == first
    packed.write_bytes(packed.read_bytes()[:-100])
    second = made()
    assert second != first
    assert packed_from(packed) is not None
    with h5py.File(path, "a") as file:
        file[kind][3] = 1
    assert made() != second
    after = make(path).arrays.input
    assert (after[3] == 1).all()
    assert torch.equal(after[4:], before.input[4:])
    third = made()
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))  # as if it were another one of the same size
    assert made() != third


def test_shards_that_another_file_joins(tmp_path: Path) -> None:
    """A virtual array over several files is packed, and anew if one of them changes; a link to another file's array is followed."""
    plain = write_images(tmp_path / "plain.h5")
    with h5py.File(plain) as file:
        image, label, split = (file[name][:] for name in ("image", "label", "split"))
    layout = h5py.VirtualLayout(image.shape, image.dtype)
    for number in range(3):
        part = slice(20 * number, 20 * number + 20)
        with h5py.File(tmp_path / f"shard{number}.h5", "w") as file:
            file["image"] = image[part]
        layout[part] = h5py.VirtualSource(f"shard{number}.h5", "image", (20, *image.shape[1:]))
    for name in ("virtual", "linked"):
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            file["label"], file["split"] = label, split
            if name == "virtual":
                file.create_virtual_dataset("image", layout)
            else:
                file["image"] = h5py.ExternalLink("plain.h5", "/image")
    packed, linked = images(tmp_path / "virtual.h5"), images(tmp_path / "linked.h5")
    assert (packed.arrays.mapped, linked.arrays.mapped) == (tmp_path / "virtual.h5.image.h5", tmp_path / "linked.h5")
    for data in (packed, linked, pickle.loads(pickle.dumps(linked))):
        assert same_batches(data, images(plain))
    with h5py.File(tmp_path / "shard1.h5", "a") as file:
        file["image"][...] = 7
    changed = images(tmp_path / "virtual.h5").arrays.input
    assert (changed[20:40] == 7).all()
    assert torch.equal(changed[40:], packed.arrays.input[40:])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("error", "told"), [(KeyboardInterrupt(), KeyboardInterrupt), (OSError(28, os.strerror(28)), DataError)])
def test_half_a_pack_is_none(
    kind: str, error: BaseException, told: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, make = KINDS[kind]
    plain = write(tmp_path / "plain.h5")
    path = chunked(plain, tmp_path / "chunked.h5", rows=7)
    set_block = ArrayBlock.__setitem__

    def stop(self: ArrayBlock, part: slice, values: np.ndarray) -> None:
        if part.start > 20:
            raise error
        set_block(self, part, values)

    with monkeypatch.context() as patch:
        patch.setattr(ArrayBlock, "__setitem__", stop)
        with pytest.raises(told) as found:
            _ = make(path).arrays
    assert told is KeyboardInterrupt or "No space left on device" in str(found.value)
    assert not [entry.name for entry in tmp_path.iterdir() if kind in entry.name and not entry.name.endswith(".lock")]
    left = tmp_path / f".chunked.h5.{kind}.h5.12345"  # of a process that was killed
    left.write_text("half")
    assert same_batches(make(path), make(plain))
    assert not left.exists()


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_chunk_is_told_of_the_file_itself(kind: str, tmp_path: Path) -> None:
    write, make = KINDS[kind]
    path = chunked(write(tmp_path / "plain.h5"), tmp_path / "chunked.h5", rows=7)
    with h5py.File(path) as file:
        place = file[kind].id.get_chunk_info(4).byte_offset
    content = bytearray(path.read_bytes())
    content[place : place + 40] = bytes(40)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"chunked\.h5 cannot be read as HDF5"):
        _ = make(path).arrays
    assert not (tmp_path / f"chunked.h5.{kind}.h5").exists()


@pytest.mark.parametrize(("name", "value", "message"), [("points", np.nan, "1 clouds hold NaN"), ("part", 2, "parts run up to 2")])
@pytest.mark.parametrize("contiguous", [True, False])
def test_wrong_clouds_are_not_packed(name: str, value: float, message: str, contiguous: bool, tmp_path: Path) -> None:
    path = write_points(tmp_path / "points.h5", parts=True)
    with h5py.File(path, "a") as file:
        file[name][50, 3] = value
    path = path if contiguous else chunked(path, tmp_path / "chunked.h5")
    with pytest.raises(DataError, match=message):
        _ = clouds(path).arrays
    assert not list(tmp_path.glob("*.points.h5"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_place_that_cannot_be_written_to(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, make = KINDS[kind]
    plain = write(tmp_path / "plain.h5")
    path = chunked(plain, tmp_path / "chunked.h5")
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match=r"cannot be written to .* \(File exists\): give a place with room .* with --data\.pack"):
        _ = make(path, pack=tmp_path / "file" / "a.h5").arrays
    with pytest.raises(DataError, match="exists and was not packed from an HDF5 file"):
        _ = make(path, pack=plain).arrays
    with monkeypatch.context() as patch:
        patch.setattr("litzoo.datamodules.packing.disk_usage", lambda _: SimpleNamespace(free=1000))
        with pytest.raises(DataError, match=rf"\({kind} takes .* MB, but 0\.0 MB are free\): give a place with room .* with --data\.pack"):
            _ = make(path).arrays
    # A folder where nobody may write: the pack goes home.
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda *_: False)
        packed = make(path)
        assert packed.arrays.mapped is not None
        assert packed.arrays.mapped.parent == tmp_path / "home" / ".cache" / "litzoo"
        assert same_batches(packed, make(plain))
    (tmp_path / "place").mkdir()
    assert make(path, pack=tmp_path / "place").arrays.mapped == tmp_path / "place" / f"chunked.h5.{kind}.h5"


@pytest.mark.parametrize("kind", KINDS)
def test_memory_does_not_grow_with_the_file(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NumPy reports its memory to tracemalloc; pages of the pack are not the process's own."""
    monkeypatch.setattr("litzoo.datamodules.hdf5_reading._BLOCK", 1 << 19)
    path, rows = tmp_path / "large.h5", 1500
    with h5py.File(path, "w") as file:
        shape, dtype = ((rows, 64, 64, 3), "u1") if kind == "image" else ((rows, 1024, 3), "f4")
        file.create_dataset(kind, shape, dtype, chunks=(50, *shape[1:]), compression="gzip")
        for start in range(0, rows, 50):
            file[kind][start : start + 50] = start % 200
        file["label"] = np.arange(rows) % 4
    make = KINDS[kind][1]

    def peak(work: Callable[[], Any]) -> int:
        tracemalloc.start()
        work()
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    assert peak(lambda: make(path).arrays) < 5e6
    assert (tmp_path / f"large.h5.{kind}.h5").stat().st_size > 18e6
    assert peak(lambda: sum(len(batch.label) for batch in make(path).train_dataloader())) < 5e6
    monkeypatch.setattr("litzoo.datamodules.hdf5_reading._IN_MEMORY", 1 << 30)
    assert peak(lambda: make(path).arrays) > 18e6, "the comparison can fail"


@pytest.mark.skipif(sys.platform != "linux", reason="reserves memory in another way")
def test_a_pack_may_be_larger_than_the_memory(tmp_path: Path) -> None:
    if Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "2":
        pytest.skip("the system grants no more than it has")
    size = 2 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    path = tmp_path / "hole"
    with path.open("wb") as file:
        file.truncate(size)  # takes no room
    array = _map(path, 4096, (size - 4096,), np.dtype("u1"))
    array[-1] += 1
    assert array[-1] == 1
    assert path.stat().st_blocks == 0, "what is written is private"
