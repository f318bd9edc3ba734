"""Folding one tile, on the host or on an accelerator; which tile, and where it goes, is `engine`'s.

A tile is folded oldest checkpoint first: its elements are read into a staging buffer, brought to
the device, widened, folded into the shadow of every average that takes the checkpoint, and each
shadow is rounded once at the end. What happens to one shadow does not depend on the others.
"""

import ctypes
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from ckpt_ema.folding.shadow import fold_, widest_float

Fold = Callable[[torch.Tensor, torch.Tensor, float], None]


class Staging:
    """Host memory that files are read into, and that tensors of any dtype are views of."""

    def __init__(self, size_bytes: int, pinned: bool = False) -> None:
        memory = torch.empty(size_bytes, dtype=torch.uint8)
        self.memory = memory.pin_memory() if pinned else memory
        # torch tensors offer no writable buffer of their own without numpy.
        raw = (ctypes.c_ubyte * size_bytes).from_address(self.memory.data_ptr())
        self.bytes = memoryview(raw).cast("B")

    def values(self, dtype: torch.dtype, count: int) -> torch.Tensor:
        """The first `count` elements, as `dtype`."""
        return self.memory[: count * dtype.itemsize].view(dtype)


# Reads a tile's elements of checkpoint number `index` into the staging buffer: shape (count,).
ReadValues = Callable[[int, Staging], torch.Tensor]


class Use(NamedTuple):
    """What one checkpoint is to one of the averages that are made together."""

    average: int
    decay: float | None  # None: it is the first one, which initialises the shadow


Uses = Sequence[Sequence[Use]]  # for each checkpoint, in the order in which they are read


class TileFold(Protocol):
    """Folds tiles of up to a fixed number of elements with memory of its own; for one thread."""

    def fold(self, count: int, read: ReadValues, fold: Fold = fold_) -> None:
        """Read a tile from every checkpoint and fold it into the shadow of every average."""

    def rounded(self, average: int, count: int, dtype: torch.dtype) -> memoryview:
        """The bytes of one shadow rounded to `dtype`, valid until the next call."""


class PlainFold:
    """Folds with everything in one order on one device: the CPU, or a device without streams."""

    def __init__(self, uses: Uses, capacity: int, wide: torch.dtype, device: torch.device) -> None:
        self._uses = uses
        self._staging = Staging(capacity * 8)
        self._rounded = Staging(capacity * 8)
        self._shadows = _empty_shadows(uses, capacity, wide, device)
        self._wide = torch.empty(capacity, dtype=wide, device=device)
        self._half = torch.empty(capacity, dtype=torch.float32, device=device)

    def fold(self, count: int, read: ReadValues, fold: Fold = fold_) -> None:
        """See `TileFold.fold`."""
        for index, uses in enumerate(self._uses):
            value = self._widened(read(index, self._staging))
            for average, decay in uses:
                shadow = self._shadows[average][:count]
                if decay is None:
                    shadow.copy_(value)
                else:
                    fold(shadow, value, decay)

    def rounded(self, average: int, count: int, dtype: torch.dtype) -> memoryview:
        """See `TileFold.rounded`."""
        self._rounded.values(dtype, count).copy_(self._shadows[average][:count])
        return self._rounded.bytes[: count * dtype.itemsize]

    def _widened(self, value: torch.Tensor) -> torch.Tensor:
        if value.dtype == self._wide.dtype and value.device == self._wide.device:
            return value
        count = len(value)
        if value.dtype == torch.float16:
            # On the CPU float16 -> float64 is not vectorised: 4 times faster by way of float32.
            value = self._half[:count].copy_(value)
        return self._wide[:count].copy_(value)


class StreamedFold:
    """Folds on an accelerator while the next checkpoint is read and copied.

    Two pinned staging buffers and two landing buffers take turns. Reading waits until the copy out
    of its staging buffer is done, copying until the fold out of its landing buffer is done, folding
    until the copy into its landing buffer is done; nothing else waits.
    """

    def __init__(self, uses: Uses, capacity: int, wide: torch.dtype, device: torch.device) -> None:
        module: Any = torch.get_device_module(device)
        self._uses = uses
        self._module = module
        self._folding, self._copying = module.Stream(device=device), module.Stream(device=device)
        self._copied = [module.Event(), module.Event()]
        self._consumed = [module.Event(), module.Event()]
        self._staging = [Staging(capacity * 8, pinned=True) for _ in range(2)]
        self._result = Staging(capacity * 8, pinned=True)
        with module.stream(self._folding):
            self._landed = [
                torch.empty(capacity * 8, dtype=torch.uint8, device=device) for _ in range(2)
            ]
            self._shadows = _empty_shadows(uses, capacity, wide, device)
            self._wide = torch.empty(capacity, dtype=wide, device=device)
            self._rounded = torch.empty(capacity * 8, dtype=torch.uint8, device=device)
            module.current_stream(device).synchronize()

    def fold(self, count: int, read: ReadValues, fold: Fold = fold_) -> None:
        """See `TileFold.fold`."""
        with self._module.stream(self._folding):
            wide = self._wide[:count]
            for index, uses in enumerate(self._uses):
                slot = index % 2
                landed = self._land(slot, read, index)
                self._copied[slot].wait()
                wide.copy_(landed)
                self._consumed[slot].record()
                for average, decay in uses:
                    shadow = self._shadows[average][:count]
                    if decay is None:
                        shadow.copy_(wide)
                    else:
                        fold(shadow, wide, decay)

    def rounded(self, average: int, count: int, dtype: torch.dtype) -> memoryview:
        """See `TileFold.rounded`."""
        size_bytes = count * dtype.itemsize
        with self._module.stream(self._folding):
            rounded = self._rounded[:size_bytes].view(dtype)
            rounded.copy_(self._shadows[average][:count])
            self._result.values(dtype, count).copy_(rounded, non_blocking=True)
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


def _empty_shadows(
    uses: Uses, capacity: int, wide: torch.dtype, device: torch.device
) -> list[torch.Tensor]:
    averages = {use.average for of_checkpoint in uses for use in of_checkpoint}
    return [torch.empty(capacity, dtype=wide, device=device) for _ in averages]


def make_fold(
    uses: Uses,
    capacity: int,
    wide: torch.dtype,
    device: torch.device,
    holds_float64: bool,
) -> TileFold:
    """The fold for a device, streamed where it has streams.

    A device without float64 cannot hold float64 values as they are (`holds_float64`: there are
    some): those are narrowed on the host, which the plain fold does.
    """
    streamed = device.type != "cpu" and hasattr(torch.get_device_module(device), "Stream")
    if holds_float64 and widest_float(device) != torch.float64:
        streamed = False
    return (StreamedFold if streamed else PlainFold)(uses, capacity, wide, device)
