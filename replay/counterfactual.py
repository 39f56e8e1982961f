"""Which gradients explain the moments that a step left: clip and update once more, with what the record says of them.

A changed gradient changes the norm, so where the clip is engaged it changes every gradient that the update reads. With
the recorded norm the factor of the clip is known: the replayed gradients, scaled by it, give the recorded moments of
every tensor whose gradient was right.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from minitrain._ext.plan import Plan
from minitrain.model import make_backend
from minitrain.optim import AdamW
from minitrain.record.digests import state_digests
from minitrain.replay.elements import Elements, compare
from minitrain.replay.rerun import Rerun
from minitrain.state import State
from minitrain.tensors import parameter_of, sites


@dataclass(frozen=True)
class Explained:
    """What the moments tell of the gradients."""

    tensors: list[str]
    """Those whose gradient was another, in the order of the backward pass."""
    elements: Elements | None
    """How m of the only one differs, where it is recorded."""
    factor: float | None
    """By which every gradient had been multiplied, if that explains the whole state to the bit."""


def explain(run: Rerun) -> Explained | None:
    """None where the moments do not tell."""
    ratio = run.frame.grad_norm / run.stats.grad_norm if run.stats.grad_norm else float("nan")
    for guess in sorted({float(f"{ratio:.{digits}g}") for digits in (2, 4, 6)}):
        if np.isfinite(guess) and guess != 1:
            state, norm = _updated(run, guess, None)
            if norm == run.frame.grad_norm and np.array_equal(state_digests(state), run.frame.digest_out):
                return Explained([], None, guess)
    factor = _clip_factor(run)
    if factor is None:
        return None
    state, _ = _updated(run, 1.0, factor)
    differs = (state_digests(state) != run.frame.digest_out)[1:].any(axis=0)
    wrong = {name for name, other in zip(run.before.params, differs, strict=True) if other}
    order = [parameter_of(site) for site in sites(run.source.config.model) if site.startswith("grad.")]
    tensors = [name for name in order if name in wrong]
    if not tensors:
        return None
    elements = None
    if len(tensors) == 1:
        then = run.source.left(run.step, "m", tensors[0])
        elements = None if then is None else compare(then, state.m[tensors[0]])
    return Explained([name for name in tensors if name], elements, None)


def _clip_factor(run: Rerun) -> float | None:
    """By what the recorded step scaled its gradients; None where that cannot be told."""
    optimizer, frame = run.source.config.optimizer, run.frame
    if not (np.isfinite(frame.grad_norm) and np.isfinite(frame.grad_norm_clipped)):
        return None
    if optimizer.clip is None or optimizer.clip_value is not None:
        return 1.0 if frame.grad_norm_clipped == frame.grad_norm else None
    return min(1.0, optimizer.clip / (frame.grad_norm + 1e-12))


def _updated(run: Rerun, multiple: float, factor: float | None) -> tuple[State, float]:
    """State t+1, and the norm, after gradients times ``multiple``; clipped by ``factor``, or as configured if None."""
    config = run.source.config
    backend = make_backend(config.training.backend)
    optimizer = AdamW(config.optimizer, lr=run.frame.lr, backend=backend)
    params, grads = run.before.params.like(), run.grads.like()
    params.flat[:], grads.flat[:] = run.before.params.flat, run.grads.flat
    m, v = optimizer.bind(params, grads)
    m.flat[:], v.flat[:] = run.before.m.flat, run.before.v.flat
    optimizer.updates = run.step
    if multiple != 1:
        with np.errstate(all="ignore"):
            grads.flat[:] *= np.float32(multiple)
    norm = float("nan")
    if factor is None:
        norm = optimizer.clip(params, grads).before
    elif factor < 1:
        plan = Plan(backend)
        plan.add("scale", grads.flat, np.array([factor]))
        plan.run()
    optimizer.update(params, grads)
    return State(run.step + 1, params, m, v), norm
