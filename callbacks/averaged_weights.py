"""What `EMA` and `SWA` share: an average of the weights that is validated, saved and kept, while training goes on with its own."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn.parameter import is_lazy

from .guards import refuse, refuse_sharded, refuse_together


class AveragedWeights(Callback):
    """Base of callbacks that average weights during training; a subclass says when to call `_move_average`.

    The average covers the floating-point parameters and the saved floating-point buffers, in float32 or wider; integer
    buffers are those of the last step. During validation the module holds the average, and after training it keeps it.
    A checkpoint's `state_dict` is the average, so `load_from_checkpoint`, `test(ckpt_path=...)` and exports need no callback;
    the weights of the training lie in the callback's state and come back when `fit` resumes. The exception is a checkpoint saved by
    hand, `trainer.save_checkpoint(..., weights_only=True)`: Lightning tells no callback of it, so it holds the weights of the training.
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
        lazy = [name for name, parameter in pl_module.named_parameters() if is_lazy(parameter)]
        if lazy:
            raise refuse(self, f"cannot average {lazy[0]}, which has no shape yet", "run a batch through the module before fit")
        unsaved = {
            f"{prefix}.{name}" if prefix else name
            for prefix, module in pl_module.named_modules()
            for name in module._non_persistent_buffers_set
        }
        known = self._loaded["raw"] if self._loaded is not None else {}
        parameters = {name: tensor for name, tensor in pl_module.named_parameters() if _is_continuous(tensor)}
        # Not masks with infinities: -inf minus -inf is no number.
        buffers = {
            name: tensor
            for name, tensor in pl_module.named_buffers()
            if name not in unsaved and _is_continuous(tensor) and (name in known if known else bool(tensor.isfinite().all()))
        }
        self._names, self._live = [*parameters, *buffers], [*parameters.values(), *buffers.values()]
        self._buffers = list(range(len(parameters), len(self._names)))
        self._average = [_wide(tensor) for tensor in self._live]
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
        if self._loaded is not None:  # a tuner saves and loads before on_fit_start
            return self._loaded
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
        if state_dict["raw"]:  # else it was saved before a fit
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
            self._show_raw(pl_module, validated=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._show_average(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._show_average(trainer, pl_module)  # for a training that was over when it was resumed

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if trainer.state.fn == "fit":
            self._show_raw(pl_module)
            self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Keep no module alive, and nothing on the device; what a checkpoint by hand needs stays."""
        if stage == "fit":
            self._live = [tensor.detach().cpu() for tensor in self._live]
            self._average = [tensor.cpu() for tensor in self._average]
            self._raw = None if self._raw is None else [tensor.cpu() for tensor in self._raw]

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
        self._find_tensors(pl_module)
        self._raw = [tensor.detach().clone() for tensor in self._live]
        torch._foreach_copy_(self._live, self._average)

    @torch.no_grad()
    def _show_raw(self, pl_module: LightningModule, validated: bool = False) -> None:
        if self._raw is None:
            return
        self._find_tensors(pl_module)
        for position in self._buffers if validated else ():
            live, average = self._live[position], self._average[position]
            if not torch.equal(live, average.to(live.dtype)):  # the validation has set it, such as a threshold
                self._raw[position] = live.clone()
                average.copy_(live)
        torch._foreach_copy_(self._live, self._raw)
        self._raw = None

    def _find_tensors(self, pl_module: LightningModule) -> None:
        """Look the tensors up anew: the end of a fit moves them to another device."""
        parameters = dict(pl_module.named_parameters())
        self._live = [parameters.get(name, live) for name, live in zip(self._names, self._live, strict=True)]
        self._find_buffers(pl_module)

    def _find_buffers(self, pl_module: LightningModule) -> None:
        """A step may replace a buffer by another tensor, also one of another shape, which cannot be averaged."""
        for position in self._buffers:
            live = self._live[position] = pl_module.get_buffer(self._names[position])
            if live.shape != self._average[position].shape:
                self._average[position] = _wide(live)
                if self._raw is not None:
                    self._raw[position] = live.clone()


def _is_continuous(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _wide(tensor: Tensor) -> Tensor:
    """A copy in float32 or wider."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32), copy=True)
