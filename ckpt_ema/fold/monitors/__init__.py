"""Monitors look at values while these are folded; these are the monitors of every run."""

from collections.abc import Callable

from ckpt_ema.fold.monitors.checksums import Checksums
from ckpt_ema.fold.monitors.digests import Digests
from ckpt_ema.fold.monitors.factors import Factors
from ckpt_ema.fold.monitors.nonfinite import NonFinite
from ckpt_ema.fold.monitors.norms import Norms
from ckpt_ema.fold.monitors.protocol import Monitor, Watched
from ckpt_ema.fold.monitors.twins import Twins
from ckpt_ema.fold.monitors.two_values import TwoValues
from ckpt_ema.fold.monitors.zeros import Zeros
from ckpt_ema.planning.plan import Plan
from ckpt_ema.schedules.weights import weights_of

KINDS: tuple[Callable[[Watched], Monitor], ...] = (
    *(Twins, Zeros, NonFinite),
    *(Norms, TwoValues, Factors),  # what a value means
    *(Digests, Checksums),  # what is written, and whether a state is what was
)


def watched(plan: Plan) -> Watched:
    """Return what the monitors of a plan need to know."""
    # Where nothing is averaged, no value tells two checkpoints apart.
    pairs = plan.neighbours if any(span.averaged for span in plan.work.spans) else ()
    names = tuple(checkpoint.name for checkpoint in plan.inputs)
    return Watched(
        names,
        tuple(pairs),
        tuple(tuple(weights_of(average.folding.decays)) for average in plan.averages),
        plan.reading.allow_duplicates,
        plan.reading.allow_nonfinite,
        plan.reading.allow_zeros,
        plan.engine.strict,
        tuple((str(state.path), state.checksum) for state in plan.states),
        len(plan.foldings) if plan.keeps_state else 0,
    )


def make_monitors(watched: Watched) -> tuple[Monitor, ...]:
    """Make monitors that have seen nothing yet."""
    return tuple(kind(watched) for kind in KINDS)
