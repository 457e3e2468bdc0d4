"""litzoo: a PyTorch Lightning model zoo.

>>> import litzoo
>>> model = litzoo.load("pointnet_furniture")  # trained weights, evaluation mode

`litzoo.zoo` holds the models, `litzoo.callbacks` the training tricks, `litzoo.datamodules` the data sets.
Importing `litzoo` loads nothing heavy; each name is imported on first use (PEP 562).
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Batch", "WeightsError", "__version__", "list_models", "load", "load_encoder", "save"]

if TYPE_CHECKING:
    from .zoo import Batch as Batch
    from .zoo import WeightsError as WeightsError
    from .zoo import list_models as list_models
    from .zoo import load as load
    from .zoo import load_encoder as load_encoder
    from .zoo import save as save


def __getattr__(name: str) -> Any:
    if name in __all__:
        from . import zoo

        return getattr(zoo, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
