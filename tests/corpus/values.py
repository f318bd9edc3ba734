"""Values of every kind, and those that are no numbers."""

import math

import torch

from tests.corpus.case import Case, states_are
from tests.makers.tensors import noise

NAN, INF = math.nan, math.inf


def with_value(number: float, step: int = 2) -> list[torch.Tensor]:
    """Three tensors, one of which holds this at its second place."""
    tensors = noise(3, 6)
    tensors[step - 1][1] = number
    return tensors


STRANGE = {
    "W": noise(3, 2),
    "w": noise(3, 3),
    "a/b": noise(3, 2),
    "%s": noise(3, 2),
    "new\nline": noise(3, 2),
    "\x1b[31mred": noise(3, 2),
    "é": noise(3, 2),
    " ": noise(3, 2),
    "x" * 10_000: noise(3, 2),
}
NEAR_MAXIMUM = [torch.full((9,), 65504.0 - 32 * step).half() for step in range(3)]
DRIFT = [torch.full((64,), 1 + step / 128).bfloat16() for step in range(3)]

CASES = [
    Case("NaN in one checkpoint", states_are(w=with_value(NAN))),
    Case("infinity in one checkpoint", states_are(w=with_value(INF))),
    Case("NaN that is allowed", states_are(w=with_value(NAN)), code=0, words=["--allow-nonfinite"]),
    Case("NaN in bfloat16", states_are(w=[t.bfloat16() for t in with_value(NAN)])),
    Case(
        "infinities that never change",
        states_are(mask=torch.full((3,), -INF), w=noise(3, 2)),
        code=0,
    ),
    Case("int64 above 2^53", states_are(n=torch.tensor([2**60 + 1]), w=noise(3, 2)), code=0),
    Case("truth values", states_are(n=torch.tensor([True, False]), w=noise(3, 2)), code=0),
    Case("bytes", states_are(n=torch.arange(5, dtype=torch.uint8), w=noise(3, 2)), code=0),
    Case("float64", states_are(w=noise(3, 4, dtype=torch.float64)), code=0),
    Case("float16 near its maximum", states_are(w=NEAR_MAXIMUM), code=0),
    Case(
        "float8",
        states_are(n=noise(3, 5, dtype=torch.float8_e4m3fn), w=noise(3, 2)),
        names="checkpoint-3",
    ),
    Case(
        "complex numbers", states_are(n=noise(3, 5, dtype=torch.complex64), w=noise(3, 2)), code=0
    ),
    Case("strange names", states_are(**STRANGE), code=0),
    Case("a slow drift in bfloat16", states_are(w=DRIFT), code=0),
]
