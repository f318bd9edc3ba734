"""Feed broken checkpoints to the containers for a while: each is refused in one sentence, or read.

Each round takes a good file of some container, breaks it in a few places and reads its headers.
These are finds: an exception that is not ours, an error without its path, more than a second, much
memory, and a safetensors file that the safetensors library refuses but we read. Finds are kept by
the number of their round; the same --seed makes the same rounds.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import environment

MOST_SECONDS = 1.0  # for one file of a few kilobytes
MOST_GROWTH_BYTES = 64 << 20  # of the process, over all rounds

# Bytes that mean something in one of the formats.
TOKENS = [
    *(b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b"0", b"-0", b"1e9", b"NaN", b"null", b"\0"),
    *(b"__metadata__", b"data_offsets", b"shape", b"dtype", b'"F64"', b"weight_map", b"../x"),
    *(b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06", b"\x80\x02", b"\x80\x04", b".", b"("),
    *(b")", b"t"),
    *(b"R", b"c", b"os\nsystem\n", b"\x93", b"\x8c\x02os", b"Q", b"\x85", b"b", b"h\x00", b"q\xff"),
    *(b"\xff" * 8, b"\x7f" + b"\xff" * 7, b"\0" * 8, b"\x8a\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf"),
]


def make_seeds(folder: Path) -> dict[str, tuple[Path, str, bytes]]:
    """Make a good checkpoint of each kind: its folder, the file to break, and its content."""
    import torch
    from safetensors.torch import save_file
    from torch.distributed.checkpoint.state_dict_saver import save

    state = {
        "layer.weight": torch.arange(12.0).reshape(3, 4),
        "layer.bias": torch.arange(4).bfloat16(),
        "steps": torch.tensor([1, 2, 3]),
    }
    files = {
        "safetensors": "model.safetensors",
        "index": "model.safetensors.index.json",
        "zip": "pytorch_model.bin",
        "legacy": "pytorch_model.bin",
        "dcp": ".metadata",
    }
    folders = {name: folder / name for name in files}
    for each in folders.values():
        each.mkdir()
    save_file(state, folders["safetensors"] / "model.safetensors", {"format": "pt"})
    save_file(state, folders["index"] / "model-00001-of-00001.safetensors")
    weight_map = dict.fromkeys(state, "model-00001-of-00001.safetensors")
    index = folders["index"] / files["index"]
    index.write_text(json.dumps({"metadata": {"total_size": 80}, "weight_map": weight_map}))
    for name in ("zip", "legacy"):
        path = folders[name] / files[name]
        content = {"model": state, "step": 3}
        torch.save(content, path, _use_new_zipfile_serialization=name == "zip")
    save({"model": state}, checkpoint_id=str(folders["dcp"]), no_dist=True)
    return {
        name: (folders[name], file, (folders[name] / file).read_bytes())
        for name, file in files.items()
    }


def broken(content: bytes, chance: random.Random) -> bytes:
    """Return `content` with one to four changes: bits, tokens, numbers, cuts, repetitions."""
    data = bytearray(content)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(data) + 1)
        end = min(len(data), at + chance.choice([0, 1, 2, 8, 64]))
        kind = chance.randrange(6)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            data[at:end] = chance.choice(TOKENS)
        elif kind == 2:
            data[at:end] = chance.randrange(1 << 64).to_bytes(8, chance.choice(["little", "big"]))
        elif kind == 3:
            del data[at:end]
        elif kind == 4:
            data[at:at] = data[chance.randrange(len(data) + 1) :][: chance.choice([1, 9, 99])]
        else:
            del data[at:]
    return bytes(data)


def library_refuses(path: Path) -> bool:
    """Return whether the safetensors library refuses a file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            file.keys()
    except (SafetensorError, OSError):
        return True
    return False


def tried(read: Callable[[], Any]) -> str:
    """Return "read" or "refused", or what should never happen."""
    from ckpt_ema.errors import CkptEmaError

    start = time.monotonic()
    try:
        read()
        outcome = "read"
    except CkptEmaError as error:
        fits = str(error).isprintable() and error.path
        outcome = "refused" if fits else f"refused without a path or in two lines: {error!r}"
    except Exception as error:  # a find
        outcome = f"{type(error).__name__}: {error}"
    took = time.monotonic() - start
    return outcome if took <= MOST_SECONDS else f"took {took:.1f} s and was {outcome}"


def one_round(
    seeds: dict[str, tuple[Path, str, bytes]], chance: random.Random
) -> tuple[str, bytes, str]:
    """Break a file and read it; return its kind, its content and the outcome."""
    from ckpt_ema.containers.source import read_specs
    from ckpt_ema.containers.specs import Member, ModelFiles
    from ckpt_ema.storage.local import Local

    name = chance.choice(sorted(seeds))
    folder, file, good = seeds[name]
    content = broken(good, chance)
    (folder / file).write_bytes(content)
    outcome = tried(lambda: read_specs(ModelFiles(folder, (Member(file),)), Local()))
    if outcome == "read" and name == "safetensors" and library_refuses(folder / file):
        outcome = "read, and the library refuses it"
    return name, content, outcome


def fuzz(seconds: float, seed: int, finds: Path) -> int:
    """Break and read for so many seconds; return the number of finds."""
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as place:
        seeds = make_seeds(Path(place))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            number = outcomes.total() + 1
            name, content, outcome = one_round(seeds, random.Random(f"{seed}/{number}"))
            if outcome not in ("read", "refused"):
                finds.mkdir(parents=True, exist_ok=True)
                (finds / f"{name}-{seed}-{number}").write_bytes(content)
                print(f"{finds}/{name}-{seed}-{number}: {outcome}")
                outcome = "FOUND"
            outcomes[f"{name} {outcome}"] += 1
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    told = ", ".join(f"{kind} {count}" for kind, count in sorted(outcomes.items()))
    print(f"{outcomes.total()} files in {seconds:g} s: {told}; memory grew by {grown >> 20} MiB")
    found = sum(count for kind, count in outcomes.items() if kind.endswith("FOUND"))
    return found + (grown > MOST_GROWTH_BYTES)


def main() -> int:
    """Parse the arguments and fuzz; exit code 1 if there are finds."""
    parser = argparse.ArgumentParser(description="Feed broken checkpoints to the readers.")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--finds", type=Path, default=Path("finds"), help="where finds are kept")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    return 1 if fuzz(options.seconds, options.seed, options.finds) else 0


if __name__ == "__main__":
    environment.enter()
    sys.exit(main())
