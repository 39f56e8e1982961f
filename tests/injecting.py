"""A tiny run into which faults are injected: random ones, and what there is to see of it. Imported by the tests."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from recording import SMALL

from minitrain.assembly import assemble, prepare_data
from minitrain.config import Config, load_config
from minitrain.data.prepare import Prepared
from minitrain.inject import FAULTS, resolved, targets
from minitrain.loop import Listener, StepStats, watched_step
from minitrain.sections import Injection
from minitrain.state import State
from minitrain.tensors import canonical_bits

STEPS = 12
TINY = [
    *(*SMALL, "data.train_path=small.txt", f"scheduler.total_steps={STEPS}", "scheduler.warmup_steps=2"),
    *("training.val_every=1000", "training.on_nonfinite=continue", "record.keyframe_every=5"),
]
SENTENCES = [
    f"{who} has {what} the letter." for who in ("She", "He", "It") for what in ("written", "read", "a plan in")
]
kinds = st.sampled_from(list(FAULTS))


def inside(examples: int) -> settings:
    """So many random cases, which are told as they were found: making them smaller would take minutes."""
    checks = [HealthCheck.function_scoped_fixture]
    phases = [Phase.explicit, Phase.reuse, Phase.generate]
    return settings(max_examples=examples, deadline=None, suppress_health_check=checks, phases=phases)


@cache
def data() -> Prepared:
    return prepare_data(load_config(None, TINY))


def tiny(*injections: dict[str, Any], more: tuple[str, ...] = ()) -> Config:
    return resolved(load_config(None, [*TINY, *more]).model_copy(update={"injections": [*map(injection, injections)]}))


def injection(told: dict[str, Any]) -> Injection:
    return Injection(**told)


@st.composite
def injections(draw: st.DrawFn, names: st.SearchStrategy[str] = kinds) -> dict[str, Any]:
    """One that is allowed, anywhere in a tiny run."""
    name, config = draw(names), load_config(None, TINY)
    fault = FAULTS[name]
    told: dict[str, Any] = {"name": name, "step": draw(st.integers(int(name == "duplicate_batch"), STEPS - 1))}
    if fault.among:
        target, shape = draw(st.sampled_from(sorted(targets(config, fault).items())))
        told["target"] = target
        if fault.element:
            told["element"] = [draw(st.integers(0, n - 1)) for n in shape]
            if target.endswith("attn.probs"):
                told["element"][2:] = sorted(told["element"][2:], reverse=True)
    if fault.factor is not None:
        told["factor"] = draw(st.sampled_from([0.0, 0.5, 3.0, 50.0, 1e30]) | st.floats(0, 1e6, width=32))
    if fault.bit is not None:
        told["bit"] = draw(st.integers(0, 31))
    return told


@dataclass
class Trace(Listener):
    """A run in memory: state t before step t, what it read, its figures, and the gradients at the clip."""

    states: list[dict[str, np.ndarray]] = field(default_factory=list)
    batches: list[Any] = field(default_factory=list)
    stats: list[StepStats] = field(default_factory=list)
    grads: list[np.ndarray] = field(default_factory=list)

    def starting(self, step: int, batch: Any, state: State) -> None:
        self.batches.append(batch)

    def stepped(self, stats: StepStats, state: State) -> None:
        self.states.append(copied(state))
        self.stats.append(stats)


def copied(state: State) -> dict[str, np.ndarray]:
    groups = {"param": state.params, "m": state.m, "v": state.v}
    return {f"{kind}.{name}": canonical_bits(x).copy() for kind, g in groups.items() for name, x in g.items()}


def trace(config: Config, steps: int = STEPS) -> Trace:
    parts = assemble(config, data())
    seen = Trace([copied(parts.state())])
    parts.hooks.listen(lambda site, grads: seen.grads.append(canonical_bits(grads).copy()), "clip")
    for step in range(steps):
        batch = parts.batches.batch_at(step)
        watched_step(parts.model, parts.optimizer, parts.scheduler, batch, [seen], parts.injector)
    return seen


@cache
def baseline(*more: str) -> Trace:
    return trace(tiny(more=more))


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray], but: tuple[str, ...] = ()) -> bool:
    return all(np.array_equal(a[name], b[name]) for name in a if name not in but)


def floats(bits: np.ndarray) -> np.ndarray:
    return bits.view(np.float32)
