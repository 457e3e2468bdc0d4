"""Time litzoo against a reference that does the same work, and say how many times faster it is.

python scripts/benchmark.py NAME [--rounds N] [--threads 1] [--json FILE]

The cases of a benchmark run interleaved in one process, in an order that rotates each round, after one round that does not
count. A ratio is the median over the rounds of (time of the other case) / (time of litzoo in the same round). With one thread
the clock is the CPU time of the process, which a busy neighbour cannot inflate by pre-emption; with several it is wall time.
Peak memory is that of a fresh process which makes and runs one case, above what it held before.

Everything is measured under two settings of glibc's malloc. By default freed blocks of many MB go back to the kernel, and their
pages are zeroed anew each step; "keep" reuses them. References often gain more from that, so quote the ratio under "keep".
"""

import argparse
import contextlib
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

KEEP = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "8589934592", "MALLOC_TOP_PAD_": "67108864"}
ALLOCATORS: dict[str, dict[str, str]] = {"default": {}, "keep": KEEP}

Run = Callable[[], object]
Make = Callable[[Path], Run]
Worker = Callable[[str, Sequence[str], int, int, str], dict[str, Any]]


@dataclass(frozen=True)
class Benchmark:
    """What to compare.

    Attributes:
        summary: one line for `--help` and the table.
        cases: name -> function that takes an empty folder and prepares the case; what it returns is timed. Litzoo comes first.
        items: what one call works through, such as clouds, for the rate in the table.
        unit: name of an item.
        rounds: rounds, unless given on the command line.
        calls: calls in one measurement; enough to make it at least some ten milliseconds.
        allocators: settings to measure under.
        apart: measure each case in processes of its own, taken in turns, because a case changes its process for good.
    """

    summary: str
    cases: dict[str, Make]
    items: int
    unit: str
    rounds: int
    calls: int = 1
    allocators: tuple[str, ...] = ("default", "keep")
    apart: bool = False


# The arithmetic


def rotated(names: Sequence[str], turn: int) -> list[str]:
    """The names from the one at position `turn` (modulo their number) on, then those before it."""
    start = turn % len(names)
    return [*names[start:], *names[:start]]


def interleave(runs: dict[str, Run], rounds: int, calls: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Time the runs in rotating order.

    Args:
        runs: name -> what to time.
        rounds: rounds that count; one more comes first and does not.
        calls: calls in one measurement.
        clock: seconds.

    Returns:
        Name -> seconds of one call, one number a round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(-1, rounds):
        for name in rotated(list(runs), turn):
            start = clock()
            for _ in range(calls):
                runs[name]()
            if turn >= 0:
                seconds[name].append((clock() - start) / calls)
    return seconds


def ratios(seconds: dict[str, list[float]]) -> dict[str, float]:
    """How many times longer each case takes than the first one: the median of the ratios of the rounds."""
    ours, *others = seconds
    return {
        name: statistics.median(theirs / own if own > 0 else math.nan for theirs, own in zip(seconds[name], seconds[ours], strict=True))
        for name in others
    }


# Memory of this process


def resident(field: str) -> int:
    """A field of /proc/self/status in bytes, VmRSS (now) or VmHWM (peak); elsewhere the peak since the start, which cannot be reset."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def reset_peak() -> None:
    """Make VmHWM start anew, where the kernel lets us; where it does not, the peak of the start remains its lower bound."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory(make: Make, folder: Path) -> int:
    """Bytes by which preparing a case and running it twice raises the memory of this process at its peak."""
    reset_peak()
    before = resident("VmRSS")
    run = make(folder)
    run()
    run()
    return max(resident("VmHWM") - before, 0)


# Processes


def work(benchmark: Benchmark, names: Sequence[str], rounds: int, threads: int) -> dict[str, Any]:
    """Measure cases in this process: their times, or with `rounds` 0 the peak memory of the only one."""
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", message=".*self.log.*")  # there is no trainer
    with tempfile.TemporaryDirectory() as temporary:
        folders = {name: Path(temporary) / str(position) for position, name in enumerate(names)}
        for folder in folders.values():
            folder.mkdir()
        if rounds == 0:
            (name,) = names
            return {"peak": peak_memory(benchmark.cases[name], folders[name])}
        runs = {name: benchmark.cases[name](folders[name]) for name in names}
        return {"seconds": interleave(runs, rounds, benchmark.calls, time.process_time if threads == 1 else time.perf_counter)}


def start_worker(benchmark: str, names: Sequence[str], rounds: int, threads: int, allocator: str) -> dict[str, Any]:
    """`work` in a fresh process with that allocator setting: malloc reads it only when a process starts."""
    environment = {name: value for name, value in os.environ.items() if name not in KEEP and name != "GLIBC_TUNABLES"}
    environment |= ALLOCATORS[allocator] | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    task = json.dumps({"names": list(names), "rounds": rounds, "threads": threads})
    command = [sys.executable, str(Path(__file__).resolve()), benchmark, "--worker", task]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{benchmark} ({', '.join(names)}) ended with status {done.returncode}:\n{done.stderr.strip()}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])  # what a library prints comes before
    return result


