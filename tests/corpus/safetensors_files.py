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
    Case("empty", holds(b""), "is empty"),
    Case("preallocated and never written", holds(bytes(999)), "begins with zeros"),
    Case("shorter than 8 bytes", holds(b"\x10\0\0"), NOT_ONE),
    Case("cut in the header", cut(20), "is cut short: its header alone takes .* has 20"),
    Case("cut in the data", cut(-1), "is cut short: its header promises 292 bytes .* has 291"),
    Case("trailing bytes", goes_on_with(b"more"), "has 4 bytes after its last tensor"),
    Case("a header longer than the file", holds(b"\0\0\0\0\1\0\0\0{"), NOT_ONE),
    Case("a header of 2^63 bytes", holds(bytes(7) + b"\x80{"), NOT_ONE),
    Case("a header past 100 MB", holds((100_000_001).to_bytes(8, "little") + b"{}"), NOT_ONE),
    Case("a header that is not UTF-8", header(b'{"\xff":1}'), "has a broken header: 'utf-8' codec"),
    Case(
        "a header that is not JSON", header("{nonsense}"), "has a broken header: Expecting property"
    ),
    Case("a header that is no object", header("[]"), NOT_ONE),
    Case("a header nested thousands deep", header('{"a":' * 50_000), "it is nested too deeply"),
    Case("a name twice", header(TWICE), "'w' is there twice"),
    Case("metadata twice", header('{"__metadata__":{},"__metadata__":{}}', 0), "is there twice"),
    Case(
        "tensors that overlap",
        header(json.dumps({"v": entry(), "w": entry(offsets=[2, 6])}), 6),
        "tensor w overlaps another",
    ),
    Case(
        "tensors at one place",
        header(json.dumps({"v": entry(), "w": entry()})),
        "tensor w overlaps another",
    ),
    Case(
        "a gap between tensors",
        header(json.dumps({"v": entry(), "w": entry(offsets=[5, 9])}), 9),
        "tensor w leaves a gap before it",
    ),
    Case("a gap at the start", tensor(data_offsets=[1, 5]), "tensor w leaves a gap before it"),
    Case("an unknown dtype", tensor(dtype="F31"), "tensor w has an unknown dtype, F31"),
    Case("a shape that does not match", tensor(shape=[2]), r"its shape \[2\] in F32 takes 8"),
    Case("a negative size", tensor(shape=[-1]), "-1 is not a size"),
    Case("a size that is no integer", tensor(shape=[1.5]), NO_SIZES),
    Case("a size that is a truth value", tensor(shape=[True]), NO_SIZES),
    Case("a shape past 64 bits", tensor(shape=[2**62, 4]), "a shape too large for 64 bits"),
    Case("offsets past 64 bits", tensor(data_offsets=[0, 2**70]), NO_SIZES),
    Case("offsets the wrong way round", tensor(data_offsets=[4, 0]), "tensor w spans -4 bytes"),
    Case("no dtype", tensor(dtype=None), "must have dtype, shape and data_offsets"),
    Case("no shape", tensor(shape=None), "must have dtype, shape and data_offsets"),
    Case("no offsets", tensor(data_offsets=None), "must have dtype, shape and data_offsets"),
    Case("metadata that is a number", header('{"__metadata__":{"k":1}}', 0), "strings to strings"),
    Case("metadata that is a list", header('{"__metadata__":[]}', 0), "strings to strings"),
    Case("no tensors", header("{}", 0), "holds no tensors"),
    Case(
        "a terabyte in a header",
        tensor(shape=[2**38], data_offsets=[0, 2**40]),
        "promises 1099511627776 bytes of data, the file has 4",
    ),
    Case(
        "a Git LFS pointer",
        holds(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"),
        "is a Git LFS pointer. Run `git lfs pull`",
    ),
    Case("an HTML error page", holds(b"<!DOCTYPE html>\n<html>Access denied</html>\n"), NOT_ONE),
    Case("a pickle", holds(pickle.dumps({"w": 1}, 2) + bytes(99)), "is a torch file under a"),
    Case("a zip", lambda run: archive(run / FILE, tensor_pickle(), _0=bytes(24)), "a torch file"),
    Case(
        "a polyglot, safetensors at its start and a zip at its end",
        goes_on_with(b"PK\x05\x06" + bytes(18)),
        "has 22 bytes after its last tensor",
    ),
    Case("blanks before the header", header("  " + ONCE), NOT_ONE),
    Case("a FIFO", becomes(fifo), "is not a regular file"),
    Case("a folder", becomes(Path.mkdir), "is not a regular file"),
    Case("a device", becomes(links_to("/dev/zero")), "is not a regular file"),
    Case(
        "a file of /proc",
        becomes(links_to("/proc/kmsg")),
        "is empty|not a regular file|Permission denied",
    ),
    Case("a dangling link", becomes(links_to("nowhere")), "model.safetensors does not exist"),
    Case(
        "a link to itself",
        becomes(links_to("model.safetensors")),
        "Too many levels of symbolic links",
    ),
    Case("a legal header of 10 MB", long_metadata, "", 0),
    Case("legal tensors of no elements", states_are(w=torch.empty(0, 3), v=noise(3, 2)), "", 0),
    Case("a legal scalar", states_are(w=noise(3)), "", 0),
    Case(
        "a tensor that turns to zeros",
        in_all(lambda state: state["b"].zero_(), 3),
        "checkpoint-3: tensor b turns to zeros",
        0,
    ),
    Case("a run that was copied sparsely", sparse, "and 2 more files. has a hole at byte", 0),
    Case(
        "an end that was never written", never_written, "checkpoint-3: tensor b turns to zeros", 0
    ),
]
