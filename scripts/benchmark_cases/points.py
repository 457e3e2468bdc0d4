"""Point clouds: augmentation, loading, and the training step of PointNet."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmark_cases import Benchmark, Run

# points: augmentation of a batch


def points_litzoo(folder: Path, clouds: int = 32, stored: int = 2048, kept: int = 1024) -> Run:
    """Subset, rotation about y, scale, shift and jitter of a whole batch."""
    import torch

    from litzoo.datamodules import PointAugmentation

    batch, key = torch.rand(clouds, stored, 3), torch.arange(clouds)
    augmentation = PointAugmentation(rotation="yaw", scale=(0.8, 1.25), shift=0.1, jitter=0.01, jitter_clip=0.05)
    return lambda: augmentation(batch, key, kept)[0]


def points_numpy(folder: Path, clouds: int = 32, stored: int = 2048, kept: int = 1024) -> Run:
    """The same operations as a data set's `__getitem__` and the default collation do them."""
    import numpy as np
    import torch

    rng = np.random.default_rng(0)
    data = rng.random((clouds, stored, 3), dtype=np.float32)

    def augment(cloud: Any) -> Any:
        cloud = cloud[rng.choice(len(cloud), kept, replace=False)]
        angle = rng.uniform(0, 2 * np.pi)
        cos, sin = np.cos(angle), np.sin(angle)
        cloud = cloud @ np.array([[cos, 0, sin], [0, 1, 0], [-sin, 0, cos]], dtype=np.float32).T
        cloud = cloud * rng.uniform(0.8, 1.25, 3) + rng.uniform(-0.1, 0.1, 3)
        return (cloud + np.clip(0.01 * rng.standard_normal(cloud.shape), -0.05, 0.05)).astype(np.float32)

    return lambda: torch.stack([torch.from_numpy(augment(cloud)) for cloud in data])


# loading: one epoch from disk


def _stored_clouds(clouds: int, points: int) -> tuple[Any, Any, Any]:
    import numpy as np

    rng = np.random.default_rng(0)
    return (
        rng.uniform(-1, 1, (clouds, points, 3)).astype(np.float32),
        np.arange(clouds) % 4,
        rng.integers(0, 6, (clouds, points)).astype(np.uint8),
    )


def loading_litzoo(folder: Path, clouds: int = 512, points: int = 2500, batch_size: int = 32) -> Run:
    """Open the HDF5 file, read it and go through one epoch of batches, every time."""
    import h5py

    from litzoo.datamodules import HDF5PointsDataModule

    path = folder / "clouds.h5"
    with h5py.File(path, "w") as file:
        for name, values in zip(("points", "label", "part"), _stored_clouds(clouds, points), strict=True):
            file[name] = values

    def epoch() -> int:
        data = HDF5PointsDataModule(path, val_fraction=0, test_fraction=0, batch_size=batch_size, seed=0)
        return sum(len(batch.label) for batch in data.train_dataloader())

    return epoch


def loading_text(folder: Path, clouds: int = 512, points: int = 2500, batch_size: int = 32) -> Run:
    """One epoch over one text file a cloud (x y z part), read by `np.loadtxt` in a data set's `__getitem__`."""
    import numpy as np
    from torch.utils.data import DataLoader, Dataset

    coordinates, label, part = _stored_clouds(clouds, points)
    paths = [folder / f"{index}.txt" for index in range(clouds)]
    for index, path in enumerate(paths):
        np.savetxt(path, np.column_stack([coordinates[index], part[index]]), fmt="%.6f")

    class TextClouds(Dataset[Any]):
        def __len__(self) -> int:
            return len(paths)

        def __getitem__(self, index: int) -> Any:
            rows = np.loadtxt(paths[index]).astype(np.float32)
            return rows[:, :3], int(label[index]), rows[:, 3].astype(np.int64)

    return lambda: sum(len(batch[1]) for batch in DataLoader(TextClouds(), batch_size, shuffle=True, drop_last=True))


# points-loading: batches of ShapeNetPart


def _shapenet(folder: Path, clouds: int, points: int) -> None:
    """Fabricate ShapeNetPart as its release with normals has it: a text file of seven columns for each shape."""
    import json

    import numpy as np

    coordinates, _, part = _stored_clouds(clouds, points)
    names = [f"{'02691156' if index % 2 else '03001627'}/{index:05}" for index in range(clouds)]
    for name, xyz, labels in zip(names, coordinates, part, strict=True):
        path = folder / f"{name}.txt"
        path.parent.mkdir(exist_ok=True)
        first = 0 if name.startswith("02691156") else 12  # both classes have four parts
        np.savetxt(path, np.column_stack([xyz, xyz, first + labels % 4]), fmt="%.6f")
    lists = folder / "train_test_split"
    lists.mkdir()
    for split in ("train", "val", "test"):
        listed = [f"shape_data/{name}" for name in names] if split == "train" else []
        (lists / f"shuffled_{split}_file_list.json").write_text(json.dumps(listed))


