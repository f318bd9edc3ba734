"""Folding by torch: on an accelerator, and on the host where there is no compiled module.

The arithmetic of a tile on one device; `torch_tiles` reads and writes.
"""

import ctypes
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import torch

from ckpt_ema.fold.shadow import fold_, fold_keeping_infinities_, fold_rows_, widest_float
from ckpt_ema.fold.tile_fold import Use


class Staging:
    """Host memory to read files into, viewed as tensors of any dtype."""

    def __init__(self, size_bytes: int, pinned: bool = False) -> None:
        memory = torch.empty(size_bytes, dtype=torch.uint8)
        self.memory = memory.pin_memory() if pinned else memory
        # torch tensors offer no writable buffer of their own without numpy.
        raw = (ctypes.c_ubyte * size_bytes).from_address(self.memory.data_ptr())
        self.bytes = memoryview(raw).cast("B")
        self._view = (torch.uint8, -1, self.memory)  # the last one, which is usually the next

    def values(self, dtype: torch.dtype, count: int) -> torch.Tensor:
        """Return the first `count` elements, as `dtype`."""
        if self._view[:2] != (dtype, count):
            self._view = (dtype, count, self.memory[: count * dtype.itemsize].view(dtype))
        return self._view[2]


# Reads a tile's elements of checkpoint number `index` into the staging buffer: shape (count,).
ReadValues = Callable[[int, Staging], torch.Tensor]


Uses = Sequence[Sequence[Use]]  # for each checkpoint, in the order in which they are read


class _Rows(NamedTuple):
    """Neighbouring shadows into which a checkpoint is folded in the same way."""

    averages: slice
    decays: list[float | None]  # all None where the checkpoint is the first one
    weights: torch.Tensor  # for `fold_rows_`
    above_half: bool


class _Shadows:
    """The shadows of a tile, one for each average, and how each checkpoint is folded in."""

    def __init__(self, uses: Uses, capacity: int, wide: torch.dtype, device: torch.device) -> None:
        self._capacity = capacity
        self.tiles = torch.empty(_averages(uses), capacity, dtype=wide, device=device)
        self._rows = [list(_rows(of_checkpoint)) for of_checkpoint in uses]
        # While short rows stay in the cache, a call costs more than its arithmetic.
        self._in_rows = device.type == "cpu" and wide == torch.float64
        # Nearly all tiles have full length.
        self._whole = [self._views(index, capacity) for index in range(len(uses))]

    def _views(self, index: int, count: int) -> list[torch.Tensor]:
        return [self.tiles[rows.averages, :count] for rows in self._rows[index]]

    def fold(self, value: torch.Tensor, index: int, *, keeping_infinities: bool) -> None:
        """Fold the values of checkpoint number `index`, of shape (count,), into its averages."""
        count = value.shape[0]
        whole = count == self._capacity
        views = self._whole[index] if whole else self._views(index, count)
        for shadows, (_, decays, weights, above_half) in zip(views, self._rows[index], strict=True):
            if decays[0] is None:
                shadows.copy_(value)
            elif self._in_rows and not keeping_infinities and 0.0 < decays[0] < 1.0:
                fold_rows_(shadows, value, weights, above_half=above_half)
            else:
                fold = fold_keeping_infinities_ if keeping_infinities else fold_
                for shadow, decay in zip(shadows, decays, strict=True):
                    fold(shadow, value, decay or 0.0)


def _rows(uses: Sequence[Use]) -> Iterator[_Rows]:
    """Yield the averages that take a checkpoint, grouped where neighbours are folded alike."""

    def kind(placed: tuple[int, Use]) -> tuple[int, bool, bool, bool]:
        place, (average, decay) = placed
        # Consecutive averages have the same difference of number and place.
        return average - place, decay is None, (decay or 0.0) > 0.5, decay in (0.0, 1.0)

    ordered = sorted(uses, key=lambda use: use.average)
    for (_, _, above_half, _), group in groupby(enumerate(ordered), kind):
        found = [use for _, use in group]
        decays = [use.decay for use in found]
        weights = [[(decay or 0.0) if above_half else 1.0 - (decay or 0.0)] for decay in decays]
        yield _Rows(
            slice(found[0].average, found[-1].average + 1),
            decays,
            torch.tensor(weights, dtype=torch.float64),
            above_half,
        )


