"""An S3 on loopback that serves folders: its buckets are the folders in one folder.

It lists and reads; latency, rates and faults are set while it runs, and requests are counted.
"""

from __future__ import annotations

import hashlib
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

_BLOCK_BYTES = 1 << 18
_CODES = {403: "AccessDenied", 404: "NoSuchKey", 412: "PreconditionFailed", 503: "SlowDown"}
_HTML = b"<html><body>Sign in to the network</body></html>"


@dataclass
class Fault:
    """What goes wrong with the next `times` requests whose path and query contain `match`.

    `kind` is a status; "cut" or "stall" half-way through a body; "reset" of the connection; "whole"
    for an ignored Range; "short" for a range that ends early; "more" for a body longer than its
    range; "longer" for a range of a larger file; "other" for the tag of another file; "html" for a
    page instead of the answer; "loop" for a redirect to the same address.
    """

    kind: str
    match: str = ""
    times: int = 1 << 30


@dataclass
class FakeS3:
    """The server: what it serves, how fast, and what it has done."""

    root: Path
    latency_seconds: float = 0
    rate: float = 0  # bytes per second, of all connections together; 0 for no limit
    connection_rate: float = 0  # of each
    most_keys: int = 1000  # of a page
    stall_seconds: float = 30
    url: str = ""
    answer: str = "<Message>no</Message>"  # what a refusal says, beside its code
    keys: list[str] | None = None  # listed instead of the files, each with no bytes
    faults: list[Fault] = field(default_factory=list)
    requests: Counter[str] = field(default_factory=Counter)  # by what was asked for, and statuses
    authorizations: set[str] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)
    stopping: threading.Event = field(default_factory=threading.Event)
    free: float = 0  # when the link is free again

    def fault(self, target: str) -> str:
        """Return the kind of fault of a request, and use it up."""
        with self.lock:
            for one in self.faults:
                if one.match in target and one.times > 0:
                    one.times -= 1
                    return one.kind
        return ""

    def count(self, *names: str) -> None:
        """Count a request under these names."""
        with self.lock:
            self.requests.update(names)


