"""From a configuration to the parts of a run: its data, and the model, optimizer, scheduler and batches at state 0."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from minitrain.config import Config
from minitrain.data.batches import Batch, EvalBatches, TrainBatches
from minitrain.data.prepare import Prepared, prepare
from minitrain.data.tokenizer import Tokenizer
from minitrain.environment import hardware
from minitrain.errors import ConfigError
from minitrain.hooks import Hooks
from minitrain.inject import Injector
from minitrain.model import MiniGPT, make_backend
from minitrain.optim import AdamW
from minitrain.schedule import Scheduler
from minitrain.state import State, copy_state
from minitrain.tensors import activation_table, gradient_table, parameter_table


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


def memory_needed(config: Config) -> int:
    """Bytes of parameters, gradients, moments and the arrays of both passes; blocks are counted from one and two."""
    B, T = config.training.batch_size, config.model.max_seq_len

    def floats(blocks: int) -> int:
        c = config.model.model_copy(update={"n_layer": blocks})
        arrays = activation_table(c, B, T) + gradient_table(c, B, T)
        return 4 * sum(math.prod(p.shape) for p in parameter_table(c)) + sum(math.prod(a.shape) for a in arrays)

    return 4 * (floats(1) + (config.model.n_layer - 1) * (floats(2) - floats(1)))


def require_memory(config: Config) -> None:
    """Raises ConfigError if the run cannot fit into this machine's memory."""
    needed, there = memory_needed(config), hardware()["ram_bytes"]
    if isinstance(there, int) and needed > there:
        raise ConfigError(
            f"model and training.batch_size: expected a run that fits into {there / 1e9:.0f} GB of memory, got one of "
            f"{needed / 1e9:,.0f} GB; lower n_layer, d_model, d_ff, vocab_size, max_seq_len or batch_size"
        )


@dataclass(frozen=True)
class Learner:
    """What a step turns: model, optimizer and scheduler, with one `Hooks` for the whole step."""

    model: MiniGPT
    optimizer: AdamW
    scheduler: Scheduler
    injector: Injector
    """Listens at the sites that it is to change before anybody else does."""

    @property
    def hooks(self) -> Hooks:
        """Those of the whole step: model and optimizer have the same."""
        return self.model.hooks

    def state(self) -> State:
        """The live state."""
        m, v = self.optimizer.bind(self.model.params, self.model.grads)
        return State(self.scheduler.step_count, self.model.params, m, v)

    def put(self, state: State) -> None:
        """Go to this state, whose bits are copied."""
        copy_state(state, self.state())
        self.go_to(state.step)

    def go_to(self, step: int) -> None:
        """Go on at ``step``, whose parameters and moments have been loaded."""
        self.scheduler.step_count = self.optimizer.updates = step


@dataclass(frozen=True)
class Parts(Learner):
    """What a configuration is made into, at state 0."""

    batches: TrainBatches
    validation: EvalBatches


def learner(
    config: Config,
    batches: Callable[[int], Batch] | None = None,
    tokenizer: Callable[[], Tokenizer] | None = None,
) -> Learner:
    """Model, optimizer, scheduler and injections as configured, at state 0; see `Injector`."""
    training = config.training
    backend = make_backend(training.backend, training.threads)
    model = MiniGPT(config.model, seed=training.rng_seed, backend=backend)
    optimizer = AdamW(config.optimizer, backend=backend, hooks=model.hooks)
    injector = Injector(config, batches, tokenizer)
    injector.listen(model.hooks, model.activations)
    return Learner(model, optimizer, Scheduler.from_config(config), injector)


def assemble(config: Config, data: Prepared) -> Parts:
    """Batches, model, optimizer and scheduler as configured."""
    training = config.training
    batches = TrainBatches(data.train, training.batch_size, training.data_seed, config.data.batching)
    return Parts(
        **vars(learner(config, batches.batch_at, lambda: data.tokenizer)),
        batches=batches,
        validation=EvalBatches(data.val, training.batch_size),
    )
