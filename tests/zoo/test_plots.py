"""Figures: what they show, that nothing is cut off, and that a failed write leaves no file."""

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.contour import ContourSet
from matplotlib.figure import Figure
from matplotlib.text import Text

from litzoo.zoo.plots.class_frequencies import plot_class_frequencies
from litzoo.zoo.plots.confusion_matrix import plot_confusion_matrix
from litzoo.zoo.plots.critical_points import body_of, plot_critical_points
from litzoo.zoo.plots.decision_boundary import plot_decision_boundary
from litzoo.zoo.plots.figures import new_figure, save_figure
from litzoo.zoo.plots.parts import plot_part_labels, plot_parts
from litzoo.zoo.plots.point_clouds import oklab, part_palette, plot_point_clouds


def texts(figure: Figure) -> list[Text]:
    """The visible texts."""
    return [text for text in figure.findobj(Text) if text.get_visible() and text.get_text()]  # type: ignore[union-attr, misc]


def assert_nothing_is_cut_off(figure: Figure) -> None:
    figure.canvas.draw()
    drawn, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert min(drawn.x0, drawn.y0, width - drawn.x1, height - drawn.y1) > -0.02, (drawn, width, height)


def matrix_of(classes: int, samples: int = 600) -> np.ndarray:
    draw = np.random.RandomState(0)
    label = draw.randint(classes, size=samples)
    prediction = np.where(draw.rand(samples) < 0.8, label, draw.randint(classes, size=samples))
    return np.bincount(label * classes + prediction, minlength=classes**2).reshape(classes, classes)


@pytest.mark.parametrize("classes", [2, 11, 69])
def test_confusion_matrix_is_legible(classes: int) -> None:
    matrix, names = matrix_of(classes), [f"a long name {cls}" for cls in range(classes)]
    figure = plot_confusion_matrix(matrix, names, "val: accuracy 81.2% of 600")
    assert_nothing_is_cut_off(figure)
    shown = [text.get_text() for text in texts(figure)]
    assert {"predicted class", "true class", "val: accuracy 81.2% of 600"} <= set(shown)
    assert sum(name in shown or any(text.startswith(name) for text in shown) for name in names) == classes
    assert all(any(str(samples) in text for text in shown) for samples in matrix.sum(axis=1)), "samples of each class"
    smallest = min(text.get_fontsize() for text in texts(figure))
    assert smallest >= 4
    if classes <= 11:
        assert all(any(text.split("\n")[0] == str(count) for text in shown) for count in matrix[matrix > 0])


def test_confusion_matrix_has_type_of_good_contrast() -> None:
    """WCAG 2.1 asks for 4.5 between type and ground; one colour of type leaves no jump between cells of nearly one colour."""

    def luminance(color: tuple[float, ...]) -> float:
        rgb = np.asarray(color[:3], dtype=np.float64)
        return float(np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722])

    figure = plot_confusion_matrix(np.array([[50, 50], [0, 7]]), ["a", "b"])
    (image,) = figure.axes[0].get_images()
    (ink,) = {to_rgb(text.get_color()) for text in figure.axes[0].texts if "%" in text.get_text()}
    grounds = [luminance(color) for color in map(tuple, image.cmap(np.linspace(0, 1, 101)))]
    assert (min(grounds) + 0.05) / (luminance(ink) + 0.05) >= 4.5
    assert grounds == sorted(grounds, reverse=True), "more is darker"


def test_confusion_matrix_labels_do_not_overlap() -> None:
    figure = plot_confusion_matrix(matrix_of(69), [f"class {cls}" for cls in range(69)])
    figure.canvas.draw()
    for labels, side in ((figure.axes[0].get_yticklabels(), "y"), (figure.axes[0].get_xticklabels(), "x")):
        spans = sorted((getattr(box, f"{side}0"), getattr(box, f"{side}1")) for box in (label.get_window_extent() for label in labels))
        assert all(end <= start + 1 for (_, end), (start, _) in pairwise(spans))


