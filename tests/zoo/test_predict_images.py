"""`litzoo predict` on pictures: every form of them against decoding by hand, kinds that do not fit, and broken files."""

import csv
import errno
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

import litzoo
from litzoo.datamodules.pictures import decode_picture
from litzoo.zoo import ImageClassifier, InstanceDiscrimination, LogisticRegression, PointNetClassifier
from litzoo.zoo.cli import main, sources

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.2, 0.2]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models of each kind, untrained."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    for name, model in (
        ("images", ImageClassifier(3, ["cat", "dog", "owl"], "conv4", image_size=16, image_mean=MEAN, image_std=STD)),
        ("grey", ImageClassifier(3, ["cat", "dog", "owl"], "conv4", in_channels=1, image_size=16)),
        ("points", PointNetClassifier(2, ["ball", "rod"], input_transform=False, feature_transform=False)),
        ("numbers", LogisticRegression(2, 2)),
        ("encoder", InstanceDiscrimination(9, "conv4", image_size=16)),
    ):
        litzoo.save(model, folder / f"{name}.safetensors", {}, half=False)
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pixels(seed: int, height: int = 20, width: int = 24) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def classify(weights: Path, *arguments: str, model: str = "images") -> list[dict[str, Any]]:
    """The rows of the JSON output."""
    assert main(["predict", *arguments, "--model", str(weights / f"{model}.safetensors"), "--output", "rows.json", "--top", "3"]) == 0
    return json.loads(Path("rows.json").read_text())


def confidence(rows: list[dict[str, Any]], names: tuple[str, ...] = ("cat", "dog", "owl")) -> np.ndarray:
    """`(rows, classes)`, in the order of the classes."""
    return np.array([[{guess["class"]: guess["confidence"] for guess in row["predictions"]}[name] for name in names] for row in rows])


def expected(weights: Path, *arrays: np.ndarray, model: str = "images") -> np.ndarray:
    """What the model says, picture by picture."""
    loaded: Any = litzoo.load(weights / f"{model}.safetensors")
    return np.concatenate([loaded.predict(torch.from_numpy(array.copy()).permute(2, 0, 1)).numpy() for array in arrays])


