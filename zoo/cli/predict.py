"""`litzoo predict`: point clouds in files or folders become classes with their probabilities."""

import argparse
import csv
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..pretrained import load, load_checkpoint
from . import CommandError

READABLE = (".npy", ".h5", ".hdf5")


def _files(sources: list[Path]) -> list[Path]:
    files: list[Path] = []
    for source in sources:
        if source.is_dir():
            found = sorted(path for path in source.rglob("*") if path.suffix.lower() in READABLE)
            if not found:
                raise CommandError(f"{source} holds no {', '.join(READABLE)} file")
            files += found
        elif not source.exists():
            raise CommandError(f"there is no file or folder {source}")
        elif source.suffix.lower() not in READABLE:
            raise CommandError(f"{source}: clouds are read from {', '.join(READABLE)} files")
        else:
            files.append(source)
    return files


def _read(path: Path) -> np.ndarray:
    """The clouds `(M, N, 3)` of a file."""
    try:
        if path.suffix.lower() == ".npy":
            points = np.load(path, allow_pickle=False)
        else:
            import h5py

            with h5py.File(path, "r") as file:
                if "points" not in file:
                    raise CommandError(f"{path} has no data set `points`; it holds: {', '.join(file) or 'nothing'}")
                points = file["points"][:]
    except (ValueError, OSError, EOFError) as error:
        raise CommandError(f"{path} cannot be read, it may be truncated or of another format ({error})") from error
    clouds = points[None] if points.ndim == 2 else points
    if clouds.ndim != 3 or clouds.shape[-1] != 3 or clouds.shape[1] == 0 or clouds.dtype.kind not in "fiu":
        raise CommandError(
            f"{path}: a cloud has shape (points, 3), several have (clouds, points, 3); this is {points.dtype} {points.shape}"
        )
    if not np.isfinite(clouds).all():
        raise CommandError(f"{path} holds NaN or infinite coordinates: remove them")
    return clouds


def _rows(path: Path, probabilities: Tensor, names: list[str], top: int) -> list[dict[str, Any]]:
    confidence, classes = probabilities.topk(min(top, len(names)), dim=1)
    rows = []
    for position, (values, ids) in enumerate(zip(confidence.tolist(), classes.tolist(), strict=True)):
        ranked = [{"class": names[cls], "confidence": round(value, 6)} for cls, value in zip(ids, values, strict=True)]
        rows.append({"file": str(path), "index": position, "predictions": ranked})
    return rows


def _table(rows: list[dict[str, Any]]) -> str:
    """CSV with a pair of columns for each rank."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    ranks = range(1, len(rows[0]["predictions"]) + 1)
    writer.writerow(["file", "index", *(name for rank in ranks for name in (f"class_{rank}", f"confidence_{rank}"))])
    for row in rows:
        writer.writerow([row["file"], row["index"], *(value for guess in row["predictions"] for value in guess.values())])
    return text.getvalue()


def predict(argv: list[str]) -> int:
    """Classify point clouds: .npy files of shape (points, 3) or (clouds, points, 3), .h5 files with `points`, or folders of them."""
    parser = argparse.ArgumentParser(prog="litzoo predict", description=predict.__doc__)
    parser.add_argument("sources", metavar="SOURCE", nargs="+", type=Path, help="files or folders")
    parser.add_argument("--model", required=True, help="a name of `litzoo list`, a .safetensors, a .ckpt or hf-hub:owner/repo")
    parser.add_argument("--top", type=int, default=5, help="classes to name for each cloud (default: 5)")
    parser.add_argument("--output", type=Path, help="a .csv or .json file; by default CSV goes to the terminal")
    parser.add_argument("--batch-size", type=int, default=32, help="clouds at a time (default: 32)")
    arguments = parser.parse_args(argv)
    if arguments.top < 1 or arguments.batch_size < 1:
        raise CommandError("--top and --batch-size must be at least 1")
    output: Path | None = arguments.output
    if output is not None and output.suffix.lower() not in (".csv", ".json"):
        raise CommandError(f"--output {output}: give a name that ends in .csv or .json")
    if output is not None and not output.absolute().parent.is_dir():
        raise CommandError(f"--output {output}: there is no folder {output.absolute().parent}")

    files = _files(arguments.sources)
    clouds = [(path, _read(path)) for path in files]
    model: Any = load_checkpoint(arguments.model) if arguments.model.endswith(".ckpt") else load(arguments.model)
    if not hasattr(model, "predict") or not hasattr(model, "class_names"):
        raise CommandError(f"{arguments.model} is a {type(model).__name__}, which does not classify point clouds")
    rows: list[dict[str, Any]] = []
    for path, points in clouds:
        parts = torch.from_numpy(points.astype(np.float32)).split(arguments.batch_size)
        rows += _rows(path, torch.cat([model.predict(part) for part in parts]), model.class_names, arguments.top)

    text = json.dumps(rows, indent=1) + "\n" if output is not None and output.suffix.lower() == ".json" else _table(rows)
    if output is None:
        sys.stdout.write(text)
    else:
        temporary = output.with_name(f".{output.name}.{os.getpid()}")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(output)
        print(f"{len(rows)} clouds: {output}")
    return 0
