"""What `FGM` and `SAM` share: the gradient of an optimiser step taken a second time, at perturbed weights."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torchmetrics import Metric

from .guards import class_names_of_bases, refuse, refuse_manual_optimization, refuse_sharded, refuse_together


class PerturbedPass(Callback):
    """Base of callbacks that move weights up the gradient, run forward and backward once more, and move them back.

    With G(w) the gradient of a whole optimiser step (all micro-batches of an accumulation, the mean over all processes),
    the second pass computes G(w + r) with r = radius G(w) / ||G(w)||_2 over the target weights. It runs through
    `trainer.strategy`, so mixed precision, loss scaling, accumulation and DDP act as in the first pass. It leaves no trace:
    `log`, torchmetrics, buffers (BatchNorm's statistics) and the random streams are as after the first pass; dropout draws
    other masks in it. A step whose last micro-batch the module skips, by returning None, is a plain one.

    Args:
        every_n_steps: perturb every n-th optimiser step only, at least 1.
    """

    replaces_gradient: ClassVar[bool]

    def __init__(self, every_n_steps: int) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, got {every_n_steps}")
        self.every_n_steps = every_n_steps
        self._reset()

    def _reset(self) -> None:
        self._running = False
        self._takes_index = True
        self._targets: list[nn.Parameter] = []
        # Arguments of the training steps whose gradients are summed in this optimiser step.
        self._window: list[tuple[Any, ...]] = []
        self._arguments: tuple[Any, ...] = ()

    def radius(self) -> float:
        """Length of the perturbation; 0 switches it off."""
        raise NotImplementedError(f"{type(self).__name__} must define radius()")

    def targets(self, pl_module: LightningModule) -> list[nn.Parameter]:
        """The weights that are moved."""
        return list(pl_module.parameters())

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._reset()
        refuse_sharded(self, trainer)
        refuse_manual_optimization(self, pl_module)
        refuse_together(self, trainer, ("FGM", "SAM"), "because each would perturb the other's second pass")
        if is_param_in_hook_signature(pl_module.training_step, "dataloader_iter", explicit=True):
            raise refuse(self, "cannot see the batches of a training_step that takes a dataloader_iter", "let it take the batch")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if any("LBFGS" in class_names_of_bases(optimizer) for optimizer in trainer.optimizers):
            raise refuse(self, "does not work with LBFGS, which evaluates a step several times", "use another optimizer")
        self._targets = self.targets(pl_module)
        self._takes_index = is_param_in_hook_signature(pl_module.training_step, "batch_idx", min_args=2)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.radius():
            # New containers, because a training step may take items out of a dictionary; the tensors are the same.
            batch = apply_to_collection(batch, Tensor, lambda tensor: tensor)
            self._arguments = (batch, batch_idx) if self._takes_index else (batch,)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._arguments = ()

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer) -> None:
        self._window.clear()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._running or not self.radius() or trainer.global_step % self.every_n_steps:
            return
        self._window.append(self._arguments)
        batches = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        if batches % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch:
            self._run(trainer, pl_module)
            self._window.clear()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._reset()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._reset()  # do not keep the last batches

    def _run(self, trainer: Trainer, pl_module: LightningModule) -> None:
        moved: list[Tensor] = [weight for weight in self._targets if weight.grad is not None]
        gradients = [weight.grad for weight in moved if weight.grad is not None]
        if not moved:  # all of them are frozen for now
            return
        if any(gradient.is_sparse for gradient in gradients):
            raise refuse(self, "cannot take the norm of sparse gradients", "make the embedding with sparse=False")
        kept = [weight.detach().clone() for weight in moved]
        self._running = True
        try:
            with torch.no_grad():
                # In float32 or wider: 1 / norm overflows in float16.
                wide = [gradient.to(torch.promote_types(gradient.dtype, torch.float32)) for gradient in gradients]
                norm = torch.nn.utils.get_total_norm(wide)
                # No branch, which would wait for the device: without a gradient the weights stay where they are.
                factor = torch.where(norm > 0, self.radius() / norm, 0.0)
                steps: list[Tensor] = [(gradient * factor).to(weight.dtype) for gradient, weight in zip(wide, moved, strict=True)]
                torch._foreach_add_(moved, steps)
                if self.replaces_gradient:
                    torch._foreach_zero_([weight.grad for weight in pl_module.parameters() if weight.grad is not None])
            with isolated(pl_module):
                self._forward_and_backward(trainer)
        finally:
            with torch.no_grad():
                torch._foreach_copy_(moved, kept)
            self._running = False

    def _forward_and_backward(self, trainer: Trainer) -> None:
        for position, arguments in enumerate(self._window):
            without_sync = getattr(trainer.strategy, "block_backward_sync", contextlib.nullcontext)
            with contextlib.nullcontext() if position == len(self._window) - 1 else without_sync():
                output = trainer.strategy.training_step(*arguments)
                loss = output["loss"] if isinstance(output, Mapping) else output
                if loss is not None:
                    trainer.strategy.backward(loss / trainer.accumulate_grad_batches, trainer.optimizers[0])


@contextlib.contextmanager
def isolated(pl_module: LightningModule) -> Iterator[None]:
    """Let a training step run without a trace in logs, metrics, buffers and random streams."""

    def ignore(*_: Any, **__: Any) -> None:
        """Stands for `log` and `log_dict`."""

    buffers = [
        (module._buffers, name, buffer, buffer.clone())
        for module in pl_module.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    metrics = [(metric, _state(metric)) for metric in pl_module.modules() if isinstance(metric, Metric)]
    own = {name: value for name, value in vars(pl_module).items() if name in ("log", "log_dict")}
    vars(pl_module).update(log=ignore, log_dict=ignore)
    try:
        with isolate_rng(include_cuda=pl_module.device.type == "cuda"):  # torch's, numpy's and Python's
            yield
    finally:
        for name in ("log", "log_dict"):
            del vars(pl_module)[name]
        vars(pl_module).update(own)
        with torch.no_grad():
            for owner, name, buffer, value in buffers:
                buffer.copy_(value)
                owner[name] = buffer  # a step may have replaced it by another tensor
        for metric, state in metrics:
            vars(metric).update(state)


def _state(metric: Metric) -> dict[str, Any]:
    """Everything that an update changes; tensors are cloned, because some metrics add in place."""

    def copied(value: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        return value.clone() if isinstance(value, Tensor) else list(value)

    return {**vars(metric), **{name: copied(value) for name, value in metric.metric_state.items()}}
