"""The model: its steps, processes and resumes against the same written by hand, and what it does with two images."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from sklearn.metrics import pairwise_distances
from torch import Tensor, nn
from torch.utils.data import DataLoader

import litzoo
from litzoo.callbacks import EMA, SAM, StepSeed
from litzoo.datamodules import DigitsDataModule, ImageAugmentation
from litzoo.zoo import Batch, RelationalReasoning
from litzoo.zoo.cli import main
from litzoo.zoo.pretrained import load_checkpoint

QUIET: dict[str, Any] = {
    **dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False),
    "accelerator": "cpu",
    "devices": 1,
}


def data_of(**settings: Any) -> DigitsDataModule:
    settings = {"augmentation": "relational", "views": 4, "image_size": 8, "batch_size": 64, "train_fraction": 0.25, "seed": 0, **settings}
    return DigitsDataModule(**settings)


class Flat(nn.Module):
    """An encoder without BatchNorm, so that shards can be compared with the whole batch."""

    num_features = 64

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.Tanh())

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def model_of(flat: bool = True, **settings: Any) -> RelationalReasoning:
    torch.manual_seed(0)
    model = RelationalReasoning(**{"backbone": "conv4", "in_channels": 1, "image_size": 8, "hidden_dim": 16, **settings})
    if flat:
        model.backbone = Flat()
    return model


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.5)


def pairs_by_hand(views: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """First and second features and targets as published: views i < j side by side, then with the second rolled, each time by one more."""
    first, second, target, shift = [], [], [], 1
    for i in range(len(views)):
        for j in range(i + 1, len(views)):
            first += [views[i], views[i]]
            second += [views[j], views[j].roll(shift, dims=0)]
            target += [torch.ones(len(views[i])), torch.zeros(len(views[i]))]
            shift = shift + 1 if shift + 1 < len(views[i]) else 1
    return torch.cat(first), torch.cat(second), torch.cat(target)


def loss_by_hand(model: RelationalReasoning, images: Tensor, gamma: float) -> Tensor:
    """Of views `(B, K, ...)`, every layer on every pair; running statistics are left alone."""
    head = model.relation
    first, second, target = pairs_by_hand([model.backbone(images[:, view]) for view in range(images.shape[1])])
    rows = torch.cat([first, second], dim=1) if head.aggregation == "cat" else torch.maximum(first, second)
    hidden = F.batch_norm(head.first(rows), None, None, head.norm.weight, head.norm.bias, training=True)
    logits = head.last(F.leaky_relu(hidden, 0.01)).squeeze(1)
    target = target.to(logits.dtype)
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    wrong = (logits.sigmoid() - target).abs()
    return (0.5 * wrong**gamma * entropy).mean() if gamma else entropy.mean()


@pytest.mark.parametrize(("aggregation", "views", "gamma"), [("cat", 8, 2.0), ("max", 3, 0.0)])
def test_steps_against_a_hand_written_loop(aggregation: Any, views: int, gamma: float) -> None:
    data = data_of(views=views)
    model = model_of(num_views=views, aggregation=aggregation, focal_gamma=gamma, optimizer=sgd)
    twin = copy.deepcopy(model).double()
    Trainer(max_epochs=2, precision="64-true", limit_val_batches=0, num_sanity_val_steps=0, **QUIET).fit(model, datamodule=data)

    weights: list[Tensor] = list(twin.parameters())
    loader = data_of(views=views).train_dataloader()
    for epoch in range(2):
        loader._batches.set_epoch(epoch)
        for batch in loader:
            loss = loss_by_hand(twin, data.transform(batch).input.double(), gamma)
            with torch.no_grad():
                for weight, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
                    weight -= 0.5 * gradient
    for mine, theirs in zip(model.parameters(), weights, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-9, atol=1e-11)


SCRIPT = """
import sys, torch
from lightning.pytorch import Trainer
from test_relational_reasoning import QUIET, SHARED, data_of, model_of, sgd

