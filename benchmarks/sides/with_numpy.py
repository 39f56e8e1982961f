"""NumPy on the race track."""

from __future__ import annotations

import numpy as np
from numpy_model import AdamW, NumpyMiniGPT

from sides.work import Work, digest_of


class Racer:
    def __init__(self, work: Work, threads: int, style: str) -> None:
        self.work = work
        self.model = NumpyMiniGPT(work.model, work.weights)
        self.optimizer = AdamW(self.model, work.optimizer)
        blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
        self.versions = {"numpy": np.__version__, "blas": f"{blas['name']} {blas['version']}"}

    def step(self, n: int) -> tuple[float, float]:
        batch = self.work.batch(n)
        loss = self.model.loss_and_gradients(batch["inputs"], batch["targets"], batch["loss_mask"])
        return loss, self.optimizer.step(self.work.rates[n])

    def digest(self) -> str:
        return digest_of([self.model.flat])

    def extras(self) -> dict[str, float]:
        return {}
