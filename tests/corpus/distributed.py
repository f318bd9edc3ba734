"""Broken and hostile distributed checkpoints (DCP)."""

import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

from tests.corpus.case import MIDDLE, Case, Make, becomes, cut, fifo, holds, is_gone
from tests.makers.dcp_folders import chunked, edit, place, w
from tests.makers.torch_files import hostile_pickles

META, DATA = f"{MIDDLE}/.metadata", f"{MIDDLE}/__0_0.distcp"
Dcp = partial(Case, form="dcp")


def metadata(change: Any) -> Make:
    """The metadata is changed."""
    return lambda run: edit(run / MIDDLE, change)


def file_is(name: str) -> Make:
    """Tensor w is said to be in this file."""
    return metadata(lambda m: setattr(place(m), "relative_path", name))


def chunks(*boxes: Any) -> Make:
    """Tensor w, 5 by 7, is said to be in these chunks (offsets, sizes)."""
    return metadata(lambda m: chunked(m, (5, 7), *boxes))


def huge(content: Metadata) -> None:
    """A tensor of 2^60 elements in a file of a few bytes."""
    w(content).size = torch.Size((2**40, 2**20))
    w(content).chunks[0].sizes = torch.Size((2**40, 2**20))


def hostile(run: Path) -> None:
    """The metadata is a pickle that would leave a mark."""
    (run / META).write_bytes(hostile_pickles(run.parent / "mark")["os.system"])


def without_metadata(run: Path) -> None:
    """The newest is still being written."""
    (run / "checkpoint-3/.metadata").unlink()


CASES = [
    Dcp("the newest is still being written", without_metadata, code=0),
    Dcp("metadata that would run a command", hostile),
    Dcp("no .metadata, as a crashed save leaves it", is_gone(META)),
    Dcp("a data file that is missing", is_gone(DATA)),
    Dcp("a data file that is cut", cut(100, DATA)),
    Dcp("a data file that is empty", holds(b"", DATA)),
    Dcp("a data file that is a FIFO", becomes(fifo, DATA)),
    Dcp("metadata that is cut", cut(-5, META)),
    Dcp("metadata that is empty", holds(b"", META)),
    Dcp("metadata that is text", holds(b"{}", META)),
    Dcp("metadata that is a FIFO", becomes(fifo, META)),
    Dcp("metadata of a terabyte", lambda run: os.truncate(run / META, 1 << 40)),
    Dcp("a path that escapes", file_is("../checkpoint-1/__0_0.distcp")),
    Dcp("an absolute path", file_is("/etc/passwd")),
    Dcp("rows that no chunk covers", chunks(((0, 0), (3, 7)))),
    Dcp("chunks that overlap", chunks(((0, 0), (3, 7)), ((2, 0), (3, 7)))),
    Dcp("a huge shape with a tiny file", metadata(huge)),
]
