"""The first step of a bisect: which step is the first that is not what it should have been.

Where a loss or norm of the record is not finite, the journal says so without a step being run, and the segment that
holds the first of them is looked at before all others; else the segments are replayed in parallel, the earliest first.
A difference can be gone again a few steps later, so a segment that ends as recorded proves nothing of its middle:
every step is held against its record. All replays are without injections: what should have happened.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from queue import SimpleQueue
from threading import Event
from typing import Literal, NamedTuple

import numpy as np

from minitrain.record.digests import groups, rng_words
from minitrain.replay.machine import Machine
from minitrain.replay.segments import default_workers
from minitrain.replay.source import RecordedRun
from minitrain.replay.verifier import double_bits
from minitrain.schedule import lr_at
from minitrain.state import State

Kind = Literal["memory", "differs", "arithmetic"]
Bounds = tuple[int, int]
Show = Callable[[int], None]


class Suspect(NamedTuple):
    """A step that is not what it should have been."""

    step: int
    kind: Kind
    """``memory``: it read another state than the step before had left. ``differs``: run again it comes out otherwise.
    ``arithmetic``: run again it gives the same numbers, and they are not finite."""


class Search(NamedTuple):
    """What was found in the steps up to N, how, and what else is known."""

    first: Suspect | None
    method: Literal["finiteness", "segments"]
    reason: str
    nonfinite: int | None
    """The first step up to N whose loss or norm is not finite."""
    later: int | None = None
    """With nothing up to N: the first step after N that is not what it should have been."""
    unchecked: range = range(0)
    """Steps before the one found that nobody has run again."""


class Searcher:
    """Looks for the first faulty step of one run."""

    def __init__(self, source: RecordedRun, workers: int | None = None, show: Show = lambda steps: None) -> None:
        """``show`` is told, in any thread, how many more of the run's steps are done with."""
        self._source, self._show = source, show
        self._workers = workers or default_workers()
        self._stopped = Event()
        run = source.run
        self._segments: list[Bounds] = list(pairwise([*(k for k in run.layout.keyframes if k < run.end), run.end]))

    def search(self, last: int) -> Search:
        """Among the steps up to ``last``. Raises RunError where the data or the record cannot be read."""
        nonfinite = first_nonfinite(self._source, last)
        return self._by_segments(last) if nonfinite is None else self._by_finiteness(nonfinite)

    def _by_segments(self, last: int) -> Search:
        found, first = self._earliest(self._segments), self._source.run.start
        reason = (
            f"every loss and norm of steps {first} to {last} is finite, so each segment was replayed from its own "
            "keyframe without injections and every step held against its record; the earliest difference counts"
        )
        if found and found.step > last:
            return Search(None, "segments", reason, None, later=found.step)
        return Search(found, "segments", reason, None)

    def _by_finiteness(self, step: int) -> Search:
        segments = [(a, min(b, step + 1)) for a, b in self._segments if a <= step]
        start = segments[-1][0]
        reason = f"step {step} is the first whose loss or norm is not finite, as the journal says"
        told = self._told(step)
        found = self._earliest(segments[-1:])
        if found and not finite(start_of(self._source, start)):
            found = None  # the segment begins with what an earlier one has left
        unchecked = range(0)
        if found or told:
            reason += f"; only the segment from keyframe {start} was replayed, up to it"
            unchecked = range(self._source.run.start, start)
        else:
            found = self._earliest(segments[:-1])
            reason += f"; the segment from keyframe {start} replays as recorded"
            reason += ", so those before it were replayed too" if segments[:-1] else ""
        first = min(filter(None, (found, told)), default=None)
        if first is None:
            return Search(Suspect(self._first_made(segments), "arithmetic"), "finiteness", reason, step)
        return Search(
            first, "finiteness", reason, step, unchecked=range(unchecked.start, min(first.step, unchecked.stop))
        )

    def _told(self, last: int) -> Suspect | None:
        """The first step up to ``last`` whose frame alone says that it is wrong: memory, batch, streams, rate."""
        source, config = self._source, self._source.config
        for t in range(source.run.start, last + 1):
            frame = source.frame(t)
            if source.memory_changed(t):
                return Suspect(t, "memory")
            if (
                double_bits(frame.lr) != double_bits(lr_at(t, config.optimizer, config.scheduler))
                or not np.array_equal(frame.rows, source.batches.rows_at(t))
                or not np.array_equal(frame.rng, rng_words(config, source.batches, t))
            ):
                return Suspect(t, "differs")
        return None

    def _earliest(self, segments: Sequence[Bounds]) -> Suspect | None:
        """The first suspect of these segments, which are replayed in parallel."""
        if not segments:
            return None
        machines: SimpleQueue[Machine] = SimpleQueue()
        workers = min(self._workers, len(segments))
        for _ in range(workers):
            machines.put(Machine(self._source, injections=False))
        self._stopped.clear()

        def check(bounds: Bounds) -> Suspect | None:
            machine, found = machines.get(), None
            try:
                for found in walk(self._source, machine, *bounds):
                    self._show(1)
                    if found or self._stopped.is_set():
                        break
                return found
            finally:
                machines.put(machine)

        with ThreadPoolExecutor(workers, "bisect") as pool:
            try:
                jobs = [pool.submit(check, bounds) for bounds in segments]
                return next(filter(None, (job.result() for job in jobs)), None)
            finally:
                self._stopped.set()
                pool.shutdown(cancel_futures=True)

    def _first_made(self, segments: Sequence[Bounds]) -> int:
        """The step that makes the first number that is not finite, in a run that replays as recorded."""
        whole = [bounds for bounds in segments if finite(start_of(self._source, bounds[0]))]
        start, last = (whole[-1] if whole else segments[0])[0], segments[-1][1] - 1
        machine = Machine(self._source, injections=False)
        machine.put(start_of(self._source, start))
        while machine.state.step < last:
            machine.step()
            if not finite(machine.state):
                return machine.state.step - 1
        return last


def first_nonfinite(source: RecordedRun, last: int) -> int | None:
    """The first step up to ``last`` whose recorded loss or norm is not finite."""
    frames = map(source.frame, range(source.run.start, last + 1))
    return next((f.step for f in frames if not (math.isfinite(f.loss) and math.isfinite(f.grad_norm))), None)


def finite(state: State) -> bool:
    """Whether every number of it is."""
    return all(bool(np.isfinite(group.flat).all()) for group in groups(state))


def start_of(source: RecordedRun, t: int) -> State:
    """State t, or the nearest before it that can be had; the first as it should be: from the seed, unless forked."""
    return source.first() if t == source.run.start else source.nearest(t)


def walk(source: RecordedRun, machine: Machine, start: int, end: int) -> Iterator[Suspect | None]:
    """Run the steps from ``start`` to before ``end``, None for each that is as recorded; ends with the first suspect.

    Where the keyframe at ``start`` cannot be read it begins earlier. A fault there is another segment's to tell.
    """
    machine.put(start_of(source, start))
    while (step := machine.state.step) < end:
        mine = step >= start
        if source.memory_changed(step):
            if mine:
                yield Suspect(step, "memory")
            return
        _, differences = machine.step()
        if mine:
            yield Suspect(step, "differs") if differences else None
        if differences:
            return
