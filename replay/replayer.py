"""Replay: from a recorded run to any of its steps, live."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from minitrain import tensors
from minitrain.data.batches import Batch
from minitrain.errors import RunError
from minitrain.hooks import Hooks
from minitrain.loop import StepStats
from minitrain.record.digests import rng_words
from minitrain.record.journal import Frame
from minitrain.record.recorded import Run, open_run
from minitrain.replay.bundle import open_bundle
from minitrain.replay.evidence import Divergence, locate
from minitrain.replay.machine import Machine
from minitrain.replay.source import RecordedRun, Source, require_match, span
from minitrain.replay.verifier import Difference
from minitrain.state import State
from minitrain.tensors import phase_of


class SiteReport(NamedTuple):
    """What passed a site. ``min``, ``max`` and ``mean_abs`` are over its finite elements, NaN where there is none."""

    site: str
    phase: str
    finite: bool
    min: float
    max: float
    mean_abs: float
    digest_match: bool | None
    """Whether it is what was recorded; None where nothing was recorded of it."""


@dataclass(frozen=True)
class StepReport:
    """A step that was run again, held against its record."""

    stats: StepStats
    recorded: Frame
    sites: list[SiteReport]
    """In the order in which the step passed them."""
    differences: list[Difference]
    """In the order of time."""
    divergence: Divergence | None
    """The first of them, with its evidence."""

    @property
    def step(self) -> int:
        return self.stats.step

    @property
    def verified(self) -> bool:
        """Whether every bit that was recorded is there again."""
        return not self.differences


class Replay:
    """A recorded run that can be run again from any of its states.

    >>> live = Replay("runs/a").at(500)
    >>> live.state.params["lm_head.bias"], live.batch.ids, live.rng
    >>> live.step().verified
    """

    def __init__(
        self,
        run: RecordedRun | Run | Path | str,
        *,
        threads: int = 1,
        allow_mismatch: bool = False,
        injections: bool = True,
        blind: bool = False,
    ) -> None:
        """``run`` is a recorded run, its folder, or a bundle. No bit depends on ``threads``.

        Without ``injections`` each step is run as it should have been, from the state that was recorded. ``blind``
        does not read what the record says of them (of a Run, what it was opened with counts).

        Raises RunError where the same bits are not promised here, which ``allow_mismatch`` only notes in
        ``mismatches``; and where the run or its data cannot be read.
        """
        self.source = _source(run, blind)
        self.mismatches = require_match(self.source, allow_mismatch)
        self._allowed = allow_mismatch
        self.injections, self.blind = injections, blind
        self.machine = Machine(self.source, threads, injections)

    @property
    def hooks(self) -> Hooks:
        """Where to listen: ``with replay.hooks.listen(f, sites): ...``"""
        return self.machine.hooks

    def at(self, t: int) -> Live:
        """State t, live: from the record, or where it is not there whole from an earlier state and the steps between.

        Raises RunError outside the recorded steps, and where those steps leave other bits than were recorded.
        """
        steps = self.source.steps
        if t not in steps:
            elsewhere = self.source.run.before(t) if isinstance(self.source, RecordedRun) else ""
            raise RunError(
                f"step {t}: expected one of the recorded steps {span(steps)} of {self.source.path}, got {t}{elsewhere}"
            )
        self.reach(t)
        return Live(self)

    def reach(self, t: int) -> State:
        """Bring the live parts to state t, which may be the last; views of their buffers.

        Raises RunError where the record does not lead there.
        """
        start = self.source.nearest(t)
        self.machine.put(start)
        self.machine.injector.off = False  # on the way to what was recorded
        for step in range(start.step, t):
            _, differences = self.machine.step()
            if differences and not self._allowed:
                raise RunError(
                    f"{self.source.path}: expected step {step}, run again from state {start.step}, to be as it was "
                    f"recorded, got another {differences[0].site}; state {t} cannot be had from there "
                    f"(minitrain verify {self.source.path} tells all faults)"
                )
        self.machine.injector.off = not self.injections
        return self.machine.state

    def take(self, state: State) -> Live:
        """This state, live, wherever it is from; its bits are copied."""
        self.machine.put(state)
        return Live(self)


class Live:
    """A step about to be run: what it reads, and the parts that will run it. They are the replay's: one at a time."""

    def __init__(self, replay: Replay) -> None:
        self._source, self._machine = replay.source, replay.machine

    @property
    def hooks(self) -> Hooks:
        """Where to listen: `minitrain.Inspector` takes this step for it."""
        return self._machine.hooks

    @property
    def state(self) -> State:
        """Views of the live buffers, not copies: the step reads and changes them."""
        return self._machine.state

    @property
    def batch(self) -> Batch:
        """What the coming step reads."""
        return self._machine.batch

    @property
    def texts(self) -> list[str]:
        """The samples of the batch as text."""
        return self._source.texts(self.batch)

    @property
    def rng(self) -> NDArray[np.uint64]:
        """(2, 4): seed, purpose and place of both random streams before the coming step draws from them."""
        return rng_words(self._machine.config, self._source.batches, self.state.step)

    def step(self, sites: str = "*") -> StepReport:
        """Run the step with the loop that trained, and go on to the next. The report has the ``sites`` of this glob.

        Raises RunError behind the last recorded step, and HookError.
        """
        with self._machine.hooks.probe(sites) as probe:
            stats, differences = self._machine.step()
        measured, verifier = probe.stats, self._machine.verifier
        rows = []
        for site in fnmatch.filter(tensors.sites(self._machine.config.model), sites):
            s = measured[site]
            match = verifier.match(site)
            rows.append(SiteReport(site, phase_of(site), s.finite, s.min, s.max, s.mean_abs, match))
        first = locate(self._source, differences[0], self.state) if differences else None
        return StepReport(stats, verifier.frame, rows, list(differences), first)


def _source(run: RecordedRun | Run | Path | str, blind: bool) -> Source:
    if isinstance(run, RecordedRun):
        return run
    if isinstance(run, Run):
        return RecordedRun(run)
    path = Path(run)
    return open_bundle(path, blind=blind) if path.is_file() else RecordedRun(open_run(path, blind=blind))