def measure(name: str, benchmark: Benchmark, rounds: int, threads: int, worker: Worker | None = None) -> dict[str, Any]:
    """Run a benchmark under all its allocator settings.

    Args:
        name: of the benchmark.
        benchmark: what it compares.
        rounds: rounds that count.
        threads: threads of torch.
        worker: measures cases; (benchmark, names, rounds, threads, allocator) -> what `work` returns;
            None starts a process.

    Returns:
        What `--json` writes: `settings[allocator]` holds `cases[name]` with `seconds` (one a round), `median` and `peak_mib`, and
        `ratios[name]` of every case but the first.
    """
    worker = worker or start_worker
    settings: dict[str, Any] = {}
    for allocator in benchmark.allocators:
        seconds: dict[str, list[float]] = {case: [] for case in benchmark.cases}
        if benchmark.apart:
            for turn in range(rounds):
                for case in rotated(list(benchmark.cases), turn):
                    seconds[case] += worker(name, [case], 1, threads, allocator)["seconds"][case]
        else:
            seconds = worker(name, list(benchmark.cases), rounds, threads, allocator)["seconds"]
        peaks = {case: worker(name, [case], 0, threads, allocator)["peak"] / 2**20 for case in benchmark.cases}
        settings[allocator] = {
            "cases": {
                case: {"median": statistics.median(times), "seconds": times, "peak_mib": peaks[case]} for case, times in seconds.items()
            },
            "ratios": ratios(seconds),
        }
    return {
        "benchmark": name,
        "summary": benchmark.summary,
        "unit": benchmark.unit,
        "items": benchmark.items,
        "rounds": rounds,
        "threads": threads,
        "clock": "process CPU seconds" if threads == 1 else "wall seconds",
        "machine": machine(),
        "settings": settings,
    }


def machine() -> dict[str, Any]:
    """What a reader needs to judge the numbers, the load by others included."""
    from importlib.metadata import version

    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").is_file() else []
    return {
        "cpu": next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine()),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "numpy", "litzoo")},
    }


def table(result: dict[str, Any]) -> str:
    """The lines that a person reads."""
    about = result["machine"]
    how = f"{result['clock']}, {result['threads']} thread{'s' if result['threads'] > 1 else ''}, {result['rounds']} rounds"
    lines = [
        f"{result['benchmark']}: {result['summary']}",
        f"{how}; {about['cpu']}, {about['cores']} cores, load {about['load']}, torch {about['torch']}",
        f"{'allocator':<10} {'case':<28} {'ms':>10} {result['unit'] + '/s':>12} {'peak MiB':>9} {'ratio':>7}",
    ]
    for allocator, found in result["settings"].items():
        for case, values in found["cases"].items():
            ratio = f"{found['ratios'][case]:.2f}" if case in found["ratios"] else "1"
            rate = f"{result['items'] / values['median']:,.0f}" if values["median"] > 0 else "-"
            lines.append(f"{allocator:<10} {case:<28} {1000 * values['median']:>10.2f} {rate:>12} {values['peak_mib']:>9.0f} {ratio:>7}")
    return "\n".join(lines)


# points: augmentation of a batch


