"""The parts of a recorded run, brought back to life: any state can be put into them, and steps run from there."""

from __future__ import annotations

from minitrain.assembly import learner
from minitrain.loop import StepStats, watched_step
from minitrain.replay.source import Source
from minitrain.replay.verifier import Difference, Verifier
from minitrain.state import State


class Machine:
    """Model, optimizer and scheduler of one thread, and the verifier that listens to them."""

    def __init__(self, source: Source, threads: int = 1) -> None:
        """At state 0, from the seed. No bit depends on ``threads``."""
        training = source.config.training.model_copy(update={"threads": threads})
        self.config = source.config.model_copy(update={"training": training})
        self._learner, self._batches = learner(self.config), source.batches
        self.hooks = self._learner.hooks
        self.verifier = Verifier(source.frame, self.config, source.batches, self.hooks)

    @property
    def state(self) -> State:
        """The live state: views of the buffers that the next step reads and changes."""
        return self._learner.state()

    def put(self, state: State) -> None:
        """Go to this state, whose bits are copied."""
        self._learner.put(state)

    def step(self) -> tuple[StepStats, list[Difference]]:
        """Run the next step, and hold it against its record. Raises RunError where that has none."""
        parts = self._learner
        batch = self._batches.batch_at(self.state.step)
        stats = watched_step(parts.model, parts.optimizer, parts.scheduler, batch, [self.verifier])
        return stats, self.verifier.differences
