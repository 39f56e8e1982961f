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
WORSE = 0.02
"""Of the lowest validation loss: how far above it is no longer noise."""


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


def spike_steps(series: Series) -> NDArray[np.intp]:
    """The steps after `WINDOW` whose number is more than `SPIKE` deviations above what was usual before them."""
    numbers = np.asarray(series, np.float64)
    if len(numbers) <= WINDOW + 1:
        return np.empty(0, np.intp)
    finite = np.isfinite(numbers)
    windows = np.lib.stride_tricks.sliding_window_view(np.where(finite, numbers, 0.0), WINDOW)[1:-1]
    there = np.lib.stride_tricks.sliding_window_view(finite, WINDOW)[1:-1]
    count = np.maximum(there.sum(axis=1), 1)
    mean = windows.sum(axis=1) / count
    deviation = np.sqrt((np.where(there, windows - mean[:, np.newaxis], 0.0) ** 2).sum(axis=1) / count)
    with np.errstate(invalid="ignore"):
        over = (numbers[WINDOW + 1 :] > mean + SPIKE * deviation) & there.any(axis=1)
    return np.flatnonzero(over) + WINDOW + 1


def spikes(series: Series) -> list[Spike]:
    """Every step after `WINDOW` whose number is a spike, each held against the steps right before it."""
    found = []
    for step in spike_steps(series).tolist():
        frozen = usual(series, step)
        found.append(Spike(step, frozen.sigmas(series[step]), recovery(series, step, frozen)))
    return found


def overfit_onset(steps: Series, val: Series, train: Series) -> int | None:
    """The validation step from which on validation only gets worse while training gets better; None where it does not.

    ``val`` and ``train`` are losses at the same steps. The gap between them grows from the start; overfitting begins
    where it grows more than training falls, that is, at the last step to which validation does not come back. It is
    said only if the last third behind it averages more than `WORSE` above it and training has fallen meanwhile.
    """
    at, losses, trained = (np.asarray(x, np.float64) for x in (steps, val, train))
    known = np.isfinite(losses) & np.isfinite(trained)
    at, losses, trained = at[known], losses[known], trained[known]
    if len(at) < 3:
        return None
    lowest = len(losses) - 1 - int(losses[::-1].argmin())
    behind = losses[lowest + 1 :]
    if len(behind) < 2 or trained[-1] >= trained[lowest]:
        return None
    last = behind[-max(1, len(behind) // 3) :]
    return int(at[lowest]) if last.mean() > losses[lowest] * (1 + WORSE) else None
