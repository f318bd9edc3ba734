"""The fold: the arithmetic of an exponential moving average and nothing else.

    shadow <- shadow - (1 - decay) * (shadow - value)

TensorFlow's `assign_sub` has this form. Unlike decay * shadow + (1 - decay) * value, it leaves the
shadow unchanged, bit for bit, where a value never changes.
"""

import math
from collections.abc import Mapping

import torch

from ckpt_ema.errors import Code, OptionError, RefusedError, some
from ckpt_ema.schedules.dynamic import dynamic_decay

AVERAGED_DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.complex128, torch.complex64, torch.complex32),
)


def fold_(shadow: torch.Tensor, value: torch.Tensor, decay: float) -> None:
    """Fold `value` into `shadow` in place; both of the same shape, dtype and device.

    `torch.lerp` computes it as one fused multiply-add, b - (b - a) * (1 - weight) where weight is
    at least a half. The arguments are ordered so that it always takes that form: the other one
    turns -0.0 into 0.0. In float32 it would round the decay before it takes 1 - decay, of which
    little is left for a decay near 1. Of -0.0 and a decay of 0 or 1 its vector code makes 0.0.
    """
    if decay == 0.0:
        shadow.copy_(value)
    elif decay == 1.0:
        return
    elif shadow.dtype == torch.float32:
        shadow.sub_(shadow - value, alpha=1.0 - decay)
    elif decay > 0.5:
        torch.lerp(value, shadow, decay, out=shadow)
    else:
        torch.lerp(shadow, value, 1.0 - decay, out=shadow)


def fold_rows_(
    shadows: torch.Tensor, value: torch.Tensor, weights: torch.Tensor, *, above_half: bool
) -> None:
    """Fold `value` into several shadows in place; each row gets the same bits as from `fold_`.

    `shadows` has the shape (K, count), `value` (count,), all float64. `weights`, of shape (K, 1),
    are the decays where these are `above_half`, otherwise 1 - decay.
    """
    start, end = (value, shadows) if above_half else (shadows, value)
    torch.lerp(start, end, weights, out=shadows)


def fold_keeping_infinities_(shadow: torch.Tensor, value: torch.Tensor, decay: float) -> None:
    """Fold like `fold_`, but keep infinities that never change, as in masks, instead of NaN."""
    unchanged = shadow.isinf() & (shadow == value)
    kept = shadow.clone()
    fold_(shadow, value, decay)
    torch.where(unchanged, kept, shadow, out=shadow)


def is_finite(values: torch.Tensor) -> bool:
    """Return whether no element of a floating-point tensor is NaN or infinite."""
    if not values.numel():
        return True
    # A finite sum has only finite terms, and nothing is faster to compute. If it is not finite it
    # may have overflowed; then the extremes decide (NaN propagates to them).
    wide_enough = torch.float32 if values.dtype == torch.float16 else values.dtype
    if math.isfinite(values.sum(dtype=wide_enough).item()):
        return True
    low, high = torch.aminmax(values)
    return math.isfinite(low.item()) and math.isfinite(high.item())


def widest_float(device: torch.device) -> torch.dtype:
    """Return float64, or float32 for a device without float64 (Apple's mps, some xpu)."""
    try:
        torch.ones(1, dtype=torch.float64, device=device).add_(1)  # allocating alone proves nothing
    except torch.OutOfMemoryError:
        return torch.float64  # a full device may well have float64
    except (TypeError, RuntimeError):
        return torch.float32
    return torch.float64


