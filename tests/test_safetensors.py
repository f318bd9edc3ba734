"""safetensors headers: nothing that the library refuses is read, and all that it writes is."""

import contextlib
import copy
import ctypes
import json
import random
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckpt_ema.containers.safetensors import MAX_HEADER_BYTES, make_header, read_specs
from ckpt_ema.containers.specs import DTYPE_BITS, WRITTEN_AS, Specs
from ckpt_ema.errors import Code, IncompleteError, RefusedError
from ckpt_ema.storage.local import Local
from tests.makers.limits import cheap
from tests.makers.safetensors_files import entry, framed

# What the library's writer calls the dtypes; it takes bytes, so no element is ever made.
WRITTEN = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "float8_e5m2": "F8_E5M2",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e8m0fnu": "F8_E8M0",
    "int16": "I16",
    "uint16": "U16",
    "float16": "F16",
    "bfloat16": "BF16",
    "int32": "I32",
    "uint32": "U32",
    "float32": "F32",
    "complex64": "C64",
    "float64": "F64",
    "int64": "I64",
    "uint64": "U64",
}
MANY = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))

names = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
shapes = st.lists(st.integers(0, 4), max_size=4)


def deserialize(content: bytes) -> list[tuple[str, dict[str, Any]]]:
    """What the library reads; it states no types for its reader."""
    read: list[tuple[str, dict[str, Any]]] = safetensors.deserialize(content)  # type: ignore[no-untyped-call]
    return read


def serialize(
    tensors: dict[str, tuple[str, list[int], bytes]], metadata: dict[str, str] | None
) -> bytes:
    """What the library writes for (dtype, shape, bytes); it asks for addresses, not for bytes."""
    buffers = {name: ctypes.create_string_buffer(t[2], len(t[2])) for name, t in tensors.items()}
    specs = {
        name: safetensors.TensorSpec(
            dtype=dtype,
            shape=shape,
            data_ptr=ctypes.addressof(buffers[name]),
            data_len=len(data),
        )
        for name, (dtype, shape, data) in tensors.items()
    }
    return safetensors.serialize(specs, metadata)


def library_refuses(content: bytes) -> bool:
    """Whether the safetensors library rejects this file, in whatever way."""
    try:
        deserialize(content)
    except Exception:  # its own class, and for some files a plain ValueError
        return True
    return False


def read(path: Path, content: bytes) -> Specs:
    """What our reader makes of a file with this content."""
    path.write_bytes(content)
    return read_specs(str(path), Local())


def refusal(path: Path, content: bytes) -> RefusedError:
    """The error with which this file is refused."""
    with pytest.raises(RefusedError) as caught:
        read(path, content)
    assert caught.value.path == str(path)
    assert str(caught.value).isprintable()
    return caught.value


@st.composite
def good_headers(draw: st.DrawFn) -> tuple[dict[str, Any], bytes]:
    """A header that covers its data, and the data."""
    header: dict[str, Any] = {}
    if draw(st.booleans()):
        header["__metadata__"] = draw(st.dictionaries(names, names, max_size=2))
    end = 0
    for name in draw(st.lists(names.filter(lambda n: n != "__metadata__"), max_size=4)):
        if name in header:
            continue
        dtype, shape = draw(st.sampled_from(sorted(DTYPE_BITS))), draw(shapes)
        bits = DTYPE_BITS[dtype]
        for size in shape:
            bits *= size
        begin, end = end, end + bits // 8
        header[name] = entry(dtype, shape, [begin, end])
    return header, bytes(end)


ODD_VALUES: list[Any] = [
    *(-1, -0.0, 0.0, 1.0, 1.5, True, None, "4", [], {}, "F32", "F128", "f32", [[1]], [0, 4, 4]),
    *(2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30, float("nan")),
    *([2**32, 2**32], [2**63, 0], [0, 2**64], [-1, 4], [4, 0], [0, 0], [1.0], ["1"], "\ud800"),
    *({"dtype": "F32"}, {"a": {}}, {"a": 1}, {"a": "\udfff"}, float("inf"), float("-inf")),
]


def _spoil(draw: st.DrawFn, node: Any) -> None:
    """Replace, remove or add one value anywhere in a header."""
    while isinstance(node, (dict, list)) and node:
        key = draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
        if isinstance(node[key], (dict, list)) and node[key] and draw(st.integers(0, 3)):
            node = node[key]
            continue
        if draw(st.integers(0, 4)) == 0:
            del node[key]
        elif draw(st.integers(0, 4)) == 0 and isinstance(node, dict):
            node["extra"] = draw(st.sampled_from(ODD_VALUES))
        elif isinstance(node[key], int) and draw(st.booleans()):
            node[key] += draw(st.integers(-8, 8))
        else:
            node[key] = copy.deepcopy(draw(st.sampled_from(ODD_VALUES)))
        return


