"""A lane as a Vega-Lite specification, made by Altair. Numbers join it in the page; here is only how they are drawn.

The page sets two parameters, ``lo`` and ``hi``, the steps in sight, and one, ``lit``, the names of lines that are not
faded. Four sets of rows are named: ``rows`` (step, value, series, alone, low, high), ``marks`` and ``spikes`` (step,
kind) and ``levels`` (value, text). Colours, dashes and widths are those of the lines; text and grid get theirs from the
style sheet, so that light, dark and print are matters of CSS.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from minitrain.dashboard.lanes import AMBER, GREEN, INK, PINK, RED, Lane

if TYPE_CHECKING:
    import altair as alt

MARKS = {"injection": RED, "alert": PINK, "broken": PINK, "forked": INK, "best": GREEN, "onset": AMBER}
MARK_DASHES = {
    "injection": [1, 0],
    "alert": [4, 2],
    "broken": [1, 0],
    "forked": [1, 3],
    "best": [2, 3],
    "onset": [6, 3],
}
OWN: Literal["independent"] = "independent"
AXIS = 52
"""Pixels of the value axis: the same in all lanes, so that a step stands in one vertical line down the page."""


def specification(lane: Lane, description: str, *, overview: bool = False) -> dict[str, Any]:
    """The chart of this lane, as JSON."""
    import altair as alt

    x = alt.X(
        "step:Q",
        title=None,
        scale=alt.Scale(domainMin=alt.ExprRef("lo"), domainMax=alt.ExprRef("hi"), nice=False, zero=False),
        axis=alt.Axis(grid=False, format=",d", tickMinStep=1, tickCount=8, labelFlush=True),
    )
    scale = alt.Scale(type="log" if lane.log else "linear", zero=lane.zero, nice=not lane.log, padding=4)
    axis = None if overview else alt.Axis(tickCount=5, format=lane.format, minExtent=AXIS, maxExtent=AXIS)
    y = alt.Y("value:Q", title=None, scale=scale, axis=axis)
    layers = [*_marks(alt, x), *_lines(alt, x, y, lane)]
    if lane.references:
        layers += _levels(alt, y)
    chart = (
        alt.layer(*layers)
        .resolve_scale(color=OWN, strokeDash=OWN, strokeWidth=OWN, opacity=OWN)
        .properties(width="container", height=lane.height, description=description, background="transparent")
        .properties(autosize=alt.AutoSizeParams(type="fit-x", contains="padding"))
        .configure_view(stroke=None)
        .configure_axis(domain=False, labelFontSize=12, tickSize=4, gridOpacity=1)
        .configure(font="system-ui, sans-serif", padding={"left": 2, "right": 12, "top": 12, "bottom": 2})
    )
    spec: dict[str, Any] = chart.to_dict()
    spec["params"] = [{"name": "lo", "value": 0}, {"name": "hi", "value": 1}, {"name": "lit", "value": []}]
    spec["datasets"] = {"rows": [], "marks": [], "spikes": [], "levels": []}
    return spec


def _lines(alt: Any, x: alt.X, y: alt.Y, lane: Lane) -> list[alt.Chart]:
    names = [line.name for line in lane.lines]

    def by_name(values: list[Any], channel: Any) -> Any:
        return channel("series:N", legend=None, scale=alt.Scale(type="ordinal", domain=names, range=values))

    colour = by_name([line.colour for line in lane.lines], alt.Color)
    dash = by_name([list(line.dash) for line in lane.lines], alt.StrokeDash)
    width = by_name([line.width for line in lane.lines], alt.StrokeWidth)
    usual = by_name([line.opacity for line in lane.lines], alt.Opacity)
    opacity = alt.condition("length(lit) == 0 || indexof(lit, datum.series) >= 0", usual, alt.value(0.1))
    rows = alt.Chart(alt.NamedData("rows")).encode(x, y, colour, opacity=opacity)
    made = []
    if any(line.spread is not None for line in lane.lines):
        band = alt.Chart(alt.NamedData("rows")).transform_filter("isValid(datum.low)").mark_area(clip=True)
        shown = alt.condition("indexof(lit, datum.series) >= 0", alt.value(0.22), alt.value(0.06))
        low = alt.Y("low:Q", title=None)
        made.append(band.encode(x, low, alt.Y2("high:Q"), colour, alt.Detail("series:N"), opacity=shown))
    made.append(rows.transform_filter("!datum.stem").mark_line(clip=True, strokeCap="butt").encode(dash, width))
    made.append(rows.transform_filter("datum.alone").mark_point(filled=True, size=26, clip=True))
    if any(line.stems for line in lane.lines):
        stem = rows.transform_filter("datum.stem")
        made.append(stem.mark_point(shape="triangle-up", filled=True, size=40, clip=True))
    return made


def _marks(alt: Any, x: alt.X) -> list[alt.Chart]:
    """Events as rules over the whole height, spikes as short ones at the top."""

    def by_kind(values: list[Any], channel: Any) -> Any:
        return channel("kind:N", legend=None, scale=alt.Scale(type="ordinal", domain=list(MARKS), range=values))

    rule = alt.Chart(alt.NamedData("marks")).mark_rule(strokeWidth=1.4, clip=True)
    colour, dash = by_kind(list(MARKS.values()), alt.Color), by_kind(list(MARK_DASHES.values()), alt.StrokeDash)
    tick = alt.Chart(alt.NamedData("spikes")).mark_rule(strokeWidth=1.6, color=RED, clip=True)
    return [rule.encode(x, colour, dash), tick.encode(x, y=alt.value(0), y2=alt.value(8))]


def _levels(alt: Any, y: alt.Y) -> list[alt.Chart]:
    level = alt.Chart(alt.NamedData("levels")).encode(y)
    text = level.mark_text(align="right", baseline="bottom", dx=-4, dy=-3, fontSize=12, clip=True)
    return [
        level.mark_rule(strokeDash=[5, 4], strokeWidth=1.4, color=INK),
        text.encode(x=alt.value("width"), text="text:N"),
    ]


def vega_lite_version() -> str:
    """Of the specifications, as the bundle is to have it."""
    import altair as alt

    return ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
