"""A prediction leaves every layer in its mode: a frozen part may be in evaluation mode while the rest trains."""

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from litzoo.zoo import ImageClassifier, PointNetClassifier, PointNetSegmenter
from litzoo.zoo.layers.modes import evaluating

CASES: dict[str, tuple[Callable[[], Any], str, tuple[Any, ...]]] = {
    "images": (lambda: ImageClassifier(3, backbone="conv4", image_size=16), "backbone", (torch.zeros(1, 3, 16, 16, dtype=torch.uint8),)),
    "clouds": (lambda: PointNetClassifier(3), "backbone", (torch.rand(2, 20, 3),)),
    "parts": (lambda: PointNetSegmenter(2, 3, [0, 0, 1], network="semantic"), "backbone", (torch.rand(2, 20, 3), torch.tensor([0, 1]))),
}


@pytest.mark.parametrize("kind", CASES)
def test_predict_leaves_a_frozen_part_in_evaluation_mode(kind: str) -> None:
    make, part, inputs = CASES[kind]
    model = make().train()
    getattr(model, part).eval()
    before = [layer.training for layer in model.modules()]
    model.predict(*inputs)
    assert [layer.training for layer in model.modules()] == before


def test_modes_come_back_after_an_error() -> None:
    layers = nn.Sequential(nn.BatchNorm1d(2).eval(), nn.Dropout())
    with contextlib.suppress(RuntimeError), evaluating(layers):
        assert not any(layer.training for layer in layers.modules())
        raise RuntimeError("on purpose")
    assert [layer.training for layer in layers.modules()] == [True, False, True]
