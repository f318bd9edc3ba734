"""The output, which appears whole or not at all: written in a workspace, published by a rename."""

import contextlib
import ctypes
import errno
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ckpt_ema.errors import Code, FailedError
from ckpt_ema.output.workspace import (
    PUBLISHED,
    Workspace,
    as_failure,
    durable_file,
    fsync_folder,
    hidden_sibling,
    remove,
    replace_file,
    write_all,
)
from ckpt_ema.storage import Storage
from ckpt_ema.targets.safetensors import target_for
from ckpt_ema.targets.target import OutputFile

_MOST_OPEN_FILES = 16
_COPIED_BYTES = 1 << 20  # at a time


class StagedOutput(Workspace):
    """An output that is being made: a workspace with the files in it, which it closes."""

    def __init__(self, final: Path, key: str, overwrite: bool, *, is_shared: bool = False) -> None:
        """See `Workspace`; `overwrite` is whether another output at `final` is replaced."""
        super().__init__(final, key, is_shared=is_shared)
        self.is_single_file = target_for(final).is_single_file
        self.left: Path | None = None  # the output that was replaced and cannot be removed
        self._overwrite = overwrite
        self._fds: list[int] = []  # of the first model files; there may be more files than that
        self._paths: list[Path] = []

    def __exit__(self, *error: Any) -> None:
        try:
            for fd in self._fds:
                with contextlib.suppress(OSError):
                    os.close(fd)
        finally:
            super().__exit__(*error)

    def create(self, files: Sequence[tuple[str, OutputFile]]) -> None:
        """Allocate the model files, keeping data that they have, and write their headers."""
        for number, (name, file) in enumerate(files):
            path = self._path_of(name)
            self._paths.append(path)
            with as_failure(self.final):
                path.parent.mkdir(parents=True, exist_ok=True)
                fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_CREAT, 0o666)
                try:
                    _reserve(fd, file.size_bytes)
                finally:
                    if number < _MOST_OPEN_FILES:
                        self._fds.append(fd)
                    else:
                        os.close(fd)
            for chunk in file.chunks:
                self.write(number, memoryview(chunk.content), chunk.offset)

    def adopt(self, names: Sequence[str]) -> None:
        """Take over model files that others have written, by their names in the folder."""
        self._paths = [self._path_of(name) for name in names]

    def _path_of(self, name: str) -> Path:
        return self.output if self.is_single_file else self.output / name

    def write(self, file: int, data: memoryview, offset: int) -> None:
        """Write `data` at `offset` of model file number `file`; from any thread."""
        with as_failure(self.final), self._opened(file) as fd:
            write_all(fd, data, offset)
            _start_writeback(fd, offset, len(data))

    @contextlib.contextmanager
    def _opened(self, file: int) -> Iterator[int]:
        """Yield the descriptor of a model file, opened for the moment if there are many files."""
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
        path = self.output / name
        with as_failure(self.final / name):
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, content, self.output.parent)  # parts may write it concurrently

    def copy(self, source: Path, name: str, storage: Storage) -> None:
        """Copy a companion file, byte for byte."""
        path = self.output / name
        with storage.open(source) as file, as_failure(self.final / name):
            path.parent.mkdir(parents=True, exist_ok=True)
            with durable_file(path) as fd:
                size_bytes = file.identity.size_bytes
                for offset in range(0, size_bytes, _COPIED_BYTES):
                    count = min(_COPIED_BYTES, size_bytes - offset)
                    write_all(fd, file.read(count, offset), offset)
                os.ftruncate(fd, size_bytes)

    def check_loads(self) -> None:
        """Check that the safetensors library accepts every model file; it reads headers only."""
        from safetensors import SafetensorError, safe_open

        for number in range(len(self._paths)):
            try:
                # By descriptor, since the library accepts only paths in UTF-8.
                with self._opened(number) as fd, safe_open(f"/dev/fd/{fd}", "pt") as model:
                    model.keys()
            except (OSError, RuntimeError, SafetensorError) as error:  # torch, which maps it, too
                code = Code.DAMAGED if isinstance(error, SafetensorError) else Code.READ_FAILED
                message = f"{self.final} cannot be loaded after writing: {error}."
                hint = "Nothing was published."
                raise FailedError(message, hint, code=code, path=self.final) from error

    def make_durable(self) -> None:
        """Make everything written so far survive a power failure."""
        with as_failure(self.final):
            for number in range(len(self._paths)):
                with self._opened(number) as fd:
                    os.fsync(fd)
            if not self.is_single_file:
                for folder, _, _ in os.walk(self.output):
                    fsync_folder(folder)

    def publish(self) -> None:
        """Give the output its final name, replacing what may be replaced there."""
        self.make_durable()
        ready = self.output.with_name(PUBLISHED)
        with as_failure(self.final):
            # This voids all records of the output; an exchange leaves the old one in its place.
            remove(ready)  # left by a run that was killed here
            os.rename(self.output, ready)
            fsync_folder(ready.parent)
            try:
                replaced = self._give_name(ready)
            except OSError:
                os.rename(ready, self.output)
                raise
        try:
            fsync_folder(self.final.parent)
        except OSError as error:
            why = f"may not survive a power failure: {error.strerror}"
            message = f"{self.final} is published, but {why}."
            raise FailedError(message, code=Code.WRITE_FAILED, path=self.final) from error
        remove(replaced)
        self.left = replaced if os.path.lexists(replaced) else None

    def _give_name(self, ready: Path) -> Path:
        """Replace nothing but an empty folder, or what `overwrite` applies to.

        Returns where what was replaced is now, if it still is.
        """
        if not (self._overwrite and os.path.lexists(self.final)):
            (_link_or_rename if self.is_single_file else os.rename)(ready, self.final)
        elif self.is_single_file:
            os.replace(ready, self.final)
        elif not _exchange(ready, self.final):
            old = hidden_sibling(self.final)
            os.rename(self.final, old)
            try:
                os.rename(ready, self.final)
            except BaseException:
                os.rename(old, self.final)
                raise
            return old
        return ready


def _exchange(one: Path, other: Path) -> bool:
    """Swap two paths atomically, so that there always is an output; return whether it worked."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    names = (here, os.fsencode(one), here, os.fsencode(other))
    return bool(renameat2 and renameat2(*names, exchange) == 0)


def _link_or_rename(staging: Path, final: Path) -> None:
    """Give a file its final name unless that is taken."""
    try:
        os.link(staging, final)  # unlike a rename, it never replaces
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP) or os.path.lexists(final):
            raise
        os.rename(staging, final)  # a file system without hard links


def _reserve(fd: int, size_bytes: int) -> None:
    """Allocate the file's space now, so that a full disk fails before the work is done."""
    try:
        os.posix_fallocate(fd, 0, size_bytes)
    except (AttributeError, OSError) as error:  # macOS has no such function
        code = getattr(error, "errno", errno.ENOSYS)
        if code not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        os.ftruncate(fd, size_bytes)


def _start_writeback(fd: int, offset: int, size_bytes: int) -> None:
    """Make the kernel start to write these bytes, so that fsync need not wait for them."""
    if hasattr(os, "posix_fadvise"):  # macOS has none; Linux writes dirty pages, drops clean ones
        os.posix_fadvise(fd, offset, size_bytes, os.POSIX_FADV_DONTNEED)
