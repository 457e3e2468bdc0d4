"""`litzoo select`: what it writes is what the models say, and mistakes are one line."""

import csv
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

import litzoo
from litzoo.datamodules import DigitsDataModule
from litzoo.zoo import ImageClassifier, InstanceDiscrimination, LogisticRegression, PointNetClassifier, select_samples
from litzoo.zoo.cli import main
from litzoo.zoo.cli.sources import read_sample, read_samples

NAMES = [f"digit {number}" for number in range(10)]
PICTURES = 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untrained models, some sure of themselves, and pictures of digits."""
    folder = tmp_path_factory.mktemp("select")
    torch.manual_seed(0)
    images: dict[str, Any] = {"backbone": "conv4", "in_channels": 1, "image_size": 16, "image_mean": [0.3], "image_std": [0.3]}
    now = ImageClassifier(10, NAMES, **images)
    with torch.no_grad():  # an untrained one says nearly the same of every picture
        now.head.weight.mul_(100)
    for name, names in (("now", NAMES), ("one", NAMES), ("two", NAMES[::-1]), ("foreign", [*NAMES[:9], "owl"])):
        model = ImageClassifier(10, names, **images)
        model.load_state_dict(now.state_dict())
        order = [names.index(cls) if cls in names else 9 for cls in NAMES]
        with torch.no_grad():  # models that agree at times
            noise = 0 if name == "now" else torch.randn_like(now.head.weight)
            model.head.weight[order], model.head.bias[order] = now.head.weight + noise, now.head.bias
        litzoo.save(model, folder / f"{name}.safetensors", {}, half=False)
    points = PointNetClassifier(2, ["ball", "rod"], input_transform=False, feature_transform=False)
    litzoo.save(points, folder / "points.safetensors", {}, half=False)
    litzoo.save(LogisticRegression(2, 2), folder / "numbers.safetensors", {})
    litzoo.save(InstanceDiscrimination(9, "conv4", image_size=16), folder / "encoder.safetensors", {})
    data = DigitsDataModule()
    (folder / "digits").mkdir()
    for number in range(PICTURES):
        Image.fromarray(data.arrays.input[number, 0].numpy()).save(folder / "digits" / f"{number:02}.png")
    return folder


@pytest.fixture
def run(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Runs `litzoo select` in a folder with these models and pictures; returns status, output and errors."""
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)

    def command(*arguments: str) -> tuple[int, str, str]:
        status = main(["select", *arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return command


MODELS = ["--production", "now.safetensors", "--models", "one.safetensors", "two.safetensors"]


def table(path: str) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def page(path: str) -> list[dict[str, Any]]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', Path(path).read_text(), re.DOTALL)
    assert found
    items: list[dict[str, Any]] = json.loads(found[1])["items"]
    return items


def expected(threshold: float, views: Any = ()) -> Any:
    now, one, two = (litzoo.load(f"{name}.safetensors") for name in ("now", "one", "two"))
    pictures = [torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1) for path in sorted(Path("digits").iterdir())]
    return select_samples(now, [one, two], [pictures], views, [1, 2], threshold)


def test_a_folder_of_pictures(run: Callable[..., Any]) -> None:
    options = ["--weights", "1", "2", "--threshold", "0.3", "--batch-size", "7", "--views", "shifts"]
    status, out, _ = run("digits", *MODELS, *options, "--output", "next")
    assert status == 0
    found = expected(0.3, "shifts")
    known = int(found.left_out.sum())
    assert 0 < known < PICTURES, "or the test would prove little"
    lines = out.splitlines()
    assert lines[0].startswith(f"{known} of {PICTURES} samples are left out")
    assert sum(int(number) for number in re.findall(r"\((\d+)\)", lines[1])) == known
    assert lines[2] == f"{PICTURES - known} to review, the most useful first: next/queue.csv; to look through: next/review.html"
    assert sorted(path.name for path in Path("next").iterdir()) == ["left_out.csv", "queue.csv", "queue.json", "review.html"]

    queue = json.loads(Path("next/queue.json").read_text())
    assert [{name: str(value) for name, value in row.items()} for row in queue] == table("next/queue.csv")
    assert [row["file"] for row in queue] == [f"digits/{number:02}.png" for number in found.order.tolist()]
    assert [row["rank"] for row in queue] == list(range(1, len(queue) + 1))
    for row, number in zip(queue, found.order.tolist(), strict=True):
        assert (row["production"], row["fused"]) == (NAMES[found.label[number]], NAMES[found.proposed[number]])
        for column, name in (("score", "production_score"), ("proposed_score", "fused_score"), ("usefulness", "usefulness")):
            assert row[name] == pytest.approx(float(getattr(found, column)[number]), abs=2e-6)
        assert row["against"] == int(found.against[number])
    left_out = table("next/left_out.csv")
    assert [row["file"] for row in left_out] == [f"digits/{number:02}.png" for number in found.left_out.nonzero().squeeze(1).tolist()]
    assert all(float(row["production_score"]) >= 0.3 <= float(row["fused_score"]) for row in left_out)
    items = page("next/review.html")
    assert [item["file"] for item in items] == [row["file"] for row in queue]
    assert [(NAMES[item["given"]], NAMES[item["proposed"]], item["flags"], item["votes"]) for item in items] == [
        (row["production"], row["fused"], row["against"], 2) for row in queue
    ]
    assert all(item["png"] for item in items)


def test_budget_page_and_overwriting(run: Callable[..., Any]) -> None:
    assert run("digits", *MODELS, "--output", "next", "--threshold", "1", "--budget", "5", "--show", "3", "--rank", "margin")[0] == 0
    before = table("next/queue.csv")
    assert len(before) == 5
    assert len(page("next/review.html")) == 3
    assert table("next/left_out.csv") == []
    status, _, errors = run("digits", *MODELS, "--output", "next")
    assert (status, errors) == (
        2,
        "litzoo: next/queue.csv exists already and is not overwritten; give another folder, or add --overwrite\n",
    )
    assert table("next/queue.csv") == before
    status, out, _ = run("digits", *MODELS, "--output", "next", "--threshold", "0", "--overwrite")
    assert status == 0
    assert len(table("next/queue.csv")) < PICTURES
    assert table("next/queue.csv") != before
    assert f"{len(table('next/left_out.csv'))} of {PICTURES} samples are left out" in out


def test_training_samples_of_data(run: Callable[..., Any]) -> None:
    data = ["--data", "DigitsDataModule", "--data.train_fraction", "0.03"]
    status, _, _ = run("--production", "now.safetensors", "--models", "one.safetensors", *data, "--output", "next", "--rank", "entropy")
    assert status == 0
    digits = DigitsDataModule(train_fraction=0.03)
    now, one = (litzoo.load(f"{name}.safetensors") for name in ("now", "one"))
    found = select_samples(now, [one], digits, rank="entropy")
    rows = table("next/queue.csv")
    index = digits.train_index[found.order]
    assert [int(row["index"]) for row in rows] == index.tolist()
    assert [row["label"] for row in rows] == [str(label) for label in digits.arrays.label[index].tolist()]
    assert "file" not in rows[0]
    assert all(item["png"] for item in page("next/review.html"))


def test_one_model_over_its_views(run: Callable[..., Any]) -> None:
    assert run("digits", "--production", "now.safetensors", "--views", "flip_rotations", "--output", "next")[0] == 0
    assert {item["votes"] for item in page("next/review.html")} <= {1}


def test_broken_pictures_are_named_and_the_others_selected_from(run: Callable[..., Any]) -> None:
    shutil.copytree("digits", "photos")
    Path("photos/05.png").write_text("hello")
    status, _, errors = run("photos", *MODELS, "--output", "next")
    assert status == 2
    assert errors == f"litzoo: 1 of {PICTURES} files cannot be read: photos/05.png (no picture); the others are selected from\n"
    assert len(table("next/queue.csv")) + len(table("next/left_out.csv")) == PICTURES - 1
    status, _, errors = run("photos/05.png", *MODELS, "--output", "none")
    assert (status, errors) == (2, "litzoo: 1 of 1 files cannot be read: photos/05.png (no picture)\n")
    assert not Path("none").exists()


def test_clouds(run: Callable[..., Any], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    Path("shapes").mkdir()
    for number in range(3):
        np.save(f"shapes/{number}.npy", rng.normal(size=(40 + number // 2, 3)).astype(np.float32))
    np.savetxt("shapes/3.xyz", rng.normal(size=(30, 3)))
    arguments = ["--production", "points.safetensors", "--models", "points.safetensors", "--views", "yaw", "--points", "20"]
    assert run("shapes", *arguments, "--up-axis", "z", "--output", "next")[0] == 0
    assert {row["file"] for row in table("next/queue.csv")} == {"shapes/0.npy", "shapes/1.npy", "shapes/2.npy", "shapes/3.xyz"}
    assert all(item["png"] for item in page("next/review.html"))


def test_a_stored_cloud_is_read_again_as_it_was(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.save(tmp_path / "one.npy", rng.normal(size=(9, 6)))
    np.save(tmp_path / "three.npy", rng.normal(size=(3, 9, 3)).astype(np.float32))
    for name, shape, count in (("one.h5", (9, 3), [5]), ("three.h5", (3, 9, 7), [9, 4, 1]), ("whole.h5", (2, 9, 3), None)):
        with h5py.File(tmp_path / name, "w") as file:
            file["points"] = rng.normal(size=shape).astype(np.float32)
            if count is not None:
                file["count"] = count
    number = 0
    for samples in read_samples(sorted(tmp_path.iterdir()), "points", 4, {}, up_axis="z"):
        for place, cloud in zip(samples.places, samples.inputs, strict=True):
            again = read_sample(*place, "points", up_axis="z")
            assert again.dtype == np.float32
            np.testing.assert_array_equal(again, cloud.numpy())
            number += 1
    assert number == 10


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([*MODELS], "say which samples: files or folders, or --data CLASS"),
        (["digits", *MODELS, "--data", "DigitsDataModule"], "give files and folders, or --data, not both"),
        (["nowhere", *MODELS], "there is no file or folder nowhere"),
        (["digits", *MODELS, "--weights", "1"], "--weights needs one number for each of --models: 2, got 1"),
        (["digits", *MODELS, "--weights", "0", "0"], "not all 0"),
        (["digits", *MODELS, "--threshold", "2"], "threshold must lie in [0, 1]"),
        (["digits", *MODELS, "--rank", "size"], "--rank: expected one of"),
        (["digits", *MODELS, "--views", "turn"], "--views"),
        (["digits", *MODELS, "--views", "yaw"], "these views do not fit"),
        (["digits", *MODELS, "--budget", "0"], "--budget must be at least 1"),
        (["digits", *MODELS, "--points", "9"], "--points is for meshes and point clouds"),
        (["digits", *MODELS, "--output", "missing/next"], "there is no folder"),
        (["digits", *MODELS, "--output", "now.safetensors"], "is a file: give a folder"),
        (["digits", "--models", "one.safetensors"], "production"),
        (["digits", "--production", "now.safetensors"], "one model alone cannot disagree with itself"),
        (["digits", "--production", "now.safetensors", "--models", "foreign.safetensors"], "only by foreign.safetensors"),
        (["digits", "--production", "now.safetensors", "--models", "points.safetensors"], "but points.safetensors point clouds"),
        (["digits", "--production", "encoder.safetensors", "--models", "one.safetensors"], "is an encoder"),
        (["digits", "--production", "numbers.safetensors", "--views", "flip"], "classifies neither pictures nor point clouds"),
        (["--data", "DigitsDataModule", "--production", "points.safetensors", "--views", "yaw"], "takes point clouds"),
        (["--data", "PatientsDataModule", "--production", "now.safetensors", "--views", "flip"], "takes images"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(arguments: list[str], words: str, run: Callable[..., Any]) -> None:
    status, _, errors = run(*arguments, *([] if "--output" in arguments else ["--output", "next"]))
    lines = [line for line in errors.splitlines() if line.startswith("litzoo: ")]
    assert (status, len(lines)) == (2, 1)
    assert words in lines[0]
    assert not Path("next").exists()
