"""The contenders of the benchmark and the run that they average; `bench.py` measures them.

    python scripts/contenders.py NAME RUN OUTPUT THREADS

runs one of them in this process, after `import torch`, and prints its seconds as JSON.
"""

import importlib
import itertools
import json
import math
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

MIB = 1024**2
DECAY = 0.999
HALF_LIVES = (100, 150, 200, 300, 400, 600, 800, 1000)  # steps; checkpoints are 100 apart
CHUNK_ELEMENTS = 4 * MIB
SHARD_BYTES = 5 * 10**9  # as transformers cuts them
READ_BYTES = MIB // 2  # of 256 KiB to 2 MiB the fastest in a fresh process: the strictest baseline
ITEM_BYTES = {"bfloat16": 2, "float32": 4}
SAFETENSORS_NAMES = {"bfloat16": "BF16", "float32": "F32"}


@dataclass(frozen=True)
class Settings:
    """What is averaged, and with how many threads."""

    dtype: str
    checkpoints: int
    size_bytes: int
    threads: int

    @property
    def name(self) -> str:
        """Name of the run's folder."""
        return f"{self.dtype}-{self.checkpoints}x{self.size_bytes // MIB}MiB"


@dataclass(frozen=True)
class Job:
    """What a contender is given."""

    run: Path
    output: Path
    threads: int


# Making a run


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


def encode_header(shapes: dict[str, list[int]], dtype: str) -> bytes:
    """Length and padded JSON with which a safetensors file of these tensors begins."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, shape in shapes.items():
        end = begin + math.prod(shape) * ITEM_BYTES[dtype]
        header[name] = {
            "dtype": SAFETENSORS_NAMES[dtype],
            "shape": shape,
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def make_run(settings: Settings, workdir: Path) -> Path:
    """Folder of the run, made unless it is there; a stamp beside it says that it is whole."""
    import torch

    run, stamp = workdir / settings.name, workdir / f"{settings.name}.whole"
    if stamp.exists():
        return run
    shutil.rmtree(run, ignore_errors=True)
    shapes = llama_shapes(settings.size_bytes // ITEM_BYTES[settings.dtype])
    elements = sum(math.prod(shape) for shape in shapes.values())
    # Every chunk is a window of the same noise at its own offset: drawing all of it takes minutes.
    random = torch.Generator().manual_seed(0)
    base = torch.randn(2 * CHUNK_ELEMENTS, generator=random) * 0.02
    walk = torch.zeros(2 * CHUNK_ELEMENTS)
    buffer = bytearray(CHUNK_ELEMENTS * ITEM_BYTES[settings.dtype])
    rounded = torch.frombuffer(buffer, dtype=getattr(torch, settings.dtype))
    for step in range(100, 100 * settings.checkpoints + 1, 100):
        folder = run / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        config = {"model_type": "llama", "hidden_size": shapes["model.norm.weight"][0]}
        (folder / "config.json").write_text(json.dumps(config))
        with (folder / "model.safetensors").open("wb") as file:
            file.write(encode_header(shapes, settings.dtype))
            for chunk, start in enumerate(range(0, elements, CHUNK_ELEMENTS)):
                count = min(CHUNK_ELEMENTS, elements - start)
                near, far = chunk * 104_729 % CHUNK_ELEMENTS, chunk * 15_485_863 % CHUNK_ELEMENTS
                rounded[:count] = base[near : near + count] + walk[far : far + count]
                file.write(memoryview(buffer)[: count * ITEM_BYTES[settings.dtype]])
            # Writing back 4 GiB of dirty pages later would disturb what is measured.
            os.fsync(file.fileno())
        walk += torch.randn(2 * CHUNK_ELEMENTS, generator=random) * 0.001
    stamp.touch()
    return run


def decay_of(fold: int) -> float:
    """TensorFlow's dynamic decay."""
    return min(DECAY, (1 + fold) / (10 + fold))


