"""How long steps and whole loops take with instruments and without: for the experiment ``overhead`` and the benchmark.

What is compared takes turns, and the fastest counts: on a shared machine what else goes on there would be told
otherwise. A round gives one figure of each, so that the rounds tell how far they can be trusted.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from minitrain import trainer
from minitrain.assembly import Parts, assemble
from minitrain.config import Config
from minitrain.data.batches import Batch
from minitrain.data.prepare import Prepared
from minitrain.hooks import Hooks
from minitrain.loop import Evaluation, Listener, StepStats, train_step
from minitrain.state import State

TURNS, BURST = 10, 5
"""In a round each way has so many turns of so many steps: the first of a turn finds the caches full of other data."""
PAGES = 5
"""How often the page is built."""

Way = Callable[[Parts], object]
"""Puts instruments on the parts of a run."""


def listener(site: str, tensor: object) -> None:
    """The cheapest Python hook: it does nothing."""


class NoHooks(list[Any]):
    """In place of `Hooks`: false without anybody being asked."""

    step = 0


def bare(parts: Parts) -> None:
    """Take even the empty dispatcher away."""
    parts.model.hooks = parts.optimizer.hooks = cast(Hooks, NoHooks())


@contextmanager
def instructions(isa: str) -> Iterator[None]:
    """Hold what is made inside to this instruction set, as MINITRAIN_ISA does."""
    before = os.environ.get("MINITRAIN_ISA")
    os.environ["MINITRAIN_ISA"] = isa
    try:
        yield
    finally:
        os.environ.pop("MINITRAIN_ISA")
        if before is not None:
            os.environ["MINITRAIN_ISA"] = before


def fastest(works: Sequence[Callable[[], object]], turns: int) -> list[float]:
    """The least seconds of each, taken in turn."""
    best = [float("inf")] * len(works)
    for _ in range(turns):
        for i, work in enumerate(works):
            since = time.perf_counter()
            work()
            best[i] = min(best[i], time.perf_counter() - since)
    return best


class Steps:
    """The same training run once for each way, each with its own instruments, a few steps at a time in turn."""

    def __init__(self, ways: Mapping[str, Way], config: Config, data: Prepared) -> None:
        self._parts = {}
        for name, way in ways.items():
            self._parts[name] = parts = assemble(config, data)
            way(parts)

    def round(self) -> dict[str, float]:
        """Seconds of the fastest step of each way, of `TURNS` × `BURST`."""
        best = dict.fromkeys(self._parts, float("inf"))
        for _ in range(TURNS):
            for name, parts in self._parts.items():
                at = parts.scheduler.step_count
                for batch in [parts.batches.batch_at(t) for t in range(at, at + BURST)]:
                    best[name] = min(best[name], fastest([partial(step, parts, batch)], 1)[0])
        return best

    @property
    def same_bits(self) -> bool:
        """Whether all are at the same state: instruments only look."""
        return len({parts.state().digest() for parts in self._parts.values()}) == 1


def step(parts: Parts, batch: Batch) -> StepStats:
    """The next step of these parts, as the loop makes it."""
    return train_step(parts.model, parts.optimizer, parts.scheduler, batch)


# Whole loops


class Page(NamedTuple):
    """Seconds of ``minitrain dashboard RUN`` from the shell, and of processor in it: on a busy machine it waits."""

    wall_s: float
    processor_s: float


VALIDATION = -1
"""In place of a step: a part of a validation."""


class Loops(NamedTuple):
    """A training loop with metrics and without, cut into short parts: seconds from one event to the next, turn by turn.

    A step ends a part, a batch of a validation does, and a validation. Each array is (turns, parts).
    """

    off: NDArray[np.float64]
    on: NDArray[np.float64]
    step: NDArray[np.int64]
    """(parts,): which step it was, or `VALIDATION`."""
    page: Page

    @staticmethod
    def seconds(turns: NDArray[np.float64]) -> float:
        """Of the loop, each part the fastest of all turns: whatever else the machine does hits none in every turn."""
        return float(turns.min(axis=0).sum())

    @property
    def longer(self) -> float:
        """The share by which the loop takes longer with metrics."""
        return self.seconds(self.on) / self.seconds(self.off) - 1

    @property
    def spread(self) -> tuple[float, float]:
        """The least and the most of ``longer`` with any one of the turns left out."""
        each = [self.longer]
        if len(self.on) > 1:
            left = [np.delete(np.arange(len(self.on)), i) for i in range(len(self.on))]
            each = [self.seconds(self.on[rows]) / self.seconds(self.off[rows]) - 1 for rows in left]
        return min(each), max(each)


class _Stamps(Listener):
    """When each part was over; the last to hear of anything."""

    def __init__(self) -> None:
        self.step: list[int] = []
        self.times = [time.perf_counter()]

    def _stamp(self, step: int) -> None:
        self.times.append(time.perf_counter())
        self.step.append(step)

    def stepped(self, stats: StepStats, state: State) -> None:
        self._stamp(stats.step)

    def evaluated(self, batch: Batch) -> None:
        self._stamp(VALIDATION)

    def validated(self, step: int, result: Evaluation) -> None:
        self._stamp(VALIDATION)


def loops(
    config: Config,
    turns: int,
    listeners: Sequence[Listener] = (),
    stop: Callable[[], bool] = lambda: False,
) -> Loops | None:
    """Train as configured, without metrics and with them in turn, and never with a record; None where it was stopped.

    The page is that of the last run.
    """
    times: dict[bool, list[NDArray[np.float64]]] = {False: [], True: []}
    for turn in range(turns):
        for on in (False, True):
            with tempfile.TemporaryDirectory() as place:
                made: list[_Stamps] = []

                def watch(parts: Parts, made: list[_Stamps] = made) -> Listener:
                    made.append(_Stamps())  # right before the loop begins
                    return made[0]

                run = Path(place) / "run"
                ended = trainer.run(_only(config, on), run, watchers=[watch], listeners=listeners, stop=stop).metrics
                if ended.ended != "complete":
                    return None
                stamps = made[0]
                times[on].append(np.diff(stamps.times))
                if on and turn == turns - 1:
                    page = build_page(run)
    return Loops(np.array(times[False]), np.array(times[True]), np.array(stamps.step), page)


def _only(config: Config, metrics: bool) -> Config:
    """This configuration without a record, and with metrics or without."""
    record = config.record.model_copy(update={"enabled": False})
    return config.model_copy(
        update={"record": record, "metrics": config.metrics.model_copy(update={"enabled": metrics})}
    )


def build_page(run: Path) -> Page:
    """The fastest of `PAGES`, once in wall and once in processor time."""
    command = [sys.executable, "-P", "-m", "minitrain", "dashboard", str(run)]
    pages = []
    for _ in range(PAGES):
        since, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        wall, after = time.perf_counter() - since, resource.getrusage(resource.RUSAGE_CHILDREN)
        pages.append((wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime))
    return Page(*(min(column) for column in zip(*pages, strict=True)))
