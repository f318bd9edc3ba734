"""Reading ahead: what is not in the page cache is asked for before it is wanted, and nothing else.

A fake of the two system calls stands for the cache, so that no test depends on what is in it.
"""

import errno
import os
from pathlib import Path

import pytest

from ckpt_ema.errors import Code, FailedError
from ckpt_ema.storage import local_pool as module
from ckpt_ema.storage.local_pool import LocalPool
from ckpt_ema.storage.protocol import Identity

SIZE = 40_000_000
BLOCK = 1_000_000


class Cache:
    """A page cache that holds nothing but what was asked for, or all (`warm`)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, warm: bool = False) -> None:
        self.asked: list[range] = []
        self.misses = 0
        self.warm = warm
        self.tells = True
        self._read = os.preadv
        monkeypatch.setattr(os, "preadv", self.preadv)
        monkeypatch.setattr(os, "posix_fadvise", self.advise)

    def preadv(self, fd: int, views: list[memoryview], offset: int, flags: int = 0) -> int:
        """Read, if it is in the cache or may wait."""
        held = self.warm or any(offset in asked for asked in self.asked)
        if flags & os.RWF_NOWAIT and not (held and self.tells):
            self.misses += 1
            number = errno.EAGAIN if self.tells else errno.EOPNOTSUPP
            raise OSError(number, os.strerror(number))
        return self._read(fd, views, offset)

    def advise(self, _: int, offset: int, size_bytes: int, advice: int) -> None:
        """Note what is asked for."""
        assert advice == os.POSIX_FADV_WILLNEED
        self.asked.append(range(offset, offset + size_bytes))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of which every block is another."""
    found = tmp_path_factory.mktemp("files") / "weights"
    found.write_bytes(b"".join(bytes([n]) * BLOCK for n in range(SIZE // BLOCK)))
    return found


def _pool(path: Path, read_in_turn: int = 1, *, reads_ahead: bool = True) -> LocalPool:
    status = path.stat()
    expected = {str(path): Identity(status.st_size, status.st_mtime_ns)}
    return LocalPool(expected, read_in_turn, reads_ahead)


def _read(pool: LocalPool, path: Path, number: int) -> None:
    buffer = bytearray(BLOCK)
    pool.read_into(str(path), memoryview(buffer), number * BLOCK)
    assert buffer == bytes([number]) * BLOCK


def test_a_cold_file_is_asked_for_once_in_order_some_way_ahead(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache(monkeypatch)
    pool = _pool(path)
    for number in range(SIZE // BLOCK):
        _read(pool, path, number)
        last = cache.asked[-1].stop
        assert 2 << 20 <= last - (number + 1) * BLOCK <= (4 << 20) + (1 << 19)
    pool.close()
    assert cache.misses == 1  # the first; all others were there when they were wanted
    starts = [asked.start for asked in cache.asked]
    assert starts == sorted(set(starts))
    assert max(len(asked) for asked in cache.asked) <= 1 << 19  # the kernel cuts what is larger
    assert all(b.start <= a.stop for a, b in zip(cache.asked, cache.asked[1:], strict=False))


def test_nothing_is_asked_for_where_all_is_in_the_cache(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache(monkeypatch, warm=True)
    pool = _pool(path)
    for number in range(SIZE // BLOCK):
        _read(pool, path, number)
    pool.close()
    assert cache.asked == []


def test_a_file_that_is_cold_in_the_middle_is_asked_for_from_there_until_it_is_warm_again(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "COLD_BYTES", 5 * BLOCK)
    cache = Cache(monkeypatch)
    pool = _pool(path)
    for number in range(SIZE // BLOCK):
        cache.warm = number != 10
        _read(pool, path, number)
    pool.close()
    assert cache.asked[0].start == 10 * BLOCK
    assert cache.asked[-1].stop > 11 * BLOCK + (4 << 20) + (1 << 19)  # not only the once
    assert cache.asked[-1].stop <= 15 * BLOCK + (4 << 20) + (1 << 19)


def test_a_file_system_that_cannot_tell_is_asked_throughout(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache(monkeypatch)
    cache.tells = False
    pool = _pool(path)
    for number in range(SIZE // BLOCK):
        _read(pool, path, number)
    pool.close()
    assert cache.asked[-1].stop >= SIZE
    assert cache.misses == 1  # having refused once, it is not tried again


def test_another_pass_over_a_file_asks_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(monkeypatch)
    pool = _pool(path)
    for number in (30, 31, 2, 3):
        _read(pool, path, number)
    pool.close()
    assert any(2 * BLOCK in asked for asked in cache.asked)


def test_many_files_that_are_read_in_turn_share_what_is_asked_for(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache(monkeypatch)
    pool = _pool(path, read_in_turn=1024)
    _read(pool, path, 0)
    pool.close()
    assert cache.asked[-1].stop <= BLOCK + (1 << 28) // 1024 + (1 << 19)


def test_what_the_cache_holds_of_a_block_is_not_read_again(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[tuple[int, int]] = []
    read = os.preadv

    def half(fd: int, views: list[memoryview], offset: int, flags: int = 0) -> int:
        wanted = len(views[0]) // (2 if flags & os.RWF_NOWAIT else 1)
        reads.append((offset, wanted))
        return read(fd, [views[0][:wanted]], offset)

    monkeypatch.setattr(os, "preadv", half)
    pool = _pool(path)
    _read(pool, path, 3)
    pool.close()
    assert reads == [(3 * BLOCK, BLOCK // 2), (3 * BLOCK + BLOCK // 2, BLOCK // 2)]


def test_a_file_that_ends_too_soon_is_named_though_it_was_asked_for(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Cache(monkeypatch)
    pool = _pool(path)
    with pytest.raises(FailedError) as caught:
        pool.read_into(str(path), memoryview(bytearray(BLOCK)), SIZE - BLOCK // 2)
    assert (caught.value.code, caught.value.path) == (Code.CHANGED, str(path))
    pool.close()


def test_a_system_that_cannot_ask_reads_all_the_same(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache(monkeypatch)
    pool = _pool(path, reads_ahead=False)
    _read(pool, path, 7)
    pool.close()
    assert (cache.asked, cache.misses) == ([], 0)
