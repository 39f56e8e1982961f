"""What recording alone costs: the loop's time with either tier against that without, and how many bytes it writes.

A figure is the mean time of STEPS default steps, from the first until everything is on disk; validations are left
out, metrics too (measure/metrics.py has them), and making the record's folder does not count. The ways take turns,
TURNS times a round, and the fastest turn of each counts: on a shared machine what else goes on there would be told
otherwise. *free* leaves the second core to the recorder's threads, *pinned* gives the whole process one core.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

from minitrain.assembly import assemble, prepare_data
from minitrain.config import load_config
from minitrain.loop import train
from minitrain.record.recorder import Recorder
from minitrain.run_folder import RunFolder

STEPS = 1000
TURNS = 3
BASE = "not recorded"
WAYS = {
    BASE: [],
    "keyframes": ["record.moments=keyframes"],
    "every step": ["record.moments=every_step"],
    "every step, sites": ["record.moments=every_step", "record.sites=digest"],
}


def one_round(folder: Path, cores: list[int], say: Callable[[str], None]) -> dict[str, Any]:
    """{place: {way: seconds of a step, of its threads together, and bytes of the record a step}}."""
    found: dict[str, Any] = {}
    for place, allowed in ("free", cores), ("pinned", cores[-1:]):
        os.sched_setaffinity(0, allowed)
        try:
            say(f"{place}: {', '.join(WAYS)}")
            turns = [{way: loop(way, folder) for way in WAYS} for _ in range(TURNS)]
            found[place] = {way: {key: min(t[way][key] for t in turns) for key in turns[0][way]} for way in WAYS}
        finally:
            os.sched_setaffinity(0, cores)
    return found


def loop(way: str, folder: Path) -> dict[str, float]:
    config = load_config(None, [f"scheduler.total_steps={STEPS}", "metrics.enabled=false", *WAYS[way]])
    data = prepare_data(config)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        parts = assemble(config, data)
        arguments = parts.model, parts.optimizer, parts.scheduler, parts.batches, [], STEPS, STEPS
        recorder = None if way == BASE else Recorder(RunFolder(Path(place)), config, parts, {})
        since, worked = time.perf_counter(), time.process_time()
        with closing(recorder) if recorder else nullcontext():
            train(*arguments, listeners=[recorder] if recorder else [])
        seconds, work = time.perf_counter() - since, time.process_time() - worked
        size = sum(p.stat().st_size for p in Path(place).rglob("*") if p.is_file())
    return {"step_s": seconds / STEPS, "processor_s": work / STEPS, "bytes": size / STEPS}
