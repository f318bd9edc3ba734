"""A client for models on the Hugging Face Hub, by its HTTP API.

Revisions are pinned to commits, so their files do not change. Nothing is written to disk, and only
GET requests are sent.
"""

import os
import re
import threading
from collections import defaultdict
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from ckpt_ema.errors import Code, FailedError, RefusedError
from ckpt_ema.storage.client import FIRST_PAUSE_SECONDS, STALL_SECONDS, RemoteFile
from ckpt_ema.storage.failures import changed
from ckpt_ema.storage.hub_listing import AbsentError, HubURI, Listing, parse_uri
from ckpt_ema.storage.web import Answer, TemporaryError, Web, WebError

_EXPIRED = (401, 403, 410)  # the status of a signed URL that has expired
_HINTS = {
    401: "Set HF_TOKEN to a token with read access.",
    403: "If it is gated, request access on its page and set HF_TOKEN.",
    429: "The Hub allows more requests with HF_TOKEN set.",
}


class _ChangedError(WebError):
    """The file is not the one that was listed."""


@dataclass(slots=True)
class _Slot:
    """A value that one thread computes while the others wait for it."""

    value: Any = None
    lock: threading.Lock = field(default_factory=threading.Lock)


class Hub:
    """A `Client` for `hf://` URIs.

    `endpoint` and `token` default to what huggingface_hub uses: HF_ENDPOINT; HF_TOKEN, or the file
    in which `hf auth login` stored the token.
    """

    def __init__(
        self,
        *,
        endpoint: str | None = None,
        token: str | None = None,
        timeout_seconds: float = STALL_SECONDS,
        pause_seconds: float = FIRST_PAUSE_SECONDS,
    ) -> None:
        asked = endpoint or os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
        self._endpoint = asked.rstrip("/")
        token = _found_token() if token is None else token
        pauses = {"timeout_seconds": timeout_seconds, "pause_seconds": pause_seconds}
        try:
            self._web = Web(self._endpoint, token, **pauses)
        except WebError as error:
            message = f"cannot reach the Hub: {error.reason}."
            hint = "See HF_ENDPOINT and HF_TOKEN."
            raise RefusedError(message, hint, code=Code.INACCESSIBLE) from None
        self._listing = Listing(self._web, self._endpoint)
        self._lock = threading.Lock()
        self._slots: defaultdict[Hashable, _Slot] = defaultdict(_Slot)

    def files(self, path: str) -> list[RemoteFile]:
        """See `Client.files`; below a glob, each name begins with its revision and a slash.

        A slash in the name of such a revision is replaced by two hyphens.
        """
        try:
            uri = parse_uri(path)
            return self._listing.files(uri, self._commits(uri))
        except WebError as error:
            raise _refusal(path, error) from None

    def read(self, path: str, file: RemoteFile, start: int, count: int) -> bytes:
        """See `Client.read`."""
        if not count:
            return b""
        try:
            url = self._url(parse_uri(path), file.name)
            return self._web.retried(lambda: self._part(url, file, start, count))
        except WebError as error:
            raise _failure(f"{path}/{file.name}" if file.name else path, error) from None

    def _commits(self, uri: HubURI) -> dict[str, str]:
        """Return the commits of a URI, requested once: later pushes are ignored."""
        slot = self._slot((uri.repo, uri.revision))
        with slot.lock:
            if slot.value is None:
                slot.value = self._listing.commits(uri)
            found: dict[str, str] = slot.value
            return found

    def _slot(self, key: Hashable) -> _Slot:
        with self._lock:
            return self._slots[key]

    def _url(self, uri: HubURI, name: str) -> str:
        """Return the address at the Hub of a file that was listed."""
        commits, folder = self._commits(uri), ""
        if uri.is_glob:
            folder, _, name = name.partition("/")
        if folder not in commits:
            raise _ChangedError("its revision was removed")
        path = "/".join(part for part in (uri.path, name) if part)
        return f"{self._endpoint}/{uri.repo}/resolve/{commits[folder]}/{quote(path)}"

    def _part(self, url: str, file: RemoteFile, start: int, count: int) -> bytes:
        # Some servers ignore the range of a small file, so a whole file is requested without one.
        part = None if count == file.size_bytes else (start, start + count)
        answer = self._opened(url, file, part)
        try:
            _check(answer, file, part)
        except WebError:
            answer.discard()
            raise
        body = answer.read(count)
        if len(body) < count:
            raise TemporaryError(f"{len(body)} of {count} bytes arrived")
        return body

    def _opened(self, url: str, file: RemoteFile, part: tuple[int, int] | None) -> Answer:
        """Request bytes at the address to which the Hub redirects, renewing it if it has expired.

        Of the threads that have no address, one asks the Hub and the others wait. Where the Hub
        itself sends the file, which it does with small ones, it is asked each time.
        """
        slot, expired = self._slot(url), None
        while True:
            with slot.lock:
                if slot.value in (None, expired):
                    answer = self._web.get(url, part, stays=True)
                    _check_link(answer, file)
                    slot.value = answer.elsewhere or (answer.url if answer.url != url else None)
                    if not answer.elsewhere:
                        return answer
                address = slot.value
            try:
                return self._web.get(address, part)
            except WebError as error:
                if expired or error.status not in _EXPIRED:
                    raise
            expired = address


