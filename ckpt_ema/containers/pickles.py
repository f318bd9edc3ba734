"""The structure of a torch pickle without torch and without trust: nothing from a file ever runs.

A pickle builds objects by calling what it names. Here the few names that torch's tensors need
lead to the functions below, which only take notes; every other name leads to an inert stand-in
that accepts anything and does nothing. So neither an unknown class nor a hostile one is imported.
"""

import pickle
import struct
from collections.abc import Callable, Iterable
from typing import IO, Any, ClassVar, NamedTuple

from ckpt_ema.errors import printable

# What torch calls a storage's or a tensor's dtype, and what safetensors calls it.
_STORAGE_DTYPES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
    "ComplexFloatStorage": "C64",
}
_TORCH_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "uint16": "U16",
    "uint32": "U32",
    "uint64": "U64",
    "bool": "BOOL",
    "complex64": "C64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e8m0fnu": "F8_E8M0",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
}


# How long the argument of an opcode is (pickletools describes them); all others have none.
_FIXED = dict(
    zip(b"KMJGqhrj\x80\x82\x83\x84\x95", (1, 2, 4, 8, 1, 1, 4, 4, 1, 1, 2, 4, 8), strict=True)
)
_COUNTED = dict(
    zip(b"UTXCB\x8c\x8d\x8e\x96\x8a\x8b", (1, 4, 4, 1, 4, 1, 8, 8, 8, 1, 4), strict=True)
)
_LINES = dict(zip(b"ciFILSVPgp", (2, 2, 1, 1, 1, 1, 1, 1, 1, 1), strict=True))

_LONG_BINPUT, _PUT, _FRAME = b"rp\x95"

MAX_DIMENSIONS = 64  # torch's own kernels take no more
_MAX_STAND_INS = 1_000


class PickledStorage(NamedTuple):
    """A run of bytes elsewhere in the file, as the pickle announces it."""

    dtype: str | None  # None: untyped, `length` is in bytes
    key: str
    length: int


class PickledTensor(NamedTuple):
    """A view of a storage; as unchecked as everything that a pickle says."""

    storage: PickledStorage
    offset: int  # in elements
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements
    dtype: str


class Inert:
    """Stands in for any class or function that a pickle names; holds and does nothing."""

    name = "?"

    def __new__(cls, *_args: Any, **_options: Any) -> "Inert":
        """Accept the arguments of any constructor or call."""
        return object.__new__(cls)

    def __init__(self, *_args: Any, **_options: Any) -> None:
        """Drop them."""

    def __setstate__(self, _state: Any) -> None:
        """Drop the state."""

    def __setitem__(self, _key: Any, _value: Any) -> None:
        """Drop an item of what was a mapping."""

    def append(self, _value: Any) -> None:
        """Drop an item of what was a list."""

    def extend(self, _values: Any) -> None:
        """Drop the items of what was a list."""


class UnreadTensor(Inert):
    """Stands in for a tensor of a kind that safetensors cannot hold."""


class _Dict(dict[Any, Any]):
    """An OrderedDict whose attributes a pickle cannot set."""

    __slots__ = ()

    def __init__(self, pairs: Any = ()) -> None:
        super().__init__()
        for key, value in pairs:
            _check_keys((key,))
            self[key] = value

    def __setstate__(self, _state: Any) -> None:
        """Drop the attributes, `_metadata` in torch's state dicts."""


class _Known(NamedTuple):
    """A function for a pickle to call; unlike a bare one, without attributes that it could set."""

    function: Callable[..., Any]

    def __call__(self, *arguments: Any) -> Any:
        return self.function(*arguments)


class _StorageType(NamedTuple):
    dtype: str | None


class Dtype(NamedTuple):
    """A dtype, by its name in safetensors."""

    name: str


class UnfitTensorError(pickle.UnpicklingError):
    """The pickle is sound, but holds tensors of a kind that safetensors cannot hold."""


# What a malformed or hostile pickle can raise in the unpickler; each becomes one sentence.
BROKEN_PICKLE = (
    pickle.UnpicklingError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    OverflowError,
    RecursionError,
    TypeError,
    ValueError,
    AssertionError,
    struct.error,
)


def what_broke(error: BaseException) -> str:
    """What is wrong with a pickle, of an error that it raised."""
    if isinstance(error, KeyError):
        return "it is no pickle"  # of which the unpickler says but the number of a byte
    return printable(error) or "it ends too soon"


