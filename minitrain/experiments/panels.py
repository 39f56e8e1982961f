"""What the seven panels show of a finished run, as figures: pure functions of its log and its metrics.

Everything here is a number of JSON, None where there is nothing to measure. A step of a series that is measured now and
then is the last one measured up to there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minitrain.config import Config
from minitrain.metrics import Series
from minitrain.report.log import Log
from minitrain.schedule import lr_at
from minitrain.stability import overfit_onset, spikes

AT = (0, 500, 2000)
"""The steps of which activations and the like are told."""
EARLY, LATE = 200, 600
"""Where the gradient norm was looked at in the prototype: at the one, and from the other on."""
NEAR = 10
"""Steps on both sides over which the norm at `EARLY` is taken, because a single batch says little."""
CHANGE = 200
"""Steps within which the growth of a spectral norm is judged (as in the stability check, 4.3)."""

Metrics = Mapping[str, Series]


def panels(log: Log, rates: NDArray[np.float64], series: Metrics, config: Config) -> dict[str, Any]:
    """The figures of each panel; ``rates`` are the learning rates of the steps, as logged."""
    found = {
        "loss": loss(log, config),
        "learning_rate": learning_rate(log, rates, config),
        "grad_norm": gradient_norm(log, series),
        "activations": activations(series),
        "spectral_norm": spectral(series, config),
        "units_and_updates": units(series),
        "classes": classes(series, log),
    }
    return {name: _json(figures) for name, figures in found.items()}


def loss(log: Log, config: Config) -> dict[str, Any]:
    """Panel 1. The onset of overfitting is `stability.overfit_onset`, of the mean train loss at each validation."""
    last = len(log.step) - 1
    at_validations = [log.mean_loss(min(int(step) - log.start, last)) for step in log.val_step]
    finite = np.isfinite(log.val_loss).any()
    return {
        "first": log.loss[0],
        "chance": math.log(config.model.vocab_size),
        "last_mean": log.mean_loss(last),
        "best_val_loss": np.nanmin(log.val_loss) if finite else None,
        "best_val_step": int(log.val_step[np.nanargmin(log.val_loss)]) if finite else None,
        "last_val_loss": log.val_loss[-1] if len(log.val_loss) else None,
        "overfit_onset": overfit_onset(log.val_step, log.val_loss, np.array(at_validations)),
        "spikes": [spike._asdict() for spike in spikes(log.loss)],
    }


def learning_rate(log: Log, rates: NDArray[np.float64], config: Config) -> dict[str, Any]:
    """Panel 2: the largest rate, and how far the logged ones are from the configured."""
    wanted = [lr_at(int(step), config.optimizer, config.scheduler) for step in log.step]
    return {
        "first": rates[0],
        "largest": rates.max(),
        "largest_step": int(log.step[rates.argmax()]),
        "last": rates[-1],
        "largest_difference": np.abs(rates - wanted).max(),
    }


def gradient_norm(log: Log, series: Metrics) -> dict[str, Any]:
    """Panel 3, with what the batches were made of."""
    finite = np.isfinite(log.norm)
    norm, largest = log.norm[finite], int(np.nanargmax(log.norm))
    median = float(np.median(norm))
    early = norm[max(EARLY - NEAR, 0) : EARLY + NEAR] if len(norm) > EARLY else norm[:0]
    late = norm[LATE:]
    composition = {}
    for name in ("batch_regular", "batch_rare", "batch_duplicates"):
        values = series[name].values if name in series else np.empty(0)
        composition[name] = values.mean() if len(values) else None
    return {
        "median": median,
        "largest": log.norm[largest],
        "largest_step": int(log.step[largest]),
        "largest_over_median": log.norm[largest] / median if median else None,
        "early": np.median(early) if len(early) else None,
        "late": np.median(late) if len(late) else None,
        "clipped_pct": 100 * float((log.norm_clipped[finite] < norm).mean()),
        "batches": composition,
    }


def activations(series: Metrics) -> dict[str, Any]:
    """Panel 4: mean |x| of every site at a few steps, and how the heads attend."""
    one, entropy, peak = (series[name] for name in ("activation_mean_abs", "attention_entropy", "attention_peak"))
    rows = _rows(one, AT)
    growth = one.values[-1] / one.values[0]
    top = int(np.nanargmax(growth))
    return {
        "steps": [int(one.steps[row]) for row in rows],
        "mean_abs": {site: one.values[rows, i].tolist() for i, site in enumerate(one.labels[0])},
        "fastest": {"site": one.labels[0][top], "growth": growth[top]},
        "entropy": {
            "first": entropy.values[0].mean(),
            "least": entropy.values.min(),
            "last_mean": entropy.values[-1].mean(),
        },
        "largest_peak": peak.values.max(),
    }


def spectral(series: Metrics, config: Config) -> dict[str, Any]:
    """Panel 5: the norm of every matrix at the first and the last look, and the fastest change after the warm-up.

    ``fastest`` is the largest ratio, up or down, between two looks that are `CHANGE` steps apart.
    """
    one = series["spectral_norm"]
    first, last = one.values[0], one.values[-1]
    growth = last / first
    warm = np.flatnonzero(one.steps >= config.scheduler.warmup_steps)
    pairs = [(i, j) for i in warm for j in warm if one.steps[j] - one.steps[i] == CHANGE]
    fastest = None
    if pairs:
        ratios = np.array([one.values[j] / one.values[i] for i, j in pairs])
        ratios = np.maximum(ratios, 1 / ratios)
        pair, matrix = np.unravel_index(int(np.nanargmax(ratios)), ratios.shape)
        step = int(one.steps[pairs[int(pair)][0]])
        fastest = {"matrix": one.labels[0][int(matrix)], "ratio": ratios[pair, matrix], "from_step": step}
    return {
        "steps": [int(one.steps[0]), int(one.steps[-1])],
        "norm": {name: [first[i], last[i]] for i, name in enumerate(one.labels[0])},
        "most_grown": {"matrix": one.labels[0][int(growth.argmax())], "growth": growth.max()},
        "least_grown": {"matrix": one.labels[0][int(growth.argmin())], "growth": growth.min()},
        "largest": {"matrix": one.labels[0][int(last.argmax())], "norm": last.max()},
        "fastest": fastest,
    }


def units(series: Metrics) -> dict[str, Any]:
    """Panel 6: dead units at any validation, |update| / |parameter|, and the gradient over the activation.

    The ratios told are medians over the matrices: biases begin at 0, so theirs say little.
    """
    dead, update, ratio = (series[name] for name in ("dead_units", "update_ratio", "grad_activation_ratio"))
    rows = _rows(update, AT)
    matrices = [update.labels[0].index(name) for name in series["spectral_norm"].labels[0]]
    of_matrices = np.median(update.values[:, matrices], axis=1)
    return {
        "dead_pct_largest": 100 * float(dead.values.max()) if len(dead.values) else None,
        "steps": [int(update.steps[row]) for row in rows],
        "update_ratio": [of_matrices[row] for row in rows],
        "update_ratio_largest": of_matrices.max(),
        "update_ratio_largest_step": int(update.steps[of_matrices.argmax()]),
        "update_ratio_median": np.median(of_matrices),
        "tensors": {name: update.values[rows, i].tolist() for i, name in enumerate(update.labels[0])},
        "grad_activation_ratio": {s: ratio.values[_rows(ratio, AT), i].tolist() for i, s in enumerate(ratio.labels[0])},
    }


def classes(series: Metrics, log: Log) -> dict[str, Any] | None:
    """Panel 7: irregular minus regular verbs at the least validation and at the end; None without verb classes.

    ``tax`` is by split and scope: nats per token that the irregular verbs cost more.
    """
    one = series["class_loss"]
    if not np.isfinite(one.values).all() or not len(one.values):
        return None
    best = int(np.nanargmin(log.val_loss))
    rows = {"best": _rows(one, (int(log.val_step[best]),))[0], "last": len(one.steps) - 1}
    splits, kinds, scopes = one.labels
    return {
        name: {
            "step": int(one.steps[row]),
            "loss": {
                split: {
                    scope: {kind: one.values[row, i, j, k] for j, kind in enumerate(kinds)}
                    for k, scope in enumerate(scopes)
                }
                for i, split in enumerate(splits)
            },
            "tax": {
                split: {
                    scope: one.values[row, i, kinds.index("irregular"), k]
                    - one.values[row, i, kinds.index("regular"), k]
                    for k, scope in enumerate(scopes)
                }
                for i, split in enumerate(splits)
            },
        }
        for name, row in rows.items()
    }


def _rows(one: Series, steps: tuple[int, ...]) -> list[int]:
    """The row measured last up to each of these steps, every row once."""
    found = np.searchsorted(one.steps, steps, side="right") - 1
    return sorted({max(int(row), 0) for row in found})


def _json(x: Any) -> Any:
    """The same in numbers of JSON: None for what is not finite."""
    if isinstance(x, Mapping):
        return {key: _json(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [_json(value) for value in x]
    if isinstance(x, np.generic):
        x = x.item()
    return None if isinstance(x, float) and not math.isfinite(x) else x
