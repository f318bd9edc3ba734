"""Monitors look at values while these are folded; these are the monitors of every run."""

from ckpt_ema.fold.monitors.nonfinite import NonFinite
from ckpt_ema.fold.monitors.protocol import Monitor, Watched
from ckpt_ema.fold.monitors.twins import Twins
from ckpt_ema.fold.monitors.zeros import Zeros
from ckpt_ema.planning.plan import Plan


def watched(plan: Plan) -> Watched:
    """Return what the monitors of a plan need to know."""
    # Where nothing is averaged, no value tells two checkpoints apart.
    pairs = plan.neighbours if any(span.averaged for span in plan.work.spans) else ()
    names = tuple(checkpoint.name for checkpoint in plan.checkpoints)
    return Watched(names, tuple(pairs), plan.allow_duplicates, plan.allow_nonfinite)


def make_monitors(watched: Watched) -> tuple[Monitor, ...]:
    """Make monitors that have seen nothing yet."""
    return Twins(watched), Zeros(watched), NonFinite(watched)