def test_confusion_matrix_of_classes_without_samples() -> None:
    assert_nothing_is_cut_off(plot_confusion_matrix(np.array([[3, 0], [0, 0]]), ["seen", "unseen"]))
    assert_nothing_is_cut_off(plot_confusion_matrix(np.zeros((3, 3), dtype=int), ["a", "b", "c"]))


@pytest.mark.parametrize("matrix", [np.zeros((2, 3)), np.zeros((3, 3)), np.zeros(4)])
def test_confusion_matrix_of_another_shape(matrix: np.ndarray) -> None:
    with pytest.raises(ValueError, match="confusion matrix"):
        plot_confusion_matrix(matrix, ["a", "b"])


@pytest.mark.parametrize(("train", "scale"), [([900, 30, 10], "linear"), ([9000, 30, 10], "log")])
def test_class_frequencies_sorted(train: list[int], scale: str) -> None:
    names = ["rare", "common", "medium"]
    figure = plot_class_frequencies({"train": [train[2], train[0], train[1]], "test": [0, 5, 5]}, names)
    assert_nothing_is_cut_off(figure)
    (axes,) = figure.axes
    assert axes.get_xscale() == scale
    assert [label.get_text() for label in axes.get_yticklabels()] == ["common", "medium", "rare"]
    assert axes.get_ylim()[0] > axes.get_ylim()[1], "the most frequent class is on top"
    assert len({bar.get_facecolor() for bar in axes.patches}) == 2, "one colour a split"
    assert sorted(bar.get_width() for bar in axes.patches) == sorted([*train, 0, 5, 5])


def test_class_frequencies_of_many_classes() -> None:
    assert_nothing_is_cut_off(plot_class_frequencies({"train": list(range(1, 70))}, [f"a long class name {cls}" for cls in range(69)]))


def test_class_frequencies_of_another_length() -> None:
    with pytest.raises(ValueError, match="classes"):
        plot_class_frequencies({"train": [1, 2, 3]}, ["a", "b"])


def cloud_axes(figure: Figure) -> list[Axes]:
    return [axes for axes in figure.axes if axes.collections]


@pytest.mark.parametrize(("number", "columns"), [(1, None), (4, None), (11, None), (7, 3)])
def test_point_clouds_sheet(number: int, columns: int | None) -> None:
    clouds = [np.random.RandomState(seed).randn(100 + seed, 3) for seed in range(number)]
    figure = plot_point_clouds(clouds, [f"cloud {seed}" for seed in range(number)], columns=columns)
    assert_nothing_is_cut_off(figure)
    axes = cloud_axes(figure)
    assert len(axes) == number
    assert [ax.get_title() for ax in axes] == [f"cloud {seed}" for seed in range(number)]
    assert all(ax.get_aspect() == 1 and not ax.axison for ax in axes)
    if columns is not None:
        assert axes[0].get_gridspec().ncols == columns  # type: ignore[union-attr]


def test_point_clouds_stand_upright() -> None:
    """The y axis points up, and every point is inside of its picture."""
    cloud = np.zeros((50, 3))
    cloud[:, 1] = np.linspace(-1, 1, 50)
    (axes,) = cloud_axes(plot_point_clouds([cloud], ["a stick"]))
    points = np.asarray(axes.collections[0].get_offsets())
    assert np.ptp(points[:, 1]) > 20 * np.ptp(points[:, 0])
    assert (points.min(axis=0) >= [axes.get_xlim()[0], axes.get_ylim()[0]]).all()
    assert (points.max(axis=0) <= [axes.get_xlim()[1], axes.get_ylim()[1]]).all()
    cloud[:, 0] = np.where(cloud[:, 1] > 0, 0.5, 0.0)
    (axes,) = cloud_axes(plot_point_clouds(cloud[None], ["bent to the right at the top"]))
    points = np.asarray(axes.collections[0].get_offsets())
    assert points[points[:, 1].argmax(), 0] > points[points[:, 1].argmin(), 0]