def check_lengths(stream: IO[bytes]) -> None:
    """Refuse a pickle with lengths beyond its file, or memo numbers beyond its count of opcodes.

    An unpickler allocates what it is told before it reads; no writer of pickles numbers its memo
    beyond its opcodes. The stream is left where it was.
    """
    start = stream.tell()
    size_bytes = stream.seek(0, 2) - start
    stream.seek(start)
    opcodes = 0
    while (opcode := stream.read(1)) not in (b".", b""):
        code, claim, limit = opcode[0], 0, size_bytes
        opcodes += 1
        if code in _FIXED:
            argument = stream.read(_FIXED[code])
            if code in (_LONG_BINPUT, _FRAME):
                claim = int.from_bytes(argument, "little")
                limit = opcodes if code == _LONG_BINPUT else size_bytes
        elif code in _COUNTED:
            claim = int.from_bytes(stream.read(_COUNTED[code]), "little")
            if claim <= size_bytes:
                _skip(stream, claim)
        elif code in _LINES:
            lines = [stream.readline() for _ in range(_LINES[code])]
            claim, limit = (int(lines[0]), opcodes) if code == _PUT else (0, 0)
        if claim > limit:
            raise pickle.UnpicklingError("it claims more than the file has")
    stream.seek(start)


def _skip(stream: IO[bytes], count: int) -> None:
    if count < 1 << 16:
        stream.read(count)  # much faster than seek, which a buffered file asks the system for
    else:
        stream.seek(count, 1)


def _check_keys(keys: Iterable[Any]) -> None:
    """Refuse tuples of tuples as keys: hashing them deep ends the process, and doubled, never."""
    for key in keys:
        if isinstance(key, tuple) and any(isinstance(part, tuple) for part in key):
            raise pickle.UnpicklingError("a dict with nested tuples for keys")


_PythonUnpickler: Any = pickle._Unpickler  # whose methods the type stubs do not list


class TensorUnpickler(_PythonUnpickler):  # type: ignore[misc]
    """Unpickles to dicts, lists and `PickledTensor`, taking notes on the way.

    `storages` has every storage by its key, `ignored` names what was stood in for. It is Python's
    own unpickler in Python, since in the one written in C keys cannot be checked before they hash.
    """

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(_PythonUnpickler.dispatch)

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file, encoding="utf-8")
        self.storages: dict[str, PickledStorage] = {}
        self._stand_ins: dict[str, type[Inert]] = {}

    @property
    def ignored(self) -> list[str]:
        """The full names of the classes and functions that were stood in for."""
        return list(self._stand_ins)

    def load_setitem(self) -> None:
        """Put one item into a dict."""
        _check_keys(self.stack[-2:-1])
        super().load_setitem()

    def load_setitems(self) -> None:
        """Put items into a dict."""
        _check_keys(self.stack[::2])
        super().load_setitems()

    def load_dict(self) -> None:
        """Make a dict of items."""
        _check_keys(self.stack[::2])
        super().load_dict()

    def load_additems(self) -> None:
        """Put items into a set."""
        _check_keys(self.stack)
        super().load_additems()

    def load_frozenset(self) -> None:
        """Make a frozenset of items."""
        _check_keys(self.stack)
        super().load_frozenset()

    for _opcode, _load in (
        (pickle.SETITEM, load_setitem),
        (pickle.SETITEMS, load_setitems),
        (pickle.DICT, load_dict),
        (pickle.ADDITEMS, load_additems),
        (pickle.FROZENSET, load_frozenset),
    ):
        dispatch[_opcode[0]] = _load

    def find_class(self, module: str, name: str) -> Any:
        """The inert counterpart of any global; never imports."""
        known = _KNOWN.get((module, name))
        if known is not None:
            return known
        if module in ("torch", "torch.storage") and name in _STORAGE_DTYPES:
            return _StorageType(_STORAGE_DTYPES[name])
        if module == "torch" and name in _TORCH_DTYPES:
            return Dtype(_TORCH_DTYPES[name])
        full_name = f"{module}.{name}"
        if full_name not in self._stand_ins:
            if len(self._stand_ins) == _MAX_STAND_INS:
                raise pickle.UnpicklingError("more kinds of objects than any checkpoint has")
            kind = UnreadTensor if full_name.startswith("torch._utils._rebuild_") else Inert
            self._stand_ins[full_name] = type("StandIn", (kind,), {"name": full_name})
        return self._stand_ins[full_name]

    def persistent_load(self, pid: Any) -> Any:
        """A storage, which torch pickles as ("storage", type, key, device, count, ...).

        Before torch 1.6, the class of a pickled module was another: ("module", class, ...).
        """
        if pid[0] == "module" and isinstance(pid[1], type):
            return pid[1]
        kind, storage_type, key, _device, count, *views = pid
        if isinstance(storage_type, type) and issubclass(storage_type, Inert):
            raise UnfitTensorError(storage_type.name)
        if kind != "storage" or not isinstance(storage_type, _StorageType) or any(views):
            raise pickle.UnpicklingError("a storage of an unknown kind")
        if not isinstance(key, str) or type(count) is not int or not 0 <= count < 2**63:
            raise pickle.UnpicklingError("a storage with an impossible key or size")
        self.storages[key] = PickledStorage(storage_type.dtype, key, count)
        return self.storages[key]


