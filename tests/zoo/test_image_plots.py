"""Sheets of images and of views: what they show, where it lies, and that no text meets another."""

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from litzoo.zoo.plots.images import plot_images, plot_views

LONG = "a class with a name of a length that nobody should give"


def shown(axes: Axes) -> np.ndarray:
    return np.asarray(axes.images[0].get_array())


def assert_legible(figure: Figure) -> None:
    """Nothing is cut off, and neither texts nor pictures overlap; no layout engine has to run first."""
    # A pixel less on each side, because neighbours may touch.
    boxes = np.array([part.get_window_extent().padded(-1).extents for part in (*figure.texts, *figure.axes)])
    assert boxes[:, :2].min() > -1
    assert (boxes[:, 2:] < np.asarray(figure.bbox.size) + 1).all()
    low, high = boxes[:, None, :2], boxes[None, :, 2:]
    meet = ((low < high) & (low.swapaxes(0, 1) < high.swapaxes(0, 1))).all(axis=-1)
    assert (meet == np.eye(len(boxes), dtype=bool)).all()


@pytest.mark.parametrize("number", [1, 2, 10, 20])
@pytest.mark.parametrize("columns", [None, 3])
def test_sheet_is_legible(number: int, columns: int | None) -> None:
    images = np.random.default_rng(0).integers(0, 256, (number, 8, 8, 3), dtype=np.uint8)
    titles = [f"{cls} {LONG}" for cls in range(number)]
    figure = plot_images(images, titles, columns=columns)
    assert_legible(figure)
    assert len(figure.axes) == number
    assert all(title.startswith(text.get_text()[:-1]) for title, text in zip(titles, figure.texts, strict=True))
    for image, axes in zip(images, figure.axes, strict=True):
        assert np.array_equal(shown(axes), image)
        assert axes.images[0].get_interpolation() == "nearest"
    if columns is not None:
        assert len({round(axes.get_position().x0, 6) for axes in figure.axes}) == min(number, columns)


def test_title_is_above_its_image() -> None:
    figure = plot_images(np.zeros((5, 8, 8, 1)), list("abcde"), columns=2)
    for axes, text in zip(figure.axes, figure.texts, strict=True):
        box, title = axes.get_window_extent(), text.get_window_extent()
        assert 0 <= title.y0 - box.y1 < 20
        assert (title.x0 + title.x1) / 2 == pytest.approx((box.x0 + box.x1) / 2, abs=1)


def test_images_of_other_sizes_keep_their_proportions() -> None:
    figure = plot_images([np.zeros((20, 40, 3)), np.zeros((600, 200)), np.zeros((7, 7, 1), np.uint8)], ["wide", "high", "square"])
    assert_legible(figure)
    boxes = [axes.get_window_extent() for axes in figure.axes]
    assert [box.width / box.height for box in boxes] == pytest.approx([2, 1 / 3, 1])
    assert [axes.images[0].get_interpolation() for axes in figure.axes] == ["nearest", "antialiased", "nearest"]


def test_grey_is_not_stretched() -> None:
    """matplotlib's own grey would make the darkest pixel black and the lightest white."""
    for image in (np.full((4, 4, 1), 128, np.uint8), np.full((4, 4), 0.5)):
        (axes,) = plot_images([image], ["grey"]).axes
        figure = axes.figure
        figure.canvas.draw()
        box = axes.get_window_extent()
        pixels = np.asarray(figure.canvas.buffer_rgba())  # type: ignore[attr-defined]
        middle = pixels[int(len(pixels) - (box.y0 + box.y1) / 2), int((box.x0 + box.x1) / 2), :3]
        assert np.abs(middle.astype(int) - 128).max() <= 1


@pytest.mark.parametrize("samples", [2, 10, 20])
@pytest.mark.parametrize("views", [1, 2, 8])
def test_views_are_legible(samples: int, views: int) -> None:
    rng = np.random.default_rng(0)
    originals = rng.integers(0, 256, (samples, 16, 24, 1), dtype=np.uint8)
    made = rng.random((samples, views, 8, 8, 1)).astype(np.float32)
    figure = plot_views(originals, made, [f"{cls} {LONG}" for cls in range(samples)])
    assert_legible(figure)
    assert [text.get_text() for text in figure.texts][: views + 1] == ["stored", *(f"view {view + 1}" for view in range(views))]
    rows = np.array([axes.get_window_extent().get_points().mean(0) for axes in figure.axes]).reshape(samples, views + 1, 2)
    assert np.allclose(rows[..., 0], rows[:1, :, 0])
    assert np.allclose(rows[..., 1], rows[:, :1, 1])
    assert (np.diff(rows[0, :, 0]) > 0).all(), "views go to the right"
    assert (np.diff(rows[:, 0, 1]) < 0).all(), "samples go down"
    drawn = np.array(figure.axes, dtype=object).reshape(samples, views + 1)
    for row in range(samples):
        assert np.array_equal(shown(drawn[row, 0])[..., :1], originals[row])
        assert all(np.array_equal(shown(drawn[row, view + 1])[..., :1], made[row, view]) for view in range(views))
    labels = figure.texts[views + 1 :]
    middle = [label.get_window_extent().get_points().mean(0)[1] for label in labels]
    assert middle == pytest.approx(rows[:, 0, 1], abs=3)


def test_tensors_and_rounding() -> None:
    plot_views(torch.rand(1, 4, 4, 3), torch.rand(1, 2, 4, 4, 3), ["cat"])  # type: ignore[arg-type]
    (axes,) = plot_images([np.full((2, 2, 3), 1 + 1e-6)], ["white"]).axes
    assert shown(axes).max() == 1


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (np.zeros((3, 8, 8)), r"shape \(height, width, channels\) with 1 or 3 channels, got \(3, 8, 8\)"),
        (np.zeros((8, 8, 4), np.uint8), "1 or 3 channels"),
        (np.zeros((0, 8, 3)), "1 or 3 channels"),
        (np.zeros((8, 8, 3), np.int64), "uint8 or floats in .0, 1., got int64"),
        (np.full((8, 8, 3), 255.0), "from 255 to 255"),
        (np.full((8, 8, 3), np.nan), "from nan to nan"),
    ],
)
def test_other_images_are_refused(image: np.ndarray, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        plot_images([image], ["a"])


def test_numbers_must_agree() -> None:
    image = np.zeros((2, 4, 4, 3))
    with pytest.raises(ValueError, match="2 images and 1 titles"):
        plot_images(image, ["a"])
    with pytest.raises(ValueError, match="0 images"):
        plot_images([], [])
    for views, titles in (([image], ["a", "b"]), ([image, image], ["a"]), ([image, image[:1]], ["a", "b"]), ([[], []], ["a", "b"])):
        with pytest.raises(ValueError, match="2 stored images"):
            plot_views(image, views, titles)  # type: ignore[arg-type]
