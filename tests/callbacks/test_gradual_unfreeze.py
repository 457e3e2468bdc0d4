"""GradualUnfreeze: the weights of a loop that builds its parameters by hand; `run_rank` is for two processes."""

import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BackboneFinetuning, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.utils.data import DataLoader

from litzoo.callbacks.discriminative_lr import DiscriminativeLR
from litzoo.callbacks.gradual_unfreeze import GradualUnfreeze

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
EPOCHS, BATCHES = 4, 3


class Net(LightningModule):
    """Stem, body and head; the first two have BatchNorm, the stem's without parameters. `optimize` is its configure_optimizers."""

    def __init__(self, optimize: Callable[[Any], Any] | None = None, norm: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        first, second = (nn.BatchNorm1d(5, affine=False), nn.BatchNorm1d(5)) if norm else (nn.Identity(), nn.Identity())
        self.stem = nn.Sequential(nn.Linear(4, 5), nn.Sequential(first), nn.Tanh())
        self.body = nn.Sequential(nn.Linear(5, 5), second, nn.Tanh())
        self.head = nn.Linear(5, 3)
        self.double()
        self.optimize = optimize or sgd
        self.shard = slice(None)

    def loss(self, batch_idx: int) -> Tensor:
        x, label = batches()[batch_idx]
        return nn.functional.cross_entropy(self.head(self.body(self.stem(x[self.shard]))), label[self.shard])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        # By number, because a run resumed within an epoch starts at the loader's first batch again.
        return self.loss(batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        assert not any(module.training for module in self.modules())

    def configure_optimizers(self) -> Any:
        return self.optimize(self)


def sgd(net: Net) -> Optimizer:
    return SGD(net.parameters(), 0.1, momentum=0.9, weight_decay=0.1)


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(8, 4, generator=generator).double(), torch.randint(3, (8,), generator=generator)) for _ in range(BATCHES)]


def fit(folder: Path, net: LightningModule, *callbacks: Callback, ckpt_path: Path | None = None, **settings: Any) -> Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    common: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "max_epochs": EPOCHS, "default_root_dir": folder, **quiet}
    trainer = Trainer(callbacks=list(callbacks), **{**common, **settings})
    loader = DataLoader(batches(), batch_size=None)
    trainer.fit(net, loader, loader, ckpt_path=ckpt_path, weights_only=False if ckpt_path else None)
    return trainer


def same(first: nn.Module, second: nn.Module, **tolerance: float) -> None:
    torch.testing.assert_close(first.state_dict(), second.state_dict(), **{"rtol": 0, "atol": 0, **tolerance})


def flags(net: nn.Module) -> list[bool]:
    return [parameter.requires_grad for parameter in net.parameters()] + [module.training for module in net.modules()]


