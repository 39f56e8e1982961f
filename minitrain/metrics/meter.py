"""The meter: a listener of the training loop that measures what the table says.

Statistics of sites are the engine's (a probe); the rest is NumPy between the steps. It only looks: the bits of the run
are the same with it and without.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minitrain.assembly import Parts
from minitrain.config import Config
from minitrain.data.batches import Batch, EvalBatches
from minitrain.data.prepare import Prepared
from minitrain.hooks import SiteStats
from minitrain.loop import Evaluation, Listener, StepStats, evaluate
from minitrain.metrics import formulas
from minitrain.metrics.classes import ClassLosses, probe_of
from minitrain.metrics.composition import Composition
from minitrain.metrics.store import MetricsWriter
from minitrain.metrics.table import VECTORS, MetricsLayout
from minitrain.record.layout import BLOCK
from minitrain.run_folder import RunFolder
from minitrain.stability import WINDOW, spike_steps
from minitrain.state import State

NAN = math.nan


class Meter(Listener):
    """Measures a run into ``metrics.zarr``; `summary` is the line that the log has of it."""

    def __init__(self, folder: RunFolder, config: Config, data: Prepared, parts: Parts, start: int = 0) -> None:
        """Begin at the parts' current step, of a run that began at ``start``. Raises RunError and OSError."""
        self._config, self._parts = config, parts
        self._layout = MetricsLayout(config, start, config.scheduler.total_steps)
        step = parts.scheduler.step_count
        self._writer = MetricsWriter(folder, self._layout, step)
        self._every, self._slow = config.metrics.every, config.metrics.slow_every
        sites, params = self._layout.labels["site"], parts.model.params
        hooks = parts.hooks
        self._probes = [hooks.probe(pattern, self._every) for pattern in _patterns(sites)]
        self._handles = [*self._probes, hooks.listen(self._attention, "block.*.attn.probs", self._slow)]
        self._before = np.empty_like(params.flat)
        self._vectors = self._first_vectors()
        self._heads: list[tuple[NDArray[np.float64], NDArray[np.float64]]] = []
        self._batch: Batch | None = None
        self._composition = Composition(data, config.model.vocab_size, self._rows_before(step))
        self._dead = [np.ones(config.model.d_ff, np.bool_) for _ in range(config.model.n_layer)]
        self._train = probe_of(data.train, config.metrics.probe)
        self._classes = [ClassLosses(split, data.tokenizer) for split in (self._train, data.val)]
        self._losses = [line["loss"] for line in folder.log_lines() if "loss" in line and line["step"] < step]
        self._spikes = 0
        self._new_spikes()

    def _rows_before(self, step: int) -> NDArray[np.int64]:
        """The rows of the batch before this step; none before the first."""
        if step == 0:
            return np.full(self._config.training.batch_size, -1, np.int64)
        return self._parts.batches.rows_at(step - 1)

    def _first_vectors(self) -> dict[str, NDArray[np.float64]]:
        """Where power iteration begins: where it stood before this process, if it did."""
        widths = self._layout.widths
        stored = self._writer.last.get(VECTORS)
        if stored is None or not np.isfinite(stored).all():
            return {name: formulas.first_vector(width) for name, width in widths.items()}
        parts = np.split(stored, np.cumsum(list(widths.values()))[:-1])
        return dict(zip(widths, parts, strict=True))

    # The step

    def starting(self, step: int, batch: Batch, state: State) -> None:
        self._batch = batch
        if step % self._every == 0:
            np.copyto(self._before, state.params.flat)

    def _attention(self, site: str, probs: NDArray[Any]) -> None:
        assert self._batch is not None
        self._heads.append(formulas.attention(probs, self._batch.attn_pad_mask))

    def stepped(self, stats: StepStats, state: State) -> None:
        assert self._batch is not None
        self._losses.append(stats.loss)
        self._composition.add(self._batch)
        if len(self._composition) == BLOCK:
            self._compose()
        if stats.step % self._every == 0:
            self._measure(state)
        if stats.step % self._slow == 0:
            self._examine(state)

    def _measure(self, state: State) -> None:
        """What a step says of activations, gradients and updates."""
        told: dict[str, SiteStats] = {}
        for probe in self._probes:
            told |= probe.stats
        sites, tensors = self._layout.labels["site"], self._layout.labels["tensor"]
        update = formulas.update_ratios(self._before, state.params.flat, state.params.offsets)
        row = {
            "activation_mean_abs": [_finite(told[s], "mean_abs") for s in sites],
            "activation_std": [math.sqrt(_finite(told[s], "variance")) for s in sites],
            "grad_norm": [_finite(told[f"grad.{name}"], "l2") for name in tensors],
            "grad_activation_ratio": [_ratio(told.get(f"grad:{s}"), told[s]) for s in sites],
            "update_ratio": update,
        }
        self._writer.append("measured_step", row)

    def _examine(self, state: State) -> None:
        """What costs more: every head, every matrix."""
        norms = []
        for name, vector in self._vectors.items():
            norm, self._vectors[name] = formulas.spectral_norm(state.params[name], vector)
            norms.append(norm)
        entropy, peak = zip(*self._heads, strict=True)
        self._heads.clear()
        row = {"attention_entropy": entropy, "attention_peak": peak, "spectral_norm": norms}
        self._writer.append("examined_step", row | {VECTORS: np.concatenate(list(self._vectors.values()))})

    # Validation

    def evaluated(self, batch: Batch) -> None:
        arrays, tokens = self._parts.model.activations(), batch.attn_pad_mask & (batch.rows >= 0)[:, np.newaxis]
        self._classes[1].take(batch.rows, arrays["losses"])
        for i, dead in enumerate(self._dead):
            if dead.any():
                self._dead[i] = formulas.never_active(arrays[f"block.{i}.ffn.pre"], tokens, dead)

    def validated(self, step: int, result: Evaluation) -> None:
        shares = [float(dead.mean()) for dead in self._dead]
        for dead in self._dead:
            dead[:] = True
        self._evaluate_probe()
        losses = [split.means() for split in self._classes]
        self._writer.append("val_step", {"dead_units": shares, "class_loss": losses})
        self._spikes = self._new_spikes()

    def _evaluate_probe(self) -> None:
        """The training sentences of the probe, run like the validation."""
        if not len(self._train):
            return
        classes, model = self._classes[0], self._parts.model

        class Takes(Listener):
            def evaluated(self, batch: Batch) -> None:
                classes.take(batch.rows, model.activations()["losses"])

        evaluate(model, EvalBatches(self._train, self._config.training.batch_size), [Takes()])

    def _new_spikes(self) -> int:
        """How many steps since the last validation were spikes."""
        found = len(spike_steps(self._losses))
        self._losses = self._losses[-WINDOW - 1 :]
        return found

    def summary(self) -> dict[str, float]:
        """What the log says of the last validation and the newest measurements, as far as it is finite."""
        last = self._writer.last
        told = {short: f(np.asarray(last[name])) for name, (short, f) in _SUMMARY.items() if name in last}
        return {**{name: round(float(x), 6) for name, x in told.items() if np.isfinite(x)}, "spikes": self._spikes}

    def _compose(self) -> None:
        for row in self._composition.rows():
            self._writer.append("step", row)

    def save(self) -> None:
        """Write what has been measured. Raises OSError."""
        self._compose()
        self._writer.flush()

    def close(self) -> None:
        """Write and leave the sites. Raises OSError."""
        for handle in self._handles:
            handle.remove()
        self.save()


