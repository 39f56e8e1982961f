"""The floors of the house: a module imports only from floors below its own, and importing does nothing."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import minitrain
from minitrain import _ext, replay

FLOORS = [
    ["errors"],
    ["files", "rng", "elementary", "yaml_files", "shorthand"],
    ["_ext", "sections"],
    ["config"],
    ["tensors", "schedule", "environment", "hooks", "stability"],
    ["state", "passes", "data"],
    ["model", "optim", "checkpoint", "run_folder", "inject", "inspector"],
    ["loop", "report", "assembly"],
    ["record"],
    ["metrics"],
    ["dashboard", "keeper"],
    ["trainer", "selftest", "sampling", "replay"],
    ["cli", "terminal", "experiments", "fork"],
    ["commands"],
    ["__init__", "__main__"],
]
"""From the ground, 0, up. A folder is one room, in which modules may import each other."""

FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
FOLDERS = {package.__name__: Path(package.__path__[0]) for package in (minitrain, _ext, replay)}


def modules() -> dict[str, Path]:
    """Every Python module by its full name."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            found[".".join([package, *path.relative_to(folder).with_suffix("").parts])] = path
    return found


MODULES = modules()


def room(module: str) -> str:
    """The room of ``minitrain.room.module``; the package itself is its ``__init__``."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imported(path: Path, name: str) -> set[str]:
    """Every module of ours that a file imports, wherever in the file: in functions and for type checkers too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name}:{node.lineno}: a relative import"
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            known = {m for m in inside if m in MODULES or f"{m}.__init__" in MODULES}
            found |= known or {str(node.module)}
    return {module for module in found if module.split(".")[0] == "minitrain"}


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_down(name):
    """Only from floors below, or from the same room. A module without a floor has to be given one."""
    own = room(name)
    assert own in FLOOR, f"{own} has no floor: add it to FLOORS in {__file__}"
    for module in imported(MODULES[name], name):
        other = room(module)
        assert other == own or FLOOR[other] < FLOOR[own], f"floor {FLOOR[own]} imports {module}, floor {FLOOR[other]}"


def test_the_engine_imports_nothing_of_ours(repository):
    """The compiled source names its own files, C, Python and NumPy; Cython's imports are outside `ast`."""
    files = [*(repository / "_ext").rglob("*.pyx"), *(repository / "_ext").rglob("*.pxi")]
    assert files
    for path in files:
        names = re.findall(r"^\s*(?:c?import|from)\s+([\w.]+)", path.read_text(), re.MULTILINE)
        assert all(name == "numpy" or name.startswith(("libc.", "cpython.")) for name in names), f"{path}: {names}"


def test_importing_does_nothing(run_python):
    """`import minitrain` loads neither NumPy nor any module of ours; asking for a name does."""
    code = """
import sys
import minitrain
print("numpy" in sys.modules, [name for name in sys.modules if name.startswith("minitrain.")])
print(minitrain.MiniGPT.__module__, "numpy" in sys.modules)
"""
    done = run_python(code)
    assert done.stdout.splitlines() == ["False []", "minitrain.model True"], done.stderr
