"""Image encoders: timm's models, with a stem for small images where asked, the ResNets of CIFAR, also with soft thresholds, and Conv-4."""

import difflib
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from .layers.soft_threshold import SoftThreshold

CIFAR_RESNETS = {"resnet8": 8, "resnet20": 20, "resnet32": 32, "resnet56": 56}
# Depth, and whether the channels share their threshold.
SHRINKAGE_RESNETS = {"rsnet20_cs": (20, True), "rsnet20_cw": (20, False)}
_OWN = ("conv4", *CIFAR_RESNETS, *SHRINKAGE_RESNETS)
Shortcut = Literal["pad", "conv"]  # options A and B of the paper
_SMALL_IMAGE = 64  # stem "auto" is "small" up to here

# timm's file of a model -> where its stem is, and the poolings that follow. Nets of the same file have the same attributes.
_STEMS: dict[str, tuple[str, tuple[str, ...]]] = {
    **dict.fromkeys(("resnet", "res2net", "resnest", "sknet"), ("conv1", ("maxpool",))),
    **dict.fromkeys(("efficientnet", "mobilenetv3", "hardcorenas", "ghostnet"), ("conv_stem", ())),
    **dict.fromkeys(("convnext", "regnet", "rexnet"), ("stem", ())),
    "resnetv2": ("stem", ("stem.pad", "stem.pool")),
    "densenet": ("features.conv0", ("features.pool0",)),
}

# Arguments of timm.create_model that are not the user's, and what to do instead.
_RESERVED = {
    "pretrained": "a description never holds pretrained: give pretrained=True to create_backbone or to the model",
    "in_chans": "call it in_channels",
    "img_size": "call it image_size",
    "num_classes": "an encoder has no classes: leave num_classes out",
    "global_pool": "an encoder pools as its paper does: leave global_pool out",
    "features_only": "an encoder gives pooled features: leave features_only out",
    **dict.fromkeys(
        ("checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"),
        "weights are no part of a description: load them into the model that create_backbone gives",
    ),
}


def resolve_backbone(backbone: str | Mapping[str, Any], in_channels: int = 3, image_size: int | None = None) -> dict[str, Any]:
    """Turn a name or a mapping into the one full description of an encoder, which a checkpoint can store.

    What a mapping says of itself wins over the arguments, so that a description that is resolved already gives itself.

    Args:
        backbone: "conv4", "resnet8", "resnet20", "resnet32", "resnet56", "rsnet20_cs", "rsnet20_cw" or a name of
            `timm.list_models()`; or a mapping with that `name` and, each optional, `stem`, `in_channels`, `image_size` and more arguments of
            `timm.create_model`, such as `drop_path_rate`. "resnet8", "resnet20", "resnet32" and "resnet56"
            take a `shortcut`, "pad" (default) or "conv", see `CifarResNet`. Stem "small" is for small images: 3 x 3, stride 1, no pooling;
            "original" is the one of the paper; "auto", the default, is "small" if `image_size` is at most 64 and there is
            a small stem for this model, which is so for ResNet and its kin, ConvNeXt, DenseNet, EfficientNet, MobileNet
            and RegNet.
        in_channels: channels of the images.
        image_size: height and width of the images in pixels, where they are known.

    Returns:
        `name`, `in_channels`, `stem` ("small" or "original"), `image_size` if the model is built for one size (such as
        vision transformers), and what else the mapping held; all plain values.

    Raises:
        ValueError: if there is no such model, a value is not plain or impossible, or stem "small" is asked of a model
            that has none.

    Example:
        >>> resolve_backbone("resnet18", image_size=32)
        {'name': 'resnet18', 'in_channels': 3, 'stem': 'small'}
        >>> resolve_backbone({"name": "vit_tiny_patch16_224", "patch_size": 4}, image_size=32)
        {'name': 'vit_tiny_patch16_224', 'in_channels': 3, 'stem': 'original', 'image_size': 32, 'patch_size': 4}
    """
    given: dict[str, Any] = {"name": backbone} if isinstance(backbone, str) else dict(backbone)
    if type(given.get("name")) is not str:
        raise ValueError(f"a backbone is a name or a mapping with a name, got {backbone!r}")
    name, stem = given.pop("name"), given.pop("stem", "auto")
    in_channels = given.pop("in_channels", in_channels)
    image_size = given.pop("image_size", image_size)
    if stem not in ("auto", "small", "original"):
        raise ValueError(f"the stem of backbone {name!r} must be 'auto', 'small' or 'original', got {stem!r}")
    _check_count(name, "in_channels", in_channels)
    if image_size is not None:
        _check_count(name, "image_size", image_size)
    extras = {str(key): _plain(name, str(key), value) for key, value in given.items() if value is not None}
    for key in extras:
        if key in _RESERVED:
            raise ValueError(f"backbone {name!r} cannot take {key!r}: {_RESERVED[key]}")

    if name in _OWN:
        shortcut = extras.pop("shortcut", "pad") if name in CIFAR_RESNETS else "pad"
        if shortcut not in ("pad", "conv"):
            raise ValueError(f"the shortcut of backbone {name!r} must be 'pad' or 'conv', got {shortcut!r}")
        if extras:
            raise ValueError(f"backbone {name!r} takes no further settings, but got {', '.join(map(repr, extras))}")
        has_small, sized = False, False
        if shortcut != "pad":  # the default is left out, as in older checkpoints
            extras["shortcut"] = shortcut
    else:
        has_small, sized = _ask_timm(name)
    if stem == "small" and not has_small:
        raise ValueError(
            f"backbone {name!r} has no small-image stem that litzoo knows how to make: leave stem out, or set it to 'original'"
        )
    if stem == "auto":
        stem = "small" if has_small and image_size is not None and image_size <= _SMALL_IMAGE else "original"
    description = {"name": name, "in_channels": in_channels, "stem": stem}
    if sized and image_size is not None:
        description["image_size"] = image_size
    return {**description, **extras}


