"""A Hugging Face Hub on loopback, made from folders, that can be slow and can fail.

The Hub is at 127.0.0.1 and the store to which it redirects, the CDN, at localhost: another host.
"""

import hashlib
import json
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from enum import Enum, auto
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.parse import parse_qs, quote, unquote, urlsplit

_CHUNK_BYTES = 1 << 18


class Fault(Enum):
    """What can go wrong with an answer."""

    STATUS = auto()  # the fault's `status`, with the fault's `headers`
    RESET = auto()  # the connection is closed before anything is sent
    CUT = auto()  # half of the body, and the connection is closed
    STALL = auto()  # half of the body, and then nothing
    HTML = auto()  # a page of HTML with status 200
    WRONG_LENGTH = auto()  # one byte less than was asked for, and the headers say so
    IGNORED_RANGE = auto()  # the whole file with status 200
    OTHER_RANGE = auto()  # as many bytes from elsewhere in the file
    OTHER_CONTENT = auto()  # the resolve answer names the digest of other content
    GROWN = auto()  # the file is longer than it was listed
    LOOP = auto()  # a redirect to the same address
    TO_SCHEME = auto()  # a redirect to a file on the client's machine
    EXPIRED = auto()  # 403 with the CDN's text


@dataclass
class _Planned:
    fault: Fault
    match: str
    times: int
    status: int
    headers: dict[str, str]


@dataclass
class _Pace:
    """A limit of bytes a second."""

    bytes_per_second: float = 0
    free_at: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def wait(self, count: int) -> None:
        """Return when `count` bytes have passed."""
        if not self.bytes_per_second:
            return
        with self.lock:
            self.free_at = max(self.free_at, time.monotonic()) + count / self.bytes_per_second
            seconds = self.free_at - time.monotonic()
        time.sleep(max(0, seconds))


