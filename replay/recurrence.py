"""The recurrence check: every recorded step's moments and parameters held against those before it; runs no model.

What it sees: moments that no gradient explains (v or m changed by somebody else than the update), and parameters that
are not what AdamW makes of the recorded moments. What it cannot see: whether the gradient was the right one. A scaled
gradient, or that of another batch, moves m and v as gradients do; only a replay tells.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from minitrain.errors import RunError
from minitrain.inject import Injector, maybe_inject, spelt
from minitrain.model import make_backend
from minitrain.optim import Recurrence
from minitrain.record.digests import has_digest
from minitrain.record.recorded import Moments
from minitrain.replay.follows import Excess, Follows
from minitrain.replay.source import RecordedRun, memory_change
from minitrain.tensors import Tensors, parameter_table


class Unexplained(NamedTuple):
    """A tensor whose bits do not follow. Where it is m or v, ``index`` is the element that is furthest off."""

    step: int
    kind: str
    """m, v, param; or memory: what the step read is not what the step before had left."""
    tensor: str
    index: tuple[int, ...] | None  # type: ignore[assignment]  # hides tuple's method
    recorded: float | None
    nearest: float | None
    """What some gradient leads to, nearest to what is recorded."""
    ulps: int | None
    """How many floating-point numbers lie between."""
    differing: int | None
    """Elements of the tensor that do not follow, of ``elements``."""
    elements: int
    message: str
    declared: str | None = None
    """The injections that the journal says were done in this step."""


@dataclass
class RecurrenceReport:
    """What the recurrence check found, and where it could not look."""

    steps_checked: int = 0
    """Steps whose moments were held against those before them."""
    faults: list[Unexplained] = field(default_factory=list)
    unverified: list[int] = field(default_factory=list)
    """Steps whose moments, before or after, are not to be had."""
    unverified_params: list[int] = field(default_factory=list)
    """Steps whose parameters could not be held against those before them, all or some."""
    reason: str | None = None
    """Why nothing could be checked."""

    @property
    def wrong(self) -> list[Unexplained]:
        """The faults that no injection of the journal accounts for."""
        return [fault for fault in self.faults if fault.declared is None]

    @property
    def verified(self) -> bool:
        return not (self.wrong or self.unverified or self.unverified_params or self.reason)

    def add(self, other: RecurrenceReport) -> None:
        """Take in what was found of other steps."""
        self.steps_checked += other.steps_checked
        self.faults = sorted(self.faults + other.faults, key=lambda fault: fault.step)
        self.unverified = sorted(self.unverified + other.unverified)
        self.unverified_params = sorted(self.unverified_params + other.unverified_params)


def unable(source: RecordedRun) -> str | None:
    """Why the recurrence of this run cannot be checked; None where it can."""
    if source.config.record.moments == "every_step":
        return None
    return "record.moments: keyframes keeps m and v at keyframes only; the recurrence needs those of every step"


class SegmentRecurrence:
    """The steps from ``start``, a keyframe, to before ``end``."""

    def __init__(self, source: RecordedRun, start: int, end: int, injections: bool = True) -> None:
        """With ``injections`` those of the record are no faults."""
        self._source, self._start, self._end = source, start, end
        self._injector = Injector(source.config)
        self._injector.off = not injections
        backend = make_backend(source.config.training.backend)
        self._table = parameter_table(source.config.model)
        self._follows = Follows(source.config.optimizer, backend)
        self._params = Tensors(self._table)
        self._update = Recurrence(source.config.optimizer, self._params, backend)
        self._lost = set(range(len(self._table)))
        """Tensors whose parameters are not known any more; the next keyframe has them again."""
        self.report = RecurrenceReport()

    def __iter__(self) -> Iterator[int]:
        """Check step after step; a pause after each."""
        source, report, before = self._source, self.report, None
        for t in range(self._start, self._end):
            if t == self._start or source.memory_changed(t):
                before = self._as_read(t)
                report.faults += self._changed(t)
            after, known = self._left(t), not self._lost
            if before is None or after is None:
                report.unverified.append(t)
                self._lost = set(range(len(self._table)))
            else:
                report.steps_checked += 1
                found = self._follows(before.m.flat, before.v.flat, after.m.flat, after.v.flat)
                declared = self._declared(t)
                for fault in (*self._unexplained(t, after, found), *self._moved(t, after)):
                    report.faults.append(fault._replace(declared=declared))
            if not known or before is None or after is None:
                report.unverified_params.append(t)
            before = after
            yield t

    def _as_read(self, t: int) -> Moments | None:
        """What step t read, parameters too; None, and all of them lost, where the record does not have it whole."""
        try:
            state = self._source.as_read(t)
        except RunError:
            self._lost = set(range(len(self._table)))
            return None if self._source.memory_changed(t) else self._left(t - 1)
        self._params.flat[:] = state.params.flat
        self._lost = set()
        return Moments(state.m, state.v)

    def _changed(self, t: int) -> Iterator[Unexplained]:
        """What the journal says by itself: step t read another tensor than step t-1 had left."""
        if self._source.memory_changed(t):
            n, message = memory_change(self._source, t)
            size = int(np.prod(self._table[n].shape))
            yield Unexplained(t, "memory", self._table[n].name, None, None, None, None, None, size, message)

    def _left(self, t: int) -> Moments | None:
        """The moments that step t left; None where they are damaged, which the audit of the files tells."""
        try:
            return self._source.run.moments(t + 1)
        except RunError:
            return None

    def _unexplained(self, t: int, after: Moments, found: Excess) -> Iterator[Unexplained]:
        """The worst element of each tensor of m and of v."""
        offsets = self._params.offsets
        owner = np.searchsorted(offsets, found.elements, side="right") - 1
        for n, of_m in sorted({*zip(owner.tolist(), found.of_m.tolist(), strict=True)}):
            mine = np.nonzero((owner == n) & (found.of_m == of_m))[0]
            worst = mine[np.argmax(found.ulps[mine])]
            kind, name, shape = "m" if of_m else "v", self._table[n].name, self._table[n].shape
            flat = (after.m if of_m else after.v).flat
            place = int(found.elements[worst])
            index = tuple(int(i) for i in np.unravel_index(place - int(offsets[n]), shape))
            recorded, nearest, ulps = float(flat[place]), float(found.nearest[worst]), int(found.ulps[worst])
            elements = int(offsets[n + 1] - offsets[n])
            why = "no gradient leads to" if of_m else "no gradient that explains m leads to"
            message = (
                f"step {t}: {why} {kind}.{name}{list(index)} = {recorded:.9g}, the nearest is {nearest:.9g}, {ulps} "
                f"ulp away; {len(mine)} of {elements} elements do not follow"
            )
            yield Unexplained(t, kind, name, index, recorded, nearest, ulps, len(mine), elements, message)

    def _declared(self, t: int) -> str | None:
        """The injections that changed the state which step t left, behind its update."""
        return ", ".join(spelt(one) for one in self._injector.at("state", t)) or None if self._injector else None

    def _moved(self, t: int, after: Moments) -> Iterator[Unexplained]:
        """Each tensor of parameters that the update does not lead to, if those before it were known."""
        frame = self._source.frame(t)
        settings = maybe_inject("optimizer", t, self._source.config.optimizer, self._injector)
        self._update(after.m.flat, after.v.flat, frame.lr, t + 1, settings)
        for n, (name, tensor) in enumerate(self._params.items()):
            if n not in self._lost and not has_digest(tensor, int(frame.digest_out[0, n])):
                self._lost.add(n)
                message = f"step {t}: param.{name} is not what the update makes of the recorded moments (digests)"
                yield Unexplained(t, "param", name, None, None, None, None, None, tensor.size, message)
