"""PointNet: classification of point clouds.

A cloud is a set: what a network says of it must not depend on the order of its points. So one and the same function h is applied to
every point, and the global feature is the maximum of each channel over the points (equation 1), from which linear layers tell the
class. Two small networks of the same kind, the T-Nets, predict a matrix that aligns the points and one that aligns their features
(section 4.2); a penalty keeps the second one close to orthogonal (equation 2).

Qi, Su, Mo & Guibas, "PointNet: Deep Learning on Point Sets for 3D Classification and Segmentation", CVPR 2017. The segmentation of
parts is in `pointnet_segmenter.py`, theorem 2 in `critical_sets.py`.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from .batch import input_and_label
from .epoch_mean import log_epoch_mean
from .functional.classification import ClassWeights, focal_cross_entropy, make_class_weights, orthogonality_penalty
from .functional.points import Normalization, VoteBy, voting_views
from .functional.views import log_mean_probability
from .layers.classification_metrics import classification_metrics
from .layers.modes import evaluating
from .layers.pointwise import Maxima, PointwiseLayers, max_over_points
from .optimization import WarmupCosineLR, configure_optimizer
from .raw_inputs import prepare_raw

# "paper", or "compact" as in the PyTorch implementations that most published weights are of.
Variant = Literal["paper", "compact"]


def shared_mlp(*widths: int, last_relu: bool = True) -> PointwiseLayers:
    """Linear, BatchNorm, ReLU for each step of `widths`, the same for every point: `(B, C, N)` -> `(B, C', N)`."""
    layers: list[nn.Module] = []
    for narrow, wide in pairwise(widths):
        layers += [nn.Conv1d(narrow, wide, 1, bias=False), nn.BatchNorm1d(wide), nn.ReLU(inplace=True)]
    if not last_relu:
        layers[-1] = nn.Identity()
    return PointwiseLayers(*layers)


def mlp(*widths: int) -> nn.Sequential:
    """Linear, BatchNorm, ReLU for each step of `widths`: `(B, C)` -> `(B, C')`."""
    layers: list[nn.Module] = []
    for narrow, wide in pairwise(widths):
        layers += [nn.Linear(narrow, wide, bias=False), nn.BatchNorm1d(wide), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class TNet(nn.Module):
    """Predicts a transform of the input from the input (section 4.2, "joint alignment network").

    Its last layer starts at zero, so that the transform starts at the identity.

    Args:
        size: K, channels of the points.

    Example:
        >>> TNet(3)(torch.rand(2, 3, 64))[0].shape
        torch.Size([2, 3, 3])
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.points = shared_mlp(size, 64, 128, 1024)
        self.head = nn.Sequential(mlp(1024, 512, 256), nn.Linear(256, size * size))
        last = self.head[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Maxima]:
        """`(B, K, N)` -> transforms `(B, K, K)`, and the maxima they were made from."""
        maxima = max_over_points(self.points, x)
        offset = self.head(maxima.value).view(-1, self.size, self.size)
        return offset + torch.eye(self.size, dtype=offset.dtype, device=offset.device), maxima


class PointNetOutput(NamedTuple):
    """What `PointNet` finds in clouds.

    Attributes:
        feature: `(B, 1024)`, the global feature.
        local: `(B, 64, N)`, the transformed features of each point.
        input_transform: `(B, 3, 3)`, or None without that T-Net.
        feature_transform: `(B, 64, 64)`, or None without that T-Net.
        maxima: of every maximum over the points, in the order of the network; the last one is the global feature.
    """

    feature: Tensor
    local: Tensor
    input_transform: Tensor | None
    feature_transform: Tensor | None
    maxima: list[Maxima]


class PointNet(nn.Module):
    """The network up to its global feature: u(S) = max over points of h(x), with both transforms (figure 2).

    Args:
        input_transform: align the points by a 3 x 3 T-Net.
        feature_transform: align the 64 features of each point by a 64 x 64 T-Net.
        variant: "paper" has the widths (64, 64) before the feature transform and (64, 128, 1024) behind it; "compact", as many
            implementations have it, (64) and (128, 1024), and no ReLU before the maximum.

    Raises:
        ValueError: if there is no such variant.

    Example:
        >>> output = PointNet().eval()(torch.rand(2, 128, 3))
        >>> output.feature.shape, output.feature_transform.shape
        (torch.Size([2, 1024]), torch.Size([2, 64, 64]))
    """

    num_features = 1024

    def __init__(self, input_transform: bool = True, feature_transform: bool = True, variant: Variant = "paper") -> None:
        super().__init__()
        check_variant(variant)
        compact = variant == "compact"
        self.input_transform = TNet(3) if input_transform else None
        self.local = shared_mlp(3, 64) if compact else shared_mlp(3, 64, 64)
        self.feature_transform = TNet(64) if feature_transform else None
        self.wide = shared_mlp(64, 128, self.num_features, last_relu=False) if compact else shared_mlp(64, 64, 128, self.num_features)

    def forward(self, points: Tensor) -> PointNetOutput:
        """Clouds `(B, N, 3)` -> global feature, local features, transforms and maxima."""
        maxima: list[Maxima] = []
        input_transform = feature_transform = None
        x = points.mT
        if self.input_transform is not None:
            input_transform, found = self.input_transform(x)
            x = (points @ input_transform).mT
            maxima.append(found)
        x = self.local(x)
        if self.feature_transform is not None:
            feature_transform, found = self.feature_transform(x)
            x = feature_transform.mT @ x
            maxima.append(found)
        maxima.append(max_over_points(self.wide, x))
        return PointNetOutput(maxima[-1].value, x, input_transform, feature_transform, maxima)


