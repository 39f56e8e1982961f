"""The recorder: a listener of the training loop that writes down what every step read and left.

On the loop's own thread it only looks: digests, and a copy of the moments. Packing and writing are done by a thread of
its own. What it was told is on disk, in order, once `settle` returns.
"""

from __future__ import annotations

import math
import shutil
import threading
from collections.abc import Callable
from functools import partial
from queue import Queue
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from minitrain.assembly import Parts
from minitrain.config import Config
from minitrain.data.batches import Batch
from minitrain.errors import RunError
from minitrain.loop import Listener, StepStats
from minitrain.record.digests import KINDS, batch_digest, groups, rng_words, state_digests, tensor_digest
from minitrain.record.journal import FORMAT_VERSION, canonical
from minitrain.record.layout import Layout, layout_of
from minitrain.record.writer import Flats, RecordWriter
from minitrain.run_folder import RunFolder
from minitrain.state import State

QUEUE_BYTES = 64 << 20
"""How far the writing thread may fall behind; at least two steps."""


def require_room(folder: RunFolder, layout: Layout) -> int:
    """The bytes that the disk has for the record, those it takes already among them.

    Raises RunError if they are too few.
    """
    place = next(p for p in (folder.path, *folder.path.absolute().parents) if p.exists())
    there = sum(path.stat().st_size for path in folder.record.rglob("*"))
    free = shutil.disk_usage(place).free + there
    if layout.disk_bytes > free:
        raise RunError(
            f"record: expected {layout.disk_bytes / 1e9:,.2f} GB of free disk at {place} for {layout.steps} steps, got "
            f"{free / 1e9:,.2f} GB; make room, choose another --out-dir, or set record.moments=keyframes "
            "(or record.enabled=false)"
        )
    return free


class Recorder(Listener):
    """Writes ``journal.msgpack``, ``record.zarr`` and ``incidents/`` of a run."""

    def __init__(self, folder: RunFolder, config: Config, parts: Parts, fingerprint: dict[str, Any]) -> None:
        """Begin at the parts' current step: a new record at 0, else the one that stands there, cut to that step.

        ``fingerprint`` is what must be the same for a replay to promise the same bits. Raises RunError if the record
        does not reach the current step, and OSError.
        """
        self.alerts: list[str] = []
        self._folder, self._config, self._parts = folder, config, parts
        self._layout = layout_of(config)
        self._keyframe = {state: number for number, state in enumerate(self._layout.keyframes)}
        state = parts.state()
        header = {
            "format_version": FORMAT_VERSION,
            **fingerprint,
            "steps": self._layout.steps,
            "record": config.record.model_dump(exclude={"on_error"}),
            **self._layout.attributes,
        }
        self._writer = RecordWriter(folder, self._layout, header, state.step)
        self._out = self._writer.digest_out
        self._raw: list[int] = []
        self._tensors = [tensor.data for group in groups(state) for tensor in group.values()]
        if not state.step:
            self._writer.keyframe(0, _flats(state))
        self._step: dict[str, Any] = {}
        self._heard: list[int] = []
        self._finite = True
        self._error: Exception | None = None
        self._off = False
        self._handles = [parts.hooks.listen(self._clipped, "clip")]
        if self._layout.S:
            self._handles.append(parts.hooks.listen(self._hear))
        row = sum(spec.row_bytes for spec in self._layout.of("rows"))
        self._jobs: Queue[Callable[[], None] | None] = Queue(max(2, min(256, QUEUE_BYTES // (row + 1))))
        self._thread = threading.Thread(target=self._work, name="recorder", daemon=True)
        self._thread.start()

    # Told by the loop, on its thread

    def starting(self, step: int, batch: Batch, state: State) -> None:
        """Raises RunError where an earlier step could not be written."""
        self._require_no_error()
        if self._off:
            return
        digest_in = None
        if self._hash() != self._raw:  # the first step, NaNs, or memory that has changed since the last step
            now = state_digests(state)
            if step == 0:
                self._out = digest_in = now
            elif not np.array_equal(now, self._out):
                digest_in = now
                self._memory_changed(state, now)
        self._step = {
            "step": step,
            "rows": batch.rows.tobytes(),
            "batch_digest": batch_digest(batch),
            "rng": rng_words(self._config, self._parts.batches, step).tobytes(),
            "digest_in": None if digest_in is None else digest_in.tobytes(),
        }
        self._heard.clear()

    def _memory_changed(self, state: State, now: NDArray[np.uint64]) -> None:
        """State t is not what step t-1 left: say so, and keep it, before it is used."""
        names = list(state.params)
        changed = [f"{KINDS[kind]}.{names[n]}" for kind, n in np.argwhere(now != self._out)]
        self.alerts.append(f"memory changed before step {state.step}: {', '.join(changed)}")
        event = {"event": "memory_changed", "step": state.step, "tensors": changed}
        self._jobs.put(partial(self._writer.event, event))
        self._save_incident("memory_changed", state, {})

    def _clipped(self, site: str, grads: NDArray[np.float32]) -> None:
        """Between the norm and the update, the last moment at which parameters and moments are as they were read."""
        model = self._parts.model
        finite = math.isfinite(self._parts.optimizer.norms.before) and math.isfinite(model.loss_sum[0])
        if self._finite and not finite and not self._off:
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
        nan = math.isnan(state.params.flat.max())  # max keeps NaN; one in a moment is one in its parameter
        self._out = state_digests(state) if nan else np.array(self._raw, np.uint64).reshape(3, -1)
        body = {
            **self._step,
            "loss": canonical(stats.loss),
            "lr": stats.lr,
            "grad_norm": canonical(stats.grad_norm),
            "grad_norm_clipped": canonical(stats.grad_norm_clipped),
            "loss_scale": 1.0,
            "tokens": stats.tokens,
            "digest_out": self._out.tobytes(),
        }
        if self._layout.S:
            body["sites"] = np.array(self._heard, np.uint64).tobytes()
        moments = (state.m.flat.tobytes(), state.v.flat.tobytes()) if self._layout.moments else ()
        if state.step in self._keyframe:
            copies = tuple(flat.copy() for flat in _flats(state))
            self._jobs.put(partial(self._writer.keyframe, self._keyframe[state.step], copies))
        self._jobs.put(partial(self._commit, body, moments))

    def _hash(self) -> list[int]:
        """xxh3-64 of the raw bits of every tensor."""
        return [xxhash.xxh3_64_intdigest(tensor) for tensor in self._tensors]

    def settle(self) -> None:
        """Wait until everything told so far is on disk. Raises RunError where that failed."""
        self._jobs.join()
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
        self._jobs.put(None)
        self._thread.join()
        try:
            self._writer.close()
            state = self._parts.state()
            if stopped and state.step < self._layout.steps and not self._error:
                self._writer.shorten(layout_of(self._config, state.step), _flats(state))
        except OSError as error:
            self._error = self._error or error
        self._require_no_error()

    # The writing thread

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                if self._error is None:
                    job()
            except Exception as error:  # told on the loop's thread
                self._error = error
            finally:
                self._jobs.task_done()

    def _commit(self, body: dict[str, Any], moments: tuple[bytes, ...]) -> None:
        if not self._writer.step(body, moments):
            self.alerts.append(
                f"step {body['step']} has other bits than it had before the run was resumed: trust neither"
            )


def _flats(state: State) -> Flats:
    return tuple(group.flat for group in groups(state))
