"""`litzoo fit`, `validate` and `test`: LightningCLI with recipes, checked links and run folders."""

import ctypes
import inspect
import json
import logging
import os
import shutil
import signal
import sys
import threading
import warnings
from itertools import pairwise
from pathlib import Path
from pydoc import locate
from typing import Any, TypeGuard

import torch
import yaml
from jsonargparse import set_parsing_settings
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only
from torch.nn.modules.batchnorm import _BatchNorm

from ...callbacks import StepSeed
from ...datamodules import ArrayDataModule
from ..pretrained import list_models, load, read_header
from . import CommandError, is_config
from .embed import check_kind
from .encoder_data import prepare_images_for
from .next_stage import check_next_stage, run_next_stage
from .parsing import LINKS, Parser, import_short_names
from .precision import native_precision
from .runs import (
    ResumePoint,
    find_checkpoint,
    job_folder,
    read_checkpoint,
    requeued_checkpoint,
    reserve_run,
    resume_point,
    run_loggers,
    run_of,
    saved_run,
)

# By what the best checkpoint is chosen, where neither the user nor the model says otherwise.
_MONITOR = "val/loss"
# Once, and not in every process.
_say = rank_zero_only(print)


class _StopBetweenBatches(Callback):
    """Lets Ctrl-C wait for the end of the batch: in the middle of one it can leave a logger's thread locked for good."""

    def __init__(self) -> None:
        self._asked = False
        self._before: Any = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if threading.current_thread() is threading.main_thread():  # only there can a signal be handled
            self._before = signal.signal(signal.SIGINT, self._on_signal)

    def _on_signal(self, signum: int, frame: Any) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        _say("\nlitzoo: stops after this batch; Ctrl-C again stops at once", file=sys.stderr)

    def _stop_if_asked(self, *_: Any) -> None:
        if self._asked:
            raise KeyboardInterrupt

    # The hooks differ in arguments that do not matter here.
    on_train_batch_end = _stop_if_asked  # type: ignore[assignment]
    on_validation_batch_end = _stop_if_asked  # type: ignore[assignment]
    on_test_batch_end = _stop_if_asked  # type: ignore[assignment]

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)


class _SharedRun(Callback):
    """Tells the other processes, whoever started them, which folder process 0 has made for the run, and gives them its loggers.

    Args:
        with_loggers: whether the run has those of `run_loggers`.
        resumed: where their logs go on, or None for a new run.
    """

    def __init__(self, with_loggers: bool, resumed: ResumePoint | None) -> None:
        self.folder: Path | None = None
        self._with_loggers = with_loggers
        self._resumed = resumed

    def open(self, trainer: Trainer, folder: Path) -> None:
        self.folder = folder
        if self._with_loggers:
            trainer.loggers = run_loggers(folder, self._resumed)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        folder = trainer.strategy.broadcast(self.folder)
        if self.folder is None and folder is not None:
            self.open(trainer, folder)


class _SameStatistics(Callback):
    """Lets every process validate the model that process 0 saves: under DDP each has BatchNorm statistics of its own last batch."""

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for module in pl_module.modules() if trainer.world_size > 1 else ():
            for buffer in module.buffers(recurse=False) if isinstance(module, _BatchNorm) else ():
                torch.distributed.broadcast(buffer, src=0)


class LastCheckpoint(ModelCheckpoint):
    """Keeps the last epoch, and its row of the log, which Lightning writes only after the checkpoint.

    A class of its own, so that its state is never mistaken for that of the best checkpoint.
    """

    _epoch_row: dict[str, float] | None = None

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Private, because trainer.logged_metrics mixes it with the rows of steps and of validation.
        row = {name: float(value) for name, value in trainer._logger_connector.metrics["log"].items()}
        self._epoch_row = {"epoch": trainer.current_epoch, **row} if row else {}
        super().on_train_epoch_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "epoch_row": self._epoch_row or {}}


