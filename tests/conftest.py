"""What every test gets: one thread, no network, no window, no seed left over by another test."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MPLBACKEND"] = "agg"

import importlib.util
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def clean_seed() -> Iterator[None]:
    """Neither a seed in the environment nor a random state passes from test to test."""
    before = os.environ.pop("PL_GLOBAL_SEED", None)
    torch.manual_seed(0)
    yield
    os.environ.pop("PL_GLOBAL_SEED", None)
    if before is not None:
        os.environ["PL_GLOBAL_SEED"] = before


@pytest.fixture
def points_file(tmp_path: Path) -> Callable[..., Path]:
    """Writes a small HDF5 file of clouds: `points_file(parts=True)`; see `contract.write_points`."""
    from contract import write_points

    def write(name: str = "points.h5", **settings: object) -> Path:
        return write_points(tmp_path / name, **settings)  # type: ignore[arg-type]

    return write


# Runs a script as Python would, and takes the process group down at its end: left to the exit, its threads may abort the process.
_RUN = """
import os, runpy, sys
import torch.distributed
sys.argv = sys.argv[1:]
sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
"""


def run_two_processes(script: Path, *arguments: str | Path) -> None:
    """Run a script in two fresh processes that find each other by torch's environment variables; fail if one fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "NODE_RANK": "0"}
    common.pop("PYTEST_CURRENT_TEST", None)
    started = [
        subprocess.Popen(
            [sys.executable, "-c", _RUN, str(script), *map(str, arguments)],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    for rank, (process, output) in enumerate(zip(started, outputs, strict=True)):
        assert process.returncode == 0, f"process {rank} failed:\n{output[-4000:]}"


@pytest.fixture(scope="session")
def two_processes() -> Callable[..., None]:
    """`two_processes(script, *arguments)`: see `run_two_processes`."""
    return run_two_processes


@pytest.fixture(scope="session")
def load_script() -> Callable[[str], ModuleType]:
    """`load_script("benchmark")`: the module scripts/benchmark.py, which finds its neighbours as a script does that Python runs."""

    def load(name: str) -> ModuleType:
        path = Path(__file__).resolve().parent.parent / "scripts" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(f"{name}_script", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(path.parent)
            spec.loader.exec_module(module)
        return module

    return load