def points_loading_litzoo(folder: Path, clouds: int = 512, points: int = 2500, batch_size: int = 32) -> Run:
    """One epoch of batches out of the packed file; it was packed before."""
    from litzoo.datamodules import ShapeNetPartDataModule

    root = folder / "shapenet"
    root.mkdir()
    _shapenet(root, clouds, points)
    data = ShapeNetPartDataModule(root, batch_size=batch_size, farthest=0, seed=0)
    data.num_train  # noqa: B018  # packs
    return lambda: sum(len(batch.label) for batch in data.train_dataloader())


def points_loading_text(folder: Path, clouds: int = 512, points: int = 2500, batch_size: int = 32) -> Run:
    """One epoch of batches whose shapes are parsed by `np.loadtxt`, as data sets do that keep no copy of their own."""
    import numpy as np
    import torch
    from torch.utils.data import DataLoader, Dataset

    _shapenet(folder, clouds, points)
    paths = sorted(folder.glob("0*/*.txt"))

    class TextShapes(Dataset[Any]):
        def __len__(self) -> int:
            return len(paths)

        def __getitem__(self, index: int) -> Any:
            rows = np.loadtxt(paths[index]).astype(np.float32)
            return rows[:, :3], index % 2, torch.from_numpy(rows[:, 6].astype(np.int64))

    return lambda: sum(len(batch[1]) for batch in DataLoader(TextShapes(), batch_size, shuffle=True, drop_last=True))


# pointnet, pointnet-2500, allocator: a training step


def _training_step(model: Any, loss: Callable[[Any, Any], Any], clouds: int, points: int, classes: int) -> Run:
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    batch, label = torch.rand(clouds, points, 3), torch.arange(clouds) % classes

    def step() -> None:
        optimizer.zero_grad()
        loss(batch, label).backward()
        optimizer.step()

    return step


def pointnet_litzoo(folder: Path, clouds: int = 32, points: int = 1024, classes: int = 16) -> Run:
    """Forward, backward and AdamW step of `PointNetClassifier`, its training metrics included."""
    from litzoo.zoo import PointNetClassifier

    model = PointNetClassifier(classes)
    return _training_step(model, lambda batch, label: model.training_step((batch, label), 0), clouds, points, classes)


def pointnet_textbook(folder: Path, clouds: int = 32, points: int = 1024, classes: int = 16) -> Run:
    """The same step of the same network, written as tutorials write it."""
    model = textbook_pointnet(classes)
    return _training_step(model, model.loss, clouds, points, classes)


def pointnet_2500_litzoo(folder: Path) -> Run:
    """The same step for clouds of 2,500 points."""
    return pointnet_litzoo(folder, points=2500)


def pointnet_2500_textbook(folder: Path) -> Run:
    """The same step for clouds of 2,500 points."""
    return pointnet_textbook(folder, points=2500)


