"""`litzoo import`: a checkpoint that another repository's code trained becomes a weights file that `litzoo.load` reads."""

import argparse
import json
from pathlib import Path
from typing import Any

from . import CommandError

_EPILOG = """\
layouts:
  lemniscate    zhirongw/lemniscate.pytorch: ResNets for ImageNet and CIFAR -> InstanceDiscrimination
  supcontrast   HobbitLong/SupContrast: SupConResNet -> SupConEncoder, SupCEResNet -> ImageClassifier
  relational    mpatacchiola/self-supervised-relational-reasoning: Conv-4, ResNet-8, 32, 56, 34 -> RelationalReasoning
  pointnet      yanx27/Pointnet_Pointnet2_pytorch, fxia22/pointnet.pytorch: PointNets of three coordinates
                -> PointNetClassifier, PointNetSegmenter

Sizes follow from the shapes. No shape tells how images were normalised; without it, give predictions normalised images:
  --hparams '{"image_size": 32, "image_mean": [0.4914, 0.4822, 0.4465], "image_std": [0.2023, 0.1994, 0.2010]}'
Nor does one tell what classes are called, or which class each part belongs to (part_classes):
  --hparams '{"class_names": ["airplane", "bathtub"]}'
"""


def import_published(argv: list[str]) -> int:
    """Turn a checkpoint of another repository into a weights file (.safetensors), without running code that it may hold."""
    parser = argparse.ArgumentParser(
        prog="litzoo import",
        description=import_published.__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a file of torch.save, or a .safetensors file with the same keys")
    parser.add_argument(
        "--layout", required=True, choices=("lemniscate", "supcontrast", "relational", "pointnet"), help="the repository, see below"
    )
    parser.add_argument("--output", metavar="FILE", type=Path, help="where to write, a .safetensors file; by default beside the checkpoint")
    parser.add_argument("--hparams", metavar="JSON", default="{}", help="hyper-parameters that no shape tells, a JSON object")
    parser.add_argument("--full-precision", action="store_true", help="keep float32; by default weights are stored in float16")
    arguments = parser.parse_args(argv)

    source: str = arguments.checkpoint
    output: Path = arguments.output or Path(source).with_suffix(".safetensors")
    if output.exists():
        raise FileExistsError(f"{output} exists already and is not overwritten; choose another name with --output FILE")
    hparams = _json_object(arguments.hparams)

    from ..pretrained import save
    from ..published import read_published

    model, card = read_published(source, arguments.layout, **hparams)
    save(model, output, card, half=not arguments.full_precision)
    if card["left_out"]:
        print(f"left out of {source}: {', '.join(card['left_out'])}")
    if "note" in card:
        print(card["note"])
    print(f"{type(model).__name__}, {output.stat().st_size / 1e6:.2f} MB: {output}; load it with litzoo.load({str(output)!r})")
    return 0


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise CommandError(f"--hparams: {text!r} is not JSON ({error}); write --hparams '{{\"image_size\": 32}}'") from error
    if not isinstance(value, dict):
        raise CommandError(f"--hparams: expected a JSON object, got {text!r}; write --hparams '{{\"image_size\": 32}}'")
    return value
