"""Files written by `torch.save`, zip archives and the older stream form: where each tensor lies.

The pickled structure is read by `pickles`, which runs nothing; the tensors stay where they are,
stored uncompressed, and are read by position as in any other container. It needs no torch.
"""

import hashlib
import io
import math
import zipfile
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import lru_cache, partial
from typing import Any, NamedTuple

from ckpt_ema.containers import pickles, safetensors
from ckpt_ema.containers.checks import (
    AGAIN,
    AS_IT_IS,
    GATHER,
    HEAD_BYTES,
    OF_ONE_RANK,
    check_start,
    cut_short,
    refused,
)
from ckpt_ema.containers.model_key import every_weight, find_model, numbers, recorded
from ckpt_ema.containers.specs import (
    DTYPE_BITS,
    FileSpec,
    Piece,
    Specs,
    TensorSpec,
    is_packed,
    spanned,
)
from ckpt_ema.errors import Code, RefusedError, some
from ckpt_ema.notices import Notice
from ckpt_ema.options import Reading
from ckpt_ema.storage.protocol import OpenFile, Storage

_LEGACY_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch's magic number, pickled
_DROPPED = TensorSpec("U8", (0,), 0, 0)  # an unreadable tensor that --drop leaves out
_TENSOR = (pickles.PickledTensor, pickles.UnreadTensor)
# Not worth a note.
_PLAIN = ("builtins.", "__builtin__.", "_codecs.", "typing.")
_OF_PARTS = ("torch.distributed.", "torch.device", "torch.serialization.")
_BIG_ENDIAN = "was saved on a big-endian machine"
_DEEPEST = 16  # levels of dicts and lists
_MAX_PICKLE_BYTES = 1 << 30
_LEGACY_BYTES = 1 << 24
_MOST_KNOWN = 16  # pickles whose content is kept
_MOST_KNOWN_BYTES = 1 << 18  # of each; DTensors take seven times that in memory
_MAX_EXPANDED_BYTES = 1 << 20  # of a view with stride 0, where that is more than the whole file


def claims(_name: str) -> bool:
    """Return whether a file of this name is read here: any that no other container claims."""
    return True


def is_torch_file(start: bytes) -> bool:
    """Return whether a file that begins with these bytes was written by torch.save."""
    name_end = 30 + int.from_bytes(start[26:28], "little")  # of a zip's first record
    is_zip = start.startswith(b"PK\x03\x04") and start[30:name_end].endswith(b"/data.pkl")
    return is_zip or (start.startswith(b"\x80") and _LEGACY_MAGIC in start)


Locate = Callable[[pickles.PickledTensor], TensorSpec]
ReadPart = Callable[[str, pickles.Part, Locate], TensorSpec]


def read_specs(
    path: str, storage: Storage, reading: Reading = AS_IT_IS, read_part: ReadPart | None = None
) -> Specs:
    """See `Container.read_specs`; tensors are in the order of the state dict.

    A tensor of which the file has a part is refused, or `read_part` returns it, given its name and
    a function that locates the tensors that it is made of.
    """
    with storage.open(path) as file:
        size_bytes = file.identity.size_bytes
        if safetensors.is_header(file.read(min(size_bytes, HEAD_BYTES), 0), size_bytes):
            return safetensors.read_specs(path, storage, reading)
        structure = read_structure(path, file)
        model = find_model(path, structure.root, reading, _TENSOR)
        tensors = placed(structure, model.values, reading.drop, read_part)
        spec = FileSpec(path, *file.identity, structure.digest)
        hole = file.first_hole()
    others = [name for name in model.values if name not in tensors]
    plain = (*_PLAIN, *_OF_PARTS) if any(map(_is_of_one_rank, structure.ignored)) else _PLAIN
    classes = [name for name in structure.ignored if not name.startswith(plain)]
    rows = (("Not tensors, so not in the average", others), ("Pickled objects not read", classes))
    left_out = [Notice(Code.LEFT_OUT, f"{what}: {some(names)}.") for what, names in rows if names]
    holes = {} if hole is None else {path: hole}
    return Specs(
        *(tensors, (spec,), ({},), (*model.notes, *left_out), model.warnings, holes),
        recorded=recorded(structure.root),
        numbers=numbers(structure.root),
        other_models=model.others,
        is_average=model.is_average,
    )


def read_part(path: str, storage: Storage, reading: Reading) -> Specs:
    """Return the weights in one of the files of a model that are averaged one by one.

    Raises what `Container.read_specs` raises.
    """
    with storage.open(path) as file:
        structure = read_structure(path, file)
        values = every_weight(path, structure.root, _TENSOR, reading.key)
        tensors = placed(structure, values, reading.drop)
        spec, hole = FileSpec(path, *file.identity, structure.digest), file.first_hole()
    holes = {} if hole is None else {path: hole}
    return Specs(tensors, (spec,), ({},), holes=holes, recorded=recorded(structure.root))


