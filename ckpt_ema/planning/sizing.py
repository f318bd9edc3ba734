"""Tile size and threads of the fold, within a limit of memory."""

import os

from ckpt_ema.containers.specs import MOST_READ_PER_WANTED
from ckpt_ema.errors import Code, OptionError
from ckpt_ema.options import Engine
from ckpt_ema.planning.work import Work

# Smaller, calls cost more than arithmetic; larger, tiles outgrow the cache (see dev/LOG.md).
_LEAST_TILE, _MOST_TILE = 1 << 14, 1 << 18
KEPT_BYTES = 8  # of a kept tensor for each element of a tile: whole elements of any dtype
_FEWEST_ELEMENTS = 1 << 10  # a limit that leaves no room for so many is refused
_THREADS_TO_FIT = 4
_PREFETCHED_BYTES = 1 << 27  # of a remote run, fetched before a thread folds them
_TILES_PREFETCHED = 4


def make_sizes(engine: Engine, work: Work, averages: int, *, is_remote: bool) -> tuple[int, int]:
    """Return how many elements a thread folds at a time, and how many threads there are.

    Unless asked for, tiles suit the cache of a core or the requests to a remote storage. Both may
    be reduced by --max-memory.
    """
    threads = engine.threads or default_threads()
    if engine.tile_size is None:
        # The shadows, and what is folded into them, stay in a core's cache.
        tile_elements = max(_LEAST_TILE, min(_MOST_TILE, 2 * _MOST_TILE // averages))
        if is_remote:
            tile_elements = min(tile_elements, fetched_elements(engine, work))
    else:
        tile_elements = max(1, engine.tile_size // work.widest_bytes)
    if engine.max_memory is None:
        return tile_elements, threads
    each = element_bytes(engine, work, averages)
    room = engine.max_memory // (2 if is_remote else 1) // each  # half is for prefetched bytes
    if room < _FEWEST_ELEMENTS:
        least = f"the fold needs at least {_FEWEST_ELEMENTS * each // 1024}KiB"
        message = f"--max-memory is {engine.max_memory} bytes; {least}."
        raise OptionError(message, code=Code.INVALID_OPTION)
    # Independent of the cores here, so that parts made on other machines have the same tiles.
    tile_elements = min(tile_elements, room, max(_LEAST_TILE, room // _THREADS_TO_FIT))
    return tile_elements, min(threads, room // tile_elements)


def default_threads() -> int:
    """Return how many cores this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux alone has it
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def prefetched_bytes(engine: Engine) -> int:
    """Return how many bytes of a remote run are fetched ahead of the fold."""
    return min(_PREFETCHED_BYTES, (engine.max_memory or 4 * _PREFETCHED_BYTES) // 4)


def fetched_elements(engine: Engine, work: Work) -> int:
    """Return how many elements of each checkpoint of a remote run are fetched at a time."""
    spans = (span for span in work.spans if span.averaged)
    each = max((span.bytes_read(work.layout_of, 1) for span in spans), default=1)
    return max(_LEAST_TILE, prefetched_bytes(engine) // _TILES_PREFETCHED // each)


def element_bytes(engine: Engine, work: Work, averages: int) -> int:
    """Return the bytes that a thread allocates for each element that it folds at a time."""
    widest, wide = work.widest_bytes, 4 if engine.accumulate == "float32" else 8
    gathered = KEPT_BYTES * MOST_READ_PER_WANTED if any(s.in_pieces for s in work.spans) else 0
    halves = 4 if "F16" in work.dtypes() else 0  # on their way to float64
    # Elements read, then widened; each shadow, and its rounded form; one shadow and masks for
    # infinities that stay.
    folded = gathered + widest + halves + wide + (wide + widest) * averages + (wide + 4)
    return KEPT_BYTES + folded
