"""What the tests of callbacks run in two processes, they run in the same two: starting them takes longer than most of it."""

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def both_processes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, two_processes: Callable[..., None]) -> Path:
    """The folder in which the two processes have run `run_rank(folder)` of every module that asks for `rank_folder`."""
    folder = tmp_path_factory.mktemp("ranks")
    names = {item.path.stem for item in request.session.items if "rank_folder" in getattr(item, "fixturenames", ())}
    two_processes(Path(__file__).with_name("ranks.py"), folder, *sorted(names))
    return folder


@pytest.fixture
def rank_folder(request: pytest.FixtureRequest, both_processes: Path) -> Path:
    """What the module's `run_rank(folder)` has written in two processes."""
    return both_processes / request.path.stem
