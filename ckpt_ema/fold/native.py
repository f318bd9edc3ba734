"""Finds the compiled fold, which wheels contain and which a C compiler makes at installation.

It imports neither torch nor anything that does.
"""

import functools
import importlib
from types import ModuleType

from ckpt_ema import __version__

# The dtypes that are folded, by their numbers in the module.
DTYPES = ("BF16", "F16", "F32", "F64")


@functools.cache
def compiled() -> ModuleType | None:
    """Return the compiled module, or None where torch has to fold."""
    return _search()[0]


def reason() -> str:
    """Return why there is no compiled module, as a clause; "" if there is one."""
    return _search()[1]


def described() -> str:
    """Return the name of the fold that runs on the CPU, and why it is not the compiled one."""
    module = compiled()
    if module:
        return f"compiled ({module.vector()})"
    from importlib import metadata  # here, since it is slow to import and rarely needed

    try:
        other = f"torch {metadata.version('torch')}"
    except metadata.PackageNotFoundError:
        other = "none, as torch is not installed either"
    return f"{other} ({reason()})"


def _search() -> tuple[ModuleType | None, str]:
    """Return the module, or None and why."""
    try:
        module = importlib.import_module("ckpt_ema._compiled")
    except ModuleNotFoundError:
        return None, "no compiled module: install from a wheel, or with a C compiler"
    except ImportError as error:  # built for another machine or C library
        return None, f"the compiled module cannot be loaded: {error}"
    if __version__ != module.VERSION:
        found = f"the compiled module is of version {module.VERSION}, not {__version__}"
        return None, f"{found}: install ckpt-ema again"
    return module, ""
