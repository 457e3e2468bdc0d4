"""The model: its steps, chunks, queue, processes and resumes; against the same written by hand."""

import copy
import math
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningDataModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn
from torch.utils.data import DataLoader

import litzoo
from litzoo.callbacks import EMA, SAM, StepSeed
from litzoo.datamodules import DigitsDataModule
from litzoo.zoo import Batch, SupConEncoder
from litzoo.zoo.layers.precision_at_one import PrecisionAtOne
from litzoo.zoo.pretrained import load_checkpoint

QUIET: dict[str, Any] = {
    **dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False),
    "accelerator": "cpu",
    "devices": 1,
}


def data_of(**settings: Any) -> DigitsDataModule:
    settings = {"augmentation": "supcon", "views": 2, "image_size": 8, "batch_size": 64, "train_fraction": 0.25, "seed": 0, **settings}
    return DigitsDataModule(**settings)


class Flat(nn.Module):
    """An encoder without BatchNorm, so that shards can be compared with the whole batch."""

    num_features = 16

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Dropout(dropout))

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def model_of(flat: bool = True, **settings: Any) -> SupConEncoder:
    torch.manual_seed(0)
    settings = {"backbone": "conv4", "embedding_dim": 8, "temperature": 0.2, "lr_scheduler": None, **settings}
    model = SupConEncoder(10, in_channels=1, image_size=8, **settings)
    if flat:
        model.backbone = Flat()
        model.projection = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))
    return model


def dense_loss(z: Tensor, label: Tensor, temperature: float) -> Tensor:
    """The formula of the paper by full matrices."""
    logits = z @ z.T / temperature
    others = ~torch.eye(len(z), dtype=torch.bool)
    positive = (label[:, None] == label) & others
    log_probability = logits - logits.masked_fill(~others, -torch.inf).logsumexp(dim=1, keepdim=True)
    return -((log_probability * positive).sum(dim=1) / positive.sum(dim=1)).mean()


@pytest.mark.parametrize("supervised", [True, False])
def test_steps_against_a_hand_written_loop(supervised: bool) -> None:
    data = data_of()
    model = model_of(supervised=supervised, optimizer=lambda params: torch.optim.SGD(params, lr=0.5))
    twin = copy.deepcopy(model).double()
    Trainer(max_epochs=2, precision="64-true", limit_val_batches=0, num_sanity_val_steps=0, **QUIET).fit(model, datamodule=data)

    weights = list(twin.parameters())
    loader = data_of().train_dataloader()
    for epoch in range(2):
        loader._batches.set_epoch(epoch)
        for batch in loader:
            batch = data.transform(batch)
            views = torch.cat([batch.input[:, 0], batch.input[:, 1]])
            z = F.normalize(twin.projection(twin.backbone(views.double())))
            loss = dense_loss(z, (batch.label if supervised else batch.index).repeat(2), 0.2)
            with torch.no_grad():
                for weight, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
                    weight -= 0.5 * gradient
    for mine, theirs in zip(model.parameters(), weights, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-10, atol=1e-12)


class Stub:
    """As much of a trainer as a step asks for."""

    world_size = 1


def step(model: SupConEncoder, batch: Any) -> Tensor:
    model._trainer = Stub()  # type: ignore[assignment]  # a stub
    model.log = lambda *_, **__: None  # type: ignore[method-assign]  # there is nobody to log to
    return model.training_step(batch, 0)


def batch_of(size: int = 12, views: int = 2, classes: int = 3) -> Batch:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(size, views, 1, 8, 8, generator=generator)
    return Batch(images, torch.arange(size) % classes, torch.arange(size), key=torch.arange(size) * 7919)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.5, 0.0), (0.0, 1.0), (0.4, 0.4)])
def test_views_are_mixed_with_the_views_of_one_other_image(mixup: float, cutmix: float) -> None:
    seen: list[Tensor] = []
    model = model_of(mixup=mixup, cutmix=cutmix, queue_size=32)
    model.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    size = 6
    values = torch.arange(size).float()
    batch = batch_of(size, views=3)._replace(input=values[:, None, None, None, None].expand(size, 3, 1, 8, 8), label=torch.arange(size))
    step(model, batch)
    assert model.queue is not None
    model.queue.commit()
    target = model.queue.contents()[1][: 3 * size].unflatten(0, (size, 3))
    # Images are constant, so the mean of a mixed one is the mean of its target.
    expected = target[..., :size] @ values
    torch.testing.assert_close(seen[0].unflatten(0, (size, 3)).mean(dim=(2, 3, 4)), expected)
    assert torch.equal(target[:, 0], target[:, 2]), "all views of an image have one target"
    assert bool((target[0, 0, [0, size - 1]] > 0).all()), "the first image is mixed with the last"
    assert torch.allclose(target.sum(dim=2), torch.ones(size, 3))


