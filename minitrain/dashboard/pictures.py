"""Which lines each picture of the page has, of one run or of two laid over each other."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minitrain.dashboard import readings
from minitrain.dashboard.gather import RunData
from minitrain.dashboard.lanes import (
    AMBER,
    BLUE,
    FEW,
    GREEN,
    INK,
    LETTERS,
    OF_RUN,
    PINK,
    RED,
    SKY,
    WHOLE,
    Lane,
    Line,
)
from minitrain.dashboard.selection import deviation_of_size, grouped, layer_name, layers_of, styled, telling
from minitrain.metrics import Series
from minitrain.report.words import number

Runs = Sequence[RunData]
COOL_WARM = (BLUE, RED)
MOST_CLIPPED = 8000
"""Points of the clipped norm in a run so long that loss and norm alone go whole."""
CHOSEN = 16
"""Lines of one run that a lane shows at most, and of each of two runs `CHOSEN_OF_TWO`."""
CHOSEN_OF_TWO = 4


def _named(runs: Runs, lines: Callable[[RunData], Sequence[Line]]) -> list[Line]:
    """The lines of every run, with its letter where there are two; then the second one's are broken.

    Its colour tells the run where the lane has few lines, else its paleness does.
    """
    if len(runs) == 1:
        return list(lines(runs[0]))
    found = []
    for number_of, run in enumerate(runs):
        for line in lines(run):
            name = f"{line.name}{OF_RUN}{LETTERS[number_of]}"
            mean_of = f"{line.mean_of}{OF_RUN}{LETTERS[number_of]}" if line.mean_of else ""
            most = line.most // 2 if line.most == WHOLE else line.most
            told = replace(line, name=name, mean_of=mean_of, most=most)
            if line.pair:
                told = replace(told, colour=line.pair[number_of], opacity=0.7 if line.width < 1.2 else 1.0)
            elif number_of:
                told = replace(told, opacity=0.6 * line.opacity)
            if number_of and line.dash == (1, 0) and line.width >= 1.2:
                told = replace(told, dash=(4, 2))
            found.append(told)
    return found


def overview(runs: Runs) -> Lane:
    """The train loss, small: where to zoom."""

    def lines(run: RunData) -> list[Line]:
        return [Line("train loss", run.log.step, run.log.loss, SKY, width=1.0, most=1000, pair=(SKY, AMBER))]

    found = _named(runs, lines)
    return Lane("overview", "Steps in sight", "", found, height=36, log=_positive(found))


def _positive(lines: Sequence[Line]) -> bool:
    """Whether these lines have a logarithm."""
    values = np.concatenate([line.values[np.isfinite(line.values)] for line in lines])
    return bool(len(values) and values.min() > 0)


def losses(runs: Runs) -> Lane:
    def lines(run: RunData) -> list[Line]:
        log, none = run.log, np.empty(0)
        each = Line("train, each step", log.step, log.loss, SKY, width=0.9, most=WHOLE, pair=(SKY, AMBER))
        mean = Line("train, running mean", none, none, BLUE, width=2.2, mean_of="train, each step", pair=COOL_WARM)
        val = Line("validation", log.val_step, log.val_loss, RED, width=1.8, points=True, pair=COOL_WARM)
        return [each, mean, val]

    found = _named(runs, lines)
    return Lane(
        "loss",
        "Loss",
        "nats per token",
        found,
        log=_positive(found),
        height=300,
        references=_baselines(runs),
        empty="No step has a finite loss.",
        help="Token-mean cross entropy of the batch, before the update of its step; validation over its whole split. "
        "A spike is a train loss more than 3σ over the mean of the 100 steps before it.",
    )


def _baselines(runs: Runs) -> list[tuple[float, str]]:
    """The loss of the best n-gram model, of every run that has another."""
    levels = {
        math.log(run.baseline_ppl): f"{run.baseline_name} (perplexity {number(run.baseline_ppl)})"
        for run in runs
        if math.isfinite(run.baseline_ppl)
    }
    return list(levels.items())


def rates(runs: Runs) -> Lane:
    def lines(run: RunData) -> list[Line]:
        if not len(run.log.lr):
            return []
        wanted = Line("configured", run.log.step, readings.scheduled(run), INK, (5, 4), 1.3)
        return [Line("learning rate", run.log.step, run.log.lr, BLUE, width=2.0, pair=COOL_WARM), wanted]

    return Lane(
        "lr",
        "Learning rate",
        "",
        _named(runs, lines),
        zero=True,
        height=150,
        format="~e",
        empty="The log has no learning rate.",
        help="As the update of each step used it; dashed what the configuration says.",
    )


def norms(runs: Runs) -> Lane:
    def lines(run: RunData) -> list[Line]:
        log = run.log
        own = [Line("before the clip", log.step, log.norm, BLUE, width=1.0, most=WHOLE, pair=COOL_WARM)]
        if run.config.optimizer.clip is None and run.config.optimizer.clip_value is None:
            return own
        most = WHOLE if len(log.step) <= WHOLE // 4 else MOST_CLIPPED
        return [
            *own,
            Line("after the clip", log.step, log.norm_clipped, AMBER, width=1.3, most=most, pair=(SKY, AMBER)),
        ]

    clips = {run.config.optimizer.clip for run in runs} - {None}
    found = _named(runs, lines)
    return Lane(
        "norm",
        "Gradient norm",
        "",
        found,
        log=_positive(found),
        height=220,
        references=[(float(clip), f"clip {clip:g}") for clip in clips if clip],
        empty="No step has a finite gradient norm.",
        help="L2 norm over all parameters, of every step.",
    )


def batches(runs: Runs) -> Lane:
    def lines(run: RunData) -> list[Line]:
        regular, rare, twice = (run.metrics.get(f"batch_{name}") for name in ("regular", "rare", "duplicates"))
        none, found = np.empty(0), []
        for series, name, colour in ((regular, "regular verbs", GREEN), (rare, "rare tokens", PINK)):
            if series is not None and np.isfinite(series.values).any():
                found.append(Line(f"{name}, each step", series.steps, series.values, colour, width=0.7, opacity=0.45))
                found.append(Line(f"{name}, running mean", none, none, colour, width=2, mean_of=f"{name}, each step"))
        if twice is not None:
            at = np.flatnonzero(twice.values > 0)
            level = np.zeros(len(at))
            found.append(Line("a sample twice, or again", twice.steps[at], level, RED, stems=True))
        return found

    return Lane(
        "batch",
        "Batch composition",
        "share of the batch",
        _named(runs, lines),
        height=120,
        zero=True,
        format=".0%",
        empty="The composition of batches was not recorded.",
        help=_formulas(runs, "batch_regular", "batch_rare", "batch_duplicates"),
    )


def _formulas(runs: Runs, *names: str) -> str:
    """How these series are measured, as they say themselves."""
    told = []
    for name in names:
        series = next((run.metrics[name] for run in runs if name in run.metrics), None)
        if series is not None and series.formula:
            told.append(f"{name}: {series.formula}")
    return "; ".join(told)


def _many(runs: Runs, series: Callable[[RunData], tuple[Any, list[str], NDArray[Any]] | None], **more: Any) -> Lane:
    """A lane of a line for each layer, site or tensor; those that changed most where they are too many."""
    limit = CHOSEN if len(runs) == 1 else CHOSEN_OF_TWO
    found = [series(run) for run in runs]
    names = next((names for one in found if one for names in [one[1]]), [])
    values = [one[2] for one in found if one and one[1] == names]
    kept = telling(values[0], limit) if values else []
    shown = [names[i] for i in kept]
    styles = styled(shown)

    def lines(run: RunData) -> list[Line]:
        told = found[list(runs).index(run)]
        if told is None:
            return []
        steps, own, numbers = told
        spread = more.get("spread", {}).get(id(run))
        return [
            Line(name, steps, numbers[:, own.index(name)], *styles[name], most=FEW, spread=_column(spread, own, name))
            for name in shown
            if name in own
        ]

    if len(shown) < len(names):
        more["unit"] = "; ".join(filter(None, [more["unit"], f"{len(shown)} of {len(names)}: those that changed most"]))
    return Lane(lines=_named(runs, lines), **{key: value for key, value in more.items() if key != "spread"})


def _column(values: NDArray[Any] | None, names: list[str], name: str) -> NDArray[Any] | None:
    return None if values is None else values[:, names.index(name)]


def _series(name: str) -> Callable[[RunData], tuple[Any, list[str], NDArray[Any]] | None]:
    """A quantity with one axis besides the steps."""

    def of(run: RunData) -> tuple[Any, list[str], NDArray[Any]] | None:
        found = run.metrics.get(name)
        return None if found is None else (found.steps, list(found.labels[0]), found.values)

    return of


def _stream(name: str) -> Callable[[RunData], tuple[Any, list[str], NDArray[Any]] | None]:
    """The same, of the sites of the residual stream."""

    def of(run: RunData) -> tuple[Any, list[str], NDArray[Any]] | None:
        found = run.metrics.get(name)
        return None if found is None else (found.steps, *layers_of(found))

    return of


def activations(runs: Runs) -> Lane:
    spread = {}
    for run in runs:
        mean, std = run.metrics.get("activation_mean_abs"), run.metrics.get("activation_std")
        if mean is not None and std is not None and mean.values.shape == std.values.shape:
            spread[id(run)] = deviation_of_size(layers_of(mean)[1], layers_of(std)[1])
    return _many(
        runs,
        _stream("activation_mean_abs"),
        id="activations",
        title="Mean |x|: what each layer adds to the residual stream, and what comes of it",
        unit="band: ±1σ of |x|",
        log=True,
        height=240,
        spread=spread,
        empty="Activations were not recorded.",
        help=_formulas(runs, "activation_mean_abs", "activation_std"),
    )


def attention(runs: Runs) -> Lane:
    def of(run: RunData) -> tuple[Any, list[str], NDArray[Any]] | None:
        found = run.metrics.get("attention_entropy")
        if found is None:
            return None
        names = [f"{layer_name(layer)} head {head}" for layer in found.labels[0] for head in found.labels[1]]
        return found.steps, names, found.values.reshape(len(found.steps), -1)

    return _many(
        runs,
        of,
        id="attention",
        title="Entropy of the attention of each head",
        unit="nats",
        height=180,
        empty="Attention was not recorded.",
        help=_formulas(runs, "attention_entropy"),
    )


def spectral(runs: Runs) -> Lane:
    return _many(
        runs,
        _series("spectral_norm"),
        id="spectral",
        title="Largest singular value",
        unit="",
        height=260,
        empty="Spectral norms were not recorded.",
        help=_formulas(runs, "spectral_norm"),
    )


def dead(runs: Runs) -> Lane:
    def of(run: RunData) -> tuple[Any, list[str], NDArray[Any]] | None:
        found = run.metrics.get("dead_units")
        return None if found is None else (found.steps, [layer_name(name) for name in found.labels[0]], found.values)

    return _many(
        runs,
        of,
        id="dead",
        title="Dead FFN units",
        reach=0.05,
        unit="share of the layer",
        height=110,
        zero=True,
        format=".0%",
        empty="Dead units were not recorded.",
        help=_formulas(runs, "dead_units"),
    )


def updates(runs: Runs) -> Lane:
    def of(run: RunData) -> tuple[Any, list[str], NDArray[Any]] | None:
        found = run.metrics.get("update_ratio")
        if found is None:
            return None
        groups = grouped(found)
        return found.steps, list(groups), np.stack(list(groups.values()), axis=1)

    return _many(
        runs,
        of,
        id="updates",
        title="Update/weight ratio ‖Δθ‖/‖θ‖",
        unit="median of each group of tensors",
        log=True,
        height=170,
        references=[(1e-3, "0.001, a usual pace")],
        empty="Updates were not recorded.",
        help=_formulas(runs, "update_ratio"),
    )


def ratios(runs: Runs) -> Lane:
    return _many(
        runs,
        _stream("grad_activation_ratio"),
        id="ratios",
        title="Gradient/activation ratio",
        unit="",
        log=True,
        height=170,
        empty="Gradients of activations were not recorded.",
        help=_formulas(runs, "grad_activation_ratio"),
    )


def classes(runs: Runs, scope: str) -> Lane:
    def lines(run: RunData) -> list[Line]:
        found = run.metrics.get("class_loss")
        if found is None or not np.isfinite(found.values).any():
            return []
        return [
            _class_line(found, split, kind, scope)
            for split in ("validation", "train")
            for kind in ("regular", "irregular")
        ]

    return Lane(
        f"classes-{scope.replace(' ', '-')}",
        "On the verb form" if scope == "verb form" else "On the whole sentence",
        "nats per token",
        _named(runs, lines),
        height=190,
        zero=True,
        references=_baselines(runs) if scope == "sentence" else (),
        empty="The text has no verb classes, or their losses were not recorded.",
        help=_formulas(runs, "class_loss") if scope == "verb form" else "",
    )


def _class_line(series: Series, split: str, kind: str, scope: str) -> Line:
    at = [axis.index(name) for axis, name in zip(series.labels, (split, kind, scope), strict=True)]
    colour = BLUE if kind == "regular" else RED
    dash = (1, 0) if split == "validation" else (5, 3)
    return Line(f"{kind}, {split}", series.steps, series.values[:, at[0], at[1], at[2]], colour, dash, 1.9, points=True)