def create_backbone(description: str | Mapping[str, Any], pretrained: bool = False) -> nn.Module:
    """Build an encoder: images `(B, C, H, W)` -> globally pooled features `(B, num_features)`.

    With the small stem, the first convolution is 3 x 3, every convolution of the stem has stride 1, and the poolings of the
    stem are gone. With `pretrained`, all other weights are timm's, and the new first convolution starts from the centre
    3 x 3 of the pretrained kernel (of a 4 x 4 kernel, its upper left 3 x 3).

    Args:
        description: what `resolve_backbone` takes or gives.
        pretrained: start from timm's weights, which are downloaded; only for timm's models.

    Returns:
        A module with the attribute `num_features`.

    Raises:
        ValueError: if the description is wrong, timm cannot build it, or pretrained weights do not exist or cannot be downloaded.

    Example:
        >>> encoder = create_backbone({"name": "resnet18", "stem": "small"})
        >>> encoder(torch.rand(2, 3, 32, 32)).shape, encoder.num_features
        (torch.Size([2, 512]), 512)

    Source:
        The small stem is the one of Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations",
        ICML 2020, appendix B.9.
    """
    extras = resolve_backbone(description)
    name, in_channels, stem = extras.pop("name"), extras.pop("in_channels"), extras.pop("stem")
    if name in _OWN:
        if pretrained:
            raise ValueError(f"there are no pretrained weights of {name!r}: set pretrained to false")
        if name in SHRINKAGE_RESNETS:
            return ShrinkageResNet(*SHRINKAGE_RESNETS[name], in_channels)
        return Conv4(in_channels) if name == "conv4" else CifarResNet(CIFAR_RESNETS[name], in_channels, **extras)

    import timm

    if pretrained and not timm.is_model_pretrained(name):
        raise ValueError(f"timm has no pretrained weights of {name!r}: set pretrained to false")
    if "image_size" in extras:
        extras["img_size"] = extras.pop("image_size")
    try:
        network = timm.create_model(name, pretrained=pretrained, num_classes=0, in_chans=in_channels, **extras)
    except (TypeError, ValueError, AssertionError) as error:
        settings = ", ".join(f"{key}={value!r}" for key, value in extras.items()) or "its defaults"
        raise ValueError(f"timm cannot build the backbone {name!r} with {settings}: {error or type(error).__name__}") from error
    except OSError as error:
        raise ValueError(
            f"the pretrained weights of {name!r} could not be downloaded: connect to the Hugging Face hub once, or set pretrained to false ({error})"
        ) from error
    if stem == "small":
        _make_stem_small(network, *_STEMS[_timm_file(name)], keep_weights=pretrained)
    return TimmEncoder(network)


