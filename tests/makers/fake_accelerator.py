"""A fake accelerator on which work is done as late as the rules of streams allow; for tests alone.

It is a device "npu" of torch, registered through torch's experimental backends in Python. Its
tensors hide CPU tensors, and every operator runs on those. As on a GPU, kernels and copies between
the device and pinned memory are only queued on the current stream. Unlike on a GPU they are carried
out when somebody waits for them and no sooner, one stream no further than the events waited for
demand, and fresh memory holds NaN: a missing wait, a buffer used again too soon, or a read of what
was never written gives wrong numbers every time, not once a month.

What it does not do: gradients, several devices, speed. It is longer than a module should be, since
streams, memory and operators are one device: none of the three can be told late from early alone.

Registration cannot be undone, so `install` is called by the first test that needs the device, and
`FAKE.available` is True in such tests only: all others see a torch without an accelerator.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree

NAME = "npu"  # safetensors' own parser knows this name of a device

Work = Callable[[], object]
Operator = Any  # torch._ops.OpOverload

# One lock for all queues and counts; re-entrant, as work that is carried out may wait for other
# work, and as a tensor may be collected, and counted, at any point of it.
_lock = threading.RLock()
_registrations: list[torch.library.Library] = []
_pinned_addresses: set[int] = set()


@dataclass
class Record:
    """What happened on the device since the last reset."""

    bytes_to_device: int = 0
    pageable_bytes_to_device: int = 0
    bytes_to_host: int = 0
    live_bytes: int = 0
    peak_bytes: int = 0
    log: list[tuple[str, str]] = field(default_factory=list)  # ("queued" or "done", what), in order


class FakeStream:
    """A queue of work, carried out in order and only when it is waited for."""

    def __init__(self, **_: object) -> None:
        self._queue: deque[Work] = deque()
        self.has_copied_to_device = False
        with _lock:
            FAKE.streams.append(self)

    def queue(self, what: str, work: Work) -> None:
        """Put `work` at the end; the log says when it was queued and when it was done."""

        def do() -> None:
            work()
            FAKE.record.log.append(("done", what))

        with _lock:
            FAKE.record.log.append(("queued", what))
            self._queue.append(do)

    def queue_silently(self, work: Work) -> None:
        """Put a step that is no work of the device at the end, as an event is."""
        with _lock:
            self._queue.append(work)

    def forget(self) -> None:
        """Drop what was never waited for."""
        self._queue.clear()

    def do_next(self) -> None:
        """Carry out the oldest piece of work."""
        with _lock:
            self._queue.popleft()()

    def synchronize(self) -> None:
        """Carry out everything queued so far."""
        with _lock:
            while self._queue:
                self.do_next()

    def query(self) -> bool:
        """Whether everything is done."""
        return not self._queue

    def record_event(self, event: "FakeEvent | None" = None) -> "FakeEvent":
        """Record `event`, or a new one, here."""
        event = event or FakeEvent()
        event.record(self)
        return event

    def wait_event(self, event: "FakeEvent") -> None:
        """Let later work here start no sooner than what `event` has recorded by now is done."""
        mark = event.mark
        self.queue_silently(lambda: _reach(mark))

    def wait_stream(self, other: "FakeStream") -> None:
        """Let later work here start no sooner than what `other` holds by now is done."""
        self.wait_event(other.record_event())


@dataclass(eq=False)
class _Mark:
    """A place in a stream's queue; each recording of an event makes a new one."""

    stream: FakeStream
    reached: bool = False

    def set_reached(self) -> None:
        self.reached = True


def _reach(mark: _Mark | None) -> None:
    with _lock:
        while mark and not mark.reached:
            mark.stream.do_next()


class FakeEvent:
    """A mark in a stream that others wait for; one that was never recorded holds nobody up."""

    def __init__(self, **_: object) -> None:
        self.mark: _Mark | None = None

    def record(self, stream: FakeStream | None = None) -> None:
        """Mark the end of `stream`, by default the current one, as it is now."""
        mark = self.mark = _Mark(stream or FAKE.current_stream())
        mark.stream.queue_silently(mark.set_reached)

    def query(self) -> bool:
        """Whether the mark was reached."""
        return self.mark is None or self.mark.reached

    def synchronize(self) -> None:
        """Hold the caller up until the mark is reached."""
        _reach(self.mark)

    def wait(self, stream: FakeStream | None = None) -> None:
        """Hold later work of `stream`, by default the current one, up until the mark is reached."""
        (stream or FAKE.current_stream()).wait_event(self)


class _Thread(threading.local):
    """What each thread has for itself: the streams it has made current, the last one on top."""

    def __init__(self) -> None:
        self.streams: list[FakeStream] = []


