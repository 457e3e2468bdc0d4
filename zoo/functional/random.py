"""Counter-based random numbers: a pure function of a key, the same on every device, for any number of workers.

A key is an int64; `fold_in` derives a new key from a key and a number, `uniform` and `normal` turn a batch of keys into
a batch of numbers. There is no generator state, so nothing depends on the order in which samples are visited.
The mixing function is SplitMix64 (Steele, Lea & Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014).
"""

import math
import os

import numpy as np
import torch
from torch import Tensor


def _signed(value: int) -> int:
    """The int64 with the bit pattern of an unsigned 64-bit number."""
    return value - (1 << 64) if value >= 1 << 63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MULTIPLY_1 = _signed(0xBF58476D1CE4E5B9)
_MULTIPLY_2 = _signed(0x94D049BB133111EB)
# A radix sort counts 256 values twice, whatever the length.
_RADIX_FROM = 512


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's `>>` on int64 copies the sign bit."""
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """The output function of SplitMix64, in place."""
    # numpy has unsigned integers, which shift in one pass over them instead of two.
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return _mix_signed(x)
    _mix_unsigned(x.numpy().view(np.uint64))
    return x


def _mix_signed(x: Tensor) -> Tensor:
    x.bitwise_xor_(_shift_right(x, 30)).mul_(_MULTIPLY_1)
    x.bitwise_xor_(_shift_right(x, 27)).mul_(_MULTIPLY_2)
    return x.bitwise_xor_(_shift_right(x, 31))


def _mix_unsigned(x: np.ndarray) -> None:
    shifted = np.empty_like(x)
    for bits, factor in ((30, _MULTIPLY_1), (27, _MULTIPLY_2)):
        np.bitwise_xor(x, np.right_shift(x, np.uint64(bits), out=shifted), out=x)
        np.multiply(x, np.uint64(factor % (1 << 64)), out=x)
    np.bitwise_xor(x, np.right_shift(x, np.uint64(31), out=shifted), out=x)


def global_seed() -> int:
    """The seed of `lightning.pytorch.seed_everything`, the same in every process; 0 without one.

    Example:
        >>> seed_everything(7)
        >>> global_seed()
        7
    """
    return int(os.environ.get("PL_GLOBAL_SEED", "0"))


def fold_in(key: Tensor | int, *numbers: Tensor | int) -> Tensor:
    """Derive a new key from a key and one or more numbers: `key' = mix(mix(key + golden) xor number)`, in turn.

    Args:
        key: int64 of any shape, or an int.
        numbers: int64 tensors that broadcast with `key`, or ints; the order matters.

    Returns:
        The new keys, int64, of the broadcast shape.

    Example:
        >>> fold_in(0, 3, torch.arange(4)).shape  # seed 0, epoch 3, samples 0 to 3
        torch.Size([4])
    """
    derived = torch.as_tensor(key, dtype=torch.int64)
    for number in numbers:
        other = torch.as_tensor(number, dtype=torch.int64)
        if derived.device != other.device:  # a plain int made on the CPU
            derived, other = (derived.to(other.device), other) if derived.dim() == 0 else (derived, other.to(derived.device))
        derived = _mix(_mix(derived + _GOLDEN) ^ other)
    return derived


def _bits(key: Tensor, shape: tuple[int, ...]) -> Tensor:
    counter = torch.arange(1, math.prod(shape) + 1, device=key.device).view(shape)
    return _mix(key.reshape(key.shape + (1,) * len(shape)) + counter * _GOLDEN)


def uniform(key: Tensor, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Uniform numbers in [low, high), `shape` of them for each key.

    Args:
        key: `(B,)` int64.
        shape: the shape of the numbers of one key; none for a single number.
        low: lower end, included.
        high: upper end, excluded (but for rounding in float32).

    Returns:
        `(B, *shape)` float32; a multiple of 2^-24 before it is scaled.

    Example:
        >>> uniform(fold_in(0, torch.arange(4)), 1024, 3).shape
        torch.Size([4, 1024, 3])
    """
    return _shift_right(_bits(key, shape), 40).to(torch.float32).mul_(2.0**-24).mul_(high - low).add_(low)


def normal(key: Tensor, *shape: int) -> Tensor:
    """Standard normal numbers by the Box-Muller transform, `shape` of them for each key.

    Args:
        key: `(B,)` int64.
        shape: the shape of the numbers of one key.

    Returns:
        `(B, *shape)` float32; |z| is at most 5.9.

    Example:
        >>> normal(torch.tensor([1, 2]), 1000).std() > 0.9
        tensor(True)
    """
    count = math.prod(shape)
    bits = _bits(key, (-(-count // 2),))
    radius = (_shift_right(bits, 40).to(torch.float32) + 0.5).mul_(2.0**-24).log_().mul_(-2.0).sqrt_()
    angle = (bits & 0xFFFFFF).to(torch.float32).mul_(2.0**-24 * 2.0 * math.pi)
    pairs = torch.stack([angle.cos(), angle.sin_()], dim=-2).mul_(radius.unsqueeze(-2))
    return pairs.flatten(-2)[..., :count].reshape(key.shape + shape)


def integers(key: Tensor, *shape: int, high: int) -> Tensor:
    """Uniform integers from 0 to high - 1, `shape` of them for each key.

    Args:
        key: `(B,)` int64, or `()`.
        shape: the shape of the numbers of one key.
        high: how many integers there are, at most 2^31.

    Returns:
        `(B, *shape)` int64.

    Example:
        >>> integers(torch.tensor([1, 2]), 5, high=10).shape
        torch.Size([2, 5])
    """
    # 32 random bits times high, without its low half: a number comes at most high / 2^32 too often.
    return _shift_right(_bits(key, shape), 32).mul_(high) >> 32


def random_order(key: Tensor, length: int) -> Tensor:
    """A random permutation of `length` items for each key.

    Args:
        key: `(B,)` int64, or `()` for one permutation.
        length: number of items.

    Returns:
        `(B, length)` int64, or `(length,)`.

    Example:
        >>> random_order(torch.tensor(5), 4).sort().values
        tensor([0, 1, 2, 3])
    """
    # The position stands in the low bits of what is sorted: no ties, and no need for an argsort.
    low = (1 << length.bit_length()) - 1
    packed = _bits(key, (length,)).bitwise_and_(~low).bitwise_or_(torch.arange(length, device=key.device))
    return (_sorted(packed) if key.device.type == "cpu" else packed.sort(dim=-1).values).bitwise_and_(low)


def _sorted(packed: Tensor) -> Tensor:
    """Random int64 in ascending order along the last dimension."""
    if packed.shape[-1] < _RADIX_FROM:
        return torch.from_numpy(np.sort(packed.numpy(), axis=-1))
    # numpy sorts 16 bits by radix, in linear time; few numbers share theirs, and its Timsort is quick where little is out of order.
    nearly = torch.from_numpy(np.argsort((packed >> 48).to(torch.int16).numpy(), axis=-1, kind="stable"))
    ordered = packed.gather(-1, nearly)
    ordered.numpy().sort(axis=-1, kind="stable")
    return ordered
