"""scripts/data_selection.py: the interpolation, the table, and that what was done is not done again."""

import argparse
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest


@pytest.fixture(scope="module")
def script(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("data_selection")


def test_labels_needed(script: ModuleType) -> None:
    curve = {100: 0.5, 200: 0.6, 400: 0.55, 800: 0.8}
    assert script.labels_needed(curve, 0.4) == 100
    assert script.labels_needed(curve, 0.6) == pytest.approx(200)
    assert script.labels_needed(curve, 0.55) == pytest.approx(np.sqrt(100 * 200)), "halfway in the logarithm"
    assert script.labels_needed(curve, 0.7) == pytest.approx(np.sqrt(400 * 800)), "where it falls, the best so far counts"
    assert script.labels_needed(curve, 0.9) == np.inf


def test_the_table(script: ModuleType) -> None:
    said = {"accuracy": 0.5, "next": [1], "left_out": 0.25, "left_out_right": 1.0, "proposals_right": 0.5}
    results = [{"selected": {100: 0.5, 200: 0.7}, "random": {100: 0.5, 200: 0.6, 400: 0.7 + gain}, "rounds": [said]} for gain in (0.0, 0.1)]
    lines = script.report(results).splitlines()
    needed = [400, np.exp((np.log(200) + np.log(400)) / 2)]
    mean, error = np.mean(needed), np.std(needed, ddof=1) / np.sqrt(2)
    assert lines[2] == "| 100 | 50.00 ± 0.00 | 50.00 ± 0.00 |  |  |"
    assert lines[3] == f"| 200 | 70.00 ± 0.00 | 60.00 ± 0.00 | {mean:.0f} ± {error:.0f} | {1 - 200 / mean:.0%} |"
    assert lines[4] == "| 400 |  | 75.00 ± 5.00 |  |  |"
    assert lines[5] == "selection 1: left out 25.0 %, of those, labels right 100.0 %, in the queue, proposals right 50.0 %"
    results[0]["selected"][200] = 0.9
    assert "| not reached |  |" in script.report(results)
    assert "nan" not in script.report(results[:1])


def test_a_run_goes_on(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = argparse.Namespace(
        data="digits", batch_size=16, start=30, step=20, rounds=1, more=1, members=1, pool=50, steps=2, backbone="conv4", lr=0.01
    )
    options.views, options.threshold, options.rank, options.runs = "shifts", 0.95, "disagreement", tmp_path
    trained: list[tuple[int, int]] = []
    real = script.Experiment.train

    def train(self: Any, labelled: Any, seed: int, member: int) -> Any:
        assert len(set(labelled.tolist())) == len(labelled)
        trained.append((len(labelled), member))
        model = real(self, labelled, seed, member)
        assert self.data.train_index.tolist() == sorted(labelled.tolist()), "no other label is seen"
        return model

    monkeypatch.setattr(script.Experiment, "train", train)
    first = script.Experiment(options).run(0)
    assert trained == [(30, 0), (30, 1), (50, 0), (50, 0), (70, 0), (1438, 0)]
    assert set(first["selected"]) == {30, 50}
    assert set(first["random"]) == {30, 50, 70, 1438}
    assert len(set(first["rounds"][0]["next"])) == 20
    (tmp_path / "seed_0_random_50.json").unlink()
    trained.clear()
    assert script.Experiment(options).run(0) == first
    assert trained == [(50, 0)]
