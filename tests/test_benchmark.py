"""scripts/benchmark.py compares like with like and computes what it says. No test looks at how long anything takes."""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from litzoo.zoo import PointNetClassifier

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "benchmark.py"


@pytest.fixture(scope="module")
def script(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("benchmark")


def _benchmark(script: ModuleType, **settings: Any) -> Any:
    cases = {"ours": lambda folder: lambda: None, "theirs": lambda folder: lambda: None, "more": lambda folder: lambda: None}
    return script.Benchmark(summary="nothing", cases=cases, items=10, unit="things", rounds=2, **settings)


def test_ratio_is_the_median_of_the_ratios_of_the_rounds(script: ModuleType) -> None:
    # The ratio of the medians would be 9 / 2 = 4.5.
    assert script.ratios({"ours": [1.0, 2.0, 10.0], "theirs": [8.0, 9.0, 20.0], "more": [1.0, 2.0, 5.0]}) == {"theirs": 4.5, "more": 1.0}
    assert script.ratios({"ours": [1.0, 2.0, 4.0], "theirs": [9.0, 4.0, 12.0]}) == {"theirs": 3.0}


def test_rounds_are_interleaved_in_rotating_order(script: ModuleType) -> None:
    seen: list[str] = []
    ticks = iter(range(1000))
    runs = {name: (lambda name=name: seen.append(name)) for name in "abc"}
    seconds = script.interleave(runs, rounds=3, calls=1, clock=lambda: float(next(ticks)))
    assert "".join(seen) == "cab" + "abc" + "bca" + "cab"  # the first three are the round that does not count
    assert seconds == {name: [1.0, 1.0, 1.0] for name in "abc"}


def test_a_cold_measurement_counts_the_first_call(script: ModuleType) -> None:
    seen: list[str] = []
    ticks = iter(range(1000))
    runs = {name: (lambda name=name: seen.append(name)) for name in "ab"}
    seconds = script.interleave(runs, rounds=1, calls=1, clock=lambda: float(next(ticks)), cold=True)
    assert (seen, seconds) == (["a", "b"], {"a": [1.0], "b": [1.0]})


def test_a_measurement_of_several_calls_is_divided_by_their_number(script: ModuleType) -> None:
    now = 0.0

    def run() -> None:
        nonlocal now
        now += 2.0

    assert script.interleave({"a": run}, rounds=2, calls=5, clock=lambda: now) == {"a": [2.0, 2.0]}


@pytest.mark.parametrize("apart", [False, True])
def test_result_holds_every_case_under_every_allocator(script: ModuleType, apart: bool) -> None:
    asked: list[tuple[tuple[str, ...], int, str]] = []

    def worker(name: str, names: Sequence[str], rounds: int, threads: int, allocator: str) -> dict[str, Any]:
        asked.append((tuple(names), rounds, allocator))
        if rounds == 0:
            return {"peak": 3 * 2**20}
        return {"seconds": {case: [{"ours": 0.5, "theirs": 1.0, "more": 2.0}[case]] * rounds for case in names}}

    result = json.loads(json.dumps(script.measure("x", _benchmark(script, apart=apart), 2, 1, worker)))
    assert set(result) == {"benchmark", "summary", "unit", "items", "rounds", "threads", "clock", "machine", "settings"}
    assert (result["benchmark"], result["clock"], result["rounds"], result["threads"]) == ("x", "process CPU seconds", 2, 1)
    assert list(result["settings"]) == ["default", "keep"]
    for found in result["settings"].values():
        assert found["cases"]["ours"] == {"median": 0.5, "seconds": [0.5, 0.5], "peak_mib": 3.0}
        assert found["ratios"] == {"theirs": 2.0, "more": 4.0}
    timed = [names for names, rounds, allocator in asked if rounds and allocator == "keep"]
    if apart:
        assert timed == [("ours",), ("theirs",), ("more",), ("theirs",), ("more",), ("ours",)]
    else:
        assert timed == [("ours", "theirs", "more")]
    lines = script.table(result).splitlines()
    assert len(lines) == 3 + 2 * 3
    assert lines[4].split() == ["default", "theirs", "1000.00", "10", "3", "2.00"]


def test_a_case_without_its_package_is_left_out(
    script: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    packages = {"ours": "torch", "theirs": "no_such_package", "more": "nor_this"}
    monkeypatch.setitem(script.BENCHMARKS, "tiny", _benchmark(script, packages=packages))
    asked: list[str] = []

    def worker(name: str, names: Sequence[str], rounds: int, threads: int, allocator: str) -> dict[str, Any]:
        asked.extend(names)
        return {"peak": 1} if rounds == 0 else {"seconds": {case: [1.0] for case in names}}

    monkeypatch.setattr(script, "start_worker", worker)
    assert script.main(["tiny", "--rounds", "1"]) == 0
    assert set(asked) == {"ours"}
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "left out, not installed: theirs; more (pip install no_such_package nor_this)"
    assert lines[1] == "tiny: nothing"


def test_the_script_runs_from_any_folder(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), "--help"], check=False, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in ("callbacks", "pointnet", "augment-stl10"))


