"""Weights files: what is saved comes back, and every way in which a file can be broken is told in one sentence."""

import functools
import hashlib
import json
import os
import stat
import zipfile
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI
from safetensors import safe_open
from torch import Tensor, nn

from litzoo import zoo
from litzoo.zoo import PointNetClassifier, WeightsError, list_models, load, load_encoder, pretrained, save, weights_files
from litzoo.zoo.cli.export import export
from litzoo.zoo.pretrained import load_checkpoint, read_checkpoint


class Tiny(LightningModule):
    """A model of every kind of state: parameters, float buffers, an integer buffer."""

    def __init__(self, width: int = 4, names: list[str] | None = None, act: Any = None) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def encode(self, x: Tensor) -> Tensor:
        return self.net(x)


class Blind(LightningModule):
    """A model that is no encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = nn.Linear(2, 2)


class Tied(LightningModule):
    """A model with shared weights."""

    def __init__(self) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.a = nn.Linear(2, 2, bias=False)
        self.b = nn.Linear(2, 2, bias=False)
        self.b.weight = self.a.weight


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    for cls in (Tiny, Blind, Tied):
        monkeypatch.setitem(zoo.MODELS, cls.__name__, "somewhere")
        monkeypatch.setattr(zoo, cls.__name__, cls, raising=False)


@pytest.fixture
def model() -> Tiny:
    torch.manual_seed(0)
    model = Tiny(width=5, names=["stuhl", "tür"])
    for _ in range(3):
        model.encode(torch.randn(8, 3))  # moves the running statistics and the batch counter
    return model


@pytest.fixture
def file(model: Tiny, tmp_path: Path) -> Path:
    path = tmp_path / "tiny.safetensors"
    save(model, path, {"summary": "a tiny model"})
    return path


@pytest.fixture
def bundle(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A weights folder with one trained model, `tiny_blobs`."""
    folder = tmp_path / "weights"
    folder.mkdir()
    path = folder / "tiny_blobs.safetensors"
    path.write_bytes(file.read_bytes())
    write_index(folder, {"tiny_blobs": {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "card": {}}})
    monkeypatch.setattr(weights_files, "WEIGHTS", folder)
    return path


def write_index(folder: Path, index: Any) -> None:
    (folder / "index.json").write_text(json.dumps(index))


