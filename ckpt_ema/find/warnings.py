"""Warnings about the entries of a run that are left out in doubt, or placed by what they record."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from ckpt_ema.errors import Code, some
from ckpt_ema.find.candidates import Candidates
from ckpt_ema.find.checkpoint import STEP_UNITS, Checkpoint
from ckpt_ema.find.entries import Entry, Verdicts
from ckpt_ema.find.names import stem_of, template_of
from ckpt_ema.find.verdict import Reason
from ckpt_ema.notices import Notice
from ckpt_ema.trainers import conventions


def warnings_about(
    verdicts: Verdicts,
    steps: Sequence[Entry],
    newest: Checkpoint,
    appended: Sequence[Checkpoint],
    lacking: Mapping[Entry, str],
) -> Iterator[Notice]:
    """Yield warnings about entries left out in doubt and those placed after the newest step."""
    templates = {entry.template for entry in steps}
    units = STEP_UNITS if newest.unit in STEP_UNITS else (newest.unit,)
    of_reason = defaultdict(list)
    for entry, verdict in verdicts.items():
        of_reason[verdict.reason].append(entry)
    for why in dict.fromkeys(lacking.values()):
        paths = [entry.path for entry, each in lacking.items() if each == why]
        text = f"{paths[0]} {why} and is left out: unfinished save?"
        if len(paths) > 1:
            text = f"{some(path.name for path in paths)} are left out, as each {why}."
        yield Notice(Code.INCOMPLETE, text)
    numbers = {(entry.template, *entry.slots) for entry in steps}
    beside = [e for e in of_reason[Reason.BESIDE_FILE] if (e.template, *e.slots) not in numbers]
    lone = [*of_reason[Reason.ONLY_ONE], *beside]
    if lone:
        later = [e for e in lone if any(e.numbers.get(u, 0) > (newest.step or 0) for u in units)]
        then = f"; {later[0].name} seems to be later than {newest.name}" if later else ""
        text = (
            f"No other name is like {some(entry.name for entry in lone)}, left out of the average"
            f"{then}. Take it in with --pattern, or confirm with --exclude."
        )
        yield Notice(Code.LEFT_OUT, text)
    for one in appended:
        if template_of(stem_of(one.name)) in templates:
            text = f"puts it after {newest.name}, although its name has a number."
            yield Notice(Code.OUT_OF_ORDER, f"--append {one.name} {text}")
    for entry, verdict in verdicts.items():
        about = _ABOUT_ALIASES.get(verdict.reason)
        if about and not (verdict.reason is Reason.ANOTHER_MODEL and entry.is_folder):
            code = _CODES.get(verdict.reason, Code.LEFT_OUT)
            yield Notice(code, about.format(name=entry.name, detail=verdict.detail))


_ABOUT_ALIASES = {
    Reason.INCOMPLETE: "{name} is left out, {detail}.",
    Reason.UNREADABLE: "{name} may be a later step and is left out, {detail}",
    Reason.OWN_MODEL_UNLIKE: (
        "{name} in the run's folder is left out, and is not the model of any checkpoint; add it as"
        " the last step with --append {name}, or confirm with --exclude {name}."
    ),
    Reason.ANOTHER_MODEL: (
        "{name} is left out, since its tensors are not those of the checkpoints; confirm with"
        " --exclude {name}."
    ),
}
_CODES = {Reason.ANOTHER_MODEL: Code.OTHER_WEIGHTS}


def beside_container(candidates: Candidates) -> list[Notice]:
    """Return a warning of models beside the folder of checkpoints, which are not opened."""
    names = [e.name for e in candidates.unnumbered if conventions.ALIAS.search(e.stem)]
    if not names:
        return []
    text = (
        f"{candidates.folder} also holds {some(names)}, outside its folder of checkpoints; if that"
        f" is a later step, add it with --append {names[0]}."
    )
    return [Notice(Code.LEFT_OUT, text)]
