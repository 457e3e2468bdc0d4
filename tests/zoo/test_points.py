"""Normalisation of clouds, against loops in float64."""

import math

import numpy as np
import pytest
import torch

from litzoo.zoo.functional.points import farthest_points, normalize_points, unit_box, unit_sphere

CLOUDS = torch.randn(5, 37, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 4.0, 0.2]) + torch.tensor([3.0, -1.0, 10.0])


def naive_sphere(cloud: list[list[float]]) -> list[list[float]]:
    mean = [sum(axis) / len(cloud) for axis in zip(*cloud, strict=True)]
    centred = [[x - m for x, m in zip(point, mean, strict=True)] for point in cloud]
    radius = max(math.dist(point, (0, 0, 0)) for point in centred)
    return [[x / radius for x in point] for point in centred]


def naive_box(cloud: list[list[float]]) -> list[list[float]]:
    axes = list(zip(*cloud, strict=True))
    return [[(x - min(a)) / (max(a) - min(a)) for x, a in zip(point, axes, strict=True)] for point in cloud]


@pytest.mark.parametrize(("function", "naive"), [(unit_sphere, naive_sphere), (unit_box, naive_box)])
def test_against_loops(function, naive) -> None:
    expected = torch.tensor([naive(cloud.double().tolist()) for cloud in CLOUDS], dtype=torch.float64)
    torch.testing.assert_close(function(CLOUDS.double()), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(function(CLOUDS).double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("function", [unit_sphere, unit_box])
def test_properties(function) -> None:
    for cloud, given in zip(CLOUDS, function(CLOUDS), strict=True):
        torch.testing.assert_close(function(cloud), given)  # (N, 3) works, and a cloud does not depend on its batch
    torch.testing.assert_close(function(function(CLOUDS)), function(CLOUDS), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(function(CLOUDS.double() * 7 - 2), function(CLOUDS.double()))
    assert function(CLOUDS.half()).dtype == torch.float16
    order = torch.randperm(37)
    torch.testing.assert_close(function(CLOUDS[:, order]), function(CLOUDS)[:, order], atol=1e-5, rtol=1e-4)


def test_ranges() -> None:
    sphere, box = unit_sphere(CLOUDS), unit_box(CLOUDS)
    torch.testing.assert_close(sphere.norm(dim=-1).amax(-1), torch.ones(5))
    torch.testing.assert_close(sphere.mean(1), torch.zeros(5, 3), atol=1e-5, rtol=0)
    assert torch.equal(box.amin(1), torch.zeros(5, 3))
    assert torch.equal(box.amax(1), torch.ones(5, 3))
    # unit_sphere keeps proportions, unit_box does not
    extent = CLOUDS.amax(1) - CLOUDS.amin(1)
    after = sphere.amax(1) - sphere.amin(1)
    torch.testing.assert_close(after / after[:, :1], extent / extent[:, :1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("function", [unit_sphere, unit_box])
def test_degenerate_clouds_stay_finite(function) -> None:
    assert torch.equal(function(torch.full((2, 8, 3), 0.5)), torch.zeros(2, 8, 3))
    flat = CLOUDS.clone()
    flat[..., 1] = 0.25
    assert function(flat)[..., 1].abs().max() == 0
    assert function(flat).isfinite().all()


@pytest.mark.parametrize("number", [3, 100, 1000, 2048])
@pytest.mark.parametrize("value", [0.1, 1e-3, 12345.678])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_coinciding_points_become_zero(number: int, value: float, dtype: torch.dtype) -> None:
    """The mean of equal numbers is not always that number, and 1e-12 is zero in float16."""
    points = torch.full((1, number, 3), value, dtype=dtype)
    assert torch.equal(unit_sphere(points), torch.zeros_like(points))
    assert torch.equal(unit_box(points), torch.zeros_like(points))


def test_far_from_the_origin() -> None:
    grid = torch.randint(-8, 9, (1, 200, 3)) * 1.0
    torch.testing.assert_close(unit_sphere(grid + 2**23), unit_sphere(grid), atol=1e-6, rtol=0)


def test_by_name() -> None:
    assert torch.equal(normalize_points(CLOUDS, "unit_sphere"), unit_sphere(CLOUDS))
    assert torch.equal(normalize_points(CLOUDS, "unit_box"), unit_box(CLOUDS))
    assert normalize_points(CLOUDS, "none") is CLOUDS
    with pytest.raises(ValueError, match="unit_sphere, unit_box, none; got 'sphere'"):
        normalize_points(CLOUDS, "sphere")  # type: ignore[arg-type]


@pytest.mark.parametrize("normalization", ["unit_sphere", "unit_box", "none"])
def test_repeated_points_do_not_count(normalization: str) -> None:
    count = torch.tensor([37, 20, 1, 5, 36])
    padded = torch.stack([cloud[torch.arange(50) % size] for cloud, size in zip(CLOUDS, count.tolist(), strict=True)])
    found = normalize_points(padded, normalization, count)
    for cloud, size, result in zip(CLOUDS, count.tolist(), found, strict=True):
        expected = normalize_points(cloud[:size], normalization)
        torch.testing.assert_close(result, expected[torch.arange(50) % size], rtol=1e-5, atol=1e-6)


def naive_farthest(cloud: torch.Tensor, number: int) -> list[int]:
    """Each time the first of the points not yet taken whose least distance to those taken is largest; in float64."""
    points, taken = cloud.double(), [0]
    for _ in range(number - 1):
        nearest = [min((point - points[other]).square().sum().item() for other in taken) for point in points]
        taken.append(max((place for place in range(len(points)) if place not in taken), key=nearest.__getitem__))
    return taken


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("number", [1, 2, 20, 37])
def test_farthest_points(dtype: torch.dtype, number: int) -> None:
    found = farthest_points(CLOUDS.to(dtype), number)
    assert found.dtype == torch.int64
    assert found.tolist() == [naive_farthest(cloud, number) for cloud in CLOUDS]
    assert torch.equal(found, farthest_points(CLOUDS.to(dtype), 37)[:, :number])


def test_farthest_points_of_a_grid() -> None:
    """Many points are equally far: the first of them is taken."""
    axis = torch.arange(4.0)
    grid = torch.cartesian_prod(axis, axis, axis)[None]
    for points in (grid, grid.half(), -grid):
        assert farthest_points(points, 64)[0].tolist() == naive_farthest(grid[0], 64)


def test_copies_are_taken_last() -> None:
    cloud = CLOUDS[:, :10]
    padded = torch.cat([cloud, cloud, cloud], 1)
    found = farthest_points(padded, 30)
    assert torch.equal(found[:, :10], farthest_points(cloud, 10))
    assert found[:, 10:].tolist() == [list(range(10, 30))] * 5
    assert farthest_points(torch.zeros(2, 5, 3), 5).tolist() == [[0, 1, 2, 3, 4]] * 2


@pytest.mark.parametrize("number", [0, 38])
def test_impossible_number_of_farthest_points(number: int) -> None:
    with pytest.raises(ValueError, match=r"number must lie in \[1, 37\]"):
        farthest_points(CLOUDS, number)


def test_farthest_points_like_open3d() -> None:
    open3d = pytest.importorskip("open3d")
    for cloud, found in zip(CLOUDS, farthest_points(CLOUDS, 20), strict=True):
        vectors = open3d.utility.Vector3dVector(cloud.double().numpy())
        chosen = open3d.geometry.PointCloud(vectors).farthest_point_down_sample(20)
        expected = {tuple(point) for point in np.asarray(chosen.points).tolist()}
        assert {tuple(point) for point in cloud[found].double().tolist()} == expected
