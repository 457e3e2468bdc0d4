"""Scores a representation by the nearest neighbours of its samples."""

from collections.abc import Iterable
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from ..zoo.batch import input_and_label
from ..zoo.functional.nearest_neighbours import Scores, knn_predict
from .features import (
    FeatureObserver,
    Features,
    accuracy_over_processes,
    batch_features,
    check_reference_loader,
    directions,
    labelled_training_samples,
    log_score,
    refuse_training_loader,
    refuse_without_training_samples,
    samples_of,
    training_features,
)
from .guards import refuse


class KNNMonitor(FeatureObserver):
    """Logs the accuracy on validation and test samples of a vote of their k nearest training samples.

    With v features of unit length and N(x) the k training samples whose v_i.v(x) are the largest, the prediction is

        argmax_c sum_{i in N(x), y_i = c} exp(v_i.v(x) / T).

    All features are taken in evaluation mode and without augmentation; those of the training set anew for every validation. So it
    scores any encoder while it trains, even without labels. It does not touch training, random streams and what others log.

    Logs `val/knn_k200_t0.1_encode` and `test/knn_k200_t0.1_encode`, named after k, T and the features, because accuracies
    compare only where these agree; for `ModelCheckpoint(monitor=...)` too. It counts over the whole epoch and all processes.
    Samples with the label -1 have none: they are neither neighbours nor scored. With several evaluation loaders, the first one counts; the
    sanity check scores nothing. It has no state.

    Cost: a pass over the training set without gradients, and one over the validation set, shared with `NeighbourGallery`; an exact
    search; memory for N x D features. Composes with every callback; under `EMA` and `SWA` it scores the average.

    Args:
        k: neighbours that vote.
        temperature: T of their weights.
        features: what is compared: "encode" for `pl_module.encode(x)`, or "forward".
        every_n_epochs: in `fit`, score the first validated epoch (also after a resume), every n-th one and the last; between
            them the last score stands, which `EarlyStopping` counts as no improvement.
        reference_loader: batches `(x, y)` of training samples, the same on every process or with a distributed sampler; by
            default those of the data module's `eval_train_dataloader`.
        scores: precision of the inner products: "fp32", or "bf16", which is faster.

    Raises:
        ValueError: if a setting is out of range, or a batch is no pair of inputs and labels.
        TypeError: if `reference_loader` can be iterated over only once.
        MisconfigurationException: at the start, if the module has no such method, another monitor has the same name, or there are no
            training samples, fewer than k, or none with a label; where their number is not known before, after the first epoch.

    Example:
        >>> monitor = KNNMonitor(k=20)
        >>> best = ModelCheckpoint(monitor="val/knn_k20_t0.1_encode", mode="max")
        >>> trainer = Trainer(callbacks=[monitor, best])

    Source:
        Wu, Xiong, Yu & Lin, "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", CVPR 2018, section 3.4.
    """

    def __init__(
        self,
        k: int = 200,
        temperature: float = 0.1,
        features: Features = "encode",
        every_n_epochs: int = 1,
        reference_loader: Iterable[Any] | None = None,
        scores: Scores = "fp32",
    ) -> None:
        super().__init__(features, every_n_epochs)
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        if scores not in get_args(Scores):
            raise ValueError(f"scores must be one of {', '.join(get_args(Scores))}, got {scores!r}")
        check_reference_loader(reference_loader)
        self.k = k
        self.temperature = temperature
        self.reference_loader = reference_loader
        self.scores: Scores = scores
        # Features and labels of the evaluated samples.
        self._queries: list[tuple[Tensor, Tensor]] = []

    def metric(self, stage: Literal["val", "test"] = "val") -> str:
        """The name under which the accuracy is logged."""
        return f"{stage}/knn_k{self.k}_t{self.temperature:g}_{self.features}"

    @property
    def state_key(self) -> str:
        return self._generate_state_key(metric=self.metric())

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "predict":
            return
        refuse_without_training_samples(self, trainer, pl_module, self.reference_loader)
        number = self._known_number(trainer)
        if number is not None and not getattr(trainer, "fast_dev_run", False):
            self._check_number(number, self.k)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        refuse_training_loader(self, trainer, self.reference_loader)

    def begin(self) -> None:
        self._queries = []

    def see(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any) -> None:
        _, label = samples_of(pl_module, batch)
        self._queries.append((batch_features(trainer, pl_module, self.features, batch), label))

    def conclude(self, trainer: Trainer, pl_module: LightningModule, stage: Literal["val", "test"]) -> None:
        bank, label, _ = training_features(trainer, pl_module, self.features, self.reference_loader)
        number = int((label >= 0).sum())
        # fast_dev_run encodes one batch of training samples.
        k = min(self.k, number) if getattr(trainer, "fast_dev_run", False) else self.k
        self._check_number(number, k)
        label, classes = label.clamp(min=-1), int(label.max()) + 1
        right = samples = 0
        if self._queries:  # else this process had no batch
            query, true = (torch.cat(parts) for parts in zip(*self._queries, strict=True))
            guess = knn_predict(directions(query), bank, label, k, self.temperature, classes, scores=self.scores)
            right, samples = int(((guess == true) & (true >= 0)).sum()), int((true >= 0).sum())
        accuracy = accuracy_over_processes(trainer, pl_module, right, samples)
        if accuracy is not None:
            log_score(pl_module, self.metric(stage), accuracy)

    def _known_number(self, trainer: Trainer) -> int | None:
        """How many labelled training samples there are, or at most, as far as that can be told without a pass over them."""
        loader = self.reference_loader
        if loader is None:
            return labelled_training_samples(trainer)
        if isinstance(loader, (list, tuple)):
            return sum(int((input_and_label(batch)[1] >= 0).sum()) for batch in loader)
        dataset: Any = getattr(loader, "dataset", None)
        # Without a batch sampler, an item of the data set may be a batch.
        is_known = hasattr(dataset, "__len__") and getattr(loader, "batch_sampler", None) is not None
        return len(dataset) if is_known else None

    def _check_number(self, number: int, k: int) -> None:
        if number == 0:
            raise refuse(self, "found no training sample with a label", "give a reference_loader with labels, or watch FeatureRank instead")
        if number < k:
            raise refuse(self, f"wants k={k} neighbours of {number} labelled training samples", f"set k to at most {number}")
