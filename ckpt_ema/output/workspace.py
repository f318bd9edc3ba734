"""The hidden folder beside an output's final path, in which the output comes into being.

It holds the output itself and, where work is shared out or taken up again, records of what is done.
Whoever works in it holds a lock on it; one that nobody holds is what a killed run left.
"""

import contextlib
import errno
import fcntl
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from ckpt_ema.errors import FailedError, RefusedError, printable
from ckpt_ema.output.destination import averages_in
from ckpt_ema.storage.local import Local
from ckpt_ema.storage.protocol import Kind

_MARK = ".ckpt-ema-"
_OUTPUT = "output"
PUBLISHED = "published"  # what the output is called while it gets its final name
_RECORD = ".json"
JOURNAL = ".jsonl"
PART = "part-"  # records of this kind say that a part is done


class WorkFolder:
    """A context manager: inside it the folder exists and is locked; after it, it is gone.

    Unless it is `kept`, for others or for later.
    """

    def __init__(self, final: Path, key: str = "", *, is_shared: bool = False) -> None:
        """For an output at `final`; work with the same `key` goes on in the same folder.

        Without a key the folder is a new one. Where it `is_shared`, others may work in it too.
        """
        self.final = Path(os.path.realpath(final))  # what a link points to, if it is one
        self.kept = False
        self._key = key
        self._is_shared = is_shared
        self._fd = -1
        self.path = hidden_sibling(self.final, key)

    @property
    def output(self) -> Path:
        """What gets the final name in the end: a folder, or one file."""
        return self.path / _OUTPUT

    def __enter__(self) -> "WorkFolder":
        _remove_leftovers(self.final, spared=self.path)
        try:
            with as_failure(self.final):
                while not self._claim():
                    self.path = hidden_sibling(self.final, self._key)
        except BaseException:
            if not self._key:  # else others may work in it, or go on from it
                remove(self.path)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not self.kept:
            try:
                remove(self.path)
            finally:  # a signal may have stopped it; there is but one
                remove(self.path)
        with contextlib.suppress(OSError):
            os.close(self._fd)

    def _claim(self) -> bool:
        """Make the folder and lock it; False if another run took it for a leftover meanwhile."""
        self.path.mkdir(exist_ok=bool(self._key))
        fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        with contextlib.ExitStack() as unless_claimed:
            unless_claimed.callback(os.close, fd)
            if _lock(fd, is_shared=self._is_shared) is False and self._key:
                raise RefusedError(
                    f"Another process is at work on {printable(self.final)}, in"
                    f" {printable(self.path)}.",
                    "Wait for it, or stop it.",
                )
            try:
                is_there = os.path.samestat(os.fstat(fd), self.path.stat())
            except FileNotFoundError:
                is_there = False
            if is_there:
                self._forget_what_is_gone()
                self._fd = fd
                unless_claimed.pop_all()
            return is_there

    def _forget_what_is_gone(self) -> None:
        """Drop what is written down of an output that is not here.

        A run was killed after it had published that, or could not tidy up.
        """
        told = [*_records(self.path, ""), *self.path.glob(f"*{JOURNAL}")]
        if Local().kind(self.output) is Kind.ABSENT:
            for path in told:
                path.unlink(missing_ok=True)  # others may have come at the same time

    def record(self, name: str, content: dict[str, Any]) -> None:
        """Write down a fact about the work under a name, durably and all at once."""
        path = self.path / f"{name}{_RECORD}"
        with as_failure(path):
            replace_file(path, json.dumps(content).encode(), self.path)
            fsync_folder(self.path)

    def records(self, prefix: str) -> dict[str, dict[str, Any]]:
        """The facts that are written down under names that begin so.

        Raises `FailedError` if what is there is no record.
        """
        found = {}
        for path in _records(self.path, prefix):
            try:
                found[path.stem] = json.loads(path.read_bytes())
            except (OSError, ValueError) as error:
                raise FailedError(
                    f"{printable(path)} is damaged.", "Remove it, and make that part again."
                ) from error
        return found


