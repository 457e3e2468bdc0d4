"""CIFAR-10 and CIFAR-100: what torchvision reads from the same files, packed once."""

import hashlib
import io
import os
import pickle
import tarfile
import urllib.error
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
import pytest
import torch
import torchvision.datasets
from torchvision.datasets import utils

from litzoo.datamodules import CIFAR10DataModule, CIFAR100DataModule, DataError
from litzoo.datamodules.arrays import TEST, TRAIN, VAL
from litzoo.datamodules.splits import UNUSED

Dataset = Literal["CIFAR10", "CIFAR100"]
MODULES: dict[str, type[CIFAR10DataModule] | type[CIFAR100DataModule]] = {"CIFAR10": CIFAR10DataModule, "CIFAR100": CIFAR100DataModule}
PACKED = {"CIFAR10": "cifar10.h5", "CIFAR100": "cifar100.h5"}
# Training images of each class.
PER_CLASS = 10
FOLDER = {"CIFAR10": "cifar-10-batches-py", "CIFAR100": "cifar-100-python"}


@cache
def batches_of(dataset: Dataset) -> dict[str, Any]:
    """What the official files hold, with few images."""
    rng = np.random.default_rng(5)

    def batch(count: int, number: int) -> dict[str, Any]:
        fine = rng.permutation(np.arange(count) % (10 if dataset == "CIFAR10" else 100)).tolist()
        found = {
            "data": rng.integers(0, 256, (count, 3072), dtype=np.uint8),
            "filenames": [f"picture_{number}_{i}.png" for i in range(count)],
            "batch_label": f"batch {number}",
        }
        if dataset == "CIFAR10":
            return found | {"labels": fine}
        return found | {"fine_labels": fine, "coarse_labels": [label * 7 % 20 for label in fine]}

    if dataset == "CIFAR10":
        files: dict[str, Any] = {f"data_batch_{number}": batch(2 * PER_CLASS, number) for number in range(1, 6)}
        return files | {"test_batch": batch(50, 6), "batches.meta": {"label_names": [f"class {i}" for i in range(10)], "num_vis": 3072}}
    meta = {"fine_label_names": [f"fine {i}" for i in range(100)], "coarse_label_names": [f"coarse {i}" for i in range(20)]}
    return {"train": batch(100 * PER_CLASS, 1), "test": batch(200, 2), "meta": meta}


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Dataset], Path]:
    """Makes an archive in the official format in a folder, teaches torchvision its checksums, and cuts the network off."""

    def build(dataset: Dataset) -> Path:
        known = getattr(torchvision.datasets, dataset)
        root = tmp_path / dataset
        root.mkdir()
        # Protocol 2 is that of the official files.
        contents = {name: pickle.dumps(content, protocol=2) for name, content in batches_of(dataset).items()}
        with tarfile.open(root / known.filename, "w:gz", compresslevel=1) as tar:
            for name in sorted(contents, reverse=True):  # not in the order of the batches, as in the official archive
                entry = tarfile.TarInfo(f"{FOLDER[dataset]}/{name}")
                entry.size = len(contents[name])
                tar.addfile(entry, io.BytesIO(contents[name]))
        md5 = {name: hashlib.md5(content).hexdigest() for name, content in contents.items()}
        monkeypatch.setattr(known, "train_list", [[name, md5[name]] for name, _ in known.train_list])
        monkeypatch.setattr(known, "test_list", [[name, md5[name]] for name, _ in known.test_list])
        monkeypatch.setattr(known, "meta", {**known.meta, "md5": md5[known.meta["filename"]]})
        monkeypatch.setattr(known, "tgz_md5", hashlib.md5((root / known.filename).read_bytes()).hexdigest())
        return root

    def no_network(*_: object, **__: object) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(utils, "download_url", no_network)
    return build


def unpack(root: Path, target: Path) -> None:
    with tarfile.open(next(root.glob("*.tar.gz"))) as tar:
        tar.extractall(target, filter="data")


@pytest.fixture(params=["CIFAR10", "CIFAR100"])
def dataset(request: pytest.FixtureRequest) -> Dataset:
    return request.param