def points_litzoo(folder: Path, clouds: int = 32, stored: int = 2048, kept: int = 1024) -> Run:
    """Subset, rotation about y, scale, shift and jitter of a whole batch."""
    import torch

    from litzoo.datamodules import PointAugmentation

    batch, key = torch.rand(clouds, stored, 3), torch.arange(clouds)
    augmentation = PointAugmentation(rotation="yaw", scale=(0.8, 1.25), shift=0.1, jitter=0.01, jitter_clip=0.05)
    return lambda: augmentation(batch, key, kept)[0]


def points_numpy(folder: Path, clouds: int = 32, stored: int = 2048, kept: int = 1024) -> Run:
    """The same operations as a data set's `__getitem__` and the default collation do them."""
    import numpy as np
    import torch

    rng = np.random.default_rng(0)
    data = rng.random((clouds, stored, 3), dtype=np.float32)

    def augment(cloud: Any) -> Any:
        cloud = cloud[rng.choice(len(cloud), kept, replace=False)]
        angle = rng.uniform(0, 2 * np.pi)
        cos, sin = np.cos(angle), np.sin(angle)
        cloud = cloud @ np.array([[cos, 0, sin], [0, 1, 0], [-sin, 0, cos]], dtype=np.float32).T
        cloud = cloud * rng.uniform(0.8, 1.25, 3) + rng.uniform(-0.1, 0.1, 3)
        return (cloud + np.clip(0.01 * rng.standard_normal(cloud.shape), -0.05, 0.05)).astype(np.float32)

    return lambda: torch.stack([torch.from_numpy(augment(cloud)) for cloud in data])


# loading: one epoch from disk


def _stored_clouds(clouds: int, points: int) -> tuple[Any, Any, Any]:
    import numpy as np

    rng = np.random.default_rng(0)
    return (
        rng.uniform(-1, 1, (clouds, points, 3)).astype(np.float32),
        np.arange(clouds) % 4,
        rng.integers(0, 6, (clouds, points)).astype(np.uint8),
    )


def loading_litzoo(folder: Path, clouds: int = 512, points: int = 2500, batch_size: int = 32) -> Run:
    """Open the HDF5 file, read it and go through one epoch of batches, every time."""
    import h5py

    from litzoo.datamodules import HDF5PointsDataModule

    path = folder / "clouds.h5"
    with h5py.File(path, "w") as file:
        for name, values in zip(("points", "label", "part"), _stored_clouds(clouds, points), strict=True):
            file[name] = values

    def epoch() -> int:
        data = HDF5PointsDataModule(path, val_fraction=0, test_fraction=0, batch_size=batch_size, seed=0)
        return sum(len(batch.label) for batch in data.train_dataloader())

    return epoch


def loading_text(folder: Path, clouds: int = 512, points: int = 2500, batch_size: int = 32) -> Run:
    """One epoch over one text file a cloud (x y z part), read by `np.loadtxt` in a data set's `__getitem__`."""
    import numpy as np
    from torch.utils.data import DataLoader, Dataset

    coordinates, label, part = _stored_clouds(clouds, points)
    paths = [folder / f"{index}.txt" for index in range(clouds)]
    for index, path in enumerate(paths):
        np.savetxt(path, np.column_stack([coordinates[index], part[index]]), fmt="%.6f")

    class TextClouds(Dataset[Any]):
        def __len__(self) -> int:
            return len(paths)

        def __getitem__(self, index: int) -> Any:
            rows = np.loadtxt(paths[index]).astype(np.float32)
            return rows[:, :3], int(label[index]), rows[:, 3].astype(np.int64)

    return lambda: sum(len(batch[1]) for batch in DataLoader(TextClouds(), batch_size, shuffle=True, drop_last=True))


# pointnet, allocator: a training step


def _training_step(model: Any, loss: Callable[[Any, Any], Any], clouds: int, points: int, classes: int) -> Run:
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    batch, label = torch.rand(clouds, points, 3), torch.arange(clouds) % classes

    def step() -> None:
        optimizer.zero_grad()
        loss(batch, label).backward()
        optimizer.step()

    return step


