"""Parts of one output, made one by one and finished: the same bytes, or what is missing."""

import json
import math
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import ckpt_ema
from ckpt_ema.errors import CkptEmaError, Code, FailedError, OptionError, RefusedError
from ckpt_ema.output.workspace import Workspace
from tests.command import ckpt_ema as command
from tests.conftest import MakeRun, noise, series
from tests.makers.faulty_os import faulty

OPTIONS: dict[str, Any] = {"device": "cpu", "tile_size": 256, "threads": 2}


@pytest.fixture
def run(make_run: MakeRun) -> Path:
    """A run of four checkpoints with shards and a companion."""
    states = series(4, a=noise(4, 300), b=noise(4, 33, 3, dtype=torch.bfloat16), n=torch.arange(99))
    return make_run(states, shards=2)


def make_parts(run: Path, output: Path, parts: list[str], **options: Any) -> None:
    """Make these parts in this order."""
    for part in parts:
        ckpt_ema.average_part(run, part, output=output, **{**OPTIONS, **options})


def error(kind: type[CkptEmaError], output: Path, code: Code) -> str:
    """The error with which an output cannot be finished."""
    with pytest.raises(kind) as caught:
        ckpt_ema.finish(output)
    assert (caught.value.code, caught.value.path) == (code, str(output))
    return caught.value.message


def contents(folder: Path) -> dict[str, bytes]:
    """The files of an output but for what tells how it was made."""
    return {
        os.path.relpath(path, folder): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("ckpt_ema.json", "README.md")
    }


@pytest.mark.parametrize(
    "parts", [["1/1"], ["2/2", "1/2"], [f"{n}/7" for n in (3, 1, 7, 2, 5, 6, 4)]]
)
@pytest.mark.parametrize("decay", [0.2, "0.1,0.2"])
def test_parts_are_byte_for_byte_the_whole(
    run: Path, tmp_path: Path, parts: list[str], decay: Any
) -> None:
    whole = ckpt_ema.average(run, output=tmp_path / "whole", decay=decay, **OPTIONS)
    make_parts(run, tmp_path / "parts", parts, decay=decay)
    assert not (tmp_path / "parts").exists()
    finished = ckpt_ema.finish(tmp_path / "parts")
    assert contents(finished.output) == contents(whole.output)
    assert [path.name for path in finished.outputs] == [
        path.name.replace("whole", "parts") for path in whole.outputs
    ]
    for made, record in zip(finished.manifests, whole.manifests, strict=True):
        for key in ("checkpoints", "statistics", "files", "device"):
            assert made[key] == record[key]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts", "run", "whole"]
    assert ckpt_ema.average(run, output=finished.output, decay=decay, **OPTIONS).is_up_to_date


def test_one_file_can_be_made_in_parts(run: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole/out.safetensors", tmp_path / "parts/out.safetensors"
    whole.parent.mkdir()
    parts.parent.mkdir()
    ckpt_ema.average(run, output=whole, **OPTIONS)
    make_parts(run, parts, ["1/3", "2/3", "3/3"])
    finished = ckpt_ema.finish(parts)
    assert finished.output.read_bytes() == whole.read_bytes()
    again = ckpt_ema.finish(parts)
    assert again.outputs == finished.outputs
    assert again.manifests[0]["fingerprint"] == finished.manifests[0]["fingerprint"]


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (["1/3", "3/3"], "part 2 of 3 is missing"),
        (["2/9", "5/9", "6/9"], "parts 1, 3-4, 7-9 of 9 are missing"),
        (["1/2", "1/5", "2/5", "3/5", "5/5"], "4 of 5 is|2 of 2 is"),
    ],
)
def test_missing_parts_are_named_and_nothing_is_published(
    run: Path, tmp_path: Path, made: list[str], message: str
) -> None:
    make_parts(run, tmp_path / "out", made)
    assert re.search(message, error(FailedError, tmp_path / "out", Code.PARTS_MISSING))
    assert not (tmp_path / "out").exists()


def test_a_division_that_is_complete_is_enough_and_twice_does_no_harm(
    run: Path, tmp_path: Path
) -> None:
    whole = ckpt_ema.average(run, output=tmp_path / "whole", **OPTIONS)
    make_parts(run, tmp_path / "out", ["2/3", "1/2", "2/3", "2/2", "1/2"])
    assert contents(ckpt_ema.finish(tmp_path / "out").output) == contents(whole.output)
    make_parts(run, tmp_path / "out", ["1/2"])  # late: it is up to date
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run", "whole"]


