"""Torch files without torch: what torch.load reads is found, and nothing in a file ever runs."""

import argparse
import collections
import datetime
import functools
import io
import pickle
import pickletools
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckpt_ema.containers import pickles, torch_file
from ckpt_ema.containers.specs import DTYPE_BITS, Specs, TensorSpec, spanned
from ckpt_ema.errors import Code, RefusedError
from ckpt_ema.storage.local import Local
from ckpt_ema.trainers.conventions import MODEL_KEYS
from tests.makers.limits import cheap
from tests.makers.tensors import DTYPES, filled, quantised, raw
from tests.makers.torch_files import (
    LEGACY_HEAD,
    archive,
    bare,
    hostile_pickles,
    legacy,
    number,
    save,
    sharded_pickle,
    tensor_pickle,
)

MANY = settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(params=["zip", "legacy"])
def form(request: pytest.FixtureRequest) -> str:
    """Each of the two forms in which torch has written files."""
    return str(request.param)


def span_bytes(spec: TensorSpec) -> int:
    """Bytes in the file from a tensor's first to its last element."""
    if not spec.pieces:
        return spec.size_bytes
    return spanned(spec.shape, spec.pieces[0].strides) * DTYPE_BITS[spec.dtype] // 8


def located(path: str, spec: TensorSpec) -> bytes:
    """The bytes of the elements where the spec says that they are, packed."""
    content = Path(path).read_bytes()
    item = DTYPE_BITS[spec.dtype] // 8
    assert spec.offset + span_bytes(spec) <= len(content)
    if not spec.pieces:
        return content[spec.offset : spec.offset + spec.size_bytes]
    starts = [spec.offset]
    for size, stride in zip(spec.shape, spec.pieces[0].strides, strict=True):
        starts = [start + i * stride * item for start in starts for i in range(size)]
    return b"".join(content[start : start + item] for start in starts)


def check(path: str, state: dict[str, torch.Tensor], specs: Specs | None = None) -> Specs:
    """Every tensor of `state` is located, in order, with its dtype, shape and bytes."""
    specs = torch_file.read_specs(path, Local()) if specs is None else specs
    assert list(specs.tensors) == list(state)
    for name, tensor in state.items():
        spec = specs.tensors[name]
        assert (spec.dtype, spec.shape) == (DTYPES[tensor.dtype], tuple(tensor.shape))
        assert located(path, spec) == raw(tensor), name
    return specs


def refusal(path: str) -> RefusedError:
    """The error with which it is refused, quickly and with little memory."""
    with cheap(8_000_000 + 40 * Path(path).stat().st_size), pytest.raises(RefusedError) as caught:
        torch_file.read_specs(path, Local())
    assert caught.value.path == path
    assert str(caught.value).isprintable()
    return caught.value


