"""Refusals at the start of `fit`: settings under which a trick would be wrong without anybody noticing."""

from collections.abc import Iterable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

# By name, because `lightning.pytorch` and `pytorch_lightning` have a class of their own each.
_SHARDED = {"FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy"}


def refuse(callback: Callback, reason: str, cure: str) -> MisconfigurationException:
    """The error of a callback that cannot work here: what is wrong, and what to do."""
    return MisconfigurationException(f"{type(callback).__name__} {reason}: {cure}")


def class_names_of_bases(thing: Any) -> set[str]:
    """The names of an object's class and its base classes."""
    return {base.__name__ for base in type(thing).__mro__}


def refuse_sharded(callback: Callback, trainer: Trainer) -> None:
    """Refuse strategies under which a process does not hold whole parameters."""
    if _SHARDED & class_names_of_bases(trainer.strategy):
        raise refuse(callback, f"does not work under {type(trainer.strategy).__name__}, which shards parameters", "use strategy='ddp'")


def refuse_manual_optimization(callback: Callback, pl_module: LightningModule) -> None:
    """Refuse modules that call `backward` themselves."""
    if not pl_module.automatic_optimization:
        raise refuse(
            callback,
            "cannot tell which of the losses of a manually optimised module is meant",
            "set automatic_optimization = True, or write the trick into the training_step",
        )


def others(callback: Callback, trainer: Trainer, names: Iterable[str]) -> list[Any]:
    """The trainer's other callbacks whose class, or a base of it, has one of these names."""
    wanted = set(names)
    found: list[Any] = list(trainer.callbacks)  # type: ignore[attr-defined]
    return [other for other in found if other is not callback and wanted & class_names_of_bases(other)]


def refuse_together(callback: Callback, trainer: Trainer, names: Iterable[str], reason: str) -> None:
    """Refuse a second callback of one of these classes in the same trainer."""
    for other in others(callback, trainer, names):
        raise refuse(callback, f"does not compose with {type(other).__name__}, {reason}", "keep one of the two")