def existing_work(final: Path, prefix: str) -> list[str]:
    """The keys of the work folders of an output that hold records of this kind.

    Raises `RefusedError` if it cannot be seen whether there are any.
    """
    final = Path(os.path.realpath(final))
    stem = _hidden_stem(final)
    try:
        return sorted(
            path.name[len(stem) :]
            for path in final.parent.iterdir()
            if path.name.startswith(stem) and _waits(path, prefix)
        )
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise RefusedError(
            f"{printable(final.parent)} cannot be searched for parts: {error.strerror}."
        ) from error


def hidden_sibling(final: Path, key: str = "") -> Path:
    """A hidden name beside `final`, of its own unless there is a key."""
    return final.parent / f"{_hidden_stem(final)}{key or secrets.token_hex(4)}"


def _hidden_stem(final: Path) -> str:
    name = os.fsencode(final.name)[:200]  # a name has room for 255 bytes
    return f".{os.fsdecode(name)}{_MARK}"


def _waits(folder: Path, prefix: str) -> bool:
    """Whether it holds an output and records of this kind."""
    return bool(_records(folder, prefix)) and Local().kind(folder / _OUTPUT) is not Kind.ABSENT


def _records(folder: Path, prefix: str) -> list[Path]:
    return sorted(folder.glob(f"{prefix}*{_RECORD}"))


def _remove_leftovers(final: Path, spared: Path) -> None:
    """Remove what killed runs to the same output left; one that still runs holds its lock."""
    stem = _hidden_stem(final)
    for name in os.listdir(final.parent):
        path = final.parent / name
        if not name.startswith(stem) or path == spared:
            continue
        with contextlib.suppress(OSError, RefusedError):  # what cannot be looked at stays
            if _is_wanted(path, final):
                continue
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                if _lock(fd, is_shared=False):
                    remove(path)
            finally:
                os.close(fd)


def _is_wanted(path: Path, final: Path) -> bool:
    """Whether a hidden sibling of an output is more than a leftover.

    Parts that are done wait for the others without a lock; the last output is there if a run was
    killed between two names.
    """
    if any(Local().kind(path / name) is not Kind.ABSENT for name in (_OUTPUT, PUBLISHED)):
        return _waits(path, PART)
    return not os.path.lexists(final) and bool(averages_in(path))


def _lock(fd: int, *, is_shared: bool) -> bool | None:
    """Whether the lock is ours now; None on a file system without locks, where nothing is known."""
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


@contextlib.contextmanager
def durable_file(path: Path) -> Iterator[int]:
    """A descriptor of a file, which is made if it is not there; on the disk when the block ends."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        yield fd
        os.fsync(fd)
    finally:
        os.close(fd)


def replace_file(path: Path, content: bytes, folder: Path) -> None:
    """Write a small file, durably and all at once; `folder` has room for it until it is whole."""
    temporary = folder / f"{secrets.token_hex(4)}.tmp"
    with durable_file(temporary) as fd:
        write_all(fd, content)
    os.replace(temporary, path)


def write_all(fd: int, data: bytes | memoryview, offset: int = 0) -> None:
    """Put all of `data` (bytes) at `offset` of an open file."""
    view, done = memoryview(data), 0
    while done < len(view):
        done += os.pwrite(fd, view[done:], offset + done)


def fsync_folder(path: str | Path) -> None:
    """Make the names in a folder durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot, and need not
            raise
    finally:
        os.close(fd)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there and can be removed."""
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


@contextlib.contextmanager
def as_failure(path: Path) -> Iterator[None]:
    """Turn an error of the file system into one sentence about `path`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
            raise RefusedError(
                f"{printable(path)} appeared while this average was made: another run wrote it.",
                "Nothing was replaced.",
            ) from error
        raise FailedError(
            f"{printable(path)} cannot be written: {error.strerror}.", "Nothing was published."
        ) from error
