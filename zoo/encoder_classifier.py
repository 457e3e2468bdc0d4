"""Classification by the features of any encoder: linear evaluation, fine-tuning, nearest neighbours and class means."""

import copy
import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable, ReduceLROnPlateau
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics.classification import MulticlassAccuracy

from .batch import count_unlabelled, input_and_label
from .epoch_mean import log_epoch_mean
from .feature_cache import FeatureCache, ShortEpochs, obstacle_to_cache, step_on, training_features
from .image_encoder import ImageEncoder
from .layers.classification_metrics import classification_metrics
from .layers.feature_heads import ClassMeansHead, LinearHead, NeighboursHead, RescaledHead
from .layers.modes import evaluating
from .optimization import WarmupCosineLR, configure_optimizer
from .pretrained import resolve_encoder
from .raw_inputs import prepare_raw

Head = Literal["linear", "knn", "class_means", "tau_normalized", "weight_scaling"]

# Moments of images that were measured on another split of the same data differ by less.
_TOLERANCE = 0.01


class EncoderClassifier(LightningModule):
    """Classifier on the features f(x) of an encoder: `encode(input) -> (B, D)` of any model of litzoo.

    - "linear": p(y | x) = softmax(W f(x) + b), fitted by the cross entropy with label smoothing. With a frozen encoder, this is the
      linear evaluation of a representation and the second stage of SupCon; otherwise it is fine-tuning.
    - "knn": weighted vote of the k nearest training features (`KNNClassifier`); k = 1 is the nearest training sample.
    - "class_means": p(y | x) = softmax(cos(f(x), m_y) / T), with m_y the mean of the normalised training features of class y.
    - "tau_normalized": the encoder's own linear classifier with weights w_c / ||w_c||^tau, without bias, for classes of unequal frequency.
    - "weight_scaling": that classifier with weights s_c w_c, where only s is learned; train it on balanced classes (`balanced` of the
      data). "linear" on balanced classes is the re-training of the classifier (cRT).

    "knn", "class_means" and "tau_normalized" learn nothing by gradient: `fit` passes over the training set once if they need it, validates,
    and ends after one epoch, whatever `max_epochs` says; training samples labelled -1 are left out.

    A frozen encoder is always in evaluation mode and does not change by a bit. If, in addition, the training data are not augmented,
    training and validation data are encoded only once, and the head is trained on the cached features, in the very minibatches that
    the training loader would yield: the result is the same up to rounding, in a fraction of the time. The trainer then sees one batch
    per epoch, while optimizer, schedulers and `global_step` count every minibatch as usual; loggers count epochs. With gradient clipping,
    accumulation, validation within an epoch, several processes, or callbacks that act on single batches, nothing is cached.

    Batches are `Batch` or `(input, label)`, as the encoder takes them; a training batch of images may hold views `(B, V, C, H, W)`. Logs
    loss and accuracy of training, and of validation and test also mean class accuracy, MCC and calibration error, over the epoch.

    Args:
        encoder: a name of `list_models()`, a `.safetensors` or `.ckpt` file, `hf-hub:owner/repo`, or `timm:NAME[@SIZE]` for pretrained weights of
            timm, see `load`; or its description, `{"model": name, "hparams": {...}}`, for random weights. The description is what is kept, so that a checkpoint loads anywhere, offline.
        num_classes: C.
        class_names: name of each class; kept with the weights.
        head: "linear", "knn", "class_means", "tau_normalized" or "weight_scaling"; the last two want an encoder that has a linear
            classifier of the same classes on its features, such as a trained `ImageClassifier`.
        freeze: whether the encoder stays as it is; False is fine-tuning.
        label_smoothing: s of the targets (1 - s) onehot(y) + s / C, in [0, 1].
        k: neighbours that vote.
        temperature: of the votes of neighbours, exp(cos / T), and of the class means.
        tau: exponent of "tau_normalized"; choose it on balanced validation data.
        cache_features: True refuses to train where features cannot be cached, False never caches them; None caches them where it can.
        lr: learning rate of the head in place of that of `optimizer`; "auto" finds one before the first epoch by a range test on the cached
            features. Lightning's `LearningRateFinder` sets it as well.
        encoder_lr_factor: in fine-tuning, learning rate of the encoder as a share of that of the head. With
            `DiscriminativeLR`, which divides once more, take 1.
        optimizer: parameters -> optimizer.
        lr_scheduler: optimizer -> scheduler, or None.

    Raises:
        ValueError: if a setting is out of range, or the encoder cannot be loaded; at the start of `fit`, if the data are
            not normalised as the encoder's were, training samples have no label, or features are to be cached and cannot be.

    Example:
        >>> model = EncoderClassifier("pointnet_furniture", num_classes=4, head="class_means")
        >>> Trainer().fit(model, datamodule=MeshFolderDataModule("shapes"))
        >>> model.ood_score(torch.rand(2048, 3))

    Source:
        Khosla et al., "Supervised Contrastive Learning", NeurIPS 2020; Snell, Swersky & Zemel, "Prototypical Networks for Few-shot
        Learning", NeurIPS 2017 (class means); Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", CVPR
        2018 (neighbours); Liu, Wang, Owens & Li, "Energy-based Out-of-distribution Detection", NeurIPS 2020; Sun, Ming, Zhu & Li,
        "Out-of-Distribution Detection with Deep Nearest Neighbors", ICML 2022; Kang et al., "Decoupling Representation and Classifier for
        Long-Tailed Recognition", ICLR 2020 (classifiers for imbalanced classes); Smith, "Cyclical Learning Rates for Training Neural
        Networks", WACV 2017 (range test).
    """

    def __init__(
        self,
        encoder: str | dict[str, Any],
        num_classes: int,
        class_names: list[str] | None = None,
        head: Head = "linear",
        freeze: bool = True,
        label_smoothing: float = 0.0,
        k: int = 20,
        temperature: float = 0.1,
        tau: float = 1.0,
        cache_features: bool | None = None,
        lr: float | Literal["auto"] | None = None,
        encoder_lr_factor: float = 0.1,
        optimizer: OptimizerCallable = lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
        lr_scheduler: LRSchedulerCallable | None = lambda optimizer: WarmupCosineLR(optimizer, warmup=0.05),
    ) -> None:
        super().__init__()
        _check_settings(num_classes, class_names, head, freeze, label_smoothing, k, temperature, tau, cache_features, lr, encoder_lr_factor)
        model, description = resolve_encoder(encoder)
        classifier, its_classes = getattr(model, "head", None), model.hparams.get("class_names")
        while isinstance(model, EncoderClassifier):  # whose own encoder is meant: a frozen one would pass no gradient on
            model, description = model.encoder, description["hparams"]["encoder"]
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler", "encoder"])
        self.save_hyperparameters({"encoder": description})
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.num_classes = num_classes
        self.class_names = class_names or [str(cls) for cls in range(num_classes)]
        self.frozen = freeze
        self.label_smoothing = label_smoothing
        self.cache_features = cache_features
        self.lr = lr
        self.encoder_lr_factor = encoder_lr_factor

        # What the encoder's own training had besides its backbone, such as a projection head, has nothing to learn here.
        self.encoder: Any = model.requires_grad_(False)
        if not freeze:
            self.backbone.requires_grad_(True)
            self.encoder.train()
        self.head: Any
        if head == "linear":
            self.head = LinearHead(self.num_features, num_classes)
        elif head == "knn":
            self.head = NeighboursHead(num_classes, k, temperature)
        elif head == "class_means":
            self.head = ClassMeansHead(self.num_features, num_classes, temperature)
        else:
            self.head = RescaledHead(self.num_features, num_classes, tau if head == "tau_normalized" else None)
            if isinstance(encoder, str):  # else it is built for weights that come
                self.head.take(_classifier_weight(classifier, self.head.weight.shape, encoder))
                _check_same_classes(its_classes, class_names, encoder)
        # What raw inputs are, and what `predict` does to them.
        self.image_input = getattr(model, "image_input", None)
        self.normalization = getattr(model, "normalization", None)
        self.input_kind = "images" if self.image_input is not None else "points" if self.normalization is not None else None
        self.prefers_bf16 = bool(getattr(model, "prefers_bf16", False))

        self.train_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.val_metrics = classification_metrics(num_classes, "val/")
        self.test_metrics = classification_metrics(num_classes, "test/")

        self._short_epochs = ShortEpochs()
        self._cache: FeatureCache | None = None
        self._schedule: dict[str, Any] | None = None
        self._lr_in_use: float | Literal["auto"] | None = None

    @property
    def backbone(self) -> nn.Module:
        """The part of the encoder that `encode` uses."""
        backbone: nn.Module = getattr(self.encoder, "backbone", self.encoder)
        return backbone

    @property
    def num_features(self) -> int:
        """D."""
        own = self.encoder.hparams.get("num_features") or getattr(self.encoder, "num_features", None)
        return int(own or self.backbone.num_features)  # type: ignore[arg-type]  # timm's attribute

    @property
    def _learns(self) -> bool:
        return any(parameter.requires_grad for parameter in self.head.parameters())

    @property
    def _wants_features(self) -> bool:
        return isinstance(self.head, (NeighboursHead, ClassMeansHead))

    def train(self, mode: bool = True) -> "EncoderClassifier":
        super().train(mode)
        if self.frozen:
            self.encoder.eval()
        return self

    def forward(self, inputs: Tensor) -> Tensor:
        """Inputs, as the encoder takes them -> logits `(B, num_classes)`."""
        logits: Tensor = self.head(self.encode(inputs))
        return logits

    def encode(self, inputs: Tensor) -> Tensor:
        """Inputs, as the encoder takes them -> its features `(B, D)`; a frozen encoder passes no gradient on."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            features: Tensor = self.encoder.encode(inputs)
        return features

    @torch.no_grad()
    def predict(self, inputs: Tensor | Sequence[Tensor]) -> Tensor:
        """Class probabilities of raw inputs, which are prepared as the encoder needs them and classified in evaluation mode.

        Args:
            inputs: images as `ImageClassifier.predict` takes them, clouds as `PointNetClassifier.predict` does, or vectors `(B, D)`.

        Returns:
            `(B, num_classes)` float32, on the model's device.

        Raises:
            ValueError: if an input has the wrong shape, dtype or range, or there are no inputs.

        Example:
            >>> model.predict(torchvision.io.decode_image("cat.png")).argmax()
        """
        with evaluating(self):
            return torch.cat([self(group).float().softmax(dim=1) for group in self._prepare(inputs)])

    @torch.no_grad()
    def ood_score(self, inputs: Tensor | Sequence[Tensor]) -> Tensor:
        """Out-of-distribution score of raw inputs, higher the less they are like the training data.

        For "knn" it is 1 - cos to the k-th nearest training feature (Sun et al.), for "class_means" 1 - the largest cosine, for the
        other heads the energy -log sum_c exp(logit_c) (Liu et al.).

        Args:
            inputs: as for `predict`.

        Returns:
            `(B,)` float32, on the model's device; scores of different heads cannot be compared.

        Raises:
            ValueError: as for `predict`.

        Example:
            >>> strange = model.ood_score(images) > model.ood_score(known_images).quantile(0.95)
        """
        with evaluating(self):
            return torch.cat([self.head.ood_score(self.encode(group)).float() for group in self._prepare(inputs)])

    def _prepare(self, inputs: Tensor | Sequence[Tensor]) -> list[Tensor]:
        """Raw inputs in batches, as the encoder takes them."""
        groups = prepare_raw(inputs, self.image_input, self.normalization, self.device)
        dtype = next((parameter.dtype for parameter in self.encoder.parameters()), torch.float32)
        return [group.to(dtype) for group in groups]

    # How a fit begins

    def configure_callbacks(self) -> list[Callback]:
        known = self._short_epochs in self.trainer.callbacks  # type: ignore[attr-defined]  # Lightning sets it in a connector
        return [] if known else [self._short_epochs]

    def setup(self, stage: str) -> None:
        trainer: Any = self.trainer
        self._check_data(trainer.datamodule)
        if stage != "fit":
            return
        self._cache = self._schedule = None
        self.automatic_optimization = True
        if trainer.limit_train_batches == 0:
            return
        if self._learns:
            _check_labels(trainer.datamodule)
            obstacle = self._obstacle()
            if obstacle is not None:
                self._check_without_cache(obstacle)
                return
            self._cache = FeatureCache(trainer.datamodule, trainer.limit_train_batches)
        elif trainer.world_size > 1:  # strategies of several processes want something to learn
            raise ValueError("a head that learns nothing by gradient is made in one process: set trainer.devices to 1")
        elif self._wants_features and not hasattr(trainer.datamodule, "eval_train_dataloader"):
            raise ValueError("neighbours and class means want the training set as it is: give a DataModule with eval_train_dataloader()")
        self.automatic_optimization = False
        self._short_epochs.begin(trainer, validated=not self._learns)

    def _check_data(self, data: Any) -> None:
        """Refuse data that the classifier or its encoder was not made for."""
        if (getattr(data, "num_classes", None) or 0) > self.num_classes:
            raise ValueError(
                f"the data have {data.num_classes} classes, but num_classes of the model is {self.num_classes}: set it to that"
            )
        if self.image_input is None:
            wanted = {"normalization": self.normalization}
        else:
            wanted = {f"image_{name}": getattr(self.image_input, name) for name in ("size", "mean", "std")}
            wanted["in_channels"] = self.image_input.channels
        for name, value in wanted.items():
            given = getattr(data, name, None)
            if value is not None and given is not None and not _is_near(given, value):
                setting = name.removeprefix("image_") if name in ("image_mean", "image_std") else name
                other = (
                    f", or take it at that size, timm:NAME@{given}"
                    if name == "image_size" and isinstance(self.encoder, ImageEncoder)
                    else ""
                )
                raise ValueError(
                    f"the encoder was trained with {name} {value}, but that of the data is {given}: set data.{setting} to it{other}"
                )

    def _obstacle(self) -> str | None:
        """Why the head cannot be trained on cached features, or None if it can."""
        if not self.frozen:
            return "the encoder is fine-tuned"
        return "cache_features is false" if self.cache_features is False else obstacle_to_cache(self.trainer)

    def _check_without_cache(self, obstacle: str) -> None:
        if self.trainer.fast_dev_run:  # type: ignore[attr-defined]  # Lightning sets it in a connector
            self.lr = None if self.lr == "auto" else self.lr
        elif self.lr == "auto":
            raise ValueError(
                f"lr auto searches on cached features, but {obstacle}: set lr to a number, or leave it out and add Lightning's callback "
                "LearningRateFinder(max_lr=30)"
            )
        elif self.cache_features:
            raise ValueError(f"features cannot be cached, because {obstacle}: change that, or leave cache_features out")
        elif self.frozen and self.cache_features is None:
            rank_zero_info(f"every epoch encodes the training data anew, because {obstacle}")

    def on_fit_start(self) -> None:
        if self._learns and self.lr != self._lr_in_use:  # a tuner has set it after the optimizer was made
            self.trainer.strategy.setup_optimizers(self.trainer)
        if self._wants_features and not self.automatic_optimization:
            features, label, _ = training_features(self)
            self.head.fit(features, label)  # before the sanity check asks for predictions

    def configure_optimizers(self) -> Any:
        if not self._learns:  # of nothing: its step counts, or no checkpoint would be written
            return torch.optim.SGD([torch.zeros(1, device=self.device)], lr=0.0)
        if self._cache is not None:
            features, label, index = training_features(self)
            self._cache.fill(features.to(self.head.weight.dtype), label, index)
        if self.lr == "auto":
            assert self._cache is not None
            head = copy.deepcopy(self.head)
            self.lr = self._cache.find_lr(head, self._make_optimizer(head), self.label_smoothing)
        self._lr_in_use = self.lr
        built = configure_optimizer(self, lambda _: self._make_optimizer(self.head), self.lr_scheduler and self._make_scheduler)
        if self._cache is None or not isinstance(built, dict):
            return built
        self._schedule = built["lr_scheduler"]  # which is stepped by hand
        return [built["optimizer"]], [self._schedule["scheduler"]]

    def _make_optimizer(self, head: nn.Module) -> Optimizer:
        groups: Any = head.parameters()
        if not self.frozen:
            trained = [parameter for parameter in self.encoder.parameters() if parameter.requires_grad]
            groups = [{"params": trained, "name": "encoder"}, {"params": list(head.parameters()), "name": "head"}]
        optimizer = self.optimizer(groups)
        for group in optimizer.param_groups:
            factor = self.encoder_lr_factor if group.get("name") == "encoder" else 1.0
            group["lr"] = factor * (self.lr if isinstance(self.lr, (int, float)) else group["lr"])
        return optimizer

    def _make_scheduler(self, optimizer: Optimizer) -> Any:
        assert self.lr_scheduler is not None
        scheduler = self.lr_scheduler(optimizer)
        if self._cache is not None and isinstance(scheduler, WarmupCosineLR) and scheduler.total_steps is None:
            epochs, steps = self.trainer.max_epochs, self.trainer.max_steps
            limits = [limit for limit in (epochs and epochs * self._cache.steps, steps) if limit is not None and limit >= 0]
            if limits:  # else it is refused as ever
                scheduler.set_total_steps(min(limits))
        return scheduler

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.hparams["lr"] == "auto":
            checkpoint["found_lr"] = self.lr

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.lr = checkpoint.get("found_lr", self.lr)

    # Training

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        if self._cache is not None:
            self._train_on(self._cache)
            return None
        if not self._learns:
            _count_step(self.optimizers())
            self.trainer.should_stop = True
            return None
        inputs, label = input_and_label(batch)
        label = label.long()
        if inputs.dim() == 5:
            inputs, label = inputs.flatten(0, 1), label.repeat_interleave(inputs.shape[1])
        logits = self(inputs)
        loss = F.cross_entropy(logits, label, label_smoothing=self.label_smoothing)
        self._log_training(loss, logits.argmax(dim=1), label)
        return loss

    def _train_on(self, cache: FeatureCache) -> None:
        """An epoch of the head over the cached features."""
        counter: Any = self.optimizers()
        optimizer: Optimizer = counter.optimizer  # as it is: what Lightning wraps around a step costs more than the step
        schedule = self._schedule or {"interval": None}
        losses, guesses, labels = [], [], []
        for features, label in cache.minibatches(self.current_epoch):
            loss, guess = step_on(self.head, optimizer, features, label, self.label_smoothing)
            _count_step(counter)
            if schedule["interval"] == "step":
                schedule["scheduler"].step()
            losses.append(loss * len(label))
            guesses.append(guess)
            labels.append(label)
            if self.global_step == self.trainer.max_steps:
                break
        if schedule["interval"] == "epoch" and not isinstance(schedule["scheduler"], ReduceLROnPlateau):
            schedule["scheduler"].step()
        every = torch.cat(labels)
        self._log_training(torch.stack(losses).sum() / len(every), torch.cat(guesses), every)

    def _log_training(self, loss: Tensor, guess: Tensor, label: Tensor) -> None:
        self.train_accuracy.update(guess, label)
        self.log("train/accuracy", self.train_accuracy, on_step=False, on_epoch=True, batch_size=len(label))
        self.log("train/loss", loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(label))

    def on_train_epoch_end(self) -> None:
        if self._schedule is None or not isinstance(self._schedule["scheduler"], ReduceLROnPlateau):
            return
        monitor, metrics = self._schedule["monitor"], self.trainer.callback_metrics
        if monitor not in metrics:
            raise ValueError(f"ReduceLROnPlateau watches {monitor}, which is not logged: there are {', '.join(sorted(metrics))}")
        self._schedule["scheduler"].step(metrics[monitor])

    # Evaluation

    def _evaluate(self, batch: Any, batch_idx: int, stage: Literal["val", "test"]) -> dict[str, Tensor]:
        inputs, label = input_and_label(batch)
        cache = self._cache if stage == "val" else None
        logits = self(inputs) if cache is None else self.head(cache.seen(batch, batch_idx, self.encode))
        metrics = self.val_metrics if stage == "val" else self.test_metrics
        metrics.update(logits, label)
        log_epoch_mean(self, f"{stage}/loss", F.cross_entropy(logits.float(), label), len(label), prog_bar=True)
        return {"logits": logits, "label": label}

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        return self._evaluate(batch, batch_idx, "val")

    def on_validation_epoch_end(self) -> None:
        values = self.val_metrics.compute()
        self.log("val/accuracy", values.pop("val/accuracy"), prog_bar=True)
        self.log_dict(values)
        self.val_metrics.reset()

    def test_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        return self._evaluate(batch, batch_idx, "test")

    def on_test_epoch_end(self) -> None:
        self.log_dict(self.test_metrics.compute())
        self.test_metrics.reset()

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Probabilities `(B, num_classes)`; the inputs of a DataModule are prepared already."""
        inputs = batch if isinstance(batch, Tensor) else input_and_label(batch)[0]
        return self(inputs).float().softmax(dim=1)

    def teardown(self, stage: str) -> None:
        self._cache = self._schedule = None


