"""`litzoo show critical`: what it reads and writes, that the sets are those of the model, and what it says to mistakes."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

import litzoo
from litzoo.zoo import LogisticRegression, PointNetClassifier
from litzoo.zoo.cli import main
from litzoo.zoo.plots import open3d_pictures
from litzoo.zoo.plots.open3d_pictures import RenderingError, render_with_open3d

MODEL = ["--model", "MODEL", "--resolution", "6"]
DRAW = np.random.RandomState(0)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs the command in a folder with an untrained model and some files of clouds; returns status, output and errors."""
    files = tmp_path / "files"
    (files / "more").mkdir(parents=True)
    torch.manual_seed(0)
    model = PointNetClassifier(2, ["chair", "lamp"], input_transform=False, feature_transform=False)
    litzoo.zoo.save(model, files / "model.safetensors", {})
    litzoo.zoo.save(LogisticRegression(), files / "logistic.safetensors", {})
    clouds = DRAW.randn(6, 400, 3).astype(np.float32)
    np.save(files / "one.npy", clouds[0])
    np.save(files / "more" / "one.npy", clouds[1])
    np.save(files / "many.npy", clouds)
    np.save(files / "empty.npy", clouds[:0])
    np.save(files / "flat.npy", clouds[0, :, :2])
    np.save(files / "nan.npy", np.where(np.arange(1200).reshape(400, 3) == 7, np.nan, clouds[0]))
    (files / "broken.npy").write_bytes(b"nothing")
    with h5py.File(files / "shapes.h5", "w") as file:
        file["points"], file["label"], file["split"] = clouds, np.array([0, 1, 0, 0, 1, 1]), np.array([0, 0, 2, 2, 2, 2])
    with h5py.File(files / "unlabelled.h5", "w") as file:
        file["points"], file["label"] = clouds[:2], np.full(2, -1)
    with h5py.File(files / "other.h5", "w") as file:
        file["image"] = np.zeros(3)
    faces = "f 1 2 3\nf 1 3 4\n"
    (files / "mesh.obj").write_text("v 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 0.5\n" + faces)
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)

    def command(*arguments: str) -> tuple[int, str, str]:
        given = ["../files/model.safetensors" if argument == "MODEL" else argument for argument in arguments]
        status = main(["show", "critical", *given])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return command


def written() -> set[str]:
    return {str(path) for path in Path().rglob("*") if path.is_file()}


def test_files_of_every_kind(run: Callable[..., tuple[int, str, str]]) -> None:
    files = ["../files/one.npy", "../files/more/one.npy", "../files/mesh.obj"]
    status, out, err = run(*files, *MODEL, "--points", "300", "--output", "new/folder", "--ply", "--html")
    assert (status, err) == (0, "")
    names = [f"{name}_{kind}.ply" for name in ("one", "one-2", "mesh") for kind in ("full", "critical", "upper")]
    assert written() == {f"new/folder/{name}" for name in ("critical_points.png", "critical_points.html", *names)}
    lines = out.splitlines()
    assert [line.split(":")[0] for line in lines[:3]] == ["one", "one-2", "mesh"]
    assert all("of 300 points are critical" in line for line in lines[:3])
    for name, line in zip(("one", "one-2", "mesh"), lines, strict=False):
        critical = int(line.split(" of ")[0].split()[-1])
        assert f"element vertex {critical}\n".encode() in Path(f"new/folder/{name}_critical.ply").read_bytes()
    page = Path("new/folder/critical_points.html").read_text(encoding="utf-8")
    assert "<title>Critical points of model</title>" in page
    assert '"name":"one-2"' in page


