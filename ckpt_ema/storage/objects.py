"""A client for S3, Google Cloud Storage and Azure, by the library obstore.

obstore is imported for the first URI. It alone retries requests and resumes bodies.
"""

from __future__ import annotations

import os
import re
import threading
from datetime import timedelta
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ckpt_ema.errors import Code, RefusedError
from ckpt_ema.storage.client import (
    FIRST_PAUSE_SECONDS,
    LONGEST_PAUSE_SECONDS,
    MOST_ATTEMPTS,
    STALL_SECONDS,
    RemoteFile,
)
from ckpt_ema.storage.object_errors import Operation, changed, refused, translated, unreadable
from ckpt_ema.storage.waiting import interruptible

if TYPE_CHECKING:
    from obstore import GetOptions, ObjectMeta

_RETRIES_SECONDS = 180  # of all attempts; signatures of a request live for minutes
_WHOLE_SECONDS = 600  # of a request that never stalls
_PAGE = 1000
_CLASSES = {"s3": "S3Store", "gs": "GCSStore", "az": "AzureStore"}
_ENDPOINTS = {
    "s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"),
    "gs": (),
    "az": ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"),
}
_URI = re.compile(
    r"(?P<scheme>s3|gs|az)://(?P<bucket>\w[\w.-]*)(/(?P<key>.*))?", re.ASCII | re.DOTALL
)
_UNSAFE_NAME = re.compile(r"^/|(^|/)\.\.?(/|$)|[\x00-\x1f\x7f-\x9f]")


