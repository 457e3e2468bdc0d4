"""Wrong labels found by K-fold ensembles: models trained on some folds judge the labels of the others."""

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, get_args

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from .cleaning_rounds import Rounds, Scheme, train_missing
from .functional.label_cleaning import LabelTable, assign_folds, fuse, judge_labels, mean_probabilities

Filter = Literal[
    "prune_by_noise_rate",
    "prune_by_class",
    "both",
    "confident_learning",
    "predicted_neq_given",
    "low_normalized_margin",
    "low_self_confidence",
]
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class CleaningResult:
    """What an ensemble says of the labels of N samples.

    Attributes:
        index: `(N,)` int64, the number of each sample in its data set, ascending.
        fold: `(N,)` int64 in [0, K).
        label: `(N,)` int64, the given labels.
        probabilities: `(K, N, C)` float32, of each round, fused over models and views; NaN where a round says nothing about a sample.
        table: votes, proposals and probabilities; its `review` goes by votes.
        review: `(N,)` bool, the samples to review: those of the table, or of cleanlab's filter where one was asked for.
        class_names: C names.
    """

    index: Tensor
    fold: Tensor
    label: Tensor
    probabilities: Tensor
    table: LabelTable
    review: Tensor
    class_names: list[str]


def clean_labels(
    make_model: Callable[[Any], LightningModule],
    datamodule: Any,
    make_trainer: Callable[..., Trainer] = Trainer,
    output: str | os.PathLike[str] | None = None,
    folds: int = 5,
    scheme: Scheme = "train_on_one",
    num_models: int = 1,
    views: int = 1,
    weights: Tensor | None = None,
    threshold: float = 0.0,
    min_flags: int | None = None,
    filter_by: Filter | None = None,
    splits: Sequence[str] = ("train",),
    seed: int = 0,
    jobs: int = 1,
    recipe: Mapping[str, Any] | None = None,
    report: Callable[[str], None] | None = print,
) -> CleaningResult:
    """Judge the labels of a data set by models that were not trained on them.

    The samples are dealt out to K stratified folds. In round k of "train_on_one", `num_models` models that differ in their seeds are
    trained on fold k alone and predict the K - 1 others, so that each label gets K - 1 votes of weak models that share no training
    sample. In round k of "leave_one_out" they are trained on the K - 1 others and predict fold k: one vote of strong models. Models and
    views are fused by `fuse`; a round doubts a label by the rule of `label_votes`; `judge_labels` decides. A round whose training part
    lacks a class says nothing about samples with that label.

    A pretrained encoder that was trained on these very labels already knows them: let `make_model` use none, or one that saw no labels.

    Each trained model leaves its logits in `output`; with the same settings and data, a later call trains only what is missing, and may
    change `num_models`, `weights`, `threshold`, `min_flags` and `filter_by`. Nothing is validated, and the last weights predict. Random
    streams, seeds and the splits of the data are left as they were.

    Args:
        make_model: datamodule -> a new model whose `forward` gives logits `(B, C)`; called with the split of the round, so that
            `num_train` and `class_counts` are its own.
        datamodule: an `ArrayDataModule`.
        make_trainer: keyword arguments -> a new trainer, such as `partial(Trainer, max_epochs=5)`; the arguments that it gets switch
            validation, logging and checkpoints off.
        output: folder of the predictions; None keeps nothing.
        folds: K.
        scheme: what a round trains on.
        num_models: N, models in a round.
        views: V; 1 predicts the plain samples, more predict that many augmented views, as training makes them, of keys (seed, view, sample).
        weights: `(N, V)` weights of models and views in the fusion; None weighs all alike.
        threshold: below which the probability of a label is too low; 0 doubts by the largest probability alone.
        min_flags: how many rounds must doubt a label; None: more than half of its votes.
        filter_by: cleanlab's filter, to choose the samples to review by the mean probabilities instead of by votes.
        splits: "train", "val" and "test", whichever are to be cleaned; all their labelled samples take part, and no others.
        seed: of folds, models and views.
        jobs: processes, which train a model each and share torch's threads; arguments must then be picklable by cloudpickle.
        recipe: settings that identify models and trainers; a folder made with others is refused. Change it when `make_model` changes.
        report: gets lines of progress; None is silent.

    Returns:
        The verdicts.

    Raises:
        ValueError: if a setting is out of range, there are no labels or only one class, a model gives other than finite logits `(B, C)`,
            `output` was made with other settings or data, or cleanlab is needed and not installed.

    Example:
        >>> data = DigitsDataModule()
        >>> make = lambda data: ImageClassifier(data.num_classes, backbone="conv4", in_channels=1)
        >>> clean_labels(make, data, partial(Trainer, max_epochs=3), folds=3).table.review.sum()

    Source:
        Northcutt, Jiang & Chuang, "Confident Learning: Estimating Uncertainty in Dataset Labels", JAIR 2021 (leave_one_out and filters).
    """
    say = report or (lambda line: None)
    if scheme not in get_args(Scheme):
        raise ValueError(f"scheme must be one of {', '.join(get_args(Scheme))}; got {scheme!r}")
    for name, number in (("num_models", num_models), ("views", views), ("jobs", jobs)):
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    if views > 1 and not datamodule.augments:
        raise ValueError(
            f"{views} views would be alike, as {type(datamodule).__name__} does not augment: give it an augmentation, or 1 view"
        )
    fuse(torch.zeros(num_models, views, 1, 1), weights)  # refuses wrong weights before any work is done
    if filter_by is not None:
        _find_label_issues(filter_by)
    index = _labelled(datamodule, splits, say)
    label = datamodule.arrays.label[index]
    fold = assign_folds(label, folds, seed)
    _tell_small_classes(label, datamodule.class_names, folds, scheme, say)

    identity: dict[str, Any] = {"samples": _hash_samples(datamodule, index), "scheme": scheme, "folds": folds, "views": views, "seed": seed}
    # Written out now, so that nobody can change it later.
    settings = json.dumps({**identity, **(recipe or {})}, indent=1, default=str)
    with TemporaryDirectory() as temporary:
        rounds = Rounds(make_model, datamodule, make_trainer, Path(output or temporary), index, fold, scheme, views, seed, settings)
        # Of all rounds that will say something, in place of what they will say: refuses rules before any work is done.
        silent = torch.stack([rounds.says_nothing(number) for number in range(folds)])
        judge_labels(torch.where(silent, float("nan"), 0.0)[..., None], label * 0, threshold, min_flags)
        if not (rounds.output / "settings.json").is_file():
            rounds.try_out()
        with _only_user(rounds.output, settings):
            train_missing(rounds, folds, num_models, jobs, say)
            fused = [rounds.fused(number, num_models, weights) for number in range(folds)]
    probabilities = torch.stack(fused)
    table = judge_labels(probabilities, label, threshold, min_flags)
    review = table.review if filter_by is None else find_issues(mean_probabilities(probabilities), label, filter_by)
    return CleaningResult(index, fold, label, probabilities, table, review, list(datamodule.class_names))