for number, views in enumerate(SHARED):
    settings = {**QUIET, "devices": 2, "strategy": "ddp", "use_distributed_sampler": False}
    trainer = Trainer(max_epochs=1, precision="64-true", num_sanity_val_steps=0, **settings)
    model = model_of(optimizer=sgd)
    trainer.fit(model, datamodule=data_of(views=views, batch_size=32))
    scores = {name: float(value) for name, value in trainer.callback_metrics.items()}
    torch.save((dict(model.named_parameters()), scores), f"{sys.argv[1]}_{number}_{trainer.global_rank}.pt")
"""
SHARED = (3, 10)  # views: few pairs, and many


def test_two_processes_equal_the_mean_of_their_shards(tmp_path: Path, two_processes: Callable[..., None]) -> None:
    script = tmp_path / "train.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n{SCRIPT}")
    two_processes(script, tmp_path / "result")
    for number, views in enumerate(SHARED):
        data = data_of(views=views)
        model = model_of().double()
        weights: list[Tensor] = list(model.parameters())
        for batch in data.train_dataloader():
            images = data.transform(batch).input.double()
            loss = sum(loss_by_hand(model, images[rank::2], 2.0) for rank in range(2)) / 2
            with torch.no_grad():
                for weight, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):  # type: ignore[arg-type]  # a sum starts with the number 0
                    weight -= 0.5 * gradient
        results = [torch.load(tmp_path / f"result_{number}_{rank}.pt", weights_only=False) for rank in range(2)]
        for found, scores in results:
            for (name, mine), theirs in zip(found.items(), weights, strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11, msg=f"{views} views: {name}")
            assert scores["val/precision_at_1"] == results[0][1]["val/precision_at_1"]


def test_resumed_in_the_middle_of_an_epoch_equals_uninterrupted(tmp_path: Path) -> None:
    def run(folder: Path, ckpt_path: Path | None = None) -> RelationalReasoning:
        seed_everything(3, verbose=False)
        model = model_of(flat=False)
        saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=7, save_top_k=-1)
        trainer = Trainer(max_epochs=2, callbacks=[StepSeed(), EMA(), SAM(0.05), saving], **{**QUIET, "enable_checkpointing": True})
        trainer.fit(model, datamodule=data_of(views=9, batch_size=32, seed=None), ckpt_path=ckpt_path, weights_only=False)
        return model

    whole = run(tmp_path / "whole")
    resumed = run(tmp_path / "resumed", tmp_path / "whole" / "step=7.ckpt")
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_learns_digits_and_scores_neighbours_as_scikit_learn_does() -> None:
    augmentation = ImageAugmentation(crop_scale=(0.5, 1.0))
    data = data_of(train_fraction=0.5, augmentation=augmentation)
    model = model_of(flat=False, hidden_dim=64, optimizer=lambda params: torch.optim.Adam(params, lr=5e-3))
    trainer = Trainer(max_epochs=8, precision="bf16-mixed", **QUIET)
    trainer.fit(model, datamodule=data)
    found = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert set(found) == {
        *("train/loss", "train/pair_accuracy", "train/positive_accuracy", "train/negative_accuracy", "val/precision_at_1")
    }
    assert found["train/pair_accuracy"] == pytest.approx((found["train/positive_accuracy"] + found["train/negative_accuracy"]) / 2)
    assert found["train/pair_accuracy"] > 0.75
    assert found["train/loss"] < 0.8 * model.collapsed_loss

    trainer = Trainer(**QUIET)
    (scores,) = trainer.test(model, datamodule=data, verbose=False)
    assert scores["test/precision_at_1"] > 0.5
    with torch.no_grad():
        batches = [data.transform(batch) for batch in data.test_dataloader()]
        features = torch.cat([model.eval().encode(batch.input) for batch in batches]).double()
    label = torch.cat([batch.label for batch in batches]).numpy()
    distance = pairwise_distances(features.numpy(), metric="cosine")
    distance[range(len(label)), range(len(label))] = math.inf
    assert scores["test/precision_at_1"] == pytest.approx((label[distance.argmin(axis=1)] == label).mean(), abs=2.1 / len(label))

    # Images of one digit are related more often than others.
    images = torch.cat([batch.input for batch in batches])[:60]
    scale = torch.tensor(data.image_std).view(-1, 1, 1), torch.tensor(data.image_mean).view(-1, 1, 1)
    raw = (images * scale[0] + scale[1]).clamp(0, 1)
    model.image_input = litzoo.zoo.RelationalReasoning(
        "conv4", in_channels=1, image_size=8, image_mean=list(data.image_mean), image_std=list(data.image_std)
    ).image_input
    first, second = torch.triu_indices(60, 60, 1)
    score = model.relation_score(raw[first], raw[second])
    same = torch.from_numpy(label[first.numpy()] == label[second.numpy()])
    assert float(score[same].mean()) > float(score[~same].mean()) + 0.1


# One step


class Stub:
    """As much of a trainer as a step asks for."""

    datamodule = None


def step(model: RelationalReasoning, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
    logged: dict[str, Tensor] = {}
    model._trainer = Stub()  # type: ignore[assignment]  # a stub
    model.log = lambda name, value, **_: logged.update({name: value})  # type: ignore[method-assign]  # there is nobody to log to
    model.log_dict = lambda values, **_: logged.update(values)  # type: ignore[method-assign]  # likewise
    return model.training_step(batch, 0), logged


def views_of(size: int = 12, views: int = 4) -> Tensor:
    return torch.rand(size, views, 1, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("views", [3, 14])
def test_accuracies_are_those_of_the_pairs(views: int) -> None:
    model, images = model_of(), views_of(views=views)
    twin = copy.deepcopy(model)
    _, logged = step(model, Batch(images, torch.zeros(12), torch.arange(12)))
    first, second, target = pairs_by_hand([twin.backbone(images[:, view]) for view in range(views)])
    right = (twin.relation(first, second) > 0) == target.bool()
    for name, chosen in (("pair", target >= 0), ("positive", target == 1), ("negative", target == 0)):
        assert float(logged[f"train/{name}_accuracy"]) == pytest.approx(float(right[chosen].float().mean()), abs=1e-6), name


def test_any_batch_of_views() -> None:
    """With labels, without, as a list of views; and in half precision the loss is in single."""
    images, label = views_of(), torch.zeros(12)
    expected = float(loss_by_hand(model_of(), images, 2.0))
    for batch in (Batch(images, label, label), (images, label), ([*images.unbind(1)], label), images, (images,)):
        assert float(step(model_of(), batch)[0]) == pytest.approx(expected, rel=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = step(model_of(), images)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(expected, rel=0.02)


def test_one_image_or_one_view_is_told() -> None:
    with pytest.raises(ValueError, match="no two images for a negative pair: let every batch hold at least two"):
        step(model_of(), views_of(size=1))
    with pytest.raises(ValueError, match="1 view of each image: set the views of the data to at least 2"):
        step(model_of(), (views_of()[:, 0], torch.zeros(12)))
    with pytest.raises(ValueError, match="4 views of each image: set the views of the data to 3, the model's num_views"):
        step(model_of(num_views=3), views_of())


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"views": 1}, "set the views of the data to at least 2"), ({"batch_size": 1}, "set the batch_size of the data to at least 2")],
)
def test_data_are_told_before_the_training(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Trainer(max_epochs=1, num_sanity_val_steps=0, **QUIET).fit(model_of(), datamodule=data_of(**settings))


class Tuples(LightningDataModule):
    """Somebody's own data: a list of views, and no use for the label."""

    def train_dataloader(self) -> Any:
        images = torch.rand(20, 1, 8, 8)
        return DataLoader([([image, image + 0.1, image * 0.5], 0) for image in images], 10)  # type: ignore[arg-type]  # a list is as good as a data set


