"""The recorder: a listener of the training loop that writes down what every step read and left.

On the loop's own thread it takes what will be gone with the next update: the digests of the state that a step has left,
and a copy of its moments. Two threads of its own do the rest. The reader takes the digests of what a step reads while
the step reads it, and has them ready before the update; the writer packs and writes. What the recorder was told is on
disk, in order, once `settle` returns.
"""

from __future__ import annotations

import math
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from queue import SimpleQueue
from typing import Any, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from minitrain.assembly import Parts
from minitrain.config import Config
from minitrain.data.batches import Batch
from minitrain.errors import RunError
from minitrain.inject import event
from minitrain.loop import Listener, StepStats
from minitrain.record.digests import batch_digest, groups, rng_words, state_digests, tensor_digest
from minitrain.record.journal import FORMAT_VERSION, canonical
from minitrain.record.layout import Layout, layout_of
from minitrain.record.writer import Flats, RecordWriter
from minitrain.run_folder import RunFolder
from minitrain.state import State
from minitrain.tensors import KINDS

BACKLOG_BYTES = 64 << 20
"""How far the writer may fall behind; at least two steps, at most BACKLOG_STEPS."""
BACKLOG_STEPS = 256


def require_room(folder: RunFolder, layout: Layout) -> int:
    """The bytes that the disk has for the record, those it takes already among them.

    Raises RunError if they are too few.
    """
    place = next(p for p in (folder.path, *folder.path.absolute().parents) if p.exists())
    there = sum(path.stat().st_size for path in folder.record.rglob("*"))
    free = shutil.disk_usage(place).free + there
    if layout.disk_bytes > free:
        raise RunError(
            f"record: expected {layout.disk_bytes / 1e9:,.2f} GB of free disk at {place} for {len(layout.steps)} "
            f"steps, got {free / 1e9:,.2f} GB; make room, choose another --out-dir, or set record.moments=keyframes "
            "(or record.enabled=false)"
        )
    return free


class _Read(NamedTuple):
    """What a step reads."""

    body: dict[str, Any]
    """Its part of the frame."""
    state: list[int]
    """xxh3-64 of the raw bits of every tensor."""


