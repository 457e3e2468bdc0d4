"""Pictures of samples and curves: what is where in them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from litzoo.zoo.plots.figures import save_figure
from litzoo.zoo.plots.samples import plot_curves, plot_samples


def grey(values: list[float], size: int = 8) -> np.ndarray:
    """An image of each value."""
    return np.full((len(values), size, size, 1), 1.0, np.float32) * np.array(values, np.float32)[:, None, None, None]


def blocks(figure: Any) -> list[np.ndarray]:
    return [axes.images[0].get_array().data for axes in figure.axes]


@pytest.mark.parametrize("size", [1, 8, 32, 200])
def test_every_image_is_in_its_place(size: int, tmp_path: Path) -> None:
    values = [number / 16 for number in range(16)]
    figure = plot_samples(grey(values, size), grey([0.2, 0.4, 0.6, 0.8, 1.0], size), "epoch 3")
    made, real = blocks(figure)
    step = (made.shape[0] + max(1, round((made.shape[0] // 4) / 17))) // 4
    centres = [made[step * row + step // 3, step * column + step // 3, 0] for row in range(4) for column in range(4)]
    assert centres == [round(value * 255) for value in values]
    # One column of four, spread over five.
    assert [real[step * row + step // 3, 3 * real.shape[1] // 4, 0] for row in range(4)] == [51, 102, 204, 255]
    assert {text.get_text() for text in figure.texts} == {"epoch 3", "16 generated", "4 real"}
    save_figure(figure, tmp_path / "samples.png")


@pytest.mark.parametrize(
    ("number", "real", "shown"), [(1, 0, None), (1, 3, "1 real"), (3, 16, "2 real"), (64, 100, "16 real"), (10, 3, None)]
)
def test_any_number(number: int, real: int, shown: str | None) -> None:
    figure = plot_samples(grey([0.5] * number), grey([0.5] * real))
    texts = [text.get_text() for text in figure.texts]
    assert f"{number} generated" in texts
    assert [text for text in texts if "real" in text] == ([shown] if shown else [])


def test_colours_and_bytes() -> None:
    images = np.random.default_rng(0).integers(256, size=(4, 8, 6, 3), dtype=np.uint8)
    (block,) = blocks(plot_samples(images))
    scale = 96 // 8
    assert (block[: 8 * scale : scale, : 6 * scale : scale] == images[0]).all()


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "no generated images"),
        ([np.zeros((8, 8, 1)), np.zeros((4, 4, 1))], "one size"),
        (np.full((4, 8, 8, 1), 2.0), r"lie in \[0, 1\]"),
        (np.zeros((4, 8, 8, 2)), "1 or 3 channels"),
    ],
)
def test_what_samples_are_refused(images: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plot_samples(images)


def test_curves(tmp_path: Path) -> None:
    figure = plot_curves({"train/loss": ([0, 1, 2], [3.0, float("nan"), 1.0]), "val/loss": ([1], [float("inf")])})
    axes = figure.axes[0]
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["train/loss", "val/loss"]
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), [3.0, np.nan, 1.0])
    save_figure(figure, tmp_path / "curves.png")
    with pytest.raises(ValueError, match="no curves"):
        plot_curves({})
    with pytest.raises(ValueError, match="2 epochs and 1 values"):
        plot_curves({"a": ([0, 1], [2.0])})
