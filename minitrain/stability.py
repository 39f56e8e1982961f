"""What is called a spike, and when a run is over it: pure functions over a series of numbers, one a step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Series = Sequence[float] | NDArray[np.float64]

WINDOW = 100
"""Steps that say what is usual."""
SPIKE = 3.0
"""Standard deviations above the usual that are a spike."""
CALM = 0.5
"""Standard deviations above the usual that are not worth a word any more."""
PATIENCE = 50
"""Steps in which a run is to be over its spike."""


class Usual(NamedTuple):
    """Mean and population standard deviation of the `WINDOW` numbers before a step."""

    mean: float
    deviation: float

    def sigmas(self, x: float) -> float:
        """How many deviations x lies above the mean; NaN where there is no deviation."""
        return (x - self.mean) / self.deviation if self.deviation > 0 else math.nan


class Spike(NamedTuple):
    """A number more than `SPIKE` deviations above what was usual before its step."""

    step: int
    sigmas: float
    recovery: int | None
    """Steps from there to the first that is back within `CALM`; None where none of the next `PATIENCE` is."""


def usual(series: Series, step: int) -> Usual:
    """What was usual before ``step``, which has at least `WINDOW` steps before it. Numbers not finite do not count."""
    before = np.asarray(series[step - WINDOW : step], np.float64)
    finite = before[np.isfinite(before)]
    return Usual(float(finite.mean()), float(finite.std())) if len(finite) else Usual(math.nan, math.nan)


def recovery(series: Series, step: int, frozen: Usual) -> int | None:
    """Steps from ``step`` to the first behind it that is back within `CALM` of ``frozen``, among `PATIENCE` steps."""
    limit = frozen.mean + CALM * frozen.deviation
    behind = np.asarray(series[step + 1 : step + 1 + PATIENCE], np.float64)
    back = np.flatnonzero(behind <= limit)
    return int(back[0]) + 1 if len(back) else None


def spikes(series: Series) -> list[Spike]:
    """Every step after `WINDOW` whose number is a spike, each held against the steps right before it."""
    found = []
    for step in range(WINDOW + 1, len(series)):
        frozen = usual(series, step)
        if series[step] > frozen.mean + SPIKE * frozen.deviation:
            found.append(Spike(step, frozen.sigmas(series[step]), recovery(series, step, frozen)))
    return found
