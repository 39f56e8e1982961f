"""JAX on the race track: one jitted step whose state is donated; batches are device arrays before the clock starts."""

from __future__ import annotations

import jax
import numpy as np
from jax_model import load_state, train_step

from sides.work import Work, digest_of


class Racer:
    def __init__(self, work: Work, threads: int, style: str) -> None:
        self.rates = np.array(work.rates, np.float32)
        self.state = load_state(work.weights)
        names = ("inputs", "targets", "loss_mask")
        self.batches = [tuple(jax.device_put(batch[name]) for name in names) for batch in work.batches]
        self.train_step = train_step(work.model, work.optimizer)
        self.versions = {"jax": jax.__version__}

    def step(self, n: int) -> tuple[float, float]:
        batch = self.batches[n % len(self.batches)]
        self.state, loss, norm = self.train_step(self.state, self.rates[n], np.float32(n + 1), *batch)
        jax.block_until_ready(self.state)
        return float(loss), float(norm)

    def digest(self) -> str:
        params = self.state[0]
        return digest_of(np.asarray(params[name]) for name in sorted(params))

    def extras(self) -> dict[str, float]:
        return {}
