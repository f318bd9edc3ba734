"""Greedy soups: checkpoints are added to a uniform average as long as its metric gets no worse.

Source: Wortsman et al. 2022, "Model soups", arXiv 2203.05482, Algorithm 1 ("GreedySoup").
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

Members = tuple[int, ...]


class Tried(NamedTuple):
    """One step: the number of a checkpoint, and the metric of the soup with it."""

    number: int
    value: float | None
    is_kept: bool


def greedy_soup(
    values: Sequence[float | None],
    evaluate: Callable[[Members], float | None],
    *,
    is_minimized: bool,
) -> tuple[Members, list[Tried]]:
    """Return the checkpoints of the soup, by their numbers in ascending order, and every step.

    `values` holds the metric of each checkpoint alone; None leaves a checkpoint out. Checkpoints
    are tried from best to worst, and on a tie the later one first. A checkpoint stays in the soup
    if the uniform average with it is at least as good as without it, as in the paper: a coarse
    metric, such as accuracy on a small set, often ties. `evaluate` takes the numbers of at least
    two checkpoints and returns the metric of their uniform average, or None if it has none.

    >>> points = [1.0, 4.0, 2.0, 6.0]
    >>> def loss(members):
    ...     return abs(sum(points[one] for one in members) / len(members) - 3)
    >>> alone = [loss([one]) for one in range(4)]
    >>> members, steps = greedy_soup(alone, loss, is_minimized=True)
    >>> members, [one.number for one in steps], [one.is_kept for one in steps]
    ((1, 2), [2, 1, 0, 3], [True, True, False, False])
    """
    sign = -1 if is_minimized else 1
    found = {number: value for number, value in enumerate(values) if value is not None}
    order = sorted(found, key=lambda number: (sign * found[number], number), reverse=True)
    if not order:
        return (), []
    first, *others = order
    members: Members = (first,)
    best = sign * found[first]
    steps = [Tried(first, found[first], is_kept=True)]
    for number in others:
        tried = tuple(sorted((*members, number)))
        value = evaluate(tried)
        is_kept = value is not None and sign * value >= best
        if value is not None and is_kept:
            members, best = tried, sign * value
        steps.append(Tried(number, value, is_kept))
    return members, steps
