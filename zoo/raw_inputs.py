"""Prepares the raw inputs of `predict` for a network: resizes and normalises images, normalises clouds, leaves vectors as they are."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .functional.points import Normalization, normalize_points
from .image_input import ImageInput


def prepare_raw(
    inputs: Tensor | Sequence[Tensor], image_input: ImageInput | None, normalization: Normalization | None, device: torch.device
) -> list[Tensor]:
    """Prepare raw inputs for a network.

    Args:
        inputs: images as `ImageInput.prepare` takes them; clouds `(B, N, 3)`, one cloud `(N, 3)`, or a sequence of either; or anything
            else, in one tensor or a sequence of batches.
        image_input: what an image network takes; None for other networks.
        normalization: that of a point cloud network; None for other networks.
        device: that of the network.

    Returns:
        Batches in the order of the inputs; images and clouds are float32.

    Raises:
        ValueError: if an image has the wrong shape, dtype or range, or there are no inputs.

    Example:
        >>> [batch.shape for batch in prepare_raw([torch.rand(50, 3), torch.rand(2, 70, 3)], None, "unit_sphere", torch.device("cpu"))]
        [torch.Size([1, 50, 3]), torch.Size([2, 70, 3])]
    """
    if image_input is not None:
        return image_input.prepare(inputs, device)
    groups = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    if not groups:
        raise ValueError("there are no inputs to predict")
    if normalization is None:
        return [group.to(device) for group in groups]
    clouds = [group if group.dim() == 3 else group.unsqueeze(0) for group in groups]
    return [normalize_points(cloud.to(device, torch.float32), normalization) for cloud in clouds]
