"""A lane as a Vega-Lite specification, made by Altair. Numbers join it in the page; here is only how they are drawn.

The page sets two parameters, ``lo`` and ``hi``, the steps in sight, and one, ``lit``, the names of lines that are not
faded. Four sets of rows are named: ``rows`` (step, value, series, alone, low, high), ``marks`` and ``spikes`` (step,
kind) and ``levels`` (value, text). Colours, dashes and widths are those of the lines; text and grid get theirs from the
style sheet, so that light, dark and print are matters of CSS.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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
CONFIG = {
    "font": "system-ui, sans-serif",
    "padding": {"left": 2, "right": 12, "top": 6, "bottom": 2},
    "view": {"stroke": None},
    "axis": {"domain": False, "labelFontSize": 12, "tickSize": 4, "gridOpacity": 1},
}
AXIS = 58
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
    if lane.log:
        scale = alt.Scale(type="log", nice=False, padding=4)
    elif lane.zero:
        scale = alt.Scale(type="linear", domainMin=0, nice=True)
    else:
        scale = alt.Scale(type="linear", zero=False, nice=True, padding=4)
    axis = alt.Axis(tickCount=9 if lane.log else 5, format=lane.format, minExtent=AXIS, maxExtent=AXIS)
    if overview:
        axis = alt.Axis(labels=False, ticks=False, grid=False, minExtent=AXIS, maxExtent=AXIS)
    y = alt.Y("value:Q", title=None, scale=scale, axis=axis)
    layers = [*_marks(alt, x), *_lines(alt, x, y, lane)]
    if lane.references or lane.reach:
        layers += _levels(alt, y)
    if lane.id == "loss":
        ring = alt.Chart(alt.NamedData("spikes")).mark_point(
            size=46, strokeWidth=1.4, color=RED, filled=False, clip=True
        )
        layers.append(ring.encode(x, y))
    # Neither checked by Altair nor copied for every property: that would be a second a page. A test checks them all.
    spec: dict[str, Any] = alt.layer(*layers).to_dict(validate=False)
    spec |= {"width": "container", "height": lane.height, "background": "transparent", "description": description}
    spec |= {"autosize": {"type": "fit-x", "contains": "padding"}, "config": CONFIG}
    own = dict.fromkeys(("color", "strokeDash", "strokeWidth", "opacity"), "independent")
    spec["resolve"] = {"scale": own}
    spec["params"] = [{"name": "lo", "value": 0}, {"name": "hi", "value": 1}, {"name": "lit", "value": []}]
    spec["datasets"] = {"rows": [], "marks": [], "spikes": [], "levels": []}
    return spec


def _lines(alt: Any, x: alt.X, y: alt.Y, lane: Lane) -> list[alt.Chart]:
    names = [line.name for line in lane.lines]

    def by_name(values: list[Any], channel: Any, **more: Any) -> Any:
        scale = alt.Scale(type="ordinal", domain=names, range=values)
        return channel("series:O", legend=None, scale=scale, **more)

    def unlit(value: float) -> dict[str, Any]:
        return {"test": "length(lit) > 0 && indexof(lit, datum.series) < 0", "value": value}

    colour = by_name([line.colour for line in lane.lines], alt.Color)
    dash = by_name([list(line.dash) for line in lane.lines], alt.StrokeDash)
    width = by_name([line.width for line in lane.lines], alt.StrokeWidth)
    opacity = by_name([line.opacity for line in lane.lines], alt.Opacity, condition=unlit(0.1))
    rows = alt.Chart(alt.NamedData("rows")).encode(x, y, colour, opacity=opacity)
    made = []
    if any(line.spread is not None for line in lane.lines):
        band = alt.Chart(alt.NamedData("rows")).transform_filter("isValid(datum.low)").mark_area(clip=True)
        brought_out = {"test": "indexof(lit, datum.series) >= 0", "value": 0.22}
        shown = alt.OpacityValue(0.06, condition=[brought_out, {"test": "length(lit) > 0", "value": 0}])
        low = alt.Y("low:Q", title=None)
        made.append(band.encode(x, low, alt.Y2("high:Q"), colour, alt.Detail("series:N"), shown))
    made.append(rows.transform_filter("!datum.stem").mark_line(clip=True, strokeCap="butt").encode(dash, width))
    made.append(rows.transform_filter("datum.alone").mark_point(filled=True, size=26, clip=True))
    if any(line.stems for line in lane.lines):
        stem = alt.Chart(alt.NamedData("rows")).transform_filter("datum.stem")
        above = stem.mark_point(shape="triangle-up", filled=True, size=40)
        made.append(above.encode(x, colour, y=alt.value(lane.height - 5), opacity=opacity))
    return made


def _marks(alt: Any, x: alt.X) -> list[alt.Chart]:
    """Events as rules over the whole height, spikes as short ones at the top."""

    def by_kind(values: list[Any], channel: Any) -> Any:
        return channel("kind:O", legend=None, scale=alt.Scale(type="ordinal", domain=list(MARKS), range=values))

    rule = alt.Chart(alt.NamedData("marks")).mark_rule(strokeWidth=1.4, clip=True)
    colour, dash = by_kind(list(MARKS.values()), alt.Color), by_kind(list(MARK_DASHES.values()), alt.StrokeDash)
    tick = alt.Chart(alt.NamedData("spikes")).mark_rule(strokeWidth=1.6, color=RED, clip=True)
    return [rule.encode(x, colour, dash), tick.encode(x, y=alt.value(0), y2=alt.value(8))]


def _levels(alt: Any, y: alt.Y) -> list[alt.Chart]:
    level = alt.Chart(alt.NamedData("levels")).encode(y)
    # The text of a level without a name is not seen; its value is in sight all the same.
    text = level.mark_text(align="right", baseline="bottom", dx=-4, dy=-3, fontSize=12, clip=True)
    return [
        level.mark_rule(strokeDash=[5, 4], strokeWidth=1.4, color=INK).transform_filter("datum.text"),
        text.encode(x=alt.value("width"), text="text:N"),
    ]


def vega_lite_version() -> str:
    """Of the specifications, as the bundle is to have it."""
    import altair as alt

    return ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
