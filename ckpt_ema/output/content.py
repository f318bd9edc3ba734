"""What a manifest says of the content of its files, so that damage shows without the checkpoints.

Model files and what is copied beside them have a CRC-32; a state has the checksum of its values.
"""

import os
import zlib
from collections.abc import Iterator, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

from ckpt_ema.fold.checksum import checksum
from ckpt_ema.fold.crc32 import Piece, joined
from ckpt_ema.fold.monitors.checksums import Checksums
from ckpt_ema.fold.monitors.digests import Digests
from ckpt_ema.fold.monitors.protocol import Monitor
from ckpt_ema.output.ledger import Outline
from ckpt_ema.output.publish import StagedOutput
from ckpt_ema.storage.local import Local
from ckpt_ema.trainers.conventions import OWN_FILES, STATE_FILE

_CHUNK_BYTES = 1 << 20


def describe_content(
    outline: Outline, monitors: Sequence[Monitor], staged: StagedOutput, *, is_seen: bool
) -> dict[str, dict[str, Any]]:
    """Return the checksums of each folder of an output, for its manifest.

    Where not everything `is_seen` by the monitors, since a run was resumed, files are read again.
    """
    seen = {one.name: one.state() for one in monitors if is_seen}
    numbers = {name: number for number, name in enumerate(outline.files)}
    found: dict[str, dict[str, Any]] = {}
    for folder, record in outline.manifests.items():
        crcs = {}
        for name in sorted(_names(staged.output / folder)):
            number = numbers.get(os.path.join(folder, name))
            is_patched = number is not None and outline.checksums[number]
            if number is None or is_patched or not is_seen:
                crcs[name] = crc32_of(staged.output / folder / name)
            else:
                fixed, size_bytes = outline.fixed[number]
                pieces = (*fixed, *seen[Digests.name].get(str(number), ()))
                crcs[name] = joined((Piece(*one) for one in pieces), size_bytes)
        found[folder] = {"crc32": {name: f"{crc:08x}" for name, crc in crcs.items()}}
        number = numbers.get(os.path.join(folder, STATE_FILE))
        if number is not None:
            path = staged.output / folder / STATE_FILE
            sums = seen.get(Checksums.name)
            # States are the last foldings, in the order of the manifests.
            place = len(found) - 1 - len(outline.manifests)
            total = sums[place] if sums else checksum_of_state(path)
            found[folder]["state"] = {**record["state"], "checksum": f"{total:016x}"}
    return found


def _names(folder: Path) -> Iterator[str]:
    """Yield the files of an output but for those that people may change, and states."""
    for path in folder.rglob("*"):
        name = os.path.relpath(path, folder)
        if name not in OWN_FILES and path.is_file():
            yield name


def crc32_of(path: Path) -> int:
    """Return the CRC-32 of a file."""
    return reduce(lambda crc, chunk: zlib.crc32(chunk, crc), _chunks(path, 0), 0)


def checksum_of_state(path: Path) -> int:
    """Return the checksum of the values in a state."""
    with Local().open(path) as file:
        start = 8 + int.from_bytes(file.read(8, 0), "little")
    return sum(checksum(bytearray(chunk)) for chunk in _chunks(path, start)) % (1 << 64)


def _chunks(path: Path, start: int) -> Iterator[bytes]:
    with Local().open(path) as file:
        size_bytes = file.identity.size_bytes
        for offset in range(start, size_bytes, _CHUNK_BYTES):
            yield file.read(min(_CHUNK_BYTES, size_bytes - offset), offset)
