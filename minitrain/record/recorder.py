"""The recorder: a listener of the training loop that writes down what every step read and left.

On the loop's own thread it has the update leave a copy of the state, and the next one make sure that nothing has
changed meanwhile. A thread of its own does the rest: it takes the digests of the copy, packs and writes. What the
recorder was told is on disk, in order, once `settle` returns.
"""

from __future__ import annotations

import math
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minitrain.assembly import Parts
from minitrain.config import Config
from minitrain.data.batches import Batch
from minitrain.errors import RunError
from minitrain.inject import FAULTS, acts, event
from minitrain.loop import Listener, StepStats
from minitrain.record.arrays import Row
from minitrain.record.digests import batch_digest, groups, rng_words, state_digests, tensor_digest
from minitrain.record.journal import FORMAT_VERSION, canonical
from minitrain.record.layout import Layout, layout_of
from minitrain.record.writer import Flats, Packed, RecordWriter
from minitrain.run_folder import RunFolder
from minitrain.state import State, copied, copy_state
from minitrain.tensors import KINDS, Tensors, pages

BACKLOG_BYTES = 64 << 20
"""How far the writer may fall behind; at least two steps, at most BACKLOG_STEPS."""
BACKLOG_STEPS = 256
TOLD_AT_ONCE, WRITTEN_AT_ONCE = 2, 4
"""Steps: waking a thread and writing to a disk have their price each time."""
PATIENCE_S = 0.01
"""How long a step waits for others. Where steps take longer, each is told and written as it comes."""


def require_room(folder: RunFolder, layout: Layout) -> tuple[int, int]:
    """The bytes that are free, and those that the record takes already.

    Raises RunError if they are too few.
    """
    place = next(p for p in (folder.path, *folder.path.absolute().parents) if p.exists())
    there = sum(path.stat().st_size for path in folder.record.rglob("*"))
    free = shutil.disk_usage(place).free
    room = free + there
    if layout.disk_bytes > room:
        raise RunError(
            f"record: expected {layout.disk_bytes / 1e9:,.2f} GB of free disk at {place} for {len(layout.steps)} "
            f"steps, got {room / 1e9:,.2f} GB; make room, choose another --out-dir, or set record.moments=keyframes "
            "(or record.enabled=false)"
        )
    return free, there


@dataclass(slots=True)
class _Step:
    """What the thread is told of a step."""

    batch: Batch
    events: list[dict[str, Any]]
    digest_in: NDArray[np.uint64] | None
    stats: StepStats
    heard: list[int]
    before: _Copy | None
    """Of the state that it read; not needed any more."""
    left: _Copy
    finite: bool
    """Known to be; else it may be."""
    packed: Packed | None = None


class _Copy:
    """Room for a copy of the state that a step has left; m and v in rows, if they are recorded."""

    def __init__(self, like: State, layout: Layout) -> None:
        specs, table = layout.of("rows"), like.params.table
        ends = [0, *accumulate(spec.stride for spec in specs)]
        memory = pages(ends[-1] + like.params.flat.nbytes)
        self.rows = [Row(spec, memory[a:b]) for spec, a, b in zip(specs, ends, ends[1:], strict=False)]
        m, v = (row.values for row in self.rows) if self.rows else (None, None)
        params = np.frombuffer(memory, np.float32, layout.P, ends[-1])
        self.state = State(-1, Tensors(table, params), Tensors(table, m), Tensors(table, v))


