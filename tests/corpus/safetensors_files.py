"""Broken safetensors files."""

import json
import pickle
from pathlib import Path
from typing import Any

import torch

from tests.corpus.case import (
    FILE,
    Case,
    Make,
    becomes,
    cut,
    fifo,
    goes_on_with,
    holds,
    in_all,
    links_to,
    states_are,
)
from tests.makers.safetensors_files import entry, framed, write_safetensors
from tests.makers.tensors import noise
from tests.makers.torch_files import archive, tensor_pickle


def header(text: str | bytes, data: int = 4) -> Make:
    """A file with this header and so many bytes of data."""
    return holds(framed(text, bytes(data)))


def tensor(**changed: Any) -> Make:
    """A file with one tensor of 4 bytes whose entry is changed; None takes a field away."""
    fields = {**entry(), **changed}
    return header(json.dumps({"w": {k: v for k, v in fields.items() if v is not None}}))


def long_metadata(run: Path) -> None:
    """The header of each file is 10 MB long."""
    for step, weight in enumerate(noise(3, 4), start=1):
        path = run / f"checkpoint-{step}/model.safetensors"
        write_safetensors(path, {"w": weight}, {"notes": "x" * 10_000_000})


def never_written(run: Path) -> None:
    """The newest is preallocated, and its end was never written."""
    path = run / "checkpoint-3/model.safetensors"
    path.write_bytes(path.read_bytes()[:-160] + bytes(160))  # all of n and all of b


def sparse(run: Path) -> None:
    """The zeros of a mask are holes, as a tool that copies sparsely leaves them."""
    states_are(mask=torch.zeros(1 << 20), w=noise(3, 4))(run)
    for path in run.glob("*/*"):
        content = path.read_bytes()
        start, end = 1 << 12, 1 << 21  # within the mask
        with path.open("wb") as file:
            file.write(content[:start])
            file.seek(end)
            file.write(content[end:])


ONCE = json.dumps({"w": entry()})
TWICE = f"{ONCE[:-1]},{ONCE[1:]}"
NO_SIZES = "tensor w has a shape or data_offsets that are not lists of sizes"
NOT_ONE = "is not a safetensors file: it does not start with a header"

CASES = [
    Case("empty", holds(b"")),
    Case("preallocated and never written", holds(bytes(999))),
    Case("shorter than 8 bytes", holds(b"\x10\0\0")),
    Case("cut in the header", cut(20)),
    Case("cut in the data", cut(-1)),
    Case("trailing bytes", goes_on_with(b"more")),
    Case("a header longer than the file", holds(b"\0\0\0\0\1\0\0\0{")),
    Case("a header of 2^63 bytes", holds(bytes(7) + b"\x80{")),
    Case("a header past 100 MB", holds((100_000_001).to_bytes(8, "little") + b"{}")),
    Case("a header that is not UTF-8", header(b'{"\xff":1}')),
    Case("a header that is not JSON", header("{nonsense}")),
    Case("a header that is no object", header("[]")),
    Case("a header nested thousands deep", header('{"a":' * 50_000)),
    Case("a name twice", header(TWICE)),
    Case("metadata twice", header('{"__metadata__":{},"__metadata__":{}}', 0)),
    Case("tensors that overlap", header(json.dumps({"v": entry(), "w": entry(offsets=[2, 6])}), 6)),
    Case("tensors at one place", header(json.dumps({"v": entry(), "w": entry()}))),
    Case(
        "a gap between tensors", header(json.dumps({"v": entry(), "w": entry(offsets=[5, 9])}), 9)
    ),
    Case("a gap at the start", tensor(data_offsets=[1, 5])),
    Case("an unknown dtype", tensor(dtype="F31")),
    Case("a shape that does not match", tensor(shape=[2])),
    Case("a negative size", tensor(shape=[-1])),
    Case("a size that is no integer", tensor(shape=[1.5])),
    Case("a size that is a truth value", tensor(shape=[True])),
    Case("a shape past 64 bits", tensor(shape=[2**62, 4])),
    Case("offsets past 64 bits", tensor(data_offsets=[0, 2**70])),
    Case("offsets the wrong way round", tensor(data_offsets=[4, 0])),
    Case("no dtype", tensor(dtype=None)),
    Case("no shape", tensor(shape=None)),
    Case("no offsets", tensor(data_offsets=None)),
    Case("metadata that is a number", header('{"__metadata__":{"k":1}}', 0)),
    Case("metadata that is a list", header('{"__metadata__":[]}', 0)),
    Case("no tensors", header("{}", 0)),
    Case("a terabyte in a header", tensor(shape=[2**38], data_offsets=[0, 2**40])),
    Case(
        "a Git LFS pointer",
        holds(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"),
    ),
    Case("an HTML error page", holds(b"<!DOCTYPE html>\n<html>Access denied</html>\n")),
    Case("a pickle", holds(pickle.dumps({"w": 1}, 2) + bytes(99))),
    Case("a zip", lambda run: archive(run / FILE, tensor_pickle(), _0=bytes(24))),
    Case(
        "a polyglot, safetensors at its start and a zip at its end",
        goes_on_with(b"PK\x05\x06" + bytes(18)),
    ),
    Case("blanks before the header", header("  " + ONCE)),
    Case("a FIFO", becomes(fifo)),
    Case("a folder", becomes(Path.mkdir)),
    Case("a device", becomes(links_to("/dev/zero"))),
    Case(
        "a file of /proc",
        becomes(links_to("/proc/kmsg")),
        says="is empty|not a regular file|Permission denied",
    ),
    Case("a dangling link", becomes(links_to("nowhere"))),
    Case("a link to itself", becomes(links_to("model.safetensors"))),
    Case("a legal header of 10 MB", long_metadata, code=0),
    Case("legal tensors of no elements", states_are(w=torch.empty(0, 3), v=noise(3, 2)), code=0),
    Case("a legal scalar", states_are(w=noise(3)), code=0),
    Case(
        "a tensor of new zeros", in_all(lambda state: state["b"].zero_(), 3), names="checkpoint-3"
    ),
    Case("a run that was copied sparsely", sparse, code=0),
    Case("an end that was never written", never_written, names="checkpoint-3"),
]
