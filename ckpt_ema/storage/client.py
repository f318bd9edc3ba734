"""The protocol of a client: it lists the files below a URI and reads ranges of them."""

from typing import NamedTuple, Protocol

# How every client retries.
MOST_ATTEMPTS = 6
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.2, 5.0  # between them; each is twice the last
STALL_SECONDS = 20.0  # without a byte, after which an attempt has failed


class RemoteFile(NamedTuple):
    """One file as it was listed."""

    name: str  # relative to the path that was listed; empty if that is the file
    size_bytes: int
    mtime_ns: int  # 0 where the service does not report it
    tag: str  # identifies the content: an ETag, a digest


class Client(Protocol):
    """Requests to the services of one or several schemes, from many threads.

    Paths are URIs without a trailing slash. Clients retry requests; nothing else does. Messages
    give the URI and the reason in one line, and never a header, a query string or a token.
    """

    def files(self, path: str) -> list[RemoteFile]:
        """Return the file at `path`, or all files below it; none if there is nothing.

        Raises `RefusedError` if access is denied, the bucket or repository does not exist, or
        something has to be installed or configured.
        """

    def read(self, path: str, file: RemoteFile, start: int, count: int) -> bytes:
        """Return exactly `count` bytes of a file that `files(path)` returned, from `start`.

        Raises `FailedError`: with the code `CHANGED` if the file was replaced or removed, with
        `READ_FAILED` if all attempts failed.
        """
