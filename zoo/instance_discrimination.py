"""Instance discrimination (Wu et al., CVPR 2018): an encoder learns without labels to tell every image from every other."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from .batch import Batch
from .epoch_mean import log_epoch_mean
from .functional.instance_discrimination import bank_similarities, instance_softmax_loss, log_partition_of, nce_loss, without_own
from .functional.nearest_neighbours import Scores, knn_predict
from .functional.random import fold_in, global_seed, integers
from .image_input import ImageInput
from .layers.memory_bank import MemoryBank
from .layers.modes import evaluating
from .optimization import WarmupCosineLR, configure_optimizer
from .unaugmented_pass import unaugmented_pass

# Numbers that keep the streams of one seed apart, from one another and from those of the data.
_NOISE, _SHARED_NOISE = 11, 12


class InstanceDiscrimination(LightningModule):
    """Instance discrimination: every image is a class of its own, and a memory bank holds one feature v_j of each.

    With f = normalise(W g(x)) of an augmented image i, g the encoder, the non-parametric softmax (equation 2) is
    P(j | f) = exp(v_j . f / t) / Z, Z = sum_k exp(v_k . f / t). The objectives:

    - "softmax": -log P(i | f), exactly, over all rows. At 50,000 images it costs no more than the approximation.
    - "nce": -log h(i) - sum_k log(1 - h(j_k)), with h(j) = P(j | f) / (P(j | f) + m / N) and m rows j_k drawn uniformly (equations
      4 to 7). Z is treated as a constant, estimated from the first batch (equation 8).

    There are two ways to keep the features from jumping between epochs. The paper adds the proximal term w ||f - v_i||^2 to the loss
    (equation 9), which acts on the encoder, and replaces the row by the new feature: a positive `proximal_weight`, `bank_momentum=0`.
    The published code has no such term; it moves the row only part of the way, v_i <- normalise(m v_i + (1 - m) f), which
    smooths the bank but does not act on the encoder: `proximal_weight=0, bank_momentum=0.5`, the defaults.

    Rows are written after each training step, identically in all processes; the bank is part of the checkpoint. Batches are `Batch`
    or `(images, label, index)`, where `index` counts the training images; views `(B, V, C, H, W)` of an image share its row.
    Logs the loss and, if training images have labels, the accuracy on validation images of a vote of their k nearest rows.

    Args:
        num_train: N, images to train on.
        backbone: the encoder g: a name or a mapping, see `resolve_backbone`.
        embedding_dim: dimensions of f.
        temperature: t; the paper has 0.07 for ImageNet, its code 0.1 for CIFAR-10.
        objective: "softmax" or "nce".
        negatives: m.
        noise: "per_sample" draws m rows for each image; "shared" draws m rows for a whole batch: the same expected loss
            at a fraction of the cost, with correlated noise.
        positives_in_noise: whether an image's own row may be drawn as noise, as in the paper.
        partition_momentum: Z <- p Z + (1 - p) Z', with Z' estimated from each batch; 1 keeps the first estimate, as the paper does.
        proximal_weight: w.
        bank_momentum: m of the bank, see above.
        bf16_scores: multiply with the bank in bfloat16.
        knn: k of the vote in validation.
        bank_start: "features" fills the bank with features of the untrained encoder in one pass over the unaugmented training images, so
            that the first epoch already has targets and Z is that of features; "random" fills it with random directions, as does the
            published code; that is also done if the trainer has no DataModule with `eval_train_dataloader`.
        rebuild_bank: if a checkpoint's bank belongs to other data, refill it in one pass over the training images instead of raising
            an error.
        in_channels: channels of the images.
        image_size: height and width of the images; up to 64, convolutional encoders get their small-image stem. None: any.
        image_mean: channel means with which the data are normalised; `embed` applies them to raw images.
        image_std: channel standard deviations, likewise.
        pretrained: start from timm's weights. The setting is not saved, so loading a checkpoint never downloads anything.
        optimizer: parameters -> optimizer.
        lr_scheduler: optimizer -> scheduler, or None.

    Raises:
        ValueError: if a setting is out of range, or there is no such encoder.

    Example:
        >>> model = InstanceDiscrimination(num_train=50_000, backbone="resnet18", image_size=32)
        >>> model.eval()(torch.rand(2, 3, 32, 32)).norm(dim=1)
        tensor([1., 1.])

    Source:
        Wu, Xiong, Yu & Lin, "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", CVPR 2018.
    """

    checkpoint_monitor = "val/knn_bank"  # the command line keeps the best checkpoint by it; validation has no loss
    prefers_bf16 = True  # convolutions dominate: the command line takes bf16-mixed where the processor gains by it

    def __init__(
        self,
        num_train: int,
        backbone: str | dict[str, Any] = "resnet18",
        embedding_dim: int = 128,
        temperature: float = 0.07,
        objective: Literal["softmax", "nce"] = "softmax",
        negatives: int = 4096,
        noise: Literal["per_sample", "shared"] = "per_sample",
        positives_in_noise: bool = False,
        partition_momentum: float = 1.0,
        proximal_weight: float = 0.0,
        bank_momentum: float = 0.5,
        bf16_scores: bool = False,
        knn: int = 200,
        bank_start: Literal["features", "random"] = "features",
        rebuild_bank: bool = False,
        in_channels: int = 3,
        image_size: int | None = 32,
        image_mean: list[float] | None = None,
        image_std: list[float] | None = None,
        pretrained: bool = False,
        optimizer: OptimizerCallable = lambda params: torch.optim.SGD(params, lr=0.03, momentum=0.9, weight_decay=5e-4),
        lr_scheduler: LRSchedulerCallable | None = lambda optimizer: WarmupCosineLR(optimizer, warmup=0.05),
    ) -> None:
        super().__init__()
        _check_settings(num_train, temperature, objective, negatives, noise, partition_momentum, proximal_weight, knn, bank_start)
        self.image_input = ImageInput(in_channels, image_size, image_mean, image_std)
        description = self.image_input.resolve(backbone)
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler", "backbone", "pretrained", "rebuild_bank"])
        # Resolved, and without pretrained, so that a checkpoint loads anywhere, offline.
        self.save_hyperparameters({"backbone": description, "pretrained": False, "rebuild_bank": False})
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.num_train = num_train
        self.temperature = temperature
        self.objective = objective
        self.negatives = negatives
        self.noise = noise
        self.positives_in_noise = positives_in_noise
        self.partition_momentum = partition_momentum
        self.proximal_weight = proximal_weight
        self.scores: Scores = "bf16" if bf16_scores else "fp32"
        self.knn = knn
        self.bank_start = bank_start
        self.rebuild_bank = rebuild_bank

        self.backbone = self.image_input.create(description, pretrained)
        self.projection = nn.Linear(int(self.backbone.num_features), embedding_dim)  # type: ignore[arg-type]
        self.bank = MemoryBank(embedding_dim, bank_momentum)
        # log(Z / N), estimated from the first batch; NaN until then.
        self.log_partition: Tensor
        self.register_buffer("log_partition", torch.tensor(float("nan")))
        self._partition_known = False
        self._labelled: tuple[Tensor, Tensor] | None = None

    def forward(self, images: Tensor) -> Tensor:
        """Images `(B, C, H, W)` -> embeddings `(B, embedding_dim)` of length one."""
        projected = self.projection(self.encode(images))
        return F.normalize(projected.to(torch.promote_types(projected.dtype, torch.float32)))

    def encode(self, images: Tensor) -> Tensor:
        """Images `(B, C, H, W)` -> features `(B, D)` of the encoder."""
        return self.image_input.encode(self.backbone, images)

    @torch.no_grad()
    def embed(self, images: Tensor | Sequence[Tensor]) -> Tensor:
        """Embeddings of raw images, which are resized, normalised as in training and encoded in evaluation mode.

        Args:
            images: `(B, C, H, W)`, one image `(C, H, W)`, or a sequence of images of different sizes; uint8, or float in [0, 1].

        Returns:
            `(B, embedding_dim)` float32 of length one, on the model's device.

        Raises:
            ValueError: if an image has the wrong shape, dtype or range, or there are no images.

        Example:
            >>> model.embed(torchvision.io.decode_image("cat.png")).shape
            torch.Size([1, 128])
        """
        groups = self.image_input.prepare(images, self.device)
        with evaluating(self):
            return torch.cat([self(group.to(self.projection.weight.dtype)) for group in groups]).float()

    # The bank

    def _apply(self, fn: Any, recurse: bool = True) -> "InstanceDiscrimination":
        super()._apply(fn, recurse)
        # In half precision, Z would not follow small changes.
        self.log_partition = self.log_partition.to(torch.promote_types(self.log_partition.dtype, torch.float32))
        return self

    def on_fit_start(self) -> None:
        self._prepare_bank()

    def on_train_start(self) -> None:
        self._prepare_bank()  # a tuner trains before `on_fit_start`, and afterwards puts back the empty bank

    def _prepare_bank(self) -> None:
        """Make sure that there is a bank, and that it belongs to the data at hand."""
        self.bank.discard()
        self._partition_known = False
        data = getattr(self.trainer, "datamodule", None)  # a plain Trainer has none
        samples: Tensor = getattr(data, "train_index", torch.arange(self.num_train))
        fingerprint = getattr(data, "fingerprint", None)
        if len(samples) != self.num_train:
            raise ValueError(
                f"the model was made for {self.num_train} training images, the data have {len(samples)}: set num_train to that"
            )
        stranger = len(self.bank) > 0 and not self.bank.fits(samples, fingerprint)
        if stranger and not self.rebuild_bank:
            raise ValueError(
                f"the memory bank of the checkpoint, {len(self.bank)} rows, belongs to other training images than the {len(samples)} "
                "at hand: resume with the data of that run, or set rebuild_bank to true to fill it from these"
            )
        if len(self.bank) == 0:
            self.log_partition.fill_(math.nan)  # trained weights come with the Z of another bank
        if stranger or len(self.bank) == 0:
            self.bank.start(samples, fingerprint, global_seed())
            if hasattr(data, "eval_train_dataloader") and (stranger or self.bank_start == "features"):
                self._fill(data)

    def _fill(self, data: Any) -> None:
        """Fill the bank with clean features, by one pass over the training images."""
        rank_zero_info(f"filling the memory bank with the features of {self.num_train} training images")
        with unaugmented_pass(self, data.eval_train_dataloader()) as batches:
            for batch in batches:
                images, index, _ = _unpack(batch)
                self.bank.write(index, self(images), momentum=0.0)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.bank.commit()

    # Training

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, index, key = _unpack(batch)
        if images.dim() == 5:
            views = images.shape[1]
            images, index = images.flatten(0, 1), index.repeat_interleave(views)
            if key is not None:
                key = fold_in(key.repeat_interleave(views), torch.arange(views, device=key.device).repeat(len(key)))
        row = self.bank.rows_of(index)
        features = self(images).to(self.bank.rows.dtype)
        if not self.bank.is_staged:  # a second pass over the batch (SAM, FGM) sees other weights
            self.bank.stage(row, features)
        if self.objective == "softmax":
            losses = instance_softmax_loss(features, self.bank.rows, row, self.temperature, self.scores)
        else:
            losses = self._nce(features, row, key, batch_idx)
        if self.proximal_weight:
            losses = losses + self.proximal_weight * (features - self.bank.rows[row]).square().sum(dim=1)
        loss = losses.mean()
        self.log("train/loss", loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(index))
        return loss

    def _nce(self, features: Tensor, row: Tensor, key: Tensor | None, batch_idx: int) -> Tensor:
        rows = self._draw(row, key, batch_idx)
        negative = bank_similarities(features, self.bank.rows, rows, self.scores)
        if not self.positives_in_noise and rows.dim() == 1:
            negative = without_own(negative, rows, row)
        self._update_partition(negative)
        positive = (features * self.bank.rows[row]).sum(dim=1)
        return nce_loss(positive, negative, self.temperature, self.log_partition)

    @torch.compiler.disable  # which folds constants without the wrapping of int64
    def _draw(self, row: Tensor, key: Tensor | None, batch_idx: int) -> Tensor:
        """Rows of the noise: `(m,)` if shared, else `(B, m)`."""
        size = len(self.bank)
        if self.noise == "shared":
            step = int(fold_in(global_seed(), _SHARED_NOISE, self.trainer.current_epoch, batch_idx))
            return integers(torch.full((), step, device=row.device), self.negatives, high=size)  # a copy would wait for the device
        high = size if self.positives_in_noise else size - 1
        if key is None:  # from somebody's own loader
            drawn = torch.randint(high, (len(row), self.negatives), device=row.device)
        else:
            drawn = integers(fold_in(key, _NOISE), self.negatives, high=high)
        if not self.positives_in_noise:  # count from the row behind one's own, round the end, up to the row before it
            drawn = drawn.add_(row[:, None] + 1)
            drawn = drawn.sub_((drawn >= size).long().mul_(size))
        return drawn

    @torch.no_grad()
    def _update_partition(self, negative: Tensor) -> None:
        known = self._partition_known = self._partition_known or not bool(self.log_partition.isnan())  # asks the device only until it is
        if known and self.partition_momentum == 1:
            return
        estimate = log_partition_of(negative, self.temperature)
        if self.trainer.world_size > 1:
            # Processes may have left out different numbers of rows.
            every, counts = self.all_gather((estimate, (negative > -torch.inf).sum().to(estimate.dtype)))
            estimate = (every + counts.log()).logsumexp(dim=0) - counts.sum().log()
        if known:
            # In logarithms; a weight of zero has none.
            old, new = (math.log(weight) if weight else -math.inf for weight in (self.partition_momentum, 1 - self.partition_momentum))
            estimate = torch.logaddexp(self.log_partition + old, estimate + new)
        self.log_partition.copy_(torch.where(estimate.isfinite(), estimate, self.log_partition))  # a batch may have overflowed

    # Evaluation by nearest neighbours in the bank

    def _labelled_rows(self) -> tuple[Tensor, Tensor] | None:
        """Rows of the training images whose label is known, and those labels; None without labels or a bank of these images."""
        data = getattr(self.trainer, "datamodule", None)
        label: Tensor | None = getattr(data, "train_label", None)
        if data is None or label is None or not bool((label >= 0).any()):
            return None
        if not self.bank.fits(data.train_index, getattr(data, "fingerprint", None)):
            if self.trainer.state.fn != "fit":  # there it was not started yet
                whose = "belongs to other training images than those at hand" if len(self.bank) else "is empty, as in a weights file"
                rank_zero_warn(
                    f"the memory bank {whose}, so there are no nearest rows to score: add the callback KNNMonitor, which makes its own"
                )
            return None
        label, rows = label.to(self.device), self.bank.rows.float()
        return (rows, label) if bool((label >= 0).all()) else (rows[label >= 0], label[label >= 0])

    def on_validation_epoch_start(self) -> None:
        self._labelled = self._labelled_rows()

    def on_test_epoch_start(self) -> None:
        self._labelled = self._labelled_rows()

    def on_validation_epoch_end(self) -> None:
        self._labelled = None  # it may be a copy of the bank

    def on_test_epoch_end(self) -> None:
        self._labelled = None

    def _evaluate(self, batch: Any, stage: Literal["val", "test"]) -> dict[str, Tensor]:
        images, label = batch[0], batch[1]
        features = self(images)
        if self._labelled is not None:
            rows, row_label = self._labelled
            classes = int(row_label.max()) + 1
            query = features.float().nan_to_num(0.0, 0.0, 0.0)  # of a training that diverged, no neighbour is right
            found = knn_predict(query, rows, row_label, min(self.knn, len(rows)), self.temperature, classes)
            right, known = (found == label) & features.isfinite().all(dim=1), int((label >= 0).sum())
            log_epoch_mean(self, f"{stage}/knn_bank", right.sum() / max(known, 1), known, prog_bar=True)
        return {"embedding": features, "label": label}

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        return self._evaluate(batch, "val")

    def test_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        return self._evaluate(batch, "test")

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Embeddings `(B, embedding_dim)`; the images of a DataModule are normalised already."""
        return self(batch if isinstance(batch, Tensor) else batch[0])

    def configure_optimizers(self) -> Any:
        return configure_optimizer(self, self.optimizer, self.lr_scheduler)