def _count_step(counter: Any) -> None:
    """Count a step of an optimizer in the trainer's `global_step`."""
    counter._on_before_step()
    counter._on_after_step()


def _classifier_weight(classifier: Any, shape: torch.Size, encoder: str) -> Tensor:
    """Of an encoder's own linear classifier on its features."""
    if not isinstance(classifier, nn.Linear) or classifier.in_features != shape[1]:
        raise ValueError(
            f"{encoder} has no linear classifier on its features to rescale: give a trained ImageClassifier, or an EncoderClassifier with a "
            "linear head, or take head linear with balanced data"
        )
    if classifier.out_features != shape[0]:
        raise ValueError(f"the classifier of {encoder} tells {classifier.out_features} classes apart, but num_classes is {shape[0]}")
    return classifier.weight


def _check_same_classes(known: list[str] | None, names: list[str] | None, encoder: str) -> None:
    """Of a classifier that is taken over: its rows are its own classes, in their order."""
    for cls, (own, name) in enumerate(zip(known or (), names or (), strict=False)):
        if own != name:
            raise ValueError(f"class {cls} of {encoder} is {own!r}, but here {name!r}: head linear learns other classes, or another order")


def _check_labels(data: Any) -> None:
    unlabelled, samples = count_unlabelled(data)
    if unlabelled:
        raise ValueError(
            f"{unlabelled} of {samples} training samples have no label: a linear classifier cannot train on them, head knn and "
            "class_means leave them out, and the callback PseudoLabels labels them"
        )


