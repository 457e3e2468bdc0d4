"""`litzoo show`: which samples it draws, that views are those of training, and what it says to mistakes."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from litzoo.datamodules import DigitsDataModule, HDF5PointsDataModule, PointAugmentation
from litzoo.zoo.batch import Batch
from litzoo.zoo.cli import main
from litzoo.zoo.plots import images as image_plots
from litzoo.zoo.plots import point_clouds

DIGITS = ["--data", "DigitsDataModule"]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """What the plotting functions get, one entry for each figure; the test runs in its folder."""
    monkeypatch.chdir(tmp_path)
    calls: list[dict[str, Any]] = []

    def spy(module: Any, name: str, *arguments: str) -> None:
        real = getattr(module, name)

        def plot(*values: Any, **named: Any) -> Any:
            calls.append({"name": name, **dict(zip(arguments, values, strict=False)), **named})
            return real(*values, **named)

        monkeypatch.setattr(module, name, plot)

    spy(image_plots, "plot_images", "images", "titles", "columns")
    spy(image_plots, "plot_views", "originals", "views", "titles")
    spy(point_clouds, "plot_point_clouds", "clouds", "titles")
    return calls


@pytest.fixture
def clouds(points_file: Callable[..., Path]) -> Path:
    return points_file()


def training_batches(data: Any, epoch: int) -> list[Batch]:
    """The batches of a training epoch, as the model gets them."""
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return [data.on_after_batch_transfer(batch, 0) for batch in loader]


@pytest.mark.parametrize("epoch", [0, 3])
def test_views_are_those_of_training(epoch: int, drawn: list[dict[str, Any]], tmp_path: Path) -> None:
    options = ["--data.augmentation", "simclr", "--data.seed", "5"]
    assert main(["show", "views", *DIGITS, *options, "--samples", "4", "--views", "3", "--epoch", str(epoch)]) == 0
    assert (tmp_path / "views.png").read_bytes().startswith(b"\x89PNG")
    (call,) = drawn
    assert call["views"].shape == (4, 3, 32, 32, 1)
    data = DigitsDataModule(augmentation="simclr", views=2, seed=5)
    mean, std = data.image_mean[0], data.image_std[0]
    batches = training_batches(data, epoch)
    index = torch.cat([batch.index for batch in batches])
    views = torch.cat([batch.input for batch in batches])
    found = 0
    for original, row, title in zip(call["originals"], call["views"], call["titles"], strict=True):
        (sample,) = (data.arrays.input == torch.from_numpy(original).permute(2, 0, 1)).flatten(1).all(1).nonzero().squeeze(1).tolist()
        assert title == str(int(data.arrays.label[sample]))
        assert data.arrays.split[sample] == 0
        for place in (index == sample).nonzero().squeeze(1).tolist():  # an epoch drops its incomplete last batch
            found += 1
            expected = views[place].permute(0, 2, 3, 1).numpy() * std + mean
            assert row[:2] == pytest.approx(expected, abs=1e-5)
    assert found >= 3
    assert call["titles"] == ["0", "1", "2", "3"]


def test_samples_are_spread_over_the_classes(drawn: list[dict[str, Any]]) -> None:
    assert main(["show", "views", *DIGITS, "--samples", "23", "--views", "1"]) == 0
    titles = drawn[0]["titles"]
    assert titles == sorted(titles)
    assert [titles.count(str(cls)) for cls in range(10)] == [3, 3, 3, 2, 2, 2, 2, 2, 2, 2]
    assert len({original.tobytes() for original in drawn[0]["originals"]}) == 23


def test_cloud_views_are_those_of_training(clouds: Path, drawn: list[dict[str, Any]], tmp_path: Path) -> None:
    options = ["--data.path", str(clouds), "--data.num_points", "16", "--data.augmentation.rotation", "full"]
    assert main(["show", "views", "--data", "HDF5PointsDataModule", *options, "--samples", "2", "--views", "2", "--epoch", "1"]) == 0
    assert (tmp_path / "views.png").is_file()
    (call,) = drawn
    assert call["columns"] == 3
    assert call["titles"][1:3] == call["titles"][4:6] == ["epoch 1", "epoch 2"]
    data = HDF5PointsDataModule(clouds, num_points=16, augmentation=PointAugmentation(rotation="full"), batch_size=1)
    for place, epoch in enumerate((1, 2)):
        inputs = [batch.input[0].numpy() for batch in training_batches(data, epoch)]
        for row in range(2):
            cloud = call["clouds"][3 * row + 1 + place]
            assert cloud.shape == (16, 3)
            assert sum(np.array_equal(cloud, other) for other in inputs) == 1


def test_show_data_of_images(drawn: list[dict[str, Any]], tmp_path: Path) -> None:
    assert main(["show", "data", *DIGITS, "--per_class", "3", "--split", "test", "--output", "pictures"]) == 0
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == {"class_frequencies.png", "images.png"}
    (call,) = drawn
    assert call["titles"] == [str(cls) for cls in range(10) for _ in range(3)]
    assert call["columns"] % 3 == 0
    data = DigitsDataModule()
    test = data.arrays.input[data.indices(2)].permute(0, 2, 3, 1).numpy()
    assert all((test == image).all(axis=(1, 2, 3)).any() for image in call["images"])


def test_samples_without_a_label(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As STL-10 has them; they are counted apart, and augmented like the others."""
    from litzoo.datamodules import ArrayDataModule, Arrays
    from litzoo.zoo.cli import show

    label = torch.tensor([0, 1, -1, -1, 0, 1])
    data = ArrayDataModule()
    data.arrays = Arrays(torch.zeros(6, 2), label, torch.tensor([0, 0, 0, 0, 1, 2], dtype=torch.uint8), ("cat", "dog"))
    assert show._titles(data, torch.tensor([2, 1])) == ["no label", "dog"]
    assert show._spread(label, 3).tolist() == [2, 0, 1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(show, "_parse", lambda parser, arguments, subject: (parser.parse_args(["--output", str(tmp_path)]), data))
        assert main(["show", "data"]) == 0
    assert "4 samples in 2 classes and 2 without a label" in capsys.readouterr().out


AUGMENTED = [
    (["--data.augmentation", "simclr"], "simclr", {"crop_scale": (0.08, 1.0), "hue": 0.1, "rotation": 0.0}),
    (["--data.augmentation.crop_scale", "[0.2,1.0]"], None, {"crop_scale": (0.2, 1.0), "flip": 0.0, "rotation": 10.0}),
    (["--data.augmentation", "{flip: 0.25, crop_scale: [0.3, 1.0]}"], None, {"crop_scale": (0.3, 1.0), "flip": 0.25, "rotation": 0.0}),
    ([{"crop_scale": [0.2, 1.0], "flip": 0.5}], None, {"crop_scale": (0.2, 1.0), "flip": 0.5, "rotation": 0.0}),
    (["supcon"], "supcon", {"crop_scale": (0.2, 1.0), "flip": 0.5, "grayscale": 0.2}),
    ([{"flip": 0.5}, "--data.augmentation", "relational"], "relational", {"brightness": 0.8, "flip": 0.5}),
    ([{"flip": 0.5}, "--data.augmentation.hue", "0.3"], None, {"flip": 0.5, "hue": 0.3, "rotation": 0.0}),
]


def given(options: list[Any], folder: Path) -> list[str]:
    """The arguments: what is no option goes into a recipe as its augmentation."""
    if isinstance(options[0], str) and options[0].startswith("--"):
        return [*DIGITS, *options]
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"data": {"class_path": "DigitsDataModule", "init_args": {"augmentation": options[0]}}}))
    return ["--config", str(path), *options[1:]]


