"""DiscriminativeLR: each layer's schedule is the original one divided, as with an optimizer of its own."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim import lr_scheduler as schedulers
from torch.utils.data import DataLoader

from litzoo.callbacks.discriminative_lr import DiscriminativeLR, discriminative_param_groups
from litzoo.callbacks.layer_groups import layer_groups
from litzoo.zoo.optimization import WarmupCosineLR

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
FACTOR, LR, STEPS = 2.0, 0.1, 12
DIVISORS = [4.0, 2.0, 1.0]


class Net(LightningModule):
    """Three layers; `optimize` is its configure_optimizers."""

    def __init__(self, optimize: Callable[[Any], Any] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.body, self.head = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.double()
        self.optimize = optimize or (lambda net: SGD(net.parameters(), LR, momentum=0.9, weight_decay=0.01))
        self.rates: list[list[float]] = []
        self.momenta: list[list[float]] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(torch.tanh(self.stem(x)))))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        groups = [group for optimizer in self.trainer.optimizers for group in optimizer.param_groups]
        self.rates.append([float(group["lr"]) for group in groups])
        self.momenta.append([group["betas"][0] if "betas" in group else group["momentum"] for group in groups])
        # By number, because a run resumed within an epoch starts at the loader's first batch again.
        x, label = batches()[batch_idx]
        return nn.functional.cross_entropy(self(x), label)

    def configure_optimizers(self) -> Any:
        return self.optimize(self)


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(4, 4, generator=generator).double(), torch.randint(3, (4,), generator=generator)) for _ in range(4)]


def fit(folder: Path, net: LightningModule, *callbacks: Callback, ckpt_path: Path | None = None, **settings: Any) -> Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    common: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "max_epochs": 3, "default_root_dir": folder, **quiet}
    trainer = Trainer(callbacks=list(callbacks), **{**common, **settings})
    trainer.fit(net, DataLoader(batches(), batch_size=None), ckpt_path=ckpt_path, weights_only=False if ckpt_path else None)
    return trainer


def same(first: nn.Module, second: nn.Module, **tolerance: float) -> None:
    torch.testing.assert_close(dict(first.named_parameters()), dict(second.named_parameters()), **{"rtol": 0, "atol": 0, **tolerance})


# Each builds a scheduler whose absolute rates are divided by d.
SCHEDULERS: dict[str, Callable[[Optimizer, float], Any]] = {
    "StepLR": lambda o, d: schedulers.StepLR(o, 3, 0.5),
    "MultiStepLR": lambda o, d: schedulers.MultiStepLR(o, [2, 5, 5, 9], 0.5),
    "ExponentialLR": lambda o, d: schedulers.ExponentialLR(o, 0.9),
    "ConstantLR": lambda o, d: schedulers.ConstantLR(o, 0.3, 4),
    "LinearLR": lambda o, d: schedulers.LinearLR(o, 0.2, 0.9, 7),
    "PolynomialLR": lambda o, d: schedulers.PolynomialLR(o, 9, 2.0),
    "CosineAnnealingLR": lambda o, d: schedulers.CosineAnnealingLR(o, 5),
    "CosineAnnealingLR eta_min": lambda o, d: schedulers.CosineAnnealingLR(o, 5, eta_min=0.05 / d),
    "WarmRestarts": lambda o, d: schedulers.CosineAnnealingWarmRestarts(o, 2, 2),
    "WarmRestarts eta_min": lambda o, d: schedulers.CosineAnnealingWarmRestarts(o, 2, 2, eta_min=0.05 / d),
    "ReduceLROnPlateau": lambda o, d: schedulers.ReduceLROnPlateau(o, patience=1, factor=0.5, min_lr=0.02 / d),
    "LambdaLR": lambda o, d: schedulers.LambdaLR(o, lambda t: 1 / (1 + t)),
    "MultiplicativeLR": lambda o, d: schedulers.MultiplicativeLR(o, lambda t: 0.95 if t % 2 else 0.8),
    "WarmupCosineLR": lambda o, d: WarmupCosineLR(o, 0.25, 0.1, STEPS),
    "OneCycleLR": lambda o, d: schedulers.OneCycleLR(o, 0.3 / d, total_steps=STEPS + 1),
    "OneCycleLR three": lambda o, d: schedulers.OneCycleLR(o, 0.3 / d, total_steps=STEPS + 1, three_phase=True, anneal_strategy="linear"),
    "CyclicLR": lambda o, d: schedulers.CyclicLR(o, 0.01 / d, 0.2 / d, 3, 2, mode="triangular2"),
    "CyclicLR exp": lambda o, d: schedulers.CyclicLR(o, 0.01 / d, 0.2 / d, 3, mode="exp_range", gamma=0.9, cycle_momentum=False),
    "SequentialLR": lambda o, d: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, 0.1, 1.0, 4), schedulers.CosineAnnealingLR(o, 6, eta_min=0.03 / d)], [4]
    ),
    "SequentialLR lambda": lambda o, d: schedulers.SequentialLR(
        o, [schedulers.LambdaLR(o, lambda t: 0.1 * (t + 1)), schedulers.CosineAnnealingWarmRestarts(o, 3, eta_min=0.03 / d)], [4]
    ),
    "ChainedScheduler": lambda o, d: schedulers.ChainedScheduler([schedulers.ConstantLR(o, 0.3, 3), schedulers.ExponentialLR(o, 0.9)]),
}
METRICS = [1.0, 0.9, 0.9, 0.9, 0.9, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8]
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "SGD": lambda parameters, lr: SGD(parameters, lr, momentum=0.9, weight_decay=0.01),
    "AdamW": lambda parameters, lr: AdamW(parameters, lr),
    "Adam, lr a tensor": lambda parameters, lr: Adam(parameters, torch.tensor(lr, dtype=torch.float64), foreach=False),
}


class Scheduled(Net):
    """Logs METRICS, for the plateau."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.log("metric", METRICS[self.trainer.global_step])
        return super().training_step(batch, batch_idx)


