"""How often the nearest other sample has the same class."""

from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from ..functional.nearest_neighbours import nearest_neighbours


class PrecisionAtOne(Metric):
    """Share of samples whose nearest other sample, by cosine similarity, has their class, over all batches and processes.

    Samples with the label -1 are no queries and no neighbours. One whose features are not finite is a query in vain.

    Returns:
        Of `compute`: a scalar in [0, 1], NaN with fewer than two labelled samples.

    Example:
        >>> metric = PrecisionAtOne()
        >>> metric.update(torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]]), torch.tensor([0, 0, 1]))
        >>> metric.compute()
        tensor(0.6667)
    """

    full_state_update = False
    features: list[Tensor]
    label: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("features", [], dist_reduce_fx="cat")
        self.add_state("label", [], dist_reduce_fx="cat")

    def update(self, features: Tensor, label: Tensor) -> None:
        """Note a batch.

        Args:
            features: `(B, D)` float.
            label: `(B,)` int64.
        """
        self.features.append(features.detach().float())
        self.label.append(label.long())

    def compute(self) -> Tensor:
        """The share so far."""
        label = dim_zero_cat(self.label)
        known = label >= 0
        features, label = F.normalize(dim_zero_cat(self.features)[known]), label[known]
        if len(label) < 2:
            return torch.tensor(float("nan"), device=label.device)
        finite = features.isfinite().all(dim=1)
        features = features.where(finite[:, None], 0.0)
        first, second = nearest_neighbours(features, features, 2)[1].T
        nearest = first.where(first != torch.arange(len(label), device=label.device), second)
        return ((label[nearest] == label) & finite).float().mean()


def log_precision_at_one(module: LightningModule, metric: PrecisionAtOne, name: str) -> None:
    """Log the value of an epoch and begin anew; nothing is logged where fewer than two samples have a label.

    Args:
        module: at the end of its validation or test epoch.
        metric: of the epoch.
        name: such as "val/precision_at_1".

    Example:
        >>> log_precision_at_one(self, self.val_precision, "val/precision_at_1")
    """
    value = metric.compute()
    metric.reset()
    if not bool(value.isnan()):
        module.log(name, value, prog_bar=True)
