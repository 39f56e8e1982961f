"""The race as a picture: how many times longer a step of each peer takes than minitrain's."""

from __future__ import annotations

from typing import Any

from sides import PEERS

from report.bars import LEADS
from report.results import Race, Tree

SHOWN = ("default", "full", "M", "L")
ONE, TWO, BAR = "#0072B2", "#D55E00", "#000000"
"""Okabe and Ito's colours, which colour-blind eyes tell apart; shapes tell them apart in grey."""
THREADS = {1: "1 thread", 2: "2 threads"}
ROW = 46


def picture(tree: Tree) -> bytes:
    """A PNG; one panel a size."""
    import altair as alt
    import vl_convert

    rows = [row for name in SHOWN if "race" in tree["sizes"].get(name, {}) for row in _rows(name, tree["sizes"][name])]
    most = max([row["most"] for row in rows], default=2.0)
    least = min([row["least"] for row in rows], default=1.0)
    scale = alt.Scale(type="log", domain=[min(0.8, 0.95 * least), max(4.0, 1.25 * most)], nice=False)
    axis = alt.Axis(values=[0.5, 0.7, 1, 1.5, 2, 3, 4, 5, 7, 10, 15, 20], format="~g", grid=True)
    x = alt.X("ratio:Q", title="times longer than minitrain's step (log scale)", scale=scale, axis=axis)
    y = alt.Y("peer:N", title=None, sort=PEERS, axis=alt.Axis(ticks=False, labelLimit=200))
    offset = alt.YOffset("threads:N", sort=list(THREADS.values()))
    legend = alt.Legend(orient="top", title=None, symbolSize=110)

    def by_threads(channel: Any, values: list[Any]) -> Any:
        kinds = alt.Scale(domain=[*THREADS.values(), "the bar to clear, 1 thread"], range=values)
        return channel("threads:N", scale=kinds, legend=legend)

    colour = by_threads(alt.Color, [ONE, TWO, BAR])
    shape = by_threads(alt.Shape, ["circle", "diamond", "M0,-1L0,1"])
    panels = []
    for name in SHOWN:
        here = [row for row in rows if row["size"] == name]
        if not here:
            continue
        data = alt.InlineData(values=here)
        level = alt.Chart(alt.InlineData(values=[{"ratio": 1}])).mark_rule(strokeWidth=2, color="#555555").encode(x)
        base = alt.Chart(data).encode(y=y, yOffset=offset)
        spread = base.mark_rule(strokeWidth=3, opacity=0.45).encode(
            alt.X("least:Q", scale=scale), x2="most:Q", color=colour
        )
        point = base.mark_point(filled=True, size=110, opacity=1).encode(x=x, color=colour, shape=shape)
        text = base.mark_text(align="left", dx=11, fontSize=11).encode(
            alt.X("most:Q", scale=scale), text="label:N", color=alt.value("#333333")
        )
        limits = [row for row in here if row["bar"] and row["threads"] == THREADS[1]]
        limit = (
            alt.Chart(alt.InlineData(values=[{**row, "threads": "the bar to clear, 1 thread"} for row in limits]))
            .mark_point(size=500, strokeWidth=2, opacity=1)
            .encode(alt.X("bar:Q", scale=scale), y=y, color=colour, shape=shape)
        )
        peers = len({row["peer"] for row in here})
        panels.append(
            alt.layer(level, limit, spread, point, text).properties(
                width=640, height=ROW * peers, title=alt.Title(here[0]["panel"], anchor="start", fontSize=13)
            )
        )
    chart = (
        alt.vconcat(*panels, spacing=14)
        .properties(title=alt.Title("A training step, peers against minitrain", subtitle=_subtitle(tree)))
        .configure(font="Helvetica, Arial, sans-serif", padding=16, background="white")
        .configure_view(stroke=None)
        .configure_title(anchor="start", fontSize=17, subtitleFontSize=12, subtitleColor="#555555", offset=8)
        .configure_axis(gridColor="#ebebeb", domainColor="#888888", labelFontSize=12, titleFontWeight="normal")
        .configure_legend(labelFontSize=12, columnPadding=18, labelLimit=300)
    )
    version = ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
    return bytes(vl_convert.vegalite_to_png(chart.to_dict(), vl_version=version, scale=2))


def _rows(name: str, size: Tree) -> list[dict[str, Any]]:
    about, rows = size["about"], []
    for threads, words in THREADS.items():
        race = Race(size, threads)
        for peer in PEERS:
            if peer in race.entrants and "minitrain" in race.entrants:
                ratio = race.ratio(peer, "minitrain")
                rows.append(
                    {
                        "size": name,
                        "panel": f"{about['title']}: {about['parameters']:,} parameters, {about['flops'] / 1e9:.3g} "
                        f"GFLOP a step; minitrain {_minitrain(size)}",
                        "peer": peer,
                        "threads": words,
                        "ratio": ratio.middle,
                        "least": min(ratio.values),
                        "most": max(ratio.values),
                        "bar": LEADS.get((name, peer)),
                        "label": f"{ratio.middle:.2f}× ({1e3 * race.smallest(peer):.4g} ms)",
                    }
                )
    return rows


def _minitrain(size: Tree) -> str:
    """Its smallest steps."""
    races = {words: Race(size, threads) for threads, words in THREADS.items()}
    return ", ".join(
        f"{1e3 * race.smallest('minitrain'):.4g} ms on {words}"
        for words, race in races.items()
        if "minitrain" in race.entrants
    )


def _subtitle(tree: Tree) -> str:
    races = [size["race"] for size in tree["sizes"].values() if "race" in size]
    if not races:
        return "nothing has been measured"
    about = races[0]["about"]
    rounds = len(races[0]["rounds"])
    return (
        f"{about['machine']}, {', '.join(isa for isa in about['isas'] if isa != 'portable')}, {about['date'][:10]}. "
        f"Smallest steps, median of {rounds} round{'s' * (rounds > 1)}; the line spans the rounds."
    )
