"""Print docs/options.md, made from the table of options.

python scripts/write_options.py > docs/options.md
"""

from itertools import groupby

from ckpt_ema.cli.average import average
from ckpt_ema.cli.options import rows_of
from ckpt_ema.cli.select import select
from ckpt_ema.options import CHECKPOINTS, COMMON, ENGINE, EVALUATION, MODEL, OUTPUT, SCHEDULE, Row
from ckpt_ema.schedules.rules import OPTIONS, SYNONYMS
from ckpt_ema.values import FLAG

_INTRODUCTION = """# Options

`ckpt-ema average` and `ckpt-ema plan` take the options below; `ckpt_ema.average` and
`ckpt_ema.plan` take them as keyword arguments, as the text of the command line or as Python values.
Each can also be set by an environment variable, `CKPT_EMA_` and the option's name in capitals:
`CKPT_EMA_DECAY`, `CKPT_EMA_HALF_LIFE`. Flags are set by `1` and unset by `0`; names and globs that
can be repeated are separated by spaces. The command line takes precedence.

This file is written by `scripts/write_options.py` from the table of options in the code."""
_ABOUT = {
    COMMON: "Every value of `--decay`, `--half-life`, `--sigma-rel`, `--decay-per-step`, `--last`"
    " and `--best` makes an average of its own, all in one pass over the checkpoints:"
    " `--half-life 500,2000 --last 4,8` makes four. Each is then in a folder of its own name below"
    " the output.",
    SCHEDULE: "Without `--schedule`, the options given select one: `--half-life`,"
    " `--decay-per-step`, `--sigma-rel` and `--weights` their own, `--power` and `--inv-gamma`"
    " select warmup, `--zero-debias` selects constant; otherwise it is dynamic, where the n-th"
    " update uses the decay min(decay, (1 + n) / (10 + n)). Also accepted: "
    + ", ".join(f"`{other}` for `{name}`" for other, name in SYNONYMS.items())
    + ".",
    CHECKPOINTS: "They apply in this order: names (`--include`, `--exclude`, `--pattern`), steps"
    " (`--from`, `--to`, `--steps`), `--min-gap`, `--every`, `--last`, `--best`.",
    MODEL: "Needed only where a checkpoint can be read in several ways, or has values that would"
    " otherwise be refused; the error then names the option.",
    OUTPUT: "Results go to stdout: the path of each output, or with `--json` its manifest."
    " Everything else goes to stderr. Warnings and errors are shown with `--quiet` too.",
    ENGINE: "None of these changes the output but `--accumulate`, and `--device` where a device has"
    " no float64.",
    EVALUATION: "Of `ckpt-ema select`, which takes the options above too, but for `--best`,"
    " `--metric-mode`, `--plot`, `--part` and `--resume`; see [Selecting](select.md).",
}


def _line(row: Row) -> str:
    """Return one option as a row of a table; of a flag that is on by default, the one for off."""
    flags = [one.rpartition("/")[2] for one in sorted(row.flags, key=len)]
    value = "" if row.values is FLAG else row.values.must.removeprefix("be ")
    default = OPTIONS[row.name].default if row.name in OPTIONS else row.default
    if isinstance(default, float):
        default = f"{default:.4g}"
    shown = f"`{default}`" if isinstance(default, str) else ""
    cells = [", ".join(f"`{one}`" for one in flags), value, shown, row.help]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Print the page."""
    parts = [_INTRODUCTION]
    own = [row for row in rows_of(select) if row.panel == EVALUATION]
    for panel, rows in groupby([*rows_of(average), *own], key=lambda row: row.panel):
        head = ["| Option | Value | Default | Effect |", "|---|---|---|---|"]
        parts.append("\n".join([f"## {panel}\n", f"{_ABOUT[panel]}\n", *head, *map(_line, rows)]))
    print("\n\n".join(parts))


if __name__ == "__main__":
    main()