def test_parts_of_different_averages_are_told_apart(run: Path, tmp_path: Path) -> None:
    make_parts(run, tmp_path / "out", ["1/2"], decay=0.1)
    make_parts(run, tmp_path / "out", ["2/2"], decay=0.2)
    assert "2 different averages" in error(RefusedError, tmp_path / "out", Code.PARTS_DISAGREE)


def test_another_run_to_the_same_output_leaves_parts_alone(run: Path, tmp_path: Path) -> None:
    make_parts(run, tmp_path / "out", ["1/2"], decay=0.1)
    ckpt_ema.average(run, output=tmp_path / "out", decay=0.2, **OPTIONS)
    make_parts(run, tmp_path / "out", ["2/2"], decay=0.1, overwrite=True)
    error(RefusedError, tmp_path / "out", Code.OUTPUT_EXISTS)
    assert ckpt_ema.finish(tmp_path / "out", overwrite=True).manifests[0]["decay"] == 0.1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


def test_where_there_is_nothing_to_finish_that_is_said(run: Path, tmp_path: Path) -> None:
    for path in (tmp_path / "out", tmp_path / "no/where", run):
        error(RefusedError, path, Code.NO_PARTS)


def test_a_part_that_is_being_made_is_waited_for(run: Path, tmp_path: Path) -> None:
    make_parts(run, tmp_path / "out", ["1/1"])
    [folder] = tmp_path.glob(".out*")
    key = folder.name.rpartition("-")[2]
    with Workspace(tmp_path / "out", key, is_shared=True) as work:
        work.kept = True
        error(RefusedError, tmp_path / "out", Code.OUTPUT_IN_USE)
        make_parts(run, tmp_path / "out", ["1/1"])  # parts are at work side by side
    assert ckpt_ema.finish(tmp_path / "out").output.is_dir()


def test_two_steps_with_one_state_are_seen_across_parts(make_run: MakeRun, tmp_path: Path) -> None:
    """Frozen halves are alike in one part; only what is alike in all is a copy."""
    moving = noise(3, 200)
    frozen = make_run(series(3, a=torch.ones(200), b=moving), name="frozen")
    make_parts(frozen, tmp_path / "out", ["1/2", "2/2"])
    assert ckpt_ema.finish(tmp_path / "out").output.is_dir()
    copied = make_run(series(3, a=torch.ones(200), b=[moving[0], moving[0], moving[1]]))
    make_parts(copied, tmp_path / "other", ["1/2", "2/2"])
    with pytest.raises(RefusedError, match="checkpoint-1 and checkpoint-2"):
        ckpt_ema.finish(tmp_path / "other")
    make_parts(copied, tmp_path / "wanted", ["1/2", "2/2"], allow_duplicates=True)
    assert ckpt_ema.finish(tmp_path / "wanted").output.is_dir()


def test_a_part_that_fails_leaves_the_others(make_run: MakeRun, tmp_path: Path) -> None:
    weights = noise(3, 200)
    weights[1][150] = math.nan
    run = make_run(series(3, w=weights))
    make_parts(run, tmp_path / "out", ["1/2"])
    with pytest.raises(RefusedError) as caught:
        make_parts(run, tmp_path / "out", ["2/2"])
    assert caught.value.tensor == "w"
    assert "part 2 of 2 is missing" in error(FailedError, tmp_path / "out", Code.PARTS_MISSING)


