"""minitrain on the race track: `train_step`, as the loop calls it."""

from __future__ import annotations

from statistics import median
from time import perf_counter

from minitrain._ext.plan import Listeners, Plan
from minitrain.config import config_from
from minitrain.data.batches import Batch
from minitrain.environment import versions
from minitrain.loop import train_step
from minitrain.model import MiniGPT, make_backend
from minitrain.optim import AdamW
from minitrain.schedule import Scheduler
from minitrain.state import State
from sides.work import Work


class Racer:
    def __init__(self, work: Work, threads: int, style: str) -> None:
        config = config_from(work.config, "the benchmark")
        backend = make_backend("compiled", threads)
        self.model = MiniGPT(config.model, seed=config.training.rng_seed, backend=backend)
        self.optimizer = AdamW(config.optimizer, backend=backend)
        self.scheduler = Scheduler.from_config(config)
        self.batches = [Batch(**arrays, dataset_ids=()) for arrays in work.batches]
        self.versions = {name: str(versions()[name]) for name in ("minitrain", "python")} | {"isa": backend.isa}

    def step(self, n: int) -> tuple[float, float]:
        stats = train_step(self.model, self.optimizer, self.scheduler, self.batches[n % len(self.batches)])
        return stats.loss, stats.grad_norm

    def digest(self) -> str:
        """Of parameters, m and v."""
        m, v = self.optimizer.bind(self.model.params, self.model.grads)
        return State(self.scheduler.step_count, self.model.params, m, v).digest()

    def extras(self) -> dict[str, float]:
        """The Python in a step: what is left of it beside the engine's plans."""
        engine = 0.0
        run = Plan.run

        def timed_run(plan: Plan, listeners: Listeners | None = None) -> None:
            nonlocal engine
            start = perf_counter()
            run(plan, listeners)
            engine += perf_counter() - start

        shares = []
        Plan.run = timed_run  # type: ignore[method-assign]
        try:
            for n in range(100):
                engine, start = 0.0, perf_counter()
                self.step(n)
                shares.append(1 - engine / (perf_counter() - start))
        finally:
            Plan.run = run  # type: ignore[method-assign]
        return {"python_share": median(shares)}
