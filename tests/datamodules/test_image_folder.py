"""Folders of pictures: layouts, every mode of Pillow, broken files, and that nothing is decoded twice."""

import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from contract import write_folder
from PIL import Image

from litzoo.datamodules import DataError, HDF5ImagesDataModule, ImageFolderDataModule, image_folder
from litzoo.datamodules.splits import TEST, TRAIN, UNUSED, VAL, hold_out, stratified_split


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "pets")


def scene(height: int, width: int) -> np.ndarray:
    """A smooth colour picture, which survives JPEG, `(height, width, 3)` uint8."""
    y, x = np.mgrid[:height, :width] / max(height, width)
    waves = [np.sin(5 * x + 2 * y), np.cos(4 * y - x), np.sin(3 * x) * np.cos(6 * y)]
    return (127.5 + 120 * np.stack(waves, -1)).round().astype(np.uint8)


def one(tmp_path: Path, save: Callable[[Path], Any], name: str, **settings: Any) -> np.ndarray:
    """What becomes of a single picture: `(H, W, C)` uint8."""
    root = tmp_path / "one"
    shutil.rmtree(root, ignore_errors=True)
    for cls in ("a", "b"):
        (root / cls).mkdir(parents=True)
        save(root / cls / name)
    data = ImageFolderDataModule(root, pack=tmp_path / "one.h5", test_fraction=0.0, val_fraction=0.0, **settings)
    assert data.num_train == 2
    return data.arrays.input[0].permute(1, 2, 0).numpy()


# --- which class, which split -------------------------------------------------------------------------------------------------------


def test_classes_are_the_folders(root: Path) -> None:
    (root / "cat" / "kittens" / "small").mkdir(parents=True)
    shutil.copy(root / "cat" / "00.png", root / "cat" / "kittens" / "small" / "x.PNG")
    data = ImageFolderDataModule(root, size=16)
    assert data.class_names == ["cat", "dog", "eel"]
    assert data.files == sorted(str(path.relative_to(root)) for path in root.rglob("*.[pP]*"))
    assert len(data.files) == 61
    assert [data.class_names[label] for label in data.arrays.label] == [name.split("/")[0] for name in data.files]
    assert data.arrays.input.shape == (61, 3, 16, 16)
    assert torch.equal(data.arrays.split, stratified_split(data.arrays.label, 0.1, 0.15, 0))
    assert not torch.equal(ImageFolderDataModule(root, size=16, split_seed=1).arrays.split, data.arrays.split)


@pytest.mark.parametrize("val", ["val", "valid", "validation", "Val", None])
def test_official_splits(tmp_path: Path, val: str | None) -> None:
    root = tmp_path / "pets"
    folders = {"train": TRAIN, "test": TEST, **({val: VAL} if val else {})}
    for folder in folders:
        write_folder(root / folder, images=10, classes=("cat", "dog", "eel") if folder == "train" else ("dog", "emu"))
    data = ImageFolderDataModule(root, size=16, val_fraction=0.2)
    assert data.class_names == ["cat", "dog", "eel", "emu"]
    assert [data.class_names[label] for label in data.arrays.label] == [name.split("/")[1] for name in data.files]
    expected = torch.tensor([folders[name.split("/")[0]] for name in data.files], dtype=torch.uint8)
    assert torch.equal(data.arrays.split, expected if val else hold_out(expected, data.arrays.label, 0.2, 0))


def test_a_single_train_folder_is_no_split(tmp_path: Path) -> None:
    write_folder(tmp_path / "pets" / "train")
    data = ImageFolderDataModule(tmp_path / "pets", size=16)
    assert data.class_names == ["cat", "dog", "eel"]
    assert torch.equal(data.arrays.split, stratified_split(data.arrays.label, 0.1, 0.15, 0))


def test_train_and_val_leave_the_test_split_empty(tmp_path: Path) -> None:
    for folder in ("train", "val"):
        write_folder(tmp_path / "pets" / folder, images=3)
    data = ImageFolderDataModule(tmp_path / "pets", size=16)
    assert data.arrays.split.bincount().tolist() == [9, 9]
    with pytest.raises(DataError, match="the test split is empty"):
        data.test_dataloader()


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    write_folder(tmp_path / "vehicles", images=3, classes=("bus", "train"))
    assert ImageFolderDataModule(tmp_path / "vehicles", size=16).class_names == ["bus", "train"]


