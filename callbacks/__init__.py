"""Training tricks as Lightning callbacks; each works in any project that imports `lightning.pytorch`."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if __name__ != "litzoo.callbacks":
    raise ImportError("import it as litzoo.callbacks: a bare `callbacks` would be a second copy of the package")

CALLBACKS = {
    "ConfusionMatrixPlot": "confusion_matrix_plot",
    "DecisionBoundaryPlot": "decision_boundary_plot",
    "PerClassTable": "per_class_table",
    "StepSeed": "step_seed",
}
__all__ = list(CALLBACKS)

if TYPE_CHECKING:
    from .confusion_matrix_plot import ConfusionMatrixPlot as ConfusionMatrixPlot
    from .decision_boundary_plot import DecisionBoundaryPlot as DecisionBoundaryPlot
    from .per_class_table import PerClassTable as PerClassTable
    from .step_seed import StepSeed as StepSeed


def __getattr__(name: str) -> Any:
    if name in CALLBACKS:
        return getattr(import_module(f"{__name__}.{CALLBACKS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
