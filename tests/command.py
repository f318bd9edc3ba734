"""The command as a process of its own, forked from one that has imported torch.

Importing torch is nine tenths of the time of a small average. What is left out by that, how the
interpreter starts and ends, the smoke test and the pipeline step cover.
"""

import contextlib
import functools
import json
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, NoReturn

import pytest

ENVIRONMENT = {
    "TYPER_USE_RICH": "0",
    "COLUMNS": "80",
    "GITHUB_STEP_SUMMARY": "",
    "TORCH_CPP_LOG_LEVEL": "FATAL",  # the command sets it, but torch reads it when it is imported
}
_PRELOADED = [
    *("torch.distributed.checkpoint", "torch.distributed.tensor"),
    *("typer._adapters", "safetensors.torch", "tqdm.auto"),
    *("ckpt_ema.cli.app", "ckpt_ema.run", "ckpt_ema.fold.engine", "ckpt_ema.report.terminal"),
    *("tests.command", "tests.conftest", "tests.corpus"),
]


@functools.cache
def processes() -> ForkServerContext:
    """What makes processes by forking one that has imported all that they need."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    with pytest.MonkeyPatch.context() as patched:
        for name, value in ENVIRONMENT.items():
            patched.setenv(name, value)  # typer asks when it is imported
        forkserver.ensure_running()
    return context


def run_together(function: Callable[..., object], every_args: Sequence[tuple[Any, ...]]) -> None:
    """Call a function in one process for each tuple of arguments, all at a time."""
    team = [processes().Process(target=function, args=args) for args in every_args]
    for process in team:
        process.start()
    deadline = time.monotonic() + 60
    for process in team:
        process.join(max(0, deadline - time.monotonic()))
        process.kill()
        process.join()
    assert [process.exitcode for process in team] == [0] * len(team)


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    returncode: int  # negative: the signal that killed it
    stdout: str
    stderr: str
    cpu_seconds: float  # without the imports; 0 if it was killed
    grown_bytes: int  # of resident memory, from its start to its peak; 0 if it was killed


class Command:
    """A command that has been started."""

    def __init__(
        self,
        *words: Any,
        env: Mapping[str, Any] | None = None,
        cwd: Path | str = "/",
        before: Callable[[], object] | None = None,
        stdout: Path | str = "",
        stderr: Path | str = "",
    ) -> None:
        """Start it, with `env` beside the environment's variables.

        `before` is called in the process first; it must be importable. `stdout` and `stderr` are
        files to write to; without them, both are collected.
        """
        self._folder = tempfile.TemporaryDirectory(prefix="command-")
        folder = Path(self._folder.name)
        self._paths = [Path(stdout or folder / "out"), Path(stderr or folder / "err")]
        self._cost = folder / "cost"
        variables = {name: str(value) for name, value in (env or {}).items()}
        task = _Task(
            [str(word) for word in words],
            [str(path) for path in (*self._paths, self._cost)],
            {**os.environ, **ENVIRONMENT, **variables},
            str(cwd),
            before,
        )
        self._process = processes().Process(target=_carry_out, args=(task,))
        self._process.start()

    def send_signal(self, number: int) -> None:
        """Send it a signal, if it has not ended yet."""
        assert self._process.pid is not None
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, number)

    def wait(self, seconds: float = 60) -> Done:
        """Wait until it has ended; one that takes longer is killed and fails the test."""
        self._process.join(seconds)
        hangs = self._process.is_alive()
        self._process.kill()
        self._process.join()
        stdout, stderr = (os.fsdecode(p.read_bytes()) if p.is_file() else "" for p in self._paths)
        cost = json.loads(self._cost.read_text() or "[0, 0]")
        self._folder.cleanup()
        assert not hangs, f"after {seconds} seconds it still runs: {stdout}{stderr}"
        assert self._process.exitcode is not None
        return Done(self._process.exitcode, stdout, stderr, *cost)


def ckpt_ema(*words: Any, **options: Any) -> Done:
    """Run the command to its end; the options are those of `Command`."""
    return Command(*words, **options).wait()


def wait_for(seen: Callable[[], object]) -> None:
    """Wait until something is seen, but not forever."""
    deadline = time.monotonic() + 50
    while not seen():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@dataclass(frozen=True)
class _Task:
    words: list[str]
    paths: list[str]  # for stdout, stderr and what it cost
    environment: dict[str, str]
    folder: str
    before: Callable[[], object] | None


def _carry_out(task: _Task) -> None:
    from ckpt_ema import __main__ as module
    from ckpt_ema.cli import app

    files = [os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOCTTY) for path in task.paths]
    os.dup2(files[0], 1)
    os.dup2(files[1], 2)
    os.environ.clear()
    os.environ.update(task.environment)
    os.chdir(task.folder)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a shell's foreground
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup has it ignored
    sys.argv = [module.__file__, *task.words]
    before_bytes, real_exit = _peak_bytes(), os._exit

    def exit_at_last(status: int) -> NoReturn:
        used = resource.getrusage(resource.RUSAGE_SELF)
        seconds = used.ru_utime + used.ru_stime
        os.write(files[2], json.dumps([seconds, _peak_bytes() - before_bytes]).encode())
        real_exit(status)

    os._exit = exit_at_last  # which ends the process in any case, whether by the command or not
    if task.before:
        task.before()
    app.main()


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
