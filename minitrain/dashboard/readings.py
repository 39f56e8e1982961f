"""One sentence a panel that reads the data, as a colleague would note it: numbers, steps, and nothing not measured."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from minitrain.dashboard.gather import Floats, RunData, spike_size
from minitrain.dashboard.selection import finite_rows, first_last, group_of, layer_name, layers_of
from minitrain.metrics import Series
from minitrain.report.words import count, number
from minitrain.schedule import lr_at

ISOLATED = 30.0
"""Times the mean of the 100 steps before it: a gradient norm that stands alone."""
TRANSPARENT = 0.05
"""Of ln V: a train loss below it guesses better than language allows that has not been read before."""
DOUBLED = 2.0
"""A factor in 200 steps that is growth or collapse."""
BAD_INIT = 10.0
"""Times the mean |x| that the configured initial weights give."""
INIT_STD = 0.02
STILL, FAST = 1e-6, 1e-1
"""Update per parameter norm: below, nothing is learnt; above, more is overwritten than learnt."""


def short(x: float) -> str:
    """Three digits, as ``0.0003``, ``5.1``, ``1.2e+09``."""
    return f"{x:.3g}" if math.isfinite(x) else number(x)


def percent(share: float) -> str:
    """``97 %``; never 0 or 100 where it is not quite."""
    if 0 < share < 0.01 or 0.99 < share < 1:
        return f"{100 * share:.1f} %" if 0.001 <= share <= 0.999 else ("under 0.1 %" if share < 0.5 else "over 99.9 %")
    return f"{100 * share:.0f} %"


def missing(what: str) -> str:
    return f"Not recorded: {what}."


def before(values: Floats, window: int = 100) -> Floats:
    """The mean of the finite values among the ``window`` before each; NaN for the first ``window``."""
    finite = np.isfinite(values)
    total, known = (np.concatenate([[0.0], np.cumsum(x)]) for x in (np.where(finite, values, 0.0), finite))
    result = np.full(len(values), np.nan)
    if len(values) > window:
        span, number_of = total[window:-1] - total[: -window - 1], known[window:-1] - known[: -window - 1]
        result[window:] = np.where(number_of > 0, span / np.maximum(number_of, 1), np.nan)
    return result


# 1


def loss(run: RunData) -> str:
    """Where train and validation went, against the baseline, and what stands out."""
    log, known = run.log, np.flatnonzero(np.isfinite(run.log.loss))
    if not len(known):
        return "No step has a finite loss." if run.steps else "No step was logged."
    first, last = known[0], known[-1]
    parts = [f"Train loss went from {number(log.loss[first])} to {number(run.mean_loss[last])}"]
    if log.window > 1:
        parts[0] += f" (mean of {log.window} steps)"
    top = int(known[log.loss[known].argmax()])
    if log.loss[top] > 1.2 * log.loss[first]:
        parts[0] += f" after a peak of {number(log.loss[top])} at step {int(log.step[top]):,}"
    parts.append(_validation(run))
    clear = np.flatnonzero(run.mean_loss < TRANSPARENT * math.log(run.config.model.vocab_size))
    if len(clear):
        limit = number(TRANSPARENT * math.log(run.config.model.vocab_size))
        step = int(log.step[clear[0]])
        parts.append(f"train is under {limit} from step {step:,} on: learnt by heart, or the model sees its targets")
    if run.onset is not None:
        parts.append(f"overfitting begins at step {run.onset:,}")
    if run.spikes:
        worst = run.largest_spikes[0]
        largest = f"the largest {spike_size(worst)} at step {worst.step:,}"
        parts.append(f"{count(len(run.spikes), 'spike')} over 3σ, {largest}")
    elif run.steps > 101:
        parts.append("no spike over 3σ")
    if log.broken:
        parts.append(f"step {log.broken[0]['step']:,} is the first of {len(log.broken):,} not finite")
    return "; ".join(parts) + "."


def _validation(run: RunData) -> str:
    if not len(run.log.val_loss):
        return "no validation was logged"
    if run.best is None:
        return "no validation was finite"
    step, lowest = run.best
    final = float(run.log.val_loss[-1])
    text = f"validation was lowest at step {step:,} ({number(lowest)})"
    if step != run.log.val_step[-1]:
        text += f" and ended at {number(final)}"
    if not math.isfinite(run.baseline_ppl):
        return text + ", its baseline is not known"
    if not math.isfinite(final):
        return text
    gain = 1 - math.exp(min(final, 700.0)) / run.baseline_ppl
    side = "under" if gain >= 0 else "over"
    return (
        f"{text}, its perplexity {abs(100 * gain):,.1f} % {side} the {run.baseline_name} ({number(run.baseline_ppl)})"
    )


# 2


def learning_rate(run: RunData) -> str:
    """Whether every step had the configured rate, and what that is."""
    lr, config, steps = run.log.lr, run.config.scheduler, run.log.step
    if not len(lr):
        return "No step was logged." if not run.steps else missing("the learning rate is not in this log")
    wanted = scheduled(run)
    warmup = config.warmup_steps
    start = f"Warm-up over {count(warmup, 'step')} to" if warmup else "No warm-up: the first step already has"
    high = run.config.optimizer.lr_max
    shape = f"{start} {short(high)}, then {config.type}" + (
        "" if config.type == "constant" else f" to {short(run.config.optimizer.lr_min)} at step {config.total_steps:,}"
    )
    other = np.flatnonzero(~np.isclose(lr, wanted, rtol=1e-9, atol=0))
    if not len(other):
        return f"{shape}; every step logged had the configured rate."
    i = int(other[0])
    times = f", {short(lr[i] / wanted[i])} ×" if wanted[i] else ""
    what = f"step {int(steps[i]):,} had {short(lr[i])} in place of {short(wanted[i])}{times}"
    return f"{shape}; {count(len(other), 'step')} had another rate than configured, the first: {what}."


def scheduled(run: RunData) -> Floats:
    """The configured rate of every logged step."""
    return np.array([lr_at(int(t), run.config.optimizer, run.config.scheduler) for t in run.log.step], np.float64)


# 3


def gradient(run: RunData) -> str:
    """How often the clip acts, the largest norm, and norms that stand alone."""
    norm, clip = run.log.norm, run.config.optimizer.clip
    known = np.flatnonzero(np.isfinite(norm))
    if not len(known):
        return "No step has a finite gradient norm." if run.steps else "No step was logged."
    parts = []
    if clip is None:
        parts.append("No clip is configured")
    else:
        engaged = float((norm[known] > clip).mean())
        always = " (it is always on: the direction alone is followed)" if engaged == 1 else ""
        parts.append(f"Clip at {clip:g} engaged on {percent(engaged)} of steps{always}")
    top = int(known[norm[known].argmax()])
    typical = float(np.median(norm[known]))
    largest = (
        f"largest norm {short(norm[top])} at step {int(run.log.step[top]):,}{_batch_at(run, int(run.log.step[top]))}"
    )
    parts.append(f"{largest}, median {short(typical)}")
    with np.errstate(invalid="ignore", divide="ignore"):
        times = norm / before(norm)
    alone = np.flatnonzero(times > ISOLATED)
    if len(alone):
        worst = int(alone[times[alone].argmax()])
        where = f"step {int(run.log.step[worst]):,} by {times[worst]:.0f} ×"
        parts.append(
            f"{count(len(alone), 'step')} over {ISOLATED:.0f} × the mean of the 100 steps before, most: {where}"
        )
    if len(known) < len(norm):
        parts.append(f"{count(len(norm) - len(known), 'step')} not finite")
    return "; ".join(parts) + "."


def _batch_at(run: RunData, step: int) -> str:
    """What was in the batch of a step, where it is known and out of the usual."""
    rare, twice = run.metrics.get("batch_rare"), run.metrics.get("batch_duplicates")
    found = []
    if rare is not None and (at := np.flatnonzero(rare.steps == step)).size:
        share, usual = float(rare.values[at[0]]), float(np.nanmean(rare.values)) if _any(rare) else math.nan
        if share > 2 * usual:
            found.append(f"{percent(share)} rare tokens, usually {percent(usual)}")
    if twice is not None and (at := np.flatnonzero(twice.steps == step)).size and twice.values[at[0]] > 0:
        found.append(count(float(twice.values[at[0]]), "duplicate"))
    return f" (batch: {', '.join(found)})" if found else ""


def _any(series: Series) -> bool:
    return bool(np.isfinite(series.values).any())


# 4


def activations(run: RunData) -> str:
    """Whether the magnitudes begin where they should, which grew most, and how sharp attention is."""
    series = run.metrics.get("activation_mean_abs")
    if series is None or not _any(series):
        text = missing("no activation was measured" if series is None else "no activation was finite").removesuffix(".")
        return "; ".join([text, *_attention(run)]) + "."
    names, values = layers_of(series)
    parts = [_initial(names, values, series.steps, "embed", INIT_STD * math.sqrt(2 / math.pi))]
    first, last = first_last(values)
    with np.errstate(divide="ignore", invalid="ignore"):
        growth = np.where(first > 0, last / first, np.nan)
    if np.isfinite(growth).any():
        most = int(np.nanargmax(growth))
        at = finite_rows(values[:, most])
        parts.append(
            f"mean |x| grew most at {names[most]}: {short(first[most])} at step {series.steps[at[0]]:,} to "
            f"{short(last[most])} at step {series.steps[at[-1]]:,}, {short(growth[most])} ×"
        )
    dead = [name for i, name in enumerate(names) if (last[i] == 0)]
    if dead:
        parts.append(f"all zero at the end: {', '.join(dead)}")
    broken = ~np.isfinite(values).all(axis=1)
    if broken.any():
        parts.append(f"not finite first at step {series.steps[int(broken.argmax())]:,}")
    return _sentence([*filter(None, parts), *_attention(run)])


def _initial(names: list[str], values: NDArray[np.float32], steps: NDArray[np.int64], name: str, usual: float) -> str:
    """Whether a site begins at the size that the initial weights give it."""
    if name not in names or not len(steps) or steps[0] != 0:
        return ""
    times = float(values[0, names.index(name)]) / usual
    if not math.isfinite(times) or 1 / BAD_INIT < times < BAD_INIT:
        return ""
    return f"{name} begins at {short(times)} × of what the configured initial weights give: look at the initialisation"


def _attention(run: RunData) -> list[str]:
    series = run.metrics.get("attention_entropy")
    if series is None or not _any(series):
        return []
    flat = series.values.reshape(len(series.steps), -1)
    rows = finite_rows(flat.min(axis=1))
    if not len(rows):
        return []
    row = flat[rows[-1]]
    layer, head = np.unravel_index(int(np.nanargmin(row)), series.values.shape[1:])
    which = f"{layer_name(series.labels[0][layer])} head {series.labels[1][head]}"
    text = f"sharpest attention is {which}: {short(float(np.nanmin(row)))} nats"
    peak = run.metrics.get("attention_peak")
    if peak is not None and peak.values.shape == series.values.shape:
        text += f", largest weight {short(float(peak.values[rows[-1], layer, head]))}"
    return [f"{text} at step {series.steps[rows[-1]]:,}"]


def _sentence(parts: list[str]) -> str:
    text = "; ".join(parts) or "Nothing to read"
    return text[0].upper() + text[1:] + "." if not text.startswith("mean |x|") else f"The {text}."


# 5


def spectral(run: RunData) -> str:
    """The largest norm, what grew most, and whether any doubled or halved within 200 steps."""
    series = run.metrics.get("spectral_norm")
    if series is None:
        return missing("no spectral norm was measured")
    if not _any(series):
        return "No spectral norm was finite."
    names, values = list(series.labels[0]), series.values.astype(np.float64)
    first, last = first_last(values)
    big = int(np.nanargmax(last))
    if last[big] == 0:
        return f"All {len(names)} matrices have norm 0 at the end: the weights have collapsed."
    parts = [f"The largest at the end is {names[big]} with {short(last[big])}"]
    with np.errstate(divide="ignore", invalid="ignore"):
        growth = np.where(first > 0, last / first, np.nan)
    if len(series.steps) > 1 and np.isfinite(growth).any():
        most, least = int(np.nanargmax(growth)), int(np.nanargmin(growth))
        parts.append(f"{names[most]} grew most ({short(growth[most])} ×)")
        parts.append(f"{names[least]} least ({short(growth[least])} ×)")
    jumps = _jumps(series.steps, values)
    if jumps:
        column, step, factor = jumps
        what = "grew" if factor > 1 else "shrank"
        parts.append(f"{names[column]} {what} {short(max(factor, 1 / factor))} × in the 200 steps up to {step:,}")
    elif len(series.steps) > 1:
        parts.append("none changed by 2 × within 200 steps")
    return "; ".join(parts) + "."


def _jumps(steps: NDArray[np.int64], values: Floats) -> tuple[int, int, float] | None:
    """The largest change within 200 steps, if it is more than `DOUBLED`: column, step, factor."""
    earlier = np.searchsorted(steps, steps - 200)
    with np.errstate(divide="ignore", invalid="ignore"):
        size = np.abs(np.log(values / values[earlier]))
    size[~np.isfinite(size)] = 0
    row, column = np.unravel_index(int(size.argmax()), size.shape)
    if size[row, column] <= math.log(DOUBLED):
        return None
    return int(column), int(steps[row]), float(values[row, column] / values[earlier[row], column])


# 6


def units(run: RunData) -> str:
    """Dead units, updates that are none or too many, and where gradients fade."""
    dead, update = run.metrics.get("dead_units"), run.metrics.get("update_ratio")
    if dead is None and update is None:
        return missing("neither dead units nor updates were measured")
    return "; ".join([_dead(dead), _updates(update)]) + "."


def _dead(series: Series | None) -> str:
    if series is None or not _any(series):
        return "Dead units were not measured"
    rows = finite_rows(series.values.max(axis=1))
    last, step = (
        series.values[rows[-1]] if len(rows) else series.values[-1],
        series.steps[rows[-1] if len(rows) else -1],
    )
    worst = int(np.nanargmax(last))
    if not last[worst] > 0:
        ever = float(np.nanmax(series.values))
        before_that = f" (at most {percent(ever)} of a layer were)" if ever > 0 else ""
        return f"No FFN unit is dead at step {step:,}{before_that}"
    whole = "the layer is dead" if last[worst] == 1 else f"{percent(float(last[worst]))} of its FFN units are dead"
    return f"{layer_name(series.labels[0][worst]).capitalize()}: {whole} at step {step:,}"


def _updates(series: Series | None) -> str:
    if series is None or not _any(series):
        return "updates were not measured"
    names, values = list(series.labels[0]), series.values.astype(np.float64)
    rows = np.flatnonzero(np.isfinite(values).any(axis=1))  # biases begin at 0, where there is no ratio
    late = values[rows[len(rows) // 2] :]
    typical = np.array([np.median(column[np.isfinite(column)]) for column in late.T if np.isfinite(column).any()])
    names = [name for name, column in zip(names, late.T, strict=True) if np.isfinite(column).any()]
    text = f"an update is {short(float(np.nanmedian(typical)))} of its parameters in the median of the second half"
    still = [names[i] for i in np.flatnonzero(typical < STILL)]
    fast = [names[i] for i in np.flatnonzero(typical > FAST)]
    if still:
        text += f"; frozen (under {STILL:g}): {_few(still)}"
    if fast:
        text += f"; too fast (over {FAST:g}): {_few(fast)}"
    if not still and not fast:
        quick = int(np.nanargmax(typical))
        text += f", most in {group_of(names[quick])} ({names[quick]}, {short(typical[quick])})"
    return text


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# 7


def classes(run: RunData) -> str:
    """The irregular tax: what irregular verb forms cost more than regular ones, in training and in validation."""
    series = run.metrics.get("class_loss")
    if series is None:
        return missing("losses by verb class need the verb corpus, or were not measured")
    if not _any(series):
        return "Not measured: the text has no verb classes."
    index = {name: i for axis in series.labels for i, name in enumerate(axis)}
    parts = []
    for split in ("validation", "train"):
        regular, irregular = (
            series.values[:, index[split], index[kind], index["verb form"]] for kind in ("regular", "irregular")
        )
        rows = finite_rows(regular + irregular)
        if not len(rows):
            parts.append(f"no {split} loss of both classes")
            continue
        a, b = float(regular[rows[-1]]), float(irregular[rows[-1]])
        more = f"{short(abs(b - a))} nats {'more' if b >= a else 'less'} than regular ones"
        parts.append(f"{split} {short(b)} against {short(a)}, {more}")
        step = int(series.steps[rows[-1]])
    if len(parts) == 2 and all(part.startswith("no ") for part in parts):
        return "; ".join(parts).capitalize() + "."
    text = f"On the verb form at step {step:,} irregular verbs cost: in {'; in '.join(parts)}".replace("in no", "no")
    held_out = series.values[:, index["validation"], index["regular"], index["verb form"]]
    if len(rows := finite_rows(held_out)) > 2 and (low := rows[held_out[rows].argmin()]) != rows[-1]:
        text += (
            f"; regular validation forms were cheapest at step {series.steps[low]:,} ({short(float(held_out[low]))})"
        )
    return f"{text}."
