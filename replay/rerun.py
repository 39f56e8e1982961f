"""One step run again, without injections, from the state that it read: everything that it passes is kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minitrain.data.batches import Batch
from minitrain.loop import StepStats
from minitrain.record.journal import Frame
from minitrain.replay.machine import Machine
from minitrain.replay.source import RecordedRun
from minitrain.replay.states import empty_state
from minitrain.replay.verifier import Difference
from minitrain.replay.which_step import start_of
from minitrain.state import State, copy_state
from minitrain.tensors import Tensors, parameter_table, phase_of, shared, sites

BEFORE = 5
"""Steps before the faulty one whose activations are told."""


@dataclass(frozen=True)
class Rerun:
    """A step as it should have been, and what was recorded of it."""

    source: RecordedRun
    step: int
    frame: Frame
    batch: Batch
    """What the data give it."""
    before: State
    """State t as the step before left it in a replay."""
    after: State
    """State t+1."""
    stats: StepStats
    differences: list[Difference]
    """Of the record from this step; none where it read another state (see `which_step.Suspect`)."""
    arrays: dict[str, NDArray[Any]]
    """Every array of the passes, and ``grad.<name>`` as the backward pass left them, by the names of the sites."""
    grads: Tensors
    """The gradients before they were clipped."""
    nonfinite: list[str]
    """The sites at which a number is not finite, in order."""
    magnitudes: list[dict[str, Any]]
    """``{"step": t, "max_abs": {layer: largest |x| of its forward sites}}`` of some steps before, and of this one."""


def rerun(source: RecordedRun, step: int) -> Rerun:
    """Run it. Raises RunError where the data or the record cannot be read."""
    machine = Machine(source, injections=False)
    model, magnitudes = machine.config.model, []
    first = max(source.run.start, step - BEFORE)
    with machine.hooks.probe() as probe:
        machine.put(start_of(source, first))
        while machine.state.step < step:
            here = machine.state.step
            machine.step()
            if here >= first:
                magnitudes.append({"step": here, "max_abs": _largest(probe.stats)})
        before = _copy(machine.state, source)
        grads, arrays = Tensors(parameter_table(model)), {}

        def gradient(site: str, tensor: NDArray[Any]) -> None:
            grads[site.removeprefix("grad.")][...] = tensor

        def clipped(site: str, tensor: NDArray[Any]) -> None:
            arrays.update({name: array.copy() for name, array in machine.arrays.items()})

        with machine.hooks.listen(gradient, "grad.*"), machine.hooks.listen(clipped, "clip"):
            batch = machine.batch
            stats, differences = machine.step()
        magnitudes.append({"step": step, "max_abs": _largest(probe.stats)})
        wrong = [site for site in sites(model) if site in probe.stats and not probe.stats[site].finite]
    arrays |= {site: arrays[array] for site, array in shared(model).items()}
    arrays |= {f"grad.{name}": grad for name, grad in grads.items()}
    after = _copy(machine.state, source)
    return Rerun(
        source,
        step,
        source.frame(step),
        batch,
        before,
        after,
        stats,
        list(differences),
        arrays,
        grads,
        wrong,
        magnitudes,
    )


def _copy(state: State, source: RecordedRun) -> State:
    copy = empty_state(source.config, state.step)
    copy_state(state, copy)
    return copy


def _largest(stats: dict[str, Any]) -> dict[str, float]:
    """By layer: ``embed``, ``block.0`` .. ``ln_f``, ``logits``; NaN where one is there, Inf where one is."""
    largest: dict[str, float] = {}
    for site, s in stats.items():
        head, *more = site.split(".")
        layer = f"{head}.{more[0]}" if head == "block" else head
        if phase_of(site) != "forward" or (head != "block" and layer not in ("embed", "ln_f", "logits")):
            continue
        size = float("nan") if s.nan else float("inf") if s.inf else max(abs(s.min), abs(s.max))
        largest[layer] = float(np.maximum(largest.get(layer, 0.0), size))
    return largest
