"""How long it takes to look into recorded default runs, from the shell and from Python."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import minitrain
from measure.processes import STEERING

STEP = 500
RUNS = {
    "run": [],
    "scaled": ["--injection", "scale", "--injection-step", str(STEP)],
    "broken": ["--injection", "param_nan", "--injection-step", "731"],
}
LOOKS = {
    "info_s": ("info", "run"),
    "replay_s": ("replay", "run", "--step", str(STEP)),
    "verify_s": ("verify", "run"),
    "bisect_nothing_s": ("replay", "run", "--nan-bisect"),
    "bisect_nan_s": ("replay", "broken", "--nan-bisect", "--blind"),
    "diff_s": ("diff", "run", "scaled"),
}


def one_round(folder: Path) -> dict[str, float]:
    """Seconds of each, of runs of 2000 steps that are made and removed again."""
    for name, more in RUNS.items():
        _command(folder, "train", "--json", "--out-dir", name, *more)
    results = json.loads((folder / "run" / "results.json").read_text())
    found = {"training_s": float(results["wall_clock_s"])}  # without picture and page
    for what, arguments in LOOKS.items():
        since = time.perf_counter()
        _command(folder, *arguments)
        found[what] = time.perf_counter() - since
    with minitrain.open_run(folder / "run") as run:
        run.moments(STEP)
        since = time.perf_counter()
        for step in range(1, 101):
            run.moments(step)
        found["moments_s"] = (time.perf_counter() - since) / 100
    for name in RUNS:
        shutil.rmtree(folder / name)
    return found


def _command(folder: Path, *arguments: str) -> str:
    """What it prints. Exit code 1 is that something was found."""
    command = [Path(sys.executable).with_name("minitrain"), *arguments]
    environ = {name: value for name, value in os.environ.items() if not name.startswith(STEERING)}
    done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise RuntimeError(f"{' '.join(map(str, command))}: {done.stderr}")
    return done.stdout
