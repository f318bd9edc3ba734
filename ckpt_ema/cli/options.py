"""The options of the command line, made from the table in `ckpt_ema.options`.

Every option can also be set by an environment variable: CKPT_EMA_ and its name.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Annotated, Any

import typer

from ckpt_ema.errors import flag
from ckpt_ema.options import Row, table


def takes_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command an option for each row of the table; it gets them as its `options`."""
    signature = inspect.signature(command)
    others = [p for p in signature.parameters.values() if p.name != "options"]
    rows = table()

    @functools.wraps(command)
    def run(**given: Any) -> None:
        options = {row.name: _value(given.pop(row.name)) for row in rows}
        command(options=options, **given)

    parameters = [_parameter(row) for row in rows]
    ordered = [p.replace(kind=p.KEYWORD_ONLY) for p in (*others[:1], *parameters, *others[1:])]
    run.__signature__ = signature.replace(parameters=ordered)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in ordered}
    return run


def variable(name: str) -> str:
    """Name the environment variable of an option.

    >>> variable("from_step")
    'CKPT_EMA_FROM'
    """
    return "CKPT_EMA" + flag(name)[1:].upper().replace("-", "_")


def _parameter(row: Row) -> inspect.Parameter:
    kind: Any = row.values.words
    default: Any = row.default
    if row.values.choices:
        kind = _choice(row.values.choices)
        default = None if default is None else kind(default)
    elif default == ():
        default = []
    declared = typer.Option(
        *row.flags,
        help=row.help,
        envvar=variable(row.name),
        show_envvar=False,
        rich_help_panel=row.panel,
        show_default=default not in (None, [], False, True),
        metavar=row.metavar,
    )
    kind = kind if default is not None else kind | None
    annotation = Annotated[kind, declared]
    return inspect.Parameter(
        row.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
    )


def _choice(values: Sequence[str]) -> Any:
    """Make what Typer wants for one of a few words."""
    return Enum("Choice", [(value, value) for value in values], type=str)


def _value(given: Any) -> Any:
    return given.value if isinstance(given, Enum) else given
