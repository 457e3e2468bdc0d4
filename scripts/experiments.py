"""What the scripts share that train many small models: quiet trainers, results that are kept, and means with their spread."""

import argparse
import json
import logging
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from litzoo.zoo.files import write_file

SILENT: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "devices": 1,
}


def silence_lightning() -> None:
    """No banners and no hints of many trainers."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")


def kept(path: Path) -> dict[str, Any] | None:
    """What was kept under this name, or None."""
    return json.loads(path.read_text()) if path.is_file() else None


def keep(path: Path, result: dict[str, Any]) -> dict[str, Any]:
    """Keep a result, whole or not at all; returns it."""
    write_file(path, json.dumps(result).encode())
    return result


def claim_folder(parser: argparse.ArgumentParser, options: argparse.Namespace, free: Collection[str] = ("runs", "seeds")) -> None:
    """Refuse a folder `options.runs` that holds results of other settings; those in `free` may differ."""
    settings = {name: value for name, value in vars(options).items() if name not in free}
    path = options.runs / "settings.json"
    before = kept(path) or keep(path, settings)
    if before != settings:
        changed = ", ".join(name for name in settings if before.get(name) != settings[name])
        parser.error(f"{options.runs} holds results of another {changed}: give another folder with --runs")


def spread(values: np.ndarray | list[float], digits: int, sign: str = "") -> str:
    """Mean and standard error in words; the mean alone of one value."""
    mean = f"{np.mean(values):{sign},.{digits}f}"
    return f"{mean} ± {np.std(values, ddof=1) / np.sqrt(len(values)):,.{digits}f}" if len(values) > 1 else mean
