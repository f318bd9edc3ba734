"""Syncing model files while they are written, so that the sync at the end has little left to do.

The disk's own flush makes a sync slow, even if the kernel has written the data back already.
"""

import contextlib
import threading
from collections.abc import Callable

from ckpt_ema.fold.hardware import check_room_for_thread

SYNCED_BYTES = 32 << 20  # at a time; 16 MiB to 64 MiB make no difference


class Syncer:
    """Syncs files in the background once enough has been written; threads may share it."""

    def __init__(self, sync: Callable[[int], None]) -> None:
        """Sync files by `sync`, which takes the number of one."""
        self._sync = sync
        self._files: set[int] = set()  # written since they were synced
        self._size_bytes = 0  # of what was written to them
        self._thread = threading.Thread()  # the last one; there is one at a time
        self._error: BaseException | None = None
        self._lock = threading.Lock()

    def note(self, file: int, size_bytes: int) -> None:
        """Note that bytes were written to a file; raises the error of an earlier sync."""
        self._raise()
        with self._lock:
            self._files.add(file)
            self._size_bytes += size_bytes
            if self._size_bytes < SYNCED_BYTES or self._thread.is_alive():
                return
            self._raise()  # now that no sync is under way
            files, self._files, self._size_bytes = self._files, set(), 0
            self._thread = threading.Thread(target=self._run, args=[files], name="ckpt-ema-sync")
            with contextlib.suppress(OSError, RuntimeError):  # then it is all left to the end
                check_room_for_thread()
                self._thread.start()

    def _run(self, files: set[int]) -> None:
        try:
            for file in files:
                self._sync(file)
        except BaseException as error:
            self._error = error

    def _raise(self) -> None:
        # Linux reports a failed write to a descriptor once, so no later sync would fail.
        if self._error:
            raise self._error

    def wait(self) -> None:
        """Wait for the sync that is under way; raises its error, or that of an earlier one."""
        self.close()
        self._raise()

    def close(self) -> None:
        """Wait for the sync that is under way, so that its file can be closed."""
        with self._lock:
            thread = self._thread
        if thread.ident is not None:
            thread.join()
