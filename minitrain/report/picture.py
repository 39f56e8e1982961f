"""What all pictures have in common: fonts, grid, and the way from a chart to a PNG without the network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import altair as alt

MODEL, BASELINE = "#0072B2", "#000000"
"""The model is blue and what it is set against black, in every picture (Okabe and Ito's colours)."""


def png(
    panels: Sequence[Sequence[alt.Chart]],
    title: str,
    subtitle: str,
    rows: Sequence[dict[str, Any]],
    *,
    height: int = 380,
) -> bytes:
    """The panels below each other, each of layers drawn over each other, as a PNG.

    ``alt.NamedData("rows")`` in them are ``rows``.
    """
    import altair as alt
    import vl_convert

    drawn = [alt.layer(*layers).properties(width=760, height=height) for layers in panels]
    chart = (
        (drawn[0] if len(drawn) == 1 else alt.vconcat(*drawn))
        .properties(title=alt.Title(title, subtitle=subtitle), description=title)
        .configure(font="Helvetica, Arial, sans-serif", padding=16, background="white")
        .configure_view(stroke=None)
        .configure_title(anchor="start", fontSize=17, subtitleFontSize=13, subtitleColor="#555555", offset=10)
        .configure_axis(gridColor="#ebebeb", domainColor="#888888", tickColor="#888888")
        .configure_axisX(labelFontSize=12, titleFontSize=13, titleFontWeight="normal")
        .configure_axisY(labelFontSize=12, titleFontSize=13, titleFontWeight="normal")
        .configure_legend(labelFontSize=12, columnPadding=18, offset=28)
    )
    # The rows join the finished specification: Altair would hold every one of them against its schema.
    spec = chart.to_dict()
    spec.setdefault("datasets", {})["rows"] = list(rows)
    version = ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
    return bytes(vl_convert.vegalite_to_png(spec, vl_version=version, scale=2))
