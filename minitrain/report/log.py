"""The log of a run as columns."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minitrain.run_folder import RunFolder

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Log:
    """train_log.jsonl by column. NaN stands for every number that was not finite."""

    step: Floats
    loss: Floats
    norm: Floats
    norm_clipped: Floats
    tokens_per_s: Floats
    val_step: Floats
    val_loss: Floats
    broken: Sequence[Mapping[str, Any]]
    """The steps that were not finite, as they were logged."""
    lr: Floats = field(default_factory=lambda: np.empty(0))

    @classmethod
    def read(cls, folder: RunFolder) -> Log:
        of_step, of_validation = (
            ("step", "loss", "grad_norm", "grad_norm_clipped", "tokens_per_s", "lr"),
            ("step", "val_loss"),
        )
        steps, validations, broken = [], [], []
        for line in folder.log_lines():
            if "val_loss" in line:
                validations.append([line[key] for key in of_validation])
                continue
            steps.append([line[key] for key in of_step])
            if "nonfinite" in line:
                broken.append(line)
        step, loss, norm, clipped, rate, lr = (
            np.array(steps, np.float64).reshape(-1, len(of_step)).T
        )  # null becomes NaN
        val_step, val_loss = np.array(validations, np.float64).reshape(-1, len(of_validation)).T
        return cls(step, loss, norm, clipped, rate, val_step, val_loss, broken, lr)

    @property
    def start(self) -> int:
        """The first step: 0, but in a run that was forked from another."""
        return int(self.step[0]) if len(self.step) else 0

    @property
    def window(self) -> int:
        """Over how many steps the train loss is averaged: 51 in a default run, a single one in a tiny run."""
        return len(self.step) // 40 // 2 * 2 + 1

    def mean_loss(self, i: int) -> float:
        """The mean of what is finite in the window around line ``i``, NaN where line ``i`` is not.

        The window is narrower towards both ends, at the start on both sides so that the first steep steps stay steep.
        """
        half = min(self.window // 2, i)
        near = self.loss[i - half : i + half + 1]
        return float(np.mean(near[np.isfinite(near)])) if math.isfinite(self.loss[i]) else math.nan