@pytest.mark.parametrize(("above", "name"), [("", "unlabelled"), ("train", "Unlabeled")])
def test_a_folder_without_label_trains_and_is_no_class(tmp_path: Path, above: str, name: str) -> None:
    root = write_folder(tmp_path / "pets" / above)
    (root / name).mkdir()
    for number in range(7):
        shutil.copy(root / "cat" / "00.png", root / name / f"{number}.png")
    if above:
        write_folder(tmp_path / "pets" / "test")
    data = ImageFolderDataModule(tmp_path / "pets", size=16, train_fraction=0.5)
    assert data.class_names == ["cat", "dog", "eel"]
    assert [name in file for file in data.files] == (data.arrays.label < 0).tolist()
    assert (data.arrays.split[data.arrays.label < 0] == TRAIN).all()
    assert sum(data.class_counts) == data.num_train - 7
    labelled = data.arrays.label >= 0
    alone = ImageFolderDataModule(write_folder(tmp_path / "alone"), size=16, train_fraction=0.5)
    if not above:
        assert torch.equal(data.arrays.split[labelled], alone.arrays.split), "the others are split as ever"
    assert HDF5ImagesDataModule(data.arrays.mapped).class_counts == ImageFolderDataModule(tmp_path / "pets", size=16).class_counts


def test_an_image_to_score_must_have_a_label(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_folder(tmp_path / "pets" / split)
    (tmp_path / "pets" / "test" / "unlabelled").mkdir()
    shutil.copy(tmp_path / "pets" / "test" / "cat" / "00.png", tmp_path / "pets" / "test" / "unlabelled" / "x.png")
    with pytest.raises(DataError, match=r"x\.png is for validation or test, but has no label: move it to .*pets/train/unlabelled"):
        ImageFolderDataModule(tmp_path / "pets", size=16).arrays  # noqa: B018  # read on first use


def test_hidden_files_are_ignored(root: Path) -> None:
    before = ImageFolderDataModule(root, size=16).files
    for hidden in (root / ".git", root / "cat" / ".thumbnails"):
        hidden.mkdir()
        shutil.copy(root / "cat" / "00.png", hidden / "x.png")
    (root / "cat" / "._00.png").write_bytes(b"resource fork")
    (root / ".DS_Store").write_bytes(b"")
    (root / "readme.txt").write_text("pets")
    (root / "cat" / "notes").write_text("no extension")
    assert ImageFolderDataModule(root, size=16).files == before


def test_links_are_followed_but_not_for_ever(root: Path, tmp_path: Path) -> None:
    write_folder(tmp_path / "elsewhere", classes=("fox",))
    (root / "fox").symlink_to(tmp_path / "elsewhere" / "fox")
    (root / "fox" / "loop").symlink_to(root)
    data = ImageFolderDataModule(root, size=16)
    assert data.class_names == ["cat", "dog", "eel", "fox"]
    assert len(data.files) == 80


def test_an_empty_folder_is_named(root: Path) -> None:
    (root / "annotations").mkdir()
    with pytest.warns(UserWarning, match=r"pets/annotations holds no image and is no class"):
        assert ImageFolderDataModule(root, size=16).num_classes == 3


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing does not exist: give the folder of the images with --data\.path"):
        _ = ImageFolderDataModule(tmp_path / "nothing").num_classes


def test_an_archive_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "pets.zip").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"pets\.zip is a file: unpack it first"):
        _ = ImageFolderDataModule(tmp_path / "pets.zip").num_classes


def test_no_images(tmp_path: Path) -> None:
    (tmp_path / "pets" / "cat").mkdir(parents=True)
    (tmp_path / "pets" / "cat" / "a.txt").write_text("")
    with pytest.raises(DataError, match=r"pets holds no images \(bmp, gif, jpeg, jpg, png"):
        _ = ImageFolderDataModule(tmp_path / "pets").num_classes


@pytest.mark.parametrize("below", ["", "train"])
def test_one_class(tmp_path: Path, below: str) -> None:
    write_folder(tmp_path / "pets" / below, classes=("cat",))
    with pytest.raises(DataError, match="has images of one class only, cat"):
        _ = ImageFolderDataModule(tmp_path / "pets").num_classes


@pytest.mark.parametrize(("stray", "place"), [("x.png", "pets/<class>/"), ("train/x.png", "pets/train/<class>/")])
def test_stray_images(tmp_path: Path, stray: str, place: str) -> None:
    root = write_folder(tmp_path / "pets" / stray.rpartition("/")[0], images=2)
    for name in ("x.png", "y.png"):
        shutil.copy(root / "cat" / "00.png", root / name)
    with pytest.raises(DataError, match=rf"pets/{stray} \(and 1 more\) lies in no class folder: move it to .*{place}"):
        _ = ImageFolderDataModule(tmp_path / "pets").num_classes