def test_critical_sets_are_those_of_the_model(run: Callable[..., tuple[int, str, str]]) -> None:
    """What is dropped does not change the answer: checked by the model itself, on the file that was written."""
    assert run("../files/one.npy", *MODEL, "--ply")[0] == 0
    model = litzoo.load("../files/model.safetensors").eval()

    def points(kind: str) -> torch.Tensor:
        body = Path(f"one_{kind}.ply").read_bytes().partition(b"end_header\n")[2]
        fields = [(name, "<f4") for name in "xyz"] + [(name, "u1") for name in ("red", "green", "blue")]
        vertices = np.frombuffer(body, dtype=fields)
        return torch.from_numpy(np.stack([vertices[name] for name in "xyz"], axis=1))[None]

    full, critical = points("full"), points("critical")
    assert 0 < critical.shape[1] < full.shape[1] == 400
    with torch.no_grad():
        torch.testing.assert_close(model(critical), model(full), atol=1e-5, rtol=0)
        torch.testing.assert_close(model(torch.cat([full, points("upper")], dim=1)), model(full), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["shapes.h5"], ["shapes_2", "shapes_4"]),  # of the test split, one of each class
        (["shapes.h5", "--index", "5", "0"], ["shapes_5", "shapes_0"]),
        (["many.npy"], [f"many_{place}" for place in range(5)]),
        (["many.npy", "--index", "3"], ["many_3"]),
        (["unlabelled.h5"], ["unlabelled_0", "unlabelled_1"]),
    ],
)
def test_which_clouds(arguments: list[str], names: list[str], run: Callable[..., tuple[int, str, str]]) -> None:
    status, out, _ = run("../files/" + arguments[0], *arguments[1:], *MODEL)
    assert status == 0
    assert [line.split(":")[0] for line in out.splitlines()[:-1]] == names
    assert written() == {"critical_points.png"}


def test_no_file_of_one_cloud_is_written_over_by_another(run: Callable[..., tuple[int, str, str]]) -> None:
    np.save("one-2.npy", np.load("../files/many.npy")[2])
    status, out, _ = run("../files/one.npy", "../files/more/one.npy", "one-2.npy", *MODEL, "--ply", "--output", "drawn")
    assert status == 0
    assert [line.split(":")[0] for line in out.splitlines()[:-1]] == ["one", "one-2", "one-2-2"]
    assert len(written()) == 1 + 1 + 9


