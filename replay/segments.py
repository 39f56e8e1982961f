"""`minitrain verify`: every step of a run replayed and held against its record, segment by segment.

A segment begins at a keyframe and ends at the next, so segments are independent of each other and run in parallel, a
machine for each thread (the engine works without the GIL). The first begins at state 0, rebuilt from seed and data, or
in a forked run at its first keyframe, which is held against the manifest and the parent (origin.py). What a fault makes
of the states behind it says nothing about them: up to the next keyframe they are unverified. The audit goes on from the
recorded state instead, so that every transition stands on its own.
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
from minitrain.record.digests import groups
from minitrain.record.recorded import Run
from minitrain.replay.machine import Machine
from minitrain.replay.onward import state_behind
from minitrain.replay.origin import FirstState, first_state
from minitrain.replay.recurrence import RecurrenceReport, SegmentRecurrence, unable
from minitrain.replay.source import RecordedRun, memory_change, require_match
from minitrain.replay.verifier import Difference
from minitrain.state import State
from minitrain.tensors import KINDS, canonical_bits, parameter_of, parameter_table


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
    lost: list[str] = field(default_factory=list)
    """Why the audit could not go on behind a fault, a line each."""
    recurrence: RecurrenceReport | None = None
    """What `recurrence` found, in an audit."""

    @property
    def verified(self) -> bool:
        return not (self.faults or self.unverified or (self.recurrence and self.recurrence.wrong))


@dataclass
class _Segment:
    """The steps from ``start`` to before ``end``."""

    start: int
    end: int
    checked: int = 0
    faults: list[Fault] = field(default_factory=list)
    unverified: list[int] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)


def default_workers() -> int:
    """The processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def verify(
    run: Run,
    *,
    workers: int | None = None,
    audit: bool = False,
    injections: bool = True,
    show: Callable[[int], None] = lambda steps: None,
) -> Verification:
    """Replay every step of ``run`` and read everything that it has recorded.

    With ``audit`` every transition stands on its own: behind a fault go on from the recorded state, where it can be
    had; and `recurrence` is checked as well. The injections of the record are done again, or without ``injections``
    are faults to be found.
    ``show`` is told, in any thread, how much of `work_of` (run, audit) has been done since it was last told.
    Raises RunError where nothing was recorded, or the same bits are not promised here (as `Replay` does).
    """
    source = _recorded(run)
    require_match(source)
    found, workers, stopped = Verification(), workers or default_workers(), Event()
    machines: SimpleQueue[Machine] = SimpleQueue()
    for _ in range(workers):
        machines.put(Machine(source, injections=injections))
    if run.parent:
        found.first = first_state(run)
        found.faults += [Fault(run.start, "parent", None, found.first.message)] * found.first.fault

    def check(segment: _Segment) -> _Segment:
        machine = machines.get()
        try:
            for _ in _replayed(source, machine, segment, audit):
                if stopped.is_set():
                    break
                show(1)
            return segment
        finally:
            machines.put(machine)

    with ThreadPoolExecutor(workers, "verify") as pool:
        try:
            jobs: list[Future[_Segment]] = [pool.submit(check, _Segment(a, b)) for a, b in _bounds(run)]
            disk = pool.submit(_disk, run, stopped, show)
            for job in as_completed(jobs):
                segment = job.result()
                found.steps_checked += segment.checked
                found.faults += segment.faults
                found.unverified += segment.unverified
                found.lost += segment.lost
            found.faults += disk.result()
        finally:
            stopped.set()
            pool.shutdown(cancel_futures=True)
    if audit:
        found.recurrence = recurrence(run, workers=workers, injections=injections, show=show)
    found.faults.sort(key=lambda fault: fault.step)
    found.unverified.sort()
    return found


def recurrence(
    run: Run,
    *,
    workers: int | None = None,
    injections: bool = True,
    show: Callable[[int], None] = lambda steps: None,
) -> RecurrenceReport:
    """Hold the moments and parameters of every step against those before it, without data and without a model.

    ``show`` is told, in any thread, of every step. Raises RunError where nothing was recorded.
    """
    source, report, stopped = _recorded(run), RecurrenceReport(), Event()
    report.reason = unable(source)
    if report.reason:
        show(len(run.steps))
        return report

    def check(bounds: tuple[int, int]) -> RecurrenceReport:
        segment = SegmentRecurrence(source, *bounds, injections)
        for _ in segment:
            if stopped.is_set():
                break
            show(1)
        return segment.report

    with ThreadPoolExecutor(workers or default_workers(), "recurrence") as pool:
        try:
            for part in pool.map(check, _bounds(run)):
                report.add(part)
        finally:
            stopped.set()
            pool.shutdown(cancel_futures=True)
    return report


def _recorded(run: Run) -> RecordedRun:
    """Raises RunError where there is no step."""
    if not run.steps:
        raise RunError(f"{run.path}: expected at least one recorded step, got none; there is nothing to verify")
    return RecordedRun(run)


def _bounds(run: Run) -> list[tuple[int, int]]:
    """Where each segment begins and ends."""
    return list(pairwise([*(k for k in run.layout.keyframes if k < run.end), run.end]))


def work_of(run: Run, audit: bool = False) -> int:
    """How much `verify` does: each step is replayed once, and read once; in an audit its recurrence is checked too."""
    return (3 if audit else 2) * len(run.steps)


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


def _replayed(source: RecordedRun, machine: Machine, segment: _Segment, every: bool) -> Iterator[int]:
    """Run the segment step by step, and note in it what is found; a pause after each step that is done with.

    Where the keyframe cannot be read, which the audit of the files tells, it begins at an earlier one. Behind a fault
    it ends, or with ``every`` goes on from the recorded state.
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
        if segment.faults and every:
            machine.put(source.run.keyframe(segment.start))
    step = start.step
    while step < segment.end:
        if source.memory_changed(step):
            segment.faults += [_memory_fault(source, step)] if step >= segment.start else []
            if step > start.step:
                try:
                    machine.put(source.as_read(step))
                except RunError:
                    break  # what it read is lost
        before = machine.state.params.copy() if every else None
        _, differences = machine.step()
        if step >= segment.start:
            segment.checked += 1
            segment.faults += [_fault(d) for d in differences[:1]]  # those behind the first follow from it
            yield step
        step += 1
        if any(d.kind in (*KINDS, "state") for d in differences):
            if before is None or step == segment.end:
                break  # from here on the live state is another than the recorded one
            if not source.memory_changed(step):  # else the state is put there anyway
                try:
                    machine.put(state_behind(source, step, before, machine.state.params))
                except RunError as error:
                    segment.lost.append(str(error))
                    break
    else:
        _hold(segment, segment.end, source, machine.state)
    for left in range(max(step, segment.start), segment.end):
        segment.unverified.append(left)
        yield left


def _fault(d: Difference) -> Fault:
    message = f"step {d.step}: expected {d.site} ({d.phase}) as recorded, {d.recorded:#x}, got {d.replayed:#x}"
    return Fault(d.step, d.kind, parameter_of(d.site) or (d.site if d.kind == "site" else None), message)


def _memory_fault(source: RecordedRun, step: int) -> Fault:
    number, message = memory_change(source, step)
    return Fault(step, "memory", parameter_table(source.config.model)[number].name, message)


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
