"""Run folders `ROOT/NAME/version_N`: one run each, never overwritten, found again by `last` and `best`."""

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.plugins.environments import SLURMEnvironment

from ..files import whole_file
from . import CommandError


def reserve_run(folder: Path, prefix: str = "version") -> Path:
    """Make the next free folder `folder/prefix_N`; two runs started at once get two folders.

    Args:
        folder: where to make it.
        prefix: what its name starts with.

    Returns:
        The new, empty folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    number = max(
        (int(path.name.rpartition("_")[2]) for path in folder.glob(f"{prefix}_[0-9]*") if path.name.rpartition("_")[2].isdigit()),
        default=-1,
    )
    while True:
        number += 1
        path = folder / f"{prefix}_{number}"
        try:
            path.mkdir()
            return path
        except FileExistsError:  # somebody else's run took the number
            continue


def read_checkpoint(path: Path, to_resume: bool = True) -> dict[str, Any]:
    """Read a Lightning checkpoint without running what it may hold.

    Args:
        path: the file.
        to_resume: whether it must hold the state of a training, which a mean of checkpoints does not.

    Raises:
        CommandError: if it is not a whole one.
    """
    import torch

    try:
        checkpoint = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # a damaged pickle can raise anything
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise CommandError(f"{path} is not a whole checkpoint ({reason}): give another file with --ckpt_path") from error
    if not isinstance(checkpoint, dict) or not {"global_step", "state_dict"} <= checkpoint.keys():
        raise CommandError(f"{path} is not a Lightning checkpoint: give one that `litzoo fit` wrote")
    if to_resume and not {"callbacks", "optimizer_states"} <= checkpoint.keys():
        raise CommandError(f"{path} holds weights alone, not the state of a training: give another one with --ckpt_path, such as last.ckpt")
    return checkpoint


def find_checkpoint(folder: Path, which: str, version: str = "version_*") -> Path:
    """The `last` or `best` checkpoint of the newest run in a folder that has one; the last is the best if nothing was to choose by.

    Args:
        folder: `ROOT/NAME`.
        which: "last" or "best".
        version: name of the run's folder, if it is not the newest one.

    Returns:
        The checkpoint file.

    Raises:
        CommandError: if there is none.
    """
    last = max(folder.glob(f"{version}/checkpoints/last.ckpt"), key=lambda path: path.stat().st_mtime, default=None)
    if last is None:
        raise CommandError(f"there is no checkpoint under {folder}: train first, or give a file with --ckpt_path")
    if which == "last":
        return last
    states = read_checkpoint(last)["callbacks"].values()
    kept = [state for state in states if "best_model_path" in state]
    if kept and all(state.get("monitor") is None for state in kept):
        return last
    names = [Path(state["best_model_path"]).name for state in states if state.get("monitor") and state.get("best_model_path")]
    # By its name: the run's folder may have been moved since.
    if names and (last.parent / names[0]).is_file():
        return last.parent / names[0]
    raise CommandError(f"{last} names no best checkpoint that still exists: give a file with --ckpt_path")


def version_of(run: Path) -> int | str:
    """What Lightning's loggers call the version: N for `version_N`, which the progress bar shows, else the name."""
    number = run.name.removeprefix("version_")
    return int(number) if number.isdigit() else run.name


class _MetricsFile(ExperimentWriter):
    """Lightning's writer, but it goes on in a file that exists, and no kill can cost the file a row."""

    def _check_log_dir_exists(self) -> None:
        """Lightning would delete the file here."""

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        write_rows(Path(self.metrics_file_path), fieldnames, read_rows(Path(self.metrics_file_path)))


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a metrics file, without their empty cells."""
    with path.open(newline="", encoding="utf-8") as file:
        return [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]


def write_rows(path: Path, fields: list[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a metrics file in one go: whoever reads it, or kills the process, finds the old rows or the new ones."""
    with whole_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=fields)
        writer.writeheader()
        writer.writerows(rows)


