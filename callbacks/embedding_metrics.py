"""Scores a representation by retrieval and by clusters."""

import warnings
from collections.abc import Iterable
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from ..zoo.batch import input_and_label
from ..zoo.functional.clustering import clustering_metrics
from ..zoo.functional.retrieval import retrieval_metrics
from ..zoo.functional.subsets import stratified_subset
from .features import (
    FeatureBank,
    FeatureObserver,
    Features,
    batch_features,
    check_reference_loader,
    directions,
    evaluated_samples,
    gathered_rows,
    log_score,
    refuse_training_loader,
    refuse_without_training_samples,
    samples_of,
    training_features,
)

Reference = Literal["own", "train"]


class EmbeddingMetrics(FeatureObserver):
    """Logs how well features separate the classes of validation and test, measured by retrieval and by clustering.

    Queries are the evaluated samples. Each searches, by cosine similarity, among the other evaluated samples, or among the training
    samples: precision at 1 is the share whose nearest one has their class, R-precision the share of a query's class among its R nearest,
    R being the number of samples of that class, and MAP@R also rewards a right order (`retrieval_metrics`). Clusters of the evaluated
    samples, by k-means into as many as there are classes, are compared with the classes: AMI and NMI (`clustering_metrics`).

    Logs `val/embedding_precision_at_1`, `..._r_precision`, `..._map_at_r`, `..._ami` and `..._nmi`, and the same of `test/`. With
    `reference="train"`, the first three end in `_vs_train`, because numbers of the two protocols do not compare; with
    `features="forward"`, all end in `_forward`. Two instances look at both sides of a projection head.

    Counted over the whole epoch and all processes; a sample that a distributed sampler repeats counts once. Samples with the label -1 are
    left out, and queries without a reference of their class; with fewer than two classes, a warning says so once and nothing is logged.
    With several evaluation loaders, the first one counts; the sanity check scores nothing. It has no state, and leaves training and random
    streams alone.

    Cost: the evaluated samples are encoded once more, once for all callbacks that look at features; in the first process, an exact
    search of the R nearest and a k-means, which `max_samples` bounds; with `reference="train"`, a pass over the training set, shared
    with `KNNMonitor`, and a search among all of it. Composes with every callback; under `EMA` and `SWA` it scores the average.

    Other libraries are too slow for this during a training. On 10,000 points and two cores, torchmetrics 1.9 took 6.5 s for the AMI of
    10 classes and 52.7 s for that of 100, scikit-learn, which this calls, 0.013 and 0.049 s. torchmetrics' retrieval wants an index for
    every pair: 10,000 queries in 50,000 references would take about half an hour. `AccuracyCalculator(k=1)` of
    pytorch-metric-learning 2.9 cuts R-precision and MAP@R off at the first neighbour, where they say no more than precision at 1.

    Args:
        features: what is compared: "encode" for `pl_module.encode(x)`, before a projection head, or "forward", after it.
        reference: "own" for the other evaluated samples, or "train" for the training samples.
        max_samples: if there are more evaluated samples, a fixed subset of this size is scored, in which each class keeps its share;
            fewer references of a class make retrieval among them harder. None scores all.
        clusters: whether to cluster; hundreds of classes take seconds.
        every_n_epochs: in `fit`, score the first validated epoch (also after a resume), every n-th one and the last; between
            them the last scores stand, which `EarlyStopping` counts as no improvement.
        reference_loader: for "train", batches `(x, y)` of training samples, the same on every process or with a distributed sampler;
            by default those of the data module's `eval_train_dataloader`.

    Raises:
        ValueError: if a setting is out of range, or a batch is no pair of inputs and labels.
        TypeError: if `reference_loader` can be iterated over only once.
        MisconfigurationException: at the start, if the module has no such method, another one looks at the same features, or, for
            "train", there are no training samples.

    Example:
        >>> metrics = [EmbeddingMetrics(), EmbeddingMetrics("forward")]
        >>> best = ModelCheckpoint(monitor="val/embedding_map_at_r", mode="max")
        >>> trainer = Trainer(callbacks=[*metrics, best])

    Source:
        Musgrave, Belongie & Lim, "A Metric Learning Reality Check", ECCV 2020, section 3.2 (MAP@R); Vinh, Epps & Bailey, "Information
        Theoretic Measures for Clusterings Comparison", JMLR 2010 (AMI).
    """

    def __init__(
        self,
        features: Features = "encode",
        reference: Reference = "own",
        max_samples: int | None = 10_000,
        clusters: bool = True,
        every_n_epochs: int = 1,
        reference_loader: Iterable[Any] | None = None,
    ) -> None:
        super().__init__(features, every_n_epochs)
        if reference not in get_args(Reference):
            raise ValueError(f"reference must be one of {', '.join(get_args(Reference))}, got {reference!r}")
        if max_samples is not None and max_samples < 2:
            raise ValueError(f"max_samples must be at least 2, or None for all, got {max_samples}")
        if reference_loader is not None and reference != "train":
            raise ValueError("reference_loader holds training samples, which are compared with reference='train' only: set it")
        check_reference_loader(reference_loader)
        self.reference: Reference = reference
        self.max_samples = max_samples
        self.clusters = clusters
        self.reference_loader = reference_loader
        self._warned = False
        self.begin()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._warned = False
        if stage != "predict" and self.reference == "train":
            refuse_without_training_samples(self, trainer, pl_module, self.reference_loader)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        refuse_training_loader(self, trainer, self.reference_loader)

    def begin(self) -> None:
        self._samples = 0
        # Features, labels and places in their order of the evaluated samples.
        self._seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def see(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any) -> None:
        _, label = samples_of(pl_module, batch)
        features = batch_features(trainer, pl_module, self.features, batch)
        samples = len(input_and_label(batch)[1])
        place = (self._samples + torch.arange(samples, device=label.device)) * trainer.world_size + trainer.global_rank
        self._samples += samples
        self._seen.append((features, label, place.repeat_interleave(len(label) // max(samples, 1))))  # views of a sample share its place

    def conclude(self, trainer: Trainer, pl_module: LightningModule, stage: Literal["val", "test"]) -> None:
        bank = training_features(trainer, pl_module, self.features, self.reference_loader) if self.reference == "train" else None
        features, label, place = torch.zeros(0, 0), torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long)
        if self._seen:  # else this process had no batch
            features, label, place = (torch.cat(parts) for parts in zip(*self._seen, strict=True))
        if trainer.world_size > 1:
            features, label, place = (gathered_rows(trainer, pl_module, rows) for rows in (features, label, place))
        scores: dict[str, float] = {}
        if trainer.is_global_zero:
            kept = (label >= 0) & (place < evaluated_samples(trainer, stage))
            order = place[kept].argsort(stable=True)  # as one process would see them
            scores = self._scores(pl_module, features[kept][order], label[kept][order], bank, stage)
        for name, value in trainer.strategy.broadcast(scores).items():
            log_score(pl_module, f"{stage}/embedding_{name}{self.suffix}", value, prog_bar=name.startswith("map_at_r"))

    def _scores(
        self, pl_module: LightningModule, features: Tensor, label: Tensor, bank: FeatureBank | None, stage: str
    ) -> dict[str, float]:
        """Of labelled samples, by names without the stage."""
        if self.max_samples is not None:
            kept = stratified_subset(label, self.max_samples)
            features, label = features[kept], label[kept]
        features = directions(features)
        counts = label.unique(return_counts=True)[1]
        if len(counts) < 2:
            self._warn(f"the samples of {stage} have labels of {len(counts)} classes, and two are needed: no score is logged")
            return {}
        scores: dict[str, float] = {}
        if bank is None:
            found = bool((counts > 1).any())
            references: tuple[Tensor, ...] = ()
        else:
            known = bank.label >= 0
            found = bool(torch.isin(label, bank.label[known]).any())
            references = bank.features[known], bank.label[known]
        if found:
            end = "" if bank is None else "_vs_train"
            retrieved = retrieval_metrics(features, label, *references)._asdict()
            scores.update({f"{name}{end}": float(value) for name, value in retrieved.items()})
        else:
            self._warn(f"no sample of {stage} has another one of its class to find: retrieval is not logged")
        if self.clusters:
            from sklearn.exceptions import ConvergenceWarning

            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)  # fewer points than classes, as of a collapse: the scores tell
                scores.update(clustering_metrics(features, label)._asdict())
        return scores

    def _warn(self, text: str) -> None:
        if not self._warned:
            self._warned = True
            rank_zero_warn(f"EmbeddingMetrics: {text}")
