"""Measure ckpt-ema against reading the bytes, the loop that everybody writes, and other tools.

It is long because each part of the report has a function of its own.

Each contender is a process of its own, so that its memory is its own; they take turns, because
only ratios within one run can be compared. It runs on Linux.
"""

import argparse
import compileall
import filecmp
import itertools
import os
import platform
import re
import resource
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import environment
from contenders import (
    AVERAGE,
    COMMAND,
    CONTENDERS,
    EIGHT,
    HALF_LIVES,
    IMPORT,
    ITEM_BYTES,
    LOOP,
    MIB,
    OF_MANY,
    OF_MONITORS,
    OF_RANKS,
    ONE,
    RANKS,
    READ,
    TORCHS,
    UNWATCHED,
    WRITE_EIGHT,
    Job,
    Settings,
    make_run,
    make_sparse_run,
    make_uniform_run,
    weights_files,
)
from exactness import Errors, errors, folded
from measuring import (
    Measured,
    Promise,
    contender_table,
    measure,
    measure_contender,
    median_of,
    promise_table,
    ratio_table,
    ratios,
    remove,
    take_off_imports,
    take_turns,
    timing_promise,
)
from peers import ENVIRONMENT, measure_peers

REPOSITORY = Path(__file__).resolve().parents[1]
PROMISED_SPEEDUP = {"bfloat16": 4.0, "float32": 5.5}
PROMISED_TIMES_READING = 2.2
PROMISED_TIMES_COLD = 1.1  # with nothing of the run in the page cache
PROMISED_ANONYMOUS_MIB = 100
SAME_ANONYMOUS_MIB = 16  # between two runs of one setting: thread stacks and allocator arenas
PROMISED_TIMES_ONE = 2.5  # eight averages in one pass, in bfloat16
TILE_BYTES = (1 << 18) * 8  # of one accumulator at its largest
PROMISED_TIMES_THREADS = 1.2  # two ranks against two threads
PROMISED_TIMES_UNWATCHED = 1.05
PROMISED_TIMES_FEW = 4.0  # the same bytes in a thousand times as many tensors
PROMISED_TIMES_LONG = 12.0  # ten times as many checkpoints
PROMISED_PLAN_SECONDS, PROMISED_PLAN_MIB = 10, 200  # of 50 checkpoints of a 70B model
PROMISED_STARTUP = 1 / 3  # of the time of `import torch`


# The parts of the report


def measure_speed(settings: Settings, workdir: Path, repeat: int) -> Iterator[str]:
    """Seconds, memory and answers of every contender, taking turns."""
    run = make_run(settings, workdir)
    job = Job(run, workdir, settings.threads)
    rounds, outputs = take_turns((*CONTENDERS, COMMAND), job, repeat)
    take_off_imports(rounds)
    found = errors(weights_files(run), outputs, folded)
    for path in outputs.values():
        remove(path)
    yield (
        f"## Speed: {settings.dtype}, {settings.checkpoints} checkpoints of "
        f"{settings.size_bytes // MIB} MiB, {settings.threads} threads\n"
    )
    yield from contender_table(rounds)
    yield from ratio_table(rounds, OF_SPEED)
    yield from promise_table(speed_promises(settings, rounds, found))


OF_SPEED = (
    (LOOP, AVERAGE),
    (LOOP, COMMAND),
    (TORCHS, AVERAGE),
    (AVERAGE, READ),
    (LOOP, READ),
)