def test_point_clouds_colours() -> None:
    clouds = np.random.RandomState(0).randn(2, 60, 3)
    parts = [np.zeros(60, dtype=int), np.repeat([0, 1, 2], 20)]
    first, second = cloud_axes(plot_point_clouds(clouds, ["a", "b"], colors=parts))
    of = [{tuple(color[:3]) for color in np.asarray(axes.collections[0].get_facecolor())} for axes in (first, second)]
    assert (len(of[0]), len(of[1])) == (1, 3)
    assert of[0] < of[1], "a part has the same colour in every cloud"
    plot_point_clouds(torch.from_numpy(clouds), ["a", "b"], colors=list(torch.rand(2, 60)))


def test_point_clouds_mistakes() -> None:
    cloud = np.zeros((5, 3))
    with pytest.raises(ValueError, match="2 clouds and 1 titles"):
        plot_point_clouds([cloud, cloud], ["a"])
    with pytest.raises(ValueError, match=r"shape \(points, 3\), got \(5, 2\)"):
        plot_point_clouds([cloud[:, :2]], ["a"])


def drawn_points(axes: Axes, layer: int = 0) -> np.ndarray:
    return np.asarray(axes.collections[layer].get_offsets())


def test_critical_points_share_view_and_scale() -> None:
    draw = np.random.RandomState(0)
    clouds = [draw.rand(300, 3), draw.rand(200, 3) * [1, 0.1, 1]]
    critical = [np.arange(0, 300, 10), np.array([3])]
    upper = [2 * draw.rand(500, 3), np.zeros((0, 3))]
    figure = plot_critical_points(clouds, critical, upper, ["chair\n98 %", "a very long name that goes on and on\n51 %"])
    assert_nothing_is_cut_off(figure)
    assert len(figure.axes) == 6
    shown = {text.get_text() for text in texts(figure)}
    assert {"all points", "critical set", "upper bound", "chair\n98 %"} <= shown
    assert {"300 points", "30 points, 10%", "500 grid points", "200 points", "1 points, 0%", "0 grid points"} <= shown
    first = figure.axes[:3]
    assert len({(axes.get_xlim(), axes.get_ylim()) for axes in first}) == 1
    whole = {tuple(point) for point in drawn_points(first[0])}
    assert {tuple(point) for point in drawn_points(first[1])} == whole, "the pale cloud"
    assert len(drawn_points(first[1], 1)) == 30
    assert {tuple(point) for point in drawn_points(first[1], 1)} < whole
    every = np.concatenate([drawn_points(axes) for axes in first])
    assert (every.min(axis=0) >= [first[0].get_xlim()[0], first[0].get_ylim()[0]]).all()
    assert (every.max(axis=0) <= [first[0].get_xlim()[1], first[0].get_ylim()[1]]).all()
    assert np.ptp(drawn_points(first[2]), axis=0).max() > 1.5 * np.ptp(drawn_points(first[0]), axis=0).max(), "the shape is twice as large"
    assert not figure.axes[5].collections


def test_critical_points_without_the_upper_bound_and_as_pictures() -> None:
    cloud = np.random.RandomState(0).randn(50, 3)
    assert len(plot_critical_points([cloud], [np.arange(5)], None, ["a"]).axes) == 2
    figure = plot_critical_points([cloud], [np.arange(5)], None, ["a"], [[np.zeros((8, 8, 3)), np.ones((8, 8, 3))]])
    assert [len(axes.images) for axes in figure.axes] == [1, 1]
    with pytest.raises(ValueError, match="there are 1 clouds"):
        plot_critical_points([cloud], [np.arange(5)], [], ["a"])


def test_a_body_is_bright_where_it_looks_up() -> None:
    """A ball of grid points: its top is brighter than its bottom, and the pitch of the grid is found."""
    axis = np.linspace(-1, 1, 17)
    grid = np.stack(np.meshgrid(axis, axis, axis), axis=-1).reshape(-1, 3)
    ball = grid[np.linalg.norm(grid, axis=1) <= 1]
    colors, pitch = body_of(ball)
    assert pitch == pytest.approx(0.125)
    assert colors[ball[:, 1].argmax(), :3].mean() > colors[ball[:, 1].argmin(), :3].mean() + 0.3
    assert body_of(ball[:1])[0].shape == (1, 4)


