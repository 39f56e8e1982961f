"""``minitrain verify``"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from minitrain.terminal import bar_wanted, json_option, quiet_option, steps_bar

if TYPE_CHECKING:
    from minitrain.record.recorded import Run
    from minitrain.replay.segments import Verification

SHOWN = 20
"""Faults that are told one by one; ``--json`` has all."""


@click.command("verify", short_help="Replay every step of a run and hold it against its record.")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--workers", type=click.IntRange(1, 256), help="Segments at a time [default: the processors there are].")
@click.option("--blind", is_flag=True, help="Do not read what the record says of injections: they are faults then.")
@json_option
@quiet_option
def command(run: Path, workers: int | None, blind: bool, as_json: bool, quiet: bool) -> None:
    """Replay every step of RUN, segment by segment from the keyframes, and read all that is recorded.

    A fault is a step that replays to other bits, memory that changed between steps, or a damaged file. Behind a fault,
    steps are unverified up to the next keyframe.

    \b
    minitrain verify runs/a
    minitrain verify runs/a --workers 1 --json
    """
    from minitrain.record.recorded import open_run
    from minitrain.replay.segments import verify, work_of

    started, recorded = time.perf_counter(), open_run(run, blind=blind)
    with steps_bar(bar_wanted(quiet, as_json), work_of(recorded), "verify") as show:
        found = verify(recorded, workers=workers, show=show)
    if as_json:
        click.echo(json.dumps(verify_json(found)))
    else:
        click.echo(verify_text(recorded, found, time.perf_counter() - started))
    sys.exit(int(not found.verified))


def verify_json(found: Verification) -> dict[str, Any]:
    """The stable keys of ``verify --json``."""
    return {
        "verified": found.verified,
        "steps_checked": found.steps_checked,
        "faulty_steps": [fault._asdict() for fault in found.faults],
        "unverified_steps": found.unverified,
        **({"first_state": found.first._asdict()} if found.first else {}),
    }


def verify_text(run: Run, found: Verification, seconds: float) -> str:
    """What a person reads at the end."""
    if found.verified:
        first = f"\nforked: {found.first.message}" if found.first else ""
        return (
            f"verified: {found.steps_checked} steps and {len(run.keyframes)} keyframes of {run.path} are bit for bit "
            f"as recorded, and so is every file of the record ({seconds:.1f} s)"
            f"{first}"
        )
    lines = [f"fault: {fault.message}" for fault in found.faults[:SHOWN]]
    if len(found.faults) > SHOWN:
        lines.append(f"... and {len(found.faults) - SHOWN} more (--json has all)")
    if found.unverified:
        lines.append(f"unverified: {ranges(found.unverified)}")
    lines.append(f"{found.steps_checked} steps checked, {len(found.faults)} faults ({seconds:.1f} s)")
    replayed = [fault.step for fault in found.faults if fault.step in run.steps]
    if replayed:
        lines.append(f"next: minitrain replay {run.path} --step {replayed[0]}")
    return "\n".join(lines)


def ranges(steps: list[int]) -> str:
    """``steps 3 to 7, 12`` for [3, 4, 5, 6, 7, 12]."""
    runs: list[list[int]] = []
    for step in steps:
        if runs and step == runs[-1][1] + 1:
            runs[-1][1] = step
        else:
            runs.append([step, step])
    return "steps " + ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in runs)