def test_points_that_only_fill_a_row_up_do_not_count(run: Callable[..., tuple[int, str, str]]) -> None:
    """A file of clouds of different sizes repeats the points of the small ones, and says how many are a cloud's own."""
    cloud = np.load("../files/one.npy")[:150]
    np.save("own.npy", cloud)
    with h5py.File("filled.h5", "w") as file:
        file["points"], file["count"] = np.stack([cloud[np.arange(400) % 150], np.load("../files/one.npy")]), np.array([150, 400])
    _, expected, _ = run("own.npy", *MODEL, "--output", "a")
    status, out, _ = run("filled.h5", *MODEL, "--index", "0", "--output", "b")
    assert status == 0
    assert out.splitlines()[0].removeprefix("filled_0") == expected.splitlines()[0].removeprefix("own")
    assert "of 150 points" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere.npy", *MODEL], "there is no file nowhere.npy"),
        (["../files/model.safetensors", *MODEL], "model.safetensors: clouds are read from"),
        (["../files/nan.npy", *MODEL], "nan.npy"),
        (["../files/broken.npy", *MODEL], "broken.npy cannot be read"),
        (["../files/flat.npy", *MODEL], "flat.npy"),
        (["../files/other.h5", *MODEL], "other.h5 has no data set `points`; it holds: image"),
        (["../files/empty.npy", *MODEL], "empty.npy holds no clouds"),
        (["../files/many.npy", *MODEL, "--index", "6"], "--index 6: ../files/many.npy holds clouds 0 to 5"),
        (["../files/one.npy", *MODEL, "--index", "0"], "--index chooses among the clouds of a file, and ../files/one.npy holds one"),
        (["../files/one.npy", "--model", "../files/logistic.safetensors"], "is a LogisticRegression; critical points are those of"),
        (["../files/one.npy", "--model", "pointnet_furnitur"], "pointnet_furnitur"),
        (["../files/one.npy"], "model"),
        (["../files/one.npy", *MODEL, "--points", "0"], "--points must be at least 1, got 0"),
        (["../files/one.npy", "--model", "MODEL", "--resolution", "1"], "--resolution must be at least 2, got 1"),
        (["../files/one.npy", *MODEL, "--renderer", "vtk"], "--renderer"),
        (["../files/one.npy", *MODEL, "--bogus", "1"], "--bogus"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(arguments: list[str], words: str, run: Callable[..., tuple[int, str, str]]) -> None:
    status, _, err = run(*arguments)
    assert status == 2
    assert len(err.splitlines()) == 1
    assert err.startswith("litzoo: ")
    assert words in err
    assert written() == set()


def test_help(run: Callable[..., tuple[int, str, str]], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show"]) == 0
    assert "show critical  FILE... --model NAME" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        run("--help")
    assert stop.value.code == 0
    assert "--up_axis" in capsys.readouterr().out


# Open3D, which may end the process that draws


def test_matplotlib_draws_where_open3d_cannot(run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RenderingError("Open3D cannot draw on this machine (no driver): install libvulkan1")

    monkeypatch.setattr(open3d_pictures, "render_with_open3d", fail)
    status, _, err = run("../files/one.npy", *MODEL, "--renderer", "open3d")
    assert status == 0
    assert err == "litzoo: Open3D cannot draw on this machine (no driver): install libvulkan1; matplotlib draws instead\n"
    assert written() == {"critical_points.png"}


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", r"ended by signal 11\): install libvulkan1 and mesa-vulkan-drivers"),
        ("raise RuntimeError('Failed to load vulkan library!')", r"\(Failed to load vulkan library\): install libvulkan1"),
        ("raise ModuleNotFoundError(\"No module named 'open3d'\")", r"Open3D is not installed: pip install litzoo\[points\]"),
        ("import time; time.sleep(60)", r"was not ready after 0\.8 s: install"),
    ],
)
def test_every_way_to_fail_is_a_sentence(script: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!{sys.executable}\n{script}\n")
    python.chmod(0o755)
    monkeypatch.setattr(open3d_pictures.sys, "executable", str(python))
    cloud = DRAW.randn(50, 3)
    with pytest.raises(RenderingError, match=words) as error:
        # Only a process that never ends may meet a short limit: on a busy machine others need seconds to start.
        render_with_open3d([cloud], [np.arange(4)], [cloud], timeout=0.2 if "sleep" in script else 60)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_open3d_draws_or_says_why() -> None:
    pytest.importorskip("open3d")
    cloud = DRAW.randn(50, 3)
    try:
        ((full, critical),) = render_with_open3d([cloud], [np.arange(4)], None)
    except RenderingError as error:
        assert "install" in str(error)  # noqa: PT017
        return
    assert full.shape == critical.shape
    assert (full[0, 0] == 255).all(), "white paper"
    assert (full < 200).any()
    assert (critical[..., 0] > critical[..., 2] + 60).any(), "red points"


def test_the_other_process_is_told_to_draw_without_a_screen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = (
        "import os, sys, numpy\n"
        "assert os.environ['EGL_PLATFORM'] == 'surfaceless' and os.environ['OPEN3D_CPU_RENDERING'] == 'mine'\n"
        "clouds = numpy.load(os.path.join(sys.argv[-1], 'clouds.npz'))\n"
        "for column, name in enumerate(('0_full', '0_critical', '0_upper')):\n"
        "    numpy.save(os.path.join(sys.argv[-1], f'0_{column}.npy'), clouds[name])\n"
    )
    python = tmp_path / "python"
    python.write_text(f"#!{sys.executable}\n{script}")
    python.chmod(0o755)
    monkeypatch.setattr(open3d_pictures.sys, "executable", str(python))
    monkeypatch.delenv("EGL_PLATFORM", raising=False)
    monkeypatch.setenv("OPEN3D_CPU_RENDERING", "mine")
    cloud = DRAW.randn(50, 3)
    ((full, critical, upper),) = render_with_open3d([cloud], [np.array([3, 7])], [np.zeros((0, 3))])
    np.testing.assert_array_equal(full, cloud)
    np.testing.assert_array_equal(critical, cloud[[3, 7]])
    assert upper.shape == (0, 3)
    assert not [name for name in os.listdir(tmp_path) if name != "python"]
