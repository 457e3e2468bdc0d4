"""The page about a run: drawings against the numbers, what the page says against the model, mistakes."""

import math
import re
import xml.etree.ElementTree as ET
from argparse import Namespace
from html.parser import HTMLParser
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from litzoo.datamodules import DigitsDataModule, PatientsDataModule
from litzoo.zoo import LogisticRegression
from litzoo.zoo.cli import main
from litzoo.zoo.cli.report import _data_of_run, _epoch_of, _sample, _see
from litzoo.zoo.plots.report import Report, Sample, Table, write_report_html
from litzoo.zoo.plots.review import image_png
from litzoo.zoo.plots.svg import line_chart, map_chart, matrix_chart, nice_ticks
from litzoo.zoo.pretrained import load_checkpoint

# Drawings


@pytest.mark.parametrize(
    ("low", "high", "number"), [(0.13, 0.92, 5), (0, 1, 5), (-3.2, 7.9, 6), (1e-6, 3e-6, 4), (5, 5, 5), (0, 0, 3), (-1e9, 1e9, 5)]
)
def test_ticks_are_round_and_span_what_they_mark(low: float, high: float, number: int) -> None:
    ticks = nice_ticks(low, high, number)
    assert ticks[0] <= low + 1e-9 * abs(low)
    assert ticks[-1] >= high - 1e-9 * abs(high)
    assert 2 <= len(ticks) <= 2 * number + 2
    step = ticks[1] - ticks[0]
    mantissa = step / 10 ** math.floor(math.log10(step) + 1e-9)
    assert min(abs(mantissa - nice) for nice in (1, 2, 5, 10)) < 1e-6


def test_ticks_of_epochs_are_whole() -> None:
    assert nice_ticks(0, 3, 6, whole=True) == [0, 1, 2, 3]
    assert nice_ticks(1, 40, 6, whole=True) == [10, 20, 30, 40]


def test_a_line_goes_through_its_values_and_breaks_where_there_are_none() -> None:
    root = ET.fromstring(line_chart({"train/loss": ([0, 1, 2, 3, 4], [4.0, 2.0, math.nan, 1.0, 0.0]), "a<b": ([4], [1.0])}, "epoch"))
    lines = [element.attrib["points"].split() for element in root.iter("polyline")]
    assert [len(points) for points in lines] == [2, 2]
    (x0, y0), (x1, y1), (x3, y3), (x4, y4) = [tuple(map(float, point.split(","))) for points in lines for point in points]
    assert (x1 - x0) == pytest.approx(x4 - x3, abs=0.2) == pytest.approx((x4 - x0) / 4, abs=0.2)
    assert (y1 - y0) == pytest.approx(2 * (y4 - y3), abs=0.2), "down the page as the values fall"
    assert y4 > y0
    assert [element.text for element in root.iter("title")] == ["train/loss", "a<b"]
    with pytest.raises(ValueError, match="no finite value"):
        line_chart({"x": ([0], [math.inf])}, "step")
    with pytest.raises(ValueError, match="2 positions and 1 values"):
        line_chart({"x": ([0, 1], [1.0])}, "step")


def test_long_lines_are_thinned_to_what_can_be_seen_and_long_numbers_have_room() -> None:
    values = np.random.default_rng(0).normal(size=20_000) * 1e-7 + 1.5e-4
    root = ET.fromstring(line_chart({"lr": (np.arange(20_000).tolist(), values.tolist())}, "step"))
    points = np.array([point.split(",") for point in next(root.iter("polyline")).attrib["points"].split()], dtype=float)
    assert len(points) == 1200
    assert (np.diff(points[:, 0]) >= 0).all()
    whole = line_chart({"lr": ([0, 1], [values.min(), values.max()])}, "step")
    assert points[:, 1].max() - points[:, 1].min() == pytest.approx(
        np.ptp([float(y) for y in re.findall(r'cy="([\d.]+)"', whole)]), abs=0.2
    )
    ends = [element for element in root.iter("text") if element.attrib["text-anchor"] == "end"]
    assert all(float(element.attrib["x"]) >= 6 * len(element.text or "") for element in ends), "no digit is cut off"


