"""What the manifest says about the machine and the programs: facts to read later, none that steers the run.

What cannot be found out is None: an unusual machine is no reason not to train.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

DEPENDENCIES = (
    "numpy",
    "click",
    "pydantic",
    "ruamel.yaml",
    "rich",
    "safetensors",
    "xxhash",
    "zarr",
    "google-crc32c",
    "msgpack",
    "altair",
    "vl-convert-python",
)
"""The packages of pyproject.toml, in its order."""

_GIT_SECONDS = 5.0


def versions() -> dict[str, str | None]:
    """The versions of minitrain, Python and the dependencies; None where a package is not installed."""
    return {
        "minitrain": _version("minitrain"),
        "python": platform.python_version(),
        **{package: _version(package) for package in DEPENDENCIES},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def hardware() -> dict[str, str | int | None]:
    """``cpu`` (the model's name), ``cores`` (logical, of the whole machine) and ``ram_bytes`` (physical)."""
    return {"cpu": _cpu_model(), "cores": os.cpu_count(), "ram_bytes": _ram_bytes()}


def _cpu_model() -> str | None:
    # Only Linux on x86 names the model; elsewhere the architecture has to do.
    return _proc_value("/proc/cpuinfo", "model name") or platform.processor() or platform.machine() or None


def _ram_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _proc_value(file: str, name: str) -> str | None:
    """The value of the first ``name : value`` line of a file under /proc."""
    try:
        lines = Path(file).read_text(errors="replace").splitlines()
    except OSError:
        return None
    pairs = (line.partition(":") for line in lines)
    return next((value.strip() for key, _, value in pairs if key.strip() == name), None)


def git_state(folder: Path) -> dict[str, str | bool | None]:
    """``sha`` of HEAD, and ``dirty``: a tracked file differs from it (as in git describe --dirty).

    Both are None without git, without a repository, before its first commit, or when git takes too long.
    """
    sha = _git(folder, "rev-parse", "--verify", "HEAD")
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no") if sha else None
    return {"sha": sha, "dirty": None if changes is None else changes != ""}


def _git(folder: Path, *arguments: str) -> str | None:
    # Without the optional locks, status writes nothing and is never in the way of the user's own git.
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, timeout=_GIT_SECONDS, stdin=subprocess.DEVNULL)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    return done.stdout.decode(errors="replace").strip() if done.returncode == 0 else None


def peak_rss_mb() -> float | None:
    """The most memory this process has held so far, in megabytes (10**6 bytes)."""
    # Linux by /proc, because its getrusage starts a child at the peak of the process that launched it.
    high_water = _proc_value("/proc/self/status", "VmHWM")
    if high_water and high_water.endswith(" kB"):
        return int(high_water.removesuffix(" kB")) * 1024 / 1e6
    try:
        import resource
    except ImportError:  # not POSIX
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, the others KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
