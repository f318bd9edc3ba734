"""The header of a safetensors file: read as strictly as the format is written, and made.

The format: 8 bytes, the header's length N as an unsigned little-endian integer; N bytes of JSON,
an object of name -> {dtype, shape, data_offsets} and perhaps __metadata__, string to string; then
the data, covered by the tensors without gap or overlap. Whatever the safetensors library refuses
is refused here too, and so is what it accepts against the format: duplicate names, blanks before
the object, unknown fields.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import accumulate, chain, pairwise, repeat
from typing import Any

from ckpt_ema.containers.checks import AGAIN, AS_IT_IS, HEAD_BYTES, check_start, cut_short, refused
from ckpt_ema.containers.specs import (
    DTYPE_BITS,
    WRITTEN_AS,
    FileSpec,
    Specs,
    TensorSpec,
    is_safetensors,
    packed_bytes,
)
from ckpt_ema.errors import Code, RefusedError
from ckpt_ema.options import Reading
from ckpt_ema.storage.protocol import OpenFile, Storage
from ckpt_ema.trainers.conventions import METADATA_KEYS

MAX_HEADER_BYTES = 100_000_000
_LARGEST = 2**64 - 1  # sizes are 64-bit in the format


claims = is_safetensors


def read_specs(path: str, storage: Storage, reading: Reading = AS_IT_IS) -> Specs:
    """See `Container.read_specs`; tensors are in the order of their bytes."""
    if reading.key is not None:
        why = f"and {path} is a safetensors file, which has none"
        message = f"--key {reading.key} names a dict in a torch file, {why}."
        raise RefusedError(message, code=Code.CONFLICTING_OPTIONS, path=path)
    with storage.open(path) as file:
        size_bytes = file.identity.size_bytes
        raw = _header_bytes(file)
        digest = hashlib.sha256(raw).hexdigest()
        spec = FileSpec(path, *file.identity, digest)
        hole = file.first_hole()
    content = _known.get((digest, size_bytes))
    if content is None:
        content = _content(path, raw, size_bytes)
        if len(_known) >= _MOST_KNOWN:
            _known.clear()
        _known[digest, size_bytes] = content
    tensors, metadata = content
    holes = {} if hole is None else {path: hole}
    return Specs(tensors, (spec,), (metadata,), holes=holes, recorded=_recorded(metadata))


def forget_headers() -> None:
    """Forget the headers that were read."""
    _known.clear()


_Content = tuple[Mapping[str, TensorSpec], Mapping[str, str]]  # tensors and metadata of a header
# By digest of the header and size of the file: most checkpoints of a run have the same headers.
_known: dict[tuple[str, int], _Content] = {}
_MOST_KNOWN = 4096  # more shards than a checkpoint has, so that the next one finds its own


def _content(path: str, raw: bytes, size_bytes: int) -> _Content:
    header = _parse(path, raw)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise refused(path, "has a broken header: __metadata__ must map strings to strings")
    start = 8 + len(raw)
    tensors = _all_at_once(path, header, start, size_bytes)
    return tensors or _one_by_one(path, header, start, size_bytes), metadata


def _all_at_once(
    path: str, header: Mapping[str, Any], start: int, size_bytes: int
) -> dict[str, TensorSpec] | None:
    """Return the tensors of a header without fault that has them in the order of their bytes.

    None leaves the verdict to `_one_by_one`, which takes five times as long.
    """
    entries = header.values()
    try:
        dtypes, shapes = [one["dtype"] for one in entries], [one["shape"] for one in entries]
        offsets = [one["data_offsets"] for one in entries]
        begins, ends = [begin for begin, _ in offsets], [end for _, end in offsets]
        kinds = [*zip(dtypes, map(tuple, shapes), strict=True)]
        one_of = dict(zip(kinds, header, strict=True))  # each kind -> a tensor that stands for it
        bytes_of = {
            kind: _tensor(path, name, header[name], start).size_bytes
            for kind, name in one_of.items()
        }
    except (RefusedError, KeyError, TypeError, ValueError):
        return None
    # True and 1.0 would be of the kind of 1.
    numbers = chain(begins, ends, chain.from_iterable(shapes))
    is_plain = {*map(type, numbers)} <= {int} and {*map(type, shapes)} <= {list}
    is_plain = is_plain and {*map(type, entries)} <= {dict} and {*map(len, entries)} <= {3}
    covered = [0, *accumulate(map(bytes_of.__getitem__, kinds))]
    if not is_plain or begins != covered[:-1] or ends != covered[1:]:
        return None
    if start + covered[-1] != size_bytes:
        return None
    sizes = (shape for _, shape in kinds)
    specs = map(TensorSpec, dtypes, sizes, repeat(0), map(start.__add__, begins))
    return dict(zip(header, specs, strict=True))


def _one_by_one(
    path: str, header: Mapping[str, Any], start: int, size_bytes: int
) -> dict[str, TensorSpec]:
    """Return the tensors of a header in the order of their bytes; refuses the first fault."""
    tensors = [(name, _tensor(path, name, entry, start)) for name, entry in header.items()]
    tensors.sort(key=lambda item: (item[1].offset, item[1].size_bytes))
    end = start
    for name, tensor in tensors:
        if tensor.offset != end:
            why = "overlaps another" if tensor.offset < end else "leaves a gap before it"
            raise refused(path, why, tensor=name)
        end += tensor.size_bytes
    if end > size_bytes:
        promised = f"{end - start} bytes of data, the file has {size_bytes - start}"
        raise cut_short(path, f"its header promises {promised}")
    if end < size_bytes:
        hint = f"Is it damaged, or two files in one? {AGAIN}"
        raise refused(path, f"has {size_bytes - end} bytes after its last tensor", hint)
    return dict(tensors)


def _recorded(metadata: Mapping[str, str]) -> dict[str, int]:
    """Return the step and epoch that trainers record in a header."""
    found = {}
    for unit, keys in METADATA_KEYS.items():
        values = (_at(metadata, *key.split(".", 1)) for key in keys)
        numbers = [int(value) for value in values if re.fullmatch(r"[0-9]{1,18}", value)]
        if numbers:
            found[unit] = numbers[0]
    return found


def _at(metadata: Mapping[str, str], key: str, inner: str = "") -> str:
    """Return a value of the metadata, or an inner one of the JSON object that it holds."""
    value: Any = metadata.get(key, "")
    if inner and value:
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return ""
        value = value.get(inner) if isinstance(value, dict) else None
    return str(value)


def make_header(
    tensors: Sequence[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, list[int]]:
    """Return the bytes before the data of tensors (name, dtype, shape), and each one's offset.

    The data follows in the order given; offsets count from the start of the file. The header is
    padded with spaces to a multiple of 8 bytes, as the library does, so that data is aligned.
    """
    # Many tensors share a dtype and shape, and so the text of these.
    kinds = {kind: _kind_text(*kind) for kind in {tensor[1:] for tensor in tensors}}
    bytes_of = {kind: packed_bytes(*kind) for kind in kinds}
    ends = [0, *accumulate(bytes_of[tensor[1:]] for tensor in tensors)]
    encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
    entries = [f'"__metadata__":{encode(dict(metadata))}'] if metadata else []
    entries += [
        f'{encode(name)}:{{{kinds[dtype, shape]},"data_offsets":[{begin},{end}]}}'
        for (name, dtype, shape), (begin, end) in zip(tensors, pairwise(ends), strict=True)
    ]
    text = f"{{{','.join(entries)}}}".encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, [start + end for end in ends[:-1]]


def _kind_text(dtype: str, shape: tuple[int, ...]) -> str:
    return f'"dtype":"{dtype}","shape":[{",".join(map(str, shape))}]'


def is_header(start: bytes, size_bytes: int) -> bool:
    """Return whether a file of this size begins with the header of a safetensors file.

    Its length may look like the first bytes of another format: 640 like those of a pickle.
    """
    return start[8:9] == b"{" and 8 + int.from_bytes(start[:8], "little") <= size_bytes


def _header_bytes(file: OpenFile) -> bytes:
    path, size_bytes = file.path, file.identity.size_bytes
    start = file.read(min(size_bytes, HEAD_BYTES), 0)
    if not is_header(start, size_bytes):
        check_start(path, start)
        if start.startswith((b"PK\x03\x04", b"\x80\x02")):
            why = "is a torch file under a safetensors name"
            raise refused(path, why, "Rename it to .bin.", Code.WRONG_FORMAT)
    length = int.from_bytes(start[:8], "little")
    if size_bytes < 8 or length > MAX_HEADER_BYTES or start[8:9] not in (b"{", b""):
        why = "is not a safetensors file: it does not start with a header"
        raise refused(path, why, AGAIN, Code.WRONG_FORMAT)
    if 8 + length > size_bytes:
        why = f"its header alone takes {8 + length} bytes, the file has {size_bytes}"
        raise cut_short(path, why)
    return file.read(length, 8)


def _parse(path: str, raw: bytes) -> dict[str, Any]:
    load = partial(
        json.loads,
        parse_constant=_size,
        parse_int=_size if re.search(rb"-[0-9]", raw) else int,
    )
    try:
        text = raw.decode("utf-8")
        header = load(text)
        if not _names_are_unique(raw, header):
            header = load(text, object_pairs_hook=_unique)
        if b"\\ud" in raw or b"\\uD" in raw:  # fails for lone surrogates
            json.dumps(header, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        if raw.endswith(b"\0"):
            raise cut_short(path, "its header ends in zeros") from error
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise refused(path, f"has a broken header: {reason}") from error
    if not isinstance(header, dict):
        raise refused(path, "has a broken header: it is not a JSON object")
    return header


def _names_are_unique(raw: bytes, header: object) -> bool:
    """Return whether no name can be there twice, because each has a colon after it.

    Other colons are counted where they are in texts; with escapes, nothing can be said.
    """
    if not isinstance(header, dict) or not all(isinstance(one, dict) for one in header.values()):
        return False
    metadata = header.get("__metadata__", {})
    texts = "".join([*header, *metadata, *map(str, metadata.values())])
    names = len(header) + sum(map(len, header.values()))
    return raw.count(b":") == names + texts.count(":") and b"\\u" not in raw


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"{twice!r} is there twice")
    return result


def _size(text: str) -> int:
    if not text.isdigit():  # int() turns -0 into a size; the library refuses it
        raise ValueError(f"{text} is not a size")
    return int(text)


def _tensor(path: str, name: str, entry: object, start: int) -> TensorSpec:
    """Check one entry of the header of a file whose data starts at byte `start`."""
    refuse = partial(refused, path, tensor=name)
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise refuse("must have dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS or dtype in WRITTEN_AS:
        raise refuse(f"has an unknown dtype, {dtype}")
    if not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2:
        raise refuse("has a shape or data_offsets that are not lists of sizes")
    bits = 1
    for factor in (*shape, DTYPE_BITS[dtype]):  # as the library multiplies: no step may overflow
        bits *= factor
        if bits > _LARGEST:
            raise refuse(f"has a shape too large for 64 bits, {shape}")
    span_bytes = offsets[1] - offsets[0]
    if bits % 8 or span_bytes != bits // 8:
        takes = f"{shape} in {dtype} takes {bits / 8:g}"
        raise refuse(f"spans {span_bytes} bytes, but its shape {takes}")
    return TensorSpec(dtype, tuple(shape), 0, start + offsets[0])


def _sizes(values: object) -> bool:
    if not isinstance(values, list) or not set(map(type, values)) <= {int}:
        return False
    return not values or (min(values) >= 0 and max(values) <= _LARGEST)
