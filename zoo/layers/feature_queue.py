"""A first-in, first-out queue of features and their labels: more positives and negatives than a batch holds."""

from typing import Any

import torch
from torch import Tensor, nn


class FeatureQueue(nn.Module):
    """The last Q labelled features of a training, of length one, for a contrastive loss that compares a batch with them, too.

    It starts empty: labels -1, or rows of zeros if labels are soft, tell a loss to leave a row out. Features of earlier weights are good
    enough where an encoder changes slowly, as after its first epochs, or as an average of weights does.

    Nothing of it is a buffer: DDP would broadcast it over what the other processes wrote, weight averages would average it and
    exports would carry it. Plain tensors follow the module to its device, in float32 (float64 in a float64 module), and travel in a
    checkpoint as extra state, with the place that is written next. Every process holds the same queue: `stage` gathers features and
    labels over all of them, `commit` writes them, which is best done after the step, because the loss of a step must not find its own rows.

    Args:
        dimensions: D, of a feature.
        length: Q.
        classes: C of soft labels `(Q, C)`; None for hard ones, `(Q,)` int64.

    Raises:
        ValueError: if a setting is out of range.

    Example:
        >>> queue = FeatureQueue(128, length=8192)
        >>> queue.write(torch.rand(2, 128), torch.tensor([7, 3]))
        >>> loss = supcon_loss(z, labels, queue=queue.contents())

    Source:
        Wang, Zhang, Huang & Scott, "Cross-Batch Memory for Embedding Learning", CVPR 2020, section 3.2, with labels; He, Fan, Wu, Xie &
        Girshick, "Momentum Contrast for Unsupervised Visual Representation Learning", CVPR 2020, section 3.2.
    """

    def __init__(self, dimensions: int, length: int, classes: int | None = None) -> None:
        super().__init__()
        for name, value in (("dimensions", dimensions), ("length", length), ("classes", classes)):
            if value is not None and value < 1:
                raise ValueError(f"{name} of a feature queue must be at least 1, got {value}")
        self.dimensions = dimensions
        self.length = length
        self.classes = classes
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        # A row more than there are: what is left out is written there, so that nothing waits for the device to tell how much it is.
        self._features = torch.empty(length + 1, dimensions, dtype=dtype)
        self._labels = torch.empty(length + 1, *(() if classes is None else (classes,)), dtype=torch.int64 if classes is None else dtype)
        # Which row is written next.
        self._next = torch.zeros((), dtype=torch.int64)
        self._staged: tuple[Tensor, Tensor] | None = None
        self.clear()

    def __len__(self) -> int:
        return self.length

    def clear(self) -> None:
        """Empty the queue, for other data."""
        self._features.zero_()
        self._labels.fill_(-1 if self.classes is None else 0)
        self._next.zero_()
        self.discard()

    def contents(self) -> tuple[Tensor, Tensor]:
        """Features `(Q, D)` and labels `(Q,)` or `(Q, C)`, in no particular order, as `supcon_loss(queue=...)` takes them.

        They are views, which the next `commit` changes.
        """
        return self._features[: self.length], self._labels[: self.length]

    @torch.no_grad()
    def stage(self, features: Tensor, labels: Tensor) -> None:
        """Gather the features of all processes for the next `commit`; every process must call it, with as many rows as it has.

        Args:
            features: `(B, D)`; they need not have length one. One that is not finite, or has no direction, is left out.
            labels: `(B,)` integers, where -1 leaves a row out, or soft `(B, C)`, where a row of zeros does.

        Raises:
            ValueError: if shapes or the kind of labels do not fit.
        """
        if features.dim() != 2 or features.shape[1] != self.dimensions:
            raise ValueError(f"features for the queue must have shape (B, {self.dimensions}), got {tuple(features.shape)}")
        shape = (len(features),) if self.classes is None else (len(features), self.classes)
        if labels.shape != shape or labels.is_floating_point() != (self.classes is not None):
            kind = "integers" if self.classes is None else "probabilities"
            raise ValueError(f"labels for the queue must be {kind} of shape {shape}, got {labels.dtype} of shape {tuple(labels.shape)}")
        features = features.detach().to(self._features.dtype)
        features = features / torch.linalg.vector_norm(features, dim=1, keepdim=True)
        labels = labels.detach().to(self._labels.dtype)
        if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            from torchmetrics.utilities.distributed import gather_all_tensors

            features, labels = (torch.cat(gather_all_tensors(part.contiguous())) for part in (features, labels))
        self._staged = features, labels

    def discard(self) -> None:
        """Forget what was staged: a step that was broken off is none."""
        self._staged = None

    @property
    def is_staged(self) -> bool:
        """Whether there is something to commit."""
        return self._staged is not None

    @torch.no_grad()
    def commit(self) -> None:
        """Write what was staged, if anything, over the oldest rows; asks no other process.

        Of more than Q rows the last ones stay; those of a higher process count as later.
        """
        if self._staged is None:
            return
        (features, labels), self._staged = self._staged, None
        known = labels >= 0 if self.classes is None else labels.isfinite().all(dim=1) & (labels != 0).any(dim=1)
        # The quotient of a feature without a finite length above zero is no feature of length one.
        kept = known & features.isfinite().all(dim=1) & features.any(dim=1)
        count = kept.cumsum(dim=0)
        total = kept.sum()
        place = torch.where(kept & (count > total - self.length), (self._next + count - 1) % self.length, self.length)
        self._features[place] = features
        self._labels[place] = labels
        self._next = (self._next + total) % self.length

    def write(self, features: Tensor, labels: Tensor) -> None:
        """`stage` and `commit` in one; every process must call it."""
        self.stage(features, labels)
        self.commit()

    def get_extra_state(self) -> dict[str, Any]:
        self.commit()  # a checkpoint may be written between a step and its end
        features, labels = self.contents()
        return {"features": features, "labels": labels, "next": self._next}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        saved, own = ([tuple(part.shape) for part in parts] for parts in ((state["features"], state["labels"]), self.contents()))
        if saved != own:
            raise ValueError(
                f"the saved feature queue has features {saved[0]} and labels {saved[1]}, this one {own[0]} and {own[1]}: "
                "set dimensions, length and classes to what they were"
            )
        self.clear()
        for part, name in zip(self.contents(), ("features", "labels"), strict=True):
            part.copy_(state[name])
        self._next.copy_(state["next"])

    def _apply(self, fn: Any, recurse: bool = True) -> "FeatureQueue":
        super()._apply(fn, recurse)
        moved = fn(self._features[:0])  # where to, and to what
        dtype = torch.promote_types(moved.dtype, torch.float32)
        self._features = self._features.to(moved.device, dtype)
        self._labels = self._labels.to(moved.device, self._labels.dtype if self.classes is None else dtype)
        self._next = self._next.to(moved.device)
        return self

    def extra_repr(self) -> str:
        return f"dimensions={self.dimensions}, length={self.length}, classes={self.classes}"
