"""The learning rate as a pure function of the step: nothing to save, nothing to drift.

In double precision and with our own cosine, so that every machine trains with the same rate. `Scheduler` is
the same function with a counter, for a training loop of one's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Self

from minitrain.config import Config, config_from
from minitrain.elementary import PI, cos, power_int
from minitrain.errors import RunError
from minitrain.sections import OptimizerConfig, SchedulerConfig

AHEAD = 32
"""Rates that are computed at once."""


def lr_at(step: int, optimizer: OptimizerConfig, scheduler: SchedulerConfig) -> float:
    """The rate of step >= 0, which is update t = step + 1, with W warm-up and T total steps.

    t <= W: lr_max * t/W, so the first update already moves. Then, with p = (t - W)/(T - W):
    cosine   lr_min + (lr_max - lr_min) * (1 + cos(pi*p))/2  (one cycle of SGDR, Loshchilov and Hutter 2017)
    linear   lr_min + (lr_max - lr_min) * (1 - p)
    step     lr_max * gamma for every whole step_size since the warm-up, but at least lr_min
    constant lr_max
    t > T: lr_min, whatever the type.
    """
    t, warmup, total = step + 1, scheduler.warmup_steps, scheduler.total_steps
    high, low = optimizer.lr_max, optimizer.lr_min
    if t > total:
        return low
    if t <= warmup:
        return high * t / warmup
    match scheduler.type:
        case "cosine":
            return low + (high - low) * (0.5 * (1.0 + cos(PI * ((t - warmup) / (total - warmup)))))
        case "linear":
            return low + (high - low) * ((total - t) / (total - warmup))
        case "step":
            return max(low, high * power_int(scheduler.gamma, (step - warmup) // scheduler.step_size))
        case "constant":
            return high


class Scheduler:
    """`lr_at` with a counter. Read `lr`, update the parameters with it, call `step`.

    Raises ConfigError for impossible values, such as a warm-up longer than the whole.
    """

    def __init__(
        self,
        *,
        lr_max: float,
        lr_min: float,
        warmup_steps: int,
        total_steps: int,
        type: Literal["cosine", "linear", "step", "constant"] = "cosine",
        step_size: int = 500,
        gamma: float = 0.5,
    ) -> None:
        rates = {"lr_max": lr_max, "lr_min": lr_min}
        shape = {"type": type, "warmup_steps": warmup_steps, "total_steps": total_steps}
        decay = {"step_size": step_size, "gamma": gamma}
        config = config_from({"optimizer": rates, "scheduler": shape | decay}, "Scheduler(...)")
        self._optimizer, self._scheduler = config.optimizer, config.scheduler
        self.step_count = 0
        self._rates: list[float] = []
        """Of the steps from `_first` on: computing them in a row is cheaper than one in every step."""
        self._first = 0

    @classmethod
    def from_config(cls, config: Config) -> Self:
        """A scheduler at step 0 of the configured run."""
        optimizer = config.optimizer
        return cls(lr_max=optimizer.lr_max, lr_min=optimizer.lr_min, **config.scheduler.model_dump())

    @property
    def lr(self) -> float:
        """The rate of the coming step."""
        step = self.step_count
        if not 0 <= step - self._first < len(self._rates):
            self._rates = [lr_at(n, self._optimizer, self._scheduler) for n in range(step, step + AHEAD)]
            self._first = step
        return self._rates[step - self._first]

    def step(self) -> None:
        """One update has been done."""
        self.step_count += 1

    def state(self) -> dict[str, int]:
        """All there is to save: ``{"step_count": n}``."""
        return {"step_count": self.step_count}

    def load_state(self, state: Mapping[str, object]) -> None:
        """Go to the step of a saved `state`. Raises RunError if it is not one."""
        count = state.get("step_count")
        if not isinstance(count, int) or isinstance(count, bool) or count < 0:
            raise RunError(f"scheduler state: expected step_count, an integer of at least 0, got {count!r}")
        self.step_count = count