@pytest.mark.parametrize("unpacked", [False, True])
def test_same_as_torchvision(dataset: Dataset, unpacked: bool, make: Callable[[Dataset], Path], tmp_path: Path) -> None:
    root = make(dataset)
    unpack(root, tmp_path / "reference")
    official = [getattr(torchvision.datasets, dataset)(tmp_path / "reference", train=train) for train in (True, False)]
    if unpacked:  # what torchvision leaves is enough
        unpack(root, root)
        next(root.glob("*.tar.gz")).unlink()
    data = MODULES[dataset](root)
    images, labels = data.arrays.input, data.arrays.label
    assert images.shape[1:] == (3, 32, 32)
    assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), np.concatenate([part.data for part in official]))
    assert labels.tolist() == official[0].targets + official[1].targets
    assert data.class_names == official[0].classes
    test = torch.arange(len(labels)) >= len(official[0])
    assert torch.equal(data.arrays.split == TEST, test)
    # and what comes out of the loaders are these images
    batch = next(iter(data.test_dataloader()))
    picture, target = official[1][3]
    assert int(batch.label[3]) == target
    assert torch.equal(batch.input[3], torch.from_numpy(np.array(picture)).permute(2, 0, 1))
    seen = data.transform(batch).input[3]
    mean, std = (torch.tensor(values)[:, None, None] for values in (data.published_mean, data.published_std))
    torch.testing.assert_close(seen, (torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255 - mean) / std)


def test_packed_layout(dataset: Dataset, make: Callable[[Dataset], Path]) -> None:
    root = make(dataset)
    _ = MODULES[dataset](root).num_classes
    with h5py.File(root / PACKED[dataset]) as file:
        assert file["image"].chunks is None
        assert file["image"].shape[1:] == (32, 32, 3)
        assert set(file["split"][:]) == {0, 2}
        assert ("coarse_label" in file) == ("coarse_names" in file) == (dataset == "CIFAR100")