def test_somebody_elses_data() -> None:
    model = model_of()
    trainer = Trainer(max_epochs=1, **QUIET)
    trainer.fit(model, datamodule=Tuples())
    assert int(model.relation.norm.num_batches_tracked) == 2  # type: ignore[arg-type]  # it counts them


@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_loss_of_a_collapsed_encoder(gamma: float) -> None:
    model = model_of(focal_gamma=gamma)
    nn.init.zeros_(model.relation.last.weight)
    nn.init.zeros_(model.relation.last.bias)
    assert float(step(model, torch.ones(12, 4, 1, 8, 8))[0]) == pytest.approx(model.collapsed_loss)


# Pairs of images


@pytest.mark.parametrize("aggregation", ["cat", "sum", "mean", "max"])
def test_relation_score_has_no_order(aggregation: Any) -> None:
    model = model_of(flat=False, aggregation=aggregation, image_mean=[0.3], image_std=[0.5])
    first, second = torch.randint(256, (2, 5, 1, 8, 8), dtype=torch.uint8)
    found = model.relation_score(first, second)
    torch.testing.assert_close(found, model.relation_score(second, first))
    assert model.training
    assert model.relation.training
    model.eval()
    a, b = (model.encode((images / 255 - 0.3) / 0.5).detach() for images in (first, second))
    assert torch.allclose(model.relation(a, b), model.relation(b, a)) == (aggregation != "cat")
    expected = ((model.relation(a, b) + model.relation(b, a)) / 2).sigmoid()
    torch.testing.assert_close(found, expected.detach())
    torch.testing.assert_close(model.relation_score(first, second[2]), model.relation_score(first, second[[2] * 5]))
    torch.testing.assert_close(model.relation_score(first[0], second)[3:4], model.relation_score(first[0], second[3]))
    with pytest.raises(ValueError, match="as many second images as first ones, or one, got 5 and 2"):
        model.relation_score(first, second[:2])


