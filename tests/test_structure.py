"""The house itself: data goes one way, and the text that people read is true."""

import ast
import doctest
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import ckpt_ema
from tests.conftest import MakeRun, noise, series
from tests.makers.imports import imported_by

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "ckpt_ema"
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
)


TESTS = sorted(path.relative_to(ROOT) for path in (ROOT / "tests").rglob("*.py"))


def source(module: str) -> Path:
    """The file of a module."""
    path = ROOT / Path(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def nodes(path: Path) -> Iterator[ast.AST]:
    """All of a file's syntax."""
    return ast.walk(ast.parse((ROOT / path).read_text()))


def imports(module: str) -> set[str]:
    """The modules of the package that a module imports, at the top or inside functions."""
    found = set()
    for node in nodes(source(module)):
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
    *("containers", "find", "targets", "planning", "fold", "measure", "output", "report"),
    *("place", "rendezvous", "ranks", "execute", "run", "selection"),
    *("updating", "watching", "verifying", "cli", "__main__"),
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
        ("fold.torch_fold", {"fold.shadow", "fold.tile_fold"}),
        ("rendezvous", {"place"}),
    ],
)
def test_the_cores_know_only_what_they_compute_with(module: str, allowed: set[str]) -> None:
    assert {name.removeprefix("ckpt_ema.") for name in imports(f"ckpt_ema.{module}")} <= allowed


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, ckpt_ema; ckpt_ema.plan; ckpt_ema.average; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# Beside the standard library and this package; older releases of Typer bring click.
_NEEDED = {"typer", "shellingham", "annotated_doc", "typing_extensions", "click", "colorama"}
_NEEDED |= {"org"}  # pickle tries Jython's


def test_a_plan_imports_nothing_that_it_does_not_need(make_run: MakeRun) -> None:
    """No torch, numpy, pydantic, rich or tqdm, which take longer than the rest of a tiny run."""
    run = make_run(series(3, w=noise(3, 4)))
    homes = {name.partition(".")[0] for name in imported_by("plan", run)}
    assert homes - sys.stdlib_module_names - {"ckpt_ema"} <= _NEEDED


def test_the_public_names_are_there_and_stay_what_they_are() -> None:
    for module in MODULES:
        importlib.import_module(module)
    for name in ckpt_ema.__all__:
        assert callable(getattr(ckpt_ema, name)), name
        assert getattr(ckpt_ema, name).__doc__, name


@pytest.mark.parametrize("module", MODULES)
def test_examples_in_docstrings_are_true(module: str) -> None:
    assert doctest.testmod(importlib.import_module(module)).failed == 0


# --- Files, tests and functions -------------------------------------------------------------------

# What may be asked of paths and of the system without touching a disk.
PURE = {
    *("os.PathLike", "os.fspath", "os.fsencode", "os.fsdecode", "os.environ", "os.environ.get"),
    *("os.path.join", "os.path.split", "os.path.basename", "os.path.dirname", "os.path.normpath"),
    *("os.path.relpath", "os.path.commonpath", "os.path.commonprefix", "os.path.abspath"),
    *("os.cpu_count", "os.sched_getaffinity", "os.terminal_size", "os.get_terminal_size"),
    *("os.strerror", "os.killpg"),
}
OF_THE_DISK = {
    *("exists", "is_dir", "is_file", "is_symlink", "is_fifo", "stat", "lstat", "iterdir", "glob"),
    *("rglob", "resolve", "read_text", "read_bytes", "write_text", "write_bytes", "unlink"),
    *("mkdir", "rename", "touch", "samefile", "symlink_to", "readlink"),
}


TOUCHING = ("storage", "output", "cli", "report.figure", "verifying.comparing", "watching.hook")


def touches_the_disk(node: ast.AST) -> bool:
    """Whether this calls `os`, `open`, or a path's own methods, and not a `Storage`."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name | ast.Attribute):
        name = ast.unparse(node)
        return name.startswith("os.") and not any(f"{one}.".startswith(f"{name}.") for one in PURE)
    if not isinstance(node, ast.Call):
        return False
    holder, _, called = ast.unparse(node.func).rpartition(".")
    if holder.rpartition(".")[2] == "storage":
        return False
    return called in OF_THE_DISK if holder not in ("", "io") else called == "open"


@pytest.mark.parametrize("module", MODULES)
def test_files_are_touched_by_storages_outputs_and_the_command_alone(module: str) -> None:
    if not module.startswith(tuple(f"ckpt_ema.{home}" for home in TOUCHING)):
        assert [ast.unparse(n) for n in nodes(source(module)) if touches_the_disk(n)] == []


@pytest.mark.parametrize("module", MODULES)
def test_no_function_is_longer_than_a_screen(module: str) -> None:
    functions = [node for node in nodes(source(module)) if isinstance(node, ast.FunctionDef)]
    lines = {node.name: (node.end_lineno or 0) - node.lineno + 1 for node in functions}
    assert {name: count for name, count in lines.items() if count > 40} == {}


@pytest.mark.parametrize("path", TESTS, ids=str)
def test_tests_know_neither_each_other_nor_what_is_private(path: Path) -> None:
    for node in nodes(path):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            if node.module.startswith(("tests", "ckpt_ema")):
                assert not [name for name in names if re.search(r"\.(test)?_[a-z]", name)]
        if isinstance(node, ast.Attribute) and re.match("_[a-z]", node.attr):
            holder = ast.unparse(node.value)
            is_ours = not holder.startswith(("self", "torch", "operator", "os"))
            assert not is_ours or node.attr == "_replace", ast.unparse(node)
