"""Build tiny runs from data files: real files of every format, and the clutter beside them.

Each file in `tests/data/trainers` holds one trainer's runs, each file in `tests/data/layouts` runs
that any trainer may leave. A run of such a file has these fields:

    about     what is special about it
    like      another run, or several, that are built first in the same folder
    each      columns of values, one value for each checkpoint, oldest first
    model     the names of the model's tensors: a list, or a key of `NAMES`
    tree      the files; a name that ends in / is a folder
    expect    what the run is read as (see `tests/test_trainers.py`)
    incomplete  ways in which a save of one checkpoint can be incomplete

`<column>` in a text stands for the checkpoint's value in that column, `<column:07>` formats it; a
text that is nothing else becomes the value itself. A path with columns is written once for each
checkpoint, any other path once, with the values of the newest. Columns that are always there:
`seed`, the position from 1, which decides the values of the tensors, `names`, from `model`, and
`epoch`, a hundredth of `step`.

The content of a file: nothing for an empty file; a text; for .json values; for .safetensors
tensors; for anything else what torch.save is given. In any mapping and any folder, `with` puts in
blocks (of the file's `blocks` or of `tests/data/blocks.yaml`) or other mappings, and `let` changes
columns. A `!tag` calls one of the functions below: a writer of a whole file, or a builder of a value.
"""

import argparse
import collections
import contextlib
import functools
import hashlib
import json
import os
import pathlib
import pickle
import random
import re
import shutil
import sys
import tarfile
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from tests.makers.safetensors_file import shards, write_safetensors, write_shards

Tensors = dict[str, torch.Tensor]
Row = Mapping[str, Any]  # the values of one checkpoint, by column
DATA = Path(__file__).parent.parent / "data"

NAMES = {
    "plain": ("model.layer.weight", "model.layer.bias", "lm_head.weight"),
    "lora": ("base_model.model.layer.lora_A.weight", "base_model.model.layer.lora_B.weight"),
}


# --- runs ---


@dataclass(frozen=True, slots=True)
class Part:
    """One tree of files, with the rows and the blocks that are meant in it."""

    rows: Sequence[Row]
    tree: Mapping[str, Any]
    blocks: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a data file."""

    name: str
    parts: Sequence[Part]  # in the order in which they are written
    expect: Sequence[Mapping[str, Any]]
    incomplete: Sequence[Mapping[str, Any]]

    @property
    def rows(self) -> Sequence[Row]:
        """The values of each checkpoint, oldest first."""
        return self.parts[-1].rows

    def make(self, folder: Path) -> Path:
        """Write the run into a folder and return it."""
        folder.mkdir(parents=True, exist_ok=True)
        for part in self.parts:
            for path, content, row in _files(part.tree, part.rows, part.blocks):
                _write(folder / path, content, row, part.blocks)
        return folder

    def value(self, data: Any, row: Row) -> Any:
        """Return what a value of the data file means for one checkpoint."""
        return _value(data, row, self.parts[-1].blocks)


def load(folder: str) -> dict[str, list[str]]:
    """Return the files of a folder of `tests/data` by stem, each with the names of its runs."""
    return {
        path.stem: list(_read(path)["runs"]) for path in sorted((DATA / folder).glob("*.yaml"))
    }


@functools.cache
def run(name: str) -> Run:
    """Return the run of that name, whatever file it is in."""
    path, data = _described()[name]
    blocks = {**_read(DATA / "blocks.yaml"), **_read(path).get("blocks", {})}
    like = data.get("like", [])
    parts = [part for other in _listed(like) for part in run(other).parts]
    if parts and "each" not in data:
        rows = parts[0].rows
    else:
        names = data.get("model", "plain")
        rows = _rows(data.get("each", {}), NAMES.get(names, names) if names == str(names) else names)
    return Run(
        name=name,
        parts=[*parts, Part(rows, data.get("tree", {}), blocks)],
        expect=_listed(data.get("expect", [])),
        incomplete=data.get("incomplete", []),
    )


def _rows(columns: Mapping[str, Sequence[Any]], names: Sequence[str]) -> list[Row]:
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return [
        {"seed": seed, "names": names, "epoch": row.get("step", 0) / 100, **row}
        for seed, row in enumerate(rows or [{}], start=1)
    ]


@functools.cache
def _described() -> dict[str, tuple[Path, Mapping[str, Any]]]:
    return {
        name: (path, data)
        for path in sorted(DATA.glob("*/*.yaml"))
        for name, data in _read(path)["runs"].items()
    }


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


# --- the data files ---


class Tag(NamedTuple):
    """A value that a function makes."""

    kind: str
    value: Any


_Loader: Any = type("_Loader", (getattr(yaml, "CSafeLoader", yaml.SafeLoader),), {})


def _tag(loader: Any, kind: str, node: yaml.Node) -> Tag:
    if isinstance(node, yaml.MappingNode):
        return Tag(kind, loader.construct_mapping(node, deep=True))
    if isinstance(node, yaml.SequenceNode):
        return Tag(kind, loader.construct_sequence(node, deep=True))
    assert isinstance(node, yaml.ScalarNode)
    return Tag(kind, node.value if node.style else yaml.safe_load(node.value))


_Loader.add_multi_constructor("!", _tag)


@functools.cache
def _read(path: Path) -> Any:
    return yaml.load(path.read_text(), _Loader)


def fill(text: str, row: Row) -> Any:
    """Put a row's values into a text."""
    if whole := re.fullmatch(r"<(\w+)>", text):
        return row[whole[1]]
    return re.sub(r"<(\w+)(?::(\w*))?>", lambda m: format(row[m[1]], m[2] or ""), text)


