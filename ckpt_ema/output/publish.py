"""The output, which appears whole or not at all: written in a workspace, published by a rename."""

import contextlib
import ctypes
import errno
import os
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ckpt_ema.containers.specs import is_safetensors
from ckpt_ema.errors import Code, FailedError, RefusedError
from ckpt_ema.fold.hardware import check_room_for_thread
from ckpt_ema.output.destination import check_free, check_replaced, is_free
from ckpt_ema.output.library import check_header
from ckpt_ema.output.sync import Syncer
from ckpt_ema.output.workspace import (
    PUBLISHED,
    Workspace,
    as_failure,
    hidden_sibling,
    remove,
    sync_folder,
    write_all,
)
from ckpt_ema.storage import Storage
from ckpt_ema.storage.descriptors import descriptor_limit, read_into
from ckpt_ema.targets.safetensors import target_for
from ckpt_ema.targets.target import OutputFile
from ckpt_ema.trainers.conventions import INDEX_SUFFIX

_FEWEST_OPEN = 16  # model files that stay open
_FILES_EACH = 32  # that a thread may open for the moment, roughly
_COPIED_BYTES = 1 << 20  # at a time
_REPLACED = "replaced"  # the name of the output that was replaced by one that was held
_CHECKING_THREADS = 4  # each checks about 1.3 GB/s