class Objects:
    """A `Client` for `s3://`, `gs://` and `az://`."""

    def __init__(
        self,
        *,
        stall_seconds: float = STALL_SECONDS,
        first_wait_seconds: float = FIRST_PAUSE_SECONDS,
        longest_wait_seconds: float = LONGEST_PAUSE_SECONDS,
        most_keys: int = 200_000,
    ) -> None:
        """Wait `stall_seconds` for the next bytes; list at most `most_keys` objects."""
        self._stall = timedelta(seconds=stall_seconds)
        self._waits = [timedelta(seconds=s) for s in (first_wait_seconds, longest_wait_seconds)]
        self._most_keys = most_keys
        self._stores: dict[tuple[str, str], Any] = {}
        self._lock = threading.Lock()

    def files(self, path: str) -> list[RemoteFile]:
        """See `Client.files`; keys that are unsafe as file names are refused.

        Empty objects that mark folders are left out, unless the folder is empty: obstore cannot
        distinguish those from empty files.
        """
        return interruptible(lambda: self._files(path))

    def _files(self, path: str) -> list[RemoteFile]:
        store, key = self._open(path)
        with translated(path, Operation.LISTING):
            found = self._below(path, store, key)
            if found or not key:
                return found
            try:
                file = _remote_file("", store.head(key))
            except FileNotFoundError:
                return []
        if not file.tag:  # every store sends one, so this may be a proxy's page
            raise unreadable(path, "the answer has no ETag")
        return [file]

    def read(self, path: str, file: RemoteFile, start: int, count: int) -> bytes:
        """See `Client.read`."""
        if not count:
            return b""  # a range of HTTP cannot be empty
        return interruptible(lambda: self._part(path, file, start, count))

    def _part(self, path: str, file: RemoteFile, start: int, count: int) -> bytes:
        uri = f"{path}/{file.name}" if file.name else path
        store, key = self._open(uri)
        options: GetOptions = {"range": (start, start + count)}
        if not file.tag.startswith("W/") and file.tag:  # a weak tag matches nothing
            options["if_match"] = f'"{file.tag}"'
        with translated(uri, Operation.READING):
            answer = store.get(key, options=options)
            now = _remote_file(file.name, answer.meta)
            if (now.tag, now.size_bytes) != (file.tag, file.size_bytes):
                raise changed(uri)
            # Of a server that sends more than its header says, only one byte more is read.
            content: bytes = next(iter(answer.stream(count + 1)), b"")
        if len(content) != count:
            reason = f"{count} bytes from {start} were requested, {len(content)} received"
            raise unreadable(uri, reason)
        return content

    def _below(self, path: str, store: Any, key: str) -> list[RemoteFile]:
        found: dict[str, RemoteFile] = {}
        folders = {""}
        for page in store.list(key or None, chunk_size=_PAGE):
            for meta in page:
                name = meta["path"].removeprefix(key).removeprefix("/")
                if _UNSAFE_NAME.search(name):
                    raise refused(path, f"the name {name!r} of an object is unsafe", Code.UNSAFE)
                found[name] = _remote_file(name, meta)
                folders.update(name[: match.start()] for match in re.finditer("/", name))
            if len(found) > self._most_keys:
                reason = f"it has more than {self._most_keys} objects"
                hint = "Name a narrower prefix."
                raise refused(path, reason, hint=hint)
        return [file for file in found.values() if file.size_bytes or file.name not in folders]

    def _open(self, uri: str) -> tuple[Any, str]:
        """Return the store of a URI, which is made once for each bucket, and the key in it."""
        match = _URI.fullmatch(uri)
        if not match:
            message = "s3://, gs:// and az:// must be followed by the name of a bucket."
            raise RefusedError(message, code=Code.NOT_FOUND)  # the text may hold a password
        scheme, bucket, key = match["scheme"], match["bucket"], (match["key"] or "").rstrip("/")
        if _UNSAFE_NAME.search(key):  # obstore would read another key for one that begins with /
            raise refused(
                uri,
                "its path is not a plain relative path",
                Code.UNSAFE,
            )
        with self._lock:
            if (scheme, bucket) not in self._stores:
                self._stores[scheme, bucket] = self._make(uri, scheme, bucket)
            return self._stores[scheme, bucket], key

    def _make(self, uri: str, scheme: str, bucket: str) -> Any:
        if find_spec("obstore") is None:
            message = f"{scheme}:// needs obstore."
            hint = "Install it with: pip install 'ckpt-ema[remote]'"
            raise RefusedError(
                message, hint, code=Code.MISSING_DEPENDENCY, path=uri.partition("?")[0]
            )
        endpoint = _endpoint(uri, scheme)
        config: dict[str, Any] = {"endpoint": endpoint} if endpoint else {}
        if endpoint and scheme == "s3":
            config["virtual_hosted_style_request"] = False
        with translated(uri, Operation.OPENING):
            if scheme == "s3":
                config |= _profile(uri)
            store = getattr(import_module("obstore.store"), _CLASSES[scheme])
            return store(bucket, **config, **self._limits(allow_http=endpoint.startswith("http:")))

    def _limits(self, *, allow_http: bool) -> dict[str, Any]:
        return {
            "client_options": {
                "allow_http": allow_http,
                "connect_timeout": self._stall,
                "read_timeout": self._stall,
                "timeout": timedelta(seconds=_WHOLE_SECONDS),
            },
            "retry_config": {
                "max_retries": MOST_ATTEMPTS - 1,
                "retry_timeout": timedelta(seconds=_RETRIES_SECONDS),
                "backoff": {
                    "init_backoff": self._waits[0],
                    "max_backoff": self._waits[1],
                    "base": 2,
                },
            },
        }


def _endpoint(uri: str, scheme: str) -> str:
    """Return the address that the user has set, or an empty text."""
    for name in _ENDPOINTS[scheme]:
        if value := os.environ.get(name):
            address = urlsplit(value)
            if address.scheme not in ("http", "https") or not address.hostname or address.username:
                reason = f"{name} is not of the form https://HOST"  # its text may be a secret
                raise refused(uri, reason, Code.INVALID_OPTION)
            return value
    return ""


def _profile(uri: str) -> dict[str, Any]:
    """Return the credentials of AWS_PROFILE, which obstore itself does not read."""
    if not os.environ.get("AWS_PROFILE"):
        return {}
    if find_spec("boto3"):
        return {
            "credential_provider": import_module("obstore.auth.boto3").Boto3CredentialProvider()
        }
    if os.environ.get("AWS_ACCESS_KEY_ID"):
        return {}
    hint = "Install it with: pip install boto3"
    raise refused(uri, "AWS_PROFILE needs boto3", Code.MISSING_DEPENDENCY, hint)


def _remote_file(name: str, meta: ObjectMeta) -> RemoteFile:
    tag = (meta["e_tag"] or "").replace('"', "")  # Azure lists it without quotes
    mtime_ns = int(meta["last_modified"].timestamp()) * 1_000_000_000
    return RemoteFile(name, meta["size"], mtime_ns, tag)
