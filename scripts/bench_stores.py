"""Measure runs in an object store on loopback: throughput, memory, and the time of a plan.

    python scripts/bench_stores.py

The store is a separate process with a latency of 40 ms and a throughput of 250 MB/s, 50 MB/s per
connection. The exit code is 1 if a promise was missed.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import environment
from measuring import Measured, measure
from runs import MIB, Run, ready

RATE, CONNECTION_RATE, LATENCY_SECONDS = 250e6, 50e6, 0.04
PROMISED_SHARE = 0.95  # of the store's throughput, without the time of a plan
PROMISED_MEMORY = 1.10  # peak with a hundred checkpoints / peak with four
PROMISED_PLAN_SECONDS = 2.0
STORE = f"""
import sys, time
sys.path.insert(0, {str(environment.REPOSITORY)!r})
from pathlib import Path
from tests.makers.fake_s3 import fake_s3
with fake_s3(Path(sys.argv[1])) as store:
    store.rate, store.connection_rate = {RATE}, {CONNECTION_RATE}
    store.latency_seconds = {LATENCY_SECONDS}
    print(store.url, flush=True)
    time.sleep(3600)
"""
LARGE, LONG = Run("bfloat16", 4, 256 * MIB), Run("bfloat16", 100, 64 * MIB)


@contextmanager
def served(root: Path) -> Iterator[None]:
    """Serve the folders in `root` as buckets of a store, and set the environment to use it."""
    with subprocess.Popen([sys.executable, "-c", STORE, root], stdout=subprocess.PIPE) as store:
        assert store.stdout is not None
        url = store.stdout.readline().decode().strip()
        account = {"AWS_ACCESS_KEY_ID": "nobody", "AWS_SECRET_ACCESS_KEY": "nothing"}
        os.environ.update(account, AWS_ENDPOINT_URL=url, NO_PROXY="127.0.0.1")
        try:
            yield
        finally:
            store.kill()


def measured(command: str, run: Run, folder: Path) -> Measured:
    """Measure one command on a run."""
    output = str(folder / f"{command}-{run.name}")
    uri = f"s3://bucket/{run.name}"
    return measure(["-m", "ckpt_ema", command, uri, "-o", output, "--device", "cpu", "-q"])


def main() -> int:
    """Measure and print; return 1 if a promise was missed."""
    missed, peaks = False, []
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        folder = Path(name)
        for run in (LARGE, LONG):
            ready(run, folder / "store/bucket")
        with served(folder / "store"):
            for run in (LARGE, LONG):
                plan, average = (measured(one, run, folder) for one in ("plan", "average"))
                peaks.append(average.resident_bytes)
                folding = average.wall_seconds - plan.wall_seconds
                share = run.checkpoints * run.size_bytes / folding / RATE
                missed |= share < PROMISED_SHARE or plan.wall_seconds > PROMISED_PLAN_SECONDS
                print(
                    f"{run}: {share:.0%} of the link, {average.wall_seconds:.2f} s, peak"
                    f" {average.resident_bytes / MIB:.0f} MiB; plan {plan.wall_seconds:.2f} s",
                    flush=True,
                )
    grown = peaks[1] / peaks[0]
    print(f"peak with {LONG.checkpoints} / with {LARGE.checkpoints} checkpoints: {grown:.2f}")
    return int(missed or grown > PROMISED_MEMORY)


if __name__ == "__main__":
    environment.enter()
    sys.exit(main())