def speed_promises(
    settings: Settings, rounds: dict[str, list[Measured]], found: dict[str, Errors]
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
    for contender, error in found.items():
        # float64, rounded to a narrower type, is rounded twice in about 1 element of 2**29.
        held = None if contender in (LOOP, TORCHS) else error.wrong <= error.elements >> 27
        text = f"{contender}: elements that differ from a float64 fold"
        yield Promise(text, f"{error.wrong} of {error.elements}", held)


def anonymous_promise(which: str, peak_bytes: float) -> Promise:
    """The promise on memory."""
    return Promise(
        f"{which}peak anonymous memory at most {PROMISED_ANONYMOUS_MIB} MiB above `import torch`",
        f"{peak_bytes / MIB:.0f} MiB",
        peak_bytes <= PROMISED_ANONYMOUS_MIB * MIB,
    )


def measure_cold(settings: Settings, workdir: Path, repeat: int) -> Iterator[str]:
    """An average beside merely reading, with nothing of the run in the page cache."""
    run = make_run(settings, workdir)
    output = workdir / "out-cold"
    rounds: dict[str, list[Measured]] = {}
    for _, contender in itertools.product(range(repeat), (READ, AVERAGE)):
        remove(output)
        os.sync()
        drop_from_cache(weights_files(run))
        job = Job(run, output, settings.threads)
        rounds.setdefault(contender, []).append(measure_contender(contender, job))
    remove(output)
    seconds = median_of(rounds[READ], "seconds")
    size_mib = settings.checkpoints * settings.size_bytes / MIB
    yield f"## Cold: {settings.name}, {settings.threads} threads\n"
    yield f"Merely reading takes {seconds:.2f} s, {size_mib / seconds:.0f} MiB/s.\n"
    yield from ratio_table(rounds, ((AVERAGE, READ),))
    times = statistics.median(ratios(rounds, AVERAGE, READ))
    busy = max(value.others_cores for values in rounds.values() for value in values)
    text = f"at most {PROMISED_TIMES_COLD:g} times the time of reading"
    held = times <= PROMISED_TIMES_COLD
    yield from promise_table([timing_promise(text, f"{times:.2f}", held, busy)])


def drop_from_cache(paths: Iterable[Path]) -> None:
    """Have the kernel forget what it holds of these files, which are on the disk already."""
    for path in paths:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


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


def warm_rounds(contenders: Iterable[str], job: Job, repeat: int) -> dict[str, list[Measured]]:
    """Measure contenders in turn on a run in the page cache, and remove what each has written."""
    measure_contender(READ, job)
    rounds: dict[str, list[Measured]] = {}
    for _, contender in itertools.product(range(repeat), [*contenders]):
        remove(job.output)
        rounds.setdefault(contender, []).append(measure_contender(contender, job))
    remove(job.output)
    return rounds


def measure_ranks(settings: Settings, workdir: Path, repeat: int) -> Iterator[str]:
    """Two ranks of one thread beside two threads of one process."""
    run = make_run(settings, workdir)
    rounds = warm_rounds(OF_RANKS, Job(run, workdir / "out-ranks", 2), repeat)
    yield f"## Ranks: {settings.name}\n"
    yield from ratio_table(rounds, ((RANKS, AVERAGE),))
    times = statistics.median(ratios(rounds, RANKS, AVERAGE))
    busy = max(value.others_cores for value in rounds[AVERAGE])
    text = f"two ranks take at most {PROMISED_TIMES_THREADS:g} times the time of two threads"
    held = times <= PROMISED_TIMES_THREADS
    yield from promise_table([timing_promise(text, f"{times:.2f}", held, busy)])


def measure_monitors(settings: Settings, workdir: Path, repeat: int) -> Iterator[str]:
    """An average in the page cache, with and without the monitors of values."""
    run = make_run(settings, workdir)
    job = Job(run, workdir / "out-monitors", settings.threads)
    rounds = warm_rounds(OF_MONITORS, job, repeat)
    yield f"## Monitors: {settings.name}, {settings.threads} threads\n"
    yield from ratio_table(rounds, ((AVERAGE, UNWATCHED),))
    times = statistics.median(ratios(rounds, AVERAGE, UNWATCHED))
    busy = max(value.others_cores for value in rounds[AVERAGE])
    text = f"at most {PROMISED_TIMES_UNWATCHED:g} times the time without monitors of values"
    held = times <= PROMISED_TIMES_UNWATCHED
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


def measure_long(settings: Settings, workdir: Path, repeat: int) -> Iterator[str]:
    """2000 small checkpoints beside 200, with at most 256 open files."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, most))  # of the processes started here, too
    rounds: dict[str, list[Measured]] = {}
    counts = {"2000 checkpoints": 2000, "200 checkpoints": 200}
    for count in counts.values():
        remove(workdir / f"long-{count}")
        make_uniform_run(workdir / f"long-{count}", count, 1, 1000)
    output = workdir / "out-long"
    for _, (name, count) in itertools.product(range(repeat), counts.items()):
        remove(output)
        job = Job(workdir / f"long-{count}", output, settings.threads)
        rounds.setdefault(name, []).append(measure_contender(AVERAGE, job))
    for path in (output, *(workdir / f"long-{count}" for count in counts.values())):
        remove(path)
    yield "## Many checkpoints: one tensor of 1 kB in each, at most 256 open files\n"
    many, few = counts
    yield from ratio_table(rounds, ((many, few),))
    times = statistics.median(ratios(rounds, many, few))
    busy = max(value.others_cores for values in rounds.values() for value in values)
    text = f"{many} take at most {PROMISED_TIMES_LONG:g} times the time of {few}"
    held = times <= PROMISED_TIMES_LONG
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
    parser.add_argument("--peers", action="store_true", help="what others have (.venv-peers)")
    parser.add_argument("--cold", action="store_true", help="with nothing in the page cache")
    parser.add_argument("--many", action="store_true", help="eight averages in one pass")
    parser.add_argument("--monitors", action="store_true", help="what looking at values costs")
    parser.add_argument("--ranks", action="store_true", help="two processes against two threads")
    parser.add_argument("--small", action="store_true", help="a hundred thousand small tensors")
    parser.add_argument("--long", action="store_true", help="two thousand checkpoints")
    parser.add_argument("--huge", action="store_true", help="the plan of a 70B model")
    parser.add_argument("--scaling", action="store_true", help="memory for other lengths and sizes")
    parser.add_argument("--startup", action="store_true", help="--help and plan")
    return parser.parse_args()


def main() -> None:
    """Measure what was asked for, print it as it comes and record it."""
    options = parse_arguments()
    if options.peers:
        environment.enter(ENVIRONMENT)
    settings = Settings(options.dtype, options.checkpoints, options.size, options.threads)
    workdir = (options.workdir or REPOSITORY / ".bench").resolve()
    workdir.mkdir(parents=True, exist_ok=True)
    # As pip does with what it installs: else each process compiles, or the first.
    compileall.compile_dir(REPOSITORY / "ckpt_ema", quiet=1)
    if not options.workdir:
        (workdir / ".gitignore").write_text("*\n")
    measures = {
        "speed": measure_speed,
        "peers": measure_peers,
        "cold": measure_cold,
        "many": measure_many,
        "monitors": measure_monitors,
        "ranks": measure_ranks,
        "small": measure_small,
        "long": measure_long,
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
