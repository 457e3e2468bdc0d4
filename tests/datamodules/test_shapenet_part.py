"""ShapeNetPart: three formats of the same shapes, broken and absent files, and that nothing is parsed twice."""

import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from contract import SHAPENET, same, shapenet_clouds, write_shapenet

from litzoo.datamodules import DataError, PointAugmentation, ShapeNetPartDataModule, shapenet_part
from litzoo.datamodules.splits import TEST, TRAIN, UNUSED, VAL, hold_out

CLOUDS, LISTS = shapenet_clouds()
# All of 48 points, as HDF5 needs it.
EVEN = shapenet_clouds((48, 48), seed=1)
ORDER = [name for names in LISTS.values() for name in names]
NAMES = ["Airplane", "Bag", "Cap", "Car", "Chair", "Earphone", "Guitar", "Knife", "Lamp"]
NAMES += ["Laptop", "Motorbike", "Mug", "Pistol", "Rocket", "Skateboard", "Table"]
PLAIN = PointAugmentation(scale=(1.0, 1.0), shift=0.0)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_shapenet(tmp_path / "shapenet", "v0", CLOUDS, LISTS)


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that were parsed since it was last cleared."""
    seen: list[str] = []
    original = shapenet_part._parse

    def spy(path: Path, columns: int) -> np.ndarray:
        seen.append(path.name)
        return original(path, columns)

    monkeypatch.setattr(shapenet_part, "_parse", spy)
    return seen


def naive_order(points: np.ndarray, number: int) -> list[int]:
    """Greedy farthest points in float64, one after the other, then the others as they were."""
    cloud, taken = points.astype(np.float64), [0]
    while len(taken) < min(number, len(cloud)):
        nearest = [min(((point - cloud[other]) ** 2).sum() for other in taken) for point in cloud]
        taken.append(max((place for place in range(len(cloud)) if place not in taken), key=nearest.__getitem__))
    return [*taken, *(place for place in range(len(cloud)) if place not in taken)]


# --- what is read -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["v0", "normal"])
@pytest.mark.parametrize("farthest", [0, 12, 30, 100])
def test_every_point_and_label(tmp_path: Path, layout: str, farthest: int) -> None:
    data = ShapeNetPartDataModule(write_shapenet(tmp_path / "shapes", layout, CLOUDS, LISTS), farthest=farthest)
    assert data.files == ORDER
    assert data.class_names == NAMES
    assert data.arrays.split.tolist() == [TRAIN] * 48 + [VAL] * 16 + [TEST] * 16
    assert data.arrays.label.tolist() == [list(SHAPENET).index(name.split("/")[0]) for name in ORDER]
    most = max(len(points) for points, _ in CLOUDS.values())
    assert data.arrays.input.shape == (80, most, 3)
    assert data.arrays.count is not None
    assert data.arrays.part is not None
    for place, name in enumerate(ORDER):
        points, part = CLOUDS[name]
        order = naive_order(points, farthest) if farthest else list(range(len(points)))
        assert data.arrays.count[place] == len(points)
        repeated = np.resize(order, most)
        np.testing.assert_allclose(data.arrays.input[place].numpy(), points[repeated], atol=1e-6)
        assert data.arrays.part[place].tolist() == part[repeated].tolist()


def test_formats_agree(tmp_path: Path) -> None:
    made = [
        ShapeNetPartDataModule(write_shapenet(tmp_path / layout, layout, *EVEN), num_points=20, batch_size=7, seed=3)
        for layout in ("v0", "normal", "hdf5")
    ]
    assert [data.arrays.count for data in made] == [None, None, None]
    for name in ("train", "val", "test", "eval_train"):
        for first, *others in zip(*([data.transform(b) for b in getattr(data, f"{name}_dataloader")()] for data in made), strict=True):
            for other in others:
                torch.testing.assert_close(first.input, other.input, rtol=0, atol=1e-5)
                assert same(first._replace(input=other.input), other)
    assert made[2].files[:2] == ["ply_data_train0.h5/0", "ply_data_train0.h5/1"]


def test_order_of_the_categories_in_hdf5(tmp_path: Path) -> None:
    root = write_shapenet(tmp_path / "hdf5", "hdf5", *EVEN)
    expected = ShapeNetPartDataModule(root).arrays
    (root / "all_object_categories.txt").write_text("".join(f"{name}\t{SHAPENET}\n" for name in NAMES))
    assert torch.equal(ShapeNetPartDataModule(root).arrays.label, expected.label)
    for path in root.glob("*.h5"):
        with h5py.File(path, "a") as file:
            file["label"][...] = 15 - file["label"][...]
    (root / "all_object_categories.txt").write_text("".join(f"{name} 0\n" for name in reversed(NAMES)))
    assert torch.equal(ShapeNetPartDataModule(root).arrays.label, expected.label)
    (root / "all_object_categories.txt").write_text("Airplane 02691156\n")
    with pytest.raises(DataError, match="must list the 16 categories, it lists Airplane"):
        _ = ShapeNetPartDataModule(root).arrays


def test_a_folder_around_it(tmp_path: Path) -> None:
    write_shapenet(tmp_path / "outer" / "inner", "v0", CLOUDS, LISTS)
    (tmp_path / "outer" / "pictures").mkdir()
    assert ShapeNetPartDataModule(tmp_path / "outer").num_train == 48
    write_shapenet(tmp_path / "outer" / "other", "normal", CLOUDS, LISTS)
    with pytest.raises(DataError, match="holds ShapeNetPart 2 times, in inner and other: give one of them"):
        _ = ShapeNetPartDataModule(tmp_path / "outer").num_train


def test_a_shape_in_two_lists_is_in_the_later_one(root: Path) -> None:
    path = root / "train_test_split" / "shuffled_train_file_list.json"
    twice = [LISTS["val"][3], LISTS["test"][5]]
    path.write_text(json.dumps([f"shape_data/{name}" for name in [twice[0], *LISTS["train"], twice[1]]]))
    data = ShapeNetPartDataModule(root)
    assert len(data.files) == len(set(data.files)) == 80
    assert [int((data.arrays.split == split).sum()) for split in range(4)] == [48, 16, 16, 0]


# --- parts, classes, splits ---------------------------------------------------------------------------------------------------------


def test_parts_of_the_categories(root: Path) -> None:
    data = ShapeNetPartDataModule(root)
    assert data.num_parts == 50
    assert data.part_names[:5] == ["Airplane/0", "Airplane/1", "Airplane/2", "Airplane/3", "Bag/0"]
    assert data.part_names[-1] == "Table/2"
    assert data.part_classes == [cls for cls, parts in enumerate(SHAPENET.values()) for _ in range(parts)]
    # the official offsets
    assert [data.part_classes.index(cls) for cls in range(16)] == [0, 4, 6, 8, 12, 16, 19, 22, 24, 28, 30, 36, 38, 41, 44, 47]


@pytest.mark.parametrize(
    ("choice", "parts", "classes"),
    [
        (None, 6, [-1, -1, -1, -1, 10, 10]),
        (["Motorbike", "Table"], 6, [-1, -1, -1, 10, 10, 10]),
        (["chair"], 4, [4, 4, 4, 4]),
    ],
)
def test_labels_within_the_category(root: Path, choice: list[str] | None, parts: int, classes: list[int]) -> None:
    whole = ShapeNetPartDataModule(root, class_choice=choice, eval_points=10)
    data = ShapeNetPartDataModule(root, class_choice=choice, eval_points=10, part_labels="category")
    assert data.part_names == [str(part) for part in range(parts)]
    assert data.part_classes == classes
    first = torch.tensor([0, *np.cumsum(list(SHAPENET.values()))])
    for one, other in zip(data.val_dataloader(), whole.val_dataloader(), strict=True):
        found, expected = data.transform(one).part, whole.transform(other).part
        assert found is not None
        assert expected is not None
        assert torch.equal(found + first[one.label][:, None], expected)
    padded = ShapeNetPartDataModule(root, part_labels="category")
    batch = padded.transform(next(iter(padded.val_dataloader())))
    assert batch.part is not None
    assert padded.arrays.count is not None
    assert torch.equal((batch.part == -1).sum(1), batch.part.shape[1] - padded.arrays.count[batch.index])


def test_a_choice_of_classes_changes_no_number(root: Path) -> None:
    whole = ShapeNetPartDataModule(root)
    data = ShapeNetPartDataModule(root, class_choice=["Table", "cap"])
    assert data.num_classes == 16
    assert data.class_names == whole.class_names
    assert data.part_names == whole.part_names
    assert data.class_counts == [3 if name in ("Cap", "Table") else 0 for name in NAMES]
    chosen = torch.isin(whole.arrays.label, torch.tensor([2, 15]))
    assert torch.equal(data.arrays.split, whole.arrays.split.where(chosen, torch.tensor(UNUSED, dtype=torch.uint8)))
    assert torch.equal(data.arrays.label, whole.arrays.label)
    assert set(torch.cat([batch.label for batch in data.test_dataloader()]).tolist()) == {2, 15}


def test_training_and_validation_together(root: Path) -> None:
    data = ShapeNetPartDataModule(root, train_on="trainval")
    assert data.num_train == 64
    with pytest.raises(DataError, match="val split is empty"):
        data.val_dataloader()
    held = ShapeNetPartDataModule(root, train_on="trainval", val_fraction=0.25, split_seed=4)
    together = torch.tensor([TRAIN] * 64 + [TEST] * 16, dtype=torch.uint8)
    assert torch.equal(held.arrays.split, hold_out(together, held.arrays.label, 0.25, 4))
    chosen = ShapeNetPartDataModule(root, train_on="trainval", val_fraction=0.25, split_seed=4, class_choice=["Mug"])
    assert torch.equal(chosen.arrays.split[chosen.arrays.label == 11], held.arrays.split[held.arrays.label == 11])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train_on": "all"}, "train_on must be one of train, trainval"),
        ({"part_labels": "local"}, "part_labels must be one of global, category"),
        ({"class_choice": ["Cap", "Dog"]}, "class_choice must name some of Airplane, .*; got Dog"),
        ({"class_choice": []}, "class_choice must name some of .*; got none"),
        ({"farthest": -1}, "farthest must be at least 0"),
        ({"val_fraction": 1.0}, "sum to less than 1"),
        ({"subset": "first"}, "subset must be one of random, farthest"),
        ({"subset": "farthest", "num_points": 2048}, "needs the first 2458 points .* but 1280 are"),
        ({"subset": "farthest", "eval_points": 1281}, "needs the first 1281 points"),
        ({"subset": "farthest", "farthest": 0}, "but none are"),
    ],
)
def test_impossible_settings(root: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ShapeNetPartDataModule(root, **settings)


def test_farthest_subsets(root: Path) -> None:
    data = ShapeNetPartDataModule(
        root, subset="farthest", num_points=10, eval_points=15, normalization="none", augmentation=PLAIN, batch_size=8
    )
    evaluation = data.transform(next(iter(data.val_dataloader())))
    assert torch.equal(evaluation.input, data.arrays.input[evaluation.index, :15])
    seen: set[int] = set()
    for batch in data.train_dataloader():
        batch = data.transform(batch)
        stored = data.arrays.input[batch.index]
        distance = (batch.input[:, :, None] - stored[:, None]).abs().amax(-1)
        place = distance.argmin(2)
        assert (distance.amin(2) == 0).all()
        assert all(len(set(row)) == 10 for row in place.tolist())
        seen |= set(place.flatten().tolist())
    assert seen == set(range(12))


# --- broken and absent --------------------------------------------------------------------------------------------------------------


def _replace(path: Path, old: str, new: str) -> None:
    path.write_text(path.read_text().replace(old, new, 1))


def _break(root: Path) -> dict[str, str]:
    """Break shapes, each in another way; what is to be said about each."""
    names = LISTS["train"][:9]
    points = [root / name.replace("/", "/points/") for name in names]
    points = [path.with_name(f"{path.name}.pts") for path in points]
    labels = [root / name.replace("/", "/points_label/") for name in names]
    labels = [path.with_name(f"{path.name}.seg") for path in labels]
    points[0].write_bytes(b"")
    points[1].write_text("nan 0 0\n" + points[1].read_text().partition("\n")[2])
    points[2].write_text(points[2].read_text().rpartition(" ")[0] + "\n")
    points[3].write_text("".join(points[3].read_text().splitlines(keepends=True)[:-4]))
    labels[4].write_text("99\n" + labels[4].read_text().partition("\n")[2])
    labels[5].unlink()
    points[6].write_text("<html>404</html>\n")
    labels[7].write_text("1.5\n" + labels[7].read_text().partition("\n")[2])
    labels[8].write_text(" \n\n")
    reasons = [" is empty", "NaN or infinite", "columns changed", "points, but", "part label 99", "no ", "could not convert", "label 1.5"]
    return dict(zip(names, [*reasons, " is empty"], strict=True))


def test_all_that_is_broken_is_named(root: Path) -> None:
    broken = _break(root)
    with pytest.raises(DataError) as caught:
        _ = ShapeNetPartDataModule(root).num_train
    message = str(caught.value)
    assert message.startswith(f"9 of 80 listed shapes in {root} are broken: ")
    assert message.endswith(" and 4 more: fetch the archive anew, or leave them out with --data.skip_corrupt true")
    assert "\n" not in message
    for name, reason in list(broken.items())[:5]:
        assert name in message
        assert reason in message.partition(name)[2].partition(")")[0]
    with pytest.raises(DataError, match="9 of 80"):
        _ = ShapeNetPartDataModule(root, skip_missing=True).num_train
    for _ in range(2):  # packed, and found packed
        data = ShapeNetPartDataModule(root, skip_corrupt=True)
        with pytest.warns(UserWarning, match=r"9 of 80 .* are broken: .* and 4 more; they are left out"):
            assert data.files == [name for name in ORDER if name not in broken]
    with h5py.File(data.arrays.mapped) as file:
        found = dict(zip(file["corrupt"].asstr()[...], file["corrupt_reason"].asstr()[...], strict=True))
    assert found.keys() == broken.keys()
    assert all(reason in found[name] for name, reason in broken.items())
    with pytest.raises(DataError, match=r"9 of 80 .*skip_corrupt true"):
        _ = ShapeNetPartDataModule(root).num_train
    for place, name in enumerate(data.files):
        np.testing.assert_allclose(data.arrays.input[place, 0].numpy(), CLOUDS[name][0][0], atol=1e-6)


def test_broken_lines_of_the_release_with_normals(tmp_path: Path) -> None:
    root = write_shapenet(tmp_path / "shapes", "normal", CLOUDS, LISTS)
    first, second = (root / f"{name}.txt" for name in LISTS["test"][:2])
    first.write_text("0 0 0 1\n1 1 1 1\n")
    _replace(second, "\n", " 7 7\n")
    with pytest.raises(DataError, match=r"2 of 80 .* has 4 columns instead of 7.*columns changed from 9 to 7 at row 2"):
        _ = ShapeNetPartDataModule(root).num_train


def test_absent_shapes_are_counted_apart(root: Path) -> None:
    for name in LISTS["val"][:7]:
        for path in root.glob(f"{name.split('/')[0]}/*/{name.split('/')[1]}.*"):
            path.unlink()
    (root / LISTS["test"][0].replace("/", "/points/")).with_suffix(".pts").write_bytes(b"")
    with pytest.raises(DataError) as caught:
        _ = ShapeNetPartDataModule(root).num_train
    message = str(caught.value)
    assert message.startswith(f"7 of 80 listed shapes in {root} are absent: {', '.join(LISTS['val'][:5])} and 2 more; 1 of 80 are broken: ")
    assert message.endswith("leave them out with --data.skip_missing true and --data.skip_corrupt true")
    with pytest.raises(DataError, match=r"leave them out with --data\.skip_corrupt true"):
        _ = ShapeNetPartDataModule(root, skip_missing=True).num_train
    with pytest.warns(UserWarning, match="7 of 80 .* 1 of 80 .* are left out"):
        assert len(ShapeNetPartDataModule(root, skip_missing=True, skip_corrupt=True).files) == 72


def test_nothing_usable(root: Path) -> None:
    for synset in SHAPENET:
        for path in root.glob(f"{synset}/points/*"):
            path.write_bytes(b"")
    with pytest.raises(DataError, match=r"holds no shape that can be used: 80 of 80"):
        _ = ShapeNetPartDataModule(root, skip_corrupt=True).num_train


def test_broken_rows_of_hdf5(tmp_path: Path) -> None:
    root = write_shapenet(tmp_path / "hdf5", "hdf5", *EVEN)
    with h5py.File(root / "ply_data_train1.h5", "a") as file:
        file["data"][3, 5, 1] = np.inf
        file["pid"][4, 2] = 50
    with pytest.raises(DataError, match=r"2 of 80 .*train1.h5/3 \(NaN or infinite coordinates\), .*train1.h5/4 \(part label 50, those of"):
        _ = ShapeNetPartDataModule(root).num_train


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: (root / "ply_data_val0.h5").write_bytes(b"x"), r"ply_data_val0\.h5 cannot be read as HDF5"),
        (lambda root: [path.unlink() for path in root.glob("*val*")], r"lacks ply_data_val\*\.h5: fetch"),
        (lambda root: h5py.File(root / "ply_data_test0.h5", "a").__delitem__("pid"), r"ply_data_test0\.h5 has no data set pid"),
        (lambda root: h5py.File(root / "ply_data_test0.h5", "a")["label"].__setitem__(0, 16), "labels run from . to 16, but there are 16"),
    ],
)
def test_broken_files_of_hdf5(tmp_path: Path, spoil: Callable[[Path], Any], message: str) -> None:
    root = write_shapenet(tmp_path / "hdf5", "hdf5", *EVEN)
    spoil(root)
    with pytest.raises(DataError, match=message):
        _ = ShapeNetPartDataModule(root, skip_corrupt=True).num_train


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "cannot be read as JSON"),
        ("{}", "must be a list of shape_data/SYNSET/ID"),
        ('["shape_data/00000000/x"]', "lists 'shape_data/00000000/x', which is no shape_data/SYNSET/ID"),
        ('["x"]', "lists 'x'"),
    ],
)
def test_broken_lists(root: Path, content: str, message: str) -> None:
    (root / "train_test_split" / "shuffled_test_file_list.json").write_text(content)
    with pytest.raises(DataError, match=message):
        _ = ShapeNetPartDataModule(root).num_train


def test_absent_lists(root: Path) -> None:
    (root / "train_test_split" / "shuffled_val_file_list.json").unlink()
    with pytest.warns(UserWarning, match=r"lacks train_test_split/shuffled_val_file_list\.json: there are no shapes of those splits"):
        assert ShapeNetPartDataModule(root, val_fraction=0.34).num_train == 32
    (root / "train_test_split" / "shuffled_train_file_list.json").unlink()
    with pytest.raises(DataError, match="lacks the official split"):
        _ = ShapeNetPartDataModule(root).num_train


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing does not exist: give the folder of ShapeNetPart with --data\.root"):
        _ = ShapeNetPartDataModule(tmp_path / "nothing").num_train
    (tmp_path / "shapes.zip").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"shapes\.zip is a file: unpack it first"):
        _ = ShapeNetPartDataModule(tmp_path / "shapes.zip").num_train
    with pytest.raises(DataError, match="holds no ShapeNetPart"):
        _ = ShapeNetPartDataModule(tmp_path).num_train


# --- packed once --------------------------------------------------------------------------------------------------------------------


def test_a_second_start_opens_no_source_file(root: Path) -> None:
    first = ShapeNetPartDataModule(root).arrays
    opened: list[str] = []
    watching = True
    # It cannot be taken away again.
    sys.addaudithook(lambda event, arguments: opened.append(str(arguments[0])) if watching and event == "open" else None)
    again = ShapeNetPartDataModule(root).arrays
    watching = False
    assert torch.equal(again.input, first.input)
    assert again.mapped == root.parent / "shapenet.1280.h5"
    assert opened
    assert not [name for name in opened if name.startswith(f"{root}/")]


def test_what_was_stopped_goes_on(root: Path, parsed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapenet_part, "_CHUNK", 8)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    spy = shapenet_part._parse

    def stop(path: Path, columns: int) -> np.ndarray:
        if len(parsed) == 80:
            raise KeyboardInterrupt
        return spy(path, columns)

    monkeypatch.setattr(shapenet_part, "_parse", stop)
    threads = torch.get_num_threads()
    with pytest.raises(KeyboardInterrupt):
        _ = ShapeNetPartDataModule(root).arrays
    assert torch.get_num_threads() == threads
    assert not (root.parent / "shapenet.1280.h5").exists()
    assert len(list((root.parent / ".shapenet.1280.h5.parts").glob("*.npz"))) == 5
    monkeypatch.setattr(shapenet_part, "_parse", spy)
    half = set(parsed)
    # one of the files that were kept is broken, one is half written
    kept = sorted((root.parent / ".shapenet.1280.h5.parts").glob("*.npz"))
    kept[0].write_bytes(kept[0].read_bytes()[:100])
    (root.parent / ".shapenet.1280.h5.parts" / "x.tmp").write_bytes(b"x")
    parsed.clear()
    arrays = ShapeNetPartDataModule(root).arrays
    assert len(parsed) == 160 - 80 + 16
    assert len(half | set(parsed)) == 160
    assert {path.name for path in root.parent.iterdir()} == {"shapenet", "shapenet.1280.h5", ".shapenet.1280.h5.lock"}
    monkeypatch.undo()
    whole = ShapeNetPartDataModule(root, pack=root.parent / "whole.h5").arrays
    assert torch.equal(arrays.input, whole.input)
    assert arrays.part is not None
    assert whole.part is not None
    assert torch.equal(arrays.part, whole.part)


def test_mending_one_file_parses_its_neighbours_only(root: Path, parsed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapenet_part, "_CHUNK", 8)
    path = (root / LISTS["train"][0].replace("/", "/points/")).with_suffix(".pts")
    content = path.read_bytes()
    path.write_bytes(b"")
    with pytest.raises(DataError, match="1 of 80"):
        _ = ShapeNetPartDataModule(root).arrays
    path.write_bytes(content)
    parsed.clear()
    assert ShapeNetPartDataModule(root).num_train == 48
    assert len(parsed) == 16


def test_a_changed_folder_is_packed_anew(root: Path, parsed: list[str]) -> None:
    path = (root / LISTS["train"][0].replace("/", "/points/")).with_suffix(".pts")
    _ = ShapeNetPartDataModule(root).arrays
    for change in (lambda: os.utime(path, ns=(1, 1)), lambda: _replace(path, "\n", "0\n"), lambda: (root / "02691156" / "x.json").touch()):
        parsed.clear()
        change()
        _ = ShapeNetPartDataModule(root).arrays
        assert len(parsed) == (0 if (root / "02691156" / "x.json").exists() else 160)
    parsed.clear()
    _ = ShapeNetPartDataModule(root, farthest=16).arrays
    _ = ShapeNetPartDataModule(root).arrays
    assert len(parsed) == 160, "settings have packed files of their own"


def test_a_folder_that_is_read_only(root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != root.parent and allowed(path, mode))
    before = sorted(path.name for path in root.parent.iterdir())
    packed = ShapeNetPartDataModule(root).arrays.mapped
    assert packed is not None
    assert packed.parent == tmp_path / "home" / ".cache" / "litzoo"
    assert sorted(path.name for path in root.parent.iterdir() if path.name != "home") == before


def test_where_to_pack(root: Path, tmp_path: Path) -> None:
    (tmp_path / "place").mkdir()
    assert ShapeNetPartDataModule(root, pack=tmp_path / "place").arrays.mapped == tmp_path / "place" / "shapenet.1280.h5"
    assert ShapeNetPartDataModule(root, pack=tmp_path / "new" / "my.h5").arrays.mapped == tmp_path / "new" / "my.h5"
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["x"] = 1
    with pytest.raises(DataError, match=r"exists and was not packed from ShapeNetPart: give another file with --data\.pack"):
        _ = ShapeNetPartDataModule(root, pack=tmp_path / "other.h5").arrays
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="cannot be written"):
        _ = ShapeNetPartDataModule(root, pack=tmp_path / "file" / "a.h5").arrays


def test_two_processes_at_once(root: Path) -> None:
    script = (
        "import sys; from litzoo.datamodules import ShapeNetPartDataModule, shapenet_part as s; seen = []; parse = s._parse\n"
        "s._parse = lambda path, columns: (seen.append(path), parse(path, columns))[1]\n"
        "data = ShapeNetPartDataModule(sys.argv[1]); print(data.num_train, float(data.arrays.input.double().sum()), len(seen))"
    )
    started = [subprocess.Popen([sys.executable, "-c", script, str(root)], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    found = [process.communicate(timeout=120)[0].split() for process in started]
    assert found[0][:2] == found[1][:2]
    assert found[0][0] == "48"
    assert sorted(int(line[2]) for line in found) == [0, 160]


def test_nothing_is_said_about_good_data(root: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ShapeNetPartDataModule(root).num_train == 48
    shutil.rmtree(root)
