"""TensorFlow's dynamic decay, by the index of checkpoints or by training steps."""

import math
from itertools import pairwise

from ckpt_ema.schedules.schedule import DECAY, Schedule, ScheduleOption, Steps


def dynamic_decay(num_updates: int, decay: float) -> float:
    """Return min(decay, (1 + n) / (10 + n)) with n = `num_updates`.

    Source: `tf.train.ExponentialMovingAverage.apply`, argument `num_updates`.

    >>> dynamic_decay(0, 0.999), dynamic_decay(8, 0.999), dynamic_decay(8, 0.3)
    (0.1, 0.5, 0.3)
    """
    return min(decay, (1 + num_updates) / (10 + num_updates))


def dynamic(steps: Steps, decay: float, num_updates: str = "index") -> list[float]:
    """Return the dynamic decays, with checkpoint j folded at num_updates = j - 1.

    The first fold, of the second checkpoint, has n = 1, as in torch-ema; TensorFlow itself gives
    the same where `apply` is called once for each checkpoint, the first one included.

    >>> dynamic(range(4), 0.28)
    [0.18181818181818182, 0.25, 0.28]
    """
    if num_updates == "step":
        return dynamic_at_steps(steps, decay)
    return [dynamic_decay(n, decay) for n in range(1, len(steps))]


def dynamic_at_steps(steps: Steps, decay: float) -> list[float]:
    """Return the dynamic decays at real training steps, the weights held between saves.

    From step a to step b the shadow keeps prod(min(decay, (1 + k) / (10 + k)), k = a + 1 .. b).
    Below the cap that telescopes to ((a + 2) ... (a + 10)) / ((b + 2) ... (b + 10)), so it takes
    the same time however far apart two saves are. Source: `tf.train.ExponentialMovingAverage` with
    the global step as `num_updates`.

    >>> [round(d, 4) for d in dynamic_at_steps([0, 1, 2, 1000], 0.999)]
    [0.1818, 0.25, 0.0]
    """
    decays = []
    for before, after in pairwise(steps):
        capped = min(max(before, updates_below_the_cap(decay)), after) if decay < 1 else after
        ramp = math.prod((before + i) / (capped + i) for i in range(2, 11))
        decays.append(float(ramp * decay ** (after - capped)))
    return decays


def first_decay_that_matters(count: int) -> float:
    """Return the end of the ramp (1 + n) / (10 + n) over `count` checkpoints, at n = count - 1.

    A cap at or above it never binds: only a lower decay changes the weights.

    >>> first_decay_that_matters(10) == 10 / 19
    True
    """
    return count / (count + 9)


def updates_below_the_cap(decay: float) -> int:
    """Return the largest num_updates at which a cap of `decay` < 1 changes nothing.

    The cap binds for n > (10 * decay - 1) / (1 - decay).

    >>> updates_below_the_cap(0.999), updates_below_the_cap(0.5), updates_below_the_cap(0.05)
    (8990, 8, 0)
    """
    n = math.floor((10 * decay - 1) / (1 - decay) + 1e-6)  # 0.999 is not exact in binary
    return max(n, 0)


_NUM_UPDATES = ScheduleOption(
    "num_updates",
    "counter for the dynamic decay: index or step",
    kind=str,
    default="index",
    choices=("index", "step"),
    label="at {}s",
)
SCHEDULES = {"dynamic": Schedule(dynamic, "dynamic, decay {}", DECAY, (_NUM_UPDATES,))}
