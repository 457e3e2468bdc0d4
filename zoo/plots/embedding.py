"""Maps of features: samples as points in a plane, coloured by class; as a picture, and as a page to look around in."""

import base64
import io
import os
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .figures import INK, LINES, MUTED, new_figure, shorten, text_width
from .images import rgb_pixels
from .pages import write_page
from .point_clouds import oklab

# Okabe & Ito's colours, which nearly everybody can tell apart; further ones are chosen to be as different as can be.
_FIRST = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9")
_NO_LABEL = "#b6bfc8"
# How colours of light look without the first, and without the second kind of cones.
_PROTAN = np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]])
_DEUTAN = np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]])
_MARGIN = 0.15
_GAP = 0.35
_HEADER = 0.55
_FOOTER = 0.3
_COLORS = 256  # more would hardly differ
_NAMED = 150  # more names would hide the map
_TILE = 32  # pixels of a thumbnail, at most
_PIXELS = 1 << 23  # of all thumbnails of a map together


class EmbeddingMap(NamedTuple):
    """Samples in a plane.

    Args:
        title: such as the name of a model.
        note: a line under the title.
        place: `(N, 2)`.
        label: `(N,)` int; -1 where it is unknown.
        index: `(N,)` int, the number of each sample in its data set.
        wrong: `(N,)` bool, samples to mark because their nearest neighbour is of another class; None marks none.
        images: `(N, H, W, C)`, uint8 or floats in [0, 1], with C = 1 or 3, for thumbnails on the page; None where there are none.
    """

    title: str
    note: str
    place: np.ndarray
    label: np.ndarray
    index: np.ndarray  # type: ignore[assignment]  # hides tuple.index, which nobody needs here
    wrong: np.ndarray | None = None
    images: np.ndarray | None = None


_NAMES = {"tsne": "t-SNE", "umap": "UMAP", "pca": "PCA"}


def describe(method: str, drawn: int, number: int, what: str, precision: float | None) -> str:
    """The note of a map.

    Args:
        method: "tsne", "umap" or "pca".
        drawn: samples in the map.
        number: samples that there are.
        what: of which kind they are.
        precision: at 1, of all of them; None where it is unknown.

    Returns:
        One line.

    Example:
        >>> describe("tsne", 2000, 10000, "test samples", 0.951)
        't-SNE of 2,000 of 10,000 test samples, precision at 1: 95.1%'
    """
    of_all = f" of {number:,}" if drawn < number else ""
    return f"{_NAMES[method]} of {drawn:,}{of_all} {what}" + ("" if precision is None else f", precision at 1: {precision:.1%}")


def _check(maps: Sequence[EmbeddingMap], class_names: Sequence[str]) -> None:
    if not maps:
        raise ValueError("there is no map to draw")
    for each in maps:
        number = len(each.place)
        others = [each.label, each.index, *(column for column in (each.wrong, each.images) if column is not None)]
        if each.place.shape != (number, 2) or number == 0 or {len(column) for column in others} != {number}:
            raise ValueError(
                f"{each.title}: every sample needs a place (N, 2), a label and an index; got {each.place.shape} and "
                f"{', '.join(str(len(column)) for column in others)} of the others"
            )
        if not np.isfinite(each.place).all():
            raise ValueError(f"{each.title}: places must be finite")
        if int(each.label.max()) >= len(class_names):
            raise ValueError(f"{each.title}: there are labels up to {int(each.label.max())}, but {len(class_names)} names of classes")


# Colours


