"""Training tricks as Lightning callbacks; each works in any project that imports `lightning.pytorch`."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if __name__ != "litzoo.callbacks":
    raise ImportError("import it as litzoo.callbacks: a bare `callbacks` would be a second copy of the package")

CALLBACKS = {
    "CheckpointAverage": "checkpoint_average",
    "CollapseWatch": "collapse_watch",
    "ConfusionMatrixPlot": "confusion_matrix_plot",
    "CriticalPointsPlot": "critical_points_plot",
    "DecisionBoundaryPlot": "decision_boundary_plot",
    "DiscriminativeLR": "discriminative_lr",
    "EMA": "ema",
    "EmbeddingMetrics": "embedding_metrics",
    "EmbeddingPlot": "embedding_plot",
    "FGM": "fgm",
    "FeatureRank": "feature_rank",
    "Flooding": "flooding",
    "GradualUnfreeze": "gradual_unfreeze",
    "KNNMonitor": "knn_monitor",
    "LinearProbe": "linear_probe",
    "NeighbourGallery": "neighbour_gallery",
    "PartPlot": "part_plot",
    "PerClassTable": "per_class_table",
    "PseudoLabels": "pseudo_labels",
    "RelationPairsPlot": "relation_pairs_plot",
    "SAM": "sam",
    "SWA": "swa",
    "SampleGrid": "sample_grid",
    "SnapshotEnsemble": "snapshot_ensemble",
    "StepSeed": "step_seed",
    "TestTimeAugmentation": "test_time_augmentation",
}
# What stands beside a callback.
_BESIDE = {"PseudoLabelDataset": "pseudo_labels", "average_checkpoints": "swa", "discriminative_param_groups": "discriminative_lr"}
__all__ = list(CALLBACKS) + list(_BESIDE)

if TYPE_CHECKING:
    from .checkpoint_average import CheckpointAverage as CheckpointAverage
    from .collapse_watch import CollapseWatch as CollapseWatch
    from .confusion_matrix_plot import ConfusionMatrixPlot as ConfusionMatrixPlot
    from .critical_points_plot import CriticalPointsPlot as CriticalPointsPlot
    from .decision_boundary_plot import DecisionBoundaryPlot as DecisionBoundaryPlot
    from .discriminative_lr import DiscriminativeLR as DiscriminativeLR
    from .discriminative_lr import discriminative_param_groups as discriminative_param_groups
    from .ema import EMA as EMA
    from .embedding_metrics import EmbeddingMetrics as EmbeddingMetrics
    from .embedding_plot import EmbeddingPlot as EmbeddingPlot
    from .feature_rank import FeatureRank as FeatureRank
    from .fgm import FGM as FGM
    from .flooding import Flooding as Flooding
    from .gradual_unfreeze import GradualUnfreeze as GradualUnfreeze
    from .knn_monitor import KNNMonitor as KNNMonitor
    from .linear_probe import LinearProbe as LinearProbe
    from .neighbour_gallery import NeighbourGallery as NeighbourGallery
    from .part_plot import PartPlot as PartPlot
    from .per_class_table import PerClassTable as PerClassTable
    from .pseudo_labels import PseudoLabelDataset as PseudoLabelDataset
    from .pseudo_labels import PseudoLabels as PseudoLabels
    from .relation_pairs_plot import RelationPairsPlot as RelationPairsPlot
    from .sam import SAM as SAM
    from .sample_grid import SampleGrid as SampleGrid
    from .snapshot_ensemble import SnapshotEnsemble as SnapshotEnsemble
    from .step_seed import StepSeed as StepSeed
    from .swa import SWA as SWA
    from .swa import average_checkpoints as average_checkpoints
    from .test_time_augmentation import TestTimeAugmentation as TestTimeAugmentation


def __getattr__(name: str) -> Any:
    file = CALLBACKS.get(name) or _BESIDE.get(name)
    if file is not None:
        return getattr(import_module(f"{__name__}.{file}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
