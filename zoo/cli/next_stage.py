"""The next stage of a training: the recipe that `then` names is fitted on the encoder that this training leaves."""

import os
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from . import CommandError, is_config, recipe_path

_TRAINER = ("accelerator", "precision", "deterministic", "default_root_dir", "enable_progress_bar", "enable_model_summary")
# Options of the command line that hold for the next stage as well; all others are of the first one, or of its recipe.
_SHARED = ("--seed_everything", "--data", *(f"--trainer.{name}" for name in _TRAINER))
# On which device a single process trains; of several, each stage's recipe says whether it can use them.
_DEVICES = ("--trainer.devices", "--trainer.strategy")
# Which samples are trained on, and how they are shown, is each stage's own affair.
_OWN_DATA = ("augmentation", "views", "batch_size", "compiled", "balanced", "train_on")
# By these a process knows that it is one of several.
_DISTRIBUTED = (
    *("LOCAL_RANK", "GLOBAL_RANK", "RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("TORCHELASTIC_RUN_ID", "SLURM_NTASKS", "JSM_NAMESPACE_SIZE", "PL_GLOBAL_SEED"),
)
_PREFIX = "LITZOO_FIT__"


def check_next_stage(parser: Any, recipe: str, arguments: list[str]) -> None:
    """Refuse a recipe that `run_next_stage` could not fit, now and not after the training.

    Args:
        parser: of the command line.
        recipe: name or file of the recipe.
        arguments: the command line of the first stage.

    Raises:
        CommandError: if there is no such recipe, or its settings, or shared options of the command line, do not fit.
    """
    from .mistakes import parser_sentence

    command = ["fit", "--config", recipe_path(recipe), "--model.encoder", "of_this_stage.ckpt", *shared_options(arguments)]
    before, environment = dict(os.environ), _environment()
    try:
        os.environ.clear()
        os.environ.update(environment)  # where the parser looks, too
        parser.parse_args(command)
    except CommandError as error:
        raise CommandError(f"the next stage, {recipe}, cannot be: {parser_sentence(str(error))}") from error
    finally:
        os.environ.clear()
        os.environ.update(before)


def run_next_stage(recipe: str, encoder: Path, arguments: list[str], processes: int = 1) -> int:
    """Fit a recipe with a trained encoder, in a process of its own.

    Args:
        recipe: name or file of the recipe; its model takes an `encoder`.
        encoder: checkpoint with the encoder.
        arguments: the command line of the first stage, of which what says where the data are, and on what to train, holds here too.
        processes: that trained the first stage.

    Returns:
        The exit status.
    """
    options = ["--config", recipe, "--model.encoder", str(encoder), *shared_options(arguments, processes)]
    print(f"litzoo: next stage: litzoo fit {shlex.join(options)}", flush=True)
    started: list[subprocess.Popen[bytes]] = []
    ended = False

    def leave(signum: int, frame: FrameType | None) -> None:
        """Ctrl-C reaches both processes: that one stops between two batches, and this one waits."""

    def end(signum: int, frame: FrameType | None) -> None:
        """What ends this process ends that one, whose status would not tell."""
        nonlocal ended
        ended = True
        for process in started:
            process.terminate()

    handlers = {signal.SIGINT: leave, signal.SIGTERM: end}
    in_main = threading.current_thread() is threading.main_thread()  # only there can a signal be handled
    before = {number: signal.signal(number, handler) for number, handler in handlers.items() if in_main}
    try:
        command = [sys.executable, "-m", __name__.partition(".")[0], "fit", *options]
        started.append(subprocess.Popen(command, env=_environment(processes)))
        status = started[0].wait()
        status = -signal.SIGTERM if ended else status
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if status == 0:
        print(f"litzoo: to score it on the test split: litzoo test {shlex.join(options)}")
    return status if status >= 0 else 128 - status  # as a shell says that a signal ended it


def shared_options(arguments: list[str], processes: int = 1) -> list[str]:
    """Those options of a command line that hold for the next stage too, with their values.

    Args:
        arguments: options as `--name value` or `--name=value`.
        processes: that trained the first stage; of several, the options that made them so are left out.

    Returns:
        The same, without the others.

    Example:
        >>> shared_options(["--data.root", "images", "--data.views=2", "--model.temperature", "0.1", "--trainer.accelerator=cpu"])
        ['--data.root', 'images', '--trainer.accelerator=cpu']
    """
    kept: list[str] = []
    is_kept = False
    for argument in arguments:
        if argument.startswith("--") or is_config(argument):
            is_kept = _is_shared(argument.partition("=")[0], processes)
        if is_kept:
            kept.append(argument)
    return kept


def _is_shared(option: str, processes: int) -> bool:
    name = option.removeprefix("--data.").removeprefix("init_args.").partition(".")[0]
    return option in _SHARED or (option in _DEVICES and processes == 1) or (option.startswith("--data.") and name not in _OWN_DATA)


def _environment(processes: int = 1) -> dict[str, str]:
    def is_kept(name: str) -> bool:
        if name.startswith(_PREFIX):
            return _is_shared(f"--{name.removeprefix(_PREFIX).lower().replace('__', '.')}", processes)
        return name not in _DISTRIBUTED

    return {name: value for name, value in os.environ.items() if is_kept(name)}
