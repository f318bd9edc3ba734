"""The checksum of float64 values; `native/fold.c` has it too.

The sum of (low + 0x9e3779b9) (high + 0x85ebca6b) over the 32-bit halves of each value, mod 2^64: NH
of UMAC (Black et al. 1999, section 4) with one key for all values, so that any order and any cut
into tiles gives the same sum.
"""

from typing import TYPE_CHECKING

from ckpt_ema.fold.native import compiled

if TYPE_CHECKING:
    import torch

_LOW_KEY, _HIGH_KEY = 0x9E3779B9, 0x85EBCA6B
_MASK = (1 << 32) - 1


def checksum(content: bytearray) -> int:
    """Return the checksum of the bytes of float64 values.

    >>> checksum(bytearray(8)) == 0x9E3779B9 * 0x85EBCA6B
    True
    """
    if module := compiled():
        return int(module.checksum(content, len(content) // 8))
    import torch

    return checksum_of(torch.frombuffer(content, dtype=torch.float64))


def checksum_of(values: "torch.Tensor") -> int:
    """Return the checksum of a tensor of float64."""
    import torch

    bits = values.contiguous().view(torch.int64)
    low, high = ((bits & _MASK) + _LOW_KEY) & _MASK, ((bits >> 32) + _HIGH_KEY) & _MASK
    return int((low * high).sum()) % (1 << 64)  # products and their sum wrap around
