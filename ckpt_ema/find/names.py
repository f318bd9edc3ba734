"""What the name of a checkpoint contains: its numbers, and the template of its series."""

import re

from ckpt_ema.trainers import conventions


def stem_of(name: str) -> str:
    """Return a name without the extension of a weights file.

    >>> stem_of("checkpoint-12.pth.tar"), stem_of("checkpoint-12")
    ('checkpoint-12', 'checkpoint-12')
    """
    return conventions.WEIGHTS_EXTENSION.sub("", name)


def numbers_in(stem: str) -> dict[str, int]:
    """Return the numbers in a name by unit: "step", "epoch", "checkpoint" or "number".

    >>> numbers_in("epoch=1-step=100"), numbers_in("checkpoint-1,500"), numbers_in("wer-9.965")
    ({'step': 100, 'epoch': 1}, {'checkpoint': 1500}, {})
    """
    if conventions.COMMIT.search(stem):
        return {}
    stem, found = _without_commas(stem), {}
    for name in conventions.NAMES:
        match = name.search(stem)
        found.update(match.groupdict() if match else {})
    for unit, pattern in conventions.STEP_NAMES.items():
        match = pattern.search(stem)
        if match and unit not in found:
            found[unit] = match[1]
    counts = {u: count_of(found[u]) for u in conventions.STEP_NAMES if u in found}
    return {unit: count for unit, count in counts.items() if count is not None}


def _without_commas(stem: str) -> str:
    """Return a name without the commas in numbers such as 10,000."""
    return re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", stem)


def count_of(text: str) -> int | None:
    """Return the integer that a text is or contains with a magnitude; None for a fraction.

    >>> count_of("0100"), count_of("800k"), count_of("tokens-1.5T"), count_of("1e4")
    (100, 800000, 1500000000000, 10000)
    """
    match = conventions.MAGNITUDE.search(text)
    if not match:
        return int(text)
    digits, decimals, letter, power = match.groups(default="")
    zeros = int(power or 3 * (1 + "kmbt".index(letter.lower()))) - len(decimals)
    return None if zeros < 0 else int(digits + decimals + "0" * zeros)


def magnitudes_in(stem: str) -> list[str]:
    """Return the magnitudes of the numbers in a name.

    >>> magnitudes_in("step-240k-token-2T"), magnitudes_in("step-100")
    (['k', 't'], [])
    """
    found = conventions.MAGNITUDE.finditer(stem)
    return [(match[3] or "e").lower() for match in found]


def rounding_of(count: int, stem: str) -> int:
    """Return how far a number in a name may be from the exact one, its last digit.

    >>> rounding_of(955000, "step-955k"), rounding_of(955000, "step-955000")
    (1000, 0)
    """
    if not magnitudes_in(stem):
        return 0
    return int("1" + "0" * (len(str(count)) - len(str(count).rstrip("0"))))


def slots_in(stem: str) -> list[int]:
    """Return every integer in a name, without decimals and values of metrics.

    >>> slots_in("Llama-3.1-8B-lora-000010"), slots_in("epoch=3-acc=1"), slots_in("net-2k")
    ([8000000000, 10], [3], [2000])
    """
    bare = conventions.METRIC.sub("", _without_commas(stem))
    counts = (count_of(m[0]) for m in conventions.COUNT.finditer(bare) if not m["f"])
    return [count for count in counts if count is not None]


def template_of(stem: str) -> str:
    """Return a name with its numbers left open: names of one template are one series.

    A number that identifies a run, such as a seed, is kept if the name has another number.

    >>> template_of("epoch=1-step=100"), template_of("net-0.5-12"), template_of("stage2-step100")
    ('epoch=<n>-step=<n>', 'net-<f>-<n>', 'stage2-step<n>')
    >>> template_of("epoch=1-loss=-3e-05"), template_of("step-2k-1.5T-token-2T")
    ('epoch=<n>-loss=<f>', 'step-<n>-<n>-<n>')
    """
    stem = _without_commas(stem)
    stem = conventions.METRIC.sub(lambda match: f"{match['name']}=<f>", stem)
    words = conventions.NUMBERS_A_RUN if len(slots_in(stem)) > 1 else r"(?!)"
    return re.sub(
        rf"(?P<run>{words})|{conventions.COUNT.pattern}",
        lambda match: match[0] if match["run"] else "<f>" if match["f"] else "<n>",
        stem,
        flags=re.IGNORECASE,
    )


def pattern_of(template: str, name: str) -> str:
    """Return a `--pattern` that matches the names of one template; `name` is one of them.

    >>> pattern_of("step_<n>", "step_100.pt")
    '^step_(\\\\d+)\\\\.pt$'
    """
    word, number = "", r"\d+"
    if conventions.MAGNITUDE.search(name):
        word, number = "(?:tokens?[-_]?)?", r"[\d.]+(?:[kKmMbBtT]|e\d+)?"
    number = f"{word}({number})" if template.count("<n>") == 1 else word + number
    parts = re.split("(<n>|<f>)", template)
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


def bare_of(template: str) -> str:
    """Return a template without its numbers and the words that go with them.

    >>> bare_of("lora-<n>"), bare_of("lora-step<n>"), bare_of("<n>_adapters"), bare_of("step_<n>")
    ('lora', 'lora', 'adapters', '')
    """
    return _NUMBER.sub("", template)


def is_unnumbered_of(stem: str, template: str) -> bool:
    """Return whether a name is that of a series with one number left out.

    >>> is_unnumbered_of("lora", "lora-<n>"), is_unnumbered_of("vae", "lora-<n>")
    (True, False)
    >>> is_unnumbered_of("resnet50", "resnet<n>_epoch_<n>")
    True
    """
    own = template_of(stem)
    return any(
        own == (template[: number.start()] + template[number.end() :]).strip("-_=.") != ""
        for number in _NUMBER.finditer(template)
    )


def captures_step(pattern: str | None) -> bool:
    """Return whether a `--pattern` has a group, which is the step.

    >>> captures_step("step_([0-9]+)"), captures_step("^step"), captures_step(None)
    (True, False, False)
    """
    return re.compile(pattern or "").groups > 0