@cache
def class_palette(number: int) -> tuple[str, ...]:
    """Colours that differ under red-green colour blindness, too: six known ones, then each time the one that differs most from all.

    The difference of two colours is their distance in OKLab: the smallest of those with full colour vision (which counts 0.6), with
    protanopia and with deuteranopia. Some dozens of colours can be told apart; beyond them, names must help. After 256 they come again.

    Args:
        number: of colours.

    Returns:
        `number` hexadecimal codes; a longer palette starts with the shorter one.

    Example:
        >>> class_palette(100)[:2]
        ('#0072b2', '#e69f00')

    Source:
        Okabe & Ito, "Color Universal Design", 2008; Machado, Oliveira & Fernandes, "A Physiologically-based Model for Simulation of
        Color Vision Deficiency", IEEE TVCG 2009 (severity 1).
    """
    levels = np.linspace(0.04, 0.96, 16)
    candidates = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(-1, 3)
    lightness, chroma = oklab(candidates)[:, 0], np.linalg.norm(oklab(candidates)[:, 1:], axis=1)
    # Neither pale on white, nor like the ink, nor grey, which stands for no label, nor glaring.
    candidates = candidates[(lightness > 0.34) & (lightness < 0.86) & (chroma > 0.07) & (chroma < 0.2)]
    seen, least = _as_seen(candidates), np.full(len(candidates), np.inf)
    weight = np.array([0.6, 1.0, 1.0])[:, None]
    codes: list[str] = []
    while len(codes) < min(number, _COLORS):
        code = _FIRST[len(codes)] if len(codes) < len(_FIRST) else _code(candidates[least.argmax()])
        codes.append(code)
        chosen = np.array([int(code[at : at + 2], 16) / 255 for at in (1, 3, 5)])
        least = np.minimum(least, (np.linalg.norm(seen - _as_seen(chosen[None]), axis=-1) * weight).min(axis=0))
    return tuple(codes[place % _COLORS] for place in range(number))


def _code(rgb: np.ndarray) -> str:
    return "#" + "".join(f"{round(255 * value):02x}" for value in rgb)