def parts(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    with safe_open(path, "pt") as opened:
        return opened.metadata(), {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118


def forge(path: Path, tensors: dict[str, Tensor] | None = None, **header: str) -> None:
    """Change a weights file and give it the digest that fits: what damage cannot do, but a person or another version can."""
    old_header, old_tensors = parts(path)
    header, tensors = {**old_header, **header}, old_tensors if tensors is None else tensors
    header["digest"] = pretrained._digest(header, tensors)
    safetensors.torch.save_file(tensors, path, header)


def flip(path: Path, byte: int) -> None:
    data = bytearray(path.read_bytes())
    data[byte] ^= 1
    path.write_bytes(data)


def message(source: Any, *words: str) -> str:
    """What `load` says; one line, and it holds all the words."""
    with pytest.raises(WeightsError) as raised:
        load(source)
    text = str(raised.value)
    assert "\n" not in text
    for word in words:
        assert word in text
    return text


# What is saved comes back


def test_full_precision_comes_back_bit_by_bit(model: Tiny, tmp_path: Path) -> None:
    save(model, tmp_path / "m.safetensors", {}, half=False)
    loaded = load(tmp_path / "m.safetensors")
    assert type(loaded) is Tiny
    assert not loaded.training
    assert dict(loaded.hparams) == dict(model.hparams)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for key, value in model.state_dict().items():
        assert loaded.state_dict()[key].dtype == value.dtype
        assert torch.equal(loaded.state_dict()[key], value)


def test_half_precision_rounds_once_and_keeps_integers(model: Tiny, file: Path) -> None:
    _, stored = parts(file)
    loaded = load(str(file)).state_dict()
    for key, value in model.state_dict().items():
        if value.is_floating_point():
            assert stored[key].dtype == torch.float16
            assert loaded[key].dtype == torch.float32
            assert torch.equal(loaded[key], value.half().float())
        else:
            assert torch.equal(loaded[key], value)
    assert loaded["net.1.num_batches_tracked"].item() == 3


def test_header_is_text_that_says_all(model: Tiny, file: Path) -> None:
    header, _ = parts(file)
    assert header.keys() == {"litzoo", "model", "hparams", "card", "digest"}
    assert (header["litzoo"], header["model"]) == ("1", "Tiny")
    assert json.loads(header["hparams"]) == {"width": 5, "names": ["stuhl", "tür"], "act": None}
    assert json.loads(header["card"]) == {"summary": "a tiny model"}


def test_saving_keeps_the_model_as_it_is(model: Tiny, tmp_path: Path) -> None:
    model.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    save(model, tmp_path / "m.safetensors", {})
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_loading_and_saving_leave_the_random_state_alone(model: Tiny, file: Path) -> None:
    state = torch.get_rng_state()
    load(file)
    save(model, file, {})
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions_come_back_as_float32(model: Tiny, tmp_path: Path, dtype: torch.dtype) -> None:
    model.to(dtype)
    save(model, tmp_path / "m.safetensors", {}, half=False)
    loaded = load(tmp_path / "m.safetensors")
    assert torch.equal(loaded.net[0].weight, model.net[0].weight.float())


def test_tied_weights(tmp_path: Path) -> None:
    model = Tied()
    save(model, tmp_path / "m.safetensors", {}, half=False)
    loaded = load(tmp_path / "m.safetensors")
    assert torch.equal(loaded.a.weight, model.a.weight)
    assert loaded.b.weight is loaded.a.weight


def test_loaded_model_does_not_hang_on_the_file(file: Path) -> None:
    loaded = load(file)
    before = loaded.net[0].weight.clone()
    file.write_bytes(b"\0" * file.stat().st_size)
    assert torch.equal(loaded.net[0].weight, before)


def test_pointnet_round_trip(tmp_path: Path) -> None:
    model = PointNetClassifier(3, class_names=["a", "b", "c"], class_counts=[1, 2, 3], class_weights="balanced", feature_transform=False)
    save(model, tmp_path / "m.safetensors", {}, half=False)
    loaded = load_encoder(tmp_path / "m.safetensors")
    points = torch.rand(2, 32, 3)
    assert torch.equal(loaded(points), model.eval()(points))
    assert torch.equal(loaded.class_weight, model.class_weight)
    assert loaded.class_names == ["a", "b", "c"]


def test_model_of_the_command_line_hides_lightnings_own_entries(model: Tiny, tmp_path: Path) -> None:
    model.hparams["_class_path"], model.hparams["_instantiator"] = "litzoo.zoo.Tiny", "lightning.pytorch.cli.instantiate_module"
    save(model, tmp_path / "m.safetensors", {})
    assert "_class_path" not in json.loads(parts(tmp_path / "m.safetensors")[0]["hparams"])


# Names


def test_bundled_name(model: Tiny, bundle: Path) -> None:
    assert list_models() == ["tiny_blobs"]
    assert torch.equal(load("tiny_blobs").net[0].weight, model.net[0].weight.half().float())


def test_unknown_name(bundle: Path) -> None:
    message("tiny_blob", "no trained model 'tiny_blob'", "did you mean tiny_blobs?")
    message("zzz", "no trained model 'zzz'", "there are: tiny_blobs")


def test_no_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights_files, "WEIGHTS", tmp_path / "nowhere")
    assert list_models() == []
    message("tiny_blobs", "no trained model", "path of a .safetensors file")


def test_index_of_this_repository_is_whole() -> None:
    for name in list_models():
        assert not load(name).training


@pytest.mark.parametrize("index", [[], 3])
def test_index_is_no_table(bundle: Path, index: Any) -> None:
    write_index(bundle.parent, index)
    message("tiny_blobs", "index.json", "reinstall litzoo")


def test_index_is_not_json(bundle: Path, file: Path) -> None:
    (bundle.parent / "index.json").write_text("<<<<<<< HEAD")
    message("tiny_blobs", "index.json", "not JSON", "reinstall litzoo")
    load(file)  # a path needs no index


@pytest.mark.parametrize("entry", [None, {}, {"file": "tiny_blobs.safetensors"}, {"sha256": "0"}])
def test_incomplete_index_entry(bundle: Path, entry: Any) -> None:
    write_index(bundle.parent, {"tiny_blobs": entry})
    assert list_models() == ["tiny_blobs"]
    message("tiny_blobs", "entry of 'tiny_blobs'", "reinstall litzoo")


def test_bundled_file_is_missing(bundle: Path) -> None:
    bundle.unlink()
    message("tiny_blobs", "'tiny_blobs'", "is missing", "reinstall litzoo")


def test_bundled_file_is_a_pointer(bundle: Path) -> None:
    bundle.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 3\n")
    message("tiny_blobs", "git-lfs pointer", "git lfs pull")


@pytest.mark.parametrize("byte", [8, 100, -1])
def test_flipped_bit_by_name(bundle: Path, byte: int) -> None:
    flip(bundle, byte)
    message("tiny_blobs", "'tiny_blobs'", "sha256", "damaged or replaced", "reinstall litzoo")


def test_a_file_of_the_same_name_does_not_hide_a_bundled_model(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny_blobs").write_text("something else")
    assert isinstance(load("tiny_blobs"), Tiny)


# Files


def test_file_without_suffix(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file.rename("tiny")
    assert isinstance(load("tiny"), Tiny)


def test_missing_file(tmp_path: Path) -> None:
    message(tmp_path / "no.safetensors", "no.safetensors does not exist", "check the path")
    message("no.safetensors", "no.safetensors does not exist")
    message("some/folder/no", "some/folder/no does not exist")


def test_folder(tmp_path: Path) -> None:
    message(tmp_path, str(tmp_path), "is a folder")


@pytest.mark.parametrize("size", [1, 7, 8, 200, -1])
def test_truncated(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])
    message(file, str(file), "not a whole safetensors file", "copy it again")


def test_too_long(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0")
    message(file, "not a whole safetensors file")


def test_empty(file: Path) -> None:
    file.write_bytes(b"")
    message(file, str(file), "is empty", "copy it again")


def test_text(file: Path) -> None:
    file.write_text("<!DOCTYPE html><html><body>404: not found</body></html>")
    message(file, str(file), "not a whole safetensors file")


def test_git_lfs_pointer(file: Path) -> None:
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 3\n")
    message(file, str(file), "git-lfs pointer", "git lfs pull")


@pytest.mark.parametrize(
    ("header", "length", "words"),
    [
        ("{}", 1 << 62, "header too large"),
        ("{}", 90_000_000, "invalid header length"),
        ('{"a": {"dtype": "F32", "shape": [1099511627776], "data_offsets": [0, 4398046511104]}}', None, "file not fully covered"),
        ('{"a": {"dtype": "F32", "shape": [1099511627776], "data_offsets": [0, 4]}}', None, "invalid shape"),
        ('{"a": {"dtype": "F32", "shape": [4611686018427387904, 8], "data_offsets": [0, 4]}}', None, "overflow"),
        ('{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}', None, "invalid offset"),
        (
            '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
            None,
            "invalid offset",
        ),
        ("[" * 100_000, None, "not a whole safetensors file"),
    ],
)
def test_headers_that_claim_what_is_not_there(file: Path, header: str, length: int | None, words: str) -> None:
    file.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header.encode() + bytes(4))
    message(file, words)
    with pytest.raises(WeightsError, match=words):
        pretrained.read_header(file)


def test_flipped_bits_by_path(file: Path, tmp_path: Path) -> None:
    whole = file.read_bytes()
    broken = tmp_path / "broken.safetensors"
    for byte in range(0, len(whole), 3):
        data = bytearray(whole)
        data[byte] ^= 1 << byte % 8
        broken.write_bytes(data)
        message(broken, str(broken))


def test_flipped_bit_in_a_tensor(file: Path) -> None:
    flip(file, -1)
    message(file, str(file), "is damaged", "digest", "copy it again")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model", "Blind"),
        ("hparams", '{"act": null, "names": ["door", "chair"], "width": 5}'),
        ("card", "{}"),
        ("digest", "0" * 64),
        ("more", "text"),
    ],
)
def test_digest_covers_the_header(file: Path, key: str, value: str) -> None:
    header, tensors = parts(file)
    safetensors.torch.save_file(tensors, file, {**header, key: value})
    message(file, "is damaged", "digest")