class Shadow:
    """The moving average of a dict of tensors in memory: TensorFlow's `ExponentialMovingAverage`.

    `initial` gives the shadow its first values; without it the first `apply` does. Floating-point
    and complex tensors are averaged in float64 (float32 on a device without it), all others keep
    the value applied last. The fold is the same as in `ckpt_ema.average`.

    >>> shadow = Shadow(0.99)
    >>> for number in (1.0, 2.0, 3.0):
    ...     shadow.apply({"w": torch.tensor(number)})
    >>> shadow.average("w")
    tensor(2.7045)
    """

    def __init__(
        self,
        decay: float,
        initial: Mapping[str, torch.Tensor] | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        if not 0.0 <= decay <= 1.0:
            message = f"decay is {decay}; it must be between 0 and 1."
            raise OptionError(message, code=Code.INVALID_OPTION)
        self.decay = decay
        self.num_applied = 0
        self._device = torch.device(device) if device is not None else None
        self._shadow: dict[str, torch.Tensor] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        if initial is not None:
            self._start(initial)

    def apply(self, state_dict: Mapping[str, torch.Tensor], num_updates: int | None = None) -> None:
        """Fold `state_dict` in with decay min(decay, (1 + n) / (10 + n)), n = `num_updates`.

        `num_updates` defaults to the number of applies so far. Raises `RefusedError` if names or
        shapes differ from the shadow's, which is then unchanged.
        """
        n = self.num_applied if num_updates is None else num_updates
        if n < 0:
            message = f"num_updates is {n}; it must not be negative."
            raise OptionError(message, code=Code.INVALID_OPTION)
        if not self._shadow:
            self._start(state_dict)
        else:
            self._check(state_dict)
            for name, value in state_dict.items():
                self._fold(name, value.detach(), dynamic_decay(n, self.decay))
        self.num_applied += 1

    def average(self, name: str) -> torch.Tensor:
        """Return the average of one tensor, in the dtype in which it was applied."""
        if name not in self._shadow:
            message = f"The shadow has no tensor {name}."
            raise RefusedError(message, code=Code.DIFFERENT_MODELS, tensor=name)
        return self._shadow[name].to(self._dtypes[name], copy=True)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return all averages, in the dtypes in which they were applied."""
        return {name: self.average(name) for name in self._shadow}

    def _start(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        for name, value in state_dict.items():
            self._shadow[name] = self._wide(value.detach()).clone()
            self._dtypes[name] = value.dtype

    def _fold(self, name: str, value: torch.Tensor, decay: float) -> None:
        wide = self._wide(value)
        self._dtypes[name] = value.dtype
        if value.dtype not in AVERAGED_DTYPES:
            self._shadow[name] = wide.clone()
            return
        after = self._shadow[name].clone()
        real, value = _as_real(after), _as_real(wide)
        fold_(real, value, decay)
        if not is_finite(real):
            after.copy_(self._shadow[name])
            fold_keeping_infinities_(real, value, decay)
        self._shadow[name] = after

    def _wide(self, value: torch.Tensor) -> torch.Tensor:
        device = self._device or value.device
        if value.dtype not in AVERAGED_DTYPES:
            return value.to(device)
        wide = widest_float(device)
        return value.to(device, wide.to_complex() if value.is_complex() else wide)

    def _check(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        if state_dict.keys() != self._shadow.keys():
            different = some(sorted(state_dict.keys() ^ self._shadow.keys()))
            message = f"The tensors differ from those of the shadow: {different}."
            raise RefusedError(message, code=Code.DIFFERENT_MODELS)
        for name, value in state_dict.items():
            mine = self._shadow[name]
            if mine.shape != value.shape:
                shape, expected = list(value.shape), list(mine.shape)
                message = f"Tensor {name} has shape {shape}; in the shadow it has {expected}."
                raise RefusedError(message, code=Code.DIFFERENT_MODELS, tensor=name)
            if _kind(value) != _kind(mine):
                message = f"Tensor {name} is {value.dtype} and in the shadow {self._dtypes[name]};"
                message = (
                    f"{message} real, complex and integer tensors cannot be averaged together."
                )
                raise RefusedError(message, code=Code.DIFFERENT_DTYPES, tensor=name)


def _as_real(values: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(values) if values.is_complex() else values


def _kind(value: torch.Tensor) -> tuple[bool, bool]:
    return value.dtype in AVERAGED_DTYPES, value.is_complex()
