"""`litzoo predict` on meshes and point clouds: folders of both against the model itself, options, and broken files."""

import csv
import errno
import json
import os
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import trimesh
from contract import shapenet_clouds, write_shapenet

import litzoo
from litzoo.datamodules import ShapeNetPartDataModule
from litzoo.datamodules.meshes import read_cloud, turn_up
from litzoo.zoo import ImageClassifier, PointNetClassifier
from litzoo.zoo.cli import main


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models, untrained."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    points = PointNetClassifier(2, ["ball", "rod"], input_transform=False, feature_transform=False)
    with torch.no_grad():  # an untrained one says nearly the same of every cloud
        points.head[-1].weight.mul_(300)
    litzoo.save(points, folder / "points.safetensors", {}, half=False)
    images = ImageClassifier(3, ["cat", "dog", "owl"], "conv4", image_size=16)
    litzoo.save(images, folder / "images.safetensors", {}, half=False)
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def shapes(here: Path) -> Path:
    """A folder of nine readable files with ten shapes."""
    folder = here / "shapes"
    (folder / "deep").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in ("a.obj", "b.OFF", "c.ply", "deep/d.stl", "e.glb"):
        mesh = trimesh.creation.box(extents=rng.uniform(0.2, 2, 3))
        mesh.export(folder / name, file_type=name[-3:].lower())
    np.savetxt(folder / "f.xyz", rng.normal(size=(300, 3)) * (1, 2, 3))
    np.save(folder / "g.npy", rng.normal(size=(400, 3)))
    with h5py.File(folder / "h.h5", "w") as file:
        file["points"] = rng.normal(size=(2, 50, 3)).astype(np.float32)
    trimesh.PointCloud(rng.normal(size=(70, 3))).export(folder / "i.ply")
    (folder / "notes.txt").write_text("hello")
    (folder / ".hidden.obj").write_text("")
    return folder


FILES = ["a.obj", "b.OFF", "c.ply", "deep/d.stl", "e.glb", "f.xyz", "g.npy", "h.h5", "h.h5", "i.ply"]


def classify(weights: Path, *arguments: str, model: str = "points") -> list[dict[str, Any]]:
    """The rows of the JSON output."""
    assert main(["predict", *arguments, "--model", str(weights / f"{model}.safetensors"), "--output", "rows.json", "--top", "3"]) == 0
    return json.loads(Path("rows.json").read_text())


def confidence(rows: list[dict[str, Any]]) -> np.ndarray:
    """`(rows, classes)`, in the order of the classes."""
    return np.array(
        [[{guess["class"]: guess["confidence"] for guess in row["predictions"]}[name] for name in ("ball", "rod")] for row in rows]
    )


def clouds(shapes: Path, points: int = 2048) -> list[np.ndarray]:
    with h5py.File(shapes / "h.h5") as file:
        two = list(file["points"][:])
    found = {name: read_cloud(shapes / name, points) for name in FILES if not name.endswith(("npy", "h5"))}
    found["g.npy"] = np.load(shapes / "g.npy")
    return [found[name] if name != "h.h5" else two.pop(0) for name in FILES]


def expected(weights: Path, arrays: list[np.ndarray], **options: Any) -> np.ndarray:
    """What the model says, cloud by cloud."""
    loaded: Any = litzoo.load(weights / "points.safetensors")
    return np.concatenate([loaded.predict(torch.from_numpy(array.astype(np.float32)), **options).numpy() for array in arrays])


