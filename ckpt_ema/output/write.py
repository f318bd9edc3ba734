"""The output, which appears whole or not at all.

Everything is written to a hidden sibling of the final path, made durable, and published by one
rename. On any failure the sibling is removed; one that a killed process left behind is removed by
the next run to the same output.
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

from ckpt_ema.errors import FailedError, RefusedError, printable
from ckpt_ema.files import open_regular
from ckpt_ema.output.vacancy import averages_in
from ckpt_ema.planning.outputs import OutputFile

_MARK = ".ckpt-ema-"
_MOST_OPEN_FILES = 16


class StagedOutput:
    """A hidden sibling of `final` that becomes it in `publish`, or vanishes.

    Used as a context manager; leaving it without `publish` removes everything.
    """

    def __init__(self, final: Path, is_single_file: bool, overwrite: bool) -> None:
        self._final = Path(os.path.realpath(final))  # what a link points to, if it is one
        self._single = is_single_file
        self._overwrite = overwrite
        self._staging = _hidden_sibling(self._final)
        self._fds: list[int] = []  # of the first model files; there may be more files than that
        self._paths: list[Path] = []
        self._lock_fd = -1

    def __enter__(self) -> "StagedOutput":
        _remove_leftovers(self._final)
        with _as_failure(self._final):
            while not self._claim():
                self._staging = _hidden_sibling(self._final)
        return self

    def _claim(self) -> bool:
        """Make the hidden sibling and lock it; False if another run took it for a leftover."""
        if self._single:
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            self._lock_fd = os.open(self._staging, flags, 0o666)
        else:
            self._staging.mkdir()
            self._lock_fd = os.open(self._staging, os.O_RDONLY | os.O_CLOEXEC)
        _try_lock(self._lock_fd)
        try:
            return os.path.samestat(os.fstat(self._lock_fd), self._staging.stat())
        except FileNotFoundError:
            os.close(self._lock_fd)
            return False

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for fd in (*self._fds, self._lock_fd):
            with contextlib.suppress(OSError):
                os.close(fd)
        _remove(self._staging)

    def create(self, files: Sequence[tuple[str, OutputFile]]) -> None:
        """Reserve the space of the model files, by their names in the folder; write the headers."""
        for number, (name, file) in enumerate(files):
            path = self._staging if self._single else self._staging / name
            self._paths.append(path)
            with _as_failure(self._final):
                path.parent.mkdir(parents=True, exist_ok=True)
                created = 0 if self._single else os.O_CREAT | os.O_EXCL
                fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | created, 0o666)
                try:
                    _reserve(fd, file.size_bytes)
                finally:
                    if number < _MOST_OPEN_FILES:
                        self._fds.append(fd)
                    else:
                        os.close(fd)
            self.write(number, memoryview(file.header), 0)

    def write(self, file: int, data: memoryview, offset: int) -> None:
        """Put `data` at `offset` of model file number `file`; from any thread."""
        with _as_failure(self._final), self._opened(file) as fd:
            done = 0
            while done < len(data):
                done += os.pwrite(fd, data[done:], offset + done)
            _start_writeback(fd, offset, len(data))

    @contextlib.contextmanager
    def _opened(self, file: int) -> Iterator[int]:
        """The descriptor of a model file; of the last of many files, one for the moment."""
        if file < len(self._fds):
            yield self._fds[file]
            return
        fd = os.open(self._paths[file], os.O_RDWR | os.O_CLOEXEC)
        try:
            yield fd
        finally:
            os.close(fd)

    def add(self, name: str, content: bytes) -> None:
        """Write one small file of the output folder."""
        path = self._staging / name
        with _as_failure(self._final / name):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("xb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())

    def copy(self, source: Path, name: str) -> None:
        """Copy one file that travels with the weights, byte for byte."""
        path = self._staging / name
        with open_regular(os.fspath(source)) as file, _as_failure(self._final / name):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(file.fd, "rb", closefd=False) as original, path.open("xb") as stream:
                shutil.copyfileobj(original, stream)
                stream.flush()
                os.fsync(stream.fileno())

    def check_loads(self) -> None:
        """Have the safetensors library itself accept every model file; it reads headers only."""
        from safetensors import SafetensorError, safe_open

        for number in range(len(self._paths)):
            try:
                # By descriptor, since the library takes no path that is not UTF-8.
                with self._opened(number) as fd, safe_open(f"/dev/fd/{fd}", "pt") as model:
                    model.keys()
            except (SafetensorError, OSError) as error:
                raise FailedError(
                    f"{printable(self._final)}: the safetensors library refuses what was written"
                    f" ({printable(error)}).",
                    "Nothing was published; please report it.",
                ) from error

    def publish(self) -> None:
        """Make everything durable and give it its final name, replacing what may be there."""
        with _as_failure(self._final):
            for number in range(len(self._paths)):
                with self._opened(number) as fd:
                    os.fsync(fd)
            if not self._single:
                for folder, _, _ in os.walk(self._staging):
                    _fsync_folder(folder)
            if self._overwrite and os.path.lexists(self._final):
                self._replace()
            elif self._single:
                _link_or_rename(self._staging, self._final)
            else:
                os.rename(self._staging, self._final)  # replaces nothing but an empty folder
            _fsync_folder(self._final.parent)

    def _replace(self) -> None:
        """Put the new in the place of the old, which leaving the context then removes."""
        if self._single:
            os.replace(self._staging, self._final)
        elif not _exchange(self._staging, self._final):
            old = _hidden_sibling(self._final)
            os.rename(self._final, old)
            try:
                os.rename(self._staging, self._final)
            except BaseException:
                os.rename(old, self._final)
                raise
            self._staging = old


def _hidden_sibling(final: Path) -> Path:
    return final.parent / f"{_hidden_stem(final)}{secrets.token_hex(4)}"


def _hidden_stem(final: Path) -> str:
    name = os.fsencode(final.name)[:200]  # a name has room for 255 bytes
    return f".{os.fsdecode(name)}{_MARK}"


def _exchange(one: Path, other: Path) -> bool:
    """Swap two paths in one step, so that there is no moment without an output; Linux can."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0)


