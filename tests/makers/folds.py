"""The fold by torch where the compiled module is there too, and counts of what the latter reads."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import pytest

from ckpt_ema.fold import native

_MODULE = "ckpt_ema._compiled"


@contextmanager
def by_torch() -> Iterator[None]:
    """Have torch fold on the CPU inside of the block, as if nothing had been compiled.

    Where torch is not installed, the test is skipped.
    """
    pytest.importorskip("torch")
    patched = pytest.MonkeyPatch()
    patched.setitem(cast(dict[str, object], sys.modules), _MODULE, None)
    _search_again()
    try:
        yield
    finally:
        patched.undo()
        _search_again()


def without_compiled() -> None:
    """Have torch fold on the CPU for the rest of the process."""
    sys.modules[_MODULE] = None  # type: ignore[assignment]  # such an import fails
    _search_again()


def bytes_read_by_this_process() -> int:
    """Return how many bytes all its reads have transferred so far, whoever made them."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["rchar"])


def _search_again() -> None:
    for function in vars(native).values():
        if clear := getattr(function, "cache_clear", None):
            clear()
