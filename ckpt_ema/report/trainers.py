"""The table of trainers as text, for `ckpt-ema formats` and the documentation."""

import textwrap

from ckpt_ema.trainers.table import TRAINERS

TIERS = {
    "1": "supported",
    "2": "supported, tested less often",
    "R": "recognised and refused, with what to do instead",
    "N": "recognised, out of scope",
}


def lines(width: int) -> list[str]:
    """Return the table for a terminal of `width` columns, tier by tier."""
    found = []
    for tier, meaning in TIERS.items():
        found += [f"{meaning}:", ""]
        for trainer in (trainer for trainer in TRAINERS if trainer.tier == tier):
            instead = dict.fromkeys(refusal.instead for refusal in trainer.refusals)
            for label, text in (
                ("  ", trainer.name),
                ("      found as  ", trainer.entry),
                ("      weights   ", trainer.weights),
                *(("      instead   ", text) for text in instead),
                *(("      written back as  ", text) for text in [trainer.written_back] if text),
            ):
                rest = " " * max(4, len(label))
                found += textwrap.TextWrapper(width, label, rest, break_on_hyphens=False).wrap(text)
        found.append("")
    return found[:-1]


def markdown() -> list[str]:
    """Return the table in Markdown."""
    found = ["| Trainer | Found as | Weights | Written back as | Tier |", "|---|---|---|---|---|"]
    for tier in TIERS:
        for trainer in (trainer for trainer in TRAINERS if trainer.tier == tier):
            entry = "`, `".join(trainer.entry.split(", "))
            weights = trainer.weights.replace("*", "\\*").replace("_", "\\_")
            copy = trainer.written_back or "-"
            found.append(f"| {trainer.name} | `{entry}` | {weights} | {copy} | {tier} |")
    return found


def described() -> list[dict[str, str]]:
    """Return the table as plain values, ready for JSON."""
    return [
        {
            "trainer": t.name,
            "found_as": t.entry,
            "weights": t.weights,
            "written_back_as": t.written_back,
            "tier": t.tier,
        }
        for t in TRAINERS
    ]
