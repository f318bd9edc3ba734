"""One factory that makes every run the tests need; files only below tmp_path."""

import ctypes
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from ckpt_ema.containers.safetensors import make_header

StateDict = Mapping[str, torch.Tensor]
MakeRun = Callable[..., Path]

NAMES = {
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
    """A tensor's bytes, row-major, without numpy."""
    packed = tensor.detach().contiguous()
    return ctypes.string_at(packed.data_ptr(), packed.nbytes)


def write_safetensors(
    path: Path, state: StateDict, metadata: Mapping[str, str] | None = None
) -> None:
    """Write one safetensors file in the order of `state`."""
    specs = [(name, NAMES[t.dtype], tuple(t.shape)) for name, t in state.items()]
    header, _ = make_header(specs, {"format": "pt"} if metadata is None else metadata)
    path.write_bytes(header + b"".join(raw(tensor) for tensor in state.values()))


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


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """A function that writes a run of checkpoint folders and returns the run's folder."""

    def make(
        states: Sequence[StateDict],
        steps: Sequence[int] | None = None,
        name: str = "run",
        pattern: str = "checkpoint-{}",
        shards: int = 0,
        torch_files: bool = False,
    ) -> Path:
        run = tmp_path / name
        for step, state in zip(steps or range(1, len(states) + 1), states, strict=True):
            folder = run / pattern.format(step)
            folder.mkdir(parents=True)
            (folder / "config.json").write_text('{"architectures": ["Tiny"]}')
            (folder / "optimizer.pt").write_bytes(b"state of the optimizer")
            if torch_files:
                torch.save(dict(state), folder / "pytorch_model.bin")
            elif shards:
                write_shards(folder, state, shards)
            else:
                write_safetensors(folder / "model.safetensors", state)
        return run

    return make


def noise(count: int, *shape: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """`count` different tensors of one shape, the same ones in every run of the tests."""
    generator = torch.Generator().manual_seed(count)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(count)]


def series(count: int, **tensors: Any) -> list[dict[str, torch.Tensor]]:
    """`count` state dicts; each keyword is a tensor for all or a list with one for each."""
    return [
        {
            name: value[index] if isinstance(value, list) else value
            for name, value in tensors.items()
        }
        for index in range(count)
    ]
