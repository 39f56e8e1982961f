"""`minitrain verify`: every step of a run replayed and held against its record, segment by segment.

A segment begins at a keyframe and ends at the next, so segments are independent of each other and run in parallel, a
machine for each thread (the engine works without the GIL). The first begins at state 0, rebuilt from seed and data, or
in a forked run at its first keyframe, which is held against the manifest and the parent (origin.py). What a fault makes
of the states behind it says nothing about them: up to the next keyframe they are unverified.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from itertools import pairwise
from queue import SimpleQueue
from threading import Event
from typing import NamedTuple

import numpy as np

from minitrain.errors import RunError
from minitrain.record.audit import Damage, audit
from minitrain.record.digests import KINDS, groups
from minitrain.record.recorded import Run
from minitrain.replay.machine import Machine
from minitrain.replay.origin import FirstState, first_state
from minitrain.replay.source import RecordedRun, require_match
from minitrain.replay.verifier import Difference, parameter_of
from minitrain.state import State
from minitrain.tensors import canonical_bits, parameter_table


class Fault(NamedTuple):
    """Something that is not as a healthy run has it."""

    step: int
    kind: str
    """What of the step: batch, rng, memory, site, loss, lr, ..., m, v, param; or the array of the record."""
    tensor: str | None
    message: str


@dataclass
class Verification:
    """What `verify` found. Steps and states that could not be checked are unverified, not faulty."""

    steps_checked: int = 0
    faults: list[Fault] = field(default_factory=list)
    unverified: list[int] = field(default_factory=list)
    first: FirstState | None = None
    """What is known of the state with which a forked run began."""

    @property
    def verified(self) -> bool:
        return not self.faults and not self.unverified


@dataclass
class _Segment:
    """The steps from ``start`` to before ``end``."""

    start: int
    end: int
    checked: int = 0
    faults: list[Fault] = field(default_factory=list)
    unverified: list[int] = field(default_factory=list)


def default_workers() -> int:
    """The processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def verify(run: Run, *, workers: int | None = None, show: Callable[[int], None] = lambda steps: None) -> Verification:
    """Replay every step of ``run`` and read everything that it has recorded.

    ``show`` is told, in any thread, how much of `work_of` (run) has been done since it was last told.
    Raises RunError where nothing was recorded, or the same bits are not promised here (as `Replay` does).
    """
    if not run.steps:
        raise RunError(f"{run.path}: expected at least one recorded step, got none; there is nothing to verify")
    source = RecordedRun(run)
    require_match(source)
    found, workers, stopped = Verification(), workers or default_workers(), Event()
    machines: SimpleQueue[Machine] = SimpleQueue()
    for _ in range(workers):
        machines.put(Machine(source))
    bounds = [k for k in run.layout.keyframes if k < run.end] + [run.end]
    if run.parent:
        found.first = first_state(run)
        found.faults += [Fault(run.start, "parent", None, found.first.message)] * found.first.fault

    def check(segment: _Segment) -> _Segment:
        machine = machines.get()
        try:
            for _ in _replayed(source, machine, segment):
                if stopped.is_set():
                    break
                show(1)
            return segment
        finally:
            machines.put(machine)

    with ThreadPoolExecutor(workers, "verify") as pool:
        try:
            jobs: list[Future[_Segment]] = [pool.submit(check, _Segment(a, b)) for a, b in pairwise(bounds)]
            disk = pool.submit(_disk, run, stopped, show)
            for job in as_completed(jobs):
                segment = job.result()
                found.steps_checked += segment.checked
                found.faults += segment.faults
                found.unverified += segment.unverified
            found.faults += disk.result()
        finally:
            stopped.set()
            pool.shutdown(cancel_futures=True)
    found.faults.sort(key=lambda fault: fault.step)
    found.unverified.sort()
    return found


def work_of(run: Run) -> int:
    """How much `verify` does: each step is replayed once, and read once."""
    return 2 * len(run.steps)


def _disk(run: Run, stopped: Event, show: Callable[[int], None]) -> list[Fault]:
    """What is damaged on disk."""
    faults, done = [], 0
    for item in audit(run):
        if stopped.is_set():
            break
        if isinstance(item, Damage):
            faults.append(Fault(item.step, item.array, None, item.message))
        else:
            show(item - done)
            done = item
    return faults


def _replayed(source: RecordedRun, machine: Machine, segment: _Segment) -> Iterator[int]:
    """Run the segment step by step, and note in it what is found; a pause after each step that is done with.

    Where the keyframe cannot be read, which the audit tells, it begins at an earlier one.
    """
    try:
        start = source.first() if segment.start == source.run.start else source.nearest(segment.start)
    except RunError:  # the first keyframe of a forked run, or all of them
        segment.unverified += range(segment.start, segment.end)
        yield from segment.unverified
        return
    machine.put(start)
    if segment.start == source.run.start:
        _hold(segment, segment.start, source, start)
    step = start.step
    while step < segment.end:
        if source.memory_changed(step):
            segment.faults += [_memory_fault(source, step)] if step >= segment.start else []
            if step > start.step:
                try:
                    machine.put(source.as_read(step))
                except RunError:
                    break  # what it read is lost
        _, differences = machine.step()
        if step >= segment.start:
            segment.checked += 1
            segment.faults += [_fault(d) for d in differences[:1]]  # those behind the first follow from it
            yield step
        step += 1
        if any(d.kind in (*KINDS, "state") for d in differences):
            break  # from here on the live state is another than the recorded one
    else:
        _hold(segment, segment.end, source, machine.state)
    for left in range(max(step, segment.start), segment.end):
        segment.unverified.append(left)
        yield left


def _fault(d: Difference) -> Fault:
    message = f"step {d.step}: expected {d.site} ({d.phase}) as recorded, {d.recorded:#x}, got {d.replayed:#x}"
    return Fault(d.step, d.kind, parameter_of(d.site) or (d.site if d.kind == "site" else None), message)


def _memory_fault(source: RecordedRun, step: int) -> Fault:
    """Tensors that step ``step`` read otherwise than the step before had left them."""
    left, read = source.frame(step - 1).digest_out, source.frame(step).digest_in
    names = [p.name for p in parameter_table(source.config.model)]
    changed = [f"{KINDS[kind]}.{names[n]}" for kind, n in np.argwhere(left != read)]
    return Fault(
        step, "memory", parameter_of(changed[0]), f"step {step}: memory changed before it: {', '.join(changed)}"
    )


def _hold(segment: _Segment, t: int, source: RecordedRun, state: State) -> None:
    """Note whether the keyframe of state t, if there is one that can be read, has the bits of the live state."""
    try:
        keyframe = source.run.keyframe(t)
    except RunError:  # missing or damaged, which the audit tells
        return
    for kind, recorded, live in zip(KINDS, groups(keyframe), groups(state), strict=True):
        for name in recorded:
            if not np.array_equal(canonical_bits(recorded[name]), canonical_bits(live[name])):
                message = f"keyframe {t}: expected {kind}.{name} as it is replayed, got other bits"
                segment.faults.append(Fault(t, "keyframe", name, message))
                return
