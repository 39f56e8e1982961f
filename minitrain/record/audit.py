"""Everything that stands in a record, read once and held against the journal: the disk's part of `minitrain verify`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from minitrain.errors import RunError
from minitrain.record.arrays import blocks, check_index, read_chunk, read_row, rows_in, shard_paths, shards
from minitrain.record.layout import BLOCK, SHARD
from minitrain.record.recorded import Run
from minitrain.record.writer import block_row
from minitrain.tensors import KINDS


class Damage(NamedTuple):
    """Something that is not as it was written."""

    step: int
    """The first step that it is about; for a keyframe, the state."""
    array: str
    message: str


def audit(run: Run) -> Iterator[Damage | int]:
    """Each damage found; and, for those who show how far it is, the number of steps whose files have been read."""
    yield from _once(run)
    for t in run.keyframes:
        try:
            run.keyframe(t)
        except RunError as error:
            yield Damage(t, "keyframe", str(error))
    yield from _missing_keyframes(run)
    for number, rows in blocks(len(run.steps), BLOCK):
        yield from _block(run, number, rows)
    for number, rows in blocks(len(run.steps), SHARD):
        for spec in run.layout.of("rows"):
            yield from _shard(run, spec.name, number, rows)
        yield number * SHARD + rows


def _once(run: Run) -> Iterator[Damage]:
    for name, expected in (("step", np.array(run.layout.steps)), ("keyframe_step", np.array(run.layout.keyframes))):
        try:
            found = read_chunk(run.folder.record, run.layout.arrays[name], 0, len(expected))
        except RunError as error:
            yield Damage(0, name, str(error))
            continue
        if not np.array_equal(found, expected):
            yield Damage(0, name, f"{run.folder.record / name}: expected {expected}, got {found}")


def _missing_keyframes(run: Run) -> Iterator[Damage]:
    there = set(run.keyframes)
    for t in run.layout.keyframes:
        if t <= run.end and t not in there:
            yield Damage(t, "keyframe", f"{run.folder.record}: expected a keyframe of state {t}, got none")


def _block(run: Run, number: int, rows: int) -> Iterator[Damage]:
    """The arrays in blocks say what the journal says. The last block of a run at work may not be there yet."""
    last = (number + 1) * BLOCK >= len(run.steps)
    for spec in run.layout.of("blocks"):
        there = any(n == number for n, _ in shards(run.folder.record, spec))
        if last and not there and run.ended == "unfinished":
            continue
        try:
            found = read_chunk(run.folder.record, spec, number, BLOCK)[:rows]
        except RunError as error:
            yield Damage(run.start + number * BLOCK, spec.name, str(error))
            continue
        for i, row in enumerate(found):
            step = run.start + number * BLOCK + i
            expected = np.asarray(block_row(run.journal, step)[spec.name], spec.dtype)
            if row.tobytes() != expected.tobytes():
                yield Damage(
                    step,
                    spec.name,
                    f"{run.folder.record / spec.name}, row {step - run.start}: expected {expected}, as the journal "
                    f"says, got {row}",
                )
                break


def _shard(run: Run, name: str, number: int, rows: int) -> Iterator[Damage]:
    """Every row has its checksum and the digests of its tensors, and the index says where the rows are."""
    spec = run.layout.arrays[name]
    for i in range(rows):
        n = number * SHARD + i
        step = run.start + n
        try:
            row = read_row(run.folder.record, spec, n)
            run.require_digests(step + 1, KINDS.index(name), row, f"row {n} of {run.folder.record / name}")
        except RunError as error:
            yield Damage(step, name, str(error))
    closed, opened = shard_paths(run.folder.record, spec, number)
    if closed.exists() or run.ended != "unfinished" or (number + 1) * SHARD < len(run.steps):
        if run.ended == "unfinished" and rows_in(closed, spec) == SHARD:
            rows = SHARD  # killed between the rows that filled the shard and their frames
        try:
            check_index(run.folder.record, spec, number, rows)
        except RunError as error:
            yield Damage(run.start + number * SHARD, name, str(error))