def _value(data: Any, row: Row, blocks: Mapping[str, Any]) -> Any:
    if isinstance(data, str):
        return fill(data, row)
    if isinstance(data, list):
        return [_value(item, row, blocks) for item in data]
    if isinstance(data, Tag):
        kind, _, argument = data.kind.partition(":")
        arguments = (argument,) if argument else ()
        return BUILDERS[kind](_value(data.value, row, blocks), row, *arguments)
    if not isinstance(data, dict):
        return data
    row = _let(data, [row], blocks)[0]
    made: dict[Any, Any] = {}
    for other in _listed(data.get("with", [])):
        name = fill(other, row) if isinstance(other, str) else None
        made |= _value(blocks[name] if name else other, row, blocks)
    for key, item in data.items():
        if key not in ("with", "let"):
            made[_value(key, row, blocks)] = _value(item, row, blocks)
    return made


def _let(data: Mapping[str, Any], rows: Sequence[Row], blocks: Mapping[str, Any]) -> list[Row]:
    if "let" not in data:
        return list(rows)
    return [{**row, **_value(data["let"], row, blocks)} for row in rows]


Files = Iterator[tuple[str, Any, Row]]


def _files(tree: Mapping[str, Any], rows: Sequence[Row], blocks: Mapping[str, Any]) -> Files:
    """Each file's path, its content as it is in the data, and its row."""
    rows = _let(tree, rows, blocks)
    for block in _listed(tree.get("with", [])):
        yield from _files(blocks[block], rows, blocks)
    for key, content in tree.items():
        if key in ("with", "let"):
            continue
        for several in [[row] for row in rows] if "<" in key else [rows]:
            path = fill(key, several[-1])
            if path.endswith("/"):
                for inner, data, row in _files(content or {}, several, blocks):
                    yield path + inner, data, row
            else:
                yield path, content, several[-1]


