"""The run that docs/inspect.md shows: a walk of eight checkpoints, one of them from elsewhere."""

from collections.abc import Callable
from pathlib import Path

import torch

from tests.makers.tensors import StateDict

STEPS = range(100, 900, 100)
_SIZE = 4000
_FOREIGN = 3  # the number of the checkpoint that belongs to another run


def winding_run(make_run: Callable[..., Path]) -> Path:
    """Write the run, of numbers that no generator of random ones has a say in."""
    place = torch.arange(_SIZE, dtype=torch.float64)
    weights = 20 * torch.sin(place)
    states: list[StateDict] = []
    for number, step in enumerate(STEPS):
        weights = weights + 0.5 * torch.sin(place * (number + 2) + 1) * (1 - step / 1000)
        shown = weights.roll(1) if number == _FOREIGN else weights
        states.append(
            {
                "layers.0.weight": shown[: _SIZE // 2].reshape(-1, 40).float(),
                "layers.1.weight": shown[_SIZE // 2 :].reshape(-1, 40).float(),
                "norm.weight": torch.ones(40) + step / 1e5,
            }
        )
    return make_run(states, STEPS, name="runs")
