"""The settings table of the callback matrix: what drives the common tests, and the README's table.

A row says how to make a callback, what a hand-written training loop with the trick does, and under which conditions the
callback refuses to start. The network has no BatchNorm where it is compared with the loop, because local statistics make
two processes differ from one by design; everything else runs on one with BatchNorm and dropout.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from litzoo import callbacks

FEATURES, CLASSES, BATCH, BATCHES, EPOCHS, LR = 2, 3, 4, 7, 3, 0.5
Pairs = list[tuple[Tensor, Tensor]]


# Data and modules


def batches(seed: int = 0, number: int = BATCHES) -> Pairs:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(BATCH, FEATURES, generator=generator), torch.randint(CLASSES, (BATCH,), generator=generator)) for _ in range(number)
    ]


class Loader:
    """Batches in a fixed order, that can be gone on with in the middle of an epoch."""

    def __init__(self, pairs: Pairs) -> None:
        self.pairs = pairs
        self._position = 0
        self._start = 0

    def __len__(self) -> int:
        return len(self.pairs)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        start, self._start = self._start, 0
        for position in range(start, len(self.pairs)):
            self._position = position + 1
            yield self.pairs[position]

    def state_dict(self) -> dict[str, int]:
        return {"position": self._position % len(self.pairs)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._start = state["position"]


class Steps:
    """What a stranger's classifier does, for the modules of both namespaces."""

    fails: type[BaseException] | None = None

    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(FEATURES, 8)
        self.norm: nn.Module = nn.Sequential(nn.BatchNorm1d(8), nn.Dropout(0.3)) if norm else nn.Tanh()
        self.last = nn.Linear(8, CLASSES)
        self.accuracy = MulticlassAccuracy(CLASSES)
        self.steps = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.encode(x))

    def encode(self, x: Tensor) -> Tensor:
        return self.norm(self.first(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.steps += 1
        logits = self(batch[0])
        loss = F.cross_entropy(logits, batch[1])
        self.accuracy.update(logits.detach(), batch[1])
        self.log("train/accuracy", self.accuracy, on_step=False, on_epoch=True)  # type: ignore[attr-defined]
        self.log("train/loss", loss, on_step=True, on_epoch=True)  # type: ignore[attr-defined]
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.fails is not None and not self.trainer.sanity_checking:  # type: ignore[attr-defined]
            raise self.fails("on purpose")
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("val/loss", loss)  # type: ignore[attr-defined]
        return loss

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test/loss", F.cross_entropy(self(batch[0]), batch[1]))  # type: ignore[attr-defined]

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0]).softmax(dim=1)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=LR)  # type: ignore[attr-defined]


class Net(Steps, LightningModule):
    """The stranger's classifier for `lightning.pytorch`."""


