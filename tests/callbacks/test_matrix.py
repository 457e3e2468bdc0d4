"""Every callback under every condition of the matrix; also the script of its two processes."""

import contextlib
import copy
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from matrix import (
    COMBINATIONS,
    CONDITIONS,
    ELSEWHERE,
    LEVEL,
    PRECISIONS,
    ROWS,
    FloodingTrick,
    Loader,
    Manual,
    Net,
    Row,
    Steps,
    Trick,
    WithMomentum,
    batches,
    by_hand,
    fit,
    make_trainer,
)
from torch import Tensor

from litzoo.callbacks import CALLBACKS, EMA, Flooding, StepSeed
from litzoo.callbacks.perturbed_pass import PerturbedPass

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
Check = Callable[[Row, Path], None]


def differences(first: Any, second: Any, where: str = "") -> list[str]:
    """Where two nested structures of tensors and plain values differ."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return [] if first.dtype == second.dtype and torch.equal(first, second) else [where]
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        if first.keys() != second.keys():
            return [f"{where}: keys {set(first) ^ set(second)}"]
        return [found for key in first for found in differences(first[key], second[key], f"{where}/{key}")]
    if isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)) and len(first) == len(second):
        pairs = enumerate(zip(first, second, strict=True))
        return [found for key, (one, other) in pairs for found in differences(one, other, f"{where}/{key}")]
    return [] if first == second else [f"{where}: {first} and {second}"]


def loaders() -> tuple[Loader, Loader]:
    return Loader(batches(0)), Loader(batches(9, 2))


# Methods that a callback may hide for a while by an attribute of the module.
PATCHED = ("forward", "encode", "log", "log_dict", "training_step", "predict_step")


def state(model: LightningModule) -> dict[str, Any]:
    """Everything of a module that a callback might leave changed."""
    return {
        "values": {name: value.clone() for name, value in model.state_dict().items()},
        "requires_grad": {name: weight.requires_grad for name, weight in model.named_parameters()},
        "attributes": sorted(name for name in vars(model) if name in PATCHED),
    }


# The checks


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name].double(), value.double(), atol=tolerance, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


def compare(row: Row, found: dict[str, Tensor], precision: str, accumulate: int, world: int) -> None:
    """Hold trained weights against the hand-written loop, and see to it that the loop without the trick is far off."""
    settings = PRECISIONS[precision]
    shards = [batches(rank) for rank in range(world)]
    assert_close(found, by_hand(row.trick(), shards, accumulate, settings.dtype, settings.autocast), settings.tolerance)
    if row.trick is not Row.trick:
        plain = by_hand(Trick(), shards, accumulate, settings.dtype, settings.autocast)
        with pytest.raises(AssertionError):
            assert_close(found, plain, settings.tolerance)


def check_precision(row: Row, folder: Path) -> None:
    for position, (precision, accumulate, world) in enumerate(COMBINATIONS):
        if world == 1:
            compare(row, fit(folder / str(position), row.make(), precision, accumulate, 1), precision, accumulate, 1)


def run_with_checkpoints(folder: Path, row: Row | None, resume: Path | None, seed: int = 1) -> dict[str, Any]:
    """Three epochs of seven batches, a checkpoint after 5, 10, ... steps and after each epoch; returns the last epoch's."""
    made = [] if row is None else [row.make()]
    every_step = ModelCheckpoint(folder / "steps", "{step}", save_top_k=-1, every_n_train_steps=5, save_on_train_epoch_end=False)
    every_epoch = ModelCheckpoint(folder / "epochs", "{epoch}", save_top_k=-1, every_n_epochs=1, save_on_train_epoch_end=True)
    model = WithMomentum(norm=True)
    trainer = make_trainer(folder, StepSeed(seed), *made, every_step, every_epoch, enable_checkpointing=True)
    trainer.fit(model, *loaders(), ckpt_path=resume, weights_only=None if resume is None else True)
    checkpoint = torch.load(folder / "epochs" / "epoch=2.ckpt", weights_only=True)
    kept = {key: value for key, value in checkpoint["callbacks"].items() if "ModelCheckpoint" not in key}
    # Where a snapshot lies is not part of what must be equal.
    for value in kept.values():
        for key in [key for key in value if re.search("path|dir|snapshot|file", key)]:
            del value[key]
    return {**{key: checkpoint[key] for key in ("state_dict", "optimizer_states", "lr_schedulers")}, "callbacks": kept, "end": state(model)}


def check_resume(row: Row, folder: Path) -> None:
    whole = run_with_checkpoints(folder / "whole", row, None)
    for name in ("steps/step=10.ckpt", "epochs/epoch=0.ckpt", "epochs/epoch=1.ckpt"):
        resumed = run_with_checkpoints(folder / name.replace("/", "_"), row, folder / "whole" / name)
        assert differences(whole, resumed) == [], name
    if not isinstance(row.make(), StepSeed):  # it has a seed of its own here
        assert differences(whole, run_with_checkpoints(folder / "control", row, None, seed=2)) != []


