"""One process of the race: one side trains on a workload and tells what each step cost, as JSON.

It pins itself to its cores before it imports anything that counts them.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import resource
import sys
from pathlib import Path
from statistics import median, quantiles
from time import monotonic, perf_counter, process_time

from sides import SIDES


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m sides", description=__doc__)
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--warmup", type=int, default=1, help="steps before the timed ones, at least one")
    parser.add_argument("--steps", type=int, default=0, help="timed steps")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cores", type=int, nargs="*", help="the cores to stay on")
    parser.add_argument("--launched", type=float, default=monotonic(), help="when, by the monotonic clock")
    parser.add_argument("--digests-after", type=int, nargs="*", default=[], help="numbers of steps")
    parser.add_argument("--extras", action="store_true", help="measure too what only this side can")
    a = parser.parse_args()
    if a.cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, a.cores)

    start = perf_counter()
    side = importlib.import_module(f"sides.{SIDES[a.side].module}")
    from sides.work import Work

    imported = perf_counter() - start
    racer = side.Racer(Work(a.folder), a.threads, SIDES[a.side].style)
    start = perf_counter()
    first_loss, first_norm = loss, norm = racer.step(0)
    first_step, first_done = perf_counter() - start, monotonic() - a.launched

    digests = {"1": racer.digest()} if 1 in a.digests_after else {}
    times: list[float] = []
    cpu = 0.0
    gc.collect()
    for n in range(1, a.warmup + a.steps):
        cpu_start, start = process_time(), perf_counter()
        loss, norm = racer.step(n)
        seconds, cpu_seconds = perf_counter() - start, process_time() - cpu_start
        if n >= a.warmup:
            times.append(seconds)
            cpu += cpu_seconds
        if n + 1 in a.digests_after:
            digests[str(n + 1)] = racer.digest()
    result = {
        "import_s": imported,
        "first_step_s": first_step,
        "launch_to_first_step_s": first_done,
        "memory_mb": peak_memory_mb(),
        "losses": [first_loss, loss],
        "norms": [first_norm, norm],
        "digests": digests,
        "versions": racer.versions,
    }
    if times:
        result["step_s"] = {
            "count": len(times),
            "min": min(times),
            "median": median(times),
            "quartiles": quantiles(times, n=4)[::2] if len(times) > 1 else 2 * times,
        }
        result["busy"] = cpu / sum(times)
    if a.extras:
        result |= racer.extras()
    json.dump(result, sys.stdout)


def peak_memory_mb() -> float:
    """Of this process alone: what getrusage tells on Linux begins with what its parent held at the fork."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmHWM"))


if __name__ == "__main__":
    main()
