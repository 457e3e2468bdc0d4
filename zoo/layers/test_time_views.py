"""Test-time augmentation of any network: the mean of its outputs over views of the input."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from ..functional.views import Merge, View, ViewPreset, check_merge, over_views, resolve_views


class TestTimeViews(nn.Module):
    """A network whose output is the mean over the input and views of it.

    For logits f(x) and V views, the first of which is x itself, "probabilities" gives log (1/V sum_v softmax(f(view_v(x)))), so that
    softmax, argmax and cross entropy are those of the mean probability; "logits" gives 1/V sum_v f(view_v(x)). Wrap a
    network in evaluation mode: in training, each view would update BatchNorm on its own.

    Cost: a forward pass for each view, one after the other, in the memory of one.

    Args:
        model: inputs `(B, ...)` -> logits `(B, C)`, or anything that `merge` can merge.
        views: a preset, or functions inputs -> inputs; x itself always comes besides. Of images `(B, C, H, W)`: "flip" (mirrored),
            "flip_rotations" (all 8 symmetries of the square), "shifts" (by 1/16 to the four sides), "scales" (0.9 and 1.1 times as
            large); of clouds `(B, N, 3)`: "yaw" (12 turns about +y), "mirror" (at x = 0), "halves" (4 fixed random halves of the points).
        merge: "probabilities", "logits", or a function of the list of outputs, for outputs of another kind.

    Raises:
        ValueError: if there is no such preset or merge, or when called, if the outputs cannot be merged.
        TypeError: if a view is no function.

    Example:
        >>> TestTimeViews(model.eval(), "flip")(images).softmax(dim=1)

    Source:
        Krizhevsky, Sutskever & Hinton, "ImageNet Classification with Deep Convolutional Neural Networks", NIPS 2012, section 4.1.
    """

    __test__ = False  # for pytest, which takes classes of such a name for tests

    def __init__(
        self, model: nn.Module, views: ViewPreset | Sequence[View] = "flip", merge: Merge | Callable[[list[Any]], Any] = "probabilities"
    ) -> None:
        super().__init__()
        self.model = model
        self.views = resolve_views(views)
        self.merge = check_merge(merge)

    def forward(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Inputs of the network -> its merged output; further arguments are the same for each view."""
        return over_views(self.model, self.views, self.merge, inputs, *args, **kwargs)