# Chunks


def gradients(model: SupConEncoder, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.parametrize("settings", [{}, {"supervised": False}, {"mixup": 0.5, "queue_size": 20}, {"mode": "one"}])
def test_chunks_have_the_gradient_of_the_whole_batch(settings: dict[str, Any]) -> None:
    whole, chunked = (model_of(chunk_size=chunk, **settings).double() for chunk in (None, 7))
    batch = batch_of()
    batch = batch._replace(input=batch.input.double())
    losses = [step(model, batch) for model in (whole, chunked)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(gradients(chunked, losses[1]), gradients(whole, losses[0]), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("autocast", [False, True])
def test_chunks_of_batch_norm_and_dropout_equal_chunks_with_kept_activations(autocast: bool) -> None:
    """The second pass draws the same dropout, and counts no image twice."""

    def make() -> SupConEncoder:
        model = model_of(flat=False, chunk_size=8)
        model.projection.insert(1, nn.Dropout(0.5))
        return model

    batch, found = batch_of(), []
    for kept in (False, True):
        model = make()
        if kept:
            model._embed_in_chunks = lambda images, model=model: torch.cat([model(chunk) for chunk in images.split(8)])  # type: ignore[method-assign,misc]  # the reference
        torch.manual_seed(5)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = step(model, batch)
        found.append((loss, gradients(model, loss), dict(model.named_buffers()), torch.get_rng_state()))
    (loss, gradient, buffers, state), (loss_2, gradient_2, buffers_2, state_2) = found
    assert torch.equal(loss, loss_2)
    for mine, theirs in zip(gradient, gradient_2, strict=True):
        torch.testing.assert_close(mine, theirs)
    assert buffers.keys() == buffers_2.keys()
    assert any(name.endswith("num_batches_tracked") and int(value) == 3 for name, value in buffers.items())
    for name, buffer in buffers.items():
        assert torch.equal(buffer, buffers_2[name]), name
    assert torch.equal(state, state_2)


def test_of_chunks_the_activations_of_one_at_a_time_are_kept() -> None:
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most = 0

    class Note(nn.Module):
        def forward(self, features: Tensor) -> Tensor:
            nonlocal most
            hidden = features * 1.5
            alive.add(hidden)
            most = max(most, len(alive))
            return hidden.square()  # keeps it for the gradient

    model = model_of(chunk_size=4)
    model.backbone.layers.append(Note())
    loss = step(model, batch_of())
    assert len(alive) == 0
    most = 0
    loss.backward()
    assert most == 1


def test_no_chunk_is_a_single_image() -> None:
    """Of which BatchNorm has no variance where the encoder has shrunk it to a pixel."""
    sizes: list[int] = []
    model = model_of(flat=False, chunk_size=5)
    model.backbone.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    step(model, batch_of(8)).backward()
    assert sizes[:4] == [4, 4, 4, 4]


@pytest.mark.parametrize(("backend", "settings"), [("aot_eager", {}), ("eager", {"chunk_size": 24, "queue_size": 64, "mixup": 0.4})])
def test_compiled_steps_equal_eager_ones(backend: str, settings: dict[str, Any]) -> None:
    found = []
    for compiled in (True, False):
        model = model_of(**settings)
        trainer = Trainer(max_epochs=1, limit_train_batches=1, limit_val_batches=0, num_sanity_val_steps=0, **QUIET)
        trainer.fit(torch.compile(model, backend=backend) if compiled else model, datamodule=data_of())  # type: ignore[arg-type]  # Lightning takes it
        found.append(list(model.parameters()))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs)


# The trainer


SCRIPT = """
import sys, torch
from lightning.pytorch import Trainer
from test_supcon import QUIET, SHARED, data_of, model_of

for number, settings in enumerate(SHARED):
    data = data_of(batch_size=16)
    model = model_of(**settings)
    settings = {**QUIET, "devices": 2, "strategy": "ddp", "use_distributed_sampler": False}
    trainer = Trainer(max_epochs=2, precision="64-true", num_sanity_val_steps=0, **settings)
    trainer.fit(model, datamodule=data)
    value = trainer.callback_metrics["val/precision_at_1"]
    torch.save((model.state_dict(), value, model.collapsed_loss), f"{sys.argv[1]}_{number}_{trainer.global_rank}.pt")
"""
# Of a queue of whole batches it does not matter in which order their rows came.
SHARED: list[dict[str, Any]] = [{"chunk_size": 10}, {"supervised": False, "queue_size": 128}]


def test_two_processes_equal_one_on_the_global_batch(tmp_path: Path, two_processes: Callable[..., None]) -> None:
    script = tmp_path / "train.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n{SCRIPT}")
    two_processes(script, tmp_path / "result")
    for number, settings in enumerate(SHARED):
        model = model_of(**settings)
        trainer = Trainer(max_epochs=2, precision="64-true", num_sanity_val_steps=0, **QUIET)
        trainer.fit(model, datamodule=data_of(batch_size=32))
        results = [torch.load(tmp_path / f"result_{number}_{rank}.pt") for rank in range(2)]
        for state, value, collapsed in results:
            for name, expected in model.state_dict().items():
                if isinstance(expected, Tensor):
                    torch.testing.assert_close(state[name], expected, rtol=1e-9, atol=1e-11, msg=f"{number} {name}")
            assert float(value) == float(trainer.callback_metrics["val/precision_at_1"])
            assert collapsed == model.collapsed_loss
        if "queue_size" in settings:
            queues = [state["queue._extra_state"] for state, _, _ in results]
            assert torch.equal(queues[0]["features"], queues[1]["features"])


def test_resumed_in_the_middle_of_an_epoch_equals_uninterrupted(tmp_path: Path) -> None:
    def run(folder: Path, ckpt_path: Path | None = None) -> SupConEncoder:
        seed_everything(3, verbose=False)
        model = model_of(flat=False, queue_size=100, chunk_size=32, mixup=0.4)
        saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=7, save_top_k=-1)
        trainer = Trainer(max_epochs=2, callbacks=[StepSeed(), EMA(), saving], **{**QUIET, "enable_checkpointing": True})
        trainer.fit(model, datamodule=data_of(batch_size=32, seed=None), ckpt_path=ckpt_path, weights_only=False)
        return model

    whole = run(tmp_path / "whole")
    resumed = run(tmp_path / "resumed", tmp_path / "whole" / "step=7.ckpt")
    assert whole.queue is not None
    assert resumed.queue is not None
    for mine, theirs in zip(resumed.queue.contents(), whole.queue.contents(), strict=True):
        assert torch.equal(mine, theirs)
    for mine, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("supervised", [True, False])
