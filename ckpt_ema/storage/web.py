"""GET requests by the standard library: connections are kept, redirects checked, failures retried.

A token is sent to its own host only. Nothing here is about the Hub, and nothing is cached.
"""

import base64
import random
import re
import selectors
import socket
import ssl
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from http.client import HTTPConnection, HTTPException, HTTPMessage, HTTPResponse, HTTPSConnection
from typing import NamedTuple, TypeVar
from urllib.parse import unquote, urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

from ckpt_ema.storage.client import LONGEST_PAUSE_SECONDS, MOST_ATTEMPTS

T = TypeVar("T")

_MOST_REDIRECTS = 5
_REDIRECTS = (301, 302, 303, 307, 308)
_MAY_SUCCEED_LATER = (429, 500, 502, 503, 504)
_LONGEST_WAIT_SECONDS = 60.0  # a longer Retry-After is cut to this
_MOST_DISCARDED_BYTES = 1 << 16  # a longer body costs more than a new connection


class WebError(Exception):
    """A request that will not succeed; `reason` is a clause without addresses and tokens."""

    def __init__(self, reason: str, status: int = 0, error_code: str = "") -> None:
        super().__init__(reason)
        self.reason, self.status, self.error_code = reason, status, error_code


class TemporaryError(WebError):
    """A request that may succeed later, not before `wait_seconds`."""

    wait_seconds = 0.0


class Origin(NamedTuple):
    """A server, as a URL names it."""

    scheme: str
    host: str
    port: int


class Answer:
    """An answer of which the status and headers have arrived; read or discard its body."""

    def __init__(
        self, url: str, response: HTTPResponse, connection: HTTPConnection, keep: Callable[[], None]
    ) -> None:
        self.url, self.status = url, response.status
        self.headers: HTTPMessage = response.headers
        self.elsewhere: str | None = None  # the address at another server, where it redirects to
        self._response, self._connection, self._keep = response, connection, keep

    def read(self, most_bytes: int) -> bytes:
        """Return the body; raises `WebError` if it is longer, `TemporaryError` if it is cut."""
        host = origin_of(self.url).host
        try:
            body = self._response.read(most_bytes + 1)
        except (OSError, HTTPException) as error:
            self._drop()
            raise _failure(host, error) from None
        is_whole = self._response.isclosed() and not self._response.length
        if is_whole and not self._response.will_close:
            self._keep()
        else:
            self._drop()
        if len(body) > most_bytes:
            raise WebError(f"{host} sent more than the expected {most_bytes} bytes")
        if self._response.length:
            raise TemporaryError(f"{host} closed the connection after {len(body)} bytes")
        return body

    def discard(self) -> None:
        """Give the connection back if the body is short, and close it otherwise."""
        if (self._response.length or 0) > _MOST_DISCARDED_BYTES:
            self._drop()
            return
        with suppress(WebError):  # `read` closed the connection; the body is not needed
            self.read(_MOST_DISCARDED_BYTES)

    def _drop(self) -> None:
        self._response.close()
        self._connection.close()


