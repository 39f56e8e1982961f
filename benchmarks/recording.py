"""What recording costs: the loop's time with either tier against that without, and how many bytes a parameter and step.

    python benchmarks/recording.py [--rounds 5] [--steps 1000]

Each figure is the mean time of a default step from the first to the last, until everything is on disk; validations are
left out, and so is making the record's folder. The ways take turns, each time in a folder of their own; told is the
median over the rounds of the ratio within a round. *free* leaves the second core to the recorder's threads, *pinned*
gives the whole process one core.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from contextlib import closing, nullcontext
from pathlib import Path

from minitrain.assembly import assemble, prepare_data
from minitrain.config import load_config
from minitrain.loop import train
from minitrain.record.recorder import Recorder
from minitrain.run_folder import RunFolder

WAYS = {
    "not recorded": [],
    "keyframes": ["record.moments=keyframes"],
    "every step": ["record.moments=every_step"],
    "every step, sites": ["record.moments=every_step", "record.sites=digest"],
}


def loop(way: str, steps: int) -> tuple[float, float, float]:
    """Seconds of a step, seconds of its threads together, and bytes of the record a step."""
    config = load_config(None, [f"scheduler.total_steps={steps}", *WAYS[way]])
    with tempfile.TemporaryDirectory(dir=".") as place:
        folder = RunFolder(Path(place))
        parts = assemble(config, prepare_data(config))
        arguments = parts.model, parts.optimizer, parts.scheduler, parts.batches, [], steps, steps
        recorder = None if way == "not recorded" else Recorder(folder, config, parts, {})
        since, worked = time.perf_counter(), time.process_time()
        with closing(recorder) if recorder else nullcontext():
            train(*arguments, listeners=[recorder] if recorder else [])
        seconds, work = time.perf_counter() - since, time.process_time() - worked
        size = sum(p.stat().st_size for p in Path(place).rglob("*") if p.is_file())
    return seconds / steps, work / steps, size / steps


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1000)
    options = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    parameters = 103_744
    for place, allowed in (("free", cores), ("pinned", cores[-1:])):
        os.sched_setaffinity(0, allowed)
        times: dict[str, list[float]] = {way: [] for way in WAYS}
        works: dict[str, list[float]] = {way: [] for way in WAYS}
        sizes: dict[str, float] = {}
        for _ in range(options.rounds):
            for way in WAYS:
                seconds, work, sizes[way] = loop(way, options.steps)
                times[way].append(seconds)
                works[way].append(work)
        print(f"\n{place} ({len(allowed)} cores), {options.rounds} rounds of {options.steps} steps\n")
        print(
            "| | ms a step | more | from | to | processor time more | bytes a step | bytes a parameter and step |\n"
            "|---|---|---|---|---|---|---|---|"
        )
        for way, seconds in times.items():
            more, work = (
                [100 * (s / b - 1) for s, b in zip(x[way], x["not recorded"], strict=True)] for x in (times, works)
            )
            print(
                f"| {way} | {1e3 * min(seconds):.3f} | {statistics.median(more):+.1f} % | {min(more):+.1f} % "
                f"| {max(more):+.1f} % | {statistics.median(work):+.1f} % | {sizes[way]:,.0f} "
                f"| {sizes[way] / parameters:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
