"""PointNet: against a plain loop over points in float64, and in every way it is used."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from litzoo.zoo import Batch, PointNetClassifier
from litzoo.zoo.functional.points import VoteBy, unit_box, unit_sphere, voting_views
from litzoo.zoo.pointnet import PointNet, TNet

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def shaken(seed: int = 0, **settings: Any) -> PointNetClassifier:
    """A model whose T-Nets and BatchNorm statistics are not at their neutral start."""
    torch.manual_seed(seed)
    model = PointNetClassifier(**{"num_classes": 5, **settings})
    for module in model.modules():
        if isinstance(module, TNet):
            torch.nn.init.normal_(module.head[-1].weight, std=0.01)
            torch.nn.init.normal_(module.head[-1].bias, std=0.1)
        if isinstance(module, torch.nn.BatchNorm1d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2.0)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.1)
    return model.eval()


# --- the naive implementation ----------------------------------------------------------------------------------------


def naive_forward(
    state: dict[str, Tensor], cloud: Tensor, input_transform: bool, feature_transform: bool, compact: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One cloud, one point at a time, by matrix products with the weights: logits, global feature, feature transform."""
    weights = {name: value.double() for name, value in state.items()}

    def layer(x: Tensor, linear: str, norm: str, relu: bool = True) -> Tensor:
        x = weights[f"{linear}.weight"].flatten(1) @ x
        mean, var = weights[f"{norm}.running_mean"], weights[f"{norm}.running_var"]
        x = (x - mean) / torch.sqrt(var + 1e-5) * weights[f"{norm}.weight"] + weights[f"{norm}.bias"]
        return torch.maximum(x, torch.zeros_like(x)) if relu else x

    def layers(x: Tensor, name: str, count: int, last_relu: bool = True) -> Tensor:
        for i in range(count):
            x = layer(x, f"{name}.{3 * i}", f"{name}.{3 * i + 1}", last_relu or i < count - 1)
        return x

    def largest(vectors: list[Tensor]) -> Tensor:
        return torch.stack(vectors).max(dim=0).values

    def t_net(vectors: list[Tensor], name: str, size: int) -> Tensor:
        hidden = layers(largest([layers(x, f"{name}.points", 3) for x in vectors]), f"{name}.head.0", 2)
        return (weights[f"{name}.head.1.weight"] @ hidden + weights[f"{name}.head.1.bias"]).view(size, size) + torch.eye(size).double()

    points = list(cloud.double())
    if input_transform:
        matrix = t_net(points, "backbone.input_transform", 3)
        points = [x @ matrix for x in points]
    local = [layers(x, "backbone.local", 1 if compact else 2) for x in points]
    transform = None
    if feature_transform:
        transform = t_net(local, "backbone.feature_transform", 64)
        local = [x @ transform for x in local]
    feature = largest([layers(x, "backbone.wide", 2 if compact else 3, last_relu=not compact) for x in local])
    hidden = layers(feature, "head.0", 2)
    return weights["head.2.weight"] @ hidden + weights["head.2.bias"], feature, transform