class PointNetClassifier(LightningModule):
    """PointNet classifier: class logits of a point cloud of any number of points.

    Loss: focal cross entropy with class weights w and label smoothing, plus the regulariser of the feature transform A
    (equation 2): L = mean_i (1 - p_i)^gamma CE_i / mean_i w_{y_i} + orthogonality_weight * mean_b ||I - A A^T||_F^2.

    Batches are `Batch` or `(points, label)`, points `(B, N, 3)` float. Logs loss and accuracy of training, and of
    validation and test also mean class accuracy, MCC and calibration error, each over the whole epoch.

    Args:
        num_classes: C.
        class_names: name of each class; kept with the weights.
        class_counts: training samples of each class; needed for class weights.
        input_transform: align the points by a T-Net.
        feature_transform: align the features by a T-Net.
        variant: "paper", or "compact" for the smaller feature network of many implementations, see `PointNet`.
        dropout: dropout before the last layer; the paper keeps 0.7, that is 0.3.
        label_smoothing: in [0, 1].
        focal_gamma: focusing exponent of the focal loss; 0 is plain cross entropy.
        class_weights: "balanced" weighs classes inversely to their frequency, "effective" to their effective number of samples, see
            `effective_number_weights`.
        effective_beta: of the effective number, in [0, 1].
        orthogonality_weight: weight of the regulariser; the paper's 0.001.
        normalization: how clouds are normalised before they get here; `predict` applies it to raw clouds.
        votes: views of each test cloud whose probabilities are averaged; 1 takes the cloud as it is.
        vote_by: what the views are: see `voting_views`.
        optimizer: parameters -> optimizer.
        lr_scheduler: optimizer -> scheduler, or None.

    Raises:
        ValueError: if a setting is out of range, or `class_counts` is missing or of another length.

    Example:
        >>> model = PointNetClassifier(num_classes=16)
        >>> model.eval()(torch.rand(2, 1024, 3)).shape
        torch.Size([2, 16])
    """

    input_kind = "points"  # what `litzoo predict` reads for it

    def __init__(
        self,
        num_classes: int,
        class_names: list[str] | None = None,
        class_counts: list[int] | None = None,
        input_transform: bool = True,
        feature_transform: bool = True,
        variant: Variant = "paper",
        dropout: float = 0.3,
        label_smoothing: float = 0.0,
        focal_gamma: float = 0.0,
        class_weights: ClassWeights = "none",
        effective_beta: float = 0.999,
        orthogonality_weight: float = 1e-3,
        normalization: Normalization = "unit_sphere",
        votes: int = 1,
        vote_by: VoteBy = "yaw",
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-3, weight_decay=0.05),
        lr_scheduler: LRSchedulerCallable | None = lambda optimizer: WarmupCosineLR(optimizer, warmup=0.05),
    ) -> None:
        super().__init__()
        _check_settings(num_classes, class_names, class_counts, dropout, label_smoothing, focal_gamma)
        if votes < 1:
            raise ValueError(f"votes must be at least 1, got {votes}")
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler"])
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.class_names = class_names or [str(cls) for cls in range(num_classes)]
        self.label_smoothing = label_smoothing
        self.focal_gamma = focal_gamma
        self.orthogonality_weight = orthogonality_weight
        self.normalization: Normalization = normalization
        self.votes = votes
        self.vote_by: VoteBy = vote_by

        self.backbone = PointNet(input_transform, feature_transform, variant)
        self.head = nn.Sequential(mlp(self.backbone.num_features, 512, 256), nn.Dropout(dropout), nn.Linear(256, num_classes))
        # Not persistent: it belongs to the training data, weights files do not need it.
        self.class_weight: Tensor | None
        self.register_buffer("class_weight", make_class_weights(class_weights, class_counts, effective_beta), persistent=False)

        self.train_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.val_metrics = classification_metrics(num_classes, "val/")
        self.test_metrics = classification_metrics(num_classes, "test/")

    def forward(self, points: Tensor) -> Tensor:
        """Points `(B, N, 3)` -> logits `(B, C)`."""
        return self.head(self._output(points).feature)

    def encode(self, points: Tensor) -> Tensor:
        """Points `(B, N, 3)` -> global feature `(B, 1024)`, before the classification head."""
        return self._output(points).feature

    @torch.no_grad()
    def predict(self, clouds: Tensor | Sequence[Tensor], votes: int = 1, vote_by: VoteBy = "yaw") -> Tensor:
        """Class probabilities of raw clouds: normalises them as in training and runs in evaluation mode.

        Args:
            clouds: `(B, N, 3)`, one cloud `(N, 3)`, or a sequence of clouds of different sizes.
            votes: views of each cloud whose probabilities are averaged; 1 takes the cloud as it is.
            vote_by: what the views are: see `voting_views`.

        Returns:
            `(B, C)` float32 probabilities, on the model's device.

        Raises:
            ValueError: if a cloud has another shape or no points, there are no clouds, or the views are impossible.

        Example:
            >>> litzoo.load("pointnet_furniture").predict(torch.rand(2048, 3)).argmax()
        """
        groups = prepare_raw(clouds, None, self.normalization, self.device)
        dtype = next(self.parameters()).dtype
        with evaluating(self):
            return torch.cat([self._vote(group.to(dtype), votes, vote_by).float().softmax(dim=1) for group in groups])

    def _vote(self, points: Tensor, votes: int, vote_by: VoteBy) -> Tensor:
        """Logits `(B, C)` of clouds `(B, N, 3)`; with several views, those of their mean probability."""
        views = voting_views(points, votes, vote_by)
        logits: Tensor = self(views.flatten(0, 1))
        return logits if votes == 1 else log_mean_probability(logits.view(len(points), votes, -1), dim=1)

    def _output(self, points: Tensor) -> PointNetOutput:
        check_clouds(points, self.training)
        return self.backbone(points)

    def _loss(self, logits: Tensor, label: Tensor, transform: Tensor | None) -> Tensor:
        loss = focal_cross_entropy(logits, label, self.focal_gamma, self.class_weight, self.label_smoothing)
        if transform is not None and self.orthogonality_weight:
            loss = loss + self.orthogonality_weight * orthogonality_penalty(transform)
        return loss

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        points, label = input_and_label(batch)
        output = self._output(points)
        logits = self.head(output.feature)
        loss = self._loss(logits, label, output.feature_transform)
        self.train_accuracy.update(logits.detach(), label)
        self.log("train/accuracy", self.train_accuracy, on_step=False, on_epoch=True, batch_size=len(label))
        self.log("train/loss", loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(label))
        return loss

    def _evaluate(self, batch: Any, stage: Literal["val", "test"]) -> dict[str, Tensor]:
        points, label = input_and_label(batch)
        logits = self(points) if stage == "val" else self._vote(points, self.votes, self.vote_by)
        metrics = self.val_metrics if stage == "val" else self.test_metrics
        metrics.update(logits, label)
        log_epoch_mean(self, f"{stage}/loss", F.cross_entropy(logits.float(), label), len(label), prog_bar=True)
        return {"logits": logits, "label": label}

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        return self._evaluate(batch, "val")

    def on_validation_epoch_end(self) -> None:
        values = self.val_metrics.compute()
        self.log("val/accuracy", values.pop("val/accuracy"), prog_bar=True)
        self.log_dict(values)
        self.val_metrics.reset()

    def test_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        return self._evaluate(batch, "test")

    def on_test_epoch_end(self) -> None:
        self.log_dict(self.test_metrics.compute())
        self.test_metrics.reset()

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Probabilities `(B, C)`; the clouds of a DataModule are normalised already."""
        points = batch if isinstance(batch, Tensor) else input_and_label(batch)[0]
        return self._vote(points, self.votes, self.vote_by).float().softmax(dim=1)

    def configure_optimizers(self) -> Any:
        return configure_optimizer(self, self.optimizer, self.lr_scheduler)


def check_clouds(points: Tensor, training: bool) -> None:
    """Refuse what is no batch of clouds `(B, N, 3)`, and in training a batch of a single one."""
    if points.dim() != 3 or points.shape[-1] != 3 or points.shape[1] == 0:
        raise ValueError(f"PointNet takes clouds of shape (batch, points, 3), got {tuple(points.shape)}")
    if training and points.shape[0] == 1:
        raise ValueError(
            "PointNet cannot train on a batch of one cloud, because BatchNorm has no variance to estimate: "
            "use a batch size of at least 2 and drop an incomplete last batch, or call .eval() for predictions"
        )


def check_variant(variant: str) -> None:
    """Refuse a variant of the feature network that there is not."""
    if variant not in get_args(Variant):
        raise ValueError(f"variant must be 'paper' or 'compact', got {variant!r}")


def _check_settings(
    num_classes: int,
    class_names: list[str] | None,
    class_counts: list[int] | None,
    dropout: float,
    label_smoothing: float,
    focal_gamma: float,
) -> None:
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, got {num_classes}")
    for name, values in (("class_names", class_names), ("class_counts", class_counts)):
        if values is not None and len(values) != num_classes:
            raise ValueError(f"{name} has {len(values)} entries, but num_classes is {num_classes}")
    for name, value, low, high in (
        ("dropout", dropout, 0, 1),
        ("label_smoothing", label_smoothing, 0, 1),
        ("focal_gamma", focal_gamma, 0, 100),
    ):
        if not low <= value <= high:
            raise ValueError(f"{name} must lie in [{low}, {high}], got {value}")