def test_the_script_measures_and_writes_json(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(script.BENCHMARKS, "tiny", _benchmark(script))

    def worker(name: str, names: Sequence[str], rounds: int, threads: int, allocator: str) -> dict[str, Any]:
        result: dict[str, Any] = script.work(script.BENCHMARKS[name], names, rounds, torch.get_num_threads())
        return result

    monkeypatch.setattr(script, "start_worker", worker)
    assert script.main(["tiny", "--rounds", "1", "--json", str(tmp_path / "out.json")]) == 0
    assert capsys.readouterr().out.startswith("tiny: nothing\n")
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]
    result = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert [len(values["seconds"]) for values in result["settings"]["keep"]["cases"].values()] == [1, 1, 1]


def test_a_worker_is_a_fresh_process_with_the_allocator_setting(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[list[str], dict[str, str]]] = []

    def run(command: list[str], env: dict[str, str], **_: Any) -> Any:
        seen.append((command, env))
        return script.subprocess.CompletedProcess(command, 0, 'chatter\n{"peak": 1}\n', "")

    monkeypatch.setattr(script.subprocess, "run", run)
    monkeypatch.setenv("MALLOC_TOP_PAD_", "1")
    assert script.start_worker("points", ["a"], 0, 2, "default") == {"peak": 1}
    assert script.start_worker("points", ["a"], 0, 2, "keep") == {"peak": 1}
    assert seen[0][0][1:4] == [str(SCRIPT), "points", "--worker"]
    assert json.loads(seen[0][0][4]) == {"names": ["a"], "rounds": 0, "threads": 2}
    assert not set(script.KEEP) & set(seen[0][1])
    assert script.KEEP.items() <= seen[1][1].items()
    assert seen[1][1]["OMP_NUM_THREADS"] == "2"


