"""Arguments that make no sense."""

from functools import partial

from tests.corpus.case import Case, nothing

Argument = partial(Case, make=nothing, code=2, names="")

CASES = [
    *(
        Argument(f"a decay of {decay}", words=["--decay", decay])
        for decay in ("nan", "-0.1", "1.5", "inf", "-inf", "much", "", "0.9,")
    ),
    Argument("options that contradict", words=["--schedule", "constant", "--half-life", "9"]),
    Argument("an option that is none", words=["--shedule", "constant"]),
    Argument("no threads", words=["--threads", "0"]),
    Argument("threads beyond reason", words=["--threads", "1000000000000"]),
    Argument("a device that is none", words=["--device", "cuda:7"]),
    Argument("a dtype that is none", words=["--dtype", "int4"]),
    Argument("tiles of no bytes", words=["--tile-size", "0"]),
    Argument("too little memory", words=["--max-memory", "10"]),
    Argument("an empty output", words=["-o", ""]),
    Argument("a path that is an option by accident", words=["-runs"]),
    Argument("a run without a name", run=""),
]
