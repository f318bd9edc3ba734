"""Torch files without torch: what torch.load reads is found, and nothing in a file ever runs."""

import argparse
import collections
import datetime
import functools
import io
import json
import os
import pickle
import pickletools
import random
import struct
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckpt_ema.containers import model_key, pickles, torch_file
from ckpt_ema.containers.read import read_specs
from ckpt_ema.containers.specs import DTYPE_BITS, Member, ModelFiles, Specs, TensorSpec, spanned
from ckpt_ema.errors import RefusedError
from ckpt_ema.storage.local import Local
from tests.makers.tensors import DTYPES, filled, quantised, raw
from tests.makers.torch_files import (
    LEGACY_HEAD,
    archive,
    bare,
    hostile_pickles,
    legacy,
    number,
    save,
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


def refusal(path: str) -> str:
    """The message with which it is refused, quickly and with little memory."""
    tracemalloc.start()
    start = time.process_time()
    try:
        with pytest.raises(RefusedError) as caught:
            torch_file.read_specs(path, Local())
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert time.process_time() - start < 2
    assert peak_bytes < 8_000_000 + 40 * Path(path).stat().st_size
    assert path in caught.value.message
    assert str(caught.value).isprintable()
    return str(caught.value).replace(path, "FILE")


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

    @pytest.mark.parametrize("key", model_key.MODEL_KEYS)
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
        assert specs.notes[0] == (
            "left out of the model, being no tensors: version, layer._extra_state"
        )

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
        notes = check(path, state).notes
        assert len(notes) == 1
        assert notes[0].startswith("skipped objects in the files that are no tensors: ")
        assert name in notes[0]

    def test_thousands_of_them_are_refused_at_once(self, tmp_path: Path) -> None:
        names = b"".join(b"cmodule\nClass%d\n0" % number for number in range(2_000))
        path = archive(tmp_path / "a.pt", b"\x80\x02" + names + b"N.")
        assert "more kinds of objects than any checkpoint has" in refusal(path)


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
        for suffix in (".bin", ".pt", ".ckpt"):
            path = tmp_path / f"a{suffix}"
            container(path, hostile_pickles(mark)[label], **extra.get(container, {}))
            try:
                specs = read_specs(ModelFiles(path.parent, (Member(path.name),)))
            except RefusedError as error:
                assert str(path) in str(error)
            else:
                assert located(str(path), specs.tensors["w"]) == data
            assert not mark.exists()

    def test_a_pickle_cannot_change_the_reader(self, tmp_path: Path) -> None:
        """Setting attributes on what a pickle names must not reach the next file."""
        before = dict(vars(pickles._rebuild_tensor))
        state = b"N}X\x0c\x00\x00\x00__defaults__(NNNNt" + b"s\x86b"
        for target in pickles._KNOWN:
            name = f"c{target[0]}\n{target[1]}\n".encode()
            with pytest.raises(RefusedError):
                torch_file.read_specs(archive(tmp_path / "a.pt", b"\x80\x02" + name + state + b"."))
        assert pickles._rebuild_tensor.__defaults__ is None
        assert vars(pickles._rebuild_tensor) == before

    def test_a_dict_cannot_lose_its_methods(self, tmp_path: Path) -> None:
        """A state dict whose attribute `items` is set is still read by the real one."""
        start = b"\x80\x02ccollections\nOrderedDict\n)R}X\x05\x00\x00\x00itemsK\x01sb"
        pickled = start + tensor_pickle()[3:]
        path = archive(tmp_path / "a.pt", pickled, _0=bytes(24))
        assert list(torch_file.read_specs(path, Local()).tensors) == ["w"]

    @pytest.mark.parametrize("inside", [False, True])
    def test_a_pickled_module_is_refused_by_name(
        self, tmp_path: Path, form: str, inside: bool
    ) -> None:
        module = torch.nn.Linear(2, 2)
        message = refusal(save(tmp_path / "a.pt", {"model": module} if inside else module, form))
        assert message == (
            "FILE stores the model as a pickled torch.nn.modules.linear.Linear, not as tensors;"
            " reading it would run code from the file. Export its state_dict() instead."
        )


NO_TORCH_FILE = "FILE is not a file written by torch.save. Fetch or save it again."


class TestDamaged:
    def test_cut_at_any_place(self, tmp_path: Path, form: str) -> None:
        path = save(tmp_path / "a.bin", {"w": filled(torch.float32, 300), "v": torch.ones(9)}, form)
        content = Path(path).read_bytes()
        for length in (*range(0, len(content), 97), len(content) - 1):
            Path(path).write_bytes(content[:length])
            assert "FILE" in refusal(path)

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
        ("tensor", "reason"),
        [
            (tensor_pickle(offset=b"K\x01"), "tensor w reaches beyond its storage"),
            (tensor_pickle(strides=b"(K\x04K\x01t"), "tensor w reaches beyond its storage"),
            (tensor_pickle(count=b"K\x05"), "tensor w reaches beyond its storage"),
            (tensor_pickle(count=b"K\x07"), "storage 0 is missing or shorter than declared"),
            (tensor_pickle(count=number(2**62)), "storage 0 is missing or shorter than declared"),
            (tensor_pickle(count=number(2**70)), "a storage with an impossible key or size"),
            (tensor_pickle(count=number(-6)), "a storage with an impossible key or size"),
            (
                tensor_pickle(strides=b"(J\xff\xff\xff\xffK\x01t"),
                "impossible shape, stride or offset",
            ),
            (tensor_pickle(offset=number(-1)), "impossible shape, stride or offset"),
            (
                tensor_pickle(shape=b"(K\x02G" + bytes(8) + b"t"),
                "impossible shape, stride or offset",
            ),
            (tensor_pickle(shape=b"(K\x02\x88t"), "impossible shape, stride or offset"),
            (tensor_pickle(shape=b"(K\x02t"), "a tensor without a typed storage"),
            (
                tensor_pickle(shape=b"(" + number(10**12) + b"K\x01t", strides=b"(K\x00K\x00t"),
                "tensor w reaches beyond its storage",
            ),
            (
                tensor_pickle(
                    shape=b"(" + number(2**62) + b"2" * 300_000 + b"t",
                    strides=b"(K\x00" + b"2" * 300_000 + b"t",
                ),
                "a tensor with too many dimensions",
            ),
        ],
    )
    def test_a_view_of_what_is_not_there(self, tmp_path: Path, tensor: bytes, reason: str) -> None:
        assert reason in refusal(archive(tmp_path / "a.pt", tensor, _0=bytes(24)))

    def test_a_handmade_archive_is_read(self, tmp_path: Path) -> None:
        """The pickles of these tests are good but for what each of them breaks."""
        check(
            archive(tmp_path / "a.pt", tensor_pickle(), _0=raw(filled(torch.float32, 2, 3))),
            {"w": filled(torch.float32, 2, 3)},
        )

    def test_compressed(self, tmp_path: Path) -> None:
        path = tmp_path / "a.pt"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
            target.writestr("archive/data.pkl", tensor_pickle())
            target.writestr("archive/data/0", bytes(1_000_000))
        assert refusal(str(path)) == (
            "FILE has compressed or repeated records, which torch.save never writes."
        )

    def test_a_record_beyond_the_end(self, tmp_path: Path) -> None:
        path = Path(archive(tmp_path / "a.pt", tensor_pickle(), _0=bytes(24)))
        content = bytearray(path.read_bytes())
        entry = content.index(b"archive/data/0", content.index(b"PK\x01\x02")) - 46
        content[entry + 42 : entry + 46] = struct.pack("<I", len(content) - 3)
        path.write_bytes(content)
        assert "record archive/data/0 is not where its directory says" in refusal(str(path))

    def test_torchscript(self, tmp_path: Path) -> None:
        path = tmp_path / "a.pt"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
            target.writestr("a/constants.pkl", b"\x80\x02).")
            target.writestr("a/data.pkl", tensor_pickle())
        assert refusal(str(path)).startswith("FILE is a TorchScript archive, a program")

    @pytest.mark.parametrize(
        ("value", "reason"),
        [
            ([torch.ones(2)], "holds no dict of tensors"),
            (torch.ones(2), "holds no dict of tensors"),
            ({}, "holds no dict of tensors"),
            ({"step": 3}, "holds no dict of tensors"),
            ({1: torch.ones(2)}, "holds no dict of tensors"),
            ({"model": {"w": torch.ones(1)}, "state_dict": {"w": torch.ones(1)}}, "2 dicts of"),
        ],
        ids=["list", "tensor", "empty", "plain", "numbered", "two models"],
    )
    def test_no_model(self, tmp_path: Path, form: str, value: Any, reason: str) -> None:
        assert reason in refusal(save(tmp_path / "a.bin", value, form))

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "FILE is empty. An interrupted save? Leave it out."),
            (b"loss 0.3\n" * 9, NO_TORCH_FILE),
            (json.dumps({"w": 1}).encode(), NO_TORCH_FILE),
            (tensor_pickle(), NO_TORCH_FILE),
            (b"version https://git-lfs.github.com/spec/v1\n", "FILE is a Git LFS pointer."),
        ],
        ids=["empty", "text", "JSON", "pickle", "LFS"],
    )
    def test_no_torch_file(self, tmp_path: Path, content: bytes, message: str) -> None:
        path = tmp_path / "a.bin"
        path.write_bytes(content)
        assert refusal(str(path)).startswith(message)

    def test_a_fifo_is_not_waited_for(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "a.bin")
        with pytest.raises(RefusedError, match="is not a regular file"):
            torch_file.read_specs(str(tmp_path / "a.bin"), Local(), Local())

    @pytest.mark.parametrize("keys", [["0", []], [["0"]], ["1"], {"0": 1}, None, [0]])
    def test_a_legacy_list_of_storages_that_is_none(self, tmp_path: Path, keys: Any) -> None:
        pickled = pickle.dumps(keys, 2)
        path = tmp_path / "a.bin"
        path.write_bytes(LEGACY_HEAD + tensor_pickle() + pickled + bytes(32))
        assert "FILE is" in refusal(str(path))

    def test_a_deep_legacy_structure(self, tmp_path: Path) -> None:
        path = legacy(tmp_path / "a.bin", b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".")
        assert "holds no dict of tensors" in refusal(path)

    def test_a_message_has_no_control_characters(self, tmp_path: Path) -> None:
        state = {"red\x1b[31m": torch.eye(2).to_sparse()}
        path = save(tmp_path / "a.bin", {**state, "w": torch.ones(1)}, "zip")
        assert "tensor red\\x1b[31m is of a kind" in refusal(path)