def textbook_pointnet(classes: int, dropout: float = 0.3) -> Any:
    """PointNet with both transforms: convolutions with a bias before BatchNorm, a maximum that also returns its indices.

    Args:
        classes: number of classes.
        dropout: before the last layer.

    Returns:
        A module of points `(B, N, 3)` -> logits and feature transform, with `loss(points, label)`.
    """
    import torch
    import torch.nn.functional as F
    from torch import Tensor, nn

    class Transform(nn.Module):
        def __init__(self, size: int) -> None:
            super().__init__()
            self.size = size
            self.conv1, self.conv2, self.conv3 = nn.Conv1d(size, 64, 1), nn.Conv1d(64, 128, 1), nn.Conv1d(128, 1024, 1)
            self.fc1, self.fc2, self.fc3 = nn.Linear(1024, 512), nn.Linear(512, 256), nn.Linear(256, size * size)
            self.bn1, self.bn2, self.bn3 = nn.BatchNorm1d(64), nn.BatchNorm1d(128), nn.BatchNorm1d(1024)
            self.bn4, self.bn5 = nn.BatchNorm1d(512), nn.BatchNorm1d(256)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.bn1(self.conv1(x)))
            x = F.relu(self.bn2(self.conv2(x)))
            x = F.relu(self.bn3(self.conv3(x)))
            x = torch.max(x, 2, keepdim=True)[0].view(-1, 1024)
            x = F.relu(self.bn4(self.fc1(x)))
            x = F.relu(self.bn5(self.fc2(x)))
            identity = torch.eye(self.size, dtype=x.dtype).flatten().repeat(len(x), 1)
            return (self.fc3(x) + identity).view(-1, self.size, self.size)

    class TextbookPointNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.transform = Transform(3)
            self.conv1, self.conv2 = nn.Conv1d(3, 64, 1), nn.Conv1d(64, 64, 1)
            self.feature_transform = Transform(64)
            self.conv3, self.conv4, self.conv5 = nn.Conv1d(64, 64, 1), nn.Conv1d(64, 128, 1), nn.Conv1d(128, 1024, 1)
            self.fc1, self.fc2, self.fc3 = nn.Linear(1024, 512), nn.Linear(512, 256), nn.Linear(256, classes)
            self.bn1, self.bn2, self.bn3, self.bn4 = nn.BatchNorm1d(64), nn.BatchNorm1d(64), nn.BatchNorm1d(64), nn.BatchNorm1d(128)
            self.bn5, self.bn6, self.bn7 = nn.BatchNorm1d(1024), nn.BatchNorm1d(512), nn.BatchNorm1d(256)
            self.dropout = nn.Dropout(dropout)

        def forward(self, points: Tensor) -> tuple[Tensor, Tensor]:
            x = points.transpose(2, 1)
            x = torch.bmm(x.transpose(2, 1), self.transform(x)).transpose(2, 1)
            x = F.relu(self.bn1(self.conv1(x)))
            x = F.relu(self.bn2(self.conv2(x)))
            matrix = self.feature_transform(x)
            x = torch.bmm(x.transpose(2, 1), matrix).transpose(2, 1)
            x = F.relu(self.bn3(self.conv3(x)))
            x = F.relu(self.bn4(self.conv4(x)))
            x = F.relu(self.bn5(self.conv5(x)))
            x = torch.max(x, 2, keepdim=True)[0].view(-1, 1024)
            x = F.relu(self.bn6(self.fc1(x)))
            x = F.relu(self.bn7(self.fc2(x)))
            return self.fc3(self.dropout(x)), matrix

        def loss(self, points: Tensor, label: Tensor) -> Tensor:
            logits, matrix = self(points)
            difference = torch.bmm(matrix, matrix.transpose(2, 1)) - torch.eye(matrix.shape[-1], dtype=matrix.dtype)
            return F.cross_entropy(logits, label) + 0.001 * torch.mean(torch.sum(difference**2, dim=(1, 2)))

    return TextbookPointNet()


def allocator_kept(folder: Path) -> Run:
    """The step after `keep_freed_memory`, as `litzoo fit` runs it; it changes the process for good."""
    from litzoo.zoo.cli.training import keep_freed_memory

    keep_freed_memory()
    return pointnet_litzoo(folder)


BENCHMARKS: dict[str, Benchmark] = {
    "points": Benchmark(
        summary="augmentation of 32 clouds, 2,048 points to 1,024: subset, yaw rotation, scale, shift, jitter",
        cases={"litzoo, whole batch": points_litzoo, "numpy, per sample": points_numpy},
        items=32,
        unit="clouds",
        rounds=15,
        calls=10,
    ),
    "loading": Benchmark(
        summary="one epoch of 512 clouds of 2,500 points with part labels, opened anew, page cache warm",
        cases={"litzoo, HDF5": loading_litzoo, "np.loadtxt, a file a cloud": loading_text},
        items=512,
        unit="clouds",
        rounds=5,
    ),
    "points-loading": Benchmark(
        summary="one epoch of batches of 512 shapes of 2,500 points, normals and part labels, page cache warm",
        cases={"litzoo, packed": points_loading_litzoo, "np.loadtxt, a file a shape": points_loading_text},
        items=512,
        unit="shapes",
        rounds=5,
    ),
    "pointnet-2500": Benchmark(
        summary="PointNet training step, 32 clouds of 2,500 points: forward, backward, AdamW",
        cases={"litzoo": pointnet_2500_litzoo, "textbook": pointnet_2500_textbook},
        items=32,
        unit="clouds",
        rounds=5,
    ),
    "pointnet": Benchmark(
        summary="PointNet training step, 32 clouds of 1,024 points: forward, backward, AdamW",
        cases={"litzoo": pointnet_litzoo, "textbook": pointnet_textbook},
        items=32,
        unit="clouds",
        rounds=5,
    ),
    "allocator": Benchmark(
        summary="litzoo's PointNet training step after keep_freed_memory() and without it",
        cases={"keep_freed_memory()": allocator_kept, "glibc's default": pointnet_litzoo},
        items=32,
        unit="clouds",
        rounds=5,
        allocators=("default",),
        apart=True,
    ),
}
