"""Tiles folded by torch: read into host memory, screened, folded on a device, written."""

from collections.abc import Mapping, Sequence, Set
from itertools import groupby

import torch

from ckpt_ema.containers.reader import Reader
from ckpt_ema.containers.specs import FOLDED
from ckpt_ema.fold.devices import accumulator, elements_at_a_time
from ckpt_ema.fold.passing import StoppedError
from ckpt_ema.fold.screen import Screen
from ckpt_ema.fold.shadow import is_finite
from ckpt_ema.fold.tile_fold import Folded, uses
from ckpt_ema.fold.tiles import Tile, TileSegments
from ckpt_ema.fold.torch_fold import Staging, make_fold
from ckpt_ema.fold.views import Sink
from ckpt_ema.planning.plan import Plan

_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, FOLDED[name]) for name in FOLDED}


class TorchTiles:
    """A `TileFold` by torch, for one thread; what torch raises is not caught."""

    def __init__(
        self, plan: Plan, reader: Reader, sink: Sink, stop: bytearray, device_name: str
    ) -> None:
        """Fold on a device; a tile ends soon after `stop[0]` is set."""
        # There is one thread per core already; without this each would start a team of its own.
        torch.set_num_threads(1)
        device = torch.device(device_name)
        self._plan, self._reader, self._sink, self._stop = plan, reader, sink, stop
        self._elements = elements_at_a_time(plan, device)
        wide, widest_bytes = accumulator(plan, device), plan.work.widest_bytes
        self._fold = make_fold(uses(plan), self._elements, wide, device, widest_bytes)
        self._again = Staging(0)  # for a checkpoint that is read once more

    def most_elements(self, _tile: Tile) -> int:
        """See `TileFold.most_elements`."""
        return self._elements

    def fold(self, tile: Tile, segments: TileSegments, *, hashes: bool) -> Folded:
        """See `TileFold.fold`."""
        screen = Screen(self._plan, segments, tile.length, hashes=hashes)

        def read_and_screen(index: int, staging: Staging) -> torch.Tensor:
            values = self._read(tile, index, staging)
            screen.see(index, staging.bytes[: values.nbytes], values)
            return values

        self._fold.fold(tile.length, read_and_screen)
        rest = self._hand_on(tile, screen, {*tile.span.dtypes.values()}, None)
        problems: dict[int, int] = {}
        if rest:
            self._fold.fold(
                tile.length,
                lambda index, staging: self._read(tile, index, staging),
                keeping_infinities=True,
            )
            self._hand_on(tile, screen, rest, problems)
        return Folded(screen.seen(), problems)

    def _read(self, tile: Tile, index: int, staging: Staging) -> torch.Tensor:
        """Return the values of a tile in one checkpoint: shape (count,)."""
        if self._stop[0]:  # a tile of a thousand checkpoints takes its time
            raise StoppedError
        source = tile.span.sources[self._plan.work.layout_of[index]]
        dtype = _DTYPES[source.dtype]
        content = staging.bytes[: tile.length * dtype.itemsize]
        self._reader.read_into(index, source, tile.start * dtype.itemsize, content)
        return staging.values(dtype, tile.length)

    def _hand_on(
        self,
        tile: Tile,
        screen: Screen,
        wanted: Set[str],
        problems: dict[int, int] | None,
    ) -> set[str]:
        """Write the averages of a tile in the wanted dtypes; return those that are not finite.

        These are written only if there is a dict for their problems.
        """
        dtypes = tile.span.dtypes
        nonfinite = set()
        for name, same in groupby(sorted(dtypes), dtypes.__getitem__):
            if name not in wanted:
                continue
            dtype, numbers = _DTYPES[name], list(same)
            data = self._fold.rounded(slice(numbers[0], numbers[-1] + 1), tile.length, dtype)
            rounded = torch.frombuffer(data, dtype=dtype)
            rows = dict(zip(numbers, rounded.view(len(numbers), tile.length), strict=True))
            if not is_finite(rounded):
                nonfinite.add(name)
                if problems is None:
                    continue
                rounded[rounded.isnan()] = torch.nan  # one NaN, whatever machine made it
                self._find_problems(tile, rows, problems)
            for average, row in rows.items():
                screen.see_average(average, row)
            self._write(tile, numbers, data, dtype.itemsize)
        return nonfinite

    def _write(self, tile: Tile, averages: Sequence[int], data: memoryview, width: int) -> None:
        size_bytes = tile.length * width
        for place in tile.span.places:
            if place.average in averages:
                begin = averages.index(place.average) * size_bytes
                offset = place.offset + tile.start * width
                self._sink.write(place.file, data[begin : begin + size_bytes], offset)

    def _find_problems(
        self, tile: Tile, rows: Mapping[int, torch.Tensor], problems: dict[int, int]
    ) -> None:
        """Note the first element of each average that is not an infinity of every checkpoint."""
        size_bytes = tile.length * self._plan.work.widest_bytes
        if len(self._again.bytes) < size_bytes:
            self._again = Staging(size_bytes)
        for average, values in rows.items():
            unchanged = values.isinf()
            if not is_finite(values):
                for checkpoint in self._plan.foldings[average].reads:
                    unchanged &= self._read(tile, checkpoint, self._again) == values
            problem = ~values.isfinite() & ~unchanged
            if bool(problem.any()):
                problems[average] = int(problem.int().argmax())