class StagedOutput(Workspace):
    """An output that is being made: a workspace with the files in it, which it closes."""

    def __init__(
        self,
        final: Path,
        key: str,
        overwrite: bool,
        *,
        is_shared: bool = False,
        sync: bool = True,
    ) -> None:
        """See `Workspace`; `overwrite` is whether another output at `final` is replaced."""
        super().__init__(final, key, is_shared=is_shared, sync=sync)
        self.is_single_file = target_for(final).is_single_file
        self.left: Path | None = None  # the output that was replaced and cannot be removed
        self._overwrite = overwrite
        few = descriptor_limit()
        self._most_open = max(_FEWEST_OPEN, few // 2)
        self._opening = threading.Semaphore(max(1, few // _FILES_EACH))  # threads that open more
        self._fds: list[int] = []  # of the first model files; there may be more files than that
        self._paths: list[Path] = []
        self._syncer = Syncer(self._sync_data)

    def __exit__(self, *error: Any) -> None:
        try:
            self._syncer.close()
            for fd in self._fds:
                with contextlib.suppress(OSError):
                    os.close(fd)
        finally:
            super().__exit__(*error)

    def create(self, files: Sequence[tuple[str, OutputFile]]) -> None:
        """Allocate the model files, keeping data that they have, and write their headers."""
        with as_failure(self.final):
            needed = sum(file.size_bytes for _, file in files)
            reserve = _reserving(self.path, 0 if os.path.exists(self.output) else needed)
        for number, (name, file) in enumerate(files):
            path = self._path_of(name)
            self._paths.append(path)
            with as_failure(self.final):
                path.parent.mkdir(parents=True, exist_ok=True)
                fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_CREAT, 0o666)
                try:
                    reserve(fd, file.size_bytes)
                finally:
                    if number < self._most_open:
                        self._fds.append(fd)
                    else:
                        os.close(fd)
            for chunk in file.chunks:
                self.write(number, memoryview(chunk.content), chunk.offset)

    def clear(self) -> None:
        """Remove what another process has left in the workspace."""
        remove(self.output)

    def adopt(self, names: Sequence[str]) -> None:
        """Take over model files that others have written, by their names in the folder."""
        self._paths = [self._path_of(name) for name in names]

    def _path_of(self, name: str) -> Path:
        return self.output if self.is_single_file else self.output / name

    def write(self, file: int, data: memoryview, offset: int) -> None:
        """Write `data` at `offset` of model file number `file`; from any thread."""
        with self.descriptors([file]) as [fd]:
            write_all(fd, data, offset)
        self.written(file, offset, len(data))

    @contextlib.contextmanager
    def descriptors(self, files: Sequence[int]) -> Iterator[list[int]]:
        """Yield descriptors of model files, by their numbers, to write to; then call `written`.

        An `OSError` inside is taken for one of writing.
        """
        is_open = all(file < len(self._fds) for file in files)
        with as_failure(self.final), contextlib.ExitStack() as stack:
            if not is_open:
                stack.enter_context(self._opening)
            yield [stack.enter_context(self._opened(file)) for file in files]

    def written(self, file: int, _offset: int, size_bytes: int) -> None:
        """Note that bytes were written to a model file; from any thread.

        Raises `FailedError` if earlier ones cannot be made durable.
        """
        if self.sync:
            self._syncer.note(file, size_bytes)

    def _sync_data(self, file: int) -> None:
        with as_failure(self.final), self._opened(file) as fd:
            getattr(os, "fdatasync", os.fsync)(fd)  # macOS has none

    def read_into(self, file: int, view: memoryview, offset: int) -> None:
        """Fill `view` with bytes of model file number `file` that have been written."""
        with as_failure(self.final), self._opened(file) as fd:
            read_into(str(self._paths[file]), fd, view, offset)

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
            self.replace_file(path, content)  # parts may write it concurrently

    def copy(self, source: Path, name: str, storage: Storage) -> None:
        """Copy a companion file, byte for byte."""
        path = self.output / name
        with storage.open(source) as file, as_failure(self.final / name):
            path.parent.mkdir(parents=True, exist_ok=True)
            with self.open_file(path) as fd:
                size_bytes = file.identity.size_bytes
                for offset in range(0, size_bytes, _COPIED_BYTES):
                    count = min(_COPIED_BYTES, size_bytes - offset)
                    write_all(fd, file.read(count, offset), offset)
                os.ftruncate(fd, size_bytes)

    def write_checksums(self, checksums: Sequence[Sequence[Sequence[Any]]]) -> None:
        """Write the checksums of what model files hold now, by the number of the file."""
        jobs = [(number, *one) for number, of_file in enumerate(checksums) for one in of_file]
        with contextlib.ExitStack() as stack:
            run: Callable[..., Iterator[None]] = map
            with contextlib.suppress(OSError, RuntimeError):  # then without more threads
                check_room_for_thread()
                pool = ThreadPoolExecutor(_CHECKING_THREADS, "ckpt-ema-checksum")
                stack.callback(pool.shutdown, cancel_futures=True)
                run = pool.map
            for _ in run(self._write_checksum, *zip(*jobs, strict=True)) if jobs else ():
                pass

    def _write_checksum(
        self, number: int, start: int, size_bytes: int, places: Sequence[int]
    ) -> None:
        crc, buffer = 0, memoryview(bytearray(min(size_bytes, _COPIED_BYTES)))
        for offset in range(0, size_bytes, _COPIED_BYTES):
            part = buffer[: size_bytes - offset]
            self.read_into(number, part, start + offset)
            crc = zlib.crc32(part, crc)
        for place in places:
            self.write(number, memoryview(crc.to_bytes(4, "little")), place)

    def check_loads(self) -> None:
        """Check that the safetensors library accepts its model files; it reads headers only."""
        from safetensors import SafetensorError

        for number, path in enumerate(self._paths):
            is_ours = is_safetensors(path.name) and not path.name.endswith(INDEX_SUFFIX)
            if not (is_ours or self.is_single_file):
                continue
            try:
                # By descriptor, since the library accepts only paths in UTF-8.
                with self._opened(number) as fd:
                    check_header(f"/dev/fd/{fd}")
            except (OSError, RuntimeError, SafetensorError) as error:
                code = Code.DAMAGED if isinstance(error, SafetensorError) else Code.READ_FAILED
                message = f"{self.final} cannot be loaded after writing: {error}."
                hint = "Nothing was published."
                raise FailedError(message, hint, code=code, path=self.final) from error

    def make_durable(self) -> None:
        """Make everything written so far survive a power failure, unless nothing is synced."""
        if not self.sync:
            return
        with as_failure(self.final):
            for number in range(len(self._paths)):
                with self._opened(number) as fd:
                    os.fsync(fd)
            if not self.is_single_file:
                for folder, _, _ in os.walk(self.output):
                    self.sync_folder(folder)
        self._syncer.wait()  # Linux reports a write error once, perhaps to the sync under way

    def publish(self, held: Path | None = None) -> None:
        """Give the output its final name, or the path where it is held to be published later."""
        self.make_durable()
        final = held or self.final
        ready = self.output.with_name(PUBLISHED)
        with as_failure(self.final):
            # This voids all records of the output; an exchange leaves the old one in its place.
            remove(ready)  # left by a run that was killed here
            os.rename(self.output, ready)
            self.sync_folder(ready.parent)
            try:
                overwrite = self._overwrite or held is not None
                replaced = _give_name(ready, final, overwrite, self.is_single_file)
            except OSError:
                os.rename(ready, self.output)
                raise
        try:
            self.sync_folder(final.parent)
        except OSError as error:
            raise _not_durable(final, error) from error
        remove(replaced)
        self.left = replaced if os.path.lexists(replaced) else None


def publish_held(held: Path, final: Path, expected: Mapping[str, str]) -> None:
    """Publish an output that was held, in place of the one that it continues.

    `expected` has the fingerprints of the latter by folder. Raises what `check_free` and
    `check_replaced` raise.
    """
    final = Path(os.path.realpath(final))  # follows a link
    check_free(final, overwrite=True)
    if not is_free(final):
        if not expected:
            raise _appeared(final)
        check_replaced(final, expected)
    old = held.with_name(_REPLACED)
    remove(old)  # left by a watch that was killed here
    with as_failure(final):
        replaced = _give_name(held, final, overwrite=True, is_single_file=False)
    with contextlib.suppress(OSError):  # nothing was replaced
        os.rename(replaced, old)  # so that what is held is never half removed
    try:
        sync_folder(final.parent)
    except OSError as error:
        raise _not_durable(final, error) from error
    remove(old)


def _appeared(final: Path) -> RefusedError:
    message = f"{final} appeared meanwhile; it is left as it is now."
    return RefusedError(message, code=Code.OUTPUT_EXISTS, path=final)


def _not_durable(final: Path, error: OSError) -> FailedError:
    why = f"may not survive a power failure: {error.strerror}"
    message = f"{final} is published, but {why}."
    return FailedError(message, code=Code.WRITE_FAILED, path=final)


def _give_name(ready: Path, final: Path, overwrite: bool, is_single_file: bool) -> Path:
    """Replace nothing but an empty folder, or what `overwrite` applies to.

    Returns where what was replaced is now, if it still is.
    """
    if not (overwrite and os.path.lexists(final)):
        (_link_or_rename if is_single_file else os.rename)(ready, final)
    elif is_single_file:
        os.replace(ready, final)
    elif not _exchange(ready, final):
        old = hidden_sibling(final)
        os.rename(final, old)
        try:
            os.rename(ready, final)
        except BaseException:
            os.rename(old, final)
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


def _reserving(folder: Path, needed_bytes: int) -> Callable[[int, int], None]:
    """Return what gives a file its size, so that a full disk fails before the work is done.

    On a tmpfs, allocating takes as long as writing, so the threads that write do it.
    """
    if not _is_in_memory(folder):
        return _allocate
    free = os.statvfs(folder)
    if free.f_bavail * free.f_frsize < needed_bytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return os.ftruncate


def _is_in_memory(folder: Path) -> bool:
    """Return whether a folder is in a tmpfs, by what Linux says of the device."""
    device = folder.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return any(line.split()[2] == number and " - tmpfs " in line for line in mounts.splitlines())


def _allocate(fd: int, size_bytes: int) -> None:
    try:
        os.posix_fallocate(fd, 0, size_bytes)
    except (AttributeError, OSError) as error:  # macOS has no such function
        code = getattr(error, "errno", errno.ENOSYS)
        if code not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        os.ftruncate(fd, size_bytes)
