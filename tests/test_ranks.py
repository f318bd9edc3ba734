"""Ranks of one launch: real processes that make one output together, or fail together."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import ckpt_ema
from ckpt_ema import ranks
from ckpt_ema.errors import Code, OptionError
from ckpt_ema.place import Place, first_host, place_from
from tests.command import Command, wait_for
from tests.conftest import MakeRun, free_port, noise, series
from tests.makers.fake_hub import fake_hub
from tests.makers.faulty_os import slowed

Ended = list[tuple[int, str, str]]  # exit code, stdout and stderr of each rank


@pytest.fixture
def run(make_run: MakeRun) -> Path:
    """A run of three checkpoints with shards."""
    states = series(3, a=noise(3, 2000), b=noise(3, 50, 4, dtype=torch.bfloat16))
    return make_run(states, shards=2)


def start(
    size: int, rank: int, port: int, *words: Any, launch: str = "none", **options: Any
) -> Command:
    """Start one rank as torchrun would, if it did not listen at the port itself."""
    place = {"RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    place |= {"TORCHELASTIC_RUN_ID": launch}
    words = ("average", *words, "--device", "cpu", "--threads", "1")
    return Command(*words, env=place, **options)


def launch(size: int, *words: Any, **options: Any) -> Ended:
    """Start all ranks of a launch and wait for them."""
    port = free_port()
    return ended([start(size, rank, port, *words, **options) for rank in range(size)])


def ended(launched: list[Command]) -> Ended:
    all_done = [command.wait(90) for command in launched]
    return [(done.returncode, done.stdout, done.stderr) for done in all_done]


def contents(folder: Path) -> dict[str, bytes]:
    """The model files of an output."""
    return {
        os.path.relpath(path, folder): path.read_bytes() for path in folder.rglob("*.safetensors")
    }


def entries(folder: Path) -> list[str]:
    """Everything in a folder, hidden names too."""
    return sorted(path.name for path in folder.iterdir())


def test_ranks_make_the_bytes_of_one(run: Path, tmp_path: Path) -> None:
    decay, output = "0.1,0.2", tmp_path / "out"
    whole = ckpt_ema.average(run, output=tmp_path / "whole", decay=decay, device="cpu").output
    words = ("-o", output, "--decay", decay, "--tile-size", "256")
    first, *others = launch(3, run, *words)
    assert first[0] == 0, first
    assert str(output) in first[2].splitlines()[-1]
    assert first[1].splitlines() == [str(path) for path in sorted(output.glob("dynamic*"))]
    assert others == [(0, "", "")] * 2
    assert contents(output) == contents(whole)
    assert entries(tmp_path) == ["out", "run", "whole"]


def test_ranks_write_a_checkpoint_back(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(series(3, w=noise(3, 64, 32), n=torch.arange(9)), torch_files=True)
    options: dict[str, Any] = {"save_as": "checkpoint", "device": "cpu"}
    whole = ckpt_ema.average(run, output=tmp_path / "whole", **options).output
    words = ("-o", tmp_path / "out", "--save-as", "checkpoint", "--tile-size", "256", "-q")
    assert [status for status, *_ in launch(3, run, *words)] == [0] * 3
    assert contents(tmp_path / "out") == contents(whole)


def test_ranks_read_a_run_on_the_hub(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = ckpt_ema.average(run, output=tmp_path / "whole", device="cpu").output
    (tmp_path / "hub/org/run").mkdir(parents=True)
    run.rename(tmp_path / "hub/org/run/main")
    words = ("-o", tmp_path / "out", "--tile-size", "256", "-q")
    with fake_hub(tmp_path / "hub") as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        done = launch(2, "hf://org/run", *words)
    assert [status for status, *_ in done] == [0, 0]
    assert contents(tmp_path / "out") == contents(whole)


@pytest.mark.sweep
def test_ranks_find_an_output_that_is_up_to_date(run: Path, tmp_path: Path) -> None:
    output = ckpt_ema.average(run, output=tmp_path / "out", device="cpu").output
    first, last = launch(2, run, "-o", output)
    assert first[:2] == (0, f"{output}\n")
    assert "is up to date" in first[2]
    assert last == (0, "", "")


FAILS_ONCE = """
import os, sys
from ckpt_ema.cli.app import main
if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    sys.exit("this rank fails")
main()
"""


@pytest.mark.sweep
@pytest.mark.parametrize("fails", [False, True])
def test_torchrun_launches_it(run: Path, tmp_path: Path, fails: bool) -> None:
    """Once, or again at the same port if a rank failed the first time."""
    program = tmp_path / "fails_once.py"
    program.write_text(FAILS_ONCE)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
            *("--max-restarts", "1", "--master-port", str(free_port())),
            *((program,) if fails else ("-m", "ckpt_ema")),
            *("average", run, "-o", tmp_path / "out", "-q"),
        ],
        capture_output=True,
        text=True,
        timeout=90,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'out'}\n"), done.stderr
    assert ("this rank fails" in done.stderr) == fails
    whole = ckpt_ema.average(run, output=tmp_path / "whole", device="cpu").output
    assert contents(tmp_path / "out") == contents(whole)


def test_two_launches_with_one_port_do_not_mix(run: Path, tmp_path: Path) -> None:
    port, decays = free_port(), ("0.1", "0.2")
    processes = [
        start(2, rank, port, run, "-o", tmp_path / decay, "--decay", decay, "-q", launch=decay)
        for rank in range(2)
        for decay in decays[:: 1 - 2 * rank]
    ]
    assert [status for status, *_ in ended(processes)] == [0] * 4
    for decay in decays:
        output = tmp_path / f"whole-{decay}"
        whole = ckpt_ema.average(run, output=output, decay=decay, device="cpu").output
        assert contents(tmp_path / decay) == contents(whole)


def test_the_library_joins_a_launch_only_when_asked(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training script calls it from rank 0, while the other ranks do something else."""
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    output = tmp_path / "out"
    assert ckpt_ema.average(run, output=output, device="cpu").manifests
    monkeypatch.delenv("MASTER_ADDR")
    with pytest.raises(OptionError) as caught:
        ckpt_ema.average(run, output=output, device="cpu", launch=True)
    assert caught.value.code is Code.LAUNCH_ENVIRONMENT


