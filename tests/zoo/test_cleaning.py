"""Label cleaning: the rules against naive loops, what a round sees, resuming, and what becomes of the verdicts."""

import builtins
import csv
import json
import math
import os
import random
import signal
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from litzoo.datamodules import (
    DigitsDataModule,
    FurnitureDataModule,
    HDF5ImagesDataModule,
    HDF5PointsDataModule,
    ImageAugmentation,
    PatientsDataModule,
)
from litzoo.datamodules.hdf5_writing import write_hdf5
from litzoo.zoo import cleaning
from litzoo.zoo.batch import Batch
from litzoo.zoo.cleaning import CleaningResult, clean_labels, find_issues
from litzoo.zoo.cleaning_results import apply_verdicts, read_decisions, write_review, write_tables
from litzoo.zoo.functional.label_cleaning import assign_folds, fuse, judge_labels, label_votes, mean_probabilities
from litzoo.zoo.functional.random import fold_in

FLIPPED = 0.1


class PixelModel(LightningModule):
    """A linear classifier of 8 x 8 pixels, which remembers the samples that it was trained on."""

    trained: list[set[int]] = []  # noqa: RUF012  # of all models, so that tests can look

    def __init__(self, classes: int = 10, lr: float = 0.05) -> None:
        super().__init__()
        self.linear, self.lr = nn.Linear(64, classes), lr
        self.dropout = nn.Dropout(0.1)
        self.seen: set[int] = set()

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(self.dropout(images.flatten(1)))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.seen |= set(batch.index.tolist())
        return F.cross_entropy(self(batch.input), batch.label)

    def on_train_end(self) -> None:
        PixelModel.trained.append(self.seen)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=self.lr)


