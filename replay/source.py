"""Where a step is taken back from: a run with its data, or (bundle.py) one step in a file."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from minitrain.assembly import prepare_data
from minitrain.config import Config
from minitrain.data.batches import Batch, TrainBatches
from minitrain.data.prepare import Prepared
from minitrain.errors import RunError
from minitrain.record.digests import state_digests
from minitrain.record.journal import Frame
from minitrain.record.recorded import Run
from minitrain.replay.fingerprint import mismatches
from minitrain.replay.states import initial_state, read_arrays, read_state
from minitrain.state import State
from minitrain.tensors import KINDS, parameter_table


class Batches(Protocol):
    """The training batches, as the configuration and the data make them."""

    def position(self, step: int) -> dict[str, int]: ...
    def batch_at(self, step: int) -> Batch: ...


class Source(Protocol):
    """What a replay needs to know of a run."""

    path: Path
    manifest: dict[str, Any]
    config: Config
    steps: range
    """Those that can be run again."""

    @property
    def batches(self) -> Batches: ...

    @property
    def tokenizer(self) -> bytes:
        """Its JSON, as the data make it here."""

    @property
    def hashes(self) -> dict[str, str]:
        """What stands here for those hashes of the manifest that are of the data, where it can be told."""

    def frame(self, t: int) -> Frame:
        """What was recorded of step t. Raises RunError outside ``steps``."""

    def texts(self, batch: Batch) -> list[str]:
        """The text of each sample, "" where there is none."""

    def nearest(self, t: int) -> State:
        """The latest state up to t that can be had without running a step, as the step there read it."""

    def left(self, t: int, kind: str, name: str) -> NDArray[np.float32] | None:
        """A tensor of m, v or param as step t left it, where its elements are recorded and undamaged."""


def span(steps: range) -> str:
    """Steps in a message."""
    return "none" if not steps else str(steps[0]) if len(steps) == 1 else f"{steps[0]}..{steps[-1]}"


def require_match(source: Source, allow: bool = False) -> list[str]:
    """What differs here so that the same bits are not promised; raises RunError where anything does, unless allowed."""
    found = mismatches(source.manifest, source.config, source.hashes)
    if found and not allow:
        raise RunError(
            f"{source.path}: expected an engine and data that promise the bits that were recorded, got others "
            f"(recorded -> here): {'; '.join(found)}; use those of the manifest, or replay with --allow-mismatch to "
            "see how far it gets, which proves nothing"
        )
    return found


class RecordedRun:
    """A run and the data that it was trained on, or what stands in their place."""

    def __init__(self, run: Run) -> None:
        self.run, self.path, self.manifest, self.config = run, run.path, run.manifest, run.config
        self.steps = run.steps

    @cached_property
    def data(self) -> Prepared:
        """From the files that the configuration names, whatever they hold now. Raises DataError."""
        return prepare_data(self.config)

    @cached_property
    def batches(self) -> TrainBatches:
        training = self.config.training
        return TrainBatches(self.data.train, training.batch_size, training.data_seed, self.config.data.batching)

    @property
    def tokenizer(self) -> bytes:
        return self.data.tokenizer.to_json()

    @property
    def hashes(self) -> dict[str, str]:
        return {"data_manifest_hash": self.data.manifest_hash, "tokenizer_hash": self.data.tokenizer.hash}

    def frame(self, t: int) -> Frame:
        return self.run.frame(t)

    def texts(self, batch: Batch) -> list[str]:
        return ["" if row < 0 else self.data.train.texts[row] for row in batch.rows.tolist()]

    def memory_changed(self, t: int) -> bool:
        """Whether step t read another state than step t-1 had left."""
        if t == self.run.start or t not in self.steps:
            return False
        return not np.array_equal(self.frame(t).digest_in, self.frame(t - 1).digest_out)

    def nearest(self, t: int) -> State:
        for candidate in self._candidates(t):
            try:
                return self.as_read(candidate)
            except RunError:  # not recorded, or damaged, which verify tells: steps from an earlier one lead here too
                continue
        return self.first()

    def first(self) -> State:
        """The state with which the run began: rebuilt from the seed, or in a forked run as it was recorded.

        Raises RunError where the record of a forked run does not give it back.
        """
        return self.run.keyframe(self.run.start) if self.run.parent else initial_state(self.config)

    def _candidates(self, t: int) -> Iterator[int]:
        """Where a whole state may stand, from t on back."""
        yield t
        incidents = (int(path.stem) for path in self.run.folder.incident_files())
        yield from sorted((s for s in {*self.run.keyframes, *incidents} if s < t), reverse=True)

    def as_read(self, t: int) -> State:
        """State t as step t read it, in buffers of its own. Raises RunError where the record does not give it back."""
        if self.memory_changed(t):
            return self.incident(t)
        if t in self.run.keyframes:
            return self.run.keyframe(t)
        return self.run.state(t) if self.config.record.moments == "every_step" else self.incident(t)

    def incident(self, t: int) -> State:
        """What stood in memory at step t, where something was wrong there. Raises RunError where it was not kept."""
        path = self.run.folder.incident(t)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise RunError(f"{path}: expected state {t} as step {t} read it, got: {error.strerror}") from error
        state = read_state(read_arrays(data, str(path)), self.config, t, str(path))
        if not np.array_equal(state_digests(state), self.frame(t).digest_in):
            raise RunError(f"{path}: expected state {t} as step {t} read it, got other digests than were recorded")
        return state

    def left(self, t: int, kind: str, name: str) -> NDArray[np.float32] | None:
        try:
            if kind == "param":
                return self.run.params(t + 1)[name]
            moments = self.run.moments(t + 1)
        except RunError:
            return None
        return (moments.m if kind == "m" else moments.v)[name]


def memory_change(source: RecordedRun, t: int) -> tuple[int, str]:
    """The number of the first tensor that step t read otherwise than step t-1 had left it, and all of them in words."""
    changed = np.argwhere(source.frame(t - 1).digest_out != source.frame(t).digest_in)
    names = [p.name for p in parameter_table(source.config.model)]
    told = ", ".join(f"{KINDS[kind]}.{names[n]}" for kind, n in changed)
    return int(changed[0][1]), f"step {t}: memory changed before it: {told}"
