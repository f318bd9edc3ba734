"""Files written by `torch.save`, zip archives and the older stream form: where each tensor lies.

The pickled structure is read by `unpickle`, which runs nothing; the tensors stay where they are,
stored uncompressed, and are read by position like those of any other format. Torch is not needed.
"""

import hashlib
import io
import math
import zipfile
from collections.abc import Callable
from typing import IO, Any, NamedTuple, cast

from ckpt_ema.containers.model_key import find_model, numbers, recorded
from ckpt_ema.containers.pickles import (
    BROKEN_PICKLE,
    PickledStorage,
    PickledTensor,
    TensorUnpickler,
    UnfitTensorError,
    UnreadTensor,
    check_lengths,
    what_broke,
)
from ckpt_ema.containers.specs import (
    DTYPE_BITS,
    FileSpec,
    Piece,
    Specs,
    TensorSpec,
    is_packed,
    spanned,
)
from ckpt_ema.errors import IncompleteError, RefusedError, printable, some
from ckpt_ema.storage.protocol import OpenFile, Storage

_LEGACY_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch's magic number, pickled
_PLAIN = ("builtins.", "__builtin__.", "typing.")  # not worth a note
_START_BYTES = 32  # by which the form of a file is told
_MAX_PICKLE_BYTES = 1 << 30
_MAX_EXPANDED_BYTES = 1 << 20  # of a view with stride 0, where that is more than the whole file


def read_specs(path: str, storage: Storage, key: str | None = None) -> Specs:
    """The tensors of the model in one torch file, in the order of its state dict.

    `key` is where the model is in it, None to look for it. Raises `IncompleteError` for a file that
    is cut, `RefusedError` for one that is no torch file, is inconsistent, or holds no model.
    """
    with storage.open(path) as file:
        size_bytes = file.identity.size_bytes
        region = Region(file, 0, size_bytes)
        start = file.read(min(size_bytes, _START_BYTES), 0)
        if start.startswith(b"PK\x03\x04"):
            root, ignored, digest, locate = _read_zip(path, region)
        elif start.startswith(b"\x80") and _LEGACY_MAGIC in start:
            root, ignored, digest, locate = _read_legacy(path, file)
        else:
            raise _no_torch_file(path, start)
        model = find_model(path, root, key, (PickledTensor, UnreadTensor))
        tensors = {
            name: _place(path, name, tensor, locate, size_bytes)
            for name, tensor in model.values.items()
            if _is_tensor(path, name, tensor)
        }
        spec = FileSpec(path, *file.identity, digest)
        hole = file.first_hole()
    others = [str(name) for name, value in model.values.items() if name not in tensors]
    notes = [*model.notes]
    if others:
        notes.append(f"left out of the model, being no tensors: {some(others)}")
    ignored = [name for name in ignored if not name.startswith(_PLAIN)]
    if ignored:
        notes.append(f"skipped objects in the files that are no tensors: {some(ignored)}")
    return Specs(
        tensors,
        (spec,),
        ({},),
        tuple(notes),
        tuple(model.warnings),
        {} if hole is None else {path: hole},
        recorded(root),
        numbers=numbers(root),
    )


class Region(NamedTuple):
    """A range of an open file that is a zip archive of its own."""

    file: OpenFile
    start: int
    size_bytes: int


def read_tensor(path: str, region: Region) -> TensorSpec:
    """Where the one tensor is that was saved by itself in a range of the file at `path`.

    Raises `RefusedError` for anything else.
    """
    root, _, _, locate = _read_zip(path, region)
    if not isinstance(root, PickledTensor):
        raise RefusedError(f"{printable(path)} has something else where a tensor was expected.")
    return _place(path, f"at byte {region.start}", root, locate, region.size_bytes)


def _is_tensor(path: str, name: str, value: object) -> bool:
    """Whether it is a tensor that can be read; raises for one that can not."""
    if isinstance(value, UnreadTensor):
        raise RefusedError(
            f"{printable(path)}: tensor {printable(name)} is of a kind that safetensors cannot hold"
            f" ({printable(value.name)}: sparse, quantised, without data, or a"
            " DTensor, of which each rank's file has a part).",
            "Save it dense, or leave it out of the state dict.",
        )
    return isinstance(value, PickledTensor)


