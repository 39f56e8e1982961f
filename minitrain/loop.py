"""The training loop.

`train_step` turns state t into state t+1 and does not know whether anyone records, checks or prints. `train` repeats it
and tells its listeners; the run folder, the progress bar, the recorder and the verifier are listeners.
"""

from __future__ import annotations

import logging
import math
import random  # noqa: TID251 - only to seed the user's global generator; nothing of ours draws from it
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from minitrain._ext.engine import Environment
from minitrain.data.batches import Batch
from minitrain.environment import git_state, hardware, versions
from minitrain.errors import DataError
from minitrain.files import write_json
from minitrain.inject import Injector, maybe_inject
from minitrain.model import MiniGPT
from minitrain.optim import AdamW
from minitrain.schedule import Scheduler
from minitrain.state import State

logger = logging.getLogger("minitrain")


class StepStats(NamedTuple):
    """What step t was: all of it belongs to state t, which it turned into state t+1."""

    step: int
    loss: float
    lr: float
    grad_norm: float
    grad_norm_clipped: float
    tokens: int

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


class Evaluation(NamedTuple):
    """Mean loss per token (nats), its exponential, and how many tokens."""

    loss: float
    perplexity: float
    tokens: int


class BatchesByStep(Protocol):
    """Training batches as a pure function of the step."""

    def batch_at(self, step: int) -> Batch: ...


class Listener(Protocol):
    """Who is told what the loop does, on the loop's own thread. Inherit and override what you want to hear."""

    def starting(self, step: int, batch: Batch, state: State) -> None:
        """Step t is about to read this batch and state t."""
        return None

    def stepped(self, stats: StepStats, state: State) -> None:
        """Step t has left state t+1."""
        return None

    def evaluated(self, batch: Batch) -> None:
        """A batch of a validation has been run; its activations stand in the model."""
        return None

    def validated(self, step: int, result: Evaluation) -> None:
        """State ``step`` has been validated."""
        return None


def train_step(
    model: MiniGPT, optimizer: AdamW, scheduler: Scheduler, batch: Batch, injector: Injector | None = None
) -> StepStats:
    """Turn state t into state t+1, in place."""
    step = model.step = scheduler.step_count
    settings = maybe_inject("optimizer", step, optimizer.config, injector)
    with Environment():  # for Python's own doubles; the engine sees to its threads itself
        _, loss = model.forward(batch.inputs, batch.targets, batch.attn_pad_mask, batch.loss_mask)
        grads = maybe_inject("gradients", step, model.backward(), injector)
        norms = optimizer.clip(model.params, grads, settings)  # finiteness is known here, before the update
        optimizer.lr = maybe_inject("lr", step, scheduler.lr, injector)
        optimizer.update(model.params, grads, settings)
        scheduler.step()
        if injector:
            m, v = optimizer.bind(model.params, grads)
            maybe_inject("state", step, State(scheduler.step_count, model.params, m, v), injector)
    return StepStats(step, loss, optimizer.lr, norms.before, norms.after, model.loss_sum[1])


def watched_step(
    model: MiniGPT,
    optimizer: AdamW,
    scheduler: Scheduler,
    batch: Batch,
    listeners: Sequence[Listener],
    injector: Injector | None = None,
) -> StepStats:
    """`train_step`, with the listeners told before and after it. ``batch`` is what the data give this step."""
    batch = maybe_inject("batch", scheduler.step_count, batch, injector)
    m, v = optimizer.bind(model.params, model.grads)
    state = State(scheduler.step_count, model.params, m, v)
    for listener in listeners:
        listener.starting(state.step, batch, state)
    stats = train_step(model, optimizer, scheduler, batch, injector)
    state = State(scheduler.step_count, model.params, m, v)
    for listener in listeners:
        listener.stepped(stats, state)
    return stats


def evaluate(model: MiniGPT, val_iter: Iterable[Batch], listeners: Sequence[Listener] = ()) -> Evaluation:
    """Loss over every token of ``val_iter``: no gradients, no dropout, no random numbers, no change to training.

    ``listeners`` are told of each batch.
    """
    total, tokens = 0.0, 0
    for batch in val_iter:
        model.forward(batch.inputs, batch.targets, batch.attn_pad_mask, batch.loss_mask, training=False)
        for listener in listeners:
            listener.evaluated(batch)
        loss_sum, count = model.loss_sum
        total += loss_sum
        tokens += count
    mean = total / tokens if tokens else math.nan
    return Evaluation(mean, perplexity(mean), tokens)


