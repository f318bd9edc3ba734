"""Arguments that make no sense."""

from functools import partial

from tests.corpus.case import Case, nothing

Argument = partial(Case, make=nothing, code=2, names="")

CASES = [
    *(
        Argument(f"a decay of {decay}", says=f"--decay is '?{decay}'?", words=["--decay", decay])
        for decay in ("nan", "-0.1", "1.5", "inf", "-inf", "much", "", "0.9,")
    ),
    Argument(
        "options that contradict",
        says="takes no --half",
        words=["--schedule", "constant", "--half-life", "9"],
    ),
    Argument(
        "an option that is none", says="No such option: --shedule", words=["--shedule", "constant"]
    ),
    Argument("no threads", says="--threads", words=["--threads", "0"]),
    Argument("threads beyond reason", says="--threads", words=["--threads", "1000000000000"]),
    Argument("a device that is none", says="--device", words=["--device", "cuda:7"]),
    Argument("a dtype that is none", says="--dtype", words=["--dtype", "int4"]),
    Argument("tiles of no bytes", says="--tile-size", words=["--tile-size", "0"]),
    Argument("too little memory", says="the fold needs at least", words=["--max-memory", "10"]),
    Argument("an empty output", says="--output is ''", words=["-o", ""]),
    Argument("a path that is an option by accident", says="No such option: -r", words=["-runs"]),
    Argument("a run without a name", says="No run and no checkpoints", run=""),
]
