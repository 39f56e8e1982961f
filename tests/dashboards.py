"""Runs for the tests of the dashboard, made of arrays: healthy, broken in one way, long, short, or empty."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minitrain.config import Config, load_config
from minitrain.dashboard.gather import RunData
from minitrain.metrics import Series
from minitrain.report.log import Log
from minitrain.schedule import lr_at
from minitrain.tensors import activation_table, parameter_table

HOSTILE = "</script><script>alert(1)</script>\u2028<!-- & \"quoted\" 'text'"
"""What a sample may hold."""


def log_of(config: Config, steps: int, seed: int = 0, val_every: int = 50) -> Log:
    """A loss that falls from ln V, validation that turns at half, norms around 4."""
    rng = np.random.default_rng(seed)
    step = np.arange(steps, dtype=np.float64)
    loss = 0.8 + 3.35 * np.exp(-step / (0.15 * steps)) + rng.normal(0, 0.06, steps)
    norm = 2 + 2 * (1 - np.exp(-step / 300)) + rng.gamma(2, 0.3, steps)
    clip = config.optimizer.clip
    clipped = norm if clip is None else np.minimum(norm, clip)
    val_step = np.arange(val_every, steps + 1, val_every, dtype=np.float64)
    val = 2.2 + 2 * np.exp(-val_step / (0.12 * steps)) + 0.6 * np.maximum(0, val_step / steps - 0.5)
    rate = np.array([lr_at(int(t), config.optimizer, config.scheduler) for t in step])
    return Log(step, loss, norm, clipped, np.full(steps, 8e4), val_step, val, [], rate)


def metrics_of(config: Config, steps: int, every: int = 10, seed: int = 1) -> dict[str, Series]:
    """All series, of a healthy run."""
    rng = np.random.default_rng(seed)
    sites = tuple(a.name for a in activation_table(config.model, 1, 1) if a.site and "prob" not in a.name)[:-2]
    tensors = tuple(p.name for p in parameter_table(config.model))
    matrices = tuple(p.name for p in parameter_table(config.model) if p.decays)
    layers = tuple(f"block.{i}" for i in range(config.model.n_layer))
    heads = tuple(str(i) for i in range(config.model.n_head))
    all_steps, some = np.arange(steps), np.arange(0, steps, every)
    spectral, validations = np.arange(0, steps, 5 * every), np.arange(50, steps + 1, 50)

    def walk(at: NDArray[Any], *shape: int, start: float = 1.0, grow: float = 1.0, noise: float = 0.03) -> NDArray[Any]:
        flat = int(np.prod(shape))
        base = start * np.exp(rng.normal(0, 0.4, flat))
        rise = 1 + grow * rng.random(flat) * (1 - np.exp(-at[:, None] / (0.3 * steps)))
        return (base * rise * np.exp(rng.normal(0, noise, (len(at), flat)))).reshape(len(at), *shape)

    def series(name: str, unit: str, at: NDArray[Any], values: NDArray[Any], *labels: tuple[str, ...]) -> Series:
        return Series(name, unit, at.astype(np.int64), values.astype(np.float32), labels, f"how {name} is measured")

    size = walk(some, len(sites), start=0.8, grow=2)
    size[:, 0] = 0.016 * (1 + some / steps)
    gain = np.array([1.5, 2.3, 1.2, 2.0, 1.8, 2.6, 1.9, 2.4]).reshape(2, 2, 2)
    classes = gain + 2 * np.exp(-validations / (0.15 * steps))[:, None, None, None]
    made = [
        series("batch_regular", "share", all_steps, rng.binomial(8, 0.6, steps) / 8),
        series("batch_rare", "share", all_steps, rng.beta(2, 40, steps)),
        series("batch_duplicates", "samples", all_steps, (rng.random(steps) < 0.02).astype(float)),
        series("activation_mean_abs", "", some, size, sites),
        series("activation_std", "", some, size * 1.25, sites),
        series("grad_norm", "", some, walk(some, len(tensors), start=0.5), tensors),
        series("grad_activation_ratio", "", some, walk(some, len(sites), start=1e-4, noise=0.2), sites),
        series("update_ratio", "", some, walk(some, len(tensors), start=1e-3, noise=0.15), tensors),
        series(
            "attention_entropy",
            "nats",
            some,
            2.9 - walk(some, len(layers), len(heads), start=0.3, grow=3),
            layers,
            heads,
        ),
        series(
            "attention_peak", "", some, np.minimum(walk(some, len(layers), len(heads), start=0.2), 1), layers, heads
        ),
        series("spectral_norm", "", spectral, walk(spectral, len(matrices), start=0.4, grow=8, noise=0.01), matrices),
        series("dead_units", "share", validations, np.zeros((len(validations), len(layers))), layers),
        series(
            "class_loss",
            "nats per token",
            validations,
            classes,
            ("train", "validation"),
            ("regular", "irregular"),
            ("verb form", "sentence"),
        ),
    ]
    return {one.name: one for one in made}


def healthy(steps: int = 2000, *settings: str, seed: int = 0, name: str = "a") -> RunData:
    """A complete run with all metrics, a record, and samples one of which is hostile."""
    warmup = min(100, steps // 4)
    config = load_config(None, [f"scheduler.total_steps={steps}", f"scheduler.warmup_steps={warmup}", *settings])
    rng = np.random.default_rng(seed)
    samples = [(f"work.past_simple.{i}", f"She worked {i}.") for i in range(40)]
    samples[0] = (HOSTILE, HOSTILE)
    log = log_of(config, steps, seed)
    final = float(np.exp(log.val_loss[-1])) if len(log.val_loss) else None
    return RunData(
        name=name,
        path=f"runs/{name}",
        config=config,
        log=log,
        manifest={"parameters": 103744, "config_hash": "ab" * 32, "hardware": {"cpu": "some processor", "cores": 2}},
        results={
            "ngram_baseline_val_ppl": 13.3,
            "ngram_best_n": 4,
            "val_ppl": final,
            "ppl_improvement_pct": 100 * (13.3 - final) / 13.3 if final else None,
            "peak_rss_mb": 240.0,
            "alerts": [],
        },
        metrics=metrics_of(config, steps),
        rows=rng.integers(0, 40, (steps, 8)),
        recorded=range(steps),
        samples=samples,
    )


def changed(run: RunData, **series: Any) -> RunData:
    """The run with other columns of its log."""
    return replace(run, log=replace(run.log, **series))


def measured(run: RunData, name: str, values: NDArray[Any] | None) -> RunData:
    """The run with other values of a metric, or without it."""
    rest = {key: value for key, value in run.metrics.items() if key != name}
    if values is not None:
        rest[name] = replace(run.metrics[name], values=np.asarray(values, np.float32))
    return replace(run, metrics=rest)


def bare(steps: int) -> RunData:
    """A run without metrics, record, results or validations."""
    run = healthy(max(steps, 1))
    log = run.log
    cut = {key: getattr(log, key)[:steps] for key in ("step", "loss", "norm", "norm_clipped", "tokens_per_s", "lr")}
    none = np.empty(0)
    return replace(
        run,
        log=replace(log, **cut, val_step=none, val_loss=none),
        metrics={},
        rows=None,
        recorded=range(0),
        results={},
        samples=(),
        manifest={},
        ended="unfinished",
        notes=["No results.json.", "No metrics were recorded."],
    )


def broken(run: RunData) -> RunData:
    """NaN in every series."""
    nan = np.full(run.steps, np.nan)
    metrics = {name: replace(one, values=np.full_like(one.values, np.nan)) for name, one in run.metrics.items()}
    log = replace(run.log, loss=nan, norm=nan, norm_clipped=nan, val_loss=np.full_like(run.log.val_loss, np.nan))
    lines = [{"step": i, "nonfinite": {"loss": "nan", "grad_norm": "nan"}} for i in range(run.steps)]
    return replace(run, log=replace(log, broken=lines), metrics=metrics)