class Web:
    """Requests from many threads: to the home server, with the token, and to others without."""

    def __init__(
        self, home: str, token: str, *, timeout_seconds: float, pause_seconds: float
    ) -> None:
        if token and not re.fullmatch("[!-~]+", token):
            raise WebError("the token has characters that cannot be sent")
        self._home, self._token = origin_of(home), token
        self._timeout_seconds, self._pause_seconds = timeout_seconds, pause_seconds
        self._lock = threading.Lock()
        self._idle: dict[Origin, list[HTTPConnection]] = {}
        weakref.finalize(self, _close, self._idle)

    def retried(self, attempt: Callable[[], T]) -> T:
        """Return what `attempt` returns; it is called again after a `TemporaryError`."""
        for number in range(1, MOST_ATTEMPTS):
            try:
                return attempt()
            except TemporaryError as error:
                pause = self._pause_seconds * 2 ** (number - 1) * random.uniform(1, 1.5)
                time.sleep(max(min(pause, LONGEST_PAUSE_SECONDS), error.wait_seconds))
        try:
            return attempt()
        except TemporaryError as error:
            reason = f"{error.reason}, after {MOST_ATTEMPTS} attempts"
            raise WebError(reason, error.status) from None

    def get(self, url: str, part: tuple[int, int] | None = None, *, stays: bool = False) -> Answer:
        """Request a URL, or the bytes of it from `part[0]` up to `part[1]`; redirects are followed.

        With `stays`, a redirect to another server is not followed but returned, in `elsewhere`.
        Raises `WebError` for each status that is an error.
        """
        for _ in range(_MOST_REDIRECTS + 1):
            answer = self._request(url, part)
            if answer.status not in _REDIRECTS:
                return _checked(answer)
            answer.discard()
            url = redirected(url, answer.headers.get("Location", ""))
            if stays and origin_of(url) != self._home:
                answer.elsewhere = url
                return answer
        raise WebError(f"{origin_of(url).host} redirects more than {_MOST_REDIRECTS} times")

    def _request(self, url: str, part: tuple[int, int] | None) -> Answer:
        origin = origin_of(url)
        headers = {"User-Agent": "ckpt-ema", "Accept-Encoding": "identity"}
        if self._token and origin == self._home:
            headers["Authorization"] = f"Bearer {self._token}"
        if part:
            headers["Range"] = f"bytes={part[0]}-{part[1] - 1}"
        parts = urlsplit(url)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection = self._connection(origin)
        try:
            connection.request("GET", target, headers=headers)
            response = connection.getresponse()
        except (OSError, HTTPException) as error:
            connection.close()
            raise _failure(origin.host, error) from None
        return Answer(url, response, connection, lambda: self._keep(origin, connection))

    def _connection(self, origin: Origin) -> HTTPConnection:
        """Return the connection that was used last and is still open, or a new one."""
        while True:
            with self._lock:
                idle = self._idle.get(origin)
                connection = idle.pop() if idle else None
            if connection is None:
                return self._connected(origin)
            if connection.sock and not _has_input(connection.sock):
                return connection
            connection.close()

    def _keep(self, origin: Origin, connection: HTTPConnection) -> None:
        with self._lock:
            self._idle.setdefault(origin, []).append(connection)

    def _connected(self, origin: Origin) -> HTTPConnection:
        """Return a new connection; one with TLS goes through the proxy of the environment."""
        scheme, host, port = origin
        if scheme == "http":
            return HTTPConnection(host, port, timeout=self._timeout_seconds)
        proxy = None if proxy_bypass(host) else getproxies().get("https")
        if not proxy:
            return HTTPSConnection(host, port, timeout=self._timeout_seconds, context=self._context)
        try:
            parts = urlsplit(proxy if "//" in proxy else f"//{proxy}")
            at = parts.hostname or "", parts.port or 80
        except ValueError:
            raise WebError("the proxy in HTTPS_PROXY is not an address") from None
        tunnel = HTTPSConnection(*at, timeout=self._timeout_seconds, context=self._context)
        user = f"{unquote(parts.username or '')}:{unquote(parts.password or '')}".encode()
        login = {"Proxy-Authorization": f"Basic {base64.b64encode(user).decode()}"}
        tunnel.set_tunnel(host, port, login if parts.username else {})
        return tunnel

    @cached_property
    def _context(self) -> ssl.SSLContext:
        return ssl.create_default_context()


def origin_of(url: str) -> Origin:
    """Return the server of an http or https URL; raises `WebError` for every other text.

    >>> origin_of("https://huggingface.co/org/name")
    Origin(scheme='https', host='huggingface.co', port=443)
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise WebError("an address cannot be parsed") from None
    is_plain = re.fullmatch("[!-~]+", url)  # what http.client sends without an error of its own
    if parts.scheme not in ("http", "https") or not host or not is_plain:
        raise WebError("an address is not an http:// or https:// URL")
    return Origin(parts.scheme, host, port or (443 if parts.scheme == "https" else 80))


def redirected(url: str, location: str) -> str:
    """Return where a redirect leads; raises `WebError` if that is not to be followed."""
    origin = origin_of(url)
    try:
        target = origin_of(address := urljoin(url, location))
    except (WebError, ValueError):
        raise WebError(
            f"{origin.host} redirects to what is not an http:// or https:// URL"
        ) from None
    if origin.scheme == "https" and target.scheme == "http":
        raise WebError(f"{origin.host} redirects from https:// to http://")
    return address


def _checked(answer: Answer) -> Answer:
    """Return an answer unless its status is an error, which is raised."""
    if answer.status < 300:
        return answer
    answer.discard()
    reason = f"{origin_of(answer.url).host} answered with status {answer.status}"
    if answer.status not in _MAY_SUCCEED_LATER:
        raise WebError(reason, answer.status, answer.headers.get("X-Error-Code", ""))
    error = TemporaryError(reason, answer.status)
    error.wait_seconds = min(_asked_seconds(answer.headers), _LONGEST_WAIT_SECONDS)
    raise error


def _asked_seconds(headers: HTTPMessage) -> float:
    """Return how long a server asks to wait; dates in `Retry-After` are not understood."""
    after = re.fullmatch(r"\s*(\d{1,9})\s*", headers.get("Retry-After", ""))
    limit = re.search(r";\s*t=(\d{1,9})\b", headers.get("RateLimit", ""))
    return max((float(found[1]) for found in (after, limit) if found), default=0.0)


def _failure(host: str, error: Exception) -> WebError:
    """Return our error for one of the standard library, whose text may have the address."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return WebError(f"the certificate of {host} is not valid")
    if isinstance(error, TimeoutError):
        return TemporaryError(f"{host} timed out")
    why = getattr(error, "strerror", None) or type(error).__name__
    return TemporaryError(f"the connection to {host} failed ({why})")


def _has_input(connected: socket.socket) -> bool:
    """Return whether an idle connection has something to read: that the server closed it."""
    with selectors.DefaultSelector() as selector:
        selector.register(connected, selectors.EVENT_READ)
        return bool(selector.select(0))


def _close(idle: dict[Origin, list[HTTPConnection]]) -> None:
    for connection in (one for some in idle.values() for one in some):
        connection.close()
