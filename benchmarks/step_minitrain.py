"""One process of the benchmark: times training steps of minitrain, and the Python in them. Run by run.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from time import perf_counter


def main(folder: Path, steps: int, threads: int) -> None:
    import numpy as np

    from minitrain._ext.plan import Listeners, Plan
    from minitrain.config import config_from
    from minitrain.data.batches import Batch
    from minitrain.loop import train_step
    from minitrain.model import MiniGPT, make_backend
    from minitrain.optim import AdamW
    from minitrain.schedule import Scheduler

    about = json.loads((folder / "about.json").read_text())
    config = config_from(about["config"], "about.json")
    arrays = dict(np.load(folder / "batches.npz"))
    batches = [
        Batch(**{name: array[i] for name, array in arrays.items()}, dataset_ids=()) for i in range(len(arrays["rows"]))
    ]
    backend = make_backend("compiled", threads)
    model = MiniGPT(config.model, seed=config.training.rng_seed, backend=backend)
    optimizer, scheduler = AdamW(config.optimizer, backend=backend), Scheduler.from_config(config)

    def timed_step(step: int) -> tuple[float, float]:
        batch = batches[step % len(batches)]
        start = perf_counter()
        stats = train_step(model, optimizer, scheduler, batch)
        return perf_counter() - start, stats.loss

    loss, times = 0.0, []
    for step in range(steps):
        seconds, loss = timed_step(step)
        times.append(seconds)

    # A second time with a clock around the plans: the rest of a step is Python.
    engine_seconds = 0.0
    run = Plan.run

    def timed_run(plan: Plan, listeners: Listeners | None = None) -> None:
        nonlocal engine_seconds
        start = perf_counter()
        run(plan, listeners)
        engine_seconds += perf_counter() - start

    Plan.run = timed_run  # type: ignore[method-assign]
    python = []
    for step in range(steps, 2 * steps):
        engine_seconds = 0.0
        seconds, _ = timed_step(step)
        python.append(seconds - engine_seconds)
    print(json.dumps({"seconds": times, "loss": loss, "python": python}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