class GuardedDigits(DigitsDataModule):
    """Digits whose loaders of other splits nobody may ask for."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"augmentation": "none", "image_size": 8, "batch_size": 32, **settings})

    def val_dataloader(self) -> Any:
        raise AssertionError("validation was read")

    def test_dataloader(self) -> Any:
        raise AssertionError("the test split was read")


def make_pixel_model(data: Any) -> PixelModel:
    return PixelModel(data.num_classes)


make_trainer = partial(Trainer, max_epochs=4, accelerator="cpu")
quick_trainer = partial(Trainer, max_epochs=1, accelerator="cpu")


def flipped_digits(**settings: Any) -> tuple[GuardedDigits, Tensor]:
    """Digits of which a tenth have another label, and the numbers of those."""
    data = GuardedDigits(**settings)
    index, label = data.train_index, data.arrays.label.clone()
    draw = torch.Generator().manual_seed(0)
    chosen = index[torch.randperm(len(index), generator=draw)[: round(FLIPPED * len(index))]]
    label[chosen] = (label[chosen] + torch.randint(1, 10, (len(chosen),), generator=draw)) % 10
    data.reassign(label=label)
    return data, chosen


@pytest.fixture(autouse=True)
def forget() -> None:
    PixelModel.trained.clear()


@pytest.fixture(scope="module")
def cleaned(tmp_path_factory: pytest.TempPathFactory) -> tuple[GuardedDigits, Tensor, CleaningResult]:
    """Digits, the numbers of the flipped ones, and their verdicts."""
    data, flipped = flipped_digits()
    return data, flipped, clean_labels(make_pixel_model, data, make_trainer, folds=4, report=None)


# The rules


@pytest.mark.parametrize(("folds", "sizes"), [(2, [7, 5]), (4, [40, 3, 1, 9]), (5, [1, 1, 1, 1, 1]), (3, [2, 100])])
def test_folds_are_even_in_every_class(folds: int, sizes: list[int]) -> None:
    label = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    label = label[torch.randperm(len(label))]
    fold = assign_folds(label, folds, seed=3)
    assert torch.equal(fold, assign_folds(label, folds, seed=3))
    for members in (torch.ones_like(label, dtype=torch.bool), *(label == cls for cls in range(len(sizes)))):
        counts = fold[members].bincount(minlength=folds)
        assert counts.max() - counts.min() <= 1
    if len(label) > 20:
        assert not torch.equal(fold, assign_folds(label, folds, seed=4))
        assert (fold.diff() == 1).float().mean() < 0.7  # at random, not in turn


def test_fusion_is_the_softmax_of_the_weighted_mean() -> None:
    logits, weights = torch.randn(3, 2, 5, 4) * 3, torch.rand(3, 2)
    for given in (None, weights, weights.double(), torch.tensor([[0, 2], [1, 0], [0, 0]])):
        found = fuse(logits, given)
        for n in range(5):
            total = [0.0] * 4
            for m in range(3):
                for v in range(2):
                    weight = 1 / 6 if given is None else float(given[m, v]) / float(given.sum())
                    for c in range(4):
                        total[c] += weight * float(logits[m, v, n, c])
            powers = [math.exp(value) for value in total]
            assert found[n].tolist() == pytest.approx([power / sum(powers) for power in powers], abs=1e-5)
    assert fuse(logits.bfloat16()).dtype == torch.float32
    assert fuse(logits.double()).dtype == torch.float64
    # Numbers that every output of a member shares say nothing.
    assert torch.allclose(fuse(logits + torch.randn(3, 2, 5, 1)), fuse(logits), atol=1e-5)
    for wrong in (weights.T, -weights, weights * 0, weights * float("nan")):
        with pytest.raises(ValueError, match="weights must"):
            fuse(logits, wrong)
    with pytest.raises(ValueError, match=r"\(models, views, N, C\)"):
        fuse(logits[0])


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.6, 1.0])
@pytest.mark.parametrize("min_flags", [None, 1, 2, 3])
def test_verdicts_equal_naive_loops(threshold: float, min_flags: int | None) -> None:
    rounds, number, classes = 4, 60, 3
    probabilities = torch.randn(rounds, number, classes).softmax(dim=-1)
    probabilities[torch.rand(rounds, number) < 0.3] = float("nan")
    probabilities[:, 0] = float("nan")  # nobody votes
    probabilities[:3, 1], probabilities[3, 1] = float("nan"), torch.tensor([0.4, 0.4, 0.2])  # a tie
    probabilities[0, 2:4] = torch.rand(2, classes).softmax(dim=-1)
    label = torch.randint(classes, (number,))
    label[1] = 1
    votes, table = label_votes(probabilities, label, threshold), judge_labels(probabilities, label, threshold, min_flags)
    for n in range(number):
        said, flags, given = [], 0, int(label[n])
        for r in range(rounds):
            values = probabilities[r, n].tolist()
            predicted = not any(map(math.isnan, values))
            doubts = predicted and (max(values) > values[given] or values[given] < threshold)
            assert (bool(votes.predicted[r, n]), bool(votes.flagged[r, n])) == (predicted, doubts)
            said += [values] if predicted else []
            flags += doubts
        assert (int(table.flags[n]), int(table.votes[n])) == (int(votes.flags[n]), int(votes.votes[n])) == (flags, len(said))
        if not said:
            assert not table.review[n]
            assert int(table.proposed[n]) == given
            assert table.given_probability[n].isnan()
            continue
        limit = len(said) // 2 + 1 if min_flags is None else min(min_flags, len(said))
        assert bool(table.review[n]) == (flags >= limit)
        mean = [sum(values[c] for values in said) / len(said) for c in range(classes)]
        proposed = given if mean[given] == max(mean) else mean.index(max(mean))
        assert int(table.proposed[n]) == proposed
        assert float(table.given_probability[n]) == pytest.approx(mean[given], abs=1e-6)
        assert float(table.proposed_probability[n]) == pytest.approx(mean[proposed], abs=1e-6)


def test_rules_refuse_what_they_cannot_judge() -> None:
    even, label = torch.full((2, 3, 2), 0.5), torch.tensor([0, 1, 1])
    for arguments, message in (
        ((even, label[:2]), r"\(rounds, N, C\)"),
        ((even, label, 1.5), r"threshold must lie in \[0, 1\], got 1.5"),
        ((even, label + 1), "labels must lie in 0 to 1, got 1 to 2"),
        ((even, label - 1), "labels must lie in 0 to 1, got -1 to 0"),
    ):
        with pytest.raises(ValueError, match=message):
            label_votes(*arguments)
    for limit in (0, 3):
        with pytest.raises(ValueError, match=f"min_flags must lie in 1 to 2, as many votes as a label gets, got {limit}"):
            judge_labels(even, label, min_flags=limit)


# The rounds


@pytest.mark.parametrize("scheme", ["train_on_one", "leave_one_out"])
def test_a_round_sees_its_part_alone_and_leaves_no_trace(scheme: Any) -> None:
    data, _ = flipped_digits()
    before, state = data.arrays, (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate())
    os.environ["PL_GLOBAL_SEED"] = "17"
    handler = signal.getsignal(signal.SIGINT)
    result = clean_labels(make_pixel_model, data, quick_trainer, folds=3, scheme=scheme, num_models=2, report=None)
    assert torch.equal(result.index, data.train_index)
    assert torch.equal(result.label, data.train_label)
    assert len(PixelModel.trained) == 6
    for number in range(3):
        part = result.fold == number if scheme == "train_on_one" else result.fold != number
        for seen in PixelModel.trained[2 * number : 2 * number + 2]:  # the incomplete last batch is dropped
            assert seen <= set(result.index[part].tolist())
            assert len(seen) > 0.9 * int(part.sum())
        assert torch.equal(result.probabilities[number].isnan().all(dim=1), part)
    assert result.table.votes.unique().tolist() == [2 if scheme == "train_on_one" else 1]
    assert torch.equal(data.arrays.split, before.split)
    assert torch.equal(data.arrays.label, before.label)
    assert data.trainer is None
    assert os.environ["PL_GLOBAL_SEED"] == "17"
    assert signal.getsignal(signal.SIGINT) is handler
    assert torch.equal(torch.get_rng_state(), state[0])
    assert (np.random.get_state()[1] == state[1]).all()
    assert random.getstate() == state[2]


def precision_and_recall(found: Tensor, index: Tensor, flipped: Tensor) -> tuple[float, float]:
    wrong = torch.isin(index, flipped)
    return float(wrong[found].float().mean()), float(found[wrong].float().mean())


def test_flipped_labels_are_found(cleaned: tuple[GuardedDigits, Tensor, CleaningResult]) -> None:
    _, flipped, result = cleaned
    precision, recall = precision_and_recall(result.review, result.index, flipped)
    assert precision > 4 * FLIPPED
    assert recall > 0.9
    # What is proposed for them is mostly what they were.
    true = DigitsDataModule(image_size=8).arrays.label[result.index]
    found = result.review & torch.isin(result.index, flipped)
    assert (result.table.proposed[found] == true[found]).float().mean() > 0.8
    issues = find_issues(mean_probabilities(result.probabilities), result.label)
    precision, recall = precision_and_recall(issues, result.index, flipped)
    assert precision > 5 * FLIPPED
    assert recall > 0.6


def test_the_other_scheme_and_cleanlab_find_them_too() -> None:
    data, flipped = flipped_digits()
    settings: dict[str, Any] = {"folds": 4, "scheme": "leave_one_out", "report": None}
    result = clean_labels(make_pixel_model, data, make_trainer, filter_by="prune_by_noise_rate", **settings)
    assert torch.equal(result.review, find_issues(mean_probabilities(result.probabilities), result.label))
    for found, least in ((result.review, 6), (result.table.review, 4)):
        precision, recall = precision_and_recall(found, result.index, flipped)
        assert precision > least * FLIPPED
        assert recall > 0.8


def test_cleanlab_judges_what_was_predicted() -> None:
    probabilities, label = torch.randn(80, 4).softmax(dim=1), torch.randint(3, (80,))
    probabilities[::9] = float("nan")
    known = ~probabilities.isnan().any(dim=1)
    from cleanlab.filter import find_label_issues

    dense = probabilities[known][:, :3].double().numpy()  # no sample is labelled as of class 3
    expected = find_label_issues(label[known].numpy(), dense / dense.sum(1, keepdims=True), filter_by="both", n_jobs=1)
    found = find_issues(probabilities, label, "both")
    assert found[known].tolist() == expected.tolist()
    assert not found[~known].any()


def interrupting(after: int, error: type[BaseException]) -> Callable[[Any], PixelModel]:
    """Makes models of which the one after so many breaks in the middle of its training."""

    class Breaking(PixelModel):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            if len(PixelModel.trained) == after and batch_idx == 3:
                raise error
            return super().training_step(batch, batch_idx)

    return lambda data: Breaking(data.num_classes)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_what_was_trained_is_not_trained_again(error: type[BaseException], tmp_path: Path) -> None:
    data, _ = flipped_digits()
    split, settings = data.arrays.split, {"folds": 3, "num_models": 2, "report": None}
    whole = clean_labels(make_pixel_model, data, quick_trainer, **settings)
    PixelModel.trained.clear()
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(error):
        clean_labels(interrupting(2, error), data, quick_trainer, tmp_path, **settings)
    assert signal.getsignal(signal.SIGINT) is handler
    assert torch.equal(data.arrays.split, split)
    (tmp_path / "predictions" / "round_1_model_2.npz").write_bytes(b"damaged")
    lines: list[str] = []
    resumed = clean_labels(make_pixel_model, data, quick_trainer, tmp_path, folds=3, num_models=2, report=lines.append)
    assert len(PixelModel.trained) == 2 + 5
    assert lines[0] == "1 of 6 models were trained before"
    assert lines[1].startswith("round 1 of 3, model 2 of 2: trained on 432 samples, agrees with ")
    for found, expected in zip(resumed.table, whole.table, strict=True):
        assert torch.equal(found, expected)

    def never(data: Any) -> PixelModel:
        raise AssertionError("trained again")

    again = clean_labels(never, data, quick_trainer, tmp_path, min_flags=1, filter_by="both", **settings)
    assert torch.equal(again.probabilities.nan_to_num(), whole.probabilities.nan_to_num())
    # Of more models, only the new ones are trained.
    PixelModel.trained.clear()
    clean_labels(make_pixel_model, data, quick_trainer, tmp_path, folds=3, num_models=3, report=None)
    assert len(PixelModel.trained) == 3


def test_a_folder_of_other_settings_or_data_is_refused(tmp_path: Path) -> None:
    data, _ = flipped_digits()
    clean = partial(clean_labels, make_pixel_model, data, quick_trainer, tmp_path, report=None)
    clean(folds=2, recipe={"epochs": 1})
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for settings, message in (
        ({"folds": 3, "recipe": {"epochs": 1}}, "made with folds 2, now it is 3: give the same settings, or another output folder"),
        ({"folds": 2, "recipe": {"epochs": 2}}, "made with epochs 1, now it is 2: "),
        ({"folds": 2, "recipe": {"epochs": 1}, "seed": 1, "scheme": "leave_one_out"}, "leave_one_out \\(and 1 more\\)"),
    ):
        with pytest.raises(ValueError, match=message):
            clean(**settings)
    label = data.arrays.label.clone()
    label[data.train_index[5]] = (label[data.train_index[5]] + 1) % 10
    data.reassign(label=label)
    with pytest.raises(ValueError, match="was made of other samples or labels: give another output folder"):
        clean(folds=2, recipe={"epochs": 1})
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_settings_bind_nobody_before_there_is_a_prediction_and_in_any_order(tmp_path: Path) -> None:
    data, _ = flipped_digits()
    clean = partial(clean_labels, datamodule=data, output=tmp_path, folds=2, report=None)
    with pytest.raises(MemoryError):
        clean(interrupting(0, MemoryError), make_trainer=quick_trainer, recipe={"lr": 1, "epochs": 1})
    assert (tmp_path / "settings.json").is_file()
    clean(make_pixel_model, make_trainer=quick_trainer, recipe={"lr": 2, "epochs": 1})
    assert json.loads((tmp_path / "settings.json").read_text())["lr"] == 2
    PixelModel.trained.clear()
    clean(make_pixel_model, make_trainer=quick_trainer, recipe={"epochs": 1, "lr": 2})
    assert PixelModel.trained == []


@pytest.mark.slow
def test_processes_change_nothing() -> None:
    data, _ = flipped_digits()
    one, two = (clean_labels(make_pixel_model, data, quick_trainer, folds=2, jobs=jobs, report=None) for jobs in (1, 2))
    assert torch.equal(one.probabilities.nan_to_num(), two.probabilities.nan_to_num())


def test_views_are_the_augmentation_of_the_data_with_keys_of_their_own() -> None:
    shift = ImageAugmentation(padding=1)
    data, _ = flipped_digits(augmentation=shift, views=2)
    made: list[PixelModel] = []

    class OneView(PixelModel):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            return super().training_step(batch._replace(input=batch.input[:, 0]), batch_idx)

    def make(data: Any) -> PixelModel:
        made.append(OneView(data.num_classes))
        return made[-1]

    clean = partial(clean_labels, make, data, quick_trainer, folds=2, num_models=1, seed=5, report=None)
    weights = torch.tensor([[1.0, 0.0, 3.0]])
    result = clean(views=3, weights=weights)
    trained = made[1:]  # the first one was only tried out
    plain = GuardedDigits(augmentation=shift)
    for number, model in enumerate(trained):
        index = result.index[result.fold != number]
        logits = []
        for view in range(3):
            batch = Batch(data.arrays.input[index], data.arrays.label[index], index, None, fold_in(5, 23, view, index))
            with torch.no_grad():
                logits.append(model.eval()(plain.transform(batch).input))
        expected = ((logits[0] + 3 * logits[2]) / 4).softmax(dim=1)
        assert torch.allclose(result.probabilities[number][result.fold != number], expected, atol=1e-5)
    assert not torch.equal(logits[0], logits[2])


# What a data set may look like


def test_unlabelled_samples_and_other_splits_are_left_out() -> None:
    data, _ = flipped_digits()
    label = data.arrays.label.clone()
    unknown = data.train_index[::10]
    label[unknown] = -1
    data.reassign(label=label)
    lines: list[str] = []
    result = clean_labels(make_pixel_model, data, quick_trainer, folds=2, splits=("train", "val"), report=lines.append)
    expected = ((data.arrays.split <= 1) & (label >= 0)).nonzero().squeeze(1)
    assert torch.equal(result.index, expected)
    assert lines[0] == "130 of 1,438 train and val samples have no label and are left out"
    assert set.union(*PixelModel.trained) <= set(expected.tolist())


@pytest.mark.parametrize(("scheme", "expected"), [("train_on_one", [1, 1, 2]), ("leave_one_out", [1, 1, 1])])
def test_rounds_say_nothing_of_classes_that_they_lack(scheme: Any, expected: list[int], tmp_path: Path) -> None:
    data, _ = flipped_digits()
    label, split = data.arrays.label.clone(), data.arrays.split.clone()
    split[:] = 3
    for cls in range(3):  # 2 samples of class 0 and 1, many of class 2
        split[(data.arrays.label == cls).nonzero().squeeze(1)[: 2 if cls < 2 else 40]] = 0
    data.reassign(split=split)
    lines: list[str] = []
    result = clean_labels(make_pixel_model, data, quick_trainer, folds=3, scheme=scheme, report=lines.append)
    for cls in range(3):
        assert result.table.votes[result.label == cls].unique().tolist() == [expected[cls]]
    small = "2 of 3 classes have fewer samples than 3: 0 (2), 1 (2); rounds that train without a class say nothing about its labels"
    assert any(line.startswith(small) for line in lines) == (scheme == "train_on_one")

    split[(label == 0).nonzero().squeeze(1)[1:]] = 3  # one sample is left of class 0
    data.reassign(split=split)
    result = clean_labels(make_pixel_model, data, quick_trainer, folds=3, scheme="leave_one_out", report=None)
    alone = result.label == 0
    assert int(result.table.votes[alone]) == 0
    assert not result.review[alone]
    summary = write_tables(tmp_path, result)
    assert summary["unjudged"] == 1
    rows = json.loads((tmp_path / "labels.json").read_text())
    assert [row["verdict"] for row in rows if row["given"] == "0"] == ["unjudged"]
    assert [row["given_probability"] for row in rows if row["given"] == "0"] == [None]


def unlabelled(data: GuardedDigits) -> None:
    data.reassign(label=torch.full_like(data.arrays.label, -1))


def one_class(data: GuardedDigits) -> None:
    data.reassign(label=torch.zeros_like(data.arrays.label))


def pairs(data: GuardedDigits) -> None:
    """Two samples of each class."""
    split = torch.full_like(data.arrays.split, 3)
    for cls in range(10):
        split[(data.arrays.label == cls).nonzero().squeeze(1)[:2]] = 0
    data.reassign(split=split)


@pytest.mark.parametrize(
    ("settings", "change", "message"),
    [
        ({"folds": 1}, None, "there must be at least 2 folds, got 1"),
        ({"folds": 2000}, None, "1295 samples cannot be dealt out to 2000 folds: use fewer folds"),
        ({"scheme": "both"}, None, "scheme must be one of train_on_one, leave_one_out; got 'both'"),
        ({"views": 2}, None, "2 views would be alike, as GuardedDigits does not augment"),
        ({"jobs": 0}, None, "jobs must be at least 1, got 0"),
        ({"weights": torch.ones(2, 1)}, None, r"weights must have shape \(models, views\) = \(1, 1\), got \(2, 1\)"),
        ({"threshold": 2.0}, None, r"threshold must lie in \[0, 1\], got 2.0"),
        ({"min_flags": 5}, None, "min_flags must lie in 1 to 4, as many votes as a label gets, got 5"),
        ({"min_flags": 2}, pairs, "min_flags must lie in 1 to 1, as many votes as a label gets, got 2"),
        ({"filter_by": "best"}, None, "cleanlab has no filter 'best'; there are: prune_by_noise_rate, prune_by_class, both"),
        ({"splits": ("training",)}, None, "splits must be of train, val, test; got training"),
        ({}, unlabelled, "none of the 1,295 train samples of GuardedDigits has a label: there is nothing to clean"),
        ({}, one_class, "all 1,295 labelled train samples are of the class 0: cleaning needs at least 2 classes"),
    ],
)
def test_mistakes_are_told_before_anything_is_trained(
    settings: dict[str, Any], change: Callable[[Any], None] | None, message: str, tmp_path: Path
) -> None:
    data = GuardedDigits()
    if change is not None:
        change(data)
    with pytest.raises(ValueError, match=message):
        clean_labels(make_pixel_model, data, quick_trainer, tmp_path / "new", report=None, **settings)
    assert PixelModel.trained == []
    assert not (tmp_path / "new").exists()


def test_models_that_cannot_judge_are_refused(tmp_path: Path) -> None:
    data = GuardedDigits()
    with pytest.raises(
        ValueError,
        match=r"PixelModel does not classify samples of GuardedDigits: its forward must give logits \(2, 10\) of 2 samples, got \(2, 7\)",
    ):
        clean_labels(lambda data: PixelModel(7), data, quick_trainer, tmp_path, report=None)
    assert PixelModel.trained == []

    class Diverging(PixelModel):
        def on_train_end(self) -> None:
            self.linear.bias.data[3] = float("nan")

    with pytest.raises(ValueError, match="model 1 of round 1 gives outputs that are not finite: its training diverged"):
        clean_labels(lambda data: Diverging(), data, quick_trainer, tmp_path, report=None)
    assert list(tmp_path.glob("predictions/*")) == []


def test_a_model_that_must_be_fitted_first_can_judge(tmp_path: Path) -> None:
    """Such as one of nearest neighbours."""

    class Fitted(PixelModel):
        fitted = False

        def on_fit_start(self) -> None:
            self.fitted = True

        def forward(self, images: Tensor) -> Tensor:
            if not self.fitted:
                raise ValueError("call fit first")
            return super().forward(images)

    data = GuardedDigits()
    before = data.arrays.split
    result = clean_labels(lambda data: Fitted(), data, quick_trainer, tmp_path, folds=2, report=None)
    assert [len(seen) for seen in PixelModel.trained[:2]] == [32, 640], "one batch to try it out"
    assert result.table.votes.tolist() == [1] * 1295
    assert torch.equal(data.arrays.split, before)

    class Other(PixelModel):
        def forward(self, images: Tensor, label: Tensor) -> Tensor:  # type: ignore[override]  # what is tested
            return super().forward(images)

        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            return F.cross_entropy(self(batch.input, batch.label), batch.label)

    with pytest.raises(ValueError, match=r"Other does not classify samples of GuardedDigits: .* missing 1 required positional argument"):
        clean_labels(lambda data: Other(), data, quick_trainer, tmp_path / "other", report=None)
    assert not (tmp_path / "other").exists()


def test_without_cleanlab_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any, **named: Any) -> Any:
        if name.startswith("cleanlab"):
            raise ImportError("No module named 'cleanlab'")
        return real(name, *arguments, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r'the filter both needs the package cleanlab \(.*\): pip install "litzoo\[clean\]"'):
        cleaning.find_issues(torch.rand(4, 2), torch.tensor([0, 1, 0, 1]), "both")


# The verdicts


def test_tables_hold_every_sample(cleaned: tuple[GuardedDigits, Tensor, CleaningResult], tmp_path: Path) -> None:
    data, _, result = cleaned
    files = [f"{number},\n.png" for number in range(len(data.arrays.label))]
    summary = write_tables(tmp_path, result, files)
    with (tmp_path / "labels.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["index"]) for row in rows] == result.index.tolist()
    for place in (0, 7, len(rows) - 1):
        row, table = rows[place], result.table
        assert row["file"] == files[result.index[place]]
        assert (row["given"], row["proposed"]) == (str(int(result.label[place])), str(int(table.proposed[place])))
        assert float(row["given_probability"]) == pytest.approx(float(table.given_probability[place]), abs=1e-5)
        assert (int(row["flags"]), int(row["votes"])) == (int(table.flags[place]), int(table.votes[place]))
        assert row["verdict"] == ("review" if result.review[place] else "clean")
    assert [{key: str(value) for key, value in row.items()} for row in json.loads((tmp_path / "labels.json").read_text())] == rows
    matrix = np.zeros((10, 10), dtype=int)
    for row in rows:
        matrix[int(row["given"]), int(row["proposed"] if row["verdict"] == "review" else row["given"])] += 1
    assert summary["noise_matrix"] == matrix.tolist()
    assert summary == json.loads((tmp_path / "summary.json").read_text())
    assert [each["samples"] for each in summary["classes"]] == data.class_counts


def page_data(path: Path) -> dict[str, Any]:
    text = path.read_text()
    return json.loads(text.partition('id="data">')[2].partition("</script>")[0])


def test_the_page_shows_the_most_certain_first(cleaned: tuple[GuardedDigits, Tensor, CleaningResult], tmp_path: Path) -> None:
    data, _, result = cleaned
    number = int(result.review.sum())
    files = [f"</script><b>{number}.png" for number in range(len(data.arrays.label))]
    assert write_review(tmp_path / "all.html", result, data, files) == number
    assert write_review(tmp_path / "some.html", result, data, files, show=5, title="<digits>") == 5
    items = page_data(tmp_path / "all.html")["items"]
    assert {item["index"] for item in items} == set(result.index[result.review].tolist())
    certainty = [(item["flags"] / item["votes"], item["proposed_probability"] - item["given_probability"]) for item in items]
    assert all(now[0] > then[0] or (now[0] == then[0] and now[1] >= then[1] - 0.11) for now, then in pairwise(certainty))
    assert page_data(tmp_path / "some.html")["items"] == items[:5]
    text = (tmp_path / "some.html").read_text()
    assert "&lt;digits&gt;" in text
    assert f"The first 5 are shown, {number - 5:,} more are in labels.csv." in text
    assert text.count("</script>") == 2
    assert "http" not in text
    with pytest.raises(ValueError, match="show must be at least 1, got 0"):
        write_review(tmp_path / "none.html", result, data, show=0)


def test_decisions_of_the_page_are_read(tmp_path: Path) -> None:
    path = tmp_path / "decisions.csv"
    path.write_bytes('\ufeffindex,file,given,proposed,decision\r\n7,"a, b",cat,dog,accept\r\n9,,dog,cat,keep\r\n11,,dog,cat,\r\n'.encode())
    assert read_decisions(path, ["cat", "dog"]) == {7: 1, 9: None}
    path.write_text("index,proposed,decision\n1, dog,accept\n2,dog ,accept\n3, cat , keep \n")
    assert read_decisions(path, ["cat", "dog", " dog"]) == {1: 2, 2: 1, 3: None}  # a folder may be called " dog"
    for content, message in (
        ("index,decision\n", "has no column proposed: it needs index, proposed and decision"),
        ("index,proposed,decision\n7,owl,accept\n", "line 2: there is no class 'owl'; there are: cat, dog"),
        ("index,proposed,decision\n7,dog,yes\n", "line 2: a decision is accept or keep, not yes"),
        ("index,proposed,decision\n-1,dog,accept\n", "line 2: the index is the number of a sample, not '-1'"),
        ("index,proposed,decision\n7\n", None),
    ):
        path.write_text(content)
        if message is None:
            assert read_decisions(path, ["cat", "dog"]) == {}
            continue
        with pytest.raises(ValueError, match=message):
            read_decisions(path, ["cat", "dog"])
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is not a CSV file in UTF-8"):
        read_decisions(path, ["cat"])
    with pytest.raises(ValueError, match="there is no file"):
        read_decisions(tmp_path / "none.csv", ["cat"])


def test_verdicts_become_labels(cleaned: tuple[GuardedDigits, Tensor, CleaningResult]) -> None:
    data, _, result = cleaned
    before = data.arrays.label.clone()
    label, kept = apply_verdicts(before, result, "relabel")
    assert kept.all()
    doubted = result.index[result.review]
    assert torch.equal(label[doubted], result.table.proposed[result.review])
    label[doubted] = before[doubted]
    assert torch.equal(label, before)
    label, kept = apply_verdicts(before, result, "drop")
    assert torch.equal((~kept).nonzero().squeeze(1), doubted)
    assert torch.equal(label, before)
    first, second, third = result.index[:3].tolist()
    label, kept = apply_verdicts(before, result, "relabel", {first: 4, second: None})
    assert [int(label[first]), int(label[second])] == [4, int(before[second])]
    assert int((label != before).sum()) == int(before[first] != 4)
    assert int((~apply_verdicts(before, result, "drop", {first: 4, second: None})[1]).sum()) == 1
    test = int((data.arrays.split == 2).nonzero()[0])
    with pytest.raises(ValueError, match=f"there is a decision on sample {test}, which was not judged"):
        apply_verdicts(before, result, "relabel", {test: 1, third: 2})


# The copy


def test_images_are_written_as_they_are_read(tmp_path: Path) -> None:
    data, path = DigitsDataModule(image_size=8), tmp_path / "digits.h5"
    label, kept = data.arrays.label.clone(), torch.ones(1797, dtype=torch.bool)
    split = data.arrays.split.clone()
    split[3:7], split[11] = torch.tensor([0, 1, 2, 0]), 3
    label[3], label[5], label[6], kept[7] = 9, -1, -1, False  # of images without a label, those that train are read
    data.reassign(split=split)
    files = [f"é{number}.png" for number in range(1797)]
    assert write_hdf5(path, data.arrays, label, kept, files) == 1794
    copy = HDF5ImagesDataModule(path)
    stays = torch.tensor([number for number in range(1797) if number not in (5, 7, 11)])
    assert torch.equal(copy.arrays.input, data.arrays.input[stays])
    assert torch.equal(copy.arrays.label, label[stays])
    assert torch.equal(copy.arrays.split, split[stays])
    assert copy.class_names == data.class_names
    with h5py.File(path, "r") as file:
        assert file["index"][:].tolist() == stays.tolist()
        assert file["file"].asstr()[4] == "é4.png"
    before = path.read_bytes()
    with pytest.raises(ValueError, match="exists already and is not overwritten: give another name"):
        write_hdf5(path, data.arrays)
    assert path.read_bytes() == before
    for name, message in (("digits.zip", r"ends in .h5 or .hdf5"), ("nowhere/digits.h5", "there is no folder")):
        with pytest.raises(ValueError, match=message):
            write_hdf5(tmp_path / name, data.arrays)
    with pytest.raises(ValueError, match="no sample with a label is left to write"):
        write_hdf5(tmp_path / "none.h5", data.arrays, kept=torch.zeros(1797, dtype=torch.bool))
    with pytest.raises(ValueError, match="are neither images nor point clouds"):
        write_hdf5(tmp_path / "patients.h5", PatientsDataModule().arrays)
    assert [each.name for each in tmp_path.iterdir()] == ["digits.h5"]


def test_clouds_are_written_as_they_are_read(points_file: Callable[..., Path], tmp_path: Path) -> None:
    for number, data in enumerate((HDF5PointsDataModule(points_file(parts=True)), FurnitureDataModule())):
        path = tmp_path / f"copy_{number}.h5"
        assert write_hdf5(path, data.arrays) == len(data.arrays.label)
        copy = HDF5PointsDataModule(path)
        for name in ("input", "label", "split"):
            assert torch.equal(getattr(copy.arrays, name), getattr(data.arrays, name))
        assert (copy.class_names, copy.part_names) == (data.class_names, data.part_names)
        if data.arrays.part is not None:
            assert torch.equal(copy.arrays.part.long(), data.arrays.part.long())
