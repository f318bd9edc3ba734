"""The compiled fold is used if it is there and of this version; if not, people are told why."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import ckpt_ema
from ckpt_ema.fold import native
from tests.command import ckpt_ema as command

NAME = "ckpt_ema._compiled"
MISSING = "no compiled module: install from a wheel, or with a C compiler"


@pytest.fixture(autouse=True)
def _not_searched_yet() -> Iterator[None]:
    native.compiled.cache_clear()
    yield
    native.compiled.cache_clear()


def module(version: str) -> ModuleType:
    """A compiled module of a version."""
    made = ModuleType(NAME)
    vars(made).update(VERSION=version, vector=lambda: "neon")
    return made


def test_a_module_of_this_version_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = module(ckpt_ema.__version__)
    monkeypatch.setitem(sys.modules, NAME, ours)
    assert native.compiled() is ours
    assert native.reason() == ""
    assert native.described() == "compiled (neon)"


def test_a_module_of_another_version_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, NAME, module("0.0.9"))
    assert native.compiled() is None
    why = f"the compiled module is of version 0.0.9, not {ckpt_ema.__version__}"
    assert native.reason() == f"{why}: install ckpt-ema again"


def test_a_missing_module_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, NAME, None)
    assert native.compiled() is None
    assert native.reason() == MISSING


def test_a_module_that_cannot_be_loaded_is_no_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "_compiled.abi3.so").write_bytes(b"for another machine")
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    monkeypatch.setattr(ckpt_ema, "__path__", [str(tmp_path)])
    assert native.compiled() is None
    assert native.reason().startswith("the compiled module cannot be loaded: ")


def test_the_version_of_torch_is_named_where_torch_folds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, NAME, None)
    monkeypatch.setattr("importlib.metadata.version", lambda name: f"2.0 of {name}")
    assert native.described() == f"torch 2.0 of torch ({MISSING})"


def test_without_torch_too_there_is_no_fold(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, NAME, None)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])  # where nothing is installed
    assert native.described() == f"none, as torch is not installed either ({MISSING})"


def test_the_command_says_which_fold_is_in_use() -> None:
    done = command("--version", "--verbose")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        f"ckpt-ema {ckpt_ema.__version__}",
        f"fold: {native.described()}",
    ]


def test_verbose_goes_with_version_alone() -> None:
    done = command("--verbose", "plan", "runs/")
    assert done.returncode == 2
    assert "--verbose goes with --version." in done.stderr
