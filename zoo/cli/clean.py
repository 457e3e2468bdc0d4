"""`litzoo clean`: labels of a data set that an ensemble, trained on other samples, takes for wrong."""

import argparse
import inspect
import shlex
import sys
from copy import deepcopy
from pathlib import Path
from pydoc import locate
from typing import TYPE_CHECKING, Any, get_args

from jsonargparse import ActionConfigFile
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from ..cleaning import SPLITS, CleaningResult, Filter, Scheme, clean_labels
from ..cleaning_results import apply_verdicts, read_decisions, write_review, write_tables
from . import CommandError, recipe_names
from .encoder_data import prepare_images_for
from .parsing import LINKS, Parser, import_short_names
from .precision import native_precision
from .training import keep_freed_memory

if TYPE_CHECKING:
    from ...datamodules import ArrayDataModule

# What a recipe may say about trainings that are kept and scored, which these are not.
_IGNORED = ("checkpoint", "last", "name", "then", "ckpt_path")
_PARTS = ("model", "data", "trainer")
# Where a training writes, what it shows, and how it is spread over the machine does not change it.
_NO_MATTER = (
    *(f"trainer.{name}" for name in ("default_root_dir", "enable_progress_bar", "enable_model_summary", "log_every_n_steps", "logger")),
    *("trainer.devices", "trainer.num_nodes", "data.num_workers", "data.eval_batch_size"),
)
# More classes, and the table would fill the terminal.
_LISTED = 20


class _MakeModel:
    """Makes the model of a recipe for some data; a plain description, so that processes can be sent one."""

    def __init__(self, model: dict[str, Any]) -> None:
        self.model = model

    def __call__(self, data: Any) -> LightningModule:
        takes = inspect.signature(_class_of(self.model).__init__).parameters
        links = {name: getattr(data, name) for name in LINKS if name in takes and hasattr(data, name)}
        init_args = {**(self.model.get("init_args") or {}), **links}
        model: LightningModule = _instantiate("model", {**self.model, "init_args": init_args})
        return model


class _MakeTrainer:
    """Makes the trainer of a recipe, with callbacks of its own, for one process and one device."""

    def __init__(self, trainer: dict[str, Any]) -> None:
        self.trainer = trainer

    def __call__(self, **forced: Any) -> Trainer:
        settings = _instantiate("trainer", self.trainer).as_dict()
        callbacks = settings.get("callbacks") or []
        callbacks = [each for each in (callbacks if isinstance(callbacks, list) else [callbacks]) if not isinstance(each, Checkpoint)]
        return Trainer(**{**settings, "callbacks": callbacks, **forced})


def _class_of(settings: dict[str, Any]) -> Any:
    return locate(settings["class_path"])


def _add(parser: Parser, part: str) -> None:
    if part == "trainer":
        parser.add_lightning_class_args(Trainer, "trainer")
        parser.set_defaults({"trainer.max_epochs": 100, "trainer.log_every_n_steps": 10})  # as `fit` has it
    else:
        kind = LightningModule if part == "model" else LightningDataModule
        parser.add_lightning_class_args(kind, part, subclass_mode=True)


def _instantiate(part: str, settings: dict[str, Any]) -> Any:
    """The object, or of the trainer its arguments."""
    parser = Parser(prog="litzoo clean")
    _add(parser, part)
    return parser.instantiate(parser.parse_object({part: deepcopy(settings)}))[part]


def clean(arguments: list[str]) -> int:
    """Find wrong labels: train ensembles on folds of the data, let them vote on the other folds, and write what they doubt.

    The folder gets the predictions of each model, so that the same command goes on where it was stopped, `labels.csv` and
    `labels.json` with a row for each sample, `summary.json`, and `review.html`, a page to look through what is in doubt.

    Args:
        arguments: the command line, recipes already resolved to files.

    Returns:
        The exit status.

    Raises:
        CommandError: if a setting is wrong, or the recipe's model is no classifier.

    Example:
        >>> clean(["--config", "zoo/configs/classifier_digits.yaml", "--output", "cleaning"])
        0
    """
    keep_freed_memory()
    import_short_names()
    options = _parse(arguments)
    parts = {part: options[part].as_dict() for part in _PARTS}
    prepare_images_for((parts["model"].get("init_args") or {}).get("encoder"), parts["data"].get("init_args") or {})
    data = _instantiate("data", parts["data"])
    _check(options, data)
    trainer = _checked_trainer(parts["trainer"], parts["model"])
    decisions = None if options.decisions is None else read_decisions(options.decisions, data.class_names)
    if options.apply is not None:
        from ...datamodules.hdf5_writing import check_target

        check_target(options.apply, data.arrays)
    files = list(getattr(data, "files", ()))

    def report(line: str) -> None:
        print(f"litzoo: {line}", flush=True)

    try:
        result = clean_labels(
            _MakeModel(parts["model"]),
            data,
            _MakeTrainer(trainer),
            options.output,
            folds=options.folds,
            scheme=options.scheme,
            num_models=options.models,
            views=options.views,
            threshold=options.threshold,
            min_flags=options.min_flags,
            filter_by=options.filter,
            splits=options.split,
            seed=int(options.seed_everything),
            jobs=options.jobs,
            recipe=_flat(parts),
            report=report,
        )
    except KeyboardInterrupt:
        print(f"\nlitzoo: stopped; the same command trains the models that {options.output} lacks", file=sys.stderr)
        return 130
    summary = write_tables(options.output, result, files)
    shown = write_review(
        options.output / "review.html", result, data, files, options.show, f"Labels to review: {options.output.absolute().name}"
    )
    _tell(summary, shown, options.output)
    if options.apply is not None:
        _apply(options, data, result, decisions, files)
    return 0


