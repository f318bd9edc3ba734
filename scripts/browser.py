"""Chromium without a screen, driven through its pipe of the DevTools protocol."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--hide-scrollbars", "--remote-debugging-pipe"),
)


class BrowserError(Exception):
    """The browser refused a command, or has gone."""


class Page:
    """A tab of the browser."""

    def __init__(self, commands: int, answers: int) -> None:
        """Open one; what it reports is collected in `events`."""
        self.events: list[dict[str, Any]] = []
        self._commands, self._answers = commands, answers
        self._rest, self._count, self._session = b"", 0, ""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and return its result."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._count:
            self.events.append(answer)
        if "error" in answer:
            raise BrowserError(f"{method}: {answer['error']['message']}")
        result: dict[str, Any] = answer["result"]
        return result

    def open(self, path: Path) -> None:
        """Load a file, and wait until it is there."""
        self.events.clear()
        self.call("Page.navigate", url=path.resolve().as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next())

    def show(self, width: int, *, is_dark: bool = False, media: str = "screen") -> None:
        """Show the page as wide as this, in pixels."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=800,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
        self.call("Emulation.setEmulatedMedia", media=media, features=[scheme])

    def evaluate(self, expression: str) -> Any:
        """Return the value of an expression of JavaScript, which the page itself cannot run."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in found:
            raise BrowserError(found["exceptionDetails"]["exception"]["description"])
        return found["result"].get("value")

    def picture(self, area: dict[str, float] | None = None) -> bytes:
        """Return the page, or an area of it, as a PNG."""
        if area is None:
            area = self.evaluate(
                "({x: 0, y: 0, width: document.documentElement.clientWidth,"
                " height: document.documentElement.scrollHeight})"
            )
        clip = {**area, "scale": 1}
        taken = self.call("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)
        return base64.b64decode(taken["data"])

    def pdf(self) -> bytes:
        """Return the page as it is printed, as a PDF."""
        printed = self.call("Page.printToPDF", preferCSSPageSize=True, printBackground=False)
        return base64.b64decode(printed["data"])

    def _next(self) -> dict[str, Any]:
        """Return the next message of the browser."""
        while b"\0" not in self._rest:
            part = os.read(self._answers, 1 << 20)
            if not part:
                raise BrowserError("the browser has gone")
            self._rest += part
        message, _, self._rest = self._rest.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found


@contextmanager
def browser() -> Iterator[Page]:
    """Start a browser with an empty profile, and yield a page of it."""
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if not program:
        raise BrowserError("chromium is not installed")
    theirs, commands = os.pipe()
    answers, their_answers = os.pipe()
    # The browser reads commands from its descriptor 3, and answers on 4.
    words = f'exec "$@" 3<&{theirs} 4>&{their_answers}'
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [program, *_OPTIONS, f"--user-data-dir={profile}"]
        process = subprocess.Popen(
            ["bash", "-c", words, "browser", *command],
            pass_fds=(theirs, their_answers),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs)
        os.close(their_answers)
        try:
            yield Page(commands, answers)
        finally:
            os.close(commands)  # with which it ends
            os.close(answers)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def pixels(png: bytes) -> list[bytes]:
    """Return the rows of a PNG of 8 bits a channel, three bytes (RGB) for each pixel."""
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    chunks, at = b"", 8
    width = height = channels = 0
    while at < len(png):
        size = int.from_bytes(png[at : at + 4], "big")
        kind, content = png[at + 4 : at + 8], png[at + 8 : at + 8 + size]
        if kind == b"IHDR":
            width, height = (int.from_bytes(content[n : n + 4], "big") for n in (0, 4))
            channels = {2: 3, 6: 4}[content[9]]
            assert content[8] == 8 and not content[12], "neither 16 bits nor interlaced"
        chunks += content if kind == b"IDAT" else b""
        at += size + 12
    data, stride = zlib.decompress(chunks), width * channels
    rows, before = [], bytes(stride)
    for start in range(0, height * (stride + 1), stride + 1):
        line = bytearray(data[start + 1 : start + 1 + stride])
        before = _unfiltered(data[start], line, before, channels)
        rows.append(before if channels == 3 else _without_alpha(before))
    return rows


def _without_alpha(row: bytes) -> bytes:
    found = bytearray(len(row) // 4 * 3)
    for channel in range(3):
        found[channel::3] = row[channel::4]
    return bytes(found)


def _unfiltered(kind: int, line: bytearray, above: bytes, channels: int) -> bytes:
    """Undo the filter of a row (PNG specification, section 9)."""
    for n in range(len(line)):
        left = line[n - channels] if n >= channels else 0
        up, corner = above[n], above[n - channels] if n >= channels else 0
        if kind == 4:
            estimate = left + up - corner
            nearest = min((left, up, corner), key=lambda one: abs(estimate - one))
            line[n] = (line[n] + nearest) & 255
        else:
            line[n] = (line[n] + (0, left, up, (left + up) // 2)[kind]) & 255
    return bytes(line)
