#!/bin/sh
# The averaging step of a post-training pipeline: average, check that it loads, hand the path on.
#
#     MODEL=$(scripts/post_training.sh runs/my-run --decay 0.9) && evaluate "$MODEL"
#
# stdout carries the path of the averaged model and nothing else; of several, a line each. Whatever
# goes wrong, the exit code is not 0, stdout is empty and no half-made model is left. Running it
# again costs nothing: an average that is there already is up to date. PYTHON names the interpreter
# that has ckpt-ema.
set -eu

if [ $# -lt 1 ]; then
    echo "usage: $0 RUN [options of ckpt-ema average]" >&2
    exit 2
fi
python=${PYTHON:-python3}

model=$("$python" -m ckpt_ema average "$@")

"$python" -W ignore - "$model" <<'CHECK' >&2
import sys
from pathlib import Path

from safetensors import safe_open

for output in map(Path, sys.argv[1].splitlines()):
    files = [output] if output.is_file() else sorted(output.glob("*.safetensors"))
    tensors = 0
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                file.get_tensor(name)
                tensors += 1
    if not tensors:
        sys.exit(f"{output} holds no tensors")
    print(f"checked: {tensors} tensors in {len(files)} file(s) load")
CHECK

printf '%s\n' "$model"
