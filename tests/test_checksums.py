"""Checksums: those of pieces join to that of the whole, in any order and by any fold."""

from __future__ import annotations

import json
import struct
import zlib
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ckpt_ema
from ckpt_ema.fold.checksum import checksum, checksum_of
from ckpt_ema.fold.crc32 import Piece, joined
from ckpt_ema.output.content import checksum_of_state, crc32_of
from tests.conftest import MakeRun, noise, series
from tests.makers.folds import by_torch


def test_by_hand_the_crc_of_two_bytes() -> None:
    """CRC-32 of "123456789" is 0xcbf43926, in every catalogue; of nothing it is 0."""
    text = b"123456789"
    pieces = [Piece(4, 9, zlib.crc32(text[4:])), Piece(0, 4, zlib.crc32(text[:4]))]
    assert joined(pieces, 9) == 0xCBF43926
    assert joined([], 0) == 0


@given(st.data())
def test_pieces_of_any_cut_in_any_order_join_to_what_zlib_says(data: st.DataObject) -> None:
    content = data.draw(st.binary(max_size=300))
    cuts = sorted({0, len(content), *data.draw(st.sets(st.integers(0, len(content))))})
    pieces = [Piece(a, b, zlib.crc32(content[a:b])) for a, b in pairwise(cuts)]
    assert joined(data.draw(st.permutations(pieces)), len(content)) == zlib.crc32(content)


@given(st.integers(2, 1 << 40), st.data())
def test_pieces_may_be_as_long_as_files(size_bytes: int, data: st.DataObject) -> None:
    """Any three of them give the same, whichever two of them are joined first."""
    cuts = sorted(data.draw(st.lists(st.integers(1, size_bytes - 1), min_size=2, max_size=2)))
    bounds = [0, *cuts, size_bytes]
    crcs = data.draw(st.lists(st.integers(0, (1 << 32) - 1), min_size=3, max_size=3))
    pieces = [Piece(*ends, crc) for ends, crc in zip(pairwise(bounds), crcs, strict=True)]
    whole = [one for one in pieces if one.start < one.stop]
    assert joined(whole, size_bytes) == joined(reversed(whole), size_bytes)


def plain(values: list[float]) -> int:
    """The checksum as its formula says, in Python's integers."""
    total = 0
    for value in values:
        low, high = struct.unpack("<2I", struct.pack("<d", value))
        total += ((low + 0x9E3779B9) % 2**32) * ((high + 0x85EBCA6B) % 2**32)
    return total % 2**64


def test_by_hand_the_checksum_of_one() -> None:
    """1.0 is 0x3ff00000_00000000."""
    content = bytearray(struct.pack("<d", 1.0))
    assert checksum(content) == 0x9E3779B9 * ((0x3FF00000 + 0x85EBCA6B) % 2**32)


VALUES = st.lists(st.floats(width=64), max_size=50)


@given(VALUES, st.randoms())
def test_compiled_torch_and_plain_python_agree_in_any_order(
    values: list[float], random: Any
) -> None:
    expected = plain(values)
    random.shuffle(values)
    content = bytearray(struct.pack(f"<{len(values)}d", *values))
    assert checksum(content) == expected
    if values:
        assert checksum_of(torch.frombuffer(content, dtype=torch.float64)) == expected
        with by_torch():
            assert checksum(content) == expected


@given(VALUES.filter(bool), st.integers(0, 63))
def test_any_bit_that_flips_shows(values: list[float], bit: int) -> None:
    content = bytearray(struct.pack(f"<{len(values)}d", *values))
    before = checksum(content)
    content[bit // 8] ^= 1 << bit % 8
    assert checksum(content) != before


def test_the_compiled_checksum_refuses_a_length_beyond_the_buffer(
    compiled_module: ModuleType,
) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        compiled_module.checksum(bytearray(8), 2)


# --- In manifests ---------------------------------------------------------------------------------

STATES = series(3, a=noise(3, 50, 70), b=noise(3, 40, dtype=torch.bfloat16), n=torch.arange(9))


def in_parts(run: Path, **options: Any) -> ckpt_ema.output.manifest.Result:
    """Two parts and their publication."""
    for part in ("1/2", "2/2"):
        ckpt_ema.average_part(run, part, **options)
    return ckpt_ema.finish(options["output"])


def resumed(run: Path, **options: Any) -> ckpt_ema.output.manifest.Result:
    """Interrupted after the first tiles, and continued."""

    def stop(done_bytes: int, _total_bytes: int) -> None:
        if done_bytes:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ckpt_ema.average(run, resume=True, progress=stop, threads=1, **options)
    return ckpt_ema.average(run, resume=True, **options)


def updated(run: Path, **options: Any) -> ckpt_ema.output.manifest.Result:
    """The first two, and an update with the third."""
    aside = run.with_name("checkpoint-3")
    (run / "checkpoint-3").rename(aside)
    ckpt_ema.average(run, **{**options, "keep_state": True})
    aside.rename(run / "checkpoint-3")
    return ckpt_ema.update(options["output"])


@pytest.mark.parametrize("make", [ckpt_ema.average, in_parts, resumed, updated])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"keep_state": True},
        {"save_as": "checkpoint"},
        {"decay": [0.2, 0.3], "keep_state": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("torch_files", [False, True])
def test_a_manifest_has_the_checksums_of_its_files_however_they_were_made(
    make_run: MakeRun, tmp_path: Path, make: Any, options: dict[str, Any], torch_files: bool
) -> None:
    run = make_run(STATES, shards=0 if torch_files else 2, torch_files=torch_files)
    made = make(run, output=tmp_path / "out", tile_size=64, **options)
    for folder in made.outputs:
        manifest = json.loads((folder / "ckpt_ema.json").read_text())
        files = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
        own = {"README.md", "ckpt_ema.json", "ckpt_ema.state"}
        expected = {
            str(one): f"{zlib.crc32((folder / one).read_bytes()):08x}"
            for one in files
            if str(one) not in own
        }
        assert manifest["crc32"] == expected
        if "state" in manifest:
            content = (folder / "ckpt_ema.state").read_bytes()
            start = 8 + int.from_bytes(content[:8], "little")
            values = [one for (one,) in struct.iter_unpack("<d", content[start:])]
            assert int(manifest["state"]["checksum"], 16) == plain(values)
            assert checksum_of_state(folder / "ckpt_ema.state") == plain(values)


def test_a_single_file_has_none(make_run: MakeRun, tmp_path: Path) -> None:
    made = ckpt_ema.average(make_run(STATES), output=tmp_path / "a.safetensors")
    assert "crc32" not in made.manifests[0]


def test_the_crc_of_a_file_is_what_zlib_says(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 9000)  # more than is read at a time
    assert crc32_of(path) == zlib.crc32(path.read_bytes())