def test_if_one_fails_all_do_and_the_first_says_why(make_run: MakeRun, tmp_path: Path) -> None:
    weights = noise(3, 2000)
    weights[1][1990] = float("nan")
    run = make_run(series(3, w=weights))
    begun = time.monotonic()
    first, *others = launch(3, run, "-o", tmp_path / "out", "--tile-size", "256")
    assert time.monotonic() - begun < 30
    assert first[:2] == (3, "")
    assert first[2].count("error: ") == 1
    assert "rank 2: " in first[2]
    assert "tensor w holds 1 NaN values" in first[2]
    assert others == [(3, "", "")] * 2
    assert entries(tmp_path) == ["run"]


def test_an_error_of_all_is_said_once(run: Path, tmp_path: Path) -> None:
    first, *others = launch(3, run, "-o", run)
    assert first[:2] == (3, "")
    assert first[2].count("error: ") == 1
    assert others == [(3, "", "")] * 2


@pytest.mark.sweep
def test_ranks_that_see_different_things_stop(run: Path, tmp_path: Path) -> None:
    port = free_port()
    words = (run, "-q", "-o", tmp_path / "out")
    processes = [start(2, 0, port, *words), start(2, 1, port, *words, "--decay", "0.1")]
    first, last = ended(processes)
    assert first[:2] == (1, "")
    assert "do not see the same plan" in first[2]
    assert last == (1, "", "")
    assert entries(tmp_path) == ["run"]


def write_slowly() -> None:
    """Take a while for each write, and do not wait long for ranks that are silent."""
    slowed("pwrite", 0.5)
    ranks.SECONDS_SILENT = 3.0


def at_work(folder: Path) -> int:
    """How many processes hold a lock on the workspace of `out`."""
    inodes = [path.stat().st_ino for path in folder.glob(".out.*")]
    locks = Path("/proc/locks").read_text().splitlines()
    return sum(f":{inode} " in line for inode in inodes for line in locks)


@pytest.mark.sweep
@pytest.mark.parametrize(("size", "victim"), [(2, 0), (2, 1), (3, 0), (3, 2)])
def test_a_rank_that_is_killed_ends_the_others(
    run: Path, tmp_path: Path, size: int, victim: int
) -> None:
    """Whichever it is: the one that has the store, or another. One of those left says so."""
    port, output = free_port(), tmp_path / "out"
    words = (run, "-o", output, "-q", "--tile-size", "256")
    processes = [start(size, rank, port, *words, before=write_slowly) for rank in range(size)]
    wait_for(lambda: at_work(tmp_path) == len(processes))
    processes[victim].send_signal(signal.SIGKILL)
    begun = time.monotonic()
    left = ended(processes)
    assert time.monotonic() - begun < 20
    del left[victim]
    assert [done[:2] for done in left] == [(1, "")] * (size - 1)
    said = "".join(done[2] for done in left)
    assert said.count("error: ") == said.count("\n") == 1
    assert f"rank {victim} has not responded" in said or "connection to rank 0 was lost" in said
    assert left[0][2] == said
    assert entries(tmp_path) == ["run"]


