"""What a checkpoint records of its own place in the run."""

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from ckpt_ema.containers.source import Source
from ckpt_ema.containers.specs import ModelFiles
from ckpt_ema.errors import IncompleteError
from ckpt_ema.find.names import stem_of
from ckpt_ema.trainers.conventions import RECORDS

_HEAD_BYTES = 4096


class Recorded(NamedTuple):
    """The "step", "epoch" or "time" (in thousandths of a second), and where it is recorded."""

    numbers: Mapping[str, int]
    file: str = "its header"


def recorded_beside(path: Path, source: Source) -> Recorded:
    """Return what small files in a checkpoint's folder, or beside its file, record."""
    is_folder = source.storage.is_folder(path)
    stem = stem_of(path.name)
    for record in RECORDS:
        if is_folder == ("{stem}" in record.file):
            continue
        file = (path if is_folder else path.parent) / record.file.format(stem=stem)
        # The trainer's log follows the step and can be megabytes.
        for most_bytes in (_HEAD_BYTES, sys.maxsize):
            content = source.storage.read(file, most_bytes) or b""
            found = _numbers(content.decode("utf-8", "replace"), file.suffix, record.keys)
            if found:
                return Recorded(found, file.name)
            if len(content) < _HEAD_BYTES:
                break
    return Recorded({})


def recorded_inside(path: Path, model: ModelFiles, source: Source) -> Mapping[str, int]:
    """Return what a checkpoint that is one file records inside; nothing if it is incomplete."""
    if source.storage.is_folder(path):
        return {}
    try:
        return source.read(model).recorded
    except IncompleteError:
        return {}


def _numbers(text: str, suffix: str, keys: Mapping[str, str]) -> dict[str, int]:
    """Return the numbers at the top of a JSON or YAML file, by unit."""
    if suffix == ".yaml":
        return _of_yaml(text, keys)
    found = {}
    for unit, key in keys.items():  # by pattern: the text may be the head of a file
        match = re.search(rf'^\s*[{{,]?\s*"{key}":\s*(\d{{1,18}})\s*[,}}]', text, re.MULTILINE)
        if match:
            found[unit] = int(match[1])
    return found or _of_json(text, keys)


def _of_json(text: str, keys: Mapping[str, str]) -> dict[str, int]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    values = {u: content.get(key) for u, key in keys.items()} if isinstance(content, dict) else {}
    return {unit: value for unit, value in values.items() if type(value) is int}


def _of_yaml(text: str, keys: Mapping[str, str]) -> dict[str, int]:
    found = {}
    for unit, key in keys.items():
        match = re.search(rf"^{key}:\s*(\d{{1,15}})(?:\.(\d+))?\s*$", text, re.MULTILINE)
        if match and unit == "time":
            found[unit] = int(match[1]) * 1000 + int((match[2] or "").ljust(3, "0")[:3])
        elif match:
            found[unit] = int(match[1])
    return found
