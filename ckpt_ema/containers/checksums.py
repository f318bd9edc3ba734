"""Finds where a zip archive keeps the checksums of records whose bytes will change.

`torch.load` ignores a wrong checksum, other readers of zip files report it.
"""

import zipfile
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ckpt_ema.containers.checks import refused
from ckpt_ema.containers.torch_file import Region, data_start, zip_directory

_IN_LOCAL, _IN_CENTRAL = 14, 16  # offsets of the checksum in the two headers of a record
_LOCAL_BYTES, _CENTRAL_BYTES = 30, 46  # of the headers, without what varies
_HAS_DESCRIPTOR = 8  # a flag: the checksum follows the record
_DESCRIPTOR = b"PK\x07\x08"  # which most writers begin it with

Range = tuple[int, int]  # of bytes in a file: start and stop


class Checksum(NamedTuple):
    """The CRC-32 of a range of a file, and where in the file it is written, in 4 bytes each."""

    start: int
    size_bytes: int
    places: Sequence[int]


def meet(ranges: Sequence[Range], start: int, stop: int) -> bool:
    """Return whether any of some ranges, sorted and disjoint, overlaps another one.

    >>> meet([(0, 8), (16, 24)], 8, 16), meet([(0, 8), (16, 24)], 8, 17)
    (False, True)
    """
    before = bisect_left(ranges, (stop,))
    return before > 0 and ranges[before - 1][1] > start


def checksums(path: str, archive: Region, changed: Sequence[Range]) -> Iterator[Checksum]:
    """Yield the checksums of the records of an archive that have bytes in the `changed` ranges.

    These are in order and do not overlap. Raises `RefusedError` if a checksum is not where a writer
    of zip files puts it.
    """
    records, position = zip_directory(path, archive)
    for info in records.values():
        central = archive.start + position
        header = archive.file.read(_CENTRAL_BYTES, central)
        lengths = (int.from_bytes(header[at : at + 2], "little") for at in (28, 30, 32))
        position += _CENTRAL_BYTES + sum(lengths)
        start = data_start(path, archive, info)
        if not meet(changed, start, start + info.file_size):
            continue
        local = archive.start + info.header_offset
        places = [central + _IN_CENTRAL, local + _IN_LOCAL, *_after(archive, info, start)]
        crc = info.CRC.to_bytes(4, "little")
        found = [place for place in places if archive.file.read(4, place) == crc]
        is_apart = not any(meet(changed, place, place + len(crc)) for place in found)
        if found[:1] != places[:1] or len(found) < 2 or not is_apart:
            raise refused(path, f"is damaged: the checksums of record {info.filename} differ")
        yield Checksum(start, info.file_size, tuple(found))


def _after(archive: Region, info: zipfile.ZipInfo, start: int) -> Iterator[int]:
    """Yield where the checksum is that follows a record, if one does."""
    end = start + info.file_size
    if info.flag_bits & _HAS_DESCRIPTOR:
        is_marked = archive.file.read(len(_DESCRIPTOR), end) == _DESCRIPTOR
        yield end + len(_DESCRIPTOR) * is_marked
