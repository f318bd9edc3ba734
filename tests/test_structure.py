"""The house itself: data goes one way, and the text that people read is true."""

import ast
import doctest
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import ckpt_ema

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "ckpt_ema"
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
)


def imports(module: str) -> set[str]:
    """The modules of the package that a module imports, at the top or inside functions."""
    path = ROOT / Path(*module.split("."))
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    found = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("ckpt_ema"):
            names = {f"{node.module}.{alias.name}" for alias in node.names} & set(MODULES)
            found |= names or {node.module}
    return found - {module}


def test_no_module_imports_itself_by_a_detour() -> None:
    edges = {module: imports(module) for module in MODULES if module != "ckpt_ema"}

    def reached(module: str, seen: set[str]) -> set[str]:
        for other in edges.get(module, set()) - seen:
            reached(other, seen | {other})
            seen |= {other} | reached(other, seen | {other})
        return seen

    for module, others in edges.items():
        for other in others:
            assert module not in reached(other, {other}), f"{module} and {other} import each other"


# The way that data goes: each imports from itself and from what stands before it.
LAYERS = (
    *("errors", "notices", "trainers", "storage", "schedules", "values", "options"),
    *("containers", "find", "targets", "planning", "fold", "output", "report"),
    *("ranks", "run", "cli", "__main__"),
)


@pytest.mark.parametrize("module", [module for module in MODULES if module != "ckpt_ema"])
def test_data_goes_one_way(module: str) -> None:
    def layer(name: str) -> int:
        return LAYERS.index(name.split(".")[1])

    later = {other for other in imports(module) - {"ckpt_ema"} if layer(other) > layer(module)}
    assert later == set()


@pytest.mark.parametrize(
    ("module", "allowed"),
    [
        ("errors", set()),
        ("schedules.by_checkpoint", {"errors", "schedules.schedule", "schedules.weights"}),
        ("schedules.weights", set()),
        ("containers.specs", {"notices", "storage.protocol"}),
        ("find.names", {"trainers.conventions"}),
        ("planning.work", {"containers.specs", "targets.target"}),
        ("fold.shadow", {"errors", "schedules.dynamic"}),
        ("fold.tile_fold", {"fold.shadow"}),
    ],
)
def test_the_cores_know_only_what_they_compute_with(module: str, allowed: set[str]) -> None:
    assert {name.removeprefix("ckpt_ema.") for name in imports(f"ckpt_ema.{module}")} <= allowed


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, ckpt_ema; ckpt_ema.plan; ckpt_ema.average; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_public_names_are_there_and_stay_what_they_are() -> None:
    for module in MODULES:
        importlib.import_module(module)
    for name in ckpt_ema.__all__:
        assert callable(getattr(ckpt_ema, name)), name
        assert getattr(ckpt_ema, name).__doc__, name


@pytest.mark.parametrize("module", MODULES)
def test_examples_in_docstrings_are_true(module: str) -> None:
    assert doctest.testmod(importlib.import_module(module)).failed == 0