def _quiet(f: Any) -> Any:
    """``f`` over what is not NaN; NaN where all is."""
    return lambda x: f(x[np.isfinite(x)]) if np.isfinite(x).any() else NAN


_SUMMARY: dict[str, tuple[str, Any]] = {
    "activation_mean_abs": ("activation_largest", _quiet(np.max)),
    "update_ratio": ("update_ratio_median", _quiet(np.median)),
    "attention_entropy": ("attention_entropy_least", _quiet(np.min)),
    "attention_peak": (
        "heads_on_one_key",
        lambda x: float(np.mean(x > formulas.ONE_KEY)) if np.isfinite(x).all() else NAN,
    ),
    "spectral_norm": ("spectral_norm_largest", _quiet(np.max)),
    "dead_units": ("dead_units_largest", _quiet(np.max)),
    "class_loss": ("val_loss_irregular_minus_regular", lambda x: x[1, 1, 1] - x[1, 0, 1]),
}
"""What the log has of a metric: under which name, and how it comes from the values."""


def _patterns(sites: tuple[str, ...]) -> list[str]:
    """Globs that match the forward sites, their gradients and those of the parameters, and no state."""
    heads = sorted({site.partition(".")[0] for site in sites})
    forward = [f"{head}.*" if head == "block" else head for head in heads]
    return [*forward, "grad:*", "grad.*"]


def _finite(stats: SiteStats, name: str) -> float:
    """This statistic; NaN where an element is not finite."""
    return float(getattr(stats, name)) if stats.finite else NAN


def _ratio(gradient: SiteStats | None, activation: SiteStats) -> float:
    """L2 norm of a gradient over that of the activation; NaN where there is no gradient."""
    if gradient is None or not activation.l2:
        return NAN
    return _finite(gradient, "l2") / _finite(activation, "l2")
