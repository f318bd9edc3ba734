"""Measure ckpt-ema against reading the bytes, the loop that everybody writes, and other tools.

    python scripts/bench.py --record                  # everything, in a quarter of an hour
    python scripts/bench.py --parts durable --peers   # beside mergekit, in .venv-peers

Every contender is a whole process, started from this one, which imports neither torch nor numpy.
They take turns, because only ratios within one run can be compared. Exit code 1 says that a
promise was missed.
"""

import argparse
import compileall
import os
import platform
import re
import resource
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path

import environment
import layouts
from contenders import DECAY
from measuring import (
    PEAK,
    PROCESSOR,
    QUIET_CORES,
    WALL,
    WRONG,
    Check,
    Contender,
    Part,
    Result,
    Round,
    measure_part,
    on_tiny,
    others_cores,
    share_of,
)
from runs import ITEM_BYTES, MIB, Run

PEERS = environment.Environment(
    environment.REPOSITORY / ".venv-peers",
    (("-c", "constraints.txt", "-r", "scripts/peers.txt", "-e", "."),),
    ("pyproject.toml", "constraints.txt", "scripts/peers.txt"),
)
HALF_LIVES = "100,150,200,300,400,600,800,1000"  # steps; checkpoints are 100 apart
PROMISED_OF_LOOP = {"bfloat16": 0.30, "float32": 0.40}
PROMISED_OF_READING = {"bfloat16": (2.0, 2.0), "float32": (1.6, 1.5)}  # wall and CPU seconds
PROMISED_MIB = 64
TINY = Run("bfloat16", 3, 100_000)
MANY_TENSORS = Run("float32", 10, 100_000_000, tensors=100_000)
FEW_TENSORS = Run("float32", 10, 100_000_000, tensors=100)
LONG, SHORT = (Run("float32", checkpoints, 1000, tensors=1) for checkpoints in (2000, 200))
HUGE = Run("bfloat16", 50, 140 * 10**9, is_sparse=True)


# The contenders

OURS, PLAN = "ckpt-ema", "ckpt-ema plan"
LOOP, AVERAGED_MODEL = "load_file + lerp_", "AveragedModel"
MERGEKIT, TIMMS = "mergekit, linear", "timm's loop: the mean, in float32"


