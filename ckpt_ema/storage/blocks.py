"""Small remote reads: a cache of blocks, which fetches the like blocks of all steps together."""

import re
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterable
from concurrent.futures import wait

from ckpt_ema.storage.client import Client, RemoteFile
from ckpt_ema.storage.protocol import SMALL_REQUESTS
from ckpt_ema.storage.waiting import requesting

BLOCK_BYTES = 1 << 18  # a header, an index, the directory of an archive
_MOST_BYTES = 1 << 27  # in the cache
_MOST_ALIKE = _MOST_BYTES // BLOCK_BYTES
_PATIENCE = 3  # sequential requests for like blocks, before the rest are fetched at once
_NUMBER = re.compile(r"\d+")

_Alike = tuple[str, str, bool]  # a URI, a name with # for numbers, whether it is block 0


class Blocks:
    """A cache of blocks of files below URIs, for many threads."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._blocks: OrderedDict[tuple[str, str, int], bytes] = OrderedDict()
        self._alone: Counter[_Alike] = Counter()
        self._fetching = self._held_bytes = 0
        self._lock = threading.Lock()

    def read(
        self, root: str, file: RemoteFile, start: int, count: int, files: Iterable[RemoteFile]
    ) -> bytes:
        """Return a range of one of the `files` below a URI; raises what `Client.read` raises.

        What is read of one step is soon read of the others. So after a few sequential requests,
        the first or last block is fetched of every file whose name differs only in its numbers.
        """
        numbers = range(start // BLOCK_BYTES, -(-(start + count) // BLOCK_BYTES))
        held = []
        for number in numbers:
            held.append(self._block(root, file, number))
            self._fetch_alike(root, file, number, files)
        begin = start - numbers.start * BLOCK_BYTES
        return b"".join(held)[begin : begin + count]

    def _block(self, root: str, file: RemoteFile, number: int) -> bytes:
        key = (root, file.name, number)
        with self._lock:
            if key in self._blocks:
                return self._blocks[key]
            if not self._fetching:
                self._alone[_alike(root, file, number)] += 1
            self._fetching += 1
        start = number * BLOCK_BYTES
        try:
            count = min(BLOCK_BYTES, file.size_bytes - start)
            content = self._client.read(root, file, start, count)
        finally:
            with self._lock:
                self._fetching -= 1
        with self._lock:
            self._held_bytes += len(content) - len(self._blocks.get(key, b""))
            self._blocks[key] = content
            while self._held_bytes > _MOST_BYTES:
                self._held_bytes -= len(self._blocks.popitem(last=False)[1])
        return content

    def _fetch_alike(
        self, root: str, file: RemoteFile, number: int, files: Iterable[RemoteFile]
    ) -> None:
        alike = _alike(root, file, number)
        if self._alone[alike] != _PATIENCE:
            return
        self._alone[alike] += 1  # never again
        found = [
            (one, at)
            for one in files
            for at in {0, _last(one)}
            if one.size_bytes and _alike(root, one, at) == alike
        ]
        with requesting(SMALL_REQUESTS) as pool:
            wait([pool.submit(self._block, root, *one) for one in found[:_MOST_ALIKE]])


def _last(file: RemoteFile) -> int:
    """Return the number of a file's last block."""
    return max(0, file.size_bytes - 1) // BLOCK_BYTES


def _alike(root: str, file: RemoteFile, number: int) -> _Alike:
    return root, _NUMBER.sub("#", file.name), number == 0
