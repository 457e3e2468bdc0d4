"""The mean over the samples of an epoch and of all processes, in Lightning's log."""

from lightning.pytorch import LightningModule
from torch import Tensor


def log_epoch_mean(module: LightningModule, name: str, value: Tensor, count: int, prog_bar: bool = False) -> None:
    """Log sum_b count_b value_b / sum_b count_b, b = the batches of the epoch in all processes.

    Args:
        module: in its validation or test step.
        name: such as "val/loss".
        value: mean over the samples of the batch, a scalar.
        count: samples in the batch.
        prog_bar: whether the progress bar shows it.

    Example:
        >>> log_epoch_mean(self, "val/loss", F.cross_entropy(logits, label), len(label))
    """
    # Lightning divides the sum of integer counts by the number of processes and drops the remainder.
    module.log(name, value, prog_bar=prog_bar, batch_size=float(count), sync_dist=True)  # type: ignore[arg-type]  # as a float, none is lost
