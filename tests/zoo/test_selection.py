"""Data selection: rankings against scipy and naive sums, the rule against a loop, and the driver against the models themselves."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy as scipy_entropy
from torch import Tensor, nn

from litzoo.datamodules import DigitsDataModule
from litzoo.zoo import ImageClassifier, LogisticRegression, PointNetClassifier, select_samples
from litzoo.zoo.functional.data_selection import disagreement, entropy, margin, rank_queue, select
from litzoo.zoo.functional.label_cleaning import fuse
from litzoo.zoo.functional.views import flip


def probabilities(seed: int, *shape: int, sharpness: float = 2.0) -> Tensor:
    return (sharpness * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).softmax(dim=-1)


# Rankings


def test_disagreement_is_the_jensen_shannon_divergence() -> None:
    pair = probabilities(0, 2, 50, 7)
    expected = [jensenshannon(first, second) ** 2 for first, second in zip(*pair.numpy(), strict=True)]
    np.testing.assert_allclose(disagreement(pair), expected, atol=1e-12)


@pytest.mark.parametrize("weights", [None, [1.0, 0.0, 2.5, 0.5]])
def test_disagreement_is_the_mean_divergence_from_the_mean(weights: list[float] | None) -> None:
    committee = probabilities(1, 4, 20, 5)
    share = np.full(4, 0.25) if weights is None else np.array(weights) / 4
    mean = np.einsum("k,knc->nc", share, committee.numpy())
    expected = [sum(share[k] * scipy_entropy(committee[k, n].numpy(), mean[n]) for k in range(4)) for n in range(20)]
    found = disagreement(committee, None if weights is None else torch.tensor(weights))
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_limits_of_disagreement() -> None:
    sure = torch.eye(3)[:, None]
    assert float(disagreement(sure)) == pytest.approx(math.log(3))
    assert disagreement(probabilities(0, 1, 9, 3).float().expand(5, -1, -1)).abs().max() < 1e-12, "they agree, however unsure"


def test_entropy_and_margin() -> None:
    rows = probabilities(2, 30, 6)
    np.testing.assert_allclose(entropy(rows), scipy_entropy(rows.numpy(), axis=1), atol=1e-12)
    ordered = np.sort(rows.numpy(), axis=1)
    np.testing.assert_allclose(margin(rows), ordered[:, -1] - ordered[:, -2], atol=1e-15)
    assert entropy(torch.tensor([1.0, 0.0])) == 0, "0 log 0 is 0"


# The rule


@pytest.mark.parametrize("rank", ["disagreement", "entropy", "margin"])
@pytest.mark.parametrize("threshold", [0.0, 0.6, 1.0])
def test_the_rule_by_a_loop(rank: Any, threshold: float) -> None:
    production, members = probabilities(3, 200, 4, sharpness=3.0), probabilities(4, 3, 200, 4)
    members[:, :100] = production[:100]  # on these they agree
    weights = torch.tensor([1.0, 3.0, 0.0])
    fused = fuse(members.log()[:, None], weights[:, None])
    found = select(production, fused, members, weights, threshold, rank)
    useful = []
    for n in range(200):
        p, f = production[n].tolist(), fused[n].tolist()
        y, z = p.index(max(p)), f.index(max(f))
        assert int(found.label[n]) == y
        assert int(found.proposed[n]) == z
        assert float(found.score[n]) == p[y]
        assert float(found.proposed_score[n]) == f[z]
        assert bool(found.left_out[n]) == (y == z and p[y] >= threshold and f[y] >= threshold)
        assert int(found.against[n]) == sum(int(members[m, n].argmax()) != y for m in range(3))
        # The production model weighs as much as a member on average: 1/4, and the members 3/16, 9/16 and 0.
        mean = 0.25 * production[n] + 0.1875 * members[0, n] + 0.5625 * members[1, n]
        of_members = 0.25 * scipy_entropy(p) + 0.1875 * scipy_entropy(members[0, n]) + 0.5625 * scipy_entropy(members[1, n])
        ordered = sorted(f)
        expected = {"disagreement": scipy_entropy(mean) - of_members, "entropy": scipy_entropy(f), "margin": 1 - ordered[-1] + ordered[-2]}
        useful.append(float(expected[rank]))
    np.testing.assert_allclose(found.usefulness, useful, atol=1e-12)
    queue = [n for n in range(200) if not found.left_out[n]]
    values = found.usefulness.tolist()
    assert found.order.tolist() == sorted(queue, key=lambda n: -values[n])
    assert bool(found.left_out.any()) == (threshold < 1)


def test_without_members_the_ensemble_is_one() -> None:
    production, fused = probabilities(5, 40, 3), probabilities(6, 40, 3)
    found = select(production, fused)
    np.testing.assert_allclose(found.usefulness, disagreement(torch.stack([production, fused])))
    assert found.against.tolist() == (production.argmax(1) != fused.argmax(1)).long().tolist()


def test_a_tie_of_the_ensemble_is_no_disagreement() -> None:
    found = select(torch.tensor([[0.1, 0.9], [0.9, 0.1]]), torch.tensor([[0.5, 0.5], [0.5, 0.5]]), threshold=0.5)
    assert found.proposed.tolist() == [1, 0]
    assert found.left_out.all()
    assert found.against.tolist() == [0, 0]


def test_equal_use_keeps_the_order() -> None:
    same = torch.tensor([[0.4, 0.6]]).expand(7, -1)
    assert select(same, same).order.tolist() == list(range(7))
    assert rank_queue(torch.tensor([True, False, False, False]), torch.tensor([9.0, 1.0, 2.0, 1.0])).tolist() == [2, 1, 3]


def test_half_precision_and_no_samples() -> None:
    half = probabilities(7, 30, 4).bfloat16()
    assert select(half, half, half[None]).usefulness.dtype == torch.float64
    assert len(select(torch.zeros(0, 3), torch.zeros(0, 3), torch.zeros(2, 0, 3)).order) == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"threshold": 1.5}, "threshold must lie in"),
        ({"rank": "random"}, "rank must be one of disagreement, entropy, margin"),
        ({"production": torch.ones(2)}, "at least 2 classes"),
        ({"production": torch.ones(2, 1)}, "at least 2 classes"),
        ({"fused": torch.full((2, 3), 1 / 3)}, r"must have shape \(2, 2\)"),
        ({"members": torch.full((2, 2), 0.5)}, "members"),
        ({"members": torch.zeros(0, 2, 2)}, "members"),
        ({"production": torch.tensor([[3.0, -1.0], [0.0, 1.0]])}, "apply a softmax"),
        ({"fused": torch.tensor([[math.nan, 1.0], [0.0, 1.0]])}, "fused must be probabilities"),
        ({"weights": torch.ones(2)}, "give members too"),
        ({"members": torch.full((2, 2, 2), 0.5), "weights": torch.ones(3)}, "one weight for each of 2 members"),
        ({"members": torch.full((2, 2, 2), 0.5), "weights": torch.zeros(2)}, "not all 0"),
        ({"members": torch.full((2, 2, 2), 0.5), "weights": torch.zeros(2), "rank": "entropy"}, "not all 0"),
    ],
)
def test_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        select(**{"production": torch.full((2, 2), 0.5), "fused": torch.full((2, 2), 0.5), **change})


# The driver


class Scores(nn.Module):
    """A linear classifier of flat inputs, in training mode, with a dropout that evaluation must switch off."""

    def __init__(self, seed: int, names: tuple[str, ...] | None = ("a", "b", "c"), features: int = 12) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(features, len(names or "abc"), generator=generator))
        self.dropout = nn.Dropout()
        if names is not None:
            self.class_names = list(names)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.dropout(inputs.flatten(1)) @ self.weight


def batches(number: int = 20, size: int = 6) -> list[Tensor]:
    return list(torch.randn(number, 1, 3, 4, generator=torch.Generator().manual_seed(9)).split(size))


def test_models_and_views_by_hand() -> None:
    production, models = Scores(0), [Scores(1), Scores(2)]
    found = select_samples(production, models, batches(), "flip", weights=[1, 3], threshold=0.7)
    inputs = torch.cat(batches())
    logits = torch.stack([torch.stack([x.flatten(1) @ model.weight for x in (inputs, inputs.flip(-1))]) for model in models])
    fused = (0.25 * logits[0].mean(0) + 0.75 * logits[1].mean(0)).softmax(1)
    members = logits.mean(1).softmax(-1)
    expected = select((inputs.flatten(1) @ production.weight).softmax(1), fused, members, torch.tensor([1.0, 3.0]), 0.7)
    for name, column in found._asdict().items():
        torch.testing.assert_close(column, getattr(expected, name), msg=name)
    assert 0 < len(found.order) < 20
    assert all(model.training and model.dropout.training for model in (production, *models)), "modes are as they were"
    whole = select_samples(production, models, batches(size=20), [flip], weights=[1, 3], threshold=0.7)
    torch.testing.assert_close(whole.usefulness, found.usefulness)


def test_classes_in_another_order() -> None:
    other = Scores(1)
    turned = Scores(1, ("c", "a", "b"))
    with torch.no_grad():
        turned.weight.copy_(other.weight[:, [2, 0, 1]])
    torch.testing.assert_close(select_samples(Scores(0), [other], batches()), select_samples(Scores(0), [turned], batches()))


def test_one_model_over_its_views() -> None:
    found = select_samples(Scores(0), [], batches(), "flip", threshold=0.5)
    inputs = torch.cat(batches())
    plain, turned = (x.flatten(1) @ Scores(0).weight for x in (inputs, inputs.flip(-1)))
    expected = select(plain.softmax(1), ((plain + turned) / 2).softmax(1), threshold=0.5)
    torch.testing.assert_close(found.usefulness, expected.usefulness)
    with pytest.raises(ValueError, match="one model alone cannot disagree with itself"):
        select_samples(Scores(0), [], batches())
    alone = select_samples(Scores(0), [], batches(), rank="entropy")
    torch.testing.assert_close(alone.usefulness, entropy(plain.softmax(1)))


class Diverged(Scores):
    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs) * math.nan


class Segmenter(Scores):
    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs)[:, :, None]


@pytest.mark.parametrize(
    ("models", "settings", "words"),
    [
        (
            [Scores(1, ("a", "b", "d"))],
            {},
            r"model 1 does not know the same 3 classes .* \(c only by the production model and d only by model 1\)",
        ),
        ([Scores(1), Scores(1, ("a", "b"))], {}, "model 2 does not know the same 3 classes"),
        ([Scores(1, ("a", "a", "b"))], {}, "does not know the same"),
        ([Diverged(1)], {}, "model 1 gives outputs that are not finite"),
        ([Segmenter(1)], {}, r"must give logits \(6, 3\) of 6 samples, got \(6, 3, 1\): give a classifier"),
        ([Scores(1)], {"weights": [1.0, 2.0]}, "one weight for each of 1 models, got 2"),
        ([Scores(1)], {"weights": [-1.0]}, "not all 0"),
        ([Scores(1)], {"threshold": 2.0}, "threshold must lie"),
        ([Scores(1)], {"rank": "size"}, "rank must be one of"),
        ([Scores(1)], {"views": "yaw"}, "these views do not fit what model 1 takes: this view is one of clouds"),
        ([Scores(1)], {"views": "turn"}, "views must be"),
        ([Scores(1)], {"data": []}, "there are no samples"),
    ],
)
def test_refused_by_the_driver(models: list[nn.Module], settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        select_samples(Scores(0), models, **{"data": batches(), **settings})


def test_models_without_names_need_as_many_classes() -> None:
    two = Scores(1, None)
    assert len(select_samples(Scores(0), [two], batches()).label) == 20
    two.weight = nn.Parameter(two.weight[:, :2].detach())
    with pytest.raises(ValueError, match=r"must give logits \(6, 3\) .* got \(6, 2\)"):
        select_samples(Scores(0), [two], batches())


@pytest.fixture(scope="module")
def classifiers() -> list[ImageClassifier]:
    """Untrained, of images of different moments and sizes."""
    torch.manual_seed(0)
    kinds = ((0.3, 32), (0.5, 16), (0.1, 32))
    return [ImageClassifier(10, None, "conv4", in_channels=1, image_size=size, image_mean=[mean], image_std=[0.3]) for mean, size in kinds]


def test_stored_images_are_prepared_by_each_model(classifiers: list[ImageClassifier]) -> None:
    data = DigitsDataModule(train_fraction=0.05, eval_batch_size=20)
    label = data.arrays.label.clone()
    label[data.train_index[::2]] = -1
    data.reassign(label=label)  # labels do not matter
    production, *models = classifiers
    found = select_samples(production, models, data)
    raw = data.arrays.input[data.train_index]
    assert len(raw) > 20
    fused = torch.stack([model.predict(raw).log() for model in models])[:, None]
    expected = select(production.predict(raw), fuse(fused), torch.stack([model.predict(raw) for model in models]))
    torch.testing.assert_close(found.usefulness, expected.usefulness, atol=1e-6, rtol=0)
    assert found.label.tolist() == expected.label.tolist()
    torch.testing.assert_close(select_samples(production, models, raw.split(9)).usefulness, found.usefulness, atol=1e-6, rtol=0)
    pictures = [list(part) for part in raw.split(9)]  # as they come from files of different sizes
    torch.testing.assert_close(select_samples(production, models, pictures).usefulness, found.usefulness, atol=1e-6, rtol=0)


def test_clouds_and_numbers() -> None:
    torch.manual_seed(0)
    models = [PointNetClassifier(3, input_transform=False, feature_transform=False) for _ in range(2)]
    clouds = torch.randn(7, 40, 3) * 5 + 1
    found = select_samples(models[0], models[1:], [clouds[:4], list(clouds[4:])], "halves")
    torch.testing.assert_close(found.score, models[0].predict(clouds).amax(1))
    vectors = LogisticRegression(4, 2)
    assert len(select_samples(vectors, [vectors], [torch.rand(5, 4)]).order) == 5