def test_digest_covers_names_dtypes_and_shapes(file: Path) -> None:
    header, tensors = parts(file)
    weight = tensors["net.0.weight"]
    others = [
        {**tensors, "net.0.weight": weight.T.contiguous().view(weight.shape)},
        {**tensors, "net.0.weight": weight.view(weight.shape[::-1])},
        {**tensors, "net.0.weight": weight.view(torch.bfloat16)},
        {**tensors, "net.0.bias": tensors["net.1.bias"], "net.1.bias": tensors["net.0.bias"]},
    ]
    for changed in others:
        safetensors.torch.save_file(changed, file, header)
        message(file, "is damaged", "digest")


def test_without_digest(file: Path) -> None:
    header, tensors = parts(file)
    del header["digest"]
    safetensors.torch.save_file(tensors, file, header)
    message(file, "is damaged")


@pytest.mark.parametrize("header", [None, {"format": "pt"}])
def test_foreign_file(file: Path, header: dict[str, str] | None) -> None:
    safetensors.torch.save_file({"weight": torch.zeros(2)}, file, header)
    message(file, str(file), "not one of litzoo's", "litzoo export")


def test_newer_format(file: Path) -> None:
    forge(file, litzoo="2")
    message(file, "format '2'", "update litzoo")


def test_missing_key(file: Path) -> None:
    _, tensors = parts(file)
    del tensors["net.0.bias"]
    forge(file, tensors)
    message(file, str(file), "does not fit the Tiny of litzoo", "Missing key", "net.0.bias")


