"""`litzoo export`: a Lightning checkpoint becomes a weights file that `litzoo.load` reads, or an ONNX file."""

import argparse
from pathlib import Path


def export(argv: list[str]) -> int:
    """Turn a Lightning checkpoint (.ckpt) into a weights file (.safetensors): the model alone, without pickle; or any model into ONNX."""
    parser = argparse.ArgumentParser(prog="litzoo export", description=export.__doc__)
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="a .ckpt that `litzoo fit` wrote; for ONNX also a .safetensors or a name of `litzoo list`"
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        type=Path,
        help="where to write, a .safetensors or .onnx file; by default .safetensors beside the checkpoint",
    )
    parser.add_argument("--full-precision", action="store_true", help="keep float32; by default weights are stored in float16")
    arguments = parser.parse_args(argv)

    source: str = arguments.checkpoint
    output: Path = arguments.output or Path(source).with_suffix(".safetensors")
    if output.exists():
        raise FileExistsError(f"{output} exists already and is not overwritten; choose another name with --output FILE")

    from ..pretrained import load, read_checkpoint, save

    if output.suffix == ".onnx":
        from ..onnx_export import export_onnx

        model = read_checkpoint(source)[0] if source.endswith(".ckpt") else load(source)
        export_onnx(model, output)
        print(f"{type(model).__name__}, {output.stat().st_size / 1e6:.2f} MB: {output}; equal to the model in onnxruntime")
        return 0
    model, card = read_checkpoint(source)
    save(model, output, card, half=not arguments.full_precision)
    print(f"{type(model).__name__}, {output.stat().st_size / 1e6:.2f} MB: {output}; load it with litzoo.load({str(output)!r})")
    return 0
