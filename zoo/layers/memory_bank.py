"""A memory bank: one feature of every training sample, remembered from the last time that it was seen."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MemoryBank(nn.Module):
    """One row v_i of length one for each sample of a data set, updated as v_i <- normalise(m v_i + (1 - m) f_i).

    A row starts as a random direction, and the first feature of its sample replaces it (in the published code, half of the random
    direction stays, and fades over the first epochs).

    The rows are no buffer: DDP would broadcast them over what the other processes wrote, weight averages would average
    them and exports would carry them. They are a plain tensor that follows the module to its device, in float32 (float64
    in a float64 module), and travel in a checkpoint as extra state. Every process holds the same rows: `stage` gathers
    features and their rows over all of them, `commit` writes them, which is best done after the step.

    Until `start` the bank is empty, so a model that is only used costs no memory for it.

    Args:
        dimensions: D, of a feature.
        momentum: m in [0, 1): 0 replaces a row, as the paper writes it; the authors' code has 0.5.

    Raises:
        ValueError: if a setting is out of range.

    Example:
        >>> bank = MemoryBank(128)
        >>> bank.start(torch.arange(50_000))
        >>> bank.write(torch.tensor([7, 3]), torch.rand(2, 128))

    Source:
        Wu, Xiong, Yu & Lin, "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", CVPR 2018, section
        3.1, and its published code.
    """

    def __init__(self, dimensions: int, momentum: float = 0.5) -> None:
        super().__init__()
        if dimensions < 1:
            raise ValueError(f"a memory bank needs at least one dimension, got {dimensions}")
        if not 0 <= momentum < 1:
            raise ValueError(f"the bank's momentum must lie in [0, 1), got {momentum}")
        self.dimensions = dimensions
        self.momentum = momentum
        self.rows = torch.empty(0, dimensions)
        self._samples = torch.empty(0, dtype=torch.int64)
        self._written = torch.empty(0, dtype=torch.bool)
        # Of the data that the rows belong to; None if nobody said.
        self.fingerprint: str | None = None
        self._staged: tuple[Tensor, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def start(self, samples: Tensor, fingerprint: str | None = None, seed: int = 0) -> None:
        """Make a row for each sample: random directions, the same in every process.

        Args:
            samples: `(N,)` int64, the samples' numbers in their data set, ascending.
            fingerprint: of the data.
            seed: of the directions.

        Raises:
            ValueError: if the numbers do not ascend.
        """
        if samples.dim() != 1 or not bool((samples.diff() > 0).all()):
            raise ValueError("the samples of a memory bank must be ascending numbers, each once")
        generator = torch.Generator().manual_seed(seed)
        rows = F.normalize(torch.randn(len(samples), self.dimensions, generator=generator))
        self.rows = rows.to(self.rows)
        self._samples = samples.to(self.rows.device)
        self._written = torch.zeros(len(samples), dtype=torch.bool, device=self.rows.device)
        self.fingerprint = fingerprint
        self.discard()

    def fits(self, samples: Tensor, fingerprint: str | None) -> bool:
        """Whether the rows are those of these samples of these data."""
        known = None in (fingerprint, self.fingerprint) or fingerprint == self.fingerprint
        return known and torch.equal(samples.to(self._samples.device), self._samples)

    def rows_of(self, samples: Tensor) -> Tensor:
        """The numbers of samples in their data set -> the numbers of their rows.

        Raises:
            IndexError: if a sample has no row.
        """
        if len(self._samples) == 0:
            raise IndexError("the memory bank is empty: call start() first")
        samples = samples.to(self._samples)
        place = torch.searchsorted(self._samples, samples).clamp_(max=len(self._samples) - 1)
        if not torch.equal(self._samples[place], samples):
            stranger = int(samples[self._samples[place] != samples][0])
            raise IndexError(
                f"sample {stranger} has no row in the memory bank of {len(self)}: a batch must say in `index` which samples of "
                "the training data it holds"
            )
        return place

    @torch.no_grad()
    def stage(self, rows: Tensor, features: Tensor) -> None:
        """Gather the features of all processes for the next `commit`; every process must call it.

        Args:
            rows: `(B,)` int64, the rows of their samples, see `rows_of`.
            features: `(B, D)`; they need not have length one. One that is not finite leaves its row as it is.
        """
        features = F.normalize(features.detach().to(self.rows.dtype))
        if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            from torchmetrics.utilities.distributed import gather_all_tensors

            rows, features = torch.cat(gather_all_tensors(rows.contiguous())), torch.cat(gather_all_tensors(features.contiguous()))
        self._staged = rows, features

    def discard(self) -> None:
        """Forget what was staged: a step that was broken off is none."""
        self._staged = None

    @property
    def is_staged(self) -> bool:
        """Whether there is something to commit."""
        return self._staged is not None

    @torch.no_grad()
    def commit(self, momentum: float | None = None) -> None:
        """Write what was staged, if anything; asks no other process.

        Where a sample comes more than once, the first feature of the lowest process counts.

        Args:
            momentum: in place of that of the bank.
        """
        if self._staged is None:
            return
        (rows, features), self._staged = self._staged, None
        rows, order = rows.sort(stable=True)
        # Every place of a sample writes what its first one does, so that nothing depends on their order, nor waits for the device.
        features = features[order[torch.searchsorted(rows, rows)]]
        sound = features.isfinite().all(dim=1, keepdim=True)
        old, written = self.rows[rows], self._written[rows, None]
        kept = written * (self.momentum if momentum is None else momentum)
        self.rows[rows] = torch.where(sound, F.normalize(kept * old + (1 - kept) * features), old)
        self._written[rows] = (written | sound).squeeze(1)

    def write(self, samples: Tensor, features: Tensor, momentum: float | None = None) -> None:
        """`rows_of`, `stage` and `commit` in one; every process must call it."""
        self.stage(self.rows_of(samples), features)
        self.commit(momentum)

    def get_extra_state(self) -> dict[str, Any]:
        self.commit()  # a checkpoint may be written between a step and its end
        return {"rows": self.rows, "samples": self._samples, "written": self._written, "fingerprint": self.fingerprint}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        rows = state["rows"]
        if rows.shape[1] != self.dimensions:
            raise ValueError(f"the saved memory bank has {rows.shape[1]} dimensions, this one has {self.dimensions}")
        self.rows = rows.to(self.rows, copy=True)
        self._samples, self._written = (state[name].to(self.rows.device, copy=True) for name in ("samples", "written"))
        self.fingerprint = state["fingerprint"]
        self.discard()

    def _apply(self, fn: Any, recurse: bool = True) -> "MemoryBank":
        super()._apply(fn, recurse)
        moved = fn(self.rows[:0])  # where to, and to what
        # An average of features in half precision would not move.
        self.rows = self.rows.to(moved.device, torch.promote_types(moved.dtype, torch.float32))
        self._samples, self._written = self._samples.to(self.rows.device), self._written.to(self.rows.device)
        return self

    def extra_repr(self) -> str:
        return f"{len(self)} rows, dimensions={self.dimensions}, momentum={self.momentum}"
