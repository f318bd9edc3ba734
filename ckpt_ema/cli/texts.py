"""Commands that take option values as text, without conversion by Typer.

Typer imports pydantic even to convert text to text, which takes longer than planning a small run.
The table of options parses the text anyway.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from typer.core import TyperCommand, TyperGroup

_Process = Callable[[Any, Any], Any]  # takes the context and a value, returns the value


class _TakesTexts:
    """Lets Typer convert only values that are not text."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the parameters."""
        params: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        for param in params:
            if "process_value" not in vars(param):
                param.process_value = partial(_processed, param, param.process_value)
        return params


class TextCommand(_TakesTexts, TyperCommand):
    """A command that takes texts and flags."""


class TextGroup(_TakesTexts, TyperGroup):
    """A group of commands, with flags of its own."""


def _processed(param: Any, process: _Process, ctx: Any, value: Any) -> Any:
    """Return the value of a parameter; Typer's own `process` converts what is not text."""
    is_flag = getattr(param, "is_flag", False)  # whose text is from an environment variable
    is_text = isinstance(value, str) and not is_flag
    are_texts = isinstance(value, list | tuple) and all(isinstance(one, str) for one in value)
    is_missing = param.required and not value
    if is_missing or not (value is None or is_text or are_texts):
        return process(ctx, value)
    return param.callback(ctx, param, value) if param.callback else value