def _write(path: Path, data: Any, row: Row, blocks: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(data, Tag) and data.kind in WRITERS:
        WRITERS[data.kind](path, _value(data.value, row, blocks))
        return
    content = _value(data, row, blocks)
    if content is None:
        path.touch()
    elif isinstance(content, str):
        path.write_text(content)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    elif path.suffix in (".json", ".jsonl"):
        path.write_text(json.dumps(content))
    elif path.suffix == ".safetensors":
        write_safetensors(path, content)
    else:
        with _importable():
            torch.save(content, path)


# --- writers of files: the path and what the data file gives ---


def _safetensors(path: Path, value: Mapping[str, Any]) -> None:
    write_safetensors(path, value["tensors"], {"format": "pt", **value["metadata"]})


def _index(path: Path, value: Mapping[str, Any]) -> None:
    """Write a sharded model beside the index."""
    write_shards(path.parent, value["model"], value["shards"])


def _dcp(path: Path, value: Mapping[str, Any]) -> None:
    """Write a distributed checkpoint into the folder of its .metadata."""
    from torch.distributed.checkpoint import state_dict_saver

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one process is what is wanted
        state_dict_saver.save(dict(value), checkpoint_id=path.parent, no_dist=True)


def _pickle(path: Path, value: Any) -> None:
    with _importable():
        path.write_bytes(pickle.dumps(value))


def _archive(path: Path, value: Mapping[str, Any]) -> None:
    """Write an archive of torch files."""
    for name, content in value.items():
        torch.save(content, path.with_name(name))
        with tarfile.open(path, "w") as archive:
            archive.add(path.with_name(name), name)
        path.with_name(name).unlink()


def _copy(path: Path, value: str) -> None:
    """Copy a file or a folder that lies beside it."""
    source = path.with_name(value)
    (shutil.copytree if source.is_dir() else shutil.copy)(source, path)


def _remove(path: Path, value: None) -> None:
    (shutil.rmtree if path.is_dir() else os.unlink)(path)


def _revision(path: Path, value: str) -> None:
    """Name the commit of a revision, as the Hub's cache does in refs/."""
    path.write_text(hashlib.sha1(value.encode()).hexdigest())


def _snapshot(path: Path, value: str) -> None:
    """Move a folder beside refs/ into the Hub's cache: each file becomes a link to a blob."""
    _revision(path, path.name)
    staging, blobs = path.parent.parent / value, path.parent.parent / "blobs"
    folder = path.parent.parent / "snapshots" / path.read_text()
    for made in (blobs, folder):
        made.mkdir(parents=True, exist_ok=True)
    for source in sorted(staging.iterdir()):
        blob = hashlib.sha256(source.read_bytes()).hexdigest()
        (folder / source.name).symlink_to(f"../../blobs/{blob}")
        source.replace(blobs / blob)
    staging.rmdir()


WRITERS: dict[str, Callable[[Path, Any], object]] = {
    "safetensors": _safetensors,
    "index": _index,
    "dcp": _dcp,
    "pickle": _pickle,
    "archive": _archive,
    "link": lambda path, value: path.symlink_to(value),
    "hardlink": lambda path, value: os.link(path.with_name(value), path),
    "copy": _copy,
    "remove": _remove,
    "revision": _revision,
    "snapshot": _snapshot,
}


# --- builders of values: what the data file gives, and the row ---


def _model(value: Mapping[str, Any] | None, row: Row) -> Tensors:
    """The model of the row, or of another `seed` and other `names`; then changed as asked."""
    asked = {**row, **(value or {})}
    names = NAMES.get(asked["names"], ()) if isinstance(asked["names"], str) else asked["names"]
    generator = torch.Generator().manual_seed(asked["seed"])
    model: Tensors = {name: torch.randn(2, 3, generator=generator) for name in names}
    return _changed(model, value or {})


def _changed(model: Tensors, changes: Mapping[str, Any]) -> Tensors:
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
        return {name: _RankTensor(tensor[:1], changes["ranks"]) for name, tensor in model.items()}  # type: ignore[misc]
    if "shards" in changes:
        return shards(model, changes["shards"])  # type: ignore[return-value]
    return collections.OrderedDict(model) if changes.get("ordered") else model


def _adam(value: Mapping[str, Any] | None, row: Row) -> dict[str, Any]:
    """The state of an Adam optimizer for a model, as state_dict() gives it."""
    moments = {
        index: {"step": torch.tensor(1.0), "exp_avg": tensor + 1, "exp_avg_sq": tensor * tensor}
        for index, tensor in enumerate(_model(value, row).values())
    }
    return {"state": moments, "param_groups": [{"lr": 1e-3, "params": list(moments)}]}


def _filled(value: Any, number: float) -> torch.Tensor:
    """A tensor of one number, of a shape or of a shape and a dtype."""
    shape, dtype = (value["shape"], value["dtype"]) if isinstance(value, dict) else (value, "float32")
    return torch.full(shape, number, dtype=getattr(torch, dtype))


def _object(value: Any, row: Row, name: str) -> Any:
    """An object of a class that is not installed here."""
    return _foreign(name, object)() if value is None else _foreign(name, str)(value)


def _module(value: Mapping[str, Sequence[int]] | None, row: Row, name: str) -> Any:
    """A module of a class that is not installed here, with layers of half precision."""
    module = _foreign(name, torch.nn.Module)()
    for layer, sizes in (value or {}).items():
        setattr(module, layer, torch.nn.Linear(*sizes).half())
    return module


def _magic(value: str, row: Row) -> bytes:
    """A file of a format that is told by its first bytes."""
    return value.encode("latin-1") + bytes(64)


_RNG: dict[str, Callable[[], Any]] = {"python": random.getstate, "torch": torch.get_rng_state}

BUILDERS: dict[str, Callable[..., Any]] = {
    "model": _model,
    "adam": _adam,
    "tensor": lambda value, row: torch.tensor(value),
    "zeros": lambda value, row: _filled(value, 0),
    "ones": lambda value, row: _filled(value, 1),
    "object": _object,
    "module": _module,
    "numpy": lambda value, row: {"scalar": _NumpyScalar, "array": _NumpyArray}[value](),
    "namespace": lambda value, row: argparse.Namespace(**value),
    "rng": lambda value, row: _RNG[value](),
    "tuple": lambda value, row: tuple(value),
    "path": lambda value, row: pathlib.Path(value),
    "bytes": lambda value, row: value.encode(),
    "magic": _magic,
}


# --- objects of packages that are not installed here ---

_FOREIGN: dict[str, Any] = {}


def _foreign(name: str, *bases: type) -> Any:
    """Return a class, or without bases a function, that pickle stores under a dotted name."""
    if name not in _FOREIGN:
        module, _, last = name.rpartition(".")
        made: Any = type(last, bases, {"__module__": module}) if bases else types.FunctionType(
            (lambda *arguments: None).__code__, {}
        )
        made.__module__, made.__qualname__, made.__name__ = module, last, last
        _FOREIGN[name] = made
    return _FOREIGN[name]


@contextlib.contextmanager
def _importable() -> Iterator[None]:
    """For as long as this lasts, what is foreign is found in the modules that it names."""
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


class _NumpyScalar:
    """Pickled as a numpy float64 is."""

    def __reduce__(self) -> tuple[Any, ...]:
        dtype = _foreign("numpy.dtype", object)
        return _foreign("numpy._core.multiarray.scalar"), (dtype(), b"\x00" * 8)


class _NumpyArray:
    """Pickled as a numpy array is."""

    def __reduce__(self) -> tuple[Any, ...]:
        dtype = _foreign("numpy.dtype", object)
        state = (1, (3,), dtype(), False, b"\x00" * 24)
        return _foreign("numpy._core.multiarray._reconstruct"), (dtype, (0,), b"b"), state


class _RankTensor:
    """Pickled as one rank's part of a DTensor is: a global shape around a local tensor."""

    def __init__(self, local: torch.Tensor, ranks: int) -> None:
        self.local, self.ranks = local, ranks

    def __reduce__(self) -> tuple[Any, ...]:
        dtensor = _foreign("torch.distributed.tensor.DTensor", object)
        spec = _foreign("torch.distributed.tensor._dtensor_spec.DTensorSpec", object)
        shape = (self.local.shape[0] * self.ranks, *self.local.shape[1:])
        strides = self.local.stride()
        layout = (dtensor, torch.float32, shape, strides, 0, None, torch.device("cpu"), False)
        parts = {"_local_tensor": self.local, "_spec": spec()}
        rebuild = vars(torch._utils)["_rebuild_wrapper_subclass"]
        return vars(torch._tensor)["_rebuild_from_type_v2"], (rebuild, dtensor, layout, parts)


# Known before the first file is written, since what reduces to them is pickled inside it.
for _name in ("dtype",):
    _foreign(f"numpy.{_name}", object)
_foreign("numpy._core.multiarray.scalar")
_foreign("numpy._core.multiarray._reconstruct")
_foreign("torch.distributed.tensor.DTensor", object)
_foreign("torch.distributed.tensor._dtensor_spec.DTensorSpec", object)
