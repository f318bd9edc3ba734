"""Which device torch folds on, and how much of its memory to take."""

import hashlib
from dataclasses import replace

import torch

from ckpt_ema.errors import Code, OptionError
from ckpt_ema.fold.hardware import CPU, is_out_of_memory
from ckpt_ema.fold.shadow import widest_float
from ckpt_ema.fold.torch_fold import device_element_bytes
from ckpt_ema.planning.fingerprint import precision
from ckpt_ema.planning.plan import Plan
from ckpt_ema.targets.target import Output

# Smaller copies and kernels take less time than starting them.
_MOST_ELEMENTS = 1 << 20
_SHARE = 4  # one in so many of the free bytes


def resolve_device(name: str, place: int = 0) -> torch.device:
    """Return the device that `name` asks for; "auto" is the accelerator if there is one.

    Where there are several and `name` leaves open which, the process with number `place` on this
    machine takes the next. Raises `OptionError` for a device that is not available.
    """
    if name.partition(":")[0] == CPU:
        return torch.device(CPU)
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto" and accelerator is None:
        return torch.device(CPU)
    try:
        device = accelerator if accelerator and name == "auto" else torch.device(name)
        if device.type not in (CPU, accelerator and accelerator.type):
            raise RuntimeError("not here")
        count = torch.accelerator.device_count()
        if device.index is None and count > 1:
            device = torch.device(device.type, place % count)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        if is_out_of_memory(error):
            return device  # it exists
        here = f"cpu and {accelerator.type}" if accelerator else "cpu only"
        raise OptionError(
            f"--device {name} is not available: this machine with this build of torch has {here}.",
            code=Code.DEVICE_UNAVAILABLE,
        ) from error
    return device


def accumulator(plan: Plan, device: torch.device) -> torch.dtype:
    """Return the dtype to fold in on a device."""
    return torch.float32 if plan.engine.accumulate == "float32" else widest_float(device)


def plan_on(plan: Plan, device: torch.device) -> Plan:
    """Return the plan with the precision of a device; fingerprints change if it assumed another."""
    wide = str(accumulator(plan, device)).removeprefix("torch.")
    averages = plan.averages
    if wide != precision(plan.engine):
        averages = tuple(replace(a, output=_marked(a.output, wide)) for a in averages)
    return replace(plan, engine=replace(plan.engine, accumulate=wide), averages=averages)


def _marked(output: Output, mark: str) -> Output:
    old = output.fingerprint.encode()
    new = hashlib.sha256(old + mark.encode()).hexdigest()
    files = []
    for file in output.files:
        chunks = [c._replace(content=c.content.replace(old, new.encode())) for c in file.chunks]
        files.append(replace(file, chunks=tuple(chunks)))
    return replace(output, files=tuple(files), fingerprint=new)


def elements_at_a_time(plan: Plan, device: torch.device) -> int:
    """Return the most elements that each thread has on the device at a time."""
    if device.type == CPU:
        return plan.tile_elements
    longest = max((span.length for span in plan.work.spans if span.averaged), default=1)
    most = min(longest, _MOST_ELEMENTS)
    budget = plan.engine.max_memory or _free_bytes(device) // _SHARE
    wide = accumulator(plan, device)
    each = device_element_bytes(len(plan.foldings), wide, plan.work.widest_bytes)
    return max(1, min(most, budget // (each * plan.threads)))


def _free_bytes(device: torch.device) -> int:
    """Return the free memory of an accelerator; 8 GiB where it is not reported."""
    module = torch.get_device_module(device)
    try:
        return int(module.mem_get_info(device)[0]) if hasattr(module, "mem_get_info") else 1 << 33
    except RuntimeError as error:
        if is_out_of_memory(error):
            return 0
        raise
