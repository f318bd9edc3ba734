"""Commands that evaluate a model, and what they have evaluated."""

import json
import shlex
import struct
import sys
from pathlib import Path

_SCRIPT = """
import json, os, struct, sys, time
folder, log = sys.argv[1:3]
with open(log, "a") as lines:
    lines.write(os.environ["CKPT_EMA_CANDIDATE"] + "\\n")
name = [one for one in os.listdir(folder) if one.endswith(".safetensors")][0]
content = open(os.path.join(folder, name), "rb").read()
size = int.from_bytes(content[:8], "little")
begin, end = json.loads(content[8 : 8 + size])["w"]["data_offsets"]
data = content[8 + size + begin : 8 + size + end]
values = struct.unpack(f"<{len(data) // 4}f", data)
mean = sum(values) / len(values)
print("loading", folder)
"""


class Evaluation:
    """A command that measures how far the mean of the tensor `w` is from a number."""

    def __init__(self, folder: Path, target: float, then: str = "") -> None:
        """Write it below a folder; `then` is Python that it runs before it prints the metric."""
        self.log = folder / "evaluated"
        script = folder / "evaluate.py"
        last = f'print(json.dumps({{"loss": abs(mean - {target}), "size": len(values)}}))\n'
        script.write_text(_SCRIPT + then + "\n" + last)
        # No site: it starts in a quarter of the time.
        words = [sys.executable, "-S", "-E", str(script)]
        self.command = f"{shlex.join(words)} {{}} {shlex.quote(str(self.log))}"

    @property
    def names(self) -> list[str]:
        """What it has evaluated, in that order."""
        return self.log.read_text().splitlines() if self.log.exists() else []


def mean_of(folder: Path, name: str = "w") -> float:
    """Return the mean of a float32 tensor of the one model file in a folder."""
    [path] = folder.glob("*.safetensors")
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    begin, end = json.loads(content[8 : 8 + size])[name]["data_offsets"]
    data = content[8 + size + begin : 8 + size + end]
    values: tuple[float, ...] = struct.unpack(f"<{len(data) // 4}f", data)
    return sum(values) / len(values)
