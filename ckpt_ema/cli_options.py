"""The options of the command line: for each field of `Options`, its help and its short name.

Types, defaults and choices are those of `Options`; every option can also be set by an environment
variable, CKPT_EMA_ and its name.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from ckpt_ema.options import CHOICES, Options, flag

AVERAGE_PANEL, CHECKPOINTS_PANEL, WEIGHTS_PANEL = "Average", "Checkpoints", "Weights"
OUTPUT_PANEL, ENGINE_PANEL = "Output", "Engine"


class _Option(NamedTuple):
    panel: str
    help: str
    kind: Any = str  # what Typer makes of the words given; choices are made from CHOICES
    names: tuple[str, ...] = ()  # if not just --the-name
    metavar: str | None = None


_OPTIONS: dict[str, _Option] = {
    "decay": _Option(
        AVERAGE_PANEL,
        "What the average keeps of itself at each checkpoint, between 0 and 1; with the dynamic"
        " schedule the most it keeps.",
        float,
        ("--decay", "-d"),
    ),
    "schedule": _Option(
        AVERAGE_PANEL,
        "dynamic: min(decay, (1 + n) / (10 + n)) at the n-th fold, as TensorFlow has it; constant:"
        " decay at every fold.",
    ),
    "allow_nonfinite": _Option(
        AVERAGE_PANEL,
        "Average NaN and infinite values as they are, instead of refusing them.",
        bool,
        ("--allow-nonfinite",),
    ),
    "allow_duplicates": _Option(
        AVERAGE_PANEL,
        "Average checkpoints of different steps that hold the same values, instead of refusing"
        " them.",
        bool,
        ("--allow-duplicates",),
    ),
    "pattern": _Option(
        CHECKPOINTS_PANEL,
        "Take only names that match this regular expression; its group, if it has one, is the step"
        " (by name: (?P<step>...)).",
        metavar="REGEX",
    ),
    "order": _Option(
        CHECKPOINTS_PANEL,
        "What orders checkpoints whose name and content disagree: metadata (what they hold) or"
        " name; auto refuses them.",
    ),
    "append": _Option(
        CHECKPOINTS_PANEL,
        "Add this entry of the run after the last step; can be given several times.",
        list[str],
        metavar="NAME",
    ),
    "aliases": _Option(
        CHECKPOINTS_PANEL,
        "Whether to look into last, final and the like, which may be a step of their own.",
        bool,
        ("--aliases/--no-aliases",),
    ),
    "skip_incomplete": _Option(
        CHECKPOINTS_PANEL,
        "Leave out incomplete checkpoints in the middle of the run, instead of refusing it.",
        bool,
        ("--skip-incomplete",),
    ),
    "weights": _Option(
        WEIGHTS_PANEL,
        "Which to take where a checkpoint has several forms of its weights.",
    ),
    "component": _Option(
        WEIGHTS_PANEL,
        "Average only this part of each checkpoint, such as unet, actor or critic.",
        metavar="NAME",
    ),
    "key": _Option(
        WEIGHTS_PANEL,
        "Where the model is in each torch file, such as state_dict or state.model; found by itself"
        " unless given.",
        metavar="PATH",
    ),
    "strip_prefix": _Option(
        WEIGHTS_PANEL,
        "Take this off the front of tensor names, such as model. or _orig_mod.",
        metavar="PREFIX",
    ),
    "output": _Option(
        OUTPUT_PANEL,
        "The folder of the result; or a path that ends in .safetensors, for one file. Unless given,"
        " RUN-ema beside the run.",
        Path,
        ("--output", "-o"),
    ),
    "dtype": _Option(
        OUTPUT_PANEL,
        "What to write averaged tensors in; same is the newest checkpoint's own.",
    ),
    "config_from": _Option(
        OUTPUT_PANEL,
        "A model or pipeline folder to take the configuration from, for runs that save none.",
        Path,
        metavar="FOLDER",
    ),
    "device": _Option(
        ENGINE_PANEL,
        "Where to fold: auto, cpu, cuda, cuda:1, mps, xpu. auto is an accelerator if there is one.",
    ),
    "threads": _Option(
        ENGINE_PANEL, "Threads that read and fold; one for each core unless given.", int
    ),
    "accumulate": _Option(
        ENGINE_PANEL, "What to fold in. float32 is a little faster and not exact."
    ),
    "tile_elements": _Option(
        ENGINE_PANEL,
        "Elements folded at a time by one thread; the result does not depend on it.",
        int,
    ),
}


def takes_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command an option for each field of `Options`; it gets them as its `options`."""
    signature = inspect.signature(command)
    others = [p for p in signature.parameters.values() if p.name != "options"]
    parameters = [_parameter(name, option) for name, option in _OPTIONS.items()]

    @functools.wraps(command)
    def run(**given: Any) -> None:
        options = {name: _value(given.pop(name)) for name in _OPTIONS}
        command(options=options, **given)

    ordered = [p.replace(kind=p.KEYWORD_ONLY) for p in (*others[:1], *parameters, *others[1:])]
    run.__signature__ = signature.replace(parameters=ordered)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in ordered}
    return run


def _parameter(name: str, option: _Option) -> inspect.Parameter:
    field = next(field for field in fields(Options) if field.name == name)
    assert field.default is not MISSING
    kind: Any = option.kind
    default: Any = field.default
    if name in CHOICES:
        kind = _choice(CHOICES[name])
        default = kind(default)
    elif default is None:
        kind = kind | None
    elif kind == list[str]:
        default = []
    declared = typer.Option(
        *(option.names or (flag(name),)),
        help=option.help,
        envvar="CKPT_EMA_" + name.upper(),
        rich_help_panel=option.panel,
        show_default=default not in (None, [], False, True),
        metavar=option.metavar,
        readable=option.kind is not Path,
    )
    annotation = Annotated[kind, declared]
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
    )


def _choice(values: Sequence[str]) -> Any:
    """What Typer wants for one of a few words."""
    return Enum("Choice", [(value, value) for value in values], type=str)


def _value(given: Any) -> Any:
    return given.value if isinstance(given, Enum) else given