def mistake(capsys: pytest.CaptureFixture[str], weights: Path, *arguments: str, model: str = "points") -> str:
    """The one line that a refused call prints."""
    capsys.readouterr()
    assert main(["predict", *arguments, "--model", str(weights / f"{model}.safetensors")]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(lines) == 1, lines
    assert lines[0].startswith("litzoo: ")
    return lines[0]


@pytest.mark.parametrize("batch_size", ["1", "2", "32"])
def test_a_folder_of_everything(batch_size: str, weights: Path, shapes: Path) -> None:
    by_hand = expected(weights, clouds(shapes))
    assert np.ptp(by_hand, axis=0).max() > 1e-3, "or the comparison would prove nothing"
    rows = classify(weights, "shapes", "--batch-size", batch_size)
    assert [row["file"] for row in rows] == [f"shapes/{name}" for name in sorted(FILES)]
    order = sorted(range(10), key=lambda place: FILES[place])
    assert [row["index"] for row in rows] == [0, 0, 0, 0, 0, 0, 0, 0, 1, 0]
    assert confidence(rows) == pytest.approx(by_hand[order], abs=2e-6)


def test_number_of_points_and_up_axis(weights: Path, shapes: Path) -> None:
    order = sorted(range(10), key=lambda place: FILES[place])
    rows = classify(weights, "shapes", "--points", "64", "--up-axis", "z")
    arrays = [turn_up(cloud, "z") for cloud in clouds(shapes, 64)]
    assert sorted({len(array) for array in arrays}) == [50, 64, 400]
    assert confidence(rows) == pytest.approx(expected(weights, arrays)[order], abs=2e-6)
    assert np.abs(confidence(rows) - expected(weights, clouds(shapes, 64))[order]).max() > 1e-3


@pytest.mark.parametrize("vote_by", [None, "yaw", "subsample"])
def test_votes(vote_by: Any, weights: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, Any]] = []
    real = PointNetClassifier.predict

    def spy(self: Any, clouds: Any, votes: int = 1, vote_by: Any = "yaw") -> torch.Tensor:
        given.append({"votes": votes, "vote_by": vote_by})
        return real(self, clouds, votes, vote_by)

    monkeypatch.setattr(PointNetClassifier, "predict", spy)
    rows = classify(weights, "shapes/a.obj", "shapes/g.npy", "--votes", "3", *(["--vote-by", vote_by] if vote_by else []))
    assert given == [{"votes": 3, "vote_by": vote_by or "yaw"}] * 2
    arrays = clouds(shapes)
    assert confidence(rows) == pytest.approx(expected(weights, [arrays[0], arrays[6]], votes=3, vote_by=vote_by or "yaw"), abs=2e-6)