@cache
def unsynced() -> tuple[str, ...]:
    """The option with which ckpt-ema does not wait for the disk, if this version has it."""
    command = [sys.executable, "-m", "ckpt_ema", "average", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return ("--no-sync",) if "--no-sync" in shown else ()


def ours(
    *options: str, name: str = OURS, run: Run | None = None, durable: bool = True
) -> Contender:
    """The command, with `--decay` unless other options say what is averaged."""
    options = (*(options or ("--decay", str(DECAY))), *(() if durable else unsynced()))
    command = ("-m", "ckpt_ema", "average", "{run}", "-o", "{output}", *options, "-q")
    return Contender(name, command, run, is_judged=True)


def planned(*options: str, name: str = PLAN) -> Contender:
    """What needs only headers."""
    return Contender(name, ("-m", "ckpt_ema", "plan", "{run}", "-o", "{output}", *options, "-q"))


def measured(*words: str, name: str) -> Contender:
    """What reads and writes nothing: `inspect` a run, or `compare` its checkpoints."""
    return Contender(name, ("-m", "ckpt_ema", *words, "-q"))


def other(name: str, key: str, durable: bool = False, is_judged: bool = False) -> Contender:
    """A function of contenders.py."""
    script = str(Path(__file__).with_name("contenders.py"))
    options = ("--durable",) if durable else ()
    return Contender(name, (script, key, "{run}", "{output}", *options), None, is_judged)


INTERPRETER = Contender("Python alone", ("-c", "pass"))
IMPORT = Contender("import torch", ("-c", "import torch"))
READ = other("read the bytes", "read")
COPY = other("read and write, no arithmetic", "read-and-write")
RANKS = other("two ranks", "two-ranks")
WRITE = "write the output's bytes"


# The parts of the report


def whole_commands(run: Run, durable: bool, peers: bool) -> Part:
    """Everybody from start to finish, all with the same promise; limits are for durable outputs."""
    others = [
        other(LOOP, "loop", durable, is_judged=True),
        other(AVERAGED_MODEL, "averaged-model", durable, is_judged=True),
        *([other(MERGEKIT, "mergekit", durable, is_judged=True)] if peers else []),
    ]
    limits = {LOOP: PROMISED_OF_LOOP[run.dtype], AVERAGED_MODEL: 0.45, MERGEKIT: 0.10}
    if run.checkpoints * run.size_bytes <= 6 * 256 * MIB:
        limits[IMPORT.name] = 0.6
    compared = [*(contender.name for contender in others), IMPORT.name, READ.name]
    checks = [Check(WALL, OURS, name, limits.get(name) if durable else None) for name in compared]
    checks += [Check(PROCESSOR, OURS, name) for name in compared]
    if durable:
        checks += [Check(PEAK, OURS, None, PROMISED_MIB), Check(WRONG, OURS, None, 0)]
    alone = (INTERPRETER, IMPORT, READ, other(WRITE, "write", durable))
    return Part(
        "durable" if durable else "unsynced",
        f"Whole commands, {'with fsync and rename' if durable else 'without fsync'}: {run}",
        run,
        (*alone, *others, ours(durable=durable)),
        tuple(checks),
        average="folded" if durable else None,
    )


def fold(run: Run) -> Part:
    """The fold without the disk, and net of start-up."""
    wall_limit, processor_limit = PROMISED_OF_READING[run.dtype]
    return Part(
        "fold",
        f"The fold, outputs in memory: {run}; net: less {TINY}",
        run,
        with_tiny(READ, COPY, ours(durable=False)),
        (
            Check(WALL, OURS, READ.name, wall_limit, is_net=True),
            Check(PROCESSOR, OURS, READ.name, processor_limit, is_net=True),
            *(Check(figure, OURS, COPY.name, is_net=True) for figure in (WALL, PROCESSOR)),
        ),
        in_memory=True,
    )


def cold(run: Run) -> Part:
    """Reading from the disk; the output is in memory, since writing it to that disk takes time."""
    return Part(
        "cold",
        f"Nothing in the page cache, outputs in memory: {run}; net: less {TINY}",
        run,
        with_tiny(READ, ours(durable=False)),
        (Check(WALL, OURS, READ.name, 1.05, is_net=True), Check(WALL, OURS, READ.name)),
        in_memory=True,
        is_cold=True,
    )


def with_tiny(*contenders: Contender) -> tuple[Contender, ...]:
    """Add the same contenders on the tiny run."""
    return (*contenders, *(one._replace(name=on_tiny(one.name), run=TINY) for one in contenders))


def tiny() -> Part:
    """What a small model in somebody's tests pays."""
    usage = Contender("ckpt-ema --help", ("-m", "ckpt_ema", "--help"))
    limits = {OURS: 0.2, PLAN: 1 / 3, usage.name: 1 / 3}
    return Part(
        "tiny",
        f"A tiny run: {TINY}",
        TINY,
        (INTERPRETER, IMPORT, other(LOOP, "loop", True), usage, planned(), ours()),
        tuple(Check(WALL, name, IMPORT.name, limit) for name, limit in limits.items()),
    )


def growth(run: Run) -> Part:
    """Time and memory for more checkpoints, and for a larger model."""
    lengths = [Run(run.dtype, n, run.size_bytes // 4) for n in (2, 8, 40)]
    runs = [*lengths, Run(run.dtype, 2, 10 * run.size_bytes // 4)]
    return Part(
        "growth",
        "More checkpoints, and a larger model",
        run,
        (IMPORT, *(ours(name=str(one), run=one) for one in runs)),
        (
            *(Check(PEAK, str(one), None, PROMISED_MIB) for one in runs),
            *(Check(WALL, str(one), str(runs[0])) for one in runs[1:]),
        ),
    )


def averages(run: Run) -> Part:
    """Several averages in one pass."""
    names = {1: "one average", 2: "two averages", 8: "eight averages"}
    values = HALF_LIVES.split(",")
    return Part(
        "averages",
        f"Several averages in one pass, outputs in memory: {run}",
        run,
        tuple(
            ours("--half-life", ",".join(values[:count]), name=name, durable=False)
            for count, name in names.items()
        ),
        (
            Check(WALL, names[2], names[1]),
            Check(WALL, names[8], names[1], 2.5),
            Check(PROCESSOR, names[8], names[1]),
            Check(PEAK, names[8]),
        ),
        in_memory=True,
    )


def measuring(run: Run) -> Part:
    """Looking at checkpoints, beside averaging them."""
    inspected = measured("inspect", "{run}", "--decay", str(DECAY), name="ckpt-ema inspect")
    pair = ("{run}@100", "{run}@200")
    compared = measured("compare", *pair, name="ckpt-ema compare, two of them")
    verified = other("ckpt-ema verify", "verify")
    return Part(
        "measuring",
        f"Inspecting, comparing and verifying, beside averages with fsync and rename: {run}",
        run,
        (IMPORT, ours(), inspected, compared, verified),
        (
            Check(WALL, inspected.name, OURS, 1.5),
            Check(PROCESSOR, inspected.name, OURS),
            Check(WALL, compared.name, OURS),
            Check(WALL, verified.name, OURS, 1.25),
            *(Check(PEAK, one.name, None, PROMISED_MIB) for one in (inspected, compared, verified)),
        ),
    )


def tensors() -> Part:
    """What each tensor costs, beside its bytes."""
    few = "ckpt-ema, the same bytes in 100"
    return Part(
        "tensors",
        f"100 000 tensors of 1 kB: {MANY_TENSORS}",
        MANY_TENSORS,
        (IMPORT, other(LOOP, "loop", True), planned(), ours(), ours(name=few, run=FEW_TENSORS)),
        (
            Check(WALL, PLAN, IMPORT.name, 0.8),
            Check(WALL, OURS, IMPORT.name, 1.2),
            *(Check(WALL, OURS, name) for name in (LOOP, few)),
        ),
    )


def uniform(run: Run) -> Part:
    """The mean, as timm's script makes it."""
    return Part(
        "uniform",
        f"The mean, written in float32, with fsync and rename: {run}",
        run,
        (
            other(TIMMS, "uniform-mean", True, True),
            ours("--schedule", "uniform", "--dtype", "float32"),
        ),
        (Check(WALL, OURS, TIMMS), Check(PROCESSOR, OURS, TIMMS)),
        average="mean",
    )


def ranks(run: Run) -> Part:
    """Two processes beside the threads of one."""
    return Part(
        "ranks",
        f"Two ranks, each with half of the cores: {run}",
        run,
        (ours(), RANKS),
        (Check(WALL, RANKS.name, OURS, 1.2), Check(PROCESSOR, RANKS.name, OURS)),
    )


def length() -> Part:
    """Many checkpoints of almost nothing."""
    return Part(
        "long",
        "2000 checkpoints of one tensor of 1 kB",
        LONG,
        (ours(name=str(SHORT), run=SHORT), ours(name=str(LONG))),
        (Check(WALL, str(LONG), str(SHORT), 12),),
    )


def huge() -> Part:
    """Headers of a model of 70 billion parameters."""
    return Part(
        "huge",
        "The plan of 50 checkpoints of 70 billion parameters in 28 shards each",
        HUGE,
        (planned(), planned("--last", "2", name="of the newest two")),
        (Check(WALL, PLAN, None, 10), Check(PEAK, PLAN, None, 200)),
    )


def of_ranks(run: Run) -> Part:
    """Weights in the files of ranks, beside the same weights in safetensors files."""
    whole = replace(run, layout="")
    return Part(
        "layouts",
        f"Weights in the files of ranks, outputs in memory: {run}",
        run,
        (ours(name=str(whole), run=whole, durable=False), ours(durable=False)),
        (
            Check(WALL, OURS, str(whole), 1.2),
            Check(PROCESSOR, OURS, str(whole)),
            Check(PEAK, OURS, None, PROMISED_MIB),
        ),
        in_memory=True,
    )


def write_back(run: Run) -> Part:
    """The newest checkpoint with averaged weights, beside a durable copy of it."""
    copied = "cp and fsync of the newest"
    return Part(
        "write-back",
        f"Checkpoints three times as large as their weights, with fsync and rename: {run}",
        run,
        (other(copied, "copy-newest", True), ours("--save-as", "checkpoint")),
        (
            Check(WALL, OURS, copied, 1.3),
            Check(PROCESSOR, OURS, copied),
            Check(PEAK, OURS, None, PROMISED_MIB),
        ),
    )


def updates(run: Run) -> Part:
    """One more checkpoint in an average, beside a durable copy of what is read for it."""
    updated, copied = other("ckpt-ema update", "update"), "cp and fsync of the same bytes"
    return Part(
        "update",
        f"One checkpoint folded into an average, with fsync and rename: {run}",
        run,
        (other(copied, "copy-for-update", True), updated),
        (
            Check(WALL, updated.name, copied, 1.5),
            Check(PROCESSOR, updated.name, copied),
            Check(PEAK, updated.name, None, PROMISED_MIB),
        ),
    )


def all_parts(dtypes: Iterable[str], checkpoints: int, size_bytes: int, peers: bool) -> list[Part]:
    """Everything that can be measured, in the order of the report."""
    runs = [Run(dtype, checkpoints, size_bytes) for dtype in dtypes]
    first = runs[0]
    return [
        *(whole_commands(run, True, peers) for run in runs),
        *(whole_commands(run, False, peers) for run in runs),
        *map(fold, runs),
        *map(cold, runs),
        *map(measuring, runs),
        *(tiny(), growth(first), averages(first), tensors(), uniform(first), ranks(first)),
        *(of_ranks(Run("float32", 4, 2 * size_bytes, layout=one)) for one in layouts.OF_RANKS),
        *(write_back(Run("float32", 2, size_bytes, layout=one)) for one in layouts.WITH_MOMENTS),
        *(updates(Run("bfloat16", 2, size_bytes)), length(), huge()),
    ]


# The report


def describe(workdir: Path, repeat: int, packages: Iterable[str]) -> Iterator[str]:
    """Machine, versions and command: a figure without them says nothing."""
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    commit = printed_by("git", "-C", str(environment.REPOSITORY), "describe", "--always", "--dirty")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    yield "# ckpt-ema, measured\n"
    yield f"- command: `python scripts/bench.py {shlex.join(sys.argv[1:])}`"
    yield f"- date: {datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC, commit {commit or 'unknown'}"
    yield (
        f"- machine: {model[1] if model else platform.machine()}, {os.cpu_count()} cores, "
        f"{memory_bytes / 1024**3:.0f} GiB, load {os.getloadavg()[0]:.1f} at the start"
    )
    yield f"- versions: Linux {platform.release()}, Python {platform.python_version()}, {versions}"
    kinds = [
        f"{what} on {printed_by('df', '--output=fstype', place).split()[-1]}"
        for what, place in (("runs", str(workdir)), ("outputs in memory", "/dev/shm"))
    ]
    yield f"- file systems: {', '.join(kinds)}"
    floor = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    yield f"- peak MiB: resident memory of the whole process; below {floor:.0f} it cannot be seen"
    yield f"- medians of {repeat} rounds (peak memory: the largest), after one that is not counted"
    yield f"- a round is left out if others keep more than {QUIET_CORES} cores busy\n"


def printed_by(*command: str) -> str:
    """What a command printed, or nothing where it failed."""
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def report(result: Result) -> Iterator[str]:
    """Contenders, ratios and promises of one part."""
    yield f"## {result.part.title}\n"
    yield from contender_table(result.rounds)
    yield from check_table(result)
    waiting = partial(share_of, seconds=lambda measured: measured.waiting_seconds)
    yield f"Rounds: {len(result.rounds)}; left out: {result.left_out}. Cores that others kept busy:"
    yield f"{each(map(others_cores, result.rounds))}. Share of the time in which a task waited for"
    yield f"a core: {each(map(waiting, result.rounds))}."
    if not result.is_quiet:
        yield "No round was quiet, so seconds are not judged."
    yield ""


def contender_table(rounds: Sequence[Round]) -> Iterator[str]:
    """Each contender's figures, and its seconds in each round."""
    header = ["contender", WALL.label, PROCESSOR.label, PEAK.label, "wrong", "error"]
    rows = [
        [name, *figures(rounds, name), each(Check(WALL, name).each(rounds))] for name in rounds[0]
    ]
    return table([*header, "rounds, wall s"], rows)


def figures(rounds: Sequence[Round], name: str) -> list[str]:
    """Seconds, memory and errors of one contender."""
    wall, processor, peak = (
        Check(figure, name).found(rounds) for figure in (WALL, PROCESSOR, PEAK)
    )
    wrong, error = rounds[0][name].wrong, rounds[0][name].error  # the same in all rounds
    return [
        *(number(wall), number(processor), f"{peak:.0f}"),
        "" if wrong is None else number(wrong),
        "" if error is None else f"{error:.3f}",
    ]


def check_table(result: Result) -> Iterator[str]:
    """What was promised, what was found, and ratios without a promise."""
    rows = []
    for check in result.part.checks:
        limit = f"{check.limit:.3g}" if check.is_promise else ""
        verdict = {True: "met", False: "MISSED", None: "not judged" if limit else ""}
        found, met = number(check.found(result.rounds)), verdict[result.is_met(check)]
        rows.append([str(check), found, limit, met, each(check.each(result.rounds))])
    return table(["figure or ratio", "found", "at most", "", "rounds"], rows)


def each(values: Iterable[float]) -> str:
    """Numbers in a row."""
    return " ".join(map(number, values))


def number(value: float) -> str:
    """A number to two decimals, or two digits where those would be zeros."""
    return f"{value:.2f}" if abs(value) >= 0.01 else f"{value:.2g}"


def readme_table(results: Iterable[Result]) -> Iterator[str]:
    """The table of README.md: averages by whole commands, with fsync and rename."""
    durable = [result for result in results if result.part.name == "durable"]
    if not durable:
        return
    names = [c.name for c in reversed(durable[0].part.contenders) if c.is_judged]
    names.append(IMPORT.name)
    columns = [[str(durable[0].part.run).split(",")[0], *names]]
    for result in durable:
        cells = [figures(result.rounds, name) for name in names]
        for label, index in ((f"{result.part.run.dtype}: s", 0), ("MiB", 2), ("wrong", 3)):
            columns.append([label, *(row[index] for row in cells)])
    yield "For README.md:\n"
    header, *rows = map(list, zip(*columns, strict=True))
    yield from table(header, rows)


def summary(results: Iterable[Result]) -> Iterator[str]:
    """How many promises were kept, and which were not."""
    promises = [
        (one, check) for one in results for check in one.part.checks if check.limit is not None
    ]
    verdicts = [result.is_met(check) for result, check in promises]
    met, missed, unknown = map(verdicts.count, (True, False, None))
    yield f"Promises: {met} met, {missed} missed, {unknown} not judged.\n"
    for (result, check), is_met in zip(promises, verdicts, strict=True):
        if is_met is False:
            yield f"- MISSED: {check}: {number(check.found(result.rounds))} ({result.part.title})"
    yield ""


def table(header: list[str], rows: list[list[str]]) -> Iterator[str]:
    """Lines of a Markdown table that is aligned for who reads it as text, without empty columns."""
    columns = [column for column in zip(header, *rows, strict=True) if any(column[1:])]
    widths = [max(map(len, column)) for column in columns]
    header, *rows = map(list, zip(*columns, strict=True))
    for row in [header, ["-" * width for width in widths], *rows]:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        yield f"| {' | '.join(cells)} |"
    yield ""


# The command


def size_in_bytes(text: str) -> int:
    """Bytes of a size as people write it: 512MiB, 4GiB."""
    match = re.fullmatch(r"(\d+)(MiB|GiB)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 512MiB or 4GiB")
    return int(match[1]) * {"MiB": MIB, "GiB": 1024 * MIB}[match[2]]


def parse_arguments() -> argparse.Namespace:
    """Options of the command line."""
    parts = dict.fromkeys(part.name for part in all_parts(ITEM_BYTES, 6, MIB, peers=False))
    parser = argparse.ArgumentParser(description="Measure ckpt-ema.")
    parser.add_argument("--parts", nargs="+", choices=parts, metavar="PART", help=", ".join(parts))
    parser.add_argument("--dtype", choices=ITEM_BYTES, help="one of the two")
    parser.add_argument("--checkpoints", type=int, default=6)
    parser.add_argument("--size", type=size_in_bytes, default="256MiB", help="of one checkpoint")
    parser.add_argument("--repeat", type=int, default=5, help="rounds")
    parser.add_argument("--peers", action="store_true", help="mergekit too, from .venv-peers")
    parser.add_argument(
        "--workdir",
        type=Path,
        default=environment.REPOSITORY / ".bench",
        help="where the runs are made, and kept for the next time (default: .bench here)",
    )
    parser.add_argument("--record", action="store_true", help="write to benchmarks/")
    return parser.parse_args()


def main() -> None:
    """Measure what was asked for, print it as it comes and record it."""
    options = parse_arguments()
    if options.peers:
        environment.enter(PEERS)
    workdir = options.workdir.resolve()
    workdir.mkdir(parents=True, exist_ok=True)
    # As pip does with what it installs: else each process compiles, or the first.
    compileall.compile_dir(environment.REPOSITORY / "ckpt_ema", quiet=1)
    dtypes = [options.dtype] if options.dtype else list(ITEM_BYTES)
    results: list[Result] = []
    lines: list[str] = []

    def tell(told: Iterable[str]) -> None:
        for line in told:
            print(line, flush=True)
            lines.append(line)

    packages = ["ckpt-ema", "torch", "safetensors", *(["mergekit"] if options.peers else [])]
    tell(describe(workdir, options.repeat, packages))
    for part in all_parts(dtypes, options.checkpoints, options.size, options.peers):
        if not options.parts or part.name in options.parts:
            results.append(measure_part(part, workdir, options.repeat))
            tell(report(results[-1]))
    tell(summary(results))
    tell(readme_table(results))
    if options.record:
        size = f"{options.checkpoints}x{options.size // MIB}MiB.md"
        date = f"{datetime.now(timezone.utc):%Y-%m-%d-%H%M}"
        name = "-".join([date, *(options.parts or ["all"]), *dtypes, size])
        (environment.REPOSITORY / "benchmarks" / name).write_text("\n".join(lines))
    sys.exit(any(one.is_met(check) is False for one in results for check in one.part.checks))


if __name__ == "__main__":
    main()