def test_part_palette_is_distinct() -> None:
    palette = part_palette(50)
    assert (part_palette(12) == palette[:12]).all()
    assert palette.min() >= 0
    assert palette.max() <= 1
    apart = np.linalg.norm(palette[:, None] - palette[None], axis=2) + np.eye(50)
    assert apart.min() > 0.07
    assert min(apart[first, first + 1] for first in range(49)) > 0.2, "neighbours"


def test_colour_blind_people_can_tell_parts_apart() -> None:
    """By another model of colour blindness than the palette's: the projections of Vienot, Brettel and Mollon (1999)."""
    light = part_palette(94) ** 2.2
    for cones in (
        [[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]],
        [[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]],
    ):
        seen = oklab(np.clip(light @ np.array(cones).T, 0, 1) ** (1 / 2.2))
        for start in range(94 - 7):
            apart = np.linalg.norm(seen[start : start + 8, None] - seen[None, start : start + 8], axis=2) + np.eye(8)
            assert apart.min() > 0.07, (start, cones)  # about twice what side by side can just be told apart


def test_parts() -> None:
    draw = np.random.RandomState(0)
    clouds = [draw.rand(100, 3), draw.rand(60, 3) * [1, 0.1, 1], *draw.rand(5, 1000, 3)]
    parts = [np.repeat([3, 1], 50), np.full(60, 40), *np.tile(np.repeat([0, 2], [998, 2]), (5, 1))]
    titles = ["chair", "lamp\nof two lines", *"abcde"]
    figure = plot_parts(clouds, parts, titles, [f"part number {part}" for part in range(50)])
    assert_nothing_is_cut_off(figure)
    shown = [text.get_text() for text in texts(figure)]
    assert set(titles) <= set(shown)
    assert [text for text in shown if text.startswith("part number")] == [
        *("part number 1  50%", "part number 3  50%", "part number 40  100%"),
        *["part number 0  100%", "part number 2  <1%"] * 5,
    ]
    for axes, cloud, part in zip(figure.axes, clouds, parts, strict=True):
        assert len(drawn_points(axes)) == len(cloud)
        colors = {tuple(color) for color in np.asarray(axes.collections[0].get_facecolor())[:, :3]}
        assert colors == {tuple(part_palette(50)[each]) for each in part}
    boxes = [text.get_window_extent() for text in texts(figure) if text.get_text() != "●"]
    assert not any(first.overlaps(second) for place, first in enumerate(boxes) for second in boxes[:place]), "texts overlap"


def test_parts_mistakes() -> None:
    cloud, part = np.zeros((5, 3)), np.zeros(5, dtype=int)
    with pytest.raises(ValueError, match="1 clouds, parts of 1, and 0 titles"):
        plot_parts([cloud], [part], [], ["leg"])
    with pytest.raises(ValueError, match="5 points needs a part for each"):
        plot_parts([cloud], [part[:4]], ["a"], ["leg"])
    with pytest.raises(ValueError, match=r"parts must lie in \[0, 0\], got -1 to -1"):
        plot_parts([cloud], [part - 1], ["a"], ["leg"])


def test_part_labels() -> None:
    draw = np.random.RandomState(0)
    clouds = [draw.rand(100, 3), draw.rand(60, 3)]
    truth = [np.repeat([0, 1], 50), np.full(60, 40)]
    predicted = [np.repeat([0, 1, 2], [50, 40, 10]), np.full(60, 40)]
    truth[1][:20] = -1  # no part
    names = [f"part number {part}" for part in range(50)]
    figure = plot_part_labels(clouds, truth, predicted, ["chair\nIoU 0.9", "lamp"], names)
    assert_nothing_is_cut_off(figure)
    shown = [text.get_text() for text in texts(figure)]
    assert [text for text in shown if text.startswith("part number")] == [f"part number {part}" for part in (0, 1, 2, 40)]
    assert "10 of 100 points wrong, 10.0%" in shown
    assert "0 of 40 points wrong, 0.0%" in shown
    chair, lamp = figure.axes[:3], figure.axes[3:]
    assert [len(drawn_points(axes)) for axes in (*chair, *lamp)] == [100, 100, 90, 40, 60, 40]
    wrong = {tuple(point) for point in drawn_points(chair[2], 1)}
    guesses = np.asarray(chair[1].collections[0].get_facecolor())[:, :3]
    third = {tuple(point) for point in drawn_points(chair[1])[(guesses == part_palette(50)[2]).all(axis=1)]}
    assert wrong == third, "what is wrong is what was called part 2"
    assert len(wrong) == 10


