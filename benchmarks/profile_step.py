"""Where a default training step goes: the fastest time of each operation of its plans, summed by kernel.

    python benchmarks/profile_step.py

Shares of the peak are of the FMA peak that peak.c measures in the same call, before and after; matrix products only,
attention counted in full.
"""

from __future__ import annotations

import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
from measure.processes import Track

from minitrain.model import MiniGPT
from minitrain.optim import AdamW
from minitrain.sections import ModelConfig

ROUNDS = 400
SEQUENCES = 8


def flops_by_kernel(c: ModelConfig, B: int) -> dict[str, int]:
    """Floating-point operations of a step in matrix products."""
    tokens = B * c.max_seq_len
    linear = 2 * tokens * (c.n_layer * (4 * c.d_model**2 + 2 * c.d_model * c.d_ff) + c.d_model * c.vocab_size)
    attention = 4 * tokens * c.max_seq_len * c.d_model * c.n_layer
    products = ("linear_forward", "linear_backward_input", "linear_backward_weight")
    return dict.fromkeys(products, linear) | {"attention_forward": attention, "attention_backward": 2 * attention}


def main() -> None:
    model, optimizer = MiniGPT(), AdamW()
    shape = (SEQUENCES, model.config.max_seq_len)
    tokens, mask = np.zeros(shape, np.int32), np.ones(shape, np.bool_)
    model.forward(tokens, tokens, mask, mask)
    optimizer.step(model.params, model.backward())
    passes = model.passes(*shape)
    plans = [passes.training, passes.backward, *optimizer.plans]
    with tempfile.TemporaryDirectory() as scratch:
        track = Track(Path(scratch))
        before = track.peak(model.backend.isa, 1)
        call = min(_seconds(lambda: plans[0].run_part(0, 0)) for _ in range(ROUNDS))  # of an empty part
        fastest: dict[tuple[int, int], float] = defaultdict(lambda: float("inf"))
        for _ in range(ROUNDS):
            for p, plan in enumerate(plans):
                for i in range(len(plan.kernels)):
                    spent = _seconds(lambda plan=plan, i=i: plan.run_part(i, i + 1)) - call
                    fastest[p, i] = min(fastest[p, i], spent)
        peak = max(before, track.peak(model.backend.isa, 1)) * 1e9
    total: dict[str, float] = defaultdict(float)
    for (p, i), seconds in fastest.items():
        total[plans[p].kernels[i]] += seconds
    whole, flops = sum(total.values()), flops_by_kernel(model.config, SEQUENCES)
    print("| kernel | µs | share of the step | of the FMA peak |\n|---|---|---|---|")
    for kernel, seconds in sorted(total.items(), key=lambda item: -item[1]):
        share = f"{100 * flops[kernel] / seconds / peak:.0f} %" if kernel in flops else ""
        print(f"| {kernel} | {1e6 * seconds:.0f} | {100 * seconds / whole:.1f} % | {share} |")
    share = 100 * sum(flops.values()) / whole / peak
    print(f"| sum ({model.backend.isa}, peak {peak / 1e9:.0f} GFLOP/s) | {1e6 * whole:.0f} | | {share:.0f} % |")


def _seconds(work: Callable[[], None]) -> float:
    since = time.perf_counter()
    work()
    return time.perf_counter() - since


if __name__ == "__main__":
    main()
