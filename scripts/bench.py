"""Measure ckpt-ema against reading the bytes and against the loop that everybody writes; long,
because it measures speed, memory and start-up, checks the answers and reports them by itself.

Each contender is a process of its own, so that its memory is its own; they take turns, because
only ratios within one run can be compared. It runs on Linux.
"""

import argparse
import filecmp
import itertools
import json
import os
import platform
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
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

from contenders import (
    AVERAGE,
    CHUNK_ELEMENTS,
    CONTENDERS,
    EIGHT,
    HALF_LIVES,
    IMPORT,
    ITEM_BYTES,
    LOOP,
    MIB,
    OF_MANY,
    OF_RANKS,
    ONE,
    RANKS,
    READ,
    TORCHS,
    WRITE,
    WRITE_EIGHT,
    Job,
    Settings,
    decay_of,
    make_run,
    make_sparse_run,
    make_uniform_run,
    weights_files,
)

REPOSITORY = Path(__file__).resolve().parents[1]
SAMPLE_SECONDS = 0.005
QUIET_CORES = 0.2  # OpenMP spins: one busy neighbour made the loop 50 times slower
PROMISED_SPEEDUP = {"bfloat16": 3.0, "float32": 4.5}
PROMISED_TIMES_READING = 3.2
PROMISED_ANONYMOUS_MIB = 120
SAME_ANONYMOUS_MIB = 16  # between two runs of one setting: thread stacks and allocator arenas
PROMISED_TIMES_ONE = 2.5  # eight averages in one pass, in bfloat16
TILE_BYTES = (1 << 18) * 8  # of one accumulator at its largest
PROMISED_TIMES_THREADS = 1.2  # two ranks against two threads
PROMISED_TIMES_FEW = 4.0  # the same bytes in a thousand times as many tensors
PROMISED_PLAN_SECONDS, PROMISED_PLAN_MIB = 10, 200  # of 50 checkpoints of a 70B model
PROMISED_STARTUP = 1 / 3  # of the time of `import torch`


@dataclass(frozen=True)
class Measured:
    """One process: seconds after `import torch`, seconds of all of it, peaks of its memory."""

    seconds: float
    wall_seconds: float
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


COMMAND = "ckpt-ema average"


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
        while process.poll() is None:
            status = Path(f"/proc/{process.pid}/status").read_text()
            for key, kibibytes in re.findall(r"(RssAnon|VmHWM):\s+(\d+)", status):
                peaks[key] = max(peaks[key], int(kibibytes) * 1024)
            time.sleep(SAMPLE_SECONDS)
        wall_seconds = time.perf_counter() - start
        others = [now - then for now, then in zip(busy_seconds(), (everybody, ours), strict=True)]
        others_cores = max(0.0, others[0] - others[1]) / wall_seconds
        errors.seek(0)
        printed.seek(0)
        if process.returncode:
            sys.exit(f"{shlex.join(map(str, arguments))} failed:\n{errors.read()}")
        figures = Measured(0.0, wall_seconds, peaks["RssAnon"], peaks["VmHWM"], others_cores)
        return figures, printed.read()


def measure_contender(contender: str, job: Job) -> Measured:
    """Run one contender in a fresh process; the command itself has only a wall time."""
    places: list[str | Path] = [job.run, job.output, str(job.threads)]
    if contender != COMMAND:
        measured, printed = measure([Path(__file__).with_name("contenders.py"), contender, *places])
        return replace(measured, **json.loads(printed))
    command: list[str | Path] = [
        "-m",
        "ckpt_ema",
        "average",
        job.run,
        "-o",
        job.output,
        "--overwrite",
        "-q",
    ]
    return measure([*command, "--threads", str(job.threads)])[0]


