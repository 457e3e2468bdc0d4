"""The picture of related pairs: every kind of image, whole and at its place."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from litzoo.zoo.plots.relations import RelatedPair, plot_relations

IMAGES = {
    "colour": lambda: np.random.rand(32, 24, 3),
    "grey": lambda: np.random.rand(8, 8, 1),
    "bytes": lambda: np.random.randint(0, 256, (300, 200, 3), dtype=np.uint8),
}


def pair_of(make: object, same: bool | None = True, names: tuple[str, str] = ("a", "b")) -> RelatedPair:
    return RelatedPair(make(), make(), names, 0.5, same)  # type: ignore[operator]  # a function


def whole(figure: Figure) -> None:
    """Nothing is cut off, and no text lies on another."""
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in figure.texts]
    for first in range(len(boxes)):
        assert boxes[first].x0 >= 0
        assert boxes[first].x1 <= figure.bbox.x1
        for second in range(first):
            assert not boxes[first].overlaps(boxes[second]), (figure.texts[first].get_text(), figure.texts[second].get_text())
    width, height = figure.get_size_inches()
    for axes in figure.axes:
        box = axes.get_position()
        assert box.x0 >= 0.05 / width
        assert box.x1 <= 1 - 0.05 / width
        assert box.y0 >= 0.05 / height
        assert box.y1 <= 1 - 0.05 / height


@pytest.mark.parametrize("kind", IMAGES)
def test_draws(kind: str) -> None:
    make = IMAGES[kind]
    pairs = [pair_of(make, same) for same in (True, False, None, True, False)]
    figure = plot_relations({"most related": pairs, "least related": pairs[:2]}, "epoch 3, val")
    texts = [text.get_text() for text in figure.texts]
    assert {"most related", "least related", "epoch 3, val", "same class", "other class"} <= set(texts)
    assert texts.count("a") == texts.count("b") == texts.count("0.500") == 7
    rims = [patch for axes in figure.axes for patch in axes.patches if type(patch).__name__ == "FancyBboxPatch"]
    assert len(rims) == 7
    assert len({str(rim.get_linestyle()) for rim in rims}) == 2, "classes differ by more than colour"
    whole(figure)


@pytest.mark.parametrize("name", ["1", "a very long name of a class of things that are alike"])
@pytest.mark.parametrize("number", [1, 2, 9])
def test_nothing_overlaps(number: int, name: str) -> None:
    pairs = [pair_of(IMAGES["grey"], names=(name, name))] * number
    title = "epoch 120, val: 2,016 pairs of 64 images, AUC of the same class 0.999"
    whole(plot_relations({"most related, with the head's probability that both are of one image": pairs, "least related": pairs}, title))


def test_mistakes() -> None:
    for headings in ([], ["most related"]):
        with pytest.raises(ValueError, match="every section needs at least one pair"):
            plot_relations({heading: [] for heading in headings})
    with pytest.raises(ValueError, match="must"):
        plot_relations({"most related": [pair_of(lambda: np.zeros((4, 4, 2)))]})
