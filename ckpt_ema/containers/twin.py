"""An average that a trainer saves among the raw weights, in one dict, under a prefix of its own.

`model_ema.` beside `model.` (Stable Diffusion, whose names lose their dots), `teacher.` beside
`student.`: it is recognised by a word in its names and by its tensors, which have their raw twins.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace

from ckpt_ema.containers.checks import refused
from ckpt_ema.containers.model_key import ALREADY_AVERAGED
from ckpt_ema.containers.specs import Specs, TensorSpec
from ckpt_ema.errors import Code, some
from ckpt_ema.notices import Notice
from ckpt_ema.storage.protocol import Location
from ckpt_ema.trainers.conventions import AVERAGED_NAME

# Most models have none of these in any name, which is found out fast.
_HINTS = ("ema", "avg", "average", "swa", "lawa", "teacher", "shadow", "polyak")

_WRAPPERS = re.compile(r"^(module\.|_orig_mod\.)+")  # which an average has and raw weights lack

_Tensors = Mapping[str, TensorSpec]


def one_of_both(path: Location, specs: Specs, *, wants_average: bool) -> Specs:
    """Return a checkpoint with either the raw weights or the average, if it has both in one dict.

    The average takes the names of the raw weights; what has no average stays raw.
    """
    groups = _groups(specs.tensors)
    if specs.is_average or not groups:
        return specs
    grouped = {name for names in groups.values() for name in names}
    raw = {name: one for name, one in specs.tensors.items() if name not in grouped}
    if not any(one.shape for one in raw.values()):  # counters, at most
        text = f"The model weights named {_prefixes(groups)} {ALREADY_AVERAGED}."
        warning = () if wants_average else (Notice(Code.ALREADY_AVERAGED, text),)
        return replace(specs, warnings=(*specs.warnings, *warning), is_average=True)
    averages = {p: twins for p, names in groups.items() if (twins := _twins(p, names, specs, raw))}
    if not averages:
        return specs
    if len(averages) > 1 and wants_average:
        why = f"holds {len(averages)} averages, {_prefixes(averages)}, and any of them may be meant"
        hint = "Export the one that you want as a checkpoint of its own."
        raise refused(path, why, hint, Code.SEVERAL_MODELS)
    left_out = {name for prefix in averages for name in groups[prefix]}
    tensors = {name: one for name, one in specs.tensors.items() if name not in left_out}
    text = f"{_prefixes(averages)} holds an average; the raw model weights are taken."
    if wants_average:
        [(prefix, twins)] = averages.items()
        tensors |= {raw_name: specs.tensors[name] for name, raw_name in twins.items()}
        text = (
            f"{len(twins)} of {len(tensors)} tensors are taken from {prefix}*; any others are raw."
        )
    others = (*specs.other_models, *([] if wants_average else [f"{one}*" for one in averages]))
    return replace(
        specs,
        tensors=tensors,
        notes=(*specs.notes, Notice(Code.DECIDED, text)),
        other_models=others,
        is_average=wants_average,
    )


def _prefixes(groups: Mapping[str, object]) -> str:
    return some([f"{prefix}*" for prefix in groups])


def _groups(tensors: _Tensors) -> dict[str, list[str]]:
    """Return the names of tensors by the prefix that ends in a word for averages."""
    text = "\n".join(tensors).lower()
    if not any(hint in text for hint in _HINTS):
        return {}
    if not any(map(AVERAGED_NAME.search, {part for name in tensors for part in name.split(".")})):
        return {}
    prefix_of: dict[str, str] = {}  # by module, of which each has several tensors
    groups: dict[str, list[str]] = {}
    for name in tensors:
        module = name.rpartition(".")[0]
        if module not in prefix_of:
            prefix_of[module] = _prefix(module)
        word = AVERAGED_NAME.match(name)  # mmcv joins the parts of a name by underscores
        prefix = prefix_of[module] or (f"{word[0]}_" if word else "")
        if prefix:
            groups.setdefault(prefix, []).append(name)
    return groups


def _prefix(module: str) -> str:
    parts = module.split(".")
    ends = (end for end, part in enumerate(parts, start=1) if AVERAGED_NAME.search(part))
    end = next(ends, 0)
    return ".".join(parts[:end]) + "." if end else ""


def _twins(prefix: str, names: list[str], specs: Specs, raw: _Tensors) -> dict[str, str]:
    """Return the raw name of each tensor of an average; empty if most have none."""
    below = {name: _WRAPPERS.sub("", name.removeprefix(prefix)) for name in names}
    tails = {_joined(tail): name for name, tail in below.items()}
    found: dict[str, dict[str, str]] = {}  # by the raw names' own prefix
    for raw_name, one in raw.items():
        for front, tail in _cuts(raw_name):
            name = tails.get(tail)
            if name and specs.tensors[name].shape == one.shape:
                found.setdefault(front, {})[name] = raw_name
    counts = Counter({front: len(twins) for front, twins in found.items()})
    [(front, count)] = counts.most_common(1) or [("", 0)]
    # A lone buffer, such as ema_embed beside embed, belongs to its module.
    is_all = prefix.endswith(".") or 2 * count >= len(raw)
    return found[front] if 2 * count >= len(names) and is_all else {}


def _cuts(name: str) -> Iterator[tuple[str, str]]:
    """Yield each way to cut a name at a dot, the second part without dots."""
    parts = name.split(".")
    for at in range(len(parts)):
        yield ".".join(parts[:at]), _joined("".join(parts[at:]))


def _joined(name: str) -> str:
    return name.replace(".", "").replace("_", "")
