"""Build the values of the data files in `tests/data`: tensors, and objects of foreign packages."""

import argparse
import collections
import contextlib
import os
import pathlib
import random
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from tests.makers.rank_files import mesh_of, part, playing

Tensors = dict[str, torch.Tensor]
Row = Mapping[str, Any]  # the values of one checkpoint, by column

# Names of the tensors of a model, by a name for them.
NAMES = {
    "plain": ("model.layer.weight", "model.layer.bias", "lm_head.weight"),
    "lora": ("base_model.model.layer.lora_A.weight", "base_model.model.layer.lora_B.weight"),
}


def build(tag: str, value: Any, row: Row) -> Any:
    """Return what a tag makes of a value, for the checkpoint of a row."""
    kind, _, class_name = tag.partition(":")
    if kind == "model":
        return _model(value or {}, row)
    if kind == "adam":
        return _adam(_model(value or {}, row))
    return BUILDERS[kind](value, class_name) if class_name else BUILDERS[kind](value)


# --- objects of packages that are not installed here ---

_FOREIGN: dict[str, Any] = {}


def _foreign(name: str, *bases: type) -> Any:
    """Return a class that pickle stores under a dotted name."""
    if name not in _FOREIGN:
        module, _, last = name.rpartition(".")
        _FOREIGN[name] = type(last, bases, {"__module__": module})
    return _FOREIGN[name]


def _foreign_function(name: str) -> Any:
    """Return a function that pickle stores under a dotted name."""

    def function(*arguments: object) -> None:
        raise AssertionError("foreign code ran")

    function.__module__, _, function.__qualname__ = name.rpartition(".")
    function.__name__ = function.__qualname__
    _FOREIGN[name] = function
    return function


@contextlib.contextmanager
def importable() -> Iterator[None]:
    """Make what is foreign importable from the modules that it names."""
    before: dict[str, types.ModuleType | None] = {}
    for thing in _FOREIGN.values():
        parts = thing.__module__.split(".")
        for end in range(1, len(parts) + 1):
            name = ".".join(parts[:end])
            if name not in before and (name not in sys.modules or end == len(parts)):
                before[name] = real = sys.modules.get(name)
                sys.modules[name] = stand_in = types.ModuleType(name)
                vars(stand_in).update(vars(real) if real else {})
        setattr(sys.modules[thing.__module__], thing.__name__, thing)
    try:
        yield
    finally:
        for name, real in before.items():
            if real is None:
                del sys.modules[name]
            else:
                sys.modules[name] = real


_DTYPE = _foreign("numpy.dtype", object)
_SCALAR = _foreign_function("numpy._core.multiarray.scalar")
_RECONSTRUCT = _foreign_function("numpy._core.multiarray._reconstruct")


class _Reduced:
    """Pickled as a call of a function with arguments, and a state."""

    def __init__(self, *reduced: Any) -> None:
        self._reduced = reduced

    def __reduce__(self) -> tuple[Any, ...]:
        return self._reduced


def _numpy(value: str) -> _Reduced:
    """Return what numpy pickles: a float64, or an array of three."""
    if value == "scalar":
        return _Reduced(_SCALAR, (_DTYPE(), bytes(8)))
    state = (1, (3,), _DTYPE(), False, bytes(24))
    return _Reduced(_RECONSTRUCT, (_DTYPE, (0,), b"b"), state)


# --- builders of values: what the data file gives, and a row or the name of a class ---


def _model(changes: Mapping[str, Any], row: Row) -> Any:
    """Return the model of a row, or of another `seed` and other `names`, changed as asked."""
    asked = {**row, **changes}
    names = NAMES[asked["names"]] if isinstance(asked["names"], str) else asked["names"]
    generator = torch.Generator().manual_seed(asked["seed"])
    model: Tensors = {name: torch.randn(2, 3, generator=generator) for name in names}
    for name, other in changes.get("tied", {}).items():
        model[name] = model[other]
    dtype = getattr(torch, changes.get("dtype", "float32"))
    model = {
        changes.get("prefix", "") + name + changes.get("suffix", ""): tensor.to(dtype)
        for name, tensor in model.items()
    }
    if "plus" in changes:
        model = {name: tensor + changes["plus"] for name, tensor in model.items()}
    if "ranks" in changes:
        ranks, rank = changes["ranks"], changes.get("rank", 0)
        with playing(rank, ranks):
            mesh = mesh_of((ranks,))
            return {name: part(tensor, (0,), mesh) for name, tensor in model.items()}
    if "shards" in changes:
        return _shards(model, changes["shards"])
    return collections.OrderedDict(model) if "ordered" in changes else model


def _shards(model: Tensors, count: int) -> dict[str, Tensors]:
    """Return the files beside an index: the tensors are dealt out in turn."""
    names = [f"model-{number + 1:05}-of-{count:05}.safetensors" for number in range(count)]
    return {
        file: {name: model[name] for name in list(model)[number::count]}
        for number, file in enumerate(names)
    }


def _adam(model: Tensors) -> dict[str, Any]:
    """Return the state of an Adam optimizer for a model, as state_dict() gives it."""
    moments = {
        index: {"step": torch.tensor(1.0), "exp_avg": tensor + 1, "exp_avg_sq": tensor * tensor}
        for index, tensor in enumerate(model.values())
    }
    return {"state": moments, "param_groups": [{"lr": 1e-3, "params": list(moments)}]}


def _filled(value: Any, number: float) -> torch.Tensor:
    """Return a tensor of one number; `value` is its shape, or has `shape`, `dtype`, `value`."""
    asked = value if isinstance(value, dict) else {"shape": value, "dtype": "float32"}
    dtype = getattr(torch, asked["dtype"])
    return torch.full(asked["shape"], asked.get("value", number), dtype=dtype)


def _object(value: Any, name: str) -> Any:
    """Return an object of a class that is not installed here; a text becomes a subclass of str."""
    return _foreign(name, object)() if value is None else _foreign(name, str)(value)


def _module(value: Mapping[str, Sequence[int]] | None, name: str) -> Any:
    """Return a module of a class that is not installed here, with layers of half precision."""
    module = _foreign(name, torch.nn.Module)()
    for layer, sizes in (value or {}).items():
        setattr(module, layer, torch.nn.Linear(sizes[0], sizes[1]).half())
    return module


def _magic(value: str) -> bytes:
    """Return a file of a format that is recognised by its first bytes."""
    return value.encode("latin-1") + bytes(64)


_RNG: dict[str, Callable[[], Any]] = {"python": random.getstate, "torch": torch.get_rng_state}

BUILDERS: dict[str, Callable[..., Any]] = {
    "tensor": torch.tensor,
    "zeros": lambda value: _filled(value, 0),
    "ones": lambda value: _filled(value, 1),
    "object": _object,
    "module": _module,
    "numpy": _numpy,
    "code": lambda _value: _Reduced(os.abort, ()),  # whoever runs it does not survive
    "namespace": lambda value: argparse.Namespace(**value),
    "rng": lambda value: _RNG[value](),
    "tuple": tuple,
    "path": pathlib.Path,
    "bytes": str.encode,
    "magic": _magic,
}
