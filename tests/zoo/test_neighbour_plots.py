"""The picture of neighbours: every kind of sample, whole and at its place."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from litzoo.zoo.plots.neighbours import Neighbour, plot_neighbours

SAMPLES = {
    "colour": lambda: np.random.rand(32, 24, 3),
    "grey": lambda: np.random.rand(8, 8, 1),
    "bytes": lambda: np.random.randint(0, 256, (300, 200, 3), dtype=np.uint8),
    "cloud": lambda: np.random.rand(256, 3),
    "vector": lambda: np.random.randn(30),
}


def rows(make: object, queries: int = 3, count: int = 4) -> list[list[Neighbour]]:
    known = [True, False, None, True]
    return [
        [Neighbour(make(), f"class {column}", 1 - column / 10, known[column % 4]) for column in range(count)]  # type: ignore[operator]
        for _ in range(queries)
    ]


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.texts]


@pytest.mark.parametrize("kind", SAMPLES)
def test_draws(kind: str) -> None:
    make = SAMPLES[kind]
    figure = plot_neighbours([make() for _ in range(3)], ["a", "b", "c"], rows(make), "epoch 3, val")
    found = texts(figure)
    assert {"a", "b", "c", "query", "epoch 3, val", "same class", "other class"} <= set(found)
    assert found.count("class 1") == found.count("0.900") == 3
    styles = [patch.get_linestyle() for axes in figure.axes for patch in axes.patches if type(patch).__name__ == "FancyBboxPatch"]
    assert len(styles) == 12
    assert len({str(style) for style in styles}) == 2, "classes differ by more than colour"
    figure.canvas.draw()
    width, height = figure.get_size_inches()
    for axes in figure.axes:
        box = axes.get_position()
        assert box.x0 >= 0.05 / width
        assert box.x1 <= 1 - 0.05 / width
        assert box.y0 >= 0.05 / height
        assert box.y1 <= 1 - 0.05 / height


@pytest.mark.parametrize("name", ["1", "a very long name of a class of things that are alike"])
def test_nothing_overlaps(name: str) -> None:
    """Names of neighbours, their numbers, and title and legend."""
    images = [[Neighbour(np.zeros((8, 8, 1)), name, 0.999, True)] * count for count in (1,)]
    figure = plot_neighbours([np.zeros((8, 8, 1))], [name], images, "epoch 120, val: 62 of 64 neighbours are of the query's class")
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in figure.texts]
    for first in range(len(boxes)):
        for second in range(first):
            assert not boxes[first].overlaps(boxes[second]), (figure.texts[first].get_text(), figure.texts[second].get_text())
    assert all(box.x1 <= figure.bbox.x1 for box in boxes)


def test_vectors_have_one_scale() -> None:
    figure = plot_neighbours([np.array([1.0, -5.0])], ["a"], [[Neighbour(np.array([0.1, 0.2]), "b", 0.5, False)]])
    limits = {axes.get_ylim() for axes in figure.axes if len(axes.patches) == 2}
    assert len(limits) == 1
    assert max(limits.pop()) > 5


def test_mistakes() -> None:
    image = np.zeros((4, 4, 1))
    one = Neighbour(image, "a", 1.0, True)
    for queries, names, neighbours in (
        ([], [], []),
        ([image], [], [[one]]),
        ([image], ["a"], [[]]),
        ([image] * 2, ["a"] * 2, [[one], [one] * 2]),
    ):
        with pytest.raises(ValueError, match="every query needs a name and as many neighbours"):
            plot_neighbours(queries, names, neighbours)
    for wrong in (np.zeros((2, 2, 2, 2)), np.zeros(0), np.zeros((5, 4)), np.zeros((4, 4, 2))):
        with pytest.raises(ValueError, match="must"):
            plot_neighbours([wrong], ["a"], [[one]])


def test_nothing_is_cut_off_a_single_neighbour() -> None:
    figure = plot_neighbours([np.random.rand(8, 8, 3)], ["a"], [[Neighbour(np.random.rand(8, 8, 3), "b", -0.5, same=False)]])
    figure.canvas.draw()
    for text in figure.texts:
        box = text.get_window_extent()
        assert box.x0 >= 0, text
        assert box.x1 <= figure.bbox.width, text
