"""What the benchmark measures ckpt-ema against; each contender is a process of its own.

    python scripts/contenders.py NAME RUN OUTPUT [--durable]

runs one of them, which writes into the folder OUTPUT. With --durable the files and the folder are
synced and renamed, as ckpt-ema does it. Modules are imported where they are used: no contender pays
for those of another.
"""

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

DECAY = 0.999
BLOCK_BYTES = 1 << 19  # of 256 KiB to 2 MiB the fastest in a fresh process: the strictest baseline
THREADS = len(os.sched_getaffinity(0))


def decay_of(fold: int) -> float:
    """TensorFlow's dynamic decay."""
    return min(DECAY, (1 + fold) / (10 + fold))


def weights_of(checkpoints: int) -> list[float]:
    """The share that each checkpoint has in the average, oldest first."""
    weights = [1.0]
    for fold in range(1, checkpoints):
        decay = decay_of(fold)
        weights = [*(weight * decay for weight in weights), 1 - decay]
    return weights


def weights_files(run: Path) -> list[Path]:
    """Weights of a run, oldest first."""
    folders = sorted(run.iterdir(), key=lambda folder: int(folder.name.rpartition("-")[2]))
    return [folder / "model.safetensors" for folder in folders]


# Reading and writing without arithmetic


def read(run: Path, _: Path) -> None:
    """Read every byte once, by position, file after file."""
    transfer(weights_files(run), None)


def write(run: Path, output: Path) -> None:
    """Write as many bytes as the output has."""
    remaining = weights_files(run)[0].stat().st_size
    block = os.urandom(2 * BLOCK_BYTES)
    with (output / "model.safetensors").open("wb", buffering=0) as file:
        while remaining > 0:
            remaining -= file.write(block[:remaining])


def read_and_write(run: Path, output: Path) -> None:
    """Read every byte once, and write those of the newest checkpoint."""
    with (output / "model.safetensors").open("wb") as file:
        transfer(weights_files(run), file.fileno())


def transfer(paths: Sequence[Path], target: int | None) -> None:
    """Read files by several threads, each with one small buffer; write the last to `target`."""
    from concurrent.futures import ThreadPoolExecutor

    sizes = [path.stat().st_size for path in paths]
    blocks = [
        (index, start)
        for index, size_bytes in enumerate(sizes)
        for start in range(0, size_bytes, BLOCK_BYTES)
    ]
    if target is not None:
        blocks.sort(key=lambda block: block[1])  # all inputs of a block, then its output
    descriptors = [os.open(path, os.O_RDONLY) for path in paths]

    def transfer_share(share: int) -> int:
        buffer = memoryview(bytearray(BLOCK_BYTES))
        read_bytes = 0
        for index, start in blocks[share::THREADS]:
            count = os.preadv(descriptors[index], [buffer], start)
            read_bytes += count
            if target is not None and index == len(paths) - 1:
                os.pwrite(target, buffer[:count], start)
        return read_bytes

    with ThreadPoolExecutor(THREADS) as pool:
        found = sum(pool.map(transfer_share, range(THREADS)))
    if found != sum(sizes):
        sys.exit(f"read {found} bytes, expected {sum(sizes)}")


def copy_newest(run: Path, output: Path) -> None:
    """Copy the newest checkpoint, a file or a folder, as people do it."""
    import subprocess

    newest = max(run.iterdir(), key=lambda path: int(path.stem.rpartition("-")[2]))
    subprocess.run(["cp", "-r", newest, output], check=True)


# Averages by other means


def averaged_before(run: Path) -> Path:
    """Return the average of the oldest checkpoint, with its state; made the first time."""
    made = run.with_name(f"{run.name}-averaged")
    if not made.exists():
        import ckpt_ema

        oldest = weights_files(run)[0].parent
        ckpt_ema.average([oldest], output=made, keep_state=True, decay=DECAY)
        os.sync()
    return made


def verify(run: Path, _output: Path) -> None:
    """Verify an average of the run, by the command; it is made the first time."""
    made = run.with_name(f"{run.name}-verified")
    if not made.exists():
        import ckpt_ema

        ckpt_ema.average(run, output=made, decay=DECAY)
    os.execv(sys.executable, [sys.executable, "-m", "ckpt_ema", "verify", str(made), "-q"])


def update(run: Path, output: Path) -> None:
    """Update the average of the oldest checkpoint with the newest, by the command."""
    before = averaged_before(run)
    output.mkdir(exist_ok=True)
    for path in before.iterdir():
        os.link(path, output / path.name)
    newest = str(weights_files(run)[-1].parent)
    os.execv(
        sys.executable,
        [sys.executable, "-m", "ckpt_ema", "update", str(output), newest, "-q"],
    )


def copy_for_update(run: Path, output: Path) -> None:
    """Copy what an update reads: as many bytes as it writes."""
    before = averaged_before(run)
    for path in (weights_files(run)[-1], before / "ckpt_ema.state"):
        shutil.copyfile(path, output / path.name)


