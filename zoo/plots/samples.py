"""Generated images beside real ones, and quantities over a training, as pictures."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .figures import INK, LINES, MUTED, SERIES, new_figure, text_width
from .images import rgb_pixels

_FONT = 9
_SIDE = 0.55  # inches of a picture
_GAP = 1 / 16  # between pictures, as a share of one
_APART = 0.3  # inches between generated and real images
_MARGIN = 0.15
_HEADER = 0.5


def plot_samples(generated: Sequence[np.ndarray] | np.ndarray, real: Sequence[np.ndarray] | np.ndarray = (), title: str = "") -> Figure:
    """Draw generated images in a square, and real ones in columns of the same height at its right.

    Args:
        generated: N images `(H, W, C)`, uint8 or floats in [0, 1], with C = 1 or 3, all of one size.
        real: images of the same size, in full columns, a quarter as many as those of the generated ones, at least one; of more, evenly
            spread ones.
        title: for the upper left corner.

    Returns:
        The figure.

    Raises:
        ValueError: if there are no generated images, sizes differ, or an image has another shape, type or range.

    Example:
        >>> plot_samples(np.random.rand(64, 8, 8, 1), np.random.rand(16, 8, 8, 1), "epoch 3")
    """
    if len(generated) == 0:
        raise ValueError("there are no generated images to draw")
    columns = round(len(generated) ** 0.5) or 1
    rows = -(-len(generated) // columns)
    blocks = {f"{len(generated)} generated": _mosaic(generated, columns, rows)}
    wide = min(max(1, columns // 4), len(real) // rows)
    if wide:
        spread = np.linspace(0, len(real) - 1, wide * rows).round().astype(int)
        blocks[f"{wide * rows} real"] = _mosaic([real[place] for place in spread], wide, rows)
    widths = [block.shape[1] / block.shape[0] * rows * _SIDE for block in blocks.values()]
    texts = [text_width([name], _FONT) for name in blocks]
    # A narrow block has a wide name.
    places = [max(width, text) for width, text in zip(widths, texts, strict=True)]
    width = 2 * _MARGIN + max(sum(places) + _APART * (len(places) - 1), text_width([title], _FONT + 2))
    height = 2 * _MARGIN + _HEADER + rows * _SIDE
    figure = new_figure(width, height, layout=None)
    figure.text(_MARGIN / width, 1 - _MARGIN / height, title, ha="left", va="top", fontsize=_FONT + 2, color=INK)
    left = _MARGIN
    for (name, block), wide_inches, place in zip(blocks.items(), widths, places, strict=True):
        figure.text(left / width, 1 - (_MARGIN + _HEADER - 0.08) / height, name, ha="left", va="baseline", fontsize=_FONT, color=MUTED)
        axes = figure.add_axes((left / width, _MARGIN / height, wide_inches / width, rows * _SIDE / height))
        axes.imshow(block, aspect="auto", interpolation="nearest")
        axes.set_axis_off()
        left += place + _APART
    return figure


def _mosaic(images: Sequence[np.ndarray] | np.ndarray, columns: int, rows: int) -> np.ndarray:
    """Images side by side on white, `(H', W', 3)` uint8; each enlarged without smoothing, so that its pixels show."""
    pictures = [rgb_pixels(image) for image in images]
    shapes = {picture.shape for picture in pictures}
    if len(shapes) > 1:
        raise ValueError(f"the images must have one size, got {', '.join(map(str, sorted(shapes)))}")
    pixels = np.stack([picture if picture.dtype == np.uint8 else (picture * 255).round().astype(np.uint8) for picture in pictures])
    scale = max(1, -(-96 // max(pixels.shape[1:3])))  # so that a gap is some pixels, and drawing does not blur the edges
    pixels = pixels.repeat(scale, axis=1).repeat(scale, axis=2)
    height, width = pixels.shape[1:3]
    gap = max(1, round(_GAP * width))
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for number, picture in enumerate(pixels):
        row, column = divmod(number, columns)
        top, left = row * (height + gap), column * (width + gap)
        sheet[top : top + height, left : left + width] = picture
    return sheet


def plot_curves(curves: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> Figure:
    """Draw quantities over the epochs of a training, one line each, in one pair of axes.

    Args:
        curves: name -> epochs and values, of the same length; values that are not finite leave a gap.

    Returns:
        The figure.

    Raises:
        ValueError: if there is no curve, or one has more or fewer epochs than values.

    Example:
        >>> plot_curves({"val/wasserstein": ([0, 1, 2], [3.1, 2.0, 1.4])})
    """
    if not curves:
        raise ValueError("there are no curves to draw")
    figure = new_figure(6.4, 3.6)
    axes: Axes = figure.add_subplot()
    for number, (name, (epochs, values)) in enumerate(curves.items()):
        if len(epochs) != len(values):
            raise ValueError(f"{name} has {len(epochs)} epochs and {len(values)} values")
        finite = [value if np.isfinite(value) else np.nan for value in values]
        marker = "o" if len(values) < 30 else ""
        axes.plot(epochs, finite, color=SERIES[number % len(SERIES)], linewidth=1.6, marker=marker, markersize=3, label=name)
    axes.grid(color=LINES)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(LINES)
    axes.tick_params(colors=MUTED, length=0, labelsize=_FONT)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("epoch", fontsize=_FONT, color=MUTED)
    axes.legend(fontsize=_FONT, frameon=False, labelcolor=INK)
    return figure
