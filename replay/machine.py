"""The parts of a recorded run, brought back to life: any state can be put into them, and steps run from there."""

from __future__ import annotations

from minitrain.assembly import learner
from minitrain.data.batches import Batch
from minitrain.data.tokenizer import Tokenizer
from minitrain.inject import maybe_inject
from minitrain.loop import StepStats, watched_step
from minitrain.replay.source import Source
from minitrain.replay.verifier import Difference, Verifier
from minitrain.state import State


class Machine:
    """Model, optimizer and scheduler of one thread, and the verifier that listens to them."""

    def __init__(self, source: Source, threads: int = 1, injections: bool = True) -> None:
        """At state 0, from the seed. No bit depends on ``threads``.

        Without ``injections`` a step is what should have happened.
        """
        training = source.config.training.model_copy(update={"threads": threads})
        self.config = source.config.model_copy(update={"training": training})
        self._batches = source.batches
        self._learner = learner(self.config, self._batches.batch_at, lambda: Tokenizer.from_json(source.tokenizer))
        self.injector = self._learner.injector
        self.injector.off = not injections
        self.hooks = self._learner.hooks
        self.verifier = Verifier(source.frame, self.config, source.batches, self.hooks)

    @property
    def state(self) -> State:
        """The live state: views of the buffers that the next step reads and changes."""
        return self._learner.state()

    def put(self, state: State) -> None:
        """Go to this state, whose bits are copied."""
        self._learner.put(state)

    @property
    def batch(self) -> Batch:
        """What the next step reads."""
        step = self.state.step
        return maybe_inject("batch", step, self._batches.batch_at(step), self.injector)

    def step(self) -> tuple[StepStats, list[Difference]]:
        """Run the next step, and hold it against its record. Raises RunError where that has none."""
        parts = self._learner
        batch = self._batches.batch_at(self.state.step)
        stats = watched_step(parts.model, parts.optimizer, parts.scheduler, batch, [self.verifier], parts.injector)
        return stats, self.verifier.differences
