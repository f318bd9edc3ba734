"""What a place that is reached over a network has to offer: what is below a path, and its bytes."""

from typing import NamedTuple, Protocol


class RemoteFile(NamedTuple):
    """One file as it was listed."""

    name: str  # relative to the path that was listed; empty if that is the file
    size_bytes: int
    mtime_ns: int  # 0 where the place does not say
    tag: str  # tells the content from any other at this name: an ETag, a digest


class Client(Protocol):
    """Requests to one kind of place; many threads call it.

    Paths are URIs without a slash at the end. A request that may succeed later is repeated here,
    and nowhere else. Messages have the URI and one line of the reason; never a header, a query or
    a token.
    """

    def files(self, path: str) -> list[RemoteFile]:
        """Return the file at `path`, or all files below it; none if there is nothing.

        Raises `RefusedError` where access is denied, the place does not exist, or something has to
        be installed or set.
        """

    def read(self, path: str, file: RemoteFile, start: int, count: int) -> bytes:
        """Return exactly `count` bytes of a file that `files(path)` returned, from `start`.

        Raises `FailedError` with the code `CHANGED` if the file is another one by now, and with
        `READ_FAILED` for what repeated requests did not give.
        """