@pytest.mark.sweep
def test_a_launch_that_is_cancelled_says_so_once(run: Path, tmp_path: Path) -> None:
    port = free_port()
    words = (run, "-o", tmp_path / "out", "-q", "--tile-size", "256")
    processes = [start(2, rank, port, *words, before=write_slowly) for rank in range(2)]
    wait_for(lambda: at_work(tmp_path) == len(processes))
    for process in processes:
        process.send_signal(signal.SIGTERM)
    left = ended(processes)
    assert [done[0] for done in left] == [143, 143]
    assert "".join(done[2] for done in left).count("\n") == 1
    assert entries(tmp_path) == ["run"]


def meet_quickly(seconds: float) -> None:
    """Do not wait long for the others."""
    ranks.SECONDS_TO_MEET = seconds


@pytest.mark.sweep
@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_that_never_come_are_named_and_not_waited_for_forever(
    run: Path, tmp_path: Path, rank: int
) -> None:
    port = free_port()
    before = partial(meet_quickly, 4.0)
    alone = start(2, rank, port, run, "-o", tmp_path / "out", before=before)
    [(status, stdout, stderr)] = ended([alone])
    assert (status, stdout) == (1, "")
    assert f"waiting for rank {1 - rank} of 2 at 127.0.0.1:{port}" in stderr
    which = f"cannot reach rank 0 at 127.0.0.1:{port} or the 16 ports after it."
    assert (which if rank else "rank 1 has not joined within 4 s.") in stderr
    assert "unset WORLD_SIZE" in stderr
    assert stderr.count("\n") == 2


def test_if_rank_0_cannot_listen_it_says_where(run: Path, tmp_path: Path) -> None:
    done = start(2, 0, 99999, run, "-o", tmp_path / "out").wait()
    assert (done.returncode, done.stdout) == (1, "")
    where = "at 127.0.0.1:99999 or the 16 ports after it."
    assert f"error: rank 0 of 2 cannot listen {where}" in done.stderr


def test_late_ranks_have_a_sentence() -> None:
    place = Place(0, 4, "host", 29500, False, 0)
    assert place.waiting_for([1, 3]) == "waiting for ranks 1, 3 of 4 at host:29500"


def test_parts_and_ranks_do_not_mix(run: Path) -> None:
    done = start(2, 0, free_port(), run, "--part", "1/2").wait()
    assert (done.returncode, done.stdout) == (2, "")


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
        (SLURM, Place(3, 4, "gpu08", 20219, False, 0, "7.2")),
        ({**TORCHRUN, "LOCAL_RANK": "3"}, Place(1, 2, "h", 29500, False, 3)),
        ({**TORCHRUN, "TORCHELASTIC_RUN_ID": "a"}, Place(1, 2, "h", 29500, False, 0, "a")),
        ({**SLURM, "SLURM_LOCALID": "1"}, Place(3, 4, "gpu08", 20219, False, 1, "7.2")),
        ({**SLURM, "MASTER_PORT": "5"}, Place(3, 4, "gpu08", 5, False, 0, "7.2")),
        ({**SLURM, **TORCHRUN}, Place(1, 2, "h", 29500, False, 0)),  # torchrun under srun
        ({**SLURM, "SLURM_STEP_NUM_TASKS": "1"}, None),
        # A batch script is one process, however many tasks its job may start.
        ({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, None),
    ],
)
def test_the_place_is_that_of_the_launcher(
    environment: dict[str, str], place: Place | None
) -> None:
    assert place_from(environment) == place


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        ({**TORCHRUN, "RANK": "x"}, "RANK is 'x'"),
        ({**TORCHRUN, "MASTER_PORT": ""}, "MASTER_PORT is not set"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR is not set"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, "SLURM_JOB_ID is not set"),
        ({**SLURM, "SLURM_STEP_NODELIST": ""}, "SLURM_STEP_NODELIST is not set"),
        ({**SLURM, "SLURM_STEP_NODELIST": "["}, "SLURM_STEP_NODELIST is '['"),
    ],
)
def test_variables_that_are_missing_or_invalid_are_a_usage_error(
    environment: dict[str, str], name: str
) -> None:
    with pytest.raises(OptionError) as caught:
        place_from(environment)
    assert caught.value.code is Code.LAUNCH_ENVIRONMENT
    assert name in caught.value.message


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("a", "a"), ("a,b", "a"), ("n[1-3]", "n1"), ("n[03,7]", "n03"), ("n[1-2]-ib,x", "n1-ib")],
)
def test_the_first_node_has_the_store(nodes: str, first: str) -> None:
    assert first_host(nodes) == first