class FakeAccelerator:
    """What `torch.get_device_module("npu")` returns.

    `available`, `has_float64` and `memory_bytes` are for tests to set.
    """

    Stream = FakeStream
    Event = FakeEvent

    def __init__(self) -> None:
        self.streams: list[FakeStream] = []
        self._thread = _Thread()
        self.reset(available=False)

    def reset(self, available: bool) -> None:
        """Forget all work and counts, and be found by `torch.accelerator` or not."""
        with _lock:
            self.available, self.has_float64, self.memory_bytes = available, True, 1 << 24
            self.record = Record()
            self.streams = self.streams[:1]  # the default stream
            for stream in self.streams:
                stream.forget()

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        """Make `stream` the current one of this thread."""
        self._thread.streams.append(stream)
        try:
            yield
        finally:
            self._thread.streams.pop()

    def current_stream(self, _device: object = None) -> FakeStream:
        """The stream on which this thread's work is queued."""
        return self._thread.streams[-1] if self._thread.streams else self.streams[0]

    def synchronize(self, _device: object = None) -> None:
        """Carry out everything."""
        for stream in list(self.streams):
            stream.synchronize()

    def mem_get_info(self, _device: object = None) -> tuple[int, int]:
        """The bytes of memory that are free, and all of them."""
        return self.memory_bytes - self.record.live_bytes, self.memory_bytes

    def is_available(self) -> bool:
        """Whether `torch.accelerator`, and so `--device auto`, takes this device."""
        return self.available

    def is_initialized(self) -> bool:
        """Whether the device can be used, for torch's own checks."""
        return True

    def current_device(self) -> int:
        """The number of the one device."""
        return 0

    def device_count(self) -> int:
        """How many devices there are."""
        return 1

    def _is_in_bad_fork(self) -> bool:  # torch.manual_seed asks
        return False

    def manual_seed_all(self, seed: int) -> None:
        """Do nothing: no operator here draws numbers of its own."""


FAKE = FakeAccelerator()
FakeStream()  # the first is the default stream


class Block:
    """Device memory, counted as long as a tensor or a view of it lives."""

    def __init__(self, size_bytes: int) -> None:
        self._record = FAKE.record
        self._size_bytes = 0
        with _lock:
            if self._record.live_bytes + size_bytes > FAKE.memory_bytes:
                raise torch.OutOfMemoryError(f"{NAME} out of memory: {size_bytes} bytes asked for")
            self._size_bytes = size_bytes
            self._record.live_bytes += size_bytes
            self._record.peak_bytes = max(self._record.peak_bytes, self._record.live_bytes)

    def __del__(self) -> None:
        with _lock:
            self._record.live_bytes -= self._size_bytes


class _DeviceTensor(torch.Tensor):
    """A tensor on the device; `hidden` is the CPU tensor that holds its elements."""

    __torch_function__: Any = torch._C._disabled_torch_function_impl
    hidden: torch.Tensor
    block: Block

    def __repr__(self, **_: Any) -> str:  # type: ignore[override] # for pytest, without options
        return f"<{NAME} {self.dtype} {list(self.shape)}>"


def _wrap(hidden: torch.Tensor, block: Block | None = None) -> _DeviceTensor:
    """A device tensor for `hidden`: a view of `block`, or in fresh memory."""
    if hidden.dtype == torch.float64 and not FAKE.has_float64:
        raise TypeError(f"{NAME} has no float64")
    tensor: Any = torch._C._acc.create_empty_tensor(hidden.shape, hidden.dtype)
    tensor.__class__ = _DeviceTensor
    tensor.hidden, tensor.block = hidden, block or Block(hidden.nbytes)
    return tensor  # type: ignore[no-any-return] # its class was changed under mypy's eyes


def _poisoned(fresh: torch.Tensor) -> torch.Tensor:
    """`fresh` with all bits set, which every floating-point dtype reads as NaN."""
    if fresh.dtype == torch.bool:
        return fresh.fill_(True)
    storage: Any = fresh.untyped_storage()
    storage.fill_(0xFF)
    return fresh


def _host(operator: Operator, value: object) -> object:
    """One argument of an operator, as the CPU needs it."""
    if isinstance(value, _DeviceTensor):
        return value.hidden
    if isinstance(value, torch.Tensor) and value.dim():
        raise RuntimeError(f"{operator} got tensors on {NAME} and on {value.device}")
    if isinstance(value, torch.device) and value.type == NAME:
        return torch.device("cpu")
    return value