class _Backlog:
    """The states on their way to the disk, in copies that are used again."""

    def __init__(self, like: State, layout: Layout) -> None:
        self.size = max(2, min(BACKLOG_STEPS, BACKLOG_BYTES // (12 * layout.P)))
        self._like, self._layout, self._made = like, layout, 0
        self._free: SimpleQueue[_Copy] = SimpleQueue()

    def take(self) -> _Copy:
        """One to write to, once there is one."""
        if self._made < self.size and self._free.empty():
            self._made += 1
            return _Copy(self._like, self._layout)
        return self._free.get()

    @property
    def crowded(self) -> bool:
        """The disk is slower than training. With room for a few only that cannot be told: then never."""
        return self.size >= 8 and self._made - self._free.qsize() > self.size // 2

    def free(self, copy: _Copy) -> None:
        """It is needed no more."""
        self._free.put(copy)


class Recorder(Listener):
    """Writes ``journal.msgpack``, ``record.zarr`` and ``incidents/`` of a run."""

    def __init__(
        self, folder: RunFolder, config: Config, parts: Parts, fingerprint: dict[str, Any], start: int = 0
    ) -> None:
        """Begin at the parts' current step: a new record at ``start``, else what stands there, cut to that step.

        ``fingerprint`` is what must be the same for a replay to promise the same bits. Raises RunError if the record
        does not reach the current step, and OSError.
        """
        self.alerts: list[str] = []
        self._folder, self._config, self._parts = folder, config, parts
        self._model, self._optimizer, self._injections = parts.model, parts.optimizer, config.injections
        self._layout = layout_of(config, start)
        self._keyframe = {state: number for number, state in enumerate(self._layout.keyframes)}
        state = parts.state()
        header = {
            "format_version": FORMAT_VERSION,
            **fingerprint,
            "start": start,
            "steps": self._layout.end,
            "record": config.record.model_dump(exclude={"on_error"}),
            **self._layout.attributes,
        }
        self._writer = RecordWriter(folder, self._layout, header, state.step)
        if state.step == start:
            self._writer.keyframe(0, _flats(state))
        self._left: _Copy | None = None
        """Of what the last step left; None before the first."""
        self._watched = False
        """The next update makes sure that the state is what the last step left; else its digests do."""
        self._batch: Batch
        self._copy: _Copy | None = None
        """Of what the running step will leave; kept for the next, if this one is given up."""
        self._events: list[dict[str, Any]] = []
        self._digest_in: NDArray[np.uint64] | None = None
        self._heard: list[int] = []
        self._finite = True
        self._error: Exception | None = None
        self._off = False
        self._handles = [parts.hooks.listen(self._clipped, "clip")]
        if self._layout.S:
            self._handles.append(parts.hooks.listen(self._hear))
        self._backlog = _Backlog(state, self._layout)
        self._steps: list[_Step] = []
        """What the thread is to be told of next."""
        self._since = time.monotonic()
        """When it was told last."""
        roomy = self._backlog.size > TOLD_AT_ONCE + WRITTEN_AT_ONCE
        self._told_at_once, self._written_at_once = (TOLD_AT_ONCE, WRITTEN_AT_ONCE) if roomy else (1, 1)
        self._told: SimpleQueue[list[_Step] | threading.Event | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="record", daemon=True)
        self._thread.start()

    # Told by the loop, on its thread

    def starting(self, step: int, batch: Batch, state: State) -> None:
        """Raises RunError where an earlier step could not be written."""
        if self._error is not None:
            self._require_no_error()
        self._batch, self._heard, self._events = batch, [], []

    def _digest_if_changed(self, state: State) -> NDArray[np.uint64] | None:
        """Digests of state t as the step reads it: at the first step, and where step t-1 left something else."""
        now = state_digests(state)
        if state.step != self._layout.start:
            before = state_digests(self._left.state) if self._left else self._writer.digest_out
            if np.array_equal(now, before):
                return None
            self._memory_changed(state, np.argwhere(now != before))
        return now

    def _memory_changed(self, state: State, tensors: NDArray[np.int64]) -> None:
        """State t is not what step t-1 left: say so, and keep it."""
        names = list(state.params)
        changed = [f"{KINDS[kind]}.{names[n]}" for kind, n in tensors]
        self.alerts.append(f"memory changed before step {state.step}: {', '.join(changed)}")
        self._events.insert(0, {"event": "memory_changed", "step": state.step, "tensors": changed})
        self._save_incident("memory_changed", state, {})

    def _clipped(self, site: str, grads: NDArray[np.float32]) -> None:
        """Between the norm and the update. The state is as it was read; the update makes sure of that."""
        if self._off:
            return
        optimizer = self._optimizer
        finite = math.isfinite(optimizer.norms.before) and math.isfinite(self._model.loss_sum[0])
        broken = self._finite and not finite
        watched = self._watched and not broken  # what has changed is told before the incident of this step is kept
        optimizer.changed = self._changed if watched else None
        self._digest_in = None if watched else self._digest_if_changed(self._parts.state())
        self._watched = False  # until the step is through
        if self._injections:
            self._events += [event(one) for one in self._injections if one.step == self._model.step]
        if self._copy is None:
            self._copy = self._backlog.take()
        optimizer.copy_to = self._copy.state
        if broken:
            model = self._model
            self._save_incident(
                "nonfinite",
                self._parts.state(),
                {**{f"grad.{name}": grad for name, grad in model.grads.items()}, **model.activations()},
            )

    def _changed(self, parts: list[slice]) -> None:
        """By the update, which has left these parts alone: elsewhere state t is what step t-1 left."""
        assert self._left
        state, now = copied(self._left.state), self._parts.state()
        for part in parts:
            copy_state(now, state, part)
        self._digest_in = self._digest_if_changed(replace(state, step=now.step))

    def _save_incident(self, reason: str, state: State, evidence: dict[str, NDArray[Any]]) -> None:
        tensors = {f"{kind}.{name}": t for kind, g in zip(KINDS, groups(state), strict=True) for name, t in g.items()}
        try:
            self._writer.incident(state.step, reason, tensors | evidence)
        except OSError as error:
            self._error = self._error or error

    def _hear(self, site: str, tensor: NDArray[Any]) -> None:
        if len(self._heard) < self._layout.S:  # m, v and parameters come last: they are in digest_out
            self._heard.append(tensor_digest(tensor))

    def stepped(self, stats: StepStats, state: State) -> None:
        if self._off or self._copy is None:
            return
        self._finite = stats.finite
        left, self._copy = self._copy, None
        finite, self._watched = self._optimizer.copied_finite, True
        if any(acts(one, stats.step) and FAULTS[one.name].point == "state" for one in self._injections):
            copy_state(state, left.state)
            finite, self._watched = False, False
        step = _Step(self._batch, self._events, self._digest_in, stats, self._heard, self._left, left, finite)
        self._left = left
        self._steps.append(step)
        if len(self._steps) >= self._told_at_once or time.monotonic() - self._since > PATIENCE_S:
            self._tell()

    def evaluated(self, batch: Batch) -> None:
        if self._steps:  # they are not to wait for a validation
            self._tell()

    def _tell(self) -> None:
        self._told.put(self._steps)
        self._steps, self._since = [], time.monotonic()

    def settle(self) -> None:
        """Wait until everything told so far is on disk. Raises RunError where that failed."""
        self._tell()
        done = threading.Event()
        self._told.put(done)
        done.wait()
        self._require_no_error()
        if not self._off:
            self._writer.sync()

    def _require_no_error(self) -> None:
        """Raises RunError, or gives the record up, as ``record.on_error`` says."""
        if self._error is None or self._off:
            return
        if not isinstance(self._error, OSError):
            raise self._error
        what = f"{self._error.filename or self._folder.record}: {self._error.strerror or self._error}"
        if self._config.record.on_error == "stop":
            raise RunError(
                f"record: expected to write step {self._parts.scheduler.step_count}, got {what}; training has stopped, "
                "what was recorded before stands; make room, then minitrain train --resume --out-dir "
                f"{self._folder.path}"
            )
        self._off = True
        self.alerts.append(f"not recorded from step {self._parts.scheduler.step_count} on: {what}")

    def close(self) -> None:
        """Write what is left. A run that ended before its last step gets arrays of its true length.

        Raises RunError where something could not be written.
        """
        stopped = not self._finite and self._config.training.on_nonfinite == "stop"
        for handle in self._handles:
            handle.remove()
        self._optimizer.stop_copying()
        self._tell()
        self._told.put(None)
        self._thread.join()
        try:
            self._writer.close()
            state = self._parts.state()
            if stopped and state.step < self._layout.end and not self._error:
                self._writer.shorten(replace(self._layout, end=state.step), _flats(state))
        except OSError as error:
            self._error = self._error or error
        self._require_no_error()

    # The thread

    def _work(self) -> None:
        """Pack steps as they come, and write them a few at a time."""
        waiting: list[_Step] = []
        while True:
            try:
                told = self._told.get(timeout=PATIENCE_S if waiting else None)
            except Empty:
                told = threading.Event()
            if isinstance(told, list):
                waiting += told
                for step in told:
                    self._attempt(self._pack, step)
                if len(waiting) < self._written_at_once:
                    continue
            self._attempt(self._write, waiting)
            for step in waiting:
                if step.before:
                    self._backlog.free(step.before)
            waiting.clear()
            if told is None:
                return
            if isinstance(told, threading.Event):
                told.set()

    def _attempt(self, do: Callable[[Any], None], what: Any) -> None:
        """Nothing more is done behind an error, which is told on the loop's thread."""
        try:
            if self._error is None:
                do(what)
        except Exception as error:
            self._error = error

    def _pack(self, step: _Step) -> None:
        stats, digest_in = step.stats, step.digest_in
        body = {
            "step": stats.step,
            "rows": step.batch.rows.tobytes(),
            "batch_digest": batch_digest(step.batch),
            "rng": rng_words(self._config, self._parts.batches, stats.step).tobytes(),
            "digest_in": None if digest_in is None else digest_in.tobytes(),
            "loss": canonical(stats.loss),
            "lr": stats.lr,
            "grad_norm": canonical(stats.grad_norm),
            "grad_norm_clipped": canonical(stats.grad_norm_clipped),
            "loss_scale": 1.0,
            "tokens": stats.tokens,
            "digest_out": state_digests(step.left.state, step.finite).tobytes(),
            **({"sites": np.array(step.heard, np.uint64).tobytes()} if self._layout.S else {}),
        }
        for row in step.left.rows:
            row.seal()
        step.packed = Packed(step.events, body, step.left.rows)

    def _write(self, steps: list[_Step]) -> None:
        for step in steps:
            if (state := step.stats.step + 1) in self._keyframe:
                self._writer.keyframe(self._keyframe[state], _flats(step.left.state))
        hurry = self._backlog.crowded
        for other in self._writer.steps([step.packed for step in steps if step.packed], hurry):
            self.alerts.append(f"step {other} has other bits than it had before the run was resumed: trust neither")


def _flats(state: State) -> Flats:
    return tuple(group.flat for group in groups(state))
