"""scripts/label_cleaning.py flips what it says, scores as scikit-learn does, and trains nothing twice."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from sklearn.metrics import precision_recall_fscore_support

from litzoo.datamodules import DigitsDataModule
from litzoo.datamodules.hdf5_writing import write_hdf5


@pytest.fixture(scope="module")
def script(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("label_cleaning")


@pytest.mark.parametrize("kind", ["symmetric", "pair"])
def test_flips(script: ModuleType, kind: str) -> None:
    label = np.arange(1000) % 4
    flipped = script.flip_labels(label, 0.25, kind, 4, seed=1)
    wrong = flipped != label
    assert wrong.sum() == 250
    steps = np.bincount((flipped - label)[wrong] % 4, minlength=4)
    assert steps[0] == 0
    assert (steps[1:] > 50).all() if kind == "symmetric" else steps[1] == 250
    assert (script.flip_labels(label, 0.25, kind, 4, seed=1) == flipped).all()
    assert (script.flip_labels(label, 0.25, kind, 4, seed=2) != flipped).any()


def test_scores(script: ModuleType) -> None:
    flagged, flipped = torch.rand(50) < 0.4, torch.rand(50) < 0.3
    expected = precision_recall_fscore_support(flipped, flagged, average="binary")[:3]
    assert script.score(flagged, flipped) == pytest.approx((int(flagged.sum()), *expected))
    assert script.score(flagged & False, flipped) == (0, 0.0, 0.0, 0.0)


def test_a_series_goes_on(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    write_hdf5(tmp_path / "digits.h5", DigitsDataModule(image_size=16).arrays)
    options = [
        "--n",
        "80",
        "--folds",
        "2",
        "--kinds",
        "pair",
        "--rates",
        "0.2",
        "--epochs",
        "1",
        "--fold-epochs",
        "1",
        "--accelerator",
        "cpu",
    ]
    tables = []
    for seeds in (["0"], ["0", "1"]):
        command = ["label_cleaning.py", str(tmp_path / "digits.h5"), *options, "--runs", str(tmp_path / "runs"), "--seeds", *seeds]
        monkeypatch.setattr(sys, "argv", command)
        script.main()
        captured = capsys.readouterr()
        tables.append(captured.out.splitlines())
        assert captured.err.count("trained on 40 samples") == 4
    assert tables[0][1:6] == tables[1][1:6]
    assert [line[35:57].strip() for line in tables[1][1:6]] == [
        "one of K, majority",
        "one of K, all votes",
        "one of K, cleanlab",
        "K - 1 of K, vote",
        "K - 1 of K, cleanlab",
    ]
    assert tables[1][12] == "mean ± standard deviation over 2 seeds"
    assert len(tables[1]) == 19
