"""What every DataModule is tested for lives in test_contract.py; a DataModule joins by adding a row to `CASES`.

Run as a script by two processes (see the fixture `two_processes`), it writes down what each of them sees.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from torch import Tensor, nn

from litzoo.callbacks import StepSeed
from litzoo.datamodules import (
    ArrayDataModule,
    DigitsDataModule,
    FurnitureDataModule,
    HDF5ImagesDataModule,
    HDF5PointsDataModule,
    ImageFolderDataModule,
    MeshFolderDataModule,
    PatientsDataModule,
    PointAugmentation,
    ShapeNetPartDataModule,
)
from litzoo.zoo import Batch

# Offset and number of parts of the categories of ShapeNetPart, in their order.
_SYNSETS = ("02691156", "02773838", "02954340", "02958343", "03001627", "03261776", "03467517", "03624134")
_SYNSETS += ("03636649", "03642806", "03790512", "03797390", "03948459", "04099429", "04225987", "04379243")
SHAPENET = dict(zip(_SYNSETS, (4, 2, 2, 4, 4, 3, 3, 2, 4, 2, 6, 2, 3, 3, 3, 3), strict=True))


def write_points(
    path: Path,
    clouds: int = 60,
    points: int = 64,
    classes: int = 4,
    parts: bool = False,
    split: bool = True,
    names: bool = True,
    seed: int = 0,
) -> Path:
    """Fabricate a file of clouds: class c is stretched along its own direction, a point's part is the sign of its z."""
    rng = np.random.default_rng(seed)
    label = np.arange(clouds) % classes
    cloud = rng.normal(size=(clouds, points, 3)) * (1 + np.eye(8, 3)[label % 8])[:, None]
    with h5py.File(path, "w") as file:
        file["points"] = cloud.astype(np.float32)
        file["label"] = label.astype(np.int32)
        if split:
            file["split"] = rng.permutation(np.r_[np.full(clouds * 3 // 4, 0), np.full(clouds // 10, 1), np.full(clouds, 2)][:clouds])
        if names:
            file["class_names"] = [f"class {cls}" for cls in range(classes)]
        if parts:
            file["part"] = (cloud[..., 2] > 0).astype(np.uint8)
            file["part_names"] = ["below", "above"]
    return path


def write_images(
    path: Path,
    images: int = 60,
    shape: tuple[int, int, int] = (12, 12, 3),
    classes: int = 4,
    split: bool = True,
    names: bool = True,
    seed: int = 0,
    **storage: Any,
) -> Path:
    """Fabricate a file of images: class c is brighter than class c - 1; in one contiguous block unless `storage` says otherwise."""
    rng = np.random.default_rng(seed)
    label = np.arange(images) % classes
    image = rng.integers(0, 128, (images, *shape)) + (label * 127 // classes)[:, None, None, None]
    with h5py.File(path, "w") as file:
        file.create_dataset("image", data=image.astype(np.uint8), **storage)
        file["label"] = label.astype(np.int64)
        if split:
            file["split"] = rng.permutation(np.r_[np.full(images * 3 // 4, 0), np.full(images // 10, 1), np.full(images, 2)][:images])
        if names:
            file["class_names"] = [f"class {cls}" for cls in range(classes)]
    return path


def write_folder(root: Path, images: int = 20, classes: tuple[str, ...] = ("cat", "dog", "eel"), seed: int = 0) -> Path:
    """Fabricate a folder of colour PNGs of many sizes, so many of each class."""
    rng = np.random.default_rng(seed)
    for name in classes:
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(images):
            shape = (*rng.integers(10, 40, 2), 3)
            Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(root / name / f"{number:02}.png")
    return root


Clouds = dict[str, tuple[np.ndarray, np.ndarray]]


def shapenet_clouds(points: tuple[int, int] = (20, 40), train: int = 3, seed: int = 0) -> tuple[Clouds, dict[str, list[str]]]:
    """Fabricate shapes of ShapeNetPart: points and global part labels by name, and the names of each split in the order of its list."""
    rng = np.random.default_rng(seed)
    clouds: Clouds = {}
    lists: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    first = 0
    for synset, parts in SHAPENET.items():
        for number, split in enumerate(["train"] * train + ["val", "test"]):
            name = f"{synset}/{number}{rng.integers(1 << 60):x}"
            size = int(rng.integers(points[0], points[1], endpoint=True))
            clouds[name] = rng.normal(size=(size, 3)).round(6).astype(np.float32), first + rng.integers(parts, size=size)
            lists[split].append(name)
        first += parts
    for names in lists.values():
        rng.shuffle(names)
    return clouds, lists


def write_shapenet(root: Path, layout: str, clouds: Clouds, lists: dict[str, list[str]]) -> Path:
    """Write shapes in an official format: "v0", "normal" or "hdf5", for which all must have equally many points."""
    root.mkdir(parents=True, exist_ok=True)
    first = dict(zip(SHAPENET, np.cumsum([0, *SHAPENET.values()]), strict=False))
    if layout == "hdf5":
        for split, names in lists.items():
            half = (len(names) + 1) // 2
            for number, part in enumerate((names[:half], names[half:])):
                with h5py.File(root / f"ply_data_{split}{number}.h5", "w") as file:
                    file["data"] = np.stack([clouds[name][0] for name in part])
                    file["label"] = np.array([[list(SHAPENET).index(name.split("/")[0])] for name in part], np.uint8)
                    file["pid"] = np.stack([clouds[name][1] for name in part]).astype(np.uint8)
        return root
    for name, (points, part) in clouds.items():
        synset, identifier = name.split("/")
        if layout == "v0":
            for folder, suffix, values, form in (
                ("points", "pts", points, "%.6f"),
                ("points_label", "seg", part - first[synset] + 1, "%d"),
            ):
                (root / synset / folder).mkdir(parents=True, exist_ok=True)
                np.savetxt(root / synset / folder / f"{identifier}.{suffix}", values, form)
        else:
            (root / synset).mkdir(exist_ok=True)
            np.savetxt(root / f"{name}.txt", np.c_[points, np.zeros_like(points), part], "%.6f")
    (root / "train_test_split").mkdir(exist_ok=True)
    for split, names in lists.items():
        path = root / "train_test_split" / f"shuffled_{split}_file_list.json"
        path.write_text(json.dumps([f"shape_data/{name}" for name in names]))
    return root


def write_shapes(root: Path, shapes: int = 20, classes: tuple[str, ...] = ("cube", "plate", "rod"), seed: int = 0) -> Path:
    """Fabricate a folder of OFF files, boxes of many sizes, so many of each class: a plate is flat, a rod is long."""
    rng = np.random.default_rng(seed)
    corners = np.indices((2, 2, 2)).reshape(3, 8).T
    faces = "4 0 1 3 2\n4 4 6 7 5\n4 0 4 5 1\n4 2 3 7 6\n4 0 2 6 4\n4 1 5 7 3\n"
    for name in classes:
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(shapes):
            size = rng.uniform(0.8, 1.2, 3) * {"plate": (1, 0.1, 1), "rod": (0.2, 2, 0.2)}.get(name, (1, 1, 1))
            vertices = "".join("{} {} {}\n".format(*row) for row in corners * size)
            (root / name / f"{number:02}.off").write_text(f"OFF\n8 6 0\n{vertices}{faces}")
    return root


@dataclass(frozen=True)
class Case:
    """One DataModule.

    Attributes:
        make: `make(folder, **settings)` builds a small one; the settings are those of `ArrayDataModule`.
        batch_size: gives at least four and at most ten training batches, the last one incomplete.
        augments: whether `augment` changes training batches.
        shuffles: whether each epoch has another order; the seed matters only then.
    """

    make: Callable[..., ArrayDataModule]
    batch_size: int
    augments: bool = True
    shuffles: bool = True


def _clouds(folder: Path, **settings: Any) -> ArrayDataModule:
    path = folder / "contract.h5"
    if not path.exists():
        write_points(path, parts=True)
    everything = PointAugmentation(rotation="full", dropout=0.3, jitter=0.02)
    return HDF5PointsDataModule(path, num_points=48, augmentation=everything, **settings)


def _patients(folder: Path, **settings: Any) -> ArrayDataModule:
    settings.pop("seed", None)  # a stream in fixed order
    return PatientsDataModule(**settings)


def _images(folder: Path, **settings: Any) -> ArrayDataModule:
    path = folder / "contract_images.h5"
    if not path.exists():
        write_images(path)
    return HDF5ImagesDataModule(path, augmentation="simclr", views=2, **settings)


def _folder(folder: Path, **settings: Any) -> ArrayDataModule:
    root = folder / "contract_folder"
    if not root.exists():
        write_folder(root)
    return ImageFolderDataModule(root, size=16, augmentation="supcon", **settings)


def _shapenet(folder: Path, **settings: Any) -> ArrayDataModule:
    root = folder / "contract_shapenet"
    if not root.exists():
        write_shapenet(root, "v0", *shapenet_clouds())
    everything = PointAugmentation(rotation="full", dropout=0.3, jitter=0.02)
    return ShapeNetPartDataModule(root, num_points=16, eval_points=30, augmentation=everything, **settings)


def _meshes(folder: Path, **settings: Any) -> ArrayDataModule:
    root = folder / "contract_meshes"
    if not root.exists():
        write_shapes(root)
    return MeshFolderDataModule(root, sampled_points=96, num_points=48, augmentation=PointAugmentation(rotation="yaw"), **settings)


CASES = {
    "hdf5_points": Case(_clouds, batch_size=8),
    "furniture": Case(lambda folder, **settings: FurnitureDataModule(num_points=64, **settings), batch_size=32),
    "patients": Case(_patients, batch_size=3000, augments=False, shuffles=False),
    "digits": Case(lambda folder, **settings: DigitsDataModule(image_size=8, **settings), batch_size=200),
    "hdf5_images": Case(_images, batch_size=8),
    "image_folder": Case(_folder, batch_size=8),
    "mesh_folder": Case(_meshes, batch_size=8),
    "shapenet_part": Case(_shapenet, batch_size=10),
}


def same(a: Batch, b: Batch) -> bool:
    """Whether two batches are bitwise equal."""
    return all(x is y is None or (x is not None and y is not None and torch.equal(x, y)) for x, y in zip(a, b, strict=True))


class Probe(LightningModule):
    """A small classifier with dropout that writes down which samples it sees, and a checksum of each as it sees it."""

    def __init__(self, num_classes: int, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.net = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, num_classes))
        self.train_seen: list[list[tuple[int, float]]] = []
        self.val_seen: list[list[int]] = []
        self.val_keys: list[Any] = []
        self.val_inputs: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(F.adaptive_avg_pool1d(x.flatten(1).float().unsqueeze(1), 16).squeeze(1))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        checksum = batch.input.flatten(1).double().square().sum(1).tolist()
        self.train_seen.append(list(zip(batch.index.tolist(), checksum, strict=True)))
        return F.cross_entropy(self(batch.input), batch.label)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.val_seen.append(batch.index.tolist())
        self.val_keys.append(batch.key)
        self.val_inputs.append(batch.input)
        self.log("val/loss", F.cross_entropy(self(batch.input), batch.label), batch_size=len(batch.label))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def trainer(folder: Path, **settings: Any) -> Trainer:
    """A quiet CPU trainer with re-seeded steps."""
    callbacks = [StepSeed(seed=3), *settings.pop("callbacks", [])]
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": any("Checkpoint" in type(callback).__name__ for callback in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": folder,
        "max_epochs": 2,
    }
    return Trainer(callbacks=callbacks, **{**defaults, **settings})


def observe(case: Case, folder: Path, batch_size: int, **settings: Any) -> dict[str, Any]:
    """Train two epochs and say what this process saw, and which samplers Lightning left in place."""
    data = case.make(folder, batch_size=batch_size, eval_batch_size=5, seed=1)
    model = Probe(data.num_classes)
    fit = trainer(folder, **settings)
    fit.fit(model, datamodule=data)
    validation = fit.val_dataloaders
    return {
        "train": model.train_seen,
        "val": model.val_seen[: len(model.val_seen) // 2],
        "samplers": [type(fit.train_dataloader.sampler).__name__, type(validation.sampler).__name__],
        "weights": {name: value.detach().clone() for name, value in model.state_dict().items()},
    }


if __name__ == "__main__":
    target = Path(sys.argv[1])
    seen = {}
    for name, row in CASES.items():
        # An odd number of samples per process somewhere: 5 to a batch over the validation split.
        seen[name] = observe(row, target, row.batch_size, devices=2, strategy="ddp")
    torch.save(seen, target / f"rank{torch.distributed.get_rank()}.pt")
    torch.distributed.barrier()
