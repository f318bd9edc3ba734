"""Looks for accelerators and for memory, without importing torch."""

import mmap
import platform
import sys
from glob import glob

CPU = "cpu"
_ROOM_TO_START = 16 << 20  # a thread's stack, and what it takes before it does anything

# Device files of accelerators that torch, or an extension of it, folds on.
_DEVICES = (
    *("/dev/nvidia[0-9]*", "/dev/dxg"),  # CUDA, and inside of Windows
    *("/dev/kfd", "/dev/davinci[0-9]*", "/dev/hl[0-9]*", "/dev/accel/accel*"),
)
_INTEL = "/dev/dri/renderD*"  # most machines have it; only torch's xpu build uses it


def needs_torch(device: str) -> bool:
    """Return whether torch is needed to resolve a --device, as it is not for the CPU."""
    if device.partition(":")[0] == CPU:
        return False
    return device != "auto" or _may_have_accelerator()


def _may_have_accelerator() -> bool:
    if torch := sys.modules.get("torch"):  # it knows better, and costs nothing more
        return torch.accelerator.current_accelerator(check_available=True) is not None
    is_apple = (platform.system(), platform.machine()) == ("Darwin", "arm64")
    is_sure = is_apple or any(map(glob, _DEVICES))
    if not is_sure and not glob(_INTEL):
        return False
    from importlib import metadata  # here, since it takes a while to import

    try:
        build = metadata.version("torch").partition("+")[2]
    except metadata.PackageNotFoundError:
        return False
    return build != "cpu" and (is_sure or build == "xpu")


def check_room_for_thread() -> None:
    """Raise `OSError` unless there is memory to start a thread.

    Python waits forever for the start of a thread that finds none.
    """
    mmap.mmap(-1, _ROOM_TO_START).close()


def is_out_of_memory(error: Exception) -> bool:
    """Return whether a device, or torch on the host, has no memory left."""
    words = ("out of memory", "allocate memory", "bad_alloc")  # only some have a class for that
    is_named = type(error).__name__ == "OutOfMemoryError"
    return is_named or any(word in str(error) for word in words)
