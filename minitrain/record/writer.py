"""Writes a record: steps, events, keyframes and incidents, in the order in which they become true.

A step is committed by its frame in the journal; its rows of m and v, and the keyframe that it completes, are written
before. Arrays in blocks follow when the block is full, or at the end: the journal says the same.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from msgpack import packb
from numpy.typing import NDArray
from safetensors.numpy import save

from minitrain.errors import RunError
from minitrain.files import write_atomic
from minitrain.record.arrays import BlockWriter, Row, RowWriter, create, shards, write_chunk
from minitrain.record.journal import Journal, JournalWriter, read_journal
from minitrain.record.layout import BLOCK, Layout
from minitrain.run_folder import RunFolder

Flats = tuple[NDArray[np.float32], ...]
"""Parameters, m and v, each (P,)."""


class Packed(NamedTuple):
    """A step as it is to be written."""

    events: Sequence[Mapping[str, Any]]
    """Before its frame: ``{"event": name, "step": t, ...}``"""
    body: Mapping[str, Any]
    rows: Sequence[Row]


class RecordWriter:
    """Begins a record, or goes on with one that is cut back to the steps before ``state``."""

    def __init__(self, folder: RunFolder, layout: Layout, header: Mapping[str, Any], state: int) -> None:
        """Raises RunError if the record that stands there does not reach ``state``, and OSError."""
        self._folder, self._layout = folder, layout
        self._before: dict[int, dict[str, Any]] = {}
        self._journal: JournalWriter
        self._committed = rows = state - layout.start
        if rows:
            journal = self._require_steps(state)
            self._before = {body["step"]: body for body in journal.steps[rows:]}
        elif folder.record.exists():
            shutil.rmtree(folder.record)
        self._drop_later(state)
        create(folder.record, layout)
        self._blocks = BlockWriter(folder.record, layout.of("blocks"), rows // BLOCK)
        self._rows = [RowWriter(folder.record, spec, rows) for spec in layout.of("rows")]
        if rows:
            for step in layout.steps[rows // BLOCK * BLOCK : rows]:
                self._blocks.append(block_row(journal, step))
            end, chain = journal.end_of(state)
            self._journal = JournalWriter(folder.journal, keep=end, chain=chain)
            self.digest_out = journal.frame(state - 1).digest_out
            """Of the last step, (3, N)."""
        else:
            self._journal = JournalWriter(folder.journal)
            self._journal.append(header)
            self.digest_out = np.zeros((3, layout.N), np.uint64)

    def _require_steps(self, state: int) -> Journal:
        journal = read_journal(self._folder.journal)
        if journal.end < state:
            raise RunError(
                f"{self._folder.journal}: expected every step before {state}, where the checkpoint stands, got only "
                f"those before {journal.end}; restore it, or {self._folder.begin_again()}"
            )
        return journal

    def _drop_later(self, state: int) -> None:
        """Keyframes and incidents of steps that will be done again, and what a kill left half written."""
        for path in self._folder.record.rglob(".*.partial"):
            path.unlink()
        for spec in self._layout.of("keyframes") if self._folder.record.exists() else ():
            for number, path in shards(self._folder.record, spec):
                if number >= len(self._layout.keyframes) or self._layout.keyframes[number] > state:
                    path.unlink()
        for path in self._folder.incident_files(state):
            path.unlink()

    def steps(self, told: Sequence[Packed], hurry: bool = False) -> list[int]:
        """Commit steps that follow each other; those that were recorded before with other bits. Raises OSError.

        In a ``hurry`` the rows go to the page cache: the disk is slower than training.
        """
        room = BLOCK - self._committed % BLOCK
        if len(told) > room:  # blocks that are full are written before the next frame is
            return self.steps(told[:room], hurry) + self.steps(told[room:], hurry)
        for rows, *of_steps in zip(self._rows, *(t.rows for t in told), strict=True):
            rows.append(of_steps, cached=hurry)
        chains = iter(self._journal.append(*(body for t in told for body in (*t.events, t.body))))
        for t in told:
            *_, chain = islice(chains, len(t.events) + 1)
            self._blocks.append(_as_row(t.body, self.digest_out, chain))
            self.digest_out = np.frombuffer(t.body["digest_out"], "<u8").reshape(3, -1)
            self._committed += 1
        again = [t.body for t in told if t.body["step"] in self._before]
        return [body["step"] for body in again if packb(body) != packb(self._before[body["step"]])]

    def keyframe(self, number: int, state: Flats) -> None:
        """Raises OSError."""
        for spec, flat in zip(self._layout.of("keyframes"), state, strict=True):
            write_chunk(self._folder.record, spec, number, flat[np.newaxis])

    def incident(self, step: int, reason: str, tensors: Mapping[str, NDArray[Any]]) -> None:
        """State ``step`` as it was read, and what else was in memory. Raises OSError."""
        self._folder.incidents.mkdir(exist_ok=True)
        about = json.dumps({"step": step, "reason": reason}, sort_keys=True)
        copies = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
        write_atomic(self._folder.incident(step), save(copies, {"minitrain": about}))

    def sync(self) -> None:
        self._journal.sync()

    def close(self) -> None:
        """Finish what is open, so that other programs see every step. Raises OSError."""
        self._journal.sync()
        self._journal.close()
        self._blocks.flush()
        for rows in self._rows:
            rows.cut(self._committed)  # a disk that was full may have taken some that were not committed
            rows.close()

    def shorten(self, shorter: Layout, last: Flats) -> None:
        """The run ended before its last step: arrays of the true length, and the last state. Raises OSError."""
        create(self._folder.record, shorter)
        self.keyframe(len(shorter.keyframes) - 1, last)


def _as_row(body: Mapping[str, Any], before: NDArray[np.uint64], chain: bytes) -> dict[str, Any]:
    """What a frame says, by the names of the arrays in blocks."""
    digest_in = before if body["digest_in"] is None else np.frombuffer(body["digest_in"], "<u8").reshape(3, -1)
    return {
        **body,
        "batch_ids": np.frombuffer(body["rows"], "<i8"),
        "rng": np.frombuffer(body["rng"], "<u8").reshape(2, 4),
        "digest_in": digest_in,
        "digest_out": np.frombuffer(body["digest_out"], "<u8").reshape(3, -1),
        "site_digest": np.frombuffer(body.get("sites", b""), "<u8"),
        "chain": np.frombuffer(chain, "<u8"),
    }


def block_row(journal: Journal, step: int) -> dict[str, Any]:
    """A committed step by the names of the arrays in blocks."""
    frame = journal.frame(step)
    return _as_row(journal.body(step), frame.digest_in, frame.chain)
