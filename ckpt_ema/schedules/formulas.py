"""Every schedule as one function from the steps of checkpoints to decays; long, as all are here.

Checkpoints are theta_1 .. theta_N, oldest first, saved at training steps t_1 < ... < t_N. The fold
is s_1 = theta_1, then s_j = s_(j-1) - (1 - d_j) * (s_(j-1) - theta_j). So every schedule is a fixed
vector of decays d_2 .. d_N, one for each fold, or of the N weights that they amount to, known
before a tensor is read. `steps` are t_1 .. t_N; of a schedule that counts checkpoints only their
number matters.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

from ckpt_ema.errors import OptionError, RefusedError
from ckpt_ema.schedules.weights import decays_of

Steps = Sequence[int]

# Beyond it the profile of the power function is not one that grows: at 1 / sqrt(12) it is uniform.
MOST_SIGMA_REL = 1 / math.sqrt(12)


# --- Schedules that count checkpoints ------------------------------------------------------------


def dynamic_decay(num_updates: int, decay: float) -> float:
    """TensorFlow's dynamic decay, min(decay, (1 + n) / (10 + n)) with n = `num_updates`.

    Source: `tf.train.ExponentialMovingAverage.apply`, argument `num_updates`.

    >>> dynamic_decay(0, 0.999), dynamic_decay(8, 0.999), dynamic_decay(8, 0.3)
    (0.1, 0.5, 0.3)
    """
    return min(decay, (1 + num_updates) / (10 + num_updates))


def dynamic(steps: Steps, decay: float) -> list[float]:
    """TensorFlow's dynamic decay with checkpoint j folded at num_updates = j - 1.

    The first fold, of the second checkpoint, has n = 1, as torch-ema counts; TensorFlow itself
    comes to the same where `apply` is called once for each checkpoint, the first one included.

    >>> dynamic(range(4), 0.28)
    [0.18181818181818182, 0.25, 0.28]
    """
    return [dynamic_decay(n, decay) for n in range(1, len(steps))]


def constant(steps: Steps, decay: float) -> list[float]:
    """d_j = decay, the exponential moving average as everybody writes it down.

    >>> constant(range(3), 0.9)
    [0.9, 0.9]
    """
    return [decay] * (len(steps) - 1)


def constant_debiased(steps: Steps, decay: float) -> list[float]:
    """A constant decay from a shadow of zeros, divided by the weight that the zeros lack.

    m_j = d m_(j-1) + (1 - d) theta_j from m_0 = 0; the result is m_N / (1 - d^N). The same as a
    fold with d_j = d (1 - d^(j-1)) / (1 - d^j). Source: Kingma and Ba 2015, arXiv 1412.6980,
    section 3; `optax.ema(debias=True)`. At d = 1 it is the limit, the uniform mean.

    >>> [round(d, 3) for d in constant_debiased(range(3), 0.5)]
    [0.333, 0.429]
    """
    if decay == 1.0:
        return uniform(steps)
    if decay == 0.0:
        return constant(steps, 0.0)
    mass = [-math.expm1(j * math.log(decay)) for j in range(1, len(steps) + 1)]  # 1 - d^j
    return [decay * before / after for before, after in pairwise(mass)]


def warmup(steps: Steps, decay: float, power: float, inv_gamma: float) -> list[float]:
    """EMAWarmup: d = 1 - (1 + n / inv_gamma)^(-power), at most `decay`; n = j - 1 for checkpoint j.

    Source: `EMAWarmup` of k-diffusion; timm's ModelEmaV3, diffusers and ema-pytorch have the same
    with a power of 2/3. With a power of 1 and an inv_gamma of 1 it is the uniform mean.

    >>> [round(d, 5) for d in warmup(range(4), 0.999, 2 / 3, 1.0)]
    [0.37004, 0.51925, 0.60315]
    """
    return [min(decay, 1.0 - (1.0 + n / inv_gamma) ** -power) for n in range(1, len(steps))]


def uniform(steps: Steps) -> list[float]:
    """The mean, w_j = 1 / N.

    Source: SWA, Izmailov et al. 2018, arXiv 1803.05407, algorithm 1; over the last k checkpoints
    LAWA, Kaddour 2022, arXiv 2209.14981.

    >>> uniform(range(3))
    [0.5, 0.6666666666666666]
    """
    return [(j - 1) / j for j in range(2, len(steps) + 1)]


def linear(steps: Steps) -> list[float]:
    """w_j proportional to j, so d_j = (j - 1) / (j + 1).

    Source: the weighted moving average (WMA) of PMA, Li et al. 2025, arXiv 2505.12082.

    >>> linear(range(3))
    [0.3333333333333333, 0.5]
    """
    return [(j - 1) / (j + 1) for j in range(2, len(steps) + 1)]


def wsm(steps: Steps, shape: Callable[[float], float]) -> list[float]:
    """A learning-rate decay of the given shape on [0, 1], from 1 to 0, as a merge of checkpoints.

    With s_i = shape(i / N) for i = 0 .. N - 1 the weights are c_0 = 1 - s_1, c_i = s_i - s_(i+1),
    c_(N-1) = s_(N-1). Source: warmup-stable-merge, Tian et al. 2025, arXiv 2507.17634.
    Raises `OptionError` for a shape that rises somewhere, which would need negative weights.

    >>> [round(d, 3) for d in wsm(range(4), minus_sqrt)]
    [0.707, 0.816, 0.866]
    """
    count = len(steps)
    values = [1.0, *(shape(i / count) for i in range(1, count)), 0.0]
    shares = [here - after for here, after in pairwise(values)]
    if not min(shares) >= 0:  # NaN fails it too
        raise OptionError("The shape of a learning-rate decay must fall from 1 to 0.")
    return decays_of(shares)


def minus_sqrt(x: float) -> float:
    """The shape 1 - sqrt(x): most of the weight is on the oldest checkpoint.

    >>> minus_sqrt(0.25)
    0.5
    """
    return 1.0 - math.sqrt(x)


def cosine(x: float) -> float:
    """The shape (1 + cos(pi x)) / 2: most of the weight is in the middle.

    >>> cosine(0.5)
    0.5
    """
    return (1.0 + math.cos(math.pi * x)) / 2.0


# --- Schedules that count training steps ---------------------------------------------------------


def dynamic_at_steps(steps: Steps, decay: float) -> list[float]:
    """TensorFlow's dynamic decay at real training steps, the weights held between saves.

    From step a to step b the shadow keeps prod(min(decay, (1 + k) / (10 + k)), k = a + 1 .. b).
    Below the cap that telescopes to ((a + 2) ... (a + 10)) / ((b + 2) ... (b + 10)), so that it
    takes the same time however far apart two saves are. Source: `tf.train.ExponentialMovingAverage`
    with the global step as `num_updates`.

    >>> [round(d, 4) for d in dynamic_at_steps([0, 1, 2, 1000], 0.999)]
    [0.1818, 0.25, 0.0]
    """
    return [_held(before, after, decay) for before, after in pairwise(steps)]


def _held(before: int, after: int, decay: float) -> float:
    """What is kept of the shadow from one training step to another."""
    capped = min(max(before, updates_below_the_cap(decay)), after) if decay < 1 else after
    ramp = math.prod((before + i) / (capped + i) for i in range(2, 11))
    return float(ramp * decay ** (after - capped))


def per_step(steps: Steps, decay_per_step: float) -> list[float]:
    """A constant decay for each training step, d_j = decay_per_step^(t_j - t_(j-1)).

    >>> per_step([0, 1, 3], 0.5)
    [0.5, 0.25]
    """
    return [float(decay_per_step ** (after - before)) for before, after in pairwise(steps)]


def half_life(steps: Steps, half_life: float) -> list[float]:
    """A share halves in `half_life` training steps, d_j = 0.5^((t_j - t_(j-1)) / half_life).

    >>> half_life([0, 1000, 3000], 1000)
    [0.5, 0.25]
    """
    return [0.5 ** ((after - before) / half_life) for before, after in pairwise(steps)]


def power(steps: Steps, sigma_rel: float) -> list[float]:
    """The power-function average, d_j = (1 - (t_j - t_(j-1)) / t_j)^(gamma + 1).

    Its profile over training time is t^gamma, with a standard deviation of `sigma_rel` times the
    length of the run. Source: Karras et al. 2024, arXiv 2312.02696, equation 127. A checkpoint at
    step 0 would get no weight: raises `RefusedError`.

    >>> [round(d, 4) for d in power([1000, 2000, 3000], 0.2)]
    [0.141, 0.3179]
    """
    if steps[0] <= 0:
        raise RefusedError(
            f"The first checkpoint is at step {steps[0]}, which has no weight in the power function"
            " (its time starts above 0).",
            "Leave it out with --from 1.",
        )
    exponent = gamma_of(sigma_rel) + 1
    return [float((before / after) ** exponent) for before, after in pairwise(steps)]


def gamma_of(sigma_rel: float) -> float:
    """The exponent of the power function whose profile has the relative width `sigma_rel`.

    The largest real root of g^3 + 7 g^2 + (16 - r) g + (12 - r) = 0 with r = sigma_rel^-2.
    Source: Karras et al. 2024, arXiv 2312.02696, equation 126 and algorithm 2.

    >>> round(gamma_of(0.10), 6)
    6.937204
    """
    r = sigma_rel**-2
    # Above the largest root the cubic is convex and rising, so Newton's method comes down to it.
    gamma = math.sqrt(r)
    for _ in range(100):
        value = ((gamma + 7) * gamma + (16 - r)) * gamma + (12 - r)
        lower = gamma - value / ((3 * gamma + 14) * gamma + (16 - r))
        if not lower < gamma:
            break
        gamma = lower
    return gamma


def sigma_rel_of(gamma: float) -> float:
    """The relative width of the power function's profile, sqrt((g + 1) / ((g + 2)^2 (g + 3))).

    Source: Karras et al. 2024, arXiv 2312.02696, equation 123.

    >>> round(sigma_rel_of(6.937204), 6)
    0.1
    """
    return math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))


# --- Where the dynamic decay meets its cap -------------------------------------------------------


def first_decay_that_matters(count: int) -> float:
    """The end of the ramp (1 + n) / (10 + n) over `count` checkpoints, at n = count - 1.

    A cap at or above it never binds: only a lower decay changes the weights.

    >>> first_decay_that_matters(10) == 10 / 19
    True
    """
    return count / (count + 9)


def updates_below_the_cap(decay: float) -> int:
    """The largest num_updates at which a cap of `decay` < 1 changes nothing.

    The cap binds for n > (10 * decay - 1) / (1 - decay).

    >>> updates_below_the_cap(0.999), updates_below_the_cap(0.5), updates_below_the_cap(0.05)
    (8990, 8, 0)
    """
    n = math.floor((10 * decay - 1) / (1 - decay) + 1e-6)  # 0.999 is not exact in binary
    return max(n, 0)
