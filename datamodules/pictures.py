"""Decoding picture files the same way wherever they are read: to be packed, and to be classified."""

import os
from typing import Any

import numpy as np

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm")
_WHITE = (255, 255, 255, 255)


def decode_picture(path: str | os.PathLike[str], color: bool = True, enough: int | None = None) -> Any:
    """Decode a picture file: turned as the camera noted, on white where transparent, 16 bits scaled to 8, of an animation the first frame.

    Args:
        path: a file that Pillow reads.
        color: three channels, or one.
        enough: pixels of the shorter edge that are wanted at least; a JPEG may then be decoded at a half, a quarter or an eighth.

    Returns:
        A `PIL.Image` of mode "RGB" or "L".

    Raises:
        Exception: of any kind that Pillow has for broken files; see `why_undecodable`.

    Example:
        >>> decode_picture("cat.jpg").size
        (640, 480)
    """
    from PIL import Image, ImageOps

    with Image.open(path) as opened:
        if enough is not None:
            opened.draft(None, (enough, enough))
        image = ImageOps.exif_transpose(opened)
    if image.mode == "F":
        raise ValueError("its pixels are floats of unknown range: store 8 or 16 bits")
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("its pixels have more than 16 bits: store 8 or 16 bits")
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    elif image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, _WHITE), image)
    return image.convert("RGB" if color else "L")


def why_undecodable(error: Exception) -> str:
    """What is wrong with a picture file, in a few words.

    Args:
        error: what `decode_picture` raised.

    Returns:
        Words for a message that names the file.

    Example:
        >>> why_undecodable(OSError("image file is truncated"))
        'image file is truncated'
    """
    if isinstance(error, OSError) and error.strerror:  # it names the file once more
        return error.strerror
    return "no picture" if type(error).__name__ == "UnidentifiedImageError" else str(error) or type(error).__name__
