"""The metrics of part segmentation, as the literature counts them."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric


class PartIoU(Metric):
    """Instance and class mean intersection over union of parts, and the share of points that are right.

    In an object, a part p has IoU_p = |predicted p and true p| / |predicted p or true p|, and 1 if it occurs in neither. The IoU of an
    object is the mean over the parts of its class; instance mIoU is the mean over objects, class mIoU the mean over classes of the mean
    over their objects. Points of the part -1 do not count. A part whose class is unknown counts where it occurs.

    Each is computed over all objects of an epoch and all processes, never averaged over batches.

    Args:
        num_classes: C.
        part_classes: the class of each of the P parts, -1 where it is unknown.

    Example:
        >>> metric = PartIoU(2, part_classes=[0, 0, 1])
        >>> metric.update(torch.tensor([[0, 1, 1, 1]]), torch.tensor([[0, 0, 1, 1]]), torch.tensor([0]))
        >>> metric.compute()
        {'instance_miou': tensor(0.5833), 'class_miou': tensor(0.5833), 'accuracy': tensor(0.7500)}

    Source:
        Yi et al., "A Scalable Active Framework for Region Annotation in 3D Shape Collections", SIGGRAPH Asia 2016;
        Qi et al., "PointNet", CVPR 2017, section 5.1.
    """

    higher_is_better = True
    full_state_update = False
    belongs: Tensor
    unknown: Tensor
    class_sum: Tensor
    class_count: Tensor
    right: Tensor
    points: Tensor

    def __init__(self, num_classes: int, part_classes: Sequence[int]) -> None:
        super().__init__()
        parts = len(part_classes)
        classes = torch.tensor(part_classes).view(1, parts)
        self.register_buffer("belongs", (classes == torch.arange(num_classes).view(-1, 1)) | (classes < 0), persistent=False)
        self.register_buffer("unknown", classes[0] < 0, persistent=False)
        for name in ("class_sum", "class_count"):
            self.add_state(name, torch.zeros(num_classes, dtype=torch.float64), dist_reduce_fx="sum")
        for name in ("right", "points"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, part: Tensor, label: Tensor) -> None:
        """Take objects in.

        Args:
            prediction: `(B, N)` int64, the predicted part of each point.
            part: `(B, N)` int64, the true one, or -1.
            label: `(B,)` int64, the class of each object.
        """
        parts = self.belongs.shape[1]
        known = part >= 0
        row = torch.arange(len(part), device=part.device)[:, None] * parts

        def count(values: Tensor, where: Tensor) -> Tensor:
            return torch.bincount((row + values)[where], minlength=len(part) * parts).view(len(part), parts).double()

        intersection = count(part, known & (prediction == part))
        union = count(part, known) + count(prediction, known) - intersection
        belongs = self.belongs[label] & ((union > 0) | ~self.unknown)
        iou = torch.where(union > 0, intersection / union.clamp_min(1), 1.0)
        instance = (iou * belongs).sum(dim=1) / belongs.sum(dim=1)
        scored = belongs.any(dim=1) & known.any(dim=1)
        self.class_sum.index_add_(0, label[scored], instance[scored])
        self.class_count.index_add_(0, label[scored], torch.ones_like(instance[scored]))
        self.right += (known & (prediction == part)).sum()
        self.points += known.sum()

    def compute(self) -> dict[str, Tensor]:
        """`instance_miou`, `class_miou` and `accuracy`; 0 without objects."""
        occurs = self.class_count > 0
        by_class = self.class_sum[occurs] / self.class_count[occurs]
        values = {
            "instance_miou": self.class_sum.sum() / self.class_count.sum().clamp_min(1),
            "class_miou": by_class.mean() if len(by_class) else torch.zeros((), device=by_class.device),
            "accuracy": self.right / self.points.clamp_min(1),
        }
        return {name: value.float() for name, value in values.items()}

    def reset(self) -> None:
        # Tensors made in Lightning's inference mode could not be updated outside of it.
        with torch.inference_mode(False):
            super().reset()
