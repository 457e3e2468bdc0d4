"""`litzoo show parts`, and `litzoo predict` of a segmenter: the parts are those that the model predicts, drawn in their colours with their names, and what it says to mistakes."""

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

import litzoo
from litzoo.datamodules import HDF5PointsDataModule
from litzoo.datamodules.meshes import read_cloud
from litzoo.zoo import LogisticRegression, PointNetSegmenter
from litzoo.zoo.cli import main
from litzoo.zoo.cli.segmenters import short_names
from litzoo.zoo.plots import parts as part_plots
from litzoo.zoo.plots.point_clouds import part_palette

MODEL = ["--model", "MODEL"]
CLOUDS = np.random.RandomState(0).randn(6, 400, 3).astype(np.float32)
PARTS = ["Chair/leg", "Chair/seat", "Chair/back", "Table/leg", "Table/top"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untrained models and some files of clouds."""
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    model = PointNetSegmenter(2, 5, [0, 0, 0, 1, 1], ["Chair", "Table"], PARTS, "semantic", feature_transform=False)
    with torch.no_grad():  # an untrained one finds the same part everywhere
        model.head.last[-1].weight.mul_(100)
    litzoo.save(model, folder / "model.safetensors", {}, half=False)
    litzoo.save(PointNetSegmenter(1, 2, [0, 0], network="semantic", feature_transform=False), folder / "single.safetensors", {})
    litzoo.save(LogisticRegression(), folder / "logistic.safetensors", {})
    np.save(folder / "one.npy", CLOUDS[0])
    np.save(folder / "none.npy", CLOUDS[:0])
    (folder / "empty.obj").write_bytes(b"")
    (folder / "mesh.obj").write_text("v 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 0.5\nf 1 2 3\nf 1 3 4\n")
    with h5py.File(folder / "shapes.h5", "w") as file:
        file["points"], file["label"], file["split"] = CLOUDS, np.array([0, 1, 0, 2, 1, 1]), np.array([0, 0, 2, 2, 2, 0])
        file["class_names"] = ["table", "CHAIR", "lamp"]
    with h5py.File(folder / "unnamed.h5", "w") as file:
        file["points"], file["label"] = CLOUDS, np.zeros(6, dtype=int)
    return folder


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What `plot_parts` gets and the figures that it makes."""
    calls: list[Any] = []
    real = part_plots.plot_parts

    def plot(*arguments: Any) -> Any:
        calls.append((*arguments, real(*arguments)))
        return calls[-1][-1]

    monkeypatch.setattr(part_plots, "plot_parts", plot)
    return calls


@pytest.fixture
def run(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Runs the command in an empty folder, `@` standing for that of the files; returns status, output and errors."""
    monkeypatch.chdir(tmp_path)

    def command(*arguments: str, subject: tuple[str, ...] = ("show", "parts")) -> tuple[int, str, str]:
        given = [str(files / "model.safetensors") if argument == "MODEL" else argument.replace("@", f"{files}/") for argument in arguments]
        status = main([*subject, *given])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return command


def predicted(files: Path, cloud: np.ndarray, cls: int) -> np.ndarray:
    return litzoo.load(files / "model.safetensors").predict(torch.from_numpy(cloud)[None], torch.tensor([cls]))[0].numpy()


def texts(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.texts if text.get_text() != "●"]


def test_points_and_legend_have_the_colours_of_the_predicted_parts(files: Path, run: Any, drawn: list[Any]) -> None:
    status, out, err = run("@one.npy", "@mesh.obj", *MODEL, "--class", "chair", "--output", "new/folder", "--points", "300")
    assert (status, err) == (0, "")
    ((clouds, parts, titles, names, figure),) = drawn
    assert titles == ["one\nChair", "mesh\nChair"]
    assert names == ["leg", "seat", "back", "leg", "top"]
    assert [cloud.shape for cloud in clouds] == [(300, 3)] * 2
    palette = part_palette(5)
    for cloud, part, axes, line in zip(clouds, parts, figure.axes, out.splitlines(), strict=False):
        np.testing.assert_array_equal(part, predicted(files, cloud, 0))
        present, count = np.unique(part, return_counts=True)
        dots = [text for text in axes.texts if text.get_text() == "●"]
        assert [tuple(dot.get_color()) for dot in dots] == [tuple(palette[each]) for each in present]
        assert [text.split("  ")[0] for text in texts(axes)] == [names[each] for each in present]
        shown, number = np.unique(np.asarray(axes.collections[0].get_facecolor())[:, :3], axis=0, return_counts=True)
        assert {tuple(color): n for color, n in zip(shown, number, strict=True)} == {
            tuple(palette[each]): n for each, n in zip(present, count, strict=True)
        }
        assert all(f"{names[each]} {n / 3:.1f}%" in line for each, n in zip(present, count, strict=True))
    assert len(np.unique(parts[0])) > 1, "the test needs a cloud of several parts"
    assert [str(path) for path in Path().rglob("*.*")] == ["new/folder/parts.png"]


def test_hdf5_files_tell_the_classes(files: Path, run: Any, drawn: list[Any]) -> None:
    """By default those of the test split that the model knows are drawn, one of each class."""
    assert run("@shapes.h5", *MODEL)[0] == 0
    assert run("@shapes.h5", *MODEL, "--class", "TABLE")[0] == 0
    assert run("@shapes.h5", *MODEL, "--index", "3", "1", "--class", "Table")[0] == 0
    assert [call[2] for call in drawn] == [
        ["shapes_2\nTable", "shapes_4\nChair"],
        ["shapes_2\nTable"],
        ["shapes_3\nTable", "shapes_1\nTable"],
    ]
    np.testing.assert_array_equal(drawn[0][1][1], predicted(files, CLOUDS[4], 0))


def test_a_model_of_one_class_needs_no_name(run: Any, drawn: list[Any]) -> None:
    assert run("@one.npy", "--model", "@single.safetensors")[0] == 0
    assert drawn[0][3] == ["0", "1"]


def test_page_and_ply(files: Path, run: Any) -> None:
    status, out, _ = run("@shapes.h5", *MODEL, "--html", "--ply")
    assert status == 0
    assert out.splitlines()[-1] == "parts.png, parts.html, shapes_2_parts.ply, shapes_4_parts.ply"
    page = Path("parts.html").read_text(encoding="utf-8")
    assert "<title>Parts by model</title>" in page
    objects = json.loads(re.findall(r'id="data">(.*?)</script>', page, re.DOTALL)[0])["objects"]
    part = predicted(files, CLOUDS[4], 0)
    assert [(each["name"], each["note"]) for each in objects] == [("shapes_2", "Table"), ("shapes_4", "Chair")]
    assert {layer["name"]: layer["count"] for layer in objects[1]["layers"]} == {
        PARTS[each].removeprefix("Chair/"): int((part == each).sum()) for each in np.unique(part)
    }
    kind = [*((axis, "<f4") for axis in "xyz"), *((channel, "u1") for channel in "rgb")]
    stored = np.frombuffer(Path("shapes_4_parts.ply").read_bytes().partition(b"end_header\n")[2], dtype=kind)
    np.testing.assert_array_equal(np.stack([stored[axis] for axis in "xyz"], axis=1), CLOUDS[4])
    np.testing.assert_array_equal(np.stack([stored[channel] for channel in "rgb"], axis=1), np.rint(255 * part_palette(5)[part]))


def test_names_of_parts_lose_their_class() -> None:
    names = ["Chair/leg", "handle", "lid/knob", "Chair/", "a/b/c", "Chair"]
    assert short_names(names, ["Chair", "a"]) == ["leg", "handle", "lid/knob", "Chair/", "b/c", "Chair"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["@one.npy", *MODEL], "say with --class what one is: "),
        (["@unnamed.h5", *MODEL], "say with --class what unnamed_0 is: "),
        (["@shapes.h5", *MODEL, "--index", "0", "3"], "shapes_3 is of class lamp, which "),
        (["@one.npy", *MODEL, "--class", "chiar"], "knows no such class; did you mean Chair?"),
        (["@one.npy", *MODEL, "--class", "xyz"], "--class xyz: "),
        (
            ["@one.npy", "--model", "@logistic.safetensors", "--class", "Chair"],
            "is a LogisticRegression; parts are what a PointNetSegmenter",
        ),
        (["@one.npy", "--class", "Chair"], "model"),
        (["@empty.obj", *MODEL, "--class", "Chair"], "empty.obj cannot be read: it is empty"),
        (["@none.npy", *MODEL, "--class", "Chair"], "none.npy holds no clouds"),
        (["@nowhere.npy", *MODEL, "--class", "Chair"], "there is no file"),
        (["@shapes.h5", *MODEL, "--index", "6"], "holds clouds 0 to 5"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(arguments: list[str], words: str, run: Any, tmp_path: Path) -> None:
    status, _, err = run(*arguments)
    assert status == 2
    assert len(err.splitlines()) == 1
    assert err.startswith("litzoo: ")
    assert words in err
    assert list(tmp_path.iterdir()) == []


# litzoo predict


@pytest.fixture
def predict(run: Any) -> Callable[..., tuple[int, str, str]]:
    """As `run`, of the other command."""
    return lambda *arguments: run(*arguments, subject=("predict",))


def shares(files: Path, cloud: np.ndarray, cls: int) -> dict[str, Any]:
    part = predicted(files, cloud, cls)
    return {PARTS[each]: pytest.approx((part == each).mean(), abs=1e-6) for each in ([0, 1, 2], [3, 4])[cls]}


def test_shares_of_parts(files: Path, predict: Any) -> None:
    status, out, err = predict("@one.npy", "@mesh.obj", *MODEL, "--class", "chair", "--output", "parts.json")
    assert (status, out, err) == (0, "2 clouds: parts.json\n", "")
    rows = json.loads(Path("parts.json").read_text())
    assert [row["parts"] for row in rows] == [shares(files, cloud, 0) for cloud in (CLOUDS[0], read_cloud(files / "mesh.obj"))]
    assert [(Path(row["file"]).name, row["index"], row["class"]) for row in rows] == [("one.npy", 0, "Chair"), ("mesh.obj", 0, "Chair")]


def test_a_table_has_a_column_for_each_part(files: Path, predict: Any) -> None:
    with h5py.File("known.h5", "w") as file:
        file["points"], file["label"], file["class_names"] = CLOUDS[:2], [1, 0], ["table", "chair"]
    status, out, _ = predict("known.h5", *MODEL)
    assert status == 0
    rows = list(csv.DictReader(out.splitlines()))
    assert [(row["file"], row["index"], row["class"]) for row in rows] == [("known.h5", "0", "Chair"), ("known.h5", "1", "Table")]
    assert list(rows[0])[3:] == PARTS
    for row, cloud, cls in zip(rows, CLOUDS, (0, 1), strict=False):
        assert {name: float(row[name]) for name in PARTS if row[name]} == shares(files, cloud, cls)


def test_points_with_their_parts_are_data_to_train_with(files: Path, predict: Any) -> None:
    np.save("few.npy", CLOUDS[1, :150])
    status, out, err = predict("@one.npy", "few.npy", "@mesh.obj", *MODEL, "--class", "Table", "--output", "parts.h5", "--points", "300")
    assert (status, out, err) == (0, "3 clouds: parts.h5\n", "")
    arrays = HDF5PointsDataModule("parts.h5").arrays
    assert (arrays.class_names, arrays.part_names, arrays.label.tolist()) == (("Chair", "Table"), tuple(PARTS), [1, 1, 1])
    assert arrays.count is not None
    assert arrays.part is not None
    assert arrays.count.tolist() == [400, 150, 300]
    clouds = [CLOUDS[0], CLOUDS[1, :150], read_cloud(files / "mesh.obj", 300)]
    for cloud, points, part in zip(clouds, arrays.input, arrays.part, strict=True):
        np.testing.assert_array_equal(points[: len(cloud)], cloud)
        np.testing.assert_array_equal(part[: len(cloud)], predicted(files, cloud, 1))
    before = Path("parts.h5").read_bytes()
    assert "parts.h5 exists already and is not overwritten" in predict("@one.npy", *MODEL, "--class", "Table", "--output", "parts.h5")[2]
    assert Path("parts.h5").read_bytes() == before


def test_broken_files_are_named_after_the_others_are_done(files: Path, predict: Any) -> None:
    status, out, err = predict("@empty.obj", "@mesh.obj", *MODEL, "--class", "Chair")
    assert status == 2
    assert len(out.splitlines()) == 2
    assert "1 of 2 files cannot be read" in err
    assert err.endswith("empty.obj (it is empty); the others are done\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["@one.npy", *MODEL], "say with --class what "),
        (["@shapes.h5", *MODEL], "cloud 3 of "),
        (["@one.npy", *MODEL, "--class", "chiar"], "did you mean Chair?"),
        (["@one.npy", *MODEL, "--class", "Chair", "--top", "2"], "--top: "),
        (["@one.npy", *MODEL, "--class", "Chair", "--votes", "2"], "is a PointNetSegmenter, which takes no votes: leave it out"),
        (["@one.npy", *MODEL, "--class", "Chair", "--ood-score"], "is a PointNetSegmenter, which gives no such score: leave it out"),
        (["@one.npy", "--model", "pointnet_furniture", "--class", "chair"], "--class: pointnet_furniture is a PointNetClassifier"),
        (["@one.npy", "--model", "pointnet_furniture", "--output", "x.h5"], "--output x.h5: pointnet_furniture finds classes"),
        (["@one.npy", *MODEL, "--class", "Chair", "--output", "x.npz"], "--output x.npz: give a name that ends in .csv or .json, or "),
    ],
)
def test_mistakes_of_predict(arguments: list[str], words: str, predict: Any, tmp_path: Path) -> None:
    status, out, err = predict(*arguments)
    assert (status, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert words in err
    assert list(tmp_path.iterdir()) == []