def loop(run: Path, output: Path) -> None:
    """Average with the loop that everybody writes: one float32 dict, one `lerp_` a tensor."""
    import torch
    from safetensors.torch import load_file

    torch.set_num_threads(THREADS)
    first, *later = weights_files(run)
    state = load_file(first)
    shadow = {name: value.to(torch.float32, copy=True) for name, value in state.items()}
    for fold, path in enumerate(later, start=1):
        state = load_file(path)
        for name, value in shadow.items():
            value.lerp_(state[name].float(), 1 - decay_of(fold))
    save({name: value.to(state[name].dtype) for name, value in shadow.items()}, output)


def averaged_model(run: Path, output: Path) -> None:
    """Average with torch's own `AveragedModel`; its shadow has the dtype of the model."""
    import torch
    from safetensors.torch import load_file
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    torch.set_num_threads(THREADS)
    paths = weights_files(run)
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
    save(dict(zip(names, values, strict=True)), output)


def mergekit(run: Path, output: Path) -> None:
    """Call what the command `mergekit-pytorch` calls: linear, with the weights of the average."""
    import importlib
    import tempfile

    from safetensors import safe_open

    module = importlib.import_module("mergekit.scripts.merge_raw_pytorch")
    files = weights_files(run)
    with safe_open(files[0], framework="pt") as opened:
        held = opened.get_slice(next(iter(opened.keys()))).get_dtype()
    weights = dict(zip(files, weights_of(len(files)), strict=True))
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(linear_merge(weights, {"BF16": "bfloat16", "F32": "float32"}[held]))
        file.flush()
        options = ["--num-threads", str(THREADS), "--quiet"]
        module.main([file.name, str(output), *options], standalone_mode=False)


def linear_merge(weights: dict[Path, float], dtype: str) -> str:
    """YAML with which mergekit adds up files by these weights and writes this dtype."""
    import json

    models = []
    for path, weight in weights.items():
        # Quoted by JSON's rules, which are YAML's; and without a point 1e-06 would be a text.
        models.append(f"  - model: {json.dumps(str(path))}")
        models.append(f"    parameters: {{weight: {weight:.17e}}}")
    return "\n".join(
        [
            "merge_method: linear",
            "parameters: {normalize: false}",
            "dtype: float32",
            f"out_dtype: {dtype}",
            "models:",
            *models,
            "",
        ]
    )


def uniform_mean(run: Path, output: Path) -> None:
    """Average as the loop of timm's avg_checkpoints.py does, in words of our own.

    That script is in timm's repository but in no package. It sums every tensor in float64, divides
    by the count, and writes float32 within its limits, whatever the dtype was: bfloat16 comes out
    twice as large, and an integer above 2**24 may come out as another. Left out here: its choice
    of checkpoints, its counting of tensors that some lack, the SHA256 of what it wrote.
    """
    import torch
    from safetensors.torch import load_file

    torch.set_num_threads(THREADS)
    paths = weights_files(run)
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
    save(averaged, output)


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
    serialize_file(specs, output / "model.safetensors", metadata={"format": "pt"})


# ckpt-ema, started by a launcher


def two_ranks(run: Path, output: Path) -> None:
    """Start the command twice, as a launcher does, with half of the cores for each."""
    import socket
    import subprocess

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(found.getsockname()[1])}
    command = [sys.executable, "-m", "ckpt_ema", "average", str(run), "-o", str(output / "average")]
    command += ["--decay", str(DECAY), "-q", "--threads", str(max(1, THREADS // 2))]
    ranks = [
        subprocess.Popen(command, env={**os.environ, **meeting, "WORLD_SIZE": "2", "RANK": rank})
        for rank in ("0", "1")
    ]
    codes = [rank.wait() for rank in ranks]
    if any(codes):
        sys.exit("a rank failed")


CONTENDERS: dict[str, Callable[[Path, Path], None]] = {
    "read": read,
    "write": write,
    "read-and-write": read_and_write,
    "copy-newest": copy_newest,
    "update": update,
    "verify": verify,
    "copy-for-update": copy_for_update,
    "loop": loop,
    "averaged-model": averaged_model,
    "mergekit": mergekit,
    "uniform-mean": uniform_mean,
    "two-ranks": two_ranks,
}


def publish(staged: Path, output: Path) -> None:
    """Make a folder durable and give it its name."""
    for path in (*staged.rglob("*"), staged):
        sync(path)
    staged.rename(output)
    sync(output.parent)


def sync(path: Path) -> None:
    """Wait until a file or a folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def main(name: str, run: str, output: str, durable: str = "") -> None:
    """Run one contender in this process."""
    folder = Path(f"{output}.tmp" if durable else output)
    folder.mkdir()
    CONTENDERS[name](Path(run), folder)
    if durable:
        publish(folder, Path(output))


if __name__ == "__main__":
    main(*sys.argv[1:])