class FakeHub:
    """Folders `org/repo/REVISION` as repositories; `%2F` in a folder's name is a slash.

    Files of `large_bytes` or more are served by the CDN. `counts` counts requests by kind ("refs",
    "revision", "tree", "resolve", "cache", "cdn"), `authorized` those with a token, by host.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.endpoint = self.cdn = ""
        self.token = ""  # required, if it is not empty
        self.tags: set[str] = set()  # the revisions that are tags, not branches
        self.large_bytes, self.page_names, self.lifetime_seconds = 1024, 1000, 3600.0
        self.sends_small_files = False  # itself, as from a private repository
        self.latency_seconds, self.connection_bytes_per_second = 0.0, 0.0
        self.link = _Pace()
        self.counts: Counter[str] = Counter()
        self.authorized: Counter[str] = Counter()
        self.paths: list[str] = []
        self.bodies: dict[str, object] = {}  # what is answered to a kind of request instead
        self.now = self.most_at_a_time = self.connections = 0
        self.lock = threading.Lock()
        self.generation = 0
        self._planned: list[_Planned] = []
        self._commits: dict[tuple[str, str], tuple[str, Path]] = {}
        for folder in sorted(root.glob("*/*/*")):
            self.push("/".join(folder.parts[-3:-1]), folder.name.replace("%2F", "/"), folder)

    def push(self, repo: str, revision: str, folder: Path) -> str:
        """Make a revision a new commit of the files in a folder, and return the commit."""
        commit = hashlib.sha1(f"{repo}@{revision} {folder}".encode()).hexdigest()
        self._commits[repo, revision] = self._commits[repo, commit] = commit, folder
        return commit

    def fail(
        self,
        fault: Fault,
        match: str = "",
        *,
        times: int = 1,
        status: int = 0,
        headers: dict[str, str] | None = None,
    ) -> None:
        """Have the next `times` requests fail of those with `match` in kind or path."""
        self._planned.append(_Planned(fault, match, times, status, headers or {}))

    def recover(self) -> None:
        """Fail no more."""
        self._planned.clear()

    def expire(self) -> None:
        """Let no address that was signed before be valid any longer."""
        self.generation += 1

    def fault(self, kind: str, path: str) -> _Planned | None:
        """Return how a request fails, which happens now."""
        with self.lock:
            for planned in self._planned:
                if planned.times and planned.match in f"{kind} {path}":
                    planned.times -= 1
                    return planned
        return None

    def folder(self, repo: str, revision: str) -> tuple[str, Path] | None:
        """Return the commit of a revision and its folder."""
        return self._commits.get((repo, revision))

    def revisions(self, repo: str) -> dict[str, str]:
        """Return the commit of each branch and tag."""
        found = {rev: commit for (home, rev), (commit, _) in self._commits.items() if home == repo}
        return {rev: commit for rev, commit in found.items() if rev != commit}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    hub: ClassVar[FakeHub]
    planned: _Planned | None = None

    def setup(self) -> None:
        super().setup()
        self.pace = _Pace(self.hub.connection_bytes_per_second)
        with self.hub.lock:
            self.hub.connections += 1

    def log_message(self, *_: object) -> None:
        """Stay silent."""

    def do_GET(self) -> None:
        """Answer, or fail as planned."""
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        kind = _kind(path)
        with hub.lock:
            hub.counts[kind] += 1
            hub.paths.append(self.path)
            hub.authorized["cdn" if kind == "cdn" else "hub"] += "Authorization" in self.headers
            hub.now += 1
            hub.most_at_a_time = max(hub.most_at_a_time, hub.now)
        try:
            time.sleep(hub.latency_seconds)
            self.planned = hub.fault(kind, path)
            with suppress(ConnectionError):
                self._fail_or(kind, path)
        finally:
            with hub.lock:
                hub.now -= 1

    def _fail_or(self, kind: str, path: str) -> None:
        fault = self.planned and self.planned.fault
        if self.planned and fault is Fault.STATUS:
            self._send(self.planned.status, b"{}", **self.planned.headers)
        elif fault is Fault.RESET:
            self.close_connection = True
        elif fault is Fault.HTML:
            self._send(200, b"<html>Sign in, please.</html>", Content_Type="text/html")
        elif fault is Fault.LOOP:
            self._send(302, Location=self.path)
        elif fault is Fault.TO_SCHEME:
            self._send(302, Location="file:///etc/passwd")
        elif fault is Fault.EXPIRED:
            self._send(403, b"<Error><Message>Request has expired</Message></Error>")
        elif kind in self.hub.bodies:
            self._json(self.hub.bodies[kind])
        else:
            self._answer(kind, path)

    def _answer(self, kind: str, path: str) -> None:
        hub, parts = self.hub, path.split("/")
        if kind == "cdn":
            return self._from_cdn(path.removeprefix("/cdn/"))
        start = {"resolve": 1, "cache": 4}.get(kind, 3)
        repo = "/".join(parts[start : start + 2])
        if hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
            return self._send(401, b"{}", X_Error_Code="RepoNotFound")
        if not hub.revisions(repo):
            return self._send(404, b"{}", X_Error_Code="RepoNotFound")
        if kind == "refs":
            return self._json(self._refs(repo))
        raw = urlsplit(self.path).path.split("/")  # a slash in a revision is quoted
        at = start + 2 + (kind != "cache")
        found = hub.folder(repo, unquote(raw[at]))
        if found is None:
            return self._send(404, b"{}", X_Error_Code="RevisionNotFound")
        commit, folder = found
        name = unquote("/".join(raw[at + 1 :]))
        if kind == "revision":
            return self._json({"_id": "1", "id": repo, "sha": commit})
        if kind == "tree":
            return self._tree(folder, name)
        return self._resolve(repo, commit, folder, name, is_cached=kind == "cache")

    def _refs(self, repo: str) -> dict[str, object]:
        rows: dict[bool, list[object]] = {False: [], True: []}
        for name, commit in self.hub.revisions(repo).items():
            rows[name in self.hub.tags].append({"name": name, "targetCommit": commit})
        return {"branches": rows[False], "tags": rows[True], "converts": []}

    def _tree(self, root: Path, name: str) -> None:
        query, hub = parse_qs(urlsplit(self.path).query), self.hub
        folder = root / name
        if not folder.is_dir():
            return self._send(404, b"{}", X_Error_Code="EntryNotFound")
        found = folder.rglob("*") if query["recursive"] == ["true"] else folder.iterdir()
        rows = [_row(path, root, hub.large_bytes) for path in sorted(found)]
        start = int(query.get("cursor", ["0"])[0])
        end = start + hub.page_names
        headers = {}
        if end < len(rows):
            recursive = query["recursive"][0]
            # As behind a mirror: the next page is said to be elsewhere.
            url = f"https://hub.invalid{urlsplit(self.path).path}"
            link = f'<{url}?recursive={recursive}&expand=false&cursor={end}>; rel="next"'
            headers["Link"] = link
        return self._json(rows[start:end], **headers)

    def _resolve(self, repo: str, commit: str, root: Path, name: str, *, is_cached: bool) -> None:
        path, hub = root / name, self.hub
        if not path.is_file():
            return self._send(404, b"{}", X_Error_Code="EntryNotFound")
        quoted = f"{repo}/{commit}/{quote(name)}"
        if path.stat().st_size >= hub.large_bytes:
            expires = time.time() + hub.lifetime_seconds
            query = f"Expires={expires}&Signature=SECRET{hub.generation}"
            is_other = self.planned and self.planned.fault is Fault.OTHER_CONTENT
            linked = {"X_Linked_Etag": f'"{"0" * 64 if is_other else _sha256(path)}"'}
            linked["X_Linked_Size"] = str(path.stat().st_size)
            return self._send(302, Location=f"{hub.cdn}/cdn/{quoted}?{query}", **linked)
        if is_cached or hub.sends_small_files:
            return self._file(path)
        return self._send(307, Location=f"/api/resolve-cache/models/{quoted}?etag=%22x%22")

    def _from_cdn(self, path: str) -> None:
        hub, query = self.hub, parse_qs(urlsplit(self.path).query)
        is_valid = query.get("Signature") == [f"SECRET{hub.generation}"]
        if not is_valid or float(query["Expires"][0]) < time.time():
            return self._send(403, b"<Error><Message>Request has expired</Message></Error>")
        org, repo, commit, name = path.split("/", 3)
        found = hub.folder(f"{org}/{repo}", commit)
        if found is None or not (found[1] / name).is_file():
            return self._send(404, b"<Error><Code>NoSuchKey</Code></Error>")
        return self._file(found[1] / name)

    def _file(self, path: Path) -> None:
        fault = self.planned and self.planned.fault
        size = path.stat().st_size + 4 * (fault is Fault.GROWN)
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked is None or fault is Fault.IGNORED_RANGE:
            return self._send(200, path.read_bytes().ljust(size))
        start, end = int(asked[1]), int(asked[2]) + 1
        if start >= size:
            return self._send(416)
        if fault is Fault.OTHER_RANGE:
            start, end = start - 1, end - 1
        if fault is Fault.WRONG_LENGTH:
            end -= 1
        with path.open("rb") as file:
            file.seek(start)
            body = file.read(end - start)
        span = f"bytes {start}-{start + len(body) - 1}/{size}"
        return self._send(206, body, Content_Range=span)

    def _json(self, value: object, **headers: str) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self._send(200, body, Content_Type="application/json", **headers)

    def _send(self, status: int, body: bytes = b"", /, **headers: str) -> None:
        """Send an answer; an underscore in the name of a header is a hyphen."""
        headers = {"Content_Length": str(len(body)), **headers}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        fault = self.planned and self.planned.fault
        is_cut = fault in (Fault.CUT, Fault.STALL)
        end = len(body) // 2 if is_cut else len(body)
        for start in range(0, end, _CHUNK_BYTES):
            chunk = body[start : min(end, start + _CHUNK_BYTES)]
            self.hub.link.wait(len(chunk))
            self.pace.wait(len(chunk))
            self.wfile.write(chunk)
        if fault is Fault.STALL:
            self.connection.settimeout(10)
            with suppress(TimeoutError):
                self.connection.recv(1)  # until the client has enough
        self.close_connection |= is_cut


def _kind(path: str) -> str:
    """Return what a request is for."""
    if path.startswith("/cdn/"):
        return "cdn"
    if path.startswith("/api/resolve-cache/"):
        return "cache"
    parts = path.split("/")
    return parts[5] if path.startswith("/api/models/") else parts[3]


def _row(path: Path, root: Path, large_bytes: int) -> dict[str, object]:
    """Return what a tree says of a file or a folder."""
    name = path.relative_to(root).as_posix()
    if path.is_dir():
        return {"type": "directory", "oid": "1" * 40, "size": 0, "path": name}
    size = path.stat().st_size
    row: dict[str, object] = {"type": "file", "oid": _sha1(path), "size": size, "path": name}
    if size >= large_bytes:
        row["lfs"] = {"oid": _sha256(path), "size": size, "pointerSize": 134}
    return row


@cache
def _digest(path: Path, algorithm: str, _mtime_ns: int) -> str:
    content = path.read_bytes()
    if algorithm == "sha1":
        content = b"blob %d\0" % len(content) + content  # as git does
    return hashlib.new(algorithm, content).hexdigest()


def _sha1(path: Path) -> str:
    return _digest(path, "sha1", path.stat().st_mtime_ns)


def _sha256(path: Path) -> str:
    return _digest(path, "sha256", path.stat().st_mtime_ns)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 512

    def __init__(self, handler: type[_Handler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.open: set[socket.socket] = set()

    def process_request(self, request: object, client_address: object) -> None:
        """Remember the connection, to end it with the server."""
        assert isinstance(request, socket.socket)
        self.open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: object) -> None:
        """Forget a connection that has ended."""
        assert isinstance(request, socket.socket)
        self.open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing of connections that a client resets."""


@contextmanager
def fake_hub(root: Path) -> Iterator[FakeHub]:
    """Serve folders `root/org/repo/REVISION` until the end of the block."""
    hub = FakeHub(root)
    server = _Server(type("Handler", (_Handler,), {"hub": hub}))
    port = server.server_address[1]
    hub.endpoint, hub.cdn = f"http://127.0.0.1:{port}", f"http://localhost:{port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        for connection in list(server.open):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        server.server_close()
