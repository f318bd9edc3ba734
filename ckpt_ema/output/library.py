"""Checks a file with the safetensors library, which shares no code with us."""

import os
import sys
from typing import Any

# The library checks a file first, and then imports the framework that tensors are wanted for. None
# is wanted here, and importing torch or numpy takes longer than many averages.
_FRAMEWORK = "paddle"  # the one that a process is least likely to need meanwhile


def check_header(path: str) -> None:
    """Raise the library's error unless it accepts the header of a file and the file's size."""
    from safetensors import SafetensorError, safe_open

    try:
        _open_without_framework(os.devnull)
    except (OSError, SafetensorError):  # so it does check first
        _open_without_framework(path)
    else:
        with safe_open(path, "pt"):
            return


def _open_without_framework(path: str) -> None:
    """Have the library open a file as far as it gets without a framework."""
    from safetensors import safe_open

    modules: dict[str, Any] = sys.modules
    is_hidden = modules.setdefault(_FRAMEWORK, None) is None  # importing it fails
    try:
        safe_open(path, _FRAMEWORK)
    except ModuleNotFoundError:
        pass
    finally:
        if is_hidden:
            modules.pop(_FRAMEWORK, None)
