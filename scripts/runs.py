"""Make the runs that the benchmark averages, each in a process of its own.

    python scripts/runs.py FOLDER RUN

takes a `Run` as JSON. Only `make` imports torch, since the benchmark has to stay small.
"""

import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import layouts

MIB = 1024**2
CHUNK_ELEMENTS = 4 * MIB
SHARD_BYTES = 5 * 10**9  # as transformers cuts them
ITEM_BYTES = {"bfloat16": 2, "float32": 4}
SAFETENSORS_NAMES = {"bfloat16": "BF16", "float32": "F32"}


@dataclass(frozen=True)
class Run:
    """Checkpoints of one model that differ in their values only."""

    dtype: str
    checkpoints: int
    size_bytes: int  # of one checkpoint
    tensors: int | None = None  # equally large ones; without a number, the model is a llama
    is_sparse: bool = False  # headers are real, data are holes
    layout: str = ""  # a trainer's, of `layouts.LAYOUTS`; else safetensors files

    def __str__(self) -> str:
        size = f"{self.size_bytes / MIB:.0f} MiB"
        if self.size_bytes < MIB:
            size = f"{self.size_bytes / 1000:.0f} kB"
        return ", ".join(filter(None, [f"{self.checkpoints} x {size}", self.dtype, self.layout]))

    @property
    def name(self) -> str:
        """Name of its folder."""
        kind = self.tensors or "sparse" * self.is_sparse or re.sub(r"\W+", "-", self.layout)
        parts = filter(None, [self.dtype, self.checkpoints, self.size_bytes, kind])
        return "-".join(map(str, parts))

    @property
    def shapes(self) -> dict[str, list[int]]:
        """Shapes of its tensors."""
        elements = self.size_bytes // ITEM_BYTES[self.dtype]
        if self.tensors is None:
            return llama_shapes(elements)
        return {f"layer.{n}.weight": [elements // self.tensors] for n in range(self.tensors)}


def ready(run: Run, workdir: Path) -> Path:
    """Return the run's folder; it is made first, unless a stamp beside it says that it is whole."""
    folder = workdir / run.name
    stamp = folder.with_suffix(".whole")
    if not stamp.exists():
        shutil.rmtree(folder, ignore_errors=True)
        command = [sys.executable, __file__, str(folder), json.dumps(asdict(run))]
        subprocess.run(command, check=True)
        stamp.touch()
    return folder


def make(run: Run, folder: Path) -> None:
    """Write the run, and wait until it is on the disk."""
    import torch

    if run.layout:
        layouts.make(run.layout, run.shapes, run.checkpoints, folder)
        os.sync()
        return
    shards = in_shards(run)
    elements = sum(math.prod(shape) for shape in run.shapes.values())
    window = 2 * min(CHUNK_ELEMENTS, elements)
    random = torch.Generator().manual_seed(0)
    base = torch.randn(0 if run.is_sparse else window, generator=random) * 0.02
    walk = torch.zeros_like(base)
    for step in range(100, 100 * run.checkpoints + 1, 100):
        checkpoint = folder / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "config.json").write_text("{}")
        if len(shards) > 1:
            weight_map = {tensor: name for name, held in shards.items() for tensor in held}
            index = {"metadata": {"total_size": run.size_bytes}, "weight_map": weight_map}
            (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
        for name, shapes in shards.items():
            with (checkpoint / name).open("wb") as file:
                file.write(encode_header(shapes, run.dtype))
                if run.is_sparse:
                    file.truncate(file.tell() + data_bytes(shapes, run.dtype))
                else:
                    file.writelines(values(base, walk, run.dtype, elements))
        walk += torch.randn(walk.shape, generator=random) * 0.001
    os.sync()  # to write gigabytes back later would disturb what is measured


def values(base: Any, walk: Any, dtype: str, elements: int) -> Iterator[memoryview]:
    """Data of a checkpoint, in chunks.

    Every chunk is a window of the same noise at its own offset: drawing all of it takes minutes.
    """
    import torch

    window = len(base) // 2
    buffer = bytearray(window * ITEM_BYTES[dtype])
    rounded = torch.frombuffer(buffer, dtype=getattr(torch, dtype))
    for chunk, start in enumerate(range(0, elements, window)):
        count = min(window, elements - start)
        near, far = chunk * 104_729 % window, chunk * 15_485_863 % window
        rounded[:count] = base[near : near + count] + walk[far : far + count]
        yield memoryview(buffer)[: count * ITEM_BYTES[dtype]]


def in_shards(run: Run) -> dict[str, dict[str, list[int]]]:
    """Shapes of the tensors in each of a checkpoint's files."""
    shards: list[dict[str, list[int]]] = [{}]
    size_bytes = 0
    for name, shape in run.shapes.items():
        tensor_bytes = data_bytes({name: shape}, run.dtype)
        if shards[-1] and size_bytes + tensor_bytes > SHARD_BYTES:
            shards.append({})
            size_bytes = 0
        shards[-1][name] = shape
        size_bytes += tensor_bytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    names = [f"model-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, len(shards) + 1)]
    return dict(zip(names, shards, strict=True))


def data_bytes(shapes: dict[str, list[int]], dtype: str) -> int:
    """Bytes that tensors of these shapes take."""
    return sum(math.prod(shape) for shape in shapes.values()) * ITEM_BYTES[dtype]


def encode_header(shapes: dict[str, list[int]], dtype: str) -> bytes:
    """Length and padded JSON with which a safetensors file of these tensors begins."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, shape in shapes.items():
        end = begin + data_bytes({name: shape}, dtype)
        header[name] = {
            "dtype": SAFETENSORS_NAMES[dtype],
            "shape": shape,
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def llama_shapes(elements: int) -> dict[str, list[int]]:
    """Shapes of a llama that has `elements` parameters, to within one row of its vocabulary."""
    hidden = max(
        (width for width in (64, 128, 256, 512, 1024, 2048, 4096) if elements > 115 * width**2),
        default=64,
    )
    wide, narrow = hidden * 11 // 4, hidden // 4
    projections = {
        "self_attn.q_proj": [hidden, hidden],
        "self_attn.k_proj": [narrow, hidden],
        "self_attn.v_proj": [narrow, hidden],
        "self_attn.o_proj": [hidden, hidden],
        "mlp.gate_proj": [wide, hidden],
        "mlp.up_proj": [wide, hidden],
        "mlp.down_proj": [hidden, wide],
        "input_layernorm": [hidden],
        "post_attention_layernorm": [hidden],
    }
    layer_elements = sum(math.prod(shape) for shape in projections.values())
    layers = max(1, int(0.75 * elements / layer_elements))
    vocabulary = max(1, (elements - layers * layer_elements - hidden) // (2 * hidden))
    shapes = {"model.embed_tokens.weight": [vocabulary, hidden]}
    for layer, (name, shape) in itertools.product(range(layers), projections.items()):
        shapes[f"model.layers.{layer}.{name}.weight"] = shape
    return shapes | {"model.norm.weight": [hidden], "lm_head.weight": [vocabulary, hidden]}


if __name__ == "__main__":
    make(Run(**json.loads(sys.argv[2])), Path(sys.argv[1]))