def test_splits_that_are_none(tmp_path: Path) -> None:
    for folder in ("test", "val"):
        write_folder(tmp_path / "pets" / folder, images=2)
    with pytest.raises(DataError, match="has the folders test, val, but no folder train"):
        _ = ImageFolderDataModule(tmp_path / "pets").num_classes
    for folder in ("train", "unlabelled"):
        write_folder(tmp_path / "pets" / folder, images=2)
    with pytest.raises(DataError, match="but unlabelled with images beside them"):
        _ = ImageFolderDataModule(tmp_path / "pets").num_classes


@pytest.mark.parametrize("setting", [{"size": 0}, {"fit": "squash"}, {"test_fraction": 1.0}])
def test_impossible_settings(root: Path, setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(setting))):
        ImageFolderDataModule(root, **setting)


# --- decoding -----------------------------------------------------------------------------------------------------------------------


def bicubic(pixels: int, start: float, length: float, size: int) -> np.ndarray:
    """Keys' cubic (a = -1/2), widened where it shrinks, as a matrix `(size, pixels)`; naive."""
    step = length / size
    weights = np.zeros((size, pixels))
    for i in range(size):
        for j in range(pixels):
            x = abs((j + 0.5) - (start + (i + 0.5) * step)) / max(step, 1)
            weights[i, j] = 1.5 * x**3 - 2.5 * x**2 + 1 if x < 1 else -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize(("height", "width"), [(40, 40), (33, 90), (120, 50), (9, 30), (1, 7)])
@pytest.mark.parametrize("fit", ["crop", "stretch"])
def test_resized_by_the_formula(tmp_path: Path, height: int, width: int, fit: str) -> None:
    picture = scene(height, width)
    found = one(tmp_path, Image.fromarray(picture).save, "a.png", size=24, fit=fit)
    high, wide = (min(height, width),) * 2 if fit == "crop" else (height, width)
    rows, columns = bicubic(height, (height - high) / 2, high, 24), bicubic(width, (width - wide) / 2, wide, 24)
    expected = np.einsum("ih,hwc,jw->ijc", rows, picture.astype(float), columns).clip(0, 255)
    assert np.abs(found - expected).max() <= 1.5  # the library rounds after each axis


def test_large_jpeg_is_decoded_coarsely_but_well(tmp_path: Path) -> None:
    picture = Image.fromarray(scene(1200, 1600))
    found = one(tmp_path, lambda path: picture.save(path, quality=95), "a.jpg", size=32)
    expected = picture.resize((32, 32), Image.Resampling.BICUBIC, box=(200, 0, 1400, 1200))
    assert np.abs(found.astype(float) - np.asarray(expected)).max() <= 3


def _palette(picture: Image.Image, path: Path) -> None:
    picture.quantize(256, dither=Image.Dither.NONE).save(path)


def _animation(picture: Image.Image, path: Path) -> None:
    picture.save(path, save_all=True, append_images=[Image.new("RGB", picture.size)], duration=10)


@pytest.mark.parametrize(
    ("name", "save", "tolerance"),
    [
        ("a.png", lambda picture, path: picture.save(path), 0),
        ("a.bmp", lambda picture, path: picture.save(path), 0),
        ("a.ppm", lambda picture, path: picture.save(path), 0),
        ("a.tif", lambda picture, path: picture.save(path), 0),
        ("a.TIFF", lambda picture, path: picture.save(path, compression="tiff_lzw"), 0),
        ("a.webp", lambda picture, path: picture.save(path, lossless=True), 0),
        ("a.jpg", lambda picture, path: picture.save(path, quality=98, subsampling=0), 4),
        ("a.jpeg", lambda picture, path: picture.convert("CMYK").save(path, quality=98), 6),
        ("b.tif", lambda picture, path: picture.convert("CMYK").save(path), 1),
        ("a.gif", _animation, 40),
        ("b.png", _palette, 40),
        ("c.png", lambda picture, path: picture.convert("RGBA").save(path), 0),
    ],
)
def test_formats_and_modes(tmp_path: Path, name: str, save: Callable[[Image.Image, Path], None], tolerance: int) -> None:
    picture = scene(32, 32)
    found = one(tmp_path, lambda path: save(Image.fromarray(picture), path), name, size=32)
    assert found.shape == (32, 32, 3)
    difference = np.abs(found.astype(int) - picture)
    assert difference.max() <= tolerance
    assert difference.mean() <= tolerance / 4


