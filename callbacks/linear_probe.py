"""Scores a representation by a linear classifier that is trained beside it."""

from copy import deepcopy
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from .features import (
    FeatureObserver,
    Features,
    FeatureTap,
    accuracy_over_processes,
    batch_features,
    encode,
    known_classes,
    labelled_training_samples,
    log_score,
    samples_of,
)
from .guards import refuse


class LinearProbe(FeatureObserver):
    """Trains a linear classifier on the features of the training batches, and logs its accuracy on validation and test.

    With v the features of a batch, which pass no gradient on: p(y | v) = softmax(W v + b), fitted by the cross entropy with Adam, a step
    per batch, from W = b = 0. The encoder does not notice: its gradients, weights, random streams and checkpointed `state_dict` are
    as without the probe, whose weights lie in the callback's state and come back when `fit` resumes.

    Features of training are those that the step itself computes, augmented and in training mode, if it calls `encode` on the batch's
    inputs; else the inputs are encoded once more, in evaluation mode. Views `(B, V, C, H, W)` of a `Batch` all count; samples with
    the label -1, or with features that are not finite, do not. In evaluation, features are those of evaluation mode. The accuracy is a
    little below that of a probe trained to convergence on the frozen encoder, which papers report.

    Logs `train/probe_loss`, `val/probe_accuracy` and `test/probe_accuracy`, with `features="forward"` followed by `_forward`, over
    the whole epoch and all processes. With several evaluation loaders, the first one counts; the sanity check logs nothing.

    Cost: a D x C layer in float32; the evaluated samples are encoded once more, once for all callbacks that look at features.
    Composes with every callback; under `EMA` and `SWA`, training shows it the features of the training's weights, validation
    those of the average.

    Args:
        num_classes: C; by default the model's or the data's.
        features: what is classified: "encode" for `pl_module.encode(x)`, or "forward".
        lr: learning rate of Adam.

    Raises:
        ValueError: if a setting is out of range, a batch is no pair of inputs and labels, or a label is C or above.
        MisconfigurationException: at the start, if the module has no such method, or nobody knows the number of classes.

    Example:
        >>> trainer = Trainer(callbacks=[LinearProbe(num_classes=10)])

    Source:
        Alain & Bengio, "Understanding intermediate layers using linear classifier probes", ICLR 2017 workshop.
    """

    def __init__(self, num_classes: int | None = None, features: Features = "encode", lr: float = 3e-3) -> None:
        super().__init__(features, every_n_epochs=1)
        if num_classes is not None and num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {num_classes}")
        if not lr > 0:
            raise ValueError(f"lr must be positive, got {lr}")
        self.num_classes = num_classes
        self.lr = lr
        self._reset()

    def _reset(self) -> None:
        self._classes = 0
        self._tap: FeatureTap | None = None
        # W and b while there is a training.
        self._weights: list[Tensor] = []
        self._optimizer: torch.optim.Adam | None = None
        # All of it as it is saved, before and after a training.
        self._saved: dict[str, Any] = {}
        self._epoch = 0
        # Sum of the loss and number of its samples in this epoch, of all processes.
        self._loss = torch.zeros(2)
        self.begin()

    def begin(self) -> None:
        self._right: Tensor | int = 0
        self._samples: Tensor | int = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        self._reset()
        classes = known_classes(trainer, pl_module, self.num_classes)
        if classes is None:
            raise refuse(
                self, f"does not know how many classes there are: neither {type(pl_module).__name__} nor the data say", "set num_classes"
            )
        if labelled_training_samples(trainer) == 0:
            raise refuse(self, "has nothing to learn, no training sample has a label", "leave it out, or watch FeatureRank instead")
        self._classes = classes
        self._tap = FeatureTap(pl_module, self.features)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._saved:
            classes, dimensions = self._saved["weight"].shape
            if classes != self._classes:
                raise refuse(self, f"was saved for {classes} classes, and now there are {self._classes}", f"set num_classes to {classes}")
            self._build(dimensions, pl_module.device)

    def _build(self, dimensions: int, device: torch.device) -> None:
        shapes = {"weight": (self._classes, dimensions), "bias": (self._classes,)}
        self._weights = [torch.zeros(shape, device=device, dtype=torch.float32, requires_grad=True) for shape in shapes.values()]
        self._optimizer = torch.optim.Adam(self._weights, lr=self.lr)
        self._loss = torch.zeros(2, device=device, dtype=torch.float32)
        if self._saved:
            with torch.no_grad():
                for name, weight in zip(shapes, self._weights, strict=True):
                    weight.copy_(self._saved[name])
                self._loss.copy_(self._saved["loss"])
            self._optimizer.load_state_dict(self._saved["optimizer"])
            self._epoch = self._saved["epoch"]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        assert self._tap is not None
        self._tap.insert()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        assert self._tap is not None
        inputs, label = samples_of(pl_module, batch)
        noted = self._tap.take(batch)
        self._tap.remove()
        features, label = (encode(trainer, pl_module, self.features, inputs), label) if noted is None else noted
        if not self._weights:
            self._build(features.shape[1], features.device)
        if self._epoch != trainer.current_epoch:
            self._epoch = trainer.current_epoch
            self._loss.zero_()
        self._step(trainer, features, label)

    def _step(self, trainer: Trainer, features: Tensor, label: Tensor) -> None:
        """A step on the samples of all processes."""
        assert self._optimizer is not None
        finite = features.isfinite().all(dim=1)  # of a step whose loss has overflowed, nothing may stay
        features, label = features.where(finite[:, None], 0.0), label.where(finite, -1)
        with torch.enable_grad():
            logits = F.linear(features, *self._weights)
            try:
                loss = F.cross_entropy(logits, label.clamp(min=-1), ignore_index=-1, reduction="sum")
            except IndexError as error:  # on a CPU; elsewhere it would take a look at every batch, which waits for the device
                raise ValueError(
                    f"LinearProbe has {self._classes} classes, but there are labels up to {int(label.max())}: set num_classes"
                ) from error
        gradients = torch.autograd.grad(loss, self._weights)
        sums = torch.cat([*(gradient.flatten() for gradient in gradients), loss.detach()[None], (label >= 0).sum()[None]])
        if trainer.world_size > 1:
            sums = trainer.strategy.reduce(sums, reduce_op="sum")
        *parts, known = sums.split([*(weight.numel() for weight in self._weights), 1, 1])
        for weight, part in zip(self._weights, parts, strict=False):
            weight.grad = part.view_as(weight) / known.clamp_min(1)
        self._optimizer.step()
        self._loss += sums[-2:]

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._remove_tap()  # of a batch that the module has cut short
        loss, samples = self._loss.tolist()
        if samples and self._epoch == trainer.current_epoch:
            log_score(pl_module, f"train/probe_loss{self.suffix}", loss / samples, prog_bar=False)

    def see(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any) -> None:
        weights = self._weights or [self._saved[name].to(pl_module.device) for name in ("weight", "bias") if self._saved]
        if weights:
            _, label = samples_of(pl_module, batch)
            features = batch_features(trainer, pl_module, self.features, batch)
            guess = F.linear(features, *weights).argmax(dim=1)
            self._right = self._right + ((guess == label) & (label >= 0)).sum()
            self._samples = self._samples + (label >= 0).sum()

    def conclude(self, trainer: Trainer, pl_module: LightningModule, stage: Literal["val", "test"]) -> None:
        accuracy = accuracy_over_processes(trainer, pl_module, self._right, self._samples)
        if accuracy is not None:
            log_score(pl_module, f"{stage}/probe_accuracy{self.suffix}", accuracy)

    def state_dict(self) -> dict[str, Any]:
        if self._optimizer is None:
            return self._saved
        weight, bias = (weight.detach() for weight in self._weights)
        return {"weight": weight, "bias": bias, "optimizer": self._optimizer.state_dict(), "epoch": self._epoch, "loss": self._loss}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = state_dict

    def _remove_tap(self) -> None:
        if self._tap is not None:
            self._tap.remove()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._rest()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._rest()

    def _rest(self) -> None:
        """Keep no module alive, and nothing on the device; what a test or a checkpoint by hand needs stays."""
        self._remove_tap()
        self._saved = apply_to_collection(deepcopy(self.state_dict()), Tensor, lambda tensor: tensor.cpu())
        self._tap, self._weights, self._optimizer = None, [], None
