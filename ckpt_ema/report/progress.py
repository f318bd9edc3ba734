"""Progress in bytes on stderr: a bar on a terminal, a line every 30 s in a log file."""

import os
import sys
import time
from typing import Any

from ckpt_ema.report.lines import size

_SECONDS_BETWEEN_LINES = 30
_SECONDS_UNTIL_STALLED = 15


class ByteProgress:
    """Show bytes read of bytes to read; call it with both. A context manager."""

    def __init__(self, quiet: bool, doing: str = "averaging") -> None:
        self._quiet, self._doing = quiet, doing
        self._bar: Any = None
        self._start = self._last_line = self._last_read = time.monotonic()
        self._done_bytes = 0

    def __enter__(self) -> "ByteProgress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the bar, if there is one."""
        if self._bar is not None:
            self._bar.close()

    def __call__(self, done_bytes: int, total_bytes: int) -> None:
        """Show that `done_bytes` of `total_bytes` are read."""
        if self._bar is None and self._may_have_bar():
            self._bar = self._make_bar(total_bytes)
        now = time.monotonic()
        if done_bytes > self._done_bytes:
            self._done_bytes, self._last_read = done_bytes, now
        idle = now - self._last_read
        stalled = f"nothing read for {idle:.0f} s" if idle > _SECONDS_UNTIL_STALLED else ""
        if self._bar is not None:
            self._bar.set_postfix_str(stalled, refresh=False)
            self._bar.update(done_bytes - self._bar.n)
        has_bar = self._bar is not None and not self._bar.disable
        silent = self._quiet or sys.stderr is None
        if not (has_bar or silent) and now - self._last_line > _SECONDS_BETWEEN_LINES:
            self._last_line = now
            speed = done_bytes / (now - self._start)
            left = (total_bytes - done_bytes) / max(speed, 1)
            done = f"{size(done_bytes)} of {size(total_bytes)}"
            rest = stalled or f"{left:.0f} s left"
            sys.stderr.write(f"{done}, {size(speed)}/s, {rest}\n")

    def _may_have_bar(self) -> bool:
        """Return whether tqdm is worth its import; of its own variable, it decides itself."""
        on_terminal = sys.stderr is not None and sys.stderr.isatty()
        shown = on_terminal or os.environ.get("TQDM_POSITION") == "-1"
        return "TQDM_DISABLE" in os.environ or (shown and not self._quiet)

    def _make_bar(self, total_bytes: int) -> Any:
        from tqdm import tqdm

        class Bar(tqdm):  # type: ignore[type-arg]
            monitor_interval = 0  # updates are frequent, and a thread may lack memory

        # An explicit argument would override the variable.
        options: Any = {} if "TQDM_DISABLE" in os.environ else {"disable": False}
        return Bar(
            total=total_bytes,
            unit="B",
            unit_scale=True,
            unit_divisor=1024,
            leave=False,
            file=sys.stderr,
            desc=self._doing,
            **options,
        )
