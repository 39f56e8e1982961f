"""How long it takes to look into a recorded default run, from the shell and from Python."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import minitrain

STEP = 500


def one_round(folder: Path) -> dict[str, float]:
    """Seconds of each, of a run of 2000 steps that is made and removed again."""
    trained = _command(folder, "train", "--json", "--out-dir", "run")
    found = {"training_s": float(json.loads(trained.stdout)["wall_clock_s"])}
    for what, arguments in {
        "replay_s": ("replay", "run", "--step", str(STEP)),
        "verify_s": ("verify", "run"),
        "info_s": ("info", "run"),
    }.items():
        since = time.perf_counter()
        _command(folder, *arguments)
        found[what] = time.perf_counter() - since
    with minitrain.open_run(folder / "run") as run:
        run.moments(STEP)
        since = time.perf_counter()
        for step in range(1, 101):
            run.moments(step)
        found["moments_s"] = (time.perf_counter() - since) / 100
    shutil.rmtree(folder / "run")
    return found


def _command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [Path(sys.executable).with_name("minitrain"), *arguments]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
