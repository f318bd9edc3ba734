"""The structure of a torch pickle without torch and without trust: nothing from a file ever runs.

A pickle builds objects by calling what it names. The few names that torch's tensors need lead to
the functions below, which only take notes; every other name leads to an inert stand-in.
"""

import io
import math
import pickle
import struct
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, NamedTuple

# What safetensors calls a dtype, torch, and torch's class of storages with it.
_DTYPES = [
    *(("F64", "float64", "DoubleStorage"), ("F32", "float32", "FloatStorage")),
    *(("F16", "float16", "HalfStorage"), ("BF16", "bfloat16", "BFloat16Storage")),
    *(("I64", "int64", "LongStorage"), ("I32", "int32", "IntStorage")),
    *(("I16", "int16", "ShortStorage"), ("I8", "int8", "CharStorage")),
    *(("U8", "uint8", "ByteStorage"), ("BOOL", "bool", "BoolStorage")),
    *(("C64", "complex64", "ComplexFloatStorage"), ("C128", "complex128", "ComplexDoubleStorage")),
    *(("C32", "complex32", ""), ("U64", "uint64", "")),
    *(("U32", "uint32", ""), ("U16", "uint16", "")),
    *(("F8_E4M3", "float8_e4m3fn", ""), ("F8_E5M2", "float8_e5m2", "")),
    *(("F8_E4M3FNUZ", "float8_e4m3fnuz", ""), ("F8_E5M2FNUZ", "float8_e5m2fnuz", "")),
    *(("F8_E8M0", "float8_e8m0fnu", ""),),
]

MAX_DIMENSIONS = 64  # torch's own kernels take no more
_MAX_STAND_INS = 1_000


class PickledStorage(NamedTuple):
    """A run of bytes elsewhere in the file, as the pickle announces it."""

    dtype: str | None  # None: untyped, `length` is in bytes
    key: str
    length: int


class PickledTensor(NamedTuple):
    """A view of a storage; as unchecked as everything that a pickle holds."""

    storage: PickledStorage
    offset: int  # in elements
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements
    dtype: str

    @property
    def is_weight(self) -> bool:
        """Whether it may be a weight: no counter, no lone number, no state of random numbers."""
        return math.prod(self.shape) != 1 and self.dtype.startswith(("F", "BF", "C"))


class Inert:
    """Stands in for any class or function that a pickle names; holds and does nothing."""

    name = "?"

    def __new__(cls, *_args: Any, **_options: Any) -> "Inert":
        """Accept any arguments; `cls` is an instance where a call looked the class up."""
        return object.__new__(cls if isinstance(cls, type) else type(cls))

    def __init__(self, *_args: Any, **_options: Any) -> None:
        """Drop the arguments; likewise the state, and the items of what was a mapping or a list."""

    __setstate__ = __setitem__ = append = extend = __init__

    def __call__(self, *_args: Any, **_options: Any) -> "Inert":
        """Accept a call of what a call has returned."""
        return self


class UnreadTensor(Inert):
    """Stands in for a tensor of a kind that cannot be read."""


class Part(UnreadTensor):
    """Stands in for a tensor of which other files hold the rest: what the pickle has of it."""

    dtype: str | None = None
    shape: Any = None  # of the whole tensor
    state: Any = None


