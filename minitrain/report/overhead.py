"""The picture of what listening costs: by how much a step is longer, against the number of sites."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from minitrain.report import picture

COLOURS = ["#0072B2", "#56B4E9", "#D55E00", "#009E73"]
"""Okabe and Ito's, which colour-blind eyes tell apart; shapes tell them apart in grey."""
SHAPES = ["circle", "square", "diamond", "triangle-up"]


class Point(NamedTuple):
    """One kind of instrument at so many sites: per cent that a step takes longer, the least and the most of it."""

    name: str
    sites: int
    middle: float
    least: float
    most: float


def draw(points: Sequence[Point], bars: Mapping[str, float], title: str, subtitle: str) -> bytes:
    """A PNG, without the network; ``bars`` are the limits, by what they are for."""
    import altair as alt

    names = list(dict.fromkeys(point.name for point in points))
    ticks = sorted({point.sites for point in points})

    def by_name(values: Sequence[Any]) -> dict[str, Any]:
        legend = alt.Legend(orient="top", title=None, symbolSize=110, symbolOpacity=1)
        scale = alt.Scale(type="ordinal", domain=names, range=list(values[: len(names)]))
        return {"shorthand": "name:N", "sort": names, "scale": scale, "legend": legend}

    x = alt.X(
        "sites:Q",
        title="sites listened at, every step (log scale)",
        scale=alt.Scale(type="log", domain=[ticks[0] / 1.3, ticks[-1] * 1.3], nice=False),
        axis=alt.Axis(values=ticks, format="d", labelOverlap=False),
    )
    y = alt.Y("middle:Q", title="longer than a bare step, %", scale=alt.Scale(zero=True, nice=True))
    data = alt.Chart(alt.NamedData("rows"))
    colour, shape = alt.Color(**by_name(COLOURS)), alt.Shape(**by_name(SHAPES))
    layers: list[Any] = [
        data.mark_rule(strokeWidth=3, opacity=0.4).encode(x, alt.Y("least:Q"), alt.Y2("most:Q"), colour),
        data.mark_line(strokeWidth=1.8).encode(x, y, colour),
        data.mark_point(filled=True, size=90, opacity=1).encode(x, y, colour, shape),
    ]
    for what, limit in bars.items():
        level = alt.Chart(alt.InlineData(values=[{"middle": limit, "text": f"bar {limit:g} %: {what}"}])).encode(y)
        layers.append(level.mark_rule(strokeDash=[5, 4], color="#555555"))
        name = level.encode(x=alt.value(6), text="text:N")
        layers.append(name.mark_text(align="left", dy=-8, fontSize=12, color="#444444"))
    return picture.png([layers], title, subtitle, [point._asdict() for point in points])
