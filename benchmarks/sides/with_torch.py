"""PyTorch on the race track, in the three styles of torch_model.py; batches are tensors before the clock starts."""

from __future__ import annotations

from time import perf_counter

import numpy as np
import torch
from torch_model import NOT_COUNTED, Style, adamw, load_model

from sides.work import Work, digest_of


class Racer:
    def __init__(self, work: Work, threads: int, style: Style) -> None:
        torch.set_num_threads(threads)
        self.rates, self.clip = work.rates, work.optimizer["clip"]
        self.batches = [
            (
                torch.from_numpy(batch["inputs"]).long(),
                torch.from_numpy(np.where(batch["loss_mask"], batch["targets"], NOT_COUNTED)).long(),
            )
            for batch in work.batches
        ]
        self.model = load_model(work.weights_file, style)
        self.optimizer = adamw(self.model, work.optimizer, fused=style != "plain")
        self.loss = torch.compile(self.model.loss, dynamic=False) if style == "compile" else self.model.loss
        self.versions = {"torch": torch.__version__}

    def step(self, n: int) -> tuple[float, float]:
        for group in self.optimizer.param_groups:
            group["lr"] = self.rates[n]
        loss = self.loss(*self.batches[n % len(self.batches)])
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        return loss.item(), norm.item()

    def digest(self) -> str:
        return digest_of(p.detach().numpy() for p in self.model.parameters())

    def extras(self) -> dict[str, float]:
        """How fast PyTorch multiplies matrices here, of a size that suits it."""
        M, N, K = 2048, 1024, 256
        x, weight = torch.rand(M, K), torch.rand(N, K)
        times = []
        for _ in range(50):
            start = perf_counter()
            torch.nn.functional.linear(x, weight)
            times.append(perf_counter() - start)
        return {"product_gflops": 2 * M * N * K / min(times) / 1e9}
