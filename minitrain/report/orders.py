"""The picture of the n-gram baseline: perplexity by order."""

from __future__ import annotations

from collections.abc import Mapping

from minitrain.report import picture
from minitrain.report.words import number

OTHERS = "#A6A6A6"


def draw(perplexity: Mapping[str, float], best_n: int, title: str, subtitle: str) -> bytes:
    """A bar for each order, its value above it, the best in colour; a PNG, without the network."""
    import altair as alt

    rows = [{"n": n, "perplexity": p, "text": number(p), "best": n == str(best_n)} for n, p in perplexity.items()]
    x = alt.X("n:O", title="n (a token is predicted from the n − 1 before it)", axis=alt.Axis(labelAngle=0))
    y = alt.Y("perplexity:Q", title="validation perplexity")
    colour = alt.condition("datum.best", alt.value(picture.MODEL), alt.value(OTHERS))
    bars = alt.Chart(alt.NamedData("rows")).encode(x, y)
    layers = [
        bars.mark_bar(width={"band": 0.6}).encode(color=colour),
        bars.mark_text(dy=-9, fontSize=13).encode(text="text:N"),
    ]
    return picture.png([layers], title, subtitle, rows)
