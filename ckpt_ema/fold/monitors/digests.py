"""Computes the CRC-32 of each model file while it is written, from memory that is still warm."""

import threading
import zlib
from typing import Any

from ckpt_ema.containers.specs import DTYPE_BITS
from ckpt_ema.fold.crc32 import Piece, Pieces
from ckpt_ema.fold.monitors.protocol import Monitor, Watched
from ckpt_ema.fold.tiles import Tile
from ckpt_ema.fold.views import Seen, TileView

_CHUNK_BYTES = 1 << 18


class Digests(Monitor):
    """A `Monitor` of what is written to the model files, by their numbers."""

    name = "crc32"
    sees_copies = True
    merges_twice = False

    def __init__(self, _watched: Watched) -> None:
        self._pieces: dict[int, Pieces] = {}
        self._lock = threading.Lock()

    def look(self, view: TileView, _seen: Seen) -> None:
        """See `Monitor.look`; reads what was just written."""
        tile = view.tile
        for place in tile.span.places:
            if place.average < len(view.plan.averages):  # states have a checksum of their own
                width = DTYPE_BITS[place.dtype] // 8
                start, size_bytes = place.offset + tile.start * width, tile.length * width
                crc, buffer = 0, memoryview(bytearray(min(size_bytes, _CHUNK_BYTES)))
                for done in range(0, size_bytes, _CHUNK_BYTES):
                    part = buffer[: size_bytes - done]
                    view.sink.read_into(place.file, part, start + done)
                    crc = zlib.crc32(part, crc)
                self._add(place.file, Piece(start, start + size_bytes, crc))

    def see_kept(self, tile: Tile, data: memoryview) -> None:
        """See `Monitor.see_kept`."""
        crc = zlib.crc32(data)
        for place in tile.span.places:
            start = place.offset + tile.start
            self._add(place.file, Piece(start, start + tile.length, crc))

    def _add(self, file: int, piece: Piece) -> None:
        with self._lock:
            self._pieces.setdefault(file, Pieces()).add(piece)

    def state(self) -> dict[str, list[Piece]]:
        """Return the pieces of each file."""
        with self._lock:
            return {str(file): pieces.all() for file, pieces in self._pieces.items()}

    def merge(self, state: Any) -> None:
        """See `Monitor.merge`."""
        for file, pieces in state.items():
            for piece in pieces:
                self._add(int(file), Piece(*piece))
