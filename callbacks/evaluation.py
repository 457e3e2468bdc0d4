"""What the callbacks that look at validation and test share: the hooks by which they do."""

from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer


class EvaluationObserver(Callback):
    """Base of callbacks that look at the batches of validation and test; of several evaluation loaders, the first one counts.

    A subclass says what to do in `begin`, `see` and `conclude`. The sanity check sees, so that mistakes show up, and concludes nothing.
    """

    def begin(self) -> None:
        """An evaluation starts."""

    def see(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any) -> None:
        """A batch was evaluated; `outputs` is what the step returned."""

    def conclude(self, trainer: Trainer, pl_module: LightningModule, stage: Literal["val", "test"]) -> None:
        """The evaluation is over; every process calls it."""

    def is_due(self, trainer: Trainer) -> bool:
        """Whether this validation is looked at."""
        return True

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.begin()

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.begin()

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if dataloader_idx == 0 and self.is_due(trainer):
            self.see(trainer, pl_module, outputs, batch)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if dataloader_idx == 0:
            self.see(trainer, pl_module, outputs, batch)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking and self.is_due(trainer):
            self.conclude(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.conclude(trainer, pl_module, "test")
