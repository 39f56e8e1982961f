"""What a run has recorded, read back: lazily, checked against checksums and digests, of a run that is done, at work or
was killed.

State t is what step t reads; step t turns it into state t+1. ``run.steps`` are the steps that are recorded, from
``run.start`` on, which is 0 but in a run that was forked from another; the states are those from ``run.start`` to
``run.end``. What is damaged is never returned: a RunError says which file and place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from minitrain.assembly import prepare_data
from minitrain.config import Config
from minitrain.data.batches import Batch, TrainBatches
from minitrain.data.prepare import Prepared
from minitrain.errors import RunError
from minitrain.inject import Injector, kind_of, spelt
from minitrain.model import make_backend
from minitrain.optim import Recurrence
from minitrain.record.arrays import read_chunk, read_row, shards
from minitrain.record.digests import batch_digest, has_digest, tensor_digest
from minitrain.record.journal import FINGERPRINT, SCALARS, Frame, Journal, read_journal
from minitrain.record.layout import Layout, layout_of
from minitrain.run_folder import RunFolder, start_of
from minitrain.state import State
from minitrain.tensors import KINDS, Parameter, Tensors, parameter_table


class Moment(NamedTuple):
    """First and second moment of one tensor."""

    m: NDArray[np.float32]
    v: NDArray[np.float32]


class Moments(Mapping[str, Moment]):
    """``moments["lm_head.bias"].m``; ``moments.m`` and ``moments.v`` are all of them, as Tensors."""

    def __init__(self, m: Tensors, v: Tensors) -> None:
        self.m, self.v = m, v

    def __getitem__(self, name: str) -> Moment:
        return Moment(self.m[name], self.v[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.m)

    def __len__(self) -> int:
        return len(self.m)


class RecordedBatch(NamedTuple):
    """What step t read."""

    rows: NDArray[np.int64]
    """(B,) numbers of the samples in the training split."""
    ids: tuple[str, ...]
    texts: tuple[str, ...]
    digest: int
    """xxh3-64 of the tokens and masks, as recorded; those of ``batch`` have the same."""
    batch: Batch


class Scalars(Mapping[str, NDArray[Any]]):
    """A number for each recorded step: step, loss, lr, grad_norm, ... ``pandas.DataFrame(dict(scalars))`` takes it."""

    NAMES = ("step", *SCALARS, "tokens")

    def __init__(self, journal: Journal) -> None:
        self._steps = journal.steps

    def __getitem__(self, name: str) -> NDArray[Any]:
        if name not in self.NAMES:
            raise KeyError(name)
        return np.array([body[name] for body in self._steps])

    def __iter__(self) -> Iterator[str]:
        return iter(self.NAMES)

    def __len__(self) -> int:
        return len(self.NAMES)


def open_run(path: Path | str, *, blind: bool = False) -> Run:
    """The record of the run in this folder. Raises RunError if there is none, or its journal is damaged.

    ``blind`` leaves out what it says of injections: for those who are to find them.
    """
    return Run(Path(path), blind=blind)


class Run:
    """A recorded run, as it was when this was made. A context manager, for symmetry: nothing stays open."""

    def __init__(self, path: Path, *, blind: bool = False) -> None:
        self.path, self._blind = path, blind
        self.folder = RunFolder(path)
        self.folder.require_run()
        self.manifest = self.folder.read_manifest()
        self.config: Config = self.folder.stored_config()
        if blind:
            self.config = self.config.model_copy(update={"injections": []})
        if not self.config.record.enabled:
            raise RunError(f"{path}: expected a recorded run, got one with record.enabled: false; train it again with")
        self.journal = read_journal(self.folder.journal)
        self._require_same_run()

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def _require_same_run(self) -> None:
        """Manifest and journal must tell of the same run, and the journal be as long as the manifest says."""
        told = {key: self.manifest.get(key) for key in FINGERPRINT} | {"start": start_of(self.manifest)}
        found = {key: self.journal.header.get(key) for key in FINGERPRINT} | {"start": self.journal.start}
        if told != found:
            names = ", ".join(key for key in told if told[key] != found[key])
            raise RunError(
                f"{self.folder.journal}: expected the journal of the run that {self.folder.manifest} tells of, got one "
                f"with another {names}; put the files of one run together again"
            )
        ended = self.manifest.get("outcome", {}).get("steps")
        if ended is not None and self.folder.complete.exists() and self.end != ended and not self._given_up:
            raise RunError(
                f"{self.folder.journal}: expected the steps before {ended}, as {self.folder.manifest} says, got "
                f"those before {self.end}: the end is missing; restore the file from a copy"
            )

    @property
    def _given_up(self) -> bool:
        """Whether the recorder could not write and training went on, as record.on_error says."""
        return self.config.record.on_error == "continue"

    @property
    def start(self) -> int:
        """The first state, and the first step: 0, but in a run that was forked from another."""
        return self.journal.start

    @property
    def end(self) -> int:
        """The last state: what the last recorded step left."""
        return self.journal.end

    @property
    def steps(self) -> range:
        """The steps that are recorded."""
        return range(self.start, self.end)

    @property
    def parent(self) -> dict[str, Any] | None:
        """What this run was forked from, as the manifest has it: run, step, config_hash, digest, chain, settings."""
        return self.manifest.get("parent")

    @property
    def complete(self) -> bool:
        return self.folder.complete.exists()

    @property
    def ended(self) -> str:
        """``complete``, ``nonfinite``, or ``unfinished``: at work, interrupted or killed."""
        return "complete" if self.complete else str(self.manifest.get("outcome", {}).get("ended", "unfinished"))

    @property
    def events(self) -> list[dict[str, Any]]:
        """What happened besides steps: ``{"event": name, "step": t, ...}``, in order."""
        return [e for e in self.journal.events if not (self._blind and e["event"] == "injection")]

    @cached_property
    def layout(self) -> Layout:
        return layout_of(self.config, self.start, self.end if self.ended == "nonfinite" else None)

    @cached_property
    def keyframes(self) -> list[int]:
        """The states that stand on disk whole, in order."""
        states = self.layout.keyframes
        numbers = [number for number, _ in shards(self.folder.record, self.layout.arrays["keyframe_param"])]
        return [states[n] for n in numbers if n < len(states) and states[n] <= self.end]

    def _require(self, what: str, t: int, last: int) -> int:
        if not self.start <= t <= last:
            there = f"{self.start} to {last}" if self.start <= last else "none"
            raise RunError(f"{what} {t}: expected {there}, which {self.path} has recorded, got {t}{self.before(t)}")
        return t

    def before(self, t: int) -> str:
        """The end of a message about a step or state that stands in the parent, if this one does."""
        if self.parent is None or not 0 <= t < self.start:
            return ""
        return f"; it was forked at state {self.start} from {self.parent['run']}, which has what was before"

    def frame(self, t: int) -> Frame:
        """What the journal says of step t. Raises RunError outside ``steps``."""
        return self.journal.frame(self._require("step", t, self.end - 1))

    def rng(self, t: int) -> NDArray[np.uint64]:
        """(2, 4): both streams before step t drew from them."""
        return self.frame(t).rng

    @cached_property
    def data(self) -> Prepared:
        """The data of the run, from the files it was trained on. Raises RunError if they are others, and DataError."""
        data = prepare_data(self.config)
        if data.manifest_hash != self.manifest["data_manifest_hash"]:
            raise RunError(
                f"{self.config.data.train_path}: expected the data that {self.path} was trained on "
                f"(data_manifest_hash {self.manifest['data_manifest_hash'][:12]}…), got others "
                f"({data.manifest_hash[:12]}…); restore them, or go to the folder from which the run was started"
            )
        return data

    def batch(self, t: int) -> RecordedBatch:
        """What step t read. Raises RunError where the data do not give the tokens that were recorded."""
        frame, training = self.frame(t), self.config.training
        train, tokenizer = self.data.train, self.data.tokenizer
        if frame.rows.max() >= len(train):
            raise RunError(f"{self.path}: expected samples 0 to {len(train) - 1} in step {t}, got {frame.rows.max()}")
        batches = TrainBatches(train, training.batch_size, training.data_seed, self.config.data.batching)
        batch = batches.take(frame.rows)
        if self.config.injections:
            batch = Injector(self.config, batches.batch_at, lambda: tokenizer).inject("batch", t, batch)
        if batch_digest(batch) != frame.batch_digest and frame.rows.min() < 0:
            raise RunError(f"step {t}: expected samples of the training split, got others that are not recorded")
        if batch_digest(batch) != frame.batch_digest:
            raise RunError(
                f"{self.path}: expected the tokens of step {t} with digest {frame.batch_digest:016x}, got "
                f"{batch_digest(batch):016x} from {self.config.data.train_path}; restore the data"
            )
        texts = tuple("" if row < 0 else train.texts[row] for row in frame.rows)
        return RecordedBatch(frame.rows, batch.ids, texts, frame.batch_digest, batch)

    @property
    def scalars(self) -> Scalars:
        """Loss, learning rate and norms of every step."""
        return Scalars(self.journal)

    # States

    def digests(self, t: int) -> NDArray[np.uint64]:
        """(3, N) of state t as it was left, or of the first state as it was read."""
        self._require("state", t, self.end)
        if not self.steps:
            raise RunError(f"{self.path}: expected at least one recorded step, got none")
        return self.frame(t - 1).digest_out if t > self.start else self.frame(t).digest_in

    def moments(self, t: int) -> Moments:
        """m and v of state t, checked. Raises RunError where they are not recorded, or damaged."""
        self._require("state", t, self.end)
        m, v = self._tensors(), self._tensors()
        row = t - 1 - self.start
        if row >= 0 and self.config.record.moments == "every_step":
            for kind, tensors in ((1, m), (2, v)):
                spec = self.layout.arrays[KINDS[kind]]
                tensors.flat[:] = read_row(self.folder.record, spec, row)
                self.require_digests(t, kind, tensors.flat, f"row {row} of {self.folder.record / spec.name}")
        elif t:
            self._read_keyframe(t, {1: m, 2: v})
        return Moments(m, v)

    def params(self, t: int) -> Tensors:
        """Parameters of state t, checked: a keyframe, or what follows from one and the recorded moments.

        Raises RunError where neither is recorded, or what follows has another digest than was recorded.
        """
        self._require("state", t, self.end)
        start = max((k for k in self.keyframes if k <= t), default=None)
        if start is None or (start != t and self.config.record.moments != "every_step"):
            raise self._not_recorded(t)
        params = self._tensors()
        self._read_keyframe(start, {0: params})
        if start < t:
            following = Recurrence(self.config.optimizer, params, make_backend(self.config.training.backend))
            injector = Injector(self.config)
            for s in range(start, t):
                moments = self.moments(s + 1)
                settings = injector.inject("optimizer", s, self.config.optimizer)
                following(moments.m.flat, moments.v.flat, self.frame(s).lr, s + 1, settings)
                self._inject(injector, State(s + 1, params, moments.m, moments.v))
                self.require_digests(s + 1, 0, params.flat, f"state {s + 1}, which follows from keyframe {start}")
        return params

    def _inject(self, injector: Injector, state: State) -> None:
        """Do to the parameters what was injected. Raises RunError where m or v were changed, which the update used."""
        caused = injector.at("state", state.step - 1)
        if other := [one for one in caused if kind_of(one) != "param"]:
            raise RunError(
                f"state {state.step}: expected moments from which its parameters follow, got some changed by "
                f"{spelt(other[0])}; minitrain.replay.Replay(run).at({state.step}) runs the step again"
            )
        injector.inject("state", state.step - 1, state)

    def state(self, t: int) -> State:
        """State t, in buffers of its own."""
        moments = self.moments(t)
        return State(t, self.params(t), moments.m, moments.v)

    def keyframe(self, t: int) -> State:
        """State t from the keyframe there. Raises RunError where there is none, or it is damaged."""
        params, m, v = self._tensors(), self._tensors(), self._tensors()
        self._read_keyframe(t, {0: params, 1: m, 2: v})
        return State(t, params, m, v)

    def _read_keyframe(self, t: int, wanted: Mapping[int, Tensors]) -> None:
        if t not in self.keyframes:
            raise self._not_recorded(t)
        number = self.layout.keyframes.index(t)
        for kind, tensors in wanted.items():
            spec = self.layout.arrays[f"keyframe_{KINDS[kind]}"]
            tensors.flat[:] = read_chunk(self.folder.record, spec, number, 1)[0]
            if self.steps:
                self.require_digests(t, kind, tensors.flat, f"keyframe {t} in {self.folder.record / spec.name}")

    def _not_recorded(self, t: int) -> RunError:
        return RunError(
            f"state {t}: expected a keyframe (there are {', '.join(map(str, self.keyframes))}) or record.moments: "
            f"every_step, got {self.config.record.moments}; minitrain.replay.Replay(run).at({t}) runs the steps again"
        )

    def require_digests(self, t: int, kind: int, flat: NDArray[np.float32], where: str) -> None:
        """Raises RunError unless this (P,) is what was recorded of state t: parameters (kind 0), m (1) or v (2)."""
        recorded = self.digests(t)[kind]
        bounds = self._offsets
        for p, start, end, expected in zip(self._table, bounds[:-1], bounds[1:], recorded, strict=True):
            if not has_digest(flat[start:end], int(expected)):
                found = tensor_digest(flat[start:end])
                raise RunError(
                    f"{where}: expected {KINDS[kind]}.{p.name} with digest {int(expected):016x}, got {found:016x}; "
                    f"minitrain verify {self.path} tells what is wrong"
                )

    def _tensors(self) -> Tensors:
        return Tensors(self._table)

    @cached_property
    def _table(self) -> list[Parameter]:
        return parameter_table(self.config.model)

    @cached_property
    def _offsets(self) -> list[int]:
        return [int(x) for x in Tensors(self._table).offsets]