class TestWhatTorchReads:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_every_dtype(self, tmp_path: Path, form: str, dtype: torch.dtype) -> None:
        state = {"w": filled(dtype, 3, 5), "v": filled(dtype, 2), "scalar": filled(dtype)}
        path = save(tmp_path / "a.bin", state, form)
        assert check(path, state).notes == ()

    def test_every_view(self, tmp_path: Path, form: str) -> None:
        base = filled(torch.float32, 4, 6, 5, 3)
        state = {
            "transposed": filled(torch.float32, 4, 6).t(),
            "sliced": base[1:3, ::2, 1:, :2],
            "one row of many": filled(torch.bfloat16, 1000, 4)[417],
            "expanded": filled(torch.float32, 3, 1).expand(3, 4),
            "much expanded": torch.ones(1).expand(1000),
            "channels last": base.contiguous(memory_format=torch.channels_last),
            "permuted": base.permute(3, 1, 0, 2),
            "empty": torch.empty(0, 3),
            "empty slice": base[4:],
            "scalar of a vector": filled(torch.int64, 9)[5],
            "column": filled(torch.float16, 5, 4)[:, 2:3],
        }
        specs = check(save(tmp_path / "a.bin", state, form), state)
        assert specs.notes == ()
        assert specs.tensors["column"].pieces

    def test_parameters_and_their_gradients(self, tmp_path: Path, form: str) -> None:
        parameter = torch.nn.Parameter(filled(torch.float32, 2, 3))
        parameter.grad = torch.ones(2, 3)
        state: dict[str, torch.Tensor] = {"w": parameter, "b": torch.nn.Parameter(torch.ones(2))}
        check(save(tmp_path / "a.bin", state, form), state)

    def test_tied_tensors_lie_at_one_place(self, tmp_path: Path, form: str) -> None:
        weight = filled(torch.float32, 4, 3)
        state = {"embedding": weight, "head": weight, "row": weight[2]}
        specs = check(save(tmp_path / "a.bin", state, form), state).tensors
        assert specs["embedding"] == specs["head"]
        assert specs["row"].offset == specs["head"].offset + 2 * 3 * 4

    def test_a_module_state_dict_with_its_metadata(self, tmp_path: Path, form: str) -> None:
        module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
        state = module.state_dict()
        assert hasattr(state, "_metadata")
        assert check(save(tmp_path / "a.bin", state, form), dict(state)).notes == ()

    @pytest.mark.parametrize("key", MODEL_KEYS)
    def test_the_model_beside_the_optimizer(self, tmp_path: Path, form: str, key: str) -> None:
        module = torch.nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(module.parameters())
        module(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        content = {
            "epoch": 3,
            "optimizer": optimizer.state_dict(),
            key: module.state_dict(),
            "random": torch.get_rng_state(),
            "scheduler": {"last": [1e-3, None, (True, "cosine")]},
        }
        check(save(tmp_path / "a.pt", content, form), dict(module.state_dict()))

    def test_plain_values_in_the_model_are_left_out_and_noted(
        self, tmp_path: Path, form: str
    ) -> None:
        state = {"w": torch.ones(2), "version": 3, "layer._extra_state": b"\x00"}
        specs = check(save(tmp_path / "a.bin", state, form), {"w": torch.ones(2)}, None)
        [note] = specs.notes
        assert note.code is Code.LEFT_OUT
        assert "version, layer._extra_state" in note.message

    @pytest.mark.parametrize("protocol", [2, 3, 4, 5])
    def test_every_protocol(self, tmp_path: Path, form: str, protocol: int) -> None:
        state = {f"layer.{number}.weight": torch.full((2,), number) for number in range(300)}
        path = tmp_path / "a.bin"
        torch.save(
            state,
            path,
            pickle_protocol=protocol,
            _use_new_zipfile_serialization=form == "zip",
        )
        check(str(path), state)

    @MANY
    @given(
        shape=st.lists(st.integers(0, 3), max_size=3),
        strides=st.lists(st.integers(0, 7), min_size=3, max_size=3),
        offset=st.integers(0, 5),
        dtype=st.sampled_from([torch.float64, torch.bfloat16, torch.uint8, torch.uint16]),
        legacy=st.booleans(),
    )
    def test_any_shape_and_strides(
        self,
        tmp_path_factory: pytest.TempPathFactory,
        shape: list[int],
        strides: list[int],
        offset: int,
        dtype: torch.dtype,
        legacy: bool,
    ) -> None:
        view = filled(dtype, 60).as_strided(shape, strides[: len(shape)], offset)
        path = tmp_path_factory.getbasetemp() / "strided.bin"
        state = {"before": torch.ones(3), "view": view}
        check(save(path, state, "legacy" if legacy else "zip"), state)


class Custom:
    """A class of the training script, which this library must neither have nor import."""

    def __init__(self) -> None:
        self.rate, self.history = 1e-3, collections.deque([1, 2], maxlen=4)


STRANGERS = {
    "argparse.Namespace": argparse.Namespace(lr=1e-3, layers=[1, 2]),
    "pathlib.PosixPath": Path("/data"),
    f"{__name__}.Custom": Custom(),
    "functools.partial": functools.partial(max, 1, default=2),
    "datetime.datetime": datetime.datetime(2024, 5, 6, tzinfo=datetime.timezone.utc),
    "collections.defaultdict": collections.defaultdict(list, {"a": [1]}),
    "torch.bits8": torch.bits8,
    "torch.device": torch.device("cpu"),
}


class TestStrangers:
    @pytest.mark.parametrize("name", STRANGERS)
    def test_beside_the_tensors_they_are_ignored_and_noted(
        self, tmp_path: Path, form: str, name: str
    ) -> None:
        state = {"w": filled(torch.float32, 4)}
        path = save(tmp_path / "a.ckpt", {"state_dict": state, "args": STRANGERS[name]}, form)
        [note] = check(path, state).notes
        assert note.code is Code.LEFT_OUT
        assert name in note.message

    def test_thousands_of_them_are_refused_at_once(self, tmp_path: Path) -> None:
        names = b"".join(b"cmodule\nClass%d\n0" % number for number in range(2_000))
        path = archive(tmp_path / "a.pt", b"\x80\x02" + names + b"N.")
        assert refusal(path).code is Code.DAMAGED


HOSTILE = sorted(hostile_pickles(Path("mark")))


class TestNothingRuns:
    @pytest.mark.parametrize("container", [archive, legacy, bare])
    @pytest.mark.parametrize("label", HOSTILE)
    def test_hostile_calls(self, tmp_path: Path, label: str, container: Callable[..., str]) -> None:
        mark = tmp_path / "mark"
        data = bytes(range(24))
        extra: dict[Callable[..., str], dict[str, Any]] = {
            archive: {"_0": data},
            legacy: {"keys": ["0"], "data": struct.pack("<q", 6) + data},
        }
        path = container(
            tmp_path / "a.bin", hostile_pickles(mark)[label], **extra.get(container, {})
        )
        try:
            specs = torch_file.read_specs(path, Local())
        except RefusedError as error:
            assert error.path == path
        else:
            assert located(path, specs.tensors["w"]) == data
        assert not mark.exists()

    def test_a_pickle_cannot_change_the_reader(self, tmp_path: Path) -> None:
        """Setting attributes on what a pickle names must not reach the next file."""
        state = b"N}X\x0c\x00\x00\x00__defaults__(NNNNt" + b"s\x86b"
        for module, name in GLOBALS:
            target = f"c{module}\n{name}\n".encode()
            path = archive(tmp_path / "a.pt", b"\x80\x02" + target + state + b".")
            with pytest.raises(RefusedError):
                torch_file.read_specs(path, Local())
        path = archive(tmp_path / "a.pt", tensor_pickle(), _0=raw(filled(torch.float32, 2, 3)))
        check(path, {"w": filled(torch.float32, 2, 3)})

    def test_a_dict_cannot_lose_its_methods(self, tmp_path: Path) -> None:
        """A state dict whose attribute `items` is set is still read by the real one."""
        start = b"\x80\x02ccollections\nOrderedDict\n)R}X\x05\x00\x00\x00itemsK\x01sb"
        pickled = start + tensor_pickle()[3:]
        path = archive(tmp_path / "a.pt", pickled, _0=bytes(24))
        assert list(torch_file.read_specs(path, Local()).tensors) == ["w"]


# What torch's pickles name and what is known here.
GLOBALS = [
    *(("collections", "OrderedDict"), ("torch", "Size"), ("torch", "UntypedStorage")),
    *(("torch.storage", "UntypedStorage"), ("copy_reg", "_reconstructor")),
    *(("torch._utils", "_rebuild_tensor"), ("torch._utils", "_rebuild_tensor_v2")),
    *(("torch._utils", "_rebuild_tensor_v3"), ("torch._utils", "_rebuild_parameter")),
    *(("torch._tensor", "_rebuild_from_type_v2"), ("torch", "FloatStorage"), ("torch", "int8")),
]


class TestObjects:
    """A sound file with objects is refused by their names; it is not called damaged."""

    @pytest.mark.parametrize("inside", [False, True])
    def test_a_pickled_module(self, tmp_path: Path, form: str, inside: bool) -> None:
        module = torch.nn.Linear(2, 2)
        error = refusal(save(tmp_path / "a.pt", {"model": module} if inside else module, form))
        assert error.code is Code.PICKLED_OBJECT
        assert "torch.nn.modules.linear.Linear" in error.message

    def test_a_sharded_tensor_as_fsdp_saves_it(self, tmp_path: Path) -> None:
        path = archive(tmp_path / "a.pt", sharded_pickle())
        with pytest.raises(Exception, match="process group"):
            torch.load(path, weights_only=False)  # it is one
        error = refusal(path)
        assert (error.code, error.tensor) == (Code.UNREADABLE_TENSOR, "w")
        assert "sharded_tensor.api.ShardedTensor" in error.message

    def test_an_object_that_copyreg_rebuilds(self, tmp_path: Path) -> None:
        path = tmp_path / "a.pt"
        torch.save({"model": Plain()}, path, pickle_protocol=1)
        error = refusal(str(path))
        assert error.code is Code.PICKLED_OBJECT
        assert f"{__name__}.Plain" in error.message


class Plain:
    """Pickled by protocol 1 as a call of `copyreg._reconstructor`."""


class TestDamaged:
    def test_cut_at_any_place(self, tmp_path: Path, form: str) -> None:
        path = save(tmp_path / "a.bin", {"w": filled(torch.float32, 300), "v": torch.ones(9)}, form)
        content = Path(path).read_bytes()
        for length in (*range(0, len(content), 97), len(content) - 1):
            Path(path).write_bytes(content[:length])
            refusal(path)

    def test_any_byte_wrong(self, tmp_path: Path, form: str) -> None:
        """Nothing but `RefusedError` comes of a damaged file, and no tensor outside the file."""
        path = save(
            tmp_path / "a.bin", {"w": filled(torch.float32, 3), "v": torch.ones(2, 2)}, form
        )
        content, noise = Path(path).read_bytes(), random.Random(3)
        for _ in range(200):
            damaged = bytearray(content)
            for _ in range(noise.randint(1, 3)):
                damaged[noise.randrange(len(damaged))] = noise.randrange(256)
            Path(path).write_bytes(damaged)
            try:
                specs = torch_file.read_specs(path, Local())
            except RefusedError:
                continue
            for spec in specs.tensors.values():
                assert spec.offset + span_bytes(spec) <= len(content)

    @pytest.mark.parametrize(
        ("tensor", "name"),
        [
            (tensor_pickle(offset=b"K\x01"), "w"),
            (tensor_pickle(strides=b"(K\x04K\x01t"), "w"),
            (tensor_pickle(count=b"K\x05"), "w"),
            (tensor_pickle(count=b"K\x07"), None),
            (tensor_pickle(count=number(2**62)), None),
            (tensor_pickle(count=number(2**70)), None),
            (tensor_pickle(count=number(-6)), None),
            (tensor_pickle(strides=b"(J\xff\xff\xff\xffK\x01t"), None),
            (tensor_pickle(offset=number(-1)), None),
            (tensor_pickle(shape=b"(K\x02G" + bytes(8) + b"t"), None),
            (tensor_pickle(shape=b"(K\x02\x88t"), None),
            (tensor_pickle(shape=b"(K\x02t"), None),
            (tensor_pickle(b"(" + number(10**12) + b"K\x01t", b"(K\x00K\x00t"), "w"),
            (
                tensor_pickle(
                    b"(" + number(2**62) + b"2" * 300_000 + b"t",
                    b"(K\x00" + b"2" * 300_000 + b"t",
                ),
                None,
            ),
        ],
        ids=lambda value: value[-90:-60].hex() if isinstance(value, bytes) else "",
    )
    def test_a_view_of_what_is_not_there(
        self, tmp_path: Path, tensor: bytes, name: str | None
    ) -> None:
        error = refusal(archive(tmp_path / "a.pt", tensor, _0=bytes(24)))
        assert (error.code, error.tensor) == (Code.DAMAGED, name)

    def test_a_record_beyond_the_end(self, tmp_path: Path) -> None:
        path = Path(archive(tmp_path / "a.pt", tensor_pickle(), _0=bytes(24)))
        content = bytearray(path.read_bytes())
        entry = content.index(b"archive/data/0", content.index(b"PK\x01\x02")) - 46
        content[entry + 42 : entry + 46] = struct.pack("<I", len(content) - 3)
        path.write_bytes(content)
        assert refusal(str(path)).code is Code.DAMAGED

    def test_torchscript(self, tmp_path: Path) -> None:
        path = tmp_path / "a.pt"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
            target.writestr("a/constants.pkl", b"\x80\x02).")
            target.writestr("a/data.pkl", tensor_pickle())
        assert refusal(str(path)).code is Code.NOT_A_CHECKPOINT

    @pytest.mark.parametrize(
        ("content", "code"),
        [
            *((b"", Code.CUT_SHORT), (bytes(99), Code.CUT_SHORT)),
            *((b"loss 0.3\n" * 9, Code.WRONG_FORMAT), (tensor_pickle(), Code.WRONG_FORMAT)),
            (b"version https://git-lfs.github.com/spec/v1\n", Code.WRONG_FORMAT),
        ],
    )
    def test_no_torch_file(self, tmp_path: Path, content: bytes, code: Code) -> None:
        path = tmp_path / "a.bin"
        path.write_bytes(content)
        assert refusal(str(path)).code is code

    @pytest.mark.parametrize("keys", [["0", []], [["0"]], ["1"], {"0": 1}, None, [0]])
    def test_a_legacy_list_of_storages_that_is_none(self, tmp_path: Path, keys: Any) -> None:
        path = tmp_path / "a.bin"
        path.write_bytes(LEGACY_HEAD + tensor_pickle() + pickle.dumps(keys, 2) + bytes(32))
        assert refusal(str(path)).code in (Code.DAMAGED, Code.CUT_SHORT)

    def test_a_deep_legacy_structure(self, tmp_path: Path) -> None:
        path = legacy(tmp_path / "a.bin", b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".")
        assert refusal(path).code is Code.NO_MODEL


class TestUnfitTensors:
    """A tensor that safetensors cannot hold is never left out of the model without a word."""

    @pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
    @pytest.mark.parametrize(
        ("make", "name"),
        [
            (lambda: torch.eye(3).to_sparse(), "s"),
            (lambda: torch.ones(3, device="meta"), "s"),
            (quantised, None),
            (lambda: torch.zeros(4, dtype=torch.uint8).view(torch.bits8), None),
            (lambda: torch.ones(2, dtype=torch.complex64).conj(), None),
            (lambda: torch.ones(2, dtype=torch.complex64).conj().imag, None),
        ],
        ids=["sparse", "meta", "quantised", "bits8", "conjugate", "negative"],
    )
    def test_in_the_model(
        self, tmp_path: Path, form: str, make: Callable[[], torch.Tensor], name: str | None
    ) -> None:
        error = refusal(save(tmp_path / "a.bin", {"w": torch.ones(2), "s": make()}, form))
        assert (error.code, error.tensor) == (Code.UNREADABLE_TENSOR, name)

    def test_beside_the_model_a_sparse_one_is_ignored(self, tmp_path: Path, form: str) -> None:
        state = {"w": filled(torch.float32, 5)}
        content = {"model": state, "optimizer": {"s": torch.eye(3).to_sparse()}}
        check(save(tmp_path / "a.bin", content, form), state)


class TestMemory:
    """A few bytes that claim gigabytes are refused before anything is allocated."""

    @pytest.mark.parametrize("container", [archive, legacy])
    @pytest.mark.parametrize(
        "opcodes",
        [
            b"Nr\xff\xff\xff\x7f",
            b"Nr\x00\x00\x00\x10",
            b"Np2147483647\n",
            b"Np99999999999999999999\n",
            b"X\x01\x00\x00\x00rr\x00\x00\x00\x10",
            b"\x8e" + struct.pack("<Q", 2**40),
            b"\x8e" + struct.pack("<Q", 2**63),
            b"\x8d" + struct.pack("<Q", 2**40),
            b"\x96" + struct.pack("<Q", 2**40),
            b"\x95" + struct.pack("<Q", 2**40) + b"N",
            b"B" + struct.pack("<I", 2**32 - 1),
            b"\x8b" + struct.pack("<I", 2**31 - 1),
        ],
    )
    def test_of_an_opcode(
        self, tmp_path: Path, container: Callable[..., str], opcodes: bytes
    ) -> None:
        path = container(tmp_path / "a.pt", b"\x80\x04" + opcodes + b".")
        assert refusal(path).code in (Code.DAMAGED, Code.CUT_SHORT)

    def test_of_every_opcode_that_declares_a_length(self) -> None:
        bytes_of = {pickletools.TAKEN_FROM_ARGUMENT4: 4, pickletools.TAKEN_FROM_ARGUMENT4U: 4}
        bytes_of[pickletools.TAKEN_FROM_ARGUMENT8U] = 8
        long = {
            o.code: bytes_of[o.arg.n] for o in pickletools.opcodes if o.arg and o.arg.n in bytes_of
        }
        for code, length_bytes in (long | {"\x95": 8}).items():
            pickled = code.encode("latin1") + b"\xff" * (length_bytes - 1) + b"\x7f."
            with pytest.raises(pickle.UnpicklingError, match="declares more than the file has"):
                pickles.TensorUnpickler(io.BytesIO(pickled)).load()


class TestKnownStructures:
    """Most checkpoints of a run have the same structure, which is unpickled once."""

    def found(self, folder: Path) -> int:
        """Read two checkpoints; return how many structures were known."""
        before = torch_file._unpickled.cache_info().hits
        for step in range(2):
            state = {folder.name: torch.full((3,), step), "v": torch.full((2,), step)}
            check(save(folder / f"{step}.pt", state), state)
        return torch_file._unpickled.cache_info().hits - before

    def test_of_equal_pickles(self, tmp_path: Path) -> None:
        assert self.found(tmp_path) == 1

    def test_large_ones_are_not_kept(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch_file, "_MOST_KNOWN_BYTES", 100)
        assert self.found(tmp_path) == 0


class TestKeysThatCannotBeHashed:
    """CPython hashes tuples recursively: deep ones overflow the stack, doubled ones never end."""

    @pytest.mark.parametrize(
        "key",
        [b")" + b"\x85" * 400_000, b")" + b"2\x86" * 60],
        ids=["deep", "doubled"],
    )
    @pytest.mark.parametrize(
        "use",
        [
            b"}%sNs.",
            b"}(%sNu.",
            b"(%sNd.",
            b"\x8f(%s\x90.",
            b"(%s\x91.",
            b"ccollections\nOrderedDict\n](%sN\x86e\x85R.",
        ],
        ids=["setitem", "setitems", "dict", "additems", "frozenset", "OrderedDict"],
    )
    def test_they_are_refused(self, tmp_path: Path, key: bytes, use: bytes) -> None:
        path = archive(tmp_path / "a.pt", b"\x80\x04" + use % key)
        with cheap(1 << 30, 20), pytest.raises(RefusedError):
            torch_file.read_specs(path, Local())
