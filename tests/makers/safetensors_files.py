"""Safetensors files and shards, written by hand: the length of a header, the header, the data."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from tests.makers.tensors import DTYPES, StateDict, raw


def framed(header: str | bytes, data: bytes = b"") -> bytes:
    """Return a file with this header, its length before it, and this data."""
    content = header if isinstance(header, bytes) else header.encode("utf-8", "surrogatepass")
    return len(content).to_bytes(8, "little") + content + data


def entry(dtype: Any = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    """Return one tensor's entry in a header, by default a good one of 4 bytes."""
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def write_safetensors(
    path: Path, state: StateDict, metadata: Mapping[str, str] | None = None
) -> None:
    """Write one safetensors file in the order of `state`."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"} if metadata is None else metadata}
    data = [raw(tensor) for tensor in state.values()]
    end = 0
    for (name, tensor), content in zip(state.items(), data, strict=True):
        begin, end = end, end + len(content)
        header[name] = entry(DTYPES[tensor.dtype], list(tensor.shape), [begin, end])
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    path.write_bytes(framed(text + b" " * (-len(text) % 8), b"".join(data)))


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """Read one safetensors file with the library, not with our own reader."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def write_shards(folder: Path, state: StateDict, shards: int) -> None:
    """Write a sharded checkpoint with its index, names dealt out in turn."""
    weight_map = {}
    for number in range(shards):
        name = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = {key: state[key] for key in list(state)[number::shards]}
        write_safetensors(folder / name, part)
        weight_map.update(dict.fromkeys(part, name))
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
