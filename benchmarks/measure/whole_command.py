"""The default run by `minitrain train`, with the log, evaluation, checkpoints and the picture; nothing pinned."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from time import perf_counter

from measure.processes import STEERING


def train(folder: Path) -> dict[str, float]:
    """Its seconds to the results and of the whole process, and the megabytes it held at most."""
    start = perf_counter()
    subprocess.run(
        [sys.executable, "-P", "-m", "minitrain", "train", "--out-dir", "run", "--json"],
        cwd=folder,
        env={name: value for name, value in os.environ.items() if not name.startswith(STEERING)},
        stdout=subprocess.DEVNULL,
        check=True,
    )
    wall = perf_counter() - start
    results = json.loads((folder / "run" / "results.json").read_text())
    # Its own figure: getrusage would begin with what this process held when it forked.
    return {"wall_s": wall, "training_s": results["wall_clock_s"], "memory_mb": results["peak_rss_mb"]}