@pytest.mark.parametrize(("options", "preset", "settings"), AUGMENTED)
def test_every_form_of_an_augmentation_in_show(options: list[Any], preset: str | None, settings: dict[str, Any], tmp_path: Path) -> None:
    from litzoo.datamodules.augment.images import PRESETS
    from litzoo.zoo.cli import show

    parser = show._parser("views")
    _, data = show._parse(parser, given(options, tmp_path), "views")
    assert isinstance(data, DigitsDataModule)
    assert preset is None or data.augmentation == PRESETS[preset]
    assert {name: getattr(data.augmentation, name) for name in settings} == settings


@pytest.mark.parametrize(("options", "preset", "settings"), AUGMENTED)
def test_every_form_of_an_augmentation_in_fit(
    options: list[Any], preset: str | None, settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--model", "ImageClassifier", *given(options, tmp_path), "--print_config"])
    assert stop.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)["data"]["init_args"]["augmentation"]
    if preset is None:
        assert {name: printed[name] for name in settings} == {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}
    else:
        assert printed == preset


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["view"], "did you mean views"),
        (["views"], "say which data"),
        (["views", "--config"], "--config needs the name of a recipe"),
        (["views", "--config", "pointnet_furnitur"], "did you mean pointnet_furniture"),
        (["views", "--config", "EMPTY"], "empty.yaml has no `data`"),
        (["views", "--config", "BROKEN"], "broken.yaml is not valid YAML"),
        (["views", "--data", "DigitDataModule"], "did you mean DigitsDataModule"),
        (["views", *DIGITS, "--data.augmentation", "simcrl"], "'simclr'"),
        (["views", "--config", "TYPO"], "'simclr'"),
        (["views", *DIGITS, "--data.augmentation.flip", "2"], "flip must lie in [0, 1]"),
        (["views", *DIGITS, "--data.augmentation.flpi", "0.5"], "--data.augmentation.flpi is not an option"),
        (["views", *DIGITS, "--bogus", "2"], "--bogus"),
        (["views", *DIGITS, "--samples", "0"], "--samples must be at least 1, got 0"),
        (["views", *DIGITS, "--views", "few"], "--views: expected int, got few"),
        (["views", *DIGITS, "--epoch", "-1"], "--epoch must be at least 0"),
        (["data", *DIGITS, "--per_class", "0"], "--per_class must be at least 1"),
        (["data", *DIGITS, "--split", "tset"], "--split"),
        (["views", "--data", "PatientsDataModule"], "a sample of PatientsDataModule is (2,) numbers"),
        (["views", "--data", "HDF5PointsDataModule", "--data.path", "nowhere.h5"], "there is no file nowhere.h5"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes = tmp_path / "recipes"
    recipes.mkdir()
    (recipes / "empty.yaml").write_text("data:\n")
    (recipes / "broken.yaml").write_text("a: [1,")
    (recipes / "typo.yaml").write_text("data: {class_path: DigitsDataModule, init_args: {augmentation: simcrl}}")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    names = {name.upper(): str(recipes / f"{name}.yaml") for name in ("empty", "broken", "typo")}
    assert main(["show", *(names.get(argument, argument) for argument in arguments)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("litzoo: ")
    assert words in lines[0]
    assert not list((tmp_path / "here").iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        ["data", *DIGITS, "--output"],
        ["views", *DIGITS, "--output"],
        ["critical", "a.npy", "--model", "none", "--output"],
        ["parts", "a.npy", "--model", "none", "--output"],
        ["embedding", "a.h5", "--output"],
    ],
)
def test_a_folder_that_may_not_be_written_to_is_refused_before_any_work(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("a.npy", np.zeros((9, 3), np.float32))
    Path("a.h5").touch()
    monkeypatch.setattr(DigitsDataModule, "read", lambda self: pytest.fail("the data were read"))
    file = "map.png" if arguments[0] == "embedding" else ""
    assert main(["show", *arguments, str(Path("a.npy", "new", file))]) == 2
    assert f"{tmp_path / 'a.npy'} is a file, give another folder" in capsys.readouterr().err
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path and access(path, mode))
    assert main(["show", *arguments, str(Path("new", "newer", file))]) == 2
    assert f": you may not write to {tmp_path}, give another folder" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"a.npy", "a.h5"}


def test_help_names_both_subjects(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show"]) == 0
    text = capsys.readouterr().out
    assert "show data" in text
    assert "show views" in text
    for subject, option in (("data", "--per_class"), ("views", "--epoch")):
        with pytest.raises(SystemExit) as stop:
            main(["show", subject, "--help"])
        assert stop.value.code == 0
        assert option in capsys.readouterr().out


def test_a_recipe_changed_from_the_command_line(tmp_path: Path, clouds: Path) -> None:
    from litzoo.zoo.cli import show

    recipe = tmp_path / "recipe.yaml"
    settings = {"class_path": "HDF5PointsDataModule", "init_args": {"path": str(clouds), "num_points": 16, "seed": 3}}
    recipe.write_text(yaml.safe_dump({"data": settings, "model": {"class_path": "nonsense"}}))
    _, data = show._parse(show._parser("views"), ["--data.num_points", "8", f"--config={recipe}"], "views")
    assert isinstance(data, HDF5PointsDataModule)
    assert (data.num_points, data.seed) == (8, 3)
