"""Logistic regression: the smallest model of the zoo, and the worked example of CONTRIBUTING.md."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from .batch import input_and_label
from .epoch_mean import log_epoch_mean
from .layers.classification_metrics import classification_metrics
from .optimization import configure_optimizer


class LogisticRegression(LightningModule):
    """Multinomial logistic regression: p(y | x) = softmax(W x + b), fitted by the cross entropy; W and b start at 0.

    Batches are `Batch` or `(x, label)`, x `(B, D)` float. Logs loss and error of each minibatch, and loss, accuracy, mean
    class accuracy, MCC and calibration error of validation and test.

    Args:
        num_features: D.
        num_classes: C.
        class_names: name of each class; kept with the weights.
        optimizer: parameters -> optimizer.
        lr_scheduler: optimizer -> scheduler, or None.

    Raises:
        ValueError: if `class_names` has another length than `num_classes`.

    Example:
        >>> LogisticRegression(num_features=2, num_classes=2)(torch.rand(5, 2)).shape
        torch.Size([5, 2])

    Source:
        Microsoft CNTK, tutorial 101, "Logistic Regression and ML Primer", whose training log the defaults reproduce.
    """

    def __init__(
        self,
        num_features: int = 2,
        num_classes: int = 2,
        class_names: list[str] | None = None,
        optimizer: OptimizerCallable = lambda params: torch.optim.SGD(params, lr=0.5),
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        if class_names is not None and len(class_names) != num_classes:
            raise ValueError(f"class_names has {len(class_names)} entries, but num_classes is {num_classes}")
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler"])
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.class_names = class_names or [str(cls) for cls in range(num_classes)]
        self.linear = nn.Linear(num_features, num_classes)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.val_metrics = classification_metrics(num_classes, "val/")
        self.test_metrics = classification_metrics(num_classes, "test/")

    def forward(self, x: Tensor) -> Tensor:
        """`(B, D)` -> logits `(B, C)`."""
        return self.linear(x)

    def encode(self, x: Tensor) -> Tensor:
        """`(B, D)` -> `(B, D)`: the features are the inputs."""
        return x

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, label = input_and_label(batch)
        logits = self(x)
        loss = F.cross_entropy(logits, label)
        error = (logits.argmax(dim=1) != label).float().mean()
        self.log_dict({"train/loss": loss, "train/error": error}, prog_bar=True, batch_size=len(label))
        return loss

    def _evaluate(self, batch: Any, stage: Literal["val", "test"]) -> dict[str, Tensor]:
        x, label = input_and_label(batch)
        logits = self(x)
        metrics = self.val_metrics if stage == "val" else self.test_metrics
        metrics.update(logits, label)
        log_epoch_mean(self, f"{stage}/loss", F.cross_entropy(logits.float(), label), len(label))
        return {"logits": logits, "label": label}

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        return self._evaluate(batch, "val")

    def on_validation_epoch_end(self) -> None:
        self.log_dict(self.val_metrics.compute())
        self.val_metrics.reset()

    def test_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        return self._evaluate(batch, "test")

    def on_test_epoch_end(self) -> None:
        self.log_dict(self.test_metrics.compute())
        self.test_metrics.reset()

    def configure_optimizers(self) -> Any:
        return configure_optimizer(self, self.optimizer, self.lr_scheduler)
