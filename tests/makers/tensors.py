"""Tensors for tests, the same in every run, and their bytes."""

import ctypes
from collections.abc import Mapping
from typing import Any

import torch

StateDict = Mapping[str, torch.Tensor]

# What safetensors calls the dtypes that torch has as well.
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
    torch.bool: "BOOL",
    torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float8_e8m0fnu: "F8_E8M0",
}


def raw(tensor: torch.Tensor) -> bytes:
    """Return a tensor's bytes, row-major, without numpy."""
    packed = tensor.detach().contiguous()
    return ctypes.string_at(packed.data_ptr(), packed.nbytes)


def noise(count: int, *shape: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Return `count` different tensors of one shape."""
    generator = torch.Generator().manual_seed(count)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(count)]


def series(count: int, **tensors: Any) -> list[dict[str, torch.Tensor]]:
    """Return `count` state dicts; each keyword is a tensor for all or a list with one for each."""
    return [
        {
            name: value[index] if isinstance(value, list) else value
            for name, value in tensors.items()
        }
        for index in range(count)
    ]


def filled(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Return a tensor whose bytes all differ from their neighbours."""
    count = torch.Size(shape).numel()
    limit = 2 if dtype == torch.bool else 251
    item = torch.empty((), dtype=dtype).element_size()
    values = bytes(i % limit for i in range(1, count * item + 1))
    if not values:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(values), dtype=torch.uint8).view(dtype).reshape(shape)


def quantised() -> torch.Tensor:
    """Return a quantised tensor, which torch warns about making."""
    scales, zeros = torch.ones(2), torch.zeros(2, dtype=torch.int64)
    return torch._make_per_channel_quantized_tensor(torch.ones(2, 2).char(), scales, zeros, 0)
