"""What the manifest says about machine and versions: right where it can be known, None where it cannot."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from minitrain import environment
from minitrain.environment import DEPENDENCIES, git_state, hardware, peak_rss_mb, versions


def git(folder: Path, *arguments: str) -> str:
    """Run git with an identity of its own and no configuration of the machine."""
    person = {f"GIT_{who}_{what}": "x" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    environ = os.environ | person | {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    return subprocess.check_output(["git", *arguments], cwd=folder, env=environ, text=True).strip()


def test_dependencies_are_those_of_pyproject():
    """The list that the manifest reports is the list that is installed."""
    required = [line for line in metadata.requires("minitrain") or [] if "extra ==" not in line]
    assert [re.split(r"[<>=]", line)[0] for line in required] == list(DEPENDENCIES)


def test_versions():
    """minitrain, Python, and every dependency in order."""
    found = versions()
    assert list(found) == ["minitrain", "python", *DEPENDENCIES]
    assert found["numpy"] == metadata.version("numpy")
    assert found["python"] == sys.version.split()[0]


def test_a_package_that_is_not_installed_has_no_version(monkeypatch):
    """None, not an error."""
    monkeypatch.setattr(environment, "DEPENDENCIES", ("no-such-package",))
    assert versions()["no-such-package"] is None


def test_hardware():
    """The three facts, with their units."""
    found = hardware()
    assert list(found) == ["cpu", "cores", "ram_bytes"]
    assert found["cpu"]
    assert found["cores"] == os.cpu_count()
    assert found["ram_bytes"] > 2**28


def test_a_machine_without_proc_and_sysconf(monkeypatch):
    """Falls back on what the platform module knows, then on None."""
    monkeypatch.setattr(environment.Path, "read_text", _raise(FileNotFoundError))
    monkeypatch.setattr(environment.platform, "processor", lambda: "")
    monkeypatch.setattr(environment.platform, "machine", lambda: "riscv64")
    monkeypatch.setattr(environment.os, "sysconf", _raise(ValueError))
    assert hardware() == {"cpu": "riscv64", "cores": os.cpu_count(), "ram_bytes": None}
    monkeypatch.setattr(environment.platform, "machine", lambda: "")
    assert hardware()["cpu"] is None


def test_git_state_of_a_repository(tmp_path):
    """The commit, and whether a tracked file differs from it; an untracked one does not count."""
    git(tmp_path, "init", "--quiet")
    assert git_state(tmp_path) == {"sha": None, "dirty": None}
    (tmp_path / "tracked").write_text("a")
    git(tmp_path, "add", "tracked")
    git(tmp_path, "commit", "--quiet", "-m", "first")
    sha = git(tmp_path, "rev-parse", "HEAD")
    (tmp_path / "untracked").write_text("a")
    assert git_state(tmp_path) == {"sha": sha, "dirty": False}
    (tmp_path / "tracked").write_text("b")
    assert git_state(tmp_path) == {"sha": sha, "dirty": True}


def test_git_state_without_a_repository(tmp_path):
    """No repository, no folder: None."""
    assert git_state(tmp_path) == {"sha": None, "dirty": None}
    assert git_state(tmp_path / "missing") == {"sha": None, "dirty": None}


@pytest.mark.parametrize("error", [FileNotFoundError, subprocess.TimeoutExpired("git", 5.0), ValueError])
def test_git_that_is_missing_or_hangs(monkeypatch, tmp_path, error):
    """None, not an error."""
    monkeypatch.setattr(environment.subprocess, "run", _raise(error))
    assert git_state(tmp_path) == {"sha": None, "dirty": None}


MEASURE = """
from minitrain.environment import peak_rss_mb
before = peak_rss_mb()
held = b"x" * 50_000_000
print(peak_rss_mb() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="VmHWM is Linux's")
def test_peak_rss_is_in_megabytes_and_of_this_process():
    """50 MB more are about 50 more, also in the child of a process whose own peak is higher."""
    grown = subprocess.check_output([sys.executable, "-c", MEASURE], text=True)
    assert float(grown) == pytest.approx(50, abs=10)


def test_peak_rss_by_getrusage(monkeypatch):
    """The same size as by /proc on Linux, bytes on macOS, None without the resource module."""
    by_proc = peak_rss_mb()
    monkeypatch.setattr(environment, "_proc_value", lambda file, name: None)
    by_getrusage = peak_rss_mb()
    assert 0.9 * by_proc < by_getrusage < 100 * by_proc  # from above: perhaps our parent's peak
    monkeypatch.setattr(environment.sys, "platform", "darwin")
    assert peak_rss_mb() == pytest.approx(by_getrusage / 1024, rel=0.1)
    monkeypatch.setitem(sys.modules, "resource", None)  # importing it raises ImportError
    assert peak_rss_mb() is None


def _raise(error):
    def stand_in(*_, **__):
        raise error

    return stand_in