@pytest.mark.parametrize("classes", [2, 21, 100])
def test_a_matrix_has_a_cell_for_each_count(classes: int) -> None:
    counts = np.random.default_rng(0).integers(0, 3, (classes, classes))
    root = ET.fromstring(matrix_chart(counts, [f"class <{number}>" for number in range(classes)]))
    cells = [element for element in root.iter("rect") if element.attrib["class"] != "frame"]
    assert len(cells) == np.count_nonzero(counts)
    tips = [element[0].text or "" for element in cells]
    assert sum(int(re.search(r": (\d+) of", tip)[1]) for tip in tips) == counts.sum()  # type: ignore[index]  # there is one in each
    names = [element for element in root.iter("text") if element.attrib["text-anchor"] == "end"]
    assert len(names) == (2 * classes if classes < 100 else 0)
    # The margin is made for this size, and the page's style must not change it.
    assert all(element.attrib["style"].startswith("font-size:") for element in names)
    row, column = np.argwhere(counts)[0]
    assert tips[0] == f"class <{row}> taken for class <{column}>: {counts[row, column]} of {counts[row].sum()}"
    with pytest.raises(ValueError, match="must have shape"):
        matrix_chart(counts[:1], ["a"] * classes)


def test_a_map_has_a_dot_for_each_sample_within_its_frame() -> None:
    place = np.random.default_rng(0).normal(size=(50, 2)) * 1e3
    label = np.arange(50) % 4 - 1
    root = ET.fromstring(map_chart(place, label, ["a", "b", "c"]))
    dots = np.array([[float(element.attrib[name]) for name in ("cx", "cy")] for element in root.iter("circle")])
    assert len(dots) == 50
    assert dots.min() > 0
    assert dots.max() < 600
    assert [element.text for element in root.iter("title")] == ["no label", "a", "b", "c"]
    assert "circle" in map_chart(np.zeros((1, 2)), np.array([0]), ["a"])
    with pytest.raises(ValueError, match="one for each of 3 labels"):
        map_chart(place, label[:3], ["a"])


# The page


class Reader(HTMLParser):
    """Tags, attributes and texts of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_page_loads_nothing_and_takes_texts_as_they_are(tmp_path: Path) -> None:
    evil = '<script>alert("{{BODY}}")</script>'
    png = image_png(np.zeros((8, 8, 3), np.uint8))
    page = Report(
        title=evil,
        subtitle="{{TITLE}}",
        metrics={evil: {"accuracy": 0.5}},
        curves={evil: {"a": ([0], [1.0])}},
        class_names=[evil, "b"],
        confusion=np.eye(2),
        classes=Table(("class", "n"), [(evil, 12345)]),
        samples={evil: [Sample(png, evil, ""), Sample(None, "no picture", "")]},
        pictures={evil: png},
        settings=Table((), [("lr", evil)]),
        config=evil,
    )
    write_report_html(tmp_path / "page.html", page)
    reader = Reader((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert "script" not in reader.tags
    assert all(link.startswith("data:image/png;base64,") for link in reader.links)
    assert len(reader.links) == 2
    assert reader.text.count(evil) >= 9
    assert "12,345" in reader.text
    assert list(tmp_path.iterdir()) == [tmp_path / "page.html"]


# The command


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short training of digits."""
    root = tmp_path_factory.mktemp("report")
    arguments = ["fit", "--config", "classifier_digits", "--trainer.default_root_dir", str(root), "--trainer.enable_progress_bar", "false"]
    assert main([*arguments, "--trainer.max_epochs", "2", "--trainer.accelerator", "cpu", "--trainer.enable_model_summary", "false"]) == 0
    return root / "classifier_digits" / "version_0"