class _Backlog:
    """The steps on their way to the disk, each with buffers of its own for m and v, which are used again."""

    def __init__(self, steps: int, parameters: int, copies: int) -> None:
        self._room = threading.Semaphore(steps)
        self._free: list[tuple[NDArray[np.float32], ...]] = []
        self._shape = copies, parameters

    def copy(self, *flats: NDArray[np.float32]) -> tuple[NDArray[np.float32], ...]:
        """Copies of these, once there is room for one more step."""
        self._room.acquire()
        buffers = self._free.pop() if self._free else tuple(np.empty(self._shape, np.float32))
        for buffer, flat in zip(buffers, flats, strict=True):
            np.copyto(buffer, flat)
        return buffers

    def written(self, buffers: tuple[NDArray[np.float32], ...]) -> None:
        """They are free again."""
        self._free.append(buffers)
        self._room.release()


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
        self._out: NDArray[np.uint64] | list[int] = self._writer.digest_out
        """What the last step left: (3, N), or one after the other."""
        self._raw: list[int] = []
        self._tensors = [tensor.data for group in groups(state) for tensor in group.values()][::-1]
        if state.step == start:
            self._writer.keyframe(0, _flats(state))
        self._body: dict[str, Any] = {}
        self._heard: list[int] = []
        self._finite = True
        self._injected = False
        self._error: Exception | None = None
        self._off = False
        self._handles = [parts.hooks.listen(self._clipped, "clip")]
        if self._layout.S:
            self._handles.append(parts.hooks.listen(self._hear))
        rows = self._layout.of("rows")
        steps = max(2, min(BACKLOG_STEPS, BACKLOG_BYTES // (1 + sum(spec.row_bytes for spec in rows))))
        self._backlog = _Backlog(steps, self._layout.P, len(rows))
        self._jobs: SimpleQueue[tuple[Callable[[], None], bool] | None] = SimpleQueue()
        self._asked: SimpleQueue[tuple[int, Batch] | None] = SimpleQueue()
        self._answers: SimpleQueue[_Read | Exception] = SimpleQueue()
        self._reading = False
        self._threads = [threading.Thread(target=f, name=f.__name__, daemon=True) for f in (self._read, self._write)]
        for thread in self._threads:
            thread.start()

    # Told by the loop, on its thread

    def starting(self, step: int, batch: Batch, state: State) -> None:
        """Raises RunError where an earlier step could not be written."""
        self._require_no_error()
        if self._off:
            return
        if self._reading:  # the step before this was not finished
            self._answers.get()
        self._asked.put((step, batch))
        self._reading = True
        self._heard.clear()

    def _take_what_was_read(self, state: State) -> None:
        """Wait for the reader. State t is still what the step reads: parameters and moments change with the update."""
        read = self._answers.get()
        self._reading = False
        if isinstance(read, Exception):
            raise read
        digest_in, injected = None, [one for one in self._config.injections if one.step == state.step]
        self._injected = bool(injected)
        if read.state != self._raw:  # the first step, NaNs, or memory that has changed since the last step
            now = state_digests(state)
            if state.step == self._layout.start:
                digest_in = now
            elif not np.array_equal(now, before := np.array(self._out, np.uint64).reshape(3, -1)):
                digest_in = now
                self._memory_changed(state, np.argwhere(now != before))
        for one in injected:
            self._tell(partial(self._writer.event, event(one)))
        self._body = read.body | {"digest_in": None if digest_in is None else digest_in.tobytes()}

    def _memory_changed(self, state: State, tensors: NDArray[np.int64]) -> None:
        """State t is not what step t-1 left: say so, and keep it, before the update is made of it."""
        names = list(state.params)
        changed = [f"{KINDS[kind]}.{names[n]}" for kind, n in tensors]
        self.alerts.append(f"memory changed before step {state.step}: {', '.join(changed)}")
        body = {"event": "memory_changed", "step": state.step, "tensors": changed}
        self._tell(partial(self._writer.event, body))
        self._save_incident("memory_changed", state, {})

    def _clipped(self, site: str, grads: NDArray[np.float32]) -> None:
        """Between the norm and the update, the last moment at which parameters and moments are as they were read."""
        if self._off:
            return
        self._take_what_was_read(self._parts.state())
        model = self._parts.model
        finite = math.isfinite(self._parts.optimizer.norms.before) and math.isfinite(model.loss_sum[0])
        if self._finite and not finite:
            self._save_incident(
                "nonfinite",
                self._parts.state(),
                {**{f"grad.{name}": grad for name, grad in model.grads.items()}, **model.activations()},
            )

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
        if self._off:
            return
        self._finite = stats.finite
        self._raw = self._hash()
        # max keeps NaN; one in a moment is one in its parameter, unless it was put there
        nan = any(math.isnan(flat.max()) for flat in (_flats(state) if self._injected else (state.params.flat,)))
        self._out = state_digests(state) if nan else self._raw
        if state.step in self._keyframe:
            copies = tuple(flat.copy() for flat in _flats(state))
            self._tell(partial(self._writer.keyframe, self._keyframe[state.step], copies))
        moments = self._backlog.copy(*(_flats(state)[1:] if self._layout.moments else ()))
        self._tell(partial(self._commit, self._body, stats, self._out, tuple(self._heard), moments))
        self._tell(partial(self._backlog.written, moments), always=True)

    def _hash(self) -> list[int]:
        """xxh3-64 of the raw bits of every tensor. The parameters come last: they are looked at once more."""
        return [xxhash.xxh3_64_intdigest(tensor) for tensor in self._tensors][::-1]

    def settle(self) -> None:
        """Wait until everything told so far is on disk. Raises RunError where that failed."""
        done = threading.Event()
        self._tell(done.set, always=True)
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
        self._asked.put(None)
        self._jobs.put(None)
        for thread in self._threads:
            thread.join()
        try:
            self._writer.close()
            state = self._parts.state()
            if stopped and state.step < self._layout.end and not self._error:
                self._writer.shorten(replace(self._layout, end=state.step), _flats(state))
        except OSError as error:
            self._error = self._error or error
        self._require_no_error()

    # Threads

    def _read(self) -> None:
        while (asked := self._asked.get()) is not None:
            try:
                self._answers.put(_Read(self._read_body(*asked), self._hash()))
            except Exception as error:  # told on the loop's thread
                self._answers.put(error)

    def _read_body(self, step: int, batch: Batch) -> dict[str, Any]:
        return {
            "step": step,
            "rows": batch.rows.tobytes(),
            "batch_digest": batch_digest(batch),
            "rng": rng_words(self._config, self._parts.batches, step).tobytes(),
        }

    def _tell(self, job: Callable[[], None], always: bool = False) -> None:
        """A job for the writer, who does it even behind an error if it is to be done ``always``."""
        self._jobs.put((job, always))

    def _write(self) -> None:
        while (told := self._jobs.get()) is not None:
            job, always = told
            try:
                if always or self._error is None:
                    job()
            except Exception as error:  # told on the loop's thread
                self._error = error

    def _commit(
        self,
        body: dict[str, Any],
        stats: StepStats,
        digest_out: NDArray[np.uint64] | list[int],
        heard: tuple[int, ...],
        moments: tuple[NDArray[np.float32], ...],
    ) -> None:
        body |= {
            "loss": canonical(stats.loss),
            "lr": stats.lr,
            "grad_norm": canonical(stats.grad_norm),
            "grad_norm_clipped": canonical(stats.grad_norm_clipped),
            "loss_scale": 1.0,
            "tokens": stats.tokens,
            "digest_out": np.array(digest_out, np.uint64).tobytes(),
            **({"sites": np.array(heard, np.uint64).tobytes()} if self._layout.S else {}),
        }
        if not self._writer.step(body, moments):
            self.alerts.append(
                f"step {body['step']} has other bits than it had before the run was resumed: trust neither"
            )


def _flats(state: State) -> Flats:
    return tuple(group.flat for group in groups(state))
