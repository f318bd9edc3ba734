"""The model card: the README.md of an output, which documents what was averaged and how.

The YAML front matter of the run's own card (licence, base model, language) is kept, tags are added,
and evaluation results, which belong to other model weights, are removed.
"""

import contextlib
import json
import re
from pathlib import Path

from ckpt_ema.errors import RefusedError, escaped, printable
from ckpt_ema.find.entries import json_object
from ckpt_ema.planning.average import Average
from ckpt_ema.planning.plan import Plan
from ckpt_ema.report.table import markdown_lines
from ckpt_ema.schedules.rules import ALONE
from ckpt_ema.trainers.conventions import CARD_NAME

TAGS = ("weight-averaging", "ckpt-ema")

_FRONT_MATTER = re.compile(r"\A---[ \t]*\n(?P<yaml>(?:.*\n)*?)(?:---|\.\.\.)[ \t]*(?:\n|\Z)")
_MOST_BYTES = 1 << 20
# Evaluation results of the model that the card was written for.
_RESULTS = re.compile(r"""^(["']?)model-index\1[ \t]*:.*\n(?:[ \t#-].*\n|\n)*""", re.MULTILINE)
_TAGS = re.compile(
    r"""^(["']?)tags\1[ \t]*:[ \t]*(?P<value>.*)\n(?P<items>(?:[ \t]*-.*\n)*)""", re.MULTILINE
)


def card(
    plan: Plan, average: Average, command: str | None, picture: str | None, evaluation: str = ""
) -> str:
    """Return the card of one average, in Markdown.

    `command` is the command that made it, if any; `picture` names a file in the same folder;
    `evaluation` is what was measured, in Markdown.
    """
    statistics, unit = average.statistics, average.unit
    run = Path(plan.run).name or plan.run
    title = re.sub(r"([\\`*_{}\[\]<>#|])", r"\\\1", printable(average.output.path.name))
    drawn = f"![The weight of each checkpoint]({picture})\n\n" if picture else ""
    called = f"```console\n$ {escaped(command)}\n```\n\n" if command else ""
    table = "\n".join(markdown_lines(plan, [average]))
    return f"""---
{front_matter(_own_card(plan, average))}---

# {title}

{_made_of(average)} of `{printable(run)}`, made with ckpt-ema, without further training.

- weights: {average.text}
- effective number of checkpoints: {statistics.effective_number:.1f}
- mean age: {statistics.mean_age:.4g} {unit}

{drawn}{table}

{evaluation}{called}See `ckpt_ema.json` for the full record.
"""


def _made_of(average: Average) -> str:
    if average.rule.schedule == ALONE:
        return "Copy of one checkpoint"
    return f"Weighted average of {len(average.members)} checkpoints"


def front_matter(original: str) -> str:
    """Return the YAML for the top of a card, from the text of the run's own card.

    >>> front_matter("---\\nlicense: mit\\ntags: [a]\\n---\\n# Title")
    'license: mit\\ntags: [weight-averaging, ckpt-ema, a]\\n'
    """
    found = _FRONT_MATTER.match(original.replace("\r\n", "\n"))
    yaml = _RESULTS.sub("", _in_lines(found["yaml"])) if found else ""
    tags = _TAGS.search(yaml)
    if not tags:
        return yaml + "tags:\n" + "".join(f"- {tag}\n" for tag in TAGS)
    value, items = tags["value"].strip(), tags["items"]
    new = [tag for tag in TAGS if not re.search(rf"[\[, '\"]{tag}['\"]?\s*(?:[,\]\n]|$)", tags[0])]
    if value.startswith("["):
        rest = value[1:].lstrip()
        listed = ", ".join(new) + (", " if new and not rest.startswith("]") else "")
        replacement = f"tags: [{listed}{rest}\n"
    else:
        indent = re.match(r"[ \t]*", items)
        own = [] if value in ("", "null", "~") or value.startswith("#") else [value]
        lines = "".join(f"{indent[0] if indent else ''}- {tag}\n" for tag in [*new, *own])
        replacement = f"tags:\n{lines}{items}"
    return yaml[: tags.start()] + replacement + yaml[tags.end() :]


def _in_lines(yaml: str) -> str:
    """Return YAML with a line for each key; a mapping in braces is read as JSON."""
    if not yaml.lstrip().startswith("{"):
        return yaml
    fields = json_object(yaml).items()
    return "".join(f"{json.dumps(key)}: {json.dumps(value)}\n" for key, value in fields)


def _own_card(plan: Plan, average: Average) -> str:
    """Return the text of the newest checkpoint's card, or of the run's."""
    for folder in (plan.checkpoints[average.newest].folder, Path(plan.run)):
        with contextlib.suppress(RefusedError, UnicodeDecodeError):
            content = plan.storage.read(folder / CARD_NAME, _MOST_BYTES + 1)
            if content is not None and len(content) <= _MOST_BYTES:
                return content.decode("utf-8-sig")
    return ""
