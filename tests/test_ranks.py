"""Ranks of one launch: real processes that make one output together, or fail together."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import ckpt_ema
from ckpt_ema import ranks
from ckpt_ema.cli import app
from ckpt_ema.errors import OptionError
from ckpt_ema.fold.tiles import Share
from ckpt_ema.output import publish
from ckpt_ema.ranks import Place, first_host, place_from
from tests.command import Command, wait_for
from tests.conftest import MakeRun, noise, series

Ended = list[tuple[int, str, str]]  # exit code, stdout and stderr of each rank


@pytest.fixture
def run(make_run: MakeRun) -> Path:
    """A run of three checkpoints with shards."""
    states = series(3, a=noise(3, 2000), b=noise(3, 50, 4, dtype=torch.bfloat16))
    return make_run(states, shards=2)


def start(size: int, rank: int, port: int, *words: Any, **options: Any) -> Command:
    """Start one rank as torchrun would."""
    place = {"RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    words = ("average", *words, "--device", "cpu", "--threads", "1")
    return Command(*words, env=place, **options)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def launch(size: int, *words: Any) -> Ended:
    """Start all ranks of a launch and wait for them."""
    port = free_port()
    return ended([start(size, rank, port, *words) for rank in range(size)])


def ended(launched: list[Command]) -> Ended:
    all_done = [command.wait(90) for command in launched]
    return [(done.returncode, done.stdout, done.stderr) for done in all_done]


def contents(folder: Path) -> dict[str, bytes]:
    """The model files of an output."""
    return {
        os.path.relpath(path, folder): path.read_bytes() for path in folder.rglob("*.safetensors")
    }


def test_ranks_make_the_bytes_of_one(run: Path, tmp_path: Path) -> None:
    decay, output = "0.1,0.2", tmp_path / "out"
    whole = ckpt_ema.average(run, output=tmp_path / "whole", decay=decay, device="cpu").output
    words = ("-o", output, "--decay", decay, "--tile-size", "256")
    first, *others = launch(3, run, *words)
    assert first[0] == 0, first
    assert "all parts are done" in first[2]
    assert first[1].splitlines() == [str(path) for path in sorted(output.glob("dynamic*"))]
    assert others == [(0, "", "")] * 2
    assert contents(output) == contents(whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run", "whole"]


@pytest.mark.sweep
def test_ranks_find_an_output_that_is_up_to_date(run: Path, tmp_path: Path) -> None:
    output = ckpt_ema.average(run, output=tmp_path / "out", device="cpu").output
    first, last = launch(2, run, "-o", output)
    assert first[:2] == (0, f"{output}\n")
    assert "is up to date" in first[2]
    assert last == (0, "", "")


@pytest.mark.sweep
def test_torchrun_launches_it(run: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
            *("--master-port", str(free_port()), "-m", "ckpt_ema", "average"),
            *(run, "-o", tmp_path / "out", "-q"),
        ],
        capture_output=True,
        text=True,
        timeout=90,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'out'}\n"), done.stderr
    whole = ckpt_ema.average(run, output=tmp_path / "whole", device="cpu").output
    assert contents(tmp_path / "out") == contents(whole)


def test_if_one_fails_all_do_and_nothing_is_left(make_run: MakeRun, tmp_path: Path) -> None:
    weights = noise(3, 2000)
    weights[1][1990] = float("nan")
    run = make_run(series(3, w=weights))
    begun = time.monotonic()
    first, last = launch(2, run, "-o", tmp_path / "out", "--tile-size", "256")
    assert time.monotonic() - begun < 30
    assert last[0] == 3
    assert "tensor w holds 1 NaN values" in last[2]
    assert (first[0], first[1]) == (1, "")
    assert "error: Rank 1 failed: " in first[2]
    assert "tensor w holds 1 NaN values" in first[2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


@pytest.mark.sweep
def test_ranks_that_see_different_things_stop(run: Path, tmp_path: Path) -> None:
    port = free_port()
    words = (run, "-q", "-o", tmp_path / "out")
    processes = [start(2, 0, port, *words), start(2, 1, port, *words, "--decay", "0.1")]
    for code, stdout, stderr in ended(processes):
        assert (code, stdout) == (1, "")
        assert "do not see the same plan" in stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def write_slowly() -> None:
    """Take a while for each tile, and do not wait long for ranks that are silent."""
    real, patched = publish.StagedOutput.write, pytest.MonkeyPatch()

    def slow(*arguments: Any) -> None:
        time.sleep(0.5)
        real(*arguments)

    patched.setattr(ranks, "_MOST_SILENT_SECONDS", 3.0)
    patched.setattr(publish.StagedOutput, "write", slow)


@pytest.mark.sweep
def test_a_rank_that_is_killed_ends_the_others(run: Path, tmp_path: Path) -> None:
    """Whichever it is: the one that has the store, or the other."""
    for victim in (0, 1):
        port, output = free_port(), tmp_path / "out"
        words = (run, "-o", output, "-q", "--tile-size", "256")
        processes = [start(2, rank, port, *words, before=write_slowly) for rank in range(2)]
        wait_for(lambda: list(tmp_path.glob(".out*/output/model*")))
        processes[victim].send_signal(signal.SIGKILL)
        begun = time.monotonic()
        code, stdout, stderr = ended(processes)[1 - victim]
        assert time.monotonic() - begun < 15
        assert (code, stdout) == (1, "")
        assert "rank is gone" in stderr or f"Rank {victim} gives no sign of life" in stderr
        assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def meet_quickly() -> None:
    """Do not wait long for the others."""
    pytest.MonkeyPatch().setattr(ranks, "_SECONDS_TO_MEET", 2.0)


@pytest.mark.sweep
def test_ranks_that_never_come_are_not_waited_for_forever(run: Path, tmp_path: Path) -> None:
    alone = start(2, 1, free_port(), run, "-o", tmp_path / "out", before=meet_quickly)
    [(status, stdout, stderr)] = ended([alone])
    assert (status, stdout) == (1, "")
    assert "Rank 1 of 2 cannot meet the others at 127.0.0.1:" in stderr
    assert "unset WORLD_SIZE" in stderr


def test_parts_and_ranks_do_not_mix(run: Path) -> None:
    some: Any = object()
    with pytest.raises(OptionError, match="--part is for jobs that run apart"):
        app._carry_out(ckpt_ema.plan(run), Share(1, 2), some, False)


SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "2",
    "SLURM_PROCID": "3",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "gpu[08-09]",
}
TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, None),
        (TORCHRUN, Place(1, 2, "h", 29500, False, 0)),
        ({**TORCHRUN, "TORCHELASTIC_USE_AGENT_STORE": "True"}, Place(1, 2, "h", 29500, True, 0)),
        ({**TORCHRUN, "WORLD_SIZE": "1"}, None),
        (SLURM, Place(3, 4, "gpu08", 20219, False, 0)),
        ({**TORCHRUN, "LOCAL_RANK": "3"}, Place(1, 2, "h", 29500, False, 3)),
        ({**SLURM, "SLURM_LOCALID": "1"}, Place(3, 4, "gpu08", 20219, False, 1)),
        ({**SLURM, "MASTER_PORT": "5"}, Place(3, 4, "gpu08", 5, False, 0)),
        ({**SLURM, **TORCHRUN}, Place(1, 2, "h", 29500, False, 0)),  # torchrun under srun
        ({**SLURM, "SLURM_STEP_NUM_TASKS": "1"}, None),
        # A batch script is one process, however many tasks its job may start.
        ({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, None),
    ],
)
def test_launchers_tell_the_place(environment: dict[str, str], place: Place | None) -> None:
    assert place_from(environment) == place


@pytest.mark.parametrize(
    "environment",
    [
        {**TORCHRUN, "RANK": "x"},
        {**TORCHRUN, "MASTER_PORT": ""},
        {"RANK": "0", "WORLD_SIZE": "2"},
        {"SLURM_STEP_NUM_TASKS": "2"},
        {**SLURM, "SLURM_STEP_NODELIST": ""},
    ],
)
def test_variables_that_make_no_sense_are_a_usage_error(environment: dict[str, str]) -> None:
    with pytest.raises(OptionError, match="The launcher's variables make no sense"):
        place_from(environment)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("a", "a"), ("a,b", "a"), ("n[1-3]", "n1"), ("n[03,7]", "n03"), ("n[1-2]-ib,x", "n1-ib")],
)
def test_the_first_node_has_the_store(nodes: str, first: str) -> None:
    assert first_host(nodes) == first