def read_chosen(
    path: str, storage: Storage, choose: Callable[[Collection[str]], Container[str]]
) -> Specs:
    """Return the tensors whose dotted paths are chosen, of the model or not.

    Raises what `Container.read_specs` raises.
    """
    with storage.open(path) as file:
        structure = read_structure(path, file)
        found = dict(_tensors_in(structure.root))
        chosen = choose(found.keys())
        tensors = {n: place(structure, n, tensor) for n, tensor in found.items() if n in chosen}
        spec, hole = FileSpec(path, *file.identity, structure.digest), file.first_hole()
    return Specs(tensors, (spec,), ({},), holes={} if hole is None else {path: hole})


def _tensors_in(root: Any) -> Iterator[tuple[str, pickles.PickledTensor]]:
    """Yield every tensor in dicts and lists, with its dotted path; what is shared comes once."""
    waiting, seen = [("", root, _DEEPEST)] if _is_nested(root) else [], {id(root)}
    for place, value, depth in waiting:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            name = f"{place}.{key}".removeprefix(".").encode("utf-8", "replace").decode()
            if isinstance(inner, pickles.PickledTensor):
                yield name, inner
            if _is_nested(inner) and depth and id(inner) not in seen:
                seen.add(id(inner))
                waiting.append((name, inner, depth - 1))


def _is_nested(value: Any) -> bool:
    return isinstance(value, dict | list) or type(value) is tuple


def read_recorded(path: str, storage: Storage) -> Mapping[str, int]:
    """Return the "step" and "epoch" that a file records, whether or not it holds a model."""
    with storage.open(path) as file:
        return recorded(read_structure(path, file).root)


def structure(path: str, storage: Storage) -> bytes:
    """Return the pickled structure of a file of torch.save, unparsed; nothing for any other file.

    Of the older form it is the start, in which the structure is.
    """
    with storage.open(path) as file:
        size_bytes = file.identity.size_bytes
        start = file.read(min(size_bytes, HEAD_BYTES), 0)
        if not is_torch_file(start):
            return b""
        if not start.startswith(b"PK"):
            return file.read(min(size_bytes, _LEGACY_BYTES), 0)
        region = Region(file, 0, size_bytes)
        records, _ = zip_directory(path, region)
        found = [info for name, info in records.items() if name.endswith("/data.pkl")]
        sizes = [info.file_size for info in found]
        if sum(sizes) > _MAX_PICKLE_BYTES:
            return b""
        return b"".join(file.read(i.file_size, data_start(path, region, i)) for i in found)


class Region(NamedTuple):
    """A range of an open file that is a zip archive of its own."""

    file: OpenFile
    start: int
    size_bytes: int


def read_tensor(path: str, region: Region) -> TensorSpec:
    """Return where the tensor is that was saved by itself in a range of the file at `path`."""
    structure = _read_zip(path, region)
    if not isinstance(structure.root, pickles.PickledTensor):
        raise refused(path, "has something else where a tensor was expected")
    return place(structure, f"at byte {region.start}", structure.root)


def read_structure(path: str, file: OpenFile) -> "Structure":
    """Return what a file that torch.save wrote holds; tensors are placed while it is open.

    Raises what `Container.read_specs` raises.
    """
    size_bytes = file.identity.size_bytes
    start = file.read(min(size_bytes, HEAD_BYTES), 0)
    if start.startswith(b"PK\x03\x04"):
        return _read_zip(path, Region(file, 0, size_bytes))
    if start.startswith(b"\x80") and _LEGACY_MAGIC in start:
        return _read_legacy(path, file)
    check_start(path, start)
    kind = "a pickle, but not" if start.startswith(b"\x80") else "not a file"
    raise refused(path, f"is {kind} written by torch.save", AGAIN, Code.WRONG_FORMAT)


def placed(
    structure: "Structure",
    values: Mapping[str, Any],
    drop: Iterable[str],
    read_part: ReadPart | None = None,
) -> dict[str, TensorSpec]:
    """Return where the tensors among these values are; `drop` has globs of ones that may be unread.

    Raises `RefusedError` for a tensor of a kind that cannot be read.
    """
    tensors = {}
    for name, value in values.items():
        if read_part and isinstance(value, pickles.Part) and _is_of_one_rank(value.name):
            tensors[name] = read_part(name, value, partial(place, structure, name))
        elif isinstance(value, pickles.PickledTensor):
            tensors[name] = place(structure, name, value)
        elif isinstance(value, pickles.UnreadTensor):
            if not any(fnmatchcase(name, glob) for glob in drop):
                raise _unreadable(structure.path, name, value)
            tensors[name] = _DROPPED
    return tensors