def pointnet_litzoo(folder: Path, clouds: int = 32, points: int = 1024, classes: int = 16) -> Run:
    """Forward, backward and AdamW step of `PointNetClassifier`, its training metrics included."""
    from litzoo.zoo import PointNetClassifier

    model = PointNetClassifier(classes)
    return _training_step(model, lambda batch, label: model.training_step((batch, label), 0), clouds, points, classes)


def pointnet_textbook(folder: Path, clouds: int = 32, points: int = 1024, classes: int = 16) -> Run:
    """The same step of the same network, written as tutorials write it."""
    model = textbook_pointnet(classes)
    return _training_step(model, model.loss, clouds, points, classes)


def textbook_pointnet(classes: int, dropout: float = 0.3) -> Any:
    """PointNet with both transforms: convolutions with a bias before BatchNorm, a maximum that also returns its indices.

    Args:
        classes: number of classes.
        dropout: before the last layer.

    Returns:
        A module of points `(B, N, 3)` -> logits and feature transform, with `loss(points, label)`.
    """
    import torch
    import torch.nn.functional as F
    from torch import Tensor, nn

    class Transform(nn.Module):
        def __init__(self, size: int) -> None:
            super().__init__()
            self.size = size
            self.conv1, self.conv2, self.conv3 = nn.Conv1d(size, 64, 1), nn.Conv1d(64, 128, 1), nn.Conv1d(128, 1024, 1)
            self.fc1, self.fc2, self.fc3 = nn.Linear(1024, 512), nn.Linear(512, 256), nn.Linear(256, size * size)
            self.bn1, self.bn2, self.bn3 = nn.BatchNorm1d(64), nn.BatchNorm1d(128), nn.BatchNorm1d(1024)
            self.bn4, self.bn5 = nn.BatchNorm1d(512), nn.BatchNorm1d(256)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.bn1(self.conv1(x)))
            x = F.relu(self.bn2(self.conv2(x)))
            x = F.relu(self.bn3(self.conv3(x)))
            x = torch.max(x, 2, keepdim=True)[0].view(-1, 1024)
            x = F.relu(self.bn4(self.fc1(x)))
            x = F.relu(self.bn5(self.fc2(x)))
            identity = torch.eye(self.size, dtype=x.dtype).flatten().repeat(len(x), 1)
            return (self.fc3(x) + identity).view(-1, self.size, self.size)

    class TextbookPointNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.transform = Transform(3)
            self.conv1, self.conv2 = nn.Conv1d(3, 64, 1), nn.Conv1d(64, 64, 1)
            self.feature_transform = Transform(64)
            self.conv3, self.conv4, self.conv5 = nn.Conv1d(64, 64, 1), nn.Conv1d(64, 128, 1), nn.Conv1d(128, 1024, 1)
            self.fc1, self.fc2, self.fc3 = nn.Linear(1024, 512), nn.Linear(512, 256), nn.Linear(256, classes)
            self.bn1, self.bn2, self.bn3, self.bn4 = nn.BatchNorm1d(64), nn.BatchNorm1d(64), nn.BatchNorm1d(64), nn.BatchNorm1d(128)
            self.bn5, self.bn6, self.bn7 = nn.BatchNorm1d(1024), nn.BatchNorm1d(512), nn.BatchNorm1d(256)
            self.dropout = nn.Dropout(dropout)

        def forward(self, points: Tensor) -> tuple[Tensor, Tensor]:
            x = points.transpose(2, 1)
            x = torch.bmm(x.transpose(2, 1), self.transform(x)).transpose(2, 1)
            x = F.relu(self.bn1(self.conv1(x)))
            x = F.relu(self.bn2(self.conv2(x)))
            matrix = self.feature_transform(x)
            x = torch.bmm(x.transpose(2, 1), matrix).transpose(2, 1)
            x = F.relu(self.bn3(self.conv3(x)))
            x = F.relu(self.bn4(self.conv4(x)))
            x = F.relu(self.bn5(self.conv5(x)))
            x = torch.max(x, 2, keepdim=True)[0].view(-1, 1024)
            x = F.relu(self.bn6(self.fc1(x)))
            x = F.relu(self.bn7(self.fc2(x)))
            return self.fc3(self.dropout(x)), matrix

        def loss(self, points: Tensor, label: Tensor) -> Tensor:
            logits, matrix = self(points)
            difference = torch.bmm(matrix, matrix.transpose(2, 1)) - torch.eye(matrix.shape[-1], dtype=matrix.dtype)
            return F.cross_entropy(logits, label) + 0.001 * torch.mean(torch.sum(difference**2, dim=(1, 2)))

    return TextbookPointNet()