def describe_pretrained(name: str, image_size: int | None = None) -> dict[str, Any]:
    """The arguments of an `ImageEncoder` for timm's weights of a name: the network, and the images that it was trained on.

    Nothing is downloaded.

    Args:
        name: of `timm.list_models(pretrained=True)`; without the part behind the point, timm's choice of weights.
        image_size: height and width of the images in place of those of the training.

    Returns:
        `backbone`, `in_channels`, `image_size`, `image_mean`, `image_std` and `interpolation`, plain values.

    Raises:
        ValueError: if timm has no such network or no weights of it, or they want images that are not square.

    Example:
        >>> describe_pretrained("resnet18")["backbone"]
        {'name': 'resnet18.a1_in1k', 'in_channels': 3, 'stem': 'original'}
    """
    import timm
    from timm.data import resolve_data_config

    config = _check_timm(name)
    if config is None or not timm.is_model_pretrained(name):
        close = difflib.get_close_matches(name, timm.list_models(pretrained=True), n=3, cutoff=0.6)
        hint = f"it has those of {' and '.join(close)}" if close else "timm.list_models(pretrained=True) names those that it has"
        raise ValueError(f"timm has no pretrained weights of {name!r}; {hint}")
    known = resolve_data_config(pretrained_cfg=config.to_dict())
    channels, height, width = known["input_size"]
    if image_size is None and height != width:
        raise ValueError(
            f"{name!r} was trained on images of {height} x {width} pixels, but litzoo's are square: say of what size, @{width}"
        )
    size = height if image_size is None else image_size
    # Its own stem, however small the images: the weights are those of the whole network.
    described = {"name": ".".join(filter(None, (config.architecture, config.tag))), "stem": "original"}
    return {
        "backbone": resolve_backbone(described, channels, size),
        "in_channels": channels,
        "image_size": size,
        "image_mean": list(known["mean"]),
        "image_std": list(known["std"]),
        "interpolation": known["interpolation"],
    }


