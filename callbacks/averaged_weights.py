"""What `EMA` and `SWA` share: an average of the weights that is validated, saved and kept, while training goes on with its own."""

from itertools import chain
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from .guards import refuse, refuse_sharded, refuse_together


class AveragedWeights(Callback):
    """Base of callbacks that average weights during training; a subclass says when to call `_move_average`.

    The average covers the floating-point parameters and the saved floating-point buffers, in float32 or wider; integer
    buffers are those of the last step. During validation the module holds the average, and after training it keeps it.
    A checkpoint's `state_dict` is the average, so `load_from_checkpoint`, `test(ckpt_path=...)` and exports need no callback;
    the weights of the training lie in the callback's state and come back when `fit` resumes.
    """

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self._names: list[str] = []
        self._live: list[Tensor] = []
        # Which of them are buffers.
        self._buffers: list[int] = []
        self._average: list[Tensor] = []
        # The weights of the training while the module holds the average.
        self._raw: list[Tensor] | None = None
        self._updates = 0
        self._loaded: dict[str, Any] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._forget()
        refuse_sharded(self, trainer)
        refuse_together(
            self,
            trainer,
            ("EMA", "SWA", "WeightAveraging", "StochasticWeightAveraging"),
            "because each would validate and save an average of its own",
        )
        if any(getattr(checkpoint, "save_weights_only", False) for checkpoint in trainer.checkpoint_callbacks):
            raise refuse(
                self,
                "cannot put its average into a checkpoint of save_weights_only=True, for which Lightning asks no callback",
                "set save_weights_only=False; the state_dict of such a checkpoint is the average, and loads everywhere",
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        saved = {id(value) for value in pl_module.state_dict(keep_vars=True).values()}
        named = chain(pl_module.named_parameters(), pl_module.named_buffers())
        tensors = {name: tensor for name, tensor in named if id(tensor) in saved and _can_be_averaged(tensor)}
        self._names, self._live = list(tensors), list(tensors.values())
        buffers = {name for name, _ in pl_module.named_buffers()}
        self._buffers = [position for position, name in enumerate(self._names) if name in buffers]
        self._average = [tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32), copy=True) for tensor in self._live]
        if self._loaded is not None:
            self._restore(self._loaded)
            self._loaded = None

    def _restore(self, state: dict[str, Any]) -> None:
        if set(state["raw"]) != set(self._names):
            differing = sorted(set(state["raw"]) ^ set(self._names))
            raise refuse(
                self,
                f"cannot go on from this checkpoint, whose weights have other names ({', '.join(differing[:3])})",
                "resume the model that was trained, or load the weights alone and begin a new fit",
            )
        self._updates = state["updates"]
        with torch.no_grad():
            for name, live, average in zip(self._names, self._live, self._average, strict=True):
                live.copy_(state["raw"][name])
                if name in state["average"]:
                    average.copy_(state["average"][name])

    def state_dict(self) -> dict[str, Any]:
        raw = self._live if self._raw is None else self._raw
        return {
            "updates": self._updates,
            "raw": {name: tensor.detach() for name, tensor in zip(self._names, raw, strict=True)},
            # The others are the checkpoint's state_dict, exactly.
            "average": {
                name: average
                for name, tensor, average in zip(self._names, self._live, self._average, strict=True)
                if tensor.dtype != average.dtype
            },
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._find_buffers(pl_module)
        if self._updates and self._raw is None:  # else there is no average yet, or the module holds it
            self._show_average(trainer, pl_module)
            try:
                state = trainer.strategy.lightning_module_state_dict()
                for name, value in state.items():  # in place, because the dictionary also has the versions of the modules
                    state[name] = value.clone() if isinstance(value, Tensor) else value
                checkpoint["state_dict"] = state
            finally:
                self._show_raw(pl_module)
        checkpoint["callbacks"][self.state_key] = self.state_dict()  # Lightning asked for it earlier

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit":
            self._show_average(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit":
            self._show_raw(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._show_average(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._show_average(trainer, pl_module)  # for a training that was over when it was resumed

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if trainer.state.fn == "fit":
            self._show_raw(pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._live = [tensor.detach() for tensor in self._live]  # keep no module alive, and nothing that cannot be pickled

    @torch.no_grad()
    def _move_average(self, weight: float) -> None:
        """average <- average + weight (raw - average)."""
        pairs = zip(self._live, self._average, strict=True)
        live = [tensor if tensor.dtype == average.dtype else tensor.to(average.dtype) for tensor, average in pairs]
        torch._foreach_lerp_(self._average, live, weight)
        self._updates += 1

    @torch.no_grad()
    def _show_average(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._updates or self._raw is not None:
            return
        self._find_buffers(pl_module)
        self._raw = [tensor.detach().clone() for tensor in self._live]
        torch._foreach_copy_(self._live, self._average)

    @torch.no_grad()
    def _show_raw(self, pl_module: LightningModule) -> None:
        if self._raw is not None:
            self._find_buffers(pl_module)
            torch._foreach_copy_(self._live, self._raw)
            self._raw = None

    def _find_buffers(self, pl_module: LightningModule) -> None:
        """A step may replace a buffer by another tensor, and a move to another device does."""
        for position in self._buffers:
            self._live[position] = pl_module.get_buffer(self._names[position])


def _can_be_averaged(tensor: Tensor) -> bool:
    """Not integers, and not masks with infinities: -inf minus -inf is no number."""
    return (tensor.is_floating_point() or tensor.is_complex()) and bool(tensor.isfinite().all())
