"""Average three tiny checkpoints on the CPU and check the result: a smoke test for anybody's CI.

    python scripts/smoke.py

It needs ckpt-ema to be installed for the Python that runs it, leaves nothing behind and ends within
seconds. Exit code 0 means that the numbers are right. It does not import torch.
"""

import json
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

from safetensors import deserialize

VALUES = (1.0, 2.0, 3.0)
# Decays 2/11 and 3/12, so the weights are 2/44, 9/44 and 33/44.
EXPECTED = (2 * 1.0 + 9 * 2.0 + 33 * 3.0) / 44


def write_checkpoint(folder: Path, value: float) -> None:
    """A checkpoint whose one tensor holds `value` throughout."""
    folder.mkdir(parents=True)
    header = {"weight": {"dtype": "F32", "shape": [8, 8], "data_offsets": [0, 256]}}
    text = json.dumps(header).encode()
    file = len(text).to_bytes(8, "little") + text + struct.pack("<64f", *[value] * 64)
    (folder / "model.safetensors").write_bytes(file)
    (folder / "config.json").write_text("{}")


def main() -> None:
    """Make the run, average it by the command, and compare."""
    with tempfile.TemporaryDirectory() as name:
        run = Path(name) / "run"
        for step, value in zip((50, 100, 150), VALUES, strict=True):
            write_checkpoint(run / f"checkpoint-{step}", value)
        done = subprocess.run(
            [sys.executable, "-m", "ckpt_ema", "average", str(run), "-q", "--device", "cpu"],
            stdout=subprocess.PIPE,
            text=True,
        )
        if done.returncode:
            sys.exit(f"ckpt-ema ended with exit code {done.returncode}")
        output = Path(done.stdout.strip())
        tensors = dict(deserialize((output / "model.safetensors").read_bytes()))  # type: ignore[no-untyped-call]
        content = tensors["weight"]["data"]
        average = struct.unpack("<64f", content)
        if content != struct.pack("<64f", *[EXPECTED] * 64):
            sys.exit(f"expected {EXPECTED} throughout, found {average}")
        if not (output / "config.json").is_file():
            sys.exit("config.json did not travel with the weights")
    print(f"ok: the average of {VALUES} is {average[0]:.6f}")


if __name__ == "__main__":
    main()
