"""The recipes of point clouds whose data do not ship: each trains, tests and is classified with on small data in the same formats."""

import csv
import math
from pathlib import Path

import pytest
import torch
from contract import shapenet_clouds, write_points, write_shapenet

import litzoo
from litzoo.zoo.cli import main

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
QUIET = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
SMALL = [*QUIET, "--trainer.max_epochs", "1", "--data.num_points", "24", "--data.batch_size", "8"]


def run(recipe: str, *options: str) -> dict[str, float]:
    """Fit and test; returns the test metrics."""
    arguments = ["--config", recipe, "--name", "run", *SMALL, *options]
    assert main(["fit", *arguments]) == 0
    assert main(["test", *arguments, "--ckpt_path", "best"]) == 0
    (path,) = Path("runs/run").glob("version_*/test_*/metrics.csv")
    with path.open(encoding="utf-8") as file:
        return {name: float(value) for name, value in next(csv.DictReader(file)).items() if name.startswith("test/")}


@pytest.fixture
def shapenet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    return str(write_shapenet(tmp_path / "shapenet", "v0", *shapenet_clouds()))


@pytest.fixture
def shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    return str(write_points(tmp_path / "shapes.h5", clouds=80, parts=True))


@pytest.mark.slow
def test_pointnet_shapenet(shapenet: str) -> None:
    metrics = run("pointnet_shapenet", "--data.root", shapenet)
    assert {"test/accuracy", "test/mcc", "test/mean_class_accuracy"} <= set(metrics)
    (picture,) = Path("runs/run").glob("version_*/test_*/critical_points_test.png")
    assert picture.stat().st_size > 10_000


@pytest.mark.slow
def test_pointnet_shapenet_tutorial(shapenet: str) -> None:
    """Its classes weigh by their frequency, and those of ShapeNetPart that have no shape weigh nothing."""
    metrics = run("pointnet_shapenet_tutorial", "--data.root", shapenet)
    assert all(map(math.isfinite, metrics.values())), metrics
    (table,) = Path("runs/run").glob("version_*/metrics.csv")
    with table.open(encoding="utf-8") as file:
        losses = [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]
    assert losses
    assert all(map(math.isfinite, losses)), losses


@pytest.mark.slow
def test_pointnet_seg_shapenet(shapenet: str) -> None:
    metrics = run("pointnet_seg_shapenet", "--data.root", shapenet)
    assert {"test/instance_miou", "test/class_miou", "test/accuracy"} <= set(metrics)
    (checkpoint,) = Path("runs/run").glob("version_*/checkpoints/epoch_*.ckpt")
    model = litzoo.zoo.load_encoder(str(checkpoint))
    assert len(model.part_names) == 50
    assert model.part_names[4] == "Bag/0"
    (part,) = model.predict(torch.rand(1, 100, 3), torch.tensor([1]))
    assert set(part.tolist()) <= {4, 5}
    (table,) = Path("runs/run").glob("version_*/test_*/part_iou_test.csv")
    assert table.read_text(encoding="utf-8").startswith("part,iou,points\n")


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["pointnet_shapes", "pointnet_shapes_tutorial"])
def test_pointnet_shapes(recipe: str, shapes: str) -> None:
    run(recipe, "--data.path", shapes)
    (checkpoint,) = Path("runs/run").glob("version_*/checkpoints/epoch_*.ckpt")
    assert main(["predict", shapes, "--model", str(checkpoint), "--output", "classes.csv", "--votes", "3"]) == 0
    assert len(Path("classes.csv").read_text(encoding="utf-8").splitlines()) == 81


@pytest.mark.slow
def test_pointnet_seg_psb(shapes: str) -> None:
    metrics = run("pointnet_seg_psb", "--data.path", shapes)
    assert 0 < metrics["test/instance_miou"] < 1


@pytest.mark.parametrize(("recipe", "option"), [("pointnet_shapes", "--data.path"), ("pointnet_shapenet", "--data.root")])
def test_the_data_must_be_given(recipe: str, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", recipe]) == 2
    assert capsys.readouterr().err == f"litzoo: give {option}, which has no default\n"


def test_one_class_is_a_list_of_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", "pointnet_shapenet", "--data.root", "x", "--data.class_choice", "Chair"]) == 2
    assert capsys.readouterr().err == "litzoo: --data.class_choice: expected a list, write '[Chair]'\n"


def test_segmentation_needs_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    path = str(write_points(tmp_path / "shapes.h5"))
    assert main(["fit", "--config", "pointnet_seg_psb", "--data.path", path, *SMALL]) == 2
    assert "the data have no part labels, which a segmenter is trained with: an HDF5 file needs `part` and" in capsys.readouterr().err
