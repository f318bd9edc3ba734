"""What small files in or beside a checkpoint record of its place in the run."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ckpt_ema.containers.source import Source
from ckpt_ema.find.names import stem_of
from ckpt_ema.trainers.conventions import RECORDS

_HEAD_BYTES = 4096
_LINES = {  # suffix of a file -> pattern of a line, with groups for an integer and its decimals
    ".json": r'^\s*[{{,]?\s*"{key}":\s*(\d{{1,18}})()\s*[,}}]',
    ".yaml": r"^{key}:\s*(\d{{1,15}})(?:\.(\d+))?\s*$",
}


def recorded_beside(path: Path, source: Source) -> tuple[Mapping[str, int], str]:
    """Return the "step", "epoch" or "time" (in ms) of a checkpoint, and the file's name."""
    is_folder = source.storage.is_folder(path)
    stem = stem_of(path.name)
    for record in RECORDS:
        if is_folder == ("{stem}" in record.file):
            continue
        file = (path if is_folder else path.parent) / record.file.format(stem=stem)
        # The trainer's log follows the step and can be megabytes.
        for most_bytes in (_HEAD_BYTES, None):
            content = source.storage.read(file, most_bytes) or b""
            found = _numbers(content.decode("utf-8", "replace"), file.suffix, record.keys)
            if found:
                return found, file.name
            if len(content) < _HEAD_BYTES:
                break
    return {}, ""


def _numbers(text: str, suffix: str, keys: Mapping[str, str]) -> dict[str, int]:
    """Return the numbers at the top of a JSON or YAML file, or of its head, by unit."""
    found = {}
    for unit, key in keys.items():
        match = re.search(_LINES[suffix].format(key=key), text, re.MULTILINE)
        if match:
            decimals = (match[2] or "").ljust(3, "0")[:3] if unit == "time" else ""
            found[unit] = int(match[1] + decimals)
    if found or suffix != ".json":
        return found
    values = {unit: json_object(text).get(key) for unit, key in keys.items()}
    return {unit: value for unit, value in values.items() if type(value) is int}


def json_object(text: str | bytes) -> Mapping[str, Any]:
    """Return the object of a JSON text, empty if it holds none."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
