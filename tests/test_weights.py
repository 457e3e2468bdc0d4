"""Every bundled model scores on the bundled data what its card says."""

import json
from pathlib import Path

import pytest
from lightning.pytorch import Trainer

import litzoo
from litzoo.datamodules import FurnitureDataModule

INDEX = json.loads((Path(litzoo.__file__).parent / "zoo" / "weights" / "index.json").read_text(encoding="utf-8"))
DATA = {"pointnet_furniture": lambda: FurnitureDataModule(eval_points=1024)}


def test_all_are_scored() -> None:
    assert set(INDEX) == set(DATA) == set(litzoo.list_models())


@pytest.mark.parametrize("name", sorted(INDEX))
def test_scores_what_the_card_says(name: str) -> None:
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    (metrics,) = trainer.test(litzoo.load(name), DATA[name](), verbose=False)
    for metric, value in INDEX[name]["card"]["metrics"].items():
        assert metrics[f"test/{metric}"] == pytest.approx(value, abs=2e-3), metric
