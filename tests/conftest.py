"""One factory that makes every run the tests need; files only below tmp_path."""

import socket
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from tests.makers.safetensors_files import read_safetensors, write_safetensors, write_shards
from tests.makers.tensors import StateDict, noise, raw, series

__all__ = ["noise", "raw", "read_safetensors", "series", "write_safetensors", "write_shards"]

MakeRun = Callable[..., Path]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Offer to write what users read into the golden file, instead of comparing it."""
    parser.addoption("--write-messages", action="store_true")


def free_port() -> int:
    """Return a port at which nobody listens."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


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
