"""Updates: byte for byte the average of all checkpoints, although the old ones are gone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.state_dict_saver import save

import ckpt_ema
from ckpt_ema.errors import Code, FailedError, OptionError, RefusedError
from tests.command import ckpt_ema as command
from tests.conftest import MakeRun, noise, read_safetensors, series, write_safetensors
from tests.makers.faulty_os import faulty
from tests.makers.folds import by_torch

STATES = series(
    7,
    a=noise(7, 5, 70),
    b=noise(7, 40, dtype=torch.bfloat16),
    h=noise(7, 3, 3, dtype=torch.float16),
    n=[torch.arange(9) + step for step in range(7)],
)

SCHEDULES: list[dict[str, Any]] = [
    {},
    {"decay": 0.3},
    {"num_updates": "step", "decay": 0.9999},
    {"schedule": "constant", "decay": 0.7},
    {"schedule": "constant", "decay": 0.7, "zero_debias": True},
    {"schedule": "uniform"},
    {"schedule": "linear"},
    {"schedule": "warmup", "decay": 0.9},
    {"sigma_rel": 0.15},
    {"decay_per_step": 0.99},
    {"half_life": 120},
]


class Run:
    """A run of which each checkpoint can be there or gone, always the same file."""

    def __init__(self, whole: Path) -> None:
        self.whole, self.path = whole, whole.parent / "run"
        self.path.mkdir()
        self.names = sorted((one.name for one in whole.iterdir()), key=lambda name: int(name[11:]))

    def show(self, *numbers: int) -> None:
        """Have these checkpoints, counted from 0, and no others."""
        shutil.rmtree(self.path)
        self.path.mkdir()
        for number in numbers:
            name = self.names[number]
            shutil.copytree(self.whole / name, self.path / name)


@pytest.fixture
def run(make_run: MakeRun) -> Run:
    """Seven checkpoints of which none is there yet."""
    steps = [100 * step + step**2 for step in range(1, 8)]
    return Run(make_run(STATES, steps, name="whole"))


def contents(folder: Path) -> dict[str, bytes]:
    """What an output holds, but for how and when it was made."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    named = {str(path.relative_to(folder)): path.read_bytes() for path in files}
    return {name: content for name, content in named.items() if "ckpt_ema.json" not in name}


def same_as_batch(run: Run, output: Path, **options: Any) -> None:
    """Check that an output is what the average of all seven checkpoints would be."""
    found = contents(output)
    manifest = json.loads((output / "ckpt_ema.json").read_text())
    run.show(*range(7))
    shutil.rmtree(output)
    made = ckpt_ema.average(run.path, output=output, keep_state=True, **options)
    assert contents(output) == found
    for key in ("fingerprint", "checkpoints", "statistics", "state", "crc32", "files"):
        assert manifest[key] == made.manifests[0][key]


@pytest.mark.parametrize("options", SCHEDULES, ids=str)
def test_an_updated_average_is_the_average_of_all_byte_for_byte(
    run: Run, options: dict[str, Any]
) -> None:
    output = run.path.parent / "out"
    run.show(0, 1, 2)
    ckpt_ema.average(run.path, output=output, keep_state=True, **options)
    run.show(2, 3)
    one = ckpt_ema.update(output)
    assert len(one.plan.inputs) == 2  # the state and one checkpoint
    run.show(4, 5, 6)
    ckpt_ema.update(output)
    same_as_batch(run, output, **options)


@pytest.mark.usefixtures("either_fold")
def test_a_state_has_tied_tensors_under_each_name(run: Run) -> None:
    """torch stores them once, and a state twice: its checksum is of both."""
    tied = [{**state, "head": state["a"]} for state in STATES]
    for name, state in zip(run.names, tied, strict=True):
        (run.whole / name / "model.safetensors").unlink()
        torch.save(state, run.whole / name / "pytorch_model.bin")
    output = run.path.parent / "out"
    run.show(0, 1, 2)
    ckpt_ema.average(run.path, output=output, keep_state=True)
    assert ckpt_ema.verify(output).is_as_claimed
    run.show(3, 4, 5, 6)
    ckpt_ema.update(output)
    assert ckpt_ema.verify(output).is_as_claimed
    same_as_batch(run, output)