@pytest.mark.parametrize("input_transform", [True, False])
@pytest.mark.parametrize("feature_transform", [True, False])
@pytest.mark.parametrize("variant", ["paper", "compact"])
def test_forward_against_a_loop_over_points(input_transform: bool, feature_transform: bool, variant: str) -> None:
    settings = {"input_transform": input_transform, "feature_transform": feature_transform, "variant": variant}
    model = shaken(**settings)
    clouds = torch.randn(3, 20, 3)
    with torch.no_grad():
        output = model.double().backbone(clouds.double())
        feature, transform = output.feature, output.feature_transform
        logits = model(clouds.double())
        single = shaken(**settings)(clouds)
    for i, cloud in enumerate(clouds):
        expected = naive_forward(model.state_dict(), cloud, input_transform, feature_transform, variant == "compact")
        torch.testing.assert_close(logits[i], expected[0], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(feature[i], expected[1], rtol=1e-9, atol=1e-9)
        assert (transform is None) == (expected[2] is None)
        if transform is not None and expected[2] is not None:
            torch.testing.assert_close(transform[i], expected[2], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(single.double(), logits, rtol=1e-3, atol=1e-4)


# --- structure -------------------------------------------------------------------------------------------------------


def test_shapes() -> None:
    model = shaken()
    assert model(torch.randn(2, 33, 3)).shape == (2, 5)
    assert model.encode(torch.randn(2, 33, 3)).shape == (2, 1024)
    output = PointNet().eval()(torch.randn(2, 33, 3))
    assert output.feature.shape == (2, 1024)
    assert output.local.shape == (2, 64, 33)
    assert output.input_transform.shape == (2, 3, 3)
    assert output.feature_transform.shape == (2, 64, 64)
    assert len(output.maxima) == 3


def test_number_of_parameters() -> None:
    # The paper's 3.5 million (table 6).
    assert sum(p.numel() for p in PointNetClassifier(num_classes=16).parameters()) == 3_467_801


@pytest.mark.parametrize("size", [3, 64])
@pytest.mark.parametrize("training", [True, False])
def test_transforms_start_at_the_identity(size: int, training: bool) -> None:
    transform = TNet(size).train(training)(torch.randn(4, size, 30))[0]
    assert torch.equal(transform, torch.eye(size).expand(4, size, size))


def test_order_of_points_does_not_matter() -> None:
    model, clouds = shaken(), torch.randn(2, 50, 3)
    torch.testing.assert_close(model(clouds), model(clouds[:, torch.randperm(50)]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(clouds), model(torch.cat([clouds, clouds[:, :7]], 1)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("points", [1, 2, 17, 3000])
def test_any_number_of_points(points: int) -> None:
    assert shaken()(torch.randn(2, points, 3)).isfinite().all()


@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 10), (2, 0, 3), (2, 10, 4)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="PointNet takes clouds of shape"):
        shaken()(torch.zeros(shape))


def test_batch_of_one_is_refused_only_in_training() -> None:
    model = shaken()
    assert model(torch.randn(1, 10, 3)).shape == (1, 5)
    with pytest.raises(ValueError, match="cannot train on a batch of one cloud"):
        model.train()(torch.randn(1, 10, 3))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"num_classes": 1}, "num_classes must be at least 2, got 1"),
        ({"class_names": ["a"]}, "class_names has 1 entries, but num_classes is 5"),
        ({"class_counts": [1, 2]}, "class_counts has 2 entries"),
        ({"class_weights": "balanced"}, "needs class_counts"),
        ({"class_weights": "sqrt"}, "one of none, balanced, effective; got 'sqrt'"),
        ({"variant": "small"}, "variant must be .paper. or .compact., got .small."),
        ({"dropout": 1.5}, "dropout must lie in"),
        ({"label_smoothing": -0.1}, "label_smoothing must lie in"),
        ({"focal_gamma": -1.0}, "focal_gamma must lie in"),
    ],
)
def test_impossible_settings_are_refused(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PointNetClassifier(**{"num_classes": 5, **setting})


# --- loss ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [0.0, 2.0])
@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_loss_against_an_independent_computation(gamma: float, balanced: bool, smoothing: float) -> None:
    counts = [10, 3, 7, 20, 1]
    model = shaken(
        class_counts=counts,
        class_weights="balanced" if balanced else "none",
        focal_gamma=gamma,
        label_smoothing=smoothing,
        orthogonality_weight=0.01,
    ).double()
    points, label = torch.randn(4, 12, 3).double(), torch.tensor([0, 3, 4, 1])
    model.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    loss = float(model.training_step((points, label), 0))
    weight = [sum(counts) / (5 * n) for n in counts] if balanced else [1.0] * 5
    total = regulariser = 0.0
    for cloud, target in zip(points, label.tolist(), strict=True):
        logits, _, transform = naive_forward(model.state_dict(), cloud, True, True)
        p = [math.exp(x) for x in (logits - logits.logsumexp(0)).tolist()]
        ce = -(1 - smoothing) * weight[target] * math.log(p[target]) - smoothing / 5 * sum(
            w * math.log(q) for w, q in zip(weight, p, strict=True)
        )
        total += (1 - p[target]) ** gamma * ce
        assert transform is not None
        regulariser += float(((torch.eye(64).double() - transform @ transform.T) ** 2).sum())
    expected = total / sum(weight[target] for target in label.tolist()) + 0.01 * regulariser / 4
    assert loss == pytest.approx(expected, rel=1e-6)  # class weights are kept in float32


# --- use -------------------------------------------------------------------------------------------------------------


def test_predict_takes_raw_clouds() -> None:
    model = shaken().train()
    clouds = [torch.randn(n, 3) * 40 + 7 for n in (10, 300, 25)]
    probability = model.predict(clouds)
    assert model.training, "predict leaves the mode as it was"
    assert probability.shape == (3, 5)
    torch.testing.assert_close(probability.sum(1), torch.ones(3))
    model.eval()
    for cloud, p in zip(clouds, probability, strict=True):
        torch.testing.assert_close(model.predict(cloud)[0], p)
        torch.testing.assert_close(model(unit_sphere(cloud)[None]).softmax(1)[0], p)
    torch.testing.assert_close(model.predict(torch.stack([clouds[0], clouds[0]]).double()), probability[[0, 0]])
    box = shaken(normalization="unit_box")
    torch.testing.assert_close(box.predict(clouds[0]), box(unit_box(clouds[0])[None]).softmax(1))
    model.double()
    torch.testing.assert_close(model.predict(clouds), probability, msg="a model of another precision takes the same clouds")
    with pytest.raises(ValueError, match="there are no inputs"):
        model.predict([])
    assert not probability.requires_grad


def trainer(folder: Path, **settings: Any) -> Trainer:
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    return Trainer(**{"accelerator": "cpu", "devices": 1, "max_epochs": 1, "default_root_dir": folder, **quiet, **settings})


def loader(batch_size: int = 4) -> DataLoader[Any]:
    torch.manual_seed(1)
    return DataLoader(TensorDataset(torch.randn(12, 16, 3), torch.arange(12) % 5), batch_size=batch_size)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_trains_on_pairs(precision: Any, tmp_path: Path) -> None:
    model = shaken()
    before = {name: value.clone() for name, value in model.named_parameters()}
    run = trainer(tmp_path, precision=precision)
    run.fit(model.train(), loader(), loader())
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert all(value.dtype == torch.float32 for value in model.parameters())
    assert all(not torch.equal(value, before[name]) for name, value in model.named_parameters())
    logged = {
        "train/loss",
        "train/accuracy",
        *(f"val/{name}" for name in ("loss", "accuracy", "mean_class_accuracy", "mcc", "calibration_error")),
    }
    assert logged <= set(run.callback_metrics)
    assert run.callback_metrics["train/loss"].dtype == torch.float32
    (scores,) = run.test(model, loader(), verbose=False)
    assert scores["test/accuracy"] == pytest.approx(float(run.validate(model, loader(), verbose=False)[0]["val/accuracy"]))


def test_pairs_and_batches_give_the_same_loss() -> None:
    model = shaken()
    model.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    points, label = torch.randn(4, 12, 3), torch.tensor([0, 3, 4, 1])
    assert torch.equal(model.training_step((points, label), 0), model.training_step(Batch(points, label, torch.arange(4)), 0))
    with pytest.raises(TypeError, match="got Tensor"):
        model.training_step(points, 0)


def test_predict_step(tmp_path: Path) -> None:
    model = shaken()
    points, label = next(iter(loader()))
    expected = model(points).softmax(1)
    for batch in (points, (points, label), Batch(points, label, torch.arange(4))):
        torch.testing.assert_close(model.predict_step(batch, 0), expected)


def test_balanced_weights_come_from_the_counts(tmp_path: Path) -> None:
    model = PointNetClassifier(num_classes=3, class_counts=[10, 20, 30], class_weights="balanced")
    torch.testing.assert_close(model.class_weight, torch.tensor([2.0, 1.0, 2 / 3]))
    assert "class_weight" not in model.state_dict()
    assert PointNetClassifier(num_classes=3, class_counts=[10, 20, 30]).class_weight is None


def test_checkpoint_loads_without_optimizer_arguments(tmp_path: Path) -> None:
    model = shaken(
        class_names=list("abcde"),
        class_counts=[1, 2, 3, 4, 5],
        class_weights="balanced",
        optimizer=lambda params: torch.optim.SGD(params, lr=0.01),
        lr_scheduler=None,
    )
    run = trainer(tmp_path)
    run.fit(model.train(), loader())
    run.save_checkpoint(tmp_path / "model.ckpt")
    loaded = PointNetClassifier.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True)
    assert loaded.class_names == list("abcde")
    torch.testing.assert_close(loaded.class_weight, model.class_weight)
    points = torch.randn(2, 30, 3)
    assert torch.equal(loaded.eval()(points), model.eval()(points))
    assert not {"optimizer", "lr_scheduler"} & set(loaded.hparams)