def test_wrong_shape(file: Path) -> None:
    forge(file, hparams='{"width": 6}')
    message(file, "does not fit the Tiny of litzoo", "size mismatch")


def test_unknown_hyper_parameter(file: Path) -> None:
    forge(file, hparams='{"widht": 5}')
    message(file, str(file), "does not fit the Tiny of litzoo", "unexpected keyword argument 'widht'")


@pytest.mark.parametrize("hparams", ["[]", "{", "3", "[" * 100_000])
def test_hyper_parameters_are_no_table(file: Path, hparams: str) -> None:
    forge(file, hparams=hparams)
    message(file, str(file))


@pytest.mark.parametrize("name", ["os.system", "Batch", "load", "WeightsError", "torch.nn.Linear", "__class__", ""])
def test_model_that_is_not_on_the_list(file: Path, name: str) -> None:
    forge(file, model=name)
    message(file, str(file), repr(name), "not a model of litzoo", "PointNetClassifier")


def test_checkpoint_is_refused_with_the_command(tmp_path: Path) -> None:
    path = tmp_path / "my run.ckpt"
    message(path, f"`litzoo export '{path}'`")
    torch.save({"state_dict": {}}, tmp_path / "disguised.safetensors")
    message(tmp_path / "disguised.safetensors", f"`litzoo export {tmp_path / 'disguised.safetensors'}`")


@pytest.mark.parametrize("device", ["cuda:77", "gpu", "meta:x"])
def test_device_that_is_not_there(file: Path, device: str) -> None:
    with pytest.raises(ValueError, match=f"cannot be put on device '{device}'"):
        load(file, device)