def _size(sizes: Any = ()) -> tuple[Any, ...]:
    """A shape; a long one, copied again and again, would fill the memory."""
    if len(sizes) > MAX_DIMENSIONS:
        raise pickle.UnpicklingError("a shape with too many dimensions")
    return tuple(sizes)


def _rebuild_tensor(
    storage: PickledStorage, offset: int, shape: Any, strides: Any, *rest: Any
) -> PickledTensor:
    _check_lazy(rest[2:])  # after whether it requires a gradient, and the hooks
    return _rebuild_typed(storage, offset, shape, strides, storage.dtype)


def _rebuild_tensor_v3(
    storage: PickledStorage,
    offset: int,
    shape: Any,
    strides: Any,
    _requires_grad: Any,
    _hooks: Any,
    dtype: Any,
    *rest: Any,
) -> PickledTensor:
    _check_lazy(rest)
    if not isinstance(dtype, Dtype):
        raise UnfitTensorError(str(getattr(dtype, "name", "of an unknown dtype")))
    return _rebuild_typed(storage, offset, shape, strides, dtype.name)


def _check_lazy(metadata: tuple[Any, ...]) -> None:
    """Refuse a tensor whose values are the conjugate or the negative of what is stored."""
    if metadata and isinstance(metadata[0], dict):
        for flag in ("conj", "neg"):
            if metadata[0].get(flag):
                raise UnfitTensorError(f"with its {flag} bit set, so its values are not stored")


def _rebuild_typed(
    storage: PickledStorage, offset: int, shape: Any, strides: Any, dtype: str | None
) -> PickledTensor:
    shape, strides = tuple(shape), tuple(strides)
    if not isinstance(storage, PickledStorage) or dtype is None or len(shape) != len(strides):
        raise pickle.UnpicklingError("a tensor without a typed storage")
    if len(shape) > MAX_DIMENSIONS:
        raise pickle.UnpicklingError("a tensor with too many dimensions")
    numbers = (offset, *shape, *strides)
    if any(type(number) is not int or not 0 <= number < 2**63 for number in numbers):
        raise pickle.UnpicklingError("a tensor with an impossible shape, stride or offset")
    return PickledTensor(storage, offset, shape, strides, dtype)


def _rebuild_parameter(data: Any, *_rest: Any) -> Any:
    return data


def _rebuild_from_type(rebuild: Callable[..., Any], _type: Any, arguments: Any, _state: Any) -> Any:
    return rebuild(*arguments)


_KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _Dict,
    ("torch", "Size"): _Known(_size),
    ("torch.storage", "UntypedStorage"): _StorageType(None),
    ("torch", "UntypedStorage"): _StorageType(None),
    ("torch._utils", "_rebuild_tensor"): _Known(_rebuild_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): _Known(_rebuild_tensor),
    ("torch._utils", "_rebuild_tensor_v3"): _Known(_rebuild_tensor_v3),
    ("torch._utils", "_rebuild_parameter"): _Known(_rebuild_parameter),
    ("torch._utils", "_rebuild_parameter_with_state"): _Known(_rebuild_parameter),
    ("torch._tensor", "_rebuild_from_type_v2"): _Known(_rebuild_from_type),
}