def test_by_hand_a_third_checkpoint_is_folded_with_the_third_decay(make_run: MakeRun) -> None:
    """1, 2, 4 at decay 1/2: 1.5, then 2.75; the state holds what float16 cannot."""
    values = [torch.tensor([value], dtype=torch.float16) for value in (1.0, 2.0, 4.0009765625)]
    run = make_run(series(2, w=values[:2]))
    made = ckpt_ema.average(run, schedule="constant", decay=0.5, keep_state=True)
    shutil.rmtree(run / "checkpoint-1")
    shutil.rmtree(run / "checkpoint-2")
    third = run / "checkpoint-3"
    third.mkdir()
    write_safetensors(third / "model.safetensors", {"w": torch.tensor([4.0])})
    ckpt_ema.update(made.output)
    shown = read_safetensors(made.output / "model.safetensors")
    assert shown["w"].tolist() == [2.75]
    state = read_safetensors(made.output / "ckpt_ema.state")
    assert state["w"].dtype == torch.float64
    assert state["w"].tolist() == [2.75]


@given(
    groups=st.lists(st.integers(1, 3), min_size=1, max_size=5),
    seed=st.integers(0, 99),
    decay=st.sampled_from([0.0, 0.3, 0.5, 0.9, 0.999, 1.0]),
    schedule=st.sampled_from(["dynamic", "constant"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.complex64]),
    is_by_torch=st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_in_whatever_groups_checkpoints_come_the_average_is_the_same(
    tmp_path_factory: pytest.TempPathFactory,
    groups: Sequence[int],
    seed: int,
    decay: float,
    schedule: str,
    dtype: torch.dtype,
    is_by_torch: bool,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    folder = tmp_path_factory.mktemp("groups")
    run, output, step = folder / "run", folder / "out", 0
    options: dict[str, Any] = {"schedule": schedule, "decay": decay, "keep_state": True}
    for count in groups:
        for _ in range(count):
            step += 1
            checkpoint = run / f"checkpoint-{step}"
            checkpoint.mkdir(parents=True)
            state = {"w": torch.randn(3, 50, generator=generator, dtype=dtype)}
            write_safetensors(checkpoint / "model.safetensors", state)
        if not output.exists():
            ckpt_ema.average(run, output=output, **options)
        elif is_by_torch:
            with by_torch():
                ckpt_ema.update(output, device="cpu")
        else:
            ckpt_ema.update(output)
    found = contents(output)
    ckpt_ema.average(run, output=output, overwrite=True, **options)
    assert contents(output) == found


def test_several_averages_are_updated_together(run: Run) -> None:
    output = run.path.parent / "out"
    options: dict[str, Any] = {"half_life": [100, 200], "decay": [0.3, 0.5]}
    run.show(0, 1, 2)
    ckpt_ema.average(run.path, output=output, keep_state=True, **options)
    run.show(3, 4, 5, 6)
    made = ckpt_ema.update(output)
    assert len(made.outputs) == len(made.manifests) == 4
    found = contents(output)
    run.show(*range(7))
    ckpt_ema.average(run.path, output=output, keep_state=True, overwrite=True, **options)
    assert contents(output) == found


def test_the_names_of_several_averages_may_sort_in_any_order(run: Run) -> None:
    """half-life-1000 stands before half-life-200 in their folder."""
    output = run.path.parent / "out"
    run.show(0, 1, 2)
    options: dict[str, Any] = {"half_life": [200, 1000]}
    ckpt_ema.average(run.path, output=output, keep_state=True, **options)
    run.show(3, 4, 5, 6)
    ckpt_ema.update(output)
    found = contents(output)
    run.show(*range(7))
    ckpt_ema.average(run.path, output=output, keep_state=True, overwrite=True, **options)
    assert contents(output) == found


def test_several_averages_of_which_one_is_gone_are_refused(run: Run) -> None:
    run.show(0, 1)
    made = ckpt_ema.average(run.path, keep_state=True, half_life=[200, 1000])
    shutil.rmtree(made.outputs[0])
    run.show(1, 2)
    error = refused(run, Code.STATE_DIFFERS)
    assert "holds half-life-1000, not half-life-1000, half-life-200" in str(error)


def test_averages_that_were_not_made_together_are_refused(run: Run) -> None:
    run.show(0, 1)
    output = run.path.parent / "run-ema"
    output.mkdir()
    for name, decay in (("a", 0.2), ("b", 0.3)):
        ckpt_ema.average(run.path, output=output / name, keep_state=True, decay=decay)
    run.show(1, 2)
    refused(run, Code.STATE_DIFFERS)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("form", ["torch files", "shards", "dcp", "torch files back", "dcp back"])
def test_every_container_can_be_updated(make_run: MakeRun, tmp_path: Path, form: str) -> None:
    steps = range(1, 8)
    if form.startswith("dcp"):
        for step, state in zip(steps, STATES, strict=True):
            save(dict(state), checkpoint_id=tmp_path / "whole" / f"checkpoint-{step}", no_dist=True)
    elif form == "shards":
        make_run(STATES, steps, name="whole", shards=2)
    else:
        make_run(STATES, steps, name="whole", torch_files=True)
    run = Run(tmp_path / "whole")
    options: dict[str, Any] = {"save_as": "checkpoint"} if form.endswith("back") else {}
    output = tmp_path / "out"
    run.show(0, 1, 2)
    ckpt_ema.average(run.path, output=output, keep_state=True, **options)
    run.show(2, 3, 4)
    ckpt_ema.update(output)
    run.show(5, 6)
    ckpt_ema.update(output)
    same_as_batch(run, output, **options)


def test_parts_keep_a_state_too(run: Run) -> None:
    output = run.path.parent / "out"
    run.show(0, 1, 2, 3)
    for part in ("1/3", "2/3", "3/3"):
        ckpt_ema.average_part(run.path, part, output=output, keep_state=True, tile_size=64)
    ckpt_ema.finish(output)
    run.show(4, 5, 6)
    ckpt_ema.update(output, threads=1)
    same_as_batch(run, output)


def test_a_resumed_run_keeps_a_state_too(run: Run) -> None:
    output = run.path.parent / "out"
    run.show(0, 1, 2)
    options: dict[str, Any] = {"output": output, "keep_state": True, "tile_size": 64}

    def stop(done_bytes: int, _total_bytes: int) -> None:
        if done_bytes:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ckpt_ema.average(run.path, resume=True, progress=stop, threads=1, **options)
    ckpt_ema.average(run.path, resume=True, **options)
    run.show(3, 4, 5, 6)
    ckpt_ema.update(output)
    same_as_batch(run, output)


def test_nothing_new_is_up_to_date_and_reads_nothing(run: Run) -> None:
    run.show(0, 1, 2)
    made = ckpt_ema.average(run.path, keep_state=True)
    before = {path: path.stat().st_mtime_ns for path in made.output.rglob("*")}
    again = ckpt_ema.update(made.output)
    assert again.is_up_to_date
    assert again.bytes_read == 0
    assert {path: path.stat().st_mtime_ns for path in made.output.rglob("*")} == before


def test_the_average_command_finds_an_updated_output_up_to_date(run: Run) -> None:
    output = run.path.parent / "out"
    run.show(0, 1, 2)
    ckpt_ema.average(run.path, output=output, keep_state=True)
    run.show(3, 4, 5, 6)
    ckpt_ema.update(output)
    run.show(*range(7))
    assert ckpt_ema.average(run.path, output=output, keep_state=True).is_up_to_date


def test_an_average_without_its_state_is_not_up_to_date_where_one_is_asked_for(run: Run) -> None:
    run.show(0, 1)
    made = ckpt_ema.average(run.path)
    with pytest.raises(RefusedError) as caught:
        ckpt_ema.average(run.path, keep_state=True)
    assert caught.value.code is Code.OUTPUT_EXISTS
    assert not ckpt_ema.average(run.path, keep_state=True, overwrite=True).is_up_to_date
    assert (made.output / "ckpt_ema.state").is_file()


def refused(run: Run, code: Code, **options: Any) -> RefusedError:
    """Update what is there; it must be refused and left as it is."""
    output = run.path.parent / "run-ema"
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    with pytest.raises(RefusedError) as caught:
        ckpt_ema.update(output, **options)
    assert caught.value.code is code
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before
    assert [p.name for p in output.parent.iterdir() if p.name.startswith(".")] == []
    return caught.value


def test_an_older_checkpoint_than_the_last_is_refused_by_name(run: Run) -> None:
    run.show(0, 2)
    ckpt_ema.average(run.path, keep_state=True)
    for there in ((0, 1, 2), (1,), (1, 3), (0, 1), (0, 1, 3)):
        run.show(*there)
        assert "checkpoint-204" in str(refused(run, Code.FOLDED_BEFORE))


def test_a_run_that_restarted_is_refused_by_name(run: Run) -> None:
    run.show(0, 1, 2)
    ckpt_ema.average(run.path, keep_state=True)
    run.show(0, 1, 2, 3)
    again = run.path / run.names[1] / "model.safetensors"
    write_safetensors(again, STATES[5])
    assert str(again) in str(refused(run, Code.FOLDED_BEFORE))


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda state: state | {"new": torch.ones(3)}, "also has new"),
        (lambda state: {k: v for k, v in state.items() if k != "b"}, "lacks b"),
        (lambda state: state | {"a": torch.ones(5, 71)}, "has a of shape [5, 71], not [5, 70]"),
        (lambda state: state | {"b": torch.ones(40, dtype=torch.int64)}, "has b, which was judged"),
    ],
)
def test_other_tensors_are_refused_by_name(run: Run, change: Any, found: str) -> None:
    run.show(0, 1)
    ckpt_ema.average(run.path, keep_state=True)
    run.show(2)
    write_safetensors(run.path / run.names[2] / "model.safetensors", change(dict(STATES[2])))
    assert found in str(refused(run, Code.STATE_DIFFERS))


