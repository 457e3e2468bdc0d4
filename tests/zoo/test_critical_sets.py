"""Critical points and upper-bound shapes: what is left out or put in does not change the logits."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

import litzoo
from litzoo.zoo import LogisticRegression, PointNetClassifier
from litzoo.zoo.critical_sets import critical_points, upper_bound_points
from litzoo.zoo.functional.points import unit_sphere


def random_model(**settings: Any) -> PointNetClassifier:
    """A network with random weights, statistics and transforms, in float64."""
    torch.manual_seed(0)
    model = PointNetClassifier(5, **settings).double().eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.weight, 1, 0.5)
            nn.init.normal_(module.bias, 0, 0.3)
            nn.init.normal_(module.running_mean, 0, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0, 0.03)
    return model


def clouds(number: int = 3, points: int = 300) -> torch.Tensor:
    torch.manual_seed(1)
    return unit_sphere(torch.rand(number, points, 3, dtype=torch.float64) * torch.tensor([1.0, 0.5, 0.2]))


MODELS: dict[str, dict[str, Any]] = {
    "both": {},
    "neither": {"input_transform": False, "feature_transform": False},
    "input": {"feature_transform": False},
    "feature": {"input_transform": False},
    "compact": {"variant": "compact"},
}


@pytest.mark.parametrize("transforms", MODELS)
def test_the_other_points_can_be_left_out(transforms: str) -> None:
    model, points = random_model(**MODELS[transforms]), clouds()
    logits = model(points)
    for number, kept in enumerate(critical_points(model, points)):
        assert 1 < len(kept) < points.shape[1]
        assert torch.equal(kept, kept.unique())
        torch.testing.assert_close(model(points[number : number + 1, kept])[0], logits[number], rtol=0, atol=1e-12)
        # And any set between: the critical points and some others.
        between = torch.cat([kept, torch.arange(0, points.shape[1], 7)]).unique()
        torch.testing.assert_close(model(points[number : number + 1, between])[0], logits[number], rtol=0, atol=1e-12)


@pytest.mark.parametrize("transforms", MODELS)
def test_every_critical_point_is_one(transforms: str) -> None:
    """Without it some maximum is another."""
    model, points = random_model(**MODELS[transforms]), clouds(1, 40)
    maxima = [found.value for found in model.backbone(points).maxima]
    kept = critical_points(model, points)[0].tolist()
    for point in range(points.shape[1]):
        rest = torch.cat([points[:, :point], points[:, point + 1 :]], dim=1)
        changed = any((now.value - before).abs().max() > 1e-11 for now, before in zip(model.backbone(rest).maxima, maxima, strict=True))
        assert changed == (point in kept)


@pytest.mark.parametrize("transforms", MODELS)
def test_the_whole_upper_bound_can_be_put_in(transforms: str) -> None:
    model, points = random_model(**MODELS[transforms]), clouds(2)
    logits = model(points)
    for number, shape in enumerate(upper_bound_points(model, points, resolution=20)):
        assert 0 < len(shape) < 20**3
        filled = torch.cat([points[number], shape])[None]
        torch.testing.assert_close(model(filled)[0], logits[number], rtol=0, atol=1e-12)


def test_no_other_grid_point_can_be_put_in() -> None:
    """In any channel of any maximum, each point outside the upper bound exceeds the cloud."""
    model, points = random_model(), clouds(1)
    limits = [found.value[0] for found in model.backbone(points).maxima]
    inside = {tuple(point) for point in upper_bound_points(model, points, resolution=6)[0].tolist()}
    axis = torch.linspace(-1, 1, 6, dtype=torch.float64)
    for point in torch.cartesian_prod(axis, axis, axis):
        found = model.backbone(torch.cat([points, point[None, None]], dim=1)).maxima
        changed = any((now.value[0] > before + 1e-12).any() for now, before in zip(found, limits, strict=True))
        assert changed == (tuple(point.tolist()) not in inside)


def test_trained_weights() -> None:
    model = litzoo.load("pointnet_furniture")
    torch.manual_seed(0)
    points = unit_sphere(torch.rand(2, 1024, 3) * torch.tensor([1.0, 0.5, 0.2]))
    shapes = upper_bound_points(model, points, resolution=16)
    with torch.no_grad():
        logits = model(points)
        for number, kept in enumerate(critical_points(model, points)):
            assert len(kept) < 1024
            alone = model(points[number : number + 1, kept])[0]
            filled = model(torch.cat([points[number, kept], shapes[number]])[None])[0]
            torch.testing.assert_close(alone, logits[number], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(filled, logits[number], rtol=1e-4, atol=1e-4)


def test_channels_that_are_cut_off_have_no_critical_point() -> None:
    model = random_model(**MODELS["neither"])
    nn.init.constant_(model.backbone.wide[-2].bias, -100)
    points = clouds(2)
    assert [kept.tolist() for kept in critical_points(model, points)] == [[0], [0]]
    torch.testing.assert_close(model(points[:, :1]), model(points), rtol=0, atol=0)


def test_the_mode_of_the_model_is_kept_and_its_statistics_stay() -> None:
    model, points = random_model().train(), clouds(1)
    model.backbone.wide.eval()  # frozen
    before = {name: value.clone() for name, value in model.state_dict().items()}
    critical_points(model, points)
    upper_bound_points(model, points, resolution=4)
    assert model.training
    assert model.backbone.training
    assert not model.backbone.wide[1].training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_synchronised_batchnorm() -> None:
    """`Trainer(sync_batchnorm=True)` puts it in, also where the other processes are gone."""
    model, points = random_model(), clouds(1)
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    assert torch.equal(critical_points(synchronised, points)[0], critical_points(model, points)[0])
    assert torch.equal(upper_bound_points(synchronised, points, 12)[0], upper_bound_points(model, points, 12)[0])


def test_other_models_are_refused() -> None:
    with pytest.raises(TypeError, match="LogisticRegression has none"):
        critical_points(LogisticRegression(num_features=2, num_classes=2), torch.rand(1, 4, 3))
    with pytest.raises(ValueError, match="resolution must be at least 2"):
        upper_bound_points(random_model(), clouds(1), resolution=1)