def _parse(arguments: list[str]) -> Any:
    """The options; those of model, data and trainer are not made into objects yet."""
    if not any(argument.startswith(("-c", "--config", "--model", "-h", "--help")) for argument in arguments):
        raise CommandError(
            f"say which model and data: --config RECIPE, or --model CLASS and --data CLASS; recipes: {', '.join(recipe_names())}"
        )
    parser = Parser(
        prog="litzoo clean",
        description="Find wrong labels: models trained on some folds of the data judge the labels of the others.",
    )
    parser.add_argument("-c", "--config", action=ActionConfigFile, help="name or file of a recipe with a classifier")
    parser.add_argument("--output", type=Path, required=True, help="folder of the results; the same command goes on in it")
    parser.add_argument("--folds", type=int, default=5, help="K, into how many folds the samples are dealt out")
    parser.add_argument(
        "--scheme",
        type=Scheme,
        default="train_on_one",
        help="train on one fold and judge the K - 1 others, which gives each label K - 1 votes, or leave one out and judge that",
    )
    parser.add_argument("--models", type=int, default=1, help="models in a round, of different seeds, whose outputs are averaged")
    parser.add_argument(
        "--views", type=int, default=1, help="augmented views of each sample, whose outputs are averaged; 1: the plain sample"
    )
    help_text = "a label is doubted if another class is more probable, or its probability is below this"
    parser.add_argument("--threshold", type=float, default=0.0, help=help_text)
    parser.add_argument(
        "--min_flags", "--min-flags", type=int | None, default=None, help="votes against a label to review it; by default more than half"
    )
    help_text = "choose what to review by this filter of cleanlab instead of votes"
    parser.add_argument("--filter", type=str | None, default=None, help=f"{help_text}: {', '.join(get_args(Filter))}")
    parser.add_argument("--split", nargs="+", choices=SPLITS, default=["train"], help="whose labels to clean; no other split is read")
    parser.add_argument("--jobs", type=int, default=1, help="processes, which train a model each and share the cores")
    parser.add_argument("--show", type=int, default=300, help="samples on the review page, at most")
    parser.add_argument("--apply", type=Path | None, default=None, help="write a cleaned copy of all splits, packed, to this new .h5 file")
    help_text = "give samples to review their proposed label in the copy, or leave them out"
    parser.add_argument("--apply_by", "--apply-by", choices=["relabel", "drop"], default="relabel", help=help_text)
    help_text = "apply only what was accepted in this CSV file, which the review page downloads"
    parser.add_argument("--decisions", type=Path | None, default=None, help=help_text)
    parser.add_argument("--seed_everything", type=int | bool, default=0, help="seed of folds, models and views")
    for part in _PARTS:
        _add(parser, part)
    for name in LINKS:
        parser.link_arguments(f"data.{name}", f"model.init_args.{name}", apply_on="instantiate")
    for name in _IGNORED:
        parser.add_argument(f"--{name}", type=Any, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def _check(options: Any, data: Any) -> None:
    """Refuse, before any work, what would be refused after it."""
    from ...datamodules import ArrayDataModule

    if not isinstance(data, ArrayDataModule):
        raise CommandError(f"litzoo clean takes the data sets of litzoo, not {type(data).__name__}")
    if options.output.exists() and not options.output.is_dir():
        raise CommandError(f"--output {options.output} is a file: give a folder")
    others = [] if not options.output.is_dir() else [path for path in options.output.iterdir() if not path.name.startswith(".")]
    if others and not (options.output / "settings.json").is_file():
        raise CommandError(f"--output {options.output} holds other files: give a new folder, or one of an earlier `litzoo clean`")
    if options.show < 1:
        raise CommandError(f"--show must be at least 1, got {options.show}")
    if options.decisions is not None and options.apply is None:
        raise CommandError("--decisions says what goes into the cleaned copy: give --apply FILE.h5 too")


def _checked_trainer(trainer: dict[str, Any], model: dict[str, Any]) -> dict[str, Any]:
    """The trainer's settings for one device and no validation, in the precision that `fit` would choose."""
    if trainer.get("devices") not in (None, "auto", 1, "1") or trainer.get("num_nodes", 1) != 1:
        raise CommandError("litzoo clean trains each model on one device: give --trainer.devices 1, and --jobs for several models at once")
    callbacks = trainer.get("callbacks") or []
    for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
        if callback["class_path"].endswith("EarlyStopping") and _monitor(callback).startswith("val"):
            raise CommandError(
                "label cleaning does not validate, so EarlyStopping would wait for ever: leave it out of --trainer.callbacks, and say with "
                "--trainer.max_epochs how long to train"
            )
    monitor = _monitor((model.get("init_args") or {}).get("lr_scheduler") or {})
    if monitor.startswith("val"):
        raise CommandError(
            f"label cleaning does not validate, so no learning rate can follow {monitor}: give another --model.lr_scheduler, or one that "
            "follows a quantity of the training"
        )
    chosen = {**trainer, "devices": 1, "num_nodes": 1}
    if trainer.get("precision") is None and getattr(_class_of(model), "prefers_bf16", False):
        chosen["precision"] = native_precision(str(trainer.get("accelerator")))
    return chosen


def _monitor(settings: dict[str, Any]) -> str:
    """The quantity that a class with these settings watches, if any."""
    return str((settings.get("init_args") or {}).get("monitor"))


def _flat(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings with dotted names, as on the command line, without those that do not matter."""
    if not isinstance(settings, dict) or not settings:
        return {prefix.removesuffix("."): settings}
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if f"{prefix}{name}" in _NO_MATTER:
            continue
        flat |= _flat(value, prefix if name == "init_args" else f"{prefix}{name}.")
    return flat


def _tell(summary: dict[str, Any], shown: int, output: Path) -> None:
    review, classes = summary["review"], summary["classes"]
    unjudged = f", {summary['unjudged']:,} without a vote" if summary["unjudged"] else ""
    print(f"{summary['samples']:,} labels, {review:,} to review{unjudged}")
    doubted = sorted((each for each in classes if each["review"]), key=lambda each: -each["review"])[:_LISTED]
    width = max((len(each["name"]) for each in doubted), default=0)
    pairs = summary["noise_matrix"]
    for each in doubted:
        given = classes.index(each)
        others = sorted(((count, cls) for cls, count in enumerate(pairs[given]) if cls != given and count), reverse=True)[:3]
        likely = ", ".join(f"{classes[cls]['name']} ({count})" for count, cls in others)
        print(f"  {each['name']:<{width}}  {each['review']:>6,} of {each['samples']:,}" + (f": {likely}" if likely else ""))
    if len(doubted) < sum(each["review"] > 0 for each in classes):
        print(f"  the other classes: {output / 'summary.json'}")
    if 2 * review > summary["samples"]:
        print(
            "more labels are doubted than not: models that weak cannot judge them; train longer with --trainer.max_epochs, or on more samples "
            "with --scheme leave_one_out"
        )
    more = f", the first {shown:,}" if shown < review else ""
    print(f"every label: {output / 'labels.csv'}; to look through{more}: {output / 'review.html'}")


def _apply(
    options: Any, data: "ArrayDataModule", result: CleaningResult, decisions: dict[int, int | None] | None, files: list[str]
) -> None:
    from ...datamodules.hdf5_writing import write_hdf5

    before = data.arrays.label
    label, kept = apply_verdicts(before, result, options.apply_by, decisions)
    written = write_hdf5(options.apply, data.arrays, label, kept, files)
    changed = f"{int((label != before).sum()):,} relabelled" if options.apply_by == "relabel" else f"{int((~kept).sum()):,} left out"
    lacking = int(kept.sum()) - written
    more = f"; {lacking:,} more, unused or without a label to go by, are left out" if lacking else ""
    kind = "HDF5ImagesDataModule" if data.arrays.input.dim() == 4 else "HDF5PointsDataModule"
    print(
        f"{written:,} samples of all splits, {changed}{more}: {options.apply}, for --data {kind} --data.path {shlex.quote(str(options.apply))}"
    )