def check_reuse(row: Row, folder: Path) -> None:
    def train(callback: Callback, name: str) -> dict[str, Any]:
        model = WithMomentum(norm=True)
        make_trainer(folder / name, StepSeed(1), callback).fit(model, *loaders())
        return state(model)

    callback = pickle.loads(pickle.dumps(row.make()))
    first = train(callback, "first")
    second = train(callback, "second")
    assert differences(first, second) == []
    again = train(pickle.loads(pickle.dumps(callback)), "third")
    assert differences(first, again) == []
    copy.deepcopy(callback)


class Watch(Callback):
    """Notes the weights that each stage sees."""

    def __init__(self) -> None:
        self.seen: dict[str, dict[str, Tensor]] = {}

    def _note(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.seen[trainer.state.fn.value] = {name: value.clone() for name, value in pl_module.state_dict().items()}

    on_validation_batch_end = on_test_batch_end = on_predict_batch_end = _note  # type: ignore[assignment]


def check_stages(row: Row, folder: Path) -> None:
    """What is saved is what was validated; testing it needs neither the callback nor a new trainer, and changes nothing."""
    watch, model = Watch(), Net(norm=True)
    checkpoint = ModelCheckpoint(folder, "best", monitor="val/loss", save_top_k=1)
    trainer = make_trainer(folder, StepSeed(1), row.make(), watch, checkpoint, enable_checkpointing=True)
    train, val = loaders()
    trainer.fit(model, train, val)
    after_fit = state(model)
    for stage in ("validate", "test"):
        getattr(trainer, stage)(model, val, verbose=False)
        assert differences(after_fit, state(model)) == [], stage
    trainer.predict(model, val)
    assert differences(after_fit, state(model)) == []
    saved = torch.load(checkpoint.best_model_path, weights_only=True)["state_dict"]
    for stage in ("validate", "test"):
        scores = getattr(trainer, stage)(model, val, ckpt_path="best", verbose=False, weights_only=True)[0]
        assert differences(saved, watch.seen[stage]) == [], f"{stage} does not score what was saved"
        if stage == "validate":
            assert scores["val/loss"] == pytest.approx(float(checkpoint.best_model_score), abs=1e-6), "not what was validated is saved"
    trainer.predict(model, val, ckpt_path="best", weights_only=True)
    assert differences(saved, watch.seen["predict"]) == []
    stranger = Net(norm=True)
    make_trainer(folder / "stranger").test(stranger, val, ckpt_path=checkpoint.best_model_path, verbose=False, weights_only=True)
    assert differences(saved, dict(stranger.state_dict())) == []


class LastTrained(Callback):
    """Notes the module after the last training batch."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.state = state(pl_module)


def check_exception(row: Row, folder: Path) -> None:
    for error, ends in ((RuntimeError, RuntimeError), (KeyboardInterrupt, SystemExit)):
        for epoch in (0, 2):
            model, last = Net(norm=True), LastTrained()
            before = state(model)

            class Fail(Callback):
                def on_train_epoch_start(self, trainer: Trainer, pl_module: Any, epoch: int = epoch, error: Any = error) -> None:
                    pl_module.fails = error if trainer.current_epoch == epoch else None

            folder_of_run = folder / f"{error.__name__}{epoch}"
            with pytest.raises(ends):
                make_trainer(folder_of_run, StepSeed(1), row.make(), last, Fail()).fit(model, *loaders())
            assert differences(last.state["values"], state(model)["values"]) == []
            assert differences(before["requires_grad"], state(model)["requires_grad"]) == []
            assert state(model)["attributes"] == before["attributes"]


def check_weights_only(row: Row, folder: Path) -> None:
    model = Net(norm=True)
    checkpoint = ModelCheckpoint(folder, "weights", save_weights_only=True, every_n_epochs=1, save_on_train_epoch_end=True)
    make_trainer(folder, StepSeed(1), row.make(), checkpoint, enable_checkpointing=True).fit(model, *loaders())
    saved = torch.load(folder / "weights.ckpt", weights_only=True)["state_dict"]
    assert differences(saved, dict(model.state_dict())) == []


def check_manual(row: Row, folder: Path, optimizers: int = 1) -> None:
    """Plain SGD by hand is plain SGD; with two optimisers each steps one layer, on a gradient taken after the other's step."""
    model = Manual(optimizers)
    make_trainer(folder, row.make()).fit(model, Loader(batches(0)), Loader(batches(9, 2)))
    trick, net = row.trick(), Net()
    parts: list[str] = ["first", "last"] if optimizers == 2 else [""]
    weights, step = dict(net.named_parameters()), 0
    for epoch in range(3):
        for x, y in batches(0):
            for part in parts:
                net.zero_grad()
                torch.nn.functional.cross_entropy(net(x), y).backward()
                with torch.no_grad():
                    for name, weight in weights.items():
                        if name.startswith(part) and weight.grad is not None:
                            weight -= trick.lr(name, 0, 1, epoch) * weight.grad
            step += 1
            trick.after_step(weights, step)
        trick.after_epoch(weights)
    assert_close({name: weight.detach() for name, weight in model.named_parameters()}, trick.result(weights), 1e-5)


def check_optimizers(row: Row, folder: Path) -> None:
    check_manual(row, folder, optimizers=2)


def check_namespace(row: Row, folder: Path) -> None:
    import pytorch_lightning

    class Foreign(Steps, pytorch_lightning.LightningModule):
        pass

    model = Foreign()
    trainer = make_trainer(folder, row.make(), kind=pytorch_lightning.Trainer)
    trainer.fit(model, *loaders())
    trainer.test(model, loaders()[1], verbose=False)
    expected = by_hand(row.trick(), [batches(0)], 1, torch.float32, None)
    assert_close({name: weight.detach() for name, weight in model.named_parameters()}, expected, 1e-4)


def check_compile(row: Row, folder: Path) -> None:
    model = Net()
    compiled = torch.compile(model, backend="eager")
    make_trainer(folder, row.make()).fit(compiled, *loaders())
    expected = by_hand(row.trick(), [batches(0)], 1, torch.float32, None)
    assert_close({name: weight.detach() for name, weight in model.named_parameters()}, expected, 1e-4)


def check_neutral(row: Row, folder: Path) -> None:
    def train(name: str, *made: Callback) -> tuple[dict[str, Any], set[str], int]:
        model = WithMomentum(norm=True)
        trainer = make_trainer(folder / name, StepSeed(1), *made)
        trainer.fit(model, *loaders())
        keys = {*trainer.logged_metrics, *trainer.callback_metrics, *trainer.progress_bar_metrics}
        return state(model), keys, model.steps

    bare, keys, steps = train("bare")
    assert train("made", row.make())[1] == keys | row.logs
    neutral = row.neutral
    if neutral is None and row.trick is Row.trick:
        neutral = row.make
    if neutral is not None:
        end, _, neutral_steps = train("neutral", neutral())
        assert differences(bare, end) == []
        assert neutral_steps == steps


CHECKS: dict[str, Check] = {
    "precision": check_precision,
    "resume": check_resume,
    "reuse": check_reuse,
    "stages": check_stages,
    "exception": check_exception,
    "weights_only": check_weights_only,
    "manual": check_manual,
    "optimizers": check_optimizers,
    "namespace": check_namespace,
    "compile": check_compile,
    "neutral": check_neutral,
}


@pytest.mark.parametrize("condition", CHECKS)
@pytest.mark.parametrize("name", ROWS)
def test_matrix(name: str, condition: str, tmp_path: Path) -> None:
    row = ROWS[name]
    if condition in row.refuses:
        with pytest.raises(MisconfigurationException, match=row.refuses[condition]) as refused:
            CHECKS[condition](row, tmp_path)
        assert name in str(refused.value)
    else:
        CHECKS[condition](row, tmp_path)


def test_table_is_whole() -> None:
    assert {*ROWS, *ELSEWHERE} == set(CALLBACKS)
    assert all(Path(__file__).with_name(file).is_file() for file in ELSEWHERE.values())
    assert set(CONDITIONS) == {*CHECKS, "processes"}
    for row in ROWS.values():
        assert set(row.refuses) == set(row.reason) <= set(CONDITIONS)


def test_readme_holds_the_generated_table() -> None:
    root = Path(__file__).resolve().parents[2]
    made = subprocess.run([sys.executable, str(root / "scripts" / "callback_table.py")], capture_output=True, text=True, check=True).stdout
    readme = (root / "README.md").read_text(encoding="utf-8")
    assert f"<!-- matrix -->\n{made}<!-- /matrix -->" in readme, "run: python scripts/callback_table.py --write"


def test_combinations_hold_every_pair() -> None:
    columns = list(zip(*COMBINATIONS, strict=True))
    for first, second in combinations(range(3), 2):
        wanted = {(one, other) for one in columns[first] for other in columns[second]}
        assert {(combination[first], combination[second]) for combination in COMBINATIONS} == wanted


# Callbacks with planted bugs


class CarelessFGM(PerturbedPass):
    """Runs the second pass past the strategy and past the isolation, as many implementations do."""

    replaces_gradient = False

    def __init__(self) -> None:
        super().__init__(1)

    def radius(self) -> float:
        return 0.7

    def targets(self, pl_module: LightningModule) -> list[torch.nn.Parameter]:
        return [weight for name, weight in pl_module.named_parameters() if "first" in name]

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        weights = [(weight, weight.grad) for weight in self._targets if weight.grad is not None]
        norm = torch.stack([gradient.norm() for _, gradient in weights]).norm()
        kept = [weight.data.clone() for weight, _ in weights]
        for weight, gradient in weights:
            weight.data.add_(0.7 * gradient / norm)
        pl_module.training_step(*self._arguments).backward()  # no division by the accumulation, no scaling
        for (weight, _), value in zip(weights, kept, strict=True):
            weight.data = value


class ForgetfulEMA(EMA):
    """Averages per batch, keeps nothing in the checkpoint, and swaps without a way back."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._loaded = None

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self._move_average(1 - min(self.decay, (2 + self._updates) / (11 + self._updates)))

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...

    def on_save_checkpoint(self, *_: Any) -> None: ...

    def on_exception(self, *_: Any) -> None: ...


PLANTED = {
    "CarelessFGM": (Row(CarelessFGM, ROWS["FGM"].trick), ["precision"]),
    "ForgetfulEMA": (
        Row(lambda: ForgetfulEMA(0.9), ROWS["EMA"].trick),
        ["precision", "resume", "stages", "exception", "weights_only", "reuse"],
    ),
}


@pytest.mark.parametrize(("name", "condition"), [(name, condition) for name, (_, found) in PLANTED.items() for condition in found])
def test_planted_bugs_are_found(name: str, condition: str, tmp_path: Path) -> None:
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        CHECKS[condition](PLANTED[name][0], tmp_path)


# Two processes


def run_rank(folder: Path) -> None:
    """One of two processes: every callback under every combination for two, one after the other."""
    import os

    rank = int(os.environ["RANK"])
    rows = {**ROWS, "CarelessFGM": PLANTED["CarelessFGM"][0], "Flooding, sync": Row(lambda: Flooding(LEVEL, sync=True))}
    results: dict[str, list[dict[str, Tensor]]] = {}
    for name, row in rows.items():
        results[name] = [
            fit(folder / name / f"{precision}{accumulate}", row.make(), precision, accumulate, 2, rank)
            for precision, accumulate, world in COMBINATIONS
            if world == 2
        ]
    torch.save(results, folder / f"rank_{rank}.pt")


@pytest.fixture(scope="module")
def both_ranks(tmp_path_factory: pytest.TempPathFactory, two_processes: Callable[..., None]) -> list[dict[str, list[dict[str, Tensor]]]]:
    folder = tmp_path_factory.mktemp("ranks")
    two_processes(Path(__file__), folder)
    return [torch.load(folder / f"rank_{rank}.pt", weights_only=True) for rank in range(2)]


def check_processes(name: str, row: Row, both_ranks: list[dict[str, list[dict[str, Tensor]]]]) -> None:
    combinations_of_two = [combination for combination in COMBINATIONS if combination[2] == 2]
    for combination, first, second in zip(combinations_of_two, both_ranks[0][name], both_ranks[1][name], strict=True):
        assert differences(first, second) == [], f"the processes drifted apart under {combination}"
        compare(row, first, *combination)


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_two_processes_equal_one(name: str, both_ranks: list[dict[str, list[dict[str, Tensor]]]]) -> None:
    check_processes(name, ROWS[name], both_ranks)


@pytest.mark.slow
def test_planted_bug_is_found_by_two_processes(both_ranks: list[dict[str, list[dict[str, Tensor]]]]) -> None:
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check_processes("CarelessFGM", PLANTED["CarelessFGM"][0], both_ranks)


@pytest.mark.slow
def test_flooding_in_step_equals_the_whole_batch(both_ranks: list[dict[str, list[dict[str, Tensor]]]]) -> None:
    """With `sync` the mean loss of the processes is compared with the level: that of one process with both batches."""
    whole = [tuple(torch.cat(parts) for parts in zip(*pairs, strict=True)) for pairs in zip(batches(0), batches(1), strict=True)]
    combinations_of_two = [combination for combination in COMBINATIONS if combination[2] == 2]
    for (precision, accumulate, _), found in zip(combinations_of_two, both_ranks[0]["Flooding, sync"], strict=True):
        settings = PRECISIONS[precision]
        if settings.autocast is None:  # a half-precision mean over the batch rounds elsewhere than one over its halves
            assert_close(found, by_hand(FloodingTrick(), [whole], accumulate, settings.dtype, None), settings.tolerance)  # type: ignore[list-item]


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        run_rank(Path(sys.argv[1]))