def test_options_that_do_not_fit(weights: Path, shapes: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    np.save("a.npy", np.zeros((16, 16, 3), np.uint8))
    for option, value in (("--points", "9"), ("--up-axis", "z"), ("--votes", "2")):
        assert f"{option} is for meshes and point clouds, but" in mistake(capsys, weights, "a.npy", option, value, model="images")
    assert "--vote-by says what the views of --votes are: give both" in mistake(capsys, weights, "shapes", "--vote-by", "yaw")
    for option in ("--points", "--votes", "--top", "--batch-size"):
        assert f"{option} must be at least 1" in mistake(capsys, weights, "shapes", option, "0")
    monkeypatch.setattr(PointNetClassifier, "predict", lambda self, clouds: pytest.fail("work was done"))
    assert "--votes: " in (text := mistake(capsys, weights, "shapes", "--votes", "2"))
    assert "PointNetClassifier, which takes no votes: leave it out" in text


def test_the_wrong_kind(weights: Path, shapes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "shapes/a.obj holds point clouds, but" in mistake(capsys, weights, "shapes/a.obj", model="images")
    assert "notes.txt: pictures are read from .jpg" in (text := mistake(capsys, weights, "shapes/notes.txt"))
    assert "meshes and clouds from .obj, .off, .ply" in text
    assert "no file or folder nowhere.obj" in mistake(capsys, weights, "nowhere.obj")
    assert "shapes holds no .jpg" in mistake(capsys, weights, "shapes", model="images")


def test_broken_files_are_named_and_the_others_classified(weights: Path, shapes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (shapes / "a2.obj").write_text("v 0 0 0\nf 1 2 3\n")
    (shapes / "cut.ply").write_bytes((shapes / "c.ply").read_bytes()[:200])
    (shapes / "z.stl").write_text("")
    message = mistake(capsys, weights, "shapes", "--output", "rows.json", "--top", "3")
    assert "3 of 12 files cannot be read: shapes/a2.obj (a face names vertex 2, but it has 1" in message
    assert "shapes/z.stl (it is empty); the others are classified" in message
    rows = json.loads(Path("rows.json").read_text())
    assert [row["file"] for row in rows] == [f"shapes/{name}" for name in sorted(FILES)]
    message = mistake(capsys, weights, "shapes/z.stl", "--output", "none.json")
    assert "1 of 1 files cannot be read: shapes/z.stl (it is empty)" in message
    assert "others" not in message
    assert sorted(path.name for path in shapes.parent.iterdir()) == ["rows.json", "shapes"]


def test_a_broken_array_is_refused_before_any_work(
    weights: Path, shapes: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PointNetClassifier, "predict", lambda self, clouds: pytest.fail("work was done"))
    np.save("wrong.npy", np.full((5, 3), np.nan))
    assert "wrong.npy holds NaN" in mistake(capsys, weights, "shapes", "wrong.npy")


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.int8, np.float16, np.float64])
def test_numbers_of_any_kind(kind: Any, weights: Path, here: Path) -> None:
    cloud = np.random.default_rng(0).integers(0, 100, (50, 3)).astype(kind)
    np.save("a.npy", cloud)
    rows = classify(weights, "a.npy", "--up-axis", "z")
    assert confidence(rows) == pytest.approx(expected(weights, [turn_up(cloud.astype(np.float64), "z")]), abs=2e-6)


def test_arrays_that_hold_no_cloud(weights: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save("none.npy", np.zeros((0, 9, 3)))
    assert "none.npy: a cloud has shape (points, 3)" in mistake(capsys, weights, "none.npy")
    np.save("large.npy", np.full((9, 3), 1e300))
    assert "large.npy holds NaN or infinite coordinates" in mistake(capsys, weights, "large.npy")
    with h5py.File("group.h5", "w") as file:
        file.create_group("points")
    assert "group.h5: `points` must be an array, it is a group" in mistake(capsys, weights, "group.h5")


@pytest.mark.parametrize("columns", [4, 6, 7])
def test_normals_and_labels_behind_the_coordinates(columns: int, weights: Path, here: Path) -> None:
    rng = np.random.default_rng(0)
    array = rng.normal(size=(2, 60, columns)) * np.array([1, 2, 3, 50, 60, 70, 80])[:columns]
    array[..., 3:] = np.nan  # not looked at
    (here / "clouds").mkdir()
    np.save("clouds/one.npy", array[0])
    np.save("clouds/two.npy", array)
    with h5py.File("clouds/three.h5", "w") as file:
        file["points"] = array
    rows = classify(weights, "clouds")
    assert [row["file"] for row in rows] == ["clouds/one.npy", *["clouds/three.h5"] * 2, *["clouds/two.npy"] * 2]
    first, second = expected(weights, list(array[..., :3]))
    assert np.abs(first - second).max() > 1e-4
    assert confidence(rows) == pytest.approx(np.stack([first, first, second, first, second]), abs=2e-6)
    np.savetxt("one.xyz", array[0])
    assert confidence(classify(weights, "one.xyz")) == pytest.approx(first[None], abs=2e-6)


@pytest.mark.parametrize("shape", [(60, 2), (60, 5), (60, 8), (2, 60, 512), (60,), (2, 2, 60, 3)])
def test_other_columns_are_refused(shape: tuple[int, ...], weights: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save("a.npy", np.zeros(shape))
    message = mistake(capsys, weights, "a.npy")
    assert "a.npy: a cloud has shape (points, 3), several have (clouds, points, 3), with 4, 6 or 7 columns if normals or labels" in message
    assert f"this is float64 {shape}" in message


@pytest.mark.parametrize("options", [(), ("--votes", "3"), ("--votes", "2", "--vote-by", "subsample"), ("--up-axis", "z")])
def test_points_that_fill_up_a_packed_cloud_are_not_seen(options: tuple[str, ...], weights: Path, here: Path) -> None:
    rng = np.random.default_rng(0)
    own = [rng.normal(size=(size, 3)).astype(np.float32) + (3 * rng.random(3)).astype(np.float32) for size in (40, 90, 7, 40)]
    with h5py.File("packed.h5", "w") as file:
        file["points"] = np.stack([cloud[np.arange(90) % len(cloud)] for cloud in own])
        file["count"] = np.array([len(cloud) for cloud in own])
    for place, cloud in enumerate(own):
        np.save(f"{place}.npy", cloud)
    rows = classify(weights, "packed.h5", *options)
    assert [row["index"] for row in rows] == [0, 1, 2, 3]
    apart = confidence(classify(weights, *(f"{place}.npy" for place in range(4)), *options))
    assert confidence(rows) == pytest.approx(apart, abs=2e-6)
    with h5py.File("packed.h5", "a") as file:
        del file["count"]
    assert np.abs(confidence(classify(weights, "packed.h5", *options)) - apart).max() > 1e-4


def test_packed_shapes_are_classified_as_the_data_module_gives_them(weights: Path, here: Path) -> None:
    data = ShapeNetPartDataModule(write_shapenet(here / "shapenet", "v0", *shapenet_clouds()), pack="packed.h5", farthest=0)
    assert data.arrays.count is not None
    found = confidence(classify(weights, "packed.h5"))
    assert len(found) == len(data.files)
    loaded: Any = litzoo.load(weights / "points.safetensors").eval()
    for batch in (*data.eval_train_dataloader(), *data.test_dataloader()):
        with torch.no_grad():
            assert found[batch.index] == pytest.approx(loaded.predict_step(data.transform(batch), 0).numpy(), abs=2e-6)


def test_whole_numbers_in_hdf5_are_no_points(weights: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As the data module says of the same file."""
    with h5py.File("whole.h5", "w") as file:
        file["points"] = np.ones((2, 9, 3), np.int32)
    told = mistake(capsys, weights, "whole.h5")
    assert "whole.h5: `points` must be floats of shape (clouds, points, 3), they are int32 (2, 9, 3)" in told


@pytest.mark.parametrize("count", [[3], [3, 0], [3, 10], [3.0, 3.0], 3])
def test_counts_that_fit_no_cloud(count: Any, weights: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with h5py.File("packed.h5", "w") as file:
        file["points"], file["count"] = np.ones((2, 9, 3), np.float32), count
    assert "packed.h5: `count` must say how many of its 9 points each of the 2 clouds has" in mistake(capsys, weights, "packed.h5")


def test_an_output_that_cannot_be_written_is_refused_before_any_work(
    weights: Path, shapes: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(PointNetClassifier, "predict", lambda self, clouds: pytest.fail("work was done"))
        Path("folder.csv").mkdir()
        assert "--output folder.csv is a folder: give the name of a file" in mistake(capsys, weights, "shapes", "--output", "folder.csv")
        patch.setattr(os, "access", lambda path, mode: False)
        assert "--output a.csv: you may not write to " in mistake(capsys, weights, "shapes", "--output", "a.csv")

    def full(self: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(target))

    monkeypatch.setattr(Path, "replace", full)
    assert "a.csv: No space left on device" in mistake(capsys, weights, "shapes", "--output", "a.csv")
    assert sorted(os.listdir()) == ["folder.csv", "shapes"]


def test_a_missing_library(weights: Path, shapes: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for library in ("trimesh", "open3d"):
        monkeypatch.setitem(sys.modules, library, None)
    assert 'pip install "litzoo[points]"' in mistake(capsys, weights, "shapes")
    assert len(classify(weights, "shapes/a.obj", "shapes/b.OFF", "shapes/c.ply", "shapes/f.xyz")) == 4


def test_not_all_are_held_in_memory(weights: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[tuple[int, ...]] = []
    real = PointNetClassifier.predict

    def spy(self: Any, clouds: Any) -> torch.Tensor:
        sizes.append(tuple(clouds.shape))
        return real(self, clouds)

    monkeypatch.setattr(PointNetClassifier, "predict", spy)
    names = [f"shapes/{name}" for name in ("a.obj", "b.OFF", "c.ply", "h.h5", "i.ply")]
    assert len(classify(weights, *names, "--batch-size", "2", "--points", "64")) == 6
    assert sizes == [(2, 64, 3), (1, 64, 3), (1, 50, 3), (1, 50, 3), (1, 64, 3)]


def test_tables(weights: Path, shapes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "shapes/a.obj", "--model", str(weights / "points.safetensors"), "--top", "1"]) == 0
    assert [list(row) for row in csv.DictReader(capsys.readouterr().out.splitlines())] == [["file", "index", "class_1", "confidence_1"]]
    assert main(["predict", "shapes/a.obj", "--model", str(weights / "points.safetensors"), "--output", "a.csv"]) == 0
    assert capsys.readouterr().out == "1 clouds: a.csv\n"
