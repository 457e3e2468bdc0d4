"""One page about one training, with everything in it: no script, no network."""

import base64
import html
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import NamedTuple

import numpy as np

from ..files import write_file
from .embedding import class_palette
from .figures import SERIES
from .svg import line_chart, map_chart, matrix_chart

Curve = tuple[Sequence[float], Sequence[float]]

_LEGEND = 60  # more names would be longer than the map


class Table(NamedTuple):
    """Rows under a header; numbers are set to the right.

    Args:
        header: names of the columns; none leaves the header out.
        rows: of texts, whole numbers, or floats, which are shown with three decimals.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str | int | float]]


class Sample(NamedTuple):
    """A sample and what the model says of it.

    Args:
        png: a picture, or None.
        heading: such as its class.
        note: such as a probability.
    """

    png: bytes | None
    heading: str
    note: str


class Map(NamedTuple):
    """Samples in a plane: places `(N, 2)`, labels `(N,)` with -1 for none, and a line on how it was made."""

    place: np.ndarray
    label: np.ndarray
    note: str


@dataclass
class Report:
    """What a page shows; what is empty is left out.

    Args:
        title: of the page.
        subtitle: a line below it.
        metrics: title -> name -> value: the tiles on top.
        curves: title of a chart -> name of a curve -> positions and values.
        axis: what the positions are.
        class_names: C names.
        confusion: `(C, C)` counts, rows are the true classes, or None.
        split: which samples the predictions are of, in words.
        classes: scores of each class, or None.
        map: of features, or None.
        samples: title -> samples.
        pictures: title -> a PNG file.
        settings: of the run.
        config: all options, as text.
        environment: of the machine that writes the page.
    """

    title: str
    subtitle: str = ""
    metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    curves: Mapping[str, Mapping[str, Curve]] = field(default_factory=dict)
    axis: str = "epoch"
    class_names: Sequence[str] = ()
    confusion: np.ndarray | None = None
    split: str = ""
    classes: Table | None = None
    map: Map | None = None
    samples: Mapping[str, Sequence[Sample]] = field(default_factory=dict)
    pictures: Mapping[str, bytes] = field(default_factory=dict)
    settings: Table | None = None
    config: str = ""
    environment: Table | None = None


def write_report_html(path: str | os.PathLike[str], report: Report) -> None:
    """Write the page, whole or not at all. It loads nothing, has no script, follows the reader's light or dark colours, and prints.

    Args:
        path: a `.html` file; its folder is made.
        report: what to show.

    Example:
        >>> write_report_html("report.html", Report("a run", curves={"loss": {"train/loss": ([0, 1], [2.3, 1.1])}}))
    """
    parts = [*_metrics(report), *_curves(report), *_confusion(report), *_map(report), *_samples(report), *_pictures(report)]
    parts += _settings(report)
    page = files(__package__).joinpath("report.html").read_text(encoding="utf-8")
    series = "\n".join(f"  .s{number} {{ stroke: {color}; }} .s{number} circle {{ fill: {color}; }}" for number, color in enumerate(SERIES))
    texts = {"SERIES": series, "TITLE": html.escape(report.title), "SUBTITLE": html.escape(report.subtitle), "BODY": "\n".join(parts)}
    page = re.sub(r"\{\{(\w+)\}\}", lambda place: texts[place[1]], page)
    write_file(path, page.encode("utf-8", "replace"))


def _metrics(report: Report) -> list[str]:
    parts = []
    for title, values in report.metrics.items():
        if not values:
            continue
        tiles = "".join(f"<div><b>{_text(value)}</b><span>{html.escape(name)}</span></div>" for name, value in values.items())
        parts.append(
            f'<p class="muted" style="margin-top:18px">{html.escape(title)}</p><div class="tiles" style="margin-top:6px">{tiles}</div>'
        )
    return parts


def _curves(report: Report) -> list[str]:
    if not report.curves:
        return []
    charts = []
    for title, curves in report.curves.items():
        legend = "".join(
            f'<span><i style="background:{SERIES[number % len(SERIES)]}"></i>{html.escape(name)}</span>'
            for number, name in enumerate(curves)
        )
        drawing = line_chart(curves, report.axis)
        charts.append(f'<figure><h3>{html.escape(title)}</h3>{drawing}<figcaption class="legend">{legend}</figcaption></figure>')
    return ["<h2>Curves</h2>", f'<div class="grid">{"".join(charts)}</div>']


def _confusion(report: Report) -> list[str]:
    if report.confusion is None:
        return []
    parts = [f"<h2>Classes</h2><p class='muted'>{html.escape(report.split)}; rows are the true classes, columns the predicted ones.</p>"]
    parts.append(f'<div class="side"><div class="wide">{matrix_chart(report.confusion, report.class_names)}</div>')
    parts.append(f'<div class="wide">{_table(report.classes)}</div></div>' if report.classes else "</div>")
    return parts


def _map(report: Report) -> list[str]:
    if report.map is None:
        return []
    place, label, note = report.map
    colors, present = class_palette(len(report.class_names)), np.unique(label[label >= 0]).tolist()
    names = [f'<span><i style="background:{colors[cls]}"></i>{html.escape(report.class_names[cls])}</span>' for cls in present[:_LEGEND]]
    if len(present) > _LEGEND:
        names.append(f"<span>and {len(present) - _LEGEND} more; each dot tells its class</span>")
    drawing = map_chart(place, label, report.class_names)
    return [
        f"<h2>Embedding</h2><p class='muted'>{html.escape(note)}</p>",
        f'<div class="side"><div>{drawing}</div><div class="legend">{"".join(names)}</div></div>',
    ]


def _samples(report: Report) -> list[str]:
    parts = []
    for title, samples in report.samples.items():
        cards = []
        for sample in samples:
            picture = "" if sample.png is None else _image(sample.png, sample.heading)
            cards.append(
                f"<figure>{picture}<figcaption><b>{html.escape(sample.heading)}</b>{html.escape(sample.note)}</figcaption></figure>"
            )
        parts.append(f'<h3>{html.escape(title)}</h3><div class="cards">{"".join(cards)}</div>')
    return ["<h2>Predictions</h2>", f'<p class="muted">{html.escape(report.split)}</p>', *parts] if parts else []


def _pictures(report: Report) -> list[str]:
    if not report.pictures:
        return []
    figures = [f"<figure><h3>{html.escape(title)}</h3>{_image(png, title)}</figure>" for title, png in report.pictures.items()]
    return ["<h2>Pictures</h2>", *figures]


def _settings(report: Report) -> list[str]:
    parts = []
    if report.settings is not None or report.config:
        parts.append("<h2>Configuration</h2>")
        parts.append(_table(report.settings) if report.settings else "")
    if report.config:
        parts.append(f"<details><summary>all options</summary><pre>{html.escape(report.config)}</pre></details>")
    if report.environment is not None:
        parts += ["<h2>Environment</h2>", "<p class='muted'>of the machine that wrote this page</p>", _table(report.environment)]
    return parts


def _image(png: bytes, text: str) -> str:
    # Width and height stand in the header of a PNG.
    width, height = (int.from_bytes(png[start : start + 4], "big") for start in (16, 20))
    small = ' class="small"' if max(width, height) < 96 else ""
    return f'<img{small} alt="{html.escape(text)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def _table(table: Table) -> str:
    numeric = [
        all(isinstance(row[column], (int, float)) or row[column] == "" for row in table.rows) for column in range(len(table.rows[0]))
    ]
    style = [' class="number"' if number else "" for number in numeric]
    head = "".join(f"<th{style[column]}>{html.escape(name)}</th>" for column, name in enumerate(table.header))
    rows = "".join(
        "<tr>" + "".join(f"<td{style[column]}>{_text(value)}</td>" for column, value in enumerate(row)) + "</tr>" for row in table.rows
    )
    return f"<table>{f'<thead><tr>{head}</tr></thead>' if head else ''}<tbody>{rows}</tbody></table>"


def _text(value: str | float) -> str:
    if isinstance(value, float):
        return f"{value:.3f}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:.3g}"
    return html.escape(f"{value:,}" if isinstance(value, int) else value)