class ResumePoint(NamedTuple):
    """Where the log of a resumed run goes on.

    Attributes:
        step: the first step that is logged anew.
        epoch_row: metrics of the checkpoint's own epoch, which Lightning logs only after the checkpoint was written.
    """

    step: int
    epoch_row: dict[str, float]


def resume_point(checkpoint: Mapping[str, Any]) -> ResumePoint:
    """Where the log goes on after a checkpoint of `litzoo fit`."""
    # Not global_step, which counts every optimizer.
    step = checkpoint["loops"]["fit_loop"]["epoch_loop.state_dict"].get("_batches_that_stepped", checkpoint["global_step"])
    rows = (state["epoch_row"] for state in checkpoint["callbacks"].values() if "epoch_row" in state)
    return ResumePoint(step, next(rows, {}))


class RunLogger(CSVLogger):
    """A CSV logger that writes every row at once and, when a run is resumed, goes on in the same file.

    Rows at or after the step of the checkpoint are dropped on resume: the resumed run writes them again.

    Args:
        run: the run's folder, which exists.
        resumed: where to go on, or None for a new run.
    """

    def __init__(self, run: Path, resumed: ResumePoint | None = None) -> None:
        super().__init__(save_dir=run.parent.parent, name=run.parent.name, version=version_of(run), flush_logs_every_n_steps=1)
        self._resumed = resumed

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._experiment is None:
            self._experiment = _MetricsFile(self.log_dir)
            if self._resumed is not None:
                self._go_on(self._experiment, self._resumed)
        return self._experiment

    def _go_on(self, writer: _MetricsFile, resumed: ResumePoint) -> None:
        path = Path(writer.metrics_file_path)
        rows: list[dict[str, Any]] = []
        if path.is_file():
            rows += [row for row in read_rows(path) if int(row.get("step", 0)) < resumed.step]
        last = str(resumed.step - 1)
        if resumed.epoch_row and not any(row["step"] == last and resumed.epoch_row.keys() <= row.keys() for row in rows):
            rows.append({**resumed.epoch_row, "step": last})
        writer.metrics_keys = sorted({key for row in rows for key in row})
        if rows:
            write_rows(path, writer.metrics_keys, rows)


def run_of(checkpoint: Path) -> Path | None:
    """The run folder that a checkpoint lies in, or None if it lies elsewhere."""
    run = checkpoint.resolve().parent.parent
    return run if checkpoint.resolve().parent.name == "checkpoints" and run.name.startswith("version_") else None


def run_loggers(run: Path, resumed: ResumePoint | None = None) -> list[Logger]:
    """The loggers of a run: its rows as CSV, and TensorBoard's.

    Args:
        run: the run's folder, which exists.
        resumed: where to go on, or None for a new run.
    """
    step = None if resumed is None else resumed.step
    return [RunLogger(run, resumed), TensorBoardLogger(run.parent.parent, run.parent.name, version_of(run), purge_step=step)]


def job_folder(folder: Path) -> Path | None:
    """Where a SLURM job that is to be requeued saves its state, which no other job must take for its own; None outside of such a job.

    Args:
        folder: `ROOT/NAME`.

    Returns:
        `ROOT/NAME/slurm_JOB`: a job keeps its number when it is requeued.
    """
    job = os.environ.get("SLURM_JOB_ID")
    return folder / f"slurm_{job}" if job is not None and SLURMEnvironment.detect() else None


def requeued_checkpoint(job: Path) -> Path | None:
    """What a requeued job saved last, or None if it was not requeued.

    Args:
        job: the job's folder, of `job_folder`.
    """
    return max(job.glob("hpc_ckpt_*.ckpt"), key=lambda path: path.stat().st_mtime, default=None)


def saved_run(checkpoint: Mapping[str, Any]) -> Path | None:
    """The folder of the run that wrote a checkpoint, by where it kept its checkpoints; None if that is no run's, or gone."""
    folders = (state["dirpath"] for state in checkpoint["callbacks"].values() if state.get("dirpath"))
    runs = (run_of(Path(folder) / "last.ckpt") for folder in folders)
    return next((run for run in runs if run is not None and run.is_dir()), None)
