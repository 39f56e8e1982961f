"""Which metrics there are: the one table from which the files, their reader and the page derive."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from minitrain.config import Config
from minitrain.record.layout import ArraySpec
from minitrain.tensors import activation_table, parameter_table

FORMAT = "minitrain-metrics"
FORMAT_VERSION = 1
VECTORS = "spectral_vector"
"""No metric, but what the next measurement of one goes on from, in this process or another."""
SPLITS, CLASSES, SCOPES = ("train", "validation"), ("regular", "irregular"), ("verb form", "sentence")


@dataclass(frozen=True)
class Metric:
    """One metric: a number, or one for each of ``axes``, at every step of its cadence."""

    name: str
    cadence: str
    axes: tuple[str, ...]
    unit: str
    formula: str


METRICS = (
    Metric("batch_regular", "step", (), "1", "share of the batch's samples whose verb is regular"),
    Metric("batch_rare", "step", (), "1", "share of the batch's tokens that are rare in the training text"),
    Metric("batch_duplicates", "step", (), "1", "samples that the batch has twice or shares with the one before"),
    Metric("activation_mean_abs", "measured_step", ("site",), "1", "mean |x|"),
    Metric("activation_std", "measured_step", ("site",), "1", "population standard deviation of x"),
    Metric("grad_norm", "measured_step", ("tensor",), "1", "L2 norm of the gradient before the clip"),
    Metric("grad_activation_ratio", "measured_step", ("site",), "1", "L2 norm of the gradient over that of x"),
    Metric("update_ratio", "measured_step", ("tensor",), "1", "L2 norm of the change of a tensor over its norm"),
    Metric("attention_entropy", "examined_step", ("layer", "head"), "nat", "mean over queries of -sum p ln p"),
    Metric("attention_peak", "examined_step", ("layer", "head"), "1", "mean over queries of the largest weight"),
    Metric("spectral_norm", "examined_step", ("matrix",), "1", "largest singular value, by power iteration"),
    Metric("dead_units", "val_step", ("layer",), "1", "share of FFN units never above 0 on the validation text"),
    Metric("class_loss", "val_step", ("split", "class", "scope"), "nat", "mean cross entropy over the tokens"),
)
"""In the order of the panels that show them; ``tensor`` and ``site`` as in tensors.py."""

CADENCES = ("step", "measured_step", "examined_step", "val_step")
"""Every step; every ``metrics.every``; every ``metrics.slow_every``; every validation."""


def activations(config: Config) -> list[str]:
    """The forward sites that hold activations, in order: all but the loss."""
    return [a.name for a in activation_table(config.model, 1, 1) if a.site]


@dataclass(frozen=True)
class MetricsLayout:
    """The arrays of ``metrics.zarr``: the row r of a cadence belongs to its r-th step."""

    config: Config
    start: int
    end: int

    @cached_property
    def labels(self) -> dict[str, tuple[str, ...]]:
        """What the places of each axis stand for."""
        table, c = parameter_table(self.config.model), self.config.model
        return {
            "site": tuple(activations(self.config)),
            "tensor": tuple(p.name for p in table),
            "matrix": tuple(self.widths),
            "layer": tuple(f"block.{i}" for i in range(c.n_layer)),
            "head": tuple(str(i) for i in range(c.n_head)),
            "split": SPLITS,
            "class": CLASSES,
            "scope": SCOPES,
        }

    @cached_property
    def steps(self) -> dict[str, range | list[int]]:
        """The steps of each cadence. Validations are of states: every multiple of val_every but 0, and the last."""
        metrics, val_every = self.config.metrics, self.config.training.val_every

        def every(n: int) -> range:
            return range(-(-self.start // n) * n, self.end, n)

        return {
            "step": range(self.start, self.end),
            "measured_step": every(metrics.every),
            "examined_step": every(metrics.slow_every),
            "val_step": [s for s in every(val_every) if s] + [self.end],
        }

    @cached_property
    def arrays(self) -> dict[str, ArraySpec]:
        """Of every metric, and the steps of each cadence by its name."""
        specs = [
            ArraySpec(cadence, "<i8", "once", (cadence,), (), {"long_name": "step", "units": "1"})
            for cadence in CADENCES
            if len(self.steps[cadence])
        ]
        specs += [
            ArraySpec(
                m.name,
                "<f4",
                "blocks",
                (m.cadence, *m.axes),
                tuple(len(self.labels[axis]) for axis in m.axes),
                {"long_name": m.formula, "units": m.unit},
            )
            for m in METRICS
            if len(self.steps[m.cadence])
        ]
        if self.steps["examined_step"]:
            about = {"long_name": "where power iteration stands, matrix after matrix", "units": "1"}
            width = sum(self.widths.values())
            specs.append(ArraySpec(VECTORS, "<f8", "blocks", ("examined_step", "component"), (width,), about))
        return {spec.name: spec for spec in specs}

    @cached_property
    def widths(self) -> dict[str, int]:
        """The second length of each matrix: that of its vector in power iteration."""
        return {p.name: p.shape[1] for p in parameter_table(self.config.model) if p.decays}

    def of(self, cadence: str) -> list[ArraySpec]:
        """The metrics of this cadence."""
        return [spec for spec in self.arrays.values() if spec.dims[0] == cadence and spec.form == "blocks"]

    @property
    def attributes(self) -> Mapping[str, Any]:
        """Of the group."""
        labels = {axis: list(names) for axis, names in self.labels.items()}
        return {"format": FORMAT, "format_version": FORMAT_VERSION, **labels}