def _unpack(batch: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    """Images, the numbers of the samples, and their keys if there are any."""
    if isinstance(batch, Batch):
        return batch.input, batch.index, batch.key
    if isinstance(batch, (tuple, list)) and len(batch) >= 3:
        return batch[0], batch[2], None
    raise TypeError(
        f"instance discrimination must know which image is which: a batch must be a litzoo Batch or (images, label, index), got "
        f"{type(batch).__name__}{f' of {len(batch)}' if isinstance(batch, (tuple, list)) else ''}"
    )


def _check_settings(
    num_train: int,
    temperature: float,
    objective: str,
    negatives: int,
    noise: str,
    partition_momentum: float,
    proximal_weight: float,
    knn: int,
    bank_start: str,
) -> None:
    if num_train < 2:
        raise ValueError(f"num_train must be at least 2, got {num_train}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if objective not in ("softmax", "nce"):
        raise ValueError(f"objective must be softmax or nce, got {objective!r}")
    if noise not in ("per_sample", "shared"):
        raise ValueError(f"noise must be per_sample or shared, got {noise!r}")
    if negatives < 1 or knn < 1:
        raise ValueError(f"negatives and knn must be at least 1, got {negatives} and {knn}")
    if bank_start not in ("features", "random"):
        raise ValueError(f"bank_start must be features or random, got {bank_start!r}")
    if not 0 <= partition_momentum <= 1:
        raise ValueError(f"partition_momentum must lie in [0, 1], got {partition_momentum}")
    if proximal_weight < 0:
        raise ValueError(f"proximal_weight must not be negative, got {proximal_weight}")
