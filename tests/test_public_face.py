"""What a user may count on: the names, their types and docs, the version, completion in the shell."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from click.testing import CliRunner

import minitrain
from minitrain import _ext, replay
from minitrain._ext import engine, plan
from minitrain.cli import main

COMPILED = ["engine", *(f"kernels_{isa}" for isa in engine.instruction_sets())]


def modules() -> list[str]:
    """Every module but the compiled kernels that this processor cannot run, and the command line as a script."""
    foreign = {f"kernels_{isa}" for isa in ("avx512", "avx2", "portable")} - set(COMPILED)
    found = [m.name for p in (minitrain, _ext, replay) for m in pkgutil.walk_packages(p.__path__, f"{p.__name__}.")]
    return [name for name in dict.fromkeys(found) if name.split(".")[-1] not in {*foreign, "__main__"}]


def test_names():
    """Each public name can be had, has a docstring, and is shown to type checkers as it is at run time."""
    shown = inspect.getsource(minitrain).partition("if TYPE_CHECKING:")[2].partition("_HOME")[0]
    imports = re.findall(r"from (\S+) import (\w+) as (\w+)", shown)
    assert sorted(name for _, name, _ in imports) == sorted(minitrain.__all__)
    for module, name, shown_as in imports:
        assert name == shown_as
        assert getattr(minitrain, name) is getattr(importlib.import_module(module), name)
        assert inspect.getdoc(getattr(minitrain, name))
    assert dir(minitrain) == minitrain.__all__
    with pytest.raises(AttributeError, match="has no attribute 'MiniGTP'"):
        minitrain.__getattr__("MiniGTP")


def test_names_are_those_of_the_readme(repository):
    """The README takes only public names from the package."""
    readme = (repository / "README.md").read_text()
    imports = re.findall(r"^from minitrain import (.*)$", readme, re.MULTILINE)
    taken = {name for line in imports for name in line.split(", ")}
    assert taken
    assert taken <= set(minitrain.__all__)


def test_every_module_imports_without_a_warning():
    """With warnings as errors, in an interpreter of its own."""
    assert "minitrain.loop" in (names := modules())
    code = f"import importlib; [importlib.import_module(name) for name in {names}]"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_stubs_agree_with_the_compiled_modules(tmp_path):
    """Names and signatures, as mypy's stubtest compares them; all kernels have the same stub."""
    folder = tmp_path / "minitrain" / "_ext"  # stubs alone, so that mypy does not read the rest of the package
    folder.mkdir(parents=True)
    for package in folder.parent, folder:
        (package / "__init__.pyi").touch()
    stubs = [shutil.copy(path, folder) for path in Path(_ext.__path__[0]).glob("*.pyi")]
    (tmp_path / "cythons").write_text(r".*\.(__test__|__(reduce|setstate)_cython__)")
    command = [sys.executable, "-m", "mypy.stubtest", "--allowlist", tmp_path / "cythons"]
    names = [f"minitrain._ext.{name}" for name in COMPILED]
    done = subprocess.run([*command, *names], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len({path.read_text() for path in map(Path, stubs) if path.stem.startswith("kernels_")}) == 1


def test_version(monkeypatch):
    """Two lines: version, numerics and instruction set; compiler and flags, none of which names a place."""
    monkeypatch.delenv("MINITRAIN_ISA", raising=False)
    for isa in engine.instruction_sets():
        monkeypatch.setenv("MINITRAIN_ISA", isa)
        first, second = CliRunner().invoke(main, ["--version"], catch_exceptions=False).stdout.splitlines()
        assert first == f"minitrain {metadata.version('minitrain')} (numerics 1, {isa})"
        assert re.fullmatch(r"compiled by \w.* \d+\.\d+.* with .*-ffp-contract=off.*", second)
        assert ("-mfma" in second) == (isa != "portable")
        assert "/" not in second
        assert second == "compiled by {} with {}".format(*plan.compiled())


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell, run_python):
    """docs/completion.md: the script for each shell is made, and what it calls completes commands and options."""
    call = "from minitrain.cli import main; main(prog_name='minitrain')"
    script = run_python(call, _MINITRAIN_COMPLETE=f"{shell}_source").stdout
    assert f"_MINITRAIN_COMPLETE={shell}_complete" in script
    for typed, expected in ("minitrain tra", "train"), ("minitrain train --out", "--out-dir"):
        *_, last = typed.split()
        words = {"COMP_WORDS": typed, "COMP_CWORD": last if shell == "fish" else str(len(typed.split()) - 1)}
        answer = run_python(call, _MINITRAIN_COMPLETE=f"{shell}_complete", **words).stdout
        assert expected in re.split(r"[,\s]", answer)
