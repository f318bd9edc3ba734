"""What decays and weights are to each other, and both to a learning rate."""

from collections.abc import Sequence
from itertools import accumulate, pairwise


def weights_of(decays: Sequence[float]) -> list[float]:
    """The share of each of the N checkpoints in the result, from the N - 1 decays d_2 .. d_N.

    w_j = (1 - d_j) * prod(d_k, k > j) and w_1 = prod(d_k, k >= 2); they sum to 1.

    >>> weights_of([0.5, 0.75])
    [0.375, 0.375, 0.25]
    """
    shares = []
    kept = 1.0  # what the folds still to come leave of the present shadow
    for decay in reversed(decays):
        shares.append((1.0 - decay) * kept)
        kept *= decay
    shares.append(kept)
    return shares[::-1]


def decays_of(weights: Sequence[float]) -> list[float]:
    """The decays with which folding gives `weights`, of which none is negative, but for their sum.

    d_j = (w_1 + ... + w_(j-1)) / (w_1 + ... + w_j).

    >>> decays_of([1, 1, 2])
    [0.5, 0.5]
    """
    sums = list(accumulate(weights))
    return [before / after if after else 0.0 for before, after in pairwise(sums)]


def learning_rate(weights: Sequence[float]) -> list[float]:
    """The learning-rate decay that an average imitates: sum(w_k, k >= j) for each checkpoint j.

    What was learnt on the way to checkpoint j is in all later ones, so the average holds this share
    of it. Source: Tian et al. 2025, arXiv 2507.17634.

    >>> learning_rate([0.25, 0.25, 0.5])
    [1.0, 0.75, 0.5]
    """
    return list(accumulate(reversed(weights)))[::-1]
