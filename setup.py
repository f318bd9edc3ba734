"""Build the compiled fold; everything else about the package is in pyproject.toml.

Without a C compiler the package is built all the same, and torch folds. CKPT_EMA_BUILD=strict, for
our own builds, makes a warning an error and a missing module too.
"""

import os
import re
import sysconfig
from pathlib import Path

from setuptools import Extension, setup

_FLAGS = ("-std=c11", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
_WARNINGS = ("-Wall", "-Wextra")

version = re.findall(r'^__version__ = (".+")$', Path("ckpt_ema/__init__.py").read_text(), re.M)
is_strict = os.environ.get("CKPT_EMA_BUILD") == "strict"  # newer compilers warn of more
is_free_threaded = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))  # it has no limited API
limited = [] if is_free_threaded else [("Py_LIMITED_API", "0x030A0000")]
fold = Extension(
    "ckpt_ema._compiled",
    ["native/fold.c"],
    depends=["setup.py", "ckpt_ema/__init__.py"],  # so that no build of another version is kept
    define_macros=[("CKPT_EMA_VERSION", *version), *limited],
    extra_compile_args=[*_FLAGS, *_WARNINGS, *(["-Werror"] if is_strict else [])],
    libraries=["m"],
    py_limited_api=bool(limited),
    optional=not is_strict,
)
setup(
    ext_modules=[fold],
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if limited else {},
)