def _is_near(given: Any, wanted: Any) -> bool:
    if isinstance(wanted, (list, tuple)):
        return len(given) == len(wanted) and all(
            math.isclose(x, y, rel_tol=0, abs_tol=_TOLERANCE) for x, y in zip(given, wanted, strict=True)
        )
    return bool(given == wanted)


def _check_settings(
    num_classes: int,
    class_names: list[str] | None,
    head: str,
    freeze: bool,
    label_smoothing: float,
    k: int,
    temperature: float,
    tau: float,
    cache_features: bool | None,
    lr: float | str | None,
    encoder_lr_factor: float,
) -> None:
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, got {num_classes}")
    if class_names is not None and len(class_names) != num_classes:
        raise ValueError(f"class_names has {len(class_names)} entries, but num_classes is {num_classes}")
    if head not in get_args(Head):
        raise ValueError(f"head must be one of {', '.join(get_args(Head))}; got {head!r}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must lie in [0, 1], got {label_smoothing}")
    if k < 1 or not temperature > 0 or not min(tau, encoder_lr_factor) >= 0:
        raise ValueError(
            "k must be at least 1, temperature positive, tau and encoder_lr_factor not negative, "
            f"got {k}, {temperature}, {tau} and {encoder_lr_factor}"
        )
    if not (lr is None or lr == "auto" or (not isinstance(lr, str) and lr > 0)):
        raise ValueError(f"lr must be positive, 'auto' or null, got {lr!r}")
    if head != "linear" and not freeze:
        raise ValueError(f"head {head} takes the encoder as it is: leave freeze true")
    if head not in ("linear", "weight_scaling") and lr is not None:
        raise ValueError(f"head {head} learns nothing by gradient: leave lr out or null")
    if not freeze and (cache_features or lr == "auto"):
        raise ValueError(
            "the features of an encoder that learns cannot be cached, nor searched for a learning rate: leave cache_features out, set lr"
        )