_Locate = Callable[[PickledStorage], int]  # the position in the file of a storage's first byte
_Structure = tuple[Any, list[str], str, _Locate]


def _no_torch_file(path: str, start: bytes) -> RefusedError:
    if not start:
        return IncompleteError(f"{printable(path)} is empty.", "An interrupted save? Leave it out.")
    if start.startswith(b"version https"):
        return RefusedError(f"{printable(path)} is a Git LFS pointer.", "Run `git lfs pull`.")
    return RefusedError(
        f"{printable(path)} is not a file written by torch.save.", "Fetch or save it again."
    )


def _read_zip(path: str, region: Region) -> _Structure:
    records = _zip_records(path, region)
    roots = [name for name in records if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise RefusedError(
            f"{printable(path)} is a zip file without one data.pkl, not written by torch.save."
        )
    prefix = roots[0].removesuffix("data.pkl")

    def record(name: str) -> bytes:
        info = records[prefix + name]
        if info.file_size > _MAX_PICKLE_BYTES:
            raise RefusedError(f"{printable(path)}: its {name} is too large to be a structure.")
        return region.file.read(info.file_size, _data_start(path, region, info))

    if prefix + "byteorder" in records and record("byteorder") != b"little":
        raise RefusedError(f"{printable(path)} was saved on a big-endian machine.")
    pickled = record("data.pkl")
    root, unpickler = _unpickle(path, io.BytesIO(pickled))

    def locate(storage: PickledStorage) -> int:
        info = records.get(f"{prefix}data/{storage.key}")
        if info is None or info.file_size < _storage_bytes(storage):
            raise RefusedError(
                f"{printable(path)} is damaged: storage {printable(storage.key)} is missing or"
                " shorter than declared."
            )
        return _data_start(path, region, info)

    return root, unpickler.ignored, hashlib.sha256(pickled).hexdigest(), locate


class _RegionStream(io.RawIOBase):
    """A range of a file, as a stream for the zip library."""

    def __init__(self, region: Region) -> None:
        self._region = region
        self._position = 0

    def seekable(self) -> bool:
        """It can be moved in."""
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        """Move to a position that counts from the start of the range."""
        start = (0, self._position, self._region.size_bytes)[whence]
        if start + offset < 0:
            raise OSError("a position before the start")
        self._position = start + offset
        return self._position

    def tell(self) -> int:
        """Where it is."""
        return self._position

    def readable(self) -> bool:
        """It can be read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer, or less of it at the end of the range."""
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def read(self, count: int = -1) -> bytes:
        """At most `count` bytes, fewer at the end of the range."""
        left = max(0, self._region.size_bytes - self._position)
        count = left if count < 0 else min(count, left)
        data = self._region.file.read(count, self._region.start + self._position)
        self._position += len(data)
        return data


def _zip_records(path: str, region: Region) -> dict[str, zipfile.ZipInfo]:
    try:
        with zipfile.ZipFile(_RegionStream(region)) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, ValueError, OverflowError, NotImplementedError, OSError) as error:
        raise IncompleteError(
            f"{printable(path)} is cut short or damaged: its zip directory cannot be read.",
            "An interrupted save? Leave it out.",
        ) from error
    records = {info.filename: info for info in infos}
    if any(name.endswith("/constants.pkl") for name in records):
        raise RefusedError(
            f"{printable(path)} is a TorchScript archive, a program and not a checkpoint.",
            "Save the model's state_dict() instead.",
        )
    stored = all(
        info.compress_type == zipfile.ZIP_STORED and info.compress_size == info.file_size
        for info in infos
    )
    if len(records) != len(infos) or not stored:
        raise RefusedError(
            f"{printable(path)} has compressed or repeated records, which torch.save never writes."
        )
    return records


