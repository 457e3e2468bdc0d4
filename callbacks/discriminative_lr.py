"""Learning rates that fall from the output to the input, so that the general layers near the input change the least."""

from collections.abc import Callable, Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.optim import Optimizer, lr_scheduler

from .guards import class_names_of_bases, refuse, refuse_sharded, refuse_together
from .layer_groups import check_patterns, layer_groups

_SCHEDULERS = (
    lr_scheduler.StepLR,
    lr_scheduler.MultiStepLR,
    lr_scheduler.ExponentialLR,
    lr_scheduler.ConstantLR,
    lr_scheduler.LinearLR,
    lr_scheduler.PolynomialLR,
    lr_scheduler.CosineAnnealingLR,
    lr_scheduler.CosineAnnealingWarmRestarts,
    lr_scheduler.ReduceLROnPlateau,
    lr_scheduler.LambdaLR,
    lr_scheduler.MultiplicativeLR,
    lr_scheduler.OneCycleLR,
    lr_scheduler.CyclicLR,
    lr_scheduler.SequentialLR,
    lr_scheduler.ChainedScheduler,
)
# A subclass that overrides one of these may set learning rates in a way of its own.
_SETTERS = ("step", "get_lr", "_get_closed_form_lr", "_update_lr", "_reduce_lr")
# OneCycleLR keeps its limits in the parameter groups.
_RATES = ("lr", "initial_lr", "max_lr", "min_lr")
# They keep a list of parameters beside the parameter groups.
_UNSPLITTABLE = {"LBFGS", "ZeroRedundancyOptimizer"}
_CURE = "call discriminative_param_groups in configure_optimizers"


