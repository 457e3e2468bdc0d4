"""What a trained encoder knows of its images, for the data that it gets next."""

from collections.abc import MutableMapping
from typing import Any

from ..pretrained import load_encoder
from ..safe_reading import WeightsError


def prepare_images_for(encoder: Any, data: MutableMapping[str, Any]) -> None:
    """Give images the size and the normalisation that a trained encoder knows, where no other was asked for.

    Args:
        encoder: the model's argument `encoder`; anything but a text is no trained one.
        data: arguments of the DataModule, changed in place: `image_size`, `mean` and `std` where they are None.

    Example:
        >>> prepare_images_for("last.ckpt", settings.data.init_args)
    """
    unset = [name for name in ("image_size", "mean", "std") if data.get(name, "") is None]
    if not isinstance(encoder, str) or not unset:
        return
    try:
        known = getattr(load_encoder(encoder), "image_input", None)
    except (WeightsError, ValueError):
        return  # the model's constructor tells it
    for name in unset if known is not None else ():
        data[name] = getattr(known, name.removeprefix("image_"))
