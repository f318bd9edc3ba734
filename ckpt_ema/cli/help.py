"""The help of a command: examples first, then a line for each option, grouped by use."""

import shutil
import textwrap
from itertools import groupby
from typing import Any

from typer.core import TyperOption

from ckpt_ema.cli.texts import TextCommand

_MOST_COLUMNS, _LEAST_COLUMNS = 100, 60
_INDENT = 26  # of what options do


class Command(TextCommand):
    """A command whose help fits few screens; its epilog has the examples."""

    def get_usage(self, ctx: Any) -> str:
        """Return the line of usage, without Typer's braces around what is required."""
        return super().get_usage(ctx).replace("{", "").replace("}", "")

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help text."""
        width = shutil.get_terminal_size().columns
        width = max(_LEAST_COLUMNS, min(_MOST_COLUMNS, width))
        about = textwrap.wrap(" ".join((self.help or "").split()), width)
        examples = [f"  {line}" for line in (self.epilog or "").strip().splitlines()]
        parts = [[self.get_usage(ctx), *about], ["Examples:", *examples]]
        options = (one for one in self.get_params(ctx) if isinstance(one, TyperOption))
        for panel, members in groupby(options, key=lambda one: one.rich_help_panel):
            if panel:  # all but --help
                lines = [line for one in members for line in _lines(one, width)]
                parts.append([f"{panel}:", *lines])
        parts[-1].append(f"{'  -h, --help':{_INDENT}}show this; the full text is docs/options.md")
        formatter.write("\n\n".join("\n".join(lines) for lines in parts) + "\n")


def _lines(option: TyperOption, width: int) -> list[str]:
    """Return the lines of one option: its names and value, and what it does."""
    shown = option.secondary_opts if option.default is True else option.opts
    label = ", ".join(sorted(shown, key=len))
    if option.metavar:
        label += f" {option.metavar}"
    text = textwrap.wrap(option.help or "", width - _INDENT, break_on_hyphens=False)
    first = [f"  {label}"] if len(label) > _INDENT - 4 else []
    padded = " " * _INDENT if first else f"  {label}".ljust(_INDENT)
    return [*first, padded + text[0], *(" " * _INDENT + line for line in text[1:])]
