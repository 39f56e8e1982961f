"""``minitrain verify``"""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from minitrain.terminal import bar_wanted, json_option, quiet_option, steps_bar

if TYPE_CHECKING:
    from minitrain.record.recorded import Run
    from minitrain.replay.recurrence import RecurrenceReport
    from minitrain.replay.segments import Verification

SHOWN = 20
"""Faults that are told one by one; ``--json`` has all."""


@click.command("verify", short_help="Replay every step of a run and hold it against its record.")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--audit", is_flag=True, help="Every step on its own, so that all faults are found; and the recurrence.")
@click.option("--recurrence-only", is_flag=True, help="Only whether m, v and parameters follow: no model, no data.")
@click.option("--no-injection", is_flag=True, help="Without the injections of the record: they are faults then.")
@click.option("--blind", is_flag=True, help="Do not even read what the record says of injections.")
@click.option("--workers", type=click.IntRange(1, 256), help="Segments at a time [default: the processors there are].")
@json_option
@quiet_option
def command(
    run: Path,
    audit: bool,
    recurrence_only: bool,
    no_injection: bool,
    blind: bool,
    workers: int | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Replay every step of RUN, segment by segment from the keyframes, and read all that is recorded.

    A fault is a step that replays to other bits, memory that changed between steps, or a damaged file. Behind a fault,
    steps are unverified up to the next keyframe; --audit goes on from the recorded state instead. It needs
    record.moments: every_step, else it can only do the same.

    The recurrence says of each recorded m', v' whether any gradient leads there from m and v, and whether the
    parameters are what AdamW makes of them. So it sees moments and parameters that something else has changed, to the
    last bit where roundings leave no doubt; it cannot see a gradient that is itself wrong (scaled, or of another
    batch), for its m and v agree. Those only the replay sees.

    \b
    minitrain verify runs/a
    minitrain verify runs/a --audit --blind
    minitrain verify runs/a --recurrence-only --json
    """
    from minitrain.record.recorded import open_run
    from minitrain.replay.segments import recurrence, verify, work_of

    if audit and recurrence_only:
        raise click.UsageError("--recurrence-only: expected it without --audit, which checks the recurrence too")
    started, recorded, injections = time.perf_counter(), open_run(run, blind=blind), not no_injection
    if recurrence_only:
        with steps_bar(bar_wanted(quiet, as_json), len(recorded.steps), "recurrence") as show:
            report = recurrence(recorded, workers=workers, injections=injections, show=show)
        told, verified = {**recurrence_only_json(report)}, report.verified
        lines = [*recurrence_lines(recorded, report)]
    else:
        with steps_bar(bar_wanted(quiet, as_json), work_of(recorded, audit), "verify") as show:
            found = verify(recorded, workers=workers, audit=audit, injections=injections, show=show)
        told, verified = verify_json(found), found.verified
        lines = verify_lines(recorded, found)
    lines.append(f"{injections_text(recorded, no_injection, blind)}({time.perf_counter() - started:.1f} s)")
    click.echo(json.dumps(told, allow_nan=False) if as_json else "\n".join(lines))
    sys.exit(int(not verified))


def injections_text(run: Run, left_out: bool, blind: bool) -> str:
    """How injections were taken; "" where there is nothing to say."""
    if blind:
        return "blind: what the record says of injections was not read "
    if not run.config.injections:
        return ""
    from minitrain.inject import spelt

    told = "; ".join(spelt(one) for one in run.config.injections)
    return f"{'without' if left_out else 'with'} the injections of the record: {told} "


def verify_json(found: Verification) -> dict[str, Any]:
    """The stable keys of ``verify --json``."""
    return {
        "verified": found.verified,
        "steps_checked": found.steps_checked,
        "faulty_steps": [fault._asdict() for fault in found.faults],
        "unverified_steps": found.unverified,
        **({"first_state": found.first._asdict()} if found.first else {}),
        **({"recurrence": recurrence_json(found.recurrence)} if found.recurrence else {}),
    }


def recurrence_only_json(report: RecurrenceReport) -> dict[str, Any]:
    """The same keys, where nothing was replayed."""
    told = recurrence_json(report)
    faulty = [{key: fault[key] for key in ("step", "kind", "tensor", "message")} for fault in told["faults"]]
    return {
        "verified": report.verified,
        "steps_checked": report.steps_checked,
        "faulty_steps": [f for f, fault in zip(faulty, report.faults, strict=True) if fault.declared is None],
        "unverified_steps": sorted({*report.unverified, *report.unverified_params}),
        "recurrence": told,
    }


def recurrence_json(report: RecurrenceReport) -> dict[str, Any]:
    def number(value: Any) -> Any:
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return {
        "steps_checked": report.steps_checked,
        "faults": [{key: number(x) for key, x in fault._asdict().items()} for fault in report.faults],
        "unverified_steps": report.unverified,
        "unverified_params": report.unverified_params,
        "reason": report.reason,
    }


def verify_lines(run: Run, found: Verification) -> list[str]:
    """What a person reads at the end."""
    recurred = recurrence_lines(run, found.recurrence) if found.recurrence else []
    if found.verified:
        each = ", every one replayed" if found.recurrence else ""
        return [
            f"verified: {found.steps_checked} steps and {len(run.keyframes)} keyframes of {run.path} are bit for bit "
            f"as recorded{each}, and so is every file of the record",
            *([f"forked: {found.first.message}"] if found.first else []),
            *recurred,
        ]
    lines = _few([f"fault: {fault.message}" for fault in found.faults])
    if found.unverified:
        lines.append(f"unverified: {ranges(found.unverified)}")
        lines += _few([f"  {reason}" for reason in found.lost])
    lines.append(f"{found.steps_checked} steps checked, {len(found.faults)} faults")
    lines += recurred
    replayed = [fault.step for fault in found.faults if fault.step in run.steps]
    if replayed:
        lines.append(f"next: minitrain replay {run.path} --step {replayed[0]}")
    return lines


def recurrence_lines(run: Run, report: RecurrenceReport) -> list[str]:
    if report.reason:
        return [f"recurrence: not checked: {report.reason}"]
    faults = [(f"declared ({fault.declared})" if fault.declared else "fault", fault.message) for fault in report.faults]
    lines = _few([f"recurrence {what}: {message}" for what, message in faults])
    for what, steps in ("m and v", report.unverified), ("parameters", report.unverified_params):
        lines += [f"recurrence unverified: {what} of {ranges(steps)}"] if steps else []
    wrong = f"{len(report.wrong)} tensors do not follow" if report.wrong else "every tensor follows"
    lines.append(
        f"recurrence: m, v and parameters of {report.steps_checked} steps held against those before them, {wrong} (it "
        "cannot see a gradient that is wrong in itself; the replay can)"
    )
    return lines


def _few(lines: list[str]) -> list[str]:
    more = [f"... and {len(lines) - SHOWN} more (--json has all)"] if len(lines) > SHOWN else []
    return lines[:SHOWN] + more


def ranges(steps: list[int]) -> str:
    """``steps 3 to 7, 12`` for [3, 4, 5, 6, 7, 12]."""
    runs: list[list[int]] = []
    for step in steps:
        if runs and step == runs[-1][1] + 1:
            runs[-1][1] = step
        else:
            runs.append([step, step])
    return "steps " + ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in runs)
