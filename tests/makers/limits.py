"""How much a test lets the code under it take."""

import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def cheap(most_bytes: int, most_seconds: float = 2) -> Iterator[None]:
    """Fail unless the block takes little memory and little time of the processor."""
    tracemalloc.start()
    start = time.process_time()
    try:
        yield
        seconds = time.process_time() - start
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert seconds < most_seconds
    assert peak_bytes < most_bytes
