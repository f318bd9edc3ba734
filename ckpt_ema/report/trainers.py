"""The table of trainers as text, for `ckpt-ema formats` and the documentation."""

import textwrap

from ckpt_ema.trainers.table import TRAINERS, Trainer

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
            found += _wrapped("  ", trainer.name, width)
            found += _wrapped("      found as  ", trainer.entry, width)
            found += _wrapped("      weights   ", trainer.weights, width)
            for instead in dict.fromkeys(refusal.instead for refusal in trainer.refusals):
                found += _wrapped("      instead   ", instead, width)
        found.append("")
    return found[:-1]


def _wrapped(label: str, text: str, width: int) -> list[str]:
    return textwrap.wrap(
        text,
        width,
        initial_indent=label,
        subsequent_indent=" " * max(4, len(label)),
        break_on_hyphens=False,
    )


def markdown() -> list[str]:
    """Return the table in Markdown."""
    rows = [_row(trainer) for tier in TIERS for trainer in TRAINERS if trainer.tier == tier]
    return ["| Trainer | Found as | Weights | Tier |", "|---|---|---|---|", *rows]


def _row(trainer: Trainer) -> str:
    entry = "`, `".join(trainer.entry.split(", "))
    return f"| {trainer.name} | `{entry}` | {_escaped(trainer.weights)} | {trainer.tier} |"


def _escaped(text: str) -> str:
    """Escape stars and underscores."""
    return text.replace("*", "\\*").replace("_", "\\_")


def described() -> list[dict[str, str]]:
    """Return the table as plain values, ready for JSON."""
    return [
        {"trainer": t.name, "found_as": t.entry, "weights": t.weights, "tier": t.tier}
        for t in TRAINERS
    ]