# --- two processes ---------------------------------------------------------------------------------------------------

DDP_SCRIPT = """
import os, sys
from pathlib import Path
import torch
from torch.nn.parallel import DistributedDataParallel
from litzoo.zoo import PointNetClassifier

class Step(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model
    def forward(self, points, label):
        return self.model.training_step((points, label), 0)

def gradients(model, step, points, label):
    model.zero_grad()
    step(points, label).backward()
    return {name: value.grad.clone() for name, value in model.named_parameters()}

torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
torch.manual_seed(0)
def build():
    model = PointNetClassifier(num_classes=4, dropout=0.0, orthogonality_weight=0.1, focal_gamma=2.0).double()
    for name, value in model.named_parameters():
        if ".head.1." in name:
            torch.nn.init.normal_(value, std=0.01)
    model.log = lambda *args, **kwargs: None
    return model.train()
model = build()
twin = build()
twin.load_state_dict(model.state_dict())
shards = [(torch.randn(3, 12, 3).double(), torch.randint(4, (3,))) for _ in range(2)]
together = gradients(model, DistributedDataParallel(Step(model)), *shards[rank])
if rank == 0:
    apart = [gradients(twin, Step(twin), *shard) for shard in shards]
    for name, value in together.items():
        torch.testing.assert_close(value, (apart[0][name] + apart[1][name]) / 2, rtol=1e-9, atol=1e-12, msg=name)
        assert value.abs().sum() > 0 and not torch.equal(apart[0][name], apart[1][name]), name
    Path(sys.argv[1]).write_text("equal")
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_average_the_gradients_of_their_shards(tmp_path: Path, two_processes: Callable[..., None]) -> None:
    script = tmp_path / "script.py"
    script.write_text(DDP_SCRIPT)
    two_processes(script, tmp_path / "result")
    assert (tmp_path / "result").read_text() == "equal"


# --- voting ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vote_by", ["yaw", "subsample"])
def test_votes_are_the_mean_over_views_that_differ(vote_by: VoteBy) -> None:
    model, clouds = shaken(normalization="none"), torch.randn(3, 40, 3)
    votes = model.predict(clouds, votes=5, vote_by=vote_by)
    views = voting_views(clouds, 5, vote_by)
    singly = torch.stack([model.predict(views[:, number]) for number in range(5)])
    torch.testing.assert_close(votes, singly.mean(dim=0), rtol=1e-4, atol=1e-5)
    assert (singly.std(dim=0) > 1e-4).any()
    assert not torch.allclose(votes, model.predict(clouds), atol=1e-4)
    torch.testing.assert_close(model.predict(list(clouds), votes=5, vote_by=vote_by), votes, rtol=1e-4, atol=1e-5)


def test_the_test_votes_and_the_validation_does_not(tmp_path: Path) -> None:
    clouds, label = torch.randn(12, 40, 3), torch.arange(12) % 5
    loader = DataLoader(TensorDataset(clouds, label), batch_size=4)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
    plain, voting = shaken(), shaken(votes=4)
    metrics = [trainer.test(model, loader, verbose=False)[0]["test/loss"] for model in (plain, voting)]
    assert metrics[0] != metrics[1]
    voting.normalization = "none"  # a loader's clouds are normalised already
    probabilities = voting.predict(clouds, votes=4)
    assert metrics[1] == pytest.approx(F.nll_loss(probabilities.log(), label).item(), rel=1e-4)
    losses = [trainer.validate(model, loader, verbose=False)[0]["val/loss"] for model in (plain, voting)]
    assert losses[0] == losses[1]


def test_a_single_vote_is_the_cloud_itself() -> None:
    clouds = torch.randn(2, 9, 3)
    assert torch.equal(voting_views(clouds, 1, "subsample"), clouds.unsqueeze(1))


def test_yaw_views_are_turned_about_the_vertical_axis() -> None:
    clouds = torch.randn(2, 9, 3, dtype=torch.float64)
    views = voting_views(clouds, 4, "yaw")
    quarter = torch.stack([clouds[..., 2], clouds[..., 1], -clouds[..., 0]], dim=-1)
    torch.testing.assert_close(views[:, 0], clouds)
    torch.testing.assert_close(views[:, 1], quarter, rtol=0, atol=1e-12)


def test_subsampled_views_are_halves_without_repeats() -> None:
    clouds = torch.arange(2 * 31 * 3.0).view(2, 31, 3)
    views = voting_views(clouds, 6, "subsample")
    assert views.shape == (2, 6, 16, 3)
    chosen = [set(view[:, 0].tolist()) for view in views[0]]
    assert all(len(points) == 16 for points in chosen)
    assert len({frozenset(points) for points in chosen}) == 6
    assert torch.equal(views, voting_views(clouds, 6, "subsample"))


@pytest.mark.parametrize(("votes", "vote_by"), [(0, "yaw"), (2, "pitch")])
def test_impossible_votes_are_refused(votes: int, vote_by: VoteBy) -> None:
    with pytest.raises(ValueError, match="votes must be at least 1 and vote_by one of yaw, subsample"):
        voting_views(torch.randn(1, 4, 3), votes, vote_by)