def remove(path: Path) -> None:
    """Delete a file or a folder."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def median_of(values: Sequence[Measured], field: str) -> float:
    """Median of one field over the rounds."""
    return float(statistics.median(getattr(value, field) for value in values))


# Checking the outputs against a float64 fold


def tensor_ranges(path: Path) -> dict[str, tuple[int, int]]:
    """First and last byte in the file of each tensor."""
    with path.open("rb") as file:
        size_bytes = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size_bytes))
    header.pop("__metadata__", None)
    offsets = {name: entry["data_offsets"] for name, entry in header.items()}
    return {name: (8 + size_bytes + a, 8 + size_bytes + b) for name, (a, b) in offsets.items()}


def count_differences(settings: Settings, run: Path, outputs: dict[str, Path]) -> dict[str, int]:
    """Elements of each output that are not the float64 fold rounded once."""
    import torch

    dtype = getattr(torch, settings.dtype)
    step_bytes = CHUNK_ELEMENTS * ITEM_BYTES[settings.dtype]
    inputs = [(path, tensor_ranges(path)) for path in weights_files(run)]
    averaged = {name: (path, tensor_ranges(path)) for name, path in outputs.items()}
    differences = dict.fromkeys(outputs, 0)

    def read(path: Path, begin: int, size_bytes: int) -> torch.Tensor:
        with path.open("rb") as file:
            file.seek(begin)
            return torch.frombuffer(bytearray(file.read(size_bytes)), dtype=dtype)

    for tensor, (begin, end) in inputs[0][1].items():
        for skipped in range(0, end - begin, step_bytes):
            size_bytes = min(step_bytes, end - begin - skipped)
            parts = (read(path, at[tensor][0] + skipped, size_bytes) for path, at in inputs)
            shadow = next(parts).double()
            for fold, part in enumerate(parts, start=1):
                shadow.lerp_(part.double(), 1 - decay_of(fold))
            expected = shadow.to(dtype)
            for name, (path, at) in averaged.items():
                found = read(path, at[tensor][0] + skipped, size_bytes)
                differences[name] += int(torch.ne(found, expected).sum())
    return differences


# The parts of the report


def measure_speed(settings: Settings, workdir: Path, repeat: int) -> Iterator[str]:
    """Seconds, memory and answers of every contender, taking turns."""
    run = make_run(settings, workdir)
    measure_contender(READ, Job(run, workdir, settings.threads))  # fills the page cache
    rounds: dict[str, list[Measured]] = {}
    outputs: dict[str, Path] = {}
    for number, contender in itertools.product(range(repeat), (*CONTENDERS, COMMAND)):
        # A finished output is not made again: each round has its own.
        output = workdir / f"out-{number}-{contender.replace(' ', '-')}"
        remove(output)
        measured = measure_contender(contender, Job(run, output, settings.threads))
        rounds.setdefault(contender, []).append(measured)
        if number == 0 and output.is_dir():
            outputs[contender] = output / "model.safetensors"
        else:
            remove(output)
    differences = count_differences(settings, run, outputs)
    for path in outputs.values():
        remove(path.parent)
    imported = median_of(rounds[IMPORT], "wall_seconds")
    rounds[COMMAND] = [replace(m, seconds=m.wall_seconds - imported) for m in rounds[COMMAND]]
    yield (
        f"## Speed: {settings.dtype}, {settings.checkpoints} checkpoints of "
        f"{settings.size_bytes // MIB} MiB, {settings.threads} threads\n"
    )
    yield from contender_table(rounds)
    yield from ratio_table(rounds, OF_SPEED)
    yield from promise_table(speed_promises(settings, rounds, differences))


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
            f"{(median_of(values, 'anonymous_bytes') - anonymous) / MIB:+.0f}",
            f"{(median_of(values, 'resident_bytes') - resident) / MIB:+.0f}",
            f"{max(value.others_cores for value in values):.1f}",
            " ".join(f"{value.seconds:.2f}" for value in values),
        ]
        for contender, values in rounds.items()
    ]
    yield from table(
        ["contender", "net s", "wall s", "anon MiB", "RSS MiB", "others", "rounds, net s"], rows
    )
    yield "net: after `import torch` (the command: wall less the import's). others: cores that"
    yield f"other processes kept busy; above {QUIET_CORES} no figure here should be quoted."
    yield "anon, RSS: peaks of memory above those of `import torch`, which are"
    yield f"{anonymous / MIB:.0f} MiB anonymous and {resident / MIB:.0f} MiB resident."
    for name in (WRITE, WRITE_EIGHT):
        if name in rounds:
            fsync = median_of(rounds[name], "fsync_seconds")
            yield f"Of `{name}`, fsync took {fsync:.3f} s. ckpt-ema makes its outputs durable,"
            yield "writing them out while it folds; all others do without.\n"


OF_SPEED = (
    (LOOP, AVERAGE),
    (LOOP, COMMAND),
    (TORCHS, AVERAGE),
    (AVERAGE, READ),
    (LOOP, READ),
)


def ratio_table(
    rounds: dict[str, list[Measured]], pairs: Sequence[tuple[str, str]]
) -> Iterator[str]:
    """Ratios of each round."""
    rows = []
    for above, below in pairs:
        found = ratios(rounds, above, below)
        rounded = " ".join(f"{ratio:.2f}" for ratio in found)
        rows.append([f"{above} / {below}", f"{statistics.median(found):.2f}", rounded])
    yield from table(["ratio of net s", "median", "rounds"], rows)


def ratios(rounds: dict[str, list[Measured]], above: str, below: str) -> list[float]:
    """Ratio of two contenders in each round."""
    return [a.seconds / b.seconds for a, b in zip(rounds[above], rounds[below], strict=True)]


def speed_promises(
    settings: Settings, rounds: dict[str, list[Measured]], differences: dict[str, int]
) -> Iterator[Promise]:
    """What was promised for a run in the page cache, beside what was measured."""
    busy = max(value.others_cores for values in rounds.values() for value in values)
    speedup = statistics.median(ratios(rounds, LOOP, AVERAGE))
    promised = PROMISED_SPEEDUP[settings.dtype]
    text = f"at least {promised:g} times as fast as {LOOP}"
    yield timing_promise(text, f"{speedup:.2f}", speedup >= promised, busy)
    times = statistics.median(ratios(rounds, AVERAGE, READ))
    text = f"at most {PROMISED_TIMES_READING:g} times the time of reading"
    yield timing_promise(text, f"{times:.2f}", times <= PROMISED_TIMES_READING, busy)
    imported = median_of(rounds[IMPORT], "anonymous_bytes")
    peak = max(value.anonymous_bytes for value in rounds[AVERAGE]) - imported
    yield anonymous_promise("", peak)
    elements = settings.size_bytes // ITEM_BYTES[settings.dtype]
    for contender, count in differences.items():
        # float64, rounded to a narrower type, is rounded twice in about 1 element of 2**29.
        held = None if contender in (LOOP, TORCHS) else count <= elements >> 27
        text = f"{contender}: elements that differ from a float64 fold"
        yield Promise(text, f"{count} of {elements}", held)


def timing_promise(text: str, measured: str, held: bool, busy_cores: float) -> Promise:
    """A promise on seconds, which a busy machine can neither hold nor miss."""
    if busy_cores > QUIET_CORES:
        return Promise(text, f"{measured}, others took {busy_cores:.1f} cores", None)
    return Promise(text, measured, held)


def anonymous_promise(which: str, peak_bytes: float) -> Promise:
    """The promise on memory."""
    return Promise(
        f"{which}peak anonymous memory at most {PROMISED_ANONYMOUS_MIB} MiB above `import torch`",
        f"{peak_bytes / MIB:.0f} MiB",
        peak_bytes <= PROMISED_ANONYMOUS_MIB * MIB,
    )


def measure_many(settings: Settings, workdir: Path, repeat: int) -> Iterator[str]:
    """Eight averages in one pass beside one of them."""
    run = make_run(settings, workdir)
    measure_contender(READ, Job(run, workdir, settings.threads))  # fills the page cache
    rounds: dict[str, list[Measured]] = {}
    alike = False
    for number in range(repeat):
        outputs = {}
        for contender in OF_MANY:
            outputs[contender] = workdir / f"out-{contender.replace(' ', '-')}"
            remove(outputs[contender])
            job = Job(run, outputs[contender], settings.threads)
            rounds.setdefault(contender, []).append(measure_contender(contender, job))
        if number == 0:
            alone = outputs[ONE] / "model.safetensors"
            together = outputs[EIGHT] / f"half-life-{HALF_LIVES[0]}" / "model.safetensors"
            alike = filecmp.cmp(alone, together, shallow=False)
        for output in outputs.values():
            remove(output)
    yield (
        f"## Several averages: {settings.dtype}, {settings.checkpoints} checkpoints of "
        f"{settings.size_bytes // MIB} MiB, {settings.threads} threads\n"
    )
    yield from contender_table(rounds)
    yield from ratio_table(rounds, ((EIGHT, ONE), (WRITE_EIGHT, ONE), (ONE, READ)))
    busy = max(value.others_cores for values in rounds.values() for value in values)
    times = statistics.median(ratios(rounds, EIGHT, ONE))
    extra = max(v.anonymous_bytes for v in rounds[EIGHT]) - median_of(
        rounds[ONE], "anonymous_bytes"
    )
    most = (len(HALF_LIVES) - 1) * settings.threads * TILE_BYTES
    yield from promise_table(
        [
            timing_promise(
                f"{EIGHT} take at most {PROMISED_TIMES_ONE:g} times the time of one",
                f"{times:.2f}",
                times <= PROMISED_TIMES_ONE,
                busy,
            ),
            Promise(
                f"each extra one takes at most {TILE_BYTES // MIB} MiB of a thread's memory",
                f"{extra / MIB:+.0f} MiB for all {len(HALF_LIVES) - 1}",
                extra <= most,
            ),
            Promise("each is what it is when made alone, byte for byte", "the first", alike),
        ]
    )


def measure_ranks(settings: Settings, workdir: Path, repeat: int) -> Iterator[str]:
    """Two ranks of one thread beside two threads of one process."""
    run = make_run(settings, workdir)
    measure_contender(READ, Job(run, workdir, 2))  # fills the page cache
    output = workdir / "out-ranks"
    rounds: dict[str, list[Measured]] = {}
    for _, contender in itertools.product(range(repeat), OF_RANKS):
        remove(output)
        rounds.setdefault(contender, []).append(measure_contender(contender, Job(run, output, 2)))
    remove(output)
    yield f"## Ranks: {settings.name}\n"
    yield from ratio_table(rounds, ((RANKS, AVERAGE),))
    times = statistics.median(ratios(rounds, RANKS, AVERAGE))
    busy = max(value.others_cores for value in rounds[AVERAGE])
    text = f"two ranks take at most {PROMISED_TIMES_THREADS:g} times the time of two threads"
    held = times <= PROMISED_TIMES_THREADS
    yield from promise_table([timing_promise(text, f"{times:.2f}", held, busy)])


def measure_small(settings: Settings, workdir: Path, repeat: int) -> Iterator[str]:
    """100 000 tensors of 1 kB in 10 checkpoints, beside the same bytes in 100 tensors."""
    rounds: dict[str, list[Measured]] = {}
    kinds = {"100 000 tensors": (100_000, 1000), "100 tensors": (100, 1_000_000)}
    for tensors, size_bytes in kinds.values():
        run = workdir / f"uniform-{tensors}"
        remove(run)
        make_uniform_run(run, 10, tensors, size_bytes)
    output = workdir / "out-small"
    for _, (name, (tensors, _)) in itertools.product(range(repeat), kinds.items()):
        remove(output)
        job = Job(workdir / f"uniform-{tensors}", output, settings.threads)
        rounds.setdefault(name, []).append(measure_contender(AVERAGE, job))
    for tensors, _ in kinds.values():
        remove(workdir / f"uniform-{tensors}")
    remove(output)
    yield "## Many small tensors: 10 checkpoints of 100 MB\n"
    many, few = kinds
    yield from ratio_table(rounds, ((many, few),))
    times = statistics.median(ratios(rounds, many, few))
    busy = max(value.others_cores for values in rounds.values() for value in values)
    text = f"{many} take at most {PROMISED_TIMES_FEW:g} times the time of {few}"
    held = times <= PROMISED_TIMES_FEW
    yield from promise_table([timing_promise(text, f"{times:.2f}", held, busy)])


def measure_huge(_: Settings, workdir: Path, repeat: int) -> Iterator[str]:
    """A plan of 50 checkpoints of a 70B model, of which all but the headers are holes."""
    run = workdir / "sparse"
    remove(run)
    shards = make_sparse_run(run, 50, 70 * 10**9)
    command: list[str | Path] = ["-m", "ckpt_ema", "plan", run, "-q", "-o", workdir / "out-huge"]
    found = [measure([*command, "--half-life", "2000"])[0] for _ in range(repeat)]
    few = [measure([*command, "--last", "2"])[0] for _ in range(repeat)]
    remove(run)
    yield f"## Huge: `plan` of 50 checkpoints of 70 billion parameters in {shards} shards each\n"
    seconds = median_of(found, "wall_seconds")
    most, least = (max(one.resident_bytes for one in runs) / MIB for runs in (found, few))
    yield from promise_table(
        [
            Promise(
                f"in at most {PROMISED_PLAN_SECONDS} s",
                f"{seconds:.1f} s",
                seconds <= PROMISED_PLAN_SECONDS,
            ),
            Promise(
                f"in at most {PROMISED_PLAN_MIB} MiB",
                f"{most:.0f} MiB; of 2 of them {least:.0f}",
                most <= PROMISED_PLAN_MIB,
            ),
        ]
    )


def measure_scaling(settings: Settings, workdir: Path, repeat: int) -> Iterator[str]:
    """Peak anonymous memory of ckpt-ema for a short run, a long run and a large model."""
    yield f"## Memory: {settings.dtype}, {settings.threads} threads\n"
    peaks = []
    promises = []
    for checkpoints, size_mib in ((2, 64), (40, 64), (2, 640)):
        sized = replace(settings, checkpoints=checkpoints, size_bytes=size_mib * MIB)
        run = make_run(sized, workdir)
        above = []
        for number in range(repeat):
            output = workdir / f"out-{number}-{sized.name}"
            remove(output)
            job = Job(run, output, settings.threads)
            imported, averaged = (measure_contender(name, job) for name in (IMPORT, AVERAGE))
            above.append(averaged.anonymous_bytes - imported.anonymous_bytes)
            remove(output)
        peaks.append(max(above))
        promises.append(anonymous_promise(f"{checkpoints} of {size_mib} MiB: ", peaks[-1]))
    spread = max(peaks) - min(peaks)
    text = f"the same for all of them, to within {SAME_ANONYMOUS_MIB} MiB"
    held = spread <= SAME_ANONYMOUS_MIB * MIB
    promises.append(Promise(text, f"{spread / MIB:.0f} MiB apart", held))
    yield from promise_table(promises)


def measure_startup(settings: Settings, workdir: Path, repeat: int) -> Iterator[str]:
    """Wall seconds of what needs no torch, against `import torch`."""
    run = make_run(replace(settings, size_bytes=16 * MIB), workdir)
    commands: dict[str, list[str | Path]] = {
        IMPORT: ["-c", "import torch"],
        "ckpt-ema --help": ["-m", "ckpt_ema", "--help"],
        "ckpt-ema plan": ["-m", "ckpt_ema", "plan", run],
    }
    found: dict[str, list[Measured]] = {name: [] for name in commands}
    for _, (name, arguments) in itertools.product(range(repeat), commands.items()):
        found[name].append(measure(arguments)[0])
    busy = max(value.others_cores for values in found.values() for value in values)
    medians = {name: median_of(values, "wall_seconds") for name, values in found.items()}
    imported = medians.pop(IMPORT)
    yield f"## Start-up: `import torch` takes {imported:.2f} s\n"
    yield from promise_table(
        timing_promise(
            f"{name}: at most a third of the time of `import torch`",
            f"{seconds:.2f} s, {seconds / imported:.2f}",
            seconds <= PROMISED_STARTUP * imported,
            busy,
        )
        for name, seconds in medians.items()
    )


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


def describe(_: Settings, workdir: Path, repeat: int) -> Iterator[str]:
    """Machine, versions and command: a figure without them says nothing."""
    cpu_info = Path("/proc/cpuinfo").read_text()
    model = re.search(r"model name\s*: (.*)", cpu_info)
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    file_system = output_of("df", "--output=fstype", str(workdir)).split()[-1]
    commit = output_of("git", "-C", str(REPOSITORY), "describe", "--always", "--dirty")
    packages = ("torch", "safetensors", "ckpt-ema")
    yield "# ckpt-ema, measured\n"
    yield f"- command: `python scripts/bench.py {shlex.join(sys.argv[1:])}`"
    yield f"- date: {datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC, commit {commit or 'unknown'}"
    yield (
        f"- machine: {model[1] if model else platform.machine()}, {os.cpu_count()} cores, "
        f"{memory_bytes / 1024**3:.0f} GiB, load {os.getloadavg()[0]:.1f} at the start"
    )
    yield (
        f"- versions: Linux {platform.release()}, Python {platform.python_version()}, "
        + ", ".join(f"{package} {version(package)}" for package in packages)
    )
    yield f"- file system of the run and of the outputs: {file_system}; medians of {repeat} rounds"
    yield "- promised: speed for 8 checkpoints of 512 MiB, 2 threads, all in the page cache"
    yield ""


def output_of(*command: str) -> str:
    """What a command printed, or nothing where it failed."""
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def size_in_bytes(text: str) -> int:
    """Bytes of a size as people write it: 512MiB, 4GiB."""
    match = re.fullmatch(r"(\d+)(MiB|GiB)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 512MiB or 4GiB")
    return int(match[1]) * {"MiB": MIB, "GiB": 1024 * MIB}[match[2]]


def parse_arguments() -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description="Measure ckpt-ema.")
    parser.add_argument("--dtype", choices=ITEM_BYTES, default="bfloat16")
    parser.add_argument("--checkpoints", type=int, default=8)
    parser.add_argument("--size", type=size_in_bytes, default="512MiB", help="of one checkpoint")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3, help="rounds")
    parser.add_argument(
        "--workdir",
        type=Path,
        help="where the runs are made, and kept for the next time (default: .bench here); "
        "/dev/shm leaves the disk out",
    )
    parser.add_argument("--record", action="store_true", help="write to benchmarks/")
    parser.add_argument("--speed", action="store_true", help="the default where no part is named")
    parser.add_argument("--many", action="store_true", help="eight averages in one pass")
    parser.add_argument("--ranks", action="store_true", help="two processes against two threads")
    parser.add_argument("--small", action="store_true", help="a hundred thousand small tensors")
    parser.add_argument("--huge", action="store_true", help="the plan of a 70B model")
    parser.add_argument("--scaling", action="store_true", help="memory for other lengths and sizes")
    parser.add_argument("--startup", action="store_true", help="--help and plan")
    return parser.parse_args()


def main() -> None:
    """Measure what was asked for, print it as it comes and record it."""
    options = parse_arguments()
    settings = Settings(options.dtype, options.checkpoints, options.size, options.threads)
    workdir = (options.workdir or REPOSITORY / ".bench").resolve()
    workdir.mkdir(parents=True, exist_ok=True)
    if not options.workdir:
        (workdir / ".gitignore").write_text("*\n")
    measures = {
        "speed": measure_speed,
        "many": measure_many,
        "ranks": measure_ranks,
        "small": measure_small,
        "huge": measure_huge,
        "scaling": measure_scaling,
        "startup": measure_startup,
    }
    parts = [part for part in measures if getattr(options, part)] or ["speed"]
    lines = []
    for part in (describe, *map(measures.__getitem__, parts)):
        for line in part(settings, workdir, options.repeat):
            print(line, flush=True)
            lines.append(line)
    if options.record:
        date = f"{datetime.now(timezone.utc):%Y-%m-%d-%H%M}"
        name = f"{date}-{'-'.join(parts)}-{settings.name}.md"
        (REPOSITORY / "benchmarks").mkdir(exist_ok=True)
        (REPOSITORY / "benchmarks" / name).write_text("\n".join(lines))


if __name__ == "__main__":
    main()
