"""What a picture of the page consists of, and how its numbers travel: float32 in base64, never averaged.

A line of more points than it may have is drawn with fewer: of each bucket of steps its lowest, its highest and its
first value that is not finite (`report.curve.extremes`). Loss and gradient norm go whole, up to 100,000 steps, so that
the page can show each of them when it is looked at closely; the page itself draws extremes of what is in sight.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minitrain.report.curve import extremes

BLUE, SKY, RED, GREEN, PINK, AMBER, INK = "#0072B2", "#56B4E9", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#000000"
"""Okabe and Ito's colours; the style sheet has lighter ones of each for the dark."""
COLOURS = (BLUE, RED, GREEN, PINK, AMBER, SKY, INK)
DASHES: tuple[tuple[int, ...], ...] = ((1, 0), (6, 3), (2, 2), (8, 3, 2, 3), (1, 3))
LETTERS = "AB"
"""Of two runs laid over each other."""
OF_RUN = " · "
"""Between the name of a line and the letter of its run, where there are two."""
WHOLE = 100_000
"""Points of a line that is never thinned where this can be helped."""
MOST = 4000
FEW = 1200
"""Points of a line that shares its lane with many."""


@dataclass(frozen=True)
class Line:
    """One series of a lane."""

    name: str
    steps: NDArray[Any]
    values: NDArray[Any]
    colour: str = BLUE
    dash: tuple[int, ...] = (1, 0)
    width: float = 1.6
    opacity: float = 1.0
    most: int = MOST
    points: bool = False
    """Whether every value is a point as well; one that no line reaches always is."""
    stems: bool = False
    """Drawn as points alone, for what happens now and then."""
    mean_of: str = ""
    """The line of which this is the running mean; the page computes it, for its window can be changed there."""
    pair: tuple[str, str] | None = None
    """Colours of this line in run A and run B, where a lane has so few lines that the colour can tell the run."""
    spread: NDArray[Any] | None = None
    """Half the height of a band around the line."""


@dataclass(frozen=True)
class Lane:
    """A picture over the steps, with a unit of its own."""

    id: str
    title: str
    unit: str
    lines: Sequence[Line]
    log: bool = False
    height: int = 190
    references: Sequence[tuple[float, str]] = ()
    """Levels across all steps, and their names."""
    empty: str = ""
    """What is missing, where there is nothing to draw."""
    format: str = "~g"
    zero: bool = False
    reach: float | None = None
    """A value that is always in sight."""
    help: str = ""
    """How it is measured."""

    @property
    def drawn(self) -> bool:
        return any(np.isfinite(line.values).any() for line in self.lines)


@dataclass(frozen=True)
class Panel:
    """One question, the sentence that answers it, and the lanes that show why."""

    number: int
    id: str
    title: str
    question: str
    readings: Sequence[str]
    """One for each run."""
    broken: str
    """What it looks like when something is wrong."""
    lanes: Sequence[Lane] = field(default_factory=tuple)


def letters(runs: Sequence[object]) -> list[str]:
    """What two runs are called; one has no letter."""
    return list(LETTERS) if len(runs) > 1 else [""]


def running_mean(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """The mean of what is finite in the window around each value, narrower at the ends; NaN where the value is."""
    half, n = window // 2, len(values)
    finite = np.isfinite(values)
    total, count = (np.concatenate([[0.0], np.cumsum(x)]) for x in (np.where(finite, values, 0.0), finite))
    at = np.arange(n)
    low, high = np.maximum(at - np.minimum(half, at), 0), np.minimum(at + np.minimum(half, at) + 1, n)
    number = np.maximum(count[high] - count[low], 1)
    return np.where(finite, (total[high] - total[low]) / number, np.nan)


def means_settled(lines: Sequence[Line], window: int) -> list[Line]:
    """Running means of lines that will be thinned, computed before: a mean of extremes would be another number."""
    sources = {line.name: line for line in lines}
    settled = []
    for line in lines:
        source = sources.get(line.mean_of)
        if source is not None and len(source.values) > source.most:
            values = running_mean(np.asarray(source.values, np.float64), window)
            line = replace(line, mean_of="", steps=source.steps, values=values, most=FEW)
        settled.append(line)
    return settled


def packed(values: NDArray[Any], dtype: str) -> str:
    with np.errstate(over="ignore"):  # beyond float32 is infinite
        return base64.b64encode(np.ascontiguousarray(values, dtype).tobytes()).decode("ascii")


def packed_steps(steps: NDArray[Any]) -> dict[str, Any]:
    """As a rule steps are evenly spaced, which three numbers say."""
    whole = np.asarray(steps, np.int64)
    gaps = np.diff(whole)
    if len(whole) and (len(whole) == 1 or (gaps == gaps[0]).all()):
        return {"first": int(whole[0]), "by": int(gaps[0]) if len(gaps) else 1, "n": len(whole)}
    return {"i4": packed(whole, "<i4")}


def line_json(line: Line) -> dict[str, Any]:
    """What the page gets of a line."""
    told: dict[str, Any] = {"name": line.name, "points": line.points, "stems": line.stems}
    if line.mean_of:
        return told | {"mean_of": line.mean_of}
    values = np.asarray(line.values, np.float64)
    kept = extremes(np.where(np.isfinite(values), values, np.nan), line.most // 2)
    told |= {"steps": packed_steps(line.steps[kept]), "f4": packed(values[kept], "<f4")}
    if line.spread is not None:
        told["spread"] = packed(np.asarray(line.spread)[kept], "<f4")
    return told
