"""Warnings and notes about the weights and the run, each with what would change it."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from ckpt_ema.containers.model_key import ALREADY_AVERAGED
from ckpt_ema.containers.specs import WRITTEN_AS, Role, Specs
from ckpt_ema.errors import Code, some
from ckpt_ema.find.checkpoint import Checkpoint, Found
from ckpt_ema.find.logs import OneRun
from ckpt_ema.find.names import stem_of
from ckpt_ema.find.select import Subsets
from ckpt_ema.find.verdict import UNSELECTED
from ckpt_ema.find.verdict import Reason as FindReason
from ckpt_ema.notices import Notice
from ckpt_ema.planning.average import Average
from ckpt_ema.planning.output import LaidOut
from ckpt_ema.planning.roles import Reason, Ruling, distinct
from ckpt_ema.planning.same_model import Compared
from ckpt_ema.schedules import dynamic
from ckpt_ema.schedules.by_step import sigma_rel_of
from ckpt_ema.schedules.rules import ALONE, EXPLICIT, short
from ckpt_ema.trainers import conventions

# How much longer than usual a gap may be.
_MOST_GAP = 1.5
# A weight above which one checkpoint is nearly the whole average.
_NEARLY_ALL = 0.95
# Copies and downloads finish in any order; runs are further apart than this.
_INVERSION_NS = 3600 * 10**9
# With so few, the trainer has often removed the others.
_FEW = 4


class Decided(NamedTuple):
    """What the stages of a plan have found and decided."""

    checkpoints: Sequence[Checkpoint]  # that some average has a share of, oldest first
    found: Found
    selected: Subsets
    one_run: OneRun
    compared: Compared
    rulings: Mapping[str, Ruling]  # on each tensor of the newest checkpoint
    laid_out: LaidOut
    averages: Sequence[Average]


def plan_warnings(decided: Decided) -> Iterator[Notice]:
    """Yield the warnings about the run, the weights, the checkpoints that take part, the output.

    Times of files are not asked where logs prove that all checkpoints are of one run.
    """
    checkpoints, found, selected, one_run, compared, rulings, laid_out, averages = decided
    yield from (*found.warnings, *selected.warnings)
    names = [checkpoint.name for checkpoint in checkpoints]
    yield from _merged(averages, lambda average: _uneven(average, names))
    alike: dict[object, list[str]] = {}
    for average in averages:
        alike.setdefault((average.members, average.weights), []).append(average.name)
    for same in alike.values():
        if len(same) > 1:
            yield Notice(Code.SAME_WEIGHTS, f"{some(same)} have the same weights.")
    yield from one_run.warnings
    if not one_run.is_proven:
        yield from _falling_times(compared.specs)
    yield from _about_run(compared.specs)
    yield from compared.warnings
    yield from _share_not_averaged(list(compared.specs.values())[-1], rulings)
    if laid_out.missing:
        message = f"{some(laid_out.missing)} is neither in the newest checkpoint nor in the run"
        effect = "so from_pretrained cannot load the average; --config-from FOLDER adds it"
        yield Notice(Code.NO_CONFIG, f"{message}, {effect}.")


def plan_notes(decided: Decided) -> Iterator[Notice]:
    """Yield notes on options without effect, on the run, and on what is not averaged."""
    checkpoints, found, selected, _, compared, rulings, laid_out, averages = decided
    for one in found.judged:
        if one.verdict.reason is FindReason.LATER:
            message = f"{one.name} is used as the last step: it {one.verdict.detail}."
            yield Notice(Code.DECIDED, message)
    yield from selected.notes
    yield from _merged(averages, _cap)
    yield from compared.notes
    specs_of = compared.specs
    newest = list(specs_of)[-1]
    unselected = [one for one in found.left_out if one.verdict.reason in UNSELECTED]
    found_in_all = max(len(found.checkpoints), len(checkpoints)) + len(unselected)
    if 1 < found_in_all <= _FEW and not newest.is_given:
        remedy = "raise its limit (save_total_limit, save_top_k, max_history)"
        message = f"Only {found_in_all} checkpoints; if the trainer removed older ones, {remedy}."
        yield Notice(Code.FEW_CHECKPOINTS, message)
    if len(specs_of) > 1 and newest.unit == "save":
        message = "Numbers in the names count saves, not steps (accelerate); gaps are unknown."
        yield Notice(Code.NO_STEPS, message)
    doubles = [k for k, one in specs_of[newest].tensors.items() if one.dtype in WRITTEN_AS]
    if doubles:
        message = "are written as complex64, the only complex dtype of safetensors"
        yield Notice(Code.DECIDED, f"{some(doubles, 3)} {message}.")
    yield from _kept(newest.name, specs_of[newest], rulings)
    yield from dict.fromkeys(note for one in specs_of.values() for note in one.notes)
    adapters = conventions.may_be_of_adapters(rulings)
    if any(pattern.search(key) for pattern in conventions.FACTORS for key in adapters):
        message = "The factors of the adapter are averaged one by one, which approximates the"
        message = f"{message} average of their products; reading them shows how closely."
        yield Notice(Code.ADAPTER_FACTORS, message)
    if laid_out.other_models:
        message = f"Folders with other models are not copied: {some(laid_out.other_models)}."
        yield Notice(Code.LEFT_OUT, message)


def _kept(name: str, newest: Specs, rulings: Mapping[str, Ruling]) -> Iterator[Notice]:
    """Note the tensors that keep the newest value, by what they are."""
    kept: dict[str, list[str]] = {}
    is_any = any(one.made is Role.KEPT for one in distinct(rulings))
    for key, (rule, made) in rulings.items() if is_any else ():
        if made is Role.KEPT:
            dtype = newest.tensors[key].dtype
            is_other = rule.reason is Reason.NOT_FLOAT
            what = f"{dtype} tensors" if is_other else rule.reason.value.capitalize()
            kept.setdefault(what, []).append(key)
    for what, names in kept.items():
        message = f"{what} are not averaged and keep the value of {name}: {some(names)}."
        yield Notice(Code.NOT_AVERAGED, message)


def _share_not_averaged(newest: Specs, rulings: Mapping[str, Ruling]) -> Iterator[Notice]:
    """Warn of integers that change as weights do, with their share of the elements."""
    if not any(one.rule.reason is Reason.CHANGING for one in distinct(rulings)):
        return
    counts = Counter[Reason]()
    for name, (rule, made) in rulings.items():
        if made is Role.AVERAGED or rule.reason is Reason.CHANGING:
            counts[rule.reason] += math.prod(newest.tensors[name].shape)
    share = counts[Reason.CHANGING] / counts.total()
    names = [name for name, one in rulings.items() if one.rule.reason is Reason.CHANGING]
    message = f"{some(names, 3)} hold integers that change in training, {share:.1%} of all"
    message = f"{message} elements: they are not averaged and keep the newest value."
    yield Notice(Code.NOT_AVERAGED, message)


def _merged(
    averages: Sequence[Average], find: Callable[[Average], Iterable[Notice]]
) -> list[Notice]:
    """Return each notice once; of several averages, with the names of those it is about."""
    about: dict[Notice, list[str]] = {}
    for average in averages:
        for notice in find(average):
            about.setdefault(notice, []).append(average.name)
    if len(averages) == 1:
        return list(about)
    return [Notice(one.code, f"{some(about[one], 3)}: {one.message}") for one in about]


def _cap(average: Average) -> Iterator[Notice]:
    """Note a cap of the decay that is never reached."""
    schedule = average.rule.schedule
    if schedule not in ("dynamic", "warmup") or len(average.members) == 1:
        return
    decay = average.rule.numbers["decay"]
    at_steps = average.rule.counts_steps
    count = average.steps[-1] if at_steps else len(average.members)
    unit = average.unit if at_steps else "checkpoints"
    first, effective = max(average.decays), ""
    if schedule == "dynamic":
        first = dynamic.first_decay_that_matters(count + at_steps)
        if decay < 1:
            below = dynamic.updates_below_the_cap(decay)
            after = f"{unit.removesuffix('s')} {below}" if at_steps else f"{below + 1} {unit}"
            effective = f" ({short(decay)} takes effect after {after})"
    if decay > first or (decay == first and schedule == "dynamic"):
        remedy = f"use less than {first:.4g}, or --half-life{effective}"
        message = f"--decay {short(decay)} has no effect with {count} {unit}; {remedy}."
        yield Notice(Code.NO_EFFECT, message)


def _uneven(average: Average, names: Sequence[str]) -> Iterator[Notice]:
    """Warn of nearly all weight on one checkpoint, and of gaps that the weights disregard."""
    weights = average.weights
    if average.rule.schedule == ALONE:
        return
    if len(weights) == 1:
        yield Notice(Code.FEW_CHECKPOINTS, "Only one checkpoint, so the average equals it.")
    elif average.rule.schedule != EXPLICIT:
        if weights[0] > 0.5:
            remedy = _remedy(0.5, average, 0, "below", "less than half")
            yield _too_much("oldest", names[average.members[0]], weights[0], remedy)
        if weights[-1] > _NEARLY_ALL:
            remedy = _remedy(1 - _NEARLY_ALL, average, -2, "above", "the others have more")
            yield _too_much("newest", names[average.newest], weights[-1], remedy)
        if not average.rule.counts_steps:
            yield from _irregular(average, names)


def _too_much(which: str, name: str, weight: float, remedy: str) -> Notice:
    message = f"The {which} checkpoint, {name}, has {weight:.1%} of the weight{remedy}."
    return Notice(Code.UNEVEN_WEIGHTS, message)


def _irregular(average: Average, names: Sequence[str]) -> Iterator[Notice]:
    """Warn if weights count checkpoints that are not equally far apart."""
    known = [gap for gap in average.gaps if gap is not None]
    middle = len(known) // 2  # as statistics.median, which takes 4 ms to import
    median = sum(sorted(known)[one] for one in (middle, ~middle)) / 2 if known else 0
    if average.unit == "checkpoints" or max(known) <= _MOST_GAP * median:
        return
    longest = average.gaps.index(max(known))
    before, after = (names[average.members[n]] for n in (longest - 1, longest))
    age, unit = average.statistics.half_life, average.unit
    remedy = f"; --half-life {_brief(age)} counts {unit} and has the same mean age" if age else ""
    found = f"{max(known)} {unit} from {before} to {after}, median {median:g}"
    message = f"Weights count checkpoints, but their gaps differ: {found}{remedy}."
    yield Notice(Code.UNEVEN_GAPS, message)


def _remedy(share: float, average: Average, since: int, side: str, effect: str) -> str:
    """Return the option that leaves `share` of the shadow after `since`; empty if none would."""
    span = average.steps[-1] - average.steps[since]
    folds = len(average.steps[since:]) - 1
    schedule, option = average.rule.schedule, ""
    # The ramp of a dynamic decay lies above `share` from the first fold on.
    is_one_fold = schedule == "dynamic" and folds == 1 and not average.rule.counts_steps
    if schedule == "constant" or is_one_fold:
        option = f"--decay {side} {share ** (1 / folds):.4g}"
    elif schedule == "per-step":
        option = f"--decay-per-step {side} {share ** (1 / span):.6g}"
    elif schedule == "half-life":
        option = f"--half-life {side} {_brief(span * math.log(0.5) / math.log(share))}"
    elif schedule == "power":
        ratio = average.steps[since] / average.steps[-1]
        gamma = math.log(share) / math.log(ratio) - 1
        option = f"--sigma-rel {side} {sigma_rel_of(gamma):.3g}" if gamma > 0 else ""
    return option and f"; with {option}, {effect}"


def _brief(steps: float) -> str:
    """Write a number of steps, to the step where there are many."""
    return f"{steps:.4g}" if steps < 1000 else f"{steps:.0f}"


def _falling_times(specs_of: Mapping[Checkpoint, Specs]) -> Iterator[Notice]:
    for (earlier, before), (later, after) in pairwise(specs_of.items()):
        if before.files[0].mtime_ns - after.files[0].mtime_ns > _INVERSION_NS:
            found = f"{later.name} was written before {earlier.name}, though its step is later"
            yield Notice(Code.OUT_OF_ORDER, f"{found}; the folder may hold two runs.")
            break


def _about_run(specs_of: Mapping[Checkpoint, Specs]) -> Iterator[Notice]:
    specs = list(specs_of.values())
    adapters = conventions.may_be_of_adapters(specs[-1].tensors)
    if any(map(conventions.OTHER_FACTOR.search, adapters)):
        message = (
            "This adapter is not linear in its tensors, which are averaged one by one; how far"
        )
        message = f"{message} that is from the average of the adapted weights is not known. Merge"
        message = f"{message} each adapter into its base model and average those."
        yield Notice(Code.ADAPTER_FACTORS, message)
    by_name = [
        c.name
        for c, one in specs_of.items()
        if conventions.AVERAGED_NAME.search(stem_of(c.name)) and not one.is_average
    ]
    key = conventions.PROVENANCE_KEY
    by_header = [c.name for c, one in specs_of.items() if any(key in own for own in one.metadata)]
    for how, names in (("By their names", by_name), ("By their headers", by_header)):
        if names:
            message = f"{how}, {some(names, 2)} {ALREADY_AVERAGED}."
            yield Notice(Code.ALREADY_AVERAGED, message)
    yield from dict.fromkeys(warning for one in specs for warning in one.warnings)
    holes = {path: hole for one in specs for path, hole in one.holes.items()}
    for path, offset in list(holes.items())[:1]:
        more = f" (and {len(holes) - 1} more files)" if len(holes) > 1 else ""
        found = f"{path}{more} has a hole at byte {offset}, which reads as zeros"
        yield Notice(Code.HOLES, f"{found}: an interrupted save, or a sparse copy.")