def test_nothing_is_unpickled(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("unpickled")

    monkeypatch.setattr("torch.load", refuse)
    monkeypatch.setattr("pickle.load", refuse)
    monkeypatch.setattr("pickle.loads", refuse)
    load_encoder(file)


# Saving


def test_saving_is_reproducible(model: Tiny, file: Path, tmp_path: Path) -> None:
    save(model, tmp_path / "again.safetensors", {"summary": "a tiny model"})
    assert parts(file)[0] == parts(tmp_path / "again.safetensors")[0]


def test_saved_files_are_readable_like_any_other(file: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("")
    assert stat.S_IMODE(file.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


@pytest.mark.parametrize("function", ["replace", "fsync"])
def test_failure_while_writing_leaves_the_old_file_and_no_other(
    model: Tiny, file: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    before = file.read_bytes()

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, function, full)
    with pytest.raises(OSError, match="No space left"):
        save(model, file, {"summary": "newer"})
    with pytest.raises(OSError, match="No space left"):
        save(model, file.with_name("new.safetensors"), {})
    assert list(file.parent.iterdir()) == [file]
    assert file.read_bytes() == before


def refused(model: LightningModule, path: Path, *words: str, card: dict[str, Any] | None = None, half: bool = True) -> None:
    with pytest.raises(WeightsError) as raised:
        save(model, path, card or {}, half)
    assert "\n" not in str(raised.value)
    for word in words:
        assert word in str(raised.value)
    assert not path.exists()


def test_hyper_parameters_that_are_not_json(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    refused(Tiny(act=lambda x: x), path, "hyper-parameters of Tiny: 'act'", "a function", "ignore=")
    refused(Tiny(act=Path("x")), path, "'act'", "Path")
    refused(Tiny(act=torch.nn.ReLU), path, "'act'", "type")
    refused(Tiny(act={"a": [1, {2, 3}]}), path, "'act': 'a'", "set")
    refused(Tiny(act={1: "a"}), path, "'act'", "text as keys", "1")
    refused(Tiny(act=float("nan")), path, "'act'", "nan")


def test_card_that_is_not_json(model: Tiny, tmp_path: Path) -> None:
    refused(model, tmp_path / "m.safetensors", "the card: 'accuracy'", "Tensor", card={"accuracy": torch.tensor(0.5)})


def test_overflow_of_half_precision(model: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    model.net[1].running_var[0] = 7e4
    refused(model, path, "net.1.running_var", "7e+04", "half=False")
    save(model, path, {}, half=False)
    assert load(path).net[1].running_var[0] == 7e4


def test_infinity_is_no_overflow(model: Tiny, tmp_path: Path) -> None:
    model.net[0].bias.data[0] = -torch.inf
    save(model, tmp_path / "m.safetensors", {})
    assert load(tmp_path / "m.safetensors").net[0].bias[0] == -torch.inf


def test_model_that_was_changed_after_it_was_built(model: Tiny, tmp_path: Path) -> None:
    model.net.append(nn.Linear(5, 2))
    refused(model, tmp_path / "m.safetensors", "could not be loaded again", "net.2.weight")


def test_models_of_others(tmp_path: Path) -> None:
    class Mine(Tiny):
        pass

    refused(Mine(), tmp_path / "m.safetensors", "Mine", "not one of litzoo's models")
    impostor = type("Tiny", (LightningModule,), {})
    refused(impostor(), tmp_path / "m.safetensors", "Tiny", "not one of litzoo's models")


def test_paths_that_cannot_be_used(model: Tiny, tmp_path: Path) -> None:
    refused(model, tmp_path / "m.bin", "must end in .safetensors")
    refused(model, tmp_path / "no" / "m.safetensors", "no folder", "make it first")


# Checkpoints


def write_checkpoint(path: Path, class_path: str | None = "litzoo.zoo.Tiny", **changes: Any) -> Tiny:
    model = Tiny(width=2)
    hparams = {"width": 2, "_instantiator": "os.system"}
    if class_path is not None:
        hparams["_class_path"] = class_path
    checkpoint = {"state_dict": model.state_dict(), "hyper_parameters": hparams, "epoch": 3, "global_step": 40}
    torch.save({**checkpoint, **changes}, path)
    return model


def checkpoint_message(path: Path, *words: str) -> None:
    with pytest.raises(WeightsError) as raised:
        load_checkpoint(path)
    assert "\n" not in str(raised.value)
    for word in (str(path), *words):
        assert word in str(raised.value)


@pytest.mark.parametrize("class_path", ["litzoo.zoo.Tiny", "litzoo.zoo.somewhere.Tiny"])
def test_checkpoint(tmp_path: Path, class_path: str) -> None:
    model = write_checkpoint(tmp_path / "last.ckpt", class_path)
    for loaded in (
        load_checkpoint(tmp_path / "last.ckpt"),
        load_encoder(tmp_path / "last.ckpt"),
        load_encoder(str(tmp_path / "last.ckpt")),
    ):
        assert type(loaded) is Tiny
        assert not loaded.training
        assert torch.equal(loaded.net[0].weight, model.net[0].weight)


def test_checkpoint_of_the_command_line(tmp_path: Path) -> None:
    arguments = [
        "--model=litzoo.zoo.PointNetClassifier",
        "--model.num_classes=3",
        "--model.feature_transform=false",
        "--model.optimizer=SGD",
    ]
    quiet = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["litzoo", *arguments])
        cli = LightningCLI(
            LightningModule,
            run=False,
            subclass_mode_model=True,
            auto_configure_optimizers=False,
            save_config_callback=None,
            seed_everything_default=False,
            trainer_defaults=quiet,
        )
    cli.trainer.strategy.connect(cli.model)
    cli.trainer.save_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    loaded = load_encoder(tmp_path / "last.ckpt")
    points = torch.rand(2, 16, 3)
    assert torch.equal(loaded(points), cli.model.eval()(points))


def test_checkpoint_of_a_plain_trainer(model: Tiny, tmp_path: Path) -> None:
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    checkpoint_message(tmp_path / "last.ckpt", "does not say which model", "litzoo fit", "litzoo.save")


@pytest.mark.parametrize(
    "class_path", ["os.system", "mine.Tiny", "litzoo.zoo.Batch", "litzoo.callbacks.Tiny", "litzoo.zoo.nowhere.Tiny", "Tiny"]
)
def test_checkpoint_of_a_model_that_is_not_on_the_list(tmp_path: Path, class_path: str) -> None:
    write_checkpoint(tmp_path / "last.ckpt", class_path)
    checkpoint_message(tmp_path / "last.ckpt", class_path, "not one of litzoo's models")


def test_checkpoint_with_python_objects(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "last.ckpt", extra=functools.partial(print))
    checkpoint_message(tmp_path / "last.ckpt", "functools.partial", "could run code", "ignore=")


def test_checkpoint_of_another_version(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "last.ckpt", state_dict={})
    checkpoint_message(tmp_path / "last.ckpt", "does not fit the Tiny of litzoo", "Missing key")


def test_broken_checkpoints(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    checkpoint_message(path, "does not exist")
    write_checkpoint(path)
    path.write_bytes(path.read_bytes()[:-100])
    checkpoint_message(path, "not a whole checkpoint")
    with zipfile.ZipFile(path, "w") as archive:  # whole, but for what it holds
        for name, content in (("data.pkl", b"\x80\x02\xff."), ("version", b"3\n"), ("byteorder", b"little")):
            archive.writestr(f"last/{name}", content)
    with pytest.raises(WeightsError, match="not a whole checkpoint") as raised:
        load_checkpoint(path)
    assert "weights_only" not in str(raised.value), "torch's advice is to run the code of the file"
    path.write_bytes(b"")
    checkpoint_message(path, "is empty")
    path.write_text("hello")
    checkpoint_message(path, "not a Lightning checkpoint")
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 3\n")
    checkpoint_message(path, "git-lfs pointer")
    torch.save({"weight": torch.zeros(2)}, path)
    checkpoint_message(path, "not a Lightning checkpoint")
    torch.save([1, 2], path)
    checkpoint_message(path, "not a Lightning checkpoint")
    write_checkpoint(path, hyper_parameters=None)
    checkpoint_message(path, "does not say which model")
    path.unlink()
    path.mkdir()
    checkpoint_message(path, "is a folder")


def test_packed_checkpoints_are_not_unpacked(model: Tiny, tmp_path: Path) -> None:
    whole, packed = tmp_path / "a.ckpt", tmp_path / "b.ckpt"
    torch.save({"state_dict": model.state_dict(), "zeros": torch.zeros(1_000_000)}, whole)
    with zipfile.ZipFile(whole) as archive, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as other:
        for entry in archive.infolist():
            other.writestr(entry.filename, archive.read(entry))
    with pytest.raises(WeightsError, match="is a packed archive, of 4 MB"):
        load_checkpoint(packed)


def test_encoder_needs_encode(tmp_path: Path) -> None:
    save(Blind(), tmp_path / "blind.safetensors", {})
    with pytest.raises(WeightsError, match=r"blind.safetensors holds a Blind, which has no encode\(\)"):
        load_encoder(tmp_path / "blind.safetensors")
    torch.save({"state_dict": Blind().state_dict(), "hyper_parameters": {"_class_path": "litzoo.zoo.Blind"}}, tmp_path / "b.ckpt")
    with pytest.raises(WeightsError, match="has no encode"):
        load_encoder(tmp_path / "b.ckpt")


# Hub


def test_hub(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(repo: str, name: str, revision: str | None = None, **others: Any) -> str:
        asked.append((repo, name, revision))
        return str(file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    for source in ("hf-hub:me/zoo", "hf-hub:me/zoo@v1.0", "hf-hub:me/zoo:sub/tiny.safetensors", "hf-hub:me/zoo@refs/pr/1:t.safetensors"):
        assert isinstance(load(source), Tiny)
    assert isinstance(load_encoder("hf-hub:me/zoo"), Tiny)
    assert asked == [
        ("me/zoo", "model.safetensors", None),
        ("me/zoo", "model.safetensors", "v1.0"),
        ("me/zoo", "sub/tiny.safetensors", None),
        ("me/zoo", "t.safetensors", "refs/pr/1"),
        ("me/zoo", "model.safetensors", None),
    ]
    flip(file, -1)
    message("hf-hub:me/zoo", "hf-hub:me/zoo is damaged", f"delete {file}")


def test_hub_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    message("hf-hub:me/zoo", "hf-hub:me/zoo", "not in the local cache", "HF_HUB_OFFLINE")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("RepositoryNotFoundError", "no repository me/zoo"),
        ("GatedRepoError", "no repository me/zoo"),
        ("RevisionNotFoundError", "no revision 'v9'"),
        ("RemoteEntryNotFoundError", "no file model.safetensors"),
        ("HfHubHTTPError", "cannot be fetched"),
        ("XetDownloadError", "cannot be fetched"),
    ],
)
def test_hub_says_no(monkeypatch: pytest.MonkeyPatch, name: str, words: str) -> None:
    from huggingface_hub import errors

    error_class = getattr(errors, name)

    def download(*args: Any, **kwargs: Any) -> str:
        raise error_class.__new__(error_class)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    message("hf-hub:me/zoo@v9", "hf-hub:me/zoo@v9", words)


@pytest.mark.parametrize("source", ["hf-hub:", "hf-hub:zoo", "hf-hub:me/zoo/more", "hf-hub:me/zoo@", "hf-hub:me/zoo:"])
def test_hub_address_that_is_none(source: str) -> None:
    message(source, source, "hf-hub:owner/repo")


def test_hub_gives_safetensors_only() -> None:
    message("hf-hub:me/zoo:last.ckpt", "not a .safetensors file")
    with pytest.raises(WeightsError, match="only those are loaded from the hub"):
        load_encoder("hf-hub:me/zoo:last.ckpt")


# litzoo export


def test_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "epoch=3-step=40.ckpt"
    model = write_checkpoint(path)
    output = path.with_suffix(".safetensors")
    assert export([str(path)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("Tiny, ")
    assert printed.endswith(f"{output}; load it with litzoo.load({str(output)!r})\n")
    assert printed.count("\n") == 1
    card = json.loads(parts(output)[0]["card"])
    about = {"summary": f"Tiny of {path.name}", "source": path.name, "litzoo": pretrained.__version__, "epoch": 3, "global_step": 40}
    assert card == read_checkpoint(path)[1] == about
    assert torch.equal(load(output).net[0].weight, model.net[0].weight.half().float())

    before = output.read_bytes()
    with pytest.raises(FileExistsError, match=r"exists already and is not overwritten.*--output"):
        export([str(path)])
    assert output.read_bytes() == before

    export([str(path), "--full-precision", "--output", str(tmp_path / "full.safetensors")])
    assert torch.equal(load(tmp_path / "full.safetensors").net[0].weight, model.net[0].weight)


def test_header_is_read_without_the_tensors(file: Path, model: Tiny) -> None:
    header = pretrained.read_header(file)
    assert header["model"] == "Tiny"
    assert header["hparams"] == {"width": 5, "names": ["stuhl", "tür"], "act": None}
    assert header["card"] == {"summary": "a tiny model"}
    foreign = file.with_name("foreign.safetensors")
    safetensors.torch.save_file({"a": torch.zeros(1)}, foreign)
    with pytest.raises(WeightsError, match="not one of litzoo's"):
        pretrained.read_header(foreign)


def test_checkpoint_of_a_plain_trainer_takes_the_name_of_its_model(tmp_path: Path, model: Tiny) -> None:
    path = tmp_path / "plain.ckpt"
    torch.save({"state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams), "epoch": 0, "global_step": 1}, path)
    with pytest.raises(WeightsError, match=r"does not say which model.*model="):
        load_checkpoint(path)
    loaded = load_checkpoint(path, model="Tiny")
    assert not loaded.training
    assert torch.equal(loaded.net[0].weight, model.net[0].weight)
    with pytest.raises(WeightsError, match="not one of litzoo's models"):
        load_checkpoint(path, model="os.system")


def test_export_mistakes(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="does not exist"):
        export([str(tmp_path / "no.ckpt")])
    write_checkpoint(tmp_path / "last.ckpt")
    with pytest.raises(WeightsError, match="must end in"):
        export([str(tmp_path / "last.ckpt"), "--output", str(tmp_path / "last.bin")])
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
