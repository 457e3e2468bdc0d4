"""PointNet for part segmentation: the part that each point of an object belongs to.

The global feature of a cloud alone does not tell its points apart, and the features of a point alone do not tell in what it lies. So
both are joined at each point, and the same layers tell from them the logits of its parts (section 4.2, "local and global information
aggregation"). For parts of objects, the network is wider, joins the features of every layer and knows the object's class (supplement C).

Qi, Su, Mo & Guibas, "PointNet: Deep Learning on Point Sets for 3D Classification and Segmentation", CVPR 2017.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from .batch import Batch
from .epoch_mean import log_epoch_mean
from .functional.classification import orthogonality_penalty
from .functional.points import Normalization, normalize_points
from .layers.modes import evaluating
from .layers.segmentation_metrics import PartIoU
from .optimization import WarmupCosineLR, configure_optimizer
from .pointnet import PointNet, TNet, Variant, check_clouds, check_variant, shared_mlp

Network = Literal["part", "semantic"]


class SegmentationFeatures(NamedTuple):
    """What a backbone finds in clouds.

    Attributes:
        local: features of each point, several `(B, C_i, N)`.
        feature: `(B, D)`, the global feature.
        transform: `(B, K, K)`, the feature transform, or None without that T-Net.
    """

    local: list[Tensor]
    feature: Tensor
    transform: Tensor | None


class SemanticBackbone(PointNet):
    """The classification network; a point is described by its 64 transformed features (figure 2)."""

    local_widths = (64,)

    def features(self, points: Tensor) -> SegmentationFeatures:
        """Clouds `(B, N, 3)` -> features."""
        output = self(points)
        return SegmentationFeatures([output.local], output.feature, output.feature_transform)


class PartBackbone(nn.Module):
    """A wider network, in which a point is described by the features of every layer (supplement C, figure 9).

    Args:
        feature_transform: align the 128 features of each point by a 128 x 128 T-Net.
        variant: "paper", or "compact" without the ReLU before the maximum.
    """

    num_features = 2048
    local_widths = (64, 128, 128, 512, 2048)

    def __init__(self, feature_transform: bool = True, variant: Variant = "paper") -> None:
        super().__init__()
        check_variant(variant)
        self.input_transform = TNet(3)
        self.local = nn.ModuleList([shared_mlp(3, 64), shared_mlp(64, 128), shared_mlp(128, 128)])
        self.feature_transform = TNet(128) if feature_transform else None
        self.wide = nn.ModuleList([shared_mlp(128, 512), shared_mlp(512, 2048, last_relu=variant == "paper")])

    def features(self, points: Tensor) -> SegmentationFeatures:
        """Clouds `(B, N, 3)` -> features."""
        x = (points @ self.input_transform(points.mT)[0]).mT
        local = []
        transform = None
        for layers in self.local:
            x = layers(x)
            local.append(x)
        if self.feature_transform is not None:
            transform = self.feature_transform(x)[0]
            x = transform.mT @ x
        for layers in self.wide:
            x = layers(x)
            local.append(x)
        return SegmentationFeatures(local, x.amax(dim=2), transform)


class PointHead(nn.Module):
    """Part logits of each point from its own features and those of its cloud.

    Its first layer W [local; cloud] is computed as W_local local + W_cloud cloud, so that what all points of a cloud share is
    multiplied once a cloud and never copied to its points.

    Args:
        local_widths: channels of the local features.
        cloud_width: channels of the features of a cloud.
        widths: of the hidden layers.
        num_parts: P.
        dropout: after the first two hidden layers.

    Example:
        >>> PointHead((64,), 1024, (512, 256, 128), 50, 0.2)([torch.rand(2, 64, 9)], torch.rand(2, 1024)).shape
        torch.Size([2, 50, 9])
    """

    def __init__(self, local_widths: Sequence[int], cloud_width: int, widths: tuple[int, int, int], num_parts: int, dropout: float) -> None:
        super().__init__()
        self.from_local = nn.ModuleList([nn.Conv1d(width, widths[0], 1, bias=False) for width in local_widths])
        self.from_cloud = nn.Linear(cloud_width, widths[0], bias=False)
        # As one layer over all of its inputs would start.
        bound = (sum(local_widths) + cloud_width) ** -0.5
        for layer in (*self.from_local, self.from_cloud):
            assert isinstance(layer, (nn.Conv1d, nn.Linear))
            nn.init.uniform_(layer.weight, -bound, bound)
        self.first = nn.Sequential(nn.BatchNorm1d(widths[0]), nn.ReLU(inplace=True), nn.Dropout(dropout))
        self.second = nn.Sequential(shared_mlp(widths[0], widths[1]), nn.Dropout(dropout))
        self.last = nn.Sequential(shared_mlp(widths[1], widths[2]), nn.Conv1d(widths[2], num_parts, 1))

    def forward(self, local: list[Tensor], cloud: Tensor) -> Tensor:
        """Local features `(B, C_i, N)` and those of the cloud `(B, D)` -> logits `(B, P, N)`."""
        x = self.from_cloud(cloud).unsqueeze(2)
        for layer, features in zip(self.from_local, local, strict=True):
            x = x + layer(features)
        return self.last(self.second(self.first(x)))


class PointNetSegmenter(LightningModule):
    """PointNet for part segmentation: the logits of every part at each point of an object whose class is known.

    Loss: cross entropy over the points, those of part -1 left out, plus orthogonality_weight * mean_b ||I - A A^T||_F^2 of the
    feature transform A. A prediction is the best of the parts that belong to the object's class, as in the literature.

    Batches are `Batch` with `part`, or `(points, label, part)`: points `(B, N, 3)` float, label `(B,)`, part `(B, N)` int64. Logs loss
    of training, and loss, instance mIoU, class mIoU and accuracy of validation and test, each over the whole epoch; see `PartIoU`.

    Args:
        num_classes: C, classes of objects.
        num_parts: P, parts of all classes together.
        part_classes: the class of each part, -1 where any may have it.
        class_names: name of each class; kept with the weights.
        part_names: name of each part; kept with the weights.
        network: "part" is the paper's network for part segmentation (supplement C), "semantic" the smaller one of figure 2.
        class_input: whether the object's class is an input.
        feature_transform: align the features by a T-Net.
        variant: "paper", or "compact", as many implementations have it: no ReLU before the maximum, and the semantic network two layers
            smaller, see `PointNet`.
        dropout: after the first two layers of the head.
        orthogonality_weight: weight of the regulariser; the paper's 0.001.
        normalization: how clouds are normalised before they get here; `predict` applies it to raw clouds.
        optimizer: parameters -> optimizer.
        lr_scheduler: optimizer -> scheduler, or None.

    Raises:
        ValueError: if a setting is out of range, or a list has another length.

    Example:
        >>> model = PointNetSegmenter(num_classes=2, num_parts=3, part_classes=[0, 0, 1])
        >>> model.eval()(torch.rand(2, 1024, 3), torch.tensor([0, 1])).shape
        torch.Size([2, 3, 1024])
    """

    def __init__(
        self,
        num_classes: int,
        num_parts: int,
        part_classes: list[int],
        class_names: list[str] | None = None,
        part_names: list[str] | None = None,
        network: Network = "part",
        class_input: bool = True,
        feature_transform: bool = True,
        variant: Variant = "paper",
        dropout: float = 0.2,
        orthogonality_weight: float = 1e-3,
        normalization: Normalization = "unit_sphere",
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-3, weight_decay=1e-4),
        lr_scheduler: LRSchedulerCallable | None = lambda optimizer: WarmupCosineLR(optimizer, warmup=0.05),
    ) -> None:
        super().__init__()
        _check_settings(num_classes, num_parts, part_classes, class_names, part_names, network, dropout)
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler"])
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.num_classes = num_classes
        self.class_names = class_names or [str(cls) for cls in range(num_classes)]
        self.part_names = part_names or [str(part) for part in range(num_parts)]
        self.class_input = class_input
        self.orthogonality_weight = orthogonality_weight
        self.normalization: Normalization = normalization

        self.backbone = (
            PartBackbone(feature_transform, variant)
            if network == "part"
            else SemanticBackbone(feature_transform=feature_transform, variant=variant)
        )
        widths = (256, 256, 128) if network == "part" else (512, 256, 128)
        cloud_width = self.backbone.num_features + num_classes * class_input
        self.head = PointHead(self.backbone.local_widths, cloud_width, widths, num_parts, dropout)
        classes = torch.tensor(part_classes)
        foreign = (classes != torch.arange(num_classes)[:, None]) & (classes >= 0)
        self.foreign: Tensor
        self.register_buffer("foreign", foreign, persistent=False)
        self.val_metrics = PartIoU(num_classes, part_classes)
        self.test_metrics = PartIoU(num_classes, part_classes)

    def forward(self, points: Tensor, label: Tensor | None = None) -> Tensor:
        """Points `(B, N, 3)` and classes `(B,)` -> logits `(B, P, N)`; without `class_input` no classes are needed."""
        return self._logits(self._features(points), label)

    def encode(self, points: Tensor) -> Tensor:
        """Points `(B, N, 3)` -> global feature `(B, D)`, before the head."""
        return self._features(points).feature

    @torch.no_grad()
    def predict(self, clouds: Tensor | Sequence[Tensor], label: Tensor) -> list[Tensor]:
        """The part of each point of raw clouds: normalises them as in training and runs in evaluation mode.

        Args:
            clouds: `(B, N, 3)`, or a sequence of B clouds `(N_i, 3)` of different sizes.
            label: `(B,)` int64, the class of each object.

        Returns:
            B tensors `(N_i,)` int64 on the model's device.

        Raises:
            ValueError: if there are more or fewer clouds than classes.

        Example:
            >>> model = PointNetSegmenter(num_classes=2, num_parts=3, part_classes=[0, 0, 1])
            >>> parts = model.predict(torch.rand(2, 2048, 3), torch.tensor([0, 1]))
        """
        if len(clouds) != len(label):
            raise ValueError(f"each cloud needs its class: there are {len(clouds)} clouds and {len(label)} classes")
        dtype = next(self.parameters()).dtype
        with evaluating(self):
            parts = []
            for cloud, cls in zip(clouds, label.to(self.device), strict=True):
                points = normalize_points(cloud.to(self.device, torch.float32), self.normalization)[None].to(dtype)
                parts.append(self._best(self(points, cls[None]), cls[None])[0])
            return parts

    def _features(self, points: Tensor) -> SegmentationFeatures:
        check_clouds(points, self.training)
        return self.backbone.features(points)

    def _logits(self, features: SegmentationFeatures, label: Tensor | None) -> Tensor:
        cloud = features.feature
        if self.class_input:
            if label is None:
                raise ValueError("this PointNetSegmenter takes the class of each object as an input: call it with (points, label)")
            cloud = torch.cat([cloud, F.one_hot(label, self.num_classes).to(cloud.dtype)], dim=1)
        return self.head(features.local, cloud)

    def _best(self, logits: Tensor, label: Tensor) -> Tensor:
        """The best part of each object's class: `(B, P, N)` -> `(B, N)`."""
        return logits.masked_fill(self.foreign[label].unsqueeze(2), -torch.inf).argmax(dim=1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        points, label, part = _with_parts(batch)
        features = self._features(points)
        loss = _cross_entropy(self._logits(features, label), part)
        if self.orthogonality_weight and features.transform is not None:
            loss = loss + self.orthogonality_weight * orthogonality_penalty(features.transform)
        self.log("train/loss", loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(label))
        return loss

    def _evaluate(self, batch: Any, stage: Literal["val", "test"]) -> dict[str, Tensor]:
        points, label, part = _with_parts(batch)
        logits = self(points, label).float()
        found = self._best(logits, label)
        (self.val_metrics if stage == "val" else self.test_metrics).update(found, part, label)
        loss = _cross_entropy(logits, part)
        log_epoch_mean(self, f"{stage}/loss", loss, len(label), prog_bar=True)
        return {"part": part, "part_prediction": found, "label": label}

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        return self._evaluate(batch, "val")

    def on_validation_epoch_end(self) -> None:
        for name, value in self.val_metrics.compute().items():
            self.log(f"val/{name}", value, prog_bar=name == "instance_miou")
        self.val_metrics.reset()

    def test_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        return self._evaluate(batch, "test")

    def on_test_epoch_end(self) -> None:
        self.log_dict({f"test/{name}": value for name, value in self.test_metrics.compute().items()})
        self.test_metrics.reset()

    def configure_optimizers(self) -> Any:
        return configure_optimizer(self, self.optimizer, self.lr_scheduler)


def _cross_entropy(logits: Tensor, part: Tensor) -> Tensor:
    """Mean over the points that have a part; 0 where none has, instead of the NaN that would end a training."""
    known = (part >= 0).sum().clamp_min(1)
    return F.cross_entropy(logits, part, ignore_index=-1, reduction="none").mean() * (part.numel() / known)


def _with_parts(batch: Any) -> tuple[Tensor, Tensor, Tensor]:
    if isinstance(batch, Batch):
        if batch.part is None:
            raise ValueError("part segmentation needs a part label for every point, and these data have none")
        return batch.input, batch.label, batch.part
    if isinstance(batch, (tuple, list)) and len(batch) == 3:
        return batch[0], batch[1], batch[2]
    raise TypeError(f"a batch must be a litzoo Batch or (points, label, part), got {type(batch).__name__}")


def _check_settings(
    num_classes: int,
    num_parts: int,
    part_classes: list[int],
    class_names: list[str] | None,
    part_names: list[str] | None,
    network: str,
    dropout: float,
) -> None:
    if num_parts == 0:
        raise ValueError("the data have no part labels, which a segmenter is trained with: an HDF5 file needs `part` and `part_names`")
    if num_classes < 1 or num_parts < 2:
        raise ValueError(f"num_classes must be at least 1 and num_parts at least 2, got {num_classes} and {num_parts}")
    for name, values, number in (
        ("class_names", class_names, num_classes),
        ("part_names", part_names, num_parts),
        ("part_classes", part_classes, num_parts),
    ):
        if values is not None and len(values) != number:
            raise ValueError(f"{name} has {len(values)} entries, it needs {number}")
    if not all(-1 <= cls < num_classes for cls in part_classes):
        raise ValueError(f"part_classes must lie in [-1, {num_classes - 1}]")
    if network not in ("part", "semantic"):
        raise ValueError(f"network must be 'part' or 'semantic', got {network!r}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must lie in [0, 1), got {dropout}")