def test_by_command(run: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    made = command("average", run, "-o", output, "--device", "cpu", "--part", "1/2")
    assert (made.returncode, made.stdout) == (0, "")
    assert f"ckpt-ema finish {output}" in made.stderr.splitlines()[-1]
    early = command("finish", output)
    assert (early.returncode, early.stdout) == (1, "")
    assert "part 2 of 2 is missing" in early.stderr
    assert command("average", run, "-o", output, "-q", "--part", "2/2").stderr == ""
    done = command("finish", output)
    assert (done.returncode, done.stdout) == (0, f"{output}\n")
    assert "--part" not in (output / "README.md").read_text()
    told = command("finish", output, "--json")
    assert (told.returncode, json.loads(told.stdout)["output"]) == (0, str(output))
    wrong = command("average", run, "-o", tmp_path / "new", "--part", "0/2")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "--part is '0/2'" in wrong.stderr


def test_a_part_is_checked_before_anything_is_read(run: Path) -> None:
    with pytest.raises(OptionError):
        ckpt_ema.average_part(run, "3/2")


def test_parts_of_an_output_that_is_published_are_parts_of_no_other(
    run: Path, tmp_path: Path
) -> None:
    """`finish` was killed after it had published, and somebody has moved the output away."""
    output = tmp_path / "out"
    for part in ("1/2", "2/2"):
        ckpt_ema.average_part(run, part, output=output, **OPTIONS)
    with faulty("unlink", 1, ever_after=True):
        ckpt_ema.finish(output)
    assert list(tmp_path.glob(".out.ckpt-ema-*/part-2-of-2.json"))
    shutil.rmtree(output)
    error(RefusedError, output, Code.NO_PARTS)
    ckpt_ema.average_part(run, "1/2", output=output, **OPTIONS)
    assert "part 2 of 2 is missing" in error(FailedError, output, Code.PARTS_MISSING)


@pytest.mark.parametrize("then", ["finish", "part", "resume"])
def test_an_output_that_was_exchanged_for_the_new_one_never_comes_back(
    run: Path, tmp_path: Path, then: str
) -> None:
    """Killed after the exchange, the work folder holds the old average beside what is done."""
    output, new = tmp_path / "out", {"decay": 0.1, **OPTIONS}
    ckpt_ema.average(run, output=output, decay=0.9, schedule="constant", **OPTIONS)
    with faulty("unlink", 1, ever_after=True):
        if then == "resume":
            ckpt_ema.average(run, output=output, overwrite=True, resume=True, **new)
        else:
            for part in ("1/2", "2/2"):
                ckpt_ema.average_part(run, part, output=output, overwrite=True, **new)
            ckpt_ema.finish(output, overwrite=True)
    expected = contents(output)
    if then == "finish":
        ckpt_ema.finish(output, overwrite=True)
        assert contents(output) == expected
        return
    output.rename(tmp_path / "best")
    if then == "part":
        ckpt_ema.average_part(run, "1/2", output=output, **new)
        assert "part 2 of 2 is missing" in error(FailedError, output, Code.PARTS_MISSING)
        ckpt_ema.average_part(run, "2/2", output=output, **new)
        ckpt_ema.finish(output)
    else:
        ckpt_ema.average(run, output=output, resume=True, **new)
    assert contents(output) == expected


def test_parts_that_start_together_after_a_published_run(run: Path, tmp_path: Path) -> None:
    """Each finds records of an output that is gone, and drops them."""
    for _ in range(30):
        folder = Workspace(tmp_path / "out", "key", is_shared=True)
        folder.path.mkdir(exist_ok=True)
        for number in range(50):
            (folder.path / f"part-{number}-of-50.json").write_text("{}")
        with ThreadPoolExecutor(4) as pool:
            for claim in [pool.submit(_claim, tmp_path / "out") for _ in range(4)]:
                claim.result()


def _claim(output: Path) -> None:
    with Workspace(output, "key", is_shared=True) as folder:
        folder.kept = True


def test_small_files_that_parts_write_at_the_same_time_are_whole(tmp_path: Path) -> None:
    texts = [b"a" * 120, b"b" * 110]

    def write(text: bytes) -> None:
        for _ in range(100):
            work.replace_file(tmp_path / "README.md", text)
            assert (tmp_path / "README.md").read_bytes() in texts

    with Workspace(tmp_path / "out") as work, ThreadPoolExecutor(2) as pool:
        for written in [pool.submit(write, text) for text in texts]:
            written.result()


@pytest.mark.parametrize("name", ["part-1-of-2.json", "outline.json"])
@pytest.mark.parametrize("content", [None, b"", b"\xff", b'{"alike": [', b'{"alike": []}'])
def test_a_damaged_record_is_named(
    run: Path, tmp_path: Path, name: str, content: bytes | None
) -> None:
    output = tmp_path / "out"
    make_parts(run, output, ["1/2", "2/2"])
    [record] = tmp_path.glob(f".out.ckpt-ema-*/{name}")
    record.unlink() if content is None else record.write_bytes(content)
    with pytest.raises(FailedError) as caught:
        ckpt_ema.finish(output)
    assert caught.value.code in (Code.DAMAGED, Code.PARTS_MISSING)
    assert caught.value.path in (str(record), str(record.parent), str(output))
    make_parts(run, output, ["1/2"])
    assert ckpt_ema.finish(output).output.is_dir()
