"""Drawings inside a page, as SVG that follows its light or dark colours and its width."""

import html
import math
from collections.abc import Mapping, Sequence

import numpy as np

from .embedding import class_palette
from .figures import SERIES, shorten

_WIDTH, _HEIGHT = 360, 210  # of a chart, in the units of its drawing
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 10, 34
_DIGIT = 6.2  # width of a digit
_BINS = 600  # of a line with very many points: from each, the lowest and the highest one are drawn
_NAMED = 60  # classes, at most, whose names stand at a matrix
_COUNTED = 20  # classes, at most, whose counts stand in its cells


def line_chart(curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], axis: str) -> str:
    """Quantities over the course of a training, one line each.

    Args:
        curves: name -> positions and values; values that are not finite leave a gap.
        axis: what the positions are.

    Returns:
        An `<svg>` element; the lines have the classes `s0`, `s1`, ... and the names of the curves as tool tips.

    Raises:
        ValueError: if no value of any curve is finite, or one has more or fewer positions than values.

    Example:
        >>> line_chart({"train/loss": ([0, 1], [2.3, 1.1])}, "epoch")[:4]
        '<svg'
    """
    for name, (positions, values) in curves.items():
        if len(positions) != len(values):
            raise ValueError(f"{name} has {len(positions)} positions and {len(values)} values")
    finite = [value for _, values in curves.values() for value in values if math.isfinite(value)]
    if not finite:
        raise ValueError("there is no finite value to draw")
    every = [position for positions, _ in curves.values() for position in positions]
    low_x = math.floor(min(every))
    high_x = max(max(every), low_x + 1)
    ticks_x, ticks_y = nice_ticks(low_x, high_x, 6, whole=True), nice_ticks(min(finite), max(finite), 5)
    low_y, high_y = min(ticks_y[0], min(finite)), max(ticks_y[-1], max(finite))
    left = max(_LEFT, 12 + _DIGIT * max(len(_number(tick)) for tick in ticks_y))

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            left + (x - low_x) / (high_x - low_x) * (_WIDTH - left - _RIGHT),
            _HEIGHT - _BOTTOM - (y - low_y) / (high_y - low_y) * (_HEIGHT - _TOP - _BOTTOM),
        )

    parts = []
    for tick in ticks_y:
        y = place(low_x, tick)[1]
        parts.append(f'<line class="grid" x1="{left:.1f}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{left - 6:.1f}" y="{y + 3.5:.1f}" text-anchor="end">{_number(tick)}</text>')
    for tick in ticks_x:
        x = place(tick, low_y)[0]
        if x <= _WIDTH - _RIGHT + 0.5:
            parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 15}" text-anchor="middle">{_number(tick)}</text>')
    parts.append(f'<text x="{(left + _WIDTH - _RIGHT) / 2:.1f}" y="{_HEIGHT - 4}" text-anchor="middle">{html.escape(axis)}</text>')
    for number, (name, (positions, values)) in enumerate(curves.items()):
        style = f"s{number % len(SERIES)}"
        runs: list[list[tuple[float, float]]] = [[]]
        for x, y in zip(positions, values, strict=True):
            if math.isfinite(y):
                runs[-1].append(place(x, y))
            elif runs[-1]:
                runs.append([])
        dotted = sum(map(len, runs)) < 30
        parts.append(f'<g class="{style}"><title>{html.escape(name)}</title>')
        for run in map(_thin, filter(None, runs)):
            if len(run) > 1:
                parts.append(f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in run)}"/>')
            if dotted or len(run) == 1:
                parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2"/>' for x, y in run]
        parts.append("</g>")
    label = f"{', '.join(curves)} over {axis}"
    return _svg(_WIDTH, _HEIGHT, "chart", label, parts)


def _thin(run: list[tuple[float, float]]) -> list[tuple[float, float]]:
    if len(run) <= 2 * _BINS:
        return run
    kept = []
    for places in np.array_split(np.arange(len(run)), _BINS):
        part = [run[place] for place in places]
        kept += sorted({min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])})
    return kept


