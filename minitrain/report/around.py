"""The picture of an injection: a run and the same run without it, in panels below each other, around its step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from minitrain.report import picture
from minitrain.report.log import Floats, Log

BEFORE, BEHIND = 30, 70
"""Steps that are shown."""
MARK = "#D55E00"
WITH, WITHOUT = "with the injection", "baseline"


class Panel(NamedTuple):
    """One quantity of both runs."""

    title: str
    step: Floats
    injected: Floats
    twin: Floats
    note: str = ""
    logarithmic: bool = False
    clip: float | None = None


def loss(log: Log, twin: Log, setting: str = "") -> Panel:
    """Of both runs; with the setting under which they were made, if it is another."""
    return Panel("loss (nats per token)", log.step, log.loss, twin.loss, setting)


def norm(log: Log, twin: Log, clip: float | None) -> Panel:
    """Before the clip, which is drawn too."""
    return Panel("gradient norm (log scale)", log.step, log.norm, twin.norm, "before the clip", True, clip)


def ratio(what: str, step: int, behind: Sequence[float | None]) -> Panel:
    """Of something that was 1 up to ``step``, and is ``behind`` in the states that follow."""
    values = np.array([1.0] * (BEFORE + 1) + [np.nan if x is None else x for x in behind])
    steps = np.arange(step - BEFORE, step + 1 + len(behind), dtype=np.float64)
    return Panel("ratio (log scale)", steps, values, np.ones(len(values)), what, True)


def draw(panels: Sequence[Panel], step: int, what: str, title: str, subtitle: str) -> bytes:
    """A PNG, without the network: the injected run broad and blue, the baseline thin and dashed upon it."""
    rows = [row for number, panel in enumerate(panels) for row in _rows(number, panel, step)]
    charts = [_chart(number, panel, step, what) for number, panel in enumerate(panels)]
    return picture.png(charts, title, subtitle, rows, height=760 // (len(panels) + 1))


def _rows(number: int, panel: Panel, step: int) -> list[dict[str, Any]]:
    shown = (panel.step >= step - BEFORE) & (panel.step <= step + BEHIND)
    return [
        {"panel": number, "series": series, "step": float(t), "value": float(x) if np.isfinite(x) else None}
        for series, values in ((WITH, panel.injected), (WITHOUT, panel.twin))
        for t, x in zip(panel.step[shown], values[shown], strict=True)
    ]


def _chart(number: int, panel: Panel, step: int, what: str) -> list[Any]:
    import altair as alt

    names = [WITH, WITHOUT]

    def by_series(values: Sequence[Any]) -> dict[str, Any]:
        legend = alt.Legend(orient="top", title=None, symbolType="stroke", symbolSize=500) if number == 0 else None
        scale = alt.Scale(type="ordinal", domain=names, range=list(values))
        return {"shorthand": "series:N", "sort": names, "scale": scale, "legend": legend}

    x = alt.X("step:Q", title="step", scale=alt.Scale(domain=[step - BEFORE, step + BEHIND], nice=False))
    scale = alt.Scale(type="log" if panel.logarithmic else "linear", zero=False, nice=False, padding=12)
    y = alt.Y("value:Q", title=panel.title, scale=scale, axis=alt.Axis(tickCount=5))
    lines = alt.Chart(alt.NamedData("rows")).transform_filter(f"datum.panel === {number}").mark_line()
    colour, width, dash = [picture.MODEL, picture.BASELINE], [3.2, 1.4], [[1, 0], [5, 3]]
    style = alt.Color(**by_series(colour)), alt.StrokeWidth(**by_series(width)), alt.StrokeDash(**by_series(dash))
    wall = alt.Chart(alt.InlineData(values=[{"step": step, "text": f"{what}, step {step:,}"}])).encode(x)
    layers: list[Any] = [wall.mark_rule(strokeWidth=1.5, color=MARK), lines.encode(x, y, *style)]
    if number == 0:
        above = wall.mark_text(align="left", dx=5, fontSize=12, color=MARK)
        layers.append(above.encode(y=alt.value(-8), text="text:N"))
    if panel.note:
        note = alt.Chart(alt.InlineData(values=[{"text": panel.note}])).mark_text(align="right", fontSize=12)
        layers.append(note.encode(x=alt.value("width"), y=alt.value(-8), text="text:N"))
    if panel.clip is not None:
        level = alt.Chart(alt.InlineData(values=[{"value": panel.clip, "text": f"clip {panel.clip:g}"}])).encode(y)
        layers.append(level.mark_rule(strokeDash=[2, 3], color="#888888"))
        name = level.encode(x=alt.value("width"), text="text:N")
        layers.append(name.mark_text(align="right", dx=-6, dy=-9, fontSize=12, stroke="white", strokeWidth=5))
        layers.append(name.mark_text(align="right", dx=-6, dy=-9, fontSize=12, color="#666666"))
    return layers