def find_issues(probabilities: Tensor, label: Tensor, filter_by: Filter = "prune_by_noise_rate") -> Tensor:
    """Labels that cleanlab's filter takes for wrong.

    Args:
        probabilities: `(N, C)` out-of-sample probabilities; samples with NaN are never found.
        label: `(N,)` int64 in [0, C).
        filter_by: of `cleanlab.filter.find_label_issues`.

    Returns:
        `(N,)` bool.

    Raises:
        ValueError: if there is no such filter, or cleanlab is not installed.

    Example:
        >>> find_issues(torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.9, 0.1]]), torch.tensor([0, 1, 1])).shape
        torch.Size([3])

    Source:
        Northcutt, Jiang & Chuang, "Confident Learning: Estimating Uncertainty in Dataset Labels", JAIR 2021.
    """
    find = _find_label_issues(filter_by)
    known = ~probabilities.isnan().any(dim=1)
    found = torch.zeros(len(label), dtype=torch.bool)
    classes, dense = label[known].unique(return_inverse=True)
    if len(classes) < 2:
        return found
    # It wants every class to have samples; those without have no labels to be wrong.
    part = probabilities[known][:, classes].double()
    part = part / part.sum(dim=1, keepdim=True).clamp_min(1e-12)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found[known] = torch.from_numpy(np.asarray(find(dense.numpy(), part.numpy(), filter_by=filter_by, n_jobs=1)))
    return found