def test_a_copy_of_the_last_checkpoint_is_refused(run: Run) -> None:
    run.show(0, 1)
    ckpt_ema.average(run.path, keep_state=True)
    shutil.copytree(run.path / run.names[1], run.path / "checkpoint-999")
    refused(run, Code.DUPLICATES)


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        (lambda content: content[:-8], Code.CUT_SHORT),
        (lambda content: content[:-1] + bytes([content[-1] ^ 1]), Code.DAMAGED),
        (lambda content: content.replace(b"decays", b"decayz"), Code.DAMAGED),
        (lambda content: content.replace(b"checkpoint-101", b"checkpoint-102"), Code.DAMAGED),
        (lambda content: content.replace(b'\\"version\\":1', b'\\"version\\":2'), Code.DAMAGED),
        (lambda _: b"", Code.CUT_SHORT),
    ],
)
def test_a_damaged_state_is_refused_and_the_old_average_stays(
    run: Run, damage: Any, code: Code
) -> None:
    run.show(0, 1)
    made = ckpt_ema.average(run.path, keep_state=True)
    state = made.output / "ckpt_ema.state"
    damaged = damage(state.read_bytes())
    assert damaged != state.read_bytes()
    state.write_bytes(damaged)
    run.show(1, 2)
    assert str(state) in str(refused(run, code))