@pytest.mark.parametrize("half", [False, True])
def test_weights_are_saved_with_the_head(half: bool, tmp_path: Path) -> None:
    model = model_of(flat=False, aggregation="sum", focal_gamma=0.0)
    trainer = Trainer(max_epochs=1, limit_val_batches=0, **QUIET)
    trainer.fit(model, datamodule=data_of())
    litzoo.save(model, tmp_path / "model.safetensors", {"summary": "digits"}, half=half)
    loaded = litzoo.load(tmp_path / "model.safetensors")
    assert isinstance(loaded, RelationalReasoning)
    assert (loaded.relation.aggregation, loaded.focal_gamma) == ("sum", 0.0)
    images = torch.randint(256, (3, 1, 8, 8), dtype=torch.uint8)
    torch.testing.assert_close(loaded.embed(images), model.embed(images), atol=5e-3, rtol=5e-3)
    torch.testing.assert_close(loaded.relation_score(images, images[0]), model.relation_score(images, images[0]), atol=5e-3, rtol=5e-3)
    assert loaded.embed(images).shape == (3, 64)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert isinstance(load_checkpoint(tmp_path / "last.ckpt", model="RelationalReasoning"), RelationalReasoning)
    encoder: Any = litzoo.load_encoder(tmp_path / "model.safetensors")
    assert encoder.encode(torch.rand(2, 1, 8, 8)).shape == (2, 64)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_views": 1}, "num_views must be at least 2"),
        ({"aggregation": "dot"}, "aggregation must be one of cat, sum, mean, max"),
        ({"hidden_dim": 0}, "hidden_dim must be at least 1"),
        ({"focal_gamma": -1.0}, "focal_gamma must be a number from 0"),
        ({"focal_gamma": math.nan}, "focal_gamma must be a number from 0"),
        ({"backbone": "conv_4"}, "conv_4"),
        ({"image_mean": [0.5]}, "image_mean and image_std go together"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model_of(flat=False, **settings)


def test_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    quick = ["--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "1", "--trainer.accelerator", "cpu"]
    small = ["--data.image_size", "8", "--data.train_fraction", "0.2", "--data.batch_size", "8", "--trainer.callbacks", "[]"]
    assert main(["fit", "--config", "relational_digits", "--trainer.max_epochs", "1", *quick, *small]) == 0
    assert "best checkpoint by val/precision_at_1" in capsys.readouterr().out
    checkpoint = torch.load("runs/relational_digits/version_0/checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["hyper_parameters"]["backbone"]["name"] == "conv4"
