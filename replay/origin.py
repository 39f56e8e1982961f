"""Where a forked run came from: a state of its parent, and whether it is that state still."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minitrain.errors import RunError
from minitrain.record.digests import state_digests
from minitrain.record.recorded import Run, open_run
from minitrain.replay.replayer import Replay
from minitrain.replay.source import RecordedRun
from minitrain.state import State


class FirstState(NamedTuple):
    """What is known of the state with which a forked run began."""

    held: bool
    """Whether the parent was at hand and has it so; else it is trusted as far as the manifest's digest is."""
    fault: bool
    message: str


def require_state(run: Run, t: int) -> None:
    """Raises RunError unless ``run`` has recorded state t."""
    if not (run.steps and run.start <= t <= run.end):
        there = f"{run.start} to {run.end}" if run.steps else "none"
        raise RunError(
            f"--step {t}: expected one of the states {there}, which {run.path} has recorded, got {t}{run.before(t)}"
        )


def recorded_state(run: Run, t: int) -> State:
    """State t as step t read it, or where there is no such step as the last one left it; in buffers of its own.

    It comes from the record, or from steps run again. Raises RunError outside the recorded states, and where neither
    gives back what was recorded.
    """
    require_state(run, t)
    source = RecordedRun(run)
    try:
        state = source.as_read(t)
    except RunError:  # not recorded whole, or damaged
        state = Replay(run).reach(t)
    read = run.frame(t).digest_in if t in run.steps else run.digests(t)
    if not np.array_equal(state_digests(state), read):
        raise RunError(
            f"{run.path}: expected state {t} as step {t} read it, got only what the step before had left: memory "
            f"changed in between, and {run.folder.incident(t)} does not say how; take an earlier state"
        )
    return state


def parent_of(run: Run, state: State) -> dict[str, Any]:
    """What the manifest of a run that begins with this state of ``run`` says of it."""
    return {
        "run": str(run.path),
        "step": state.step,
        "config_hash": run.manifest["config_hash"],
        "digest": state.digest(),
        "chain": run.journal.end_of(state.step)[1].hex(),
    }


def first_state(run: Run) -> FirstState:
    """Hold the first state of a forked run against its manifest, and against its parent where that is at hand."""
    told, t = run.parent or {}, run.start
    name = f"state {t} of {told.get('run')}"
    try:
        first = run.keyframe(t)
    except RunError as error:
        return FirstState(False, False, f"the first state cannot be read: {error}")
    if first.digest() != told.get("digest"):
        wrong = f"with digest {told.get('digest')}, as {run.folder.manifest} says, got {first.digest()}"
        return FirstState(False, True, f"keyframe {t}: expected {name} {wrong}")
    trusted = f"state {t} is taken as {run.folder.manifest} has it"
    try:
        parent = open_run(Path(str(told.get("run"))))
    except RunError as error:
        return FirstState(False, False, f"{trusted}: its parent is not at hand ({error})")
    if not parent.start <= t <= parent.end or parent.journal.end_of(t)[1].hex() != told.get("chain"):
        return FirstState(False, False, f"{trusted}: {parent.path} is another run by now")
    recorded = parent.frame(t).digest_in if t in parent.steps else parent.digests(t)
    if not np.array_equal(state_digests(first), recorded):
        return FirstState(False, True, f"keyframe {t}: expected {name}, got other bits than are recorded there")
    return FirstState(True, False, f"state {t} is that of {parent.path}")