def test_learns_and_scores_neighbours_as_scikit_learn_does(supervised: bool) -> None:
    data = data_of(train_fraction=0.5)
    model = model_of(flat=False, supervised=supervised)
    trainer = Trainer(max_epochs=6, precision="bf16-mixed", **QUIET)
    trainer.fit(model, datamodule=data)
    (scores,) = trainer.test(model, datamodule=data, verbose=False)
    assert scores["test/precision_at_1"] > (0.7 if supervised else 0.4)
    assert model.collapsed_loss is not None
    assert float(model.collapsed_loss) == pytest.approx(math.log(127))

    trainer = Trainer(**QUIET)
    (scores,) = trainer.test(model, datamodule=data, verbose=False)
    with torch.no_grad():
        batches = [data.transform(batch) for batch in data.test_dataloader()]
        features = F.normalize(torch.cat([model.eval().encode(batch.input) for batch in batches])).numpy()
    label = torch.cat([batch.label for batch in batches]).numpy()
    neighbours = KNeighborsClassifier(2).fit(features, label).kneighbors(features, return_distance=False)
    nearest = np.where(neighbours[:, 0] == np.arange(len(label)), neighbours[:, 1], neighbours[:, 0])
    assert scores["test/precision_at_1"] == pytest.approx((label[nearest] == label).mean(), abs=2.1 / len(label))


def test_precision_at_one_of_unlabelled_and_broken_features() -> None:
    metric = PrecisionAtOne()
    features = torch.tensor([[1.0, 0.0], [0.9, 0.1], [1.0, 0.0], [0.0, 1.0], [float("nan"), 1.0]])
    metric.update(features, torch.tensor([0, 0, -1, 1, 1]))
    assert float(metric.compute()) == 0.5, "of four, the two of class 0"
    metric.reset()
    metric.update(features[:2], torch.tensor([-1, 0]))
    assert bool(metric.compute().isnan())


def test_a_second_pass_over_a_batch_queues_nothing() -> None:
    seen: list[Tensor] = []
    model = model_of(queue_size=100)
    forward = model.forward
    model.forward = lambda images: seen.append(forward(images)) or seen[-1]  # type: ignore[method-assign,func-returns-value]  # records what it gives
    Trainer(max_epochs=1, limit_train_batches=1, limit_val_batches=0, callbacks=[SAM(5.0)], **QUIET).fit(
        model, datamodule=data_of(batch_size=40)
    )
    assert model.queue is not None
    assert len(seen) == 2
    torch.testing.assert_close(model.queue.contents()[0][:80], seen[0].detach())
    assert int((model.queue.contents()[1] >= 0).sum()) == 80
    assert float(model.collapsed_loss or 0) == pytest.approx(math.log(79)), "in the step the queue was empty"