def test_a_state_of_another_version_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run.show(0, 1)
    with monkeypatch.context() as patched:
        patched.setattr("ckpt_ema.planning.state.VERSION", 99)
        ckpt_ema.average(run.path, keep_state=True)
    run.show(1, 2)
    assert "another version" in str(refused(run, Code.DAMAGED))


def test_the_state_of_another_average_is_refused(run: Run) -> None:
    run.show(0, 1)
    made = ckpt_ema.average(run.path, keep_state=True)
    other = ckpt_ema.average(run.path, keep_state=True, decay=0.2, output=run.path.parent / "b")
    shutil.copy(other.output / "ckpt_ema.state", made.output / "ckpt_ema.state")
    run.show(1, 2)
    assert "does not belong" in str(refused(run, Code.DAMAGED))


def test_an_output_without_a_state_is_refused(run: Run) -> None:
    run.show(0, 1)
    ckpt_ema.average(run.path)
    run.show(1, 2)
    assert "--keep-state" in str(refused(run, Code.NO_STATE))


@pytest.mark.parametrize(
    "options",
    [
        {"last": 2},
        {"every": 2},
        {"steps": "100-300"},
        {"to_step": 900},
        {"min_gap": 50},
        {"append": ["final"]},
        {"best": 1, "metric": "loss"},
        {"schedule": "wsm-cosine"},
        {"weights": {"checkpoint-101": 1.0}},
    ],
    ids=str,
)
def test_what_no_checkpoint_can_be_added_to_is_refused_with_the_reason(
    run: Run, options: dict[str, Any]
) -> None:
    run.show(0, 1, 2)
    with pytest.raises(OptionError, match="--keep-state cannot be used with --") as caught:
        ckpt_ema.average(run.path, keep_state=True, **options)
    assert caught.value.code is Code.NOT_EXTENDABLE