def mistake(capsys: pytest.CaptureFixture[str], weights: Path, *arguments: str, model: str = "images") -> str:
    """The one line that a refused call prints."""
    capsys.readouterr()
    assert main(["predict", *arguments, "--model", str(weights / f"{model}.safetensors")]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(lines) == 1, lines
    assert lines[0].startswith("litzoo: ")
    return lines[0]


def test_the_models_of_the_test_say_different_things(weights: Path) -> None:
    """Or the comparisons below would prove nothing."""
    assert np.ptp(expected(weights, pixels(0), 255 - pixels(1) // 4), axis=0).max() > 1e-3


@pytest.mark.parametrize("batch_size", ["1", "2", "32"])
def test_folder_of_pictures_and_arrays(batch_size: str, weights: Path, here: Path) -> None:
    images = [pixels(seed, 16 + 5 * seed, 40 - 3 * seed) for seed in range(7)]
    (here / "photos" / "deep").mkdir(parents=True)
    for number, name in enumerate(("a.png", "b.BMP", "deep/c.tiff", "deep/d.gif")):
        # A GIF has 256 colours at most.
        images[number] = images[number] // 64 * 64 if name.endswith("gif") else images[number]
        Image.fromarray(images[number]).save(here / "photos" / name)
    series = np.stack([pixels(seed, 16, 16) for seed in range(10, 15)])
    np.save(here / "photos" / "e.npy", series)
    with h5py.File(here / "photos" / "f.h5", "w") as file:
        file["image"] = series[::-1]
    np.save(here / "photos" / "g.npy", images[4])
    # What is of the other kind, of none, or hidden is passed over.
    np.save(here / "photos" / "cloud.npy", np.random.rand(50, 3))
    with h5py.File(here / "photos" / "clouds.h5", "w") as file:
        file["points"] = np.random.rand(2, 50, 3)
    (here / "photos" / "notes.txt").write_text("hello")
    (here / "photos" / ".hidden.png").write_bytes(b"")
    rows = classify(weights, "photos", "--batch-size", batch_size)
    names = ["a.png", "b.BMP", "deep/c.tiff", "deep/d.gif", *["e.npy"] * 5, *["f.h5"] * 5, "g.npy"]
    assert [row["file"] for row in rows] == [f"photos/{name}" for name in names]
    assert [row["index"] for row in rows] == [0, 0, 0, 0, 0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0]
    by_hand = expected(weights, *images[:4], *series, *series[::-1], images[4])
    assert confidence(rows) == pytest.approx(by_hand, abs=2e-6)


def test_lossy_pictures(weights: Path, here: Path) -> None:
    """A JPEG of few details is close to what it was made of; WebP loses nothing."""
    smooth = np.asarray(Image.fromarray(pixels(0, 6, 6)).resize((64, 48), Image.Resampling.BICUBIC))
    for name in ("a.jpg", "b.jpeg"):
        Image.fromarray(smooth).save(name, quality=95, subsampling=0)
    Image.fromarray(smooth).save("c.webp", lossless=True)
    decoded = np.asarray(decode_picture("a.jpg"))
    assert np.abs(decoded.astype(int) - smooth).mean() < 2
    rows = classify(weights, "a.jpg", "b.jpeg", "c.webp")
    assert confidence(rows) == pytest.approx(expected(weights, decoded, decoded, smooth), abs=2e-6)


def test_orientation_transparency_grey_and_depth(weights: Path, here: Path) -> None:
    image = pixels(0)
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera was held so that the picture must be turned clockwise
    Image.fromarray(image).save("turned.png", exif=turned)
    alpha = np.random.default_rng(1).integers(0, 2, image.shape[:2], dtype=np.uint8) * 255
    Image.fromarray(np.dstack([image, alpha])).save("clear.png")
    grey = image[:, :, 0]
    Image.fromarray(grey).save("grey.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save("deep.png")
    Image.fromarray(image // 64 * 64).quantize(256, dither=Image.Dither.NONE).save("palette.png")
    rows = classify(weights, "turned.png", "clear.png", "grey.png", "deep.png", "palette.png")
    by_hand = [
        np.rot90(image, -1),
        np.where(alpha[:, :, None] > 0, image, np.uint8(255)),
        np.dstack([grey] * 3),
        np.dstack([grey] * 3),
        image // 64 * 64,
    ]
    assert confidence(rows) == pytest.approx(expected(weights, *by_hand), abs=2e-6)


def test_a_model_of_grey_images(weights: Path, here: Path) -> None:
    grey = pixels(0)[:, :, :1]
    Image.fromarray(grey[:, :, 0]).save("a.png")
    np.save("a.npy", grey)
    rows = classify(weights, "a.png", "a.npy", model="grey")
    assert confidence(rows) == pytest.approx(expected(weights, grey, grey, model="grey"), abs=1e-3)


def test_tables_are_as_for_clouds(weights: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.fromarray(pixels(0)).save("a.png")
    assert main(["predict", "a.png", "--model", str(weights / "images.safetensors"), "--top", "2"]) == 0
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert [list(row) for row in rows] == [["file", "index", "class_1", "confidence_1", "class_2", "confidence_2"]]
    assert (rows[0]["file"], rows[0]["index"]) == ("a.png", "0")
    assert main(["predict", "a.png", "--model", str(weights / "images.safetensors"), "--output", "a.csv"]) == 0
    assert capsys.readouterr().out == "1 pictures: a.csv\n"


def test_not_all_are_held_in_memory(weights: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    real = ImageClassifier.predict

    def spy(self: Any, images: Any) -> torch.Tensor:
        sizes.append(len(images))
        return real(self, images)

    monkeypatch.setattr(ImageClassifier, "predict", spy)
    for number in range(5):
        Image.fromarray(pixels(number)).save(f"{number}.png")
    np.save("5.npy", np.stack([pixels(0)] * 5))
    files = [*(f"{number}.png" for number in range(5)), "5.npy"]
    classify(weights, *files, "--batch-size", "2")
    assert sizes == [2, 2, 1, 2, 2, 1]
    # Large pictures are classified in smaller batches.
    sizes.clear()
    monkeypatch.setattr(sources, "_PIXELS", 2 * 20 * 24)
    rows = classify(weights, *files, "--batch-size", "4")
    assert sizes == [2, 2, 1, 2, 2, 1]
    assert [row["index"] for row in rows] == [0] * 5 + [0, 1, 2, 3, 4]


def test_a_folder_of_both_kinds_by_pointnet(weights: Path, here: Path) -> None:
    (here / "both").mkdir()
    Image.fromarray(pixels(0)).save("both/a.png")
    np.save("both/picture.npy", pixels(0))
    cloud = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    np.save("both/cloud.npy", cloud)
    rows = classify(weights, "both", model="points")
    assert [row["file"] for row in rows] == ["both/cloud.npy"]
    loaded: Any = litzoo.load(weights / "points.safetensors")
    assert confidence(rows, ("ball", "rod")) == pytest.approx(loaded.predict(torch.from_numpy(cloud)).numpy(), abs=2e-6)


def test_the_wrong_kind(weights: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save("cloud.npy", np.random.rand(50, 3))
    np.save("series.npy", np.stack([pixels(0)] * 2))
    with h5py.File("clouds.h5", "w") as file:
        file["points"] = np.random.rand(2, 50, 3)
    with h5py.File("images.h5", "w") as file:
        file["image"] = np.stack([pixels(0)] * 2)
    Image.fromarray(pixels(0)).save("a.png")
    for name in ("cloud.npy", "clouds.h5"):
        assert f"{name} holds point clouds, but {weights / 'images.safetensors'} classifies pictures: .jpg" in mistake(
            capsys, weights, "a.png", name
        )
    for name in ("a.png", "series.npy", "images.h5"):
        assert f"{name} holds pictures, but {weights / 'points.safetensors'} classifies point clouds: .npy" in mistake(
            capsys, weights, "cloud.npy", name, model="points"
        )
    told = mistake(capsys, weights, "a.png", model="encoder")
    assert (
        "is an encoder, InstanceDiscrimination, and has no classes: give a classifier, or write its features with `litzoo embed --model "
        in told
    )
    assert "LogisticRegression, which classifies neither pictures nor point clouds" in mistake(capsys, weights, "a.png", model="numbers")
    (here / "photos").mkdir()
    Image.fromarray(pixels(0)).save("photos/a.png")
    assert "photos holds no .npy, .h5, .hdf5, .obj" in mistake(capsys, weights, "photos", model="points")
    assert "nowhere.png" in mistake(capsys, weights, "nowhere.png")
    (here / "a.txt").write_text("hello")
    assert "a.txt: pictures are read from .jpg" in mistake(capsys, weights, "a.txt")


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((8, 8), np.uint8), "this is uint8 (8, 8)"),
        (np.zeros((2, 8, 8, 4), np.uint8), "this is uint8 (2, 8, 8, 4)"),
        (np.zeros((2, 8, 8, 3), np.float32), "this is float32 (2, 8, 8, 3)"),
        (np.zeros((0, 8, 8, 3), np.uint8), "this is uint8 (0, 8, 8, 3)"),
        (np.array(["a"]), "(1,)"),
    ],
)
def test_other_arrays_are_refused_before_any_work(
    array: np.ndarray, words: str, weights: Path, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageClassifier, "predict", lambda self, images: pytest.fail("work was done"))
    np.save("wrong.npy", array)
    Image.fromarray(pixels(0)).save("a.png")
    message = mistake(capsys, weights, "a.png", "wrong.npy")
    assert "wrong.npy: pictures in an array are uint8" in message
    assert words in message


def test_broken_arrays(weights: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save("short.npy", np.stack([pixels(0)] * 2))
    (here / "short.npy").write_bytes((here / "short.npy").read_bytes()[:-100])
    (here / "text.h5").write_text("hello")
    np.save("object.npy", np.array([{}], dtype=object), allow_pickle=True)
    for name in ("short.npy", "text.h5", "object.npy"):
        assert f"{name} cannot be read" in mistake(capsys, weights, name)
    with h5py.File("other.h5", "w") as file:
        file["label"] = [1]
    assert "other.h5 has no data set `image`; it holds: label" in mistake(capsys, weights, "other.h5")


def test_corrupt_pictures_are_named_and_the_others_classified(weights: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "photos").mkdir()
    images = [pixels(seed) for seed in range(3)]
    for number, image in enumerate(images):
        Image.fromarray(image).save(f"photos/{number}.png")
    Image.fromarray(pixels(9, 200, 200)).save("photos/cut.jpg")
    (here / "photos" / "cut.jpg").write_bytes((here / "photos" / "cut.jpg").read_bytes()[:3000])
    (here / "photos" / "empty.png").write_bytes(b"")
    (here / "photos" / "text.gif").write_text("hello")
    message = mistake(capsys, weights, "photos", "--output", "rows.json", "--top", "3")
    assert "3 of 6 files cannot be read: photos/cut.jpg (" in message
    assert "photos/empty.png (no picture), photos/text.gif (no picture); the others are classified" in message
    rows = json.loads(Path("rows.json").read_text())
    assert [row["file"] for row in rows] == [f"photos/{number}.png" for number in range(3)]
    assert confidence(rows) == pytest.approx(expected(weights, *images), abs=2e-6)
    message = mistake(capsys, weights, "photos/text.gif", "--output", "none.json")
    assert "1 of 1 files cannot be read: photos/text.gif (no picture)" in message
    assert sorted(path.name for path in here.iterdir()) == ["photos", "rows.json"]


def test_a_picture_that_may_not_be_read(
    weights: Path, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.fromarray(pixels(0)).save("a.png")

    def deny(path: Any, *arguments: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Image, "open", deny)
    assert mistake(capsys, weights, "a.png").endswith("1 of 1 files cannot be read: a.png (Permission denied)")


def test_help_names_both_kinds_and_imports_no_torch() -> None:
    code = "import sys; from litzoo.zoo.cli import main; main(['--help']); print('torch' in sys.modules, 'PIL' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.splitlines()[-1] == "False False"
    assert "classify pictures, meshes or point clouds" in result.stdout
