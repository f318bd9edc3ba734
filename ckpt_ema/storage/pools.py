"""Files of several storages as one pool, such as a run far away and an output on a disk."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager

from ckpt_ema.errors import FailedError
from ckpt_ema.storage.local import Local
from ckpt_ema.storage.protocol import FilePool, Identity, Range, Storage
from ckpt_ema.storage.uri import scheme_of


def pool_of(storage: Storage, expected: Mapping[str, Identity], read_in_turn: int) -> FilePool:
    """Return a pool of files in a storage, or on a disk beside a remote one; see `Storage.pool`."""
    if not storage.is_remote:
        return storage.pool(expected, read_in_turn)
    files_of: dict[str, dict[str, Identity]] = {}
    for path, identity in expected.items():
        files_of.setdefault(scheme_of(path), {})[path] = identity
    pools = {
        scheme: (storage if scheme else Local()).pool(files, read_in_turn)
        for scheme, files in files_of.items()
    }
    return next(iter(pools.values())) if len(pools) == 1 else Pools(pools)


class Pools:
    """A `FilePool` of one pool for each storage."""

    def __init__(self, pools: Mapping[str, FilePool]) -> None:
        """`pools` are by the scheme of their paths."""
        self._pools = pools

    def _of(self, path: str) -> FilePool:
        return self._pools[scheme_of(path)]

    def _split(self, ranges: Iterable[Range]) -> dict[str, list[Range]]:
        of_pools: dict[str, list[Range]] = {scheme: [] for scheme in self._pools}
        for one in ranges:
            of_pools[scheme_of(one.path)].append(one)
        return of_pools

    @property
    def ahead_bytes(self) -> int:
        """See `FilePool.ahead_bytes`."""
        return max(pool.ahead_bytes for pool in self._pools.values())

    @property
    def most_open(self) -> int:
        """See `FilePool.most_open`."""
        return min(pool.most_open for pool in self._pools.values())

    def read_into(self, path: str, view: memoryview, offset: int) -> None:
        """See `FilePool.read_into`."""
        self._of(path).read_into(path, view, offset)

    @contextmanager
    def descriptors(self, paths: Iterable[str]) -> Iterator[list[int]]:
        """See `FilePool.descriptors`."""
        with ExitStack() as stack:
            opened = (stack.enter_context(self._of(path).descriptors([path])) for path in paths)
            yield [fd for fds in opened for fd in fds]

    def failure(self, path: str, code: int, offset: int) -> FailedError:
        """See `FilePool.failure`."""
        return self._of(path).failure(path, code, offset)

    def request(self, ranges: Iterable[Range]) -> None:
        """See `FilePool.request`."""
        for scheme, own in self._split(ranges).items():
            self._pools[scheme].request(own)

    def held(self, ranges: Iterable[Range]) -> AbstractContextManager[None]:
        """See `FilePool.held`."""
        return self._held(self._split(ranges))

    @contextmanager
    def _held(self, of_pools: Mapping[str, list[Range]]) -> Iterator[None]:
        with ExitStack() as stack:
            for scheme, own in of_pools.items():
                stack.enter_context(self._pools[scheme].held(own))
            yield

    def verify(self) -> None:
        """See `FilePool.verify`."""
        for pool in self._pools.values():
            pool.verify()

    def cancel(self) -> None:
        """See `FilePool.cancel`."""
        for pool in self._pools.values():
            pool.cancel()

    def close(self) -> None:
        """See `FilePool.close`."""
        for pool in self._pools.values():
            pool.close()