def discriminative_param_groups(
    module: nn.Module, lr: float, factor: float = 2.6, groups: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """Parameter groups whose learning rates fall from the output to the input, for `configure_optimizers`.

    lr_l = lr / factor^(L - 1 - l) for the layer groups l = 0 (input) ... L - 1 (output). Frozen parameters are left out, a
    tied weight counts once, and every other parameter lies in exactly one group.

    Args:
        module: whose parameters to group.
        lr: learning rate of the last group, positive.
        factor: ratio of the rates of neighbouring groups, at least 1.
        groups: regular expressions for parameter names, from the input to the output; None takes the module's children.

    Returns:
        A dictionary with `params`, `lr` and `name` for each group that has trainable parameters.

    Raises:
        ValueError: if `factor` or `groups` cannot be used.

    Example:
        >>> def configure_optimizers(self):
        ...     return torch.optim.AdamW(discriminative_param_groups(self, lr=1e-3))

    Source:
        Howard & Ruder, "Universal Language Model Fine-tuning for Text Classification", ACL 2018, section 3.2.
    """
    _check_factor(factor)
    layers = layer_groups(module, groups)
    built: list[dict[str, Any]] = []
    for depth, (name, members) in enumerate(layers):
        trainable = [parameter for _, parameter in members if parameter.requires_grad]
        if trainable:
            built.append({"params": trainable, "lr": lr / factor ** (len(layers) - 1 - depth), "name": name})
    return built


class DiscriminativeLR(Callback):
    """Divides the learning rates of the layers by powers of a factor that grow from the output to the input.

    lr_l(t) = lr(t) / factor^(L - 1 - l) for the layer groups l = 0 (input) ... L - 1 (output), with lr(t) the module's own
    schedule. Each parameter group of each optimizer is split by layer and keeps its other options. If you can edit the
    module, call `discriminative_param_groups` in `configure_optimizers` instead.

    The schedulers of `torch.optim.lr_scheduler` that this module lists are scaled with their limits (`eta_min`, `min_lr`,
    `max_lr`, `base_lr`), their subclasses too if they compute no rates of their own, as `WarmupCosineLR`. What
    ReduceLROnPlateau calls `eps` is not scaled. A checkpoint resumes exactly, with the same `factor` and `groups`; it holds
    no state of its own. factor = 1 changes nothing.

    Cost: a few more parameter groups for the optimizer to loop over. Composes with every callback but
    LearningRateFinder, StochasticWeightAveraging and BaseFinetuning; not with strategies that shard parameters, nor with
    the optimizers LBFGS and ZeroRedundancyOptimizer.

    Args:
        factor: ratio of the rates of neighbouring groups, at least 1; the paper's is 2.6.
        groups: regular expressions for parameter names, from the input to the output, the first that matches wins; None
            takes the module's children in order of registration, which must then be that from the input to the output.

    Raises:
        ValueError: if `factor` is below 1, or `groups` does not fit the module.
        MisconfigurationException: at the start of `fit`, under what it does not compose with, and with a scheduler that it
            does not know.

    Example:
        >>> trainer = Trainer(callbacks=[DiscriminativeLR(groups=[r"stem", r"layer[12]", r"layer[34]", r"head"])])

    Source:
        Howard & Ruder, "Universal Language Model Fine-tuning for Text Classification", ACL 2018, section 3.2.
    """

    def __init__(self, factor: float = 2.6, groups: Sequence[str] | None = None) -> None:
        _check_factor(factor)
        check_patterns(groups)
        self.factor = factor
        self.groups = groups

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit" or self.factor == 1:
            return
        refuse_sharded(self, trainer)
        refuse_together(self, trainer, {"LearningRateFinder"}, "which gives all parameter groups one learning rate")
        refuse_together(self, trainer, {"StochasticWeightAveraging"}, "which anneals to learning rates of its own")
        refuse_together(self, trainer, {"BaseFinetuning"}, "which adds parameter groups with learning rates of its own")
        refuse_together(self, trainer, {"DiscriminativeLR"}, "because the rates would be divided twice")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Here optimizers exist, and their state is not restored yet."""
        if self.factor == 1:
            return
        layers = layer_groups(pl_module, self.groups)
        depth_of = {parameter: depth for depth, (_, members) in enumerate(layers) for _, parameter in members}
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        for scheduler in schedulers:
            unknown = _unknown(scheduler)
            if unknown is not None:
                raise refuse(self, f"does not know how to scale the scheduler {unknown}", _CURE)
        for optimizer in trainer.optimizers:
            sources, divisors = self._split(optimizer, [name for name, _ in layers], depth_of)
            for scheduler in schedulers:
                if scheduler.optimizer is optimizer:
                    _scale(scheduler, sources, divisors)

    def _split(self, optimizer: Optimizer, names: list[str], depth_of: dict[nn.Parameter, int]) -> tuple[list[int], list[float]]:
        """Split an optimizer's groups; returns the old group's position and the divisor of each new one."""
        if _UNSPLITTABLE & class_names_of_bases(optimizer):
            raise refuse(self, f"cannot split the parameters of {type(optimizer).__name__}", "use another optimizer")
        parts: list[dict[str, Any]] = []
        sources: list[int] = []
        divisors: list[float] = []
        for source, group in enumerate(optimizer.param_groups):
            positions: dict[int, list[int]] = {}
            for position, parameter in enumerate(group["params"]):
                if parameter not in depth_of:
                    shape = tuple(parameter.shape)
                    raise refuse(self, f"found a parameter of shape {shape} that is not the module's", "register it in the module")
                positions.setdefault(depth_of[parameter], []).append(position)
            for depth, kept in sorted(positions.items()):
                divisor = self.factor ** (len(names) - 1 - depth)
                part = dict(group)
                # `param_names` is there if the optimizer was given named_parameters().
                part.update({key: [group[key][position] for position in kept] for key in ("params", "param_names") if key in group})
                part.update({key: group[key] / divisor for key in _RATES if key in group})
                if "name" in group:
                    part["name"] = f"{group['name']}/{names[depth]}"  # LearningRateMonitor wants different names
                parts.append(part)
                sources.append(source)
                divisors.append(divisor)
        # In place, because wrappers such as timm's Lookahead share the list with the optimizer that they wrap.
        optimizer.param_groups[:] = parts
        return sources, divisors


def _check_factor(factor: float) -> None:
    if not 1 <= factor < float("inf"):
        raise ValueError(f"factor divides the learning rates and must be at least 1, got {factor}: for a decay d, give 1 / d")


def _unknown(scheduler: Any) -> str | None:
    """The name of the scheduler, or of one inside it, that cannot be scaled."""
    known = next((known for known in _SCHEDULERS if isinstance(scheduler, known)), None)
    if known is None or any(getattr(type(scheduler), name, None) is not getattr(known, name, None) for name in _SETTERS):
        return type(scheduler).__name__
    return next(filter(None, map(_unknown, getattr(scheduler, "_schedulers", ()))), None)


def _scale(scheduler: Any, sources: list[int], divisors: list[float]) -> None:
    """Give a scheduler, and those inside it, a value a new group where it had a value an old one."""
    for name in ("_last_lr", "base_lrs", "max_lrs", "min_lrs"):
        if hasattr(scheduler, name):
            old = getattr(scheduler, name)
            setattr(scheduler, name, [old[source] / divisor for source, divisor in zip(sources, divisors, strict=True)])
    for name in ("lr_lambdas", "base_momentums", "max_momentums"):
        if hasattr(scheduler, name):
            old = getattr(scheduler, name)
            setattr(scheduler, name, [old[source] for source in sources])
    if getattr(scheduler, "eta_min", 0) != 0:
        scheduler.eta_mins = [scheduler.eta_min / divisor for divisor in divisors]
        scheduler.__class__ = type(type(scheduler).__name__, (_EtaMins, type(scheduler)), {})
    for inner in getattr(scheduler, "_schedulers", ()):
        _scale(inner, sources, divisors)


class _EtaMins:
    """Mixed into a cosine scheduler, whose one `eta_min` would lie above the rates of the layers near the input."""

    eta_min: float
    eta_mins: list[float]

    def get_lr(self) -> list[Any]:
        parent: Any = super()
        return self._by_group(parent.get_lr)

    def _get_closed_form_lr(self) -> list[Any]:
        # SequentialLR asks for it; CosineAnnealingWarmRestarts has none, and torch then takes get_lr.
        parent: Any = super()
        return self._by_group(getattr(parent, "_get_closed_form_lr", parent.get_lr))

    def _by_group(self, rates: Callable[[], list[Any]]) -> list[Any]:
        common, found = self.eta_min, []
        for position, eta_min in enumerate(self.eta_mins):
            self.eta_min = eta_min
            found.append(rates()[position])
        self.eta_min = common
        return found