def _found_token() -> str:
    """Return the token in the environment or from `hf auth login`; empty if there is none."""
    if token := os.environ.get("HF_TOKEN", "").strip():
        return token
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or os.path.join(caches, "huggingface")
    path = os.environ.get("HF_TOKEN_PATH") or os.path.join(home, "token")
    try:
        with open(os.path.expanduser(path), encoding="utf-8") as file:
            return file.read(4096).strip()
    except (OSError, UnicodeDecodeError):
        return ""  # the Hub answers 401 if one is needed


def _check_link(answer: Answer, file: RemoteFile) -> None:
    """Raise if the Hub redirects to the content of another file than the one listed."""
    size, digest = (answer.headers.get(f"X-Linked-{what}", "") for what in ("Size", "Etag"))
    is_other_size = size not in ("", str(file.size_bytes))
    is_other_digest = digest.strip('"') not in ("", file.tag) and "@" not in file.tag
    if answer.elsewhere and (is_other_size or is_other_digest):
        raise _ChangedError("it is another file")


def _check(answer: Answer, file: RemoteFile, part: tuple[int, int] | None) -> None:
    """Raise unless the body of an answer is the requested part, or the file for None."""
    if part is None:
        size = answer.headers.get("Content-Length", "")
        if answer.headers.get_content_type() == "text/html" and not file.name.endswith(".html"):
            raise WebError("the answer is HTML and not the file")
        if answer.status != 200 or size not in ("", str(file.size_bytes)):
            raise _ChangedError("it has another size")
        return
    if answer.status != 206:
        raise WebError("the server ignores the Range of a request")
    found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", answer.headers.get("Content-Range", ""))
    if found is None or (int(found[1]), int(found[2]) + 1) != part:
        raise WebError("the server sent another range than was requested")
    if int(found[3]) != file.size_bytes:
        raise _ChangedError("it has another size")


def _refusal(uri: str, error: WebError) -> RefusedError:
    reasons = {
        401: "there is no such repository, or it is private or gated",
        403: "the Hub denies access",
        404: "there is no such repository or revision",
    }
    is_absent = isinstance(error, AbsentError) or error.status == 404
    message = f"cannot access {uri}: {reasons.get(error.status, error.reason)}."
    code = Code.NOT_FOUND if is_absent else Code.INACCESSIBLE
    return RefusedError(message, _HINTS.get(error.status, ""), code=code, path=uri)


def _failure(uri: str, error: WebError) -> FailedError:
    if isinstance(error, _ChangedError) or error.status in (404, 412, 416):
        return changed(uri)
    message = f"cannot read {uri}: {error.reason}."
    return FailedError(message, _HINTS.get(error.status, ""), code=Code.READ_FAILED, path=uri)
