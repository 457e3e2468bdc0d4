"""Folders of shapes: layouts, every kind of file, broken files, and that nothing is sampled twice."""

import os
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from contract import write_shapes

from litzoo.datamodules import DataError, HDF5PointsDataModule, MeshFolderDataModule, PointAugmentation, mesh_folder, meshes
from litzoo.datamodules.meshes import read_cloud
from litzoo.datamodules.splits import TEST, TRAIN, UNUSED, VAL, hold_out, stratified_split
from litzoo.zoo import Batch
from litzoo.zoo.functional.points import unit_sphere


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_shapes(tmp_path / "shapes")


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were read since it was last cleared."""
    seen: list[Path] = []
    original = meshes.read_cloud

    def spy(path: Path, *settings: Any) -> np.ndarray:
        seen.append(path)
        return original(path, *settings)

    monkeypatch.setattr(meshes, "read_cloud", spy)
    return seen


# --- which class, which split -------------------------------------------------------------------------------------------------------


def test_classes_are_the_folders(root: Path) -> None:
    (root / "rod" / "long" / "thin").mkdir(parents=True)
    shutil.copy(root / "rod" / "00.off", root / "rod" / "long" / "thin" / "x.OFF")
    data = MeshFolderDataModule(root, sampled_points=64)
    assert data.class_names == ["cube", "plate", "rod"]
    assert data.files == sorted(str(path.relative_to(root)) for path in root.rglob("*.[oO]*"))
    assert data.arrays.input.shape == (61, 64, 3)
    assert data.arrays.input.dtype == torch.float32
    assert [data.class_names[label] for label in data.arrays.label] == [name.split("/")[0] for name in data.files]
    assert torch.equal(data.arrays.split, stratified_split(data.arrays.label, 0.1, 0.15, 0))
    for name, points in zip(data.files, data.arrays.input, strict=True):
        assert (points.numpy() == read_cloud(root / name, 64)).all()


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("val", ["val", "Valid", None])
def test_official_splits(tmp_path: Path, val: str | None, inside: bool) -> None:
    """Above the classes, and within them as in ModelNet."""
    folders = {"train": TRAIN, "test": TEST, **({val: VAL} if val else {})}
    for folder in folders:
        write_shapes(tmp_path / "apart" / folder, shapes=6, classes=("cube", "rod"))
    root = tmp_path / "apart"
    if inside:
        root = tmp_path / "shapes"
        for folder in folders:
            for cls in ("cube", "rod"):
                (root / cls).mkdir(parents=True, exist_ok=True)
                (tmp_path / "apart" / folder / cls).rename(root / cls / folder)
    data = MeshFolderDataModule(root, sampled_points=16, val_fraction=0.3)
    assert data.class_names == ["cube", "rod"]
    assert len(data.files) == 12 * len(folders)
    expected = torch.tensor([folders[name.split("/")[inside]] for name in data.files], dtype=torch.uint8)
    assert torch.equal(data.arrays.split, expected if val else hold_out(expected, data.arrays.label, 0.3, 0))
    again = MeshFolderDataModule(root, sampled_points=16, split_seed=4)
    assert torch.equal(again.arrays.split, stratified_split(data.arrays.label, 0.1, 0.15, 4))


def test_a_folder_beside_the_splits_of_a_class(tmp_path: Path) -> None:
    for folder in ("train", "test", "extra"):
        write_shapes(tmp_path / folder, shapes=2, classes=("cube", "rod"))
        for cls in ("cube", "rod"):
            (tmp_path / "shapes" / cls).mkdir(parents=True, exist_ok=True)
            (tmp_path / folder / cls).rename(tmp_path / "shapes" / cls / folder)
    with pytest.raises(DataError, match=r"has the splits test, train within its classes, but cube/extra/00\.off in none of them"):
        _ = MeshFolderDataModule(tmp_path / "shapes").num_classes


def test_a_subfolder_called_test_is_no_split(root: Path) -> None:
    (root / "rod" / "test").mkdir()
    shutil.copy(root / "rod" / "00.off", root / "rod" / "test" / "x.off")
    assert MeshFolderDataModule(root, sampled_points=8).arrays.split.bincount().tolist()[0] > 40


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda root: None, "does not exist: give the folder of the shapes with --data.path"),
        (lambda root: (root / "rod").mkdir(parents=True), r"holds no shapes \(glb, gltf, npy, obj, off, pcd, ply, pts, stl, xyz\)"),
        (lambda root: write_shapes(root, classes=("rod",)), "has shapes of one class only, rod"),
        (lambda root: shutil.copy(write_shapes(root) / "rod" / "00.off", root / "x.off"), "x.off lies in no class folder"),
    ],
)
def test_other_layouts(tmp_path: Path, make: Any, words: str) -> None:
    make(tmp_path / "shapes")
    with pytest.raises(DataError, match=words):
        _ = MeshFolderDataModule(tmp_path / "shapes").num_classes


@pytest.mark.parametrize("setting", [{"sampled_points": 0}, {"up_axis": "x"}, {"num_points": 0}])
def test_impossible_settings(root: Path, setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(setting))):
        MeshFolderDataModule(root, **setting)


# --- points -------------------------------------------------------------------------------------------------------------------------


def test_clouds_of_other_sizes(root: Path) -> None:
    rng = np.random.default_rng(0)
    few, many = rng.normal(size=(5, 3)).astype(np.float32), rng.normal(size=(500, 3)).astype(np.float32)
    np.savetxt(root / "rod" / "few.xyz", few, fmt="%.9g")
    np.save(root / "rod" / "many.npy", many)
    data = MeshFolderDataModule(root, sampled_points=32)
    points = data.arrays.input[data.files.index("rod/few.xyz")].numpy()
    assert points == pytest.approx(few[np.arange(32) % 5])
    points = data.arrays.input[data.files.index("rod/many.npy")].numpy()
    assert (points == read_cloud(root / "rod" / "many.npy", 32)).all()
    assert len({tuple(point) for point in points.tolist()}) == 32


def test_repeated_points_are_not_seen(root: Path) -> None:
    """A cloud of 20 points is normalised, and drawn from, as if it stood alone."""
    few = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    np.savetxt(root / "rod" / "few.xyz", few, fmt="%.9g")
    (root / "rod" / "broken.off").write_text("OFF")
    data = MeshFolderDataModule(root, sampled_points=32, num_points=20, augmentation=PointAugmentation(scale=(1, 1), shift=0))
    with pytest.warns(UserWarning, match=r"broken\.off"):
        place = data.files.index("rod/few.xyz")
    assert data.arrays.count is not None
    assert data.arrays.count[place] == 20
    expected = unit_sphere(torch.from_numpy(few))
    index = torch.tensor([place])
    batch = Batch(data.arrays.input[index], data.arrays.label[index], index)
    torch.testing.assert_close(data.transform(batch).input[0], expected[torch.arange(32) % 20])
    drawn = data.transform(batch._replace(key=torch.tensor([7]))).input[0]
    assert np.array(sorted(drawn.tolist())) == pytest.approx(np.array(sorted(expected.tolist())), abs=1e-6)


def test_up_axis(root: Path) -> None:
    y, z = (MeshFolderDataModule(root, sampled_points=16, up_axis=axis).arrays for axis in ("y", "z"))
    assert torch.equal(z.input, torch.stack([y.input[..., 0], y.input[..., 2], -y.input[..., 1]], dim=-1))
    assert y.mapped != z.mapped


def test_batches(root: Path) -> None:
    data = MeshFolderDataModule(root, sampled_points=64, num_points=24, eval_points=48, batch_size=8)
    batch = data.transform(next(iter(data.train_dataloader())))
    assert batch.input.shape == (8, 24, 3)
    batch = data.transform(next(iter(data.test_dataloader())))
    assert batch.input.shape[1:] == (48, 3)
    assert batch.input.norm(dim=-1).max() <= 1 + 1e-5


# --- broken files -------------------------------------------------------------------------------------------------------------------


def spoil(root: Path) -> list[str]:
    """Break files, each in another way; their names, in order."""
    whole = (root / "cube" / "00.off").read_bytes()
    (root / "cube" / "cut.off").write_bytes(whole[: len(whole) // 2])
    (root / "cube" / "empty.obj").write_bytes(b"")
    (root / "plate" / "text.ply").write_text("<html>404</html>")
    (root / "rod" / "gone.stl").symlink_to(root / "nowhere.stl")
    np.save(root / "rod" / "image.npy", np.zeros((4, 4, 3)))
    (root / "rod" / "nan.xyz").write_text("nan 1 2\n")
    return ["cube/cut.off", "cube/empty.obj", "plate/text.ply", "rod/gone.stl", "rod/image.npy", "rod/nan.xyz"]


def test_broken_files_are_named_and_left_out(root: Path) -> None:
    clean = MeshFolderDataModule(root, sampled_points=16, pack=root.parent / "clean.h5")
    expected = dict(zip(clean.files, clean.arrays.input, strict=True))
    names = spoil(root)
    for again in range(2):  # the second time, nothing is read, but they are named all the same
        data = MeshFolderDataModule(root, sampled_points=16)
        with pytest.warns(UserWarning, match=r"6 of 66 shapes in .* cannot be read: cube/cut\.off \(.* and 1 more; they are left out"):
            _ = data.arrays
        assert [data.files[index] for index in data.indices(UNUSED)] == names, again
        assert sum(data.class_counts) == data.num_train
        good = torch.tensor([name not in names for name in data.files])
        assert torch.equal(data.arrays.split[good], clean.arrays.split)
        for name, points in zip(data.files, data.arrays.input, strict=True):
            assert name in names or torch.equal(points, expected[name])


def test_broken_files_can_be_refused(root: Path) -> None:
    spoil(root)
    with pytest.raises(DataError, match=r"6 of 66 shapes in .* cannot be read: cube/cut\.off \(it is truncated.*skip_corrupt true"):
        _ = MeshFolderDataModule(root, skip_corrupt=False).num_classes
    assert {path.name for path in root.parent.iterdir()} <= {"shapes", ".shapes.2048.y_up.h5.lock"}, "nothing half written stays"


def test_nothing_but_broken_files(tmp_path: Path) -> None:
    for cls in ("a", "b"):
        (tmp_path / "bad" / cls).mkdir(parents=True)
        (tmp_path / "bad" / cls / "x.stl").write_bytes(b"no")
    with pytest.raises(DataError, match="2 of 2 shapes"):
        _ = MeshFolderDataModule(tmp_path / "bad").arrays


def test_a_missing_library_is_no_broken_file(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "rod" / "x.stl").write_text("solid")
    for library in ("trimesh", "open3d"):
        monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(DataError, match=r'pip install "litzoo\[points\]"'):
        _ = MeshFolderDataModule(root).num_classes
    assert not list(root.parent.glob("*.h5"))


# --- packed once --------------------------------------------------------------------------------------------------------------------


def test_an_unchanged_folder_is_sampled_once(root: Path, sampled: list[Path]) -> None:
    first = MeshFolderDataModule(root, sampled_points=16).arrays
    assert sorted(sampled) == sorted(root.rglob("*.off"))
    sampled.clear()
    again = MeshFolderDataModule(root, sampled_points=16)
    assert torch.equal(again.arrays.input, first.input)
    assert again.arrays.mapped == root.parent / "shapes.16.y_up.h5"
    assert not sampled


def test_a_changed_folder_is_packed_anew(root: Path, sampled: list[Path]) -> None:
    before = MeshFolderDataModule(root, sampled_points=16).arrays.input.clone()

    def add() -> None:
        shutil.copy(root / "cube" / "00.off", root / "rod" / "new.off")

    def touch() -> None:
        os.utime(root / "cube" / "01.off", ns=(1, 1))

    def remove() -> None:
        (root / "rod" / "new.off").unlink()

    def replace() -> None:
        shutil.copy(root / "rod" / "03.off", root / "cube" / "00.off")

    for change in (add, touch, remove, replace):
        change()
        sampled.clear()
        data = MeshFolderDataModule(root, sampled_points=16)
        assert len(data.files) == len(data.arrays.input) == len(sampled) == len(list(root.rglob("*.off"))), change.__name__
    assert torch.equal(data.arrays.input[1:], before[1:])
    assert torch.equal(data.arrays.input[0], before[data.files.index("rod/03.off")])


def test_processes_and_blocks_change_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "rod" / "broken.off").write_text("OFF")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        alone = MeshFolderDataModule(root, sampled_points=16).arrays.input.clone()
        monkeypatch.setattr(meshes, "_PARALLEL", 0)
        monkeypatch.setattr(meshes, "_FILES", 7)
        monkeypatch.setattr(mesh_folder, "_BLOCK", 5)
        together = MeshFolderDataModule(root, sampled_points=16, pack=root.parent / "together.h5").arrays.input
    assert torch.equal(alone, together)


def test_stopped_by_the_user(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, read = meshes.read_cloud, []

    def stop(path: Path, *settings: Any) -> np.ndarray:
        read.append(path)
        if len(read) == 30:
            raise KeyboardInterrupt
        return original(path, *settings)

    with monkeypatch.context() as patch:
        patch.setattr(meshes, "read_cloud", stop)
        patch.setattr(mesh_folder, "_BLOCK", 4)
        with pytest.raises(KeyboardInterrupt):
            _ = MeshFolderDataModule(root, sampled_points=16).arrays
    assert {path.name for path in root.parent.iterdir()} <= {"shapes", ".shapes.16.y_up.h5.lock"}
    assert len(MeshFolderDataModule(root, sampled_points=16).arrays.input) == 60


def test_packed_file_is_a_file_of_points(root: Path) -> None:
    """What was packed is read by the other DataModule as well."""
    data = MeshFolderDataModule(root, sampled_points=16, pack=root.parent / "packed.h5")
    _ = data.arrays
    other = HDF5PointsDataModule(root.parent / "packed.h5").arrays
    assert torch.equal(other.input, data.arrays.input)
    assert torch.equal(other.label, data.arrays.label)
    assert other.class_names == data.arrays.class_names
    with h5py.File(root.parent / "packed.h5") as file:
        assert file["file"].asstr()[...].tolist() == data.files


def test_a_pack_of_another_kind_is_not_overwritten(root: Path, tmp_path: Path) -> None:
    with h5py.File(tmp_path / "photos.h5", "w") as file:
        file.attrs["source"] = "litzoo image folder, version 1: 64 crop rgb"
    with pytest.raises(DataError, match="was not packed from a folder of shapes"):
        _ = MeshFolderDataModule(root, pack=tmp_path / "photos.h5").arrays