@st.composite
def odd_files(draw: st.DrawFn) -> bytes:
    """A file that is good, or broken in one to three ways, in its values or its bytes."""
    header, data = draw(good_headers())
    for _ in range(draw(st.integers(0, 2))):
        _spoil(draw, header)
    text = json.dumps(header, ensure_ascii=draw(st.booleans()))
    if draw(st.integers(0, 2)) == 0:
        old, new = draw(st.sampled_from(REWRITINGS))
        text = text.replace(old, new, draw(st.integers(1, 2)))
    content = bytearray(framed(text, data))
    for _ in range(draw(st.integers(0, 2))):
        where = draw(st.integers(0, len(content)))
        some_bytes = draw(st.binary(max_size=3))
        content[where : where + draw(st.integers(0, 3))] = some_bytes
    if draw(st.integers(0, 3)) == 0:
        length = draw(st.integers(0, 2 ** draw(st.integers(0, 64)) - 1))
        content[:8] = length.to_bytes(8, "little")
    return bytes(content)


REWRITINGS = [
    *(("{", "\ufeff{"), ("{", " {"), ("{", "\n\t{"), ("}", "}\0"), ("}", "} "), ("}", ",}")),
    *((" 0", " -0"), ("[0", "[-0"), ("[0", "[00"), ("[0", "[0e0"), ("[0", "[0.0"), ("4]", "4,]")),
    *(("[", "[NaN,"), ("[0", "[Infinity"), ('"', "'"), ('"F32"', '"\\u004632"'), ("{", "[")),
    *(("{", '{"__metadata__":null,'), ("{", '{"a":1,"a":2,'), ("[0", "[1e400"), (":", "::")),
    *(("{", "{" + '"x":' + "[" * 500 + "]" * 500 + ","), ('": "', '": "\\ud800'), ('"', "")),
    *(("{", '{"\\ud83d\\ude00":1,'), ("0", "٠"), ("[0", "[1_0"), ("{", "/**/{"), (" ", "\x0b")),
    *(('"F32"', '{"F32":null}'), ('"dtype"', '"dtype": "F32", "dtype"'), ("]", "], 1")),
]


EMPTY = '{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'


