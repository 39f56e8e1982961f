"""Where a default training step goes: the fastest time of each operation of its plans, summed by kernel."""

from __future__ import annotations

import time
from collections import defaultdict

import numpy as np

from minitrain.model import MiniGPT
from minitrain.optim import AdamW

ROUNDS = 400


def main() -> None:
    model, optimizer = MiniGPT(), AdamW()
    shape = (8, model.config.max_seq_len)
    tokens, mask = np.zeros(shape, np.int32), np.ones(shape, np.bool_)
    model.forward(tokens, tokens, mask, mask)
    optimizer.step(model.params, model.backward())
    passes = model.passes(*shape)
    plans = [passes.training, passes.backward, *optimizer.plans]
    fastest: dict[tuple[int, int], float] = defaultdict(lambda: float("inf"))
    for _ in range(ROUNDS):
        for p, plan in enumerate(plans):
            for i in range(len(plan.kernels)):
                since = time.perf_counter()
                plan.run_part(i, i + 1)
                fastest[p, i] = min(fastest[p, i], time.perf_counter() - since)
    total: dict[str, float] = defaultdict(float)
    for (p, i), seconds in fastest.items():
        total[plans[p].kernels[i]] += seconds
    whole = sum(total.values())
    print("| kernel | µs | share |\n|---|---|---|")
    for kernel, seconds in sorted(total.items(), key=lambda item: -item[1]):
        print(f"| {kernel} | {1e6 * seconds:.0f} | {100 * seconds / whole:.1f} % |")
    print(f"| sum ({model.backend.isa}) | {1e6 * whole:.0f} | |")


if __name__ == "__main__":
    main()
