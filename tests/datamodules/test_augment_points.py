"""Augmentation of clouds: distributions, and a plain loop over samples that uses the same numbers."""

import hashlib
import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from litzoo.datamodules.augment import points as module
from litzoo.datamodules.augment.points import PointAugmentation, drop_points, rotation_matrices, subsample
from litzoo.zoo.functional.random import fold_in, normal, random_order, uniform

MANY = fold_in(0, torch.arange(20_000))
NEUTRAL = {"rotation": "none", "scale": (1.0, 1.0), "shift": 0.0, "dropout": 0.0, "jitter": 0.0}


def ks(sample: Tensor, distribution: object) -> float:
    return float(stats.kstest(sample.flatten().double().numpy(), distribution).pvalue)


@pytest.mark.parametrize("rotation", ["yaw", "full"])
def test_rotations_are_rotations(rotation: str) -> None:
    matrices = rotation_matrices(MANY[:500], rotation).double()
    torch.testing.assert_close(matrices @ matrices.mT, torch.eye(3).double().expand(500, 3, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.det(matrices), torch.ones(500).double(), atol=1e-5, rtol=0)


def test_full_rotations_are_uniform() -> None:
    matrices = rotation_matrices(MANY, "full")
    n = len(MANY)
    # Under the uniform distribution each entry has mean 0, second moment 1/3 and fourth 1/5, and entries are uncorrelated.
    flat = matrices.view(n, 9).double()
    assert flat.mean(0).abs().max() < 5 * math.sqrt(1 / 3 / n)
    covariance = flat.T @ flat / n
    assert (covariance - torch.eye(9) / 3).abs().max() < 5 * math.sqrt(0.2 / n)
    assert ((flat**4).mean(0) - 0.2).abs().max() < 5 * math.sqrt(1 / 9 / n)
    # A column is uniform on the sphere, so each coordinate is uniform on [-1, 1] (Archimedes).
    for entry in flat.T:
        assert ks(entry, stats.uniform(-1, 2).cdf) > 1e-4
    # The angle has density (1 - cos a) / pi.
    angle = ((flat[:, 0] + flat[:, 4] + flat[:, 8] - 1) / 2).clamp(-1, 1).acos()
    assert ks(angle, lambda a: (a - np.sin(a)) / np.pi) > 1e-3


def test_yaw_keeps_y_and_is_uniform() -> None:
    points = torch.randn(len(MANY), 2, 3)
    turned = points @ rotation_matrices(MANY, "yaw").mT
    assert torch.equal(turned[..., 1], points[..., 1])
    matrices = rotation_matrices(MANY, "yaw")
    angle = torch.atan2(matrices[:, 0, 2], matrices[:, 0, 0])
    assert ks(angle, stats.uniform(-math.pi, 2 * math.pi).cdf) > 1e-3
    quarter = torch.tensor([[0.0, 0.0, 1.0]]) @ matrices.mT  # z turns towards x by the angle
    torch.testing.assert_close(quarter[:, 0, 0], angle.sin(), atol=1e-5, rtol=0)


def test_other_rotations_are_refused() -> None:
    with pytest.raises(ValueError, match="'yaw' or 'full', got 'none'"):
        rotation_matrices(MANY[:2], "none")


def alone(**setting: object) -> PointAugmentation:
    return PointAugmentation(**{**NEUTRAL, **setting})


def test_scale() -> None:
    ones = torch.ones(len(MANY), 1, 3)
    axes = alone(scale=(0.5, 2.0))(ones, MANY)[0][:, 0]
    assert ks(axes, stats.uniform(0.5, 1.5).cdf) > 1e-3
    assert np.abs(np.corrcoef(axes.T.numpy()) - np.eye(3)).max() < 0.03
    same = alone(scale=(0.5, 2.0), scale_axes=False)(ones, MANY)[0][:, 0]
    assert torch.equal(same[:, 0], same[:, 1])
    assert torch.equal(same[:, 0], same[:, 2])
    assert ks(same[:, 0], stats.uniform(0.5, 1.5).cdf) > 1e-3


def test_shift() -> None:
    shifted = alone(shift=0.3)(torch.zeros(len(MANY), 2, 3), MANY)[0]
    assert torch.equal(shifted[:, 0], shifted[:, 1])
    assert ks(shifted[:, 0], stats.uniform(-0.3, 0.6).cdf) > 1e-3
    assert np.abs(np.corrcoef(shifted[:, 0].T.numpy()) - np.eye(3)).max() < 0.03


def test_jitter() -> None:
    noise = alone(jitter=0.02, jitter_clip=1.0)(torch.zeros(100, 300, 3), MANY[:100])[0]
    assert ks(noise, stats.norm(0, 0.02).cdf) > 1e-3
    clipped = alone(jitter=0.02, jitter_clip=0.03)(torch.zeros(100, 300, 3), MANY[:100])[0]
    assert torch.equal(clipped, noise.clamp(-0.03, 0.03))


def test_dropout() -> None:
    points = torch.arange(1.0, 1001).view(1, 1000, 1).repeat(2000, 1, 3)
    dropped, _ = drop_points(points, MANY[:2000], 0.6)
    gone = (dropped != points).any(-1)
    assert torch.equal(dropped[gone], torch.ones(int(gone.sum()), 3))
    ratio = gone.float().mean(1)
    # uniform in [0, 0.6), up to the binomial noise of 1,000 points
    assert ks(ratio, stats.uniform(0, 0.6).cdf) > 1e-4
    assert gone.float().mean(0)[1:].std() < 0.02
    assert not gone[:, 0].any()


def test_subsample_is_uniform_without_replacement() -> None:
    points = torch.arange(12.0).view(1, 12, 1).repeat(6000, 1, 3)
    kept, _ = subsample(points, MANY[:6000], 5)
    index = kept[..., 0].long()
    assert all(len(set(row)) == 5 for row in index[:500].tolist())
    assert stats.chisquare(index.flatten().bincount().numpy()).pvalue > 1e-3
    more, _ = subsample(points[:3], MANY[:3], 30)
    counts = torch.stack([row[:, 0].long().bincount(minlength=12) for row in more])
    assert counts.min() >= 2
    assert counts.max() <= 3


def test_subsample_of_clouds_of_unequal_size() -> None:
    """The cloud's own points equally often, and none twice before all have come; places behind them never."""
    points = torch.arange(12.0).view(1, 12, 1).repeat(6000, 1, 3)
    count = torch.tensor([7, 12, 1]).repeat(2000)
    kept, _ = subsample(points, MANY[:6000], 5, count=count)
    index = kept[..., 0].long()
    for size in (7, 12):
        mine = index[count == size]
        assert mine.max() == size - 1
        assert all(len(set(row)) == 5 for row in mine.tolist())
        for place in range(5):
            assert stats.chisquare(mine[:, place].bincount(minlength=size).numpy()).pvalue > 1e-4
    assert (index[count == 1] == 0).all()
    more, part = subsample(points, MANY[:6000], 20, points[..., 0].long(), count)
    assert part is not None
    assert torch.equal(part, more[..., 0].long())
    for size, low, high in ((7, 2, 3), (12, 1, 2), (1, 20, 20)):
        for row in part[count == size][:200]:
            counts = row.bincount(minlength=size)
            assert len(counts) == size
            assert low <= counts.min() <= counts.max() <= high
            assert torch.equal(row[size:], row[:-size])  # again and again in the same order
    for number in (5, 12, 30):
        full = subsample(points[:9], MANY[:9], number, count=torch.full((9,), 12))[0]
        assert torch.equal(full, subsample(points[:9], MANY[:9], number)[0])


def test_augmented_clouds_of_unequal_size() -> None:
    augment = PointAugmentation(rotation="full", dropout=0.3, jitter=0.02)
    points, count = torch.randn(6, 50, 3), torch.tensor([10, 20, 30, 40, 50, 25])
    moved, _ = augment(points, MANY[:6], 15, count=count)
    padding = torch.arange(50) >= count[:, None]
    again, _ = augment(points.masked_fill(padding[..., None], 1e6), MANY[:6], 15, count=count)
    assert torch.equal(moved, again)


def test_parts_follow_their_points() -> None:
    points = torch.randn(6, 50, 3)
    part = (points[..., 0] > 0).long() + 2 * (points[..., 1] > 0).long()
    for moved, label in (
        subsample(points, MANY[:6], 20, part),
        subsample(points, MANY[:6], 120, part),
        drop_points(points, MANY[:6], 0.9, part),
        alone(dropout=0.5)(points, MANY[:6], 30, part),
    ):
        assert label is not None
        assert torch.equal(label, (moved[..., 0] > 0).long() + 2 * (moved[..., 1] > 0).long())


def test_neutral_is_bit_equal() -> None:
    points, part = torch.randn(4, 20, 3), torch.randint(3, (4, 20))
    given, label = alone()(points, MANY[:4], None, part)
    assert torch.equal(given, points)
    assert label is not None
    assert torch.equal(label, part)


def test_switching_one_draw_on_leaves_the_others() -> None:
    points = torch.randn(4, 20, 3)
    scaled = alone(scale=(0.5, 2.0))(points, MANY[:4])[0]
    both = alone(scale=(0.5, 2.0), shift=0.1)(points, MANY[:4])[0]
    shift = alone(shift=0.1)(torch.zeros_like(points), MANY[:4])[0]
    torch.testing.assert_close(both, scaled + shift)


def naive(augment: PointAugmentation, points: Tensor, key: Tensor, num_points: int, part: Tensor) -> tuple[Tensor, Tensor]:
    """One sample, one point at a time, in the order the docstring gives."""
    clouds, parts = [], []
    for cloud, k, labels in zip(points, key, part, strict=True):
        k = k.view(1)
        order = random_order(fold_in(k, module._SUBSAMPLE), len(cloud))[0].tolist()
        chosen = [order[i % len(cloud)] for i in range(num_points)]
        matrix = rotation_matrices(fold_in(k, module._ROTATE), augment.rotation)[0].double()
        scale = uniform(fold_in(k, module._SCALE), 3, low=augment.scale[0], high=augment.scale[1])[0].double()
        shift = uniform(fold_in(k, module._SHIFT), 3, low=-augment.shift, high=augment.shift)[0].double()
        ratio = float(uniform(fold_in(k, module._DROP, 0), high=augment.dropout))
        drop = uniform(fold_in(k, module._DROP, 1), num_points)[0].tolist()
        noise = normal(fold_in(k, module._JITTER), num_points, 3)[0].double() * augment.jitter
        new = [matrix @ cloud[i].double() * scale + shift for i in chosen]
        clouds.append(
            torch.stack(
                [
                    (new[0] if drop[i] < ratio else new[i]) + noise[i].clamp(-augment.jitter_clip, augment.jitter_clip)
                    for i in range(num_points)
                ]
            )
        )
        parts.append(torch.stack([labels[chosen[0]] if drop[i] < ratio else labels[chosen[i]] for i in range(num_points)]))
    return torch.stack(clouds), torch.stack(parts)


@pytest.mark.parametrize("rotation", ["yaw", "full"])
@pytest.mark.parametrize("num_points", [16, 40, 100])
def test_against_a_loop(rotation: str, num_points: int) -> None:
    augment = PointAugmentation(rotation=rotation, scale=(0.7, 1.4), shift=0.2, dropout=0.6, jitter=0.05, jitter_clip=0.08)
    points, part, key = torch.randn(5, 40, 3), torch.randint(4, (5, 40)), MANY[:5]
    given, label = augment(points, key, num_points, part)
    expected, expected_part = naive(augment, points, key, num_points, part)
    torch.testing.assert_close(given.double(), expected, atol=1e-5, rtol=1e-5)
    assert label is not None
    assert torch.equal(label, expected_part)


@pytest.mark.parametrize("size", [1, 3, 100])
def test_points_are_turned_like_by_a_plain_product(size: int) -> None:
    points, matrix = torch.randn(3, size, 6)[..., ::2], rotation_matrices(MANY[:3], "full").mT
    expected = points.double() @ matrix.double()
    for given in (points, points.double(), points.clone().requires_grad_()):
        moved = module._transform(given, matrix)
        assert (moved.dtype, moved.requires_grad) == (given.dtype, given.requires_grad)
        torch.testing.assert_close(moved.double(), expected, atol=2e-6, rtol=1e-6)
    torch.testing.assert_close(module._transform_plain(points, matrix).double(), expected, atol=2e-6, rtol=1e-6)


def fingerprint(numbers: Tensor) -> str:
    return hashlib.sha256(numbers.contiguous().numpy().tobytes()).hexdigest()[:16]


RECORDED_KEY = fold_in(7, torch.arange(16))
RECORDED_PART, RECORDED_COUNT = torch.arange(200).expand(16, 200), 12 * torch.arange(16) + 20


@pytest.mark.parametrize(
    ("number", "full", "counted"),
    [
        (50, "fa45cba5f827c674", "552186847ade6145"),
        (200, "1218fce175285c94", "39eb5dc223eb2afb"),
        (450, "2ca835be00d334ab", "8155a8261cb4d406"),
    ],
)
def test_recorded_subsets(number: int, full: str, counted: str) -> None:
    """Published numbers were scored on them."""
    points = RECORDED_PART[..., None].float().expand(-1, -1, 3)
    for count, recorded in ((None, full), (RECORDED_COUNT, counted)):
        kept, part = subsample(points, RECORDED_KEY, number, RECORDED_PART, count)
        assert part is not None
        assert fingerprint(part) == recorded
        assert torch.equal(kept, part[..., None].float().expand(-1, -1, 3))


@pytest.mark.parametrize(
    ("setting", "chosen", "first", "last", "total"),
    [
        ({}, "f7b419b4ed78a6df", [0.30555987, 0.27127299, 0.33627108], [0.51952773, 0.42411989, 0.58205676], 1546.82844),
        (
            *({"rotation": "yaw", "jitter": 0.01}, "f7b419b4ed78a6df"),
            *([0.08251420, 0.28378627, 0.46736771], [-0.64074719, 0.42538673, -0.24638833], 719.86973),
        ),
        (
            *({"rotation": "full", "scale_axes": False, "dropout": 0.5, "jitter": 0.05, "jitter_clip": 0.02}, "ff7d9b172d0e0d63"),
            *([0.07458557, -0.41567552, 0.42850500], [-0.60902339, 0.04957482, 0.61798686], 134.28570),
        ),
        (
            *({"scale": (1.0, 1.0), "shift": 0.0, "rotation": "yaw"}, "f7b419b4ed78a6df"),
            *([0.13957587, 0.38144329, 0.52127647], [-0.58724570, 0.44329897, -0.21996142], 745.53712),
        ),
    ],
)
def test_recorded_clouds(setting: dict[str, object], chosen: str, first: list[float], last: list[float], total: float) -> None:
    points = torch.arange(16 * 200 * 3).view(16, 200, 3).remainder(97).float() / 97
    moved, part = PointAugmentation(**setting)(points, RECORDED_KEY, 64, RECORDED_PART)
    assert part is not None
    assert fingerprint(part) == chosen
    np.testing.assert_allclose(moved[[3, 15], [17, 63]], [first, last], rtol=0, atol=1e-6)
    assert float(moved.double().sum()) == pytest.approx(total, abs=1e-3)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"rotation": "roll"}, "rotation must be one of none, yaw, full; got 'roll'"),
        ({"scale": (0.0, 1.0)}, "scale must be a range"),
        ({"scale": (1.2, 0.8)}, "scale must be a range"),
        ({"dropout": 1.0}, "dropout must lie in"),
        ({"jitter": -0.1}, "at least 0"),
    ],
)
def test_impossible_settings_are_refused(setting: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PointAugmentation(**setting)
