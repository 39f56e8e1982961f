"""From the sources to the wheel: everything that belongs there, and nothing that was left lying about."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from importlib import metadata
from pathlib import Path, PurePosixPath

import pytest

import minitrain
from minitrain import _ext

PAGE = (".html", ".css", ".js")
"""What the dashboard is made of."""


def project(repository: Path) -> dict:
    return tomllib.loads((repository / "pyproject.toml").read_text())


def test_every_package_is_listed(repository):
    """Each folder with an ``__init__.py`` is in pyproject.toml under the name that it is imported by."""
    setuptools = project(repository)["tool"]["setuptools"]
    found = {}
    for name, folder in setuptools["package-dir"].items():
        for init in (repository / folder).rglob("__init__.py"):
            below = init.parent.relative_to(repository / folder).parts
            found[".".join([name, *below])] = init
    assert sorted(found) == sorted(setuptools["packages"])


def test_the_sdist_is_the_repository(repository, tmp_path):
    """It holds every file that is tracked or about to be, and nothing else but its own metadata."""
    if not (repository / ".git").exists() or not shutil.which("git"):
        pytest.skip("needs the git repository")
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    tracked = subprocess.check_output(listed, cwd=repository, text=True).splitlines()
    tracked = {name for name in tracked if (repository / name).exists()}
    build = f"from setuptools.build_meta import build_sdist; build_sdist({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", build], cwd=repository, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as sdist:
        names = [PurePosixPath(*PurePosixPath(m.name).parts[1:]) for m in sdist.getmembers() if m.isfile()]
    generated = ("PKG-INFO", "setup.cfg", "minitrain.egg-info")
    assert {str(name) for name in names if name.parts[0] not in generated} == tracked


def test_a_deleted_module_does_not_come_back(repository, tmp_path):
    """What an earlier build left in the build folder is gone after the next one; what is not ours is left alone."""
    for name in ("minitrain/gone.py", "minitrain/replay/gone.py", "minitrain/_ext/kernels_gone.so", "other/kept.py"):
        path = tmp_path / "lib" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", tmp_path / "lib"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    built = {path.name for path in (tmp_path / "lib").rglob("*.*")}
    assert {"cli.py", "plan.py", "py.typed", "engine.pyi", "kept.py"} <= built
    assert not {"gone.py", "kernels_gone.so"} & built


def test_make_test_runs_everything(repository):
    """One command runs the linter, the type checker and the tests, and it is the one that .ci/run begins with."""
    if not shutil.which("make"):
        pytest.skip("make is not installed")
    recipe = subprocess.check_output(["make", "--dry-run", "test"], cwd=repository, text=True)
    assert all(command in recipe for command in ("ruff check", "ruff format --check", "mypy -p minitrain", "pytest"))
    assert project(repository)["tool"]["mypy"]["strict"] is True
    assert re.search(r"(?m)^make test\b", (repository / ".ci" / "run").read_text())


def test_an_installation_holds_only_the_package():
    """Site-packages gets one folder, without the engine's sources; every compiled module has its stub beside it."""
    if Path(_ext.__path__[0]).parent != Path(minitrain.__path__[0]):
        pytest.skip("needs an installed wheel; .ci/run has one")
    files = [path for path in metadata.files("minitrain") or [] if ".dist-info" not in path.parts[0]]
    inside = [path for path in files if path.parts[0] != ".."]  # above are the scripts
    assert {path.parts[0] for path in inside} == {"minitrain"}
    assert "py.typed" in {path.name for path in inside}
    assert {path.suffix for path in inside} <= {".py", ".pyc", ".pyi", ".so", ".typed", ".yaml", *PAGE}
    compiled = {path.name.partition(".")[0] for path in inside if path.suffix == ".so"}
    assert compiled == {path.stem for path in inside if path.suffix == ".pyi"}