def test_transparency_lies_on_white(tmp_path: Path) -> None:
    pixels = np.zeros((16, 16, 4), np.uint8)
    pixels[:, :8] = (200, 100, 50, 255)
    pixels[:, 8:] = (0, 0, 0, 0)
    pixels[:8, 8:] = (0, 0, 255, 51)
    found = one(tmp_path, Image.fromarray(pixels).save, "a.png", size=16)
    assert found[0, 0].tolist() == [200, 100, 50]
    assert found[15, 15].tolist() == [255, 255, 255]
    assert found[0, 15].tolist() == [204, 204, 255]
    grey = Image.fromarray(np.stack([pixels[..., 0], pixels[..., 3]], -1), "LA")
    assert one(tmp_path, grey.save, "a.png", size=16, color=False)[15, 15].tolist() == [255]
    palette = Image.new("P", (16, 16), 1)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    found = one(tmp_path, lambda path: palette.save(path, transparency=1), "a.png", size=16)
    assert found[0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize("kind", ["png", "tif"])
def test_sixteen_bits(tmp_path: Path, kind: str) -> None:
    levels = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    found = one(tmp_path, Image.fromarray(levels).save, f"a.{kind}", size=16)
    assert found[..., 0].tolist() == np.rint(levels / 257).astype(int).tolist()
    assert (found == found[..., :1]).all()


def test_grey_and_black_and_white(tmp_path: Path) -> None:
    picture = scene(16, 16)
    found = one(tmp_path, Image.fromarray(picture).save, "a.png", size=16, color=False)
    luma = picture @ np.array([0.299, 0.587, 0.114])
    assert found.shape == (16, 16, 1)
    assert np.abs(found[..., 0] - luma).max() <= 1
    grey = Image.fromarray(picture[..., 0])
    assert (one(tmp_path, grey.save, "a.png", size=16) == picture[..., :1]).all()
    checks = Image.fromarray(np.indices((16, 16)).sum(0) % 2 == 0)
    assert checks.mode == "1"
    assert np.abs(one(tmp_path, checks.save, "a.png", size=4).astype(int) - 127.5).max() < 20


@pytest.mark.parametrize(("orientation", "turn"), [(3, lambda x: x[::-1, ::-1]), (6, lambda x: np.rot90(x, -1)), (2, lambda x: x[:, ::-1])])
def test_orientation_of_the_camera(tmp_path: Path, orientation: int, turn: Callable[[np.ndarray], np.ndarray]) -> None:
    picture = scene(24, 24)
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = one(tmp_path, lambda path: Image.fromarray(picture).save(path, exif=exif, quality=98, subsampling=0), "a.jpg", size=24)
    assert np.abs(found.astype(int) - turn(picture)).max() <= 5


# --- broken files -------------------------------------------------------------------------------------------------------------------


def spoil(root: Path, count: int = 8) -> list[str]:
    """Break files, each in another way; their names, in order."""
    image = Image.fromarray(scene(40, 40))
    image.save(root / "cat" / "cut.jpg")
    whole = (root / "cat" / "cut.jpg").read_bytes()
    (root / "cat" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "cat" / "empty.png").write_bytes(b"")
    (root / "dog" / "text.jpg").write_text("<html>404</html>")
    png = bytearray((root / "dog" / "00.png").read_bytes())
    png[-60:-40] = b"\xff" * 20
    (root / "dog" / "flipped.png").write_bytes(png)
    (root / "eel" / "gone.png").symlink_to(root / "nowhere.png")
    (root / "eel" / "head.png").write_bytes(bytes(png[:40]))
    Image.fromarray(np.random.default_rng(0).random((8, 8)).astype(np.float32)).save(root / "eel" / "real.tif")
    image.save(root / "eel" / "zzz.gif")
    (root / "eel" / "zzz.gif").write_bytes((root / "eel" / "zzz.gif").read_bytes()[:30])
    return [
        "cat/cut.jpg",
        "cat/empty.png",
        "dog/flipped.png",
        "dog/text.jpg",
        "eel/gone.png",
        "eel/head.png",
        "eel/real.tif",
        "eel/zzz.gif",
    ][:count]


def test_all_broken_files_are_counted_and_five_named(root: Path) -> None:
    names = spoil(root)
    with pytest.raises(DataError) as caught:
        _ = ImageFolderDataModule(root, size=16).num_classes
    message = str(caught.value)
    assert message.startswith(f"8 of 68 images in {root} cannot be read: cat/cut.jpg (")
    assert all(name in message for name in names[:5])
    assert not any(name in message for name in names[5:])
    assert "and 3 more: remove or replace them, or leave them out with --data.skip_corrupt true" in message
    assert "\n" not in message
    left = {path.name for path in root.parent.iterdir()}
    assert left <= {"pets", ".pets.16.crop.rgb.h5.lock"}, "nothing half written stays"


def test_skip_corrupt_leaves_them_out(root: Path) -> None:
    clean = ImageFolderDataModule(root, size=16, pack=root.parent / "clean.h5")
    expected = dict(zip(clean.files, clean.arrays.input, strict=True))
    names = spoil(root)
    for again in range(2):  # the second time, nothing is decoded, but they are named all the same
        data = ImageFolderDataModule(root, size=16, skip_corrupt=True)
        with pytest.warns(UserWarning, match=r"8 of 68 images in .* cannot be read: cat/cut\.jpg .* they are left out"):
            _ = data.arrays
        unused = [data.files[index] for index in data.indices(UNUSED)]
        assert unused == names, again
        assert sum(data.class_counts) == data.num_train
        good = torch.tensor([name not in names for name in data.files])
        # and which images train does not depend on them
        assert torch.equal(data.arrays.split[good], clean.arrays.split)
        for name, image in zip(data.files, data.arrays.input, strict=True):
            assert name in names or torch.equal(image, expected[name])
    with pytest.raises(DataError, match=r"8 of 68 .*skip_corrupt true"):
        _ = ImageFolderDataModule(root, size=16).arrays
    for name in names:
        (root / name).unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(ImageFolderDataModule(root, size=16).files) == 60


def test_nothing_but_broken_files(tmp_path: Path) -> None:
    for cls in ("a", "b"):
        (tmp_path / "bad" / cls).mkdir(parents=True)
        (tmp_path / "bad" / cls / "x.png").write_bytes(b"no")
    with pytest.raises(DataError, match="2 of 2 images"):
        _ = ImageFolderDataModule(tmp_path / "bad", skip_corrupt=True).arrays


# --- packed once --------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that were decoded since it was last cleared."""
    seen: list[str] = []
    original = image_folder._decode

    def spy(path: str, *settings: Any) -> np.ndarray:
        seen.append(path)
        return original(path, *settings)

    monkeypatch.setattr(image_folder, "_decode", spy)
    return seen


def test_an_unchanged_folder_is_decoded_once(root: Path, decoded: list[str]) -> None:
    first = ImageFolderDataModule(root, size=16).arrays
    assert sorted(decoded) == sorted(map(str, root.rglob("*.png")))
    decoded.clear()
    again = ImageFolderDataModule(root, size=16)
    assert torch.equal(again.arrays.input, first.input)
    assert again.arrays.mapped == root.parent / "pets.16.crop.rgb.h5"
    assert not decoded


def test_a_changed_folder_is_packed_anew(root: Path, decoded: list[str]) -> None:
    _ = ImageFolderDataModule(root, size=16).arrays

    def add() -> None:
        shutil.copy(root / "cat" / "00.png", root / "dog" / "new.png")

    def replace() -> None:
        Image.new("RGB", (20, 20), "red").save(root / "cat" / "00.png")

    def touch() -> None:
        os.utime(root / "cat" / "01.png", ns=(1, 1))

    def rename() -> None:
        (root / "cat" / "02.png").rename(root / "dog" / "02b.png")

    def remove() -> None:
        (root / "cat" / "03.png").unlink()

    for change in (add, replace, touch, rename, remove):
        change()
        decoded.clear()
        data = ImageFolderDataModule(root, size=16)
        assert len(data.files) == len(data.arrays.input) == len(decoded) == len(list(root.rglob("*.png"))), change.__name__
    index = data.files.index("cat/00.png")
    assert data.arrays.input[index, :, 0, 0].tolist() == [255, 0, 0]


def test_settings_do_not_overwrite_each_other(root: Path, decoded: list[str]) -> None:
    settings: list[dict[str, Any]] = [{"size": 16}, {"size": 20}, {"size": 16, "fit": "stretch"}, {"size": 16, "color": False}]
    for setting in settings:
        _ = ImageFolderDataModule(root, **setting).arrays
    assert len(list(root.parent.glob("pets.*.h5"))) == 4
    decoded.clear()
    for setting in settings:
        data = ImageFolderDataModule(root, **setting)
        assert data.arrays.input.shape == (60, 3 if setting.get("color", True) else 1, setting["size"], setting["size"])
    assert not decoded


def test_many_blocks(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = ImageFolderDataModule(root, size=16).arrays.input.clone()
    monkeypatch.setattr(image_folder, "_BLOCK", 1)
    assert torch.equal(ImageFolderDataModule(root, size=16, pack=root.parent / "blocks.h5").arrays.input, whole)


def test_packed_file_is_an_image_file(root: Path) -> None:
    """What was packed is read by the other DataModule as well."""
    for folder in ("train", "test"):
        write_folder(root / folder, images=4)
    for cls in ("cat", "dog", "eel"):
        shutil.rmtree(root / cls)
    data = ImageFolderDataModule(root, size=16, pack=root.parent / "packed.h5")
    arrays = data.arrays
    other = HDF5ImagesDataModule(root.parent / "packed.h5").arrays
    assert torch.equal(other.input, arrays.input)
    assert torch.equal(other.label, arrays.label)
    assert torch.equal(other.split, arrays.split)
    assert other.class_names == arrays.class_names
    with h5py.File(root.parent / "packed.h5") as file:
        assert file["file"].asstr()[...].tolist() == data.files


def test_pack_into_a_folder_or_under_a_name(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "scratch").mkdir()
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    data = ImageFolderDataModule(root, size=16, pack="$SCRATCH")
    assert data.arrays.mapped == tmp_path / "scratch" / "pets.16.crop.rgb.h5"
    data = ImageFolderDataModule(root, size=16, pack="$SCRATCH/new/mine.h5")
    assert data.arrays.mapped == tmp_path / "scratch" / "new" / "mine.h5"
    assert [path.name for path in (tmp_path / "scratch" / "new").glob("[!.]*")] == ["mine.h5"]


def test_a_file_of_somebody_else_is_not_overwritten(root: Path, tmp_path: Path) -> None:
    with h5py.File(tmp_path / "mine.h5", "w") as file:
        file["results"] = [1, 2, 3]
    with h5py.File(tmp_path / "cifar10.h5", "w") as file:
        file.attrs["source"] = "another data set"
    (tmp_path / "mine.txt").write_text("precious")
    for name in ("mine.h5", "cifar10.h5", "mine.txt"):
        before = (tmp_path / name).read_bytes()
        with pytest.raises(DataError, match="was not packed from a folder of images"):
            _ = ImageFolderDataModule(root, size=16, pack=tmp_path / name).arrays
        assert (tmp_path / name).read_bytes() == before


def test_cache_where_the_place_beside_is_not_writable(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decoded: list[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != root.parent and allowed(path, mode))
    packed = ImageFolderDataModule(root, size=16).arrays.mapped
    assert packed is not None
    assert packed.parent == tmp_path / "home" / ".cache" / "litzoo"
    assert packed.name.endswith("-pets.16.crop.rgb.h5")
    # a file that lies beside the folder already is used, though
    beside = root.parent / "pets.16.crop.rgb.h5"
    shutil.copy(packed, beside)
    decoded.clear()
    assert ImageFolderDataModule(root, size=16).arrays.mapped == beside
    assert not decoded


def test_nowhere_to_pack(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(DataError, match=r"with --data\.pack"):
        _ = ImageFolderDataModule(root, size=16).arrays


def test_names_that_are_no_unicode(root: Path) -> None:
    odd = os.fsencode(root / "cat") + b"/caf\xe9.png"
    shutil.copy(root / "cat" / "00.png", odd)
    data = ImageFolderDataModule(root, size=16)
    assert len(data.arrays.input) == 61
    index = [os.fsencode(name) for name in data.files].index(b"cat/caf\xe9.png")
    assert torch.equal(data.arrays.input[index], data.arrays.input[data.files.index("cat/00.png")])


def test_path_resolves_home_and_variables(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(root.parent))
    monkeypatch.setenv("PETS", str(root))
    monkeypatch.chdir(root)
    for path in ("~/pets", "$PETS", ".", "../pets/"):
        assert ImageFolderDataModule(path, size=16).arrays.mapped == root.parent / "pets.16.crop.rgb.h5"