def _as_seen(rgb: np.ndarray) -> np.ndarray:
    """sRGB `(N, 3)` in OKLab `(3, N, 3)`, as people with full colour vision see it, with protanopia and with deuteranopia."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    poorer = [(linear @ matrix.T).clip(0, 1) for matrix in (_PROTAN, _DEUTAN)]
    return np.stack([oklab(rgb), *(oklab(np.where(x <= 0.0031308, 12.92 * x, 1.055 * x ** (1 / 2.4) - 0.055)) for x in poorer)])


# The picture


def plot_embedding(maps: Sequence[EmbeddingMap], class_names: Sequence[str]) -> Figure:
    """Draw maps side by side, in the same colours; the name of each class stands where most of its samples lie.

    Of more than 150 classes in a map, the largest ones are named. Samples to mark have a dark ring, those without a label are grey.
    Names that would cover one another are moved apart.

    Args:
        maps: one panel each.
        class_names: C names.

    Returns:
        The figure.

    Raises:
        ValueError: if there is no map, or one has columns of different lengths, no samples, or labels without a name.

    Example:
        >>> label = np.arange(100) % 2
        >>> plot_embedding([EmbeddingMap("model", "t-SNE", np.random.rand(100, 2), label, np.arange(100))], ["cat", "dog"])
    """
    _check(maps, class_names)
    columns = min(3, len(maps))
    rows = -(-len(maps) // columns)
    classes = len({cls for each in maps for cls in np.unique(each.label).tolist() if cls >= 0})
    side = (6.4 if len(maps) == 1 else 5.0) * (1.25 if classes > 40 else 1.0)
    width = 2 * _MARGIN + columns * side + (columns - 1) * _GAP
    height = 2 * _MARGIN + rows * (_HEADER + side) + (rows - 1) * _GAP
    marks = any(each.wrong is not None and each.wrong.any() for each in maps)
    grey = any((each.label < 0).any() for each in maps)
    if marks or grey:
        height += _FOOTER
    figure = new_figure(width, height, layout=None)
    for position, each in enumerate(maps):
        row, column = divmod(position, columns)
        left, top = _MARGIN + column * (side + _GAP), _MARGIN + row * (_HEADER + side + _GAP)
        for text, down, size, color in ((each.title, 0.02, 11, INK), (each.note, 0.25, 9, MUTED)):
            place = left / width, 1 - (top + down) / height
            figure.text(*place, _fitted(text, size, side), ha="left", va="top", fontsize=size, color=color, parse_math=False)
        box = (left / width, 1 - (top + _HEADER + side) / height, side / width, side / height)
        _draw(figure.add_axes(box), each, class_names, side, classes)
    keys = [("its nearest neighbour is of another class", "none", INK)] if marks else []
    keys += [("no label", _NO_LABEL, "none")] if grey else []
    left = _MARGIN
    for text, face, edge in keys:
        axes = figure.add_axes((left / width, _MARGIN / height, 0.16 / width, 0.16 / height))
        axes.scatter([0], [0], s=28, facecolors=face, edgecolors=edge, linewidths=0.9)
        axes.set_axis_off()
        figure.text((left + 0.22) / width, (_MARGIN + 0.08) / height, text, ha="left", va="center", fontsize=9, color=MUTED)
        left += 0.22 + text_width([text], 9) + 0.3
    return figure


def _fitted(text: str, size: float, width: float) -> str:
    """The text, shortened to a width in inches."""
    text = shorten(text, 1000)
    wide = text_width([text], size)
    return text if wide <= width else shorten(text, max(4, int(len(text) * width / wide) - 1))


def _draw(axes: Axes, each: EmbeddingMap, class_names: Sequence[str], side: float, classes: int) -> None:
    # The same scale in both directions, in inches of the panel.
    middle = (each.place.max(axis=0) + each.place.min(axis=0)) / 2
    reach = max(float(np.ptp(each.place, axis=0).max()), 1e-12)
    inches = (each.place - middle) / reach * side * 0.92 + side / 2
    axes.set(xlim=(0, side), ylim=(0, side), xticks=[], yticks=[])
    axes.spines[:].set_color(LINES)
    # In a random order, so that no class lies on top of the others.
    order = np.random.default_rng(0).permutation(len(inches))
    palette = np.array([*class_palette(len(class_names)), _NO_LABEL])
    colors = palette[np.where(each.label < 0, len(class_names), each.label)]
    area = float(np.clip(14000 / len(inches), 3.0, 30.0)) * (side / 6.4) ** 2
    axes.scatter(inches[order, 0], inches[order, 1], s=area, c=colors[order], alpha=0.75, linewidths=0)
    if each.wrong is not None:
        axes.scatter(inches[each.wrong, 0], inches[each.wrong, 1], s=1.5 * area + 4, facecolors="none", edgecolors=INK, linewidths=0.7)

    font = float(np.clip(13 - 1.7 * np.log2(max(classes, 10) / 10), 6.5, 13))
    found, counts = np.unique(each.label[each.label >= 0], return_counts=True)
    present = np.sort(found[np.argsort(-counts, kind="stable")[:_NAMED]]).tolist()
    names = [shorten(str(class_names[cls]), 18) for cls in present]
    anchors = np.array([_typical(inches[each.label == cls]) for cls in present]).reshape(-1, 2)
    sizes = np.array([(text_width([name], font) + 0.15, font * 1.5 / 72) for name in names]).reshape(-1, 2)
    # Names of few points would cover them, so they stand above, or at the upper edge below.
    lift = font * 1.5 / 72 if len(inches) < 40 * classes or classes > 40 else 0.0
    wanted = anchors + lift * np.where(anchors[:, 1:] + 1.5 * lift > side, [[0.0, -1.0]], [[0.0, 1.0]])
    for cls, name, anchor, start, at in zip(present, names, anchors, wanted, _apart(wanted, sizes, side), strict=True):
        if np.abs(at - start).max() > 0.12:
            axes.plot(*np.stack([anchor, at]).T, color=INK, linewidth=0.5, alpha=0.7)
        box = {"boxstyle": "round,pad=0.14", "facecolor": "white", "edgecolor": palette[cls], "linewidth": 1.0, "alpha": 0.85}
        axes.text(at[0], at[1], name, ha="center", va="center_baseline", fontsize=font, color=INK, bbox=box, parse_math=False)


def _typical(places: np.ndarray) -> np.ndarray:
    """Of points `(n, 2)`, the one nearest to their median, so that a name never stands between two groups."""
    return places[np.linalg.norm(places - np.median(places, axis=0), axis=1).argmin()]


def _apart(places: np.ndarray, sizes: np.ndarray, side: float) -> np.ndarray:
    """Move boxes `(M, 2)` of some sizes `(M, 2)` until none covers another one, as far as there is room in a square."""
    # Boxes at one place need a direction to part.
    at = places + np.random.default_rng(0).normal(scale=1e-3, size=places.shape)
    for _ in range(200):
        at = at.clip(sizes / 2, side - sizes / 2)
        offset = at[:, None] - at[None]
        overlap = (sizes[:, None] + sizes[None]) / 2 - np.abs(offset)
        covers = (overlap > 0).all(axis=2)
        np.fill_diagonal(covers, False)
        if not covers.any():
            break
        # Along the direction in which less is to be done, each a little more than half of the way.
        shorter = overlap == overlap.min(axis=2, keepdims=True)
        at = at + (np.sign(offset) * overlap * (covers[..., None] & shorter)).sum(axis=1) * 0.525
    return at.clip(sizes / 2, side - sizes / 2)


# The page


def write_embedding_html(path: str | os.PathLike[str], maps: Sequence[EmbeddingMap], class_names: Sequence[str], title: str) -> None:
    """Write one page that shows maps, to move and zoom by mouse, finger and keyboard; a sample under the pointer tells what it is.

    The page holds everything that it needs, loads nothing, and works from a disk without a network. The legend takes classes away
    and brings them back. Thumbnails have at most 32 pixels a side, and those of a map 8 million together.

    Args:
        path: a `.html` file; its folder is made.
        maps: in the order of their buttons.
        class_names: C names.
        title: of the page.

    Raises:
        ValueError: as for `plot_embedding`, or if an image has another shape, type or range.

    Example:
        >>> label = np.arange(100) % 2
        >>> maps = [EmbeddingMap("model", "t-SNE", np.random.rand(100, 2), label, np.arange(100))]
        >>> write_embedding_html("map.html", maps, ["cat", "dog"], "Embedding")
    """
    _check(maps, class_names)
    sheets: list[dict[str, Any]] = []
    known: dict[int, int] = {}
    objects = []
    for each in maps:
        if each.images is not None and id(each.images) not in known:  # maps of the same samples share them
            known[id(each.images)] = len(sheets)
            sheets.append(_sheet(each.images))
        middle = (each.place.max(axis=0) + each.place.min(axis=0)) / 2
        reach = max(float(np.ptp(each.place, axis=0).max()), 1e-12)
        objects.append(
            {
                "title": each.title,
                "note": each.note,
                "place": np.round((each.place - middle) / reach * 2, 4).ravel().tolist(),
                "label": np.maximum(each.label, -1).tolist(),
                "index": each.index.tolist(),
                "wrong": np.flatnonzero(each.wrong).tolist() if each.wrong is not None else [],
                "sheet": known[id(each.images)] if each.images is not None else None,
            }
        )
    palette = class_palette(len(class_names))
    classes = [{"name": str(name), "color": color} for name, color in zip(class_names, palette, strict=True)]
    content = {"classes": classes, "noLabel": _NO_LABEL, "maps": objects, "sheets": sheets}
    write_page(path, "embedding.html", content, title=title)


def _sheet(images: np.ndarray) -> dict[str, Any]:
    """All thumbnails as one PNG, row by row."""
    from PIL import Image

    number = len(images)
    side = max(4, min(_TILE, int((_PIXELS / number) ** 0.5), max(images.shape[1:3])))
    columns = int(np.ceil(number**0.5))
    sheet = Image.new("RGB", (columns * side, -(-number // columns) * side), "white")
    for position, image in enumerate(images):
        pixels = rgb_pixels(image)
        tile = Image.fromarray(pixels if pixels.dtype == np.uint8 else np.rint(255 * pixels).astype(np.uint8))
        tile.thumbnail((side, side))
        row, column = divmod(position, columns)
        sheet.paste(tile, (column * side + (side - tile.width) // 2, row * side + (side - tile.height) // 2))
    stream = io.BytesIO()
    (sheet.convert("L") if images.shape[3] == 1 else sheet).save(stream, format="PNG")
    return {"side": side, "columns": columns, "png": base64.b64encode(stream.getvalue()).decode()}
