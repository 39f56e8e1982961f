"""The listener that writes the log and the checkpoints of a run, and raises the alert of one that does not learn."""

from __future__ import annotations

import math
from typing import Any

from minitrain.assembly import Parts
from minitrain.checkpoint import save_checkpoint
from minitrain.config import Config, config_hash
from minitrain.errors import RunError
from minitrain.loop import Evaluation, Listener, StepStats, perplexity
from minitrain.metrics.meter import Meter
from minitrain.record.recorder import Recorder
from minitrain.rng import Purpose
from minitrain.run_folder import LogWriter, RunFolder, start_of
from minitrain.state import State


class Keeper(Listener):
    """The listener that writes the log and the checkpoints, and raises the alert of a run that does not learn."""

    PLATEAU = 4.0 / math.log(64)
    """Of ln V: a loss that stays above it is a run near chance (4.0 at a vocabulary of 64)."""
    WINDOW = 200

    def __init__(
        self,
        folder: RunFolder,
        config: Config,
        parts: Parts,
        recorder: Recorder | None = None,
        meter: Meter | None = None,
    ) -> None:
        """Go on with the log at the current step. Raises RunError if a step before it is missing there."""
        self.alerts: list[str] = []
        self.earlier: dict[int, Evaluation] = {}
        """The validations of the processes before this one."""
        self.first_nonfinite: int | None = None
        self.last_loss = math.nan
        self._folder, self._config, self._parts = folder, config, parts
        self._recorder, self._meter = recorder, meter
        self._chance = self.PLATEAU * math.log(config.model.vocab_size)
        self._low = math.inf
        self._first = self._steps = start_of(folder.read_manifest())
        start = parts.scheduler.step_count
        for line in folder.log_lines():
            if line["step"] >= start:
                continue  # after the checkpoint: these steps are done again
            if "val_loss" in line:
                self.earlier[line["step"]] = _evaluation(line)
            elif line["step"] == self._steps:
                self._watch(line["step"], _number(line["loss"]), "nonfinite" not in line)
        if self._steps != start:
            raise RunError(
                f"{folder.log}: expected every step before {start}, where the checkpoint stands, got no step "
                f"{self._steps}; restore the log, or {folder.begin_again()}"
            )
        self._log = LogWriter(folder.log, start)

    def _watch(self, step: int, loss: float, finite: bool) -> None:
        """What is known of a run from all its steps, in this process or before."""
        self._steps = step + 1
        self.last_loss = loss
        if not finite and self.first_nonfinite is None:
            self.first_nonfinite = step
        if loss < self._low:
            self._low = loss
        if self._steps == self._first + self.WINDOW and self._low > self._chance:
            self.alerts.append(
                f"not learning: debug before scaling up (no loss below {self._chance:.2f} in {self.WINDOW} steps)"
            )

    def stepped(self, stats: StepStats, state: State) -> None:
        self._log.step(stats.step, stats.loss, stats.lr, stats.grad_norm, stats.grad_norm_clipped, stats.tokens)
        self._watch(stats.step, stats.loss, stats.finite)
        if state.step % self._config.training.checkpoint_every == 0 and stats.finite:
            self.save(state)
            self._log.skip_time()

    def validated(self, step: int, result: Evaluation) -> None:
        self._log.validation(step, result.loss, result.perplexity, self._meter.summary() if self._meter else None)
        self._log.skip_time()

    def save(self, state: State) -> None:
        """A checkpoint, and before it the log, the record and the metrics up to there."""
        self._log.sync()
        if self._recorder:
            self._recorder.settle()
        if self._meter:
            self._meter.save()
        write_checkpoint(self._folder, self._config, self._parts)

    def close(self) -> None:
        self._log.close()


def _number(value: float | None) -> float:
    """A number of the log, where null stands for NaN."""
    return math.nan if value is None else value


def _evaluation(line: dict[str, Any]) -> Evaluation:
    loss = _number(line["val_loss"])
    return Evaluation(loss, perplexity(loss), 0)


def write_checkpoint(folder: RunFolder, config: Config, parts: Parts) -> None:
    """The parts' current state. Raises OSError."""
    state, training = parts.state(), config.training
    control = {"seed": training.rng_seed, "purpose": Purpose.DROPOUT.name, "step": state.step}
    order = {"seed": training.data_seed, "purpose": Purpose.SHUFFLE.name}
    streams = {"training_control": control, "data": order | parts.batches.position(state.step)}
    save_checkpoint(folder.checkpoint, state, config_hash=config_hash(config), streams=streams)
