"""Schedules that count checkpoints: of the steps only their number matters.

Each function returns the decays d_2 .. d_N of a fold over N checkpoints, oldest first.
"""

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise

from ckpt_ema.schedules.schedule import DECAY, POSITIVE, Schedule, ScheduleOption, Steps
from ckpt_ema.schedules.weights import decays_of


def constant(steps: Steps, decay: float, zero_debias: bool = False) -> list[float]:
    """Return d_j = decay, the usual exponential moving average.

    With `zero_debias`, from a shadow of zeros, divided by the weight that the checkpoints have:
    m_j = d m_(j-1) + (1 - d) theta_j from m_0 = 0; the result is m_N / (1 - d^N). The same as a
    fold with d_j = d (1 - d^(j-1)) / (1 - d^j). Source: Kingma and Ba 2015, arXiv 1412.6980,
    section 3; `optax.ema(debias=True)`. At d = 1 it is the limit, the uniform mean.

    >>> constant(range(3), 0.9), [round(d, 3) for d in constant(range(3), 0.5, True)]
    ([0.9, 0.9], [0.333, 0.429])
    """
    if not zero_debias or decay == 0.0:
        return [decay] * (len(steps) - 1)
    if decay == 1.0:
        return uniform(steps)
    mass = [-math.expm1(j * math.log(decay)) for j in range(1, len(steps) + 1)]  # 1 - d^j
    return [decay * before / after for before, after in pairwise(mass)]


def warmup(steps: Steps, decay: float, power: float, inv_gamma: float) -> list[float]:
    """Return d = 1 - (1 + n / inv_gamma)^(-power), at most `decay`; n = j - 1 for checkpoint j.

    Source: `EMAWarmup` of k-diffusion; timm's ModelEmaV3, diffusers and ema-pytorch have the same
    with a power of 2/3. With a power of 1 and an inv_gamma of 1 it is the uniform mean.

    >>> [round(d, 5) for d in warmup(range(4), 0.999, 2 / 3, 1.0)]
    [0.37004, 0.51925, 0.60315]
    """
    return [min(decay, 1.0 - (1.0 + n / inv_gamma) ** -power) for n in range(1, len(steps))]


def uniform(steps: Steps) -> list[float]:
    """Return the decays of the mean, w_j = 1 / N.

    Source: SWA, Izmailov et al. 2018, arXiv 1803.05407, algorithm 1; over the last k checkpoints
    LAWA, Kaddour 2022, arXiv 2209.14981.

    >>> uniform(range(3))
    [0.5, 0.6666666666666666]
    """
    return [(j - 1) / j for j in range(2, len(steps) + 1)]


def linear(steps: Steps) -> list[float]:
    """Return the decays of w_j proportional to j, d_j = (j - 1) / (j + 1).

    Source: the weighted moving average (WMA) of PMA, Li et al. 2025, arXiv 2505.12082.

    >>> linear(range(3))
    [0.3333333333333333, 0.5]
    """
    return [(j - 1) / (j + 1) for j in range(2, len(steps) + 1)]


def wsm(steps: Steps, shape: Callable[[float], float]) -> list[float]:
    """Return a learning-rate decay of the given shape on [0, 1], from 1 to 0, as a merge.

    With s_i = shape(i / N) for i = 0 .. N - 1 the weights are c_0 = 1 - s_1, c_i = s_i - s_(i+1),
    c_(N-1) = s_(N-1). Source: warmup-stable-merge, Tian et al. 2025, arXiv 2507.17634.

    >>> [round(d, 3) for d in wsm(range(4), minus_sqrt)]
    [0.707, 0.816, 0.866]
    """
    count = len(steps)
    values = [1.0, *(shape(i / count) for i in range(1, count)), 0.0]
    return decays_of([here - after for here, after in pairwise(values)])


def minus_sqrt(x: float) -> float:
    """Return 1 - sqrt(x), a shape with most of the weight on the oldest checkpoint."""
    return 1.0 - math.sqrt(x)


def cosine(x: float) -> float:
    """Return (1 + cos(pi x)) / 2, a shape with most of the weight in the middle."""
    return (1.0 + math.cos(math.pi * x)) / 2.0


_ZERO_DEBIAS = ScheduleOption(
    "zero_debias",
    "start at zero and correct the bias, as Adam does",
    bool,
    label="debiased",
    default=False,
)
_POWER = ScheduleOption(
    "power",
    "warmup exponent: decay 1 - (1 + n / inv_gamma)^-power",
    default=2 / 3,
    limits=POSITIVE,
    label="power {}",
)
_INV_GAMMA = ScheduleOption(
    "inv_gamma", "warmup scale, see --power", default=1.0, limits=POSITIVE, label="inv gamma {}"
)
SCHEDULES = {
    "constant": Schedule(constant, "constant, decay {}", DECAY, (_ZERO_DEBIAS,)),
    "uniform": Schedule(uniform, "uniform"),
    "linear": Schedule(linear, "linear"),
    "warmup": Schedule(warmup, "warmup, decay at most {}", DECAY, (_POWER, _INV_GAMMA)),
    "wsm-minus-sqrt": Schedule(
        partial(wsm, shape=minus_sqrt), "learning-rate decay 1 - sqrt(x)", extends=False
    ),
    "wsm-cosine": Schedule(
        partial(wsm, shape=cosine), "learning-rate decay (1 + cos(pi x)) / 2", extends=False
    ),
}
