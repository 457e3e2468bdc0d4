"""Networks of timm as encoders: features against timm's own, training and what follows it without a network, mistakes."""

import json
import re
from pathlib import Path
from typing import Any
from urllib.error import URLError

import h5py
import pytest
import timm
import torch
import yaml
from huggingface_hub.errors import LocalEntryNotFoundError
from lightning.pytorch import Callback, Trainer
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms import v2

import litzoo
from litzoo.callbacks import DiscriminativeLR, GradualUnfreeze
from litzoo.datamodules import ImageFolderDataModule
from litzoo.zoo import EncoderClassifier, ImageEncoder, WeightsError
from litzoo.zoo.backbones import describe_pretrained
from litzoo.zoo.cli import main
from litzoo.zoo.image_input import ImageInput
from litzoo.zoo.pretrained import encoder_hparams

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
QUIET: dict[str, Any] = {
    **dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False),
    "accelerator": "cpu",
    "devices": 1,
}
CREATE = timm.create_model


def weights_of(name: str, **settings: Any) -> Any:
    """A network with the weights that stand for timm's."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        network = CREATE(name, **settings)
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.uniform_(-0.1, 0.1)
                module.running_var.uniform_(0.5, 2)
        return network


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The networks whose weights were asked for, which are drawn instead of downloaded."""
    asked: list[str] = []

    def create(name: str, pretrained: bool = False, **settings: Any) -> Any:
        if not pretrained:
            return CREATE(name, **settings)
        asked.append(name)
        return weights_of(name, **settings)

    monkeypatch.setattr(timm, "create_model", create)
    return asked


