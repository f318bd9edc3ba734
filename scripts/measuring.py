"""Run contenders in processes of their own, by turns, and tell in tables what they took.

It runs on Linux.
"""

import itertools
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
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from contenders import COMMAND, DECAY, IMPORT, MIB, READ, WRITE, WRITE_EIGHT, Job

SAMPLE_SECONDS = 0.005
QUIET_CORES = 0.2  # OpenMP spins: one busy neighbour made the loop 50 times slower


@dataclass(frozen=True)
class Measured:
    """One process: seconds after its imports, seconds of all of it, peaks of its memory."""

    seconds: float
    wall_seconds: float
    processor_seconds: float  # of all its threads, and of processes that it waited for
    anonymous_bytes: int
    resident_bytes: int
    others_cores: float  # that processes other than ours kept busy meanwhile
    fsync_seconds: float = 0.0


@dataclass(frozen=True)
class Promise:
    """One line of the table of promises; `held` is None where there is nothing to judge."""

    text: str
    measured: str
    held: bool | None

    def row(self) -> list[str]:
        """Cells of the line."""
        return [self.text, self.measured, {True: "held", False: "MISSED", None: "-"}[self.held]]


# Measuring


def busy_seconds() -> tuple[float, float]:
    """Processor seconds of the whole machine so far, and of this process and those it ran."""
    ticks = list(map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]))
    everybody = (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")  # idle, iowait
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return everybody, sum(usage.ru_utime + usage.ru_stime for usage in usages)


def measure(arguments: Sequence[str | Path]) -> tuple[Measured, str]:
    """Run Python with these arguments: its figures, without net seconds, and what it printed.

    Memory is sampled from outside. Linux keeps no peak of anonymous memory, and `ru_maxrss` of a
    child starts from its parent's peak.
    """
    peaks = {"RssAnon": 0, "VmHWM": 0}
    with tempfile.TemporaryFile("w+") as errors, tempfile.TemporaryFile("w+") as printed:
        everybody, ours = busy_seconds()
        start = time.perf_counter()
        process = subprocess.Popen([sys.executable, *arguments], stdout=printed, stderr=errors)
        while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
            status = Path(f"/proc/{process.pid}/status").read_text()
            for key, kibibytes in re.findall(r"(RssAnon|VmHWM):\s+(\d+)", status):
                peaks[key] = max(peaks[key], int(kibibytes) * 1024)
            time.sleep(SAMPLE_SECONDS)
        wall_seconds = time.perf_counter() - start
        _, code, usage = ended
        process.returncode = os.waitstatus_to_exitcode(code)  # nobody can wait for it again
        others = [now - then for now, then in zip(busy_seconds(), (everybody, ours), strict=True)]
        others_cores = max(0.0, others[0] - others[1]) / wall_seconds
        errors.seek(0)
        printed.seek(0)
        if process.returncode:
            sys.exit(f"{shlex.join(map(str, arguments))} failed:\n{errors.read()}")
        used = usage.ru_utime + usage.ru_stime
        memory = peaks["RssAnon"], peaks["VmHWM"]
        return Measured(0.0, wall_seconds, used, *memory, others_cores), printed.read()


def measure_contender(contender: str, job: Job) -> Measured:
    """Run one contender in a fresh process; the command itself has only a wall time."""
    places: list[str | Path] = [job.run, job.output, str(job.threads)]
    if contender != COMMAND:
        measured, printed = measure([Path(__file__).with_name("contenders.py"), contender, *places])
        return replace(measured, **json.loads(printed))
    places[1:] = ["-o", job.output, "--threads", str(job.threads)]
    options = ["--decay", str(DECAY), "--overwrite", "-q"]
    return measure(["-m", "ckpt_ema", "average", *places, *options])[0]


def take_turns(
    contenders: Iterable[str], job: Job, repeat: int
) -> tuple[dict[str, list[Measured]], dict[str, Path]]:
    """Rounds of each contender, and the folders of what each made first, below `job.output`."""
    measure_contender(READ, job)  # fills the page cache
    rounds: dict[str, list[Measured]] = {}
    outputs: dict[str, Path] = {}
    for number, contender in itertools.product(range(repeat), tuple(contenders)):
        # A finished output is not made again: each round has its own.
        output = job.output / f"out-{number}-{contender.replace(' ', '-')}"
        remove(output)
        os.sync()  # what others left to be written is not this one's to wait for
        measured = measure_contender(contender, replace(job, output=output))
        rounds.setdefault(contender, []).append(measured)
        if number == 0 and output.is_dir():
            outputs[contender] = output
        else:
            remove(output)
    return rounds, outputs


def take_off_imports(rounds: dict[str, list[Measured]]) -> None:
    """Give the command its net seconds: those of the whole process less those of its import."""
    imported = median_of(rounds[IMPORT], "wall_seconds")
    rounds[COMMAND] = [replace(m, seconds=m.wall_seconds - imported) for m in rounds[COMMAND]]


def remove(path: Path) -> None:
    """Delete a file or a folder."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def median_of(values: Sequence[Measured], field: str) -> float:
    """Median of one field over the rounds."""
    return float(statistics.median(getattr(value, field) for value in values))


# Telling


def contender_table(rounds: dict[str, list[Measured]]) -> Iterator[str]:
    """Medians of each contender, and the net seconds of each round."""
    anonymous, resident = (
        median_of(rounds[IMPORT], field) for field in ("anonymous_bytes", "resident_bytes")
    )
    rows = [
        [
            contender,
            f"{median_of(values, 'seconds'):.3f}",
            f"{median_of(values, 'wall_seconds'):.2f}",
            f"{median_of(values, 'processor_seconds'):.2f}",
            f"{(median_of(values, 'anonymous_bytes') - anonymous) / MIB:+.0f}",
            f"{(median_of(values, 'resident_bytes') - resident) / MIB:+.0f}",
            f"{max(value.others_cores for value in values):.1f}",
            " ".join(f"{value.seconds:.2f}" for value in values),
        ]
        for contender, values in rounds.items()
    ]
    header = ["contender", "net s", "wall s", "CPU s", "anon MiB", "RSS MiB", "others"]
    yield from table([*header, "rounds, net s"], rows)
    yield "net: after all imports of torch and peers (the command: wall less `import torch`)."
    yield "CPU: of all threads, imports included. others: cores that other processes kept busy;"
    yield f"above {QUIET_CORES} no figure here should be quoted."
    yield "anon, RSS: peaks of memory above those of `import torch`, which are"
    yield f"{anonymous / MIB:.0f} MiB anonymous and {resident / MIB:.0f} MiB resident.\n"
    for name in (WRITE, WRITE_EIGHT):
        if name in rounds:
            fsync = median_of(rounds[name], "fsync_seconds")
            yield f"Of `{name}`, fsync took {fsync:.3f} s. ckpt-ema makes its outputs durable,"
            yield "writing them out while it folds; all others do without.\n"


def ratio_table(
    rounds: dict[str, list[Measured]],
    pairs: Sequence[tuple[str, str]],
    field: str = "seconds",
) -> Iterator[str]:
    """Ratios of each round."""
    rows = []
    for above, below in pairs:
        found = ratios(rounds, above, below, field)
        rounded = " ".join(f"{ratio:.2f}" for ratio in found)
        rows.append([f"{above} / {below}", f"{statistics.median(found):.2f}", rounded])
    seconds = {"seconds": "net s", "wall_seconds": "wall s", "processor_seconds": "CPU s"}[field]
    yield from table([f"ratio of {seconds}", "median", "rounds"], rows)


def ratios(
    rounds: dict[str, list[Measured]], above: str, below: str, field: str = "seconds"
) -> list[float]:
    """Ratio of two contenders in each round."""
    pairs = zip(rounds[above], rounds[below], strict=True)
    return [getattr(a, field) / getattr(b, field) for a, b in pairs]


def timing_promise(text: str, measured: str, held: bool, busy_cores: float) -> Promise:
    """A promise on seconds, which a busy machine can neither hold nor miss."""
    if busy_cores > QUIET_CORES:
        return Promise(text, f"{measured}, others took {busy_cores:.1f} cores", None)
    return Promise(text, measured, held)


def promise_table(promises: Iterable[Promise]) -> Iterator[str]:
    """Promise, measured, held or missed."""
    return table(["promise", "measured", ""], [promise.row() for promise in promises])


def table(header: list[str], rows: list[list[str]]) -> Iterator[str]:
    """Lines of a Markdown table that is aligned for who reads it as text."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in [header, ["-" * width for width in widths], *rows]:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        yield f"| {' | '.join(cells)} |"
    yield ""
