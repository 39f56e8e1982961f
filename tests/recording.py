"""A small recorded run, and what the tests of the record look at: imported by them, with fixtures in conftest.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

import minitrain
from minitrain.config import Config, load_config
from minitrain.loop import Listener, StepStats
from minitrain.record.audit import Damage, audit
from minitrain.state import State

STEPS = 150
SMALL = [
    *("model.n_layer=1", "model.d_model=16", "model.n_head=2", "model.d_ff=32"),
    *("training.batch_size=4", "training.val_every=60", "training.checkpoint_every=40"),
    *(f"scheduler.total_steps={STEPS}", "scheduler.warmup_steps=10", "record.keyframe_every=32"),
]
"""More than two shards, a last keyframe out of turn, checkpoints out of step with both."""


def config(*more: str) -> Config:
    return load_config(None, [*SMALL, *more])


class Watch(Listener):
    """Copies of every state, and the stop at a step."""

    def __init__(self, stop_at: int = 10**9) -> None:
        self.stop_at = stop_at
        self.states: dict[int, tuple[np.ndarray, ...]] = {}
        self.stats: dict[int, StepStats] = {}
        self.batches: dict[int, Any] = {}

    def starting(self, step: int, batch: Any, state: State) -> None:
        self.batches[step] = batch
        self.states.setdefault(step, tuple(g.flat.copy() for g in (state.params, state.m, state.v)))

    def stepped(self, stats: StepStats, state: State) -> None:
        self.stats[stats.step] = stats
        self.states[state.step] = tuple(g.flat.copy() for g in (state.params, state.m, state.v))

    def __call__(self) -> bool:
        return len(self.stats) >= self.stop_at


def contents(run: Path) -> dict[str, bytes]:
    """Every file of the record."""
    files = [run / "journal.msgpack", *(p for p in (run / "record.zarr").rglob("*") if p.is_file())]
    return {str(path.relative_to(run)): path.read_bytes() for path in sorted(files)}


def damages(run: Path) -> list[Damage]:
    return [found for found in audit(minitrain.open_run(run)) if isinstance(found, Damage)]
