"""What listening costs: nobody, probes and Python hooks, a fire at a time and over a default step.

A fire is measured on a plan of a thousand sites without operations; the call of the Python function itself is measured
too and taken off. Of a step the fastest of many is told; what stands beside is measured in turn with it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import numpy as np

from minitrain._ext.plan import CompiledBackend, Plan
from minitrain.hooks import Hooks
from minitrain.model import MiniGPT
from minitrain.optim import AdamW

FIRES = 1000
ROUNDS = 400
SEQUENCES = 8


def listener(site: str, tensor: object) -> None:
    """Does nothing."""


def per_fire(listen: Callable[[Hooks], object], elements: int = 0) -> float:
    """Seconds of one site in a row of a thousand."""
    plan, hooks, tensor = Plan(CompiledBackend()), Hooks(), np.zeros(elements, np.float32)
    for i in range(FIRES):
        plan.site(f"site.{i}", tensor)
    listen(hooks)
    return fastest([partial(plan.run, hooks)])[0] / FIRES


def call() -> float:
    """Seconds of calling the Python function from Python."""
    tensor = np.zeros(0, np.float32)

    def work() -> None:
        for site in names:
            listener(site, tensor)

    names = [f"site.{i}" for i in range(FIRES)]
    return fastest([work])[0] / FIRES


def steps(ways: dict[str, Callable[[Hooks], object]]) -> dict[str, float]:
    """Seconds of a default training step with each set of hooks, on one thread, in turn."""
    works = []
    for listen in ways.values():
        model = MiniGPT()
        optimizer = AdamW(hooks=model.hooks)
        listen(model.hooks)
        works.append(partial(step, model, optimizer, *batch(model)))
    return dict(zip(ways, fastest(works), strict=True))


def batch(model: MiniGPT) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and a mask of a full batch."""
    shape = (SEQUENCES, model.config.max_seq_len)
    return np.zeros(shape, np.int32), np.ones(shape, np.bool_)


def step(model: MiniGPT, optimizer: AdamW, tokens: np.ndarray, mask: np.ndarray) -> None:
    model.forward(tokens, tokens, mask, mask)
    optimizer.step(model.params, model.backward())


def fastest(works: list[Callable[[], None]]) -> list[float]:
    """The least seconds of each over all rounds, taken in turn."""
    best = [float("inf")] * len(works)
    for _ in range(ROUNDS):
        for i, work in enumerate(works):
            since = time.perf_counter()
            work()
            best[i] = min(best[i], time.perf_counter() - since)
    return best


def nobody() -> float:
    """Seconds that a pass spends on finding out that nobody listens."""
    plan, hooks = Plan(CompiledBackend()), Hooks()
    asked, unasked = fastest([lambda: repeat(partial(plan.run, hooks)), lambda: repeat(partial(plan.run_part, 0, 0))])
    return (asked - unasked) / FIRES


def repeat(work: Callable[[], None]) -> None:
    for _ in range(FIRES):
        work()


def python(hooks: Hooks) -> None:
    """The cheapest Python hook at every site."""
    hooks.listen(listener)


def not_due(hooks: Hooks) -> None:
    """A probe at every site, and a step that is none of its."""
    hooks.probe(every=2)
    hooks.step = 1


WAYS: dict[str, Callable[[Hooks], object]] = {
    "nobody": lambda hooks: None,
    "nobody, again": lambda hooks: None,
    "a probe at every site that is not due": not_due,
    "a Python hook at one site": lambda hooks: hooks.listen(listener, "loss"),
    "a Python hook at every site": python,
    "a probe of the parameters": lambda hooks: hooks.probe("param.*"),
    "a probe at every site": Hooks.probe,
}


def costs() -> dict[str, dict[str, float]]:
    """Seconds of a fire of each kind, and of a step with each set of hooks."""
    fires = {
        "a pass, nobody listening": nobody(),
        "a hook that is not due": per_fire(not_due),
        "a probe, 0 elements": per_fire(Hooks.probe),
        "a probe, 1024 elements": per_fire(Hooks.probe, 1024),
        "a Python hook, its call taken off": per_fire(python) - call(),
        "the call": call(),
    }
    return {"fires": fires, "steps": steps(WAYS)}
