"""The options of the command line, a long table: of each field of `Options` help and short name.

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

from ckpt_ema.errors import flag
from ckpt_ema.options import CHOICES, Options
from ckpt_ema.schedules.table import ALIASES, DEFAULT_DECAY, DEFAULT_SCHEDULE, SCHEDULES

AVERAGE_PANEL, CHECKPOINTS_PANEL, WEIGHTS_PANEL = "Average", "Which checkpoints", "Which weights"
OUTPUT_PANEL, ENGINE_PANEL = "Output", "Engine"


_SEVERAL_NUMBERS, _SEVERAL_COUNTS = "X[,X...]", "N[,N...]"


class _Option(NamedTuple):
    panel: str
    help: str
    kind: Any = str  # what Typer makes of the words given; choices are made from CHOICES
    names: tuple[str, ...] = ()  # if not just --the-name
    metavar: str | None = None


_OPTIONS: dict[str, _Option] = {
    "schedule": _Option(
        AVERAGE_PANEL,
        f"How the weights come about: {', '.join(SCHEDULES)}; also"
        f" {', '.join(f'{alias} ({name})' for alias, name in ALIASES.items())}. Unless given, what"
        f" the other options mean, or else {DEFAULT_SCHEDULE}.",
        metavar="NAME",
    ),
    "decay": _Option(
        AVERAGE_PANEL,
        "What the average keeps of itself at each checkpoint, between 0 and 1: always (constant),"
        " or at the most (dynamic: min(decay, (1 + n) / (10 + n)) at the n-th fold, as TensorFlow"
        f" has it; warmup). {DEFAULT_DECAY:g} unless given.",
        names=("--decay", "-d"),
        metavar=_SEVERAL_NUMBERS,
    ),
    "num_updates": _Option(
        AVERAGE_PANEL,
        "What n is in the dynamic decay: the index of the checkpoint, or its training step.",
    ),
    "zero_debias": _Option(
        AVERAGE_PANEL,
        "Constant decay from a shadow of zeros, divided by the weight that those lack.",
        bool,
        ("--zero-debias",),
    ),
    "power": _Option(
        AVERAGE_PANEL,
        "Warmup: decay 1 - (1 + n / inv_gamma)^-power; 2/3 unless given.",
        float,
    ),
    "inv_gamma": _Option(AVERAGE_PANEL, "Warmup: see --power; 1 unless given.", float),
    "decay_per_step": _Option(
        AVERAGE_PANEL,
        "What the average keeps of itself at each training step.",
        metavar=_SEVERAL_NUMBERS,
    ),
    "half_life": _Option(
        AVERAGE_PANEL,
        "Training steps in which a checkpoint's share halves. Each value is an average of its own.",
        metavar=_SEVERAL_NUMBERS,
    ),
    "sigma_rel": _Option(
        AVERAGE_PANEL,
        "Width of the power function of Karras et al., relative to the run: 0.05, 0.1 ...",
        metavar=_SEVERAL_NUMBERS,
    ),
    "weights": _Option(
        AVERAGE_PANEL,
        "A file that states the weights: a JSON object, or lines of a name (or step) and a weight."
        " Checkpoints that it does not name are left out.",
        Path,
        metavar="FILE",
    ),
    "normalize": _Option(
        AVERAGE_PANEL, "Divide the weights of --weights by their sum.", bool, ("--normalize",)
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
    "last": _Option(
        CHECKPOINTS_PANEL,
        "Take the N newest, of those that the options on steps and names leave.",
        metavar=_SEVERAL_COUNTS,
    ),
    "best": _Option(
        CHECKPOINTS_PANEL,
        "Take the N with the best --metric, of those that the other options leave; of equals the"
        " later ones.",
        metavar=_SEVERAL_COUNTS,
    ),
    "metric": _Option(
        CHECKPOINTS_PANEL,
        "What --best goes by, such as eval_loss: from trainer_state.json, from results beside the"
        " weights, from names or from numbers in a torch file.",
        metavar="NAME",
    ),
    "metric_mode": _Option(
        CHECKPOINTS_PANEL, "Whether a low (min) or a high (max) metric is good; auto knows many."
    ),
    "from_step": _Option(CHECKPOINTS_PANEL, "Take this step and later ones.", int, metavar="STEP"),
    "to_step": _Option(CHECKPOINTS_PANEL, "Take this step and earlier ones.", int, metavar="STEP"),
    "steps": _Option(
        CHECKPOINTS_PANEL, "Take these steps: 100,200 or ranges, 1000-5000.", metavar="STEPS"
    ),
    "every": _Option(
        CHECKPOINTS_PANEL, "Take every N-th, counted back from the newest.", int, metavar="N"
    ),
    "min_gap": _Option(
        CHECKPOINTS_PANEL,
        "Take the newest, and before it those that are at least this many steps apart.",
        int,
        metavar="STEPS",
    ),
    "include": _Option(
        CHECKPOINTS_PANEL,
        "Take only names that are as this pattern of a shell, 'checkpoint-1*'; can be given several"
        " times.",
        list[str],
        metavar="GLOB",
    ),
    "exclude": _Option(
        CHECKPOINTS_PANEL,
        "Leave out names that are as this pattern; can be given several times.",
        list[str],
        metavar="GLOB",
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
    "form": _Option(
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
    "card": _Option(
        OUTPUT_PANEL,
        "Whether to write a model card, README.md, with what the run's own says of licence and base"
        " model.",
        bool,
        ("--card/--no-card",),
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
    "tile_size": _Option(
        ENGINE_PANEL,
        "How much of a checkpoint a thread reads at a time, such as 4MiB; the result does not"
        " depend on it.",
        metavar="SIZE",
    ),
    "max_memory": _Option(
        ENGINE_PANEL,
        "How much memory the fold may take beside torch itself, and how much of an accelerator's,"
        " such as 64MiB; the result does not depend on it.",
        metavar="SIZE",
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
        default = kind(default) if default is not None else None
        kind = kind if default is not None else kind | None
    elif kind == list[str]:
        default = []
    elif default is None:
        kind = kind | None
    declared = typer.Option(
        *(option.names or (flag(name),)),
        help=option.help,
        envvar="CKPT_EMA" + flag(name)[1:].upper().replace("-", "_"),
        rich_help_panel=option.panel,
        show_default=default not in (None, [], False, True),
        metavar=option.metavar,
        readable=option.kind is not Path,
        path_type=str if option.kind is Path else None,  # a Path would make "." of an empty one
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