def test_validation_is_held_out_of_training(dataset: Dataset, make: Callable[[Dataset], Path]) -> None:
    root = make(dataset)
    data = MODULES[dataset](root, val_fraction=0.2)
    train, val = data.indices(TRAIN), data.indices(VAL)
    assert data.class_counts == [round(PER_CLASS * 0.8)] * data.num_classes
    assert torch.bincount(data.arrays.label[val]).tolist() == [round(PER_CLASS * 0.2)] * data.num_classes
    assert torch.equal(torch.cat([train, val]).sort().values, torch.arange(PER_CLASS * data.num_classes))
    assert torch.equal(val, MODULES[dataset](root, val_fraction=0.2, seed=4).indices(VAL)), "the seed of training changes no split"
    assert not torch.equal(val, MODULES[dataset](root, val_fraction=0.2, split_seed=1).indices(VAL))
    thin = MODULES[dataset](root, val_fraction=0.2, train_fraction=0.5)
    assert torch.equal(thin.indices(VAL), val)
    assert set(thin.indices(TRAIN).tolist()) < set(train.tolist())
    assert thin.class_counts == [PER_CLASS * 4 // 10] * data.num_classes
    assert len(thin.indices(UNUSED)) == len(train) - len(thin.indices(TRAIN))


def test_fine_and_coarse(make: Callable[[Dataset], Path]) -> None:
    root = make("CIFAR100")
    fine, coarse = CIFAR100DataModule(root), CIFAR100DataModule(root, labels="coarse")
    assert (fine.num_classes, coarse.num_classes) == (100, 20)
    assert coarse.class_names == [f"coarse {i}" for i in range(20)]
    written = batches_of("CIFAR100")
    assert fine.arrays.label.tolist() == written["train"]["fine_labels"] + written["test"]["fine_labels"]
    assert coarse.arrays.label.tolist() == written["train"]["coarse_labels"] + written["test"]["coarse_labels"]
    assert torch.equal(fine.arrays.split, coarse.arrays.split), "both validate on the same images"
    assert coarse.class_counts == [5 * (PER_CLASS - 1)] * 20
    assert torch.equal(fine.arrays.input, coarse.arrays.input)


def test_packed_file_is_enough(dataset: Dataset, make: Callable[[Dataset], Path]) -> None:
    root = make(dataset)
    before = MODULES[dataset](root).arrays
    next(root.glob("*.tar.gz")).unlink()
    for download in (True, False):
        after = MODULES[dataset](root, download=download).arrays
        assert torch.equal(before.input, after.input)
        assert torch.equal(before.label, after.label)
    assert sorted(path.name for path in root.iterdir() if path.suffix != ".lock") == [PACKED[dataset]]


def test_pickle_holds_no_images(dataset: Dataset, make: Callable[[Dataset], Path]) -> None:
    data = MODULES[dataset](make(dataset), batch_size=16)
    images = data.arrays.input
    content = pickle.dumps(data.arrays)
    assert len(content) < images.numel() / 10
    assert torch.equal(pickle.loads(content).input, images)
    loader = data.train_dataloader()
    assert len(pickle.dumps(loader.dataset)) < images.numel() / 10
    again = pickle.loads(pickle.dumps(data))
    assert torch.equal(next(iter(again.train_dataloader())).input, next(iter(loader)).input)


def test_truncated_archive(dataset: Dataset, make: Callable[[Dataset], Path]) -> None:
    root = make(dataset)
    archive = next(root.glob("*.tar.gz"))
    archive.write_bytes(archive.read_bytes()[: archive.stat().st_size // 2])
    with pytest.raises(DataError, match=rf"{archive.name} is truncated or corrupt.*delete it"):
        _ = MODULES[dataset](root, download=False).num_classes
    with pytest.raises(DataError, match=r"could not be downloaded .*no route to host.*--data\.root"):
        _ = MODULES[dataset](root).num_classes
    assert sorted(path.name for path in root.iterdir() if path.suffix != ".lock") == [archive.name]


def test_nothing_there(dataset: Dataset, make: Callable[[Dataset], Path], tmp_path: Path) -> None:
    make(dataset)
    known = getattr(torchvision.datasets, dataset)
    with pytest.raises(DataError, match=rf"neither {known.filename} nor the folder {FOLDER[dataset]} in .*/nowhere: download {known.url}"):
        _ = MODULES[dataset](tmp_path / "nowhere", download=False).num_classes
    with pytest.raises(DataError, match=rf"{known.url} could not be downloaded .* by hand into {tmp_path}/nowhere"):
        _ = MODULES[dataset](tmp_path / "nowhere").num_classes


def test_foreign_pickle_is_refused(make: Callable[[Dataset], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make("CIFAR10")
    unpack(root, root)

    class Evil:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path}/run",)

    content = pickle.dumps({"label_names": Evil()}, protocol=2)
    (root / FOLDER["CIFAR10"] / "batches.meta").write_bytes(content)
    known = torchvision.datasets.CIFAR10
    monkeypatch.setattr(known, "meta", {**known.meta, "md5": hashlib.md5(content).hexdigest()})
    with pytest.raises(DataError, match=r"batches\.meta is not a pickle of plain arrays"):
        _ = CIFAR10DataModule(root).num_classes
    assert not (tmp_path / "run").exists()
    assert not (root / "cifar10.h5").exists()


def test_root_resolves_home_and_variables(make: Callable[[Dataset], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    root = make("CIFAR10")
    monkeypatch.setenv("IMAGES", str(root.parent))
    monkeypatch.setenv("HOME", str(root.parent))
    assert CIFAR10DataModule("$IMAGES/CIFAR10").num_classes == CIFAR10DataModule("~/CIFAR10").num_classes == 10


def test_settings_out_of_range() -> None:
    with pytest.raises(ValueError, match="labels must be fine or coarse, got 'both'"):
        CIFAR100DataModule(labels="both")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="train_fraction"):
        CIFAR10DataModule(train_fraction=0.0)


def test_published_moments() -> None:
    """Mean and deviation of the real training images, computed by numpy from their histograms."""
    from PIL import Image

    folder = Path(os.environ.get("LITZOO_DATA", "")) / "cifar10"
    if "LITZOO_DATA" not in os.environ or not folder.is_dir():
        pytest.skip("the real CIFAR-10 is not there: LITZOO_DATA must name the folder of the shared data")
    histogram = np.zeros((3, 256))
    for path in sorted(folder.glob("train_*.webp")):
        pixels = np.asarray(Image.open(path).convert("RGB"))
        histogram += [np.bincount(pixels[..., channel].ravel(), minlength=256) for channel in range(3)]
    assert histogram.sum() == 50_000 * 32 * 32 * 3
    values, weights = np.arange(256) / 255, histogram / histogram.sum(1, keepdims=True)
    mean = weights @ values
    std = np.sqrt(weights @ values**2 - mean**2)
    assert tuple(mean.round(4)) == CIFAR10DataModule.published_mean
    assert tuple(std.round(4)) == CIFAR10DataModule.published_std
