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

import pytest

from ckpt_ema.report import progress
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


@pytest.mark.parametrize(("variables", "shown"), [({}, True), ({"TQDM_DISABLE": "1"}, False)])
def test_a_terminal_gets_a_bar_unless_it_is_switched_off(
    make_run: MakeRun, variables: dict[str, str], shown: bool
) -> None:
    run = make_run(series(2, w=noise(2, 1000)))
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    command = [sys.executable, "-m", "ckpt_ema", "average", str(run), "--device", "cpu"]
    environment = {**os.environ, **variables}  # tqdm asks when it is imported
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=theirs, env=environment)
    os.close(theirs)
    text = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert done.returncode == 0
    assert ("averaging:" in text) == shown


@pytest.mark.parametrize("quiet", [True, False])
def test_no_thread_is_started_for_it(quiet: bool) -> None:
    before = threading.active_count()
    with progress.ByteProgress(quiet) as show:
        show(1024, 4096)
        assert threading.active_count() == before
