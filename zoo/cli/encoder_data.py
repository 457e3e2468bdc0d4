"""What a trained encoder knows of its images, for the data that it gets next."""

from collections.abc import MutableMapping
from typing import Any

from ..pretrained import encoder_hparams


def prepare_images_for(encoder: Any, data: MutableMapping[str, Any]) -> None:
    """Give images the size and the normalisation that a trained encoder knows, where no other was asked for.

    Args:
        encoder: what the model's argument `encoder` takes, or None.
        data: arguments of the DataModule, changed in place: `image_size`, `mean` and `std` where they are None.

    Example:
        >>> prepare_images_for("last.ckpt", settings.data.init_args)
    """
    unset = [name for name in ("image_size", "mean", "std") if data.get(name, "") is None]
    if encoder is None or not unset:
        return
    try:
        known = encoder_hparams(encoder)
    except ValueError:
        return  # the model's constructor tells it
    for name in unset:
        data[name] = known.get(name if name == "image_size" else f"image_{name}")
