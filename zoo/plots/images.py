"""Images as a sheet of pictures, and stored images beside their augmented views."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .figures import DPI, INK, MUTED, new_figure, shorten, text_width

_FONT = 9
_GAP = 0.08  # inches between neighbours
_MARGIN = 0.12


def rgb_pixels(image: np.ndarray) -> np.ndarray:
    """An image in three channels, as it can be drawn.

    Args:
        image: `(H, W, C)` or `(H, W)`, uint8 or floats in [0, 1], with C = 1 or 3.

    Returns:
        `(H, W, 3)` uint8, or float32 in [0, 1].

    Raises:
        ValueError: if the image has another shape, type or range.

    Example:
        >>> rgb_pixels(np.zeros((8, 8), np.uint8)).shape
        (8, 8, 3)
    """
    pixels = np.asarray(image)
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 3) or 0 in pixels.shape:
        raise ValueError(f"an image must have shape (height, width, channels) with 1 or 3 channels, got {np.shape(image)}")
    if pixels.dtype != np.uint8:
        if pixels.dtype.kind != "f":
            raise ValueError(f"an image must be uint8 or floats in [0, 1], got {pixels.dtype}")
        # What was normalised and brought back misses the bounds by rounding.
        if not (pixels.min() >= -1e-3 and pixels.max() <= 1 + 1e-3):
            raise ValueError(f"an image of floats must lie in [0, 1], this one goes from {pixels.min():.3g} to {pixels.max():.3g}")
        pixels = pixels.astype(np.float32).clip(0, 1)
    return pixels if pixels.shape[2] == 3 else pixels.repeat(3, axis=2)


def draw_image(figure: Figure, image: np.ndarray, left: float, top: float, side: float) -> Axes:
    """Put an image into the middle of a square place.

    Args:
        figure: where to draw.
        image: as `rgb_pixels` takes it.
        left: inches from the left edge of the figure to the place.
        top: inches from its upper edge.
        side: of the place, in inches.

    Returns:
        The axes of the image.

    Example:
        >>> draw_image(new_figure(2, 2, layout=None), np.random.rand(8, 8, 3), 0.5, 0.5, 1.0)
    """
    pixels = rgb_pixels(image)
    height, width = pixels.shape[:2]
    scale = side / max(height, width)
    high, wide = height * scale, width * scale
    total_width, total_height = figure.get_size_inches()
    x, y = left + (side - wide) / 2, total_height - top - (side + high) / 2
    axes = figure.add_axes((x / total_width, y / total_height, wide / total_width, high / total_height))
    # Pictures with fewer pixels than their place are enlarged, so that each pixel shows.
    axes.imshow(pixels, aspect="auto", interpolation="nearest" if max(height, width) <= side * DPI else "antialiased")
    axes.set_axis_off()
    return axes


def plot_images(images: Sequence[np.ndarray] | np.ndarray, titles: Sequence[str], columns: int | None = None) -> Figure:
    """Draw images side by side, each under its title; small ones are enlarged without smoothing, so that their pixels show.

    Args:
        images: N images `(H, W, C)`, or `(H, W)` grey, uint8 or floats in [0, 1], with C = 1 or 3; sizes may differ.
        titles: N titles; the columns are as wide as the widest needs.
        columns: images in a row; by default as many as make the sheet about 3:2.

    Returns:
        The figure.

    Raises:
        ValueError: if an image has another shape, type or range, or there are more or fewer titles than images.

    Example:
        >>> plot_images(np.random.rand(4, 32, 32, 3), ["a", "b", "c", "d"])
    """
    number = len(images)
    if number == 0 or len(titles) != number:
        raise ValueError(f"every image needs a title: there are {number} images and {len(titles)} titles")
    names = [shorten(title) for title in titles]
    columns = columns or (number if number <= 5 else round((1.7 * number) ** 0.5))
    rows = -(-number // columns)
    side = 1.3 if number <= 60 else 0.9
    pitch = max(side + _GAP, text_width(names, _FONT) + 2 * _GAP)
    line = 0.26
    figure = new_figure(2 * _MARGIN + pitch * columns - _GAP, 2 * _MARGIN + (side + line + _GAP) * rows - _GAP, layout=None)
    width, height = figure.get_size_inches()
    for position, (image, name) in enumerate(zip(images, names, strict=True)):
        row, column = divmod(position, columns)
        left, top = _MARGIN + column * pitch, _MARGIN + row * (side + line + _GAP)
        draw_image(figure, image, left + (pitch - _GAP - side) / 2, top + line, side)
        middle, base = left + (pitch - _GAP) / 2, top + line - 0.05
        figure.text(middle / width, 1 - base / height, name, ha="center", va="bottom", fontsize=_FONT, color=INK)
    return figure


def plot_views(
    originals: Sequence[np.ndarray] | np.ndarray, views: Sequence[Sequence[np.ndarray]] | np.ndarray, titles: Sequence[str]
) -> Figure:
    """Draw a row for each sample: its title, the stored image, and the augmented views of it.

    Args:
        originals: N stored images as `plot_images` takes them.
        views: N times V images, such as `(N, V, S, S, C)`; their size may differ from that of the originals.
        titles: N titles, for the left edge.

    Returns:
        The figure.

    Raises:
        ValueError: if an image has another shape, type or range, or the numbers of originals, views and titles disagree.

    Example:
        >>> plot_views(np.random.rand(2, 32, 32, 3), np.random.rand(2, 4, 32, 32, 3), ["cat", "dog"])
    """
    number = len(originals)
    counts = {len(row) for row in views}
    if number == 0 or len(titles) != number or len(views) != number or len(counts) != 1 or 0 in counts:
        raise ValueError(
            f"every sample needs a title and as many views as the others: there are {number} stored images, "
            f"views of {len(views)} and {len(titles)} titles"
        )
    count = counts.pop()
    names = [shorten(title) for title in titles]
    headers = ["stored", *(f"view {number}" for number in range(1, count + 1))]
    side = float(np.clip(9 / (count + 1), max(0.7, text_width(headers, _FONT)), 1.2))
    label = text_width(names, _FONT) + 0.12
    # The stored image stands apart from what was made of it.
    apart = 0.16
    lefts = [_MARGIN + label + column * (side + _GAP) + (apart if column else 0) for column in range(count + 1)]
    line = 0.26
    figure = new_figure(lefts[-1] + side + _MARGIN, 2 * _MARGIN + line + (side + _GAP) * number - _GAP, layout=None)
    width, height = figure.get_size_inches()
    for left, header in zip(lefts, headers, strict=True):
        base = _MARGIN + line - 0.05
        figure.text((left + side / 2) / width, 1 - base / height, header, ha="center", va="bottom", fontsize=_FONT, color=MUTED)
    for row, (original, made, name) in enumerate(zip(originals, views, names, strict=True)):
        top = _MARGIN + line + row * (side + _GAP)
        middle = 1 - (top + side / 2) / height
        figure.text((_MARGIN + label - 0.12) / width, middle, name, ha="right", va="center", fontsize=_FONT, color=INK)
        for left, image in zip(lefts, [original, *made], strict=True):
            draw_image(figure, image, left, top, side)
    return figure