class TimmEncoder(nn.Module):
    """A timm model without its classifier.

    Args:
        network: made with `num_classes=0`.

    Example:
        >>> TimmEncoder(timm.create_model("resnet18", num_classes=0)).num_features
        512
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        # Not num_features: some models widen the features between their pooling and their classifier.
        self.num_features = int(network.head_hidden_size)  # type: ignore[arg-type]

    def forward(self, images: Tensor) -> Tensor:
        """`(B, C, H, W)` -> `(B, num_features)`."""
        return self.network(images)


class Conv4(nn.Module):
    """Conv-4: four times 3 x 3 convolution, BatchNorm, ReLU and average pooling, with 8, 16, 32 and 64 channels.

    The first three poolings are 2 x 2 with stride 2, the last is global. Images of any size from 8 pixels.

    Args:
        in_channels: channels of the images.

    Example:
        >>> Conv4()(torch.rand(2, 3, 28, 28)).shape
        torch.Size([2, 64])

    Source:
        Patacchiola & Storkey, "Self-Supervised Relational Reasoning for Representation Learning", NeurIPS 2020, and its
        code, which pools by the average where the few-shot learners' net of that name takes the maximum.
    """

    num_features = 64

    def __init__(self, in_channels: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for narrow, wide in pairwise((in_channels, 8, 16, 32, self.num_features)):
            layers += [nn.Conv2d(narrow, wide, 3, padding=1, bias=False), nn.BatchNorm2d(wide), nn.ReLU(inplace=True), nn.AvgPool2d(2)]
        self.layers = nn.Sequential(*layers[:-1])
        _he_init(self)

    def forward(self, images: Tensor) -> Tensor:
        """`(B, C, H, W)` -> `(B, 64)`."""
        return self.layers(images).mean(dim=(2, 3))


class _BasicBlock(nn.Module):
    """relu(F(x) + x), F two 3 x 3 convolutions.

    Where F halves the image, x is subsampled and padded with zero channels (option A) or goes through a 1 x 1 convolution (option B).
    """

    def __init__(self, narrow: int, wide: int, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        self.stride = stride
        self.padding = wide - narrow
        self.conv1 = nn.Conv2d(narrow, wide, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(wide)
        self.conv2 = nn.Conv2d(wide, wide, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(wide)
        projects = shortcut == "conv" and stride > 1
        self.shortcut = nn.Sequential(nn.Conv2d(narrow, wide, 1, stride, bias=False), nn.BatchNorm2d(wide)) if projects else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)), inplace=True)))
        shortcut = _option_a(x, self.stride, self.padding) if self.shortcut is None else self.shortcut(x)
        return F.relu(out + shortcut, inplace=True)


class CifarResNet(nn.Module):
    """The ResNets for CIFAR: 6n + 2 layers in three stages of n blocks with 16, 32 and 64 channels, then the global average.

    The depth counts the linear classifier, which is not part of the encoder.

    Args:
        depth: 6n + 2, such as 8, 20, 32 or 56.
        in_channels: channels of the images.
        shortcut: where a stage halves the image, "pad" subsamples it and pads it with channels of zeros (the paper's option A, without
            parameters), "conv" takes a 1 x 1 convolution with BatchNorm (option B).

    Raises:
        ValueError: if `depth` is not 6n + 2.

    Example:
        >>> CifarResNet(20)(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 64])

    Source:
        He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2.
    """

    num_features = 64

    def __init__(self, depth: int, in_channels: int = 3, shortcut: Shortcut = "pad") -> None:
        super().__init__()
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"the depth of a CIFAR ResNet is 6n + 2, such as 20, got {depth}")
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        blocks: list[nn.Module] = []
        for narrow, wide in pairwise((16, 16, 32, 64)):
            blocks.append(_BasicBlock(narrow, wide, wide // narrow, shortcut))
            blocks += [_BasicBlock(wide, wide, 1, shortcut) for _ in range((depth - 2) // 6 - 1)]
        self.blocks = nn.Sequential(*blocks)
        _he_init(self)

    def forward(self, images: Tensor) -> Tensor:
        """`(B, C, H, W)` -> `(B, 64)`."""
        return self.blocks(F.relu(self.bn1(self.conv1(images)), inplace=True)).mean(dim=(2, 3))


class _ShrinkageBlock(nn.Module):
    """F(x) + x, F twice BatchNorm, ReLU and 3 x 3 convolution, then a soft threshold; the shortcut is that of `_BasicBlock`."""

    def __init__(self, narrow: int, wide: int, stride: int, shared: bool) -> None:
        super().__init__()
        self.stride = stride
        self.padding = wide - narrow
        self.bn1 = nn.BatchNorm2d(narrow)
        self.conv1 = nn.Conv2d(narrow, wide, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(wide)
        self.conv2 = nn.Conv2d(wide, wide, 3, padding=1, bias=False)
        self.shrink = SoftThreshold(wide, shared)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(F.relu(self.bn1(x), inplace=True))
        out = self.shrink(self.conv2(F.relu(self.bn2(out), inplace=True)))
        return out + _option_a(x, self.stride, self.padding)


class ShrinkageResNet(nn.Module):
    """Deep residual shrinkage network of the size of a CIFAR ResNet: every residual is shrunk by thresholds learned from it.

    6n + 2 layers as in `CifarResNet`, in blocks with BatchNorm and ReLU before each convolution and a `SoftThreshold` after the
    second; the layers that make the thresholds do not count.

    Args:
        depth: 6n + 2, such as 20.
        shared: one threshold for all channels of a block (DRSN-CS) instead of one each (DRSN-CW).
        in_channels: channels of the images.

    Raises:
        ValueError: if `depth` is not 6n + 2.

    Example:
        >>> ShrinkageResNet(20, shared=True)(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 64])

    Source:
        Zhao, Zhong, Fu & Pecht, "Deep Residual Shrinkage Networks for Fault Diagnosis", IEEE Transactions on Industrial Informatics
        16(7), 2020; the sizes are those of He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2.
    """

    num_features = 64

    def __init__(self, depth: int, shared: bool, in_channels: int = 3) -> None:
        super().__init__()
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"the depth of a CIFAR ResNet is 6n + 2, such as 20, got {depth}")
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        blocks: list[nn.Module] = []
        for narrow, wide in pairwise((16, 16, 32, 64)):
            blocks.append(_ShrinkageBlock(narrow, wide, wide // narrow, shared))
            blocks += [_ShrinkageBlock(wide, wide, 1, shared) for _ in range((depth - 2) // 6 - 1)]
        self.blocks = nn.Sequential(*blocks)
        self.bn = nn.BatchNorm2d(self.num_features)
        _he_init(self)

    def forward(self, images: Tensor) -> Tensor:
        """`(B, C, H, W)` -> `(B, 64)`."""
        return F.relu(self.bn(self.blocks(self.conv1(images))), inplace=True).mean(dim=(2, 3))


def _option_a(x: Tensor, stride: int, padding: int) -> Tensor:
    """The shortcut without parameters: subsampled, and padded with channels of zeros."""
    return F.pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, 0, padding)) if padding else x


def _he_init(module: nn.Module) -> None:
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")


def _check_count(name: str, key: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{key} of backbone {name!r} must be a positive integer, got {value!r}")


def _plain(name: str, key: str, value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(name, key, item) for item in value]
    if type(value) not in (str, int, float, bool):
        raise ValueError(f"{key!r} of backbone {name!r} is a {type(value).__name__}; a checkpoint can hold text, numbers and lists of them")
    return value


def _timm_file(name: str) -> str:
    import timm

    return timm.model_entrypoint(name).__module__.rpartition(".")[2]


def _ask_timm(name: str) -> tuple[bool, bool]:
    """Whether timm's model has a stem that can be made small, and whether it is built for one image size."""
    config = _check_timm(name, _OWN)
    return _timm_file(name) in _STEMS, bool(config is not None and config.fixed_input_size)


