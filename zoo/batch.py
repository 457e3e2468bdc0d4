"""The one thing that every DataModule of litzoo yields, and what any DataModule tells about its labels."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """A batch of samples.

    A batch with a `key` is a training batch: its DataModule's `transform` augments it. A batch without one is an
    evaluation batch and is never augmented.

    Attributes:
        input: points `(B, N, 3)`, images `(B, C, H, W)`, views `(B, V, C, H, W)` or vectors `(B, D)`.
        label: `(B,)` int64, the class of each sample.
        index: `(B,)` int64, the position of each sample in its data set.
        part: `(B, N)` int64, the part each point belongs to, or None.
        key: `(B,)` int64, the sample's random key for this epoch, or None.

    Example:
        >>> Batch(torch.zeros(2, 1024, 3), torch.tensor([0, 1]), torch.tensor([7, 8])).key is None
        True
    """

    input: Tensor
    label: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody needs here
    part: Tensor | None = None
    key: Tensor | None = None


def input_and_label(batch: Any) -> tuple[Tensor, Tensor]:
    """Take `(input, label)` out of a `Batch` or of a plain `(x, y)` pair from somebody else's loader.

    Args:
        batch: a `Batch`, or a sequence whose first two items are the inputs and the labels.

    Returns:
        The inputs and the labels `(B,)`.

    Raises:
        TypeError: if it is neither.

    Example:
        >>> x, y = input_and_label((torch.zeros(2, 3), torch.tensor([0, 1])))
    """
    if isinstance(batch, Batch):
        return batch.input, batch.label
    if isinstance(batch, (tuple, list)) and len(batch) >= 2:
        return batch[0], batch[1]
    raise TypeError(f"a batch must be a litzoo Batch or a pair (input, label), got {type(batch).__name__}")


def labelled_samples(data: Any) -> int | None:
    """How many training samples of a DataModule have a label.

    Args:
        data: any DataModule, or None.

    Returns:
        The sum of its `class_counts`, a list, a tensor or a mapping from class to number; None if it has none.

    Example:
        >>> labelled_samples(SimpleNamespace(class_counts={"cat": 3, "dog": 5}))
        8
    """
    counts = getattr(data, "class_counts", None)
    if not isinstance(counts, Iterable):
        return None
    return int(sum(counts.values() if isinstance(counts, Mapping) else counts))


def count_unlabelled(data: Any) -> tuple[int, int]:
    """How many training samples of a DataModule have no label, out of how many.

    Args:
        data: any DataModule, or None.

    Returns:
        Both numbers; (0, 0) if it does not have `num_train` and `class_counts`.

    Example:
        >>> count_unlabelled(SimpleNamespace(num_train=10, class_counts=[3, 5]))
        (2, 10)
    """
    samples, labelled = getattr(data, "num_train", None), labelled_samples(data)
    return (0, 0) if not isinstance(samples, int) or labelled is None else (max(samples - labelled, 0), samples)