def scheduled(optimizer: str, scheduler: str) -> Scheduled:
    def optimize(net: Scheduled) -> Any:
        built = OPTIMIZERS[optimizer](net.parameters(), LR)
        settings = {"scheduler": SCHEDULERS[scheduler](built, 1.0), "interval": "step", "monitor": "metric"}
        return {"optimizer": built, "lr_scheduler": settings}

    return Scheduled(optimize)


def reference(optimizer: str, scheduler: str) -> tuple[Net, list[list[float]], list[list[float]]]:
    """A loop with an optimizer and a scheduler a layer; returns the network, the rates and the momenta of each step."""
    net = Net()
    built = [OPTIMIZERS[optimizer](layer.parameters(), LR / d) for layer, d in zip(net.children(), DIVISORS, strict=True)]
    followers = [SCHEDULERS[scheduler](one, d) for one, d in zip(built, DIVISORS, strict=True)]
    rates, momenta = [], []
    for step in range(STEPS):
        groups = [one.param_groups[0] for one in built]
        rates.append([float(group["lr"]) for group in groups])
        momenta.append([group["betas"][0] if "betas" in group else group["momentum"] for group in groups])
        x, label = batches()[step % 4]
        net.zero_grad()
        nn.functional.cross_entropy(net(x), label).backward()
        for one in built:
            one.step()
        for follower in followers:
            follower.step(*([METRICS[step]] if scheduler == "ReduceLROnPlateau" else []))
    return net, rates, momenta


CASES = [("SGD", name) for name in SCHEDULERS] + [("AdamW", "OneCycleLR"), ("AdamW", "CyclicLR")]
# Without SequentialLR, whose own rates are wrong in torch 2.6 if lr is a tensor.
CASES += [("Adam, lr a tensor", name) for name in ("StepLR", "CosineAnnealingLR eta_min", "LambdaLR", "ReduceLROnPlateau")]


