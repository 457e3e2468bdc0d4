"""Makes `litzoo fit --help` quick: what the help does not need is not imported."""

import gc
import importlib.metadata
from typing import Any

# torchmetrics imports these for plots, images and sound where they are installed: 2.7 of 6.5 CPU seconds.
_NOT_NEEDED = ("matplotlib", "scipy", "torchvision")


def skip_optional_imports() -> None:
    """Let torchmetrics believe, in this process, that packages which only its optional metrics use are not installed.

    Must be called before torchmetrics is imported, in a process that prints help and ends.
    """
    from lightning_utilities.core import imports as found

    gc.disable()  # nothing is freed before the process ends
    imports: Any = found
    package_available = imports.package_available

    def version(name: str) -> str:
        if name in _NOT_NEEDED:
            raise importlib.metadata.PackageNotFoundError(name)
        return importlib.metadata.version(name)

    imports._version = version
    imports.package_available = lambda name: name not in _NOT_NEEDED and package_available(name)
