"""A training whose data have no validation split is refused before its callbacks are set up, unless it does not validate."""

from pathlib import Path
from typing import Any

import pytest
import torch
from contract import Probe, trainer
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader

from litzoo.datamodules import DataError, DigitsDataModule
from litzoo.datamodules.arrays import TRAIN, VAL


def without_validation(data: DigitsDataModule) -> DigitsDataModule:
    data.reassign(split=torch.where(data.arrays.split == VAL, TRAIN, data.arrays.split))
    return data


class _Elsewhere(DigitsDataModule):
    """Validates on other data."""

    def val_dataloader(self) -> DataLoader[Any]:  # type: ignore[override]  # another loader than the base promises is the point
        return self.test_dataloader()


class _NotReached(Callback):
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        pytest.fail("callbacks were set up")


def test_it_is_refused_at_once(tmp_path: Path) -> None:
    settings = {"limit_train_batches": 1, "callbacks": [_NotReached()]}
    with pytest.raises(DataError, match=r"DigitsDataModule: the val split is empty; raise --data\.val_fraction, or train without"):
        trainer(tmp_path, **settings).fit(Probe(10), datamodule=without_validation(DigitsDataModule()))


@pytest.mark.parametrize(("data", "limit"), [(DigitsDataModule, 0), (_Elsewhere, 1)])
def test_without_validation_or_with_another_one(data: type[DigitsDataModule], limit: int, tmp_path: Path) -> None:
    model = Probe(10)
    trainer(tmp_path, limit_train_batches=1, max_epochs=1, limit_val_batches=limit).fit(model, datamodule=without_validation(data()))
    assert len(model.train_seen) == 1