def test_one_file_has_no_room_for_a_state(run: Run) -> None:
    run.show(0, 1)
    with pytest.raises(OptionError, match="needs an output folder"):
        ckpt_ema.average(run.path, keep_state=True, output=run.path.parent / "a.safetensors")


def test_options_of_the_average_select_from_what_is_new(run: Run) -> None:
    output = run.path.parent / "out"
    chosen: dict[str, Any] = {"exclude": ["checkpoint-204"], "from_step": 150}
    run.show(0, 1, 2)
    ckpt_ema.average(run.path, output=output, keep_state=True, **chosen)
    run.show(0, 1, 2, 3, 4, 5, 6)
    made = ckpt_ema.update(output)
    steps = [one["step"] for one in made.manifests[0]["checkpoints"]]
    assert steps == [309, 416, 525, 636, 749]
    same_as_batch(run, output, **chosen)


def test_an_update_may_be_made_from_another_folder(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Paths of the average were given from where it was made."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text('{"from": "base"}')
    (tmp_path / "elsewhere").mkdir()
    run.show(0, 1, 2)
    monkeypatch.chdir(tmp_path)
    ckpt_ema.average("run", output="out", keep_state=True, config_from="base")
    run.show(3, 4, 5, 6)
    monkeypatch.chdir(tmp_path / "elsewhere")
    ckpt_ema.update("../out")
    same_as_batch(run, tmp_path / "out", config_from=tmp_path / "base")


def test_files_of_others_in_the_output_are_not_deleted(run: Run) -> None:
    run.show(0, 1)
    made = ckpt_ema.average(run.path, keep_state=True)
    (made.output / "eval.json").write_text("{}")
    run.show(1, 2)
    assert "eval.json" in str(refused(run, Code.OUTPUT_EXISTS))


def test_an_output_that_is_replaced_meanwhile_is_left_as_it_is(run: Run) -> None:
    run.show(0, 1)
    made = ckpt_ema.average(run.path, keep_state=True)
    run.show(1, 2)

    def replace(_done_bytes: int, _total_bytes: int) -> None:
        ckpt_ema.average(run.path, output=made.output, overwrite=True, decay=0.2)

    with pytest.raises(RefusedError, match="was replaced meanwhile"):
        ckpt_ema.update(made.output, progress=replace)
    assert json.loads((made.output / "ckpt_ema.json").read_text())["decay"] == 0.2


def test_two_updates_at_a_time_are_refused(run: Run) -> None:
    run.show(0, 1)
    made = ckpt_ema.average(run.path, keep_state=True)
    run.show(1, 2)
    codes = []

    def again(_done_bytes: int, _total_bytes: int) -> None:
        with pytest.raises(RefusedError) as caught:
            ckpt_ema.update(made.output)
        codes.append(caught.value.code)

    ckpt_ema.update(made.output, progress=again)
    assert {*codes} == {Code.OUTPUT_IN_USE}


def test_a_disk_that_fills_leaves_the_old_average(run: Run) -> None:
    run.show(0, 1)
    made = ckpt_ema.average(run.path, keep_state=True)
    before = contents(made.output)
    run.show(1, 2)
    with faulty("pwrite", 2, 28), pytest.raises(FailedError, match="No space left"):
        ckpt_ema.update(made.output)
    assert contents(made.output) == before
    assert [p.name for p in made.output.parent.iterdir() if p.name.startswith(".")] == []


def test_the_command_prints_the_path_and_says_what_was_read(run: Run) -> None:
    run.show(0, 1)
    output = run.path.parent / "out"
    assert command("average", run.path, "-o", output, "--keep-state", "-q").returncode == 0
    run.show(1, 2)
    done = command("update", output)
    assert done.returncode == 0
    assert done.stdout == f"{output}\n"
    assert "checkpoint-101" in done.stderr  # which is gone, and has its share
    again = command("update", output, "--json")
    assert json.loads(again.stdout)["state"]["name"] == "ckpt_ema.state"
    assert "up to date" in again.stderr
