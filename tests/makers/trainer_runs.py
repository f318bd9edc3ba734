"""Build tiny runs from data files: real files of every format, and the clutter beside them.

Each file in `tests/data/trainers` holds one trainer's runs, each file in `tests/data/layouts` runs
that any trainer may leave. A run of such a file has these fields:

    about       what is special about it
    like        another run, or several, that are written first into the same folder
    each        columns of values, one value for each checkpoint, oldest first
    model       the names of the model's tensors: a list, or a key of `NAMES`
    tree        the files; a name that ends in / is a folder
    expect      how the run is read (see `tests/test_trainers.py`)
    incomplete  ways in which a save of one checkpoint can be incomplete: `touch`, `remove`,
                `rename` a file, or `cut` one, `to` a size or by a size

`<column>` in a text stands for the checkpoint's value in that column, `<column:07>` formats it; a
text that is nothing else becomes the value itself. A path with columns is written once for each
checkpoint, any other path once, with the values of the newest. Columns that are always there:
`seed`, the position from 1, which decides the values of the tensors, `names`, from `model`, and
`epoch`, a hundredth of `step`.

The content of a file: nothing for an empty file; a text; for .json values; for .safetensors
tensors; for anything else what torch.save is given. In any mapping and any folder, `with` puts in
blocks (of the file's `blocks` or of `tests/data/blocks.yaml`) or other mappings, and `let` changes
columns; in a folder, `empty` lists empty files. A `!tag` calls a writer of a whole file from below,
or a builder of a value from `trainer_values`.
"""

import functools
import hashlib
import json
import os
import pickle
import re
import shutil
import tarfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from tests.makers import deepspeed_folders
from tests.makers.safetensors_files import write_safetensors, write_shards
from tests.makers.trainer_values import Row, build, importable

DATA = Path(__file__).parent.parent / "data"


# --- runs ---


@dataclass(frozen=True, slots=True)
class Part:
    """One tree of files, with the rows and the blocks that it uses."""

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


def names() -> list[str]:
    """Return the names of all runs."""
    return list(_described())


def entries() -> set[str]:
    """Return the entries of the table of trainers that have a data file."""
    files = (DATA / "trainers").glob("*.yaml")
    return {entry for file in files for entry in _listed(_read(file)["entry"])}


def numbered_names() -> dict[str, dict[str, int]]:
    """Return names of checkpoints and the numbers in them by unit."""
    return dict(_read(DATA / "names.yaml"))


@functools.cache
def run(name: str) -> Run:
    """Return the run of that name, whatever file it is in."""
    path, data = _described()[name]
    blocks = {**_read(DATA / "blocks.yaml"), **_read(path).get("blocks", {})}
    parts = [part for other in _listed(data.get("like", [])) for part in run(other).parts]
    rows = _rows(data.get("each", {}), data.get("model", "plain"))
    if parts and "each" not in data:
        rows = list(parts[0].rows)
    return Run(
        name=name,
        parts=[*parts, Part(rows, data.get("tree", {}), blocks)],
        expect=_listed(data.get("expect", [])),
        incomplete=data.get("incomplete", []),
    )


def _rows(columns: Mapping[str, Sequence[Any]], names: str | Sequence[str]) -> list[Row]:
    rows = [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]
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
        return build(data.kind, _value(data.value, row, blocks), row)
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
    """Yield each file's path, its content as the data has it, and its row."""
    rows = _let(tree, rows, blocks)
    for block in _listed(tree.get("with", [])):
        yield from _files(blocks[block], rows, blocks)
    empty = dict.fromkeys(tree.get("empty", []))
    for key, content in {**tree, **empty}.items():
        if key in ("with", "let", "empty"):
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
        with importable():
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


def _zero(path: Path, value: Mapping[str, Any]) -> None:
    """Write a checkpoint of DeepSpeed into the folder of its model's file."""
    options = {key: one for key, one in value.items() if key != "model"}
    deepspeed_folders.save(path.parent, value["model"], **options)


def _pickle(path: Path, value: Any) -> None:
    with importable():
        path.write_bytes(pickle.dumps(value))


def _archive(path: Path, value: Mapping[str, Any]) -> None:
    """Write an archive of torch files."""
    for name, content in value.items():
        torch.save(content, path.with_name(name))
        with tarfile.open(path, "w") as archive:
            archive.add(path.with_name(name), name)
        path.with_name(name).unlink()


def _copy(path: Path, value: str) -> None:
    """Copy a file or a folder beside it."""
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
    "zero": _zero,
    "pickle": _pickle,
    "archive": _archive,
    "link": lambda path, value: path.symlink_to(value),
    "hardlink": lambda path, value: os.link(path.with_name(value), path),
    "copy": _copy,
    "remove": _remove,
    "revision": _revision,
    "snapshot": _snapshot,
}
