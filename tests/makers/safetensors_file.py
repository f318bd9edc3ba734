"""Write safetensors files byte by byte, independently of the package's own header code."""

import ctypes
import json
from collections.abc import Mapping
from pathlib import Path

import torch

StateDict = Mapping[str, torch.Tensor]

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.complex64: "C64",
}


def raw(tensor: torch.Tensor) -> bytes:
    """Return a tensor's bytes, row-major, without numpy."""
    packed = tensor.detach().contiguous()
    return ctypes.string_at(packed.data_ptr(), packed.nbytes)


def write_safetensors(
    path: Path, state: StateDict, metadata: Mapping[str, str] | None = None
) -> None:
    """Write one file, its tensors in the order of `state`."""
    header: dict[str, object] = {}
    if metadata := {"format": "pt"} if metadata is None else metadata:
        header["__metadata__"] = dict(metadata)
    end = 0
    for name, tensor in state.items():
        begin, end = end, end + tensor.nbytes
        shape = list(tensor.shape)
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": shape,
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    data = b"".join(raw(tensor) for tensor in state.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def shards(state: StateDict, count: int) -> dict[str, StateDict]:
    """Deal the tensors out to `count` files in turn, under the names that an index has."""
    return {
        f"model-{number + 1:05}-of-{count:05}.safetensors": {
            name: state[name] for name in list(state)[number::count]
        }
        for number in range(count)
    }


def write_shards(folder: Path, state: StateDict, count: int) -> None:
    """Write a sharded model with its index."""
    weight_map = {}
    for file, part in shards(state, count).items():
        write_safetensors(folder / file, part)
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