@pytest.mark.parametrize(("optimizer", "scheduler"), CASES)
def test_equals_an_optimizer_a_layer(optimizer: str, scheduler: str, tmp_path: Path) -> None:
    expected, rates, momenta = reference(optimizer, scheduler)
    net = scheduled(optimizer, scheduler)

    class Look(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
            (config,) = trainer.lr_scheduler_configs
            last = [float(lr) for lr in config.scheduler.get_last_lr()]
            assert last == [float(group["lr"]) for group in trainer.optimizers[0].param_groups]

    fit(tmp_path, net, DiscriminativeLR(FACTOR), Look())
    torch.testing.assert_close(torch.tensor(net.rates).double(), torch.tensor(rates).double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.tensor(net.momenta), torch.tensor(momenta))
    same(net, expected, rtol=1e-9, atol=1e-12)


def test_equals_the_function(tmp_path: Path) -> None:
    net, other = Net(), Net(lambda net: SGD(discriminative_param_groups(net, LR), LR, momentum=0.9, weight_decay=0.01))
    trainer = fit(tmp_path, net, DiscriminativeLR())
    fit(tmp_path, other)
    same(net, other)
    assert net.rates == other.rates == [[LR / 2.6**2, LR / 2.6, LR]] * STEPS
    assert trainer.logged_metrics == {}


@pytest.mark.parametrize("step", [6, 8])
@pytest.mark.parametrize("scheduler", ["OneCycleLR", "SequentialLR", "WarmupCosineLR", "CyclicLR", "WarmRestarts eta_min"])
def test_resume_within_and_after_an_epoch(scheduler: str, step: int, tmp_path: Path) -> None:
    whole, resumed = scheduled("AdamW", scheduler), scheduled("AdamW", scheduler)
    save = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1)
    fit(tmp_path, whole, DiscriminativeLR(FACTOR), save, enable_checkpointing=True)
    fit(tmp_path, resumed, DiscriminativeLR(FACTOR), ckpt_path=tmp_path / f"step={step}.ckpt")
    same(resumed, whole)
    assert resumed.rates == whole.rates[step:]


