"""`litzoo export`: a Lightning checkpoint becomes a weights file that `litzoo.load` reads."""

import argparse
from pathlib import Path


def export(argv: list[str]) -> int:
    """Turn a Lightning checkpoint (.ckpt) into a weights file (.safetensors): the model alone, without pickle."""
    parser = argparse.ArgumentParser(prog="litzoo export", description=export.__doc__)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="a .ckpt that `litzoo fit` wrote")
    parser.add_argument("--output", metavar="FILE.safetensors", type=Path, help="where to write; next to the checkpoint by default")
    parser.add_argument("--full-precision", action="store_true", help="keep float32; by default weights are stored in float16")
    arguments = parser.parse_args(argv)

    checkpoint: Path = arguments.checkpoint
    output: Path = arguments.output or checkpoint.with_suffix(".safetensors")
    if output.exists():
        raise FileExistsError(f"{output} exists already and is not overwritten; choose another name with --output FILE.safetensors")

    from ..pretrained import read_checkpoint, save

    model, card = read_checkpoint(checkpoint)
    save(model, output, card, half=not arguments.full_precision)
    print(f"{type(model).__name__}, {output.stat().st_size / 1e6:.2f} MB: {output}; load it with litzoo.load({str(output)!r})")
    return 0