class TestUnfitTensors:
    """A tensor that safetensors cannot hold is never left out of the model without a word."""

    @pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
    @pytest.mark.parametrize(
        ("make", "what"),
        [
            (lambda: torch.eye(3).to_sparse(), "tensor s is of a kind"),
            (lambda: torch.ones(3, device="meta"), "tensor s is of a kind"),
            (quantised, "torch.QInt8Storage"),
            (lambda: torch.ones(3, dtype=torch.complex128), "torch.ComplexDoubleStorage"),
            (lambda: torch.zeros(4, dtype=torch.uint8).view(torch.bits8), "torch.bits8"),
            (lambda: torch.ones(2, dtype=torch.complex64).conj(), "its conj bit set"),
            (lambda: torch.ones(2, dtype=torch.complex64).conj().imag, "its neg bit set"),
        ],
        ids=["sparse", "meta", "quantised", "complex128", "bits8", "conjugate", "negative"],
    )
    def test_in_the_model(
        self, tmp_path: Path, form: str, make: Callable[[], torch.Tensor], what: str
    ) -> None:
        path = save(tmp_path / "a.bin", {"w": torch.ones(2), "s": make()}, form)
        message = refusal(path)
        assert what in message
        assert "safetensors cannot hold" in message

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
        assert "structure cannot be read" in refusal(path)

    def test_the_scan_knows_every_opcode(self) -> None:
        """What it takes for the length of an argument is what pickletools says."""
        for opcode in pickletools.opcodes:
            code = ord(opcode.code)
            length = opcode.arg.n if opcode.arg else 0
            counted = {-2: 1, -3: 4, -4: 4, -5: 8}.get(length, 0)
            pair = opcode.arg is not None and opcode.arg.name.endswith("pair")
            assert pickles._FIXED.get(code, 0) == max(length, 0), opcode.name
            assert pickles._COUNTED.get(code, 0) == counted, opcode.name
            assert pickles._LINES.get(code, 0) == (length == -1) * (1 + pair), opcode.name

    def test_the_scan_leaves_the_stream_where_it_was(self) -> None:
        stream = io.BytesIO(b"before" + pickle.dumps(["x" * 100_000, {1: (2, 3)}], 2) + b"after")
        stream.seek(6)
        pickles.check_lengths(stream)
        assert stream.tell() == 6


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
        start = time.process_time()
        with pytest.raises(RefusedError):
            torch_file.read_specs(path, Local())
        assert time.process_time() - start < 20
