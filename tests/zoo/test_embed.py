"""`litzoo embed` and `litzoo show embedding`: the features are those of the model, and mistakes leave nothing behind."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest
import torch

import litzoo
from litzoo.datamodules import DigitsDataModule
from litzoo.zoo import EncoderClassifier, ImageClassifier, InstanceDiscrimination, PointNetClassifier
from litzoo.zoo.cli import main
from litzoo.zoo.cli.show_embedding import _short_names
from litzoo.zoo.plots import embedding as plots
from litzoo.zoo.plots.embedding import EmbeddingMap

DATA = ["--data", "DigitsDataModule"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of untrained models, and of what `litzoo embed` made with one of them."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    data = DigitsDataModule()
    images = {"in_channels": 1, "image_size": 32, "image_mean": data.image_mean, "image_std": data.image_std, "backbone": "conv4"}
    litzoo.save(InstanceDiscrimination(data.num_train, **images), folder / "encoder.safetensors", {}, half=False)
    litzoo.save(ImageClassifier(10, **images), folder / "classifier.safetensors", {})
    litzoo.save(ImageClassifier(10, **{**images, "image_mean": [0.5]}), folder / "other_mean.safetensors", {})
    on_other = EncoderClassifier(folder / "other_mean.safetensors", num_classes=10)
    litzoo.save(on_other, folder / "on_other_mean.safetensors", {})
    litzoo.save(PointNetClassifier(2, input_transform=False, feature_transform=False), folder / "pointnet.safetensors", {})
    assert main(["embed", "--model", str(folder / "encoder.safetensors"), *DATA, "--output", str(folder / "features.h5")]) == 0
    draw = np.random.RandomState(0)
    features, label = draw.randn(9, 4).astype("f4"), np.arange(9, dtype="u1") % 2
    diverged = np.where(np.arange(36).reshape(9, 4) == 7, np.nan, features)
    for name, columns, names in (
        ("unlabelled", (features, np.full(9, -1)), ["cat", "dog"]),
        ("cats", (features, label), ["cat", "dog"]),
        ("short", (features, label[:8]), ["cat", "dog"]),
        ("nameless", (features, label), ["cat"]),
        ("diverged", (diverged, label), ["cat", "dog"]),
    ):
        with h5py.File(folder / f"{name}.h5", "w") as file:
            file.attrs["class_names"], file.attrs["model_class"] = names, "ImageClassifier"
            (file["val/features"], file["val/label"]), file["val/index"] = columns, np.arange(9)
    whole = bytearray((folder / "features.h5").read_bytes())
    whole[300] ^= 255
    (folder / "damaged.h5").write_bytes(whole)
    with h5py.File(folder / "foreign.h5", "w") as file:
        file["x"] = np.zeros(3)
    (folder / "broken.h5").write_bytes(b"nothing")
    return folder


@pytest.fixture
def run(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Runs a command in an empty folder; names in capitals are files of `models`. Returns status, output and errors."""
    monkeypatch.chdir(tmp_path)

    def command(*arguments: str) -> tuple[int, str, str]:
        files = {path.name.upper(): str(path) for path in models.iterdir()}
        status = main([files.get(argument, argument) for argument in arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return command


def test_features_are_those_of_the_model(models: Path) -> None:
    data, model = DigitsDataModule(), litzoo.load_encoder(models / "encoder.safetensors")
    with h5py.File(models / "features.h5", "r") as file:
        assert set(file) == {"train", "val", "test"}
        assert file.attrs["model"].endswith("encoder.safetensors")
        assert file.attrs["model_class"] == "InstanceDiscrimination"
        assert file.attrs["data"] == "DigitsDataModule"
        assert list(file.attrs["class_names"]) == data.class_names
        assert file.attrs["fingerprint"] == data.fingerprint
        assert file.attrs["litzoo"] == litzoo.__version__
        assert file.attrs["image_mean"].tolist() == data.image_mean
        for number, split in enumerate(("train", "val", "test")):
            index, group = data.indices(number), file[split]
            images = data.arrays.input[index].float() / 255
            images = (images - torch.tensor(data.image_mean)[:, None, None]) / torch.tensor(data.image_std)[:, None, None]
            with torch.no_grad():
                features, embedding = model.encode(images), model(images)
            assert group["features"].dtype == group["embedding"].dtype == np.float32
            assert group["label"].dtype == group["index"].dtype == np.int64
            assert group["features"][()] == pytest.approx(features.numpy(), abs=1e-4)
            assert group["embedding"][()] == pytest.approx(embedding.numpy(), abs=1e-5)
            assert group["index"][()].tolist() == index.tolist()
            assert group["label"][()].tolist() == data.arrays.label[index].tolist()


def test_one_split_of_a_classifier(run: Callable[..., Any], tmp_path: Path) -> None:
    arguments = ["embed", "--model", "CLASSIFIER.SAFETENSORS", *DATA, "--split", "val", "--batch-size", "9", "--output", "f.h5"]
    assert run(*arguments)[:2] == (0, "143 val samples: f.h5\n")
    with h5py.File(tmp_path / "f.h5", "r") as file:
        assert list(file) == ["val"]
        assert set(file["val"]) == {"features", "label", "index"}, "logits are no embedding"


def test_a_failure_leaves_no_file(run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def encode(model: Any, images: torch.Tensor) -> torch.Tensor:
        calls.append(len(images))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return torch.zeros(len(images), 4)

    monkeypatch.setattr(ImageClassifier, "encode", encode)
    assert run("embed", "--model", "CLASSIFIER.SAFETENSORS", *DATA, "--output", "f.h5")[0] == 130
    assert len(calls) == 2
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_told_before_it_is(run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("litzoo.zoo.cli.embed.disk_usage", lambda _: SimpleNamespace(free=1_000))
    status, _, err = run("embed", "--model", "ENCODER.SAFETENSORS", *DATA, "--split", "val", "--output", "f.h5")
    assert status == 2
    assert "--output f.h5 takes 0.1 MB, but there are 0.0 MB free" in err
    assert not list(tmp_path.iterdir())


def test_thousands_of_class_names(run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"class {number}" for number in range(12_000)]
    monkeypatch.setattr(DigitsDataModule, "class_names", names)
    assert run("embed", "--model", "ENCODER.SAFETENSORS", *DATA, "--split", "val", "--output", "f.h5")[0] == 0
    with h5py.File(tmp_path / "f.h5", "r") as file:
        assert list(file.attrs["class_names"]) == names


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[list[EmbeddingMap]]:
    """What was drawn, without the time that a picture takes."""
    from matplotlib.figure import Figure

    calls: list[list[EmbeddingMap]] = []

    def plot(maps: list[EmbeddingMap], names: list[str]) -> Figure:
        calls.append(maps)
        return Figure(figsize=(1, 1))

    monkeypatch.setattr(plots, "plot_embedding", plot)
    return calls


def test_maps_side_by_side(run: Callable[..., Any], models: Path, tmp_path: Path, drawn: list[list[EmbeddingMap]]) -> None:
    """A file and the model that made it have the same map; another model shows the same samples."""
    sources = ["FEATURES.H5", "ENCODER.SAFETENSORS", "CLASSIFIER.SAFETENSORS"]
    options = ["--method", "pca", "--samples", "50", "--split", "test", "--wrong", "--output", "m.png", "new/m.html"]
    status, out, _ = run("show", "embedding", *sources, *DATA, *options)
    assert status == 0
    assert out.splitlines()[-1] == "m.png, new/m.html"
    ((first, second, third),) = drawn
    assert [each.title for each in drawn[0]] == ["features", "encoder", "classifier"]
    assert first.place == pytest.approx(second.place, abs=1e-4)
    assert first.index.tolist() == second.index.tolist() == third.index.tolist()
    assert first.note == second.note
    assert first.note.startswith("PCA of 50 of 359 test samples, precision at 1: ")
    assert first.wrong is not None
    data = DigitsDataModule()
    assert first.images is not None
    assert np.array_equal(first.images, data.arrays.input[first.index].permute(0, 2, 3, 1).numpy())
    assert first.label.tolist() == data.arrays.label[first.index].tolist()
    page = (tmp_path / "new" / "m.html").read_text()
    content = json.loads(re.findall(r'type="application/json" id="data">(.*?)</script>', page)[0])
    assert [len(each["label"]) for each in content["maps"]] == [50, 50, 50]
    assert len(content["sheets"]) == 1
    assert (tmp_path / "m.png").is_file()


def test_the_embedding_is_drawn_of_a_file_alone(run: Callable[..., Any], tmp_path: Path, drawn: list[list[EmbeddingMap]]) -> None:
    assert run("show", "embedding", "FEATURES.H5", "--features", "forward", "--method", "pca")[0] == 0
    ((found,),) = drawn
    assert len(found.place) == 143
    assert found.images is None
    assert found.wrong is None
    assert [path.name for path in tmp_path.iterdir()] == ["embedding.png"]


EMBED = ["embed", *DATA, "--output", "f.h5", "--model"]
SHOW = ["show", "embedding", "--method", "pca"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([*EMBED, "nowhere.safetensors"], "nowhere.safetensors does not exist"),
        ([*EMBED, "POINTNET.SAFETENSORS"], "(PointNetClassifier) takes point clouds, but DigitsDataModule has none"),
        (
            [*EMBED, "ENCODER.SAFETENSORS", "--data.image_size", "16"],
            "made for image_size 32, but that of DigitsDataModule is 16: add --data.im",
        ),
        ([*EMBED, "OTHER_MEAN.SAFETENSORS", "--data.mean", "[0.2]"], "add --data.mean [0.5]"),
        ([*EMBED, "ON_OTHER_MEAN.SAFETENSORS", "--data.mean", "[0.2]"], "add --data.mean [0.5]"),
        ([*EMBED, "ENCODER.SAFETENSORS", "--split", "tset"], "tset"),
        (
            [*EMBED, "ENCODER.SAFETENSORS", "--split", "val", "--data.val_fraction", "0"],
            "--split val: DigitsDataModule has no such samples",
        ),
        ([*EMBED, "ENCODER.SAFETENSORS", "--batch_size", "0"], "--batch_size must be at least 1, got 0"),
        ([*EMBED, "ENCODER.SAFETENSORS", "--output", "f.csv"], "ends in .h5"),
        ([*EMBED, "ENCODER.SAFETENSORS", "--output", "nowhere/f.h5"], "there is no folder"),
        ([*EMBED, "ENCODER.SAFETENSORS", "--output", "FEATURES.H5"], "exists already and is not overwritten"),
        (["embed", "--model", "ENCODER.SAFETENSORS", "--output", "f.h5"], "say which data"),
        (["embed", *DATA, "--output", "f.h5"], "model"),
        ([*SHOW, "nowhere.h5"], "there is no file nowhere.h5"),
        ([*SHOW, "ENCODER.SAFETENSORS"], "say which data"),
        ([*SHOW, "BROKEN.H5"], "cannot be read"),
        ([*SHOW, "DAMAGED.H5"], "cannot be read"),
        ([*SHOW, "SHORT.H5"], "holds no features (N, D) with a label and an index each"),
        ([*SHOW, "NAMELESS.H5"], "has 1 names of classes, but labels up to 1"),
        ([*SHOW, "DIVERGED.H5"], "diverged: features of 1 of 9 samples are not finite"),
        ([*SHOW, "FOREIGN.H5"], "`litzoo embed` writes such files"),
        ([*SHOW, "UNLABELLED.H5"], "unlabelled: no val sample has a label"),
        ([*SHOW, "CATS.H5", "--split", "test"], "has no test samples; choose --split val"),
        ([*SHOW, "CATS.H5", "--split", "tset"], "tset"),
        ([*SHOW, "CATS.H5", "--features", "forward"], "no embedding beside its features"),
        ([*SHOW, "CLASSIFIER.SAFETENSORS", *DATA, "--features", "forward"], "no embedding beside its features"),
        ([*SHOW, "CATS.H5", "FEATURES.H5"], "different classes"),
        ([*SHOW, "CATS.H5", *DATA], "was made of other data than this DigitsDataModule"),
        ([*SHOW, "CATS.H5", "--samples", "1"], "--samples must be at least 2"),
        ([*SHOW, "CATS.H5", "--output", "a.jpg"], "names that end in .png or .html"),
        ([*SHOW, "CATS.H5", "--method", "umap"], "umap-learn"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    arguments: list[str], words: str, run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "umap", None)
    status, _, err = run(*arguments)
    assert status == 2
    (line,) = err.splitlines()
    assert line.startswith("litzoo: ")
    assert words in line
    assert not list(tmp_path.iterdir())


def test_panels_are_named_after_their_run() -> None:
    run = "runs/supcon/version_3/checkpoints"
    names = _short_names([f"{run}/average.ckpt", "runs/twin/version_0/checkpoints/average.ckpt", "mine.safetensors", "pointnet_furniture"])
    assert names == ["supcon, average", "twin, average", "mine", "pointnet_furniture"]
    same = [f"{run}/last.ckpt", "runs/supcon/version_4/checkpoints/last.ckpt"]
    assert _short_names(same) == same, "only the whole path tells them apart"