def test_a_report_tells_what_the_model_says(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "report.html"
    assert (
        main(["report", "--split", "val", str(run), "--method", "pca", "--samples", "60", "--checkpoint", "last", "--output", str(output)])
        == 0
    )
    assert str(output) in capsys.readouterr().out
    page = output.read_text(encoding="utf-8")
    reader = Reader(page)
    data = DigitsDataModule(image_size=32)
    model = load_checkpoint(run / "checkpoints" / "last.ckpt")
    with torch.no_grad():
        batches = [(model(data.transform(batch).input), batch.label) for batch in data.val_dataloader()]
    logits, label = (torch.cat(column) for column in zip(*batches, strict=True))
    accuracy = (logits.argmax(dim=1) == label).double().mean()
    assert f"<b>{accuracy:.3f}</b><span>accuracy</span>" in page
    assert f"{len(label)} val samples, last.ckpt" in reader.text
    cells = re.findall(r": (\d+) of \d+</title>", page)
    assert sum(map(int, cells)) == len(label)
    assert page.count("<circle") >= 60
    for word in (
        "Most confidently wrong",
        "Worst",
        "Best",
        "PCA of 60 of",
        "train/loss",
        "processor",
        "confusion matrix",
        "DigitsDataModule",
    ):
        assert word in reader.text, word
    assert "script" not in reader.tags
    assert not [link for link in reader.links if not link.startswith("data:")]


def test_a_report_of_the_log_alone_needs_neither_model_nor_data(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "moved" / "version_3"
    copy.mkdir(parents=True)
    for name in ("metrics.csv", "config.yaml"):
        (copy / name).write_bytes((run / name).read_bytes())
    png = image_png(np.zeros((8, 8, 3), np.uint8))
    for name in ("confusion_matrix/val.png", "neighbours/val.png", "samples/epoch_001.png", "samples/epoch_002.png", "samples/curve.png"):
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_bytes(png)
    assert main(["report", str(copy), "--log_only"]) == 0
    reader = Reader((copy / "report.html").read_text(encoding="utf-8"))
    assert "moved, version_3" in reader.text
    assert "Curves" in reader.text
    assert "Predictions" not in reader.text
    page = (copy / "report.html").read_text(encoding="utf-8")
    # The newest one of each kind, whatever the files of other kinds are called.
    assert re.findall('alt="([^"]*)"', page) == ["confusion matrix val", "neighbours val", "samples curve", "samples epoch 002"]


def test_steps_lie_on_the_axis_of_epochs() -> None:
    """Of two epochs of 10 steps, validated twice in each, and a third one that was not finished."""
    rows = [{"step": float(step), "loss": 1.0} for step in (0, 4, 14)]
    rows += [{"step": step, "epoch": epoch} for step, epoch in ((4.0, 0.0), (9.0, 0.0), (14.0, 1.0), (19.0, 1.0))]
    assert _epoch_of([0, 4, 9, 14, 19, 24], rows) == pytest.approx([0.1, 0.5, 1.0, 1.5, 2.0, 2.5])


def test_a_value_of_an_option_is_not_taken_for_the_run(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("val").mkdir()
    for name in ("metrics.csv", "config.yaml"):
        (Path("val") / name).write_text("")
    config = ["--config", str(run / "config.yaml")]
    assert _data_of_run(["--split", "val", str(run)]) == config
    assert _data_of_run(["--split=val", "--overwrite", str(run)]) == config
    assert _data_of_run(["--split", "test", "val"]) == ["--config", "val/config.yaml"]
    for others in (["--data", "DigitsDataModule"], ["--config=x"], ["--log-only"]):
        assert _data_of_run([str(run), *others]) == []


def fit(root: Path, recipe: str, *options: str) -> Path:
    quiet = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false", "--trainer.accelerator", "cpu"]
    short = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "1", "--data.num_points", "32", "--data.eval_points", "32"]
    assert main(["fit", "--config", recipe, "--trainer.default_root_dir", str(root), *quiet, *short, *options]) == 0
    return root / recipe / "version_0"


def test_a_classifier_of_clouds_has_predictions_and_critical_points(tmp_path: Path) -> None:
    run = fit(tmp_path, "pointnet_furniture")
    assert main(["report", str(run), "--method", "none"]) == 0
    page = (run / "report.html").read_text(encoding="utf-8")
    for word in ("Most confidently wrong", "mean class accuracy", "confusion matrix of 11 classes"):
        assert word in page
    assert 'alt="Critical points of some objects' in page


def test_a_segmenter_has_a_page_without_predictions(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    with h5py.File(tmp_path / "parts.h5", "w") as file:
        file["points"], file["label"] = rng.normal(size=(40, 32, 3)).astype(np.float32), np.arange(40) % 2
        file["part"] = np.arange(40)[:, None] % 2 + rng.integers(0, 2, (40, 32)) * 2
    run = fit(tmp_path, "pointnet_seg_psb", "--data.path", str(tmp_path / "parts.h5"))
    assert main(["report", str(run), "--method", "pca"]) == 0
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "val/instance_miou" in page
    assert "PCA of 4 val samples" in page
    assert "Most confidently wrong" not in page


def test_samples_that_are_no_pictures_show_their_numbers(tmp_path: Path) -> None:
    data, index = PatientsDataModule(), int(PatientsDataModule().indices(1)[5])
    model = LogisticRegression(2, 2, data.class_names)
    seen = _see(model, data, Namespace(split="val", batch_size=None))
    assert seen.probability is not None
    assert seen.probability.shape == (32, 2)
    card = _sample(data, index, "benign", "malignant", 0.25, 0.75)
    first, second = data.arrays.input[index].tolist()
    assert card == Sample(None, "benign, taken for malignant", f"25.0 % against 75.0 %, number {index}: {first:.4g}, {second:.4g}")


def test_a_model_that_diverged_or_has_other_classes_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    names = checkpoint["hyper_parameters"]["class_names"]
    for change, sentence in (
        (
            {"class_names": ["zero", *names[1:]]},
            "knows the classes zero, 1, 2, 3, 4 ..., but those of DigitsDataModule are 0, 1, 2, 3, 4 ...: ",
        ),
        ({}, "other than finite numbers for 143 of 143 val samples, its training diverged: choose another --checkpoint, or add --log_only"),
    ):
        checkpoint["hyper_parameters"]["class_names"] = names
        checkpoint["hyper_parameters"].update(change)
        torch.save(checkpoint, tmp_path / "changed.ckpt")
        output = tmp_path / "page.html"
        assert main(["report", str(run), "--checkpoint", str(tmp_path / "changed.ckpt"), "--output", str(output)]) == 2
        assert sentence in capsys.readouterr().err
        assert not output.exists()
        checkpoint["state_dict"]["head.bias"].fill_(math.nan)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere"], "there is no run nowhere: give a folder that `litzoo fit` wrote"),
        (["RUN", "--output", "page.txt"], "give a name that ends in .html"),
        (["RUN", "--checkpoint", "none.ckpt", "--output", "OUT"], "--checkpoint none.ckpt: there is no such file"),
        (["RUN", "--samples", "1", "--output", "OUT"], "--samples must be at least 2"),
        (["RUN", "--data.image_size", "16", "--output", "OUT"], "was made for image_size 32"),
        (["RUN", "--data", "FurnitureDataModule", "--output", "OUT"], "takes images, but FurnitureDataModule has none"),
    ],
)
def test_mistakes(run: Path, tmp_path: Path, arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "page.html"
    given = [{"RUN": str(run), "OUT": str(output)}.get(argument, argument) for argument in arguments]
    assert main(["report", *given]) == 2
    assert sentence in capsys.readouterr().err
    assert not output.exists()


def test_a_page_that_exists_is_kept(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "page.html"
    output.write_text("mine")
    assert main(["report", str(run), "--log_only", "--output", str(output)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert output.read_text() == "mine"
    assert main(["report", str(run), "--log_only", "--output", str(output), "--overwrite"]) == 0
    assert output.read_text().startswith("<!DOCTYPE html>")
