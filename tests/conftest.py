"""One factory that makes every run the tests need; files only below tmp_path.

Where torch, numpy or obstore is not installed, test modules that import it are left out.
"""

from __future__ import annotations

import ast
import importlib.util
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType

import pytest

from ckpt_ema.fold.native import compiled
from tests.makers.folds import by_torch

MISSING = {name for name in ("torch", "numpy", "obstore") if importlib.util.find_spec(name) is None}
if "torch" not in MISSING:
    import torch

    from tests.makers.safetensors_files import read_safetensors, write_safetensors, write_shards
    from tests.makers.tensors import StateDict, noise, raw, series

__all__ = ["noise", "raw", "read_safetensors", "series", "write_safetensors", "write_shards"]

ROOT = Path(__file__).parent.parent
MakeRun = Callable[..., Path]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Offer to write what users read into the golden file, instead of comparing it."""
    parser.addoption("--write-messages", action="store_true")


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave out modules that import what is not installed; None lets others decide."""
    return True if MISSING and _imports_missing(collection_path) else None


def _imports_missing(path: Path, seen: frozenset[Path] = frozenset()) -> bool:
    """Return whether a module imports what is missing, itself or through another of the tests."""
    if path.suffix != ".py" or path in seen:
        return False
    imported = set(_imported(path))
    if any(name.partition(".")[0] in MISSING for name in imported):
        return True
    ours = [ROOT / name.replace(".", "/") for name in imported if name.startswith("tests.")]
    files = [file for home in ours for file in (home.with_suffix(".py"), home / "__init__.py")]
    seen |= {path}
    return any(_imports_missing(file, seen) for file in files if file.is_file())


def _imported(path: Path) -> Iterator[str]:
    """Yield the names that a module imports, each with its module."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def free_port() -> int:
    """Return a port at which nobody listens."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture(params=["compiled", "torch"])
def either_fold(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run a test with the compiled fold, and again with torch's."""
    with by_torch() if request.param == "torch" else nullcontext():
        yield


@pytest.fixture
def compiled_module() -> ModuleType:
    """The compiled fold; a test of it is skipped where there is none."""
    return compiled() or pytest.skip("the fold is not compiled here")


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """A function that writes a run of checkpoint folders and returns the run's folder."""

    def make(
        states: Sequence[StateDict],
        steps: Sequence[int] | None = None,
        name: str = "run",
        pattern: str = "checkpoint-{}",
        shards: int = 0,
        torch_files: bool = False,
    ) -> Path:
        run = tmp_path / name
        for step, state in zip(steps or range(1, len(states) + 1), states, strict=True):
            folder = run / pattern.format(step)
            folder.mkdir(parents=True)
            (folder / "config.json").write_text('{"architectures": ["Tiny"]}')
            (folder / "optimizer.pt").write_bytes(b"state of the optimizer")
            if torch_files:
                torch.save(dict(state), folder / "pytorch_model.bin")
            elif shards:
                write_shards(folder, state, shards)
            else:
                write_safetensors(folder / "model.safetensors", state)
        return run

    return make
