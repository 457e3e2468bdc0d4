"""The parts of objects, as `litzoo predict` writes them: a row with the share of each, or all points in an HDF5 file."""

import argparse
import csv
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .cloud_files import HDF5, stored_classes
from .segmenters import class_of, given_class, parts_of
from .sources import ARRAYS, Samples

if TYPE_CHECKING:
    from ..pointnet_segmenter import PointNetSegmenter


class PartFinder:
    """The parts of objects whose class the command line or their file tells.

    Args:
        model: finds them.
        files: of the objects; classes that are missing are told before any work is done.
        options: of the command line.

    Raises:
        CommandError: if nobody says which class an object is, or the model does not know it.
    """

    def __init__(self, model: "PointNetSegmenter", files: list[Path], options: argparse.Namespace) -> None:
        self.model = model
        self.source: str = options.model
        self.given = given_class(options.cls, model, self.source)
        self.keeps = options.output is not None and options.output.suffix.lower() in HDF5
        self.told = {path: stored_classes(path) if self.given is None else [] for path in files}
        for path, names in self.told.items():
            for position in range(max(1, len(names))):
                self._class(path, position)
        # Of each object, if points are written: name, class, points and their parts.
        self.found: list[tuple[str, int, np.ndarray, np.ndarray]] = []

    def _class(self, path: Path, position: int) -> int:
        names = self.told[path]
        place = f"cloud {position} of {path}" if names else str(path)
        return class_of(place, names[position] if position < len(names) else None, self.given, self.model, self.source)

    def rows(self, samples: Samples) -> list[dict[str, Any]]:
        """The share of each part in some samples, whose points are kept where `write` is to write them."""
        classes = [self._class(path, position) for path, position in samples.places]
        rows = []
        for (path, position), cloud, cls, found in zip(
            samples.places, samples.inputs, classes, self.model.predict(samples.inputs, torch.tensor(classes)), strict=True
        ):
            part = found.cpu()
            share = part.bincount(minlength=len(self.model.part_names)).double() / len(part)
            shares = {self.model.part_names[each]: round(float(share[each]), 6) for each in parts_of(self.model, cls)}
            rows.append({"file": str(path), "index": position, "class": self.model.class_names[cls], "parts": shares})
            if self.keeps:
                name = f"{path}:{position}" if path.suffix.lower() in ARRAYS else str(path)
                self.found.append((name, cls, cloud.numpy(), part.numpy()))
        return rows

    def write(self, output: Path) -> None:
        """Points with their parts, as `HDF5PointsDataModule` reads them."""
        from ...datamodules.arrays import Arrays
        from ...datamodules.hdf5_writing import write_hdf5

        names, classes, clouds, parts = zip(*self.found, strict=True)
        count = torch.tensor([len(cloud) for cloud in clouds])
        size = int(count.max())
        # Behind a cloud's own points they come again.
        filled = [np.arange(size) % len(cloud) for cloud in clouds]
        arrays = Arrays(
            torch.from_numpy(np.stack([cloud[order] for cloud, order in zip(clouds, filled, strict=True)])),
            torch.tensor(classes),
            torch.zeros(len(clouds), dtype=torch.uint8),
            tuple(self.model.class_names),
            torch.from_numpy(np.stack([part[order] for part, order in zip(parts, filled, strict=True)])),
            tuple(self.model.part_names),
            count=None if bool((count == size).all()) else count,
        )
        write_hdf5(output, arrays, files=names)
        print(f"{len(clouds)} clouds: {output}")


def part_table(rows: list[dict[str, Any]]) -> str:
    """CSV with a column for each part that an object of these classes may have.

    Args:
        rows: of `PartFinder.rows`.

    Returns:
        The text; what an object cannot have is left empty.
    """
    text = io.StringIO()
    names = list(dict.fromkeys(name for row in rows for name in row["parts"]))
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file", "index", "class", *names])
    for row in rows:
        writer.writerow([row["file"], row["index"], row["class"], *(row["parts"].get(name, "") for name in names)])
    return text.getvalue()
