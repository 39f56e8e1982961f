"""The same seven panels in a terminal: the sentences, and a line of blocks for what matters most in each."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from minitrain.config import differing_keys
from minitrain.dashboard.checks import checks, verdict
from minitrain.dashboard.gather import RunData
from minitrain.dashboard.header import first_difference, headline
from minitrain.dashboard.lanes import OF_RUN, Lane, Line, letters
from minitrain.dashboard.panels import panels
from minitrain.dashboard.readings import short

WIDTH = 80
BLOCKS = "▁▂▃▄▅▆▇█"
NAME, GRAPH = 22, 34
LINES = {"loss": 3, "lr": 1, "norm": 1, "batch": 3, "dead": 2, "updates": 3, "ratios": 2}
"""Lines of a lane that are drawn; of the others four."""


def sparkline(values: NDArray[np.floating], width: int, log: bool = False) -> str:
    """A block a bucket of steps: of each the value that lies farthest from the bucket's median, so a spike is seen.

    The highest of all and the lowest of all are drawn too. A bucket without a finite value is a space, one with a value
    that is not finite and none that is, ``×``.
    """
    known = np.isfinite(values) & ((values > 0) if log else True)
    if not known.any():
        return ("×" if len(values) else "") * min(width, len(values))
    size = np.where(known, np.log(np.where(known & (values > 0), values, 1.0)) if log else values, np.nan)
    low, high = float(np.nanmin(size)), float(np.nanmax(size))
    text = ""
    for part in np.array_split(size, min(width, len(size))):
        finite = part[np.isfinite(part)]
        if not len(finite):
            text += "×" if len(part) else " "
            continue
        centre = float(np.median(finite))
        top, bottom = float(finite.max()), float(finite.min())
        x = top if top == high or (top - centre >= centre - bottom and bottom != low) else bottom
        text += BLOCKS[0 if high == low else round((x - low) / (high - low) * (len(BLOCKS) - 1))]
    return text


def summary(runs: Sequence[RunData], style: bool = False) -> str:
    """At most 80 columns. With ``style`` titles are bold, for a terminal."""

    def bold(text: str) -> str:
        return f"\033[1m{text}\033[0m" if style else text

    lines = []
    for letter, run in zip(letters(runs), runs, strict=True):
        name = f"{letter} {run.name}" if letter else run.name
        lines += [bold(name), *_wrapped(headline(run)), *_wrapped(verdict(checks(run)))]
        lines += [line for check in checks(run) if check.verdict == "fail" for line in _failed(check)]
        lines += [line for note in run.notes for line in _wrapped(note)]
        lines += [line for mark in run.marks[:8] for line in _wrapped(f"step {mark.step:,}: {mark.text}")]
        lines.append("")
    if len(runs) == 2:
        step = first_difference(*runs)
        lines.append(f"losses first differ at step {step:,}" if step is not None else "losses are equal")
        keys = differing_keys(runs[0].config, runs[1].config)
        lines += ["settings that differ, A to B:" if keys else "no setting differs", *sum(map(_wrapped, keys), []), ""]
    for panel in panels(runs):
        lines.append(bold(f"{panel.number}  {panel.title}"))
        for letter, reading in zip(letters(runs), panel.readings, strict=True):
            lines += _wrapped(f"{letter}: {reading}" if letter else reading)
        for lane in panel.lanes:
            graphs = _graphs(lane)
            lines += _wrapped(f"{lane.title}:") if graphs and len(panel.lanes) > 1 else []
            lines += graphs
        lines.append("")
    return "\n".join(lines[:-1])


def _failed(check: tuple[str, ...]) -> list[str]:
    _, question, measured, threshold, _, advice = check
    return _wrapped(f"✗ {question} {measured}, expected {threshold}: look at {advice}")


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent="   ", subsequent_indent="   ", break_long_words=True)


def _graphs(lane: Lane) -> list[str]:
    """Of two runs each line of the first, and that of the second under it."""
    shown: dict[str, list[Line]] = {}
    for line in lane.lines:
        if not line.mean_of and not line.stems and np.isfinite(line.values).any():
            shown.setdefault(line.name.partition(OF_RUN)[0], []).append(line)
    first = list(shown.values())[: LINES.get(lane.id, 4)]
    return [_graph(line, lane) for lines in first for line in lines]


def _graph(line: Line, lane: Lane) -> str:
    values = np.asarray(line.values, np.float64)
    known = values[np.isfinite(values)]
    name, dot, letter = line.name.partition(OF_RUN)
    room = NAME - len(dot + letter)
    name = (name if len(name) <= room else name[: room - 1] + "…") + dot + letter
    ends = f"{short(float(known.min()))} to {short(float(known.max()))}"
    return f"   {name:<{NAME}} {sparkline(values, GRAPH, lane.log):<{GRAPH}} {ends}"[:WIDTH].rstrip()