def _unreadable(path: str, name: str, value: pickles.UnreadTensor) -> RefusedError:
    """Return the error for a tensor of a kind that cannot be read."""
    if isinstance(value, pickles.Array):
        why = "is a numpy array, which is not read"
        hint = f"Save it as a tensor (torch.from_numpy), or leave it out with --drop {name}."
    elif _is_of_one_rank(value.name):
        why = f"is a {value.name}, of which each rank's file holds a part"
        hint = GATHER
    else:
        kind = f"{value.name}: sparse, quantised or without data"
        why = f"is of a kind that safetensors cannot hold ({kind})"
        hint = "Save it dense, or leave it out of the state dict."
    return refused(path, why, hint, Code.UNREADABLE_TENSOR, tensor=name)


def _is_of_one_rank(name: str) -> bool:
    return name.endswith(OF_ONE_RANK)


class Structure(NamedTuple):
    """What a torch file holds, and how its tensors are found."""

    path: str
    size_bytes: int
    root: Any
    ignored: Collection[str]  # classes and functions
    digest: str
    locate: Callable[[pickles.PickledStorage], int]  # returns where a storage's first byte is


def _read_zip(path: str, region: Region) -> Structure:
    records, _ = zip_directory(path, region)
    roots = [name for name in records if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(roots) != 1:
        why = "is a zip file without one data.pkl, not written by torch.save"
        raise refused(path, why, code=Code.WRONG_FORMAT)
    prefix = roots[0].removesuffix("data.pkl")

    def record(name: str) -> bytes:
        info = records[prefix + name]
        if info.file_size > _MAX_PICKLE_BYTES:
            raise refused(
                path, f"has a {name} of {info.file_size} bytes, too large for a structure"
            )
        return region.file.read(info.file_size, data_start(path, region, info))

    if prefix + "byteorder" in records and record("byteorder") != b"little":
        raise refused(path, _BIG_ENDIAN, code=Code.WRONG_FORMAT)
    pickled = record("data.pkl")
    load = _unpickled if len(pickled) <= _MOST_KNOWN_BYTES else _unpickled.__wrapped__
    with _refusing(path):
        root, ignored = load(pickled)

    def locate(storage: pickles.PickledStorage) -> int:
        info = records.get(f"{prefix}data/{storage.key}")
        if info is None or info.file_size < _storage_bytes(storage):
            why = "is missing or shorter than declared"
            raise refused(path, f"is damaged: storage {storage.key} {why}")
        return data_start(path, region, info)

    digest = hashlib.sha256(pickled).hexdigest()
    return Structure(path, region.size_bytes, root, ignored, digest, locate)


def forget_structures() -> None:
    """Forget what was unpickled."""
    _unpickled.cache_clear()


@lru_cache(_MOST_KNOWN)  # the files of one rank have the same structure in every checkpoint
def _unpickled(pickled: bytes) -> tuple[Any, Collection[str]]:
    """Return what was pickled, which nobody may change, and the classes and functions in it."""
    unpickler = pickles.TensorUnpickler(io.BytesIO(pickled))
    return unpickler.load(), unpickler.stand_ins


class _RegionStream(io.RawIOBase):
    """A range of a file, as a stream for the zip library and the unpickler."""

    def __init__(self, region: Region) -> None:
        self._region = region
        self._position = 0

    def readable(self) -> bool:
        return True

    seekable = readable

    def seek(self, offset: int, whence: int = 0) -> int:
        start = (0, self._position, self._region.size_bytes)[whence]
        if start + offset < 0:
            raise OSError("a position before the start")
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self._region.size_bytes - self._position))
        buffer[:count] = self._region.file.read(count, self._region.start + self._position)
        self._position += count
        return count


def zip_directory(path: str, region: Region) -> tuple[dict[str, zipfile.ZipInfo], int]:
    """Return the records of an archive by name, and where their directory is in its region.

    Raises `RefusedError` for an archive that torch.save did not write.
    """
    try:
        with zipfile.ZipFile(_RegionStream(region)) as archive:
            infos, start = archive.infolist(), archive.start_dir
    except (zipfile.BadZipFile, ValueError, OverflowError, NotImplementedError, OSError) as error:
        raise cut_short(path, "its zip directory cannot be read", or_damaged=True) from error
    records = {info.filename: info for info in infos}
    if any(name.endswith("/constants.pkl") for name in records):
        why = "is a TorchScript archive, a program and not a checkpoint"
        raise refused(path, why, "Save the model's state_dict() instead.", Code.NOT_A_CHECKPOINT)
    methods = {info.compress_type for info in infos}
    stored = all(info.compress_size == info.file_size for info in infos)
    if len(records) != len(infos) or not stored or methods - {zipfile.ZIP_STORED}:
        raise refused(path, "has compressed or repeated records, which torch.save never writes")
    return records, start


