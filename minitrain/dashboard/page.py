"""The page as one HTML file: the template, the style sheet, the script, Vega's bundle and the numbers.

Everything that comes from a run is escaped on its way in: text by `html.escape`, numbers and texts of the data by
`embedded`, in which nothing can end a script or begin a comment.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Sequence
from functools import cache
from html import escape
from importlib import resources
from string import Template
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minitrain.dashboard.gather import RunData
from minitrain.dashboard.header import header
from minitrain.dashboard.lanes import (
    MOST,
    OF_RUN,
    WHOLE,
    Lane,
    Line,
    Panel,
    letters,
    line_json,
    means_settled,
    packed,
    packed_steps,
)
from minitrain.dashboard.panels import panels
from minitrain.dashboard.pictures import overview
from minitrain.dashboard.specs import specification, vega_lite_version
from minitrain.environment import versions
from minitrain.report.curve import extremes

BUNDLE = "window.vegaEmbed = vegaEmbed;"
"""What the plotting library is asked to leave in the page."""
BAR = (
    ("loss", "train, each step", "loss"),
    ("lr", "learning rate", "lr"),
    ("norm", "before the clip", "norm"),
    ("norm", "after the clip", "clipped"),
    ("batch", "regular verbs, each step", "share of regular verbs"),
    ("batch", "rare tokens, each step", "of rare tokens"),
)
"""What is told of a chosen step: lane, line, and what it is called there."""
BATCH_NUMBERS = 60_000
"""Sample numbers that the page holds; of longer runs, those of the steps that stand out."""
SAMPLES = 400_000
"""Characters of samples' ids and texts."""


def page(runs: Sequence[RunData]) -> str:
    """The page of one run, or of two."""
    drawn = panels(runs)
    strip = overview(runs)
    lanes = [strip, *(lane for panel in drawn for lane in panel.lanes if lane.drawn)]
    window = max(run.log.window for run in runs)
    told = {lane.id: _lane_json(lane, _description(lane, drawn), window) for lane in lanes}
    names = " and ".join(run.name for run in runs)
    return Template(_file("page.html")).substitute(
        title=escape(f"{names} · minitrain"),
        version=escape(str(versions()["minitrain"])),
        style=_file("page.css"),
        header=header(runs),
        overview=_figure(strip),
        links="".join(f'<a href="#h-{panel.id}">{panel.number} {escape(panel.title)}</a>' for panel in drawn),
        panels="\n".join(_section(panel, runs) for panel in drawn),
        footer=_footer(),
        data=embedded(_data(runs) | {"lanes": told}),
        bundle=bundle(),
        script=_file("numbers.js") + _file("page.js"),
    )