def perplexity(loss: float) -> float:
    """exp(loss); Inf where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf if loss == loss else math.nan


def set_seed(seed: int) -> None:
    """Seed Python's and NumPy's global generators, for the user's code: ours draws from neither."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: TID251, NPY002 - the global generator is the one to seed


@dataclass
class Metrics:
    """How training ended. ``ended`` is ``complete``, ``interrupted`` or ``nonfinite``."""

    ended: str = "complete"
    steps: int = 0
    final_loss: float = math.nan
    first_nonfinite_step: int | None = None
    validations: dict[int, Evaluation] = field(default_factory=dict)

    @property
    def best(self) -> tuple[int, Evaluation] | None:
        """The validation of the lowest loss and its step, the earliest of equals."""
        finite = {step: e for step, e in self.validations.items() if math.isfinite(e.loss)}
        return min(finite.items(), key=lambda item: item[1].loss) if finite else None


def train(
    model: MiniGPT,
    optimizer: AdamW,
    scheduler: Scheduler,
    train_iter: Iterable[Batch] | BatchesByStep,
    val_iter: Iterable[Batch],
    total_steps: int,
    val_every: int = 50,
    log_every: int = 10,
    rng_seed: int = 42,
    manifest_path: Path | str | None = None,
    *,
    listeners: Sequence[Listener] = (),
    injector: Injector | None = None,
    on_nonfinite: str = "stop",
    stop: Callable[[], bool] = lambda: False,
) -> Metrics:
    """Train from ``scheduler.step_count`` up to ``total_steps`` and return the final metrics.

    ``train_iter`` gives batches, by ``batch_at(step)`` where it has that, else in turn (from the front again at its
    end). State t is validated on ``val_iter`` at every multiple of ``val_every`` and at the end. Every ``log_every``
    steps a line goes to the logger ``minitrain``. ``rng_seed`` seeds dropout and the global generators. With
    ``manifest_path`` a manifest is written before step 0. ``stop`` is asked between steps. A loss or gradient norm
    that is not finite ends the run after its step, or is only noted with ``on_nonfinite="continue"``. Raises DataError
    where a batch or ``train_iter`` is no good.
    """
    set_seed(rng_seed)
    model.reseed(rng_seed)
    if manifest_path is not None:
        write_json(Path(manifest_path), describe(model, optimizer, rng_seed))
    metrics = Metrics(steps=scheduler.step_count)
    next_batch = _batches(train_iter)

    def validate(step: int) -> None:
        result = metrics.validations[step] = evaluate(model, val_iter, listeners)
        for listener in listeners:
            listener.validated(step, result)

    while scheduler.step_count < total_steps:
        step = scheduler.step_count
        if stop():
            metrics.ended = "interrupted"
            return metrics
        if step and step % val_every == 0:
            validate(step)
        stats = watched_step(model, optimizer, scheduler, next_batch(step), listeners, injector)
        metrics.steps, metrics.final_loss = step + 1, stats.loss
        if step % log_every == 0:
            logger.info("step %d loss %.4f lr %.3g grad_norm %.3f", step, stats.loss, stats.lr, stats.grad_norm)
        if not stats.finite:
            if metrics.first_nonfinite_step is None:
                metrics.first_nonfinite_step = step
            if on_nonfinite == "stop":
                metrics.ended = "nonfinite"
                return metrics
    validate(total_steps)
    return metrics


def describe(model: MiniGPT, optimizer: AdamW, rng_seed: int) -> dict[str, Any]:
    """The manifest of a run: what must be known to run it again."""
    git = git_state(Path.cwd())
    return {
        "seed": rng_seed,
        "versions": versions(),
        "config": {"model": model.config.model_dump(), "optimizer": optimizer.config.model_dump()},
        "git_sha": git["sha"],
        "git_dirty": git["dirty"],
        "data_manifest_hash": None,
        "hardware": {**hardware(), "instruction_set": model.backend.isa},
    }


def _batches(source: Iterable[Batch] | BatchesByStep) -> Callable[[int], Batch]:
    """``source`` as a function of the step."""
    if hasattr(source, "batch_at"):
        by_step: Callable[[int], Batch] = source.batch_at
        return by_step

    def endless() -> Iterator[Batch]:
        while True:
            batch = None
            for batch in source:
                yield batch
            if batch is None:
                raise DataError(
                    "train_iter: expected at least one batch, got none (a generator that has run out? pass a list)"
                )

    batches = endless()
    return lambda step: next(batches)