class WithMomentum(Net):
    """A resumed run must also find its optimiser's state."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)


class Manual(Net):
    """Steps one or two optimisers by hand, as a GAN does."""

    def __init__(self, optimizers: int = 1) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.number = optimizers

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizers: Any = self.optimizers()
        for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
            loss = F.cross_entropy(self(batch[0]), batch[1])
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self) -> Any:
        if self.number == 1:
            return torch.optim.SGD(self.parameters(), lr=LR)
        return [torch.optim.SGD(part.parameters(), lr=LR) for part in (self.first, self.last)]


# The hand-written loop


class Trick:
    """What a trick does in a hand-written loop; this one does nothing."""

    def loss(self, loss: Tensor) -> Tensor:
        return loss

    def gradient(self, gradient: Callable[[], dict[str, Tensor]], weights: dict[str, nn.Parameter]) -> dict[str, Tensor]:
        return gradient()

    def lr(self, name: str, step: int, steps: int, epoch: int) -> float:
        return LR

    def after_step(self, weights: dict[str, nn.Parameter], step: int) -> None: ...

    def after_epoch(self, weights: dict[str, nn.Parameter]) -> None: ...

    def result(self, weights: dict[str, nn.Parameter]) -> dict[str, Tensor]:
        return {name: weight.detach() for name, weight in weights.items()}


LEVEL = 1.1  # about where the loss begins, so that micro-batches lie on both sides


class FloodingTrick(Trick):
    def loss(self, loss: Tensor) -> Tensor:
        return (loss - LEVEL).abs() + LEVEL


class PerturbedTrick(Trick):
    """FGM and SAM: the gradient at moved weights is added, or replaces."""

    def __init__(self, radius: float, part: str, add: bool) -> None:
        self.radius, self.part, self.add = radius, part, add

    def gradient(self, gradient: Callable[[], dict[str, Tensor]], weights: dict[str, nn.Parameter]) -> dict[str, Tensor]:
        first = gradient()
        moved = [name for name in weights if self.part in name]
        norm = math.sqrt(sum(float(first[name].double().pow(2).sum()) for name in moved))
        before = {name: weights[name].data.clone() for name in moved}
        for name in moved:
            weights[name].data += self.radius * first[name] / norm
        second = gradient()
        for name in moved:
            weights[name].data = before[name]
        return {name: first[name] + second[name] for name in first} if self.add else second


class EMATrick(Trick):
    average: dict[str, Tensor]

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.average = {}

    def after_step(self, weights: dict[str, nn.Parameter], step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        start = self.average or START
        self.average = {name: decay * start[name].to(w) + (1 - decay) * w.detach() for name, w in weights.items()}

    def result(self, weights: dict[str, nn.Parameter]) -> dict[str, Tensor]:
        return self.average


START = {name: weight.detach().clone() for name, weight in Net().named_parameters()}


class SWATrick(Trick):
    def __init__(self) -> None:
        self.ends: list[dict[str, Tensor]] = []

    def after_epoch(self, weights: dict[str, nn.Parameter]) -> None:
        self.ends.append({name: weight.detach().clone() for name, weight in weights.items()})

    def result(self, weights: dict[str, nn.Parameter]) -> dict[str, Tensor]:
        averaged = self.ends[1:]
        return {name: torch.stack([end[name] for end in averaged]).mean(dim=0) for name in weights}


class LayerwiseTrick(Trick):
    def lr(self, name: str, step: int, steps: int, epoch: int) -> float:
        return LR / 2.6 if name.startswith("first") else LR


class UnfreezeTrick(Trick):
    def lr(self, name: str, step: int, steps: int, epoch: int) -> float:
        return 0.0 if name.startswith("first") and epoch == 0 else LR


class SnapshotTrick(Trick):
    def lr(self, name: str, step: int, steps: int, epoch: int) -> float:
        cycle = math.ceil(steps / 2)
        return LR / 2 * (math.cos(math.pi * (step % cycle) / cycle) + 1)


def by_hand(trick: Trick, shards: list[Pairs], accumulate: int, dtype: torch.dtype, autocast: torch.dtype | None) -> dict[str, Tensor]:
    """Train with plain SGD: the gradient of a step is the mean over the shards of the sum over its micro-batches."""
    model = nn.Module.to(Net(), dtype)
    weights = dict(model.named_parameters())
    windows = [range(start, min(start + accumulate, BATCHES)) for start in range(0, BATCHES, accumulate)]
    step = 0
    for epoch in range(EPOCHS):
        for window in windows:

            def gradient(window: range = window) -> dict[str, Tensor]:
                model.zero_grad()
                for shard in shards:
                    for position in window:
                        x, y = shard[position]
                        with torch.autocast("cpu", autocast) if autocast else contextlib.nullcontext():
                            loss = F.cross_entropy(model(x.to(dtype)), y)
                        (trick.loss(loss) / accumulate / len(shards)).backward()
                return {name: weight.grad.clone() for name, weight in weights.items() if weight.grad is not None}

            found = trick.gradient(gradient, weights)
            with torch.no_grad():
                for name, weight in weights.items():
                    weight -= trick.lr(name, step, EPOCHS * len(windows), epoch) * found[name]
            step += 1
            trick.after_step(weights, step)
        trick.after_epoch(weights)
    return trick.result(weights)


# Precision, accumulation and processes: every pair of two of them occurs


@dataclass(frozen=True)
class Precision:
    dtype: torch.dtype
    autocast: torch.dtype | None
    tolerance: float


PRECISIONS = {
    "64-true": Precision(torch.float64, None, 1e-12),
    "32-true": Precision(torch.float32, None, 1e-5),
    "bf16-mixed": Precision(torch.float32, torch.bfloat16, 1e-3),
    "16-mixed, GradScaler": Precision(torch.float32, torch.float16, 1e-3),
}
COMBINATIONS = [
    (precision, accumulate, 1 + (row + column) % 2)
    for row, precision in enumerate(PRECISIONS)
    for column, accumulate in enumerate((1, 2, 3))
]


def precision_settings(name: str) -> dict[str, Any]:
    """On a CPU Lightning would turn 16-mixed into bf16-mixed; the plugin keeps float16 and its scaler."""
    if name.startswith("16-mixed"):
        return {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))]}
    return {"precision": name}


def make_trainer(folder: Path, *extra: Callback, kind: Any = Trainer, **settings: Any) -> Any:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    common = {"accelerator": "cpu", "devices": 1, "max_epochs": EPOCHS, "default_root_dir": folder, "log_every_n_steps": 1, **quiet}
    return kind(callbacks=list(extra), **{**common, **settings})


def fit(folder: Path, callback: Callback | None, precision: str, accumulate: int, world: int, rank: int = 0) -> dict[str, Tensor]:
    """Train a `Net` with the callback under one combination, and return the weights that it leaves in the module."""
    settings: dict[str, Any] = {"strategy": "ddp", "devices": 2, "use_distributed_sampler": False} if world == 2 else {}
    extra = [] if callback is None else [callback]
    trainer = make_trainer(folder, *extra, accumulate_grad_batches=accumulate, **precision_settings(precision), **settings)
    model = Net()
    trainer.fit(model, Loader(batches(rank)), Loader(batches(9, 2)))
    return {name: weight.detach() for name, weight in model.named_parameters()}


# The rows

SOME_LABELS = torch.tensor([0, 1, 2, *[-1] * (BATCH * BATCHES - 3)])


def _same() -> Trick:
    return Trick()


@dataclass(frozen=True)
class Row:
    """One callback.

    Attributes:
        make: the callback with settings that change the training.
        trick: the same by hand.
        neutral: the callback with settings that change nothing; None if it never changes anything.
        logs: the keys that it logs in a `fit`, besides those of the module.
        refuses: condition -> pattern of the reason it gives.
        reason: condition -> the same reason in a few words, for the README.
    """

    make: Callable[[], Callback]
    trick: Callable[[], Trick] = _same
    neutral: Callable[[], Callback] | None = None
    logs: frozenset[str] = frozenset()
    refuses: dict[str, str] = field(default_factory=dict)
    reason: dict[str, str] = field(default_factory=dict)


CONDITIONS = {
    "precision": "fp32, bf16-mixed, fp16 with GradScaler, accumulation 1, 2, 3",
    "processes": "two processes (DDP)",
    "resume": "resume at an epoch's end and in its middle",
    "reuse": "two fits with one object; pickling",
    "stages": "fit, validate, test, predict, also with `ckpt_path`",
    "exception": "exception in validation, Ctrl-C",
    "weights_only": "`save_weights_only`",
    "manual": "manual optimisation",
    "optimizers": "several optimisers",
    "namespace": "`pytorch_lightning` trainer",
    "compile": "`torch.compile`",
    "neutral": "neutral settings change no bit; no log keys but those it is there for",
}
_MANUAL = {"manual": "manually optimised", "optimizers": "manually optimised"}
_MANUAL_REASON = dict.fromkeys(("manual", "optimizers"), "which loss is meant is unknown")
_AVERAGE = {"weights_only": "save_weights_only=True"}
_AVERAGE_REASON = {"weights_only": "Lightning asks no callback for such a file"}

ROWS: dict[str, Row] = {
    "CheckpointAverage": Row(lambda: callbacks.CheckpointAverage()),
    "CollapseWatch": Row(lambda: callbacks.CollapseWatch(collapsed_loss=1.0), logs=frozenset({"train/collapse_ratio", "val/feature_rank"})),
    "ConfusionMatrixPlot": Row(lambda: callbacks.ConfusionMatrixPlot(every_n_epochs=99)),
    "DecisionBoundaryPlot": Row(lambda: callbacks.DecisionBoundaryPlot()),
    "DiscriminativeLR": Row(
        lambda: callbacks.DiscriminativeLR(2.6, ["first", "norm|last"]), LayerwiseTrick, lambda: callbacks.DiscriminativeLR(1.0)
    ),
    "EMA": Row(
        lambda: callbacks.EMA(0.9),
        lambda: EMATrick(0.9),
        lambda: callbacks.EMA(0.0, warmup=False),
        refuses=_AVERAGE,
        reason=_AVERAGE_REASON,
    ),
    "EmbeddingMetrics": Row(
        lambda: callbacks.EmbeddingMetrics(reference="train", reference_loader=batches(3)),
        logs=frozenset(
            f"val/embedding_{name}" for name in ("precision_at_1_vs_train", "r_precision_vs_train", "map_at_r_vs_train", "ami", "nmi")
        ),
    ),
    "EmbeddingPlot": Row(lambda: callbacks.EmbeddingPlot(method="pca", every_n_epochs=99)),
    "FGM": Row(
        lambda: callbacks.FGM(0.7, "first"),
        lambda: PerturbedTrick(0.7, "first", add=True),
        lambda: callbacks.FGM(0.0, "first"),
        refuses=_MANUAL,
        reason=_MANUAL_REASON,
    ),
    "FeatureRank": Row(lambda: callbacks.FeatureRank(warn_below=0), logs=frozenset({"val/feature_rank"})),
    "Flooding": Row(
        lambda: callbacks.Flooding(LEVEL), FloodingTrick, lambda: callbacks.Flooding(0.0), refuses=_MANUAL, reason=_MANUAL_REASON
    ),
    "GradualUnfreeze": Row(
        lambda: callbacks.GradualUnfreeze(1, ["first", "norm|last"]), UnfreezeTrick, lambda: callbacks.GradualUnfreeze(1, ["."])
    ),
    "KNNMonitor": Row(lambda: callbacks.KNNMonitor(k=5, reference_loader=batches(3)), logs=frozenset({"val/knn_k5_t0.1_encode"})),
    "LinearProbe": Row(lambda: callbacks.LinearProbe(CLASSES), logs=frozenset({"train/probe_loss", "val/probe_accuracy"})),
    "NeighbourGallery": Row(lambda: callbacks.NeighbourGallery(1, 1, every_n_epochs=99, reference_loader=batches(3))),
    "PerClassTable": Row(lambda: callbacks.PerClassTable()),
    "PseudoLabels": Row(
        lambda: callbacks.PseudoLabels(0.4, dataset=callbacks.PseudoLabelDataset(torch.cat([x for x, _ in batches(3)]), SOME_LABELS)),
        logs=frozenset({"train/pseudo_labels"}),
    ),
    "SAM": Row(
        lambda: callbacks.SAM(0.5),
        lambda: PerturbedTrick(0.5, "", add=False),
        lambda: callbacks.SAM(0.0),
        refuses=_MANUAL,
        reason=_MANUAL_REASON,
    ),
    "SWA": Row(lambda: callbacks.SWA(1), SWATrick, refuses=_AVERAGE, reason=_AVERAGE_REASON),
    "SnapshotEnsemble": Row(
        lambda: callbacks.SnapshotEnsemble(2),
        SnapshotTrick,
        refuses={"manual": "manual", "optimizers": "manual|optimi"},
        reason={"manual": "no learning rate to take over", "optimizers": "no learning rate to take over"},
    ),
    "StepSeed": Row(lambda: callbacks.StepSeed(1)),
    "TestTimeAugmentation": Row(lambda: callbacks.TestTimeAugmentation([torch.neg])),
}
# Callbacks that refuse every module but one kind, and what holds them to the same conditions.
ELSEWHERE = {
    "CriticalPointsPlot": "test_critical_points_plot.py",
    "PartPlot": "test_part_plot.py",
    "RelationPairsPlot": "test_relation_pairs_plot.py",
    "SampleGrid": "test_sample_grid.py",
}