def nice_ticks(low: float, high: float, number: int, whole: bool = False) -> list[float]:
    """Round numbers that span an interval.

    Args:
        low: its lower end.
        high: its upper end.
        number: how many, about.
        whole: whether only whole numbers will do.

    Returns:
        Ascending, 1, 2 or 5 times a power of ten apart; the first is at most `low`, or, of whole numbers, at least.

    Example:
        >>> nice_ticks(0.13, 0.92, 5)
        [0.0, 0.2, 0.4, 0.6000000000000001, 0.8, 1.0]
    """
    if not high > low:
        high = low + (abs(low) or 1.0) * 0.1
    rough = (high - low) / max(number - 1, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    if whole:
        step = max(1.0, step)
        first, last = math.ceil(low / step), math.floor(high / step)
    else:
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [place * step for place in range(first, last + 1)]


def matrix_chart(matrix: np.ndarray, class_names: Sequence[str]) -> str:
    """A confusion matrix: a cell is the darker, the larger its share of the true class.

    Args:
        matrix: `(C, C)` counts, rows are the true classes.
        class_names: C names.

    Returns:
        An `<svg>` element; counts are tool tips, and stand in the cells of up to 20 classes.

    Raises:
        ValueError: if the matrix is not square, or there are more or fewer names.

    Example:
        >>> matrix_chart(np.eye(2), ["cat", "dog"])[:4]
        '<svg'
    """
    classes = len(class_names)
    if matrix.shape != (classes, classes):
        raise ValueError(f"the matrix of {classes} classes must have shape {(classes, classes)}, got {matrix.shape}")
    side = max(8.0, min(34.0, 640 / classes)) if classes <= _NAMED else 640 / classes
    names = [shorten(name, 16) for name in class_names] if classes <= _NAMED else []
    size = min(12.0, side * 0.8)
    margin = 24 + max((len(name) for name in names), default=0) * size * 0.6
    parts = []
    for row in range(classes):
        total = max(matrix[row].sum(), 1)
        for column in np.flatnonzero(matrix[row]).tolist():
            count, share = int(matrix[row, column]), matrix[row, column] / total
            x, y = margin + column * side, 4 + row * side
            style = "right" if row == column else "wrong"
            tip = html.escape(f"{class_names[row]} taken for {class_names[column]}: {count} of {int(total)}")
            parts.append(
                f'<rect class="{style}" x="{x:.1f}" y="{y:.1f}" width="{side:.1f}" height="{side:.1f}" fill-opacity="{0.08 + 0.92 * share:.2f}">'
                f"<title>{tip}</title></rect>"
            )
            if classes <= _COUNTED:
                strong = " strong" if share > 0.5 else ""
                place = f'x="{x + side / 2:.1f}" y="{y + side / 2 + 3.5:.1f}"'
                parts.append(f'<text class="count{strong}" {place} text-anchor="middle">{count}</text>')
    end = 4 + classes * side
    parts.append(f'<rect class="frame" x="{margin:.1f}" y="4" width="{classes * side:.1f}" height="{classes * side:.1f}"/>')
    for number, name in enumerate(names):
        middle = (number + 0.5) * side
        font = f'style="font-size:{size:.1f}px"'  # an attribute would give way to the page's style
        parts.append(f'<text x="{margin - 5:.1f}" y="{4 + middle + size / 3:.1f}" text-anchor="end" {font}>{html.escape(name)}</text>')
        turn = f'transform="translate({margin + middle + size / 3:.1f} {end + 5:.1f}) rotate(-90)"'
        parts.append(f'<text {turn} text-anchor="end" {font}>{html.escape(name)}</text>')
    label = f"confusion matrix of {classes} classes, true classes in rows"
    return _svg(margin + classes * side + 6, end + margin, "matrix", label, parts)


def map_chart(place: np.ndarray, label: np.ndarray, class_names: Sequence[str]) -> str:
    """Samples in a plane, coloured by class.

    Args:
        place: `(N, 2)`, finite.
        label: `(N,)` int; -1 where it is unknown.
        class_names: C names.

    Returns:
        An `<svg>` element; dots have the names of their classes as tool tips.

    Raises:
        ValueError: if there is not one label for each place.

    Example:
        >>> map_chart(np.zeros((1, 2)), np.array([0]), ["cat"])[:4]
        '<svg'
    """
    if place.shape != (len(label), 2):
        raise ValueError(f"places must be (N, 2), one for each of {len(label)} labels, got {place.shape}")
    colors = class_palette(len(class_names))
    middle = (place.min(axis=0) + place.max(axis=0)) / 2 if len(place) else np.zeros(2)
    reach = max(float(np.abs(place - middle).max(initial=0.0)), 1e-12)
    spots = 300 + 286 * (place - middle) / reach * np.array([1.0, -1.0])
    radius = max(2.0, min(5.0, 140 / math.sqrt(max(len(label), 1))))
    parts = []
    for cls in range(-1, len(class_names)):
        members = spots[label == cls]
        if len(members):
            name = "no label" if cls < 0 else class_names[cls]
            fill = "var(--lines)" if cls < 0 else colors[cls]
            dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}"/>' for x, y in members)
            parts.append(f'<g fill="{fill}"><title>{html.escape(name)}</title>{dots}</g>')
    return _svg(600, 600, "map", f"map of {len(label)} samples, coloured by class", parts)


def _number(value: float) -> str:
    return f"{value:.6g}"


def _svg(width: float, height: float, style: str, label: str, parts: Sequence[str]) -> str:
    box = f'viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}"'
    return f'<svg class="{style}" role="img" aria-label="{html.escape(label)}" {box}>{"".join(parts)}</svg>'
