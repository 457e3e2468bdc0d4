"""Test-time augmentation: tests and predictions by the mean over views of each input."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..zoo.functional.views import Merge, View, check_merge, over_views, resolve_views
from .features import known_classes
from .guards import refuse


class TestTimeAugmentation(Callback):
    """Tests and predicts with the mean over the input and views of it.

    While `test` and `predict` run, `forward` gives, for logits f(x) and V views, the first of which is x itself,

        log (1/V sum_v softmax(f(view_v(x))))   ("probabilities"),   or   1/V sum_v f(view_v(x))   ("logits"),

    in float32 or wider: logits again, so that softmax, argmax and cross entropy of them, in the module's own steps, are those of the
    mean. Without views but x itself, nothing is changed, to the bit. Training is never touched, and validation only if asked for.

    Cost: a forward pass for each view, one after the other, in the memory of one; no state. Composes with every callback: with
    `SnapshotEnsemble` and with votes of the model's own, the views multiply; under `EMA` the views are those of the average. A step
    that never calls `forward` is an error. Copies of the module that are made meanwhile average too.

    Args:
        views: a preset, or functions inputs -> inputs; x itself always comes besides. Of images `(B, C, H, W)`: "flip" (mirrored),
            "flip_rotations" (all 8 symmetries of the square), "shifts" (by 1/16 to the four sides), "scales" (0.9 and 1.1 times as
            large); of clouds `(B, N, 3)`: "yaw" (12 turns about +y), "mirror" (at x = 0), "halves" (4 fixed random halves of the points).
            Choose only views that keep the class: a mirrored digit is none.
        merge: "probabilities" for logits `(B, C)`, "logits" for scores `(B,)` or `(B, C)`, or a function of the list of outputs, that of
            x first, for anything else.
        target: name of the submodule whose `forward` is meant, such as "net", where the steps do not call the module itself.
        validation: whether validation is augmented too, also within `fit`; then what is monitored is.

    Raises:
        ValueError: if there is no such preset or merge, or if the outputs cannot be merged.
        TypeError: if a view is no function.
        MisconfigurationException: if there is no such submodule, or its `forward` was not called.

    Example:
        >>> trainer = Trainer(callbacks=[TestTimeAugmentation("flip")])
        >>> trainer.test(model, datamodule=data)

    Source:
        Krizhevsky, Sutskever & Hinton, "ImageNet Classification with Deep Convolutional Neural Networks", NIPS 2012, section 4.1.
    """

    __test__ = False  # for pytest, which takes classes of such a name for tests

    def __init__(
        self,
        views: str | Sequence[Callable[[Tensor], Tensor]] = "flip",
        merge: str | Callable[[list[Any]], Any] = "probabilities",
        target: str | None = None,
        validation: bool = False,
    ) -> None:
        self.merge = check_merge(merge)
        self.views = resolve_views(views)
        self.target = target
        self.validation = validation
        self._forward: _ForwardOverViews | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_forward": None}  # a callback that is copied or pickled carries no network

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._insert(trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._insert(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.validation:
            self._insert(trainer, pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish(pl_module, trainer.num_test_batches)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish(pl_module, trainer.num_predict_batches)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.validation:
            self._finish(pl_module, trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._remove()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._remove()

    def _insert(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._remove()
        module: nn.Module = pl_module
        if self.target is not None:
            try:
                module = pl_module.get_submodule(self.target)
            except AttributeError:
                known = ", ".join(name for name, _ in pl_module.named_children()) or "none"
                raise refuse(
                    self, f"finds no submodule {self.target!r} in {type(pl_module).__name__}", f"set target to one, such as {known}"
                ) from None
        self._forward = _ForwardOverViews(module, self.views, self.merge, known_classes(trainer, pl_module, None))

    def _finish(self, pl_module: LightningModule, batches: float | Iterable[Any]) -> None:
        forward, name = self._forward, "forward" if self.target is None else f"the forward of {self.target}"
        self._remove()
        if forward is not None and not forward.called and sum(tree_leaves(batches)) > 0:
            raise refuse(
                self,
                f"augmented nothing: the steps of {type(pl_module).__name__} never called {name}",
                "set target to the name of the submodule that they call, or let them call self(x)",
            )

    def _remove(self) -> None:
        # Under the forward of another callback, which was put on top, it stays in place and does nothing, until teardown finds it.
        if self._forward is not None and self._forward.remove():
            self._forward = None


class _ForwardOverViews:
    """Stands for a module's `forward` until it is removed; a class of its own, so that the module can still be copied and pickled."""

    def __init__(self, module: nn.Module, views: Sequence[View], merge: Merge | Callable[[list[Any]], Any], classes: int | None) -> None:
        self.module = module
        self.views = views
        self.merge = merge
        self.classes = classes
        self.called = False
        self.active = True
        # Something else may have replaced it before, such as torch.compile.
        self.own = vars(module).get("forward")
        self.before = module.forward
        vars(module)["forward"] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.called = True
        if not self.active:
            return self.before(*args, **kwargs)
        if not args:
            raise ValueError(
                f"the forward of {type(self.module).__name__} was called without the inputs in the first place: call it as f(x)"
            )
        found = over_views(self.before, self.views, self.merge, *args, **kwargs)
        if self.views and self.merge == "probabilities" and self.classes is not None and found.shape[1] != self.classes:
            raise ValueError(
                f"merge='probabilities' averages the logits of {self.classes} classes, but the forward of {type(self.module).__name__} gives "
                f"{found.shape[1]} numbers: set target to the submodule that gives logits, or merge to 'logits' or a function for others"
            )
        return found

    def remove(self) -> bool:
        """Put back what was there; returns whether it could."""
        self.active = False
        if vars(self.module).get("forward") is not self:
            return False
        if self.own is None:
            del vars(self.module)["forward"]
        else:
            vars(self.module)["forward"] = self.own
        return True