def _link_or_rename(staging: Path, final: Path) -> None:
    """Give a file its final name, but never one that is taken."""
    try:
        os.link(staging, final)  # unlike a rename, it never replaces
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP) or os.path.lexists(final):
            raise
        os.rename(staging, final)  # a file system without hard links


def _remove_leftovers(final: Path) -> None:
    """Remove what killed runs to the same output left; one that still runs holds its lock.

    Where there is no output, a leftover that is whole may be the last one, caught between two
    names; it stays.
    """
    stem = _hidden_stem(final)
    for name in os.listdir(final.parent):
        path = final.parent / name
        if not name.startswith(stem):
            continue
        if not os.path.lexists(final) and averages_in(path):
            continue
        with contextlib.suppress(OSError):
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                if _try_lock(fd):
                    _remove(path)
            finally:
                os.close(fd)


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # taken, or a file system without locks: then nothing is known to be stale
        return False
    return True


def _reserve(fd: int, size_bytes: int) -> None:
    """Allocate the file's space now, so that a full disk shows before the work is done."""
    try:
        os.posix_fallocate(fd, 0, size_bytes)
    except AttributeError:  # macOS
        os.ftruncate(fd, size_bytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        os.ftruncate(fd, size_bytes)


def _start_writeback(fd: int, offset: int, size_bytes: int) -> None:
    """Have the kernel begin to write these bytes out, so that fsync has nothing left to wait for.

    On Linux that is what the advice does to dirty pages; it drops clean ones only.
    """
    if hasattr(os, "posix_fadvise"):  # macOS has none
        os.posix_fadvise(fd, offset, size_bytes, os.POSIX_FADV_DONTNEED)


def _fsync_folder(path: str | Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot, and need not
            raise
    finally:
        os.close(fd)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


@contextlib.contextmanager
def _as_failure(path: Path) -> Iterator[None]:
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
