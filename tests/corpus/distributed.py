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
    Dcp("the newest is still being written", without_metadata, "checkpoint-3 is incomplete", 0),
    Dcp(
        "metadata that would run a command",
        hostile,
        "which no metadata of a checkpoint needs; torch would run it",
    ),
    Dcp(
        "no .metadata, as a crashed save leaves it",
        is_gone(META),
        "has data files but no .metadata",
    ),
    Dcp(
        "a data file that is missing", is_gone(DATA), "names __0_0.distcp, and that file is missing"
    ),
    Dcp(
        "a data file that is cut", cut(100, DATA), "is cut short: tensor model.. would end at byte"
    ),
    Dcp(
        "a data file that is empty",
        holds(b"", DATA),
        "is cut short: tensor model.. would end at byte .* has 0",
    ),
    Dcp("a data file that is a FIFO", becomes(fifo, DATA), "is not a regular file"),
    Dcp("metadata that is cut", cut(-5, META), "is cut short or damaged"),
    Dcp("metadata that is empty", holds(b"", META), "is cut short or damaged: it ends too soon"),
    Dcp("metadata that is text", holds(b"{}", META), "is cut short or damaged: it is not a pickle"),
    Dcp("metadata that is a FIFO", becomes(fifo, META), "is not a regular file"),
    Dcp(
        "metadata of a terabyte",
        lambda run: os.truncate(run / META, 1 << 40),
        "is too large to be the metadata",
    ),
    Dcp("a path that escapes", file_is("../checkpoint-1/__0_0.distcp"), "not a plain file name"),
    Dcp("an absolute path", file_is("/etc/passwd"), "not a plain file name"),
    Dcp(
        "rows that no chunk covers",
        chunks(((0, 0), (3, 7))),
        "do not cover its shape .* exactly once",
    ),
    Dcp(
        "chunks that overlap",
        chunks(((0, 0), (3, 7)), ((2, 0), (3, 7))),
        "do not cover its shape .* exactly once",
    ),
    Dcp("a huge shape with a tiny file", metadata(huge), "but the metadata has F32"),
]
