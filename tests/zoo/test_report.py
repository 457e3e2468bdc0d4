"""The page about a run: drawings against the numbers, what the page says against the model, mistakes."""

import math
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

from litzoo.datamodules import DigitsDataModule
from litzoo.zoo.cli import main
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


@pytest.mark.parametrize("classes", [2, 21, 100])
def test_a_matrix_has_a_cell_for_each_count(classes: int) -> None:
    counts = np.random.default_rng(0).integers(0, 3, (classes, classes))
    root = ET.fromstring(matrix_chart(counts, [f"class <{number}>" for number in range(classes)]))
    cells = [element for element in root.iter("rect") if element.attrib["class"] != "frame"]
    assert len(cells) == np.count_nonzero(counts)
    tips = [element[0].text or "" for element in cells]
    assert sum(int(re.search(r": (\d+) of", tip)[1]) for tip in tips) == counts.sum()  # type: ignore[index]  # there is one in each
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
    assert main(["report", str(copy), "--log_only"]) == 0
    reader = Reader((copy / "report.html").read_text(encoding="utf-8"))
    assert "moved, version_3" in reader.text
    assert "Curves" in reader.text
    assert "Predictions" not in reader.text


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
