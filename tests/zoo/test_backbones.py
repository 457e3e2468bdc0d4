"""Encoders: against hand-written forward passes, published parameter counts, and the widths and kernels of timm itself."""

import json
import subprocess
import sys
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litzoo.zoo import create_backbone, resolve_backbone
from litzoo.zoo.backbones import CIFAR_RESNETS, SHRINKAGE_RESNETS, CifarResNet, Conv4, Shortcut, ShrinkageResNet


def shaken(module: nn.Module) -> nn.Module:
    """In evaluation mode and float64, with BatchNorm statistics that are not at their neutral start."""
    for layer in module.modules():
        if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
            layer.running_mean.normal_(std=0.1)
            layer.running_var.uniform_(0.5, 2.0)
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, std=0.1)
    return module.double().eval()


class Reader:
    """Takes the tensors of a state in the order of the network, so that a reference needs none of its names."""

    def __init__(self, module: nn.Module) -> None:
        self.tensors = [value for key, value in module.state_dict().items() if not key.endswith("num_batches_tracked")]

    def conv(self, x: Tensor, stride: int = 1) -> Tensor:
        """3 x 3 convolution by unfolding."""
        kernel = self.tensors.pop(0)
        height = (x.shape[2] - 1) // stride + 1
        return (kernel.flatten(1) @ F.unfold(x, 3, padding=1, stride=stride)).view(len(x), len(kernel), height, -1)

    def bn(self, x: Tensor) -> Tensor:
        """BatchNorm by its formula, channels in the second dimension."""
        weight, bias, mean, var = (self.tensors.pop(0).view(1, -1, *[1] * (x.dim() - 2)) for _ in range(4))
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    def conv_bn(self, x: Tensor, stride: int = 1) -> Tensor:
        """3 x 3 convolution by unfolding, then BatchNorm by its formula."""
        return self.bn(self.conv(x, stride))