def _operate(operator: Operator, *args: Any, **kwargs: Any) -> Any:
    """Any operator on device tensors, queued on the current stream."""
    flat, structure = pytree.tree_flatten((args, kwargs))
    on_host = [_host(operator, value) for value in flat]
    host_args, host_kwargs = pytree.tree_unflatten(on_host, structure)
    stream = FAKE.current_stream()

    def compute() -> Any:
        return operator(*host_args, **host_kwargs)

    if operator._schema.is_mutable:  # in place, or with out=
        stream.queue(str(operator), compute)
        return kwargs.get("out", args[0]) if operator._schema.returns else None
    if operator is torch.ops.aten._local_scalar_dense.default:  # .item(): the caller waits
        stream.synchronize()
        return compute()
    result = compute()  # for its shape and dtype; what it holds may be too early
    if any(returned.alias_info is not None for returned in operator._schema.returns):
        return pytree.tree_map_only(torch.Tensor, lambda view: _wrap(view, args[0].block), result)
    fresh = [value for value in pytree.tree_leaves(result) if isinstance(value, torch.Tensor)]
    for tensor in fresh:
        _poisoned(tensor)
    stream.queue(str(operator), lambda: _fill(fresh, compute()))
    return pytree.tree_map_only(torch.Tensor, _wrap, result)


def _fill(fresh: list[torch.Tensor], result: Any) -> None:
    values = [value for value in pytree.tree_leaves(result) if isinstance(value, torch.Tensor)]
    for tensor, value in zip(fresh, values, strict=True):
        tensor.copy_(value)


def _copy(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    """Copy to, from or within the device; with pageable memory the caller waits, as on CUDA."""
    from_device, to_device = (isinstance(end, _DeviceTensor) for end in (source, target))
    hidden_source = source.hidden if isinstance(source, _DeviceTensor) else source
    hidden_target = target.hidden if isinstance(target, _DeviceTensor) else target
    stream = FAKE.current_stream()
    what = "copy on the device"
    if not (from_device and to_device):
        what = "copy to the device" if to_device else "copy to the host"
        pinned = _is_pinned(source if to_device else target)
        non_blocking = non_blocking and pinned
        stream.has_copied_to_device |= to_device
        _count(source.nbytes, to_device, pinned)
    stream.queue(what, lambda: hidden_target.copy_(hidden_source))
    if not (from_device and to_device) and not non_blocking:
        stream.synchronize()
    return target


def _count(size_bytes: int, to_device: bool, pinned: bool) -> None:
    with _lock:
        if not to_device:
            FAKE.record.bytes_to_host += size_bytes
            return
        FAKE.record.bytes_to_device += size_bytes
        if not pinned:
            FAKE.record.pageable_bytes_to_device += size_bytes


class _PinnedMemory(bytearray):
    """Memory that counts as pinned until the last tensor in it is gone."""

    address = 0

    def __del__(self) -> None:
        _pinned_addresses.discard(self.address)


def _pin(tensor: torch.Tensor, device: object = None) -> torch.Tensor:
    memory = _PinnedMemory(max(tensor.nbytes, 1))
    raw = torch.frombuffer(memory, dtype=torch.uint8)  # it keeps `memory` alive
    memory.address = raw.data_ptr()
    _pinned_addresses.add(memory.address)
    return raw[: tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)


def _is_pinned(tensor: torch.Tensor, device: object = None) -> bool:
    return tensor.untyped_storage().data_ptr() in _pinned_addresses


def _empty(size: list[int], *, dtype: torch.dtype | None = None, **_: object) -> torch.Tensor:
    return _wrap(_poisoned(torch.empty(size, dtype=dtype)))


def _empty_strided(
    size: list[int], stride: list[int], *, dtype: torch.dtype | None = None, **_: object
) -> torch.Tensor:
    return _wrap(_poisoned(torch.empty_strided(size, stride, dtype=dtype)))


# torch has kernels for any device for these, which would win over the one for everything. That of
# `abs` makes an empty tensor and has it resized, which a queue comes too late for.
_FOR_ANY_DEVICE = (
    *("slice.Tensor", "select.int", "unbind.int", "expand", "view", "alias", "detach"),
    "abs",
)


def install() -> None:
    """Register the device with torch, once; raises `ImportError` if this torch cannot do it."""
    if _registrations:
        return
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend(NAME, backend_module=FAKE)
    make_library: Any = torch.library.Library  # which torch leaves untyped
    everything = make_library("_", "IMPL")
    everything.fallback(_operate, "PrivateUse1")
    aten = make_library("aten", "IMPL")
    aten.impl("_copy_from", _copy, "PrivateUse1")
    aten.impl("empty.memory_format", _empty, "PrivateUse1")
    aten.impl("empty_strided", _empty_strided, "PrivateUse1")
    for name in _FOR_ANY_DEVICE:
        aten.impl(name, _operation(name), "PrivateUse1")
    # Above the bookkeeping of views, which would make a new tensor and forget `hidden`.
    aten.impl("view.dtype", _operation("view.dtype"), "AutogradPrivateUse1")
    for name, pinning in (("_pin_memory", _pin), ("pin_memory", _pin), ("is_pinned", _is_pinned)):
        aten.impl(name, pinning, "CPU")
    _registrations.extend([everything, aten])


def _operation(name: str) -> Callable[..., Any]:
    packet, _, overload = name.partition(".")
    operator = getattr(getattr(torch.ops.aten, packet), overload or "default")
    return lambda *args, **kwargs: _operate(operator, *args, **kwargs)