def data_start(path: str, region: Region, info: zipfile.ZipInfo) -> int:
    """Return where a record's bytes begin, after a local header whose own lengths count."""
    offset, end = region.start + info.header_offset, region.start + region.size_bytes
    inside = region.start <= offset <= end - 30
    header = region.file.read(30, offset) if inside else b""
    lengths = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
    start = offset + 30 + sum(lengths)
    if not header.startswith(b"PK\x03\x04") or start + info.file_size > end:
        raise refused(path, f"is damaged: record {info.filename} is not where its directory has it")
    return start


def _read_legacy(path: str, file: OpenFile) -> Structure:
    """Read the form before torch 1.6: pickles one after the other, then every storage's bytes."""
    size_bytes = file.identity.size_bytes
    whole = _RegionStream(Region(file, 0, size_bytes))
    with io.BufferedReader(whole) as stream:
        _unpickle(path, stream)  # the magic number
        _unpickle(path, stream)  # the protocol's version
        system, _ = _unpickle(path, stream)
        if not isinstance(system, dict) or system.get("little_endian") is not True:
            raise refused(path, _BIG_ENDIAN, code=Code.WRONG_FORMAT)
        root_start = stream.tell()
        root, unpickler = _unpickle(path, stream)
        keys, _ = _unpickle(path, stream)
        position = stream.tell()
    digest = hashlib.sha256(file.read(position - root_start, root_start))
    starts: dict[str, int] = {}
    for key in keys if isinstance(keys, list) else []:
        storage = unpickler.storages.get(key) if isinstance(key, str) else None
        if storage is None:
            raise refused(path, "is damaged: it lists a storage that its structure lacks")
        starts[storage.key] = position + 8  # a count of elements comes first
        position += 8 + _storage_bytes(storage)

    def locate(storage: pickles.PickledStorage) -> int:
        if starts.get(storage.key, size_bytes) + _storage_bytes(storage) > size_bytes:
            raise cut_short(path, f"storage {storage.key} is incomplete")
        return starts[storage.key]

    return Structure(path, size_bytes, root, unpickler.stand_ins, digest.hexdigest(), locate)


def _unpickle(path: str, stream: io.BufferedIOBase) -> tuple[Any, pickles.TensorUnpickler]:
    unpickler = pickles.TensorUnpickler(stream)
    with _refusing(path):
        return unpickler.load(), unpickler


@contextmanager
def _refusing(path: str) -> Iterator[None]:
    """Turn what an unpickler raises into a refusal of the file at `path`."""
    try:
        yield
    except pickles.UnfitTensorError as error:
        why = f"holds a tensor of a kind that safetensors cannot hold ({error})"
        hint = "Leave it out of what is saved."
        raise refused(path, why, hint, Code.UNREADABLE_TENSOR) from error
    except pickles.BROKEN_PICKLE as error:
        why = f"its structure cannot be read ({pickles.what_broke(error)})"
        if isinstance(error, EOFError) or "truncated" in str(error):
            raise cut_short(path, why, or_damaged=True) from error
        raise refused(path, f"is cut short or damaged: {why}") from error


def place(structure: Structure, name: str, tensor: pickles.PickledTensor) -> TensorSpec:
    """Return where a tensor's elements are, checked to lie inside its storage."""
    dtype, shape, strides = tensor.dtype, tensor.shape, tensor.strides
    item_bytes = DTYPE_BITS[dtype] // 8
    start = tensor.offset * item_bytes
    size_bytes = math.prod(shape) * item_bytes
    end = start + spanned(shape, strides) * item_bytes
    most_bytes = max(structure.size_bytes, _MAX_EXPANDED_BYTES)
    if end > _storage_bytes(tensor.storage) or size_bytes > most_bytes:
        hint = "Download or save the file again."
        raise refused(structure.path, "reaches beyond its storage", hint, tensor=name)
    if not size_bytes:
        return TensorSpec(dtype, shape, 0, 0)
    offset = structure.locate(tensor.storage) + start
    piece = Piece(0, offset, (0,) * len(shape), shape, strides)
    return TensorSpec(dtype, shape, 0, offset, () if is_packed(shape, strides) else (piece,))


def _storage_bytes(storage: pickles.PickledStorage) -> int:
    return storage.length * (DTYPE_BITS[storage.dtype] // 8 if storage.dtype else 1)