def cut_network(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def create(name: str, pretrained: bool = False, **settings: Any) -> Any:
        if pretrained:
            raise error
        return CREATE(name, **settings)

    monkeypatch.setattr(timm, "create_model", create)


# Features


@pytest.mark.parametrize(
    ("source", "name"), [("timm:test_resnet", "test_resnet.r160_in1k"), ("hf-hub:timm/test_vit.r160_in1k", "test_vit.r160_in1k")]
)
@pytest.mark.parametrize("size", [None, 48])
def test_features_are_those_of_timm(source: str, name: str, size: int | None, downloads: list[str]) -> None:
    settings: dict[str, Any] = {} if size is None or "vit" not in name else {"img_size": size}
    torch.manual_seed(1)
    expected_draw = torch.rand(3)
    torch.manual_seed(1)
    encoder: Any = litzoo.load_encoder(source if size is None or source.startswith("hf") else f"{source}@{size}")
    assert torch.equal(torch.rand(3), expected_draw), "loading draws no random numbers"
    assert downloads == [name]
    assert not encoder.training
    size = encoder.image_input.size
    settings = {"img_size": size} if "vit" in name else {}
    network = weights_of(name, num_classes=0, **settings).eval().double()
    config = timm.data.resolve_model_data_config(network)
    assert (encoder.hparams["image_mean"], encoder.hparams["image_std"]) == (list(config["mean"]), list(config["std"]))
    normalise = v2.Compose([v2.ToDtype(torch.float64, scale=True), v2.Normalize(config["mean"], config["std"])])

    images = torch.randint(0, 256, (3, 3, size, size), dtype=torch.uint8)
    with torch.no_grad():
        expected = network(normalise(images))
        torch.testing.assert_close(encoder.embed(images).double(), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(encoder.double().encode(normalise(images)), expected, rtol=1e-9, atol=1e-9)
    assert encoder.float().embed(images[0, :1]).shape == (1, expected.shape[1]), "one grey image"
    assert expected.std(dim=0).max() > 1e-3, "another image has other features"


@pytest.mark.parametrize(("mode", "other"), [("bicubic", "bilinear"), ("bilinear", "bicubic")])
def test_raw_images_are_resized_as_in_the_training_of_the_weights(mode: Any, other: str) -> None:
    image = torch.randint(0, 256, (3, 90, 70), dtype=torch.uint8)
    image[:, 30:60, 20:40] = 255  # where bicubic overshoots

    def expected(by: str) -> Tensor:
        resize = v2.Resize(32, v2.InterpolationMode(by), antialias=True)
        return v2.Compose([v2.CenterCrop(70), v2.ToDtype(torch.float64, scale=True), resize])(image).clamp(0, 1)

    found = ImageInput(3, 32, None, None, mode).prepare(image)[0][0]
    torch.testing.assert_close(found.double(), expected(mode), rtol=0, atol=1e-5)
    assert (found - expected(other)).abs().max() > 0.05


@pytest.mark.parametrize("kind", [str, Path, Image.open, lambda path: v2.PILToTensor()(Image.open(path)).numpy()])
def test_what_is_no_tensor_is_told_in_one_sentence(kind: Any, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    given, encoder = kind(tmp_path / "a.png"), ImageEncoder("conv4", image_size=16)
    for images in (given, [given]):
        with pytest.raises(ValueError, match=r"an image is a uint8 or float tensor .* torchvision.io.decode_image gives, got \w+$"):
            encoder.embed(images)


def test_settings_of_all_kinds_of_networks() -> None:
    """One of 60 networks with weights, of every size and family."""
    names = [name for name in timm.list_models(pretrained=True) if "sapiens2" not in name][::60]
    for name in names:
        found, config = describe_pretrained(name), timm.get_pretrained_cfg(name)
        assert found["backbone"]["name"] == name
        assert (found["in_channels"], found["image_size"], found["image_size"]) == config.input_size
        assert ("image_size" in found["backbone"]) == config.fixed_input_size
        assert (found["image_mean"], found["image_std"]) == (list(config.mean), list(config.std))
        ImageInput(found["in_channels"], *(found[key] for key in ("image_size", "image_mean", "image_std", "interpolation")))
        json.dumps(found)
    dinov2 = encoder_hparams("timm:vit_small_patch14_dinov2.lvd142m")
    assert (dinov2["image_size"], dinov2["backbone"]["image_size"], dinov2["interpolation"]) == (518, 518, "bicubic")
    assert encoder_hparams("timm:vit_small_patch14_dinov2@224")["backbone"] == {**dinov2["backbone"], "image_size": 224}
    assert encoder_hparams("timm:resnet18@32")["backbone"]["stem"] == "original", "small images leave the pretrained stem alone"


def test_weights_are_saved_and_loaded_without_timm(tmp_path: Path, downloads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    encoder: Any = litzoo.load("timm:test_vit@32")
    litzoo.save(encoder, tmp_path / "encoder.safetensors", {}, half=False)
    cut_network(monkeypatch, OSError("no network"))
    loaded: Any = litzoo.load_encoder(tmp_path / "encoder.safetensors")
    images = torch.randint(0, 256, (2, 3, 40, 36), dtype=torch.uint8)
    assert torch.equal(loaded.embed(images), encoder.embed(images))
    assert loaded.image_input == encoder.image_input
    batches: Any = Trainer(**QUIET).predict(loaded, DataLoader(loaded.image_input.prepare(images)[0]))
    torch.testing.assert_close(torch.cat(batches), encoder.embed(images))


# Training


class Watch(Callback):
    """Which parameters changed in which epoch, and the learning rates."""

    def __init__(self) -> None:
        self.changed: list[set[str]] = []
        self.rates: dict[str, float] = {}

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.before = {name: value.detach().clone() for name, value in pl_module.named_parameters()}
        self.rates = {group["name"]: group["lr"] for group in trainer.optimizers[0].param_groups}

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.changed.append({name for name, value in pl_module.named_parameters() if not torch.equal(value, self.before[name])})


def test_layer_groups_have_rates_and_start_one_after_another(downloads: list[str]) -> None:
    model = EncoderClassifier(
        "timm:test_vit@32",
        num_classes=2,
        freeze=False,
        encoder_lr_factor=1.0,
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
        lr_scheduler=None,
    )
    assert model.hparams["encoder"]["hparams"]["backbone"]["name"] == "test_vit.r160_in1k"
    groups = [r"embed|cls_token|reg_token|norm_pre", r"blocks\.[0-2]\.", r"blocks|norm|fc_norm", r"^head"]
    watch = Watch()
    data = DataLoader(TensorDataset(torch.randn(8, 3, 32, 32), torch.arange(8) % 3 // 2), batch_size=8)
    callbacks = [DiscriminativeLR(2.0, groups), GradualUnfreeze(1, groups), watch]
    Trainer(**QUIET, max_epochs=4, callbacks=callbacks).fit(model, data)
    assert sorted(watch.rates.values()) == pytest.approx([0.0125, 0.025, 0.05, 0.1])
    starts = {name: next(epoch for epoch, names in enumerate(watch.changed) if name in names) for name, _ in model.named_parameters()}
    for name, start in starts.items():
        assert start == 3 - next(depth for depth, pattern in enumerate(groups) if re.search(pattern, name)), name
    assert set(starts.values()) == {0, 1, 2, 3}


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("light", "dark"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for index in range(12):
            value = (200 if name == "light" else 20) + index
            Image.new("RGB", (50, 44), (value, value // 2, index)).save(tmp_path / "photos" / name / f"{index}.png")
    return tmp_path / "photos"


def state_of(path: Path | str) -> dict[str, Tensor]:
    return torch.load(path, weights_only=True)["state_dict"]


def test_fine_tuning_and_what_follows_it_without_a_network(photos: Path, downloads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    quiet = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false", "--trainer.callbacks", "null"]
    data = ["--data", "ImageFolderDataModule", "--data.path", "photos"]
    command = ["--config", "finetune", "--model.encoder", "timm:test_resnet@72", "--model.lr_scheduler", "null", *data, *quiet]
    assert main(["fit", *command, "--trainer.max_epochs", "2", "--name", "whole"]) == 0
    assert main(["fit", *command, "--trainer.max_epochs", "1"]) == 0
    run = Path("runs/finetune/version_0")
    settings = yaml.safe_load((run / "config.yaml").read_text())["data"]["init_args"]
    known = encoder_hparams("timm:test_resnet@72")
    assert [settings[name] for name in ("image_size", "mean", "std")] == [72, known["image_mean"], known["image_std"]]
    assert [path.name for path in photos.parent.glob("photos.*.h5")] == ["photos.72.crop.rgb.h5"], "packed at the size that is needed"

    cut_network(monkeypatch, LocalEntryNotFoundError("no network"))
    last = run / "checkpoints" / "last.ckpt"
    assert main(["fit", *command, "--trainer.max_epochs", "2", "--ckpt_path", "last"]) == 0
    whole, resumed = (state_of(f"runs/{name}/version_0/checkpoints/last.ckpt") for name in ("whole", "finetune"))
    assert all(torch.equal(whole[name], value) for name, value in resumed.items())
    named = [yaml.safe_load(path.read_text())["model"]["init_args"]["encoder"] for path in sorted(run.glob("config*.yaml"))]
    assert named == ["timm:test_resnet@72"] * 2, "a new run of this configuration starts from timm's weights, too"
    assert main(["test", *command]) == 0
    assert main(["predict", "photos", "--model", str(last), "--output", "classes.csv"]) == 0
    assert main(["embed", "--model", str(last), *data, "--output", "features.h5"]) == 0
    assert main(["export", str(last), "--output", "tuned.safetensors", "--full-precision"]) == 0
    tuned: Any = litzoo.load("tuned.safetensors")
    stored = ImageFolderDataModule("photos", image_size=72).arrays.input[:5]
    with h5py.File("features.h5") as file:
        index = torch.from_numpy(file["train/index"][:])
        position = int((index == index.min()).nonzero()[0])
        expected = tuned.encode(tuned.image_input.prepare(torch.as_tensor(stored[int(index.min())]))[0])
        torch.testing.assert_close(torch.from_numpy(file["train/features"][position]), expected[0].detach(), rtol=1e-4, atol=1e-4)
    assert main(["fit", *command]) == 2, "but a new training wants timm's weights"


def test_data_of_another_size(photos: Path, downloads: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    command = ["fit", "--config", "linear_eval", "--data", "ImageFolderDataModule", "--data.path", "photos", "--data.image_size", "48"]
    assert main([*command, "--model.encoder", "timm:test_resnet"]) == 2
    assert (
        "image_size 160, but that of the data is 48: set data.image_size to it, or take it at that size, timm:NAME@48"
        in capsys.readouterr().err
    )


def test_embed_takes_one_command(photos: Path, downloads: list[str]) -> None:
    data = ["--data", "ImageFolderDataModule", "--data.path", "photos"]
    assert main(["embed", "--model", "timm:test_vit@32", *data, "--output", "features.h5"]) == 0
    with h5py.File("features.h5") as file:
        assert set(file["train"]) == {"features", "label", "index"}, "features are not stored twice"
        assert file.attrs["image_size"] == 32
    assert main(["show", "embedding", "timm:test_vit@32", *data, "--features", "forward"]) == 2


def test_size_of_packed_images() -> None:
    size = lambda **settings: ImageFolderDataModule("nowhere", **settings).size
    assert [size(), size(image_size=32), size(image_size=224), size(size=48, image_size=224)] == [64, 64, 224, 48]


# Mistakes


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("timm:resnet118", "timm:resnet118: there is no backbone 'resnet118'; did you mean resnet18 "),
        ("hf-hub:timm/resnet118", "did you mean resnet18 "),
        ("timm:conv4", "there is no backbone 'conv4'"),
        ("timm:resnet18.foo", "'resnet18' has no weights 'foo'; there are a1_in1k, "),
        ("timm:skresnet50d", "no pretrained weights of 'skresnet50d'; it has those of "),
        ("timm:", "there is no backbone ''"),
        ("timm:resnet18@big", "the size of the images in pixels, such as timm:resnet18@224"),
        ("timm:resnet18@0", "the size of the images in pixels"),
        ("timm:vit_base_patch16_sapiens2", "images of 1024 x 768 pixels, but litzoo's are square: say of what size, @768"),
        ("timm:test_vit@4", "cannot be loaded: "),
    ],
)
def test_wrong_names(source: str, words: str, downloads: list[str]) -> None:
    for load in (litzoo.load_encoder, encoder_hparams) if "cannot be loaded" not in words else (litzoo.load_encoder,):
        with pytest.raises(WeightsError) as error:
            load(source)
        assert words in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("error", [LocalEntryNotFoundError("line 1\nline 2"), URLError("no route"), ConnectionError("no hub")])
def test_no_network(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_network(monkeypatch, error)
    with pytest.raises(WeightsError, match=r"^timm:test_vit: its weights .* HF_HUB_OFFLINE .* litzoo.save.*$"):
        EncoderClassifier("timm:test_vit", num_classes=2)


def test_other_faults_of_a_download(monkeypatch: pytest.MonkeyPatch) -> None:
    cut_network(monkeypatch, RuntimeError("Error(s) in loading state_dict"))
    with pytest.raises(WeightsError, match=r"^timm:test_vit cannot be loaded: Error\(s\) in loading"):
        litzoo.load("timm:test_vit")


def test_an_encoder_alone_has_no_classes(photos: Path, downloads: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "photos", "--model", "timm:test_vit@32"]) == 2
    command = "`litzoo embed --model timm:test_vit@32 --data ImageFolderDataModule --data.path DIR --output features.h5`"
    assert command in capsys.readouterr().err
    with pytest.raises(ValueError, match="has no linear classifier on its features to rescale"):
        EncoderClassifier("timm:test_vit@32", num_classes=2, head="tau_normalized")
    with pytest.raises(ValueError, match="interpolation must be one of bilinear, bicubic; got 'nearest'"):
        ImageEncoder("conv4", interpolation="nearest")  # type: ignore[arg-type]  # the mistake that is tested