def weights_files(run: Path) -> list[Path]:
    """Weights of a run, oldest first."""
    folders = sorted(run.iterdir(), key=lambda folder: int(folder.name.rpartition("-")[2]))
    return [folder / "model.safetensors" for folder in folders]


def make_uniform_run(run: Path, checkpoints: int, tensors: int, size_bytes: int) -> None:
    """A run in float32, all of whose tensors are equally large."""
    import torch

    header = encode_header(
        {f"layer.{n}.weight": [size_bytes // 4] for n in range(tensors)}, "float32"
    )
    random = torch.Generator().manual_seed(0)
    buffer = bytearray(tensors * size_bytes)
    for step in range(100, 100 * checkpoints + 1, 100):
        folder = run / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        torch.frombuffer(buffer, dtype=torch.uint8).random_(0, 100, generator=random)
        with (folder / "model.safetensors").open("wb") as file:
            file.write(header)
            file.write(buffer)


def make_sparse_run(run: Path, checkpoints: int, elements: int) -> int:
    """A run in bfloat16 in shards whose headers are real and whose data are holes; its shards."""
    shards: list[dict[str, list[int]]] = [{}]
    for name, shape in llama_shapes(elements).items():
        size_bytes = sum(2 * math.prod(other) for other in shards[-1].values())
        if shards[-1] and size_bytes + 2 * math.prod(shape) > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = shape
    names = [f"model-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, len(shards) + 1)]
    weight_map = {tensor: name for name, held in zip(names, shards, strict=True) for tensor in held}
    for step in range(500, 500 * checkpoints + 1, 500):
        folder = run / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        index = {"metadata": {"total_size": 2 * elements}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        for name, held in zip(names, shards, strict=True):
            header = encode_header(held, "bfloat16")
            with (folder / name).open("wb") as file:
                file.write(header)
                file.truncate(len(header) + sum(2 * math.prod(shape) for shape in held.values()))
    return len(shards)


# The contenders, each in a process of its own


def read_bytes(job: Job) -> None:
    """Read every byte once, by position, into one small buffer for each thread."""
    paths = weights_files(job.run)
    sizes = [path.stat().st_size for path in paths]
    ranges = [
        (index, start)
        for index, size_bytes in enumerate(sizes)
        for start in range(0, size_bytes, READ_BYTES)
    ]
    descriptors = [os.open(path, os.O_RDONLY) for path in paths]

    def read_share(share: int) -> int:
        buffer = bytearray(READ_BYTES)
        return sum(
            os.preadv(descriptors[index], [buffer], start)
            for index, start in ranges[share :: job.threads]
        )

    with ThreadPoolExecutor(job.threads) as pool:
        found = sum(pool.map(read_share, range(job.threads)))
    if found != sum(sizes):
        sys.exit(f"{job.run}: read {found} bytes, expected {sum(sizes)}")


def write_bytes(job: Job) -> float:
    """Write as many bytes as the output has and return the seconds that fsync took."""
    remaining = weights_files(job.run)[0].stat().st_size
    block = os.urandom(MIB)
    with job.output.open("wb", buffering=0) as file:
        while remaining > 0:
            remaining -= file.write(block[:remaining])
        start = time.perf_counter()
        os.fsync(file.fileno())
    return time.perf_counter() - start


def run_loop(job: Job) -> None:
    """Average with the loop that everybody writes: one float32 dict, one `lerp_` a tensor."""
    import torch
    from safetensors.torch import load_file

    torch.set_num_threads(job.threads)
    first, *later = weights_files(job.run)
    state = load_file(first)
    shadow = {name: value.to(torch.float32, copy=True) for name, value in state.items()}
    for fold, path in enumerate(later, start=1):
        state = load_file(path)
        for name, value in shadow.items():
            value.lerp_(state[name].float(), 1 - decay_of(fold))
    save({name: value.to(state[name].dtype) for name, value in shadow.items()}, job.output)


def run_averaged_model(job: Job) -> None:
    """Average with torch's own `AveragedModel`; its shadow has the dtype of the model."""
    import torch
    from safetensors.torch import load_file
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    torch.set_num_threads(job.threads)
    paths = weights_files(job.run)
    names = list(load_file(paths[0]))

    def parameters(path: Path) -> list[torch.nn.Parameter]:
        state = load_file(path)
        return [torch.nn.Parameter(state[name], requires_grad=False) for name in names]

    model = torch.nn.Module()
    averaged: Any = None
    for fold, path in enumerate(paths):
        model.weights = torch.nn.ParameterList(parameters(path))
        if averaged is None:
            averaged = AveragedModel(model)
        averaged.multi_avg_fn = get_ema_multi_avg_fn(decay_of(fold))  # type: ignore[no-untyped-call]
        averaged.update_parameters(model)
    values = [value.detach() for value in averaged.module.weights]
    save(dict(zip(names, values, strict=True)), job.output)


def merge_file(run: Path) -> Path:
    """Where the YAML lies that tells mergekit what to do with this run."""
    return run.with_name(f"{run.name}-mergekit.yaml")


def run_mergekit(job: Job) -> None:
    """Call what the command `mergekit-pytorch` calls."""
    module = importlib.import_module(IMPORTS[MERGEKIT])
    options = ["--num-threads", str(job.threads), "--quiet"]
    module.main([str(merge_file(job.run)), str(job.output), *options], standalone_mode=False)


def run_uniform_mean(job: Job) -> None:
    """Average as the loop of timm's avg_checkpoints.py does, in words of our own.

    That script is in timm's repository but in no package. It sums every tensor in float64, divides
    by the count, and writes float32 within its limits, whatever the dtype was: bfloat16 comes out
    twice as large, and an integer above 2**24 may come out as another. Left out here: its choice
    of checkpoints, its counting of tensors that some lack, the SHA256 of what it wrote.
    """
    import torch
    from safetensors.torch import load_file

    torch.set_num_threads(job.threads)
    paths = weights_files(job.run)
    sums: dict[str, torch.Tensor] = {}
    for path in paths:
        for name, value in load_file(path).items():
            if name in sums:
                sums[name] += value.double()
            else:
                sums[name] = value.to(torch.float64, copy=True)
    limits = torch.finfo(torch.float32)
    averaged = {}
    for name, total in sums.items():
        averaged[name] = total.div_(len(paths)).clamp(limits.min, limits.max).float()
    save(averaged, job.output)


def save(averaged: dict[str, Any], output: Path) -> None:
    """Do what safetensors.torch.save_file does, which cannot do it where numpy is missing."""
    from safetensors import TensorSpec, serialize_file

    specs = {
        name: TensorSpec(
            dtype=str(value.dtype).removeprefix("torch."),
            shape=value.shape,
            data_ptr=value.data_ptr(),
            data_len=value.nbytes,
        )
        for name, value in averaged.items()
    }
    output.mkdir()
    serialize_file(specs, output / "model.safetensors", metadata={"format": "pt"})


def run_average(job: Job) -> None:
    """Average with the library's one call."""
    import ckpt_ema

    ckpt_ema.average(job.run, decay=DECAY, output=job.output, threads=job.threads, overwrite=True)


def run_unwatched(job: Job) -> None:
    """Average without the monitors of values; those of copies, zeros and NaN remain."""
    from ckpt_ema.fold import monitors

    monitors.KINDS = monitors.KINDS[:3]
    run_average(job)


def run_uniform(job: Job) -> None:
    """What `run_uniform_mean` makes, with the library's one call."""
    import ckpt_ema

    options: dict[str, Any] = {"schedule": "uniform", "dtype": "float32", "threads": job.threads}
    ckpt_ema.average(job.run, output=job.output, **options)


def run_ranks(job: Job) -> None:
    """The same by two processes of one thread, as a launcher starts them but for the imports."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    import ckpt_ema

    children = []
    for rank in range(2):
        child = os.fork()
        if not child:
            place = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in place.items()})
            ckpt_ema.average(job.run, decay=DECAY, output=job.output, threads=1, launch=True)
            os._exit(0)
        children.append(child)
    if any(os.waitpid(child, 0)[1] for child in children):
        sys.exit("a rank failed")


def run_half_life(job: Job) -> None:
    """One average, by a half-life in steps."""
    import ckpt_ema

    ckpt_ema.average(job.run, half_life=HALF_LIVES[0], output=job.output, threads=job.threads)


def run_half_lives(job: Job) -> None:
    """Eight averages in one pass."""
    import ckpt_ema

    ckpt_ema.average(job.run, half_life=HALF_LIVES, output=job.output, threads=job.threads)


def write_eight(job: Job) -> float:
    """Write as many bytes as eight outputs have, file after file."""
    job.output.mkdir()
    places = [replace(job, output=job.output / str(number)) for number in range(len(HALF_LIVES))]
    return sum(write_bytes(place) for place in places)


def import_only(_: Job) -> None:
    """Do nothing: the memory that `import torch` itself takes."""


def import_ours(_: Job) -> None:
    """Import what `run_average` and the command import, which their seconds include."""
    from ckpt_ema import average  # noqa: F401


IMPORT_OURS = "import ckpt_ema"
IMPORT, READ, LOOP = "import torch", "read the bytes", "load_file + lerp_"
TORCHS = "AveragedModel"
MERGEKIT = "mergekit-pytorch"
COMMAND = "ckpt-ema average"
UNIFORM_MEAN, UNIFORM = "timm's loop, uniform", "ckpt_ema.average, uniform"
AVERAGE, WRITE = "ckpt_ema.average", "write + fsync"
RANKS = "two ranks"
ONE, EIGHT, WRITE_EIGHT = "one average", "eight averages", "write + fsync, eight"
CONTENDERS: dict[str, Callable[[Job], float | None]] = {
    IMPORT: import_only,
    READ: read_bytes,
    LOOP: run_loop,
    TORCHS: run_averaged_model,
    AVERAGE: run_average,
    WRITE: write_bytes,
}
# Those of the part on peers.
OF_PEERS: dict[str, Callable[[Job], float | None]] = {
    IMPORT: import_only,
    IMPORT_OURS: import_ours,
    READ: read_bytes,
    WRITE: write_bytes,
    LOOP: run_loop,
    TORCHS: run_averaged_model,
    MERGEKIT: run_mergekit,
    AVERAGE: run_average,
    UNIFORM_MEAN: run_uniform_mean,
    UNIFORM: run_uniform,
}
# Those of the part on several averages.
OF_MANY: dict[str, Callable[[Job], float | None]] = {
    IMPORT: import_only,
    READ: read_bytes,
    ONE: run_half_life,
    EIGHT: run_half_lives,
    WRITE_EIGHT: write_eight,
}


# Those of the part on monitors.
UNWATCHED = "without monitors of values"
OF_MONITORS: dict[str, Callable[[Job], float | None]] = {
    AVERAGE: run_average,
    UNWATCHED: run_unwatched,
}
# Those of the part on ranks.
OF_RANKS: dict[str, Callable[[Job], float | None]] = {AVERAGE: run_average, RANKS: run_ranks}
# What a contender imports, besides torch, before its seconds begin.
IMPORTS = {MERGEKIT: "mergekit.scripts.merge_raw_pytorch"}


def run_child(contender: str, run: str, output: str, threads: str) -> None:
    """Run one contender in this process and print its seconds, from after its imports on."""
    import torch  # noqa: F401 - its memory and its seconds are what all contenders start from

    if contender in IMPORTS:
        importlib.import_module(IMPORTS[contender])
    start = time.perf_counter()
    fsync_seconds = {**CONTENDERS, **OF_PEERS, **OF_MANY, **OF_RANKS, **OF_MONITORS}[contender](
        Job(Path(run), Path(output), int(threads))
    )
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "fsync_seconds": fsync_seconds or 0.0}))


if __name__ == "__main__":
    run_child(*sys.argv[1:])