class Record(Inert):
    """Stands in for an object of plain data: its state, as it was pickled."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


def attribute(record: Any, name: str) -> Any:
    """Return an attribute of a record or a part of a tensor, from its dict or slots; else None."""
    state = record.state if isinstance(record, Record | Part) else None
    for values in state if isinstance(state, tuple) else (state,):
        if isinstance(values, dict) and name in values:
            return values[name]
    return None


class Array(UnreadTensor):
    """Stands in for an array of numpy."""

    is_weight = False  # unless it is among tensors


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

    def __repr__(self) -> str:
        """Return the name: it may be in the key of a dict, and so in a path."""
        return self.name


class UnfitTensorError(pickle.UnpicklingError):
    """The pickle is valid, but holds a tensor of a kind that safetensors cannot hold."""


# What a malformed or hostile pickle can raise in the unpickler.
BROKEN_PICKLE = (
    *(pickle.UnpicklingError, AttributeError, EOFError, ImportError, LookupError, MemoryError),
    *(OverflowError, RecursionError, TypeError, ValueError, AssertionError, struct.error),
)


def is_size(value: Any) -> bool:
    """Return whether a value is an integer that can be a size or an offset."""
    return type(value) is int and 0 <= value < 2**63


def what_broke(error: BaseException) -> str:
    """Return what is wrong with a pickle that raised this error."""
    if isinstance(error, KeyError):  # the unpickler's own message is the number of a byte
        return "it is not a pickle"
    return str(error) or "it ends too soon"


def _check_keys(keys: Iterable[Any]) -> None:
    """Refuse tuples of tuples as keys: hashing deep ones crashes, and doubled ones never ends.

    Tuples of dtypes are not deep; Megatron has them.
    """
    for key in keys:
        parts = key if isinstance(key, tuple) else ()
        if any(isinstance(part, tuple) and type(part) is not Dtype for part in parts):
            raise pickle.UnpicklingError("a dict has nested tuples as keys")


# What the type stubs do not list.
_PythonUnpickler: Any = pickle._Unpickler
_Stop: Any = pickle._Stop  # type: ignore[attr-defined]

_Action = Callable[[Any], None]  # what an unpickler does for an opcode

# Which of the values on the stack become keys of a dict or members of a set.
_KEYS_OF = {
    pickle.SETITEM: slice(-2, -1),
    **dict.fromkeys((pickle.SETITEMS, pickle.DICT), slice(0, None, 2)),
    **dict.fromkeys((pickle.ADDITEMS, pickle.FROZENSET), slice(None)),
}

# In how many bytes the opcodes with long arguments declare their length.
_LENGTH_BYTES = {
    **dict.fromkeys((pickle.BINSTRING, pickle.BINBYTES, pickle.BINUNICODE, pickle.LONG4), 4),
    **dict.fromkeys((pickle.BINBYTES8, pickle.BINUNICODE8, pickle.BYTEARRAY8), 8),
}


def _with_checked_keys(opcode: bytes, keys: slice) -> _Action:
    """Return a function that checks the keys before it does what the opcode does."""
    load = _PythonUnpickler.dispatch[opcode[0]]

    def checked(unpickler: Any) -> None:
        _check_keys(unpickler.stack[keys])
        load(unpickler)

    return checked


def _with_checked_length(opcode: bytes, length_bytes: int) -> _Action:
    """Return a function that checks the length before it does what the opcode does.

    The argument's memory is allocated before it is read.
    """
    load = _PythonUnpickler.dispatch[opcode[0]]

    def checked(unpickler: Any) -> None:
        declared = unpickler.read(length_bytes)
        unpickler.check_length(declared)
        unpickler.seek(-len(declared), 1)  # fewer where the file ends
        load(unpickler)

    return checked


def _skip_frame(unpickler: Any) -> None:
    """Skip the length of a frame, which says how much a reader may buffer."""
    unpickler.check_length(unpickler.read(8))


class TensorUnpickler(_PythonUnpickler):  # type: ignore[misc]
    """Unpickles to dicts, lists and `PickledTensor`; `storages` has every storage by its key.

    It extends the unpickler in Python: the one in C cannot check keys before it hashes them.
    """

    dispatch: ClassVar[dict[int, _Action]] = {
        **_PythonUnpickler.dispatch,
        **{opcode[0]: _with_checked_keys(opcode, keys) for opcode, keys in _KEYS_OF.items()},
        **{opcode[0]: _with_checked_length(opcode, n) for opcode, n in _LENGTH_BYTES.items()},
        pickle.FRAME[0]: _skip_frame,
    }

    def __init__(self, file: io.BufferedIOBase) -> None:
        super().__init__(file, encoding="utf-8")
        self.read, self.readinto, self.readline = file.read, file.readinto, file.readline
        self.seek = file.seek
        start = file.tell()
        self._size_bytes = file.seek(0, 2) - start
        file.seek(start)
        self.storages: dict[str, PickledStorage] = {}
        self.stand_ins: dict[str, type[Inert]] = {}  # by full names of classes and functions

    def load(self) -> Any:
        """Return the root object; raises one of `BROKEN_PICKLE`.

        The base class reads through a layer for frames, which takes half of the time.
        """
        self.metastack: list[list[Any]] = []
        self.stack: list[Any] = []
        self.append = self.stack.append
        try:
            while opcode := self.read(1):
                self.dispatch[opcode[0]](self)
        except _Stop as stop:
            self._check_size(max(self.memo, default=0))  # no writer skips numbers
            return stop.value
        raise EOFError

    def check_length(self, declared: bytes) -> None:
        """Raise if the length of an argument is more than the file has."""
        self._check_size(int.from_bytes(declared, "little"))

    def _check_size(self, size: int) -> None:
        if size > self._size_bytes:
            raise pickle.UnpicklingError("it declares more than the file has")

    def find_class(self, module: str, name: str) -> Any:
        """Return the inert counterpart of any global; never imports."""
        if (module, name) in _KNOWN:
            return _KNOWN[module, name]
        full_name = f"{module}.{name}"
        if full_name not in self.stand_ins:
            if len(self.stand_ins) == _MAX_STAND_INS:
                raise pickle.UnpicklingError("it has more kinds of objects than any checkpoint")
            base = self.stand_in(module, name)
            self.stand_ins[full_name] = type("StandIn", (base,), {"name": full_name})
        return self.stand_ins[full_name]

    def stand_in(self, module: str, name: str) -> type[Inert]:
        """Return the base of the class that stands in for an unknown global."""
        if module.startswith("numpy") and name in ("_reconstruct", "_frombuffer"):
            return Array
        is_rebuilt = f"{module}.{name}".startswith("torch._utils._rebuild_")
        if is_rebuilt or name.endswith("Tensor"):
            return UnreadTensor
        # How parts of tensors are laid out over ranks.
        return Record if module.startswith("torch.distributed.") else Inert

    def persistent_load(self, pid: Any) -> Any:
        """Return a storage, which torch pickles as ("storage", type, key, device, count, ...).

        Before torch 1.6 it pickled the class of a module like this too: ("module", class, ...).
        """
        if pid[0] == "module" and isinstance(pid[1], type):
            return pid[1]
        kind, storage_type, key, _device, count, *views = pid
        if isinstance(storage_type, type) and issubclass(storage_type, Inert):
            raise UnfitTensorError(storage_type.name)
        if kind != "storage" or not isinstance(storage_type, _StorageType) or any(views):
            raise pickle.UnpicklingError("it has a storage of an unknown kind")
        if not isinstance(key, str) or not is_size(count):
            raise pickle.UnpicklingError("a storage has an impossible key or size")
        self.storages[key] = PickledStorage(storage_type.dtype, key, count)
        return self.storages[key]


def _size(sizes: Any = ()) -> tuple[Any, ...]:
    """Return a shape; a long one, copied again and again, would fill the memory."""
    if len(sizes) > MAX_DIMENSIONS:
        raise pickle.UnpicklingError("a shape has too many dimensions")
    return tuple(sizes)


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> Any:
    _check_lazy(rest[2:])  # requires_grad and the hooks come first
    return _view(storage, offset, shape, strides, storage.dtype)


def _rebuild_tensor_v3(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> Any:
    _check_lazy(rest[3:])
    dtype = rest[2]
    if not isinstance(dtype, Dtype):
        raise UnfitTensorError(str(getattr(dtype, "name", "an unknown dtype")))
    return _view(storage, offset, shape, strides, dtype.name)


def _check_lazy(metadata: tuple[Any, ...]) -> None:
    """Refuse a tensor whose values are the conjugate or the negative of the stored ones."""
    flags = metadata[0] if metadata and isinstance(metadata[0], dict) else {}
    if flag := next(filter(flags.get, ("conj", "neg")), None):
        raise UnfitTensorError(f"its {flag} bit is set, so that its values are not stored")


def _view(storage: Any, offset: Any, shape: Any, strides: Any, dtype: Any) -> PickledTensor:
    shape, strides = _size(shape), tuple(strides)
    if not isinstance(storage, PickledStorage) or dtype is None or len(shape) != len(strides):
        raise pickle.UnpicklingError("a tensor has no typed storage")
    if not all(map(is_size, (offset, *shape, *strides))):
        raise pickle.UnpicklingError("a tensor has an impossible shape, stride or offset")
    return PickledTensor(storage, offset, shape, strides, dtype)


def _rebuild_parameter(data: Any, *_rest: Any) -> Any:
    return data


def _rebuild_wrapper(_kind: Any, dtype: Any, shape: Any, *_rest: Any) -> Part:
    made = Part()
    made.dtype, made.shape = dtype.name if isinstance(dtype, Dtype) else None, _size(shape)
    return made


def _rebuild_from_type(rebuild: Callable[..., Any], kind: Any, arguments: Any, state: Any) -> Any:
    made = rebuild(*arguments)
    if isinstance(made, Part):
        made.state = state
    if isinstance(made, UnreadTensor) and isinstance(kind, type) and issubclass(kind, Inert):
        made.name = kind.name  # the tensor's class says more than the function that rebuilds it
    return made


def _reconstruct(kind: Any, *_rest: Any) -> Any:
    return kind() if isinstance(kind, type) and issubclass(kind, Inert) else Inert()


_STORAGES = ("torch", "torch.storage")  # modules with the classes of storages
_KNOWN: dict[tuple[str, str], Any] = {
    **{("torch", name): Dtype(dtype) for dtype, name, _ in _DTYPES},
    **{(m, s): _StorageType(dtype) for m in _STORAGES for dtype, _, s in _DTYPES if s},
    **{(m, "UntypedStorage"): _StorageType(None) for m in _STORAGES},
    ("copyreg", "_reconstructor"): _Known(_reconstruct),
    ("copy_reg", "_reconstructor"): _Known(_reconstruct),
    ("collections", "OrderedDict"): _Dict,
    ("torch", "Size"): _Known(_size),
    ("torch._utils", "_rebuild_tensor"): _Known(_rebuild_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): _Known(_rebuild_tensor),
    ("torch._utils", "_rebuild_tensor_v3"): _Known(_rebuild_tensor_v3),
    ("torch._utils", "_rebuild_parameter"): _Known(_rebuild_parameter),
    ("torch._utils", "_rebuild_wrapper_subclass"): _Known(_rebuild_wrapper),
    ("torch._utils", "_rebuild_parameter_with_state"): _Known(_rebuild_parameter),
    ("torch._tensor", "_rebuild_from_type_v2"): _Known(_rebuild_from_type),
}
