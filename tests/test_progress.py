"""Progress: a bar on a terminal, a line now and then in a log, nothing when quiet."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator

import pytest

from ckpt_ema.report import progress
from tests.command import ckpt_ema
from tests.conftest import MakeRun, noise, series


@pytest.mark.parametrize(("quiet", "lines"), [(False, 1), (True, 0)])
def test_a_log_gets_a_plain_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], quiet: bool, lines: int
) -> None:
    clock = iter([0.0, 10.0, 40.0, 50.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    with progress.ByteProgress(quiet) as show:
        for done in (1024, 2048, 3072):
            show(done, 4096)
    expected = "2.0 KiB of 4.0 KiB, 51 B/s, 40 s left\n"
    assert capsys.readouterr().err == expected * lines


def test_a_log_says_that_nothing_arrives(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 10.0, 40.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    with progress.ByteProgress(False) as show:
        for done in (1024, 1024):
            show(done, 4096)
    assert capsys.readouterr().err == "1.0 KiB of 4.0 KiB, 26 B/s, nothing read for 30 s\n"


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    """Our end of a terminal of 80 columns, and that of a command."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    yield ours, theirs
    os.close(ours)
    os.close(theirs)


def test_a_terminal_gets_a_bar(make_run: MakeRun, terminal: tuple[int, int]) -> None:
    run, (ours, theirs) = make_run(series(2, w=noise(2, 1000))), terminal
    done = ckpt_ema("average", run, "--device", "cpu", stderr=os.ttyname(theirs))
    assert done.returncode == 0
    assert b"averaging:" in os.read(ours, 1 << 16)


def test_a_bar_can_be_switched_off(make_run: MakeRun, terminal: tuple[int, int]) -> None:
    """In a fresh interpreter, since tqdm asks when it is imported."""
    run, (ours, theirs) = make_run(series(2, w=noise(2, 1000))), terminal
    words = [sys.executable, "-m", "ckpt_ema", "average", str(run), "--device", "cpu"]
    without = {**os.environ, "TQDM_DISABLE": "1"}
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=theirs, env=without)
    assert done.returncode == 0
    text = os.read(ours, 1 << 16)
    assert b"run-ema" in text
    assert b"averaging:" not in text


@pytest.mark.parametrize("quiet", [True, False])
def test_no_thread_is_started_for_it(quiet: bool) -> None:
    before = threading.active_count()
    with progress.ByteProgress(quiet) as show:
        show(1024, 4096)
        assert threading.active_count() == before
