"""ONNX files: what onnxruntime computes is what `predict` gives."""

import sys
import warnings
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

import litzoo
from litzoo.zoo import EncoderClassifier, LogisticRegression, PointNetClassifier, WeightsError
from litzoo.zoo.cli import main
from litzoo.zoo.onnx_export import export_onnx


@pytest.mark.parametrize("normalization", ["unit_sphere", "unit_box"])
def test_the_file_predicts_as_the_model(normalization: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = PointNetClassifier(4, class_names=["a", "b\"'", "ü", "d"], normalization=normalization)
    for transform in (model.backbone.input_transform, model.backbone.feature_transform):
        torch.nn.init.normal_(transform.head[-1].weight, std=0.05)
    model.backbone.eval()  # frozen
    export_onnx(model, tmp_path / "model.onnx")
    assert model.training
    assert not model.backbone.local.training
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.onnx"]
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    assert session.get_modelmeta().custom_metadata_map["class_names"].split("\n") == model.class_names
    for shape in ((1, 1000, 3), (5, 7, 3)):
        clouds = np.random.default_rng(0).normal(size=shape).astype(np.float32)
        found = session.run(["probabilities"], {"points": clouds})[0]
        assert np.allclose(found, model.predict(torch.from_numpy(clouds)).numpy(), atol=1e-5)


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "furniture.onnx")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*in training mode.*")
        assert main(["export", "pointnet_furniture", "--output", path]) == 0
    assert "equal to the model in onnxruntime" in capsys.readouterr().out
    clouds = torch.rand(2, 300, 3)
    found = onnxruntime.InferenceSession(path).run(None, {"points": clouds.numpy()})[0]
    assert np.allclose(found, litzoo.load("pointnet_furniture").predict(clouds).numpy(), atol=1e-5)
    assert main(["export", "pointnet_furniture", "--output", path]) == 2
    assert "exists already" in capsys.readouterr().err


def test_what_cannot_be_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = PointNetClassifier(2)
    with pytest.raises(WeightsError, match="only classifiers of point clouds"):
        export_onnx(LogisticRegression(num_features=2, num_classes=2), tmp_path / "a.onnx")
    near = EncoderClassifier("pointnet_furniture", 2, head="knn")
    with pytest.raises(WeightsError, match=r"with head knn cannot be exported to ONNX: train one with head linear"):
        export_onnx(near, tmp_path / "near.onnx")
    with pytest.raises(WeightsError, match=r"must end in \.onnx"):
        export_onnx(model, tmp_path / "a.pt")
    with pytest.raises(WeightsError, match="make it first"):
        export_onnx(model, tmp_path / "none" / "a.onnx")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(WeightsError, match=r"onnxscript is missing: pip install .*litzoo\[export\]"):
        export_onnx(model, tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir())