def allocator_kept(folder: Path) -> Run:
    """The step after `keep_freed_memory`, as `litzoo fit` runs it; it changes the process for good."""
    from litzoo.zoo.cli.training import keep_freed_memory

    keep_freed_memory()
    return pointnet_litzoo(folder)


# callbacks, ema: what a trick adds to a training step


def resnet18_steps(callback: str, folder: Path, steps: int = 4, batch_size: int = 16, side: int = 32, **settings: Any) -> Run:
    """A fit of a few steps of ResNet-18 (torchvision's, with the 3 x 3 stem for small pictures) with one callback, or none."""
    import logging

    import torch
    import torch.nn.functional as F
    from lightning.pytorch import LightningModule, Trainer
    from torch import nn
    from torch.utils.data import DataLoader

    import litzoo.callbacks

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    batches = DataLoader([(torch.randn(batch_size, 3, side, side), torch.arange(batch_size) % 10)] * steps, batch_size=None)

    class Classifier(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = small_resnet18()

        def forward(self, x: Any) -> Any:
            return self.net(x)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return F.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=1e-3, momentum=0.9)

    model: nn.Module = Classifier()
    peers: Any = {"EMAWeightAveraging": lightning_ema}

    def fit() -> None:
        made = [peers.get(callback) or getattr(litzoo.callbacks, callback)] if callback else []
        quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        trainer = Trainer(callbacks=[make(**settings) for make in made], accelerator="cpu", max_epochs=1, default_root_dir=folder, **quiet)
        trainer.fit(model, batches)

    return fit


def small_resnet18() -> Any:
    """torchvision's ResNet-18 with a 3 x 3 stem and no pooling after it, 11.2 million weights."""
    from torch import nn
    from torchvision.models import resnet18

    net = resnet18(num_classes=10)
    net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    return net


def lightning_ema(**settings: Any) -> Any:
    """Lightning's own callback for the same purpose."""
    from lightning.pytorch.callbacks import EMAWeightAveraging

    return EMAWeightAveraging(**settings)


def ema_update(make: Callable[..., Any], folder: Path) -> Run:
    """One update of the average of ResNet-18, by the hook that Lightning calls after a step."""
    from types import SimpleNamespace

    from lightning.pytorch import LightningModule

    model, callback = LightningModule(), make()
    model.net = small_resnet18()
    trainer: Any = SimpleNamespace(global_step=0, current_epoch=0, strategy=None, checkpoint_callbacks=[], callbacks=[], world_size=1)
    trainer.strategy = SimpleNamespace(root_device=model.device)
    for hook in (callback.setup, callback.on_fit_start):
        hook(trainer, model, *(["fit"] if hook.__name__ == "setup" else []))

    def update() -> None:
        trainer.global_step += 1
        callback.on_train_batch_end(trainer, model, None, None, trainer.global_step - 1)

    return update


def ema_litzoo(folder: Path) -> Run:
    from litzoo.callbacks import EMA

    return ema_update(partial(EMA, decay=0.999, warmup=False), folder)


def ema_lightning(folder: Path) -> Run:
    return ema_update(partial(lightning_ema, decay=0.999), folder)


def ema_timm(folder: Path) -> Run:
    """timm's `ModelEmaV3`, which is no callback."""
    from timm.utils import ModelEmaV3

    net = small_resnet18()
    average = ModelEmaV3(net, decay=0.999, foreach=True)
    return lambda: average.update(net)


