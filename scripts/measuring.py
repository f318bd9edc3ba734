"""Run contenders in turn, each as a process of its own, and check what was promised of them.

It runs on Linux, and imports little: a process begins with its parent's peak of memory.
"""

import json
import os
import re
import resource
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from runs import MIB, Run, ready

# Of the cores that others may keep busy. The kernel's CPU pressure is recorded but cannot decide:
# a contender with more threads than cores presses on itself (0.3 without anybody else).
QUIET_CORES = 0.2
SURROUNDINGS = {
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "OMP_WAIT_POLICY": "passive",  # else OpenMP's threads spin while others work
    "TOKENIZERS_PARALLELISM": "false",
}


@dataclass(frozen=True)
class Measured:
    """What one process took."""

    wall_seconds: float
    processor_seconds: float  # of all its threads, and of processes that it waited for
    resident_bytes: int  # at its peak, but no less than the peak of the benchmark itself
    others_seconds: float  # processor seconds of everything else on the machine meanwhile
    waiting_seconds: float  # in which a task of any process waited for a core
    wrong: float | None = None  # share of elements that are not the exact value, rounded once
    error: float | None = None  # root mean square, in multiples of that of rounding once


Round = dict[str, Measured]  # by the contender's name


class Contender(NamedTuple):
    """A process: its name in the report, and the arguments with which Python starts it."""

    name: str
    arguments: tuple[str, ...]  # {run} and {output} stand for folders
    run: Run | None = None  # instead of the part's
    is_judged: bool = False  # its output is compared with the exact average


def on_tiny(contender: str) -> str:
    """Name of the same contender on the tiny run, which is all start-up."""
    return f"{contender}, tiny"


class Figure(NamedTuple):
    """What is compared."""

    label: str
    of: Callable[[Measured], float]
    over_rounds: Callable[[Sequence[float]], float] = statistics.median
    is_timing: bool = True


WALL = Figure("wall s", lambda measured: measured.wall_seconds)
PROCESSOR = Figure("CPU s", lambda measured: measured.processor_seconds)
PEAK = Figure("peak MiB", lambda measured: measured.resident_bytes / MIB, max, is_timing=False)
WRONG = Figure("wrong", lambda measured: measured.wrong or 0.0, max, is_timing=False)


class Check(NamedTuple):
    """A contender's figure, or its ratio to another's; with a limit it is a promise."""

    figure: Figure
    contender: str
    over: str | None = None
    limit: float | None = None
    is_net: bool = False  # less the figure of the same contender on the tiny run

    def __str__(self) -> str:
        names = " / ".join(filter(None, (self.contender, self.over)))
        return f"{self.figure.label}{', net' if self.is_net else ''}: {names}"

    @property
    def is_promise(self) -> bool:
        """Whether there is a limit to keep."""
        return self.limit is not None

    def each(self, rounds: Sequence[Round]) -> list[float]:
        """The figure or the ratio in each round."""
        found = self._of(rounds, self.contender)
        if self.over is None:
            return found
        below = self._of(rounds, self.over)
        return [one / other for one, other in zip(found, below, strict=True)]

    def found(self, rounds: Sequence[Round]) -> float:
        """One number for all rounds."""
        return self.figure.over_rounds(self.each(rounds))

    def _of(self, rounds: Sequence[Round], contender: str) -> list[float]:
        found = [self.figure.of(taken[contender]) for taken in rounds]
        if not self.is_net:
            return found
        # The median, since the start-up of one round is as noisy as the fold is short.
        start_up = statistics.median(self.figure.of(taken[on_tiny(contender)]) for taken in rounds)
        return [value - start_up for value in found]


@dataclass(frozen=True)
class Part:
    """A part of the report: who competes on which run, and what was promised."""

    name: str  # by which the command line knows it
    title: str
    run: Run
    contenders: tuple[Contender, ...]
    checks: tuple[Check, ...]
    in_memory: bool = False  # outputs are in /dev/shm
    is_cold: bool = False  # nothing of the run is in the page cache
    average: str | None = None  # folded or mean: what the outputs are compared with


@dataclass(frozen=True)
class Result:
    """The rounds of a part that count."""

    part: Part
    rounds: list[Round]
    left_out: int = 0
    is_quiet: bool = True  # if no round was, all are here, and seconds are not judged

    def is_met(self, check: Check) -> bool | None:
        """Whether a promise was kept; None where nothing was promised, or cannot be judged."""
        if check.limit is None or (check.figure.is_timing and not self.is_quiet):
            return None
        return 0 <= check.found(self.rounds) <= check.limit  # below 0, start-up is all there is


