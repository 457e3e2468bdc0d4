"""Time litzoo against a reference that does the same work, and say how many times faster it is.

python scripts/benchmark.py NAME [--rounds N] [--threads 1] [--json FILE]

The cases of a benchmark run interleaved in one process, in an order that rotates each round, after one round that does not
count. A ratio is the median over the rounds of (time of the other case) / (time of litzoo in the same round). With one thread
the clock is the CPU time of the process, which a busy neighbour cannot inflate by pre-emption; with several it is wall time.
Peak memory is that of a fresh process which makes and runs one case, above what it held before; where all cases hold the same large
thing, such as a memory bank, above what it held once the case was made.

Everything is measured under two settings of glibc's malloc. By default freed blocks of many MB go back to the kernel, and their
pages are zeroed anew each step; "keep" reuses them. References often gain more from that, so quote the ratio under "keep".

The benchmarks themselves are in `benchmark_cases`.
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
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmark_cases import Benchmark, Make, Run, callbacks, contrastive, images, instances, neighbours, points, relational

KEEP = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "8589934592", "MALLOC_TOP_PAD_": "67108864"}
ALLOCATORS: dict[str, dict[str, str]] = {"default": {}, "keep": KEEP}
BENCHMARKS: dict[str, Benchmark] = {
    **callbacks.BENCHMARKS,
    **points.BENCHMARKS,
    **images.BENCHMARKS,
    **instances.BENCHMARKS,
    **neighbours.BENCHMARKS,
    **contrastive.BENCHMARKS,
    **relational.BENCHMARKS,
}

Worker = Callable[[str, Sequence[str], int, int, str], dict[str, Any]]


# The arithmetic


def rotated(names: Sequence[str], turn: int) -> list[str]:
    """The names from the one at position `turn` (modulo their number) on, then those before it."""
    start = turn % len(names)
    return [*names[start:], *names[:start]]


def interleave(runs: dict[str, Run], rounds: int, calls: int, clock: Callable[[], float], cold: bool = False) -> dict[str, list[float]]:
    """Time the runs in rotating order.

    Args:
        runs: name -> what to time.
        rounds: rounds that count; one more comes first and does not, unless `cold`.
        calls: calls in one measurement.
        clock: seconds.
        cold: whether the first round counts.

    Returns:
        Name -> seconds of one call, one number a round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(0 if cold else -1, rounds):
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


def peak_memory(make: Make, folder: Path, prepared: bool = False) -> int:
    """Bytes by which preparing a case (unless that is not to count) and running it twice raises the memory of this process at its peak."""
    reset_peak()
    before = resident("VmRSS")
    run = make(folder)
    if prepared:
        reset_peak()
        before = resident("VmRSS")
    run()
    run()
    return max(resident("VmHWM") - before, 0)


# Peers


def available(benchmark: Benchmark) -> tuple[Benchmark, dict[str, str]]:
    """The benchmark without the cases whose package is not installed, and those: case -> package."""
    absent = {case: package for case, package in benchmark.packages.items() if find_spec(package) is None}
    return replace(benchmark, cases={case: make for case, make in benchmark.cases.items() if case not in absent}), absent


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
            return {"peak": peak_memory(benchmark.cases[name], folders[name], benchmark.prepared)}
        runs = {name: benchmark.cases[name](folders[name]) for name in names}
        clock = time.process_time if threads == 1 else time.perf_counter
        return {"seconds": interleave(runs, rounds, benchmark.calls, clock, benchmark.cold)}


def start_worker(
    benchmark: str, names: Sequence[str], rounds: int, threads: int, allocator: str, options: Sequence[str] = ()
) -> dict[str, Any]:
    """`work` in a fresh process with that allocator setting: malloc reads it only when a process starts."""
    environment = {name: value for name, value in os.environ.items() if name not in KEEP and name != "GLIBC_TUNABLES"}
    environment |= ALLOCATORS[allocator] | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    task = json.dumps({"names": list(names), "rounds": rounds, "threads": threads})
    command = [sys.executable, str(Path(__file__).resolve()), benchmark, *options, "--worker", task]
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
    width = max(28, *(len(case) for found in result["settings"].values() for case in found["cases"]))
    lines = [
        f"{result['benchmark']}: {result['summary']}",
        f"{how}; {about['cpu']}, {about['cores']} cores, load {about['load']}, torch {about['torch']}",
        f"{'allocator':<10} {'case':<{width}} {'ms':>10} {result['unit'] + '/s':>12} {'peak MiB':>9} {'ratio':>7}",
    ]
    for allocator, found in result["settings"].items():
        for case, values in found["cases"].items():
            ratio = f"{found['ratios'][case]:.2f}" if case in found["ratios"] else "1"
            rate = f"{result['items'] / values['median']:,.0f}" if values["median"] > 0 else "-"
            lines.append(
                f"{allocator:<10} {case:<{width}} {1000 * values['median']:>10.2f} {rate:>12} {values['peak_mib']:>9.0f} {ratio:>7}"
            )
    return "\n".join(lines)


# The command line


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark that the command line names, and return the exit status."""
    names = "\n".join(f"  {name:<14} {benchmark.summary}" for name, benchmark in BENCHMARKS.items())
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\nBenchmarks:\n{names}", formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("name", metavar="NAME", help=f"one of: {', '.join(BENCHMARKS)}")
    parser.add_argument("--rounds", type=int, metavar="N", help="rounds that count; the benchmark's own number by default")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="threads of torch (default: 1)")
    parser.add_argument("--instances", type=int, metavar="N", help="size of a benchmark that has one, such as the rows of a memory bank")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything that was measured to this file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.name not in BENCHMARKS:
        print(f"benchmark: there is no {arguments.name!r}; there are: {', '.join(BENCHMARKS)}", file=sys.stderr)
        return 2
    benchmark, absent = available(BENCHMARKS[arguments.name])
    options: list[str] = []
    if arguments.instances is not None:
        if benchmark.instances is None or arguments.instances < 1:
            sized = ", ".join(name for name, known in BENCHMARKS.items() if known.instances is not None)
            print(f"benchmark: --instances is a positive number for one of: {sized}", file=sys.stderr)
            return 2
        cases = {case: partial(make, instances=arguments.instances) for case, make in benchmark.cases.items()}
        summary = f"{benchmark.summary}; {arguments.instances:,} instances"
        benchmark, options = replace(benchmark, cases=cases, summary=summary), ["--instances", str(arguments.instances)]
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
    if absent:
        print(f"left out, not installed: {'; '.join(absent)} (pip install {' '.join(absent.values())})")
    try:
        result = measure(arguments.name, benchmark, rounds, arguments.threads, partial(start_worker, options=options) if options else None)
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
