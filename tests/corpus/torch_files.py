"""Broken and hostile torch files."""

import io
import pickle
import struct
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tests.corpus.case import MIDDLE, Case, Make, cut, holds
from tests.makers.tensors import quantised
from tests.makers.torch_files import (
    LEGACY_HEAD,
    archive,
    bare,
    hostile_pickles,
    legacy,
    number,
    sharded_pickle,
    tensor_pickle,
)

FILE = f"{MIDDLE}/pytorch_model.bin"
Torch = partial(Case, form="zip")
DATA = bytes(24)


def saved(make: Callable[[], Any]) -> Make:
    """The file is what torch saves of this."""

    def write(run: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that quantised tensors are deprecated
            torch.save(make(), run / FILE)

    return write


def pickled(content: bytes, data: bytes = DATA) -> Make:
    """A zip around this pickle and one storage."""
    return lambda run: archive(run / FILE, content, _0=data)


def beside(**values: Any) -> Make:
    """The model is a state dict with these in it."""
    return saved(lambda: {"w": torch.ones(5, 7), **values})


def hostile(container: Callable[..., object], suffix: str, **extra: Any) -> Make:
    """The pickle would run a command that leaves a mark beside the run."""

    def make(run: Path) -> None:
        for path in run.glob("*/pytorch_model*"):
            path.rename(path.with_name(f"pytorch_model{suffix}"))
        content = hostile_pickles(run.parent / "mark")["os.system"]
        container(run / MIDDLE / f"pytorch_model{suffix}", content, **extra)

    return make


def protocol_0(path: Path, _content: bytes) -> None:
    """A pickle in letters."""
    mark = path.parents[2] / "mark"
    path.write_bytes(b"cos\nsystem\n(S'touch %s'\ntR." % bytes(mark))


def tarred(path: Path, content: bytes) -> None:
    """A tar, as torch wrote it before 0.4 (CVE-2025-32434 is of its reader)."""
    with tarfile.open(path, "w") as target:
        for name in ("sys_info", "pickle", "tensors", "storages"):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            target.addfile(info, io.BytesIO(content))


def wrong_checksums(path: Path, content: bytes) -> None:
    """A zip whose pickle is another one, as long, than its checksum was made of."""
    archive(path, content.replace(b"touch ", b"ouch  "), _0=DATA)
    path.write_bytes(path.read_bytes().replace(b"ouch  ", b"touch "))


def deflated(run: Path) -> None:
    """3 GB of zeros in 3 MB would be next; 30 MB do."""
    with zipfile.ZipFile(run / FILE, "w", zipfile.ZIP_DEFLATED) as target:
        target.writestr("archive/data.pkl", tensor_pickle(count=number(7_500_000)))
        target.writestr("archive/data/0", bytes(30_000_000))


def undersized(run: Path) -> None:
    """A storage that is declared larger than its record (as in CVE-2026-24747)."""
    pickled(tensor_pickle(count=number(600), shape=b"(K\x02K\x03t"))(run)


READ = "checkpoint-2 has 1 tensors"  # the rest was skipped
REACHES = "reaches beyond its storage"
MANY = torch.arange(1000.0)
CLAIM = b"cbuiltins\nbytearray\n(" + number(8 << 30) + b"tR."


def all_saved(make: Callable[[int], Any], form: str = "zip") -> Make:
    """All three checkpoints are what torch saves of this."""

    def write(run: Path) -> None:
        for step in (1, 2, 3):
            path = run / f"checkpoint-{step}/pytorch_model.bin"
            torch.save(make(step), path, _use_new_zipfile_serialization=form == "zip")

    return write


def tied(step: int) -> dict[str, torch.Tensor]:
    """Two names of one storage, a view that is not contiguous, and a slice of a large one."""
    weight = torch.full((4, 3), float(step))
    return {"a": weight, "b": weight, "t": weight.t(), "slice": (MANY + step)[5:7]}


def with_gradients(step: int) -> dict[str, Any]:
    """Parameters, each with its gradient."""
    parameter = torch.nn.Parameter(torch.full((3,), float(step)))
    parameter.grad = torch.ones(3)
    return {"w": parameter}


CASES = [
    *(
        Torch(f"hostile reduce in {label}", hostile(container, suffix, **extra))
        for label, container, suffix, extra in (
            ("a zip", archive, ".bin", {"_0": DATA}),
            ("a legacy file", legacy, ".bin", {"keys": ["0"], "data": b"\6" + bytes(7) + DATA}),
            ("a zip with wrong checksums", wrong_checksums, ".bin", {}),
            ("a .pt file", archive, ".pt", {"_0": DATA}),
            ("a .ckpt file", archive, ".ckpt", {"_0": DATA}),
        )
    ),
    *(
        Torch(f"hostile reduce in {label}", hostile(container, suffix))
        for label, container, suffix in (
            ("a tar", tarred, ".bin"),
            ("a raw pickle", bare, ".bin"),
            ("a raw pickle called .pt", bare, ".pt"),
            ("a raw pickle called .ckpt", bare, ".ckpt"),
            ("a pickle in letters", protocol_0, ".bin"),
        )
    ),
    Torch("compressed records", deflated),
    Torch("a bytearray of 8 GB", pickled(b"\x80\x02" + CLAIM)),
    Torch("a storage of 2^62 elements", pickled(tensor_pickle(count=number(2**62)))),
    Torch("a storage of 2^70 elements", pickled(tensor_pickle(count=number(2**70)))),
    Torch(
        "10^12 elements of stride 0",
        pickled(tensor_pickle(shape=b"(" + number(10**12) + b"K\x01t", strides=b"(K\x00K\x00t")),
    ),
    Torch("a storage shorter than declared", undersized),
    Torch("a storage that is missing", lambda run: archive(run / FILE, tensor_pickle())),
    Torch("a view outside of its storage", pickled(tensor_pickle(offset=b"K\x01"))),
    Torch("a negative stride", pickled(tensor_pickle(strides=b"(J\xff\xff\xff\xffK\x01t"))),
    Torch("a negative offset", pickled(tensor_pickle(offset=number(-1)))),
    Torch(
        "an opcode that claims a terabyte", pickled(b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40))
    ),
    Torch("a legacy file that is cut", cut(-9, FILE), form="legacy", says="is cut short: storage"),
    Torch("a zip that is cut", cut(-9, FILE)),
    Torch("a zip of which half is there", cut(700, FILE)),
    Torch("an empty file", holds(b"", FILE)),
    Torch("text", holds(b"loss 0.3\n" * 9, FILE)),
    Torch("a legacy head alone", holds(LEGACY_HEAD, FILE)),
    Torch("a list", saved(lambda: [torch.ones(2)])),
    Torch("one bare tensor", saved(lambda: torch.ones(2))),
    Torch("an empty dict", saved(dict)),
    Torch("a pickled module", saved(lambda: torch.nn.Linear(2, 2))),
    Torch("a sparse tensor", beside(s=torch.eye(2).to_sparse())),
    Torch("a meta tensor", beside(s=torch.ones(3, device="meta"))),
    Torch("a quantised tensor", saved(lambda: {"w": torch.ones(2), "s": quantised()})),
    Torch("a ShardedTensor of one rank", pickled(sharded_pickle())),
    Torch("names that are numbers", saved(lambda: {1: torch.ones(2)})),
    Torch(
        "a name that safetensors reserves",
        all_saved(lambda step: {"__metadata__": torch.ones(2) * step}),
        names="",
    ),
    Torch(
        "plain values beside tensors",
        all_saved(lambda step: {"w": torch.ones(2) * step, "version": 3, "extra": b"\0"}),
        code=0,
    ),
    Torch("tied, strided and sliced tensors", all_saved(tied), code=0),
    Torch("tied, strided and sliced tensors in the old form", all_saved(tied, "legacy"), code=0),
    Torch("parameters with gradients", all_saved(with_gradients), code=0),
    Torch(
        "tensors saved on a GPU",
        lambda run: [
            archive(
                run / f"checkpoint-{step}/pytorch_model.bin",
                tensor_pickle().replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:3"),
                _0=struct.pack("<6f", *range(step, step + 6)),
            )
            for step in (1, 2, 3)
        ],
        code=0,
    ),
    Torch("a pickle that is none", pickled(pickle.dumps({"w": 1})[:-1])),
]
