"""Part IoU against a loop over objects, parts and points in plain Python."""

import pytest
import torch
from sklearn.metrics import jaccard_score

from litzoo.zoo.layers.segmentation_metrics import PartIoU

PART_CLASSES = [0, 0, 0, 1, 1, 2, 2, 2, 2]


def objects(seed: int = 0, number: int = 40, points: int = 30) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Predictions and truth within the parts of each object's class, which does not have all of them."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(3, (number,), generator=generator)
    start, width = torch.tensor([0, 3, 5])[label], torch.tensor([3, 2, 4])[label]
    truth = start[:, None] + torch.randint(0, 4, (number, points), generator=generator) % torch.randint(
        1, 5, (number, 1), generator=generator
    )
    truth = truth.minimum((start + width - 1)[:, None])
    wrong = torch.rand(number, points, generator=generator) < 0.3
    prediction = torch.where(wrong, start[:, None] + torch.randint(0, 60, (number, points), generator=generator) % width[:, None], truth)
    return prediction, truth, label


def naive(prediction: torch.Tensor, truth: torch.Tensor, label: torch.Tensor) -> dict[str, float]:
    by_class: dict[int, list[float]] = {}
    right = points = 0
    for found, real, cls in zip(prediction.tolist(), truth.tolist(), label.tolist(), strict=True):
        pairs = [(a, b) for a, b in zip(found, real, strict=True) if b >= 0]
        right += sum(a == b for a, b in pairs)
        points += len(pairs)
        ious = []
        for part in (part for part, owner in enumerate(PART_CLASSES) if owner == cls):
            union = sum(part in pair for pair in pairs)
            ious.append(sum(a == b == part for a, b in pairs) / union if union else 1.0)
        if pairs:
            by_class.setdefault(cls, []).append(sum(ious) / len(ious))
    everything = [iou for ious in by_class.values() for iou in ious]
    means = [sum(ious) / len(ious) for ious in by_class.values()]
    return {"instance_miou": sum(everything) / len(everything), "class_miou": sum(means) / len(means), "accuracy": right / points}


@pytest.mark.parametrize("batch", [1, 7, 40])
@pytest.mark.parametrize("ignored", [False, True])
def test_against_a_loop(batch: int, ignored: bool) -> None:
    prediction, truth, label = objects()
    if ignored:
        truth = torch.where(torch.rand(truth.shape, generator=torch.Generator().manual_seed(1)) < 0.3, -1, truth)
        truth[0] = -1
    metric = PartIoU(3, PART_CLASSES)
    for part in zip(prediction.split(batch), truth.split(batch), label.split(batch), strict=True):
        metric.update(*part)
    assert {name: value.item() for name, value in metric.compute().items()} == pytest.approx(naive(prediction, truth, label), abs=1e-6)


def test_an_object_of_all_parts_has_the_jaccard_score_of_scikit_learn() -> None:
    prediction, truth = torch.randint(4, (1, 200)) + 5, torch.randint(4, (1, 200)) + 5
    metric = PartIoU(3, PART_CLASSES)
    metric.update(prediction, truth, torch.tensor([2]))
    expected = jaccard_score(truth[0].numpy(), prediction[0].numpy(), average="macro")
    assert metric.compute()["instance_miou"].item() == pytest.approx(expected, abs=1e-6)


def test_a_part_of_unknown_class_counts_where_it_occurs() -> None:
    metric = PartIoU(1, [-1, -1, -1])
    metric.update(torch.tensor([[0, 0, 1, 1]]), torch.tensor([[0, 0, 0, 1]]), torch.tensor([0]))
    assert metric.compute()["instance_miou"].item() == pytest.approx((2 / 3 + 1 / 2) / 2)


def test_without_objects_everything_is_zero() -> None:
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert all(value == 0 for value in PartIoU(3, PART_CLASSES).compute().values())