def by_hand(every: int = 1, norm: bool = True, accumulate: int = 1, clip: float | None = None, shards: int = 1) -> Net:
    """SGD with momentum and weight decay in plain arithmetic, over the parts whose turn has come."""
    net = Net(norm=norm)
    parts = [net.stem, net.body, net.head]
    momenta: dict[nn.Parameter, Tensor] = {}
    for epoch in range(EPOCHS):
        trained = parts[max(2 - epoch // every, 0) :]
        for part in parts:
            part.train(part in trained)
        weights = [weight for part in trained for weight in part.parameters()]
        for start in range(0, BATCHES, accumulate):
            gradients = [torch.zeros_like(weight) for weight in weights]
            for batch in range(start, min(start + accumulate, BATCHES)):
                for shard in range(shards):
                    net.shard = slice(shard * 8 // shards, (shard + 1) * 8 // shards)
                    # As in Lightning, an incomplete window is divided by the whole one's length.
                    for total, gradient in zip(gradients, torch.autograd.grad(net.loss(batch), weights), strict=True):
                        total += gradient / accumulate / shards
            if clip is not None:
                norm_ = torch.sqrt(sum((gradient**2).sum() for gradient in gradients))  # type: ignore[arg-type]
                gradients = [gradient * min(1.0, clip / (float(norm_) + 1e-6)) for gradient in gradients]
            with torch.no_grad():
                for weight, gradient in zip(weights, gradients, strict=True):
                    step = gradient + 0.1 * weight
                    momenta[weight] = momenta[weight] * 0.9 + step if weight in momenta else step
                    weight -= 0.1 * momenta[weight]
    return net


CLOSE = {"rtol": 1e-9, "atol": 1e-12}


@pytest.mark.parametrize("every", [1, 2, 9])
def test_equals_a_loop_by_hand(every: int, tmp_path: Path) -> None:
    net = Net()
    found = flags(net)
    trainer = fit(tmp_path, net, GradualUnfreeze(every))
    same(net, by_hand(every), **CLOSE)
    assert flags(net) == found
    assert trainer.logged_metrics == {}


def test_accumulation_and_clipping(tmp_path: Path) -> None:
    net = Net()
    fit(tmp_path, net, GradualUnfreeze(), accumulate_grad_batches=2, gradient_clip_val=0.05, val_check_interval=1)
    same(net, by_hand(accumulate=2, clip=0.05), **CLOSE)


class Watch(Callback):
    """Notes for each batch which parts train, and which layers of BatchNorm do."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        parts = {name: next(part.parameters()).requires_grad for name, part in pl_module.named_children()}
        modes = {"stem": pl_module.stem[1][0].training, "body": pl_module.body[1].training, "head": pl_module.head.training}
        self.seen.append(tuple(" ".join(name for name, on in found.items() if on) for found in (parts, modes)))  # type: ignore[arg-type]


def test_what_trains_when(tmp_path: Path) -> None:
    watch = Watch()
    fit(tmp_path, Net(), GradualUnfreeze(), watch, val_check_interval=1)
    epochs = ["head", "body head", "stem body head", "stem body head"]
    assert watch.seen == [(trained, trained) for trained in epochs for _ in range(BATCHES)]


def test_statistics_stand_still_when_the_module_changes_its_modes(tmp_path: Path) -> None:
    class Trains(Net):
        def on_validation_model_train(self) -> None:
            self.train()

        def on_train_epoch_start(self) -> None:
            self.train()

    net = Trains()
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    fit(tmp_path, net, GradualUnfreeze(9), val_check_interval=1)
    torch.testing.assert_close(dict(net.named_buffers()), before, rtol=0, atol=0)


@pytest.mark.parametrize("callback", [GradualUnfreeze(groups=["."]), GradualUnfreeze(10, ["."])])
def test_one_group_is_neutral(callback: GradualUnfreeze, tmp_path: Path) -> None:
    net, plain = Net(), Net()
    fit(tmp_path, net, callback)
    fit(tmp_path, plain)
    same(net, plain)


@pytest.mark.parametrize("step", [2, 3, 4, 5, 6, 8])
def test_resume_within_and_after_an_epoch(step: int, tmp_path: Path) -> None:
    """Lightning's BaseFinetuning freezes again what was unfrozen when a run resumes (issue 21901)."""
    whole, resumed, watch, again = Net(adamw), Net(adamw), Watch(), Watch()
    save = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    fit(tmp_path, whole, GradualUnfreeze(), watch, save, enable_checkpointing=True)
    fit(tmp_path, resumed, GradualUnfreeze(), again, ckpt_path=tmp_path / f"step={step}.ckpt")
    same(resumed, whole)
    assert again.seen == watch.seen[step:]


def adamw(net: Net) -> Optimizer:
    return AdamW(net.parameters(), 0.01)


def test_resume_from_the_end_of_a_fit(tmp_path: Path) -> None:
    whole, resumed = Net(adamw), Net(adamw)
    fit(tmp_path, whole, GradualUnfreeze())
    fit(tmp_path, Net(adamw), GradualUnfreeze(), max_epochs=2).save_checkpoint(tmp_path / "last.ckpt")
    fit(tmp_path, resumed, GradualUnfreeze(), ckpt_path=tmp_path / "last.ckpt")
    same(resumed, whole)


def test_two_fits_with_one_object_and_pickle(tmp_path: Path) -> None:
    callback = pickle.loads(pickle.dumps(GradualUnfreeze()))
    for _ in range(2):
        net = Net()
        fit(tmp_path, net, callback)
        same(net, by_hand(), **CLOSE)
    assert callback.state_dict() == {}
    assert not callback._parameters
    assert not callback._norms


def test_what_was_frozen_stays_frozen(tmp_path: Path) -> None:
    net, start = Net(), Net()
    net.body.requires_grad_(False)
    net.stem[0].bias.requires_grad_(False)
    net.body[1].eval()
    found = flags(net)
    fit(tmp_path, net, GradualUnfreeze())
    assert flags(net) == found
    same(net.body, start.body)
    assert net.stem[0].bias.equal(start.stem[0].bias)
    assert not net.stem[0].weight.equal(start.stem[0].weight)


@pytest.mark.parametrize("hook", ["validation_step", "training_step", "on_train_batch_end", "on_train_epoch_end"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_exception_gives_back(hook: str, error: type[BaseException], tmp_path: Path) -> None:
    net, callback = Net(), GradualUnfreeze()
    requires_grad, modes = [p.requires_grad for p in net.parameters()], [m.training for m in net.modules()]

    def fail(*arguments: Any, **settings: Any) -> None:
        assert [p.requires_grad for p in net.parameters()] != requires_grad
        raise error("stop")

    setattr(net, hook, fail)
    with pytest.raises(SystemExit if error is KeyboardInterrupt else error):
        fit(tmp_path, net, callback, num_sanity_val_steps=0)
    assert [p.requires_grad for p in net.parameters()] == requires_grad
    if hook == "validation_step":  # Lightning leaves the whole network in eval mode then
        assert net.stem[1][0].training
        assert net.body[1].training
    else:
        assert [m.training for m in net.modules()] == modes
    second = Net()
    fit(tmp_path, second, callback)
    same(second, by_hand(), **CLOSE)


@contextmanager
def one_process() -> Iterator[None]:
    """DDP in this process leaves no trace in it."""
    with mock.patch.dict(os.environ):
        try:
            yield
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()


class Manual(Net):
    """Two optimizers, stepped by hand; gradients are set to zero, not to None, and no hook sees the backward pass."""

    automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        self.loss(batch_idx).backward()
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)


@pytest.mark.parametrize("strategy", ["auto", "ddp"])
def test_several_optimizers_by_hand(strategy: str, tmp_path: Path) -> None:
    def two(net: Net) -> list[Optimizer]:
        halves = [*net.stem.parameters(), *net.body[0].parameters()], [*net.body[1].parameters(), *net.head.parameters()]
        return [SGD(half, 0.1, momentum=0.9, weight_decay=0.1) for half in halves]

    net = Manual(two)
    with one_process():
        fit(tmp_path, net, GradualUnfreeze(), strategy=strategy)
    same(net, by_hand(), **CLOSE)


def test_composes_with_discriminative_rates(tmp_path: Path) -> None:
    def optimize(net: Net) -> Optimizer:
        parts = [{"params": part.parameters(), "lr": lr} for part, lr in zip(net.children(), (0.025, 0.05, 0.1), strict=True)]
        return SGD(parts, momentum=0.9, weight_decay=0.1)

    net, other, groups = Net(), Net(optimize), ["stem", "body", "head"]
    fit(tmp_path, net, GradualUnfreeze(groups=groups), DiscriminativeLR(2, groups))
    fit(tmp_path, other, GradualUnfreeze())
    same(net, other)


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="every_n_epochs must be at least 1, got 0"):
        GradualUnfreeze(0)
    with pytest.raises(ValueError, match="groups must be a list of regular expressions"):
        GradualUnfreeze(groups="head")
    with pytest.raises(ValueError, match=r"no pattern for the parameter 'stem.0.weight'"):
        fit(tmp_path, Net(), GradualUnfreeze(groups=["head"]))
    for other in (BackboneFinetuning(), StochasticWeightAveraging(0.01), GradualUnfreeze()):
        with pytest.raises(MisconfigurationException, match=f"GradualUnfreeze does not compose with {type(other).__name__}"):
            fit(tmp_path, Net(), GradualUnfreeze(), other)
    with pytest.raises(MisconfigurationException, match=r"unfreeze 'stem.0.weight', which no optimizer holds: give the optimizer all"):
        fit(tmp_path, Net(lambda net: Adam(net.head.parameters())), GradualUnfreeze())

    class FSDPStrategy:
        pass

    class Stub:
        strategy, callbacks = FSDPStrategy(), ()

    with pytest.raises(MisconfigurationException, match="does not work under FSDPStrategy"):
        GradualUnfreeze().setup(Stub(), Net(), "fit")  # type: ignore[arg-type]


def test_ddp_with_one_process(tmp_path: Path) -> None:
    """The reducer waits for all gradients there too."""
    net = Net()
    with one_process():
        fit(tmp_path, net, GradualUnfreeze(), strategy="ddp")
    same(net, by_hand(), **CLOSE)


def run_rank(folder: Path) -> None:
    """One of two processes, each with half of every batch."""
    for name, settings in RUNS.items():
        net = Net(norm=False)
        trainer = fit(folder, net, Shard(), GradualUnfreeze(), strategy="ddp", devices=2, use_distributed_sampler=False, **settings)
        assert all(parameter.requires_grad for parameter in net.parameters())
        torch.save(net.state_dict(), folder / f"{name}{trainer.global_rank}.pt")


RUNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "windows": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05},
}


class Shard(Callback):
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.shard = slice(4 * trainer.global_rank, 4 * trainer.global_rank + 4)


@pytest.mark.slow
def test_two_processes_equal_the_mean_of_gradients(rank_folder: Path) -> None:
    expected = {"plain": by_hand(norm=False, shards=2), "windows": by_hand(norm=False, shards=2, accumulate=2, clip=0.05)}
    for name, net in expected.items():
        for rank in range(2):
            found = torch.load(rank_folder / f"{name}{rank}.pt", weights_only=True)
            torch.testing.assert_close(found, net.state_dict(), **CLOSE)
