"""Every bundled model whose data are bundled too scores what its card says; the others load, encode and predict."""

import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer

import litzoo
from litzoo.datamodules import FurnitureDataModule

INDEX = json.loads((Path(litzoo.__file__).parent / "zoo" / "weights" / "index.json").read_text(encoding="utf-8"))
DATA = {"pointnet_furniture": lambda: FurnitureDataModule(eval_points=1024)}
# Of images and shapes that are not ours to ship.
ENCODERS = ["instdisc_cifar10", "relational_cifar10", "supcon_cifar10"]
CLASSIFIERS = ["classifier_cifar10", "supcon_cifar10_classifier"]
SEGMENTERS = ["pointnet_seg_psb"]


def test_all_are_here() -> None:
    assert sorted(INDEX) == sorted([*DATA, *ENCODERS, *CLASSIFIERS, *SEGMENTERS]) == sorted(litzoo.list_models())


@pytest.mark.parametrize("name", DATA)
def test_scores_what_the_card_says(name: str) -> None:
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    (metrics,) = trainer.test(litzoo.load(name), DATA[name](), verbose=False)
    for metric, value in INDEX[name]["card"]["metrics"].items():
        assert metrics[f"test/{metric}"] == pytest.approx(value, abs=2e-3), metric


@pytest.mark.parametrize("name", ENCODERS)
def test_encodes_what_its_card_describes(name: str) -> None:
    model, card = litzoo.load_encoder(name), INDEX[name]["card"]
    assert card["metrics"]
    assert sum(parameter.numel() for parameter in model.parameters()) == card["params"]
    features = model.embed(torch.randint(256, (3, 3, 40, 32), dtype=torch.uint8))  # type: ignore[operator]  # `embed` of a model of unknown class
    assert features.isfinite().all()
    assert features.unique(dim=0).shape == features.shape, "different images have different features"


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_predicts_the_classes_that_it_names(name: str) -> None:
    model, card = litzoo.load(name), INDEX[name]["card"]
    assert sum(parameter.numel() for parameter in model.parameters()) == card["params"]
    assert model.class_names[:3] == ["airplane", "automobile", "bird"]
    probabilities = model.predict(torch.randint(256, (3, 3, 40, 32), dtype=torch.uint8))
    assert probabilities.shape == (3, 10)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(3))


@pytest.mark.parametrize("name", SEGMENTERS)
def test_finds_the_parts_of_other_chairs(name: str) -> None:
    model, card = litzoo.load(name), INDEX[name]["card"]
    assert sum(parameter.numel() for parameter in model.parameters()) == card["params"]
    data = FurnitureDataModule(eval_points=1024)
    data.prepare_data()
    data.setup("test")
    (batch,) = data.test_dataloader()
    chairs = batch.input[batch.label == data.class_names.index("chair")]
    height = dict.fromkeys(("leg", "support", "backsupport"), 0.0)
    found = model.predict(chairs, torch.full((len(chairs),), model.class_names.index("Chair")))
    for part in height:
        is_part = torch.stack(found) == model.part_names.index(f"Chair/{part}")
        height[part] = chairs[..., 1][is_part].mean()
    assert height["leg"] < height["support"] - 0.2 < height["backsupport"] - 0.4