class PlainFold:
    """Folds in order on one device: the CPU, or a device without streams; for one thread."""

    def __init__(
        self, uses: Uses, capacity: int, wide: torch.dtype, device: torch.device, widest_bytes: int
    ) -> None:
        self._checkpoints = len(uses)
        self._staging = Staging(capacity * widest_bytes)
        self._rounded = Staging(capacity * widest_bytes * _averages(uses))
        self._shadows = _Shadows(uses, capacity, wide, device)
        self._wide = torch.empty(capacity, dtype=wide, device=device)
        self._half = torch.empty(capacity, dtype=torch.float32, device=device)

    def fold(self, count: int, read: ReadValues, *, keeping_infinities: bool = False) -> None:
        """Read a tile from every checkpoint and fold it into the shadow of every average."""
        wide = self._wide[:count]
        for index in range(self._checkpoints):
            value = read(index, self._staging)
            if value.dtype != wide.dtype or value.device != wide.device:
                if value.dtype == torch.float16:
                    # float16 -> float64 is not vectorised: 4 times faster by way of float32.
                    value = self._half[:count].copy_(value)
                value = wide.copy_(value)
            self._shadows.fold(value, index, keeping_infinities=keeping_infinities)

    def rounded(self, averages: slice, count: int, dtype: torch.dtype) -> memoryview:
        """Return the bytes of some shadows, in order, rounded; valid until the next call."""
        shadows = self._shadows.tiles[averages, :count]
        self._rounded.values(dtype, shadows.numel()).view(shadows.shape).copy_(shadows)
        return self._rounded.bytes[: shadows.numel() * dtype.itemsize]


class StreamedFold:
    """Folds on an accelerator while the next checkpoint is read and copied.

    Of two buffers each, reading waits for the copy out of its staging buffer, copying for the fold
    out of its landing buffer, folding for the copy into it; nothing else waits.
    """

    def __init__(
        self, uses: Uses, capacity: int, wide: torch.dtype, device: torch.device, widest_bytes: int
    ) -> None:
        self._checkpoints = len(uses)
        self._module = module = torch.get_device_module(device)
        self._folding, self._copying = module.Stream(device=device), module.Stream(device=device)
        self._copied = [module.Event(), module.Event()]
        self._consumed = [module.Event(), module.Event()]
        self._staging = [Staging(capacity * widest_bytes, pinned=True) for _ in range(2)]
        result_bytes = capacity * widest_bytes * _averages(uses)
        self._result = Staging(result_bytes, pinned=True)
        with module.stream(self._folding):
            self._landed = [
                torch.empty(capacity * widest_bytes, dtype=torch.uint8, device=device)
                for _ in range(2)
            ]
            self._shadows = _Shadows(uses, capacity, wide, device)
            self._wide = torch.empty(capacity, dtype=wide, device=device)
            self._rounded = torch.empty(result_bytes, dtype=torch.uint8, device=device)
            module.current_stream(device).synchronize()

    def fold(self, count: int, read: ReadValues, *, keeping_infinities: bool = False) -> None:
        """See `PlainFold.fold`."""
        try:
            with self._module.stream(self._folding):
                wide = self._wide[:count]
                for index in range(self._checkpoints):
                    slot = index % 2
                    landed = self._land(slot, read, index)
                    self._copied[slot].wait()
                    wide.copy_(landed)
                    self._consumed[slot].record()
                    self._shadows.fold(wide, index, keeping_infinities=keeping_infinities)
        except BaseException:
            self._copying.synchronize()  # or it would write to memory that is in other use by now
            raise

    def rounded(self, averages: slice, count: int, dtype: torch.dtype) -> memoryview:
        """See `PlainFold.rounded`."""
        shadows = self._shadows.tiles[averages, :count]
        size_bytes = shadows.numel() * dtype.itemsize
        with self._module.stream(self._folding):
            rounded = self._rounded[:size_bytes].view(dtype)
            rounded.view(shadows.shape).copy_(shadows)
            self._result.values(dtype, shadows.numel()).copy_(rounded, non_blocking=True)
            self._folding.synchronize()
        return self._result.bytes[:size_bytes]

    def _land(self, slot: int, read: ReadValues, index: int) -> torch.Tensor:
        """Read a checkpoint's values and start their copy to the device."""
        self._copied[slot].synchronize()
        value = read(index, self._staging[slot])
        landed = self._landed[slot][: value.nbytes].view(value.dtype)
        with self._module.stream(self._copying):
            self._consumed[slot].wait()
            landed.copy_(value, non_blocking=True)
            self._copied[slot].record()
        return landed


def device_element_bytes(averages: int, wide: torch.dtype, widest_bytes: int) -> int:
    """Return the bytes of device memory for each element that is folded at a time."""
    # Two landing buffers, the widened values, each shadow and its rounded form; to keep infinities,
    # one more shadow and masks.
    shadow = wide.itemsize
    return 2 * widest_bytes + shadow + (shadow + widest_bytes) * averages + (shadow + 4)


def _averages(uses: Uses) -> int:
    return 1 + max(use.average for of_checkpoint in uses for use in of_checkpoint)


DeviceFold = PlainFold | StreamedFold


def make_fold(
    uses: Uses, capacity: int, wide: torch.dtype, device: torch.device, widest_bytes: int
) -> DeviceFold:
    """Make the fold for a device; `widest_bytes` is of the widest element read or written."""
    streamed = (
        device.type != "cpu"
        and hasattr(torch.get_device_module(device), "Stream")
        # A device without float64 cannot hold such values: the plain fold narrows them on the host.
        and widest_bytes <= widest_float(device).itemsize
    )
    return (StreamedFold if streamed else PlainFold)(uses, capacity, wide, device, widest_bytes)
