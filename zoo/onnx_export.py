"""Models as ONNX files, each checked against the model before it gets its name."""

import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from .files import whole_file
from .functional.points import normalize_points
from .layers.modes import evaluating
from .safe_reading import WeightsError

# Largest difference to the model that a file may show, in probabilities.
_TOLERANCE = 1e-4


class _Clouds(nn.Module):
    """What `predict` does to clouds of one size: raw clouds in, class probabilities out."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, points: Tensor) -> Tensor:
        """`(B, N, 3)` -> `(B, C)`."""
        return self.model(normalize_points(points, self.model.normalization)).softmax(dim=1)


def export_onnx(model: LightningModule, path: str | os.PathLike[str]) -> None:
    """Write a classifier of point clouds as one ONNX file: raw clouds in, class probabilities out, as `model.predict` gives them.

    Its input `points` is `(batch, points, 3)` float32, any number of clouds of any number of points; its output `probabilities` is
    `(batch, classes)`; the class names are in its metadata, as a line each. Before it gets its name, the file is run by onnxruntime on
    another number of clouds and points and compared with the model. A file of that name is replaced.

    Args:
        model: a classifier of point clouds, `input_kind = "points"`.
        path: where to write, ending in `.onnx`.

    Raises:
        WeightsError: if the model is of another kind, the path cannot be used, a library of the extra `export` is missing, or the file
            does not compute what the model does.

    Example:
        >>> export_onnx(litzoo.load("pointnet_furniture"), "pointnet.onnx")
        >>> session = onnxruntime.InferenceSession("pointnet.onnx")
        >>> session.run(None, {"points": np.random.rand(1, 2048, 3).astype("f4")})[0].shape
        (1, 11)
    """
    path = Path(path).expanduser()
    if getattr(model, "input_kind", None) != "points":
        raise WeightsError(f"{type(model).__name__} cannot be exported to ONNX: only classifiers of point clouds can")
    head = model.hparams.get("head", "linear")
    if head != "linear":
        raise WeightsError(f"a classifier with head {head} cannot be exported to ONNX: train one with head linear on the same encoder")
    if path.suffix != ".onnx":
        raise WeightsError(f"{path} must end in .onnx")
    if not path.parent.is_dir():
        raise WeightsError(f"there is no folder {path.parent} to write {path.name} to; make it first")
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  # torch needs it
    except ImportError as error:
        raise WeightsError(f'{error.name} is missing: pip install "litzoo[export]"') from error

    with whole_file(path) as temporary, evaluating(model):
        whole = _Clouds(model).eval()
        example = torch.rand(2, 64, 3, device=model.device)
        program = torch.onnx.export(
            whole,
            (example,),
            dynamo=True,
            input_names=["points"],
            output_names=["probabilities"],
            dynamic_shapes=({0: torch.export.Dim("batch"), 1: torch.export.Dim("points")},),
            external_data=False,
            verbose=False,
        )
        assert program is not None
        program.save(temporary)
        file = onnx.load(temporary)
        onnx.helper.set_model_props(file, {"class_names": "\n".join(getattr(model, "class_names", []))})
        onnx.save(file, temporary)
        clouds = torch.randn(3, 200, 3, generator=torch.Generator().manual_seed(0)) * 2 + 1
        with torch.no_grad():
            expected = whole(clouds.to(model.device)).cpu()
        session = onnxruntime.InferenceSession(temporary.read_bytes(), providers=["CPUExecutionProvider"])
        found = torch.from_numpy(session.run(None, {"points": clouds.numpy()})[0])
        difference = float((found - expected).abs().max())
        if not difference < _TOLERANCE:
            raise WeightsError(f"the ONNX file differs from the model by {difference:.2g} in a probability and is not kept")