# The samples


def _labelled(datamodule: Any, splits: Sequence[str], say: Callable[[str], None]) -> Tensor:
    """Numbers of the labelled samples of some splits, ascending."""
    unknown = [name for name in splits if name not in SPLITS]
    if unknown or not splits:
        raise ValueError(f"splits must be of {', '.join(SPLITS)}; got {', '.join(splits) or 'none'}")
    name, arrays = " and ".join(dict.fromkeys(splits)), datamodule.arrays
    index = torch.isin(arrays.split, torch.tensor([SPLITS.index(each) for each in splits], dtype=arrays.split.dtype)).nonzero().squeeze(1)
    known = arrays.label[index] >= 0
    if len(index) == 0:
        raise ValueError(f"{type(datamodule).__name__} has no {name} samples: clean another split")
    if not known.any():
        raise ValueError(f"none of the {len(index):,} {name} samples of {type(datamodule).__name__} has a label: there is nothing to clean")
    if not known.all():
        say(f"{int((~known).sum()):,} of {len(index):,} {name} samples have no label and are left out")
    index = index[known]
    if len(arrays.label[index].unique()) < 2:
        cls = datamodule.class_names[int(arrays.label[index[0]])]
        raise ValueError(f"all {len(index):,} labelled {name} samples are of the class {cls}: cleaning needs at least 2 classes")
    return index


def _tell_small_classes(label: Tensor, names: Sequence[str], folds: int, scheme: Scheme, say: Callable[[str], None]) -> None:
    """Rounds say nothing about a class that their training part lacks; a class of one sample trains no round that judges it."""
    classes, counts = label.unique(return_counts=True)
    least = folds if scheme == "train_on_one" else 2
    small = classes[counts < least].tolist()
    if small:
        listed = ", ".join(f"{names[cls]} ({int(counts[classes == cls])})" for cls in small[:5]) + (" ..." if len(small) > 5 else "")
        say(
            f"{len(small)} of {len(classes)} classes have fewer samples than {least}: {listed}; rounds that train without a class say nothing "
            "about its labels: use fewer folds for more votes"
        )


def _hash_samples(datamodule: Any, index: Tensor) -> str:
    """Of the samples' numbers, all their labels, and some of their inputs."""
    some = index[torch.linspace(0, len(index) - 1, min(len(index), 64)).long()]
    digest = hashlib.sha256(index.numpy().tobytes())
    digest.update(datamodule.arrays.label[index].numpy().tobytes())
    digest.update(datamodule.arrays.input[some].contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


@contextmanager
def _only_user(output: Path, settings: str) -> Iterator[None]:
    """Work in a folder that nobody else works in, and that was not made with other settings."""
    from filelock import FileLock, Timeout

    output.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(output / ".lock", timeout=0):
            _check_settings(output, settings)
            yield
    except Timeout as error:
        raise ValueError(f"another process cleans labels in {output}: wait for it, or give another output folder") from error


def _check_settings(output: Path, settings: str) -> None:
    path = output / "settings.json"
    if not path.is_file() or not any((output / "predictions").glob("*.npz")):  # nothing that they could be settings of
        return
    before, now = json.loads(path.read_text(encoding="utf-8")), json.loads(settings)
    changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if changed == ["samples"]:
        raise ValueError(f"{output} was made of other samples or labels: give another output folder")
    if changed:
        name = next(each for each in changed if each != "samples")
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        raise ValueError(
            f"{output} was made with {name} {before.get(name)}, now it is {now.get(name)}{more}: give the same settings, or another output "
            "folder"
        )


def _find_label_issues(filter_by: str) -> Callable[..., Any]:
    """cleanlab's function, if there is such a filter and cleanlab."""
    if filter_by not in get_args(Filter):
        raise ValueError(f"cleanlab has no filter {filter_by!r}; there are: {', '.join(get_args(Filter))}")
    try:
        from cleanlab.filter import find_label_issues
    except ImportError as error:
        raise ValueError(f'the filter {filter_by} needs the package cleanlab ({error}): pip install "litzoo[clean]"') from error
    return find_label_issues
