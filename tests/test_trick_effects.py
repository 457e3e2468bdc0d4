"""scripts/trick_effects.py: the table, that every trick trains, and that what was done is not done again."""

import argparse
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest


@pytest.fixture(scope="module")
def script(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("trick_effects")


def test_effects_are_differences_of_the_same_seed(script: ModuleType) -> None:
    results = [dict.fromkeys(script.TRICKS, 0.5 + seed / 10) for seed in range(3)]
    for seed, result in enumerate(results):
        result["SAM(rho=0.05)"] += 0.01 * (1 + seed)
    lines = {line.split(" | ")[0]: line for line in script.report(results).splitlines()}
    assert lines["| plain"] == "| plain | 60.0 ± 5.8 |  |"
    accuracy = 100 * np.array([0.51, 0.62, 0.73])
    error = accuracy.std(ddof=1) / np.sqrt(3)
    assert lines["| `SAM(rho=0.05)`"] == f"| `SAM(rho=0.05)` | {accuracy.mean():.1f} ± {error:.1f} | +2.0 ± 0.6 |"
    assert lines["| `mixup: 0.2`"].endswith("| +0.0 ± 0.0 |")
    assert "nan" not in script.report(results[:1])


def test_every_trick_trains_and_is_trained_once(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = argparse.Namespace(
        data="digits", n=40, unlabelled=40, epochs=4, batch_size=20, backbone="resnet8", augmentation="none", lr=0.01
    )
    options.runs, options.precision, options.accelerator = tmp_path, "32-true", "cpu"
    trained: list[int] = []
    real = script.Experiment.train

    def train(self: Any, trick: Any, seed: int) -> Any:
        model, data, accuracy = real(self, trick, seed)
        trained.append(model.trainer.global_step)
        known = data.arrays.label[data.train_index] >= 0
        assert known.sum() == 40
        assert (~known).sum() == (40 if trick.unlabelled else 0)
        return model, data, accuracy

    monkeypatch.setattr(script.Experiment, "train", train)
    accuracy = script.Experiment(options).run(0)
    assert set(accuracy) == set(script.TRICKS)
    assert set(trained) == {8}, "every training takes the same number of steps"
    assert len(trained) == len(script.TRICKS) - 1, "views of a test train nothing"
    assert script.Experiment(options).run(0) == accuracy
    assert len(trained) == len(script.TRICKS) - 1