@cache
def bundle() -> str:
    """The plotting library, as it may stand in a script element. Putting it together takes a second."""
    from vl_convert import javascript_bundle

    code = javascript_bundle(BUNDLE, vl_version=vega_lite_version())
    return code.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def embedded(value: Any) -> str:
    """Strict JSON that may stand in a script element, whatever its texts hold."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"), ensure_ascii=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _file(name: str) -> str:
    return (resources.files("minitrain.dashboard") / name).read_text(encoding="utf-8")


# Numbers


def _lane_json(lane: Lane, description: str, window: int) -> dict[str, Any]:
    return {
        "title": lane.title,
        "description": description,
        "log": lane.log,
        "zero": lane.zero,
        "levels": [{"value": value, "text": text} for value, text in lane.references]
        + ([{"value": lane.reach, "text": ""}] if lane.reach else []),
        "lines": [line_json(line) for line in means_settled(lane.lines, window)],
        "spec": specification(lane, description, overview=lane.id == "overview"),
    }


def _description(lane: Lane, drawn: Sequence[Panel]) -> str:
    """What a screen reader says of the picture."""
    names = ", ".join(line.name for line in lane.lines)
    for panel in drawn:
        if lane in panel.lanes:
            return f"{lane.title} by step: {names}. {' '.join(panel.readings)}"
    return "Train loss by step, small: drag to choose the steps that the pictures below show."


def _data(runs: Sequence[RunData]) -> dict[str, Any]:
    """All but the lanes."""
    first, suffix = runs[0], [OF_RUN + letter if letter else "" for letter in letters(runs)]
    return {
        "name": first.name,
        "start": min(run.start for run in runs),
        "end": max(run.end for run in runs),
        "window": max(run.log.window for run in runs),
        "logged": packed_steps(np.unique(np.concatenate([run.log.step for run in runs]).astype(np.int64))),
        "marks": [
            {"step": mark.step, "kind": mark.kind, "text": mark.text + end}
            for run, end in zip(runs, suffix, strict=True)
            for mark in run.marks
        ],
        "spikes": [
            {
                "step": spike.step,
                "sigmas": round(spike.sigmas, 1) if math.isfinite(spike.sigmas) else None,
                "value": finite(run.log.loss[np.searchsorted(run.log.step, spike.step)]),
            }
            for run in runs
            for spike in run.spikes
        ],
        "bar": [[lane, name + end, label + end] for end in suffix for lane, name, label in BAR],
        "runs": [{"recorded": [run.recorded.start, run.recorded.stop], "command": replay_command(run)} for run in runs],
        "unrecorded": "this step was not recorded, so it cannot be replayed",
        "batches": _batches(first) if len(runs) == 1 else None,
    }


def finite(x: float) -> float | None:
    """JSON has no NaN."""
    return float(x) if math.isfinite(x) else None


def replay_command(run: RunData) -> str:
    """With ``{step}`` where the step goes."""
    return f"minitrain replay {shlex.quote(run.path)} --step {{step}}"


def _batches(run: RunData) -> dict[str, Any] | None:
    """Which samples each step read: of all steps, or of those that stand out."""
    if run.rows is None:
        return None
    size = run.rows.shape[1]
    kept = _telling_steps(run, max(1, BATCH_NUMBERS // (2 * size)))
    rows = run.rows[kept]
    samples, room = {}, SAMPLES
    for row in np.unique(rows[rows >= 0]).tolist():
        if row < len(run.samples):
            samples[str(row)] = [text[:200] for text in run.samples[row]]
            room -= sum(map(len, samples[str(row)]))
        if room < 0:
            break
    steps = packed_steps(kept + run.recorded.start)
    return {"steps": steps, "size": size, "rows": packed(rows.ravel(), "<i4"), "samples": samples}


def _telling_steps(run: RunData, most: int) -> NDArray[np.intp]:
    """Rows of the record: all, or those where loss or norm is an extreme."""
    if run.rows is None or len(run.rows) <= 2 * most:
        return np.arange(0 if run.rows is None else len(run.rows))
    steps = [run.log.step[extremes(values, most // 2)] for values in (run.log.loss, run.log.norm)]
    found = np.unique(np.concatenate(steps)).astype(np.intp) - run.recorded.start
    return found[(found >= 0) & (found < len(run.rows))]


# Words and frames


def _section(panel: Panel, runs: Sequence[RunData]) -> str:
    readings = "".join(
        f'<p class="reading">{f"<b>{letter}</b> " if letter else ""}{escape(reading)}</p>'
        for letter, reading in zip(letters(runs), panel.readings, strict=True)
    )
    helps = "".join(f"<p>{escape(lane.title)}: {escape(lane.help)}</p>" for lane in panel.lanes if lane.help)
    return (
        f'<section class="panel" id="p-{panel.id}" aria-labelledby="h-{panel.id}">'
        f'<h2 id="h-{panel.id}"><span class="number">{panel.number}</span>{escape(panel.title)}</h2>'
        f'<p class="question">{escape(panel.question)}</p>{readings}'
        f"{''.join(map(_figure, panel.lanes))}"
        f"<details><summary>what it shows when broken, and how it is measured</summary>"
        f"<p>{escape(panel.broken[0].upper() + panel.broken[1:])}.</p>{helps}</details></section>"
    )


def _figure(lane: Lane) -> str:
    """The frame that the script draws into, with its legend; a sentence where there is nothing to draw."""
    strip = lane.id == "overview"
    if not lane.drawn and not strip:
        return f'<p class="empty"><b>{escape(lane.title)}.</b> {escape(lane.empty)}</p>'
    unit = f'<span class="unit">{escape(lane.unit)}</span>' if lane.unit else ""
    scale = (
        f'<button type="button" class="scale" title="Scale of the values">{"log" if lane.log else "linear"}</button>'
    )
    save = '<button type="button" class="save" title="Save this picture">SVG</button>'
    save += ' <button type="button" class="numbers" title="Save the numbers in sight">CSV</button>'
    caption = f'<figcaption><b>{escape(lane.title)}</b>{unit}<span class="tools">{scale} {save}</span></figcaption>'
    legend = "".join(map(_entry, lane.lines)) + "".join(_level_entry(text) for _, text in lane.references)
    what = "drag to choose the steps in sight" if strip else "arrow keys choose a step, + and - zoom, Escape shows all"
    above = "" if strip else f'{caption}<div class="legend">{legend}</div>'
    return (
        f'<figure class="lane" data-lane="{lane.id}">{above}'
        f'<div class="plot"><div class="vis" style="min-height:{lane.height + 34}px"></div>'
        f'<div class="over" tabindex="0" role="group" aria-label="{escape(lane.title)}: {what}"></div></div></figure>'
    )


def swatch(line: Line) -> str:
    """How a line looks."""
    dash = "" if line.dash == (1, 0) else f' stroke-dasharray="{" ".join(map(str, line.dash))}"'
    if line.stems:
        shape = f'<path d="M8 2 L12 9 L4 9 Z" fill="{line.colour}"/>'
    else:
        shape = (
            f'<line x1="0" x2="26" y1="6" y2="6" stroke="{line.colour}" stroke-width="{max(line.width, 1.2)}"{dash}/>'
        )
        if line.points:
            shape += f'<circle cx="13" cy="6" r="2.6" fill="{line.colour}"/>'
    return f'<svg width="26" height="12" aria-hidden="true" opacity="{max(line.opacity, 0.6)}">{shape}</svg>'


def _entry(line: Line) -> str:
    name = escape(line.name)
    return (
        f'<button type="button" aria-pressed="false" data-series="{name}" title="Bring out">'
        f"{swatch(line)}{name}</button>"
    )


def _level_entry(text: str) -> str:
    mark = '<svg width="26" height="12" aria-hidden="true"><line x1="0" x2="26" y1="6" y2="6" stroke="#000000" '
    return f'<span class="level">{mark}stroke-width="1.4" stroke-dasharray="5 4"/></svg>{escape(text)}</span>'


def _footer() -> str:
    return (
        '<footer class="soft"><p>Drag in any picture to zoom all of them; a double click or Escape shows all steps '
        "again. A click chooses a step and names the command that replays it. A name in a legend brings out its line. "
        f"The address of the page keeps what is in sight. Lines show every extreme: more than {WHOLE:,} losses or "
        f"norms, or {MOST:,} points of another line, are thinned to the lowest and highest of each bucket, none is "
        "averaged.</p></footer>"
    )
