"""Which device to fold on, and how much of its memory to take."""

import torch

from ckpt_ema.errors import OptionError, printable
from ckpt_ema.fold.shadow import widest_float
from ckpt_ema.fold.tile_fold import device_element_bytes
from ckpt_ema.planning.plan import Plan

CPU = torch.device("cpu")

# Smaller copies and kernels take less time than it takes to ask for them.
_MOST_ELEMENTS = 1 << 20
_SHARE = 4  # of what is free, one in so many


def resolve_device(name: str, place: int = 0) -> torch.device:
    """The device that `name` asks for; "auto" is the accelerator if there is one, else the CPU.

    Where there are several and `name` leaves open which, processes on one machine take them by
    turns: `place` is the number of this one. Raises `OptionError` for a device that this machine,
    or this build of torch, does not have.
    """
    if name.partition(":")[0] == "cpu":
        return CPU
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto" and accelerator is None:
        return CPU
    try:
        device = accelerator if accelerator and name == "auto" else torch.device(name)
        if device.type not in ("cpu", accelerator and accelerator.type):
            raise RuntimeError("not here")
        count = torch.accelerator.device_count()
        if device.index is None and count > 1:
            device = torch.device(device.type, place % count)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        if is_out_of_memory(error):
            return device  # it is there
        here = f"cpu and {accelerator.type}" if accelerator else "cpu only"
        raise OptionError(
            f"--device {printable(name)} cannot be used: this machine with this build of torch has"
            f" {here}."
        ) from error
    return device


def accumulator(plan: Plan, device: torch.device) -> torch.dtype:
    """What is folded in there."""
    return torch.float32 if plan.engine.accumulate == "float32" else widest_float(device)


def elements_at_a_time(plan: Plan, device: torch.device) -> int:
    """How many elements each thread has on the device at a time, at most.

    All threads together take what `--max-memory` allows of its memory, or a share of what is free.
    """
    if device == CPU:
        return plan.tile_elements
    longest = max((span.length for span in plan.work.spans if span.averaged), default=1)
    most = min(longest, _MOST_ELEMENTS)
    budget = plan.engine.max_memory or _free_bytes(device) // _SHARE
    wide = accumulator(plan, device)
    each = device_element_bytes(len(plan.averages), wide, plan.work.widest_bytes)
    return max(1, min(most, budget // (each * plan.threads)))


def _free_bytes(device: torch.device) -> int:
    """The memory of an accelerator that nobody has taken; much where it does not tell."""
    module = torch.get_device_module(device)
    try:
        return int(module.mem_get_info(device)[0]) if hasattr(module, "mem_get_info") else 1 << 33
    except RuntimeError as error:
        if is_out_of_memory(error):
            return 0
        raise


def is_out_of_memory(error: Exception) -> bool:
    """Whether torch says that a device has no memory left; only some have a class for that."""
    words = ("out of memory", "allocate memory", "bad_alloc")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)
