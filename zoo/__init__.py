"""Models, losses, layers, trained weights and the command line of litzoo. Names are imported on first use."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if __name__ != "litzoo.zoo":
    raise ImportError("import it as litzoo.zoo: a bare `zoo` would be a second copy of the package")

# Name -> file that defines it. The models are also the allow-list of what a weights file may name.
MODELS = {
    "EncoderClassifier": "encoder_classifier",
    "ImageClassifier": "image_classifier",
    "ImageEncoder": "image_encoder",
    "InstanceDiscrimination": "instance_discrimination",
    "LogisticRegression": "logistic_regression",
    "PointNetClassifier": "pointnet",
    "PointNetSegmenter": "pointnet_segmenter",
    "RelationalReasoning": "relational_reasoning",
    "SupConEncoder": "supcon",
    "WGAN": "wgan",
}
_EXPORTS = {
    **MODELS,
    "Batch": "batch",
    "KNNClassifier": "layers.knn_classifier",
    "TimmOptimizer": "optimization",
    "WarmupCosineLR": "optimization",
    "WeightsError": "safe_reading",
    "clean_labels": "cleaning",
    "create_backbone": "backbones",
    "critical_points": "critical_sets",
    "from_published": "published",
    "list_models": "pretrained",
    "load": "pretrained",
    "load_encoder": "pretrained",
    "resolve_backbone": "backbones",
    "save": "pretrained",
    "select_samples": "selection",
    "upper_bound_points": "critical_sets",
}
__all__ = list(_EXPORTS)

if TYPE_CHECKING:
    from .backbones import create_backbone as create_backbone
    from .backbones import resolve_backbone as resolve_backbone
    from .batch import Batch as Batch
    from .cleaning import clean_labels as clean_labels
    from .critical_sets import critical_points as critical_points
    from .critical_sets import upper_bound_points as upper_bound_points
    from .encoder_classifier import EncoderClassifier as EncoderClassifier
    from .image_classifier import ImageClassifier as ImageClassifier
    from .image_encoder import ImageEncoder as ImageEncoder
    from .instance_discrimination import InstanceDiscrimination as InstanceDiscrimination
    from .layers.knn_classifier import KNNClassifier as KNNClassifier
    from .logistic_regression import LogisticRegression as LogisticRegression
    from .optimization import TimmOptimizer as TimmOptimizer
    from .optimization import WarmupCosineLR as WarmupCosineLR
    from .pointnet import PointNetClassifier as PointNetClassifier
    from .pointnet_segmenter import PointNetSegmenter as PointNetSegmenter
    from .pretrained import list_models as list_models
    from .pretrained import load as load
    from .pretrained import load_encoder as load_encoder
    from .pretrained import save as save
    from .published import from_published as from_published
    from .relational_reasoning import RelationalReasoning as RelationalReasoning
    from .safe_reading import WeightsError as WeightsError
    from .selection import select_samples as select_samples
    from .supcon import SupConEncoder as SupConEncoder
    from .wgan import WGAN as WGAN


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
