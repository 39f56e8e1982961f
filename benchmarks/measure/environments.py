"""The Pythons of the race: one with the peers, and copies of minitrain compiled with other flags."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import venv
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[1]
ROOT = BENCHMARKS.parent
REQUIREMENTS = BENCHMARKS / "requirements.txt"
PEERS = ROOT / "build" / "bench-venv"


def peers_python() -> Path:
    """The Python of an environment with as many of the requirements as can be had, made at first use."""
    python, stamp = PEERS / "bin" / "python", PEERS / "requirements.txt"
    wanted = [line for line in REQUIREMENTS.read_text().splitlines() if not line.startswith("#")]
    state = "\n".join([platform.python_version(), *wanted])
    if not stamp.exists() or stamp.read_text() != state:
        print(f"making {PEERS.relative_to(ROOT)} for {', '.join(wanted)}", file=sys.stderr)
        venv.create(PEERS, clear=True, with_pip=True)
        failed = [
            line for line in wanted if subprocess.run([python, "-m", "pip", "install", "--quiet", line]).returncode
        ]
        if failed:
            print(f"left out, could not be installed: {', '.join(failed)}", file=sys.stderr)
        else:
            stamp.write_text(state)
    return python


def has_packages(python: Path, packages: tuple[str, ...]) -> bool:
    names = ", ".join(packages)
    return subprocess.run([python, "-c", f"import {names}"], stderr=subprocess.DEVNULL).returncode == 0


def build_copy(folder: Path, flags: str) -> Path:
    """minitrain compiled with ``flags`` after its own; the folder to put in front of the installed one."""
    source, library = folder / "source", folder / "library"
    keep_out = shutil.ignore_patterns("*.so", "__pycache__")
    for part in ("minitrain", "_ext", "replay"):
        shutil.copytree(ROOT / part, source / part, ignore=keep_out)
    for part in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / part, source)
    command = [sys.executable, "setup.py", "-q", "build", "--build-lib", str(library)]
    built = subprocess.run(
        command, cwd=source, env={**os.environ, "MINITRAIN_CFLAGS": flags}, capture_output=True, text=True
    )
    if built.returncode:
        raise RuntimeError(f"building minitrain with {flags} failed:\n{built.stderr[-2000:]}")
    command = [sys.executable, "-P", "-c", "from minitrain._ext import engine; print(engine.__file__)"]
    environment = {**os.environ, "PYTHONPATH": str(library)}
    loaded = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()
    if not Path(loaded).resolve().is_relative_to(library.resolve()):
        raise RuntimeError(f"expected the engine of {library} to be loaded, got {loaded}")
    return library
