"""From a number of checkpoints and a rule to the decay and the weight of each; floats only.

Checkpoints are theta_1 .. theta_N, oldest first. The fold is s_1 = theta_1, then
s_j = s_(j-1) - (1 - d_j) * (s_(j-1) - theta_j). So every schedule is a fixed vector of weights,
known before a tensor is read.
"""

import math
from collections.abc import Sequence

from ckpt_ema.errors import OptionError

SCHEDULES = ("dynamic", "constant")


def dynamic_decay(num_updates: int, decay: float) -> float:
    """TensorFlow's dynamic decay, min(decay, (1 + n) / (10 + n)) with n = `num_updates`.

    Source: `tf.train.ExponentialMovingAverage.apply`, argument `num_updates`.

    >>> dynamic_decay(0, 0.999), dynamic_decay(8, 0.999), dynamic_decay(8, 0.3)
    (0.1, 0.5, 0.3)
    """
    return min(decay, (1 + num_updates) / (10 + num_updates))


def decays(count: int, schedule: str, decay: float) -> list[float]:
    """The decays d_2 .. d_N with which checkpoints 2 .. N are folded, N = `count`.

    The first checkpoint initialises the shadow and has none; the j-th is folded with
    num_updates = j - 1, so the first fold has n = 1. Raises `OptionError` for an unknown
    schedule or a decay outside [0, 1].

    >>> decays(4, "dynamic", 0.28)
    [0.18181818181818182, 0.25, 0.28]
    >>> decays(3, "constant", 0.9)
    [0.9, 0.9]
    """
    if not 0.0 <= decay <= 1.0:  # NaN fails it too
        raise OptionError(f"--decay is {decay}; it must lie between 0 and 1.")
    if schedule == "dynamic":
        return [dynamic_decay(n, decay) for n in range(1, count)]
    if schedule == "constant":
        return [decay] * (count - 1)
    raise OptionError(f"--schedule is {schedule!r}; it must be one of {', '.join(SCHEDULES)}.")


def weights(decays: Sequence[float]) -> list[float]:
    """The share of each of the N checkpoints in the result, from the N - 1 decays d_2 .. d_N.

    w_j = (1 - d_j) * prod(d_k, k > j) and w_1 = prod(d_k, k >= 2); they sum to 1.

    >>> weights([0.5, 0.75])
    [0.375, 0.375, 0.25]
    """
    shares = []
    kept = 1.0  # what the folds still to come leave of the present shadow
    for decay in reversed(decays):
        shares.append((1.0 - decay) * kept)
        kept *= decay
    shares.append(kept)
    return shares[::-1]


def first_decay_that_matters(count: int) -> float:
    """The end of the ramp (1 + n) / (10 + n) over `count` checkpoints, at n = count - 1.

    A cap at or above it never binds: only a lower decay changes the weights.

    >>> first_decay_that_matters(10) == 10 / 19
    True
    """
    return count / (count + 9)


def checkpoints_below_the_cap(decay: float) -> int:
    """The largest number of checkpoints for which a cap of `decay` < 1 changes nothing.

    The cap binds for n > (10 * decay - 1) / (1 - decay).

    >>> checkpoints_below_the_cap(0.999), checkpoints_below_the_cap(0.5)
    (8991, 9)
    """
    n = math.floor((10 * decay - 1) / (1 - decay) + 1e-6)  # 0.999 is not exact in binary
    return max(n, 0) + 1
