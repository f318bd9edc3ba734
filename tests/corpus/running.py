"""What happens while the command runs."""

import errno
import os
import resource
import shutil
import signal
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

from tests.corpus.case import MIDDLE, Case, Make, nothing
from tests.makers.faulty_os import faulty
from tests.makers.faulty_storage import on_first_read
from tests.makers.folds import without_compiled

_lasting: list[AbstractContextManager[object]] = []  # until the process ends


def broken(kind: str, k: int, error: int) -> None:
    """The k-th call of a kind and all later ones fail, for the rest of the process."""
    _lasting.append(faulty(kind, k, error, ever_after=True))
    _lasting[-1].__enter__()


def signalled(number: int, _run: Path) -> None:
    """The process gets a signal."""
    os.kill(os.getpid(), number)


def raised(error: BaseException, _run: Path) -> None:
    """A thread at work fails so."""
    raise error


def forget_home() -> None:
    """There is no HOME."""
    os.environ.pop("HOME", None)


def has_little_memory(size_bytes: int) -> None:
    """Of the address space, so much is left."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + size_bytes
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def rotated(run: Path) -> None:
    """The oldest makes room."""
    shutil.rmtree(run / "checkpoint-1")


def moved(run: Path) -> None:
    """A checkpoint gets another name."""
    (run / MIDDLE).rename(run / "best")


def truncated(run: Path) -> None:
    """A file that is read is cut."""
    os.truncate(run / MIDDLE / "model.safetensors", 50)


def replaced(run: Path) -> None:
    """A file is another one of the same size."""
    path = run / MIDDLE / "model.safetensors"
    content = path.read_bytes()
    path.with_name("new").write_bytes(content)
    path.with_name("new").rename(path)


def written_again(run: Path) -> None:
    """A file has the same size and other content."""
    with (run / MIDDLE / "model.safetensors").open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\1\2\3\4")


def overtaken(run: Path) -> None:
    """Another run has written the output."""
    shutil.copytree(run / MIDDLE, run.parent / "out")


def prepare(before: Callable[[], object] | None, during: Make | None, run: Path) -> None:
    """What is done in the process before the command."""
    if during:
        on_first_read(partial(during, run))
    if before:
        before()


CHANGED = "changed or vanished since the plan"
Running = partial(Case, make=nothing, code=1, names="")
Output = partial(Case, make=nothing, names="")


CASES = [
    Running("a checkpoint is rotated away", during=rotated),
    Running("a checkpoint is renamed", during=moved),
    Running("a file is truncated", says=f"{CHANGED}|ended at byte", during=truncated),
    Running("a file is replaced", during=replaced),
    Running("a file is written again", during=written_again),
    Running("reading a header fails", before=partial(broken, "pread", 5, errno.EIO)),
    Running(
        "reading a tensor fails",
        words=["--threads", "1"],  # so that it is always the same one
        before=partial(broken, "preadv", 1, errno.EIO),
    ),
    Running("opening fails", before=partial(broken, "open", 3, errno.EIO), code=3),
    *(
        Running(f"{label} in {kind}, call {k}", before=partial(broken, kind, k, number))
        for label, text, number in (
            ("no space", "No space left on device", errno.ENOSPC),
            ("over quota", "Disk quota exceeded", errno.EDQUOT),
            ("an error of the disk", "Input/output error", errno.EIO),
            ("read-only", "Read-only file system", errno.EROFS),
        )
        for kind, k in (
            ("mkdir", 1),
            ("posix_fallocate", 1),
            ("pwrite", 1),
            ("pwrite", 2),
            ("fsync", 1),
            ("fsync", 3),
            ("rename", 1),
            ("rename", 2),
        )
    ),
    *(
        Running(number.name, during=partial(signalled, number), code=128 + number)
        for number, how in (
            (signal.SIGINT, "interrupted"),
            (signal.SIGTERM, "terminated"),
            (signal.SIGHUP, "terminated"),
        )
    ),
    Running("out of memory in a thread", during=partial(raised, MemoryError())),
    Running(
        "out of memory in torch's own library",
        during=partial(raised, RuntimeError("std::bad_alloc")),
        before=without_compiled,
    ),
    Running(
        "out of memory in torch",
        during=partial(
            raised, RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")
        ),
        before=without_compiled,
    ),
    *(
        Running(
            f"{size_bytes >> 20} MiB of address space left",
            says="memory|threads",
            before=partial(has_little_memory, size_bytes),
        )
        for size_bytes in (0, 1 << 20, 4 << 20, 10 << 20, 16 << 20)
    ),
    Running("no HOME", before=forget_home, code=0),
    Running("a closed stdout", before=partial(os.close, 1), fails_after=True),
    Output("the output's parent is missing", words=["-o", "OUT/in"]),
    Output(
        "the output's parent is a file",
        make=lambda run: (run.parent / "file").touch(),
        words=["-o", "RUN/../file/out"],
    ),
    Output("the output is the run", words=["-o", "RUN"]),
    Output("the output is an input", words=["-o", f"RUN/{MIDDLE}"]),
    Output("the output is in the run", words=["-o", "RUN/in"]),
    Output(
        "the output is a FIFO",
        make=lambda run: os.mkfifo(run.parent / "fifo"),
        words=["-o", "RUN/../fifo"],
    ),
    Output(
        "the output is a dangling link",
        make=lambda run: (run.parent / "link").symlink_to("nowhere"),
        words=["-o", "RUN/../link"],
    ),
    Output("the output is in /proc", words=["-o", "/proc/out"], code=1),
    Output(
        "the output's name is too long",
        words=["-o", "OUT" + "x" * 300],
        says="File name too long",
        code=1,
    ),
    Output("another run writes the same output", during=overtaken),
]
