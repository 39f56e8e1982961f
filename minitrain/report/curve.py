"""The picture of the losses. Drawing takes half a second and about 150 MB; Altair and V8 load inside `draw` only."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minitrain.report import picture
from minitrain.report.log import Floats, Log
from minitrain.report.words import not_finite, number

EACH, MEAN, VALIDATION, BASELINE, BROKEN = "#56B4E9", picture.MODEL, "#D55E00", picture.BASELINE, "#CC79A7"
"""Okabe and Ito's colours, which colour-blind eyes tell apart; dashes, points and widths tell them apart in grey."""


def draw(log: Log, baseline_ppl: float, baseline_name: str, title: str, subtitle: str) -> bytes:
    """The loss curves as a PNG, without the network."""
    import altair as alt

    start, end = log.start, max([log.start + 1.0, *log.step + 1, *log.val_step])
    base = math.log(baseline_ppl) if 0 < baseline_ppl < math.inf else math.nan
    kept, kept_val = extremes(log.loss), extremes(log.val_loss)
    mean = f"train, mean of {log.window:,} steps"
    curves = {  # name: colour, width, dashes, points (see _rows), steps, losses
        "train, each step": (EACH, 0.8, [1, 0], 0, log.step[kept], log.loss[kept]),
        mean: (MEAN, 2.4, [1, 0], -1, log.step[kept], np.array([log.mean_loss(i) for i in kept])),
        baseline_name: (BASELINE, 1.5, [6, 4], -1, np.array([start, end]), np.array([base, base])),
        "validation": (VALIDATION, 1.8, [1, 0], 2, log.val_step[kept_val], log.val_loss[kept_val]),
    }
    if log.window == 1:
        del curves[mean]
    names, (colours, widths, dashes, *_) = list(curves), zip(*curves.values(), strict=True)
    rows = [row for name, (*_, points, steps, losses) in curves.items() for row in _rows(name, points, steps, losses)]
    heights = [row["loss"] for row in rows if row["loss"] is not None] or [1.0]
    logarithmic = min(heights) > 0 and max(heights) > 20 * min(heights)

    def by_series(values: Iterable[Any]) -> dict[str, Any]:
        legend = alt.Legend(orient="top", title=None, symbolType="stroke", symbolSize=500, labelLimit=300)
        scale = alt.Scale(type="ordinal", domain=names, range=list(values))
        return {"shorthand": "series:N", "sort": names, "scale": scale, "legend": legend}

    unit = "nats per token, log scale" if logarithmic else "nats per token"
    scale = alt.Scale(type="log" if logarithmic else "linear", zero=False, nice=True)
    x = alt.X(
        "step:Q",
        title="step",
        scale=alt.Scale(domain=[start, end], nice=False),
        axis=alt.Axis(tickCount=int(min(end - start, 10))),
    )
    y = alt.Y("loss:Q", title=f"loss ({unit})", scale=scale)
    series = alt.Chart(alt.NamedData("rows")).encode(x, y, alt.Color(**by_series(colours)))
    layers: list[alt.Chart] = [
        series.mark_line().encode(alt.StrokeWidth(**by_series(widths)), alt.StrokeDash(**by_series(dashes))),
        series.mark_point(filled=True, opacity=1, size=30).transform_filter("datum.point"),
    ]

    def note(text: str, step: float, y: Any, **place: Any) -> None:
        row = {"step": step, "text": text} | ({"loss": base} if math.isfinite(base) else {})
        at = alt.Chart(alt.InlineData(values=[row])).encode(x, y=y, text="text:N")
        layers.append(at.mark_text(fontSize=12, stroke="white", strokeWidth=5, strokeJoin="round", **place))
        layers.append(at.mark_text(fontSize=12, **place))

    if math.isfinite(base):
        over = log.val_loss[np.isfinite(log.val_loss)][-1:].sum() > base  # the label stands where the curve does not
        note(
            f"{baseline_name}: perplexity {number(baseline_ppl)}", end, y, align="right", dx=-6, dy=13 if over else -11
        )
    for line in log.broken[:1]:
        step, align = line["step"], "right" if line["step"] > (start + end) / 2 else "left"
        wall = alt.Chart(alt.InlineData(values=[{"step": step}])).mark_rule(strokeWidth=2, color=BROKEN)
        layers.append(wall.encode(x))
        note(f"step {step:,}: {not_finite(line)}", step, alt.value(-10), align=align)  # above the marks
    return picture.png([layers], title, subtitle, rows)


def _rows(series: str, points: int, steps: Floats, losses: Floats) -> list[dict[str, Any]]:
    """A row for each value, null where it is not finite.

    A value with at most ``points`` finite neighbours is a point too: 2 marks all, 0 those that no line reaches.
    """
    finite = [False, *np.isfinite(losses).tolist(), False]
    return [
        {
            "series": series,
            "step": float(step),
            "loss": float(loss) if here else None,
            "point": here and before + after <= points,
        }
        for step, loss, before, here, after in zip(steps, losses, finite, finite[1:], finite[2:], strict=False)
    ]


def extremes(values: Floats, buckets: int = 1000) -> NDArray[np.intp]:
    """Indices that draw the same curve: of each bucket its lowest, its highest and its first value that is not finite.

    So no spike and no gap is lost. Up to two values a bucket all are kept.
    """
    if len(values) <= 2 * buckets:
        return np.arange(len(values))
    kept = {0, len(values) - 1}
    for part in np.array_split(np.arange(len(values)), buckets):
        finite = np.isfinite(values[part])
        kept.update(part[~finite][:1].tolist())
        if finite.any():
            inside = part[finite]
            kept.update((int(inside[values[inside].argmin()]), int(inside[values[inside].argmax()])))
    return np.array(sorted(kept), np.intp)