def _data_start(path: str, region: Region, info: zipfile.ZipInfo) -> int:
    """Where in the file a record's bytes begin, after a local header whose own lengths count."""
    offset, end = region.start + info.header_offset, region.start + region.size_bytes
    inside = region.start <= offset <= end - 30
    header = region.file.read(30, offset) if inside else b""
    name_bytes = int.from_bytes(header[26:28], "little")
    extra_bytes = int.from_bytes(header[28:30], "little")
    start = offset + 30 + name_bytes + extra_bytes
    if not header.startswith(b"PK\x03\x04") or start + info.file_size > end:
        raise RefusedError(
            f"{printable(path)} is damaged: record {printable(info.filename)} is not where its"
            " directory says."
        )
    return start


def _read_legacy(path: str, file: OpenFile) -> _Structure:
    """The form before torch 1.6: pickles one after the other, then every storage's bytes."""
    size_bytes = file.identity.size_bytes
    whole = _RegionStream(Region(file, 0, size_bytes))
    with cast(IO[bytes], io.BufferedReader(whole)) as stream:
        _unpickle(path, stream)  # the magic number
        _unpickle(path, stream)  # the protocol's version
        system, _ = _unpickle(path, stream)
        if not isinstance(system, dict) or system.get("little_endian") is not True:
            raise RefusedError(f"{printable(path)} was saved on a big-endian machine.")
        root_start = stream.tell()
        root, unpickler = _unpickle(path, stream)
        keys, _ = _unpickle(path, stream)
        position = stream.tell()
    digest = hashlib.sha256(file.read(position - root_start, root_start))
    starts: dict[str, int] = {}
    for key in keys if isinstance(keys, list) else []:
        storage = unpickler.storages.get(key) if isinstance(key, str) else None
        if storage is None:
            raise RefusedError(
                f"{printable(path)} is damaged: it lists a storage that its structure lacks."
            )
        starts[storage.key] = position + 8  # a count of elements comes first
        position += 8 + _storage_bytes(storage)

    def locate(storage: PickledStorage) -> int:
        if starts.get(storage.key, size_bytes) + _storage_bytes(storage) > size_bytes:
            raise IncompleteError(
                f"{printable(path)} is cut short: storage {printable(storage.key)} is not whole.",
                "An interrupted save? Leave it out.",
            )
        return starts[storage.key]

    return root, unpickler.ignored, digest.hexdigest(), locate


def _unpickle(path: str, stream: IO[bytes]) -> tuple[Any, TensorUnpickler]:
    unpickler = TensorUnpickler(stream)
    try:
        check_lengths(stream)
        return unpickler.load(), unpickler
    except UnfitTensorError as error:
        raise RefusedError(
            f"{printable(path)} holds a tensor of a kind that safetensors cannot hold"
            f" ({printable(error)}).",
            "Leave it out of what is saved.",
        ) from error
    except BROKEN_PICKLE as error:
        is_cut = isinstance(error, EOFError) or "truncated" in str(error)
        raise (IncompleteError if is_cut else RefusedError)(
            f"{printable(path)} is cut short or damaged: its structure cannot be read"
            f" ({what_broke(error)})."
        ) from error


def _place(
    path: str, name: str, tensor: PickledTensor, locate: _Locate, file_bytes: int
) -> TensorSpec:
    """Where a tensor's elements are, checked to lie inside its storage."""
    dtype, shape, strides = tensor.dtype, tensor.shape, tensor.strides
    item_bytes = DTYPE_BITS[dtype] // 8
    start = tensor.offset * item_bytes
    size_bytes = math.prod(shape) * item_bytes
    end = start + spanned(shape, strides) * item_bytes
    if end > _storage_bytes(tensor.storage) or size_bytes > max(file_bytes, _MAX_EXPANDED_BYTES):
        raise RefusedError(
            f"{printable(path)}: tensor {printable(name)} reaches beyond its storage; the file is"
            " damaged or not what it seems."
        )
    if not size_bytes:
        return TensorSpec(dtype, shape, 0, 0)
    offset = locate(tensor.storage) + start
    if is_packed(shape, strides):
        return TensorSpec(dtype, shape, 0, offset)
    piece = Piece(0, offset, (0,) * len(shape), shape, strides)
    return TensorSpec(dtype, shape, 0, offset, (piece,))


def _storage_bytes(storage: PickledStorage) -> int:
    return storage.length * (DTYPE_BITS[storage.dtype] // 8 if storage.dtype else 1)