def test_lightning_steps_the_plateau(tmp_path: Path) -> None:
    """Lightning's own subclass of ReduceLROnPlateau, which litzoo's recipes use, once an epoch."""
    from lightning.pytorch.cli import ReduceLROnPlateau

    class Logs(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.log("flat", 1.0)
            return super().training_step(batch, batch_idx)

    def optimize(net: Net) -> Any:
        built = SGD(net.parameters(), LR, momentum=0.9)
        return {"optimizer": built, "lr_scheduler": {"scheduler": ReduceLROnPlateau(built, "flat", patience=0), "monitor": "flat"}}

    net = Logs(optimize)
    fit(tmp_path, net, DiscriminativeLR(FACTOR))
    torch.testing.assert_close(torch.tensor(net.rates[::4]), torch.tensor([[LR / d * s for d in DIVISORS] for s in (1, 1, 0.1)]))


def test_factor_one_is_neutral(tmp_path: Path) -> None:
    net, other = scheduled("AdamW", "OneCycleLR"), scheduled("AdamW", "OneCycleLR")
    trainer = fit(tmp_path, net, DiscriminativeLR(1), LearningRateMonitor(), logger=True)
    fit(tmp_path, other)
    same(net, other)
    assert net.rates == other.rates
    assert len(trainer.optimizers[0].param_groups) == 1


def test_two_fits_with_one_object_and_pickle(tmp_path: Path) -> None:
    callback = pickle.loads(pickle.dumps(DiscriminativeLR(FACTOR)))
    first, second = scheduled("SGD", "CyclicLR"), scheduled("SGD", "CyclicLR")
    fit(tmp_path, first, callback)
    fit(tmp_path, second, copy.deepcopy(callback))
    assert first.rates == second.rates
    third = scheduled("SGD", "CyclicLR")
    fit(tmp_path, third, callback)
    same(first, third)
    assert callback.state_dict() == {}


def test_options_of_groups_are_kept(tmp_path: Path) -> None:
    shared: list[Any] = []

    def optimize(net: Net) -> Optimizer:
        weights = [(name, p) for name, p in net.named_parameters() if name.endswith("weight")]
        biases = [(name, p) for name, p in net.named_parameters() if name.endswith("bias")]
        built = SGD(
            [{"params": weights, "name": "w", "weight_decay": 0.5}, {"params": biases, "name": "b", "lr": 0.2, "nesterov": True}],
            LR,
            momentum=0.9,
        )
        shared.append(built.param_groups)  # as timm's Lookahead does
        return built

    net = Net(optimize)
    trainer = fit(tmp_path, net, DiscriminativeLR(FACTOR), LearningRateMonitor(), logger=True)
    groups = trainer.optimizers[0].param_groups
    assert groups is shared[0]
    assert [group["name"] for group in groups] == [f"{kind}/{layer}" for kind in "wb" for layer in ("stem", "body", "head")]
    assert [group["lr"] for group in groups] == [LR / d for d in DIVISORS] + [0.2 / d for d in DIVISORS]
    assert [group["weight_decay"] for group in groups] == [0.5] * 3 + [0] * 3
    assert [group["nesterov"] for group in groups] == [False] * 3 + [True] * 3
    names = {parameter: name for name, parameter in net.named_parameters()}
    for group in groups:
        assert group["param_names"] == [names[parameter] for parameter in group["params"]]
    assert sorted(names.values()) == sorted(name for group in groups for name in group["param_names"])


def test_several_optimizers_by_hand(tmp_path: Path) -> None:
    class Manual(Net):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
            loss = super().training_step(batch, batch_idx)
            self.manual_backward(loss)
            for optimizer, scheduler in zip(self.optimizers(), self.lr_schedulers(), strict=True):
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()

    def optimize(net: Net) -> Any:
        lower, upper = SGD([*net.stem.parameters(), *net.body.parameters()], LR, momentum=0.9), Adam(net.head.parameters(), LR)
        return [lower, upper], [schedulers.LambdaLR(lower, lambda t: 1 / (1 + t)), schedulers.ExponentialLR(upper, 0.5)]

    net = Manual(optimize)
    fit(tmp_path, net, DiscriminativeLR(FACTOR), max_epochs=1)
    expected = [[LR / 4 / (1 + t), LR / 2 / (1 + t), LR * 0.5**t] for t in range(4)]
    torch.testing.assert_close(torch.tensor(net.rates), torch.tensor(expected))


class Tied(Net):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.head = nn.Linear(5, 3).double()
        self.tail = nn.Linear(5, 5, bias=False)
        self.tail.weight = self.body.weight


def test_tied_and_frozen_parameters(tmp_path: Path) -> None:
    net = Tied()
    assert [name for name, _ in layer_groups(net, None)] == ["stem", "body", "head"]
    net.stem.requires_grad_(False)
    net.body.bias.requires_grad_(False)
    groups = discriminative_param_groups(net, LR, FACTOR)
    assert [(group["name"], group["lr"], len(group["params"])) for group in groups] == [("body", LR / 2, 1), ("head", LR, 2)]
    taken = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(taken) == sorted(id(parameter) for parameter in net.parameters() if parameter.requires_grad)
    net = Tied(lambda net: SGD([p for p in net.parameters() if p.requires_grad], LR, momentum=0.9))
    net.stem.requires_grad_(False)
    fit(tmp_path, net, DiscriminativeLR(FACTOR))
    assert net.rates == [[LR / 2, LR]] * STEPS
    same(net.stem, Tied().stem)


class Parts(nn.Module):
    """A parameter of its own, two children and one without parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.drop, self.b = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1)), nn.Dropout(), nn.Linear(1, 1)
        self.token = nn.Parameter(torch.zeros(1))


def test_groups() -> None:
    def names(module: nn.Module, patterns: list[str] | None = None) -> list[tuple[str, list[str]]]:
        return [(group, [name for name, _ in members]) for group, members in layer_groups(module, patterns)]

    whole = [("Parts", ["token"]), ("a", ["a.0.weight", "a.0.bias", "a.1.weight", "a.1.bias"]), ("b", ["b.weight", "b.bias"])]
    assert names(Parts()) == whole
    nested = nn.ModuleDict({"net": nn.ModuleDict({"parts": Parts()})})
    assert [group for group, _ in names(nested)] == ["net.parts", "net.parts.a", "net.parts.b"]
    assert names(nn.Linear(1, 1)) == [("Linear", ["weight", "bias"])]
    assert names(nn.Sequential(nn.ReLU(), nn.Linear(1, 1))) == [("1", ["1.weight", "1.bias"])]
    assert names(nn.ReLU()) == []
    assert names(Parts(), [r"token|a\.0", r"^a", "."]) == [
        (r"token|a\.0", ["token", "a.0.weight", "a.0.bias"]),
        (r"^a", ["a.1.weight", "a.1.bias"]),
        (".", ["b.weight", "b.bias"]),
    ]


class Unknown(schedulers.StepLR):
    def get_lr(self) -> list[float]:
        return [0.3 for _ in self.optimizer.param_groups]


def test_mistakes(tmp_path: Path) -> None:
    for factor in (0.65, 0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="factor divides the learning rates and must be at least 1"):
            DiscriminativeLR(factor)
        with pytest.raises(ValueError, match="at least 1"):
            discriminative_param_groups(Net(), LR, factor)
    with pytest.raises(ValueError, match="groups must be a list of regular expressions"):
        DiscriminativeLR(groups="stem")
    with pytest.raises(ValueError, match="groups must be a list"):
        DiscriminativeLR(groups=[])
    with pytest.raises(ValueError, match=r"groups has '\(', which is no regular expression"):
        DiscriminativeLR(groups=["("])
    with pytest.raises(ValueError, match=r"no pattern for the parameter 'head.weight'"):
        fit(tmp_path, Net(), DiscriminativeLR(groups=["stem", "body"]))
    with pytest.raises(ValueError, match=r"'stem.weight', which matches no parameter that an earlier pattern leaves"):
        discriminative_param_groups(Net(), LR, groups=["stem", "stem.weight", "."])


def swalr(net: Net) -> Any:
    built = SGD(net.parameters(), LR, momentum=0.9)
    return [built], [torch.optim.swa_utils.SWALR(built, 0.01)]


@pytest.mark.parametrize(
    "build",
    [
        lambda o: Unknown(o, 1),
        lambda o: schedulers.SequentialLR(o, [schedulers.ConstantLR(o), Unknown(o, 1)], [2]),
        lambda o: schedulers.ChainedScheduler([schedulers.ChainedScheduler([Unknown(o, 1)])]),
    ],
)
def test_unknown_scheduler(build: Callable[[Optimizer], Any], tmp_path: Path) -> None:
    def optimize(net: Net) -> Any:
        built = SGD(net.parameters(), LR, momentum=0.9)
        return [built], [build(built)]

    with pytest.raises(MisconfigurationException, match="scheduler Unknown: call discriminative_param_groups in configure_optim"):
        fit(tmp_path, Net(optimize), DiscriminativeLR())
    with pytest.raises(MisconfigurationException, match="scheduler SWALR"):
        fit(tmp_path, Net(swalr), DiscriminativeLR())


def test_impossible_setups(tmp_path: Path) -> None:
    others = [LearningRateFinder(), StochasticWeightAveraging(0.01), BackboneFinetuning(), DiscriminativeLR()]
    for other in others:
        with pytest.raises(MisconfigurationException, match=f"DiscriminativeLR does not compose with {type(other).__name__}"):
            fit(tmp_path, Net(), DiscriminativeLR(), other)
    with pytest.raises(MisconfigurationException, match="cannot split the parameters of LBFGS"):
        fit(tmp_path, Net(lambda net: torch.optim.LBFGS(net.parameters())), DiscriminativeLR())
    stray = nn.Parameter(torch.zeros(2, 3))
    with pytest.raises(MisconfigurationException, match=r"a parameter of shape \(2, 3\) that is not the module's"):
        fit(tmp_path, Net(lambda net: SGD([*net.parameters(), stray], LR)), DiscriminativeLR())

    class FSDPStrategy:
        pass

    class Stub:
        strategy, callbacks = FSDPStrategy(), ()

    with pytest.raises(MisconfigurationException, match="does not work under FSDPStrategy"):
        DiscriminativeLR().setup(Stub(), Net(), "fit")  # type: ignore[arg-type]
