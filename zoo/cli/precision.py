"""The default precision of the models that gain from bfloat16."""

from pathlib import Path

# Instructions that multiply bfloat16 in hardware: tiles of newer Xeons, and AVX-512 of Zen 4 and of Cooper Lake on.
_NATIVE = ("amx_bf16", "avx512_bf16")


def cpu_multiplies_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the processor multiplies bfloat16 in hardware; others emulate it, slower than float32.

    Args:
        cpuinfo: the kernel's description of the processor.

    Returns:
        True by the flags of the processor; False where there is no such file.

    Example:
        >>> cpu_multiplies_bf16(Path("nowhere"))
        False
    """
    if not cpuinfo.is_file():
        return False
    flags = next((line.split() for line in cpuinfo.read_text(encoding="utf-8").splitlines() if line.startswith("flags")), [])
    return any(flag in flags for flag in _NATIVE)


def native_precision(accelerator: str) -> str | None:
    """The precision to train in on an accelerator, decided by what it can do and never by a measurement, so that a run repeats.

    Args:
        accelerator: the trainer's setting: "auto", "cpu", "gpu", "cuda", ...

    Returns:
        "bf16-mixed" where bfloat16 is multiplied in hardware, else None: Lightning's default, float32.

    Example:
        >>> native_precision("tpu") is None
        True
    """
    import torch

    if accelerator in ("gpu", "cuda") or (accelerator == "auto" and torch.cuda.is_available()):
        return "bf16-mixed" if torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False) else None
    if accelerator == "cpu" or (accelerator == "auto" and not torch.backends.mps.is_available()):
        return "bf16-mixed" if cpu_multiplies_bf16() else None
    return None
