"""MixUp and CutMix of a batch of images."""

import torch
from torch import Tensor, nn


def mix_images(
    images: Tensor, label: Tensor, num_classes: int, mixup: float = 0.0, cutmix: float = 0.0, key: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Mix each image x_i with the one before it, x_j, j = i - 1, of the first image the last one, and their labels alike.

    MixUp gives a x_i + (1 - a) x_j with a ~ Beta(mixup, mixup); CutMix pastes a box of x_j that covers 1 - a of the image, a ~
    Beta(cutmix, cutmix). The target is a onehot(y_i) + (1 - a) onehot(y_j). One a and one box are drawn for the batch; with both, one
    of the two methods.

    Args:
        images: `(B, C, H, W)` float.
        label: `(B,)` int64 in [0, num_classes).
        num_classes: C of the targets.
        mixup: parameter of MixUp's Beta distribution; 0 is off.
        cutmix: parameter of CutMix's Beta distribution; 0 is off.
        key: `(B,)` int64, the batch's random keys: the draw is then a function of them, so that a second pass over the batch (SAM) mixes
            as the first.

    Returns:
        Images, and their targets: `(B, num_classes)` float, or the labels themselves if both methods are off.

    Example:
        >>> mixed, target = mix_images(torch.rand(8, 3, 32, 32), torch.arange(8), num_classes=10, mixup=0.2)

    Source:
        Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018; Yun et al., "CutMix: Regularization Strategy
        to Train Strong Classifiers with Localizable Features", ICCV 2019.
    """
    if not (mixup or cutmix):
        return images, label
    from torchvision.transforms.v2 import CutMix, MixUp, RandomChoice

    # Half precision has no Beta distribution.
    dtype, state = torch.get_default_dtype(), torch.default_generator.get_state()
    torch.set_default_dtype(torch.float32)
    if key is not None:
        torch.default_generator.manual_seed(int(key.sum()))
    try:
        choices: list[nn.Module] = []
        if mixup:
            choices.append(MixUp(alpha=mixup, num_classes=num_classes))
        if cutmix:
            choices.append(CutMix(alpha=cutmix, num_classes=num_classes))
        mixed: tuple[Tensor, Tensor] = RandomChoice(choices)(images, label)
        return mixed
    finally:
        torch.set_default_dtype(dtype)
        if key is not None:
            torch.default_generator.set_state(state)
