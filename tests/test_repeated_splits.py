"""scripts/repeated_splits.py takes what was scored before, whatever the choice goes by now."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def script(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("repeated_splits")


def test_a_scored_split_is_chosen_by_another_metric(script: ModuleType, tmp_path: Path) -> None:
    before = {"test/accuracy": 0.75, "val/loss": 0.5}
    (tmp_path / "recipe_split_1.json").write_text(json.dumps(before))
    run = tmp_path / "recipe_split_1" / "version_0"
    (run / "test_0").mkdir(parents=True)
    (run / "metrics.csv").write_text("epoch,val/loss,val/knn\n0,0.7,0.2\n1,0.5,\n2,0.6,0.9\n")
    (run / "test_0" / "metrics.csv").write_text("epoch,test/accuracy\n2,0.75\n")
    assert script.run_split("recipe", "recipe", 1, tmp_path, False, []) == before
    for _ in range(2):
        assert script.run_split("recipe", "recipe", 1, tmp_path, False, [], "val/knn") == {**before, "val/knn": 0.9}
    with pytest.raises(SystemExit, match="recipe logs no val/acc: let --chosen-by be one of val/loss, val/knn"):
        script.run_split("recipe", "recipe", 1, tmp_path, False, [], "val/acc")
