"""The workspace: a hidden folder beside an output's final path, in which the output is made.

Every process at work in it holds a lock on it; a killed run leaves one that nobody has locked.
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
from typing import TYPE_CHECKING, Any

from ckpt_ema.errors import Code, FailedError, RefusedError
from ckpt_ema.output.destination import averages_in
from ckpt_ema.storage.local import Local

if TYPE_CHECKING:
    from typing_extensions import Self

_MARK = ".ckpt-ema-"
_OUTPUT = "output"
PUBLISHED = "published"  # the name of the output just before it gets its final name
_RECORD = ".json"
LINES = ".jsonl"
PART = "part-"  # the kind of records of parts that `finish` publishes
HELD = "watch"  # the key of the workspace in which a watch holds what it has not published yet


class Workspace:
    """A context manager: the folder exists and is locked inside; removed after unless `kept`."""

    def __init__(
        self, final: Path, key: str = "", *, is_shared: bool = False, sync: bool = True
    ) -> None:
        """For an output at `final`: the folder of a `key`, which others may share, or a new one.

        Without `sync`, what is written may be lost in a power failure.
        """
        self.final = Path(os.path.realpath(final))  # follows a link
        self.kept = False
        self.sync = sync
        self._key = key
        self._is_shared = is_shared
        self._fd = -1
        self.path = hidden_sibling(self.final, key)

    @property
    def output(self) -> Path:
        """The output, a folder or one file, before it gets its final name."""
        return self.path / _OUTPUT

    def is_there(self) -> bool:
        """Return whether the folder of a key is there, made by whomever."""
        return self.path.exists()

    def __enter__(self) -> "Self":
        _remove_leftovers(self.final, spared=self.path)
        try:
            with as_failure(self.final):
                while not self._claim():
                    self._unlock()
                    self.path = hidden_sibling(self.final, self._key)
        except BaseException:
            if not self._key:  # else others may use it
                remove(self.path)
            self._unlock()
            raise
        return self

    def __exit__(self, *_error: object) -> None:
        if not self.kept:
            try:
                remove(self.path)
            finally:  # a signal, of which there is only one, may have stopped it
                remove(self.path)
        self._unlock()

    def _claim(self) -> bool:
        """Make the folder and lock it; return False if another run removed it as a leftover."""
        self.path.mkdir(exist_ok=bool(self._key))
        self._fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        if _lock(self._fd, is_shared=self._is_shared) is False and self._key:
            message = f"{self.final} is being made by another process, in {self.path}."
            hint = "Wait for that process, or stop it."
            raise RefusedError(message, hint, code=Code.OUTPUT_IN_USE, path=self.final)
        try:
            if not os.path.samestat(os.fstat(self._fd), self.path.stat()):
                return False
        except FileNotFoundError:
            return False
        if not Local().exists(self.output):
            # A run published the output and was killed, or could not clean up: records are void.
            for path in [*_records(self.path, ""), *self.path.glob(f"*{LINES}")]:
                path.unlink(missing_ok=True)  # another process may do the same
        return True

    def _unlock(self) -> None:
        fd, self._fd = self._fd, -1
        with contextlib.suppress(OSError):
            os.close(fd)

    def record(self, name: str, content: dict[str, Any]) -> None:
        """Write a record, durably and atomically."""
        path = self.path / f"{name}{_RECORD}"
        with as_failure(path):
            self.replace_file(path, json.dumps(content).encode())
            self.sync_folder(self.path)

    def records(self, prefix: str) -> dict[str, dict[str, Any]]:
        """Return the records whose names have a prefix; raises `FailedError` for a damaged one."""
        found = {}
        for path in _records(self.path, prefix):
            try:
                found[path.stem] = json.loads(path.read_bytes())
            except (OSError, ValueError) as error:
                message, hint = f"{path} is damaged.", "Remove it, and make that part again."
                raise FailedError(message, hint, code=Code.DAMAGED, path=path) from error
        return found

    @contextlib.contextmanager
    def open_file(self, path: Path) -> Iterator[int]:
        """Open a file for writing, created if it does not exist; synced when the block ends."""
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            yield fd
            self.sync_file(fd)
        finally:
            os.close(fd)

    def replace_file(self, path: Path, content: bytes) -> None:
        """Write a small file atomically, by way of a temporary file in the workspace."""
        temporary = self.path / f"{secrets.token_hex(4)}.tmp"
        with self.open_file(temporary) as fd:
            write_all(fd, content)
        os.replace(temporary, path)

    def sync_file(self, fd: int) -> None:
        """Make an open file durable."""
        if self.sync:
            os.fsync(fd)

    def sync_folder(self, path: str | Path) -> None:
        """Make the names in a folder durable."""
        if self.sync:
            sync_folder(path)


def sync_folder(path: str | Path) -> None:
    """Make the names in a folder durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems need none
            raise
    finally:
        os.close(fd)