class TestAgainstTheLibrary:
    @MANY
    @given(content=odd_files())
    def test_what_it_refuses_we_refuse(
        self, tmp_path_factory: pytest.TempPathFactory, content: bytes
    ) -> None:
        path = tmp_path_factory.getbasetemp() / "odd.safetensors"
        if library_refuses(content):
            refusal(path, content)
        else:
            with contextlib.suppress(RefusedError):
                read(path, content)

    @MANY
    @given(
        tensors=st.dictionaries(
            names.filter(lambda name: name != "__metadata__"),
            st.tuples(st.sampled_from(sorted(WRITTEN)), shapes, st.randoms()),
            max_size=5,
        ),
        # For no tensors and empty metadata the library writes what it cannot read itself.
        metadata=st.none() | st.dictionaries(names, names, min_size=1, max_size=3),
    )
    def test_what_it_writes_we_read(
        self,
        tmp_path_factory: pytest.TempPathFactory,
        tensors: dict[str, tuple[str, list[int], random.Random]],
        metadata: dict[str, str] | None,
    ) -> None:
        written: dict[str, tuple[str, list[int], bytes]] = {}
        for name, (dtype, shape, noise) in tensors.items():
            bits = DTYPE_BITS[WRITTEN[dtype]]
            for size in shape:
                bits *= size
            written[name] = (dtype, shape, noise.randbytes(bits // 8))
        content = serialize(written, metadata)
        specs = read(tmp_path_factory.getbasetemp() / "written.safetensors", content)
        assert specs.metadata == (metadata or {},)
        assert specs.tensors.keys() == written.keys()
        for name, spec in specs.tensors.items():
            assert (spec.dtype, list(spec.shape)) == (WRITTEN[tensors[name][0]], tensors[name][1])
            assert content[spec.offset : spec.offset + spec.size_bytes] == written[name][2]

    def test_every_dtype_that_it_knows_is_known(self) -> None:
        content = framed(json.dumps({"a": entry("F128")}), bytes(4))
        with pytest.raises(safetensors.SafetensorError, match="expected one of") as caught:
            deserialize(content)
        known = str(caught.value).split("expected one of ")[1].split(" at line")[0]
        assert {name.strip(" `") for name in known.split(",")} == set(DTYPE_BITS) - set(WRITTEN_AS)

    def test_a_huge_zero_element_shape_is_read_as_it_reads_it(self, tmp_path: Path) -> None:
        content = framed(json.dumps({"a": entry("F64", [2**63, 0], [0, 0])}))
        assert not library_refuses(content)
        assert read(tmp_path / "a.safetensors", content).tensors["a"].size_bytes == 0


class TestStricterThanTheLibrary:
    """The format forbids these, the library reads them; two readers could read two models."""

    @pytest.mark.parametrize(
        ("header", "code"),
        [
            (f'{{"a": {EMPTY}, "a": {EMPTY}}}', Code.DAMAGED),
            ('{"__metadata__": {"k": "1", "k": "2"}}', Code.DAMAGED),
            ("  {}", Code.WRONG_FORMAT),
            (f'{{"a": {EMPTY[:-1]}, "more": 1}}}}', Code.DAMAGED),
            ('{"__metadata__": null}', Code.DAMAGED),
        ],
        ids=["name twice", "metadata twice", "blanks first", "unknown field", "null metadata"],
    )
    def test_refused(self, tmp_path: Path, header: str, code: Code) -> None:
        assert not library_refuses(framed(header))
        assert refusal(tmp_path / "a.safetensors", framed(header)).code is code


class TestMakeHeader:
    @MANY
    @given(
        tensors=st.dictionaries(
            names.filter(lambda name: name != "__metadata__"),
            st.tuples(st.sampled_from(sorted(WRITTEN.values())), shapes.map(tuple)),
            max_size=5,
        ),
        metadata=st.dictionaries(names, names, max_size=3),
    )
    def test_the_library_reads_it_back(
        self,
        tmp_path_factory: pytest.TempPathFactory,
        tensors: dict[str, tuple[str, tuple[int, ...]]],
        metadata: dict[str, str],
    ) -> None:
        header, offsets = make_header([(n, *rest) for n, rest in tensors.items()], metadata)
        assert len(header) % 8 == 0
        sizes = [torch.Size(s).numel() * DTYPE_BITS[dtype] // 8 for dtype, s in tensors.values()]
        content = header + random.Random(0).randbytes(sum(sizes))
        theirs = dict(deserialize(content))
        assert {n: (t["dtype"], tuple(t["shape"])) for n, t in theirs.items()} == tensors
        for name, begin, size in zip(tensors, offsets, sizes, strict=True):
            assert bytes(theirs[name]["data"]) == content[begin : begin + size]
        ours = read(tmp_path_factory.getbasetemp() / "made.safetensors", content)
        assert [ours.tensors[name].offset for name in tensors] == offsets
        assert ours.metadata == (metadata,)


GOOD = framed(json.dumps({"w": entry()}), bytes(4))


class TestRefusals:
    @pytest.mark.parametrize(
        ("content", "code"),
        [
            (b"", Code.CUT_SHORT),
            (bytes(100), Code.CUT_SHORT),
            (GOOD[:20], Code.CUT_SHORT),
            (GOOD[:-1], Code.CUT_SHORT),
            (GOOD[:5], Code.WRONG_FORMAT),
            (GOOD + b"more", Code.DAMAGED),
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n", Code.WRONG_FORMAT),
            (b"<!DOCTYPE html>\n<html><body>Access denied</body></html>\n", Code.WRONG_FORMAT),
            (b"PK\x03\x04" + bytes(100), Code.WRONG_FORMAT),
            (b"\x80\x02}q\x00." + bytes(100), Code.WRONG_FORMAT),
        ],
        ids=str,
    )
    def test_tell_an_interrupted_save_from_another_format(
        self, tmp_path: Path, content: bytes, code: Code
    ) -> None:
        assert library_refuses(content)
        error = refusal(tmp_path / "model.safetensors", content)
        assert error.code is code
        assert isinstance(error, IncompleteError) == (code is Code.CUT_SHORT)

    @pytest.mark.parametrize(
        "tensor",
        [
            *(entry(shape=[2]), entry(shape=[2**62, 4]), entry(shape="1"), entry("F31")),
            *(entry(offsets=[1, 5]), entry(offsets=[4, 0]), entry("F4", [1], [0, 0]), {}),
        ],
        ids=str,
    )
    def test_name_the_tensor(self, tmp_path: Path, tensor: dict[str, Any]) -> None:
        content = framed(json.dumps({"red\x1b[31m\n": tensor}), bytes(4))
        error = refusal(tmp_path / "a.safetensors", content)
        assert (error.code, error.tensor) == (Code.DAMAGED, "red\x1b[31m\n")

    def test_name_the_tensor_that_overlaps(self, tmp_path: Path) -> None:
        header = json.dumps({"v": entry(), "w": entry(offsets=[2, 6])})
        assert refusal(tmp_path / "a.safetensors", framed(header, bytes(6))).tensor == "w"

    @pytest.mark.parametrize("size", [True, 1.0, "1"], ids=str)
    @pytest.mark.parametrize("first", ["v", "x"])
    def test_what_only_equals_a_size_beside_good_tensors(
        self, tmp_path: Path, size: Any, first: str
    ) -> None:
        tensors = {"w": [1], "v": [1], "x": [1], first: [size]}
        header = {
            name: entry(shape=shape, offsets=[4 * n, 4 * n + 4])
            for n, (name, shape) in enumerate(tensors.items())
        }
        content = framed(json.dumps(header), bytes(12))
        assert library_refuses(content)
        assert refusal(tmp_path / "a.safetensors", content).tensor == first

    @pytest.mark.parametrize(
        ("template", "name"),
        [
            ("{w},{w}", "w"),
            ("{w}, {x},{w}", "w"),
            ('"\\u003a":{free},{w},{w}', "w"),  # an escaped colon is not counted for a name's
            ('"::":{free},{w},{w}', "w"),
            ('"__metadata__":{{"a:":"b:","a:":"b"}},{w}', "a:"),
            ('"__metadata__":{{"a":"\\u003a\\u003a"}},{w},{x},{w}', "w"),
            ('"v":{{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}', "dtype"),
        ],
    )
    def test_names_that_are_there_twice_whatever_other_colons_there_are(
        self, tmp_path: Path, template: str, name: str
    ) -> None:
        w, free = json.dumps(entry()), json.dumps(entry(shape=[0], offsets=[0, 0]))
        text = template.format(w=f'"w":{w}', x=f'"x" : {free}', free=free)
        error = refusal(tmp_path / "a.safetensors", framed(f"{{{text}}}", bytes(4)))
        assert f"'{name}' is there twice" in str(error)


class TestEqualHeaders:
    def test_are_parsed_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        parsed: list[str] = []
        loads = json.loads

        def noted(text: str, **options: Any) -> Any:
            parsed.append(text)
            return loads(text, **options)

        monkeypatch.setattr(json, "loads", noted)
        header = json.dumps({"only-here": entry()})
        files = [tmp_path / f"{number}.safetensors" for number in range(10)]
        specs = [read(file, framed(header, bytes([n] * 4))) for n, file in enumerate(files)]
        assert parsed == [header]
        assert all(one.tensors is specs[0].tensors for one in specs)

    def test_do_not_excuse_a_file_that_is_cut_short(self, tmp_path: Path) -> None:
        content = framed(json.dumps({"w": entry()}), bytes(4))
        read(tmp_path / "a.safetensors", content)
        assert refusal(tmp_path / "b.safetensors", content[:-1]).code is Code.CUT_SHORT
        assert refusal(tmp_path / "c.safetensors", content + b"1").code is Code.DAMAGED


class TestBounds:
    @pytest.mark.parametrize(
        "content",
        [
            (2**40).to_bytes(8, "little") + b"{",
            (2**63).to_bytes(8, "little") + b"{",
            (MAX_HEADER_BYTES).to_bytes(8, "little") + b"{}",
            (MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{}",
            framed(json.dumps({"a": entry("U8", [2**40], [0, 2**40])})),
            framed(json.dumps({"a": entry("U8", [1] * 1000 + [2**63], [0, 2**63])})),
            framed('{"a":' * 50_000),
            framed('{"a":' + "[" * 50_000),
            framed('{"__metadata__":{"a":' + "1" * 50_000 + "}}"),
        ],
        ids=lambda content: content[:12].hex(),
    )
    def test_a_small_file_with_a_huge_claim_costs_nothing(
        self, tmp_path: Path, content: bytes
    ) -> None:
        assert library_refuses(content)
        with cheap(8_000_000):
            refusal(tmp_path / "a.safetensors", content)

    def test_a_legal_10_megabyte_header_is_read(self, tmp_path: Path) -> None:
        header = {"__metadata__": {"long": "x" * 10_000_000}, "a": entry(shape=[])}
        content = framed(json.dumps(header), bytes(4))
        assert read(tmp_path / "a.safetensors", content).tensors["a"].shape == ()

    def test_a_file_without_tensors_is_read_as_such(self, tmp_path: Path) -> None:
        assert not read(tmp_path / "a.safetensors", framed("{}")).tensors