class Pairs(LightningDataModule):
    """Somebody's own data: a list of views, and labels."""

    def train_dataloader(self) -> Any:
        images = torch.rand(20, 1, 8, 8)
        samples = [([image, image + 0.1], int(number) % 4) for number, image in enumerate(images)]
        return DataLoader(samples, 10)  # type: ignore[arg-type]  # a list is as good as a data set

    def val_dataloader(self) -> Any:
        return self.train_dataloader()


def test_plain_batches() -> None:
    model = model_of()
    trainer = Trainer(max_epochs=1, **QUIET)
    trainer.fit(model, datamodule=Pairs())
    assert float(model.collapsed_loss or 0) == pytest.approx(math.log(19))
    assert "val/precision_at_1" in trainer.callback_metrics
    images, label = torch.rand(8, 1, 8, 8), torch.arange(8) % 2
    z = model(images).detach()
    torch.testing.assert_close(step(model, (images, label)).detach(), dense_loss(z, label, 0.2), msg="one view each")
    with pytest.raises(ValueError, match="set the views of the data to 2"):
        step(model_of(supervised=False), (images, label))
    with pytest.raises(ValueError, match=r"let the loader yield \(images, label, index\)"):
        step(model_of(supervised=False, queue_size=8), (torch.stack([images, images], 1), label))


@pytest.mark.parametrize("half", [False, True])
def test_weights_are_saved_without_the_queue(half: bool, tmp_path: Path) -> None:
    model = model_of(flat=False, queue_size=50)
    trainer = Trainer(max_epochs=1, limit_val_batches=0, **QUIET)
    trainer.fit(model, datamodule=data_of())
    litzoo.save(model, tmp_path / "model.safetensors", {"summary": "digits"}, half=half)
    loaded = litzoo.load(tmp_path / "model.safetensors")
    assert isinstance(loaded, SupConEncoder)
    assert loaded.queue is not None
    assert not bool((loaded.queue.contents()[1] >= 0).any())
    images = torch.randint(256, (3, 1, 8, 8), dtype=torch.uint8)
    for features in ("encode", "forward"):
        torch.testing.assert_close(loaded.embed(images, features), model.embed(images, features), atol=5e-3, rtol=5e-3)  # type: ignore[arg-type]  # both are literals
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    whole = load_checkpoint(tmp_path / "last.ckpt", model="SupConEncoder")
    assert isinstance(whole, SupConEncoder)
    assert whole.queue is not None
    assert torch.equal(whole.queue.contents()[0], model.queue.contents()[0])  # type: ignore[union-attr]  # it has one


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "temperature must be at least 1/640"),
        ({"mode": "two"}, "mode must be one of all, one"),
        ({"queue_size": -1}, "queue_size must be at least 0"),
        ({"chunk_size": 0}, "chunk_size must be at least 1"),
        ({"embedding_dim": 0}, "embedding_dim must be at least 1"),
        ({"mixup": -0.1}, r"mixup must lie in \[0, 100\]"),
        ({"mixup": 0.1, "supervised": False}, "without supervision there are none"),
        ({"backbone": "resnet_18"}, "resnet_18"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model_of(**settings)
    with pytest.raises(ValueError, match="give num_classes"):
        SupConEncoder(cutmix=1.0)


def test_data_without_labels_are_told() -> None:
    class Unlabelled(DigitsDataModule):
        @property
        def class_counts(self) -> list[int]:
            return self._counts

    data = Unlabelled(views=2)
    data._counts = [0] * 10  # type: ignore[attr-defined]  # set by the test
    with pytest.raises(ValueError, match="set supervised to false"):
        Trainer(max_epochs=1, **QUIET).fit(model_of(), datamodule=data)
    data._counts = [1] * 10  # type: ignore[attr-defined]  # set by the test
    with pytest.raises(ValueError, match="which MixUp and CutMix cannot mix"):
        Trainer(max_epochs=1, **QUIET).fit(model_of(mixup=0.5), datamodule=data)


class Watch(Callback):
    """Nothing is evaluated in training mode."""

    def on_validation_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, _: int = 0) -> None:
        assert not pl_module.backbone.training
        assert set(outputs) == {"embedding", "label"}


def test_evaluation_leaves_chunks_and_queue_alone() -> None:
    model = model_of(flat=False, queue_size=30, chunk_size=5)
    trainer = Trainer(callbacks=[Watch()], **QUIET)
    trainer.validate(model, datamodule=data_of(), verbose=False)
    assert model.queue is not None
    assert not bool((model.queue.contents()[1] >= 0).any())
    assert model.collapsed_loss is None