STEP_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "bare step": ("", {}),
    "EMA": ("EMA", {}),
    "EMAWeightAveraging (Lightning)": ("EMAWeightAveraging", {}),
    "SWA, averages 1 epoch of 4 steps": ("SWA", {"start": 0}),
    "Flooding": ("Flooding", {"level": 0.1}),
    "FGM, first convolution": ("FGM", {"epsilon": 0.5, "target": "net.conv1"}),
    "SAM": ("SAM", {}),
    "SAM, every 4th step": ("SAM", {"every_n_steps": 4}),
    "DiscriminativeLR": ("DiscriminativeLR", {}),
    "GradualUnfreeze, last layer": ("GradualUnfreeze", {}),
    "StepSeed": ("StepSeed", {}),
}

BENCHMARKS = {
    "callbacks": Benchmark(
        summary="a training of 4 steps of ResNet-18 on 16 pictures of 32 x 32, forward, backward and SGD, alone and with a callback",
        cases={name: partial(resnet18_steps, callback, **settings) for name, (callback, settings) in STEP_CASES.items()},
        items=4,
        unit="steps",
        rounds=5,
        allocators=("keep",),
    ),
    "ema": Benchmark(
        summary="one update of an exponential moving average of ResNet-18, 11.2 million weights",
        cases={"litzoo": ema_litzoo, "Lightning, EMAWeightAveraging": ema_lightning, "timm, ModelEmaV3": ema_timm},
        items=1,
        unit="updates",
        rounds=15,
        calls=5,
    ),
    "points": Benchmark(
        summary="augmentation of 32 clouds, 2,048 points to 1,024: subset, yaw rotation, scale, shift, jitter",
        cases={"litzoo, whole batch": points_litzoo, "numpy, per sample": points_numpy},
        items=32,
        unit="clouds",
        rounds=15,
        calls=10,
    ),
    "loading": Benchmark(
        summary="one epoch of 512 clouds of 2,500 points with part labels, opened anew, page cache warm",
        cases={"litzoo, HDF5": loading_litzoo, "np.loadtxt, a file a cloud": loading_text},
        items=512,
        unit="clouds",
        rounds=5,
    ),
    "pointnet": Benchmark(
        summary="PointNet training step, 32 clouds of 1,024 points: forward, backward, AdamW",
        cases={"litzoo": pointnet_litzoo, "textbook": pointnet_textbook},
        items=32,
        unit="clouds",
        rounds=5,
    ),
    "allocator": Benchmark(
        summary="litzoo's PointNet training step after keep_freed_memory() and without it",
        cases={"keep_freed_memory()": allocator_kept, "glibc's default": pointnet_litzoo},
        items=32,
        unit="clouds",
        rounds=5,
        allocators=("default",),
        apart=True,
    ),
}


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark that the command line names, and return the exit status."""
    names = "\n".join(f"  {name:<10} {benchmark.summary}" for name, benchmark in BENCHMARKS.items())
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\nBenchmarks:\n{names}", formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("name", metavar="NAME", help=f"one of: {', '.join(BENCHMARKS)}")
    parser.add_argument("--rounds", type=int, metavar="N", help="rounds that count; the benchmark's own number by default")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="threads of torch (default: 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything that was measured to this file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.name not in BENCHMARKS:
        print(f"benchmark: there is no {arguments.name!r}; there are: {', '.join(BENCHMARKS)}", file=sys.stderr)
        return 2
    benchmark = BENCHMARKS[arguments.name]
    if arguments.worker is not None:
        print(json.dumps(work(benchmark, **json.loads(arguments.worker))))
        return 0
    rounds = benchmark.rounds if arguments.rounds is None else arguments.rounds
    if rounds < 1 or arguments.threads < 1:
        print(f"benchmark: --rounds and --threads must be at least 1, got {rounds} and {arguments.threads}", file=sys.stderr)
        return 2
    if arguments.json is not None and not arguments.json.parent.is_dir():
        print(f"benchmark: there is no folder {arguments.json.parent} to write {arguments.json.name} to: make it first", file=sys.stderr)
        return 2
    try:
        result = measure(arguments.name, benchmark, rounds, arguments.threads)
    except RuntimeError as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 1
    print(table(result))
    if arguments.json is not None:
        temporary = arguments.json.with_name(f".{arguments.json.name}.tmp")
        temporary.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        temporary.replace(arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
