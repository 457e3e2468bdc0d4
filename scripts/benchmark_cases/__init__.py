"""The cases of `scripts/benchmark.py`: each module has its `BENCHMARKS`, functions that prepare and return what is timed."""

from collections.abc import Callable
from dataclasses import dataclass, field

Run = Callable[[], object]
Make = Callable[..., Run]


@dataclass(frozen=True)
class Benchmark:
    """What to compare.

    Attributes:
        summary: one line for `--help` and the table.
        cases: name -> function that takes an empty folder (a Path) and prepares the case; what it returns is timed. Litzoo comes first.
        items: what one call works through, such as clouds, for the rate in the table.
        unit: name of an item.
        rounds: rounds, unless given on the command line.
        calls: calls in one measurement; enough to make it at least some ten milliseconds.
        allocators: settings to measure under.
        apart: measure each case in processes of its own, taken in turns, because a case changes its process for good.
        cold: count the first call as well; with `apart` and one call, all that counts is the first call of a process.
        instances: what `--instances` changes: a size that all cases take as an argument of that name; None if they have none.
        prepared: do not count what a case prepares as its memory, such as a bank that all cases hold.
        packages: case -> the package it needs that litzoo does not depend on; where that is not installed, the case is left out.
    """

    summary: str
    cases: dict[str, Make]
    items: int
    unit: str
    rounds: int
    calls: int = 1
    allocators: tuple[str, ...] = ("default", "keep")
    apart: bool = False
    cold: bool = False
    instances: int | None = None
    prepared: bool = False
    packages: dict[str, str] = field(default_factory=dict)