# --- our own nets ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [8, 20])
@pytest.mark.parametrize("shortcut", ["pad", "conv"])
def test_cifar_resnet_against_a_hand_written_forward(depth: int, shortcut: Shortcut) -> None:
    model = shaken(CifarResNet(depth, shortcut=shortcut))
    images = torch.randn(2, 3, 32, 32).double()
    reader = Reader(model)
    x = reader.conv_bn(images).clamp(min=0)
    for stage in range(3):
        for block in range((depth - 2) // 6):
            stride = 2 if stage > 0 and block == 0 else 1
            before = x
            x = reader.conv_bn(reader.conv_bn(x, stride).clamp(min=0))
            if stride == 2:
                before = before[:, :, ::2, ::2]  # every other pixel
                if shortcut == "conv":
                    before = reader.bn(torch.einsum("ckij,bkhw->bchw", reader.tensors.pop(0), before))
                else:  # and as many channels of zeros
                    before = torch.cat([before, torch.zeros_like(before)], dim=1)
            x = (x + before).clamp(min=0)
    assert not reader.tensors
    assert x.shape == (2, 64, 8, 8)
    torch.testing.assert_close(model(images), x.sum((2, 3)) / 64, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("name", "published"), [("resnet20", 0.27), ("resnet32", 0.46), ("resnet56", 0.85), ("resnet8", None)])
def test_cifar_resnet_has_the_published_number_of_parameters(name: str, published: float | None) -> None:
    model = create_backbone(resolve_backbone(name))
    n = (CIFAR_RESNETS[name] - 2) // 6
    convolutions = 9 * (3 * 16 + 2 * n * 16**2 + 16 * 32 + (2 * n - 1) * 32**2 + 32 * 64 + (2 * n - 1) * 64**2)
    norms = 2 * (16 + 2 * n * (16 + 32 + 64))
    count = sum(p.numel() for p in model.parameters())
    assert count == convolutions + norms
    if published is not None:  # table 6, with the linear layer of ten classes, in millions
        assert round((count + 650) / 1e6, 2) == published
    assert sum(isinstance(layer, nn.Conv2d) for layer in model.modules()) + 1 == CIFAR_RESNETS[name]


@pytest.mark.parametrize("name", SHRINKAGE_RESNETS)
def test_shrinkage_resnet_against_a_hand_written_forward(name: str) -> None:
    depth, shared = SHRINKAGE_RESNETS[name]
    model = shaken(create_backbone(name))
    assert isinstance(model, ShrinkageResNet)
    images = torch.randn(2, 3, 32, 32).double()
    reader = Reader(model)
    x = reader.conv(images)
    for stage in range(3):
        for block in range((depth - 2) // 6):
            stride = 2 if stage > 0 and block == 0 else 1
            shortcut = x
            if stride == 2:
                shortcut = torch.cat([x[:, :, ::2, ::2], torch.zeros_like(x[:, :, ::2, ::2])], dim=1)
            x = reader.conv(reader.bn(x).clamp(min=0), stride)
            x = reader.conv(reader.bn(x).clamp(min=0))
            average = x.abs().sum((2, 3)) / x[0, 0].numel()
            hidden = reader.bn(average @ reader.tensors.pop(0).mT).clamp(min=0)
            weight, bias = reader.tensors.pop(0), reader.tensors.pop(0)
            alpha = 1 / (1 + torch.exp(-(hidden @ weight.mT + bias)))
            tau = alpha * average.sum(dim=1, keepdim=True) / average.shape[1] if shared else alpha * average
            tau = tau[:, :, None, None].expand_as(x)
            x = torch.where(x > tau, x - tau, torch.where(x < -tau, x + tau, 0)) + shortcut
    x = reader.bn(x).clamp(min=0)
    assert not reader.tensors
    assert x.shape == (2, 64, 8, 8)
    torch.testing.assert_close(model(images), x.sum((2, 3)) / 64, rtol=1e-9, atol=1e-9)


def test_shrinkage_thresholds_learn() -> None:
    """Every parameter has a gradient, which DDP waits for."""
    model = create_backbone(resolve_backbone("rsnet20_cw", in_channels=1))
    model(torch.randn(4, 1, 8, 8)).square().sum().backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None, name
        assert bool(weight.grad.any()), name


def test_conv4_against_a_hand_written_forward() -> None:
    model = shaken(Conv4(in_channels=2))
    for size in (28, 32):
        images = torch.randn(2, 2, size, size).double()
        reader = Reader(model)
        x = images
        for _ in range(3):
            x = reader.conv_bn(x).clamp(min=0)
            even = x[:, :, : x.shape[2] // 2 * 2, : x.shape[3] // 2 * 2]
            x = (even[:, :, ::2, ::2] + even[:, :, 1::2, ::2] + even[:, :, ::2, 1::2] + even[:, :, 1::2, 1::2]) / 4
        x = reader.conv_bn(x).clamp(min=0)
        assert not reader.tensors
        torch.testing.assert_close(model(images), x.flatten(2).sum(2) / x[0, 0].numel(), rtol=1e-9, atol=1e-9)
    # 8, 16, 32 and 64 channels, without biases but those of BatchNorm
    assert sum(p.numel() for p in model.parameters()) == 9 * (2 * 8 + 8 * 16 + 16 * 32 + 32 * 64) + 2 * (8 + 16 + 32 + 64)


@pytest.mark.parametrize("name", ["conv4", "resnet8", "rsnet20_cs"])
@pytest.mark.parametrize(("size", "channels"), [(28, 1), (32, 3), (64, 4), (96, 3)])
def test_own_nets_take_images_of_any_size_and_channels(name: str, size: int, channels: int) -> None:
    encoder = create_backbone(resolve_backbone(name, channels, size))
    assert encoder(torch.randn(2, channels, size, size)).shape == (2, 64)
    assert encoder.num_features == 64


def test_own_nets_start_as_he_says() -> None:
    for module in (CifarResNet(56), Conv4()):
        for layer in module.modules():
            if isinstance(layer, nn.Conv2d) and layer.weight.numel() > 4000:
                assert float(layer.weight.detach().std()) == pytest.approx((2 / (9 * layer.out_channels)) ** 0.5, rel=0.05)


def test_own_names_are_not_names_of_timm() -> None:
    assert not {"conv4", *CIFAR_RESNETS, *SHRINKAGE_RESNETS} & set(timm.list_models())
    with pytest.raises(ValueError, match="6n \\+ 2, such as 20, got 18"):
        CifarResNet(18)
    with pytest.raises(ValueError, match="6n \\+ 2, such as 20, got 18"):
        ShrinkageResNet(18, shared=True)


# --- timm ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backbone", "width", "grid"),  # grid: what is left of 32 pixels before the global pooling
    [
        ("resnet18", 512, 4),
        ("resnet50", 2048, 4),
        ("resnet18d", 512, 4),
        ("resnet10t", 512, 4),
        ("resnetv2_18", 512, 4),
        ("convnext_atto", 320, 4),
        ("densenet121", 1024, 4),
        ("efficientnet_b0", 1280, 2),
        ("tf_efficientnet_lite0", 1280, 2),
        ("regnetx_002", 368, 2),
        ("regnetv_040", 1088, 2),
        ("mobilenetv3_small_050", 1024, 2),
        ("mobilenetv2_050", 1280, 2),
        ("ghostnet_050", 1280, 2),
        ({"name": "vit_tiny_patch16_224", "patch_size": 4}, 192, None),
        ("mambaout_femto", 1152, None),
    ],
)
def test_width_is_what_comes_out(backbone: Any, width: int, grid: int | None) -> None:
    description = resolve_backbone(backbone, image_size=32)
    assert description["stem"] == ("original" if grid is None else "small")
    encoder = create_backbone(description).eval()
    images = torch.zeros(2, 3, 32, 32)
    with torch.no_grad():
        assert encoder(images).shape == (2, encoder.num_features) == (2, width)
        if grid is not None:
            assert encoder.network.forward_features(images).shape[2:] == (grid, grid)


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050"])
def test_computes_and_learns(name: str) -> None:
    encoder = create_backbone(resolve_backbone(name, in_channels=1, image_size=32))
    features = encoder(torch.randn(2, 1, 32, 32))
    assert features.isfinite().all()
    features.square().sum().backward()
    assert all(p.grad is not None for p in encoder.parameters())


def test_small_resnet_against_torchvision() -> None:
    from torchvision.models import resnet18

    reference = resnet18(num_classes=10)
    reference.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    reference.maxpool = reference.fc = nn.Identity()
    encoder = create_backbone(resolve_backbone("resnet18", image_size=32))
    assert encoder.network.conv1.weight.detach().std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.1), "He's, for the new kernel"
    reference.load_state_dict(encoder.network.state_dict())
    reference, encoder = shaken(reference), encoder.double().eval()
    encoder.network.load_state_dict(reference.state_dict())
    images = torch.randn(2, 3, 32, 32).double()
    torch.testing.assert_close(encoder(images), reference(images), rtol=1e-9, atol=1e-9)


def test_original_stem_is_timm_as_it_is() -> None:
    torch.manual_seed(3)
    encoder = create_backbone(resolve_backbone("resnet18", image_size=96)).eval()
    torch.manual_seed(3)
    expected = timm.create_model("resnet18", num_classes=0).eval()
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(encoder(images), expected(images))


@pytest.mark.parametrize(("name", "first", "crop"), [("resnet18", "conv1", (2, 5)), ("convnext_atto", "stem.0", (0, 3))])
def test_pretrained_weights_are_kept_and_the_stem_is_their_centre(
    name: str, first: str, crop: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    create, start, stop = timm.create_model, *crop
    donor = create(name, num_classes=0)

    def download(name: str, pretrained: bool, **settings: Any) -> nn.Module:
        asked.append(pretrained)
        network = create(name, **settings)
        network.load_state_dict(donor.state_dict())
        return network

    monkeypatch.setattr(timm, "create_model", download)
    encoder = create_backbone(resolve_backbone(name, image_size=32), pretrained=True)
    assert asked == [True]
    for key, value in encoder.network.state_dict().items():
        expected = donor.state_dict()[key]
        assert torch.equal(value, expected[:, :, start:stop, start:stop] if key == f"{first}.weight" else expected), key


def test_pretrained_that_is_not_there() -> None:
    for name in ("conv4", "resnet20"):
        with pytest.raises(ValueError, match=f"no pretrained weights of '{name}'"):
            create_backbone(name, pretrained=True)
    with pytest.raises(ValueError, match="timm has no pretrained weights of 'skresnet50d'"):
        create_backbone("skresnet50d", pretrained=True)


def test_timm_is_imported_when_it_is_needed() -> None:
    code = "import sys, litzoo.zoo.backbones as b; b.create_backbone('conv4'); assert not {'timm', 'torchvision'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- descriptions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backbone", "channels", "size", "expected"),
    [
        ("conv4", 1, 28, {"name": "conv4", "in_channels": 1, "stem": "original"}),
        ("resnet20", 3, 32, {"name": "resnet20", "in_channels": 3, "stem": "original"}),
        ("resnet18", 3, 64, {"name": "resnet18", "in_channels": 3, "stem": "small"}),
        ("resnet18", 3, 65, {"name": "resnet18", "in_channels": 3, "stem": "original"}),
        ("resnet18", 3, None, {"name": "resnet18", "in_channels": 3, "stem": "original"}),
        ("resnet18.a1_in1k", 3, 32, {"name": "resnet18.a1_in1k", "in_channels": 3, "stem": "small"}),
        ({"name": "resnet18", "stem": "small"}, 3, 224, {"name": "resnet18", "in_channels": 3, "stem": "small"}),
        ({"name": "resnet18", "stem": "original", "in_channels": 1}, 3, 32, {"name": "resnet18", "in_channels": 1, "stem": "original"}),
        (
            {"name": "convnext_atto", "drop_path_rate": 0.1, "ls_init_value": None},
            3,
            32,
            {"name": "convnext_atto", "in_channels": 3, "stem": "small", "drop_path_rate": 0.1},
        ),
        (
            {"name": "vit_tiny_patch16_224", "patch_size": 4},
            3,
            32,
            {"name": "vit_tiny_patch16_224", "in_channels": 3, "stem": "original", "image_size": 32, "patch_size": 4},
        ),
        ({"name": "resnet8", "shortcut": "conv"}, 3, 32, {"name": "resnet8", "in_channels": 3, "stem": "original", "shortcut": "conv"}),
        ({"name": "resnet8", "shortcut": "pad"}, 3, 32, {"name": "resnet8", "in_channels": 3, "stem": "original"}),
        ("vit_tiny_patch16_224", 3, None, {"name": "vit_tiny_patch16_224", "in_channels": 3, "stem": "original"}),
    ],
)
def test_description(backbone: Any, channels: int, size: int | None, expected: dict[str, Any]) -> None:
    description = resolve_backbone(backbone, channels, size)
    assert description == expected
    assert json.loads(json.dumps(description)) == description
    assert resolve_backbone(description) == description


