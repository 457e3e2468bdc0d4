"""Labels to review, as one HTML page: pictures with given and proposed labels, to accept or keep."""

import base64
import io
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from .figures import new_figure
from .images import rgb_pixels
from .pages import write_page
from .point_clouds import DEPTH, cloud_of, dot_area, draw_cloud, frame_of

_SIDE = 128  # pixels of a thumbnail, at most
_CLOUD, _DPI, _SHADES = 1.6, 100, 48  # of a picture of a cloud: inches, dots per inch, colours
_NUMBERS = 40  # of a sample that is neither an image nor a cloud, at most


class ReviewItem(NamedTuple):
    """A sample whose label is in doubt.

    Args:
        index: its number in the data set.
        file: its name, or "".
        given: its class.
        proposed: the class that it may be.
        given_probability: in [0, 1].
        proposed_probability: in [0, 1].
        flags: votes against its label.
        votes: votes on it.
        png: a picture, or None.
        text: what to show where there is no picture.
    """

    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody needs here
    file: str
    given: int
    proposed: int
    given_probability: float
    proposed_probability: float
    flags: int
    votes: int
    png: bytes | None = None
    text: str = ""


def image_png(image: np.ndarray, side: int = _SIDE) -> bytes:
    """A thumbnail.

    Args:
        image: `(H, W, C)`, uint8 or floats in [0, 1], with C = 1 or 3.
        side: pixels of the longer side, at most; small images are not enlarged.

    Returns:
        A PNG file.

    Raises:
        ValueError: if the image has another shape, type or range.

    Example:
        >>> image_png(np.zeros((8, 8, 3), np.uint8))[1:4]
        b'PNG'
    """
    from PIL import Image

    pixels = rgb_pixels(image)
    picture = Image.fromarray(pixels if pixels.dtype == np.uint8 else np.rint(255 * pixels).astype(np.uint8))
    picture.thumbnail((side, side))
    content = io.BytesIO()
    picture.save(content, format="PNG", optimize=True)
    return content.getvalue()


def cloud_png(points: np.ndarray) -> bytes:
    """A small picture of a point cloud on white, +y up.

    Args:
        points: `(N, 3)`.

    Returns:
        A PNG file.

    Raises:
        ValueError: if the points have another shape.

    Example:
        >>> cloud_png(np.random.rand(512, 3))[1:4]
        b'PNG'
    """
    from PIL import Image

    cloud = cloud_of(points)
    figure = new_figure(_CLOUD, _CLOUD, layout=None)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
    axes.set_axis_off()
    draw_cloud(axes, cloud, frame_of(cloud), DEPTH, dot_area(len(cloud), _CLOUD))
    drawn, content = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=_DPI)
    # A few shades of blue: all colours would take five times the room.
    Image.open(drawn).convert("RGB").quantize(_SHADES).save(content, format="PNG", optimize=True)
    return content.getvalue()


def sample_picture(arrays: Any, index: int, side: int = _SIDE) -> tuple[bytes | None, str]:
    """What to show of a stored sample: a picture of an image or a cloud, the numbers of anything else.

    Args:
        arrays: the `Arrays` of a DataModule.
        index: number of the sample.
        side: pixels of the longer side of an image, at most.

    Returns:
        A PNG file and "", or None and a text.

    Example:
        >>> sample_picture(PatientsDataModule().arrays, 0)
        (None, '3.444, 3.334')
    """
    sample = arrays.input[index]
    if sample.dim() == 3 and sample.dtype == torch.uint8 and sample.shape[0] in (1, 3):
        return image_png(sample.permute(1, 2, 0).numpy(), side), ""
    if sample.dim() == 2 and sample.shape[1] == 3:
        own = len(sample) if arrays.count is None else int(arrays.count[index])
        return cloud_png(sample[:own].float().numpy()), ""
    numbers = sample.flatten()
    return None, ", ".join(f"{value:.4g}" for value in numbers[:_NUMBERS].tolist()) + (" ..." if len(numbers) > _NUMBERS else "")


def write_review_html(
    path: str | os.PathLike[str],
    items: Sequence[ReviewItem],
    class_names: Sequence[str],
    title: str,
    note: str = "",
) -> None:
    """Write one page that shows samples with given and proposed label, to filter by class, to tick off, and to download the decisions.

    The page holds everything that it needs, loads nothing, and works from a disk without a network. What it downloads is a CSV file
    with the columns index, file, given, proposed and decision, which is `accept` or `keep`.

    Args:
        path: a `.html` file; its folder is made.
        items: in the order of the page; there may be none.
        class_names: C names.
        title: of the page.
        note: a line under the title.

    Raises:
        ValueError: if an item's class has no name.

    Example:
        >>> write_review_html("review.html", [ReviewItem(7, "", 0, 1, 0.1, 0.9, 4, 4)], ["cat", "dog"], "Labels to review")
    """
    rows = []
    for item in items:
        if not (0 <= item.given < len(class_names) and 0 <= item.proposed < len(class_names)):
            raise ValueError(f"sample {item.index} has classes {item.given} and {item.proposed}, but there are {len(class_names)} names")
        picture = None if item.png is None else base64.b64encode(item.png).decode()
        percent = [round(100 * value, 1) for value in (item.given_probability, item.proposed_probability)]
        rows.append({**item._asdict(), "given_probability": percent[0], "proposed_probability": percent[1], "png": picture})
    write_page(path, "review.html", {"classes": list(map(str, class_names)), "items": rows}, title=title, note=note)