def test_part_labels_mistakes() -> None:
    cloud, part = np.zeros((5, 3)), np.zeros(5, dtype=int)
    with pytest.raises(ValueError, match="1 clouds, parts of 1 and 0"):
        plot_part_labels([cloud], [part], [], ["a"], ["leg"])
    with pytest.raises(ValueError, match="5 points needs a part for each"):
        plot_part_labels([cloud], [part], [part[:4]], ["a"], ["leg"])
    with pytest.raises(ValueError, match=r"parts must lie in \[0, 0\], got 0, and predicted 1 to 1"):
        plot_part_labels([cloud], [part], [part + 1], ["a"], ["leg"])


def test_decision_line_is_where_the_classes_meet() -> None:
    """Of a model that says class 1 where x1 + x2 > 1."""
    points = np.random.RandomState(0).rand(200, 2).astype(np.float32)

    def predict(grid: torch.Tensor) -> torch.Tensor:
        margin = 4 * (grid.sum(dim=1) - 1)
        return torch.stack([-margin, margin], dim=1).softmax(dim=1)

    label = (points.sum(axis=1) > 1).astype(int)
    label[0] = 1 - label[0]
    figure = plot_decision_boundary(points, label, predict, ["below", "above"], ("age", "size"))
    assert_nothing_is_cut_off(figure)
    axes = figure.axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("age", "size")
    lines = [contour for contour in axes.findobj(ContourSet) if not contour.filled]  # type: ignore[union-attr]
    line = np.concatenate([path.vertices for contour in lines for path in contour.get_paths()])
    assert len(line) > 10
    assert line.sum(axis=1) == pytest.approx(1, abs=1e-3)
    shown = " ".join(text.get_text() for text in texts(figure))
    assert f"below ({(label == 0).sum()})" in shown


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("classes", [1, 2, 5])
def test_decision_boundary_of_one_region(classes: int) -> None:
    """A model that says the same everywhere has no line, which is no reason to warn."""
    names = [f"class {cls}" for cls in range(max(classes, 2))]
    points = np.random.RandomState(0).randn(30, 2)
    always = torch.eye(len(names))[0]
    figure = plot_decision_boundary(points, np.arange(30) % classes, lambda grid: always.expand(len(grid), -1), names)
    figure.canvas.draw()


def test_decision_boundary_needs_two_features() -> None:
    with pytest.raises(ValueError, match="two features"):
        plot_decision_boundary(np.zeros((4, 3)), np.zeros(4), lambda grid: grid, ["a", "b"])


def test_save_figure_makes_the_folder(tmp_path: Path) -> None:
    save_figure(new_figure(2, 1), tmp_path / "new" / "deeper" / "picture.png")
    assert [path.name for path in (tmp_path / "new" / "deeper").iterdir()] == ["picture.png"]
    assert (tmp_path / "new" / "deeper" / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_failed_save_keeps_the_last_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure, path = new_figure(2, 1), tmp_path / "picture.png"
    save_figure(figure, path)
    before = path.read_bytes()

    def fail(target: Path, **settings: object) -> None:
        Path(target).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(figure, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        save_figure(figure, path)
    assert [file.name for file in tmp_path.iterdir()] == ["picture.png"]
    assert path.read_bytes() == before


def test_no_global_state() -> None:
    """The figures never import pyplot, so that nothing opens a window or stays in memory."""
    folder = Path(__file__).resolve().parents[2] / "zoo" / "plots"
    names = ", ".join(f"litzoo.zoo.plots.{path.stem}" for path in folder.glob("*.py") if path.stem != "__init__")
    code = f"import sys, {names}; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
