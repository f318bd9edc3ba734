"""Decays, weights and learning rates, each computed from another.

Checkpoints are theta_1 .. theta_N, oldest first. The fold is s_1 = theta_1, then
s_j = s_(j-1) - (1 - d_j) * (s_(j-1) - theta_j), so every schedule is a fixed vector of decays
d_2 .. d_N, one for each fold, or of the N weights that they amount to.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise


def weights_of(decays: Sequence[float]) -> list[float]:
    """Return the weight of each of the N checkpoints, from the N - 1 decays d_2 .. d_N.

    w_j = (1 - d_j) * prod(d_k, k > j) and w_1 = prod(d_k, k >= 2); they sum to 1.

    >>> weights_of([0.5, 0.75])
    [0.375, 0.375, 0.25]
    """
    weights = []
    kept = 1.0  # what the folds still to come leave of the present shadow
    for decay in reversed(decays):
        weights.append((1.0 - decay) * kept)
        kept *= decay
    weights.append(kept)
    return weights[::-1]


def decays_of(weights: Sequence[float]) -> list[float]:
    """Return the decays whose fold gives `weights`, none negative, divided by their sum.

    d_j = (w_1 + ... + w_(j-1)) / (w_1 + ... + w_j).

    >>> decays_of([1, 1, 2])
    [0.5, 0.5]
    """
    sums = list(accumulate(weights))
    return [before / after if after else 0.0 for before, after in pairwise(sums)]


def learning_rate(weights: Sequence[float]) -> list[float]:
    """Return the learning-rate decay that an average imitates, sum(w_k, k >= j) for each j.

    What was learnt up to checkpoint j is in all later ones, so the average holds this much of it.
    Source: Tian et al. 2025, arXiv 2507.17634.

    >>> learning_rate([0.25, 0.25, 0.5])
    [1.0, 0.75, 0.5]
    """
    return list(accumulate(reversed(weights)))[::-1]
