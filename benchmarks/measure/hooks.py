"""What listening costs: nobody, probes and Python hooks, a fire at a time and over a default step.

A fire is measured on a plan of a thousand sites without operations; the call of the Python function itself is measured
too and taken off. Of a step the fastest of many is told; what stands beside is measured in turn with it, as in the
experiment 19-overhead.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from measure.workloads import SIZES, random_batches
from minitrain._ext import engine
from minitrain._ext.plan import CompiledBackend, Plan, instruction_set
from minitrain.assembly import prepare_data
from minitrain.config import Config
from minitrain.experiments.timing import Steps, Way, bare, fastest, instructions, listener
from minitrain.hooks import Hooks
from minitrain.loop import train_step
from minitrain.model import MiniGPT
from minitrain.optim import AdamW
from minitrain.schedule import Scheduler

FIRES = 1000
TURNS = 400
CACHED = 4096
"""Elements that the first cache holds."""
STEP_ROUNDS = 8
"""Of `timing.Steps`, each of 50 steps; the fastest of all counts."""


def per_fire(listen: Callable[[Hooks], object], elements: int = 0) -> float:
    """Seconds of one site in a row of a thousand."""
    plan, hooks, tensor = Plan(CompiledBackend()), Hooks(), np.zeros(elements, np.float32)
    for i in range(FIRES):
        plan.site(f"site.{i}", tensor)
    listen(hooks)
    return fastest([partial(plan.run, hooks)], TURNS)[0] / FIRES


def call() -> float:
    """Seconds of calling the Python function from Python."""
    tensor = np.zeros(0, np.float32)

    def work() -> None:
        for site in names:
            listener(site, tensor)

    names = [f"site.{i}" for i in range(FIRES)]
    return fastest([work], TURNS)[0] / FIRES


def steps(ways: dict[str, Way]) -> dict[str, float]:
    """Seconds of a default training step with each set of hooks, on one thread, in turn."""
    config = Config()
    timed = Steps(ways, config, prepare_data(config))
    rounds = [timed.round() for _ in range(STEP_ROUNDS)]
    return {way: min(each[way] for each in rounds) for way in ways}


def on(listen: Callable[[Hooks], object]) -> Way:
    """These hooks on a run."""
    return lambda parts: listen(parts.hooks)


def nobody() -> float:
    """Seconds that a pass spends on finding out that nobody listens."""
    plan, hooks = Plan(CompiledBackend()), Hooks()
    works = [lambda: repeat(partial(plan.run, hooks)), lambda: repeat(partial(plan.run_part, 0, 0))]
    asked, unasked = fastest(works, TURNS)
    return (asked - unasked) / FIRES


def repeat(work: Callable[[], None]) -> None:
    for _ in range(FIRES):
        work()


def python(hooks: Hooks) -> None:
    """The cheapest Python hook at every site."""
    hooks.listen(listener)


def not_due(hooks: Hooks) -> None:
    """A probe at every site, and a step that is none of its: of a run only the first is."""
    hooks.probe(every=2**30)
    hooks.step = 1


WAYS: dict[str, Way] = {
    "no dispatcher": bare,
    "nobody": on(lambda hooks: None),
    "nobody, again": on(lambda hooks: None),
    "a probe at every site that is not due": on(not_due),
    "a Python hook at one site": on(lambda hooks: hooks.listen(listener, "loss")),
    "a Python hook at every site": on(python),
    "a probe of the parameters": on(lambda hooks: hooks.probe("param.*")),
    "a probe at every site": on(Hooks.probe),
}


def elements() -> int:
    """At all sites of a default step."""
    model = MiniGPT()
    optimizer, total = AdamW(hooks=model.hooks), 0
    shape = (Config().training.batch_size, model.config.max_seq_len)

    def count(site: str, tensor: NDArray[Any]) -> None:
        nonlocal total
        total += tensor.size

    model.hooks.listen(count)
    tokens, mask = np.zeros(shape, np.int32), np.ones(shape, np.bool_)
    model.forward(tokens, tokens, mask, mask)
    optimizer.step(model.params, model.backward())
    return total


def larger() -> dict[str, float]:
    """Seconds of a step of size M with nobody and with a probe at every site, on one thread, in turn."""
    size, ways = SIZES["M"], {"nobody": lambda hooks: None, "a probe at every site": Hooks.probe}
    learners = []
    for listen in ways.values():
        model = MiniGPT(size.config.model)
        optimizer = AdamW(size.config.optimizer, backend=model.backend, hooks=model.hooks)
        listen(model.hooks)
        learners.append((model, optimizer, Scheduler.from_config(size.config)))
    times = [fastest([partial(train_step, *each, batch) for each in learners], 1) for batch in random_batches(size)]
    return dict(zip(ways, map(min, zip(*times[1:], strict=True)), strict=True))


def costs() -> dict[str, Any]:
    """Seconds of a fire of each kind, and of a step with each set of hooks.

    Where there is AVX-512, the probes are measured held to AVX2 too: that has a bar of its own.
    """
    fires = {
        "a pass, nobody listening": nobody(),
        "a hook that is not due": per_fire(not_due),
        "a probe, 0 elements": per_fire(Hooks.probe),
        "a probe, 1024 elements": per_fire(Hooks.probe, 1024),
        "a probe, 4096 elements": per_fire(Hooks.probe, CACHED),
        "a Python hook, its call taken off": per_fire(python) - call(),
        "the call": call(),
    }
    found = {"fires": fires, "steps": steps(WAYS), "steps of M": larger(), "elements": elements()}
    if "avx2" in engine.instruction_sets() and instruction_set() != "avx2":
        with instructions("avx2"):
            found["steps, avx2"] = steps({way: WAYS[way] for way in ("nobody", "a probe at every site")})
    return found