def keys_with_parts(final: Path) -> list[str]:
    """Return the keys of the workspaces of an output in which parts were made."""
    final = Path(os.path.realpath(final))
    stem, storage = _hidden_stem(final), Local()
    names = storage.names(final.parent) if storage.is_folder(final.parent) else ()
    found = [name for name in names if name.startswith(stem) and _has_parts(final.parent / name)]
    return sorted(name[len(stem) :] for name in found)


def hidden_sibling(final: Path, key: str = "") -> Path:
    """Return a hidden path beside `final`, a new one unless there is a key."""
    return final.parent / f"{_hidden_stem(final)}{key or secrets.token_hex(4)}"


def _hidden_stem(final: Path) -> str:
    name = os.fsencode(final.name)[:200]  # a name has room for 255 bytes
    return f".{os.fsdecode(name)}{_MARK}"


def _has_parts(folder: Path) -> bool:
    """Return whether a workspace holds an output and records of its parts."""
    return bool(_records(folder, PART)) and Local().exists(folder / _OUTPUT)


def _records(folder: Path, prefix: str) -> list[Path]:
    return sorted(folder.glob(f"{prefix}*{_RECORD}"))


def _remove_leftovers(final: Path, spared: Path) -> None:
    """Remove what killed runs to the same output left; a running one holds its lock."""
    stem = _hidden_stem(final)
    for name in os.listdir(final.parent):
        path = final.parent / name
        if not name.startswith(stem) or path == spared:
            continue
        with contextlib.suppress(OSError, RefusedError):  # leave what is not accessible
            if _is_wanted(path, final):
                continue
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                if _lock(fd, is_shared=False):
                    remove(path)
            finally:
                os.close(fd)


def _is_wanted(path: Path, final: Path) -> bool:
    """Return whether a hidden sibling of an output is more than a leftover."""
    # Finished parts hold no lock, nor does what a killed watch has held; a run killed between two
    # renames leaves the previous output.
    if any(Local().exists(path / name) for name in (_OUTPUT, PUBLISHED)):
        return _has_parts(path) or path == hidden_sibling(final, HELD)
    return not os.path.lexists(final) and bool(averages_in(path))


def _lock(fd: int, *, is_shared: bool) -> bool | None:
    """Return whether the lock is ours; None on a file system without locks."""
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def write_all(fd: int, data: bytes | memoryview, offset: int = 0) -> None:
    """Write all of `data` (bytes) at `offset` of an open file."""
    view, done = memoryview(data), 0
    while done < len(view):
        done += os.pwrite(fd, view[done:], offset + done)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it exists and can be removed."""
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


@contextlib.contextmanager
def as_failure(path: Path) -> Iterator[None]:
    """Turn an error of the file system into an error about `path`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
            message = f"{path} appeared while this average was made: another run wrote it."
            hint = "Nothing was replaced."
            raise RefusedError(message, hint, code=Code.OUTPUT_EXISTS, path=path) from error
        message, hint = f"{path} cannot be written: {error.strerror}.", "Nothing was published."
        raise FailedError(message, hint, code=Code.WRITE_FAILED, path=path) from error
