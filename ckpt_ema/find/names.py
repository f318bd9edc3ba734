"""What the name of a checkpoint says: its step, its series, whether it is a step at all."""

import re

from ckpt_ema.trainers import conventions


def stem_of(name: str) -> str:
    """A name without the extension of a weights file.

    >>> stem_of("checkpoint-12.pth.tar"), stem_of("checkpoint-12")
    ('checkpoint-12', 'checkpoint-12')
    """
    return conventions.WEIGHTS_EXTENSION.sub("", name)


def numbers_in(stem: str) -> dict[str, int]:
    """The numbers in a name by what they count: "step", "epoch", "checkpoint" or "number".

    >>> numbers_in("epoch=1-step=100"), numbers_in("checkpoint-500"), numbers_in("wer-9.965")
    ({'step': 100, 'epoch': 1}, {'checkpoint': 500}, {})
    """
    if conventions.COMMIT.search(stem):
        return {}
    pair = conventions.EPOCH_AND_STEP.search(stem)
    if pair:
        return {"step": int(pair[2]), "epoch": int(pair[1])}
    found = {}
    for unit, pattern in conventions.STEP_NAMES.items():
        match = pattern.search(stem)
        if match:
            found[unit] = int(next(group for group in match.groups() if group))
    return found


def slots_in(stem: str) -> list[int]:
    """Every integer in a name; decimals and the values of metrics are left out.

    >>> slots_in("Llama-3.1-8B-lora-000010"), slots_in("epoch=3-acc=1")
    ([8, 10], [3])
    """
    bare = conventions.METRIC.sub("", stem)
    return [int(digits) for digits in re.findall(r"\d+", re.sub(r"\d+\.\d+", "", bare))]


def form_of(stem: str) -> str:
    """A name with its numbers left open: those of one form are one series.

    What numbers a run and not a moment of it stays, where the name has another number.

    >>> form_of("epoch=1-step=100"), form_of("net-0.5-12"), form_of("stage2-step100")
    ('epoch=<n>-step=<n>', 'net-<f>-<n>', 'stage2-step<n>')
    >>> form_of("epoch=1-loss=-3e-05")
    'epoch=<n>-loss=<f>'
    """
    stem = conventions.METRIC.sub(lambda match: f"{match['name']}=<f>", stem)
    words = conventions.NUMBERS_A_RUN if len(slots_in(stem)) > 1 else r"(?!)"
    return re.sub(
        rf"(?P<run>{words})|(?P<f>\d+\.\d+)|(?P<n>\d+)",
        lambda match: match[0] if match["run"] else f"<{match.lastgroup}>",
        stem,
    )


def pattern_of(form: str, name: str) -> str:
    """A `--pattern` that matches the names of one form; `name` is one of them.

    >>> pattern_of("step_<n>", "step_100.pt")
    '^step_(\\\\d+)\\\\.pt$'
    """
    number = r"(\d+)" if form.count("<n>") == 1 else r"\d+"
    parts = re.split("(<n>|<f>)", form)
    known = {"<n>": number, "<f>": r"\d+\.\d+"}
    extension = name[len(stem_of(name)) :]
    return f"^{''.join(known.get(p) or _escaped(p) for p in parts)}{_escaped(extension)}$"


def _escaped(text: str) -> str:
    return re.sub(r"([.^$*+?{}\[\]\\|()])", r"\\\1", text)


_NUMBER = re.compile(
    r"[-_=.]?(?:(?<![a-z])at-)?(?:global_?step|step|iteration|iter|epoch|ep|checkpoint)?"
    r"[-_=]?<n>[-_]?",
    re.IGNORECASE,
)


def bare_of(form: str) -> str:
    """The name of a series without its numbers and the words that go with them.

    >>> bare_of("lora-<n>"), bare_of("lora-step<n>"), bare_of("<n>_adapters"), bare_of("step_<n>")
    ('lora', 'lora', 'adapters', '')
    """
    return _NUMBER.sub("", form)


def is_unnumbered_of(stem: str, form: str) -> bool:
    """Whether a name is that of a series with one number left out.

    >>> is_unnumbered_of("lora", "lora-<n>"), is_unnumbered_of("vae", "lora-<n>")
    (True, False)
    >>> is_unnumbered_of("resnet50", "resnet<n>_epoch_<n>")
    True
    """
    own = form_of(stem)
    return any(
        own == (form[: number.start()] + form[number.end() :]).strip("-_=.") != ""
        for number in _NUMBER.finditer(form)
    )


def why_not_a_step(name: str, stem: str) -> str | None:
    """Why an entry of a run is no step, by its name; None if it may be one."""
    # A folder's name has no extension: what looks like one ("tmp.5.tmp") is part of the name.
    for reason, pattern in conventions.NOT_A_STEP.items():
        if pattern.search(name) or (stem != name and pattern.search(stem)):
            return reason
    return None
