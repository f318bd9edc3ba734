"""Schedules that count training steps: checkpoint j was saved at step t_j, oldest first.

Each function returns the decays d_2 .. d_N of a fold over N checkpoints.
"""

import math
from itertools import pairwise

from ckpt_ema.errors import Code, RefusedError
from ckpt_ema.schedules.schedule import POSITIVE, SHARE, Limits, Schedule, ScheduleOption, Steps

# At 1 / sqrt(12) the power function is uniform; above it, its profile falls over training time.
MOST_SIGMA_REL = 1 / math.sqrt(12)
_LEAST_SIGMA_REL = 1e-6  # far below, its exponent overflows


def per_step(steps: Steps, decay_per_step: float) -> list[float]:
    """Return a constant decay for each training step, d_j = decay_per_step^(t_j - t_(j-1)).

    >>> per_step([0, 1, 3], 0.5)
    [0.5, 0.25]
    """
    return [float(decay_per_step ** (after - before)) for before, after in pairwise(steps)]


def half_life(steps: Steps, half_life: float) -> list[float]:
    """Return d_j = 0.5^((t_j - t_(j-1)) / half_life): weights halve in `half_life` steps.

    >>> half_life([0, 1000, 3000], 1000)
    [0.5, 0.25]
    """
    return [0.5 ** ((after - before) / half_life) for before, after in pairwise(steps)]


def power(steps: Steps, sigma_rel: float) -> list[float]:
    """Return the power-function average, d_j = (1 - (t_j - t_(j-1)) / t_j)^(gamma + 1).

    Its profile over training time is t^gamma, with a standard deviation of `sigma_rel` times the
    length of the run. Source: Karras et al. 2024, arXiv 2312.02696, equation 127. Raises
    `RefusedError` for a checkpoint at step 0, which would have no weight.

    >>> [round(d, 4) for d in power([1000, 2000, 3000], 0.2)]
    [0.141, 0.3179]
    """
    if steps[0] <= 0:
        where = f"The first checkpoint is at step {steps[0]}"
        message = f"{where}, which has no weight in the power function."
        raise RefusedError(message, "Leave it out with --from 1.", code=Code.WRONG_WEIGHTS)
    exponent = gamma_of(sigma_rel) + 1
    return [float((before / after) ** exponent) for before, after in pairwise(steps)]


def gamma_of(sigma_rel: float) -> float:
    """Return the exponent of the power function whose profile has the relative width `sigma_rel`.

    The largest real root of g^3 + 7 g^2 + (16 - r) g + (12 - r) = 0 with r = sigma_rel^-2.
    Source: Karras et al. 2024, arXiv 2312.02696, equation 126 and algorithm 2.

    >>> round(gamma_of(0.10), 6)
    6.937204
    """
    r = sigma_rel**-2
    # Above the largest root the cubic is convex and rising, so Newton's method falls to it.
    gamma = math.sqrt(r)
    for _ in range(100):
        value = ((gamma + 7) * gamma + (16 - r)) * gamma + (12 - r)
        lower = gamma - value / ((3 * gamma + 14) * gamma + (16 - r))
        if not lower < gamma:
            break
        gamma = lower
    return gamma


def sigma_rel_of(gamma: float) -> float:
    """Return the relative width of the power function, sqrt((g + 1) / ((g + 2)^2 (g + 3))).

    Source: Karras et al. 2024, arXiv 2312.02696, equation 123.

    >>> round(sigma_rel_of(6.937204), 6)
    0.1
    """
    return math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))


_LEAST, _MOST = f"{_LEAST_SIGMA_REL:g}", f"1 / sqrt(12) = {MOST_SIGMA_REL:.6f}"
_SIGMA_REL = ScheduleOption(
    "sigma_rel",
    "relative width of Karras et al.'s power-function EMA",
    several=True,
    limits=Limits(
        lambda x: _LEAST_SIGMA_REL <= x < MOST_SIGMA_REL,
        f"lie between {_LEAST} and {_MOST}, the uniform mean",
    ),
)
_PER_STEP = ScheduleOption("decay_per_step", "decay per training step", several=True, limits=SHARE)
_HALF_LIFE = ScheduleOption(
    "half_life", "training steps in which a weight halves", several=True, limits=POSITIVE
)
SCHEDULES = {
    "power": Schedule(
        power, "power function, sigma_rel {}", _SIGMA_REL, counts_steps=True, label="sigma-rel"
    ),
    "per-step": Schedule(
        per_step, "decay {} per {unit}", _PER_STEP, counts_steps=True, is_implied=True
    ),
    "half-life": Schedule(
        half_life, "half-life {} {units}", _HALF_LIFE, counts_steps=True, is_implied=True
    ),
}