def test_instances_reach_the_cases_and_the_workers(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def make(folder: Path, instances: int = 5) -> Any:
        sizes.append(instances)
        return lambda: None

    sized = replace(_benchmark(script, instances=5), cases={"ours": make})
    monkeypatch.setitem(script.BENCHMARKS, "tiny", sized)

    def worker(name: str, names: Sequence[str], rounds: int, threads: int, allocator: str, options: Sequence[str] = ()) -> dict[str, Any]:
        assert list(options) == ["--instances", "7"]
        assert script.main([name, *options, "--worker", json.dumps({"names": names, "rounds": rounds, "threads": 1})]) == 0
        return {"peak": 1} if rounds == 0 else {"seconds": {case: [1.0] for case in names}}

    monkeypatch.setattr(script, "start_worker", worker)
    assert script.main(["tiny", "--rounds", "1", "--instances", "7"]) == 0
    assert set(sizes) == {7}


def test_peak_memory_sees_what_a_case_holds(script: ModuleType, tmp_path: Path) -> None:
    held: list[bytearray] = []

    def make(folder: Path) -> Any:
        held.append(bytearray(b"x") * (64 << 20))
        return lambda: None

    assert script.peak_memory(make, tmp_path) >= 48 << 20
    assert script.peak_memory(make, tmp_path, prepared=True) < 48 << 20


@pytest.mark.parametrize(
    "arguments",
    [
        ["pointnets"],
        ["points", "--rounds", "0"],
        ["points", "--instances", "5"],
        ["bank", "--instances", "0"],
        ["points", "--json", "no/such/folder/x.json"],
    ],
)
def test_a_mistake_gives_one_line(script: ModuleType, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(arguments) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    if arguments == ["pointnets"]:
        assert all(name in said for name in script.BENCHMARKS)


def test_both_augmentations_do_the_same_work(script: ModuleType, tmp_path: Path) -> None:
    for make in (script.points.points_litzoo, script.points.points_numpy):
        points = make(tmp_path, clouds=3, stored=40, kept=16)()
        assert points.shape == (3, 16, 3)
        assert points.dtype == torch.float32


def test_both_loaders_read_every_cloud(script: ModuleType, tmp_path: Path) -> None:
    for make in (script.points.loading_litzoo, script.points.loading_text):
        epoch = make(tmp_path, clouds=4, points=8, batch_size=2)
        assert epoch() == epoch() == 4


@pytest.mark.filterwarnings("ignore:.*self.log.*")
def test_both_training_steps_run(script: ModuleType, tmp_path: Path) -> None:
    for make in (script.points.pointnet_litzoo, script.points.pointnet_textbook):
        make(tmp_path, clouds=2, points=8, classes=2)()


def _by_use(textbook: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    """Weights in the order in which the forward pass uses them, not that of their definition."""
    order = ("transform.", "conv1", "conv2", "feature_transform.", "conv3", "conv4", "conv5", "fc1", "fc2", "fc3")
    named = [(name, parameter) for name, parameter in textbook.named_parameters() if parameter.dim() > 1]
    return [item for prefix in order for item in named if item[0].startswith(prefix)]


def test_textbook_network_is_the_same_network(script: ModuleType) -> None:
    torch.manual_seed(0)
    ours, textbook = PointNetClassifier(5, dropout=0.0).double(), script.points.textbook_pointnet(5, dropout=0.0).double()
    pairs = list(
        zip(
            [parameter for parameter in ours.parameters() if parameter.dim() > 1],
            [parameter for _, parameter in _by_use(textbook)],
            strict=True,
        )
    )
    with torch.no_grad():
        for own, other in pairs:
            own.normal_(std=0.05)
            other.copy_(own.view_as(other))
        for model in (ours, textbook):
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.zero_()
    points, label = torch.randn(4, 32, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 4])
    with pytest.warns(UserWarning, match="self.log"):
        own_loss = ours.training_step((points, label), 0)
    other_loss = textbook.loss(points, label)
    own_loss.backward()
    other_loss.backward()
    torch.testing.assert_close(own_loss, other_loss)
    for own, other in pairs:
        torch.testing.assert_close(own.grad, other.grad.view_as(own))


def test_every_average_moves_alike(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The three peers compute the same average of the same moving weights."""
    nets: list[torch.nn.Module] = []

    def small() -> torch.nn.Module:
        torch.manual_seed(0)
        nets.append(torch.nn.Linear(3, 2))
        return nets[-1]

    monkeypatch.setattr(script.callbacks, "small_resnet18", small)
    averages = []
    for make in (script.callbacks.ema_litzoo, script.callbacks.ema_lightning, script.callbacks.ema_timm):
        update = make(tmp_path)
        held = {type(cell.cell_contents).__name__: cell.cell_contents for cell in update.__closure__}
        update()  # Lightning's first update copies the weights
        for _ in range(4):
            with torch.no_grad():
                nets[-1].weight += 1.0
            update()
        if "EMA" in held:
            averages.append(held["EMA"]._average[0])
        elif "EMAWeightAveraging" in held:
            averages.append(held["EMAWeightAveraging"]._average_model.module.net.weight)
        else:
            averages.append(held["ModelEmaV3"].module.weight)
    torch.testing.assert_close(averages[0], averages[1])
    torch.testing.assert_close(averages[0], averages[2])


@pytest.mark.filterwarnings("ignore")
def test_every_callback_case_trains(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Tiny(torch.nn.Sequential):
        def __init__(self) -> None:
            super().__init__()
            self.conv1 = torch.nn.Conv2d(3, 4, 3)
            self.norm = torch.nn.BatchNorm2d(4)
            self.flatten = torch.nn.Flatten()
            self.fc = torch.nn.Linear(4 * 36, 10)

    monkeypatch.setattr(script.callbacks, "small_resnet18", Tiny)
    for make in script.BENCHMARKS["callbacks"].cases.values():
        make(tmp_path, steps=4, batch_size=2, side=8)()


PEERS = {"augment_lightly": "lightly", "augment_albumentations": "albumentations", "augment_kornia": "kornia"}
PEER_AUGMENTATIONS = ("augment_pil", "augment_v2", *PEERS)


def _all_views(pair: Any) -> torch.Tensor:
    return torch.cat([*pair])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["augment_litzoo", *PEER_AUGMENTATIONS])
def test_every_augmentation_gives_two_normalised_views(script: ModuleType, tmp_path: Path, name: str) -> None:
    if name in PEERS:
        pytest.importorskip(PEERS[name])
    stored = script.images.smooth_images(64, 32)
    low, high = ((value - torch.tensor(script.images.MEAN)) / torch.tensor(script.images.STD) for value in (0, 1))
    torch.manual_seed(0)
    run = getattr(script.images, name)(tmp_path, images=64)
    seen = []
    for _ in range(16):
        first, second = run()
        assert first.shape == second.shape == stored.shape
        assert first.dtype == second.dtype == torch.float32
        assert not torch.equal(first, second)
        seen += [first, second]
    views = torch.cat(seen)
    assert bool(views.isfinite().all())
    assert bool((views.amin(dim=(0, 2, 3)) >= low - 1e-3).all())
    assert bool((views.amax(dim=(0, 2, 3)) <= high + 1e-3).all())

    # And the same distribution as litzoo's views.
    ours = script.images.augment_litzoo(tmp_path, images=64)
    expected = torch.cat([_all_views(ours()) for _ in range(16)])
    torch.testing.assert_close(views.mean(dim=(0, 2, 3)), expected.mean(dim=(0, 2, 3)), rtol=0, atol=0.06)
    torch.testing.assert_close(views.std(dim=(0, 2, 3)), expected.std(dim=(0, 2, 3)), rtol=0.05, atol=0)
    across = [values.mean(dim=1).std(dim=(1, 2)).mean() for values in (views, expected)]  # contrast within a view
    torch.testing.assert_close(across[0], across[1], rtol=0.05, atol=0)


@pytest.mark.filterwarnings("ignore")
def test_augmentations_of_larger_images_agree(script: ModuleType, tmp_path: Path) -> None:
    benchmark, _ = script.available(script.BENCHMARKS["augment-stl10"])
    found = {}
    torch.manual_seed(0)
    for name, make in benchmark.cases.items():
        run = make(tmp_path, images=32)
        first, second = run()
        assert first.shape == second.shape == (32, 3, 64, 64)
        assert first.dtype == second.dtype == torch.float32
        found[name] = torch.cat([_all_views(run()) for _ in range(12)])
        assert bool(found[name].isfinite().all())
    ours, *others = found.values()
    for views in others:
        torch.testing.assert_close(views.mean(dim=(0, 2, 3)), ours.mean(dim=(0, 2, 3)), rtol=0, atol=0.12)
        torch.testing.assert_close(views.std(dim=(0, 2, 3)), ours.std(dim=(0, 2, 3)), rtol=0.08, atol=0)


@pytest.mark.slow
def test_compiled_augmentation_gives_the_same_views(script: ModuleType, tmp_path: Path) -> None:
    eager, compiled = (script.images.augment_litzoo(tmp_path, images=4, compiled=compiled)() for compiled in (False, True))
    torch.testing.assert_close(_all_views(compiled), _all_views(eager), rtol=0, atol=1e-3)


@pytest.mark.filterwarnings("ignore")
def test_every_image_training_step_trains(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[torch.nn.Module] = []
    classifier = script.images._classifier

    def small(backbone: str, *arguments: Any) -> Any:
        assert backbone in ("resnet18", "conv4")
        made.append((built := classifier("conv4", *arguments))[0])
        return built

    monkeypatch.setattr(script.images, "_classifier", small)
    for name in ("train-resnet18", "train-conv4", "precision"):
        for case, make in script.BENCHMARKS[name].cases.items():
            made.clear()
            settings = {} if name == "precision" or "bare" in case else {"images": 8}
            step = make(tmp_path, batch_size=4, side=8, **settings)
            (model,) = made
            before = model.head.weight.detach().clone()
            for _ in range(3):  # the third starts another epoch
                step()
            assert not torch.equal(model.head.weight, before), f"{name}, {case}"
            assert bool(model.head.weight.isfinite().all())


def test_precision_and_layout_are_what_the_case_says(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[torch.dtype, bool]] = []
    convolution = torch.nn.Conv2d.forward

    def forward(self: torch.nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
        out = convolution(self, x)
        seen.append((out.dtype, x.is_contiguous(memory_format=torch.channels_last)))
        return out

    monkeypatch.setattr(torch.nn.Conv2d, "forward", forward)
    for case, make in script.BENCHMARKS["precision"].cases.items():
        seen.clear()
        make(tmp_path, batch_size=2, side=8, backbone="conv4")()
        # The first of the four convolutions of the step: making the model tries an image of its own.
        assert seen[-4] == (torch.bfloat16 if "bf16" in case else torch.float32, "channels_last" in case)


def test_both_starts_give_a_batch(script: ModuleType, tmp_path: Path) -> None:
    for make in (script.images.startup_litzoo, script.images.startup_whole):
        classes, counts, batch = make(tmp_path, images=200, side=8, batch_size=4)()
        assert classes == len(counts) == 10
        assert min(counts) == max(counts) > 0
        assert batch.shape == (4, 3, 8, 8)
        assert batch.dtype == torch.float32


def test_all_cases_of_knn_predict_the_same_classes(script: ModuleType, tmp_path: Path) -> None:
    cases = script.available(script.BENCHMARKS["knn"])[0].cases
    predictions = {name: make(tmp_path, queries=20, rows=500, k=10)() for name, make in cases.items()}
    expected = predictions["litzoo, fp32"]
    assert expected.shape == (20,)
    assert len(expected.unique()) > 1
    assert {name for name, found in predictions.items() if not torch.equal(found, expected)} == set()
