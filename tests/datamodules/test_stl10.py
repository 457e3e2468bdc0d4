"""STL-10: what torchvision reads from the same files, packed once; splits and folds of the published protocol."""

import hashlib
import io
import os
import pickle
import tarfile
import urllib.error
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import torchvision.datasets
from torchvision.datasets import utils

import litzoo.datamodules.stl10
from litzoo.datamodules import DataError, STL10DataModule
from litzoo.datamodules.arrays import TEST, TRAIN, VAL
from litzoo.datamodules.splits import UNUSED

NAMES = ["airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"]
TRAINING, TESTING, UNLABELLED, FOLD = 60, 30, 50, 20
LABELLED = TRAINING + TESTING


def planes(images: np.ndarray) -> bytes:
    """The binary format, written pixel by pixel: red, green, blue, and within each one column after the other."""
    return b"".join(bytes(image[:, column, channel].tobytes()) for image in images for channel in range(3) for column in range(96))


def write_binary(contents: dict[str, bytes], root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the archive, teach torchvision its checksums, and cut the network off."""
    known = torchvision.datasets.STL10
    root.mkdir(exist_ok=True)
    with tarfile.open(root / known.filename, "w:gz", compresslevel=1) as tar:
        for name, content in contents.items():
            entry = tarfile.TarInfo(f"stl10_binary/{name}")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    md5 = {name: hashlib.md5(content).hexdigest() for name, content in contents.items()}
    monkeypatch.setattr(known, "train_list", [[name, md5[name]] for name, _ in known.train_list])
    monkeypatch.setattr(known, "test_list", [[name, md5[name]] for name, _ in known.test_list])
    monkeypatch.setattr(known, "tgz_md5", hashlib.md5((root / known.filename).read_bytes()).hexdigest())

    def no_network(*_: object, **__: object) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(utils, "download_url", no_network)


def binary_files() -> dict[str, bytes]:
    rng = np.random.default_rng(3)
    images = {"test_X.bin": TESTING, "train_X.bin": TRAINING, "unlabeled_X.bin": UNLABELLED}
    contents = {name: planes(rng.integers(0, 256, (count, 96, 96, 3), dtype=np.uint8)) for name, count in images.items()}
    for name, count in (("test_y.bin", TESTING), ("train_y.bin", TRAINING)):
        contents[name] = bytes((rng.permutation(count) % 10 + 1).tolist())
    # The official folds overlap, and their lines end in a space.
    folds = "".join("".join(f"{i} " for i in rng.choice(TRAINING, FOLD, replace=False)) + "\n" for _ in range(10))
    return contents | {"fold_indices.txt": folds.encode(), "class_names.txt": "".join(f"{name}\n" for name in NAMES).encode()}


@pytest.fixture(scope="module")
def contents() -> dict[str, bytes]:
    return binary_files()


@pytest.fixture
def root(contents: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(litzoo.datamodules.stl10, "_BLOCK", 16)  # several blocks, the last one incomplete
    write_binary(contents, tmp_path / "data", monkeypatch)
    return tmp_path / "data"


def unpack(root: Path, target: Path) -> None:
    with tarfile.open(root / "stl10_binary.tar.gz") as tar:
        tar.extractall(target, filter="data")


def replace_member(root: Path, contents: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, **changed: bytes) -> None:
    write_binary(
        contents | {f"{name}.txt" if "_X" not in name else f"{name}.bin": value for name, value in changed.items()}, root, monkeypatch
    )


def indices(data: STL10DataModule, split: int) -> set[int]:
    return set(data.indices(split).tolist())


@pytest.mark.parametrize("unpacked", [False, True])
def test_same_as_torchvision(root: Path, tmp_path: Path, unpacked: bool) -> None:
    unpack(root, tmp_path / "reference")
    official = [torchvision.datasets.STL10(str(tmp_path / "reference"), split=split) for split in ("train", "test", "unlabeled")]
    if unpacked:
        unpack(root, root)
        (root / "stl10_binary.tar.gz").unlink()
    data = STL10DataModule(root)
    assert np.array_equal(data.arrays.input.numpy(), np.concatenate([part.data for part in official]))
    assert data.arrays.label.tolist() == np.concatenate([np.asarray(part.labels, np.int64) for part in official]).tolist()
    assert data.class_names == official[0].classes == NAMES
    assert data.image_size == 96
    batch = next(iter(data.test_dataloader()))
    picture, target = official[1][3]
    assert int(batch.label[3]) == target
    assert torch.equal(batch.input[3], torch.from_numpy(np.array(picture)).permute(2, 0, 1))


def test_labelled(root: Path) -> None:
    data = STL10DataModule(root, val_fraction=1 / 3)
    train, val = indices(data, TRAIN), indices(data, VAL)
    assert train | val == set(range(TRAINING))
    assert data.class_counts == [4] * 10
    assert torch.bincount(data.arrays.label[data.indices(VAL)]).tolist() == [2] * 10
    assert indices(data, TEST) == set(range(TRAINING, LABELLED))
    assert indices(data, UNUSED) == set(range(LABELLED, LABELLED + UNLABELLED))
    assert val == indices(STL10DataModule(root, val_fraction=1 / 3, seed=9), VAL)
    assert val != indices(STL10DataModule(root, val_fraction=1 / 3, split_seed=1), VAL)


def test_unlabelled_and_both(root: Path) -> None:
    alone, unlabelled, both = (STL10DataModule(root, train_on=on, batch_size=8) for on in ("labelled", "unlabelled", "both"))  # type: ignore[arg-type]
    rest = set(range(LABELLED, LABELLED + UNLABELLED))
    assert indices(alone, VAL) == indices(unlabelled, VAL) == indices(both, VAL) != set()
    assert indices(alone, TEST) == indices(unlabelled, TEST) == indices(both, TEST)
    assert indices(unlabelled, TRAIN) == rest
    assert indices(unlabelled, UNUSED) == indices(alone, TRAIN)
    assert indices(both, TRAIN) == rest | indices(alone, TRAIN)
    assert indices(both, UNUSED) == set()
    assert unlabelled.class_counts == [0] * 10
    assert both.class_counts == alone.class_counts
    assert unlabelled.num_train == UNLABELLED
    batch = next(iter(unlabelled.train_dataloader()))
    assert batch.label.tolist() == [-1] * 8
    assert {-1, *range(10)} == set(both.arrays.label[both.indices(TRAIN)].tolist())
    assert next(iter(unlabelled.val_dataloader())).label.min() >= 0


@pytest.mark.parametrize("train_on", ["labelled", "unlabelled", "both"])
@pytest.mark.parametrize("val_fraction", [0.0, 0.2])
def test_train_fraction_touches_training_only(root: Path, train_on: str, val_fraction: float) -> None:
    whole, half = (
        STL10DataModule(root, train_on=train_on, val_fraction=val_fraction, train_fraction=share)  # type: ignore[arg-type]
        for share in (1.0, 0.5)
    )
    for split in (VAL, TEST):
        assert indices(whole, split) == indices(half, split)
    assert (val_fraction == 0) == (indices(whole, VAL) == set())
    assert indices(half, TRAIN) < indices(whole, TRAIN)
    kept, all_of = (data.arrays.label[data.indices(TRAIN)] for data in (half, whole))
    for cls in all_of.unique():
        assert int((kept == cls).sum()) == max(1, round(int((all_of == cls).sum()) / 2))


@pytest.mark.parametrize("fold", [0, 9])
def test_folds(root: Path, tmp_path: Path, fold: int) -> None:
    unpack(root, tmp_path)
    official = torchvision.datasets.STL10(str(tmp_path), split="train", folds=fold)
    data = STL10DataModule(root, fold=fold, val_fraction=0.25)
    line = (tmp_path / "stl10_binary" / "fold_indices.txt").read_text().splitlines()[fold]
    assert indices(data, TRAIN) == {int(number) for number in line.split()}
    assert data.num_train == FOLD
    order = np.argsort([int(number) for number in line.split()])
    assert np.array_equal(data.arrays.input[data.indices(TRAIN)].numpy(), official.data[order])
    outside = set(range(TRAINING)) - indices(data, TRAIN)
    assert indices(data, VAL) < outside
    label = data.arrays.label
    for cls in range(10):  # stratified, and a share of the images outside the fold
        members = [i for i in outside if label[i] == cls]
        assert sum(int(label[i]) == cls for i in indices(data, VAL)) == min(round(len(members) * 0.25), max(len(members) - 1, 0))
    assert indices(data, TEST) == set(range(TRAINING, LABELLED))
    assert indices(data, TRAIN) | indices(data, VAL) | indices(data, UNUSED) | indices(data, TEST) == set(range(LABELLED + UNLABELLED))
    assert indices(STL10DataModule(root, fold=fold, val_fraction=0.0), TRAIN) == indices(data, TRAIN)


@pytest.mark.parametrize(
    "settings", [{"fold": 10}, {"fold": -1}, {"train_on": "all"}, {"fold": 1, "train_on": "both"}, {"train_fraction": 0}]
)
def test_settings_out_of_range(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"fold|train_on|train_fraction"):
        STL10DataModule(**settings)  # type: ignore[arg-type]


def test_balanced_needs_labels(root: Path) -> None:
    with pytest.raises(DataError, match="balanced=True needs labels"):
        STL10DataModule(root, train_on="both", balanced=True).train_dataloader()


def test_only_the_unlabelled_part_has_a_progress_bar(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _ = STL10DataModule(root).num_classes
    shown = capsys.readouterr().err
    assert f"{UNLABELLED}/{UNLABELLED}" in shown
    assert f"/{TRAINING} " not in shown
    assert f"/{TESTING} " not in shown
    _ = STL10DataModule(root).num_classes
    assert capsys.readouterr().err == ""


def test_packed_file_is_enough(root: Path) -> None:
    before = STL10DataModule(root, fold=3).arrays
    (root / "stl10_binary.tar.gz").unlink()
    with h5py.File(root / "stl10.h5") as file:
        assert file["image"].chunks is None
    for download in (True, False):
        after = STL10DataModule(root, download=download, fold=3).arrays
        assert all(torch.equal(x, y) for x, y in ((before.input, after.input), (before.label, after.label), (before.split, after.split)))
    assert sorted(path.name for path in root.iterdir() if path.suffix != ".lock") == ["stl10.h5"]


def test_pickle_holds_no_images(root: Path) -> None:
    data = STL10DataModule(root, train_on="both", batch_size=8)
    content = pickle.dumps(data.arrays)
    assert len(content) < data.arrays.input.numel() / 100
    assert torch.equal(pickle.loads(content).input, data.arrays.input)
    again = pickle.loads(pickle.dumps(data))
    assert torch.equal(next(iter(again.train_dataloader())).input, next(iter(data.train_dataloader())).input)


def test_nothing_there(root: Path, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"neither stl10_binary\.tar\.gz nor the folder stl10_binary in .*/nowhere: download http.*--data\.root"
    ):
        _ = STL10DataModule(tmp_path / "nowhere", download=False).num_classes
    with pytest.raises(DataError, match=rf"stl10_binary\.tar\.gz could not be downloaded .*no route.* by hand into {tmp_path}/nowhere"):
        _ = STL10DataModule(tmp_path / "nowhere").num_classes


def test_truncated_archive(root: Path) -> None:
    archive = root / "stl10_binary.tar.gz"
    archive.write_bytes(archive.read_bytes()[: archive.stat().st_size // 2])
    with pytest.raises(DataError, match=r"stl10_binary\.tar\.gz is truncated or corrupt.*delete it"):
        _ = STL10DataModule(root, download=False).num_classes
    assert sorted(path.name for path in root.iterdir() if path.suffix != ".lock") == [archive.name]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("fold_indices", b"0 1\n" * 9, "fold_indices.txt must hold 10 lines"),
        ("fold_indices", b"0 60\n" * 10, "below 60"),
        ("fold_indices", b"0 1\n" * 9 + b"0\n", "fold_indices.txt must hold"),
        ("fold_indices", b"\xff", "fold_indices.txt must hold"),
        ("fold_indices", b"", "fold_indices.txt must hold"),
        ("train_X", b"\0" * 27648 * 59, "train_X.bin does not hold an image of 27648 bytes for each label in train_y.bin"),
    ],
)
def test_wrong_content(
    root: Path, contents: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, name: str, content: bytes, message: str
) -> None:
    replace_member(root, contents, monkeypatch, **{name: content})
    with pytest.raises(DataError, match=message):
        _ = STL10DataModule(root).num_classes
    assert not (root / "stl10.h5").exists()


def test_real_images(contents: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real training images, written in the official format, come back as they were."""
    path = Path(os.environ.get("LITZOO_DATA", "")) / "stl10_sample" / "train109.npz"
    if "LITZOO_DATA" not in os.environ or not path.is_file():
        pytest.skip("the real STL-10 images are not there: LITZOO_DATA must name the folder of the shared data")
    sample = np.load(path)
    assert list(sample["class_names"]) == NAMES
    labels = bytes((sample["label"] + 1).tolist())
    real = contents | {"train_X.bin": planes(sample["image"]), "train_y.bin": labels}
    write_binary(real, tmp_path / "real", monkeypatch)
    data = STL10DataModule(tmp_path / "real", val_fraction=0.0, image_size=48)
    assert np.array_equal(data.arrays.input[:109].permute(0, 2, 3, 1).numpy(), sample["image"])
    assert data.arrays.label[:109].tolist() == sample["label"].tolist()
    batch = data.transform(next(iter(data.eval_train_dataloader())))
    assert batch.input.shape == (109, 3, 48, 48)
    # Photographs normalised by the published moments: about 0 and 1.
    assert batch.input.mean().abs() < 0.3
    assert 0.7 < batch.input.std() < 1.3
