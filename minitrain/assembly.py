"""From a configuration to the parts of a run: its data, and the model, optimizer, scheduler and batches at state 0."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from minitrain.config import Config
from minitrain.data.batches import EvalBatches, TrainBatches
from minitrain.data.prepare import Prepared, prepare
from minitrain.model import MiniGPT, make_backend
from minitrain.optim import AdamW
from minitrain.schedule import Scheduler
from minitrain.state import State


def prepare_data(config: Config) -> Prepared:
    """The data that the configuration names; the built-in corpus is generated where its files are missing."""
    named = config.data.named_paths()
    own_text_only = config.data.train_path in named and config.data.val_path not in named
    return prepare(
        Path(config.data.train_path),
        None if own_text_only else Path(config.data.val_path),
        heldout_policy=config.data.heldout_policy,
        vocab_size=config.model.vocab_size,
        max_seq_len=config.model.max_seq_len,
        generate_missing=not named,
    )


@dataclass(frozen=True)
class Parts:
    """What a configuration is made into, at state 0."""

    batches: TrainBatches
    validation: EvalBatches
    model: MiniGPT
    optimizer: AdamW
    scheduler: Scheduler

    def state(self) -> State:
        """The live state."""
        m, v = self.optimizer.bind(self.model.params, self.model.grads)
        return State(self.scheduler.step_count, self.model.params, m, v)

    def go_to(self, step: int) -> None:
        """Go on at ``step``, whose parameters and moments have been loaded."""
        self.scheduler.step_count = self.optimizer.updates = step


def assemble(config: Config, data: Prepared) -> Parts:
    """Batches, model, optimizer and scheduler as configured."""
    training = config.training
    backend = make_backend(training.backend, training.threads)
    return Parts(
        batches=TrainBatches(data.train, training.batch_size, training.data_seed, config.data.batching),
        validation=EvalBatches(data.val, training.batch_size),
        model=MiniGPT(config.model, seed=training.rng_seed, backend=backend),
        optimizer=AdamW(config.optimizer, backend=backend),
        scheduler=Scheduler.from_config(config),
    )
