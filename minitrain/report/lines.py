"""A picture of lines over steps, in panels below each other, every line named at its end."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from minitrain.report import picture

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
"""Okabe and Ito's, which colour-blind eyes tell apart; each line has its name beside it."""
HEIGHT, LINE = 160, 14
"""Pixels of a panel, and from one name to the next."""


Floats = NDArray[np.floating]


class Panel(NamedTuple):
    """Lines over steps, by name; ``level`` is a dashed one across."""

    title: str
    steps: Floats
    lines: Mapping[str, Floats]
    logarithmic: bool = True
    level: float | None = None


def draw(panels: Sequence[Panel], title: str, subtitle: str) -> bytes:
    """A PNG, without the network."""
    rows = [row for number, panel in enumerate(panels) for row in _rows(number, panel)]
    end = max(float(panel.steps[-1]) for panel in panels)
    charts = [_chart(number, panel, end) for number, panel in enumerate(panels)]
    return picture.png(charts, title, subtitle, rows, height=HEIGHT)


def _rows(number: int, panel: Panel) -> list[dict[str, Any]]:
    return [
        {"panel": number, "series": str(i), "step": float(t), "value": float(x)}
        for i, values in enumerate(panel.lines.values())
        for t, x in zip(panel.steps, values, strict=True)
        if math.isfinite(x) and (x > 0 or not panel.logarithmic)
    ]


def _chart(number: int, panel: Panel, end: float) -> list[Any]:
    import altair as alt

    low, high = domain(panel)
    y = alt.Y(
        "value:Q",
        title=panel.title,
        scale=alt.Scale(type="log" if panel.logarithmic else "linear", domain=[low, high], nice=False),
        axis=alt.Axis(tickCount=4, format="~g"),
    )
    x = alt.X("step:Q", title="step", scale=alt.Scale(domain=[0, end], nice=False))
    scale = alt.Scale(domain=[str(i) for i in range(len(COLOURS))], range=COLOURS)
    colour = alt.Color("series:N", scale=scale, legend=None)
    lines = alt.Chart(alt.NamedData("rows")).transform_filter(f"datum.panel === {number}")
    layers: list[Any] = [lines.mark_line(strokeWidth=1.8).encode(x, y, colour)]
    if panel.level is not None:
        rule = alt.Chart(alt.InlineData(values=[{"value": panel.level}])).mark_rule(strokeDash=[4, 3], color="#555555")
        layers.insert(0, rule.encode(y))
    names = [
        {"series": str(i), "pixel": pixel, "text": name}
        for (i, name), pixel in zip(enumerate(panel.lines), places(panel, low, high), strict=True)
    ]
    text = alt.Chart(alt.InlineData(values=names)).mark_text(align="left", fontSize=12)
    layers.append(text.encode(x=alt.value(766), y=alt.Y("pixel:Q", scale=None, axis=None), text="text:N", color=colour))
    return layers


def domain(panel: Panel) -> tuple[float, float]:
    """The least and the greatest that is shown, with a little room."""
    values = np.concatenate([np.asarray(line, np.float64) for line in panel.lines.values()])
    values = values[np.isfinite(values) & ((values > 0) | (not panel.logarithmic))]
    if panel.level is not None:
        values = np.append(values, panel.level)
    low, high = float(values.min()), float(values.max())
    if panel.logarithmic:
        return low / 1.15, high * 1.15
    room = 0.06 * (high - low) or 1.0
    return low - room, high + room


def places(panel: Panel, low: float, high: float) -> list[float]:
    """For each line the pixel, from the top, of its name: at its last value, but no two names upon each other."""
    f = math.log if panel.logarithmic else float

    def wanted(values: Floats) -> float:
        there = values[np.isfinite(values) & ((values > 0) | (not panel.logarithmic))]
        last = float(there[-1]) if len(there) else low
        return HEIGHT * (f(high) - f(last)) / (f(high) - f(low))

    at = [wanted(np.asarray(values)) for values in panel.lines.values()]
    order = np.argsort(at, kind="stable")
    placed = np.array(at, np.float64)[order]
    for i in range(1, len(placed)):
        placed[i] = max(placed[i], placed[i - 1] + LINE)
    over = placed[-1] - HEIGHT
    if over > 0:  # back up from the bottom
        placed[-1] = HEIGHT
        for i in range(len(placed) - 2, -1, -1):
            placed[i] = min(placed[i], placed[i + 1] - LINE)
    found = np.empty(len(placed))
    found[order] = placed
    return found.tolist()
