"""Import a published network with random weights and say how far litzoo's outputs are from its own, in float64.

    git clone https://github.com/zhirongw/lemniscate.pytorch /tmp/lemniscate.pytorch
    python scripts/compare_published.py /tmp/lemniscate.pytorch lemniscate --network resnet18

FOLDER is a clone of the repository of the layout; its model code is imported and RUN, so look at it first. The network gets random
weights, scales and running statistics, is saved as its repository saves it, and read by `read_published`. The networks:

    lemniscate     resnet18, resnet50, ... of models/resnet.py; ResNet18, ... of models/resnet_cifar.py
    supcontrast    resnet18, resnet34, resnet50, resnet101, each with /mlp, /linear or /classifier
    relational     conv4, resnet8, resnet32, resnet56, resnet34, each with /cat, /sum, /mean or /max
    pointnet       of yanx27's repository yanx27/classifier, yanx27/parts; of fxia22's fxia22/classifier, fxia22/dense, each also with
                   /transform, the feature transform
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from litzoo.zoo.published import Layout, read_published

Outputs = dict[str, Tensor]


class Published(NamedTuple):
    """A network of a repository.

    Attributes:
        module: all that has parameters.
        warm_up: what moves the running statistics, given inputs in training mode.
        checkpoint: makes what the repository gives to torch.save.
        theirs: outputs for inputs.
        ours: the same of litzoo's model.
        shape: of an input: an image, or a cloud of points.
        hparams: what no shape tells.
    """

    module: nn.Module
    warm_up: Callable[[Tensor], Any]
    checkpoint: Callable[[], dict[str, Any]]
    theirs: Callable[[Tensor], Outputs]
    ours: Callable[[Any, Tensor], Outputs]
    shape: tuple[int, ...]
    hparams: dict[str, Any]


def lemniscate(network: str) -> Published:
    """Its main.py and cifar.py save the state of a DataParallel, and the memory bank as an object."""
    models: Any = import_module("models")
    bank = import_module("lib.LinearAverage").LinearAverage(128, 1000, 0.07, 0.5)
    module: nn.Module = getattr(models, network)(low_dim=128)
    is_cifar = network[0] == "R"
    nest = "net" if is_cifar else "state_dict"
    return Published(
        module,
        module,
        lambda: {nest: _wrapped(module), "lemniscate": bank, "epoch": 200},
        lambda images: {"embedding": module(images)},
        lambda model, images: {"embedding": model(images)},
        (3, 32, 32) if is_cifar else (3, 224, 224),
        {},
    )


def supcontrast(network: str) -> Published:
    """Its util.save_model saves the options, too, as a namespace."""
    name, _, head = network.partition("/")
    code: Any = import_module("networks.resnet_big")
    module: nn.Module = code.SupCEResNet(name, 100) if head == "classifier" else code.SupConResNet(name, head or "mlp", 128)
    encoder: Any = module.encoder
    options = argparse.Namespace(model=name, temp=0.1, lr_decay_epochs=[700, 800, 900])
    return Published(
        module,
        module,
        lambda: {"opt": options, "model": _wrapped(module), "optimizer": {"state": {}, "param_groups": []}, "epoch": 1000},
        lambda images: {"features": encoder(images), "output": module(images)},
        lambda model, images: {"features": model.encode(images), "output": model(images)},
        (3, 32, 32),
        {},
    )


def relational(network: str) -> Published:
    """Its RelationNet saves the encoder and the head apart."""
    name, _, aggregation = network.partition("/")
    aggregation = aggregation or "cat"
    if name == "conv4":
        encoder: Any = import_module("backbones.conv4").Conv4()
    else:
        code: Any = import_module("backbones.resnet_large" if name == "resnet34" else "backbones.resnet_small")
        layers = {"resnet8": [1, 1, 1], "resnet32": [5, 5, 5], "resnet34": [3, 4, 6, 3], "resnet56": [9, 9, 9]}
        encoder = code.ResNet(code.BasicBlock, layers[name])
    whole: Any = import_module("methods.relationnet").Model(encoder, device="cpu", aggregation=aggregation)
    module = nn.ModuleList([whole.net, whole.relation_module])  # its train() takes other arguments than that of a module

    def pairs(images: Tensor) -> Outputs:
        features = encoder(images)
        # Its first pairs join the first half of the images, as one view of each, with the second half, as the other.
        joined = whole.aggregate(features, 2, type=aggregation)[0][: len(features) // 2]
        return {"features": features, "logits": whole.relation_module(joined).squeeze(1)}

    def our_pairs(model: Any, images: Tensor) -> Outputs:
        features = model.encode(images)
        return {"features": features, "logits": model.relation(*features.chunk(2))}

    return Published(
        module,
        pairs,
        lambda: {
            "backbone": encoder.state_dict(),
            "relation": whole.relation_module.state_dict(),
            "optimizer": whole.optimizer.state_dict(),
        },
        pairs,
        our_pairs,
        (3, 96, 96) if name == "resnet34" else (3, 32, 32),
        {} if aggregation == "cat" else {"aggregation": aggregation},
    )


def pointnet(network: str) -> Published:
    """yanx27's trainings save the state in a dictionary with scores of numpy, fxia22's the state alone; both give log-probabilities."""
    owner, kind, *more = network.split("/")
    by_class = (owner, kind) == ("yanx27", "parts")
    if owner == "yanx27":
        code: Any = import_module("pointnet_part_seg" if by_class else "pointnet_cls")
        module: nn.Module = code.get_model(50 if by_class else 40, normal_channel=False)
    else:
        code = import_module("pointnet.model")
        make = code.PointNetDenseCls if kind == "dense" else code.PointNetCls
        module = make(k=4 if kind == "dense" else 16, feature_transform=more == ["transform"])
    label = torch.arange(8)  # as many as there are clouds

    def scores(points: Tensor) -> Tensor:
        classes = (nn.functional.one_hot(label, 16).to(points.dtype)[:, None],) if by_class else ()
        return module(points.mT, *classes)[0]

    def our_scores(model: Any, points: Tensor) -> Tensor:
        logits: Tensor = model(points, label) if by_class else model(points)
        return (logits.mT if logits.dim() == 3 else logits).log_softmax(dim=-1)

    return Published(
        module,
        scores,
        lambda: (
            {"model_state_dict": module.state_dict(), "epoch": 7, "class_acc": np.mean([0.5])} if owner == "yanx27" else module.state_dict()
        ),
        lambda points: {"log-probabilities": scores(points)},
        lambda model, points: {"log-probabilities": our_scores(model, points)},
        (500, 3),
        {},
    )


LAYOUTS: dict[str, Callable[[str], Published]] = {
    "lemniscate": lemniscate,
    "supcontrast": supcontrast,
    "relational": relational,
    "pointnet": pointnet,
}
DEFAULTS = {"lemniscate": "resnet18", "supcontrast": "resnet18/mlp", "relational": "conv4/cat", "pointnet": "yanx27/classifier"}


def compare(layout: Layout, network: str, seed: int = 0) -> tuple[LightningModule, dict[str, tuple[float, float]]]:
    """litzoo's model of a network with random weights, and of each output the largest difference and the largest value."""
    torch.manual_seed(seed)
    published = LAYOUTS[layout](network)
    for layer in published.module.modules():
        if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, std=0.3)
    inputs = torch.randn(8, *published.shape)
    published.module.train()
    with torch.no_grad():
        for _ in range(3):
            published.warm_up(torch.randn_like(inputs) + 0.5)
    published.module.eval()

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "checkpoint.pth"
        torch.save(published.checkpoint(), file)
        model, card = read_published(file, layout, **published.hparams)
    print(f"left out: {', '.join(card['left_out']) or 'nothing'}" + (f"; {card['note']}" if "note" in card else ""))
    published.module.double()
    model.double()
    with torch.no_grad():
        theirs, ours = published.theirs(inputs.double()), published.ours(model, inputs.double())
    return model, {name: (float((ours[name] - value).abs().max()), float(value.abs().max())) for name, value in theirs.items()}


def _wrapped(module: nn.Module) -> dict[str, Tensor]:
    return {f"module.{key}": value for key, value in module.state_dict().items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="a clone of the repository; its code is run")
    parser.add_argument("layout", choices=get_args(Layout))
    parser.add_argument("--network", help="which of its networks, see above")
    parser.add_argument("--tolerance", type=float, default=1e-5, help="of each difference, relative to the largest value (default 1e-5)")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    sys.path[:0] = [str(folder), str(folder / "models")]  # of yanx27's models, each imports another as if it lay beside all code
    network = arguments.network or DEFAULTS[arguments.layout]
    model, found = compare(arguments.layout, network)
    good = True
    for name, (difference, largest) in found.items():
        good = good and difference <= arguments.tolerance * max(largest, 1.0)
        print(
            f"{arguments.layout} {network} -> {type(model).__name__}: {name} differs by at most {difference:.2g} (values to {largest:.3g})"
        )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