def test_what_a_description_says_of_itself_wins() -> None:
    for backbone in ("resnet18", "conv4"):
        description = resolve_backbone(backbone, 1, 32)
        assert resolve_backbone(description, 7, 999) == description
    description = resolve_backbone({"name": "vit_tiny_patch16_224", "patch_size": (4, 4)}, image_size=32)
    assert description["patch_size"] == [4, 4]
    assert resolve_backbone(description, 1, 64) == description


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        ("resnet81", "no backbone 'resnet81'; did you mean resnet8"),
        ("conv5", "did you mean conv4"),
        ("hf-hub:timm/resnet18.a1_in1k", "no backbone 'hf-hub:timm/resnet18.a1_in1k'"),
        ("zzzzzzzz", "there are conv4, .* and timm.list_models"),
        ("resnet18.nobody", "backbone 'resnet18' has no weights 'nobody'; there are .*a1_in1k"),
        ({"stem": "small"}, "a name or a mapping with a name"),
        ({"name": "resnet18", "stem": "tiny"}, "must be 'auto', 'small' or 'original', got 'tiny'"),
        ({"name": "vit_tiny_patch16_224", "stem": "small"}, "'vit_tiny_patch16_224' has no small-image stem"),
        ({"name": "resnet20", "stem": "small"}, "'resnet20' has no small-image stem"),
        ({"name": "resnet20", "shortcut": "zeros"}, "shortcut of backbone 'resnet20' must be 'pad' or 'conv', got 'zeros'"),
        ({"name": "conv4", "shortcut": "conv"}, "'conv4' takes no further settings, but got 'shortcut'"),
        ({"name": "conv4", "width": 64}, "'conv4' takes no further settings, but got 'width'"),
        ({"name": "resnet18", "pretrained": True}, "never holds pretrained"),
        ({"name": "resnet18", "pretrained": False}, "never holds pretrained"),
        ({"name": "resnet18", "in_chans": 1}, "call it in_channels"),
        ({"name": "resnet18", "global_pool": ""}, "leave global_pool out"),
        ({"name": "resnet18", "checkpoint_path": "x.pt"}, "weights are no part of a description"),
        ({"name": "resnet18", "act_layer": nn.GELU}, "'act_layer' of backbone 'resnet18' is a type; a checkpoint can hold"),
        ({"name": "resnet18", "in_channels": 0}, "in_channels of backbone 'resnet18' must be a positive integer, got 0"),
        ({"name": "resnet18", "image_size": 32.5}, "image_size of backbone 'resnet18' must be a positive integer, got 32.5"),
    ],
)
def test_mistakes(backbone: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        resolve_backbone(backbone)
    assert "\n" not in str(raised.value)


def test_arguments_that_the_model_does_not_take() -> None:
    with pytest.raises(ValueError, match=r"timm cannot build the backbone 'resnet18' with patch_size=4: .*patch_size"):
        create_backbone({"name": "resnet18", "patch_size": 4})


def test_no_network_for_pretrained_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: object, **kwargs: object) -> None:
        raise FileNotFoundError("cannot find the requested files in the local cache")

    monkeypatch.setattr("timm.create_model", offline)
    with pytest.raises(ValueError, match="could not be downloaded: connect to the Hugging Face hub once"):
        create_backbone("resnet18", pretrained=True)