class LitzooCLI(LightningCLI):
    """LightningCLI for any LightningModule and LightningDataModule, with litzoo's reachable by their short names."""

    def __init__(self, arguments: list[str]) -> None:
        sys.argv = [sys.argv[0], *arguments]  # LightningCLI warns about args= beside a command line
        super().__init__(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            parser_class=Parser,
            parser_kwargs={"default_env": True, "env_prefix": "LITZOO", "prog": "litzoo"},
            trainer_defaults={"max_epochs": 100, "default_root_dir": "runs", "log_every_n_steps": 10},
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        everything = LightningCLI.subcommands()
        return {name: everything[name] for name in ("fit", "validate", "test")}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for name in LINKS:
            parser.link_arguments(f"data.{name}", f"model.init_args.{name}", apply_on="instantiate")
        parser.add_argument("--name", type=str | None, default=None, help="Folder of the runs; default: the recipe's name, or the model's.")
        parser.add_argument(
            "--then",
            type=str | None,
            default=None,
            help="Recipe to fit after this one, on the encoder of its best checkpoint, or of CheckpointAverage's mean; null: none.",
        )
        # Two, because save_last of the one that keeps the best is written only when a new best is.
        best = {"monitor": _MONITOR, "filename": "epoch_{epoch:03d}", "auto_insert_metric_name": False}
        last = {"filename": "last", "save_on_train_epoch_end": True, "enable_version_counter": False}
        for group, kind, defaults in (("checkpoint", ModelCheckpoint, best), ("last", LastCheckpoint, last)):
            parser.add_lightning_class_args(kind, group)
            parser.set_defaults({f"{group}.{name}": value for name, value in defaults.items()})

    def _parse_ckpt_path(self) -> None:
        """LightningCLI lets a checkpoint's hyper-parameters override the command line; here the command line holds."""

    def _settings(self) -> Any:
        return self.config[self.subcommand]

    def _run_name(self) -> str:
        settings = self._settings()
        if settings.name:
            return settings.name
        for path in settings.get("config") or []:
            return Path(str(path)).stem
        return settings.model.class_path.rpartition(".")[2]

    def _by_hand(self, name: str) -> bool:
        """Whether an argument of the model was given on the command line, in the environment or in a configuration file."""
        options = (f"--model.{name}", f"--model.init_args.{name}")
        variable = f"LITZOO_{self.subcommand}__MODEL__INIT_ARGS__{name}".upper()
        if variable in os.environ or any(argument.partition("=")[0] in options for argument in sys.argv):
            return True
        for path in self._settings().get("config") or []:
            model = (yaml.safe_load(Path(str(path)).read_text(encoding="utf-8")) or {}).get("model")
            if isinstance(model, dict) and name in (model.get("init_args") or {}):
                return True
        return False

    def before_instantiate_classes(self) -> None:
        settings = self._settings()
        monitor = getattr(locate(settings.model.class_path), "checkpoint_monitor", _MONITOR)
        if settings.checkpoint.monitor == _MONITOR:  # a model without that loss says what to go by, or None: the newest is the best
            settings.checkpoint.monitor = monitor
            if monitor is not None and not monitor.endswith("loss"):
                settings.checkpoint.mode = "max"
        init_args = settings.model.get("init_args") or {}
        self._given = {name: init_args.get(name) for name in LINKS if self._by_hand(name)}
        if self.subcommand == "fit" and settings.then is not None:
            check_next_stage(self.parser, settings.then, sys.argv[1:])
        self._find_start(settings)
        if settings.trainer.fast_dev_run or settings.trainer.logger is False:
            self.save_config_callback = None  # there is no folder to save it in
        self._encoder = init_args.get("encoder")
        if self._described is not None and self._encoder is not None:  # its weights are in the checkpoint, wherever they once came from
            init_args["encoder"] = self._described
        prepare_images_for(self._weights or init_args.get("encoder"), settings.data.get("init_args") or {})

    def _find_start(self, settings: Any) -> None:
        """What there is to score, or to train on from: weights or a checkpoint, if any."""
        fits, given, expected = self.subcommand == "fit", settings.get("ckpt_path"), settings.model.class_path.rpartition(".")[2]
        self._runs = Path(os.path.expandvars(settings.trainer.default_root_dir)).expanduser() / self._run_name()
        # Lightning would take what any requeued job has left in the root folder for this job's own.
        self._job = job_folder(self._runs)
        self._weights: str | None = None
        self._checkpoint: Path | None = None
        self._old_run: Path | None = None
        self._resumed: ResumePoint | None = None
        self._described: dict[str, Any] | None = None
        if not fits and _is_weights(given):
            held = read_header(given)["model"]
            if held != expected:
                raise CommandError(
                    f"{given} holds {held}, but the configuration names {expected}: give the recipe of its card, or --model {held}"
                )
            settings.ckpt_path = None
            self._weights = given
            _say(f"litzoo: {self.subcommand} of {given}")
            return
        requeued = requeued_checkpoint(self._job) if fits and self._job is not None else None
        wanted = requeued or given or (None if fits else "best")
        if wanted is None:
            return
        self._checkpoint = find_checkpoint(self._runs, wanted) if wanted in ("last", "best") else Path(wanted)
        if not self._checkpoint.is_file():
            scored = "" if fits else ", a name of `litzoo list`"
            raise CommandError(f"there is no checkpoint {wanted}: give a file{scored}, or `last` or `best` of the runs under {self._runs}")
        settings.ckpt_path = str(self._checkpoint)
        checkpoint = read_checkpoint(self._checkpoint, to_resume=fits)
        _say(f"litzoo: {self.subcommand} from {self._checkpoint}")
        saved = checkpoint.get("hyper_parameters") or {}
        held = str(saved.get("_class_path", settings.model.class_path)).rpartition(".")[2]
        if held != expected:
            raise CommandError(f"{wanted} holds {held}, but the configuration names {expected}: give that of its run with --config")
        done, planned = checkpoint.get("epoch", -1) + 1, settings.trainer.max_epochs
        if fits and planned is not None and 0 <= planned < done:
            raise CommandError(f"{wanted} has had {done} epochs: to go on from it, give --trainer.max_epochs above that, not {planned}")
        self._described = saved.get("encoder")
        self._old_run = saved_run(checkpoint) if wanted == requeued else run_of(self._checkpoint)
        if fits and wanted in ("last", requeued):
            self._resumed = resume_point(checkpoint)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        # Only now, with model and data made, is it clear that there will be a run.
        self._refuse_disagreement()
        if self._described is not None and self._encoder is not None:
            self._settings().model.init_args["encoder"] = self._encoder  # in the saved configuration, as it was named
        if self._encoder is not None and isinstance(self.datamodule, ArrayDataModule):
            check_kind(self.model, str(self._encoder), self.datamodule)
        if self._weights is not None:
            self.model = self._load_weights(self._weights)
        for name in set(LINKS) - set(inspect.signature(type(self.model).__init__).parameters):
            self.model.hparams.pop(name, None)  # LightningCLI adds every link, the model could not be loaded with it
        self._drop_monitor_without_labels()
        trainer = self._get(self.config_init, "trainer")
        # The number on a card is that of float32.
        if trainer.get("precision") is None and getattr(self.model, "prefers_bf16", False) and self._weights is None:
            kwargs["precision"] = native_precision(str(trainer.get("accelerator")))
            if kwargs["precision"] is not None:
                _say(f"litzoo: {kwargs['precision']}, which this processor computes in hardware; --trainer.precision 32-true for float32")
        has_run = self.save_config_callback is not None
        own_loggers = has_run and trainer.get("logger") in (None, True)
        if own_loggers:
            kwargs["logger"] = False  # until there is a folder
        if self._job is not None:
            kwargs["default_root_dir"] = str(self._job)
        if self._resumed is not None and self._old_run is not None:
            self.save_config_kwargs = {"config_filename": f"config_resumed_{len(list(self._old_run.glob('config*.yaml')))}.yaml"}
        self._shared = _SharedRun(own_loggers, self._resumed)
        self.trainer_defaults["callbacks"] = [self._shared, StepSeed(), _StopBetweenBatches(), _SameStatistics()]
        if has_run and self.subcommand == "fit":
            self.trainer_defaults["callbacks"].append(LearningRateMonitor())
        made = super().instantiate_trainer(**kwargs)
        if has_run and made.is_global_zero:
            self._shared.open(made, self._make_run())
            # A test keeps to the folder of the checkpoint, or Lightning warns that the run has moved.
            owner = self._shared.folder if self.subcommand == "fit" or self._checkpoint is None else self._old_run
            for checkpoint in (self._get(self.config_init, group) for group in ("checkpoint", "last")):
                if owner is not None and checkpoint.dirpath is None:
                    checkpoint.dirpath = str((owner / "checkpoints").absolute())
        return made

    def _drop_monitor_without_labels(self) -> None:
        """What a model without a validation loss is judged by needs the labels of its training images."""
        best, counts = self._get(self.config_init, "checkpoint"), getattr(self.datamodule, "class_counts", None)
        if (
            best.monitor is not None
            and best.monitor == getattr(self.model, "checkpoint_monitor", None)
            and counts is not None
            and not any(counts)
        ):
            _say(f"litzoo: the training data have no labels for {best.monitor}: of the checkpoints, the newest counts as the best")
            best.monitor = None

    def _refuse_disagreement(self) -> None:
        """jsonargparse drops a hand-given value of a linked argument in silence."""
        for name, given in self._given.items():
            known = getattr(self.datamodule, name, None)
            if given is not None and known is not None and given != known:
                raise CommandError(
                    f"--model.{name} {given} disagrees with the data, whose {name} is {known}: leave it out, the data give it"
                )

    def _load_weights(self, source: str) -> LightningModule:
        """The trained model to score, if the data are of the kind that it learned from."""
        model = load(source)
        for name in set(LINKS) - {"class_counts", "num_train"}:
            learned, given = model.hparams.get(name), getattr(self.datamodule, name, None)
            if None not in (learned, given) and json.dumps(learned) != json.dumps(given):  # to which a list and a tuple are the same
                raise CommandError(
                    f"{source} learned from data whose {name} is {learned}, here it is {given}: --data must give the same kind"
                )
        return model

    def _make_run(self) -> Path:
        """The folder of this run: a new one, but the checkpoint's own for `--ckpt_path last` and a requeued job."""
        if self.subcommand != "fit":
            return reserve_run(self._old_run or self._runs, str(self.subcommand))
        return reserve_run(self._runs) if self._resumed is None or self._old_run is None else self._old_run

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except SystemExit:  # how Lightning ends on Ctrl-C
            if self._shared.folder is not None and subcommand == "fit":
                _say("litzoo: stopped; the same command with --ckpt_path last goes on from the last whole epoch", file=sys.stderr)
            raise
        except Exception:
            # A run that was refused before its first step is none; what it logged is its start.
            unused = subcommand == "fit" and self._checkpoint is None and self.trainer.global_step == 0 and self.trainer.is_global_zero
            if self._shared.folder is not None and unused:
                shutil.rmtree(self._shared.folder, ignore_errors=True)
            raise

    def before_fit(self) -> None:
        if self._shared.folder is not None and self.trainer.is_global_zero:
            print(f"litzoo: this run writes to {self._shared.folder}")

    def after_fit(self) -> None:
        best = self._get(self.config_init, "checkpoint")
        if self.trainer.is_global_zero and best.best_model_path:
            print(f"litzoo: {f'best checkpoint by {best.monitor}' if best.monitor else 'newest checkpoint'}: {best.best_model_path}")

    def next_stage(self, arguments: list[str]) -> int:
        """Fit the recipe that `then` names; returns the exit status."""
        recipe, trainer = self._settings().then, self.trainer
        if self.subcommand != "fit" or recipe is None or not trainer.is_global_zero:
            return 0
        if trainer.fast_dev_run:  # type: ignore[attr-defined]  # Lightning sets it in a connector
            print(f"litzoo: fast_dev_run leaves no encoder for the next stage, {recipe}")
            return 0
        averages = (getattr(callback, "average_path", None) for callback in trainer.callbacks)  # type: ignore[attr-defined]  # Lightning sets it in a connector
        saved = (self._get(self.config_init, group).best_model_path for group in ("checkpoint", "last"))
        found = next(filter(None, (*averages, *saved)), None)
        if found is None:
            raise CommandError(
                f"this training has left no checkpoint for {recipe}: let it save some, or leave the next stage out with --then null"
            )
        return run_next_stage(recipe, Path(found), arguments, trainer.world_size)


def keep_freed_memory() -> None:
    """Tell glibc to reuse freed blocks instead of returning them to the kernel after every step.

    Activations are blocks of many MB; by default each is mapped and unmapped anew, and zeroing its pages costs more than
    the arithmetic of a PointNet step. The process keeps its peak memory. Does nothing where there is no glibc.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    m_trim_threshold, m_top_pad, m_mmap_threshold = -1, -2, -3
    for parameter, value in ((m_mmap_threshold, 2**31 - 4096), (m_trim_threshold, 2**31 - 1), (m_top_pad, 64 << 20)):
        mallopt(parameter, value)


def _is_weights(source: str | None) -> TypeGuard[str]:
    """Whether `litzoo.load` is to read it, not Lightning."""
    if source is None or Path(source).is_file():
        return source is not None and source.endswith(".safetensors")
    return source in list_models() or source.startswith("hf-hub:") or source.endswith(".safetensors")


def _with_encoder(arguments: list[str]) -> list[str]:
    """Weights of a classifier on an encoder hold that, too: it need not be given once more to score them."""
    given = dict(pairwise(part for argument in arguments for part in argument.split("=", 1)))
    source = given.get("--ckpt_path")
    if arguments[0] == "fit" or "--model.encoder" in given or not _is_weights(source) or "encoder" not in read_header(source)["hparams"]:
        return arguments
    return [*arguments, "--model.encoder", source]


def train(arguments: list[str]) -> int:
    """Run `fit`, `validate` or `test`.

    Args:
        arguments: the command and its options, recipes already resolved to files.

    Returns:
        The exit status.
    """
    keep_freed_memory()
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")  # data in memory needs none
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda record: "litlogger" not in record.getMessage())
    warnings.filterwarnings("ignore", message=".*exists and is not empty.*")  # a resumed run goes on in its folder
    warnings.filterwarnings("ignore", message=r".*module\(s\) in eval mode at the start")  # a frozen encoder stays in it
    warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated.*")
    warnings.filterwarnings("ignore", message="Using ModelCheckpoint with manual optimization.*")  # what is saved is right to resume from
    import_short_names()
    set_parsing_settings(add_print_completion_argument=True)
    try:
        cli = LitzooCLI(_with_encoder(arguments))
    except CommandError as error:
        if str(error).startswith("Problems parsing config"):  # jsonargparse does not say of which file
            files = [argument.partition("=")[2] or following for argument, following in pairwise([*arguments, ""]) if is_config(argument)]
            raise CommandError(f"{', '.join(files)}: {error}") from error
        raise
    return cli.next_stage(arguments)