@contextmanager
def fake_s3(root: Path) -> Iterator[FakeS3]:
    """Serve the folders in `root` as buckets, at the yielded server's `url`."""
    store = FakeS3(root)
    with _Server(("127.0.0.1", 0), partial(_Handler, store)) as server:
        store.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=partial(server.serve_forever, 0.02))
        thread.start()
        try:
            yield store
        finally:
            store.stopping.set()
            server.shutdown()
            thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def handle_error(self, *_: object) -> None:
        """Say nothing: clients that give up are expected here."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, store: FakeS3, *arguments: object) -> None:
        self.store = store
        self.free = 0.0  # when the connection is free again
        super().__init__(*arguments)  # type: ignore[arg-type]

    def setup(self) -> None:
        """Take a connection; a handshake takes a round trip."""
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.store.count("connection")
        time.sleep(self.store.latency_seconds)

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        """List a bucket or read an object."""
        time.sleep(self.store.latency_seconds)
        url = urlsplit(self.path)
        bucket, _, key = unquote(url.path)[1:].partition("/")
        self.fault = self.store.fault(unquote(self.path))
        self.store.count("LIST" if not key else self.command)
        self.store.authorizations.add(self.headers.get("Authorization", ""))
        if self.fault.isdigit():
            self._refuse(int(self.fault))
        elif self.fault == "html":
            self._send(200, _HTML, "text/html")
        elif self.fault == "loop":
            self._send(307, b"", "text/plain", {"Location": f"{self.store.url}{self.path}"})
        elif self.fault == "reset":
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        elif not key:
            self._list(bucket, {name: values[0] for name, values in parse_qs(url.query).items()})
        else:
            self._read(self.store.root / bucket / key)

    do_HEAD = do_GET  # noqa: N815 - the name is the base class's

    def _refuse(self, status: int, code: str = "") -> None:
        code = code or _CODES.get(status, "InternalError")
        body = f"<Error><Code>{code}</Code>{self.store.answer}</Error>".encode()
        self._send(status, body, "application/xml")

    def _send(
        self, status: int, body: bytes, kind: str, more: dict[str, str] | None = None
    ) -> None:
        self.store.count(str(status))
        self.send_response(status)
        headers = {"Content-Type": kind, "Content-Length": str(len(body)), **(more or {})}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            breaks = self.fault in ("cut", "stall")
            self.wfile.write(body[: len(body) // 2] if breaks else body)
            self._break_off()

    def _break_off(self) -> None:
        """Give no more, at once or after a while, if that is the fault."""
        if self.fault == "stall":
            self.wfile.flush()
            self.store.stopping.wait(self.store.stall_seconds)
        self.close_connection = self.close_connection or self.fault in ("cut", "stall")

    def _list(self, bucket: str, query: dict[str, str]) -> None:
        root = self.store.root / bucket
        if not root.is_dir():
            return self._refuse(404, "NoSuchBucket")
        prefix, after = query.get("prefix", ""), query.get("continuation-token", "")
        found = self.store.keys or _keys(root)
        keys = [key for key in found if key.startswith(prefix) and key > after]
        page = keys[: self.store.most_keys]
        more = escape(page[-1]) if len(keys) > len(page) else ""
        rows = "".join(_row(root / key, key) for key in page)
        token = f"<NextContinuationToken>{more}</NextContinuationToken>" if more else ""
        body = (
            f'<?xml version="1.0"?><ListBucketResult><Name>{bucket}</Name>'
            f"<KeyCount>{len(page)}</KeyCount><IsTruncated>{str(bool(more)).lower()}</IsTruncated>"
            f"{token}{rows}</ListBucketResult>"
        )
        return self._send(200, body.encode(), "application/xml")

    def _read(self, path: Path) -> None:
        if not path.is_file():
            return self._refuse(404)
        tag = "other" if self.fault == "other" else etag(path)
        if_match = self.headers.get("If-Match", "")
        if if_match and self.fault != "other" and if_match.strip('"') != tag:
            return self._refuse(412)
        size_bytes = path.stat().st_size
        asked = self.headers.get("Range", "") if self.fault != "whole" else ""
        first, _, last = asked.removeprefix("bytes=").partition("-")
        start = int(first or 0)
        stop = min(int(last) + 1 if last else size_bytes, size_bytes)
        if asked and start >= size_bytes:
            return self._refuse(416)
        if self.fault == "short":
            stop = start + (stop - start) // 2
        self._answer(path, tag, range(start, stop), size_bytes if asked else None)
        return None

    def _answer(self, path: Path, tag: str, part: range, size_bytes: int | None) -> None:
        """Send a part of a file; `size_bytes` is the file's if a range was asked for."""
        self.store.count("200" if size_bytes is None else "206")
        self.send_response(200 if size_bytes is None else 206)
        if size_bytes is not None:
            of = size_bytes + (self.fault == "longer")
            self.send_header("Content-Range", f"bytes {part.start}-{part.stop - 1}/{of}")
        extra = len(part) if self.fault == "more" else 0
        self.send_header("Content-Length", str(len(part) + extra))
        self.send_header("ETag", f'"{tag}"')
        self.send_header("Last-Modified", formatdate(path.stat().st_mtime, usegmt=True))
        self.end_headers()
        if self.command == "HEAD":
            return
        breaks = self.fault in ("cut", "stall")
        end = part.start + len(part) // 2 if breaks else part.stop
        self.wfile.flush()
        self._copy(path, part.start, end)
        self.wfile.write(bytes(extra))
        self._break_off()

    def _copy(self, path: Path, start: int, stop: int) -> None:
        fd = os.open(path, os.O_RDONLY)
        try:
            while start < stop:
                count = min(_BLOCK_BYTES, stop - start)
                sent = os.sendfile(self.connection.fileno(), fd, start, count)
                start += sent
                self._pace(sent)
        finally:
            os.close(fd)

    def _pace(self, count: int) -> None:
        """Wait until `count` bytes have passed the connection and the link."""
        store, now = self.store, time.monotonic()
        if store.connection_rate:
            self.free = max(self.free, now - 0.02) + count / store.connection_rate
        if store.rate:
            with store.lock:
                store.free = max(store.free, now - 0.02) + count / store.rate
        wait = max(self.free, store.free) - now
        if wait > 0.002:
            time.sleep(wait)


def etag(path: Path) -> str:
    """Return what tells the content of a file from what it was before, without the quotes."""
    status = path.stat()
    text = f"{status.st_ino} {status.st_size} {status.st_mtime_ns}"
    return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()


def _keys(root: Path) -> list[str]:
    """List the files below a folder, and empty folders as markers."""
    found = []
    for folder, folders, names in os.walk(root):
        found += [os.path.relpath(os.path.join(folder, name), root) for name in names]
        if not folders and not names and folder != str(root):
            found.append(os.path.relpath(folder, root) + "/")
    return sorted(found)


def _row(path: Path, key: str) -> str:
    is_file = path.is_file()
    size_bytes, mtime = (path.stat().st_size, path.stat().st_mtime) if is_file else (0, 0)
    tag = etag(path) if is_file else "empty"
    modified = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(mtime))
    return (
        f"<Contents><Key>{escape(key)}</Key><LastModified>{modified}</LastModified>"
        f"<ETag>&quot;{tag}&quot;</ETag><Size>{size_bytes}</Size></Contents>"
    )