def measure_part(part: Part, workdir: Path, repeat: int) -> Result:
    """Run the contenders in turn until `repeat` rounds were quiet, or twice as many were run.

    A round ahead of all others warms the page cache, and its outputs are judged.
    """
    with tempfile.TemporaryDirectory(dir="/dev/shm" if part.in_memory else workdir) as name:
        outputs = Path(name)
        take_turn(part, workdir, outputs)
        judged = judge(part, workdir, outputs)
        quiet: list[Round] = []
        loud: list[Round] = []
        while len(quiet) < repeat and len(quiet) + len(loud) < 2 * repeat:
            taken = take_turn(part, workdir, outputs)
            for contender, (wrong, error) in judged.items():
                taken[contender] = replace(taken[contender], wrong=wrong, error=error)
            (quiet if others_cores(taken) <= QUIET_CORES else loud).append(taken)
    return Result(part, quiet or loud, len(loud) if quiet else 0, bool(quiet))


def take_turn(part: Part, workdir: Path, outputs: Path) -> Round:
    """Measure every contender of a part once; outputs stay where they are until the next turn."""
    taken = {}
    for contender in part.contenders:
        run = ready(contender.run or part.run, workdir)
        output = output_of(contender, outputs)
        shutil.rmtree(output, ignore_errors=True)
        os.sync()  # what others left to be written is not this one's to wait for
        if part.is_cold:
            drop_from_cache(run)
        arguments = [text.format(run=run, output=output) for text in contender.arguments]
        taken[contender.name] = measure(arguments)
    return taken


def output_of(contender: Contender, outputs: Path) -> Path:
    """Where a contender writes."""
    return outputs / re.sub(r"\W+", "-", contender.name)


def drop_from_cache(run: Path) -> None:
    """Have the kernel forget what it holds of a run, which is on the disk already."""
    for path in run.rglob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(arguments: Sequence[str]) -> Measured:
    """Start Python with these arguments and wait for it."""
    with tempfile.TemporaryFile("w+") as errors:
        busy, waiting, start = busy_seconds(), waiting_seconds(), time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *arguments],
            stdout=subprocess.DEVNULL,
            stderr=errors,
            env={**os.environ, **SURROUNDINGS},
        )
        _, code, usage = os.wait4(process.pid, 0)
        wall_seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(code)  # nobody can wait for it again
        if process.returncode:
            errors.seek(0)
            sys.exit(f"{shlex.join(arguments)} failed:\n{errors.read()}")
    return Measured(
        wall_seconds,
        usage.ru_utime + usage.ru_stime,
        usage.ru_maxrss * 1024,
        max(0.0, busy_seconds() - busy),
        waiting_seconds() - waiting,
    )


def busy_seconds() -> float:
    """Processor seconds of the whole machine so far, less those of this process and its children.

    Those that a hypervisor gave to other machines are among them.
    """
    ticks = list(map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]))
    everybody = (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")  # idle, iowait
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return everybody - sum(usage.ru_utime + usage.ru_stime for usage in usages)


def waiting_seconds() -> float:
    """Seconds so far in which a task waited for a core; none where the kernel does not count."""
    pressure = Path("/proc/pressure/cpu")
    total = re.search(r"some .*total=(\d+)", pressure.read_text() if pressure.exists() else "")
    return int(total[1]) / 1e6 if total else 0.0


def others_cores(taken: Round) -> float:
    """Cores that others kept busy while the processes of a round ran."""
    return share_of(taken, lambda measured: measured.others_seconds)


def share_of(taken: Round, seconds: Callable[[Measured], float]) -> float:
    """Such seconds of all processes of a round, over their wall seconds."""
    wall_seconds = sum(measured.wall_seconds for measured in taken.values())
    return sum(seconds(measured) for measured in taken.values()) / wall_seconds


def judge(part: Part, workdir: Path, outputs: Path) -> dict[str, tuple[float, float]]:
    """`wrong` and `error` of each contender's output, by a process of its own: it needs torch."""
    if part.average is None:
        return {}
    folders = {c.name: output_of(c, outputs) for c in part.contenders if c.is_judged}
    script = str(Path(__file__).with_name("exactness.py"))
    places = [ready(part.run, workdir), *folders.values()]
    done = subprocess.run(
        [sys.executable, script, part.average, *map(str, places)],
        check=True,
        stdout=subprocess.PIPE,
    )
    return dict(zip(folders, json.loads(done.stdout), strict=True))