def _check_timm(name: str, others: Sequence[str] = ()) -> Any:
    """What timm knows of the weights of a name, None if it has none; `others` are names that would do, too."""
    import timm

    if not timm.is_model(name):
        close = difflib.get_close_matches(name, [*others, *timm.list_models()], n=3, cutoff=0.6)
        known = f"there are {', '.join(others)} and timm.list_models()" if others else "timm.list_models() names them all"
        hint = f"did you mean {' or '.join(close)}?" if close else known
        raise ValueError(f"there is no backbone {name!r}; {hint}")
    try:
        return timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        architecture, _, tag = name.partition(".")
        tags = [other.partition(".")[2] for other in timm.list_models(f"{architecture}.*", include_tags=True)]
        raise ValueError(f"the backbone {architecture!r} has no weights {tag!r}; there are {', '.join(tags) or 'none'}") from error


def _make_stem_small(network: nn.Module, stem: str, poolings: tuple[str, ...], keep_weights: bool) -> None:
    """Stride 1 all over the stem, a first kernel of at most 3 x 3, and no pooling; changes the network in place."""
    first = True
    for conv in network.get_submodule(stem).modules():
        if not isinstance(conv, nn.Conv2d):
            continue
        size = conv.kernel_size[0]
        if first and size > 3:
            start = (size - 3) // 2
            conv.weight = nn.Parameter(conv.weight.detach()[:, :, start : start + 3, start : start + 3].clone())
            conv.kernel_size, conv.padding = (3, 3), (1, 1)
            if not keep_weights:  # what was drawn is too small by far for the smaller kernel
                nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        conv.stride = (1, 1)
        first = False
    for path in poolings:
        parent, _, child = path.rpartition(".")
        if hasattr(owner := network.get_submodule(parent), child):
            setattr(owner, child, nn.Identity())
